"""Mean mixing distance against closed forms (ms-ssm.md, acceptance check 12)."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.core import UsageError, seeded
from pliant.kernels import linear_scan
from pliant.measure.mixing import mixing_distance, mixing_distances
from pliant.mixers import GatedLRU
from pliant.models import SequenceClassifier

X = torch.linspace(-1, 1, 2 * 400 * 3, dtype=torch.float64).reshape(2, 400, 3)


def one_pole(a: float):  # type: ignore[no-untyped-def]
    return lambda x: linear_scan(torch.full_like(x, a), x)


def test_of_the_identity_and_of_delays() -> None:
    assert mixing_distance(lambda x: x, X).tolist() == [0, 0]
    for delay in (1, 17):
        assert mixing_distance(lambda x, n=delay: F.pad(x, (0, 0, n, 0))[:, :400], X).tolist() == [delay, delay]


@pytest.mark.parametrize(("a", "steps"), [(0.5, 1.0), (0.9, 9.0)])
def test_of_a_decaying_average(a: float, steps: float) -> None:
    torch.testing.assert_close(mixing_distance(one_pole(a), X), torch.full((2,), steps, dtype=torch.float64))
    torch.testing.assert_close(mixing_distance(one_pole(a), X, printed=True), torch.full((2,), steps).double())


def test_signs_do_not_matter_but_in_the_printed_form() -> None:
    def difference(x: Tensor) -> Tensor:
        return x - 0.5 * F.pad(x, (0, 0, 4, 0))[:, :400]

    assert mixing_distance(difference, X)[0] == pytest.approx(0.5 * 4 / 1.5)
    assert mixing_distance(difference, X, printed=True)[0] == pytest.approx(0.5 * 4 / 0.5)


def test_it_is_the_mean_over_channels_and_reads_all_of_them() -> None:
    def mixed(x: Tensor) -> Tensor:
        late = F.pad(x, (0, 0, 6, 0))[:, :400]
        return torch.stack([x[..., 0] + late[..., 1], x[..., 2]], 2)

    assert mixing_distance(mixed, X).tolist() == [1.5, 1.5]
    assert mixing_distance(mixed, X, channels=1)[0] in (0, 3)


def test_it_depends_on_where_it_is_taken() -> None:
    gated = lambda x: x * F.pad(x, (0, 0, 5, 0))[:, :400]  # noqa: E731
    x = X.clone()
    x[0, 394] = 0
    first, second = mixing_distance(gated, x).tolist()
    expected = (5 * x[1, 399].abs() / (x[1, 399].abs() + x[1, 394].abs())).mean()
    assert second == pytest.approx(float(expected))
    assert first == 5


def test_of_the_layers_of_a_model() -> None:
    with seeded(0):
        model, x, alone = SequenceClassifier(3, 2, width=4, depth=2), torch.randn(2, 30, 3), GatedLRU(4)
    found = mixing_distances(model, x)
    assert list(found) == ["stack.blocks.0.mixer", "stack.blocks.1.mixer"]  # and not the unit within
    assert all(0 < distance < 29 for distance in found.values())
    assert all(p.grad is None for p in model.parameters())
    assert not any(part._forward_pre_hooks for part in model.modules())
    assert list(mixing_distances(alone, torch.ones(1, 5, 4))) == [""]


@pytest.mark.usefixtures("unchecked")
def test_what_has_no_distance_is_refused() -> None:
    with pytest.raises(UsageError, match="expected floats"):
        mixing_distance(lambda x: x, torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(UsageError, match="expected floats"):
        mixing_distance(lambda x: x, torch.zeros(2, 0, 1))
    with pytest.raises(UsageError, match="no gradient"):
        mixing_distance(lambda x: torch.zeros(2, 3, 1), torch.zeros(2, 3, 1))
    with pytest.raises(UsageError, match="mixes over time"):
        mixing_distances(torch.nn.Identity(), torch.zeros(1, 2, 3))
