"""One page about small learners: sweeps of exploration and initial values, pairs under their bound, closed forms."""

from collections.abc import Sequence
from html import escape
from typing import Any

import numpy as np

from pliant.recipes.reproduce import Claim, Result, Trial
from pliant.report.flow import EMPOWERMENT, PLASTICITY, document, scatter
from pliant.report.style import FONT, STYLE, dark

Runs = Sequence[tuple[Trial, Result]]
AXES = {"exploration": "ε", "initial values": "initial values"}
HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>Plasticity and empowerment, in bits</title>
<style>body{font:15px/1.5 sans-serif;color:#222;max-width:62rem;margin:2rem auto;padding:0 1rem}
table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left;border-bottom:1px solid #ddd;
vertical-align:top}svg{max-width:100%;height:auto}</style>
<h1>Plasticity and empowerment, in bits</h1>"""


def page(results: Runs, claims: Sequence[Claim]) -> str:
    """HTML that needs nothing but itself."""
    rows = [[claim.claim, claim.paper, claim.ours, claim.verdict] for claim in claims]
    closed = next(result for trial, result in results if trial.name == "closed forms")
    exact = [[name, *(f"{abs(value):.4f}" for value in row)] for name, row in closed.items() if name != "seconds"]
    picture = sweeps(results)
    return "\n".join([
        HEAD, picture[picture.index("<svg") :],
        "<p>Lines are exact; dots and bars are estimates from lives that were played and their 95 % intervals, one "
        "seed; hollow where the verdict was that there are not enough lives. On the right each dot is a pair, exact."
        "</p>",
        "<h2>The paper, and what came out here</h2>", _table(["claim", "paper", "here", "verdict"], rows),
        "<h2>Systems with a closed form</h2>",
        _table(["system", "empowerment", "plasticity", "bound", "E by its formula", "P by its formula"], exact),
    ])  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [f"<tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>"]
    cells += [f"<tr>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>" for row in rows]
    return f"<table>{''.join(cells)}</table>"


def sweeps(results: Runs) -> str:
    """The figure: an SVG document."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(12.6, 3.8), layout="constrained")
        for index, (name, axis) in enumerate(AXES.items()):
            axes = figure.add_subplot(1, 3, index + 1)
            _sweep(axes, next(result["rows"] for trial, result in results if trial.name == name))
            axes.set_xlabel(axis)
            axes.set_ylabel("bits")
            axes.set_title(name, loc="left", fontsize=FONT)
        axes = figure.add_subplot(1, 3, 3)
        points = next(result["points"] for trial, result in results if trial.name == "pairs")
        scatter(axes, [(e, p) for e, p, _ in points], points[0][2])
        axes.set_title("pairs that were drawn, under their bound", loc="left", fontsize=FONT)
        return document(figure)


def _sweep(axes: Any, rows: Sequence[dict[str, Any]]) -> None:
    x = np.array([row["at"] for row in rows])
    for which, color, key in (("empowerment", EMPOWERMENT, "o"), ("plasticity", PLASTICITY, "s")):
        y = np.array([row[which] for row in rows])
        axes.plot(x, y, color=color, linewidth=2)
        for row in rows:
            value, low, high = row["estimates"][which]
            axes.plot([row["at"]] * 2, [low, high], color=color, linewidth=1)
            axes.plot(row["at"], value, key, color=color, markersize=5,
                      markerfacecolor=color if row["enough"] else "#ffffff")  # fmt: skip
        axes.annotate(which, (x[-1], y[-1]), (6, 0), textcoords="offset points", va="center", color=dark(color),
                      annotation_clip=False)  # fmt: skip
    literal = [row["literal"] for row in rows]
    axes.plot(x, literal, color="#888888", linewidth=1, linestyle=(0, (4, 3)))
    axes.annotate(
        "literally", (x[0], literal[0]), (0, 5), textcoords="offset points", color="#666666", fontsize=FONT - 1
    )
