"""Coverage of predictive distributions of numbers."""

import math

import numpy as np
import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from pliant.core import Answer
from pliant.core.pack import differences, pack, unpack
from pliant.measure.numbers import Coverage


def answer(targets: Tensor, shown: Tensor | None = None) -> Answer:
    shown = torch.ones(targets.shape[:2], dtype=torch.bool) if shown is None else shown
    return Answer(targets, shown, shown, 0, torch.arange(len(targets)))


def gaussian(mean: Tensor, scale: Tensor | float) -> Tensor:
    """`(...)` as a mixture of one, `(..., 3)`."""
    scales = torch.as_tensor(scale, dtype=torch.float64).log().expand_as(mean)
    return torch.stack([torch.zeros_like(mean), mean, scales], -1)


def normals(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def score(said: Tensor, targets: Tensor) -> Coverage:
    found = Coverage()
    found.update(answer(targets), said)
    return found


def test_calibrated_numbers_are_inside_as_often_as_is_promised() -> None:
    mean, scale = 100 * normals(200, 100, 1, seed=1), normals(200, 100, 1, seed=2).exp()
    found = score(gaussian(mean, scale), mean + scale * normals(200, 100, 1, seed=3))
    # 20,000 targets: a share is known to 0.0035.
    assert found.value() < 0.005
    assert found.count == 20_000
    table = found.table()
    assert [row["level"] for row in table] == pytest.approx([i / 20 for i in range(1, 20)])
    assert all(abs(row["inside"] - row["level"]) < 0.012 for row in table)


def test_a_calibrated_mixture_is_told_apart_from_its_parts() -> None:
    side = torch.where(normals(1, 20_000, 1, seed=4) > 0, 5.0, -5.0).double()
    targets = side + normals(1, 20_000, 1, seed=5)
    both = torch.tensor([0.0, 0.0, 5.0, -5.0, 0.0, 0.0], dtype=torch.float64).expand(1, 20_000, 1, 6)
    assert score(both, targets).value() < 0.005
    assert score(gaussian(torch.zeros_like(targets), 1.0), targets).value() > 0.4


@pytest.mark.parametrize("scale", [1e6, 3.0, 1.2, 0.8, 1 / 3, 1e-6])
def test_too_wide_and_too_narrow_are_both_wrong(scale: float) -> None:
    targets = normals(100, 100, 1)
    levels = np.arange(1, 20) / 20
    inside = 2 * norm.cdf(scale * norm.ppf((1 + levels) / 2)) - 1
    found = score(gaussian(torch.zeros_like(targets), scale), targets).value()
    assert found == pytest.approx(np.abs(inside - levels).mean(), abs=0.01)
    assert found <= 0.5 + 1e-12


def test_a_row_counts_once_however_many_numbers_it_has() -> None:
    targets = torch.tensor([[[0.0, 10.0]], [[0.0, 10.0]]], dtype=torch.float64)
    found = score(gaussian(torch.zeros_like(targets), 1.0), targets)
    assert found.count == 2
    # The median is inside of every interval, ten deviations off is inside of none.
    assert [row["inside"] for row in found.table()] == [0.5] * 19


def test_parts_are_merged_and_saved() -> None:
    said, targets = gaussian(normals(6, 50, 2), 1.5), normals(6, 50, 2, seed=9)
    whole, one, two = score(said, targets), score(said[:2], targets[:2]), score(said[2:], targets[2:])
    both = one.merge(two)
    assert both.count == whole.count == 300
    assert both.value() == pytest.approx(whole.value())
    assert one.count == 100
    other = Coverage()
    other.load_state_dict(unpack(*pack(whole.state_dict())))
    assert differences(other.state_dict(), whole.state_dict()) == []
    assert other.value() == whole.value()


def test_what_cannot_be_scored_is_not_passed_over() -> None:
    empty = Coverage()
    assert math.isnan(empty.value())
    assert empty.table() == []
    assert empty.reason() == "no answers yet"
    targets = normals(1, 3, 1)
    said = gaussian(torch.zeros_like(targets), 1.0)
    said[0, 1] = math.nan
    broken = score(said, targets)
    assert math.isnan(broken.value())
    assert broken.reason() is not None
    missed = Coverage()
    missed.update(answer(targets), None)
    assert (missed.count, missed.missed) == (0, 3)
    hidden = Coverage()
    hidden.update(answer(targets, torch.tensor([[True, False, True]])), said)
    assert hidden.count == 2
    assert not math.isnan(hidden.value())
    infinite = score(gaussian(torch.zeros(1, 1, 1).double(), 1.0), torch.tensor([[[1e300]]]))
    assert [row["inside"] for row in infinite.table()] == [0.0] * 19
