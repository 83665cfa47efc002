"""The figure that a run opens with if it is kept able to learn: it beside the same learner without, task by task."""

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pliant.report.figures import Figure
from pliant.report.labels import label_ends
from pliant.report.load import Loaded, answers, column, tasks
from pliant.report.paint import Line, paint_line, plain, svg
from pliant.report.style import LEFT, WIDE, color_of
from pliant.report.values import MAX_TEXT, Floats, amount, short, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Places = NDArray[np.integer[Any]]
PLAIN = "plain"
MOST = 40
"""Points of a line; more tasks than that are told several at a time."""
PARTS = 10
"""Where a run has no tasks."""


def kept_figure(run: Loaded, prefix: str) -> Figure | None:
    """Each task's mean score of the learner and of `plain`; None where there is no such opponent."""
    if PLAIN not in run.names or len(run.records) < 2:
        return None
    place, unit = _parts(run)
    count = int(place.max()) + 1
    lines = []
    for name in (run.names[0], PLAIN):
        y = _means(column(run, name, run.measure), column(run, name, "answers"), place)
        label = f"{short(name)} {_value(run, float(y[-1]))}"
        lines.append(Line(label, np.arange(1.0, count + 1), y, color_of(name), name == run.names[0]))

    def paint(axes: "Axes") -> None:
        axes.set_xlim(0.5, count + 0.5)
        known = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
        if run.measure == "accuracy" and len(known):
            axes.set_ylim(max(0.0, float(known.min()) - 0.1), 1.0)
        axes.locator_params(axis="x", integer=True)
        axes.xaxis.set_major_formatter(plain)
        for line in lines:
            paint_line(axes, line, dots=count <= MOST)
        label_ends(axes, lines)
        axes.set_xlabel(unit)
        axes.set_ylabel(run.measure)

    said = "; ".join(_ends(run, name, line.y) for name, line in zip((run.names[0], PLAIN), lines, strict=True))
    caption = (
        f"Mean {run.measure} over each {unit}, answered before learned; plain is the same learner without "
        f"{_ways(run)}. {said}."
    )
    room = 1.0 + 0.088 * max(len(line.label) for line in lines)
    aria = f"{run.measure} by {unit}: " + ", ".join(line.label for line in lines)
    return Figure("Kept able to learn, and not", caption, svg(f"{prefix}-kept", aria, WIDE, (LEFT, room), paint))


def _parts(run: Loaded) -> tuple[Places, str]:
    """For each window the part of the run that it belongs to, from 0, and what a part is."""
    bands, ends = tasks(run), answers(run)
    if len(bands) < 2:
        return np.arange(len(ends)) * min(PARTS, len(ends)) // len(ends), "tenth of the run"
    task = np.searchsorted([end for _, end, _ in bands], ends)
    together = -(-len(bands) // MOST)
    return task // together, "task" if together == 1 else f"{together} tasks"


def _means(values: Floats, weights: Floats, place: Places) -> Floats:
    weights = np.where(np.isfinite(values), np.nan_to_num(weights), 0.0)
    total = np.bincount(place, weights * np.nan_to_num(values))
    with np.errstate(invalid="ignore"):
        return total / np.bincount(place, weights)


def _value(run: Loaded, value: float) -> str:
    return show(value) if run.measure == "accuracy" else amount(value)


def _ends(run: Loaded, name: str, y: Floats) -> str:
    """From what to what the score has gone, the first part left out where it can be, since it began from nothing."""
    known = y[np.isfinite(y)]
    if not len(known):
        return f"{short(name)} has no finite score"
    first = known[1] if len(known) > 2 else known[0]
    return f"{short(name)} went from {_value(run, float(first))} to {_value(run, float(known[-1]))}"


def _ways(run: Loaded) -> str:
    """The value of --keep, as it is typed."""
    return "--keep " + short(run.config.get("keep", ""), MAX_TEXT).strip("[]()").replace("'", "").replace(
        '"', ""
    ).replace(" ", "")
