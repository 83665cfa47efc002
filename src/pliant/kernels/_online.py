"""Running statistics of a stream that changes: standardized features and a reference answer, in one pass.

For each feature, over the steps at which it is there (n counts them):

    r = max(1/n, RATE);  d = x - m, held within REACH sqrt(v) once n > SETTLE and v > 0
    m <- m + r d;  v <- (1 - r)(v + r d²);     level = (x - m) / sqrt(v),  within ±CLIP
    c = x - x_before;  w <- w + r'(c² - w);     move = c / sqrt(w),        within ±CLIP

so the past is forgotten over about 1/RATE steps, one outlier moves the mean by at most REACH r
standard deviations, and a true jump is still caught, since v then grows by half in about 0.4/(RATE REACH²)
steps. A feature that is missing gives zeros and moves nothing; a constant one gives zeros.

Sources: the exponentially weighted mean and variance are those of Finch 2009, Incremental calculation
of weighted mean and variance, eq. 124 and 143; holding deviations is Huber's M-estimate of location,
taken one step at a time (Huber 1964). RATE, REACH and SETTLE are ours.

All in float64, step by step: a chunk gives what its steps give, to the bit. Nothing here has a
gradient, since nothing in it depends on a parameter. Cost: O(B T F).
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._jit import jit

RATE = 1 / 500
REACH = 6.0
SETTLE = 20
CLIP = 5.0
ROUNDING = 1e-12
"""A spread below this share of the mean is rounding, so the feature is constant."""

LARGEST = 1e140
"""Larger numbers are held to this, so that squares stay finite."""


# The same in all three.


@jit
def _track(value, m):  # type: ignore[no-untyped-def]
    """Moves m, whose first three are the count, the mean and the variance."""
    m[0] += 1
    n = m[0]
    rate, spread = max(1 / n, RATE), math.sqrt(m[2])
    d = value - m[1]
    if n > SETTLE and spread > ROUNDING * abs(m[1]):
        d = min(max(d, -REACH * spread), REACH * spread)
    m[1] += rate * d
    m[2] = (1 - rate) * (m[2] + rate * d * d)


@jit
def _unit(value, var):  # type: ignore[no-untyped-def]
    spread = math.sqrt(var)
    return spread if spread > ROUNDING * abs(value) else UNVARIED * (1 + abs(value))


@jit
def _share_move(z, n, shares):  # type: ignore[no-untyped-def]
    # In logarithms about the largest: a wild move is still closest to the widest.
    kinds, z = len(WIDTHS), min(max(z, -LARGEST), LARGEST)
    highest = -math.inf
    for k in range(kinds):
        highest = max(highest, -math.log(WIDTHS[k]) - 0.5 * (z / WIDTHS[k]) ** 2)
    total = 0.0
    for k in range(kinds):
        share = (1 - DOUBT) * shares[k] + DOUBT / kinds
        total += share * math.exp(-math.log(WIDTHS[k]) - 0.5 * (z / WIDTHS[k]) ** 2 - highest)
    rate = max(SHARE_RATE, 3 / (n + 4))
    for k in range(kinds):
        share = (1 - DOUBT) * shares[k] + DOUBT / kinds
        joint = share * math.exp(-math.log(WIDTHS[k]) - 0.5 * (z / WIDTHS[k]) ** 2 - highest)
        shares[k] += rate * (joint / total - shares[k])


def _array(x: Tensor) -> np.ndarray:
    return (x if x.is_cpu and not x.requires_grad else x.detach().cpu()).contiguous().numpy()


def _exists(x: Tensor, mask: Tensor | None) -> np.ndarray:
    return np.ones(x.shape[:2], np.bool_) if mask is None else _array(mask)


def _tensor(array: np.ndarray, like: Tensor) -> Tensor:
    made = torch.from_numpy(array)
    return made if like.is_cpu else made.to(like.device)


DOUBT = 1e-3
"""Part of the weight of a mixture that is always shared evenly."""

SHARE_RATE = 1 / 200
FINE = 16
WIDTHS = (*(2.0**k for k in range(6 - FINE, 6)), 1e3, 1e12, 1e100)
"""Standard deviations of the Gaussians that make up the errors of no-change, in standard deviations of the
target. The `FINE` narrow ones, a factor of 2 apart, shape the density; the others bound the price of a
surprise. None is below about a thousandth, so that values which repeat exactly, as rounded ones do,
cannot earn bits without end."""

UNVARIED = 1e-3
"""A target that has never varied counts as having this standard deviation, in units of 1 + its size."""


class Moments(NamedTuple):
    """Statistics of F features of B streams: values `(B, F, 5)` float64, in this order.

    seen: values so far; mean, var: of the level; last: the newest value; change: mean square of the
    differences between neighboring values.
    """

    # One tensor, since at one step of a narrow model each more costs as much as the statistics themselves.
    values: Tensor

    @classmethod
    def fresh(cls, batch: int, width: int, device: torch.device | None = None) -> "Moments":
        """Of streams that have shown nothing yet."""
        return cls(torch.zeros(batch, width, 5, dtype=torch.float64, device=device))

    @property
    def seen(self) -> Tensor:
        return self.values[..., 0]

    @property
    def mean(self) -> Tensor:
        return self.values[..., 1]

    @property
    def var(self) -> Tensor:
        return self.values[..., 2]

    @property
    def change(self) -> Tensor:
        return self.values[..., 4]


def online_moments(x: Tensor, state: Moments, mask: Tensor | None = None) -> tuple[Tensor, Moments]:
    """Standardize features by what their stream has shown so far.

    Args:
        x: `(B, T, F)` float64, NaN where a value is missing.
        state: statistics before the first step.
        mask: `(B, T)` bool, false where the step does not exist.

    Returns:
        `(B, T, 3, F)` float64: level, move, and 1 where the value is missing; and the statistics after
        the last step.
    """
    values, (batch, steps, width) = _array(state.values).copy(), x.shape
    out = np.zeros((batch, steps, 3 * width))
    _moments(_array(x), _exists(x, mask), np.arange(width), values, out)
    return _tensor(out, x).view(batch, steps, 3, width), Moments(_tensor(values, x))


@jit
def _moments(x, exists, columns, moments, out):  # type: ignore[no-untyped-def]
    # out: the levels of all columns, then their moves, then their marks.
    batch, steps, _ = x.shape
    width = len(columns)
    for b in range(batch):
        for t in range(steps):
            if not exists[b, t]:
                continue
            for f in range(width):
                value, m = x[b, t, columns[f]], moments[b, f]
                if math.isnan(value):
                    out[b, t, 2 * width + f] = 1
                    continue
                value = min(max(value, -LARGEST), LARGEST)
                _track(value, m)
                n, spread = m[0], math.sqrt(m[2])
                if n == 1:
                    m[3] = value
                    continue
                if spread > ROUNDING * abs(m[1]):
                    out[b, t, f] = min(max((value - m[1]) / spread, -CLIP), CLIP)
                c = value - m[3]
                m[3] = value
                size = math.sqrt(m[4])
                rate = max(1 / (n - 1), RATE)
                held = c
                if n > SETTLE and size > ROUNDING * abs(m[1]):
                    held = min(max(c, -REACH * size), REACH * size)
                m[4] += rate * (held * held - m[4])
                size = math.sqrt(m[4])
                if size > ROUNDING * abs(m[1]):
                    out[b, t, width + f] = min(max(c / size, -CLIP), CLIP)


class ClassCounts(NamedTuple):
    """What the labels of B streams have been, forgotten over about 1/RATE steps.

    ring `(B, L + 1)` float64: the newest known label at each of the last L steps, NaN for none, and the
    place where the next one goes; counts `(B, C + 2)` float64: of each class, and how often the label L
    steps after a known one was another, and the same.
    """

    ring: Tensor
    counts: Tensor

    @classmethod
    def fresh(cls, batch: int, lag: int, classes: int, device: torch.device | None = None) -> "ClassCounts":
        """Of streams that have shown nothing yet."""
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        ring = torch.full((batch, lag + 1), math.nan, **wide)
        ring[:, lag] = 0
        return cls(ring, torch.full((batch, classes + 2), 0.5, **wide))


def class_reference(
    known: Tensor, state: ClassCounts, mask: Tensor | None = None, *, hold: bool = True
) -> tuple[Tensor, ClassCounts]:
    """The answer of no-change: the newest known label with the probability that it holds, else class frequencies.

        p(c) = s [c = l] + (1 - s) f_c / (1 - f_l) [c ≠ l]

    with l the newest known label, s the share of times at which it was still right L steps later, f
    the class frequencies; both by Krichevsky & Trofimov 1981 (counts plus one half).

    Args:
        known: `(B, T)` float64, the label that became known at each step, NaN if none; the newest of the steps before
            then stays the newest known one.
        state: counts before the first step.
        mask: `(B, T)` bool, false where the step does not exist.
        hold: expect the newest known label; otherwise the class frequencies alone.

    Returns:
        log p `(B, T, C)` float64 in nats, and the counts after the last step.

    Raises:
        UsageError: a label is no class.
    """
    ring, counts = _array(state.ring).copy(), _array(state.counts).copy()
    out = np.zeros((*known.shape, counts.shape[1] - 2))
    _classes(_array(known[..., None]), _exists(known, mask), hold, ring, counts, out)
    return _tensor(out, known), ClassCounts(_tensor(ring, known), _tensor(counts, known))


def _classes(*given: Any) -> None:
    if _class_reference(*given):
        classes = given[-2].shape[1] - 2
        raise UsageError(f"class_reference: a label is outside the {classes} classes 0 to {classes - 1}; give indices")


@jit
def _class_reference(x, exists, hold, ring, counts, out):  # type: ignore[no-untyped-def]
    # The label stands last in a row of x, the answer last in a row of out. Returns whether a label is no class.
    batch, steps, _ = x.shape
    lag, classes = ring.shape[1] - 1, counts.shape[1] - 2
    at = out.shape[2] - classes
    for b in range(batch):
        count, kept = counts[b, :classes], counts[b, classes:]
        for t in range(steps):
            if not exists[b, t]:
                continue
            label, place = x[b, t, -1], int(ring[b, lag])
            if label < 0 or label >= classes:
                return True
            before = ring[b, place]
            newest = ring[b, (place + lag - 1) % lag] if math.isnan(label) else label
            ring[b, place] = newest
            ring[b, lag] = (place + 1) % lag
            if not math.isnan(label):
                for c in range(classes):
                    count[c] = 0.5 + (1 - RATE) * (count[c] - 0.5)
                count[int(label)] += 1
                if not math.isnan(before):
                    for k in range(2):
                        kept[k] = 0.5 + (1 - RATE) * (kept[k] - 0.5)
                    kept[1 if label == before else 0] += 1
            total = count.sum()
            if math.isnan(newest) or not hold:
                for c in range(classes):
                    out[b, t, at + c] = math.log(count[c] / total)
                continue
            rest = total - count[int(newest)]
            stays = kept[1] / (kept[0] + kept[1])
            for c in range(classes):
                out[b, t, at + c] = math.log((1 - stays) * count[c] / rest)
            out[b, t, at + int(newest)] = math.log(stays)
    return False


class NumberScale(NamedTuple):
    """How far G numbers of B streams move within L steps.

    ring `(B, L + 1, G)` float64: what no-change expected at each of the last L steps, NaN for nothing, and
    the place where the next one goes; values `(B, G, 6 + K)` float64: how many numbers, their mean and
    variance, the newest known one (NaN for none), how many moves, their mean square, and the shares of
    them that fell to each of `WIDTHS`.
    """

    ring: Tensor
    values: Tensor

    @classmethod
    def fresh(cls, batch: int, lag: int, targets: int, device: torch.device | None = None) -> "NumberScale":
        """Of streams that have shown nothing yet."""
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        ring = torch.full((batch, lag + 1, targets), math.nan, **wide)
        values = torch.zeros(batch, targets, 6 + len(WIDTHS), **wide)
        ring[:, lag], values[..., 3], values[..., 6:] = 0, math.nan, 1 / len(WIDTHS)
        return cls(ring, values)


def number_reference(
    known: Tensor, state: NumberScale, mask: Tensor | None = None, *, hold: bool = True
) -> tuple[Tensor, NumberScale]:
    """Where no-change expects a number, and how its errors are spread.

    The errors are modelled by Gaussians around the center whose standard deviations are `WIDTHS` times
    that of the target, with shares that follow their responsibilities for the errors, over about the last
    1/SHARE_RATE of them (online EM: Cappé & Moulines 2009), mixed with `DOUBT` of even ones.

    Args:
        known: `(B, T, G)` float64, newest known number at each step, NaN if none.
        state: scales before the first step.
        mask: `(B, T)` bool, false where the step does not exist.
        hold: expect the newest known number; otherwise the mean, with the standard deviation as the scale.

    Returns:
        `(B, T, 3 + K, G)` float64: center, root mean square of the errors, standard deviation of the target,
        in its units (0, 1, 1 while nothing is known), and the logarithms of the shares; and the scales after
        the last step.
    """
    ring, values = _array(state.ring).copy(), _array(state.values).copy()
    batch, steps, targets = known.shape
    out = np.zeros((batch, steps, (3 + len(WIDTHS)) * targets))
    _number_reference(_array(known), _exists(known, mask), hold, ring, values, out)
    about = _tensor(out, known).view(batch, steps, 3 + len(WIDTHS), targets)
    return about, NumberScale(_tensor(ring, known), _tensor(values, known))


@jit
def _number_reference(x, exists, hold, ring, values, out):  # type: ignore[no-untyped-def]
    # The numbers stand last in a row of x, the answer last in a row of out.
    batch, steps, width = x.shape
    lag, targets, kinds = ring.shape[1] - 1, ring.shape[2], len(WIDTHS)
    first, at = width - targets, out.shape[2] - (3 + kinds) * targets
    for b in range(batch):
        for t in range(steps):
            if not exists[b, t]:
                continue
            place = int(ring[b, lag, 0])
            ring[b, lag, 0] = (place + 1) % lag
            for g in range(targets):
                value, expected, m = x[b, t, first + g], ring[b, place, g], values[b, g]
                if not math.isnan(value):
                    value = min(max(value, -LARGEST), LARGEST)
                    m[3] = value
                    _track(value, m)
                    if not math.isnan(expected):
                        m[4] += 1
                        move, size = value - expected, math.sqrt(m[5])
                        _share_move(move / _unit(value, m[2]), m[4], m[6:])
                        if m[4] > SETTLE and size > 0:
                            move = min(max(move, -REACH * size), REACH * size)
                        m[5] += max(1 / m[4], RATE) * (move * move - m[5])
                ring[b, place, g] = m[3]
                for k in range(kinds):
                    out[b, t, at + (3 + k) * targets + g] = math.log((1 - DOUBT) * m[6 + k] + DOUBT / kinds)
                center, size, unit = 0.0, 1.0, 1.0
                if m[0] > 0:
                    center = m[3] if hold else m[1]
                    unit = _unit(center, m[2])
                    size = math.sqrt(m[5]) if hold and m[4] > 0 else unit
                    size = max(size, WIDTHS[0] * unit)
                out[b, t, at + g], out[b, t, at + targets + g], out[b, t, at + 2 * targets + g] = center, size, unit


class Places(NamedTuple):
    """Where things stand in a row of a table, all int64.

    numbers `(N,)`: columns that hold numbers; codes `(M,)`: those that hold codes; sizes, starts `(M,)`: how
    many codes each has, and the row of the table of embeddings from which on its codes stand. The newest
    known labels come last in a row.
    """

    numbers: np.ndarray
    codes: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray

    @property
    def width(self) -> int:
        """Columns of what `observe_rows` gives that stand before the reference."""
        return 3 * len(self.numbers) + len(self.codes)


def observe_rows(
    x: Tensor,
    places: Places,
    moments: Moments,
    reference: ClassCounts | NumberScale,
    mask: Tensor | None = None,
    *,
    hold: bool = True,
) -> tuple[Tensor, Moments, ClassCounts | NumberScale]:
    """All that a model of rows makes of them before any parameter comes in, in one go.

    Args:
        x: `(B, T, F + G)` float64, NaN where a value is missing.
        places: what stands where.
        moments, reference: of the numbers and of the labels before the first step.
        mask: `(B, T)` bool, false where the step does not exist.
        hold: see `class_reference` and `number_reference`.

    Returns:
        `(B, T, S)` float64: what `online_moments` gives, rows of the table of embeddings (one after a column's
        codes for a missing one), and what `class_reference` or `number_reference` gives; and the statistics
        after the last step.

    Raises:
        UsageError: a code is none of its column, or a label is no class.
    """
    rows, exists, n = _array(x), _exists(x, mask), len(places.numbers)
    values, ring, counts = (_array(part).copy() for part in (*moments, *reference))
    classify = isinstance(reference, ClassCounts)
    size = counts.shape[1] - 2 if classify else counts.shape[1] * (3 + len(WIDTHS))
    out = np.zeros((*rows.shape[:2], places.width + size))
    _moments(rows, exists, places.numbers, values, out)
    if len(places.codes):
        wrong, code, most = _code_rows(rows, exists, places.codes, places.sizes, places.starts, out[..., 3 * n :])
        if wrong:
            raise UsageError(f"a category has the code {code:g}, expected one from 0 to {most - 1}, or NaN")
    if classify:
        _classes(rows, exists, hold, ring, counts, out)
    else:
        _number_reference(rows, exists, hold, ring, counts, out)
    kind = ClassCounts if classify else NumberScale
    return _tensor(out, x), Moments(_tensor(values, x)), kind(_tensor(ring, x), _tensor(counts, x))


@jit
def _code_rows(x, exists, columns, sizes, starts, out):  # type: ignore[no-untyped-def]
    """Whether a code is none of its column, that code, and how many the column has."""
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            if not exists[b, t]:
                continue
            for m in range(len(columns)):
                code = x[b, t, columns[m]]
                if math.isnan(code):
                    code = np.float64(sizes[m])
                elif not 0 <= code <= sizes[m]:
                    return True, code, sizes[m]
                out[b, t, m] = starts[m] + np.floor(code)
    return False, 0.0, 0
