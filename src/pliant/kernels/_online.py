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
def _track(value, b, f, count, mean, var):  # type: ignore[no-untyped-def]
    count[b, f] += 1
    n = count[b, f]
    rate, spread = max(1 / n, RATE), math.sqrt(var[b, f])
    d = value - mean[b, f]
    if n > SETTLE and spread > ROUNDING * abs(mean[b, f]):
        d = min(max(d, -REACH * spread), REACH * spread)
    mean[b, f] += rate * d
    var[b, f] = (1 - rate) * (var[b, f] + rate * d * d)


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


def _arrays(state: tuple[Tensor, ...]) -> list[np.ndarray]:
    return [_array(leaf).copy() for leaf in state]


def _exists(x: Tensor, mask: Tensor | None) -> np.ndarray:
    return np.ones(x.shape[:2], np.bool_) if mask is None else _array(mask)


def _tensors(like: Tensor, out: np.ndarray, parts: list[np.ndarray], kind: Any) -> tuple[Tensor, Any]:
    made = [torch.from_numpy(part) for part in (out, *parts)]
    if not like.is_cpu:
        made = [part.to(like.device) for part in made]
    return made[0], kind(*made[1:])


DOUBT = 1e-3
"""Part of the weight of a mixture that is always shared evenly."""

SHARE_RATE = 1 / 200
FINE = 16
WIDTHS = (*(2.0**k for k in range(6 - FINE, 6)), 1e3, 1e6, 1e12)
"""Standard deviations of the Gaussians that make up the errors of no-change, in standard deviations of the
target. The `FINE` narrow ones, a factor of 2 apart, shape the density; the others bound the price of a
surprise. None is below about a thousandth, so that values which repeat exactly, as rounded ones do,
cannot earn bits without end."""

UNVARIED = 1e-3
"""A target that has never varied counts as having this standard deviation, in units of 1 + its size."""


class Moments(NamedTuple):
    """Statistics of F features of B streams, each `(B, F)` float64.

    seen: values so far; mean, var: of the level; last: the newest value; change: mean square of the
    differences between neighboring values.
    """

    seen: Tensor
    mean: Tensor
    var: Tensor
    last: Tensor
    change: Tensor

    @classmethod
    def fresh(cls, batch: int, width: int, device: torch.device | None = None) -> "Moments":
        """Of streams that have shown nothing yet."""
        return cls(*torch.zeros(5, batch, width, dtype=torch.float64, device=device).unbind(0))


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
    parts = _arrays(state)
    out = np.zeros((*x.shape[:2], 3, x.shape[2]))
    _moments(_array(x), _exists(x, mask), *parts, out)
    return _tensors(x, out, parts, Moments)


@jit
def _moments(x, exists, count, mean, var, last, change, out):  # type: ignore[no-untyped-def]
    batch, steps, width = x.shape
    for b in range(batch):
        for t in range(steps):
            if not exists[b, t]:
                continue
            for f in range(width):
                if math.isnan(x[b, t, f]):
                    out[b, t, 2, f] = 1
                    continue
                value = min(max(x[b, t, f], -LARGEST), LARGEST)
                _track(value, b, f, count, mean, var)
                n, spread = count[b, f], math.sqrt(var[b, f])
                if n == 1:
                    last[b, f] = value
                    continue
                if spread > ROUNDING * abs(mean[b, f]):
                    out[b, t, 0, f] = min(max((value - mean[b, f]) / spread, -CLIP), CLIP)
                c = value - last[b, f]
                last[b, f] = value
                size = math.sqrt(change[b, f])
                rate = max(1 / (n - 1), RATE)
                held = c
                if n > SETTLE and size > ROUNDING * abs(mean[b, f]):
                    held = min(max(c, -REACH * size), REACH * size)
                change[b, f] += rate * (held * held - change[b, f])
                size = math.sqrt(change[b, f])
                if size > ROUNDING * abs(mean[b, f]):
                    out[b, t, 1, f] = min(max(c / size, -CLIP), CLIP)


class ClassCounts(NamedTuple):
    """What the labels of B streams have been, forgotten over about 1/RATE steps.

    ring `(B, L)` float64: the newest known label at each of the last L steps, NaN for none; place
    `(B,)` int64: where the next one goes; counts `(B, C)` float64 of each class; kept `(B, 2)` float64:
    how often the label L steps after a known one was another, and the same.
    """

    ring: Tensor
    place: Tensor
    counts: Tensor
    kept: Tensor

    @classmethod
    def fresh(cls, batch: int, lag: int, classes: int, device: torch.device | None = None) -> "ClassCounts":
        """Of streams that have shown nothing yet."""
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        return cls(
            torch.full((batch, lag), math.nan, **wide),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.full((batch, classes), 0.5, **wide),
            torch.full((batch, 2), 0.5, **wide),
        )


def class_reference(
    known: Tensor, state: ClassCounts, mask: Tensor | None = None, *, hold: bool = True
) -> tuple[Tensor, ClassCounts]:
    """The answer of no-change: the newest known label with the probability that it holds, else class frequencies.

        p(c) = s [c = l] + (1 - s) f_c / (1 - f_l) [c ≠ l]

    with l the newest known label, s the share of times at which it was still right L steps later, f
    the class frequencies; both by Krichevsky & Trofimov 1981 (counts plus one half).

    Args:
        known: `(B, T)` float64, newest known label at each step, NaN if none.
        state: counts before the first step.
        mask: `(B, T)` bool, false where the step does not exist.
        hold: expect the newest known label; otherwise the class frequencies alone.

    Returns:
        log p `(B, T, C)` float64 in nats, and the counts after the last step.

    Raises:
        UsageError: a label is no class.
    """
    parts, classes = _arrays(state), state.counts.shape[1]
    labels, exists = _array(known), _exists(known, mask)
    if (exists & ((labels < 0) | (labels >= classes))).any():
        raise UsageError(f"class_reference: a label is outside the {classes} classes 0 to {classes - 1}; give indices")
    out = np.zeros((*known.shape, classes))
    _class_reference(labels, exists, hold, *parts, out)
    return _tensors(known, out, parts, ClassCounts)


@jit
def _class_reference(known, exists, hold, ring, place, counts, kept, out):  # type: ignore[no-untyped-def]
    batch, steps = known.shape
    lag, classes = ring.shape[1], counts.shape[1]
    for b in range(batch):
        for t in range(steps):
            if not exists[b, t]:
                continue
            label, before = known[b, t], ring[b, place[b]]
            ring[b, place[b]] = label
            place[b] = (place[b] + 1) % lag
            if not math.isnan(label):
                for c in range(classes):
                    counts[b, c] = 0.5 + (1 - RATE) * (counts[b, c] - 0.5)
                counts[b, int(label)] += 1
                if not math.isnan(before):
                    for k in range(2):
                        kept[b, k] = 0.5 + (1 - RATE) * (kept[b, k] - 0.5)
                    kept[b, 1 if label == before else 0] += 1
            total = counts[b].sum()
            if math.isnan(label) or not hold:
                for c in range(classes):
                    out[b, t, c] = math.log(counts[b, c] / total)
                continue
            rest = total - counts[b, int(label)]
            stays = kept[b, 1] / (kept[b, 0] + kept[b, 1])
            for c in range(classes):
                out[b, t, c] = math.log((1 - stays) * counts[b, c] / rest)
            out[b, t, int(label)] = math.log(stays)


class NumberScale(NamedTuple):
    """How far numbers of B streams move within L steps.

    ring `(B, L, G)` float64: what no-change expected at each of the last L steps, NaN for nothing;
    place `(B,)` int64: where the next one goes; last `(B, G)` float64: the newest known number, NaN for
    none; seen, mean, var `(B, G)`: of the numbers; moves, square `(B, G)`: how many moves, and their
    mean square; shares `(B, G, K)`: of them that fell to each of `WIDTHS`.
    """

    ring: Tensor
    place: Tensor
    last: Tensor
    seen: Tensor
    mean: Tensor
    var: Tensor
    moves: Tensor
    square: Tensor
    shares: Tensor

    @classmethod
    def fresh(cls, batch: int, lag: int, targets: int, device: torch.device | None = None) -> "NumberScale":
        """Of streams that have shown nothing yet."""
        wide: dict[str, Any] = {"dtype": torch.float64, "device": device}
        zeros = torch.zeros(5, batch, targets, **wide)
        return cls(
            torch.full((batch, lag, targets), math.nan, **wide),
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.full((batch, targets), math.nan, **wide),
            seen=zeros[0],
            mean=zeros[1],
            var=zeros[2],
            moves=zeros[3],
            square=zeros[4],
            shares=torch.full((batch, targets, len(WIDTHS)), 1 / len(WIDTHS), **wide),
        )


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
    parts, exists = _arrays(state), _exists(known, mask)
    out = np.zeros((*known.shape[:2], 3 + len(WIDTHS), known.shape[2]))
    _number_reference(_array(known), exists, hold, *parts, out)
    return _tensors(known, out, parts, NumberScale)


@jit
def _number_reference(known, exists, hold, ring, place, last, count, mean, var, moves, square, shares, out):  # type: ignore[no-untyped-def]  # fmt: skip
    batch, steps, targets = known.shape
    lag = ring.shape[1]
    for b in range(batch):
        for t in range(steps):
            if not exists[b, t]:
                continue
            at = place[b]
            place[b] = (at + 1) % lag
            for g in range(targets):
                value, expected = known[b, t, g], ring[b, at, g]
                if not math.isnan(value):
                    value = min(max(value, -LARGEST), LARGEST)
                    last[b, g] = value
                    _track(value, b, g, count, mean, var)
                    if not math.isnan(expected):
                        moves[b, g] += 1
                        move, size = value - expected, math.sqrt(square[b, g])
                        _share_move(move / _unit(value, var[b, g]), moves[b, g], shares[b, g])
                        if moves[b, g] > SETTLE and size > 0:
                            move = min(max(move, -REACH * size), REACH * size)
                        square[b, g] += max(1 / moves[b, g], RATE) * (move * move - square[b, g])
                ring[b, at, g] = last[b, g]
                for k in range(len(WIDTHS)):
                    out[b, t, 3 + k, g] = math.log((1 - DOUBT) * shares[b, g, k] + DOUBT / len(WIDTHS))
                out[b, t, 1, g] = out[b, t, 2, g] = 1
                if count[b, g] > 0:
                    center = last[b, g] if hold else mean[b, g]
                    unit = _unit(center, var[b, g])
                    size = math.sqrt(square[b, g]) if hold and moves[b, g] > 0 else unit
                    out[b, t, 0, g], out[b, t, 1, g], out[b, t, 2, g] = center, max(size, WIDTHS[0] * unit), unit
