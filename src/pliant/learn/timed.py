"""What a predictor costs."""

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from pliant.core import Answer, Question, Record
from pliant.learn.base import Predictor


class Timed(Predictor):
    """A predictor seen through a clock: `seconds` of processor time, all threads, since it was made.

    The clock is not part of the life; two lives that agree to the bit may have cost differently.
    """

    def __init__(self, inner: Predictor):
        self.inner = inner
        self.seconds = 0.0

    @property
    def output(self) -> Tensor | None:  # type: ignore[override]
        return self.inner.output

    def predict(self, question: Question) -> Tensor:
        return self._clock(self.inner.predict, question)

    def learn(self, answer: Answer) -> Record:
        return self._clock(self.inner.learn, answer)

    def said(self, answer: Answer) -> Tensor | None:
        return self.inner.said(answer)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)

    def _clock(self, call: Callable[..., Any], argument: Any) -> Any:
        start = time.process_time()
        result = call(argument)
        self.seconds += time.process_time() - start
        return result
