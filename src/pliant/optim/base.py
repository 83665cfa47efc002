"""The contract of upkeep: what is done to a model after an update, so that it stays able to learn."""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core import Question


class Lesson(NamedTuple):
    """An answer that an update learns from, with all that it takes to learn from it once more.

    Attributes:
        inputs, reset, mask: of the question, `(R, T, ...)`, its R rows that were answered.
        before: the state of these rows before the question, as the parameters of that time made it.
        targets: `(R, T, ...)`.
        use: `(R, T)` bool, which of the targets may be learned from.
    """

    inputs: Tensor
    reset: Tensor
    mask: Tensor
    before: Any
    targets: Tensor
    use: Tensor


class Probe(NamedTuple):
    """What upkeep gets to see around an update.

    Attributes:
        update: parameter updates so far, from 1.
        generator: the learner's own; draw from no other, or a life cannot be continued exactly.
        question: the question that was just learned from.
        nats: the loss before the update, nats per answer.
        lessons: the answers that this update is the first to learn from; empty where no upkeep of the learner has
            a `gradient`.
    """

    update: int
    generator: torch.Generator
    question: Question
    nats: float = math.nan
    lessons: tuple[Lesson, ...] = ()


class Upkeep(ABC):
    """Something done to the model or its optimizer after each update.

    Keep everything that moves in attributes that `state_dict` returns: a life is saved, forked
    and resumed in the middle.
    """

    @abstractmethod
    def init(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called once, before the first update."""

    def gradient(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> None:  # noqa: B027
        """Called before each update, with autograd on, when the gradient of the loss is in `grad` of the parameters.

        May add to `grad` in place; what comes of it is checked, clipped and stepped along as one gradient. If it is not
        finite there is no update and no call of `apply`.
        """

    @abstractmethod
    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        """Called after each update, under `torch.no_grad()`; returns plain values for the record."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that moves, as nested plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
