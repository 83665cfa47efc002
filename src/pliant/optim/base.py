"""The contract of upkeep: what is done to a model after an update, so that it stays able to learn."""

import math
from abc import ABC, abstractmethod
from typing import Any, NamedTuple

import torch
from torch import nn

from pliant.core import Question


class Probe(NamedTuple):
    """What upkeep gets to see after an update.

    Attributes:
        update: parameter updates so far, from 1.
        generator: the learner's own; draw from no other, or a life cannot be continued exactly.
        question: the question that was just learned from.
        nats: the loss before the update, nats per answer.
    """

    update: int
    generator: torch.Generator
    question: Question
    nats: float = math.nan


class Upkeep(ABC):
    """Something done to the model or its optimizer after each update.

    Keep everything that moves in attributes that `state_dict` returns: a life is saved, forked
    and resumed in the middle.
    """

    @abstractmethod
    def init(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called once, before the first update."""

    @abstractmethod
    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        """Called after each update, under `torch.no_grad()`; returns plain values for the record."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything that moves, as nested plain values and tensors."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
