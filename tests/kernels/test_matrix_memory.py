"""The matrix memory: all forms are the loop, chunks are the whole, gradients, limits, and the dossier's checks."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pliant.core import UsageError
from pliant.kernels import matrix_memory
from tests.suite import close

FORMS = ("loop", "parallel", "chunkwise", "numba")
FAST = FORMS[1:]


def noise(*shapes: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=random, dtype=torch.float64).to(dtype) for shape in shapes]


def problem(
    batch: int = 2,
    steps: int = 9,
    heads: int = 2,
    keys: int = 3,
    values: int = 4,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    spread: float = 1.0,
) -> tuple[list[Tensor], list[Tensor]]:
    """q, k, v, log i and log f; and a state. `spread` of the pre-activations of the gates."""
    over, each = (batch, steps, heads), (batch, heads)
    shapes = ((*over, keys), (*over, keys), (*over, values), over, over, (*each, keys, values), (*each, keys), each)
    found = noise(*shapes, seed=seed, dtype=dtype)
    found[3], found[4] = spread * found[3], F.logsigmoid(spread * found[4] + 1)
    return found[:5], found[5:]


def flags(batch: int, steps: int, seed: int = 0) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(seed)
    reset = torch.rand(batch, steps, generator=random) < 0.2
    return {"reset": reset, "mask": torch.rand(batch, steps, generator=random) < 0.7}


def run(inputs: list[Tensor], state: list[Tensor] | None, **options: Any) -> list[Tensor]:
    """Outputs, last state, and the gradients of a loss that weighs all of them differently."""
    leaves = [x.detach().clone().requires_grad_() for x in (*inputs, *(state or ()))]
    h, last = matrix_memory(*leaves[:5], tuple(leaves[5:]) or None, **options)
    loss = sum((x * torch.linspace(-1, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in (h, *last))
    return [x.detach() for x in (h, *last, *torch.autograd.grad(loss, leaves))]


@pytest.mark.parametrize("form", FAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_every_form_is_the_loop(form: str, dtype: torch.dtype, data: st.DataObject) -> None:
    batch, steps, heads = (data.draw(st.integers(1, most)) for most in (3, 20, 3))
    keys, values = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6))
    seed, eps = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([1e-6, 1e-2, 1.0]))
    inputs, state = problem(batch, steps, heads, keys, values, seed=seed, dtype=dtype)
    given_flags = flags(batch, steps, seed) if data.draw(st.booleans()) else {}
    from_state = state if data.draw(st.booleans()) else None
    chunk = data.draw(st.sampled_from([None, 1, 2, 7, 64]))
    found = run(inputs, from_state, form=form, chunk=chunk, eps=eps, **given_flags)
    for fast, loop in zip(found, run(inputs, from_state, form="loop", eps=eps, **given_flags), strict=True):
        # Where qᵀn happens to be small, gradients are large and so are their roundings, in the loop as well.
        close(fast, loop, scale=4.0)


@pytest.mark.parametrize("chunk", [1, 7, 16, 64, 100])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-4)])
def test_check_1_all_forms_agree(dtype: torch.dtype, error: float, chunk: int) -> None:
    """Without ε, also with the equations that have no stabilizer."""
    inputs, _ = problem(2, 100, 2, 8, 8, dtype=torch.float64)
    q, k, v, log_input, log_forget = inputs
    C, n, hs = torch.zeros(2, 2, 8, 8).double(), torch.zeros(2, 2, 8).double(), []
    for t in range(100):
        i, f, key = log_input[:, t].exp(), log_forget[:, t].exp(), k[:, t] / math.sqrt(8)
        C = f[..., None, None] * C + i[..., None, None] * key[..., :, None] * v[:, t][..., None, :]
        n = f[..., None] * n + i[..., None] * key
        scale = (q[:, t] * n).sum(-1).abs().clamp(min=1)
        hs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], C) / scale[..., None])
    for form in FORMS:
        h, state = matrix_memory(*(x.to(dtype) for x in inputs), form=form, chunk=chunk, eps=0.0)
        torch.testing.assert_close(h.double(), torch.stack(hs, 1), atol=error, rtol=0)
        in_units_of_one = state.C.double() * state.m.double().exp()[..., None, None]
        torch.testing.assert_close(in_units_of_one, C, atol=10 * error, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_check_2_invariances(form: str) -> None:
    inputs, _ = problem(2, 30)
    q, k, v, *gates = inputs
    h, _ = matrix_memory(*inputs, form=form, chunk=8, eps=0.0)
    zeros = [torch.zeros(shape, dtype=torch.float64) for shape in ((2, 2, 3, 4), (2, 2, 3))]
    elsewhere = (*zeros, torch.full((2, 2), -50.0, dtype=torch.float64))
    close(matrix_memory(*inputs, elsewhere, form=form, chunk=8, eps=0.0)[0], h)
    close(matrix_memory(-q, k, v, *gates, form=form, chunk=8)[0], -matrix_memory(*inputs, form=form, chunk=8)[0])
    close(matrix_memory(q, -k, v, *gates, form=form, chunk=8, eps=0.0)[0], -h)
    other = noise(v.shape, seed=7)[0]
    both, _ = matrix_memory(q, k, 2 * v + other, *gates, form=form, chunk=8, eps=0.0)
    close(both, 2 * h + matrix_memory(q, k, other, *gates, form=form, chunk=8, eps=0.0)[0])


@pytest.mark.parametrize("form", FORMS)
def test_check_3_the_closed_form(form: str) -> None:
    one = torch.ones(1, 200, 1, 1, dtype=torch.float64)
    half = torch.full((1, 200, 1), math.log(0.5), dtype=torch.float64)
    open_gate, half_open = (torch.full((1, 200, 1), x, dtype=torch.float64) for x in (0.0, -1.0))
    h, _ = matrix_memory(one, one, 2 * one, open_gate, half, form=form, chunk=16, eps=0.0)
    torch.testing.assert_close(h, 2 * one)
    h, _ = matrix_memory(one, one, 2 * one, half_open, half, form=form, chunk=16, eps=0.0)
    expected = torch.tensor([0.7358, 1.1036, 1.2876, 1.3795, 1.4255], dtype=torch.float64)
    torch.testing.assert_close(h[0, :5, 0, 0], expected, atol=5e-5, rtol=0)
    assert h[0, -1, 0, 0].item() == pytest.approx(4 / math.e)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("gate", [-260.0, -20.0, 20.0, 260.0])
def test_check_4_nothing_overflows(form: str, gate: float) -> None:
    inputs, state = problem(2, 40, dtype=torch.float32)
    for forget in (-1e4, -20.0, 0.0, -math.inf):
        for log_input in (torch.full_like(inputs[3], gate), gate * inputs[3]):
            given_gates = [log_input, torch.full_like(inputs[4], forget)]
            found = run(inputs[:3] + given_gates, state, form=form, chunk=16, **flags(2, 40))
            assert all(x.isfinite().all() for x in found)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scale", [20.0, 1e-42])
def test_extreme_gates_and_denormals_are_those_of_the_loop(form: str, scale: float) -> None:
    inputs, state = problem(2, 40, dtype=torch.float32)
    inputs[3:] = [20 * inputs[3].sign(), F.logsigmoid(20 * inputs[4].sign())]
    inputs[2] = inputs[2] * (1.0 if scale > 1 else scale)
    exact = run([x.double() for x in inputs], [x.double() for x in state], form="loop", **flags(2, 40))
    for one, two in zip(run(inputs, state, form=form, chunk=16, **flags(2, 40)), exact, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-4 * max(1.0, float(two.abs().max())))


@pytest.mark.parametrize("form", FORMS)
def test_a_closed_forget_gate_has_no_memory_and_open_gates_keep_all(form: str) -> None:
    inputs, state = problem(1, 12)
    q, k, v, log_input, log_forget = inputs
    closed = torch.full_like(log_forget, -math.inf)
    h, _ = matrix_memory(*inputs[:4], closed, tuple(state), form=form, chunk=5, eps=0.0)
    match = (q * k).sum(-1) / math.sqrt(3)
    alone = match / match.abs().maximum((-log_input).exp())
    close(h, alone[..., None] * v)
    shut, open_gate = torch.full_like(log_input, -math.inf), torch.zeros_like(log_forget)
    _, kept = matrix_memory(q, k, v, shut, open_gate, tuple(state), form=form, chunk=5)
    for one, two in zip(kept, state, strict=True):
        close(one, two)


@pytest.mark.parametrize("form", ["chunkwise", "numba"])
@given(data=st.data())
def test_chunks_are_the_whole(form: str, data: st.DataObject) -> None:
    steps, chunk = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 50))
    inputs, first = problem(2, steps, seed=steps)
    given_flags = flags(2, steps, steps) if data.draw(st.booleans()) else {}
    h, last = matrix_memory(*inputs, tuple(first), form=form, chunk=chunk, **given_flags)
    state, parts = tuple(first), []
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, steps), max_size=4))), steps]
    for start, end in pairwise(cuts):
        span = slice(start, end)
        part, state = matrix_memory(
            *(x[:, span] for x in inputs),
            state,
            **{name: flag[:, span] for name, flag in given_flags.items()},
            form=form if end > start else None,
        )
        parts.append(part)
    close(torch.cat(parts, 1), h)
    for one, two in zip(state, last, strict=True):
        close(one, two)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_gradients_are_those_of_finite_differences(form: str, eps: float) -> None:
    """A large ε shows the part of the gradient that goes by way of the stabilizer."""
    inputs, state = problem(1, 5, 1, 2, 2)
    leaves = [x.requires_grad_() for x in (*inputs, *state)]
    for given_flags in ({}, flags(1, 5, 5)):

        def outputs(*x: Tensor, given_flags: dict[str, Tensor] = given_flags) -> tuple[Tensor, ...]:
            h, last = matrix_memory(*x[:5], x[5:], form=form, chunk=2, eps=eps, **given_flags)
            return h, *last

        assert torch.autograd.gradcheck(outputs, leaves)


@pytest.mark.parametrize("form", FORMS)
def test_a_reset_drops_what_is_not_finite_and_a_masked_step_is_not_read(form: str) -> None:
    inputs, state = problem(1, 11)
    reset, mask = torch.zeros(1, 11, dtype=torch.bool), torch.ones(1, 11, dtype=torch.bool)
    reset[0, 3], mask[0, [6, 9]] = True, False
    broken = [torch.full_like(x, math.nan) for x in state]
    hidden = [torch.where(mask.reshape(1, 11, *[1] * (x.ndim - 2)), x, math.nan) for x in inputs]
    found = run(hidden, broken, form=form, chunk=4, reset=reset, mask=mask)
    h, last = matrix_memory(*(x[:, mask[0]][:, 3:] for x in inputs), form="loop")
    close(found[0][:, 3:][:, mask[0, 3:]], h)
    assert not found[0][:, ~mask[0]].any()
    for one, two in zip(found[1:4], last, strict=True):
        close(one, two)
    assert all(not x[:, ~mask[0]].any() for x in found[4:9])


def test_the_future_does_not_touch_the_past() -> None:
    inputs, _ = problem(1, 100, 1, 8, 8, dtype=torch.float32)
    later = [torch.cat([x[:, :50], x[:, 50:] + 1], 1) for x in inputs]
    later[4] = later[4].clamp(max=0)
    assert matrix_memory(*inputs)[0][:, :50].equal(matrix_memory(*later)[0][:, :50])


@pytest.mark.parametrize(("keys", "values"), [(512, 512), (1, 130), (130, 1)])
def test_heads_of_any_size(keys: int, values: int) -> None:
    inputs, state = problem(1, 20, 1, keys, values, dtype=torch.float32)
    inputs[0] = inputs[0] / 10
    exact = run([x.double() for x in inputs], [x.double() for x in state], form="loop")
    for one, two in zip(run(inputs, state, form="numba", chunk=9), exact, strict=True):
        torch.testing.assert_close(one.double(), two, rtol=1e-3, atol=1e-4 * max(1.0, float(two.abs().max())))


def test_narrow_inputs_are_accumulated_wide() -> None:
    inputs, _ = problem(2, 30, dtype=torch.bfloat16)
    for form in FORMS:
        h, last = matrix_memory(*inputs, form=form)
        exact, last_exact = matrix_memory(*(x.double() for x in inputs), form="loop")
        assert h.dtype == torch.bfloat16
        torch.testing.assert_close(h.double(), exact, rtol=2**-7, atol=1e-5)
        for one, two in zip(last, last_exact, strict=True):
            close(one, two.float())


def test_inputs_of_any_memory_layout_are_read_right() -> None:
    inputs, state = problem()
    strange = [x.transpose(0, -1).contiguous().transpose(0, -1) for x in inputs]
    for one, two in zip(run(strange, state, form="numba"), run(inputs, state, form="loop"), strict=True):
        close(one, two)


def test_the_number_of_threads_changes_no_bit() -> None:
    inputs, state = problem(2, 300, 2, 16, 16, dtype=torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run(inputs, state, form="numba"))
    assert all(one.equal(two) for one, two in zip(*found, strict=True))


@pytest.mark.parametrize("steps", [63, 64, 65, 500])
def test_many_slabs_are_one(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, state = problem(2, steps)
    whole = run(inputs, state, form="numba", chunk=8, **flags(2, steps))
    monkeypatch.setattr("pliant.kernels._matrix_chunks.SLAB", 1)
    for one, two in zip(run(inputs, state, form="numba", chunk=8, **flags(2, steps)), whole, strict=True):
        close(one, two)


@pytest.mark.global_rng
def test_the_custom_operations_keep_the_rules_of_torch() -> None:
    inputs, (C, n, m) = problem(2, 6, dtype=torch.float32)
    given_flags = flags(2, 6)
    leaves = [x.requires_grad_() for x in (*inputs, torch.cat([C, n[..., None]], -1), m)]
    operation = torch.ops.pliant.matrix_memory.default
    torch.library.opcheck(operation, (*leaves, given_flags["reset"], given_flags["mask"], 4, 1e-6, True))
    torch.library.opcheck(operation, (*leaves, None, None, 4, 1e-6, True))


def test_one_step_is_plain_torch_and_few_operations() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    inputs, state = problem(1, 1, dtype=torch.float32)
    with torch.no_grad(), Count() as count:
        matrix_memory(*inputs, tuple(state))
    free = ("promote_types", "select", "unsqueeze", "squeeze", "view", "expand", "slice")
    assert all(name.startswith("aten.") for name in count.seen)
    assert len([name for name in count.seen if not any(part in name for part in free)]) <= 24


@pytest.mark.parametrize("form", ["loop", "parallel", "chunkwise", "numba"])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_step_that_is_not_finite_spoils_what_follows_in_its_episode(form: str, bad: float) -> None:
    reset = torch.zeros(2, 12, dtype=torch.bool)
    reset[0, 7] = True
    for which in range(1, 5):
        given, state = problem(2, 12)
        given[which].data[0, 4, 1] = bad
        for flag, end in ((reset, 7), (None, 12)):
            h, after = matrix_memory(*given, tuple(state), reset=flag, chunk=5, form=form)
            spoiled = torch.zeros(2, 12, h.shape[2], dtype=torch.bool)
            spoiled[0, 4:end, 1] = True
            assert h.isfinite().all(-1).equal(~spoiled)
            assert after.C.isfinite().all(-1).all(-1)[0].tolist() == [True, end == 7, *[True] * (h.shape[2] - 2)]


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    inputs, state = problem(2, 3)
    q, k, v, log_input, log_forget = inputs
    wrong: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
        ((q[..., :2], k, v, log_input, log_forget), {}),
        ((q, k, v[:, :2], log_input, log_forget), {}),
        ((q[0], k[0], v[0], log_input, log_forget), {}),
        ((q, k, v, log_input[:, :2], log_forget), {}),
        ((q, k, v, log_input, log_forget[..., :1]), {}),
        ((*inputs, (state[0], state[1], state[2][:1])), {}),
        (tuple(inputs), {"reset": torch.zeros(2, 4, dtype=torch.bool)}),
        (tuple(inputs), {"mask": torch.zeros(1, 3, dtype=torch.bool)}),
        (tuple(inputs), {"mask": torch.ones(2, 3)}),
        (tuple(inputs), {"chunk": 0}),
        (tuple(inputs), {"form": "magic"}),
    ]
    for arguments, options in wrong:
        with pytest.raises(UsageError, match="matrix_memory"):
            matrix_memory(*arguments, **options)


@pytest.mark.parametrize("form", FORMS)
def test_no_steps_change_nothing(form: str) -> None:
    inputs, state = problem(2, 0)
    h, last = matrix_memory(*inputs, tuple(state), form=form)
    assert h.shape == (2, 0, 2, 4)
    assert all(one.equal(two) for one, two in zip(last, state, strict=True))


@pytest.mark.slow
def test_long_sequences_lose_no_precision() -> None:
    """The error against float64 does not grow with the length."""
    errors = {}
    for steps in (2048, 65536):
        inputs, _ = problem(1, steps, 1, 16, 16, dtype=torch.float32)
        inputs[4] = F.logsigmoid(inputs[4] + 6)
        exact = run([x.double() for x in inputs], None, form="numba")
        found = run(inputs, None, form="numba")
        errors[steps] = [
            float((one - two).abs().mean() / two.abs().mean()) for one, two in zip(found, exact, strict=True)
        ]
        assert all(x.isfinite().all() for x in found)
    assert max(errors[65536]) < 1e-4
    assert all(long < 4 * short + 1e-6 for short, long in zip(errors[2048], errors[65536], strict=True))
