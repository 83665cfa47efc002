"""Scores of what was answered, once the truth is known.

Every score has `update(answer, said)`, `value()` and `merge(other)`, and so merges over windows and
processes. Only targets that `answer.target_mask` reveals count. What cannot be scored is not
passed over: a probability of zero for what happened is a code length of infinity, and an output
that is NaN makes the value NaN. A question that had been forgotten counts as `missed` and in no value.
Outputs may be on any device and carry gradients; what is kept is float64 or int64 on the CPU, without
gradients, so sums over parts equal those of one pass up to rounding, and counts exactly.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from pliant.core import KNOWN, Answer, UsageError, categorical_nats, mixture_mean

Nats = Callable[[Tensor, Tensor], Tensor]
"""(output `(n, ...)`, targets `(n, ...)`) -> code lengths in nats `(n,)`."""


WRONG, RIGHT, UNDEFINED, MISSED = range(4)
"""What became of an answer: UNDEFINED where the output is NaN, MISSED where the question was forgotten."""


class Score(ABC):
    """One number about a stream of answers.

    Attributes:
        count: answers that the value is about.
        missed: revealed targets whose question had been forgotten.
        nothing, undefined: why the value is NaN when nothing was counted, and when something was.
    """

    count: int
    missed: int
    nothing = "no answers yet"
    undefined = "an output or a target was NaN"

    @abstractmethod
    def update(self, answer: Answer, said: Tensor | None) -> None:
        """Count the revealed targets of `answer`; said `(R, T, ...)` is the output for its rows, None if forgotten."""

    @abstractmethod
    def value(self) -> float:
        """The score; NaN when nothing has been scored (`reason` says so)."""

    @abstractmethod
    def merge(self, other: Any) -> Any:
        """A score as if one had seen what this one and then `other` saw; both stay as they are."""

    @abstractmethod
    def fresh(self) -> Any:
        """An empty score of the same settings."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Everything counted so far."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""

    def reason(self) -> str | None:
        """Why the value is NaN, None if it is a number."""
        if not math.isnan(self.value()):
            return None
        return self.undefined if self.count else self.nothing


class _Sums(Score):
    """A score made of sums; a leaf says what is added and what the value is."""

    def __init__(self) -> None:
        self.count = 0
        self.missed = 0
        self.sums = torch.zeros(self._sizes(), dtype=torch.float64)

    def _sizes(self) -> tuple[int, ...]:
        return (1,)

    @abstractmethod
    def _add(self, said: Tensor, targets: Tensor) -> Tensor:
        """What n scored targets add to the sums; said `(n, ...)`, targets `(n, ...)`."""

    def value(self) -> float:
        return float(self.sums[0]) / self.count if self.count else math.nan

    def update(self, answer: Answer, said: Tensor | None) -> None:
        shown = answer.target_mask
        if said is None:
            self.missed += int(shown.sum())
            return
        said, targets = _revealed(self, answer, said)
        if len(targets):
            self.sums = self.sums + self._add(said, targets).double()
            self.count += len(targets)

    def merge(self, other: Any) -> Any:
        _check_alike(self, other)
        both = self.fresh()
        both.sums, both.count, both.missed = (
            self.sums + other.sums,
            self.count + other.count,
            self.missed + other.missed,
        )
        return both

    def fresh(self) -> Any:
        return type(self)()

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums, "count": self.count, "missed": self.missed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums, self.count, self.missed = state["sums"], state["count"], state["missed"]


class Bits(_Sums):
    """Mean code length, bits per answer: -log2 p(target). `total()` is the sum.

    Args:
        nats: output `(n, ...)`, targets `(n, ...)` -> code lengths in nats `(n,)`. Only scores with the same
            `nats` may be merged or compared; two functions cannot be told apart, so nothing checks it.
    """

    def __init__(self, nats: Nats = categorical_nats):
        self.nats = nats
        super().__init__()

    def fresh(self) -> Any:
        return type(self)(self.nats)

    def _add(self, said: Tensor, targets: Tensor) -> Tensor:
        if self.nats is categorical_nats:
            targets = _classes(self, said, targets)
        nats = self.nats(said, targets)
        _check_shape(self, "code lengths", nats, (len(targets),))
        return nats.double().sum().reshape(1) / math.log(2)

    def total(self) -> float:
        """Code length of all answers, bits."""
        return float(self.sums[0])


def bits_saved(reference: Bits, ours: Bits) -> float:
    """Bits by which `ours` is shorter than `reference`, over the same answers.

    Raises:
        UsageError: the two have not scored equally many answers.
    """
    if reference.count != ours.count:
        raise UsageError(
            f"bits_saved: the reference scored {reference.count} answers and ours {ours.count}; "
            "compare scores of the same answers"
        )
    return reference.total() - ours.total()


class Accuracy(_Sums):
    """Share of answers whose most probable class was right."""

    def _add(self, said: Tensor, targets: Tensor) -> Tensor:
        outcome = _outcome(said, _classes(self, said, targets))
        return torch.where(outcome == UNDEFINED, math.nan, outcome.double()).sum().reshape(1)


class Brier(_Sums):
    """Mean over answers of the squared distance of the probabilities from the truth, summed over classes; 0 to 2.

    The form of Brier 1950; for two classes it is twice the one that looks at one class only.
    """

    def _add(self, said: Tensor, targets: Tensor) -> Tensor:
        probabilities = said.double().softmax(-1)
        truth = torch.nn.functional.one_hot(_classes(self, said, targets), said.shape[-1])
        return (probabilities - truth).square().sum().reshape(1)


class Calibration(_Sums):
    """Expected calibration error of the top class: mean over answers of |confidence - accuracy| of its bin.

    Bins of equal width over 0 … 1 (Guo et al. 2017, arXiv:1706.04599, eq. 3). Departure: a confidence on the
    edge of two bins counts in the upper one.
    """

    def __init__(self, bins: int = 15):
        if bins < 1:
            raise UsageError(f"Calibration: bins is {bins}, expected at least 1; 15 is usual")
        self.bins = bins
        super().__init__()

    def fresh(self) -> Any:
        return type(self)(self.bins)

    def _sizes(self) -> tuple[int, ...]:
        return (3, self.bins)  # count, confidence, right

    def _add(self, said: Tensor, targets: Tensor) -> Tensor:
        confidence, best = said.double().softmax(-1).max(-1)
        where = (confidence * self.bins).nan_to_num().long().clamp(0, self.bins - 1)
        right = (best == _classes(self, said, targets)).double()
        rows = torch.stack([torch.ones_like(confidence), confidence, right])
        return torch.zeros(3, self.bins, dtype=torch.float64).index_add(1, where, rows)

    def value(self) -> float:
        return float((self.sums[1] - self.sums[2]).abs().sum()) / self.count if self.count else math.nan

    def table(self) -> list[dict[str, float]]:
        """The bins that hold answers: count, mean confidence, accuracy."""
        return [
            {"count": count, "confidence": confidence / count, "accuracy": right / count}
            for count, confidence, right in self.sums.T.tolist()
            if count
        ]


class Kappa(Score):
    """Cohen's kappa: how far accuracy exceeds that of guessing by the frequencies of both sides (Cohen 1960).

    The table grows to the most classes that an output had, C; memory and an update cost O(C²).
    """

    undefined = "an output was NaN, or all targets and answers are of one class"

    def __init__(self) -> None:
        self.count = 0
        self.missed = 0
        self.table = torch.zeros(0, 0, dtype=torch.int64)  # truth x answer, without the undefined

    def update(self, answer: Answer, said: Tensor | None) -> None:
        if said is None:
            self.missed += int(answer.target_mask.sum())
            return
        said, targets = _revealed(self, answer, said)
        targets, classes = _classes(self, said, targets), said.shape[-1]
        defined = _outcome(said, targets) != UNDEFINED
        cells = torch.bincount((targets * classes + said.argmax(-1))[defined], minlength=classes * classes)
        self.table = _grown(self.table, classes) + _grown(cells.reshape(classes, classes), len(self.table))
        self.count += len(targets)

    def value(self) -> float:
        counts = self.table.double()
        total = counts.sum()
        if not self.count or total < self.count:
            return math.nan
        observed = counts.trace() / total
        expected = (counts.sum(0) * counts.sum(1)).sum() / total.square()
        # One class only, always right: agreement beyond chance cannot be told.
        return float((observed - expected) / (1 - expected)) if expected < 1 else math.nan

    def merge(self, other: Any) -> Any:
        _check_alike(self, other)
        both = self.fresh()
        both.table = _grown(self.table, len(other.table)) + _grown(other.table, len(self.table))
        both.count, both.missed = self.count + other.count, self.missed + other.missed
        return both

    def fresh(self) -> Any:
        return type(self)()

    def state_dict(self) -> dict[str, Any]:
        return {"table": self.table, "count": self.count, "missed": self.missed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.table, self.count, self.missed = state["table"], state["count"], state["missed"]


class TemporalKappa(Score):
    """How far accuracy exceeds that of no-change: (p - p0) / (1 - p0), p0 that of the last label of the stream.

    Žliobaitė et al. 2015, Evaluation methods and decision theory for classification of streaming data
    with temporal dependence, Machine Learning 98. The first answer of a stream has no label before it and
    counts for neither. The last label is the newest that was known when the step was asked, where a tag
    `KNOWN` tells it, so that nothing is compared with a label that a delay hid; else "last" is in the order in
    which answers came. The label of a forgotten question was revealed too, so no-change knows it although it
    is not scored. Memory: two labels for each stream.
    """

    nothing = "no answers yet that follow another one of their stream"
    undefined = "an output was NaN, or the labels never changed"

    def __init__(self) -> None:
        self.count = 0
        self.missed = 0
        self.counts = torch.zeros(3, dtype=torch.int64)  # right, no-change right, undefined
        # First answer of each stream (label, what became of it) and its last label; -1 where there is none.
        self.first = torch.full((0, 2), -1)
        self.last = torch.full((0,), -1)

    def update(self, answer: Answer, said: Tensor | None) -> None:
        if said is None:
            targets = answer.targets[answer.target_mask].cpu().long()
            outcome = torch.full_like(targets, MISSED)
            self.missed += len(targets)
        else:
            said, targets = _revealed(self, answer, said)
            targets = _classes(self, said, targets)
            outcome = _outcome(said, targets)
        if not len(targets):
            return
        if (known := answer.tags.get(KNOWN)) is not None:
            self._count(known[answer.target_mask].cpu(), targets, outcome)
            return
        row = torch.nonzero(answer.target_mask, as_tuple=True)[0]
        rows, order = answer.rows[row].cpu().sort(stable=True)
        targets, outcome = targets[order], outcome[order]
        self._grow(int(rows[-1]) + 1)
        starts = torch.ones_like(rows, dtype=torch.bool)
        starts[1:] = rows[1:] != rows[:-1]
        before = torch.where(starts, self.last[rows], targets.roll(1))
        new, ends = before < 0, starts.roll(-1)
        self.first = self.first.index_put((rows[new],), torch.stack([targets[new], outcome[new]], 1))
        self.last = self.last.index_put((rows[ends],), targets[ends])
        self._count(before, targets, outcome)

    def _count(self, before: Tensor, label: Tensor, outcome: Tensor) -> None:
        compared = (before >= 0) & (label >= 0) & (outcome != MISSED)
        found = torch.stack([outcome == RIGHT, before == label, outcome == UNDEFINED])
        self.counts = self.counts + (found & compared).sum(1)
        self.count += int(compared.sum())

    def value(self) -> float:
        right, stayed, undefined = self.counts.tolist()
        if undefined or self.count == stayed:
            return math.nan
        return (right - stayed) / (self.count - stayed)

    def merge(self, other: Any) -> Any:
        _check_alike(self, other)
        both = self.fresh()
        streams = max(len(self.last), len(other.last))
        mine, theirs = (_copy_grown(self, streams), _copy_grown(other, streams))
        both.counts, both.count = mine.counts + theirs.counts, mine.count + theirs.count
        both.missed = self.missed + other.missed
        both.first = torch.where(mine.first[:, :1] >= 0, mine.first, theirs.first)
        both.last = torch.where(theirs.last >= 0, theirs.last, mine.last)
        # The first answer of the later part follows the last one of the earlier.
        both._count(mine.last, *theirs.first.unbind(1))
        return both

    def fresh(self) -> Any:
        return type(self)()

    def _grow(self, streams: int) -> None:
        if (missing := streams - len(self.last)) > 0:
            self.first = torch.cat([self.first, torch.full((missing, 2), -1)])
            self.last = torch.cat([self.last, torch.full((missing,), -1)])

    def state_dict(self) -> dict[str, Any]:
        tensors = {"counts": self.counts, "first": self.first, "last": self.last}
        return {**tensors, "count": self.count, "missed": self.missed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts, self.first, self.last = state["counts"], state["first"], state["last"]
        self.count, self.missed = state["count"], state["missed"]


class AbsoluteError(_Sums):
    """Mean absolute error of a point prediction, in units of the target; its mean where a target has many numbers.

    Args:
        point: output `(n, ...)` -> prediction in the shape of the targets; the mean of a Gaussian mixture if not given.
    """

    def __init__(self, point: Callable[[Tensor], Tensor] = mixture_mean):
        self.point = point
        super().__init__()

    def fresh(self) -> Any:
        return type(self)(self.point)

    def _add(self, said: Tensor, targets: Tensor) -> Tensor:
        predictions = self.point(said)
        _check_shape(self, "predictions", predictions, tuple(targets.shape))
        apart = (predictions.double() - targets.double()).abs()
        return apart.reshape(len(targets), -1).mean(1).sum().reshape(1)


class Scores:
    """Scores by name, updated together."""

    def __init__(self, **scores: "Score | Grouped"):
        self._scores = scores

    def __getitem__(self, name: str) -> Any:
        return self._scores[name]

    def update(self, answer: Answer, said: Tensor | None) -> None:
        for score in self._scores.values():
            score.update(answer, said)

    def value(self) -> dict[str, Any]:
        return {name: score.value() for name, score in self._scores.items()}

    def merge(self, other: Any) -> Any:
        self._check_names("merge", other._scores)
        return type(self)(**{name: score.merge(other[name]) for name, score in self._scores.items()})

    def fresh(self) -> Any:
        return type(self)(**{name: score.fresh() for name, score in self._scores.items()})

    def state_dict(self) -> dict[str, Any]:
        return {name: score.state_dict() for name, score in self._scores.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._check_names("load_state_dict", state)
        for name, score in self._scores.items():
            score.load_state_dict(state[name])

    def _check_names(self, called: str, other: Iterable[str]) -> None:
        if set(other) != set(self._scores):
            raise UsageError(
                f"Scores.{called}: got the scores {', '.join(sorted(other))} but these are "
                f"{', '.join(sorted(self._scores))}; give the same scores under the same names"
            )


class Grouped:
    """One copy of a score for each value of a tag; memory grows with the number of values.

    A group sees only its own answers, so what no-change says in a group is the last label of that group.

    Args:
        score: an empty score, copied for each group.
        by: name of the tag, an int or an int tensor `(R, T)`. Answers without it are not counted.
    """

    def __init__(self, score: Score, *, by: str):
        self.score, self.by = score, by
        self.groups: dict[int, Score] = {}

    def update(self, answer: Answer, said: Tensor | None) -> None:
        if self.by not in answer.tags:
            return
        tag = self._tag(answer)
        for value in tag[answer.target_mask].unique().tolist():
            group = self.groups.setdefault(value, self.score.fresh())
            group.update(answer._replace(target_mask=answer.target_mask & (tag == value)), said)

    def _tag(self, answer: Answer) -> Tensor:
        tag, shape = answer.tags[self.by], answer.target_mask.shape
        whole = isinstance(tag, int) or (isinstance(tag, Tensor) and tag.shape == shape and not tag.is_floating_point())
        if not whole:
            got = f"{type(tag).__name__} {tuple(getattr(tag, 'shape', ()))}".removesuffix(" ()")
            raise UsageError(
                f"Grouped: the tag {self.by!r} is a {got}, expected an int or an int tensor {tuple(shape)}; "
                "number the values"
            )
        return torch.as_tensor(tag, device=answer.target_mask.device).expand(shape)

    def value(self) -> dict[int, float]:
        return {value: self.groups[value].value() for value in sorted(self.groups)}

    def merge(self, other: Any) -> Any:
        if self.by != other.by:
            raise UsageError(
                f"Grouped.merge: one is by {self.by!r}, the other by {other.by!r}; merge groups of one tag"
            )
        _check_alike(self.score, other.score)
        both = self.fresh()
        for value in self.groups.keys() | other.groups.keys():
            empty = self.score.fresh()
            both.groups[value] = self.groups.get(value, empty).merge(other.groups.get(value, empty))
        return both

    def fresh(self) -> Any:
        return type(self)(self.score, by=self.by)

    def state_dict(self) -> dict[str, Any]:
        return {"groups": {value: self.groups[value].state_dict() for value in sorted(self.groups)}}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.groups = {}
        for value, part in state["groups"].items():
            self.groups[value] = self.score.fresh()
            self.groups[value].load_state_dict(part)


def _revealed(score: Score, answer: Answer, said: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs (at least float32) and targets at the n revealed places, `(n, ...)` each, on the CPU."""
    shown = answer.target_mask
    if said.shape[:2] != shown.shape or answer.targets.shape[:2] != shown.shape or len(answer.rows) != len(shown):
        raise UsageError(
            f"{type(score).__name__}: the output is {tuple(said.shape)} but the answer has {tuple(shown.shape)} "
            f"targets in {tuple(answer.targets.shape)} for {len(answer.rows)} rows; "
            "give what was said to this question, for the rows of the answer"
        )
    outputs = said.detach()[shown.to(said.device)].cpu()
    narrow = outputs.dtype in (torch.float16, torch.bfloat16)
    return outputs.float() if narrow else outputs, answer.targets[shown].cpu()


def _classes(score: Score, said: Tensor, targets: Tensor) -> Tensor:
    """The targets as int64, once they are known to be classes of the output; said `(n, C)`, targets `(n,)`."""
    name = type(score).__name__
    if said.dim() != 2 or targets.dim() != 1 or targets.is_floating_point():
        raise UsageError(
            f"{name}: for each answer the output is {tuple(said.shape[1:])} and the target {tuple(targets.shape[1:])} "
            f"{targets.dtype}, expected (C,) logits and one int class; choose a score that fits such targets"
        )
    if len(targets) and not 0 <= int(targets.min()) <= int(targets.max()) < said.shape[-1]:
        raise UsageError(
            f"{name}: targets go from {int(targets.min())} to {int(targets.max())} but the output has "
            f"{said.shape[-1]} classes, 0 to {said.shape[-1] - 1}; make the model with more outputs"
        )
    return targets.long()


def _outcome(said: Tensor, targets: Tensor) -> Tensor:
    """WRONG, RIGHT or UNDEFINED for each answer. `(n, C)`, `(n,)` int64 -> `(n,)` int64."""
    right = (said.argmax(-1) == targets).long()
    return torch.where(said.isnan().any(-1), UNDEFINED, right)


def _check_shape(score: Score, what: str, found: Tensor, expected: tuple[int, ...]) -> None:
    # Broadcasting would make a number out of any pair of shapes.
    if found.shape != expected:
        raise UsageError(
            f"{type(score).__name__}: {what} of shape {tuple(found.shape)} came for {expected[0]} answers, "
            f"expected {expected}; mend the function that the score was given"
        )


def _check_alike(score: Any, other: Any) -> None:
    if type(score) is not type(other) or getattr(score, "bins", None) != getattr(other, "bins", None):
        one, two = (type(s).__name__ + (f"(bins={s.bins})" if hasattr(s, "bins") else "") for s in (score, other))
        raise UsageError(f"{one}.merge: got {two}, expected {one}; merge scores of one kind and the same settings")


def _grown(table: Tensor, classes: int) -> Tensor:
    more = max(0, classes - len(table))
    return torch.nn.functional.pad(table, (0, more, 0, more))


def _copy_grown(score: TemporalKappa, streams: int) -> TemporalKappa:
    twin = score.fresh()
    twin.load_state_dict(score.state_dict())
    twin._grow(streams)
    return twin
