"""The learner and its opponents in one loop, and how each of them is scored."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pliant.core import KNOWN, Answer, mixture_nats
from pliant.core.change import Cusum
from pliant.learn import Predictor, Timed
from pliant.learn.loops import Opponents
from pliant.measure.numbers import Coverage
from pliant.measure.scores import (
    AbsoluteError,
    Accuracy,
    Bits,
    Brier,
    Calibration,
    Grouped,
    Kappa,
    Scores,
    TemporalKappa,
    bits_saved,
)

LEARNER, REFERENCE = "pliant", "no-change"
GATHER = 256
"""Targets that are scored together; a score costs as much for one as for all of them."""
SPAN = 50
"""Answers whose mean code length is one value for the detector of changes."""


def row_nats(output: Tensor, targets: Tensor) -> Tensor:
    """Code length of rows of numbers, nats. output `(n, G, 3K)`, targets `(n, G)` -> `(n,)`."""
    return mixture_nats(output, targets).sum(-1)


@dataclass(frozen=True)
class Scoring:
    """Which scores a panel keeps.

    Attributes:
        numbers: targets are numbers, not classes.
        by: a tag by whose values answers are also scored apart, None for none.
        names: of these values.
    """

    numbers: bool = False
    by: str | None = None
    names: Sequence[str] = ()

    @property
    def main(self) -> str:
        """The score beside bits."""
        return "error" if self.numbers else "accuracy"

    def scores(self) -> Scores:
        """An empty set."""
        if self.numbers:
            found: dict[str, Any] = {"bits": Bits(row_nats), "error": AbsoluteError(), "coverage": Coverage()}
        else:
            found = {"bits": Bits(), "accuracy": Accuracy(), "brier": Brier(), "calibration": Calibration(),
                     "kappa": Kappa(), "temporal_kappa": TemporalKappa()}  # fmt: skip
        if self.by is not None:
            found |= {f"{name}_by": Grouped(found[name].fresh(), by=self.by) for name in ("bits", self.main)}
        return Scores(**found)

    def apart(self, scores: Scores) -> dict[str, dict[str, float | int]]:
        """Values by name of the tag: answers, bits per answer and the main score."""
        if self.by is None:
            return {}
        bits, main = scores["bits_by"].groups, scores[f"{self.main}_by"].groups
        return {
            str(self.names[tag]): {"answers": bits[tag].count, "bits": bits[tag].value(), self.main: main[tag].value()}
            for tag in sorted(bits)
        }


class Gathered:
    """Scores of a window of answers, updated some hundred targets at a time.

    Attributes:
        answers: targets scored so far, those that wait included.
    """

    def __init__(self, scoring: Scoring):
        self.scoring = scoring
        self.begin()

    def begin(self) -> None:
        """Forget all answers so far."""
        self._scores, self.answers, self._held = self.scoring.scores(), 0, 0
        self._waiting: list[tuple[Answer, Tensor | None]] = []

    @property
    def scores(self) -> Scores:
        """With all answers so far."""
        self._flush()
        return self._scores

    def update(self, answer: Answer, said: Tensor | None) -> None:
        self._waiting.append((answer, said))
        self._held += answer.target_mask.numel()
        if said is not None:
            self.answers += int(answer.target_mask.sum())
        if self._held >= GATHER:
            self._flush()

    def _flush(self) -> None:
        # In their order, since a forgotten question's label is the last one for the next answer.
        known: list[tuple[Answer, Tensor]] = []
        for answer, said in self._waiting:
            if said is not None:
                known.append((answer, said))
                continue
            self._score(known)
            known = []
            self._scores.update(answer, None)
        self._score(known)
        self._waiting, self._held = [], 0

    def _score(self, known: list[tuple[Answer, Tensor]]) -> None:
        if known:
            self._scores.update(*_joined(known, self.scoring.by))

    def state_dict(self) -> dict[str, Any]:
        # What waits is saved as it is: to score it now would add it up in another order.
        waiting = [(tuple(answer), said) for answer, said in self._waiting]
        return {"scores": self._scores.state_dict(), "answers": self.answers, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._scores.load_state_dict(state["scores"])
        self.answers = state["answers"]
        self._waiting = [(Answer(*parts), said) for parts, said in state["waiting"]]
        self._held = sum(answer.target_mask.numel() for answer, _ in self._waiting)


def _joined(pairs: Sequence[tuple[Answer, Tensor]], by: str | None) -> tuple[Answer, Tensor]:
    """Several answers as one of n rows with one step each, in their order."""
    if len(pairs) == 1:
        return pairs[0]
    masks = [answer.target_mask for answer, _ in pairs]
    targets = torch.cat([answer.targets[mask] for (answer, _), mask in zip(pairs, masks, strict=True)])
    said = torch.cat([said.detach()[mask] for (_, said), mask in zip(pairs, masks, strict=True)])
    rows = torch.cat(
        [answer.rows[mask.nonzero(as_tuple=True)[0]] for (answer, _), mask in zip(pairs, masks, strict=True)]
    )
    tags = {}
    for name in pairs[0][0].tags.keys() & {by or KNOWN, KNOWN}:
        spread = [torch.as_tensor(answer.tags[name]).expand(answer.target_mask.shape) for answer, _ in pairs]
        tags[name] = torch.cat([tag[mask] for tag, mask in zip(spread, masks, strict=True)])[:, None]
    shown = torch.ones(len(rows), 1, dtype=torch.bool)
    return Answer(targets[:, None], shown, shown, pairs[0][0].time, rows, tags=tags), said[:, None]


class Member:
    """A predictor under a clock, with its scores of the running window and of everything before it."""

    def __init__(self, predictor: Predictor, scoring: Scoring):
        self.timed, self.scoring = Timed(predictor), scoring
        self.window = Gathered(scoring)
        self.total = scoring.scores()

    def cut(self) -> dict[str, Any]:
        """Values of the window, which is then added to the total and begins anew."""
        window, main = self.window.scores, self.scoring.main
        row = {"answers": window["bits"].count, "bits": window["bits"].value(), main: window[main].value()}
        self.total = self.total.merge(window)
        self.window.begin()
        return row

    def summary(self, reference: "Member") -> dict[str, Any]:
        """Totals, and bits saved against `reference`."""
        bits, scoring = self.total["bits"], self.scoring
        found = {
            "answers": bits.count,
            "bits": bits.value(),
            "total_bits": bits.total(),
            "bits_saved": bits_saved(reference.total["bits"], bits),
            "missed": bits.missed,
        }
        if scoring.numbers:
            error, other = (member.total["error"].value() for member in (self, reference))
            found |= {"error": error, "relative_error": error / other if other else None}
            return found | {
                "coverage_error": self.total["coverage"].value(),
                "coverage": self.total["coverage"].table(),
            }
        names = ("accuracy", "brier", "calibration", "kappa", "temporal_kappa")
        found |= {name: self.total[name].value() for name in names}
        return found | {"reliability": self.total["calibration"].table()}

    def apart(self) -> dict[str, dict[str, float | int]]:
        return self.scoring.apart(self.total)


class Changes:
    """Places at which the code length of the learner has risen, as `Cusum` finds them over spans of answers."""

    def __init__(self, nats: Callable[[Tensor, Tensor], Tensor]):
        self.nats, self.detector = nats, Cusum()
        self.sum, self.count, self.answers = 0.0, 0, 0
        self.found: list[int] = []

    def update(self, answer: Answer, said: Tensor | None) -> None:
        if said is None:
            return
        values = self.nats(said.detach()[answer.target_mask], answer.targets[answer.target_mask])
        self.sum, self.count = self.sum + float(values.sum()), self.count + len(values)
        self.answers += len(values)
        if self.count >= SPAN:
            if self.detector.update(self.sum / self.count):
                self.found.append(self.answers)
            self.sum, self.count = 0.0, 0

    def state_dict(self) -> dict[str, Any]:
        return {"detector": self.detector.state_dict(), "sum": self.sum, "count": self.count,
                "answers": self.answers, "found": list(self.found)}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.detector.load_state_dict(state["detector"])
        self.sum, self.count, self.answers = state["sum"], state["count"], state["answers"]
        self.found = list(state["found"])


class _Both:
    """Two things that take note of the same answers."""

    def __init__(self, *parts: Any):
        self.parts = parts

    def update(self, answer: Answer, said: Tensor | None) -> None:
        for part in self.parts:
            part.update(answer, said)


class Panel:
    """Members by name, the learner first; a part of a life."""

    def __init__(
        self, learner: Predictor, opponents: Mapping[str, Predictor], scoring: Scoring, changes: Changes | None = None
    ):
        everyone = {LEARNER: learner, **opponents}
        self.members = {name: Member(who, scoring) for name, who in everyone.items()}
        self.scoring, self.changes = scoring, changes

    @property
    def learner(self) -> Member:
        return self.members[LEARNER]

    @property
    def resumable(self) -> bool:
        """Whether all members can be saved."""
        return all(member.timed.inner.resumable for member in self.members.values())

    @property
    def watch(self) -> Any:
        """What takes note of the learner's answers."""
        window = self.learner.window
        return window if self.changes is None else _Both(window, self.changes)

    @property
    def opponents(self) -> Opponents:
        """As `prequential` takes them."""
        return {name: (who.timed, who.window) for name, who in self.members.items() if name != LEARNER}

    @property
    def answers(self) -> int:
        """Answers scored so far."""
        return int(self.learner.total["bits"].count) + self.learner.window.answers

    def cut(self) -> dict[str, Any]:
        """The window of every member; see `Member.cut`."""
        return {name: member.cut() for name, member in self.members.items()}

    def summary(self) -> dict[str, Any]:
        return {name: member.summary(self.members[REFERENCE]) for name, member in self.members.items()}

    def apart(self) -> dict[str, dict[str, dict[str, float | int]]]:
        """By member, then by name of the tag; empty without one."""
        return {name: found for name, member in self.members.items() if (found := member.apart())}

    def saved(self) -> dict[str, float]:
        """Bits of every member saved against the reference up to the last cut."""
        reference = self.members[REFERENCE].total["bits"]
        return {name: bits_saved(reference, member.total["bits"]) for name, member in self.members.items()}

    def seconds(self) -> dict[str, float]:
        """Processor seconds of every member since this process began."""
        return {name: member.timed.seconds for name, member in self.members.items()}

    def state_dict(self) -> dict[str, Any]:
        """Scores of all, and the opponents; the learner is a part of the life in its own right."""
        members = {
            name: {
                "window": member.window.state_dict(),
                "total": member.total.state_dict(),
                "predictor": None if name == LEARNER else member.timed.state_dict(),
            }
            for name, member in self.members.items()
        }
        return {"members": members, "changes": None if self.changes is None else self.changes.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, member in self.members.items():
            own = state["members"][name]
            member.window.load_state_dict(own["window"])
            member.total.load_state_dict(own["total"])
            if name != LEARNER:
                member.timed.load_state_dict(own["predictor"])
        if self.changes is not None:
            self.changes.load_state_dict(state["changes"])
