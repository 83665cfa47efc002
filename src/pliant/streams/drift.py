"""Wrappers that make a stream change; each takes a stream and returns one.

- `permute`, `relabel`, `redraw`: a new task every so many answers; those of `permute` may return
- `visits`: tell first visits of an item from revisits within a task
- `delay`, `hide`: answers come late, or not at all
- `shard`: the part of a stream that belongs to one of several processes

What changes is a function of the seed and the place in the stream, so wrappers have hardly any
state of their own and resume exactly. A wrapper changes what it says and nothing else. Wrap `delay`
around the others, since they expect answers in the order of the questions, and `shard` last of all.
"""

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pliant.core import Answer, Batch, Question, UsageError, numpy_generator
from pliant.streams.base import Spec, Stream


def permutation(task: int, size: int, seed: int = 0) -> Tensor:
    """The order in which `permute` puts the `size` inputs of a question of this task, `(size,)` int64."""
    natural = np.arange(size)
    return torch.from_numpy(natural if task == 0 else numpy_generator(seed, f"permute/{task}").permutation(size))


def permute(stream: Stream, *, every: int, returning: int | None = None, seed: int = 0) -> Stream:
    """Reorder the inputs of a question (steps and features together) anew every `every` answers.

    The first task keeps the natural order. Adds the tag `task`.

    Args:
        stream: what to wrap.
        every: answers that a task lasts.
        returning: there are so many tasks, visited in turn again and again; None means that each is new.
        seed: of the orders.
    """
    tasks = _Tasks(stream.spec, every, returning)

    def question(asked: Question) -> Question:
        flat = asked.inputs.flatten(1)
        orders = tasks.per_row(asked.time, asked.rows, lambda task: permutation(task, flat.shape[1], seed))
        return asked._replace(inputs=flat.gather(1, orders).reshape(asked.inputs.shape))

    return _Mapped(stream, question=question, answer=tasks.tag)


def relabel(stream: Stream, *, every: int, seed: int = 0) -> Stream:
    """Rename the classes anew every `every` answers; the first task keeps their names. Adds the tag `task`."""
    tasks = _Tasks(stream.spec, every)
    classes = stream.spec.num_outputs

    def names(task: int) -> Tensor:
        natural = np.arange(classes)
        return torch.from_numpy(natural if task == 0 else numpy_generator(seed, f"relabel/{task}").permutation(classes))

    def answer(said: Answer) -> Answer:
        renamed = tasks.per_row(said.time, said.rows, names).gather(1, said.targets)
        return tasks.tag(said._replace(targets=renamed))

    return _Mapped(stream, answer=answer)


def redraw(stream: Stream, *, every: int, items: int, seed: int = 0) -> Stream:
    """Give each of `items` items a random class, drawn anew every `every` answers.

    What is learned about one item says nothing about another: only revisits can be answered.
    Needs the tag `item`; adds the tag `task`.
    """
    tasks = _Tasks(stream.spec, every)
    classes = stream.spec.num_outputs

    def table(task: int) -> Tensor:
        return torch.from_numpy(numpy_generator(seed, f"redraw/{task}").integers(classes, size=items))

    def answer(said: Answer) -> Answer:
        drawn = tasks.per_row(said.time, said.rows, table).gather(1, _item(said, "redraw"))
        return tasks.tag(said._replace(targets=drawn))

    return _Mapped(stream, answer=answer)


VISITS = ("first visit", "revisit", "held out")


def visits(stream: Stream, *, items: int) -> Stream:
    """Add the tag `visit`, an index of `VISITS`.

    An item is a first visit when its task has not shown it before, then a revisit; an item that may
    not be learned from is held out always. Needs the tags `item` and `task`, so put it around the
    wrapper that makes the tasks.
    """
    return _Visits(stream, items)


def delay(stream: Stream, *, questions: int) -> Stream:
    """Each answer comes `questions` questions later than it would."""
    if questions < 0:
        raise UsageError(f"delay: questions is {questions}, expected 0 or more")
    return _Delayed(stream, questions)


def hide(stream: Stream, *, rate: float, seed: int = 0) -> Stream:
    """Withhold the target of each row with probability `rate`; the answer still comes, without it."""
    if not 0 <= rate <= 1:
        raise UsageError(f"hide: rate is {rate}, expected 0 to 1")

    def answer(said: Answer) -> Answer:
        draws = numpy_generator(seed, f"hide/{said.time}").random(int(said.rows.max()) + 1)
        shown = torch.from_numpy(draws >= rate)[said.rows][:, None]
        return said._replace(target_mask=said.target_mask & shown, learn_mask=said.learn_mask & shown)

    return _Mapped(stream, answer=answer)


def shard(stream: Stream, *, rank: int, world: int) -> Stream:
    """Rows rank, rank + world, … of a passive stream, numbered from 0."""
    if not 0 <= rank < world or world > stream.spec.batch:
        raise UsageError(
            f"shard: rank {rank} of {world} does not fit a stream of {stream.spec.batch} rows; "
            "need 0 <= rank < world <= rows"
        )

    def question(asked: Question) -> Question:
        mine = asked.rows % world == rank
        inputs, reset, mask, rows = (part[mine] for part in (asked.inputs, asked.reset, asked.mask, asked.rows))
        return Question(inputs, reset, mask, asked.time, rows // world)

    def answer(said: Answer) -> Answer:
        mine = said.rows % world == rank
        tags = {name: tag[mine] if isinstance(tag, Tensor) else tag for name, tag in said.tags.items()}
        targets, shown, learned = (part[mine] for part in (said.targets, said.target_mask, said.learn_mask))
        return Answer(targets, shown, learned, said.time, said.rows[mine] // world, said.final, tags)

    rows = len(range(rank, stream.spec.batch, world))
    return _Mapped(stream, question=question, answer=answer, spec=stream.spec._replace(batch=rows))


class _Tasks:
    """Which task a row of a question belongs to, when a new one starts every `every` answers."""

    def __init__(self, spec: Spec, every: int, returning: int | None = None):
        if every < 1:
            raise UsageError(f"drift: every is {every}, expected at least 1 answer")
        if returning is not None and returning < 1:
            raise UsageError(f"drift: returning is {returning}, expected at least 1 task, or None")
        self.spec, self.every, self.returning = spec, every, returning
        self._made: dict[int, Tensor] = {}

    def of(self, time: int, rows: Tensor) -> Tensor:
        visit = (self.spec.asked_before(time) + rows) // self.every
        return visit if self.returning is None else visit % self.returning

    def per_row(self, time: int, rows: Tensor, make: Callable[[int], Tensor]) -> Tensor:
        """`make(task)` for the task of each row, `(R, size)`."""
        task, which = self.of(time, rows).unique(return_inverse=True)
        tasks = task.tolist()
        # Most questions lie within the task of the one before.
        self._made = {one: self._made[one] if one in self._made else make(one) for one in tasks}
        if len(tasks) == 1:
            return self._made[tasks[0]].expand(len(rows), -1)
        return torch.stack(list(self._made.values()))[which]

    def tag(self, said: Answer) -> Answer:
        task = self.of(said.time, said.rows)[:, None].expand(-1, said.target_mask.shape[1])
        return said._replace(tags=said.tags | {"task": task})


class _Mapped(Stream):
    """A stream seen through a function of each question and one of each answer."""

    def __init__(
        self,
        inner: Stream,
        *,
        question: Callable[[Question], Question] = lambda question: question,
        answer: Callable[[Answer], Answer] = lambda answer: answer,
        spec: Spec | None = None,
    ):
        self.inner, self.spec = inner, spec or inner.spec
        self._question, self._map_answer = question, answer

    def _answer(self, said: Answer) -> Answer:
        return self._map_answer(said)

    def send(self, output: Tensor | None) -> Batch | None:
        batch = self.inner.send(output)
        if batch is None:
            return None
        asked = None if batch.question is None else self._question(batch.question)
        return Batch(tuple(map(self._answer, batch.answers)), asked)

    def state_dict(self) -> dict[str, Any]:
        return {"inner": self.inner.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])


class _Visits(_Mapped):
    def __init__(self, inner: Stream, items: int):
        super().__init__(inner)
        # The task in which each item was last met.
        self.met = torch.full((items,), -1)

    def _answer(self, said: Answer) -> Answer:
        item, task = _item(said, "visits"), said.tags["task"]
        again = (self.met[item] == task).long()
        held_out = (said.target_mask & ~said.learn_mask).any(1, keepdim=True)
        visit = torch.where(held_out, VISITS.index("held out"), again)
        self.met = self.met.index_put((item[:, -1],), task[:, -1])
        return said._replace(tags=said.tags | {"visit": visit})

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"met": self.met}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.met = state["met"].clone()


class _Delayed(Stream):
    def __init__(self, inner: Stream, questions: int):
        self.inner, self.spec, self.questions = inner, inner.spec, questions
        self.sent = 0
        self.waiting: deque[tuple[int, Answer]] = deque()

    def send(self, output: Tensor | None) -> Batch | None:
        batch = self.inner.send(output)
        if batch is None and not self.waiting:
            return None
        answers, asked = (batch.answers, batch.question) if batch else ((), None)
        self.waiting.extend((self.sent + self.questions, answer) for answer in answers)
        due = []
        while self.waiting and self.waiting[0][0] <= self.sent:
            due.append(self.waiting.popleft()[1])
        self.sent += 1
        return Batch(tuple(due), asked)

    def state_dict(self) -> dict[str, Any]:
        waiting = [(due, tuple(answer)) for due, answer in self.waiting]
        return {"inner": self.inner.state_dict(), "sent": self.sent, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state["inner"])
        self.sent = state["sent"]
        self.waiting = deque((due, Answer(*parts)) for due, parts in state["waiting"])


def _item(said: Answer, who: str) -> Tensor:
    if "item" not in said.tags:
        raise UsageError(f"{who}: the answers of this stream have no tag 'item'; use a stream of items, such as digits")
    return said.tags["item"]
