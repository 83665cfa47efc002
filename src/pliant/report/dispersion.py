"""The figure of dispersion: the top share of every head against the keys that it sees, layer by layer."""

import io
import math
import warnings
from collections.abc import Sequence

from pliant.measure.dispersion import Head, share_limits
from pliant.report.paint import plain
from pliant.report.style import DASHED, FONT, PALETTE, STYLE, dark

COLUMNS, CELL, GAP = 4, (2.5, 1.9), 0.55
"""Layers beside each other, inches of one, and inches between them."""


def draw(heads: Sequence[Head]) -> str:
    """An SVG document: a square for each layer, a line for each head with its number; dashed: the most that one key of
    n could have.

    The dashed line is at the widest spread of logits that a head of the layer had.
    """
    from matplotlib import style
    from matplotlib.figure import Figure

    layers = list(dict.fromkeys(head.layer for head in heads))
    columns = min(COLUMNS, len(layers))
    rows = math.ceil(len(layers) / columns)
    size = columns * (CELL[0] + GAP) + 0.3, rows * (CELL[1] + GAP) + 0.35
    buffer = io.BytesIO()
    with style.context(["default", STYLE]), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size)
        for place, layer in enumerate(layers):
            row, column = divmod(place, columns)
            left, top = column * (CELL[0] + GAP) + GAP, row * (CELL[1] + GAP) + 0.3
            axes = figure.add_axes(
                (left / size[0], 1 - (top + CELL[1]) / size[1], CELL[0] / size[0], CELL[1] / size[1])
            )
            own = [head for head in heads if head.layer == layer]
            _paint(axes, own, first=column == 0, last=place + columns >= len(layers))
            axes.set_title(layer, fontsize=FONT - 1, loc="left", color="#444444")
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return buffer.getvalue().decode()


def _paint(axes, heads: Sequence[Head], first: bool, last: bool) -> None:  # type: ignore[no-untyped-def]
    from matplotlib.ticker import FuncFormatter, LogLocator

    longest = max(head.keys[-1] for head in heads)
    lengths = [2**level for level in range(1, math.ceil(math.log2(longest)) + 1)]
    widest = max(head.widest for head in heads)
    limits = [share_limits(widest, n)[1] for n in lengths]
    axes.plot(lengths, limits, color="#888888", linewidth=1, linestyle=DASHED)
    for head in heads:
        color = PALETTE[head.head % len(PALETTE)]
        axes.plot(head.keys, head.top, color=color, linewidth=1.1, alpha=0.75, marker="o", markersize=2)
        axes.annotate(str(head.head), (head.keys[0], head.top[0]), (-4, 0), textcoords="offset points", va="center",
                      ha="right", fontsize=FONT - 3, color=dark(color), annotation_clip=False)  # fmt: skip
    axes.set_xscale("log", base=2)
    axes.set_xlim(left=1.3)
    axes.xaxis.set_major_locator(LogLocator(base=4, numticks=6))
    axes.xaxis.set_major_formatter(FuncFormatter(plain))
    axes.set_ylim(0, 1.02)
    axes.tick_params(labelsize=FONT - 2)
    if first:
        axes.set_ylabel("share of the top key", fontsize=FONT - 1)
    if last:
        axes.set_xlabel("keys that are visible", fontsize=FONT - 1)
