"""The contract of whoever answers a stream: our learner and its opponents alike."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from pliant.core import Answer, Question, Record


class Predictor(ABC):
    """Answers questions, and may learn when the truth comes."""

    output: Tensor | None
    """What was answered to the last question; a stream gets it with the next `send`."""

    resumable: bool = True
    """Whether `state_dict` works, so that a life with it can be saved."""

    @abstractmethod
    def predict(self, question: Question) -> Tensor:
        """The answer, `(B, T, ...)`. Moves the memory of the stream and nothing else."""

    @abstractmethod
    def learn(self, answer: Answer) -> Record:
        """Change, given what was true; after a final answer the question is forgotten."""

    @abstractmethod
    def said(self, answer: Answer) -> Tensor | None:
        """What was answered to the question that `answer` is about, for its rows; None if forgotten."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that moves."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""


def rows_of(output: Tensor, question_rows: Tensor, answer_rows: Tensor) -> Tensor:
    """The part of `output` `(B, T, ...)`, given for `question_rows`, that belongs to `answer_rows`."""
    if answer_rows is question_rows or answer_rows.equal(question_rows):
        return output
    place = {int(row): i for i, row in enumerate(question_rows)}
    return output[[place[int(row)] for row in answer_rows]]
