"""The figures of a run, and those that several runs share."""

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np

from pliant.report.labels import label_ends, label_points
from pliant.report.load import Loaded, Tasks, Total, answers, column, drift, speed, tasks
from pliant.report.paint import (
    Line,
    Point,
    any_size,
    count_answers,
    limits,
    limits_from_zero,
    paint_changes,
    paint_grid,
    paint_line,
    paint_tasks,
    plain,
    smooth,
    smoothing,
    svg,
)
from pliant.report.style import (
    BLUE,
    COLORS,
    DASHED,
    FONT,
    HALF,
    LEFT,
    OURS,
    PALETTE,
    REFERENCE,
    RIGHT,
    SMALL,
    WIDE,
    color_of,
    dashes_of,
)
from pliant.report.values import Floats, amount, as_dict, as_list, number, short, show, signed, text

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

RARE = 0.002
HIGHER = "Higher is better. The number behind a name is its mean over the whole run."
KINDS = {
    "bits": ("Bits saved per answer", "bits saved per answer", HIGHER),
    "accuracy": ("Accuracy", "accuracy", "As above."),
    "error": ("Absolute error", "absolute error", "In units of the target. Lower is better."),
}
"""Title, name of the axis and caption of the figures over time."""
MAX_FEATURES, MAX_COLUMNS, MAX_DRIFT = 30, 200, 3.0
SPOKEN = 8
"""Change points that a caption names one by one."""


@dataclass(frozen=True)
class Figure:
    """A figure of the page."""

    title: str
    caption: str
    svg: "Markup"
    wide: bool = True


def figures(run: Loaded, prefix: str) -> list[Figure]:
    """All figures that the run has data for."""
    points = [Point(name, run.totals[name], color_of(name), name == run.names[0]) for name in run.names]
    found = [
        _time_figure(run, prefix, "bits"),
        _time_figure(run, prefix, run.measure),
        _drift_figure(run, prefix),
        _compute_figure(points, prefix),
        _reliability_figure(run, prefix),
        _coverage_figure(run, prefix),
        _pace_figure(run, prefix),
        _memory_figure(run, prefix),
    ]
    return [figure for figure in found if figure is not None]


def _curve(run: Loaded, name: str, kind: str) -> Floats:
    own = column(run, name, kind)
    return column(run, run.reference, kind) - own if kind == "bits" else own


def _worth(total: Total, kind: str) -> str:
    if kind == "error":
        return amount(total.error)
    return signed(total.saved_per_answer) if kind == "bits" else show(total.accuracy)


def _room(labels: list[str]) -> float:
    """Inches for the bold letters right of a wide figure; the same for all kinds, so that they stand in line."""
    return 1.0 + 0.088 * max((len(label) for label in labels), default=0)


def _time_figure(run: Loaded, prefix: str, kind: str) -> Figure | None:
    if not run.records:
        return None
    x, bands = answers(run), tasks(run)
    lines = []
    for name in run.names:
        if kind == "bits" and name == run.reference:
            continue
        y = smooth(_curve(run, name, kind), bands, x)
        label = f"{short(name)} {_worth(run.totals[name], kind)}"
        lines.append(Line(label, x, y, color_of(name), name == run.names[0], dashes_of(name)))
    what, _, caption = KINDS[kind]
    what += f" against {run.reference}" if kind == "bits" else ""
    return _over_time(prefix, kind, what, caption, lines, bands, run.reference, run.changes)


def shared_figures(runs: list[Loaded]) -> list[Figure]:
    """Our own lines of several runs over each other."""
    recorded = [run for run in runs if run.records]
    bands = [tasks(run) for run in recorded]
    agree = all(a[:-1] == b[: len(a) - 1] for a, b in pairwise(sorted(bands, key=len)))
    shared = max(bands, key=len) if agree and bands else []
    found = []
    for kind in ("bits", *_common_measure(recorded)) if recorded else ():
        lines = []
        for index, (run, own) in enumerate(zip(recorded, bands, strict=True)):
            x, name = answers(run), run.names[0]
            y = smooth(_curve(run, name, kind), own, x)
            dashes = "-" if index < len(PALETTE) else DASHED
            label = f"{short(run.label)} {_worth(run.totals[name], kind)}"
            lines.append(Line(label, x, y, run.color, True, dashes))
        what, _, caption = KINDS[kind]
        caption = f"{OURS} in each run. {caption}" if kind == "bits" else caption
        found.append(_over_time("shared", kind, what, caption, lines, shared, recorded[0].reference, []))
    points = [Point(run.label, run.totals[run.names[0]], run.color, True) for run in runs]
    compute = _compute_figure(points, "shared")
    return [*found, compute] if compute else found


def _common_measure(runs: list[Loaded]) -> list[str]:
    """The second figure of several runs; none where the units of their errors may differ."""
    measures = {run.measure for run in runs}
    targets = {(run.config.get("data"), run.config.get("target")) for run in runs}
    return list(measures) if measures == {"accuracy"} or (measures == {"error"} and len(targets) == 1) else []


def _over_time(
    prefix: str, kind: str, what: str, caption: str, lines: list[Line], bands: Tasks, reference: str,
    changes: list[tuple[int, str]],
) -> Figure:  # fmt: skip
    width = max((smoothing(len(line.x)) for line in lines), default=1)
    if kind == "bits":
        caption += " Bands are tasks." if len(bands) > 1 else ""
        caption += f" Lines are running means over {width} windows, never across a change of task." if width > 1 else ""
        caption += _spoken(changes)

    def paint(axes: "Axes") -> None:
        ranges = {"bits": limits, "error": limits_from_zero, "accuracy": lambda lines: (0.0, 1.02)}
        low, high = ranges[kind](lines)
        axes.set_ylim(low, high)
        axes.set_xlim(0, max((float(line.x[-1]) for line in lines), default=0) or 1)
        paint_tasks(axes, bands)
        if kind == "bits":
            axes.axhline(0, color=COLORS[REFERENCE], linewidth=1, dashes=(4, 3), zorder=1)
        if kind == "error":
            axes.yaxis.set_major_formatter(any_size)
        for line in lines:
            paint_line(axes, line)
        zero = [Line(f"{short(reference)} 0", np.array([axes.get_xlim()[1]]), np.zeros(1), COLORS[REFERENCE])]
        label_ends(axes, lines + (zero if kind == "bits" else []))
        count_answers(axes)
        axes.set_ylabel(KINDS[kind][1])
        if kind == "bits":
            paint_changes(axes, [place for place, _ in changes])

    aria = f"{what}, means over the run: " + ", ".join(line.label for line in lines)
    room = _room([line.label.rpartition(" ")[0] for line in lines])
    return Figure(what, caption, svg(f"{prefix}-{kind}", aria, WIDE, (LEFT, room), paint))


def _spoken(changes: list[tuple[int, str]]) -> str:
    if not changes:
        return ""
    said = changes[:SPOKEN]
    names = {name for _, name in said}
    places = [f"{place:,}" + (f" ({short(name)})" if name and len(names) > 1 else "") for place, name in said]
    by = f" by {short(said[0][1])}" if len(names) == 1 and said[0][1] else ""
    more = f" and {len(changes) - SPOKEN:,} more" if len(changes) > SPOKEN else ""
    return f" Marks on the axis: a change was detected{by}, after answer {', '.join(places)}{more}."


def _drift_figure(run: Loaded, prefix: str) -> Figure | None:
    found = drift(run, MAX_FEATURES, MAX_COLUMNS, MAX_DRIFT)
    if found is None:
        return None
    room = _room([short(name) for name in run.names if name != run.reference])
    letters = int((room - 0.15) * 72 / ((FONT - 1.5) * 0.6))

    def paint(axes: "Axes") -> None:
        paint_grid(axes, found.values, found.edges, MAX_DRIFT)
        for row, name in enumerate(found.names):
            axes.annotate(short(name, letters), (1, row + 0.5), (6, 0), xycoords=axes.get_yaxis_transform(),
                          textcoords="offset points", va="center", fontsize=FONT - 1.5, color="#444444")  # fmt: skip
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        count_answers(axes)
        paint_changes(axes, [place for place, _ in run.changes])

    caption = (
        "How far the mean of a feature in a window lies from its mean before, in standard deviations: orange above, "
        f"blue below, gray unknown. Colors end at {MAX_DRIFT:g}."
    )
    caption += f" A column is the mean of {found.width:,} windows." if found.width > 1 else ""
    caption += f" {found.left_out:,} features that moved less are left out." if found.left_out else ""
    names = ", ".join(short(name) for name in found.names)
    size = (WIDE[0], 0.8 + max(0.8, 0.19 * len(found.names)))
    picture = svg(f"{prefix}-drift", f"Drift of features over time, most first: {names}", size, (LEFT, room), paint)
    return Figure("Drift of features", caption, picture)


def _compute_figure(points: list[Point], prefix: str) -> Figure | None:
    points = [point for point in points if point.total.cpu > 0 and math.isfinite(point.y)]
    if not points:
        return None
    low, high = limits([Line("", np.ones(1), np.full(1, point.y), "", point.strong) for point in points])
    costs = [point.total.cpu for point in points]

    def paint(axes: "Axes") -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 4, max(costs) * 4)
        axes.set_ylim(low, high)
        decades = math.log10(max(costs) / min(costs))
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 1.5 else (1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(plain)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axhline(0, color=COLORS[REFERENCE], linewidth=1, dashes=(4, 3), zorder=1)
        for point in points:
            mark = "o" if low <= point.y <= high else "v" if point.y < low else "^"
            axes.plot([point.total.cpu], [np.clip(point.y, low, high)], mark, color=point.color, clip_on=False,
                      markersize=10 if point.strong else 7, zorder=3)  # fmt: skip
        label_points(axes, points)
        axes.set_xlabel("CPU seconds in the whole run (log scale)")
        axes.set_ylabel("bits saved per answer")

    aria = "Bits saved per answer and cost: "
    aria += ", ".join(f"{point.text} for {show(point.total.cpu, 1)} CPU seconds" for point in points)
    caption = "Up is better, left is cheaper."
    picture = svg(f"{prefix}-compute", aria, HALF, (LEFT, RIGHT), paint)
    return Figure("Compute against score", caption, picture, False)


def _reliability_figure(run: Loaded, prefix: str) -> Figure | None:
    lines = []
    for name in run.names:
        values = _rows(run, name, "reliability", ("confidence", "accuracy", "count"))
        values = values[values[:, 2] > 0]
        values = values[values[:, 2] >= RARE * values[:, 2].sum()]
        strong = name == run.names[0]
        if len(values) >= (1 if strong else 3):
            lines.append(Line(short(name), values[:, 0], values[:, 1], color_of(name), strong, dashes_of(name)))
    caption = "On the diagonal a member is as sure as it is right; below it, it is too sure."
    caption += f" Levels with fewer than 1 in {1 / RARE:.0f} of its answers are left out."
    if len(lines) < len(run.names):
        caption += " Members that are always about equally sure are left out."
    aria = "Share of right answers by stated probability for " + ", ".join(line.label for line in lines)
    axes = "how sure (mean probability of the answer)", "how often right"
    return _diagonal_figure("Reliability", caption, aria, f"{prefix}-reliability", lines, axes)


def _coverage_figure(run: Loaded, prefix: str) -> Figure | None:
    lines = []
    for name in run.names:
        values = _rows(run, name, "coverage", ("level", "inside"))
        values = values[np.argsort(values[:, 0], kind="stable")]
        if len(values):
            strong = name == run.names[0]
            lines.append(Line(short(name), values[:, 0], values[:, 1], color_of(name), strong, dashes_of(name)))
    caption = (
        "How many targets fall inside the central interval that should hold a given share of them. "
        "Below the diagonal the intervals are too narrow, above it too wide."
    )
    aria = "Share of targets inside the central interval, by its level, for " + ", ".join(line.label for line in lines)
    axes = "share that should be inside (level of the interval)", "share inside"
    return _diagonal_figure("Coverage", caption, aria, f"{prefix}-coverage", lines, axes)


def _rows(run: Loaded, name: str, table: str, keys: tuple[str, ...]) -> Floats:
    """The rows of a member's table `(n, keys)` in which every value is finite."""
    rows = [as_dict(row) for row in as_list(run.member(name).get(table))]
    values = np.array([[number(row.get(key)) for key in keys] for row in rows]).reshape(-1, len(keys))
    return values[np.isfinite(values).all(1)]


def _diagonal_figure(
    title: str, caption: str, aria: str, prefix: str, lines: list[Line], names: tuple[str, str]
) -> Figure | None:
    """Lines between shares, beside the diagonal on which both are equal."""
    if not lines:
        return None

    def paint(axes: "Axes") -> None:
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
        for line in lines:
            paint_line(axes, line, dots=True)
        label_ends(axes, lines)
        axes.set_xlabel(names[0])
        axes.set_ylabel(names[1])

    room = max(1.2, 0.3 + 0.088 * max(len(line.label) for line in lines))
    return Figure(title, caption, svg(prefix, aria, HALF, (LEFT, room), paint), False)


def _pace_figure(run: Loaded, prefix: str) -> Figure | None:
    spent, name = speed(run), run.names[0]
    known = np.isfinite(spent.cpu)
    if not known.any():
        return None
    line = Line("", spent.ends[known], 1000 * spent.cpu[known] / spent.answers[known], BLUE, True)
    caption = f"CPU time of {name} for one answer, learning included."
    aria = f"CPU milliseconds of {name} per answer over time, median {show(float(np.median(line.y)))}"
    picture = _from_zero(f"{prefix}-pace", aria, [line], "milliseconds")
    return Figure("Time per answer", caption, picture, False)


def _memory_figure(run: Loaded, prefix: str) -> Figure | None:
    sessions: dict[str, list[tuple[float, float]]] = {}
    for row in run.timing:
        point = (number(row.get("answers")), number(row.get("rss")) / 2**20)
        if all(map(math.isfinite, point)):
            sessions.setdefault(text(row.get("session")), []).append(point)
    if not sessions:
        return None
    arrays = [np.array(points, dtype=np.float64) for points in sessions.values()]
    lines = [Line("", points[:, 0], points[:, 1], BLUE, strong=True) for points in arrays]
    caption = "Of the whole process, opponents included." + (" One line per session." if len(lines) > 1 else "")
    aria = f"Memory of the process over time, at most {max(float(line.y.max()) for line in lines):,.0f} MiB"
    return Figure("Memory over time", caption, _from_zero(f"{prefix}-memory", aria, lines, "MiB"), False)


def _from_zero(prefix: str, aria: str, lines: list[Line], unit: str) -> "Markup":
    """A small figure over answers whose axis begins at zero."""

    def paint(axes: "Axes") -> None:
        axes.set_xlim(0, max(float(line.x.max()) for line in lines) or 1)
        axes.set_ylim(0, max(float(line.y.max()) for line in lines) * 1.15 or 1)
        for line in lines:
            paint_line(axes, line)
        count_answers(axes)
        axes.set_ylabel(unit)

    return svg(prefix, aria, SMALL, (LEFT, RIGHT), paint)
