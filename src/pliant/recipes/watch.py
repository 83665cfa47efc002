"""How the features of a stream drift."""

import math
from typing import Any

import torch
from torch import Tensor

from pliant.core import Batch, Question
from pliant.core.columns import Columns
from pliant.streams import Stream

GATHER = 256
"""Questions that are taken note of together."""


class Watched(Stream):
    """A stream whose features are watched on their way: `drift` says how far they have moved.

    Args:
        inner: a stream of rows of a table.
        columns: what its inputs mean.
    """

    def __init__(self, inner: Stream, columns: Columns):
        self.inner, self.columns, self.spec = inner, columns, inner.spec
        self._window, self._before = (torch.zeros(3, len(columns.features), dtype=torch.float64) for _ in range(2))
        self._waiting: list[Tensor] = []

    def send(self, output: Tensor | None) -> Batch | None:
        batch = self.inner.send(output)
        if batch is not None and batch.question is not None:
            self._take(batch.question)
        return batch

    def _take(self, question: Question) -> None:
        self._waiting.append(question.inputs[question.mask][:, : len(self.columns.features)])
        if len(self._waiting) >= GATHER:
            self._add()

    def _add(self) -> None:
        """Take note of the rows that wait; many at a time, since one costs as much."""
        x = torch.cat([torch.empty(0, len(self.columns.features), dtype=torch.float64), *self._waiting])
        there = ~x.isnan()
        # Wild values must not make the rest of the table useless.
        x = x.nan_to_num().clamp(-1e100, 1e100)
        self._window = self._window + torch.stack([there.double().sum(0), x.sum(0), x.square().sum(0)])
        self._waiting = []

    def drift(self) -> dict[str, float | None]:
        """By feature: mean since the last call less the mean before it, in standard deviations before it."""
        self._add()
        (new, sum_new, _), (old, sum_old, squares) = self._window, self._before
        mean = sum_old / old
        deviation = (squares / old - mean.square()).clamp(min=0).sqrt()
        moved = ((sum_new / new - mean) / deviation).tolist()
        self._before, self._window = self._before + self._window, torch.zeros_like(self._window)
        names = [column.name for column in self.columns.features]
        return {
            name: round(value, 4) if math.isfinite(value) else None for name, value in zip(names, moved, strict=True)
        }

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict(), "window": self._window, "before": self._before,
                "waiting": list(self._waiting)}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self._window, self._before = state["window"], state["before"]
        self._waiting = list(state["waiting"])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # what copying asks for is about this stream, not the inner one
            raise AttributeError(name)
        return getattr(self.__dict__["inner"], name)
