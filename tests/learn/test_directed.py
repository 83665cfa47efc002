"""Directed information from two recurrent predictors, against exact values."""

import math

import numpy as np
import pytest

from pliant.core import UsageError
from pliant.learn.directed import Codes, two_predictors
from pliant.measure.information import joint_law
from pliant.measure.lifetimes import Lifetimes, sampled
from pliant.recipes.plasticity import EXAMPLES

ONE = EXAMPLES["loop"]
LOOP = joint_law(ONE.agent, ONE.environment, ONE.n, ONE.order)


def test_a_loop_in_a_moment() -> None:
    found = two_predictors(sampled(LOOP, 1600, 1), "A", sink_window=(1, 2), seed=1)
    truth = 1 - 0.4689955936 + 0.6800770457 - 0.4689955936  # 1 - h(.1) + h(.18) - h(.1)
    assert found.bits == pytest.approx(truth, abs=0.15)
    assert found.without - found.informed == found.difference and found.lives == 800
    assert abs(found.difference - found.bits) < 4 * found.error + 0.05


@pytest.mark.slow
@pytest.mark.parametrize(("source", "truth"), [("A", ONE.empowerment), ("O", ONE.plasticity)])
def test_a_loop(source: str, truth: float) -> None:
    found = [two_predictors(sampled(LOOP, 16_000, seed), source, seed=seed).bits for seed in range(2)]
    assert max(abs(bits - truth) for bits in found) < 0.05


@pytest.mark.slow
def test_alphabets_too_large_to_count() -> None:
    """Of 20 symbols the one that was seen, in nine of ten cases: 3 (log 20 - h(.1) - .1 log 19) bits."""
    rng = np.random.default_rng(0)
    seen = rng.integers(0, 20, (12_000, 3))
    done = np.where(rng.random(seen.shape) < 0.1, (seen + rng.integers(1, 20, seen.shape)) % 20, seen)
    found = two_predictors(Lifetimes(done, seen, "OA", (20, 20)), "O")
    truth = 3 * (math.log2(20) - 0.4689955936 - 0.1 * math.log2(19))
    assert found.bits == pytest.approx(truth, abs=0.15) and found.without == pytest.approx(3 * math.log2(20), abs=0.05)


def test_windows_through_which_nothing_can_flow() -> None:
    """What comes later tells nothing: both are told the same, so they say the same."""
    lives = sampled(LOOP, 256, 0)
    found = two_predictors(lives, "O", source_window=(3, 3), sink_window=(1, 3))
    assert found.bits == 0 and found.difference == 0 and found.without > 0
    again: Codes = two_predictors(lives, "A", source_window=(1, 2), sink_window=(2, 3), seed=3)
    assert again == two_predictors(lives, "A", source_window=(1, 2), sink_window=(2, 3), seed=3) and again.bits > 0


def test_misuse(unchecked: None) -> None:
    lives = sampled(LOOP, 60, 0)
    for call, said in (
        (lambda: two_predictors(lives, "X", batch=8), "source is 'X'"),
        (lambda: two_predictors(lives, "A"), "60 lives, expected at least two batches of 32"),
        (lambda: two_predictors(lives, "A", batch=0), "expected at least two batches of 0, of 1 or more"),
        (lambda: two_predictors(lives, "A", batch=8, scored=0.0), "scored is 0.0, expected a share"),
        (lambda: two_predictors(lives, "A", batch=8, sink_window=(0, 1)), "is not within the stream"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
