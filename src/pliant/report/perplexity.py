"""The iso-perplexity figure: models in the plane of accuracy and code length, each on the line of its confidence."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pliant.measure.perplexity import Interval, Summary
from pliant.report.labels import label_ends
from pliant.report.paint import Line, svg
from pliant.report.style import DASHED, LEFT, PALETTE
from pliant.report.values import short

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

SIZE = (9.0, 4.2)
"""Inches."""


@dataclass(frozen=True)
class Measured:
    """A model: what was found of it, and how sure that is."""

    name: str
    summary: Summary
    nll: Interval
    accuracy: Interval


def iso_perplexity(models: Sequence[Measured], best: str | None = None) -> "Markup":
    """A model is a point at its accuracy and its mean code length, with their intervals over documents.

    Its line says what its code length would be at other accuracies, as sure as it is when right and when wrong:
    L(a) = a l_R + (1 - a) l_W. Where it crosses the dashed level of the model that perplexity picks, is the critical
    accuracy: perplexity prefers the model if it is right of there.

    Args:
        models: of the same tokens, and of finite code length.
        best: name of the one that perplexity picks; None: that of the least nats per token.
    """
    low, high = _span(models)
    lines = [_line(model, PALETTE[i % len(PALETTE)], low, high) for i, model in enumerate(models)]
    picked = min(models, key=lambda model: (model.name != best, model.summary.nll))

    def paint(axes: "Axes") -> None:
        from matplotlib.ticker import PercentFormatter

        axes.set_xlim(low, high)
        axes.axhline(picked.summary.nll, color="#888888", linewidth=1, linestyle=DASHED, zorder=1)
        for model, line in zip(models, lines, strict=True):
            _paint_model(axes, model, line)
        heights = np.concatenate([line.y for line in lines])
        pad = 0.05 * (float(heights.max() - heights.min()) or 1.0)
        axes.set_ylim(float(heights.min()) - pad, float(heights.max()) + pad)
        axes.xaxis.set_major_formatter(PercentFormatter(1.0))
        label_ends(axes, lines)
        axes.set_xlabel("right (dashed: the same perplexity; diamonds: critical accuracy)")
        axes.set_ylabel("nats per token")

    label = "Accuracy and nats per token: " + ", ".join(
        f"{model.name} {model.summary.accuracy:.3f}, {model.summary.nll:.3f}" for model in models
    )
    room = 0.4 + 0.1 * max(len(line.label) for line in lines)

    def with_critical(axes: "Axes") -> None:
        paint(axes)
        for model, line in zip(models, lines, strict=True):
            critical = _critical(model.summary, picked.summary.nll)
            if model is not picked and low <= critical <= high:
                axes.plot([critical], [picked.summary.nll], "D", color=line.color, markersize=6, zorder=4)

    return svg("iso-perplexity", label, SIZE, (LEFT, room), with_critical)


def _span(models: Sequence[Measured]) -> tuple[float, float]:
    """Accuracies that the figure shows: all models, and critical accuracies that are not far from them."""
    lowest = min(model.summary.nll for model in models)
    found = [value for model in models for value in (*model.accuracy[1:], model.summary.accuracy)]
    known = [value for value in found if math.isfinite(value)]
    reach = max(max(known) - min(known), 0.02)
    critical = [_critical(model.summary, lowest) for model in models]
    known += [a for a in critical if min(known) - 4 * reach < a < max(known) + 4 * reach]
    pad = max(0.25 * (max(known) - min(known)), 0.01)
    return max(0.0, min(known) - pad), min(1.0, max(known) + pad)


def _critical(model: Summary, nll: float) -> float:
    apart = model.right_nll - model.wrong_nll
    return (nll - model.wrong_nll) / apart if apart else math.nan


def _line(model: Measured, color: str, low: float, high: float) -> Line:
    x = np.array([low, high])
    right, wrong = model.summary.right_nll, model.summary.wrong_nll
    flat = math.isnan(right) or math.isnan(wrong)
    return Line(short(model.name), x, np.full(2, model.summary.nll) if flat else x * right + (1 - x) * wrong, color)


def _paint_model(axes: "Axes", model: Measured, line: Line) -> None:
    axes.plot(line.x, line.y, color=line.color, linewidth=1.2, zorder=2)
    x, y = model.summary.accuracy, model.summary.nll
    axes.plot([x], [y], "o", color=line.color, markersize=7, zorder=3)
    if math.isfinite(model.accuracy.low) and math.isfinite(model.nll.low):
        axes.plot([model.accuracy.low, model.accuracy.high], [y, y], color=line.color, linewidth=2.4, zorder=3)
        axes.plot([x, x], [model.nll.low, model.nll.high], color=line.color, linewidth=2.4, zorder=3)
