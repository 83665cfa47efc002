"""The convolution over the past: order of its taps, resets, masks, chunks."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pliant.core import UsageError
from pliant.kernels import causal_conv
from tests.suite import World, close, worlds

TAPS = torch.tensor([[1.0], [10.0], [100.0], [1000.0]])
HALF = torch.tensor([0.5])
ONE_TO_FIVE = torch.arange(1.0, 6.0).reshape(1, 5, 1)
both_forms = pytest.mark.parametrize("form", ["loop", "numba"])


@both_forms
def test_the_last_tap_belongs_to_the_current_step(form: str) -> None:
    """trecvit.md, acceptance check 6."""
    y, history = causal_conv(ONE_TO_FIVE, TAPS, HALF, form=form)
    assert y.flatten().tolist() == [1000.5, 2100.5, 3210.5, 4321.5, 5432.5]
    assert history.flatten().tolist() == [3, 4, 5]
    reset = torch.tensor([[True, False, False, True, False]])
    y, history = causal_conv(ONE_TO_FIVE, TAPS, HALF, reset=reset, form=form)
    assert y.flatten().tolist() == [1000.5, 2100.5, 3210.5, 4000.5, 5400.5]
    assert history.flatten().tolist() == [0, 4, 5]


@pytest.mark.parametrize("dilation", [1, 3])
@both_forms
def test_it_is_the_depthwise_convolution_of_torch(form: str, dilation: int) -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=random, dtype=torch.float64) for s in ((2, 19, 5), (4, 5)))
    theirs = F.conv1d(F.pad(x.mT, (3 * dilation, 0)), weight.T[:, None], groups=5, dilation=dilation).mT
    close(causal_conv(x, weight, dilation=dilation, form=form)[0], theirs)


@given(data=st.data())
def test_chunks_are_the_whole(data: st.DataObject) -> None:
    world: World = data.draw(worlds(3, torch.float64, ((), (2,))))
    taps, dilation = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 3))
    form = data.draw(st.sampled_from([None, "loop", "numba"]))
    weight = torch.randn(taps, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    y, history = causal_conv(world.x, weight, **world.flags, dilation=dilation, form=form)
    carried, parts = None, []
    for x, flags in world.chunks():
        part, carried = causal_conv(x, weight, None, carried, **flags, dilation=dilation, form=form)
        parts.append(part)
    close(torch.cat(parts, 1), y)
    assert carried is not None
    assert carried.equal(history)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_the_fast_form_is_the_readable_one(dtype: torch.dtype, data: st.DataObject) -> None:
    world: World = data.draw(worlds(3, dtype, ((), (2,))))
    taps, dilation = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 3))
    random, extra = torch.Generator().manual_seed(2), world.x.shape[2:-1]
    shapes = ((taps, 3), (3,), (len(world.x), (taps - 1) * dilation, *extra, 3))
    rest = [torch.randn(s, generator=random).to(dtype) for s in shapes]

    def run(form: str) -> list[Tensor]:
        leaves = [part.detach().clone().requires_grad_() for part in (world.x, *rest)]
        y, history = causal_conv(*leaves, **world.flags, dilation=dilation, form=form)
        weigh = torch.linspace(-1, 1, y.numel()).to(dtype).reshape(y.shape)
        return [y, history, *torch.autograd.grad((y * weigh).sum() + history.square().sum(), leaves)]

    for fast, loop in zip(run("numba"), run("loop"), strict=True):
        close(fast, loop)


def test_what_is_not_finite_and_does_not_exist_is_not_read() -> None:
    x = torch.ones(1, 6, 2)
    x[0, 1] = torch.nan
    x[0, 2] = torch.inf
    mask = torch.tensor([[True, False, True, True, True, True]])
    reset = torch.tensor([[False, False, False, True, False, False]])
    x.requires_grad_()
    for form in ("loop", "numba"):
        y, history = causal_conv(x, torch.ones(3, 2), None, torch.full((1, 2, 2), torch.nan), reset=reset, mask=mask,
                                 form=form)  # fmt: skip
        assert y[0, :, 0].detach().nan_to_num(nan=-1.0).tolist() == [-1, 0, -1, 1, 2, 3]
        assert history.tolist() == [[[1, 1], [1, 1]]]
        (dx,) = torch.autograd.grad(y[:, 3:].sum(), x)
        assert dx[0, :, 0].tolist() == [0, 0, 0, 3, 2, 1]


def test_the_custom_op_keeps_the_rules_of_torch() -> None:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 5, 3), (3, 3), (3,), (2, 4, 3))
    x, weight, bias, history = (torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes)
    flag = torch.rand(2, 5, generator=random) < 0.5
    for reset, mask in ((None, None), (flag, ~flag)):
        torch.library.opcheck(torch.ops.pliant.causal_conv.default, (x, weight, bias, history, reset, mask, 2))


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_one_sentence() -> None:
    x, weight, flag = torch.zeros(2, 5, 3), torch.zeros(4, 3), torch.zeros(2, 5, dtype=torch.bool)
    for wrong, said in (
        ({"dilation": 0}, "dilation 0"),
        ({"x": x[0]}, "expected .B, T"),
        ({"weight": weight[:0]}, "at least one tap"),
        ({"weight": weight[:, :2]}, "weight is .4, 2., expected .4, 3."),
        ({"bias": torch.zeros(2)}, "bias is .2,., expected .3,."),
        ({"history": torch.zeros(2, 3, 3), "dilation": 2}, "history is .2, 3, 3., expected .2, 6, 3."),
        ({"history": torch.zeros(1, 3, 3)}, "history is .1, 3, 3., expected .2, 3, 3."),
        ({"reset": flag[:1]}, "reset is torch.bool .1, 5., expected"),
        ({"mask": flag.long()}, "mask is torch.int64"),
    ):
        for form in ("loop", "numba"):  # which would read beyond arrays
            with pytest.raises(UsageError, match=f"causal_conv: .*{said}"):
                causal_conv(**({"x": x, "weight": weight, "form": form} | wrong))  # type: ignore[arg-type]


@both_forms
def test_only_what_a_tap_stands_on_is_read(form: str) -> None:
    x = ONE_TO_FIVE.repeat(1, 2, 1)
    x[0, 3] = torch.nan
    y, _ = causal_conv(x, TAPS[:2], dilation=3, form=form)
    assert y.isnan().flatten().tolist() == [i in (3, 6) for i in range(10)]


@both_forms
def test_gradients_are_those_of_finite_differences(form: str) -> None:
    random = torch.Generator().manual_seed(0)
    shapes = ((2, 6, 3), (3, 3), (3,), (2, 2, 3))
    inputs = [torch.randn(s, generator=random, dtype=torch.float64).requires_grad_() for s in shapes]
    reset = torch.tensor([[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]).bool()
    mask = torch.tensor([[1, 1, 0, 1, 1, 1], [0, 1, 1, 0, 1, 1]]).bool()
    assert torch.autograd.gradcheck(lambda *x: causal_conv(*x, reset=reset, mask=mask, form=form), inputs)
    assert torch.autograd.gradcheck(lambda *x: causal_conv(*x, form=form), inputs)


def test_the_history_stays_wide_under_narrow_inputs() -> None:
    y, history = causal_conv(ONE_TO_FIVE.bfloat16(), TAPS.bfloat16())
    assert y.dtype == torch.bfloat16
    assert history.dtype == torch.float32
