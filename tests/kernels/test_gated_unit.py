"""The gated unit: slices of rows = the whole, gradients, what is kept."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels import _gated_unit as kernel
from pliant.kernels import gated_scan, gated_unit
from tests.suite import close

FLOATS = ("x", "input_weight", "input_bias", "decay_weight", "decay_bias", "rate", "h0")


def problem(batch: int, steps: int, side: int, heads: int, part: int, seed: int = 0, dtype: torch.dtype = torch.float64,
            share: float = 0.3) -> dict[str, Any]:  # fmt: skip
    random = torch.Generator().manual_seed(seed)
    shapes = {"x": (batch, steps, side, heads * part), "input_weight": (heads, part, part), "input_bias": (heads, part),
              "decay_weight": (heads, part, part), "decay_bias": (heads, part), "rate": (heads * part,),
              "h0": (batch, side, heads * part)}  # fmt: skip
    found = {n: torch.randn(s, generator=random, dtype=torch.float64).to(dtype) for n, s in shapes.items()}
    found["rate"] = found["rate"].abs()
    flags = {n: torch.rand(batch, steps, generator=random) < share for n in ("first", "reset", "mask")}
    return found | flags | {"mask": ~flags["mask"]}


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    sizes = (draw(st.integers(low, high)) for low, high in ((1, 4), (0, 12), (0, 3), (1, 3), (1, 4)))
    found = problem(*sizes, draw(st.integers(0, 2**31)), dtype, draw(st.sampled_from([0.1, 0.6])))  # type: ignore[misc]
    return found | {name: None for name in ("reset", "mask") if draw(st.booleans())}


def run(form: str, found: dict[str, Any]) -> list[Tensor]:
    leaves = {n: found[n].detach().clone().requires_grad_() for n in FLOATS}
    h, last = gated_unit(**(found | leaves), form=form)
    weigh = torch.linspace(-1, 1, h.numel(), dtype=torch.float64).reshape(h.shape).to(h.dtype)
    loss = (h * weigh).sum() + (last * last).sum().to(h.dtype)
    gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zeros = [torch.zeros_like(x) for x in leaves.values()]
    return [h.detach(), last.detach(), *(z if g is None else g for g, z in zip(gradients, zeros, strict=True))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_slices_of_any_size_are_the_loop(dtype: torch.dtype, data: st.DataObject) -> None:
    found, rows = data.draw(problems(dtype)), data.draw(st.sampled_from([1, 5, 17, 512]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "ROWS", rows)
        fast = run("numba", found)
    for one, two in zip(fast, run("loop", found), strict=True):
        close(one, two)


@pytest.mark.parametrize("form", ["loop", "numba"])
@pytest.mark.parametrize("rows", [4, 512])
def test_gradients_are_those_of_finite_differences(form: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "ROWS", rows)
    found = problem(2, 5, 2, 1, 2)

    def unit(*values: Tensor) -> Any:
        return gated_unit(**(found | dict(zip(FLOATS, values, strict=True))), form=form)

    assert torch.autograd.gradcheck(unit, [(found[name] + 0.1).requires_grad_() for name in FLOATS])


@pytest.mark.parametrize("form", ["loop", "numba"])
def test_it_is_the_scan_of_its_gates(form: str) -> None:
    found = problem(2, 7, 1, 2, 3)
    gates = []
    for name in ("input", "decay"):
        weight = torch.block_diag(*found[f"{name}_weight"])
        gates.append((found["x"] @ weight + found[f"{name}_bias"].flatten())[:, :, 0])
    flags = {name: found[name] for name in ("first", "reset", "mask")}
    h, last = gated_scan(found["x"][:, :, 0], *gates, found["rate"], found["h0"][:, 0], **flags, form=form)
    other, end = gated_unit(**found, form=form)
    close(other[:, :, 0], h)
    close(end[:, 0], last)


@pytest.mark.parametrize("gate", [-100.0, -20.0, 20.0, 100.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_closed_and_open_gates_stay_finite(gate: float, dtype: torch.dtype) -> None:
    found = problem(2, 30, 1, 2, 2, dtype=dtype)
    found |= {name: torch.full_like(found[name], gate) for name in ("input_bias", "decay_bias")}
    assert all(part.isfinite().all() for part in run("numba", found))


def test_the_gates_are_not_kept_for_the_gradient() -> None:
    found = problem(2, 16, 1, 2, 4, dtype=torch.float32) | {"mask": None, "reset": None}
    found["x"].requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        gated_unit(**found, form="numba")
    assert sum(size >= found["x"].numel() for size in kept) == 2


def test_inputs_of_any_memory_layout_are_read_right() -> None:
    found = problem(2, 6, 3, 2, 2)
    turned = {n: x.mT.contiguous().mT if x.is_floating_point() and x.ndim > 1 else x for n, x in found.items()}
    for one, two in zip(run("numba", turned), run("numba", found), strict=True):
        close(one, two)


@pytest.mark.global_rng
def test_the_custom_operations_keep_the_rules_of_torch() -> None:
    found = problem(2, 4, 2, 2, 2, dtype=torch.float32)
    found["rate"] = -8 * found["rate"]  # what the operation is given: the exponent of an open gate
    floats = [found[name].requires_grad_() for name in FLOATS]
    for flags in ((found["reset"], found["mask"]), (None, None)):
        torch.library.opcheck(torch.ops.pliant.gated_unit.default, (*floats, found["first"], *flags))


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    found = problem(2, 3, 1, 2, 2)
    for wrong in (
        {"x": found["x"][0]},
        {"x": found["x"][..., :3]},
        {"input_weight": found["input_weight"][:1]},
        {"decay_bias": found["decay_bias"][:1]},
        {"rate": torch.zeros(3)},
        {"h0": torch.zeros(2, 1, 3)},
        {"first": torch.zeros(2, 4, dtype=torch.bool)},
        {"mask": torch.ones(2, 3)},
        {"form": "magic"},
    ):
        with pytest.raises(UsageError, match="gated_unit"):
            gated_unit(**(found | wrong))
