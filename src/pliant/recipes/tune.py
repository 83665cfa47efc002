"""Choose the settings of a series run by what they would have earned on its first part.

Successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943): all candidates answer the beginning of
the first part, row by row, each answer scored before it is learned from; the better third goes on over
three times as many rows, until the part is used up or time is. Bits per answer decide, those of the
second half of the rows alone: at the very beginning whoever learns fastest wins, which the rest of a
long stream does not reward.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from pliant.core import categorical_nats
from pliant.learn import prequential
from pliant.measure.scores import Bits, Scores
from pliant.recipes import series
from pliant.recipes.panel import row_nats
from pliant.streams import Series

SHARE = 5
"""The first part is one row in so many."""
HALVING = 3
LEAST = 300
"""Rows below which bits tell candidates apart too badly, so a short table gives more than its fifth."""


@dataclass(frozen=True)
class Trial:
    """A candidate and what came of it: rows answered, bits per answer over the second half of them."""

    lr: float
    chunk: int
    size: int
    rows: int
    bits: float

    def settings(self) -> dict[str, Any]:
        return {"lr": self.lr, "chunk": self.chunk, "size": self.size}


def candidates(config: series.SeriesConfig, rows: Any) -> Iterator[series.SeriesConfig]:
    """The default first, then others around it; what the config says itself stays as it is."""
    shape = series.Shape.of(config, rows)
    rates = [shape.lr * factor for factor in (1, 1 / 3, 3)] if config.lr is None else [config.lr]
    chunks = [max(1, int(shape.chunk * factor)) for factor in (1, 2, 0.5)] if config.chunk is None else [config.chunk]
    for size, chunk, lr in product((config.size, 2 * config.size), chunks, rates):
        if size <= series.MAX_SIZE and chunk <= series.MAX_CHUNK:
            yield replace(config, lr=lr, chunk=chunk, size=size)


def tune(
    config: series.SeriesConfig, rows: Any, minutes: float, tell: Callable[[Trial], None] = lambda trial: None
) -> tuple[series.SeriesConfig, list[Trial]]:
    """The best candidate within `minutes` of wall-clock time, and all trials.

    Args:
        config: settings that are None are chosen.
        rows: the source of the rows.
        minutes: how long to look; the trial that is under way then is given up.
        tell: called after each trial.
    """
    end = time.monotonic() + 60 * minutes
    count = series.Shape.of(config, rows).rows
    part = min(count, max(LEAST, count // SHARE))
    running, trials = list(candidates(config, rows)), list[Trial]()
    span = max(LEAST, part // HALVING**2)
    best = running[0]
    while running:
        rung: list[tuple[float, int, series.SeriesConfig]] = []
        for candidate in running:
            trial = _try(candidate, rows, min(span, part), end)
            if trial is None:
                break
            tell(trial)
            trials.append(trial)
            rung.append((trial.bits, len(rung), candidate))
        # Only a rung that is complete, or the first, says who is best over equally many rows.
        if rung and (len(rung) == len(running) or span == max(LEAST, part // HALVING**2)):
            best = min(rung)[2]
        if len(rung) < len(running) or span >= part or len(running) == 1:
            break
        running = [candidate for _, _, candidate in sorted(rung)[: math.ceil(len(rung) / HALVING)]]
        span *= HALVING
    return best, trials


def _try(config: series.SeriesConfig, rows: Any, limit: int, end: float) -> Trial | None:
    """One candidate over the first `limit` rows; None if time ran out."""
    shape, columns = series.Shape.of(config, rows), rows.columns
    stream = Series(rows, chunk=shape.chunk, ahead=shape.ahead, limit=limit)
    learner = series.learner(config, columns, shape, stream.streams)
    scores = Scores(bits=Bits(categorical_nats if columns.task == "classify" else row_nats))
    burning = True
    for _ in prequential(stream, learner, scores):
        if burning and stream.row >= limit // 2:
            scores.load_state_dict(scores.fresh().state_dict())
            burning = False
        if time.monotonic() > end:
            return None
    value = scores["bits"].value()
    return Trial(shape.lr, shape.chunk, config.size, limit, value if math.isfinite(value) else math.inf)
