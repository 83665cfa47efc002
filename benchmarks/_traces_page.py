"""docs/rules.svg, and the figures within docs/rules.md, from the records of `traces.py`."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from _ledger import DOCS

from pliant.report.paint import plain
from pliant.report.style import BLUE, ORANGE, STYLE

BEGIN, END = "<!-- figures, by `python benchmarks/traces.py draw` -->", "<!-- end of figures -->"
COLORS = {"trace 1": "#56B4E9", "trace exact": "#009E73", "trace": BLUE, "trace 16": BLUE, "trace 32": "#009E73",
          "immediate": "#666666", "bptt 1": "#666666", "bptt 32": ORANGE, "bptt 256": "#E69F00"}  # fmt: skip
DEPTHS = (1, 2, 4, 8)
TASKS = {"recall": "one marked bit", "copy": "three marked bits"}

Line = Mapping[str, Any]


def draw(lines: Sequence[Line]) -> None:
    """Both."""
    page = DOCS / "rules.md"
    before, rest = page.read_text().split(BEGIN)
    after = rest.split(END)[1]
    text = [
        "![Cosines of gradients by depth, and accuracy by distance](rules.svg)",
        "",
        *_cosines(lines),
        *_distances(lines),
    ]
    page.write_text("\n".join([before + BEGIN, "", *text, END + after]))
    _figure(lines)


def by_distance(lines: Sequence[Line], task: str) -> dict[str, dict[int, list[Line]]]:
    """Records of a task by rule and distance."""
    found: dict[str, dict[int, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        if line["kind"] == "distance" and line["task"] == task:
            found[line["rule"]][line["distance"]].append(line)
    return found


def _cosines(lines: Sequence[Line]) -> list[str]:
    text = []
    for line in lines:
        if line["kind"] != "cosines":
            continue
        where = (
            f"one loss, at the last of {line['steps']} steps"
            if line["last"]
            else f"losses at all of {line['steps']} steps"
        )
        text += [f"Cosine of the gradient with that through the whole past, {where}; {line['seeds']} seeds, width 16,",
                 "at initialization. First number: gates, decays and convolutions; second: maps into the recurrences.",
                 ""]  # fmt: skip
        rules = list(dict.fromkeys(name.split(", ")[0] for name in line["figures"]))
        text += ["| layers | " + " | ".join(rules) + " |", "| --- " * (1 + len(rules)) + "|"]
        for depth in DEPTHS:
            cells = [" / ".join(f"{line['figures'][f'{rule}, {depth} layers, {group}']:.3f}"
                                for group in ("recurrent", "input maps")) for rule in rules]  # fmt: skip
            text.append(f"| {depth} | " + " | ".join(cells) + " |")
        text.append("")
    return text


def _distances(lines: Sequence[Line]) -> list[str]:
    text = []
    for task in TASKS:
        found = by_distance(lines, task)
        distances = sorted({distance for rule in found.values() for distance in rule})
        text += [f"Accuracy over the last fifth of a life, *{task}*: {TASKS[task]} in noise, asked for so many steps",
                 "later (chance 0.5; a gated LRU of 16 units, 64 streams, questions of 16 steps, the same episodes for",
                 "all). Several numbers are several seeds. KB: what learning holds for a stream beside parameters and",
                 "optimizer; µs: processor time of a step of all streams.", ""]  # fmt: skip
        text += ["| rule | " + " | ".join(f"{d:,} steps" for d in distances) + " | KB a stream | µs a step |",
                 "| --- " * (3 + len(distances)) + "|"]  # fmt: skip
        for rule, cells in sorted(found.items()):
            each = [" ".join(f"{line['accuracy']:.2f}" for line in cells[d]) if d in cells else "" for d in distances]
            runs = [line for d in cells for line in cells[d]]
            size, time = (max(line["bytes"] / line["streams"] for line in runs) / 1000,
                          statistics.median(line["microseconds a step"] for line in runs))  # fmt: skip
            text.append(f"| {rule} | " + " | ".join(each) + f" | {size:.1f} | {time:.0f} |")
        text.append("")
    return text


def _figure(lines: Sequence[Line]) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, NullFormatter

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(11.0, 3.6), layout="constrained")
        for place, last in enumerate((False, True)):
            axes = figure.add_subplot(1, 3, place + 1)
            for line in lines:
                if line["kind"] == "cosines" and line["last"] == last:
                    _depths(axes, line["figures"])
            axes.set_title("a loss at the last step" if last else "losses at all steps", loc="left", fontsize=10)
            axes.set_xlabel("layers")
            axes.set_ylabel("cosine, recurrent parameters")
        axes = figure.add_subplot(1, 3, 3)
        for rule, cells in by_distance(lines, "recall").items():
            at = sorted(cells)
            means = [statistics.fmean(line["accuracy"] for line in cells[d]) for d in at]
            axes.plot(at, means, marker="o", markersize=4, color=COLORS[rule], label=rule)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title("recall of one bit", loc="left", fontsize=10)
        axes.set_xlabel("steps back")
        axes.set_ylabel("accuracy")
        axes.legend(frameon=False, fontsize=8.5, labelcolor="#444444", loc="lower left", bbox_to_anchor=(0.0, 0.08))
        figure.savefig(DOCS / "rules.svg", metadata={"Date": None})


def _depths(axes: Any, figures: Mapping[str, float]) -> None:
    for rule in dict.fromkeys(name.split(", ")[0] for name in figures):
        values = [figures[f"{rule}, {depth} layers, recurrent"] for depth in DEPTHS]
        axes.plot(DEPTHS, values, marker="o", markersize=4, color=COLORS[rule], label=rule)
    axes.set_xscale("log", base=2)
    axes.set_xticks(DEPTHS, DEPTHS)
    axes.legend(frameon=False, fontsize=8.5, labelcolor="#444444")
