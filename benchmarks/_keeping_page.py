"""docs/keeping.md and docs/keeping.svg from the records of `keeping.py`."""

import statistics
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
from _ledger import DOCS

from pliant.report.style import BLUE, ORANGE, STYLE

Line = dict[str, Any]
Place = tuple[str, str]
WORLD_NAMES = {"permute": "pixels reordered, 400 tasks", "random": "classes drawn anew, 200 tasks"}
PLAIN, REFERENCE = "adam", ("anew", "norm-anew")
DEFAULT = "joint-isometry-toward-init"
"""How `pliant learn digits` keeps."""
HEAD = """# Who stays able to learn

Written by `python benchmarks/keeping.py --draw` from the records in `docs/results/keeping.jsonl`. Two worlds of tasks
that have nothing in common: scikit-learn's digits with their pixels in a new order after each pass over them, and 240
of the images with classes drawn anew, ten passes each. Every image is answered before it is learned, so what counts is
how fast a task is learned, and whether late tasks are learned as fast as early ones. No arm is told when a task begins;
those that act at a change find it in their own loss (CUSUM). Each arm had six settings, tried with a seed of its own
on a quarter of the tasks, and the best in online accuracy is run with {seeds} other seeds over all; mean and standard
deviation over these.{told}

*anew* begins again from its first parameters at each change that it finds: where
tasks have nothing in common, an arm above it has come to parameters that learn faster than first ones do.

- *norm*: LayerNorm before each nonlinearity. Our recurrent net has norms there already.
- *isometry*: FIRE. *project*: normalize-and-project, with the norms; *joint*: the same, and gain and bias of each norm
  keep their joint length, as in `pliant learn digits`, whose default is joint-isometry-toward-init. *rewarm*: the rate
  falls, and rises again at a change.
- *first*, *last tenth*: of the tasks, online accuracy. *speed*: of the first three quarters of each task, last tenth
  over first.

"""


def draw(lines: Sequence[Line], seeds: Sequence[int]) -> None:
    """Both files."""
    found = by_place(lines, seeds)
    short = {arm for arms in found.values() for arm, runs in arms.items() if len(runs) < len(seeds)}
    told = f"\nWith fewer seeds: {', '.join(sorted(short))}." if short else ""
    head = HEAD.format(seeds=len(seeds), told=told)
    text = [head, "![Online accuracy over tasks](keeping.svg)\n"]
    for (world, net), arms in found.items():
        text += [f"\n## {net}, {WORLD_NAMES[world]}\n", *_table(arms)]
    (DOCS / "keeping.md").write_text("\n".join(text) + "\n")
    _figure(found)


def by_place(lines: Sequence[Line], seeds: Sequence[int]) -> dict[Place, dict[str, list[Line]]]:
    """Runs by world and net, then by arm, of the seeds that count."""
    found: dict[Place, dict[str, list[Line]]] = defaultdict(lambda: defaultdict(list))
    for line in lines:
        key = line["key"]
        if key["seed"] in seeds:
            found[key["world"], key["net"]][key["arm"]].append(line)
    return found


def figures(run: Line) -> dict[str, float]:
    """What a run amounts to."""
    accuracy, late = np.array(run["accuracy"]), np.array(run["late accuracy"])
    tenth = len(accuracy) // 10
    early = (accuracy - late / 4) / 0.75
    return {
        "accuracy": accuracy.mean(),
        "first": accuracy[:tenth].mean(),
        "last": accuracy[-tenth:].mean(),
        "change": accuracy[-tenth:].mean() - accuracy[:tenth].mean(),
        "speed": early[-tenth:].mean() / early[:tenth].mean(),
        "seconds": run["cpu seconds"],
    }


def of(runs: Sequence[Line], name: str) -> list[float]:
    return [float(figures(run)[name]) for run in runs]


def best(arms: dict[str, list[Line]]) -> str:
    """The arm with the highest online accuracy of those that keep something."""
    return max(
        (arm for arm in arms if arm not in REFERENCE), key=lambda arm: statistics.fmean(of(arms[arm], "accuracy"))
    )


def _spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


COLUMNS = (
    "arm", "rate, strength", "online accuracy", "first tenth", "last tenth", "last - first", "speed", "CPU of adam",
    "seeds",
)  # fmt: skip


def _table(arms: dict[str, list[Line]]) -> list[str]:
    plain = statistics.fmean(of(arms[PLAIN], "seconds")) if PLAIN in arms else float("nan")
    rows = [
        "| " + " | ".join(COLUMNS) + " |",
        "| " + " | ".join(["---"] * len(COLUMNS)) + " |",
    ]
    for arm in sorted(arms, key=lambda arm: -statistics.fmean(of(arms[arm], "accuracy"))):
        runs, key = arms[arm], arms[arm][0]["key"]
        setting = f"{key['rate']:g}" + ("" if key["strength"] is None else f", {key['strength']:g}")
        cells = [arm, setting, *(_spread(of(runs, name)) for name in ("accuracy", "first", "last", "change"))]
        cells += [f"{statistics.fmean(of(runs, 'speed')):.2f}", f"{statistics.fmean(of(runs, 'seconds')) / plain:.2f}"]
        cells.append(str(len(runs)))
        rows.append("| " + " | ".join(cells) + " |")
    return rows


def _figure(found: dict[Place, dict[str, list[Line]]]) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        rows, columns = -(-len(found) // 2), min(2, len(found))
        figure = Figure(figsize=(5.6 * columns, 3.4 * rows), layout="constrained")
        for index, ((world, net), arms) in enumerate(found.items()):
            axes = figure.add_subplot(rows, columns, index + 1)
            axes.set_title(f"{net}, {WORLD_NAMES[world]}", loc="left", fontsize=10)
            winner = best(arms)
            for arm, runs in arms.items():
                _paint(axes, arm, runs, winner)
            axes.set_xlabel("task")
            axes.set_ylabel("online accuracy")
        figure.savefig(DOCS / "keeping.svg", metadata={"Date": None})


def _paint(axes: Any, arm: str, runs: list[Line], winner: str) -> None:
    """The mean over seeds of running means over a twentieth of the tasks; the band is the spread over seeds."""
    curves = np.array([run["accuracy"] for run in runs])
    span = curves.shape[1] // 20
    smooth = np.apply_along_axis(lambda row: np.convolve(row, np.ones(span) / span, "valid"), 1, curves)
    x = np.arange(smooth.shape[1]) + span / 2
    middle, spread = smooth.mean(0), smooth.std(0)
    named = {winner: (BLUE, 2.4, "-"), PLAIN: (ORANGE, 2.4, "-"), "anew": ("#000000", 1.2, (0, (1.5, 1.5)))}
    color, width, dashes = named.get(arm, ("#c4c4c0", 0.8, "-"))
    axes.plot(x, middle, color=color, linewidth=width, linestyle=dashes, zorder=3 if arm in named else 2)
    if arm in named:
        axes.fill_between(x, middle - spread, middle + spread, color=color, alpha=0.15, linewidth=0)
        axes.annotate(arm, (x[-1], middle[-1]), xytext=(4, 0), textcoords="offset points", color=color, va="center")
