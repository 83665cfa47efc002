"""docs/returning.md and docs/returning.svg from the records of `returning.py`."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from _ledger import DOCS

from pliant.report.style import BLUE, ORANGE, STYLE

Line = dict[str, Any]
Arm = tuple[str, str]
Runs = dict[Arm, list[Line]]
LEVEL, BLOCK, TASKS = 0.8, 8, 4
COLORS = {"adam": ORANGE, "project-rewarm": BLUE, "continual": "#009E73"}
MARKS = {"none": "o", "replay": "s", "ewc": "^"}
NAMES = {"none": "no memory", "replay": "replay", "ewc": "EWC"}
HEAD = """# When tasks return

Written by `python benchmarks/returning.py --draw` from the records in `docs/results/returning.jsonl`. To stay able to
learn may mean to forget; here both are measured on one life. scikit-learn's digits come with their pixels in one of
four orders, visited in turn A B C D A B C D ..., one pass over the images each, four times round, and then in three
orders never seen before. Each image is answered before it is learned. A fifth is never learned: on it all four tasks
are asked after each visit. An arm is a way to stay plastic (*adam*: none; *project-rewarm*: normalize-and-project, the
rate rises at a change that it finds; *continual*: continual backprop) and a way to remember (*replay*: 16 of 500
images kept from all of the past join each update; *EWC*: online, consolidated at the end of each visit, which it is
told, on 50 images with sampled answers). Each arm had eight settings, tried with a seed of its own on half of the
visits; the one with the best online accuracy was run with {seeds} other seeds; mean and standard deviation over these.
Online accuracy on the visits hardly tells EWC of strength 1 from that of 10; what is learned of the new does.

- *kept*: accuracy on held-out images of the three tasks that were not visited last, over the last time round.
- *backward transfer* (Lopez-Paz & Ranzato 2017, arXiv:1706.08840): accuracy on earlier tasks at the end of a time
  round, minus what it was just after each; the first time, and the last.
- *relearn*: questions of 16 images until eight of them are answered with an accuracy of {level:g}, on first visits and
  when tasks return; 112, the whole visit, if never.
- *new*: online accuracy on the three new tasks at the end. *kept after*: on the four old ones after those.
- *CPU of adam*: roughly; not all arms were run on the same day.

![What is kept against what is learned of the new](returning.svg)
"""


def found(lines: Sequence[Line], seeds: Sequence[int]) -> dict[str, Runs]:
    """Runs by net and arm, of the setting that tuning chose; arms of which a seed is missing are left out."""
    chosen: dict[tuple[str, str, str], Line] = {}
    for line in (line for line in lines if line["key"]["seed"] not in seeds):
        place = _place(line)
        if place not in chosen or line["mean"] > chosen[place]["mean"]:
            chosen[place] = line
    nets: dict[str, Runs] = defaultdict(dict)
    for (*place, rate, strength), runs in _whole(lines, seeds).items():
        net, base, memory = place
        best = chosen[net, base, memory]["key"]
        if (rate, strength) == (best["rate"], best["strength"]):
            nets[net][base, memory] = runs
    return nets


def _whole(lines: Sequence[Line], seeds: Sequence[int]) -> dict[tuple[Any, ...], list[Line]]:
    """Runs by net, base, memory, rate and strength, where all seeds are there."""
    by: dict[tuple[Any, ...], list[Line]] = defaultdict(list)
    for line in lines:
        if line["key"]["seed"] in seeds:
            by[*_place(line), line["key"]["rate"], line["key"]["strength"]].append(line)
    return {key: runs for key, runs in by.items() if len(runs) == len(seeds)}


def _place(line: Line) -> tuple[str, str, str]:
    return line["key"]["net"], line["key"]["base"], line["key"]["memory"]


def figures(run: Line) -> dict[str, float]:
    """What a run amounts to."""
    online, held = np.array(run["online"]), np.array(run["held out"])
    visits = run["key"]["visits"]
    last = range(visits - TASKS, visits)
    away = [[task for task in range(TASKS) if task != visit % TASKS] for visit in last]
    needed = [_needed(visit) for visit in online]
    return {
        "online": online[:visits].mean(),
        "kept": np.mean([held[visit, tasks].mean() for visit, tasks in zip(last, away, strict=True)]),
        "first transfer": _transfer(held[:TASKS]),
        "last transfer": _transfer(held[visits - TASKS : visits]),
        "learn": float(np.mean(needed[:TASKS])),
        "relearn": float(np.mean(needed[TASKS:visits])),
        "new": online[visits:].mean(),
        "kept after": held[-1].mean(),
        "seconds": run["cpu seconds"],
    }


def _needed(visit: np.ndarray) -> int:
    """Questions until a block reaches the level."""
    reached = np.flatnonzero(visit >= LEVEL)
    return BLOCK * (int(reached[0]) + 1 if len(reached) else len(visit))


def _transfer(held: np.ndarray) -> float:
    return float((held[-1] - held.diagonal())[:-1].mean())


def of(runs: Sequence[Line], name: str) -> list[float]:
    return [float(figures(run)[name]) for run in runs]


def verdict(arms: Runs) -> tuple[dict[str, Any], bool]:
    """Figures for the ledger, and whether replay keeps more and learns no less, whatever it is added to."""
    names = ("kept", "new", "relearn")
    told = {
        f"{base}, {NAMES[memory]}: kept, its deviation, new, its deviation, questions to relearn": [
            statistics.fmean(of(runs, "kept")), statistics.stdev(of(runs, "kept")),
            statistics.fmean(of(runs, "new")), statistics.stdev(of(runs, "new")),
            statistics.fmean(of(runs, "relearn")),
        ]
        for (base, memory), runs in arms.items()
    }  # fmt: skip
    gains = []
    for base in {base for base, memory in arms if memory == "replay" and (base, "none") in arms}:
        pair = [[statistics.fmean(of(arms[base, memory], name)) for name in names] for memory in ("replay", "none")]
        gains.append((pair[0][0] - pair[1][0], pair[0][1] - pair[1][1]))
    return told, bool(gains) and all(kept > 0 and new > -0.01 for kept, new in gains)


def draw(lines: Sequence[Line], seeds: Sequence[int]) -> None:
    """Both files."""
    nets = found(lines, seeds)
    text = [HEAD.format(seeds=len(seeds), level=LEVEL)]
    for net, arms in nets.items():
        rest = {key[1:]: runs for key, runs in _whole(lines, seeds).items() if key[0] == net}
        text += [f"## {net}\n", *_table(arms), "", *_sentences(arms), *_instead(arms, rest), ""]
    tuning = [line for line in lines if line["key"]["seed"] not in seeds]
    text += ["## What was tried\n", "Online accuracy on the first half of the visits, by rate and strength.\n"]
    for memory in MARKS:
        text += [f"{NAMES[memory]}:\n", *_tried([line for line in tuning if line["key"]["memory"] == memory]), ""]
    (DOCS / "returning.md").write_text("\n".join(text).rstrip() + "\n")
    _figure(nets)


def _table(arms: Runs) -> list[str]:
    plain = statistics.fmean(of(arms["adam", "none"], "seconds")) if ("adam", "none") in arms else float("nan")
    rows = ["| arm | rate, strength | online | kept | backward transfer: first, last | learn, relearn | new | kept "
            "after | CPU of adam |", "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"]  # fmt: skip
    for base, memory in sorted(arms, key=lambda arm: -statistics.fmean(of(arms[arm], "online"))):
        runs = arms[base, memory]
        key, mean = runs[0]["key"], {name: statistics.fmean(of(runs, name)) for name in figures(runs[0])}
        cells = [
            base if memory == "none" else f"{base} + {NAMES[memory]}",
            f"{key['rate']:g}" + ("" if key["strength"] is None else f", {key['strength']:g}"),
            *(_spread(of(runs, name)) for name in ("online", "kept")),
            f"{mean['first transfer']:+.3f}, {mean['last transfer']:+.3f}",
            f"{mean['learn']:.0f}, {mean['relearn']:.0f}",
            *(_spread(of(runs, name)) for name in ("new", "kept after")),
            f"{mean['seconds'] / plain:.2f}",
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _instead(arms: Runs, rest: dict[tuple[Any, ...], list[Line]]) -> list[str]:
    """What another strength of EWC at the same rate would have changed, where it was run too."""
    said = []
    for (base, memory, rate, strength), runs in rest.items():
        best = arms.get((base, memory), runs)[0]["key"]
        if memory == "ewc" and rate == best["rate"] and strength != best["strength"]:
            kept, new = (statistics.fmean(of(runs, name)) - statistics.fmean(of(arms[base, memory], name))
                         for name in ("kept", "new"))  # fmt: skip
            said.append(f"- EWC of {strength:g} instead of {best['strength']:g} added to {base}: kept {kept:+.3f}, "
                        f"new {new:+.3f}")  # fmt: skip
    return said


def _tried(lines: Sequence[Line]) -> list[str]:
    """A row for each net and base, a column for each setting."""
    settings = sorted({(line["key"]["rate"], line["key"]["strength"] or 0) for line in lines})
    at = {(line["key"]["net"], line["key"]["base"], line["key"]["rate"], line["key"]["strength"] or 0): line["mean"]
          for line in lines}  # fmt: skip
    head = ["arm", *(f"{rate:g}" + (f", {strength:g}" if strength else "") for rate, strength in settings)]
    rows = [[f"{net}, {base}", *(f"{at[net, base, *one]:.3f}" if (net, base, *one) in at else "" for one in settings)]
            for net, base in dict.fromkeys((net, base) for net, base, *_ in sorted(at))]  # fmt: skip
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def _spread(values: list[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.3f} ± {deviation:.3f}"


def _sentences(arms: Runs) -> list[str]:
    """What each memory changes, beside the same arm without it."""
    said = []
    for memory in ("replay", "ewc"):
        for base in COLORS:
            if (base, memory) in arms and (base, "none") in arms:
                kept, new, again = (
                    statistics.fmean(of(arms[base, memory], name)) - statistics.fmean(of(arms[base, "none"], name))
                    for name in ("kept", "new", "relearn")
                )
                said.append(f"- {NAMES[memory]} added to {base}: kept {kept:+.3f}, new {new:+.3f}, "
                            f"{again:+.0f} questions to relearn")  # fmt: skip
    return said


def _figure(nets: dict[str, Runs]) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(5.6 * len(nets), 4.2), layout="constrained")
        for place, (net, arms) in enumerate(nets.items()):
            axes = figure.add_subplot(1, len(nets), place + 1)
            axes.set_title(net, loc="left", fontsize=10)
            for base in COLORS:
                _paint(axes, arms, base)
            axes.set_xlabel("plastic: accuracy on new tasks, late in life →")
            axes.set_ylabel("stable: kept accuracy on old tasks →")
        handles = [Line2D([], [], color="#666666", marker=MARKS[memory], linestyle="", label=NAMES[memory])
                   for memory in MARKS]  # fmt: skip
        handles += [Line2D([], [], color=color, linewidth=3, label=base) for base, color in COLORS.items()]
        figure.legend(handles=handles, frameon=False, loc="outside lower center", ncols=6, fontsize=8.5,
                      labelcolor="#444444")  # fmt: skip
        figure.savefig(DOCS / "returning.svg", metadata={"Date": None})


def _paint(axes: Any, arms: Runs, base: str) -> None:
    """A mark for each memory, with the deviation over seeds, and a line to it from the same arm without one."""
    at = {}
    for memory, mark in MARKS.items():
        if (base, memory) in arms:
            new, kept = (of(arms[base, memory], name) for name in ("new", "kept"))
            at[memory] = (statistics.fmean(new), statistics.fmean(kept))
            axes.errorbar(*at[memory], xerr=statistics.stdev(new), yerr=statistics.stdev(kept), fmt=mark, markersize=8,
                          color=COLORS[base], elinewidth=1, zorder=3)  # fmt: skip
    for memory in at:
        if memory != "none" and "none" in at:
            axes.plot(*zip(at["none"], at[memory], strict=True), color=COLORS[base], linewidth=0.8, alpha=0.5, zorder=2)
