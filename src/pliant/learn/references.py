"""References for streams of table rows: what can be said from the labels alone.

They live on the label channels of a question (`pliant.core.columns`), row by row, and so know a label
as soon as a learner may know it, however the stream is cut into questions. A reset drops what stands
for a stream at the moment (its latest labels, its guesses that wait); what has been learned
(frequencies, hits, scales of errors) stays, as a learner's parameters do.
"""

import math
from abc import abstractmethod
from collections import deque
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pliant.core import Answer, Question, Record, UsageError
from pliant.core.columns import Columns
from pliant.learn.opponents import Remembering

Array = NDArray[Any]
FINE = 16
WIDTHS = np.array([*(2.0**k for k in range(-10, FINE - 10)), 1e3, 1e6, 1e12, 1e100])
"""Widths of the Gaussians of a `ResidualDensity`, in its unit: `FINE` powers of 2, then coarse ones."""
NARROW = float(1 / WIDTHS[0])
"""The unit over the narrowest width."""
MEMORY = 200
"""Labels after which shares have forgotten all but 1/e of what they knew."""
DOUBT = 0.003
"""Part of the weight of a mixture that is always shared evenly."""
SLOW = 1000
"""Labels after which the level and standard deviation of a label have forgotten as much."""
LARGEST = 1e100
"""Numbers beyond are read as this, so that squares stay finite."""


class Shares:
    """How often each of K experts was right of late: mixture weights by online EM (Cappé & Moulines 2009).

    a ← (1 - rate) a + rate r with responsibilities r, the rate falling as 3 / (n + 3) to 1 / `MEMORY`: with
    1 / n it takes several times as many labels to get as close, each being a small part of a step of EM.
    A part `DOUBT` of the weight is always shared evenly, so nobody is ruled out.
    """

    __slots__ = ("labels", "shares")

    def __init__(self, shares: Array, labels: int = 0):
        self.shares, self.labels = shares, labels

    @classmethod
    def even(cls, experts: int) -> "Shares":
        """Before any label."""
        return cls(np.full(experts, 1 / experts))

    def weights(self) -> Array:
        """The weights `(K,)`."""
        return (1 - DOUBT) * self.shares + DOUBT / len(self.shares)

    def learn(self, densities: Array) -> None:
        """Take note of what each expert gave to what happened `(K,)`, up to a common factor; one must be positive."""
        joint = self.weights() * densities
        rate = max(1 / MEMORY, 3 / (self.labels + 4))
        self.shares = (1 - rate) * self.shares + rate / joint.sum() * joint
        self.labels += 1

    def numbers(self) -> list[float]:
        """All of it."""
        return [float(self.labels), *self.shares.tolist()]

    @classmethod
    def of(cls, numbers: list[float]) -> "Shares":
        """What `numbers` told."""
        return cls(np.array(numbers[1:]), int(numbers[0]))


@lru_cache(maxsize=4096)
def _widths(notch: int) -> tuple[Array, Array]:
    """The widths at the unit 2**notch, and their logarithms."""
    widths = WIDTHS * 2.0**notch
    return widths, np.log(widths)


class ResidualDensity:
    """A density of a number around a center that somebody else chose, fitted online to past errors.

    A mixture of Gaussians around the center whose widths are fixed, powers of 2 from about 1e-3 to 30
    standard deviations of the label and four coarse ones beyond, with shares by online EM (`Shares`). In
    the shares alone the likelihood has one maximum, so nothing depends on a start; neighbors that are a
    factor of 2 apart make any Gaussian to 0.02 nats; the coarse ones bound the price of a surprise.
    The standard deviation (exponential over `SLOW` labels, an outlier counts as 30 of them) moves
    the grid by whole powers, and the shares with it. So exact repeats earn at most about 10 bits. No width is
    below 1e-9 of the label's level, nor 1e-6 of it (of 1, if it is 0) before the label has varied. The unit is 1 while
    no label is known.
    """

    __slots__ = ("labels", "level", "notch", "shares", "variance")

    def __init__(self) -> None:
        self.labels, self.level, self.variance = 0, 0.0, 0.0
        self.shares = Shares.even(len(WIDTHS))
        self.notch = round(self._notch())

    def learn(self, label: float, center: float | None) -> None:
        """A label became known; `center` is where it was expected, None if there was no expectation."""
        if center is not None:
            widths, logs = _widths(self.notch)
            z = min(abs(label - center), 30 * float(widths[-1])) / widths
            nats = 0.5 * z * z + logs
            self.shares.learn(np.exp(nats.min() - nats))
        self.labels += 1
        rate = max(1 / self.labels, 1 / SLOW)
        bound = 30 * math.sqrt(self.variance) if self.labels > 10 and self.variance else math.inf
        apart = min(max(label - self.level, -bound), bound)
        self.variance = (1 - rate) * (self.variance + rate * apart * apart)
        self.level += rate * apart
        notch = self._notch()
        # Only when it is clearly another one, so that noise does not move the grid to and fro.
        if abs(notch - self.notch) > 0.75:
            self._move(round(notch) - self.notch)

    def _notch(self) -> float:
        """Logarithm to base 2 of the unit that the grid should have."""
        if not self.labels:
            return 0.0  # a unit of 1, as `pliant.kernels.number_reference` has while nothing is known
        level, spread = abs(self.level), math.sqrt(self.variance)
        unit = max(spread, NARROW * 1e-9 * level) if spread else NARROW * 1e-6 * (level or 1.0)
        return math.log2(max(unit, 1e-90))

    def _move(self, notches: int) -> None:
        """Move the grid up by so many powers of 2; shares that leave it stay at its end."""
        before = self.shares.shares
        after = np.concatenate([np.zeros(FINE), before[FINE:]])
        np.add.at(after, (np.arange(FINE) - notches).clip(0, FINE - 1), before[:FINE])
        self.shares.shares = after
        self.notch += notches

    def around(self, center: float | None, place: Array) -> None:
        """Write the mixture: K logits, means, log standard deviations; around the level if there is no center."""
        k = len(WIDTHS)
        place[:k] = np.log(self.shares.weights())
        place[k : 2 * k] = self.level if center is None else center
        place[2 * k :] = _widths(self.notch)[1]

    def numbers(self) -> list[float]:
        """All of it."""
        return [float(self.labels), self.level, self.variance, float(self.notch), *self.shares.numbers()]

    @classmethod
    def of(cls, numbers: list[float]) -> "ResidualDensity":
        """What `numbers` told."""
        one = cls()
        one.labels, one.level, one.variance, one.notch = int(numbers[0]), numbers[1], numbers[2], int(numbers[3])
        one.shares = Shares.of(numbers[4:])
        return one


class Frequencies:
    """Class frequencies, (n_c + 1/2) / (n + C/2): Krichevsky & Trofimov 1981."""

    def __init__(self, num_classes: int):
        self.counts = np.full(num_classes, 0.5)
        self.total = 0.5 * num_classes

    def learn(self, label: int) -> None:
        self.counts[label] += 1
        self.total += 1

    def probabilities(self) -> Array:
        """`(C,)`."""
        return self.counts / self.total

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.counts = np.array(state["counts"])
        self.total = float(self.counts.sum())


Note = tuple[Any, ...]
"""What a leaf wants to know of a step when its label comes: nested tuples of plain values."""


class RowByRow(Remembering):
    """Walks through a question in time order, learning at each step from the label that is known there.

    Questions of T steps and T questions of one step give the same to the bit. Outputs are float64:
    log-probabilities `(B, T, C)`, or mixtures `(B, T, G, 3K)` in the unit of the targets, one density for
    each stream, target and kind of center. `learn` only closes questions.

    Args:
        columns: the schema of the stream.
        remember: questions that may wait for an answer at the same time.
    """

    kinds = 1
    """Kinds of centers whose errors differ in size."""

    def __init__(self, columns: Columns, remember: int = 128):
        super().__init__(remember)
        if columns.lag < 1:
            raise UsageError(
                f"{type(self).__name__}: lag is {columns.lag}, but no label is known before its step is asked"
            )
        self.columns = columns
        self.classify = columns.task == "classify"
        self._pending: dict[int, deque[Note]] = {}  # notes of the latest steps, `lag` at most
        self._densities: dict[int, list[ResidualDensity]] = {}  # kinds * G of them

    @abstractmethod
    def _learn(self, row: int, note: Note | None, label: list[float]) -> None:
        """The label `(G,)` of stream `row` became known; NaN if missing, `note` None if its step is not remembered."""

    @abstractmethod
    def _answer(self, row: int, seen: Any, place: Array) -> Note:
        """Write the answer to a step of stream `row` into `place`, zeros `(C,)` or `(G, 3K)`."""

    def _look(self, inputs: Array, question: Question) -> Any:
        """What `_answer` gets to see of inputs `(B, T, F + G)`, indexed by stream and step."""
        return inputs

    def _forget(self, row: int) -> None:
        """Drop the memory of a stream."""
        self._pending.pop(row, None)

    def predict(self, question: Question) -> Tensor:
        """The answer.

        Raises:
            UsageError: the inputs do not fit the schema.
        """
        batch, steps = question.mask.shape
        inputs, features = question.inputs.detach().cpu().double().numpy(), len(self.columns.features)
        if inputs.shape[2:] != (self.columns.num_features,):
            raise UsageError(
                f"{type(self).__name__}: inputs have shape {inputs.shape}, expected {self.columns.num_features} "
                "numbers per row, the features and the newest known labels"
            )
        mask, reset = question.mask.numpy(), question.reset.tolist()
        inputs = np.where(mask[..., None] & np.isfinite(inputs), inputs, np.nan).clip(-LARGEST, LARGEST)
        labels = inputs[..., features:]
        if self.classify and not np.isin(labels[~np.isnan(labels)], np.arange(self.columns.num_outputs)).all():
            raise UsageError(
                f"{type(self).__name__}: a label is none of the {self.columns.num_outputs} classes; give "
                "the index of its class, or NaN"
            )
        size = (self.columns.num_outputs,) if self.classify else (self.columns.num_outputs, 3 * len(WIDTHS))
        output, seen = np.zeros((batch, steps, *size)), self._look(inputs, question)
        rows, known, exists = question.rows.tolist(), labels.tolist(), mask.tolist()
        for t in range(steps):
            for b, row in enumerate(rows):
                if reset[b][t]:
                    self._forget(row)
                if exists[b][t]:
                    self._step(row, known[b][t], seen[b][t], output[b, t])
        return self._say(question, torch.from_numpy(output))

    def _step(self, row: int, label: list[float], seen: Any, place: Array) -> None:
        pending = self._pending.get(row)
        if pending is None:
            pending = self._pending[row] = deque(maxlen=self.columns.lag)
        self._learn(row, pending[0] if len(pending) == self.columns.lag else None, label)
        pending.append(self._answer(row, seen, place))

    def learn(self, answer: Answer) -> Record:
        outcome = "nothing to learn" if answer.time in self._waiting else "forgotten"
        self._close(answer)
        return Record(0, answer.time, outcome)

    def _densities_of(self, row: int) -> list[ResidualDensity]:
        if row not in self._densities:
            self._densities[row] = [ResidualDensity() for _ in range(self.kinds * self.columns.num_outputs)]
        return self._densities[row]

    def _learn_numbers(self, row: int, guesses: tuple[Any, ...] | None, label: list[float]) -> None:
        """Fit the densities to numbers `(G,)`; guesses are pairs of kind and center, None if not remembered."""
        densities = self._densities_of(row)
        for g, value in enumerate(label):
            if value == value:
                kind, center = guesses[g] if guesses is not None else (0, None)
                for k in range(self.kinds):
                    densities[k * len(label) + g].learn(value, center if k == kind else None)

    def _say_numbers(self, row: int, guesses: tuple[Any, ...], place: Array) -> None:
        densities = self._densities_of(row)
        for g, (kind, center) in enumerate(guesses):
            densities[kind * len(guesses) + g].around(center, place[g])

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves, as nested plain values and tensors."""
        told = {row: [one.numbers() for one in densities] for row, densities in self._densities.items()}
        return super().state_dict() | {
            "pending": {row: list(notes) for row, notes in self._pending.items()},
            "densities": {row: torch.tensor(numbers, dtype=torch.float64) for row, numbers in told.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._pending = {row: deque(notes, maxlen=self.columns.lag) for row, notes in state["pending"].items()}
        told = {row: numbers.tolist() for row, numbers in state["densities"].items()}
        self._densities = {row: [ResidualDensity.of(one) for one in numbers] for row, numbers in told.items()}


class Marginal(RowByRow):
    """What labels have been so far, whatever the inputs.

    Classes by their frequencies over all streams, numbers by a density around the mean of the stream.
    """

    def __init__(self, columns: Columns, remember: int = 128):
        super().__init__(columns, remember)
        self.frequencies = Frequencies(columns.num_outputs if self.classify else 0)
        self._means: dict[int, list[tuple[int, float]]] = {}  # count and mean of each target

    def _learn(self, row: int, note: Note | None, label: list[float]) -> None:
        if self.classify:
            if label[0] == label[0]:
                self.frequencies.learn(int(label[0]))
            return
        self._learn_numbers(row, note, label)
        means = self._means.setdefault(row, [(0, 0.0)] * len(label))
        for g, value in enumerate(label):
            if value == value:
                count, mean = means[g]
                means[g] = (count + 1, mean * (count / (count + 1)) + value / (count + 1))

    def _answer(self, row: int, seen: Any, place: Array) -> Note:
        if self.classify:
            place[:] = np.log(self.frequencies.probabilities())
            return ()
        guesses = tuple((0, mean if count else None) for count, mean in self._means[row])
        self._say_numbers(row, guesses, place)
        return guesses

    def state_dict(self) -> dict[str, Any]:
        means = {row: list(pairs) for row, pairs in self._means.items()}
        return super().state_dict() | {"frequencies": self.frequencies.state_dict(), "means": means}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.frequencies.load_state_dict(state["frequencies"])
        self._means = {row: list(pairs) for row, pairs in state["means"].items()}


class LastLabel(RowByRow):
    """No change: the newest known label of the stream again.

    A class with the probability that this has been right so far over the same lag, in all streams; the
    other classes share the rest evenly. A number with a density around it. A stream without a known
    label gets the uniform guess, or a density as wide as is known.
    """

    def __init__(self, columns: Columns, remember: int = 128):
        super().__init__(columns, remember)
        self._last: dict[int, list[float]] = {}  # newest known label of each target, NaN if none
        self.hits = [[0.5, 0.5] for _ in range(self.kinds)]  # wrong, right

    def _forget(self, row: int) -> None:
        super()._forget(row)
        self._last.pop(row, None)

    def _learn(self, row: int, note: Note | None, label: list[float]) -> None:
        if not self.classify:
            self._learn_numbers(row, note, label)
        elif note is not None and label[0] == label[0]:
            kind, guess = note[0]
            if guess is not None:
                self.hits[kind][guess == label[0]] += 1
        self._keep(row, label)

    def _keep(self, row: int, label: list[float]) -> None:
        """Take the newest label `(G,)` into the memory of the stream."""
        last = self._last.get(row)
        kept = [math.nan] * len(label) if last is None else last
        self._last[row] = [new if new == new else old for new, old in zip(label, kept, strict=True)]

    def _guess(self, row: int) -> list[tuple[int, float]]:
        """Kind and guess for each target, NaN if there is none."""
        return [(0, value) for value in self._last[row]]

    def _answer(self, row: int, seen: Any, place: Array) -> Note:
        guesses = tuple((kind, value if value == value else None) for kind, value in self._guess(row))
        if not self.classify:
            self._say_numbers(row, guesses, place)
            return guesses
        kind, guess = guesses[0]
        if guess is None:
            place[:] = -math.log(len(place))
        else:
            wrong, right = self.hits[kind]
            place[:] = math.log(wrong / (wrong + right) / max(1, len(place) - 1))
            place[int(guess)] = math.log(right / (wrong + right))
        return guesses

    def state_dict(self) -> dict[str, Any]:
        last = {row: list(label) for row, label in self._last.items()}
        return super().state_dict() | {"last": last, "hits": [list(pair) for pair in self.hits]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._last = {row: list(label) for row, label in state["last"].items()}
        self.hits = [list(pair) for pair in state["hits"]]


class Seasonal(LastLabel):
    """The label of as few whole seasons before as are needed for it to be known, said like `LastLabel`.

    For step s that is the label of step s - m season, m = ceil(lag / season). Where it is missing, or
    before the first season is full, it is the last label, whose hits and errors are counted apart.

    Raises:
        UsageError: the columns tell no season.
    """

    kinds = 2

    def __init__(self, columns: Columns, remember: int = 128):
        super().__init__(columns, remember)
        if columns.season is None or columns.season < 1:
            raise UsageError(f"Seasonal: season is {columns.season}, expected 1 step or more; give the columns one")
        ahead = math.ceil(columns.lag / columns.season) * columns.season - columns.lag
        self._size = ahead + 1
        self._past: dict[int, deque[list[float]]] = {}

    def _forget(self, row: int) -> None:
        super()._forget(row)
        self._past.pop(row, None)

    def _keep(self, row: int, label: list[float]) -> None:
        super()._keep(row, label)
        if row not in self._past:
            self._past[row] = deque(maxlen=self._size)
        self._past[row].append(label)

    def _guess(self, row: int) -> list[tuple[int, float]]:
        past, fallback = self._past[row], super()._guess(row)
        if len(past) < self._size:
            return fallback
        return [(1, value) if value == value else other for value, other in zip(past[0], fallback, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        past = {row: torch.tensor(list(labels), dtype=torch.float64) for row, labels in self._past.items()}
        return super().state_dict() | {"past": past}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._past = {row: deque(labels.tolist(), maxlen=self._size) for row, labels in state["past"].items()}
