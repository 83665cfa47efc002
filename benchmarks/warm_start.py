"""Draw docs/warm-start.md and its figure from finished runs of `pliant reproduce warm-start`, and write the ledger.

python benchmarks/warm_start.py FOLDER ...   # take over their trials into docs/results/warm-start.jsonl
python benchmarks/warm_start.py              # draw again
"""

import json
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

from _ledger import DOCS, append

from pliant.core.plain import dumps
from pliant.recipes.reproduce import Trial
from pliant.recipes.warm_start import ARMS, FRESH, RATES, TUNING, final, first_trials, gaps, judge, then

TRIALS, CLAIMS = DOCS / "results/warm-start.jsonl", DOCS / "results/warm-start.json"
TITLES = {"fashion-mnist": "Fashion-MNIST, 60,000 images", "cifar10": "CIFAR-10, a subset of 5,000 images"}
COLORS = {"free": "#D55E00", "layer norm": "#E69F00", "projected": "#0072B2", "shrink-perturb": "#009E73"}
NAMES = {"free": "free", "layer norm": "free, with layer norm", "projected": "projected, with layer norm",
         "shrink-perturb": "shrink and perturb"}  # fmt: skip
HEAD = """# Warm starts

```sh
pliant reproduce warm-start                                  # full Fashion-MNIST, where Debian's package has put it
pliant reproduce warm-start --data FOLDER_OR_ZIP             # see pliant reproduce warm-start --help
```

A net that has first learned a part of the data, and then all of them, may end below the same net trained on all of them
from the start. That is the gap: test accuracy fresh less warm, in points, for each kind of net against itself. First a
random 10 or 50 % is learned, then everything; as many updates each time, Adam, the rate rising and falling anew in
each phase, in all arms. Every arm has the same rates to choose from, by a tenth of the training data that runs of their
own hold out, where 10 % come first; no other run has their seed. *Projected* has a norm before each nonlinearity
(`normalized`) and its matrices held to their first lengths (`normalize_and_project`).
"""


TAIL = """## How to read it

- Fashion-MNIST is too easy: no net has a gap there. The subset of CIFAR-10 is not.
- A free net without norms has a gap in every seed. With a norm, projection and a rate that rises again hardly any of it
  is left, after either share; with the norm alone the gap after 50 % is wide open in some seeds and absent in others.
- It takes the rate: at 0.001 the projected net kept its gap after 50 % in the one seed that was run (the line below the
  table). Projection keeps a rate at what it was, while the matrices of the free net grow and its rate fades; over
  280,000 updates, as in the paper, more so than here.
- The gap is closed, but the highest accuracy is not that of the projected net: on so few images a norm over channels
  costs more than the gap, and shrink and perturb without norms ends above the fresh net after 50 %.
- The test part of the subset has 1,000 images, so that a standard error of one accuracy is 1.6 points. The rate was
  chosen with 10 % first, and is at the edge of the grid in some arms.
"""

Results = list[tuple[Trial, dict[str, Any]]]


def load() -> tuple[dict[str, Results], dict[str, Results]]:
    """Trials of the reproduction with their results, by set; and those at rates that another grid had chosen."""
    rows: dict[str, Results] = defaultdict(list)
    for line in TRIALS.read_text().splitlines():
        row = json.loads(line)
        trial = Trial(*json.loads(row["key"]))
        rows[trial.settings["data"]].append((trial, row["result"]))
    found, others = {}, {}
    for data, results in sorted(rows.items()):
        keys = {trial.key for trial in then(data, "ten", [row for row in results if row[0].seed == TUNING])}
        keys |= {trial.key for trial in first_trials(data, "ten")}
        found[data] = [row for row in results if row[0].key in keys]
        others[data] = [row for row in results if row[0].key not in keys]
    return found, others


def take(folders: list[str]) -> None:
    rows = {}
    for folder in folders:
        for line in (Path(folder) / "trials.jsonl").read_text().splitlines():
            row = json.loads(line)
            rows[row["key"]] = dumps(row)
    order = sorted(rows, key=lambda key: (json.loads(key)[1]["data"], json.loads(key)[2], key))
    TRIALS.write_text("".join(rows[key] + "\n" for key in order))


def page(found: dict[str, Results], others: dict[str, Results], claims: list[dict[str, Any]]) -> None:
    lines = [HEAD, "![Test accuracy over updates](warm-start.svg)", ""]
    for data, results in found.items():
        settings = results[0][0].settings
        seeds = len({trial.seed for trial, _ in results} - {TUNING})
        lines += [f"## {TITLES[data]}", "",
                  f"{settings['net'].upper()} of width {settings['width']}, {settings['updates']:,} updates a phase in "
                  f"batches of {settings['batch']}, one of the rates {', '.join(f'{rate:g}' for rate in RATES[data])}; "
                  f"{seeds} seeds: means, and the range of the gap.", "",
                  *table(results), ""]  # fmt: skip
        own = [claim for claim in claims if claim["claim"].startswith(data)]
        lines += ["| Claim | Paper | Here | Spread | Verdict |", "| --- | --- | --- | --- | --- |"]
        lines += [f"| {c['claim'].partition(': ')[2]} | {c['paper']} ({c['known']}) | {c['ours']} | {c['spread']} | "
                  f"{c['verdict']} |" for c in own]  # fmt: skip
        lines += ["", *lower(others[data])]
    lines += [TAIL]
    (DOCS / "warm-start.md").write_text("\n".join(lines))


def lower(others: Results) -> list[str]:
    """What came out at other rates than those of the table."""
    if not others:
        return []
    said = [f"{NAMES[trial.name]}, rate {trial.settings['rate']:g}, "
            + (f"after {trial.settings['share']:.0%}" if trial.settings["share"] else "fresh")
            + f", seed {trial.seed}: {100 * result['accuracy'][-1]:.1f} %" for trial, result in others]  # fmt: skip
    return ["At the rates that were best before the largest was among them: " + "; ".join(sorted(said)) + ".", ""]


def table(results: Results) -> list[str]:
    shares = sorted({trial.settings["share"] for trial, _ in results} - {FRESH})
    lines = ["| Net | Rate | Fresh | " + " | ".join(f"After {s:.0%} | Gap | Lengths" for s in shares) + " |"]
    lines += ["|" + " --- |" * (3 + 3 * len(shares))]
    for arm in ARMS:
        base = "free" if arm == "shrink-perturb" else arm
        own = [(trial, result) for trial, result in results if trial.name == arm and trial.seed != TUNING]
        rates = {bool(trial.settings["share"]): trial.settings["rate"] for trial, _ in own}
        rate = f"{rates[False]:g}, warm {rates[True]:g}" if False in rates else f"warm {rates[True]:g}"
        cells = [NAMES[arm], rate, f"{100 * statistics.mean(final(results, base, FRESH)):.1f} %"]
        for share in shares:
            gap = gaps(results, arm, share)
            grown = statistics.mean(result["length"][-1] for trial, result in own if trial.settings["share"] == share)
            cells += [f"{100 * statistics.mean(final(results, arm, share)):.1f} %",
                      f"{statistics.mean(gap):.1f} ({min(gap):.1f} to {max(gap):.1f})", f"{grown:.2f}"]  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return [*lines, "", "Lengths: mean length of the hidden matrices in the end, over their first."]


def figure(found: dict[str, Results]) -> None:
    """Test accuracy over updates, a panel for each set and share, as docs/warm-start.svg."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "pliant"
    from matplotlib import pyplot

    columns = [(data, share) for data, results in found.items()
               for share in sorted({trial.settings["share"] for trial, _ in results} - {FRESH})]  # fmt: skip
    drawn, axes = pyplot.subplots(
        1, len(columns), figsize=(3.1 * len(columns), 3.6), layout="constrained", squeeze=False
    )
    for (data, share), panel in zip(columns, axes[0], strict=True):
        results = found[data]
        switch = results[0][0].settings["updates"]
        for arm in ARMS:
            for part, dashes in ((FRESH, (0, (3, 2))), (share, "-")):
                runs = [
                    r
                    for trial, r in results
                    if (trial.name, trial.settings["share"]) == (arm, part) and trial.seed != TUNING
                ]
                if runs and (part or arm in ("free", "projected")):
                    mean = [statistics.mean(values) for values in zip(*(r["accuracy"] for r in runs), strict=True)]
                    panel.plot(runs[0]["step"], mean, linestyle=dashes, color=COLORS[arm], linewidth=2 if part else 1.3,
                               label=NAMES[arm] if part else f"{arm}, fresh", zorder=3 if part else 2)  # fmt: skip
        panel.axvline(switch, color="#888888", linewidth=1)
        panel.annotate("all data", (switch, 0.02), (4, 0), xycoords=("data", "axes fraction"),
                       textcoords="offset points", fontsize=8, color="#666666")  # fmt: skip
        last = [result["accuracy"][-1] for trial, result in results if trial.seed != TUNING]
        room = max(last) - min(last)
        panel.set(title=f"{TITLES[data].partition(',')[0]}, {share:.0%} first", xlabel="updates",
                  ylim=(min(last) - max(1.5 * room, 0.06), max(last) + max(0.15 * room, 0.005)))  # fmt: skip
        panel.spines[["top", "right"]].set_visible(False)
    axes[0][0].set_ylabel("test accuracy")
    handles, names = axes[0][0].get_legend_handles_labels()
    drawn.legend(handles, names, frameon=False, loc="outside lower center", ncols=len(names))
    drawn.savefig(DOCS / "warm-start.svg", metadata={"Date": None})


def ledger(found: dict[str, Results], claims: list[dict[str, Any]]) -> None:
    for data, results in found.items():
        own = [claim for claim in claims if claim["claim"].startswith(data)]
        figures: dict[str, Any] = {"seeds": own[0]["seeds"]}
        for share in sorted({trial.settings["share"] for trial, _ in results} - {FRESH}):
            for arm in ARMS:
                gap = gaps(results, arm, share)
                figures[f"gap of {arm} after {share:.0%}"] = [
                    round(x, 2) for x in (min(gap), statistics.mean(gap), max(gap))
                ]
        verdicts = [claim["verdict"] for claim in own]
        append(f"Warm starts on {TITLES[data]}: the gap of a free net, and its closing",
               "pliant reproduce warm-start --data PATH; python benchmarks/warm_start.py FOLDER", figures,
               holds=all(v == "reproduced" for v in verdicts),
               note="points, least, mean and most of the seeds; " + ", ".join(verdicts))  # fmt: skip


def main() -> None:
    if sys.argv[1:]:
        take(sys.argv[1:])
    found, others = load()
    claims = []
    for results in found.values():
        scale = "ten"
        seconds = round(sum(result["seconds"] for _, result in results), 1)
        claims += [vars(claim) | {"scale": scale, "seconds": seconds} for claim in judge(results)]
    CLAIMS.write_text(dumps({"claims": claims}) + "\n")
    page(found, others, claims)
    figure(found)
    if sys.argv[1:]:
        ledger(found, claims)


if __name__ == "__main__":
    main()
