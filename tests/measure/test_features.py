"""What activations tell; numbered checks are those of effective-learning-rate.md, section 8."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import UsageError, generator
from pliant.core.change import Cusum
from pliant.measure.features import (
    approximate_rank,
    churn,
    dead_units,
    dormant_units,
    effective_rank,
    flipped,
    linear_units,
    similarity_moved,
    srank,
    stable_rank,
)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed, "noise"))


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
def test_check_7_a_random_update_turns_embeddings_and_flips_units(step: float) -> None:
    # One row of d weights of length 1; a random update of length `step`, with d large.
    d, n = 1000, 4000
    rows = torch.nn.functional.normalize(noise(n, d, seed=1), dim=1)
    moved = rows + step * noise(n, d, seed=2) / math.sqrt(d)
    cosines = torch.nn.functional.cosine_similarity(rows, moved)
    assert float(cosines.mean()) == pytest.approx(1 / math.sqrt(1 + step**2), rel=0.01)
    x = noise(40, d, seed=3)
    before, after = x @ rows.mT, x @ moved.mT
    off = ((before > 0) & (after <= 0)).double().sum() / (before > 0).double().sum()
    assert float(off) == pytest.approx(0.5 - math.atan(1 / step) / math.pi, rel=0.03)
    assert flipped(before, after) == pytest.approx(float(off), rel=0.03)


@given(scale=st.floats(0.01, 100), seed=st.integers(0, 100))
def test_check_8_scale_and_rotation_do_not_move_similarities(scale: float, seed: int) -> None:
    f = noise(12, 5, seed=seed)
    q = torch.linalg.qr(noise(5, 5, seed=seed + 1)).Q
    assert similarity_moved(f, scale * f) < 1e-7
    assert similarity_moved(f, f @ q) < 1e-7
    assert 0 < similarity_moved(f, noise(12, 5, seed=seed + 2)) <= math.sqrt(2)
    assert flipped(f, scale * f) == 0


def test_check_8_the_largest_move_is_between_features_of_nothing_in_common() -> None:
    one, two = torch.zeros(4, 2, dtype=torch.float64), torch.zeros(4, 2, dtype=torch.float64)
    one[0, 0] = two[1, 0] = 1
    assert similarity_moved(one, two) == pytest.approx(math.sqrt(2))


def test_similarity_is_that_of_the_definition() -> None:
    f, g = noise(9, 4), noise(9, 4, seed=1)
    c, d = (x @ x.mT / (x @ x.mT).trace() for x in (f, g))
    assert similarity_moved(f, g) == pytest.approx(float((c - d).norm()), rel=1e-10)


def test_check_9_dead_and_dormant_units_by_hand() -> None:
    h = torch.tensor([[1.0, 0.0, -1.0, 0.02], [3.0, 0.0, -2.0, 0.0], [2.0, 0.0, -3.0, 0.01]])
    assert dead_units(h) == 0.5
    assert dormant_units(h, 0.0) == 0.25
    assert dormant_units(h, 0.1) == 0.5
    assert linear_units(h) == 0.25


def test_check_9_ranks() -> None:
    eye, one = torch.eye(7, dtype=torch.float64), noise(7, 1) @ noise(1, 5, seed=1)
    assert srank(eye) == 7 and effective_rank(eye) == pytest.approx(7) and stable_rank(eye) == pytest.approx(7)
    assert srank(one) == 1 and effective_rank(one) == pytest.approx(1) and stable_rank(one) == pytest.approx(1)
    zeros = torch.zeros(3, 2)
    assert srank(zeros) == 0 and effective_rank(zeros) == 0 and stable_rank(zeros) == 0
    h = torch.diag(torch.tensor([10.0, 1.0, 0.2]))
    assert srank(h, 0.01) == 3 and approximate_rank(h, 0.02) == 1
    assert stable_rank(h) == pytest.approx((100 + 1 + 0.04) / 100)
    shifted = noise(50, 4) + 1000
    assert effective_rank(shifted) < 1.1 and effective_rank(shifted, centered=True) > 3
    with pytest.raises(UsageError, match="delta"):
        srank(eye, 1.5)


def test_check_10_cusum_as_page_has_it() -> None:
    # Known mean and deviation, no winsorizing: the run lengths of the literature.
    def run_length(shift: float, random: torch.Generator) -> int:
        total, count = 0.0, 0
        while True:
            for z in (torch.randn(1000, generator=random) + shift).tolist():
                total, count = max(0.0, total + z - 0.5), count + 1
                if total > 5:
                    return count

    # Ours, once it is settled, is the same chart with limits: it alarms no sooner.
    random = generator(0, "delays")
    delays = [run_length(1.0, random) for _ in range(2000)]
    assert sum(delays) / len(delays) == pytest.approx(10.35, abs=0.3)

    def ours(random: torch.Generator) -> int:
        chart = Cusum(drift=0.5, threshold=5.0, settle=1000)
        for z in torch.randn(1000, generator=random).tolist():
            chart.update(z)
        for count, z in enumerate((torch.randn(1000, generator=random) + 1).tolist(), 1):
            if chart.update(z):
                return count
        raise AssertionError("never")

    found = [ours(random) for _ in range(300)]
    assert sum(found) / len(found) == pytest.approx(10.35, abs=1.0)


def test_churn_is_the_mean_change() -> None:
    assert churn(torch.zeros(2, 2), torch.tensor([[1.0, -1.0], [0.0, 2.0]])) == 1.0
