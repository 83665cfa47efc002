"""One default command on seven streams, five seeds, beside all opponents; and with later labels.

python benchmarks/streams.py --data FOLDER                  # whatever is missing in docs/results/streams.jsonl
python benchmarks/streams.py --data FOLDER --delays         # docs/results/delays.jsonl
python benchmarks/streams.py --data FOLDER --again boosting # one opponent anew, in the records that have it
python benchmarks/streams.py --draw                         # docs/streams.md
python benchmarks/streams.py --ledger [--delays]            # lines of the ledger

FOLDER holds `streams` and `ett`, the layouts that `pliant.streams.named` reads. Needs river.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _ledger import DOCS, append

from pliant.core.run import Run
from pliant.recipes import drive, series

RESULTS = DOCS / "results"
ALL = (*series.STANDARD, "hoeffding-tree", "adaptive-forest")
CHEAP = ("majority", "no-change", "frozen", "hoeffding-tree")
STREAMS: dict[str, dict[str, Any]] = {
    "electricity": {"stream": "electricity", "data": "streams"},
    "weather": {"stream": "weather", "data": "streams"},
    "outdoor": {"stream": "outdoor", "data": "streams"},
    "ett": {"stream": "ett", "data": "ett"},
    "river:TrumpApproval": {"stream": "river:TrumpApproval"},
    "river:ImageSegments": {"stream": "river:ImageSegments"},
    "regimes 100k": {"stream": "regimes", "rows": 100_000},
    # The costly opponents would take hours; they are all there on the first 100,000 rows.
    "regimes 1M": {"stream": "regimes", "rows": 1_000_000, "opponents": CHEAP},
}
INPUTS = 2
"""Which inputs the trees got that were run anew: of 2 are the label before the newest, and the group."""
TIMING = 2
"""Which state of the hot paths a record was timed with; what things cost is told from the newest alone."""
DELAYS = (1, 10, 100, 1000)
DELAYED = {"electricity": 15_000, "weather": 15_000}
"""Streams and rows on which labels come later."""


def driven(recipe: Any, config: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The summary and the records of a run of a recipe, in a folder that does not stay."""
    task = recipe.task(config)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        folder_run = Run(Path(folder) / "run")
        folder_run.create(recipe.COMMAND, dataclasses.asdict(config), threads=1)
        task.begin(folder_run)
        driving = drive.Driving(report=False, save_every=10**9)
        summary = drive.drive(folder_run, task.life(), driving=driving, show=lambda *_: None, row=task.row)
        assert summary is not None
        return summary, list(folder_run.lines("records.jsonl"))


def options_of(stream: str, data: Path) -> dict[str, Any]:
    """What names a stream, with its folder in `data`."""
    options = dict(STREAMS[stream])
    return options | {"data": str(data / options["data"])} if "data" in options else options


def run(options: dict[str, Any], data: Path, seed: int) -> dict[str, Any]:
    """The summary of one run of the default command."""
    if "data" in options:
        options = options | {"data": str(data / options["data"])}
    summary, _ = driven(series, series.SeriesConfig(**{"opponents": ALL, **options}, seed=seed))
    keep = ("answers", "members", "cpu_seconds", "rows_per_second", "latency", "seconds", "peak_rss", "parameters")
    return {name: summary[name] for name in keep}


def fill(file: Path, wanted: list[tuple[dict[str, Any], dict[str, Any]]], data: Path) -> None:
    """Run what is not in `file` yet, a line each."""
    file.parent.mkdir(exist_ok=True)
    done = [json.loads(line)["key"] for line in file.read_text().splitlines()] if file.exists() else []
    for key, options in wanted:
        if key in done:
            continue
        began = time.time()
        summary = run(options, data, key["seed"])
        summary["members"] = {name: _short(member) for name, member in summary["members"].items()}
        with open(file, "a") as out:
            out.write(json.dumps({"key": key, "timing": TIMING, **summary}) + "\n")
        print(key, round(time.time() - began), "s", flush=True)


def again(file: Path, wanted: list[tuple[dict[str, Any], dict[str, Any]]], data: Path, opponents: list[str]) -> None:
    """Run some opponents anew, beside ours, which has to be what it was; what others did stays."""
    options = {json.dumps(key): value for key, value in wanted}
    for index, line in enumerate(file.read_text().splitlines()):
        record = json.loads(line)
        name, done = json.dumps(record["key"]), record.setdefault("again", {})
        asked = tuple(o for o in opponents if o in record["members"] and done.get(o) != INPUTS)
        if not asked or name not in options:
            continue
        summary = run({**options[name], "opponents": asked}, data, record["key"]["seed"])
        apart = abs(summary["members"]["pliant"]["bits"] - record["members"]["pliant"]["bits"])
        assert apart < 1e-6, f"{name}: ours moved by {apart:.2g} bits"
        # Measured by our own time in both runs, so that the rest of the record can be compared.
        scale = record["cpu_seconds"]["pliant"] / summary["cpu_seconds"]["pliant"]
        for opponent in asked:
            record["members"][opponent] = _short(summary["members"][opponent])
            record["cpu_seconds"][opponent] = summary["cpu_seconds"][opponent] * scale
            done[opponent] = INPUTS
        lines = file.read_text().splitlines()
        lines[index] = json.dumps(record)
        file.write_text("\n".join(lines) + "\n")
        print(record["key"], {o: record["members"][o]["bits"] for o in asked}, flush=True)


def _short(member: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in member.items() if name not in ("reliability", "coverage")}


def rows(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Results by stream."""
    found: dict[str, list[dict[str, Any]]] = {}
    for line in file.read_text().splitlines() if file.exists() else []:
        row = json.loads(line)
        key = row["key"]
        found.setdefault(key["stream"] + (f", delay {key['delay']}" if "delay" in key else ""), []).append(row)
    return found


def newest(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those that tell what things cost."""
    last = max(row.get("timing", 1) for row in found)
    return [row for row in found if row.get("timing", 1) == last]


def spread(values: list[float], digits: int = 4) -> str:
    """Mean and standard deviation over seeds."""
    apart = statistics.stdev(values) if len(values) > 1 else 0.0
    mean = statistics.fmean(values)
    return f"{mean:.{digits}f}" + (f" ± {apart:.{digits}f}" if apart > 0.5 * 10**-digits else "")


def table(found: list[dict[str, Any]]) -> list[str]:
    names = sorted(found[0]["members"], key=lambda name: statistics.fmean(r["members"][name]["bits"] for r in found))
    timed = newest(found)
    ours = statistics.fmean(row["cpu_seconds"]["pliant"] for row in timed)
    main = "accuracy" if "accuracy" in found[0]["members"]["pliant"] else "error"
    third = "temporal_kappa" if main == "accuracy" else "relative_error"
    lines = [f"| | bits per answer | {main} | {third.replace('_', ' ')} | CPU s | compute of ours | rows per CPU s |",
             "| --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for name in names:
        members = [row["members"][name] for row in found]
        cpu = statistics.fmean(row["cpu_seconds"][name] for row in timed)
        title = f"**{name}**" if name == "pliant" else name
        lines.append(
            f"| {title} | {spread([m['bits'] for m in members])} | {spread([m[main] for m in members])} "
            f"| {spread([m[third] if m[third] is not None else float('nan') for m in members], 3)} | {cpu:.1f} "
            f"| {cpu / ours:.2g} | {found[0]['answers'] / max(cpu, 1e-9):,.0f} |"
        )
    return lines


def ahead(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Whoever is ahead of ours in bits, stream by stream."""
    lines = []
    for name, runs in found.items():
        means = {n: statistics.fmean(row["members"][n]["bits"] for row in runs) for n in runs[0]["members"]}
        better = sorted((mean, n) for n, mean in means.items() if mean < means["pliant"])
        if better:
            told = ", ".join(f"{n} by {means['pliant'] - mean:.3f}" for mean, n in better)
            lines.append(f"- {name}: {told} bits per answer")
    none = [f"Ours is first in bits on all {len(found)}."]
    return ["Ahead of ours:", "", *lines] if lines else none


def place(found: list[dict[str, Any]], of: str = "pliant") -> int:
    """Rank by mean bits, from 1."""
    means = {n: statistics.fmean(row["members"][n]["bits"] for row in found) for n in found[0]["members"]}
    return 1 + sum(value < means[of] for value in means.values())


def draw() -> None:
    lines = [
        "# Seven streams, one default command",
        "",
        "Written by `python benchmarks/streams.py --draw` from the records in `docs/results`. Mean and standard",
        "deviation over seeds; sorted by bits per answer (for numbers, of a density in units of the target).",
        "Electricity rewards predicting persistence: read bits and temporal kappa there, not accuracy. Nobody is tuned",
        "for a stream, but our one set of defaults was chosen while looking at electricity, weather, outdoor and ett.",
        "CPU seconds of ours hold the first call of its kernels. What things cost is told from the newest runs alone.",
        "Boosting and river's trees were run anew once they got the label before the newest and the group; their",
        "seconds are measured by ours in the same run, and stand here in units of ours of the run before.",
        "",
    ]
    lines += [*ahead(rows(RESULTS / "streams.jsonl")), ""]
    for title, file in (("", "streams.jsonl"), ("## Later labels\n", "delays.jsonl")):
        found = rows(RESULTS / file)
        lines += [title] if title and found else []
        for name, runs in found.items():
            seeds = f"{len(runs)} seed{'s' * (len(runs) > 1)}"
            lines += [f"### {name}: {runs[0]['answers']:,} answers, {seeds}", "", *table(runs), ""]
        if title and found:
            lines += ["![Bits per answer by delay](delays.svg)", ""]
            figure()
    (DOCS / "streams.md").write_text("\n".join(lines))


def figure() -> None:
    """Bits per answer by delay, a panel for each stream, as docs/delays.svg."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pliant"
    from matplotlib import pyplot

    from pliant.report.style import COLORS

    found = rows(RESULTS / "delays.jsonl")
    drawn, axes = pyplot.subplots(1, len(DELAYED), figsize=(11, 4), layout="constrained", squeeze=False)
    for name, panel in zip(DELAYED, axes[0], strict=True):
        curves: dict[str, dict[int, float]] = {}
        for delay in DELAYS:
            runs = found.get(f"{name}, delay {delay}", [])
            for member in runs[0]["members"] if runs else ():
                mean = statistics.fmean(run["members"][member]["bits"] for run in runs)
                curves.setdefault(member, {})[delay] = mean
        for member, curve in curves.items():
            strong = member == "pliant"
            panel.plot(list(curve), list(curve.values()), marker="o", linewidth=2.5 if strong else 1.2, label=member,
                       color=COLORS.get(member, "#56B4E9"), zorder=3 if strong else 2)  # fmt: skip
        panel.set(xscale="log", title=name, xlabel="delay of labels (rows)", ylabel="bits per answer (lower is better)")
        panel.set_xticks(DELAYS, [f"{delay:,}" for delay in DELAYS])
        panel.spines[["top", "right"]].set_visible(False)
    handles, names = axes[0][0].get_legend_handles_labels()  # the stream with a season has them all
    axes[0][-1].legend(handles, names, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    drawn.savefig(DOCS / "delays.svg", metadata={"Date": None})


def ledger(streams: list[str]) -> None:
    """One line per stream, and the two aims."""
    found = {name: runs for name, runs in rows(RESULTS / "streams.jsonl").items() if name in streams}
    command = "python benchmarks/streams.py --data FOLDER; --draw"
    for name, runs in found.items():
        ours = [row["members"]["pliant"] for row in runs]
        best = min((n for n in runs[0]["members"] if n != "pliant"),
                   key=lambda n: statistics.fmean(row["members"][n]["bits"] for row in runs))  # fmt: skip
        main = "accuracy" if "accuracy" in ours[0] else "error"
        figures = {
            "seeds": len(runs), "bits": spread([m["bits"] for m in ours]), main: spread([m[main] for m in ours]),
            "place in bits": place(runs), "best opponent": best,
            "its bits": spread([row["members"][best]["bits"] for row in runs]),
            "rows per CPU second": round(statistics.fmean(row["rows_per_second"] for row in newest(runs))),
        }  # fmt: skip
        if "retrained" in runs[0]["members"]:
            ratio = statistics.fmean(
                row["cpu_seconds"]["retrained"] / row["cpu_seconds"]["pliant"] for row in newest(runs)
            )
            bits = [row["members"]["retrained"]["bits"] for row in runs]
            figures |= {"compute of retrained": f"{ratio:.1f} times ours", "bits of retrained": spread(bits)}
        append(f"Default command on {name}", command, figures, holds=place(runs) <= 2)


def delays_ledger() -> None:
    """One line per stream: bits of ours and of the best opponent at each delay."""
    found = rows(RESULTS / "delays.jsonl")
    for name in DELAYED:
        figures: dict[str, Any] = {}
        first = True
        for delay in DELAYS:
            runs = found[f"{name}, delay {delay}"]
            means = {n: statistics.fmean(row["members"][n]["bits"] for row in runs) for n in runs[0]["members"]}
            best = min((n for n in means if n != "pliant"), key=means.__getitem__)
            figures |= {"seeds": len(runs), f"delay {delay}": f"{means['pliant']:.4f}, {best} {means[best]:.4f}"}
            first &= means["pliant"] <= means[best]
        append(f"Later labels on {name}: bits of ours and of the best opponent",
               "python benchmarks/streams.py --data FOLDER --delays; --ledger", figures, holds=first)  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2, 3, 4])
    parser.add_argument("--streams", nargs="*", default=list(STREAMS))
    parser.add_argument("--delays", action="store_true")
    parser.add_argument("--again", metavar="OPPONENT", nargs="+")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--ledger", action="store_true")
    asked = parser.parse_args()
    file, grid = (
        RESULTS / "streams.jsonl",
        [({"stream": name, "seed": seed}, STREAMS[name]) for seed in asked.seeds for name in asked.streams],
    )
    if asked.delays:
        file, grid = RESULTS / "delays.jsonl", [
            ({"stream": name, "delay": delay, "seed": seed}, {**STREAMS[name], "rows": count, "delay": delay})
            for seed in asked.seeds for name, count in DELAYED.items() for delay in DELAYS
        ]  # fmt: skip
    if asked.draw:
        draw()
    elif asked.ledger:
        ledger(asked.streams)
        if asked.delays:
            delays_ledger()
    elif asked.again:
        again(file, grid, asked.data, asked.again)
    else:
        fill(file, grid, asked.data)
