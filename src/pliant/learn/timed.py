"""What a predictor costs."""

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import Tensor

from pliant.core import Answer, Question, Record
from pliant.learn.base import Predictor

SHORTEST, PER_OCTAVE, BINS = 1e-6, 24, 24 * 30
"""Seconds of the shortest time told apart; bins for each doubling; up to about 1,000 seconds."""


class Latency:
    """Wall-clock times of calls, as a histogram whose bins are 3 % wide; its size is fixed."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)

    def add(self, seconds: float) -> None:
        place = int(PER_OCTAVE * math.log2(max(seconds, SHORTEST) / SHORTEST))
        self.counts[min(place, BINS - 1)] += 1

    def quantile(self, share: float) -> float:
        """Seconds that a share of the calls did not exceed, NaN if there were none."""
        total = int(self.counts.sum())
        if not total:
            return math.nan
        place = int(np.searchsorted(self.counts.cumsum(), math.ceil(share * total)))
        return SHORTEST * 2 ** ((place + 1) / PER_OCTAVE)


class Timed(Predictor):
    """A predictor seen through a clock: `seconds` of processor time, all threads, since it was made.

    `latency` has the wall-clock times of `predict` and `learn`. The clock is not part of the life; two
    lives that agree to the bit may have cost differently.
    """

    def __init__(self, inner: Predictor):
        self.inner = inner
        self.seconds = 0.0
        self.latency = {"predict": Latency(), "learn": Latency()}

    @property
    def output(self) -> Tensor | None:  # type: ignore[override]
        return self.inner.output

    def predict(self, question: Question) -> Tensor:
        return self._clock("predict", self.inner.predict, question)

    def learn(self, answer: Answer) -> Record:
        return self._clock("learn", self.inner.learn, answer)

    def said(self, answer: Answer) -> Tensor | None:
        return self.inner.said(answer)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def _clock(self, name: str, call: Callable[..., Any], argument: Any) -> Any:
        wall, start = time.perf_counter(), time.process_time()
        result = call(argument)
        self.seconds += time.process_time() - start
        self.latency[name].add(time.perf_counter() - wall)
        return result
