"""The contract of a stream."""

from abc import ABC, abstractmethod
from typing import Any, NamedTuple

from torch import Tensor

from pliant.core import Answer, Batch, Question


class Spec(NamedTuple):
    """Sizes of a stream, enough to build a model for it.

    Attributes:
        num_features: F, trailing size of the inputs.
        num_outputs: C classes (or the count of target numbers).
        batch: B, streams asked about in one question.
        steps: T, steps in one question.
    """

    num_features: int
    num_outputs: int
    batch: int
    steps: int

    def asked_before(self, time: int) -> int:
        """Rows asked about before the question at `time`, B for each question."""
        return time // self.steps * self.batch


class Stream(ABC):
    """Asks questions and later says what was true.

    A stream is driven by `send`, which takes what was answered to the last question. Passive data
    ignore it, environments act on it. Two streams never share anything that moves.
    """

    spec: Spec

    @abstractmethod
    def send(self, output: Tensor | None) -> Batch | None:
        """Take the output for the last question (None at first); return what comes next, None at the end."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Position and everything else an exact continuation needs."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""


class Passive(Stream):
    """A stream that is a fixed sequence of (question, answer) pairs; each answer comes with the next reply.

    Implement `pair`. It must be a function of the index alone, so the position is all there is to save.
    """

    def __init__(self, spec: Spec):
        self.spec = spec
        self.asked = 0
        self._answer: Answer | None = None

    @abstractmethod
    def pair(self, index: int) -> tuple[Question, Answer] | None:
        """The question number `index`, from 0, and its answer; None after the last."""

    def send(self, output: Tensor | None) -> Batch | None:
        known = self._answer
        if known is None and self.asked:  # after load_state_dict
            previous = self.pair(self.asked - 1)
            known = previous[1] if previous else None
        pair = self.pair(self.asked)
        self.asked += 1
        question, self._answer = pair or (None, None)
        if question is None and known is None:
            return None
        return Batch(answers=() if known is None else (known,), question=question)

    def state_dict(self) -> dict[str, Any]:
        return {"asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.asked, self._answer = state["asked"], None
