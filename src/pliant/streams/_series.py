"""Rows of a table as a stream of questions and late answers.

Step s of a stream asks for the label of its row s, given the features of the row and the newest label
that is known by then, which is that of step s - lag. To forecast is the same, but the label of a step
is the value `horizon` rows on. With `chunk` > 1 a question holds that many steps. What a causal model
says is then the same as row by row; only learning waits until the question is over.

Rows of one group are one stream. With groups a question holds one step of several streams: the longest
run of rows no two of which are of one group, at most `chunk` of them.
"""

import copy
from collections import Counter, deque
from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from pliant.core import KNOWN, Answer, Batch, Question, UsageError
from pliant.core.columns import Columns
from pliant.streams._table import Block, scan
from pliant.streams.base import Spec, Stream


@runtime_checkable
class Source(Protocol):
    """Rows in order, the same every time: a table in a file, arrays, a generator.

    `columns` is their schema, `groups` the names of the streams among them (none if there is but one), `rows` how many
    there are, `notes` sentences about them for a person.
    """

    @property
    def columns(self) -> Columns: ...

    @property
    def groups(self) -> tuple[str, ...]: ...

    @property
    def rows(self) -> int: ...

    @property
    def notes(self) -> tuple[str, ...]: ...

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """Consecutive rows from row `start` on, in blocks of any size."""


def series(
    data: str | Path | Source, *, target: Sequence[str] = (), task: str = "auto", horizon: int = 1, delay: int = 0,
    chunk: int = 1, limit: int | None = None, **options: Any,
) -> "Series":  # fmt: skip
    """The rows of a table as a stream; see `Series`.

    Args:
        data: a file, a folder, or rows of another kind, which then know target, task and horizon + delay themselves.
        target, task, horizon, delay, options: see `pliant.streams._table.scan`.
        chunk, limit: see `Series`.

    Raises:
        UsageError: the data cannot be read or cannot serve the task.
    """
    if isinstance(data, str | Path):
        data = scan(data, task=task, target=target, horizon=horizon, delay=delay, **options)
    ahead = data.columns.lag - delay if data.columns.task == "forecast" else 0
    return Series(data, chunk=chunk, ahead=ahead, limit=limit)


class Series(Stream):
    """A stream of the rows of `source`.

    Inputs `(B, T, F + G)` float64, the last G channels the newest known label (see `Columns`). Targets
    `(B, T)` int64 for classes, `(B, T, G)` float64 for numbers. A row without a label is asked and never
    scored. Tags: `group`, the index of the group; of classes also `known`, the newest label of the stream that
    was known when the row was asked, -1 if none. That may be older than the one among the inputs, which may be missing.

    Args:
        source: the rows.
        chunk: rows in a question.
        ahead: rows from a step to the value that it asks for; 0 unless the task is to forecast.
        limit: stop after this many rows; None reads all.

    Attributes:
        problems: what was met while reading, counted.
        error: why the source broke off before its end, None if it did not. The rows before are asked and answered.
    """

    def __init__(self, source: Source, *, chunk: int = 1, ahead: int = 0, limit: int | None = None):
        if chunk < 1:
            raise UsageError(f"series: chunk is {chunk}, expected at least 1 row")
        columns, streams = source.columns, max(1, len(source.groups))
        self.source, self.columns, self.chunk, self.ahead, self.limit = source, columns, chunk, ahead, limit
        batch, steps = (1, chunk) if streams == 1 else (min(chunk, streams), 1)
        self.spec = Spec(columns.num_features, columns.num_outputs, batch, steps)
        self.problems: Counter[str] = Counter()
        self.error: str | None = None
        self.row = 0
        self.asked = np.zeros(streams, np.int64)  # steps of each stream
        # The targets of its newest rows: that of row i at i modulo the length.
        self.values = np.full((streams, columns.lag + 3 * steps + 1, len(columns.targets)), np.nan)
        # Of classes the newest label that was known when each of these rows was asked, and that of all rows.
        self.held = np.full(self.values.shape[:2] if columns.task == "classify" else (0, 0), np.nan)
        self.newest = np.full(streams, np.nan)
        # For each stream the parts of questions that wait for its labels.
        self.waiting: list[deque[_Part]] = [deque() for _ in range(streams)]
        self.open: Counter[int] = Counter()  # time of a question -> parts that wait
        self._touched: Sequence[int] = ()  # streams of the last question
        self._blocks: Iterator[Block] | None = None
        self._block: Block | None = None
        self._at = 0
        self._begun = 0  # row at which the block begins
        self._counted = 0  # rows whose problems have been counted

    @property
    def streams(self) -> int:
        """How many streams a learner has to remember, one for each group."""
        return len(self.asked)

    def send(self, output: Tensor | None) -> Batch | None:
        rows = self._take()
        if rows is None:
            return self._end()
        features, targets, groups = rows
        steps = self._keep(targets, groups)
        # A label of step i is known once step i + lag is about to be asked; that of a forecast without
        # delay stands in the very row that is asked then.
        asking = groups[:1] if self.streams == 1 else groups
        streams = self._touched if self.columns.lag > self.ahead else asking.tolist()
        known = [part for stream in streams for part in self._due(stream, self.columns.lag)]
        return Batch(self._answers(known), self._ask(features, groups, steps))

    def _end(self) -> Batch | None:
        """All answers that are left: nothing more will be asked, so whatever the source holds is known."""
        self._touched = ()
        beyond = self.asked[:, None] + np.arange(self.ahead)
        np.put_along_axis(self.values, beyond[..., None] % self.values.shape[1], np.nan, 1)
        answers = self._answers([part for stream in range(self.streams) for part in self._due(stream, 0)])
        return Batch(answers, None) if answers else None

    def _take(self) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
        """Features, targets and groups of the rows of the next question; None after the last."""
        parts: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        taken: set[int] = set()
        left = self.chunk
        while left and (block := self._fetch()) is not None:
            size = min(left, len(block.groups) - self._at)
            if self.limit is not None:
                size = min(size, self.limit - self.row)
            if self.streams > 1:
                size = _distinct(block.groups[self._at : self._at + size], taken)
            if not size:
                break
            span = slice(self._at, self._at + size)
            parts.append((block.features[span], block.targets[span], block.groups[span]))
            self._at, self.row, left = self._at + size, self.row + size, left - size
        if not parts:
            return None
        features, targets, groups = parts[0] if len(parts) == 1 else map(np.concatenate, zip(*parts, strict=True))
        return features, targets, groups

    def _fetch(self) -> Block | None:
        """A block with rows left, None at the end."""
        if self._block is not None and self._at < len(self._block.groups):
            return self._block
        if self.error is not None:
            return None
        if self._blocks is None:
            self._blocks = self.source.blocks(self._begun)
        try:
            self._block = next(self._blocks, None)
        except UsageError as error:
            self.error, self._block = str(error), None
        if (block := self._block) is None:
            return None
        self._begun, self._at = block.first, self.row - block.first
        if block.first >= self._counted:
            self.problems.update(block.problems)
            self._counted = block.first + len(block.groups)
        return block if self._at < len(block.groups) else self._fetch()

    def _keep(self, targets: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Take note of the targets of rows; returns their steps."""
        steps = self.asked[groups] + (np.arange(len(groups)) if self.streams == 1 else 0)
        self.values[groups, steps % self.values.shape[1]] = targets
        return steps

    def _ask(self, features: np.ndarray, groups: np.ndarray, steps: np.ndarray) -> Question:
        single = self.streams == 1
        shape = (1, len(groups)) if single else (len(groups), 1)
        streams = groups[:1] if single else groups
        size, behind = self.values.shape[1], self.columns.lag - self.ahead
        known = self.values[groups, (steps - behind) % size]
        first = steps[:: shape[1]].tolist()
        if min(first) < behind:
            known[steps < behind] = np.nan
        if self.columns.task == "classify":
            self.held[groups, steps % size] = self._hold(groups, known[:, 0])
        time = self.row - len(groups)
        self._touched = streams.tolist()
        for stream, begin in zip(self._touched, first, strict=True):
            self.waiting[stream].append(_Part(time, begin, shape[1]))
        self.open[time] = shape[0]
        self.asked[streams] += shape[1]
        inputs = torch.from_numpy(np.concatenate([features, known], 1)).view(*shape, -1)
        reset = torch.from_numpy((steps == 0).reshape(shape)) if 0 in first else _flags(shape, False)
        return Question(inputs, reset, _flags(shape, True), time, _indices(self._touched))

    def _hold(self, groups: np.ndarray, known: np.ndarray) -> np.ndarray:
        """The newest label `(n,)` at rows of these groups `(n,)`, where `known` is missing that of an older row."""
        if self.streams > 1:
            held = self.newest[groups] = np.where(np.isnan(known), self.newest[groups], known)
            return held
        held = np.concatenate([self.newest, known])
        held = held[np.maximum.accumulate(np.where(np.isnan(held), 0, np.arange(len(held))))]
        self.newest = held[-1:].copy()
        return held[1:]

    def _due(self, stream: int, lag: int) -> list[tuple[int, "_Part"]]:
        """The parts of questions that are answered `lag` steps after the last of them."""
        waiting, due = self.waiting[stream], []
        while waiting and waiting[0].first + waiting[0].steps - 1 + lag <= self.asked[stream]:
            due.append((stream, waiting.popleft()))
        return due

    def _answers(self, due: list[tuple[int, "_Part"]]) -> tuple[Answer, ...]:
        """One answer for each question, about the rows that are due."""
        by_time: dict[int, list[tuple[int, _Part]]] = {}
        for stream, part in due:
            by_time.setdefault(part.time, []).append((stream, part))
        return tuple(self._answer(time, by_time[time]) for time in sorted(by_time))

    def _answer(self, time: int, due: list[tuple[int, "_Part"]]) -> Answer:
        streams, length = [stream for stream, _ in due], due[0][1].steps
        steps = np.array([part.first + self.ahead for _, part in due])[:, None] + np.arange(length)
        labels = self.values[np.array(streams)[:, None], steps % self.values.shape[1]]
        there = labels == labels
        shown = _flags(there.shape[:2], True)
        if not there.all():
            shown, labels = torch.from_numpy(there.all(-1)), np.where(there, labels, 0.0)
        targets = torch.from_numpy(labels[..., 0].astype(np.int64) if self.columns.task == "classify" else labels)
        self.open[time] -= len(due)
        if final := not self.open[time]:
            del self.open[time]
        group = _indices(streams)
        tags = {"group": group[:, None].expand(shown.shape)}
        if self.columns.task == "classify":
            known = self.held[np.array(streams)[:, None], steps % self.held.shape[1]]
            tags[KNOWN] = torch.from_numpy(np.where(np.isnan(known), -1, known).astype(np.int64))
        return Answer(targets, shown, shown, time, group, final, tags)

    def state_dict(self) -> dict[str, Any]:
        waiting = [[tuple(part) for part in parts] for parts in self.waiting]
        return {
            "row": self.row,
            "begun": self._begun,
            "counted": self._counted,
            "asked": torch.from_numpy(self.asked.copy()),
            "values": torch.from_numpy(self.values.copy()),
            "held": torch.from_numpy(self.held.copy()),
            "newest": torch.from_numpy(self.newest.copy()),
            "waiting": waiting,
            "open": dict(self.open),
            "touched": list(self._touched),
            "problems": dict(self.problems),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.row, self._begun, self._counted = state["row"], state["begun"], state["counted"]
        self.asked, self.values = state["asked"].numpy().copy(), state["values"].numpy().copy()
        if "held" in state:  # not in lives of before
            self.held, self.newest = state["held"].numpy().copy(), state["newest"].numpy().copy()
        self.waiting = [deque(_Part(*part) for part in parts) for parts in state["waiting"]]
        self.open, self.problems = Counter(state["open"]), Counter(state["problems"])
        self._touched = state["touched"]
        self.error, self._blocks, self._block, self._at = None, None, None, 0

    def __deepcopy__(self, memo: dict[int, Any]) -> "Series":
        """A stream of its own at the same place; the source, which nobody changes, is shared."""
        twin = type(self)(self.source, chunk=self.chunk, ahead=self.ahead, limit=self.limit)
        memo[id(self)] = twin
        twin.load_state_dict(copy.deepcopy(self.state_dict()))
        return twin


class _Part(NamedTuple):
    """What one stream was asked in one question: its steps from `first` on."""

    time: int
    first: int
    steps: int


@lru_cache(maxsize=256)
def _flags(shape: tuple[int, ...], value: bool) -> Tensor:
    """The same flag for all steps; one tensor for all questions of a shape, since nobody changes it."""
    return torch.full(shape, value)


def _indices(streams: Sequence[int]) -> Tensor:
    """Of streams, int64 `(n,)`; the same tensor each time for the first one alone."""
    return _FIRST if list(streams) == [0] else torch.tensor(streams)


_FIRST = torch.zeros(1, dtype=torch.int64)


def _distinct(groups: np.ndarray, taken: set[int]) -> int:
    """How many of the first rows are of groups that are not taken; they are taken then."""
    for count, group in enumerate(groups.tolist()):
        if group in taken:
            return count
        taken.add(group)
    return len(groups)
