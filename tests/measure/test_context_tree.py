"""Rates from one long life: context trees by definition, the four estimators, pieces, alphabets of unlike sizes."""

import math
from collections import Counter
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from pliant.core import UsageError
from pliant.measure import context_tree
from pliant.measure.context_tree import ESTIMATORS, ContextTrees, rates
from tests.measure.systems import h


def delayed(length: int, seed: int = 0, noise: float = 0.1) -> tuple[np.ndarray, np.ndarray]:
    """Fair bits, and the bit before through a binary symmetric channel: 1 - h(noise) bits there, none back."""
    rng = np.random.default_rng(seed)
    x = rng.integers(0, 2, length)
    return x, np.roll(x, 1) ^ (rng.random(length) < noise)


def weighted(symbols: list[int], size: int, depth: int) -> Fraction:
    """Probability of what follows the first `depth` symbols: the mixture over all trees, by definition."""

    def estimated(counts: Counter[int]) -> Fraction:
        p, seen = Fraction(1), 0
        for count in counts.values():
            for k in range(count):
                p *= (Fraction(1, 2) + k) / (Fraction(size, 2) + seen)
                seen += 1
        return p

    def node(context: tuple[int, ...]) -> Fraction:
        after = [symbols[t] for t in range(depth, len(symbols)) if tuple(symbols[t - len(context) : t]) == context]
        own = estimated(Counter(after))
        if len(context) == depth or not after:
            return own
        return (own + math.prod((node((symbol, *context)) for symbol in range(size)), start=Fraction(1))) / 2

    return node(())


@pytest.mark.parametrize("sizes", [(2, 2), (2, 3), (3, 2)])
def test_trees_mix_as_defined(sizes: tuple[int, int]) -> None:
    """E1 of both directions adds up to log P_w(pairs) - log P_w(actions) - log P_w(observations)."""
    rng = np.random.default_rng(1)
    a, o = rng.integers(0, sizes[0], 60), rng.integers(0, sizes[1], 60)
    o[1:] = np.where(rng.random(59) < 0.7, np.minimum(a[:-1], sizes[1] - 1), o[1:])
    pairs = (a * sizes[1] + o).tolist()
    wanted = (weighted(pairs, sizes[0] * sizes[1], 2) / weighted(a.tolist(), sizes[0], 2)
              / weighted(o.tolist(), sizes[1], 2))  # fmt: skip
    found = rates(a, o, sizes=sizes, depth=2, estimator="E1")
    assert found.information * found.indices == pytest.approx(math.log2(wanted), abs=1e-9)


def test_a_delayed_channel() -> None:
    a, o = delayed(30_000)
    trees = ContextTrees((2, 2), depth=3)
    terms = trees.update(a, o)
    for index, estimator in enumerate(ESTIMATORS):
        found = trees.rates(estimator)
        assert abs(found.empowerment - (1 - h(0.1))) < 0.015 and abs(found.plasticity) < 0.01
        assert found.empowerment == pytest.approx(terms[0, index].mean())
    assert terms[:, 2:].min() >= 0
    small = {estimator: rates(*delayed(4000), depth=3, estimator=estimator) for estimator in ESTIMATORS}
    wanted = {"E1": 0.5098, "E2": 0.4933, "E3": 0.4943, "E4": 0.4965}
    for estimator, found in small.items():
        assert found.empowerment == pytest.approx(wanted[estimator], abs=0.001) and abs(found.plasticity) < 0.01


def test_divergences_are_those_of_what_is_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """E3 and E4 are no less than 0 before rounding is taken away, and E4 is the mean of E3 over what may come first."""
    raw: list[np.ndarray] = []
    monkeypatch.setattr(context_tree, "not_negative", lambda bits: raw.append(bits.copy()) or bits)
    rng = np.random.default_rng(3)
    read = ContextTrees((3, 2), depth=2)
    read.update(rng.integers(0, 3, 500), rng.integers(0, 2, 500))
    (terms,) = raw
    assert terms.min() > -1e-12 and terms.max() > 0.1
    assert (terms[1, 0] == terms[1, 1]).all() and terms[0, 0].mean() == pytest.approx(terms[0, 1].mean(), abs=0.01)


def test_what_is_constant_tells_nothing() -> None:
    a = np.random.default_rng(0).integers(0, 2, 4000)
    for estimator in ESTIMATORS:
        found = rates(a, np.zeros_like(a), sizes=(2, 2), depth=3, estimator=estimator)
        assert abs(found.empowerment) < 0.01 and abs(found.plasticity) < 0.01


def test_alphabets_of_unlike_sizes_and_both_orders() -> None:
    """Whether the action before was not the first of three, as an observation: h(1/3) bits."""
    a = np.random.default_rng(2).integers(0, 3, 20_000)
    o = (np.roll(a, 1) > 0).astype(int)
    for order, late in (("AO", o), ("OA", o), ("AO", np.roll(o, -1))):
        found = rates(a, late, depth=2, order=order)  # type: ignore[arg-type]
        assert found.empowerment == pytest.approx(h(1 / 3), abs=0.03) and found.plasticity < 0.01
    # What comes with an action, in the order in which it comes before it, is told by it of the action.
    found = rates(a, np.roll(o, -1), depth=2, order="OA")
    assert found.plasticity == pytest.approx(h(1 / 3), abs=0.03) and found.empowerment < 0.01


def test_the_mirror() -> None:
    rng = np.random.default_rng(3)
    a, o = rng.integers(0, 2, 500), rng.integers(0, 3, 500)
    there, back = rates(a, o, depth=2, order="AO"), rates(o, a, depth=2, order="OA")
    assert (there.empowerment, there.plasticity) == (back.plasticity, back.empowerment)


def test_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pliant.measure.context_tree.CHUNK", 37)
    a, o = delayed(500, seed=5)
    whole, pieces = ContextTrees((2, 2), depth=3), ContextTrees((2, 2), depth=3)
    terms = whole.update(a, o)
    cuts = [0, 0, 1, 2, 5, 90, 91, 400, 500]
    parts = [pieces.update(a[i:j], o[i:j]) for i, j in pairwise(cuts)]
    assert np.array_equal(np.concatenate(parts, 2), terms)
    assert pieces.rates() == pytest.approx(whole.rates()) and whole.rates().indices == 497


def test_contexts_that_do_not_occur_take_no_memory() -> None:
    trees = ContextTrees((20, 20), depth=8)
    x = np.arange(300) % 20
    trees.update(x, x)
    assert sum(tree.used for tree in trees.trees) <= 3 * (1 + 8 * 20)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: ContextTrees((1, 2)), "an alphabet of 1 of actions"),
        (lambda: ContextTrees((2, 2), depth=0), "depth is 0"),
        (lambda: rates(np.array([0, 1]), np.array([0, 1])), "a life of 2 indices"),
        (lambda: ContextTrees((2, 2)).update(np.array([0, 2]), np.array([0, 1])), "actions hold 2, expected symbols"),
        (lambda: ContextTrees((2, 2)).update(np.array([0, 1]), np.array([0])), "2 actions and 1 observations"),
        (lambda: ContextTrees((2, 2)).rates("E5"), "expected one of E1, E2, E3, E4"),  # type: ignore[arg-type]
        (lambda: ContextTrees((99, 99), memory=1e6).update(np.arange(99), np.arange(99)), "the trees may take"),
    ],
)
def test_misuse(call: Any, said: str, unchecked: None) -> None:
    with pytest.raises(UsageError, match=said):
        call()


def test_before_a_whole_past_there_is_no_rate() -> None:
    assert math.isnan(ContextTrees((2, 2)).rates().plasticity)
