"""The gated scan: fast form = readable form, gates and decays at their limits, what is kept for the gradient."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels import gated_scan
from pliant.kernels._gated_scan import BLOCK
from tests.suite import close

FORMS = ("loop", "numba")


def problem(batch: int, steps: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64,
            share: float = 0.3) -> dict[str, Any]:  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    x, p, r = (torch.randn(batch, steps, width, generator=random, dtype=torch.float64).to(dtype) for _ in range(3))
    rate = torch.rand(width, generator=random, dtype=torch.float64).to(dtype)
    h0 = torch.randn(batch, width, generator=random, dtype=torch.float64).to(dtype)
    reset, first = (torch.rand(batch, steps, generator=random) < share for _ in range(2))
    mask = torch.rand(batch, steps, generator=random) >= share
    return {"x": x, "input_gate": p, "decay_gate": r, "rate": rate, "h0": h0, "first": first, "reset": reset,
            "mask": mask}  # fmt: skip


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    sizes = draw(st.integers(1, 3)), draw(st.integers(0, 12)), draw(st.integers(1, 20))
    given = problem(*sizes, draw(st.integers(0, 2**31)), dtype, draw(st.sampled_from([0.1, 0.6])))
    return given | {name: None for name in ("reset", "mask") if draw(st.booleans())}


def run(form: str, given: dict[str, Any]) -> list[Tensor]:
    """Outputs, last state, and the gradients of a loss that weighs all of them differently."""
    leaves = {
        n: x.detach().clone().requires_grad_() for n, x in given.items() if x is not None and x.is_floating_point()
    }
    h, last = gated_scan(**(given | leaves), form=form)
    weigh = torch.linspace(-1, 1, h.numel(), dtype=torch.float64).reshape(h.shape).to(h.dtype)
    loss = (h * weigh).sum() + (last * last).sum().to(h.dtype)
    found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    # Without steps there is a gradient of the state alone.
    zeros = [torch.zeros_like(x) for x in leaves.values()]
    return [h.detach(), last.detach(), *(z if g is None else g for g, z in zip(found, zeros, strict=True))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_the_fast_form_is_the_loop(dtype: torch.dtype, data: st.DataObject) -> None:
    given = data.draw(problems(dtype))
    for fast, loop in zip(run("numba", given), run("loop", given), strict=True):
        close(fast, loop)


def test_more_channels_than_are_taken_together() -> None:
    given = problem(2, 5, 2 * BLOCK + 3)
    for fast, loop in zip(run("numba", given), run("loop", given), strict=True):
        close(fast, loop)


@pytest.mark.parametrize("form", FORMS)
@given(data=st.data())
def test_chunks_are_the_whole(form: str, data: st.DataObject) -> None:
    given = data.draw(problems(torch.float64))
    h, last = gated_scan(**given, form=form)
    state, parts = given["h0"], []
    steps = h.shape[1]
    cuts = [0, *sorted(data.draw(st.lists(st.integers(0, steps), max_size=4))), steps]
    for start, end in pairwise(cuts):
        over_time = ("x", "input_gate", "decay_gate", "first", "reset", "mask")
        part = {name: None if given[name] is None else given[name][:, start:end] for name in over_time}
        found, state = gated_scan(**(given | part | {"h0": state}), form=form)
        parts.append(found)
    close(torch.cat(parts, 1), h)
    close(state, last)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_are_those_of_finite_differences(form: str) -> None:
    given = problem(2, 6, 3)
    names = ("x", "input_gate", "decay_gate", "rate", "h0")

    def scan(*values: Tensor) -> Any:
        return gated_scan(**(given | dict(zip(names, values, strict=True))), form=form)

    assert torch.autograd.gradcheck(scan, [(given[name] + 0.1).requires_grad_() for name in names])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gate", [-100.0, -20.0, 20.0, 100.0, 1e4])
@pytest.mark.parametrize("rate", [0.0, 1e-40, 2e-9, 3.0, 100.0])
def test_closed_and_open_gates_stay_finite(form: str, dtype: torch.dtype, gate: float, rate: float) -> None:
    given = problem(2, 30, 4, dtype=dtype, share=0.05)
    for name in ("input_gate", "decay_gate"):
        given[name] = torch.full_like(given[name], gate)
    given["rate"] = torch.full_like(given["rate"], rate)
    found = run(form, given)
    assert all(part.isfinite().all() for part in found)
    # The root of a difference near 1 has half of the digits of its argument.
    rounding = torch.finfo(dtype).eps ** 0.5
    for part, loop in zip(found[:2], run("loop", given)[:2], strict=True):
        torch.testing.assert_close(part, loop, atol=8 * rounding, rtol=0)


@pytest.mark.parametrize("form", FORMS)
def test_decay_zero_has_no_memory_and_decay_one_keeps_it(form: str) -> None:
    given = problem(2, 6, 4) | {"reset": None, "mask": None, "first": torch.zeros(2, 6, dtype=torch.bool)}
    given["decay_gate"] = torch.full_like(given["x"], 30.0)
    h, _ = gated_scan(**(given | {"rate": torch.full((4,), 100.0, dtype=torch.float64)}), form=form)
    close(h, given["x"] * given["input_gate"].sigmoid())
    h, last = gated_scan(**(given | {"rate": torch.zeros(4, dtype=torch.float64)}), form=form)
    assert h.equal(given["h0"][:, None].expand_as(h))
    assert last.equal(given["h0"])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_slope_of_the_root_is_bounded(form: str, dtype: torch.dtype) -> None:
    # Without decay the root is of zero; its slope is then the bound, 1000: d n / d rate = 1000 * 2 * 8 * σ(r).
    ones = torch.ones(1, 1, 1, dtype=dtype)
    rate = torch.zeros(1, dtype=dtype, requires_grad=True)
    h, _ = gated_scan(ones, 40 * ones, 40 * ones, rate, 0 * ones[0], torch.zeros(1, 1, dtype=torch.bool), form=form)
    h.sum().backward()
    assert rate.grad is not None
    assert rate.grad.item() == pytest.approx(16000, rel=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_goes_no_further_than_a_reset_or_a_mask(form: str) -> None:
    given = problem(1, 6, 2)
    given["reset"] = torch.tensor([[True, False, False, False, True, False]])
    given["mask"] = torch.tensor([[True, False, True, True, True, True]])
    given["first"] = torch.tensor([[True, False, False, False, True, False]])
    expected = gated_scan(**given, form=form)
    given["h0"] = torch.full_like(given["h0"], torch.nan)
    given["x"][:, 1] = torch.nan
    h, last = gated_scan(**given, form=form)
    assert h.equal(expected[0])
    assert last.equal(expected[1])
    given["x"][:, 3] = torch.nan
    h, last = gated_scan(**given, form=form)
    assert h[:, 4:].equal(expected[0][:, 4:])
    assert last.equal(expected[1])


def test_a_long_run_keeps_its_precision() -> None:
    given = problem(1, 5000, 8, dtype=torch.float32, share=0.0) | {"reset": None, "mask": None}
    # Half-lives of some thousand steps.
    given["rate"] = given["rate"] * 1e-3
    exact = run("loop", {n: x.double() if x is not None and x.is_floating_point() else x for n, x in given.items()})
    for fast, wide in zip(run("numba", given), exact, strict=True):
        close(fast, wide.float(), 4.0)


def test_narrow_inputs_are_accumulated_wide() -> None:
    given = problem(2, 20, 6)
    narrow = {n: x.bfloat16() if x is not None and x.is_floating_point() else x for n, x in given.items()}
    h, last = gated_scan(**narrow, form="numba")
    assert (h.dtype, last.dtype) == (torch.bfloat16, torch.float32)
    wide = {n: x.double() if x is not None and x.is_floating_point() else x for n, x in narrow.items()}
    exact, last_exact = gated_scan(**wide, form="loop")
    close(last, last_exact.float())
    torch.testing.assert_close(h.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 33, 4099), (5, 64, 500)])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, int, int]) -> None:
    given, found = problem(*shape, dtype=torch.float32), []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run("numba", given))
    assert all(one.equal(two) for one, two in zip(*found, strict=True))


def test_inputs_of_any_memory_layout_are_read_right() -> None:
    given = problem(4, 3, 5)
    turned = {n: x if x.ndim < 3 else x.permute(2, 0, 1).contiguous().permute(1, 2, 0) for n, x in given.items()}
    assert gated_scan(**turned, form="numba")[0].equal(gated_scan(**given, form="numba")[0])


def test_nothing_is_kept_for_the_gradient_but_what_came_in_and_h() -> None:
    given = problem(2, 16, 8, dtype=torch.float32) | {"mask": None, "reset": None}
    given["x"].requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gated_scan(**given, form="numba")
    assert sum(size >= 2 * 16 * 8 for size in kept) == 4


@pytest.mark.global_rng
def test_the_custom_operations_keep_the_rules_of_torch() -> None:
    given = problem(2, 4, 3, dtype=torch.float32)
    given["rate"] = -8 * given["rate"]  # what the operation is given: the exponent of an open gate
    floats = [x.requires_grad_() for x in given.values() if x.is_floating_point()]
    for flags in ((given["reset"], given["mask"]), (None, None)):
        torch.library.opcheck(torch.ops.pliant.gated_scan.default, (*floats, given["first"], *flags))


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    given = problem(2, 3, 4)
    for wrong in (
        {"input_gate": given["x"][:, :2]},
        {"x": given["x"][0], "input_gate": given["x"][0], "decay_gate": given["x"][0]},
        {"rate": torch.zeros(3)},
        {"h0": torch.zeros(2, 3)},
        {"reset": torch.zeros(2, 4, dtype=torch.bool)},
        {"mask": torch.ones(2, 3)},
        {"form": "magic"},
    ):
        with pytest.raises(UsageError, match="gated_scan"):
            gated_scan(**(given | wrong))
