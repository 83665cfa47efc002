"""Looks at a learner now and then, on the first questions of its stream."""

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import Answer, Batch, Question
from pliant.learn import Learner
from pliant.learn.probe import plasticity
from pliant.measure.health import Health, health, verdict
from pliant.streams import Stream

PROBE = 256
"""Steps of the probe: as many of the first questions as have them together."""
EVERY = 12_000
"""Steps of the stream from one look to the next at least; a look costs as much as learning from a few hundred."""
DIGITS = 5
"""Of a number that is told; what is compared later is kept whole."""


class Checkup:
    """The first questions of a stream with their answers, and what was found on them; a part of a life.

    Args:
        plasticity: whether a look tells it, which takes as long as learning the probe from many times.

    Attributes:
        seconds: of processor time that looking took since this was made; not part of a life.
    """

    def __init__(self, plasticity: bool = False) -> None:
        self.plasticity = plasticity
        self.questions: list[Question] = []
        self.answers: list[Answer] = []
        self.first: Health | None = None
        self.last: Health | None = None
        self.asked, self.looked = 0, 0
        self.seconds = 0.0

    @property
    def steps(self) -> int:
        return sum(int(question.mask.sum()) for question in self.questions)

    @property
    def ready(self) -> bool:
        """Whether the probe is whole."""
        return self.first is not None or self.steps >= PROBE

    def take(self, batch: Batch) -> None:
        """Keep what belongs to the probe."""
        if batch.question is not None:
            self.asked += batch.question.mask.numel()
            if not self.ready:
                self.questions.append(batch.question)
        if batch.answers and len(self.answers) < len(self.questions):
            times = {question.time for question in self.questions} - {answer.time for answer in self.answers}
            self.answers += [answer for answer in batch.answers if answer.time in times and answer.final]

    def due(self, ended: bool = False) -> bool:
        """Whether it is time to look; also at the end, if anything came since."""
        wait = 1 if self.first is None else EVERY // 2 if ended else EVERY  # else too little has moved to speak of
        return self.ready and self.asked - self.looked >= wait

    def look(self, learner: Learner) -> dict[str, Any]:
        """What is found now, as plain values, with a verdict in words; compared with the first and the last look."""
        began = time.process_time()
        parts = [(question.inputs, question.reset, question.mask) for question in self.questions]
        inputs, reset, mask = side_by_side([question.rows for question in self.questions], parts)
        found = health(
            learner.model, inputs, reset=reset, mask=mask, optimizer=learner.optimizer, since=self.first,
            before=self.last, keep_parameters=self.first is None,
        )  # fmt: skip
        self.first = found if self.first is None else self.first
        self.last = replace(found, parameters={})
        self.looked = self.asked
        tables = found.tables()
        if self.plasticity and (pairs := pairs_of(self.questions, self.answers)):
            tables["whole"] = tables["whole"] | {"plasticity": plasticity(learner, pairs).bits}
        self.seconds += time.process_time() - began
        return {"verdict": verdict(found), **rounded(tables)}

    def state_dict(self) -> dict[str, Any]:
        moments = {"first": self.first, "last": self.last}
        return {
            "questions": [tuple(question) for question in self.questions],
            "answers": [tuple(answer._replace(tags={})) for answer in self.answers],
            **{name: None if moment is None else dict(vars(moment)) for name, moment in moments.items()},
            "asked": self.asked,
            "looked": self.looked,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.questions = [Question(*parts) for parts in state["questions"]]
        self.answers = [Answer(*parts) for parts in state["answers"]]
        self.first, self.last = (None if state[name] is None else Health(**state[name]) for name in ("first", "last"))
        self.asked, self.looked = state["asked"], state["looked"]


def pairs_of(questions: Sequence[Question], answers: Sequence[Answer]) -> list[tuple[Question, Answer]]:
    """Questions that have one answer about all of their rows, with it."""
    known = {answer.time: answer for answer in answers}
    found = [(question, known[question.time]) for question in questions if question.time in known]
    return [(question, answer) for question, answer in found if answer.rows.equal(question.rows)]


class Overheard(Stream):
    """A stream whose first questions and answers are kept on their way."""

    def __init__(self, inner: Stream, checkup: Checkup):
        self.inner, self.checkup, self.spec = inner, checkup, inner.spec

    def send(self, output: Tensor | None) -> Batch | None:
        batch = self.inner.send(output)
        if batch is not None:
            self.checkup.take(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def side_by_side(rows: Sequence[Tensor], parts: Sequence[tuple[Tensor, ...]]) -> list[Tensor]:
    """What several questions have as if they were one: each stream has a row, short ones end with zeros.

    Args:
        rows: for each question, which streams it is about, `(B,)`.
        parts: for each question, tensors `(B, T, ...)`, such as its inputs, reset and mask.
    """
    streams = torch.cat(list(rows)).unique()
    place = {int(row): i for i, row in enumerate(streams)}
    found: list[list[tuple[Tensor, ...]]] = [[] for _ in streams]
    for own, part in zip(rows, parts, strict=True):
        for i, row in enumerate(own.tolist()):
            found[place[row]].append(tuple(tensor[i] for tensor in part))
    joined = [[torch.cat(same) for same in zip(*pieces, strict=True)] for pieces in found]
    return [nn.utils.rnn.pad_sequence(list(same), batch_first=True) for same in zip(*joined, strict=True)]


def rounded(value: Any) -> Any:
    """The same nested values with numbers of few digits; None for what is not finite."""
    if isinstance(value, dict):
        return {key: rounded(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(part) for part in value]
    if isinstance(value, float):
        return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
    return value
