"""Plasticity and empowerment as a picture: flow between single turns, the plane of both under their bound, curves."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pliant.report.paint import thousands
from pliant.report.style import BLUE, FONT, ORANGE, STYLE, blend, dark

EMPOWERMENT, PLASTICITY = BLUE, ORANGE
LETTERED = 8
"""Indices up to which the entries of a matrix are written out."""


@dataclass(frozen=True)
class Curve:
    """Both quantities in bits along some axis.

    Attributes:
        x: `(K,)`, and `name`: what it counts.
        empowerment, plasticity: `(K,)`, or `(3, K)` with the ends of intervals below.
        bound: what their sum cannot exceed, at the end.
    """

    name: str
    x: np.ndarray
    empowerment: np.ndarray
    plasticity: np.ndarray
    bound: float

    def rows(self, which: str) -> np.ndarray:
        """`(1 or 3, K)`."""
        return np.atleast_2d(getattr(self, which))


def picture(curve: Curve, *, matrix: np.ndarray | None = None, order: str = "AO", unit: str = "bits") -> str:
    """An SVG document: the flow matrix, if there is one, the plane under the bound, the curves."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        count = 2 + (matrix is not None)
        figure = Figure(figsize=(4.2 * count, 3.6), layout="constrained")
        axes = [figure.add_subplot(1, count, index + 1) for index in range(count)]
        if matrix is not None:
            paint_matrix(axes[0], matrix, order)
        paint_plane(axes[-2], curve, unit)
        paint_curves(axes[-1], curve, unit)
        return document(figure)


def of_learner(looks: Sequence[tuple[int, float]], now: tuple[int, float], error: float, most: float) -> str:
    """An SVG document: bits of one learner at updates that were looked at, and now with its error, under the most."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.add_subplot()
        x, y = np.array([*looks, now], np.float64).T
        axes.axhline(most, color="#888888", linewidth=1)
        axes.annotate(f"at most {most:.3g}", (x[0], most), (0, -12), textcoords="offset points", color="#666666",
                      fontsize=FONT - 1)  # fmt: skip
        axes.plot(x, y, color=PLASTICITY, linewidth=2.2, marker="o", markersize=3)
        axes.errorbar(*now, yerr=error, color=PLASTICITY, marker="o", markersize=7, capsize=4)
        axes.set_ylim(0, 1.06 * most)
        axes.xaxis.set_major_formatter(thousands)
        axes.set_xlabel("updates")
        axes.set_ylabel("bits per answer")
        axes.set_title("plasticity: how far random targets shape what it says", loc="left", fontsize=FONT)
        return document(figure)


def document(figure: Any) -> str:
    """A figure as an SVG document, the same bytes each time."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue().decode()


def paint_matrix(axes: Any, matrix: np.ndarray, order: str) -> None:
    """Bits between single turns, in the color of what they count as: later observations are told of by actions."""
    n, most = len(matrix), max(float(matrix.max()), 1e-9)
    for j, i in np.ndindex(matrix.shape):
        forward = j < i or (j == i and order == "AO")
        share = max(0.0, float(matrix[j, i])) / most
        color = blend(EMPOWERMENT if forward else PLASTICITY, "#ffffff", 0.06 + 0.94 * share)
        axes.fill([i, i + 1, i + 1, i], [j, j, j + 1, j + 1], color=color, linewidth=0)
        if n <= LETTERED:
            axes.annotate(f"{abs(matrix[j, i]):.2f}", (i + 0.5, j + 0.5), ha="center", va="center", fontsize=FONT - 2,
                          color="#ffffff" if share > 0.6 else "#444444")  # fmt: skip
    axes.set_xlim(0, n)
    axes.set_ylim(n, 0)
    axes.set_aspect("equal")
    ticks = np.unique(np.linspace(1, n, min(n, 8)).round().astype(int))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks - 0.5, [str(tick) for tick in ticks])
    axes.set_xlabel("observation")
    axes.set_ylabel("action")
    axes.set_title("flow between single turns, bits", loc="left", fontsize=FONT)


def paint_plane(axes: Any, curve: Curve, unit: str) -> None:
    """The pair under its bound, and how it came there."""
    m, (e, *e_ends), (p, *p_ends) = curve.bound, curve.rows("empowerment"), curve.rows("plasticity")
    axes.fill([0, m, 0], [0, 0, m], color="#f1f1ee", linewidth=0, zorder=0)
    axes.plot([0, m], [m, 0], color="#888888", linewidth=1, zorder=1)
    axes.annotate(f"bound {m:.3g}", (m / 2, m / 2), (4, 4), textcoords="offset points", color="#666666",
                  fontsize=FONT - 1)  # fmt: skip
    axes.plot(e, p, color="#444444", linewidth=1.2, marker="o", markersize=3, zorder=2)
    axes.plot(e[-1:], p[-1:], "o", color="#000000", markersize=7, zorder=3)
    if e_ends:
        low, high = ([end[-1] for end in ends] for ends in zip(e_ends, p_ends, strict=True))
        axes.plot([low[0], high[0]], [p[-1]] * 2, color=EMPOWERMENT, linewidth=2, zorder=3)
        axes.plot([e[-1]] * 2, [low[1], high[1]], color=PLASTICITY, linewidth=2, zorder=3)
    axes.set_xlim(min(0.0, float(e.min())), 1.04 * m)
    axes.set_ylim(min(0.0, float(p.min())), 1.04 * m)
    axes.set_aspect("equal")
    axes.set_xlabel(f"empowerment, {unit}")
    axes.set_ylabel(f"plasticity, {unit}")
    axes.set_title("both under their bound", loc="left", fontsize=FONT)


def paint_curves(axes: Any, curve: Curve, unit: str) -> None:
    """Both along the axis; bands are intervals."""
    from matplotlib.ticker import MaxNLocator

    for which, color in (("empowerment", EMPOWERMENT), ("plasticity", PLASTICITY)):
        y, *ends = curve.rows(which)
        axes.plot(curve.x, y, color=color, linewidth=2.2, marker="o", markersize=3 if len(y) <= 40 else 0)
        if ends:
            axes.fill_between(curve.x, *ends, color=color, alpha=0.2, linewidth=0)
        axes.annotate(which, (curve.x[-1], y[-1]), (6, 0), textcoords="offset points", va="center", color=dark(color),
                      annotation_clip=False)  # fmt: skip
    axes.set_ylim(bottom=min(0.0, *axes.get_ylim()))
    axes.xaxis.set_major_locator(MaxNLocator("auto", integer=True))
    axes.xaxis.set_major_formatter(thousands)
    axes.set_xlabel(curve.name)
    axes.set_ylabel(unit)
    axes.set_title("over time", loc="left", fontsize=FONT)


def scatter(axes: Any, points: Sequence[tuple[float, float]], bound: float) -> None:
    """Many pairs in one plane under one bound."""
    e, p = np.array(points, np.float64).T
    axes.fill([0, bound, 0], [0, 0, bound], color="#f1f1ee", linewidth=0, zorder=0)
    axes.plot([0, bound], [bound, 0], color="#888888", linewidth=1, zorder=1)
    axes.plot(e, p, ".", color="#444444", markersize=3, zorder=2)
    axes.set_xlim(0, 1.04 * bound)
    axes.set_ylim(0, 1.04 * bound)
    axes.set_aspect("equal")
    axes.set_xlabel("empowerment, bits")
    axes.set_ylabel("plasticity, bits")
