"""What figures are painted with: an SVG element, lines, bands, marks, tiles."""

import io
import warnings
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

from pliant.report.load import Tasks, Total
from pliant.report.style import BLUE, FONT, ORANGE, STYLE, blend
from pliant.report.values import MINUS, Floats, short, signed, zero

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

SMOOTH_FROM, POINTS = 60, 40
"""Lines with more windows than the first are smoothed, over about 1/POINTS of their length."""
MAX_MARKS = 500
SHADES = 6
"""Steps of color from the middle to either end."""


@dataclass(frozen=True)
class Line:
    """A line of a figure."""

    label: str
    x: Floats
    y: Floats
    color: str
    strong: bool = False
    dashes: Any = "-"


@dataclass(frozen=True)
class Point:
    """A member in the plane of compute and score."""

    name: str
    total: Total
    color: str
    strong: bool

    @property
    def y(self) -> float:
        """Bits saved per answer."""
        return self.total.saved_per_answer

    @property
    def text(self) -> str:
        """Name and score."""
        return f"{short(self.name)} {zero(signed(self.y))}"


def svg(
    prefix: str, label: str, size: tuple[float, float], margins: tuple[float, float], paint: Callable[["Axes"], None]
) -> "Markup":
    """A figure as an SVG element whose ids begin with `prefix`; `margins` are left and right, inches."""
    from markupsafe import Markup
    from matplotlib import style
    from matplotlib.figure import Figure

    width, height = size
    buffer = io.BytesIO()
    with style.context(["default", STYLE]), warnings.catch_warnings():
        # Only for measuring: the browser has the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size)
        left, right = margins
        axes = figure.add_axes((left / width, 0.52 / height, 1 - (left + right) / width, 1 - 0.8 / height))
        paint(axes)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Markup(_inline(buffer.getvalue(), prefix, label))  # ElementTree escapes all text in it


def _inline(document: bytes, prefix: str, label: str) -> str:
    """An SVG document as an element that can share a page with others."""
    root = ElementTree.fromstring(document)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # a style would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            plain = name.rpartition("}")[2]  # href needs no xlink today
            if plain == "id":
                value = f"{prefix}-{value}"
            elif plain == "href":
                value = value.replace("#", f"#{prefix}-", 1)
            element.set(plain, value.replace("url(#", f"url(#{prefix}-"))
    for name in ("width", "height"):
        del root.attrib[name]
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


def paint_line(axes: "Axes", line: Line, dots: bool = False) -> None:
    """A line; a dot on every point if asked for, else only on those that have no neighbour."""
    known = np.pad(np.isfinite(line.y), 1)
    alone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:]).tolist()  # no line goes there
    axes.plot(line.x, line.y, color=line.color, linewidth=2.4 if line.strong else 1.2, linestyle=line.dashes,
              marker="o", markevery=None if dots else alone, markersize=5 if line.strong else 3.5,
              zorder=3 if line.strong else 2)  # fmt: skip


def paint_tasks(axes: "Axes", tasks: Tasks) -> None:
    """Light bands with names above; names are left out where they would not fit."""
    if len(tasks) < 2:
        return
    every = -(-len(tasks) // 30)
    for index, (start, end, name) in enumerate(tasks):
        if index % 2:
            axes.axvspan(start, end, color="#f1f1ee", linewidth=0, zorder=0)
        if index % every == 0:
            text = f"task {name}" if index == 0 and len(tasks) <= 20 else name
            axes.annotate(text[:8], ((start + end) / 2, 1), (0, 3), xycoords=axes.get_xaxis_transform(),
                          textcoords="offset points", ha="center", fontsize=FONT - 2, color="#777777")  # fmt: skip


def paint_changes(axes: "Axes", changes: Sequence[int]) -> None:
    """Marks that stand on the x axis, explained below its end."""
    low, high = axes.get_xlim()
    inside = [x for x in changes if low <= x <= high][:MAX_MARKS]
    if not inside:
        return
    x, y = np.repeat(np.array(inside, dtype=np.float64), 3), np.tile([0, 0.08, np.nan], len(inside))
    axes.plot(x, y, color="#1d1d1b", linewidth=1.3, transform=axes.get_xaxis_transform(), zorder=4)
    window, point = axes.get_window_extent(), axes.get_figure().dpi / 72  # type: ignore[union-attr]
    wide, tall = window.width / point, window.height / point
    axes.plot([1 - 84 / wide] * 2, [-37 / tall, -28 / tall], color="#1d1d1b", linewidth=1.3,
              transform=axes.transAxes, clip_on=False)  # fmt: skip
    axes.annotate("change detected", (1, 0), (-79, -33), xycoords="axes fraction", textcoords="offset points",
                  va="center", fontsize=FONT - 1, color="#444444")  # fmt: skip


def paint_grid(axes: "Axes", values: Floats, edges: Floats, clip: float) -> None:
    """Rows of `values`, the first on top, as colors from -clip to clip; gray where unknown; a scale on the left.

    Neighbours of one color are one tile and all tiles of a color one element, so that many values stay few.
    """
    rows, _ = values.shape
    axes.set_xlim(edges[0], edges[-1] or 1)
    axes.set_ylim(rows, 0)
    levels = np.where(np.isnan(values), SHADES + 1, np.round(np.nan_to_num(values) / clip * SHADES)).astype(int)
    tiles: dict[int, list[tuple[float, ...]]] = {}
    for row, line in enumerate(levels):
        cuts = [0, *(np.flatnonzero(np.diff(line)) + 1).tolist(), len(line)]
        for start, end in pairwise(cuts):
            if line[start]:  # the middle is the white of the page
                tiles.setdefault(int(line[start]), []).append((edges[start], float(row), edges[end], row + 1.0))
    for level in sorted(tiles):
        _tile(axes, tiles[level], _shade(level), axes.transData)
    for row in range(1, rows):
        axes.axhline(row, color="#ffffff", linewidth=0.8)
    for level in range(-SHADES, SHADES + 1):
        low, high = ((level + SHADES + extra) / (2 * SHADES + 1) for extra in (0, 1))
        _tile(axes, [(-0.024, low, -0.014, high)], _shade(level), axes.transAxes)
    for place, words in ((0, f"{MINUS}{clip:g}"), (0.5, "0"), (1, f"+{clip:g}")):
        axes.annotate(words, (-0.029, place), xycoords="axes fraction", ha="right", va="center", fontsize=FONT - 1,
                      color="#444444", annotation_clip=False)  # fmt: skip


def _shade(level: int) -> str:
    """From blue over white to orange; gray for what is unknown."""
    if abs(level) > SHADES:
        return "#dededa"
    return blend(ORANGE if level > 0 else BLUE, "#ffffff", abs(level) / SHADES)


def _tile(axes: "Axes", boxes: list[tuple[float, ...]], color: str, transform: Any) -> None:
    from matplotlib.patches import PathPatch
    from matplotlib.path import Path

    corners = np.array([[(x0, y0), (x1, y0), (x1, y1), (x0, y1), (x0, y0)] for x0, y0, x1, y1 in boxes])
    codes = np.tile([Path.MOVETO, Path.LINETO, Path.LINETO, Path.LINETO, Path.CLOSEPOLY], len(boxes))
    axes.add_patch(PathPatch(Path(corners.reshape(-1, 2), codes), facecolor=color, linewidth=0, antialiased=False,
                             transform=transform, clip_on=False, zorder=1))  # fmt: skip


def limits(lines: list[Line]) -> tuple[float, float]:
    """Range of the y axis: our lines and zero for certain; a line far away may leave the picture."""
    ours = np.concatenate([line.y for line in lines if line.strong] or [np.zeros(1)])
    every = np.concatenate([line.y for line in lines] or [np.zeros(1)])
    ours, every = ours[np.isfinite(ours)], every[np.isfinite(every)]
    low, high = min(0.0, *ours.tolist(), 0.0), max(0.0, *ours.tolist(), 0.0)
    span = max(high - low, 0.1)
    low = min(low, max(float(every.min(initial=0)), low - span))
    high = max(high, min(float(every.max(initial=0)), high + span))
    return low - 0.06 * (high - low) - 0.01, high + 0.06 * (high - low) + 0.01


def limits_from_zero(lines: list[Line]) -> tuple[float, float]:
    """As `limits`, for values of any size that are not negative: up to twice the most of our lines."""
    most = [max((float(np.nanmax(line.y)) for line in chosen if np.isfinite(line.y).any()), default=0.0)
            for chosen in ([line for line in lines if line.strong], lines)]  # fmt: skip
    high = min(2 * most[0], most[1]) if most[0] > 0 else most[1]
    return 0.0, 1.06 * high if high > 0 else 1.0


def smoothing(windows: int) -> int:
    """Windows that a running mean goes over."""
    return 1 if windows <= SMOOTH_FROM else 2 * (windows // POINTS // 2) + 1


def smooth(y: Floats, tasks: Tasks, x: Floats) -> Floats:
    """Running mean `(n,)` over windows of one task; what is missing stays missing."""
    reach = smoothing(len(y)) // 2
    starts = [start for start, _, _ in tasks] or [0.0]
    task = np.searchsorted(starts, x, side="left")
    means = y.copy()
    for index in np.flatnonzero(np.isfinite(y)) if reach else ():
        near = slice(max(0, index - reach), index + reach + 1)
        means[index] = np.nanmean(y[near][task[near] == task[index]])
    return means


def count_answers(axes: "Axes") -> None:
    """Let the axis below count answers, of which there are whole ones only."""
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("answers")
    axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    axes.xaxis.set_major_formatter(thousands)


def thousands(value: float, position: float | int = 0) -> str:
    """A tick of whole numbers."""
    return f"{value:,.0f}"


def plain(value: float, position: float | int = 0) -> str:
    """A tick of a log axis."""
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


def any_size(value: float, position: float | int = 0) -> str:
    """A tick of numbers of any size, in few letters."""
    for start, unit, letter in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if start <= abs(value) < 1e12:
            return f"{value / unit:.4g}{letter}"
    return f"{value:.4g}"
