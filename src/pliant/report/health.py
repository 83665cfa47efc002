"""Whether a run stayed able to learn: the looks that its records hold, drawn layer by layer."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from pliant.report.figures import Figure
from pliant.report.labels import label_ends
from pliant.report.load import Loaded, tasks
from pliant.report.paint import Line, count_answers, paint_line, paint_tasks, svg
from pliant.report.style import BLUE, LEFT, ORANGE, SMALL
from pliant.report.values import MAX_NAME, Floats, as_dict, number, short, show, text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_LAYERS = 60
LETTERS = 12


@dataclass(frozen=True)
class Health:
    """A section of the page: the verdict of the newest look in words, and figures."""

    verdict: str
    figures: list[Figure]


@dataclass(frozen=True)
class _Panel:
    """One of the small figures: of each layer of a table, one or two values.

    Attributes:
        of: a value of a layer, from its row.
        worst: picks the line that stands out, of values at the end.
        room: the axis goes at least that far.
    """

    key: str
    title: str
    caption: str
    table: str
    of: dict[str, Callable[[dict[str, Any]], float]]
    worst: Callable[..., Any]
    room: float = 0.01


def _value(name: str) -> Callable[[dict[str, Any]], float]:
    return lambda row: number(row.get(name))


def _of_room(row: dict[str, Any]) -> float:
    room = min(number(row.get("width")), number(row.get("rows")))
    return number(row.get("srank")) / room if room > 0 else math.nan


PANELS = (
    _Panel("rate", "Effective rate", "Of each matrix, over that at the start. Lower turns more slowly.",
           "matrices", {"rate": _value("rate ratio")}, min, 1.0),
    _Panel("units", "Dead and dormant units", "Share of a layer's units. Higher is worse.",
           "units", {"dead": _value("dead"), "dormant": _value("dormant")}, max, 0.2),
    _Panel("moved", "Movement of features", "Since the look before: change of similarities, signs that flipped. "
           "At zero nothing is learned.", "units", {"moved": _value("moved"), "flipped": _value("flipped")}, min),
    _Panel("rank", "Rank of features", "Directions that a layer's units span, over what they could. Lower is worse.",
           "units", {"rank": _of_room}, min),
    _Panel("plasticity", "Plasticity", "Bits by which random targets shape what forks of the learner say after them, "
           "per answer.", "whole", {"plasticity": _value("plasticity")}, min, 1.0),
)  # fmt: skip


def health_of(run: Loaded, prefix: str) -> Health | None:
    """The section about a run; None if its records hold no look."""
    looks = [(float(row["answers"]), row["health"]) for row in run.records if as_dict(row.get("health"))]
    if not looks:
        return None
    x = np.array([at for at, _ in looks])
    found = [_figure(run, panel, f"{prefix}-{panel.key}", x, [look for _, look in looks]) for panel in PANELS]
    verdict = short(text(looks[-1][1].get("verdict", "")), 300)
    return Health(f"After {looks[-1][0]:,.0f} answers: {verdict}.", [figure for figure in found if figure is not None])


def _figure(run: Loaded, panel: _Panel, prefix: str, x: Floats, looks: list[dict[str, Any]]) -> Figure | None:
    tables = [_layers(look, panel.table) for look in looks]
    names = list(dict.fromkeys(name for table in tables for name in table))[:MAX_LAYERS]
    lines, said = [], []
    for (kind, of), color in zip(panel.of.items(), (BLUE, ORANGE), strict=False):
        curves = {name: np.array([of(as_dict(table.get(name))) for table in tables]) for name in names}
        curves = {name: np.where(np.isfinite(y), y, np.nan) for name, y in curves.items()}
        ends: dict[str, float] = {name: y[np.isfinite(y)][-1] for name, y in curves.items() if np.isfinite(y).any()}
        if not ends:
            continue
        worst: str = panel.worst(ends, key=ends.__getitem__)
        lines += [Line("", x, curves[name], color) for name in ends if name != worst]
        lines.append(Line(f"{kind} {show(ends[worst])}", x, curves[worst], color, True))
        said.append(f"{kind}: {short(worst, MAX_NAME)}")
    if not lines:
        return None
    bands = tasks(run)

    def paint(axes: "Axes") -> None:
        axes.set_xlim(0, float(x.max()) or 1)
        axes.set_ylim(0, 1.1 * max([panel.room, *(float(np.nanmax(line.y)) for line in lines)]))
        paint_tasks(axes, bands)
        for line in lines:
            paint_line(axes, line)
        label_ends(axes, [line for line in lines if line.label])
        count_answers(axes)

    layers = f" A line is a layer; thick is the worst at the end ({'; '.join(said)})." if panel.table != "whole" else ""
    aria = f"{panel.title} over time, worst layer at the end, {', '.join(said)}"
    picture = svg(prefix, aria, SMALL, (LEFT, 0.3 + 0.088 * LETTERS), paint)
    return Figure(panel.title, panel.caption + layers, picture, False)


def _layers(look: dict[str, Any], table: str) -> dict[str, Any]:
    """Rows of a table of a look by layer; of matrices those whose direction alone counts."""
    rows = as_dict(look.get(table))
    if table == "whole":
        rows = {"learner": rows}
    if table == "matrices":
        roles = as_dict(look.get("roles"))
        rows = {name: row for name, row in rows.items() if roles.get(name) == "matrix"}
    return rows
