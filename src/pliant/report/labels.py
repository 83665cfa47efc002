"""Names beside lines and points, where they cover nothing."""

from typing import TYPE_CHECKING, Any

import numpy as np

from pliant.report.paint import Line, Point
from pliant.report.style import FONT, dark

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_NEAR = ((10, 0, "left"), (-10, 0, "right"), (0, 13, "center"), (0, -13, "center"),
         (6, 12, "left"), (-6, 12, "right"), (6, -12, "left"), (-6, -12, "right"))  # fmt: skip
# Only where nothing near is free; a leader then says whose name it is.
_FAR = tuple((dx, dy, "left" if dx > 0 else "right" if dx < 0 else "center")
             for reach in (26, 40, 54, 70, 88) for dx, dy in ((0, reach), (0, -reach), (16, reach), (-16, reach),
                                                             (16, -reach), (-16, -reach)))  # fmt: skip

_DISTANT = 6
"""Area in pixels that a name may rather cover than lie a point farther away."""
_TURNS = 4
"""How often each name may look for a better place once the others have theirs."""
_Box = tuple[float, float, float, float]
_Place = tuple[int, int, str]


def label_ends(axes: "Axes", lines: list[Line]) -> None:
    """Each name right of the end of its line, pushed apart where they would cover each other."""
    figure = axes.get_figure()
    assert figure is not None
    height = axes.get_position().height * figure.get_figheight() * 72  # type: ignore[union-attr]
    (low, high), (_, right) = axes.get_ylim(), axes.get_xlim()
    ends = []
    for line in lines:
        known = np.flatnonzero(np.isfinite(line.y))
        if not len(known):
            continue
        x, y = float(line.x[known[-1]]), float(np.clip(line.y[known[-1]], low, high))
        if x >= 0.8 * right:
            ends.append((x, y, line))
        else:
            # A leader from far away would look like data.
            axes.annotate(line.label, (x, y), (8, 0), textcoords="offset points", va="center", zorder=5,
                          bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
                          **_lettering(line))  # fmt: skip
    ends.sort(key=lambda end: end[1])
    places = _apart([(y - low) / (high - low) * height for _, y, _ in ends], gap=FONT * 1.3, top=height)
    for (x, y, line), place in zip(ends, places, strict=True):
        leader = {"arrowstyle": "-", "color": line.color, "linewidth": 0.7, "linestyle": ":", "relpos": (0, 0.5)}
        axes.annotate(line.label, (x, y), (1.03, place / height), textcoords="axes fraction", va="center",
                      arrowprops=leader | {"shrinkA": 1, "shrinkB": 0}, **_lettering(line))  # fmt: skip


def _lettering(of: Line | Point) -> dict[str, Any]:
    return {"color": dark(of.color), "fontweight": "bold" if of.strong else "normal", "annotation_clip": False}


def _apart(places: list[float], gap: float, top: float) -> list[float]:
    """Sorted places moved as little as needed so that neighbours are `gap` apart and none is above `top`."""
    apart: list[float] = []
    for place in places:
        apart.append(max(place, apart[-1] + gap) if apart else place)
    limit = top
    for index in reversed(range(len(apart))):
        apart[index] = min(apart[index], limit)
        limit = apart[index] - gap
    return apart


def label_points(axes: "Axes", points: list[Point]) -> None:
    """A name beside each point, where it covers no other name, point or the line of zero if there is such a place."""
    window, (low, high) = axes.get_window_extent(), axes.get_ylim()
    scale = axes.get_figure().dpi / 72  # type: ignore[union-attr]
    points = sorted(points, key=lambda point: not point.strong)
    spots = [axes.transData.transform((point.total.cpu, np.clip(point.y, low, high))) for point in points]
    zero = axes.transData.transform((1, 0))[1]
    fixed = [(window.x0, zero - 2, window.x1, zero + 2), *((x - 9, y - 9, x + 9, y + 9) for x, y in spots)]
    names: dict[int, tuple[_Place, list[_Box]]] = {}
    for turn in range(_TURNS * len(points)):
        index = turn % len(points)
        taken = fixed + [box for other, (_, boxes) in names.items() if other != index for box in boxes]
        point, (x, y) = points[index], spots[index]
        width, height = len(point.text) * FONT * (0.62 if point.strong else 0.57) * scale, FONT * 1.3 * scale
        choices = []
        for rank, place in enumerate(_NEAR + _FAR):
            dx, dy, align = place
            left = x + dx * scale - {"left": 0.0, "center": width / 2, "right": width}[align]
            box = (left, y + dy * scale - height / 2, left + width, y + dy * scale + height / 2)
            outside = max(0, window.x0 - box[0]) + max(0, box[2] - window.x1 - 20 * scale) + max(0, window.y0 - box[1])
            outside += max(0, box[3] - window.y1 - 14 * scale)
            boxes = [box, *_leader(x, y, box)] if place in _FAR else [box]
            far = _DISTANT * (abs(dy) - 13) if place in _FAR else 0
            covered = sum(_overlap(own, other) for own in boxes for other in taken)
            choices.append((covered + 50 * outside + far, rank, place, boxes))
        _, _, place, boxes = min(choices)
        names[index] = place, boxes
    for index, point in enumerate(points):
        (dx, dy, align), _ = names[index]
        leader = {
            "arrowstyle": "-",
            "color": point.color,
            "linewidth": 0.7,
            "linestyle": ":",
            "shrinkA": 0,
            "relpos": (0.5, 0 if dy > 0 else 1),
        }
        axes.annotate(point.text, (point.total.cpu, np.clip(point.y, low, high)), (dx, dy), va="center", ha=align,
                      textcoords="offset points", arrowprops=leader if (dx, dy, align) in _FAR else None,
                      **_lettering(point))  # fmt: skip


def _leader(x: float, y: float, box: _Box) -> list[_Box]:
    """Small boxes along the line from a point to its name."""
    to_x, to_y = (box[0] + box[2]) / 2, box[1] if box[1] > y else box[3]
    along = [(x + (to_x - x) * part / 6, y + (to_y - y) * part / 6) for part in range(2, 6)]
    return [(a - 4, b - 4, a + 4, b + 4) for a, b in along]


def _overlap(a: _Box, b: _Box) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))
