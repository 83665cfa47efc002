"""Honest opponents: what is done today, in the same loop, with the same answers.

All of them learn only from targets that a learner may learn from, when they come.
"""

import copy
import gc
import math
from abc import abstractmethod
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pliant.core import Answer, Question, Record, UsageError
from pliant.learn.base import Predictor, rows_of
from pliant.learn.learner import Learner
from pliant.learn.loops import fit


class Remembering(Predictor):
    """Remembers what it said to at most `remember` questions; beyond that the oldest is forgotten."""

    def __init__(self, remember: int = 128):
        self.remember = remember
        self.output: Tensor | None = None
        self._waiting: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()  # time -> rows, output

    def _say(self, question: Question, output: Tensor) -> Tensor:
        self.output = output
        self._waiting[question.time] = (question.rows, output)
        if len(self._waiting) > self.remember:
            self._waiting.popitem(last=False)
        return output

    def said(self, answer: Answer) -> Tensor | None:
        if answer.time not in self._waiting:
            return None
        rows, output = self._waiting[answer.time]
        return rows_of(output, rows, answer.rows)

    def _close(self, answer: Answer) -> None:
        if answer.final:
            self._waiting.pop(answer.time, None)

    def state_dict(self) -> dict[str, Any]:
        return {"output": self.output, "waiting": [(time, *said) for time, said in self._waiting.items()]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.output = state["output"]
        self._waiting = OrderedDict((time, (rows, output)) for time, rows, output in state["waiting"])


class _Counting(Remembering):
    """Leaves the guess and the counting to a leaf."""

    def __init__(self, num_classes: int, remember: int = 128):
        super().__init__(remember)
        self.num_classes = num_classes

    @abstractmethod
    def _guess(self, rows: Tensor) -> Tensor:
        """Log-probabilities `(B, C)`, nats."""

    @abstractmethod
    def _count(self, rows: Tensor, labels: Tensor) -> None:
        """Take note of labels `(n,)` of the streams `rows` `(n,)`, in time order for each stream."""

    def predict(self, question: Question) -> Tensor:
        batch, steps = question.mask.shape
        return self._say(question, self._guess(question.rows)[:, None].expand(batch, steps, -1))

    def learn(self, answer: Answer) -> Record:
        row, step = torch.nonzero(answer.learn_mask & answer.target_mask, as_tuple=True)
        self._count(answer.rows[row], answer.targets[row, step])
        self._close(answer)
        return Record(0, answer.time, "updated" if len(row) else "nothing to learn", learned=len(row))


class Majority(_Counting):
    """Class frequencies so far, as probabilities: (n_c + 1/2) / (n + C/2).

    The estimator of Krichevsky & Trofimov 1981, which pays at most about (C-1)/2 log2 n bits for not knowing.
    """

    def __init__(self, num_classes: int, remember: int = 128):
        super().__init__(num_classes, remember)
        self.counts = torch.full((num_classes,), 0.5, dtype=torch.float64)

    def _guess(self, rows: Tensor) -> Tensor:
        return torch.log(self.counts / self.counts.sum()).float().expand(len(rows), -1)

    def _count(self, rows: Tensor, labels: Tensor) -> None:
        self.counts = self.counts + torch.bincount(labels, minlength=self.num_classes)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"counts": self.counts}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.counts = state["counts"]


class NoChange(_Counting):
    """The last known label of the stream again, with the probability that this has been right so far.

    The other classes share the rest evenly. A stream without a known label gets the uniform guess.
    """

    def __init__(self, num_classes: int, remember: int = 128):
        super().__init__(num_classes, remember)
        self.last = torch.empty(0, dtype=torch.int64)  # (streams,), -1 where unknown
        self.hits = torch.full((2,), 0.5, dtype=torch.float64)  # changed, stayed

    def _grow(self, rows: Tensor) -> None:
        missing = int(rows.max()) + 1 - len(self.last) if len(rows) else 0
        if missing > 0:
            self.last = torch.cat([self.last, torch.full((missing,), -1)])

    def _guess(self, rows: Tensor) -> Tensor:
        self._grow(rows)
        changed, stayed = (self.hits / self.hits.sum()).tolist()
        other = math.log(changed / max(1, self.num_classes - 1))
        last = self.last[rows]
        guess = torch.full((len(rows), self.num_classes), other)
        guess = guess.scatter(1, last.clamp(min=0)[:, None], math.log(stayed))
        return torch.where(last[:, None] < 0, -math.log(self.num_classes), guess)

    def _count(self, rows: Tensor, labels: Tensor) -> None:
        self._grow(rows)
        if not len(rows):
            return
        # The label before each one: the one before it in this answer, else the one known so far.
        order = rows.argsort(stable=True)
        rows, labels = rows[order], labels[order]
        start = torch.ones_like(rows, dtype=torch.bool)
        start[1:] = rows[1:] != rows[:-1]
        before = torch.where(start, self.last[rows], labels.roll(1))
        known = before >= 0
        stayed = int((known & (before == labels)).sum())
        self.hits = self.hits + torch.tensor([int(known.sum()) - stayed, stayed], dtype=torch.float64)
        end = torch.ones_like(start)
        end[:-1] = start[1:]
        self.last = self.last.index_put((rows[end],), labels[end])

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"last": self.last, "hits": self.hits}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.last, self.hits = state["last"], state["hits"]


class Frozen(Predictor):
    """The learner as it was after its first `after` answers; until then it is the learner.

    Its memory of the streams goes on, its parameters do not. In a panel it must come after the
    learner that it watches.
    """

    def __init__(self, learner: Learner, *, after: int):
        if after < 0:
            raise UsageError(f"Frozen: after is {after}, expected 0 or more answers")
        self._learner, self.after = learner, after
        self.answers = 0
        self._copy: Learner | None = None
        self._freeze()

    def _freeze(self) -> None:
        if self._copy is None and self.answers >= self.after:
            self._copy = copy.deepcopy(self._learner)
            self._copy.reuse = False

    @property
    def output(self) -> Tensor | None:  # type: ignore[override]
        return (self._copy or self._learner).output

    def predict(self, question: Question) -> Tensor:
        if self._copy is not None:
            return self._copy.predict(question)
        assert self._learner.output is not None
        return self._learner.output

    def said(self, answer: Answer) -> Tensor | None:
        return (self._copy or self._learner).said(answer)

    def learn(self, answer: Answer) -> Record:
        self.answers += int(answer.target_mask.sum())
        if self._copy is not None:
            self._copy.forget(answer)
        self._freeze()
        return Record(0, answer.time, "nothing to learn")

    def state_dict(self) -> dict[str, Any]:
        return {"answers": self.answers, "copy": None if self._copy is None else self._copy.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.answers, self._copy = state["answers"], None
        if state["copy"] is not None:
            self._copy = copy.deepcopy(self._learner)
            self._copy.reuse = False
            self._copy.load_state_dict(state["copy"])


def _whole(question: Question, parts: list[Answer]) -> Answer:
    """Parts of an answer as one, its rows in the order of the question."""
    if len(parts) == 1 and (parts[0].rows is question.rows or parts[0].rows.equal(question.rows)):
        return parts[0]
    targets, shown, learned = (torch.cat(same) for same in zip(*[part[:3] for part in parts], strict=True))
    rows = torch.cat([part.rows for part in parts])
    place = {row: i for i, row in enumerate(question.rows.tolist())}
    order = torch.tensor(sorted(range(len(rows)), key=lambda i: place[int(rows[i])]))
    return parts[-1]._replace(
        targets=targets[order], target_mask=shown[order], learn_mask=learned[order], rows=rows[order]
    )


def _merged(pairs: Iterable[tuple[Question, Answer]], targets: int) -> list[tuple[Question, Answer]]:
    """Neighbors about the same streams as one question, up to so many targets; models answer it the same."""
    merged: list[list[tuple[Question, Answer]]] = []
    held = 0
    for question, answer in pairs:
        count = answer.target_mask.numel()
        alike = bool(merged) and all(
            one.rows.equal(question.rows) and about.rows.equal(answer.rows) for one, about in merged[-1][-1:]
        )
        if alike and held + count <= targets:
            merged[-1].append((question, answer))
            held += count
        else:
            merged.append([(question, answer)])
            held = count
    return [_one(part) for part in merged]


def _one(pairs: list[tuple[Question, Answer]]) -> tuple[Question, Answer]:
    if len(pairs) == 1:
        return pairs[0]
    questions, answers = zip(*pairs, strict=True)
    (inputs, reset, mask), (targets, shown, learned) = (
        [torch.cat(same, 1) for same in zip(*[part[:3] for part in parts], strict=True)]
        for parts in (questions, answers)
    )
    first = questions[0]
    return first._replace(inputs=inputs, reset=reset, mask=mask), answers[-1]._replace(
        targets=targets, target_mask=shown, learn_mask=learned, time=first.time
    )


class Retrained(Predictor):
    """The same model trained from scratch every `every` answers on the last `window` answers.

    An answer that comes in parts is trained on when its last part has come.

    Args:
        make: a new learner for training number k, from 0; the one for 0 answers before the first training.
        every: answers between trainings.
        window: answers that a training sees.
        passes: how often it sees each of them.
    """

    def __init__(self, make: Callable[[int], Learner], *, every: int, window: int, passes: int):
        for name, value in (("every", every), ("window", window), ("passes", passes)):
            if value < 1:
                raise UsageError(f"Retrained: {name} is {value}, expected at least 1")
        self._make, self.every, self.window, self.passes = make, every, window, passes
        self.trainings, self.answers = 0, 0
        self._current = self._new(0)
        self._asked: OrderedDict[int, tuple[Question, Tensor]] = OrderedDict()
        self._parts: dict[int, list[Answer]] = {}  # of the questions in _asked
        self._pairs: deque[tuple[Question, Answer]] = deque()
        self._held = 0  # answers in _pairs

    def _new(self, number: int) -> Learner:
        learner = self._make(number)
        learner.reuse = False
        return learner

    @property
    def output(self) -> Tensor | None:  # type: ignore[override]
        return self._current.output

    def predict(self, question: Question) -> Tensor:
        # What a model said stands, also when the next one has replaced it before the answer.
        self._asked[question.time] = (question, self._current.predict(question))
        if len(self._asked) > self._current.remember:
            self._parts.pop(self._asked.popitem(last=False)[0], None)
        return self._asked[question.time][1]

    def said(self, answer: Answer) -> Tensor | None:
        if answer.time not in self._asked:
            return None
        question, output = self._asked[answer.time]
        return rows_of(output, question.rows, answer.rows)

    def learn(self, answer: Answer) -> Record:
        self._current.forget(answer)
        if answer.time not in self._asked:
            return Record(self.trainings, answer.time, "forgotten")
        question, _ = self._asked[answer.time]
        self._parts.setdefault(answer.time, []).append(answer._replace(tags={}))
        if answer.final:
            del self._asked[answer.time]
            self._keep(question, _whole(question, self._parts.pop(answer.time)))
        before = self.answers
        self.answers += int(answer.target_mask.sum())
        if self.answers // self.every > before // self.every:
            self._train()
            return Record(self.trainings, answer.time, "updated", learned=self._held)
        return Record(self.trainings, answer.time, "nothing to learn")

    def _keep(self, question: Question, answer: Answer) -> None:
        self._pairs.append((question, answer))
        self._held += int(answer.target_mask.sum())
        while self._held - int(self._pairs[0][1].target_mask.sum()) >= self.window:
            self._held -= int(self._pairs.popleft()[1].target_mask.sum())

    def _train(self) -> None:
        self.trainings += 1
        # Modules and optimizers hold on to each other, so a dropped model lives on until the collector
        # runs; the new one should take the place of the old, not one beside it.
        del self._current
        gc.collect()
        self._current = self._new(self.trainings)
        self._current.reuse = True
        for _ in fit(self._current, _merged(self._pairs, self._current.rule.every), passes=self.passes):
            pass
        self._current.reuse = False

    def state_dict(self) -> dict[str, Any]:
        return {
            "trainings": self.trainings,
            "answers": self.answers,
            "held": self._held,
            "current": self._current.state_dict(),
            "asked": [(tuple(question), output) for question, output in self._asked.values()],
            "parts": [tuple(part) for parts in self._parts.values() for part in parts],
            "pairs": [(tuple(question), tuple(answer)) for question, answer in self._pairs],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainings, self.answers, self._held = state["trainings"], state["answers"], state["held"]
        self._current = self._new(self.trainings)
        self._current.load_state_dict(state["current"])
        asked = [(Question(*parts), output) for parts, output in state["asked"]]
        self._asked = OrderedDict((question.time, (question, output)) for question, output in asked)
        self._pairs = deque((Question(*question), Answer(*answer)) for question, answer in state["pairs"])
        self._parts = {}
        for part in (Answer(*values) for values in state["parts"]):
            self._parts.setdefault(part.time, []).append(part)
