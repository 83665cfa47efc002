"""The classifier that reads from both ends: what it sees, padding, norms, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.core import UsageError, check_roles, seeded
from pliant.models import BidirectionalClassifier
from pliant.models.bidirectional import StepBatchNorm


def model(**options: Any) -> BidirectionalClassifier:
    with seeded(0, "bidirectional"):
        made = BidirectionalClassifier(3, 4, width=8, depth=2, mixer="LRU", **options)
        nn.init.normal_(made.head.linear.weight)
    return made.double()


def wave(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
def test_padding_is_not_there_whatever_is_in_it(norm: str) -> None:
    made, x = model(norm=norm), wave(3, 9, 3)
    lengths = torch.tensor([9, 4, 6])
    mask = torch.arange(9) < lengths[:, None]
    y = made(x, mask=mask)
    padded = torch.cat([torch.where(mask[..., None], x, torch.nan), x.new_full((3, 2, 3), torch.inf)], 1)
    twin = made(padded, mask=torch.cat([mask, mask.new_zeros(3, 2)], 1))
    torch.testing.assert_close(twin, y)
    made.eval()
    y = made(x, mask=mask)
    for row, length in enumerate(lengths.tolist()):
        torch.testing.assert_close(made(x[row : row + 1, :length]), y[row : row + 1])


def test_reversing_the_sequence_and_swapping_the_directions_changes_nothing() -> None:
    made, twin, x = model(), model(), wave(2, 7, 3)
    for block, other in zip(made.blocks, twin.blocks, strict=True):
        other.onward.load_state_dict(block.back.state_dict())
        other.back.load_state_dict(block.onward.state_dict())
    torch.testing.assert_close(twin(x.flip(1)), made(x))
    assert not torch.allclose(made(x.flip(1)), made(x))


def test_batch_norm_is_that_of_torch_over_what_is_there() -> None:
    ours, theirs, x = StepBatchNorm(3).double(), nn.BatchNorm1d(3).double(), wave(2, 5, 3)
    mask = torch.tensor([[True] * 5, [True, False, True, False, False]])
    y = ours(torch.where(mask[..., None], x, torch.nan), mask)
    torch.testing.assert_close(y[mask], theirs(x[mask]))
    assert not y[~mask].any()
    torch.testing.assert_close(ours(x), theirs(x.transpose(1, 2)).transpose(1, 2))
    torch.testing.assert_close(ours.running_var, theirs.running_var)


def test_extra_axes_share_time_alone() -> None:
    made, x = model(), wave(2, 6, 5, 3)
    torch.testing.assert_close(made(x)[:, 2], made(x[:, :, 2]))
    assert model(head="forecast", horizon=2)(x).shape == (2, 5, 2, 4, 3)


def test_it_is_no_model_of_a_stream_and_says_so() -> None:
    made, x = model(), wave(1, 4, 3)
    for call in (lambda: made.step(x[:, 0]), lambda: made.init_state(1), lambda: made(x, ())):
        with pytest.raises(UsageError, match="whole sequences from both ends"):
            call()
    for bad in ({"norm": "none"}, {"head": "tail"}, {"width": 0}):
        with pytest.raises(UsageError, match="BidirectionalClassifier"):
            BidirectionalClassifier(3, 4, **bad)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="expected"):
        made(x[..., :2])


@pytest.mark.parametrize("norm", ["layer", "rms", "batch"])
def test_every_parameter_has_a_role_and_a_gradient(norm: str) -> None:
    made = model(norm=norm)
    check_roles(made, made.roles())
    made.nats(made(wave(3, 6, 3)), torch.tensor([0, 1, 2])).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in made.parameters())
