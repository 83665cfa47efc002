"""Questions that a learner holds until it has learned from them: what was asked, and what is known of it."""

from collections import Counter, OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pliant.core import Answer, Question, from_leaves, leaves, moved, take
from pliant.learn.base import rows_of
from pliant.learn.rules import Asked, Together, joined
from pliant.optim import Lesson

SPARE = 16
"""Questions that may be held beyond twice those that are needed: to look what is needed takes as long as there are."""


class Known(NamedTuple):
    """An answer, and which of its targets may be learned from: `use` `(R, T)` bool, how many, and whether all."""

    answer: Answer
    use: Tensor
    learned: int
    whole: bool

    @classmethod
    def of(cls, answer: Answer) -> "Known":
        same = answer.learn_mask is answer.target_mask
        use = answer.target_mask if same else answer.learn_mask & answer.target_mask
        learned = int(use.count_nonzero())
        return cls(answer, use, learned, learned == use.numel())


class Held:
    """Questions by time, in the order in which they were asked.

    Attributes:
        asked: with the memory before each and what was said.
        open: an ordered set of times: questions that wait for answers.
        known: answers of each question that an update may learn from.
        due: times of the questions that answers since the last update are about, once for each answer.
        gathered: targets in these answers.
    """

    def __init__(self) -> None:
        self.asked: OrderedDict[int, Asked] = OrderedDict()
        self.open: OrderedDict[int, None] = OrderedDict()
        self.known: dict[int, list[Known]] = {}
        self.due: list[int] = []
        self.gathered = 0
        self._before: dict[int, int] = {}  # the question before each of those in asked
        self._full = SPARE  # questions beyond which those that are not needed are dropped

    def __len__(self) -> int:
        return len(self.asked)

    def __contains__(self, time: int) -> bool:
        return time in self.asked

    @property
    def newest(self) -> Asked | None:
        return next(reversed(self.asked.values()), None)

    @property
    def full(self) -> bool:
        """Whether it is time to look which are not needed any more."""
        return len(self.asked) > self._full

    def ask(self, asked: Asked) -> None:
        """Hold one more question, which waits for an answer."""
        time, last = asked.question.time, self.newest
        if time in self.asked:
            self.known.pop(time, None)  # asked again, as in another pass: it has its old place
        elif last is not None:
            self._before[time] = last.question.time
        self.asked[time] = asked
        self.open[time] = None

    def learn(self, known: Known) -> None:
        """Take what is known of a question for the next update."""
        time = known.answer.time
        self.gathered += known.learned
        self.due.append(time)
        self.known.setdefault(time, []).append(known)

    def take_due(self) -> list[int]:
        """What is due of the questions that are still held, in the order they were asked; nothing is due then."""
        due, self.due, self.gathered = Counter(self.due), [], 0
        return [time for time in self.asked for _ in range(due.get(time, 0))]

    def steps_due(self) -> int:
        """Steps of the questions that answers have come for since the last update."""
        return sum(self.asked[time].steps for time in set(self.due) if time in self.asked)

    def back_from(self, time: int | None) -> Iterator[Asked]:
        """The question at `time` and those before it that are still held, newest first."""
        while time is not None and (asked := self.asked.get(time)) is not None:
            yield asked
            time = self._before.get(time)

    def answered(self) -> Iterator[Asked]:
        """The oldest, up to the first that waits for an answer."""
        for time, asked in self.asked.items():
            if time in self.open:
                return
            yield asked

    def drop(self, time: int) -> None:
        """Hold a question no longer; what is known of it stays until the next update."""
        del self.asked[time]
        self._before.pop(time, None)
        self.open.pop(time, None)

    def keep(self, needed: set[int]) -> None:
        """Drop all others, and what is known of them."""
        for time in [time for time in self.asked if time not in needed]:
            self.drop(time)
            self.known.pop(time, None)
        self._full = 2 * len(self.asked) + SPARE

    def clear(self) -> None:
        """Hold nothing; what is known of questions stays until the next update."""
        self.asked.clear()
        self.open.clear()
        self._before.clear()

    def lessons(self, reached: list[Asked], due: list[int]) -> tuple[Lesson, ...]:
        """What is learned for the first time; `due` has the time of its question once for each answer."""
        found = []
        for asked in reached:
            question = asked.question
            known = self.known.get(question.time, [])
            for part in known[max(0, len(known) - due.count(question.time)) :]:
                rows = part.answer.rows
                inputs, reset, mask = (rows_of(of, question.rows, rows) for of in question[:3])
                found.append(Lesson(inputs, reset, mask, take(asked.before, rows), part.answer.targets, part.use))
        return tuple(found)

    def told(self, reached: list[Asked]) -> tuple[Tensor, Tensor | None] | None:
        """Targets of all these questions side by side and which of them count (None: all).

        None if some question has not exactly one answer, which is about all of its rows: the common case.
        """
        parts, rows = [], reached[-1].question.rows
        for asked in reached:
            known = self.known.get(asked.question.time, [])
            if len(known) != 1 or not (known[0].answer.rows is rows or known[0].answer.rows.equal(rows)):
                return None
            parts.append(known[0])
        use = None if all(part.whole for part in parts) else joined([part.use for part in parts])
        return joined([part.answer.targets for part in parts]), use

    def placed(self, reached: list[Asked], together: Together) -> tuple[Tensor, Tensor]:
        """Targets, and which of them count, where `together` has put their steps."""
        assert together.places is not None
        shape, use = together.mask.shape, torch.zeros_like(together.mask)
        targets: Tensor | None = None
        for asked, (stream, step) in zip(reached, together.places, strict=True):
            for part in self.known.get(asked.question.time, []):
                at = (rows_of(torch.from_numpy(stream), asked.question.rows, part.answer.rows),
                      rows_of(torch.from_numpy(step), asked.question.rows, part.answer.rows))  # fmt: skip
                if targets is None:
                    targets = part.answer.targets.new_zeros(*shape, *part.answer.targets.shape[2:])
                targets[at], use[at] = part.answer.targets, part.use
        assert targets is not None
        return targets, use

    def state_dict(self, needed: set[int]) -> dict[str, Any]:
        """Those that are needed, as nested plain values and tensors."""
        held = [asked for time, asked in self.asked.items() if time in needed]
        before = {time: last if last in needed else None for time, last in self._before.items()}
        return {
            "asked": [
                (tuple(a.question), dict(leaves(a.before)), a.said, a.seen, before.get(a.question.time)) for a in held
            ],
            "open": list(self.open),
            "answered": [tuple(part.answer) for time in self.known if time in needed for part in self.known[time]],
            "gathered": self.gathered,
            "due": list(self.due),
        }

    def load_state_dict(self, state: dict[str, Any], like: Any, device: torch.device) -> None:
        """Hold what another one held, on a device; `like` is a memory of the right kind."""
        self.clear()
        for question, before, said, seen, last in state["asked"]:
            given = (moved(Question(*question), device), from_leaves(before, like), said.to(device))
            asked = Asked.of(*given, None if seen is None else seen.to(device))
            if last in self.asked:
                self._before[asked.question.time] = last
            self.asked[asked.question.time] = asked
        self._full = 2 * len(self.asked) + SPARE
        self.open = OrderedDict.fromkeys(state["open"])
        self.known, self.gathered, self.due = {}, state["gathered"], list(state["due"])
        for parts in state["answered"]:
            answer = moved(Answer(*parts), device)
            self.known.setdefault(answer.time, []).append(Known.of(answer))

    def __deepcopy__(self, memo: dict[int, Any]) -> "Held":
        """Shares tensors, which are never changed in place."""
        twin = type(self)()
        twin.asked, twin.open, twin._before = self.asked.copy(), self.open.copy(), self._before.copy()
        twin.known = {time: list(parts) for time, parts in self.known.items()}
        twin.due, twin.gathered, twin._full = list(self.due), self.gathered, self._full
        return twin
