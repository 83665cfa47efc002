"""Running statistics and references of no-change: what their pages say, in any chunks, under any values."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import norm
from torch import Tensor

from pliant.core import UsageError, leaves
from pliant.kernels import (
    WIDTHS,
    ClassCounts,
    Moments,
    NumberScale,
    class_reference,
    mixture_quantiles,
    number_reference,
    online_moments,
)
from pliant.kernels._online import CLIP, DOUBT, LARGEST, RATE, REACH, ROUNDING, SETTLE, SHARE_RATE, UNVARIED

CLASSES, LAG = 3, 2
KINDS = ("moments", "classes", "numbers", "mean of numbers")


def fresh(kind: str, batch: int, width: int, lag: int = LAG) -> Any:
    if kind == "moments":
        return Moments.fresh(batch, width)
    return ClassCounts.fresh(batch, lag, CLASSES) if kind == "classes" else NumberScale.fresh(batch, lag, width)


def run(kind: str, x: Tensor, state: Any, mask: Tensor | None = None) -> tuple[Tensor, Any]:
    if kind == "moments":
        return online_moments(x, state, mask)
    if kind == "classes":
        return class_reference(x[..., 0], state, mask)
    return number_reference(x, state, mask, hold=kind == "numbers")


def values(
    kind: str, shape: tuple[int, int, int], seed: int, offset: float = 0, scale: float = 1, missing: float = 0.2
) -> Tensor:
    random = np.random.default_rng(seed)
    x = offset + scale * random.standard_normal(shape).cumsum(1)
    if kind == "classes":
        x = random.integers(CLASSES, size=shape).repeat(2, 1)[:, : shape[1]].astype(float)
    x[random.random(shape) < missing] = np.nan
    return torch.from_numpy(x)


# What the pages say, value by value.


class Track:
    """Mean and variance of the top of the page."""

    def __init__(self) -> None:
        self.n, self.m, self.v = 0, 0.0, 0.0

    def take(self, x: float) -> None:
        self.n += 1
        r, d = max(1 / self.n, RATE), x - self.m
        if self.n > SETTLE and math.sqrt(self.v) > ROUNDING * abs(self.m):
            d = math.copysign(min(abs(d), REACH * math.sqrt(self.v)), d)
        self.m += r * d
        self.v = (1 - r) * (self.v + r * d * d)


def held(x: float, most: float) -> float:
    return math.copysign(min(abs(x), most), x)


def moments_of(x: list[float]) -> list[tuple[float, float, float]]:
    track, w, before, found = Track(), 0.0, math.nan, []
    for value in x:
        if math.isnan(value):
            found.append((0.0, 0.0, 1.0))
            continue
        track.take(value)
        small, level, move = ROUNDING * abs(track.m), 0.0, 0.0
        if math.sqrt(track.v) > small:
            level = held((value - track.m) / math.sqrt(track.v), CLIP)
        if track.n > 1:
            c = value - before
            reach = REACH * math.sqrt(w) if track.n > SETTLE and math.sqrt(w) > small else math.inf
            w += max(1 / (track.n - 1), RATE) * (held(c, reach) ** 2 - w)
            move = held(c / math.sqrt(w), CLIP) if math.sqrt(w) > small else 0.0
        before = value
        found.append((level, move, 0.0))
    return found


def classes_of(known: list[float], lag: int) -> list[list[float]]:
    found, newest = [], list[float]()
    for t, label in enumerate(known):
        newest.append(newest[-1] if math.isnan(label) and newest else label)
        # Older labels count less: by (1 - RATE) for each that came since.
        came = [c for c in known[: t + 1] if not math.isnan(c)]
        pairs = [(newest[i - lag], known[i]) for i in range(lag, t + 1)]
        pairs = [pair for pair in pairs if not any(map(math.isnan, pair))]
        f = [
            0.5 + sum((1 - RATE) ** (len(came) - 1 - i) for i, own in enumerate(came) if own == c)
            for c in range(CLASSES)
        ]
        kept, changed = (
            0.5 + sum((1 - RATE) ** (len(pairs) - 1 - i) for i, (a, b) in enumerate(pairs) if (a == b) is same)
            for same in (True, False)
        )
        s = kept / (kept + changed)
        if math.isnan(newest[-1]):
            p = [own / sum(f) for own in f]
        else:
            rest = sum(f) - f[int(newest[-1])]
            p = [s if c == newest[-1] else (1 - s) * f[c] / rest for c in range(CLASSES)]
        found.append([math.log(own) for own in p])
    return found


def numbers_of(known: list[float], lag: int, hold: bool) -> list[list[float]]:
    track, expected, square, moves, found = Track(), [math.nan] * lag, 0.0, 0, []
    shares, last = [1 / len(WIDTHS)] * len(WIDTHS), math.nan

    def deviation(value: float) -> float:
        return math.sqrt(track.v) if math.sqrt(track.v) > ROUNDING * abs(value) else UNVARIED * (1 + abs(value))

    def mixed() -> list[float]:
        return [(1 - DOUBT) * share + DOUBT / len(WIDTHS) for share in shares]

    for value in known:
        before = expected.pop(0)
        if not math.isnan(value):
            last = value
            track.take(value)
            if not math.isnan(before):
                moves += 1
                move = value - before
                joint = [p * norm.pdf(move, scale=w * deviation(value)) for p, w in zip(mixed(), WIDTHS, strict=True)]
                rate = max(SHARE_RATE, 3 / (moves + 4))
                shares = [s + rate * (j / sum(joint) - s) for s, j in zip(shares, joint, strict=True)]
                if moves > SETTLE and square > 0:
                    move = held(move, REACH * math.sqrt(square))
                square += max(1 / moves, RATE) * (move * move - square)
        expected.append(last)
        logs = [math.log(p) for p in mixed()]
        if not track.n:
            found.append([0, 1, 1, *logs])
            continue
        center = last if hold else track.m
        unit = deviation(center)
        error = math.sqrt(square) if hold and moves else unit
        found.append([center, max(error, WIDTHS[0] * unit), unit, *logs])
    return found


def expected(kind: str, x: Tensor, lag: int = LAG) -> np.ndarray:
    rows = []
    for stream in x.tolist():
        columns = [list(column) for column in zip(*stream, strict=True)]
        if kind == "moments":
            rows.append(np.moveaxis([moments_of(column) for column in columns], 0, -1))
        elif kind == "classes":
            rows.append(np.array(classes_of(columns[0], lag)))
        else:
            rows.append(np.moveaxis([numbers_of(column, lag, kind == "numbers") for column in columns], 0, -1))
    return np.array(rows)


@pytest.mark.parametrize("kind", KINDS)
@given(
    seed=st.integers(0, 999), steps=st.integers(1, 60), lag=st.integers(1, 5),
    offset=st.sampled_from([0.0, 0.0, 1e3, -1e9]), scale=st.sampled_from([1.0, 1e-3, 1e6]),
    missing=st.sampled_from([0.0, 0.3]),
)  # fmt: skip
def test_it_is_what_its_page_says(
    kind: str, seed: int, steps: int, lag: int, offset: float, scale: float, missing: float
) -> None:
    x = values(kind, (2, steps, 2), seed, offset, scale, missing)
    found, _ = run(kind, x, fresh(kind, 2, 2, lag))
    # A deviation of a value is known to eps (offset / scale), and that of a change too.
    tolerance = 1e-9 + 1e-13 * abs(offset) / scale
    np.testing.assert_allclose(found.numpy(), expected(kind, x, lag), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_what_its_page_says_over_a_long_time(kind: str) -> None:
    x = values(kind, (1, 1500, 1), 5, missing=0.1)
    if kind != "classes":
        x[0, 700:900] += 50
        x[0, 1000] = 1e9
    found, _ = run(kind, x, fresh(kind, 1, 1))
    np.testing.assert_allclose(found.numpy(), expected(kind, x), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 999), cuts=st.lists(st.integers(0, 30), max_size=4), masked=st.booleans())
def test_chunks_give_what_the_whole_gives_to_the_bit(kind: str, seed: int, cuts: list[int], masked: bool) -> None:
    x = values(kind, (2, 30, 3), seed)
    mask = torch.from_numpy(np.random.default_rng(seed).random((2, 30)) < 0.7) if masked else None
    whole, end = run(kind, x, fresh(kind, 2, 3), mask)
    state, parts = fresh(kind, 2, 3), []
    copy = [leaf.clone() for _, leaf in leaves(state)]
    start = state
    edges = [0, *sorted(cuts), 30]
    for a, b in itertools.pairwise(edges):
        out, state = run(kind, x[:, a:b], state, None if mask is None else mask[:, a:b])
        parts.append(out)
    assert torch.cat(parts, 1).equal(whole)
    assert all(
        one.nan_to_num(nan=-9).equal(two.nan_to_num(nan=-9))
        for (_, one), (_, two) in zip(leaves(state), leaves(end), strict=True)
    )
    # A state is a value.
    assert all(
        one.nan_to_num(nan=-9).equal(two.nan_to_num(nan=-9)) for one, (_, two) in zip(copy, leaves(start), strict=True)
    )


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 999))
def test_masked_steps_do_not_exist(kind: str, seed: int) -> None:
    random = np.random.default_rng(seed)
    x, mask = values(kind, (1, 25, 2), seed), torch.from_numpy(random.random((1, 25)) < 0.6)
    garbage = torch.where(mask[..., None], x, torch.from_numpy(random.choice([np.nan, np.inf, 1e300], (1, 25, 2))))
    out, state = run(kind, garbage, fresh(kind, 1, 2), mask)
    short, other = run(kind, x[:, mask[0]], fresh(kind, 1, 2))
    assert out[:, mask[0]].equal(short)
    assert not out[:, ~mask[0]].any()
    assert all(
        a.nan_to_num(nan=-9).equal(b.nan_to_num(nan=-9))
        for (_, a), (_, b) in zip(leaves(state), leaves(other), strict=True)
    )


@pytest.mark.parametrize("kind", ["moments", "numbers", "mean of numbers"])
def test_columns_and_streams_are_independent(kind: str) -> None:
    x = values(kind, (2, 20, 3), 1)
    whole, _ = run(kind, x, fresh(kind, 2, 3))
    for b in range(2):
        for f in range(3):
            alone, _ = run(kind, x[b : b + 1, :, f : f + 1], fresh(kind, 1, 1))
            assert whole[b : b + 1, ..., f : f + 1].equal(alone)


# Limits.


@pytest.mark.parametrize("value", [0.0, 0.1, -1e7, 1e15, 1e-300, 1e139, -1e200])
def test_a_constant_column_gives_zeros(value: float) -> None:
    out, state = online_moments(torch.full((1, 1000, 1), value, dtype=torch.float64), Moments.fresh(1, 1))
    assert not out.any()
    assert state.seen.item() == 1000


def test_numbers_upon_a_huge_offset_are_seen() -> None:
    noise = torch.randn(1, 3000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    out, _ = online_moments(1e9 + noise, Moments.fresh(1, 1))
    plain, _ = online_moments(noise, Moments.fresh(1, 1))
    # 1e9 + noise is rounded to 1e-7.
    assert float((out - plain)[:, 100:].abs().max()) < 1e-5
    assert float(out[0, 1000:, 0].std()) == pytest.approx(1, abs=0.1)
    assert float(out[0, 1000:, 1].std()) == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("size", [1e3, 1e12, 1e200, -1e300])
def test_one_outlier_moves_a_settled_mean_by_little(size: float) -> None:
    noise = torch.randn(1, 1000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    _, before = online_moments(noise, Moments.fresh(1, 1))
    out, after = online_moments(torch.full((1, 1, 1), size, dtype=torch.float64), before)
    assert out.abs().max() == CLIP
    spread = float(before.var.sqrt())
    assert float((after.mean - before.mean).abs()) <= REACH * RATE * spread * (1 + 1e-12)
    assert float(after.var.sqrt()) < 1.05 * spread
    # Both its coming and its going are moves.
    _, later = online_moments(noise[:, :1], after)
    assert float(later.change.sqrt()) < 1.2 * float(before.change.sqrt())


def test_a_jump_of_the_level_is_caught() -> None:
    noise = torch.randn(1, 4000, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for jump in (10, 1e4, 1e9):
        x = noise.clone()
        x[:, 1000:] += jump
        out, state = online_moments(x, Moments.fresh(1, 1))
        assert float(out[0, 1000, 0]) == CLIP
        assert float((state.mean - jump).abs()) < 0.05 * jump
        # The variance grows by half within some steps as long as deviations are held.
        _, before = online_moments(x[:, :1000], Moments.fresh(1, 1))
        _, soon = online_moments(x[:, 1000 : 1000 + math.ceil(math.log(1.5) / (RATE * REACH**2)) + 1], before)
        if jump > 100:
            assert float(soon.var / before.var) > 1.5


@pytest.mark.parametrize("kind", ["moments", "numbers", "mean of numbers"])
@given(
    x=st.lists(
        st.floats(width=64) | st.sampled_from([math.nan, 1e200, -1e200, 1e308, 5e-324, 1e-150, 1e9, 0.0]),
        min_size=1, max_size=60,
    ),
    repeat=st.integers(1, 3),
)  # fmt: skip
@example(x=[1e-150, -1e-150] * 15 + [1e140, 0.0, 1.0], repeat=1)
@example(x=[0.0] * 30 + [1e200, 0.0, 1e-300, 1e200], repeat=1)
def test_whatever_comes_everything_stays_finite(kind: str, x: list[float], repeat: int) -> None:
    inputs = torch.tensor(x * repeat, dtype=torch.float64)[None, :, None]
    out, state = run(kind, inputs, fresh(kind, 1, 1, lag=1))
    assert out.isfinite().all()
    # NaN where nothing has been known: in the ring, and for the newest number.
    for name, leaf in leaves(state):
        known = leaf[..., [0, 1, 2, 4, 5]] if kind.endswith("numbers") and name == "values" else leaf
        assert not leaf.isinf().any() and (name == "ring" or known.isfinite().all())
    if kind == "moments":
        assert (out[:, :, :2].abs() <= CLIP).all()
        assert (state.var >= 0).all()
    else:
        assert (out[:, :, 1:3] > 0).all()
        assert (out[:, :, 0].abs() <= LARGEST).all()
        assert out[0, :, 3:, 0].exp().sum(-1).numpy() == pytest.approx(1)


@given(seed=st.integers(0, 99), hold=st.booleans())
def test_probabilities_of_classes_add_to_one(seed: int, hold: bool) -> None:
    known = values("classes", (2, 40, 1), seed)[..., 0]
    out, _ = class_reference(known, ClassCounts.fresh(2, LAG, CLASSES), hold=hold)
    assert out.exp().sum(-1).numpy() == pytest.approx(1)
    if not hold:  # frequencies alone
        several = out[:, :-1].equal(class_reference(known, ClassCounts.fresh(2, 7, CLASSES), hold=False)[0][:, :-1])
        assert several


def test_classes_that_never_change_are_soon_expected_and_those_that_never_stay_are_not() -> None:
    stays, turns = torch.zeros(1, 500, dtype=torch.float64), torch.arange(500.0).double()[None] % 2
    out, _ = class_reference(stays, ClassCounts.fresh(1, 1, CLASSES))
    assert float(out[0, -1, 0].exp()) > 0.99
    out, _ = class_reference(turns, ClassCounts.fresh(1, 1, CLASSES))
    assert float(out[0, -1, 0].exp()) > 0.98  # the newest is 1
    # Two steps later it is the same again.
    out, _ = class_reference(turns, ClassCounts.fresh(1, 2, CLASSES))
    assert float(out[0, -1, 1].exp()) > 0.98


# Quantiles.

LEVELS = (1e-9, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.999)


def cdf(output: Tensor, at: Tensor) -> Tensor:
    logits, means, log_scales = output.double().chunk(3, -1)
    z = (at[..., None] - means[..., None, :]) * torch.exp(-log_scales)[..., None, :]
    return (logits.softmax(-1)[..., None, :] * torch.special.ndtr(z)).sum(-1)


@given(mean=st.floats(-1e9, 1e9), log_scale=st.floats(-20, 40))
def test_one_gaussian_has_its_own_quantiles(mean: float, log_scale: float) -> None:
    found = mixture_quantiles(torch.tensor([0.3, mean, log_scale], dtype=torch.float64), LEVELS)
    scale = math.exp(log_scale)
    np.testing.assert_allclose(found.numpy(), norm.ppf(LEVELS, mean, scale), rtol=1e-12, atol=1e-12 * scale)


@given(seed=st.integers(0, 999), kinds=st.integers(1, 6), wide=st.sampled_from([0.5, 3.0, 12.0]))
def test_quantiles_are_where_the_distribution_function_has_their_level(seed: int, kinds: int, wide: float) -> None:
    output = torch.randn(2, 3, 3 * kinds, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    output[..., 2 * kinds :] *= wide
    found = mixture_quantiles(output, LEVELS)
    assert found.shape == (2, 3, len(LEVELS))
    # A quantile is known to eps of itself, its level to that times the density, at most of the narrowest part.
    narrowest = output[..., 2 * kinds :].exp().amin(-1, keepdim=True)
    tolerance = 1e-12 + 1e-15 * found.abs() / narrowest
    assert ((cdf(output, found) - torch.tensor(LEVELS, dtype=torch.float64)).abs() <= tolerance).all()
    assert (found.diff(dim=-1) >= 0).all()


def test_quantiles_of_a_mixture_of_extremes_and_of_narrow_numbers() -> None:
    output = torch.tensor([0.0, 0.0, -800.0, 5.0, 5.0, 0.0, math.log(1e-3), math.log(1e12), 0.0])
    found = mixture_quantiles(output, (0.05, 0.3, 0.5, 0.7, 0.95))
    assert found.dtype == torch.float64
    assert float(found[2]) == pytest.approx(5, abs=1e-3)
    assert float(found[0]) == pytest.approx(1e12 * norm.ppf(0.1), rel=1e-3)
    assert mixture_quantiles(torch.zeros(0, 2, 6), (0.5,)).shape == (0, 2, 1)
    symmetric = torch.tensor([0.2, 0.2, -3.0, 3.0, 0.1, 0.1])
    assert float(mixture_quantiles(symmetric, (0.5,))) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("label", [-1.0, 3.0, 7.0])
def test_a_label_that_is_no_class_is_refused(label: float) -> None:
    known = torch.full((1, 2), label, dtype=torch.float64)
    with pytest.raises(UsageError, match="outside the 3 classes"):
        class_reference(known, ClassCounts.fresh(1, 1, 3))
