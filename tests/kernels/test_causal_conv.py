"""The convolution over the past: order of its taps, resets, masks, chunks."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pliant.kernels import causal_conv
from tests.suite import World, close, worlds

TAPS = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
HALF = torch.tensor([0.5])
ONE_TO_FIVE = torch.arange(1.0, 6.0).reshape(1, 5, 1)


def test_the_last_tap_belongs_to_the_current_step() -> None:
    """trecvit.md, acceptance check 6."""
    y, history = causal_conv(ONE_TO_FIVE, TAPS, HALF)
    assert y.flatten().tolist() == [1000.5, 2100.5, 3210.5, 4321.5, 5432.5]
    assert history.flatten().tolist() == [3, 4, 5]
    reset = torch.tensor([[True, False, False, True, False]])
    y, history = causal_conv(ONE_TO_FIVE, TAPS, HALF, reset=reset)
    assert y.flatten().tolist() == [1000.5, 2100.5, 3210.5, 4000.5, 5400.5]
    assert history.flatten().tolist() == [0, 4, 5]


def test_it_is_the_depthwise_convolution_of_torch() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=random, dtype=torch.float64) for s in ((2, 9, 5), (4, 5)))
    theirs = F.conv1d(F.pad(x.mT, (3, 0)), weight.T[:, None], groups=5).mT
    close(causal_conv(x, weight)[0], theirs)


@given(data=st.data())
def test_chunks_are_the_whole(data: st.DataObject) -> None:
    world: World = data.draw(worlds(3, torch.float64, ((), (2,))))
    taps = data.draw(st.integers(1, 5))
    weight = torch.randn(taps, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, history = causal_conv(world.x, weight, **world.flags)
    carried, parts = None, []
    for x, flags in world.chunks():
        part, carried = causal_conv(x, weight, None, carried, **flags)
        parts.append(part)
    close(torch.cat(parts, 1), y)
    assert carried is not None
    assert carried.equal(history)


def test_gradients_are_those_of_finite_differences() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 3), (3, 3), (3,), (2, 2, 3))
    inputs = [torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes]
    reset = torch.tensor([[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1]]).bool()
    assert torch.autograd.gradcheck(lambda *x: causal_conv(*x, reset=reset, mask=mask), inputs)
    assert torch.autograd.gradcheck(lambda *x: causal_conv(*x), inputs)


def test_the_history_stays_wide_under_narrow_inputs() -> None:
    y, history = causal_conv(ONE_TO_FIVE.bfloat16(), TAPS.bfloat16())
    assert y.dtype == torch.bfloat16
    assert history.dtype == torch.float32
