"""The scan: fast form = readable form, chunks = whole, gradients, limits."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels import _linear_scan, linear_scan
from tests.suite import close

WIDE = {torch.float32: torch.float64, torch.bfloat16: torch.float64, torch.complex64: torch.complex128}


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    batch, steps, width = draw(st.integers(1, 3)), draw(st.integers(0, 20)), draw(st.integers(1, 20))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    wide = WIDE.get(dtype, dtype)
    angle = torch.randn(batch, steps, width, generator=random, dtype=torch.float64)
    a = torch.rand(batch, steps, width, generator=random, dtype=torch.float64)
    a = torch.polar(a, angle).to(dtype) if wide.is_complex else a.to(dtype)
    u = torch.randn(batch, steps, width, generator=random, dtype=wide).to(dtype)
    h0 = torch.randn(batch, width, generator=random, dtype=wide).to(dtype) if draw(st.booleans()) else None
    reset = torch.rand(batch, steps, generator=random) < 0.3 if draw(st.booleans()) else None
    return a, u, h0, reset


def run(form: str, a: Tensor, u: Tensor, h0: Tensor | None, reset: Tensor | None) -> list[Tensor]:
    """Outputs, last state, and the gradients of a loss that weighs all of them differently."""
    leaves = [x.detach().clone().requires_grad_() for x in (a, u, h0) if x is not None]
    h, last = linear_scan(leaves[0], leaves[1], leaves[2] if h0 is not None else None, reset, form=form)
    weigh = torch.linspace(-1, 1, h.numel(), dtype=torch.float64).reshape(h.shape).to(h.dtype)
    loss = (h * weigh).sum() + (last * last).sum().to(h.dtype)
    loss = loss.real if loss.is_complex() else loss
    # Without steps and without a state there is nothing to differentiate.
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if loss.requires_grad else [None] * len(leaves)
    found = [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, gradients, strict=True)]
    return [h.detach(), last.detach(), *found]


def near(one: Tensor, two: Tensor) -> None:
    if one.is_complex():
        one, two = torch.view_as_real(one), torch.view_as_real(two)
    close(one, two)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
@given(data=st.data())
def test_the_fast_form_is_the_loop(dtype: torch.dtype, data: st.DataObject) -> None:
    problem = data.draw(problems(dtype))
    for fast, loop in zip(run("numba", *problem), run("loop", *problem), strict=True):
        near(fast, loop)


@given(data=st.data())
def test_narrow_inputs_are_accumulated_wide(data: st.DataObject) -> None:
    a, u, h0, reset = data.draw(problems(torch.bfloat16))
    h, last = linear_scan(a, u, h0, reset, form="numba")
    exact, last_exact = linear_scan(a.double(), u.double(), None if h0 is None else h0.double(), reset, form="loop")
    assert h.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    # Only the outputs are rounded to eight bits; the state they are read from is float32.
    close(last, last_exact.float())
    torch.testing.assert_close(h.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("form", ["loop", "numba"])
@given(data=st.data())
def test_chunks_are_the_whole(form: str, data: st.DataObject) -> None:
    a, u, h0, reset = data.draw(problems(torch.float64))
    h, last = linear_scan(a, u, h0, reset, form=form)
    state, parts = h0, []
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, u.shape[1]), max_size=4))), u.shape[1]]
    for start, end in pairwise(cuts):
        span = slice(start, end)
        part, state = linear_scan(a[:, span], u[:, span], state, None if reset is None else reset[:, span], form=form)
        parts.append(part)
    close(torch.cat(parts, 1), h)
    close(state, last)


@pytest.mark.parametrize("form", ["loop", "numba"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_gradients_are_those_of_finite_differences(form: str, dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    a, u, h0 = (torch.randn(shape, generator=random, dtype=dtype) for shape in ((2, 5, 3), (2, 5, 3), (2, 3)))
    reset = torch.tensor([[0, 0, 1, 0, 0], [1, 0, 0, 0, 1]]).bool()
    inputs = [x.requires_grad_() for x in (a, u, h0)]
    assert torch.autograd.gradcheck(lambda *x: linear_scan(*x, reset, form=form), inputs)


def test_a_gradient_to_the_last_state_alone_is_right() -> None:
    a, u = torch.full((1, 3, 1), 0.5), torch.ones(1, 3, 1)
    h0 = torch.ones(1, 1, requires_grad=True)
    linear_scan(a, u, h0, form="numba")[1].sum().backward()
    assert h0.grad is not None
    assert h0.grad.item() == 0.125


@pytest.mark.parametrize("shape", [(1, 33, 4099), (5, 64, 500)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int, int]) -> None:
    random = torch.Generator().manual_seed(0)
    a, u = torch.rand(shape, generator=random), torch.randn(shape, generator=random)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run("numba", a, u, None, None))
    assert all(one.equal(two) for one, two in zip(*found, strict=True))


@pytest.mark.global_rng
def test_the_custom_operations_keep_the_rules_of_torch() -> None:
    a, u, h0 = (torch.rand(shape, requires_grad=True) for shape in ((2, 4, 3), (2, 4, 3), (2, 3)))
    reset = torch.zeros(2, 4, dtype=torch.bool)
    torch.library.opcheck(torch.ops.pliant.linear_scan.default, (a, u, h0, reset))
    torch.library.opcheck(torch.ops.pliant.linear_scan.default, (a, u, h0, None))


def test_decay_zero_has_no_memory_and_decay_one_keeps_it() -> None:
    u = torch.arange(12.0).reshape(2, 3, 2)
    h0 = torch.tensor([[5.0, 6.0], [7.0, 8.0]])
    assert linear_scan(torch.zeros_like(u), u, h0)[0].equal(u)
    assert linear_scan(torch.ones_like(u), torch.zeros_like(u), h0)[0].equal(h0[:, None].expand(2, 3, 2))
    assert linear_scan(torch.ones_like(u), u)[0].equal(u.cumsum(1))


def test_products_of_decays_that_underflow_leave_no_trace_and_no_nan() -> None:
    a = torch.full((1, 1000, 2), 1e-30, requires_grad=True)
    h, last = linear_scan(a, torch.ones(1, 1000, 2), torch.full((1, 2), 1e30), form="numba")
    (h.sum() + last.sum()).backward()
    assert h.isfinite().all()
    assert a.grad is not None
    assert a.grad.isfinite().all()


@pytest.mark.parametrize("form", ["loop", "numba"])
def test_a_reset_drops_what_is_not_finite(form: str) -> None:
    a, u = torch.full((1, 3, 2), 0.5), torch.ones(1, 3, 2)
    reset = torch.tensor([[True, False, False]])
    found = linear_scan(a, u, torch.full((1, 2), torch.nan), reset, form=form)[0]
    assert found.equal(linear_scan(a, u, form=form)[0])


def test_inputs_of_any_memory_layout_are_read_right() -> None:
    random = torch.Generator().manual_seed(0)
    a, u = (torch.rand(4, 3, 5, generator=random).permute(1, 2, 0) for _ in range(2))
    close(linear_scan(a, u, form="numba")[0], linear_scan(a.contiguous(), u.contiguous(), form="loop")[0])


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    x = torch.zeros(2, 3, 4)
    for wrong in (
        {"a": x, "u": x[:, :2]},
        {"a": x, "u": x, "h0": torch.zeros(2, 3)},
        {"a": x, "u": x, "reset": torch.zeros(2, 4, dtype=torch.bool)},
        {"a": x, "u": x, "reset": torch.zeros(2, 3)},
        {"a": x, "u": x, "form": "magic"},
        {"a": x[0], "u": x[0]},
    ):
        with pytest.raises(UsageError, match="linear_scan"):
            linear_scan(**wrong)  # type: ignore[arg-type]


@pytest.mark.slow
def test_compiles_in_one_graph_and_once_for_all_lengths(tmp_path: object) -> None:
    import subprocess
    import sys

    code = """
import torch
from pliant.mixers import GatedLRU
torch._dynamo.config.error_on_recompile = False
mixer = GatedLRU(8)
compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
with torch._dynamo.utils.maybe_enable_compiled_autograd(False):
    for steps in (16, 24, 40):
        x = torch.randn(2, steps, 8)
        torch.testing.assert_close(compiled(x)[0], mixer(x)[0])
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_one_stream_in_tiles_and_in_two_threads_is_the_same(dtype: torch.dtype, monkeypatch: Any) -> None:
    # Tiles of three steps, with resets inside and at the edges of them, and threads even for this little.
    random = torch.Generator().manual_seed(0)
    shape = (1, 40, 6)
    monkeypatch.setattr(_linear_scan, "TILE", 3 * 6 * dtype.itemsize)
    monkeypatch.setattr(_linear_scan, "SMALL", 0)
    a, u, h0 = (torch.randn(s, generator=random, dtype=dtype) for s in (shape, shape, (1, 6)))
    a = a / (1 + a.abs())
    for share in (None, 0.0, 0.1, 0.5, 1.0):
        reset = None if share is None else torch.rand(1, 40, generator=random) < share
        expected = run("loop", a, u, h0, reset)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            for fast, loop in zip(run("numba", a, u, h0, reset), expected, strict=True):
                near(fast, loop)


@pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
def test_one_stream_in_two_threads_is_the_same_to_the_bit(dtype: torch.dtype) -> None:
    random = torch.Generator().manual_seed(0)
    shape = (1, 700, 300)
    a, u, h0 = (torch.randn(s, generator=random, dtype=dtype) for s in (shape, shape, (1, 300)))
    a = a / (1 + a.abs())
    for reset in (None, torch.rand(1, 700, generator=random) < 0.01):
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(run("numba", a, u, h0, reset))
        assert all(one.equal(two) for one, two in zip(*found, strict=True))


def test_expanded_decays_and_gradients_are_read_where_they_stand() -> None:
    random = torch.Generator().manual_seed(0)
    u = torch.randn(2, 6, 3, generator=random, dtype=torch.complex64, requires_grad=True)
    a = torch.randn(3, generator=random, dtype=torch.complex64, requires_grad=True)
    reset = torch.tensor([[0, 0, 1, 0, 0, 0], [1, 0, 0, 0, 0, 1]]).bool()
    found = []
    for form in ("loop", "numba"):
        h, _ = linear_scan(a.expand(2, 6, 3), u, None, reset, form=form)
        # The gradient of a sum is one number, expanded.
        found.append([h.detach(), *torch.autograd.grad(h.sum().real, (a, u))])
    for loop, fast in zip(*found, strict=True):
        near(fast, loop)
    for axes in ((1, 6, 3), (2, 1, 3)):
        decays = torch.rand(axes, generator=random).expand(2, 6, 3)
        near(linear_scan(decays, u, form="numba")[0], linear_scan(decays, u, form="loop")[0])


def test_denormal_numbers_pass() -> None:
    a, u = torch.full((1, 200, 3), 0.5), torch.zeros(1, 200, 3)
    h0 = torch.full((1, 3), 1e-38)
    near(linear_scan(a, u, h0, form="numba")[0] * 1e38, linear_scan(a, u, h0, form="loop")[0] * 1e38)
    assert all(x.isfinite().all() for x in run("numba", a * 1e-39, u, h0, None))


@pytest.mark.slow
@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999, 1.0])
def test_a_million_steps(decay: float) -> None:
    steps = 10**6
    a = torch.full((1, steps, 2), decay, requires_grad=True)
    u = torch.ones(1, steps, 2, requires_grad=True)
    h, last = linear_scan(a, u)
    h[:, -1].sum().backward()
    exact = steps if decay == 1 else (1 - decay**steps) / (1 - decay)
    torch.testing.assert_close(last, torch.full((1, 2), float(exact)), rtol=1e-4, atol=0)
    assert u.grad is not None
    assert a.grad is not None
    torch.testing.assert_close(u.grad.double().sum(1), torch.full((1, 2), float(exact)).double(), rtol=1e-4, atol=0)
    assert a.grad.isfinite().all()


@pytest.mark.slow
def test_outputs_on_large_pages_are_like_others() -> None:
    random = torch.Generator().manual_seed(0)
    shape = (1, 3000, 1024)
    a, u = torch.rand(shape, generator=random), torch.randn(shape, generator=random)
    torch.set_num_threads(2)
    whole = run("numba", a, u, None, None)
    narrow = run("numba", a[:, :, :8].contiguous(), u[:, :, :8].contiguous(), None, None)
    assert whole[0][:, :, :8].equal(narrow[0])
