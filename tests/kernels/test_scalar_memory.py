"""The scalar memory: fast form = readable form, chunks = whole, gradients, and the numbers of lram-xlstm.md."""

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels import ScalarMemory, scalar_memory
from tests.suite import close

every_form = pytest.mark.parametrize("form", ["loop", "numba"])
DTYPES = (torch.float32, torch.float64)


class Problem(NamedTuple):
    pre: Tensor
    recurrent: Tensor
    state: ScalarMemory | None
    reset: Tensor | None
    mask: Tensor | None

    @property
    def flags(self) -> dict[str, Tensor | None]:
        return {"reset": self.reset, "mask": self.mask}


def problem(
    shape: tuple[int, int, int, int], dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 2.0
) -> Problem:
    """Random numbers for `(B, T, H, K)`, with a state, resets and masks."""
    batch, steps, heads, size = shape
    random = torch.Generator().manual_seed(seed)

    def normal(*of: int) -> Tensor:
        return torch.randn(*of, generator=random, dtype=torch.float64).to(dtype)

    n = 1 + normal(batch, heads, size).abs()
    # Some units may be fresh while others are not.
    n = torch.where(torch.rand(n.shape, generator=random) < 0.2, 0, n)
    h, c, m = (normal(batch, heads, size) for _ in range(3))
    state = ScalarMemory(h.tanh(), c.tanh() * n, n, m)
    flags = (torch.rand(batch, steps, generator=random) for _ in range(2))
    reset, mask = (flag < share for flag, share in zip(flags, (0.2, 0.8), strict=True))
    recurrent = normal(heads, size, 4, size) / size**0.5
    return Problem(scale * normal(batch, steps, 4, heads, size), recurrent, state, reset, mask)


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype) -> Problem:
    shape = (draw(st.integers(1, 3)), draw(st.integers(0, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 9)))
    found = problem(shape, dtype, draw(st.integers(0, 2**31)), draw(st.sampled_from([0.1, 2.0, 20.0])))
    drop = draw(st.sets(st.sampled_from(["state", "reset", "mask"])))
    return found._replace(**dict.fromkeys(drop))


def run(form: str, given: Problem) -> list[Tensor]:
    """Outputs, last state, and the gradients of a loss that weighs all of them differently."""
    leaves = [x.detach().clone().requires_grad_() for x in (given.pre, given.recurrent, *(given.state or ()))]
    state = ScalarMemory(*leaves[2:]) if given.state else None
    h, last = scalar_memory(leaves[0], leaves[1], state, **given.flags, form=form)
    weigh = torch.linspace(-1, 1, h.numel(), dtype=h.dtype).reshape(h.shape)
    # m grows with the gates, and is not squared, lest it drown the rest.
    loss = (h * weigh).sum() + last.h.square().sum() + (last.c * 0.5).sum() + last.n.log1p().sum() + last.m.sum()
    found = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    gradients = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]
    return [h.detach(), *(part.detach() for part in last), *gradients]


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_the_fast_form_is_the_loop(dtype: torch.dtype, data: st.DataObject) -> None:
    given = data.draw(problems(dtype))
    for fast, loop in zip(run("numba", given), run("loop", given), strict=True):
        close(fast, loop)


@every_form
@given(data=st.data())
def test_chunks_are_the_whole(form: str, data: st.DataObject) -> None:
    given = data.draw(problems(torch.float64))
    pre, recurrent, state = given[:3]
    h, last = scalar_memory(pre, recurrent, state, **given.flags, form=form)
    parts = []
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, pre.shape[1]), max_size=4))), pre.shape[1]]
    for start, end in pairwise(cuts):
        flags = {n: None if flag is None else flag[:, start:end] for n, flag in given.flags.items()}
        part, state = scalar_memory(pre[:, start:end], recurrent, state, **flags, form=form)
        parts.append(part)
    close(torch.cat(parts, 1), h)
    for one, two in zip(state, last, strict=True):
        close(one, two)


@every_form
def test_gradients_are_those_of_finite_differences(form: str) -> None:
    given = problem((2, 4, 1, 3))
    assert given.state is not None
    # A unit that is fresh is so exactly, and no difference of n is small then.
    state = given.state._replace(n=given.state.n.clamp(min=1))
    inputs = [x.requires_grad_() for x in (given.pre, given.recurrent, *state)]

    def outputs(pre: Tensor, recurrent: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        h, last = scalar_memory(pre, recurrent, ScalarMemory(*state), **given.flags, form=form)
        return h, *last

    assert torch.autograd.gradcheck(outputs, inputs)


@pytest.mark.parametrize("shape", [(1, 40, 5, 32), (5, 40, 1, 32)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int, int, int]) -> None:
    given, found = problem(shape, torch.float32), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run("numba", given))
    assert all(one.equal(two) for one, two in zip(*found, strict=True))


@pytest.mark.global_rng
def test_the_custom_operations_keep_the_rules_of_torch() -> None:
    pre, recurrent, state, reset, mask = problem((2, 4, 2, 3))
    assert state is not None
    floats = [x.requires_grad_() for x in (pre, recurrent, torch.stack(state))]
    for flags in ((reset, mask), (None, None)):
        torch.library.opcheck(torch.ops.pliant.scalar_memory.default, (*floats, *flags, True))
    torch.library.opcheck(torch.ops.pliant.scalar_memory.default, (*(x.detach() for x in floats), None, None, False))


@pytest.mark.parametrize("dtype", DTYPES)
@every_form
def test_check_5_constant_gates_give_a_constant_output(form: str, dtype: torch.dtype) -> None:
    pre = torch.tensor([0.7, -0.4, 0.9, 0.3], dtype=dtype)[:, None, None].expand(1, 30, 4, 1, 1)
    h, _ = scalar_memory(pre, torch.zeros(1, 1, 4, 1, dtype=dtype), form=form)
    torch.testing.assert_close(h, torch.full_like(h, 0.411472), atol=5e-7, rtol=0)
    close(h, (torch.sigmoid(pre[:, :, 3]) * torch.tanh(pre[:, :, 2])))


@every_form
def test_check_5_outputs_are_below_one_and_heads_are_apart(form: str) -> None:
    pre, recurrent, *_ = problem((2, 50, 3, 4), scale=5.0)
    h, _ = scalar_memory(pre, recurrent, form=form)
    assert h.abs().max() < 1
    other = recurrent.clone()
    other[1] += 1
    moved = (scalar_memory(pre, other, form=form)[0] != h).any(0).any(0).any(-1)
    assert moved.tolist() == [False, True, False]


@every_form
def test_a_unit_is_fresh_by_itself(form: str) -> None:
    # The published code asks whether all of the batch is fresh, and divides 0 by 0 for the stream that alone is.
    pre = torch.full((2, 3, 4, 1, 1), -200.0)
    pre[:, :, 2:] = 1.0
    state = ScalarMemory(*(torch.tensor([0.1, 0.5, 1.0, 300.0])[:, None, None, None].expand(4, 2, 1, 1)))
    reset = torch.tensor([[True, False, False], [False, True, False]])
    recurrent = torch.zeros(1, 1, 4, 1, requires_grad=True)
    h, last = scalar_memory(pre, recurrent, state, reset=reset, form=form)
    alone, _ = scalar_memory(pre[:1], recurrent, form=form)
    assert h[0].equal(alone[0])
    assert h[1, 1:].equal(alone[0, :2])
    (h.sum() + last.c.sum()).backward()
    assert recurrent.grad is not None
    assert recurrent.grad.isfinite().all()


@every_form
def test_what_a_fresh_unit_carries_does_not_matter_but_for_what_others_read(form: str) -> None:
    pre, recurrent, *_ = problem((1, 6, 1, 2))
    zero = torch.zeros(1, 1, 2, dtype=torch.float64)
    junk = ScalarMemory(zero, torch.full_like(zero, torch.nan), zero, torch.full_like(zero, torch.inf))
    assert scalar_memory(pre, recurrent, junk, form=form)[0].equal(scalar_memory(pre, recurrent, form=form)[0])


@pytest.mark.parametrize("size", [20.0, 260.0, 1e4, 1e-30, 1e-42])
@every_form
def test_extreme_gates_stay_finite(form: str, size: float) -> None:
    signs = torch.tensor([[a, b, c, d] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1) for d in (-1, 1)])
    pre = (size * signs.float())[:, None, :, None, None].expand(16, 60, 4, 1, 2).clone().requires_grad_()
    recurrent = torch.full((1, 2, 4, 2), size).requires_grad_()
    h, last = scalar_memory(pre, recurrent, form=form)
    (h.sum() + sum(part.sum() for part in last)).backward()
    for value in (h, *last, pre.grad, recurrent.grad):
        assert value is not None
        assert value.isfinite().all()


@every_form
def test_an_open_forget_gate_keeps_and_a_closed_one_drops(form: str) -> None:
    pre = torch.zeros(1, 4, 4, 1, 1, dtype=torch.float64)
    pre[:, :, 0] = torch.tensor([0.0, -800.0, -800.0, -800.0])[:, None, None]
    pre[:, :, 2] = torch.tensor([0.7, -5.0, -5.0, -5.0])[:, None, None]
    zero = torch.zeros(1, 1, 4, 1, dtype=torch.float64)
    pre[:, :, 1] = 50
    kept, _ = scalar_memory(pre, zero, form=form)
    torch.testing.assert_close(kept, kept[:, :1].expand_as(kept))
    pre[:, :, 1] = -2000
    dropped, _ = scalar_memory(pre, zero, form=form)
    torch.testing.assert_close(dropped, 0.5 * pre[:, :, 2].tanh())


@every_form
def test_long_sequences_are_weighted_means(form: str) -> None:
    steps = 3000
    random = torch.Generator().manual_seed(0)
    pre = torch.zeros(1, steps, 4, 1, 1)
    pre[:, :, 1] = 40  # σ is 1 in float32, so that c / n is the mean of all
    pre[:, :, 2] = torch.randn(1, steps, 1, 1, generator=random)
    h, last = scalar_memory(pre, torch.zeros(1, 1, 4, 1), form=form)
    mean = pre[:, :, 2].double().tanh().cumsum(1) / torch.arange(1, steps + 1)[:, None, None]
    assert last.n.item() == steps
    torch.testing.assert_close(h, (0.5 * mean).float(), atol=1e-5, rtol=0)


@every_form
def test_steps_that_do_not_exist_may_hold_anything(form: str) -> None:
    pre, recurrent, state, reset, mask = problem((3, 9, 2, 3))
    assert mask is not None
    gone = ~mask[:, :, None, None, None]
    clean, junk = torch.where(gone, 0, pre), torch.where(gone, torch.nan, pre).requires_grad_()
    recurrent.requires_grad_()
    h, _ = scalar_memory(junk, recurrent, state, reset=reset, mask=mask, form=form)
    assert h.equal(scalar_memory(clean, recurrent, state, reset=reset, mask=mask, form=form)[0])
    assert not h[~mask].any()
    h.square().sum().backward()
    assert junk.grad is not None and recurrent.grad is not None
    assert not torch.where(gone, junk.grad, 0).any()
    assert recurrent.grad.isfinite().all()


@every_form
def test_a_reset_drops_what_is_not_finite(form: str) -> None:
    pre, recurrent, state, *_ = problem((2, 4, 2, 3))
    assert state is not None
    broken = ScalarMemory(*(torch.full_like(part, torch.nan) for part in state))
    reset = torch.zeros(2, 4, dtype=torch.bool)
    reset[:, 0] = True
    h = scalar_memory(pre, recurrent, broken, reset=reset, form=form)[0]
    assert h.equal(scalar_memory(pre, recurrent, form=form)[0])


@given(data=st.data())
def test_narrow_inputs_are_computed_wide(data: st.DataObject) -> None:
    given = data.draw(problems(torch.bfloat16))._replace(state=None)
    h, last = scalar_memory(given.pre, given.recurrent, **given.flags, form="numba")
    exact, after = scalar_memory(given.pre.float(), given.recurrent.float(), **given.flags, form="loop")
    assert h.dtype == torch.bfloat16
    close(h, exact.bfloat16())
    for one, two in zip(last, after, strict=True):
        close(one, two)


def test_inputs_of_any_memory_layout_are_read_right() -> None:
    pre, recurrent, state, *_ = problem((3, 4, 2, 5))
    turned = pre.permute(4, 3, 2, 1, 0).contiguous().permute(4, 3, 2, 1, 0)
    weight = recurrent.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert scalar_memory(turned, weight, state, form="numba")[0].equal(
        scalar_memory(pre, recurrent, state, form="numba")[0]
    )


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    pre, recurrent, state, *_ = problem((2, 3, 2, 4))
    right: dict[str, Any] = {"pre": pre, "recurrent": recurrent, "state": state}
    for wrong in (
        {"pre": pre[:, :, :3]},
        {"pre": pre[0]},
        {"recurrent": recurrent[:1]},
        {"state": (pre[:, 0, 0],) * 3},
        {"state": (pre[:1, 0, 0],) * 4},
        {"reset": torch.zeros(2, 4, dtype=torch.bool)},
        {"mask": torch.zeros(1, 3, dtype=torch.bool)},
        {"reset": torch.zeros(2, 3, dtype=torch.int64)},
        {"form": "magic"},
    ):
        with pytest.raises(UsageError, match="scalar_memory"):
            scalar_memory(**(right | wrong))
