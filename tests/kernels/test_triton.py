"""The forms in Triton are the loops: outputs, last states and all gradients. In Triton's interpreter, by `make triton`.

Tiles are small here, so that short sequences, which are all the interpreter has time for, have many; and the machine
has few or many processors, so that time is cut into pieces or not.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed; make triton installs it in an environment of its own")
if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1, as set by make triton", allow_module_level=True)

from pliant.core import UsageError
from pliant.kernels import (
    causal_conv,
    gated_scan,
    gated_unit,
    linear_scan,
    matrix_memory,
    scalar_memory,
    selective_scan,
)
from pliant.kernels._triton import causal_conv as conv
from pliant.kernels._triton import gated_scan as gated
from pliant.kernels._triton import linear_scan as linear
from pliant.kernels._triton import matrix_memory as matrices
from pliant.kernels._triton import scalar_memory as scalars
from pliant.kernels._triton import selective_scan as selective
from tests.suite import close

SIZES = [(2, 9, 5), (1, 1, 1), (1, 37, 3)]
"""Streams, steps, channels; none is a multiple of a tile."""


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "LINE", 32)
    for module in (linear, gated, selective, conv):
        monkeypatch.setattr(module, "STEPS", 4)
    monkeypatch.setattr(matrices, "STEPS", 16)
    monkeypatch.setattr(matrices, "WIDTH", 16)
    for module in (selective, conv):
        monkeypatch.setattr(module, "WIDTH", 4)


@pytest.fixture(params=[1, 100], ids=["whole", "pieces"])
def processors(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "processors", lambda _: request.param)


def run(kernel: Any, form: str, given: dict[str, Any], **options: Any) -> list[Tensor]:
    """Outputs, last state, and the gradients of a loss that weighs all of them differently."""
    leaves = {n: x.detach().clone().requires_grad_() for n, x in given.items() if _has_gradient(x)}
    y, state = kernel(**(given | leaves), form=form, **options)
    found = [y, *(state if isinstance(state, tuple) else [state])]
    loss = sum((x * _weights(x)).sum().to(torch.complex128 if x.is_complex() else torch.float64) for x in found)
    grads = torch.autograd.grad(loss.real if loss.is_complex() else loss, list(leaves.values()))
    return [x.detach() for x in [*found, *grads]]


def _has_gradient(x: Any) -> bool:
    return isinstance(x, Tensor) and (x.is_floating_point() or x.is_complex())


def _weights(x: Tensor) -> Tensor:
    return torch.linspace(-1, 1.5, x.numel(), dtype=torch.float64).reshape(x.shape).to(x.dtype)


def same(kernel: Any, given: dict[str, Any], scale: float = 1.0, **options: Any) -> None:
    for fast, loop in zip(run(kernel, "triton", given, **options), run(kernel, "loop", given, **options), strict=True):
        assert fast.dtype == loop.dtype
        fast, loop = (torch.view_as_real(x) if x.is_complex() else x for x in (fast, loop))
        close(fast, loop, scale)


class Draw:
    """Numbers and flags for one problem."""

    def __init__(self, batch: int, steps: int, dtype: torch.dtype, seed: int = 0):
        self.batch, self.steps, self.dtype = batch, steps, dtype
        self.random = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        wide = torch.complex128 if self.dtype.is_complex else torch.float64
        return torch.randn(shape, generator=self.random, dtype=wide).to(self.dtype)

    def over_time(self, *shape: int) -> Tensor:
        return self.normal(self.batch, self.steps, *shape)

    def flags(self, share: float) -> Tensor:
        return torch.rand(self.batch, self.steps, generator=self.random) < share


# linear_scan


def scan_problem(
    batch: int, steps: int, width: int, dtype: torch.dtype = torch.float64, share: float = 0.2
) -> dict[str, Any]:
    draw = Draw(batch, steps, dtype)
    given = {"a": 0.7 * draw.over_time(width), "u": draw.over_time(width), "h0": draw.normal(batch, width)}
    return given | {"reset": draw.flags(share) if share else None}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex128])
@pytest.mark.usefixtures("processors")
def test_linear_scan(size: tuple[int, int, int], share: float, dtype: torch.dtype) -> None:
    same(linear_scan, scan_problem(*size, dtype, share))


def test_linear_scan_of_expanded_and_turned_inputs() -> None:
    given = scan_problem(2, 9, 5)
    given["a"] = given["a"][:, :1].expand(2, 9, 5)
    given["u"] = given["u"].mT.contiguous().mT
    h, last = linear_scan(**given, form="triton")
    loop, last_loop = linear_scan(**given, form="loop")
    close(h, loop)
    close(last, last_loop)


def test_linear_scan_keeps_a_wide_state_between_narrow_numbers() -> None:
    given = scan_problem(2, 9, 5, torch.bfloat16) | {"h0": None}
    wide = {name: x.float() if _has_gradient(x) else x for name, x in given.items()}
    h, last = linear_scan(**given, form="triton")
    loop, last_loop = linear_scan(**wide, form="loop")
    assert h.dtype == torch.bfloat16
    close(last, last_loop)
    torch.testing.assert_close(h.float(), loop, rtol=2**-7, atol=1e-6)  # the interpreter rounds toward zero
    found = run(linear_scan, "triton", given)
    for one, two in zip(found[2:], run(linear_scan, "loop", given)[2:], strict=True):
        torch.testing.assert_close(one.float(), two.float(), rtol=2**-6, atol=2**-6)


@pytest.mark.filterwarnings("ignore:invalid value")
def test_linear_scan_forgets_what_is_not_finite_at_a_reset() -> None:
    given = scan_problem(1, 9, 5)
    given["reset"] = torch.arange(9)[None] == 6
    given["u"][0, 1, 0], given["u"][0, 2, 1], given["h0"][0, 2] = torch.inf, torch.nan, torch.nan
    found, loop = run(linear_scan, "triton", given), run(linear_scan, "loop", given)
    close(found[0][:, 6:], loop[0][:, 6:])
    close(found[1], loop[1])
    assert found[2][:, 6:].isfinite().all()


def test_linear_scan_of_nothing() -> None:
    given = scan_problem(2, 0, 5)
    h, last = linear_scan(**given, form="triton")
    assert h.shape == (2, 0, 5)
    close(last, given["h0"])


# gated_scan


def gate_problem(
    batch: int, steps: int, width: int, dtype: torch.dtype = torch.float64, resets: float = 0.2, masks: float = 0.3
) -> dict[str, Any]:
    draw = Draw(batch, steps, dtype)
    given = {name: draw.over_time(width) for name in ("x", "input_gate", "decay_gate")}
    given |= {"rate": draw.normal(width).abs(), "h0": draw.normal(batch, width), "first": draw.flags(0.2)}
    given["reset"] = draw.flags(resets) if resets else None
    given["mask"] = draw.flags(1 - masks) if masks else None
    return given


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("flags", [(0, 0), (0.2, 0), (0, 0.3), (0.2, 0.3)])
@pytest.mark.usefixtures("processors")
def test_gated_scan(size: tuple[int, int, int], flags: tuple[float, float]) -> None:
    same(gated_scan, gate_problem(*size, torch.float64, *flags))


def test_gated_scan_in_float32() -> None:
    # The root of a difference near 1 has fewer digits than its argument.
    same(gated_scan, gate_problem(2, 9, 5, torch.float32), scale=16)


@pytest.mark.parametrize("gate", [-100.0, 100.0])
@pytest.mark.parametrize("rate", [0.0, 1e-40, 100.0])
def test_gated_scan_at_the_limits_of_its_gates(gate: float, rate: float) -> None:
    given = gate_problem(1, 9, 2)
    given |= {name: torch.full_like(given[name], gate) for name in ("input_gate", "decay_gate")}
    given["rate"] = torch.full_like(given["rate"], rate)
    same(gated_scan, given)


def test_gated_scan_does_not_read_masked_steps() -> None:
    given = gate_problem(2, 9, 5)
    for name in ("x", "input_gate", "decay_gate"):
        given[name] = torch.where(given["mask"][..., None], given[name], torch.nan)
    assert all(x.isfinite().all() for x in run(gated_scan, "triton", given))


def test_gated_unit() -> None:
    draw = Draw(2, 9, torch.float64)
    given = {"x": draw.over_time(2, 6), "rate": draw.normal(6).abs(), "h0": draw.normal(2, 2, 6)}
    for gate in ("input", "decay"):
        given |= {f"{gate}_weight": draw.normal(2, 3, 3), f"{gate}_bias": draw.normal(2, 3)}
    same(gated_unit, given | {"first": draw.flags(0.2), "reset": draw.flags(0.2), "mask": draw.flags(0.7)})


# selective_scan


def selective_problem(
    batch: int, steps: int, channels: int, states: int, dtype: torch.dtype = torch.float64, flags: float = 0.25
) -> dict[str, Any]:
    draw = Draw(batch, steps, dtype)
    given = {"u": draw.over_time(channels), "dt": draw.over_time(channels).abs()}
    given |= {
        "A": -draw.normal(channels, states).exp(),
        "B": draw.over_time(states),
        "C": draw.over_time(states),
        "D": draw.normal(channels),
    }
    given |= {"h0": draw.normal(batch, channels, states)}
    return given | ({"reset": draw.flags(flags), "mask": draw.flags(1 - flags)} if flags else {})


@pytest.mark.parametrize("size", [(2, 9, 5, 2), (1, 1, 1, 1), (1, 18, 3, 3)])
@pytest.mark.parametrize("flags", [0.0, 0.25])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_selective_scan(size: tuple[int, int, int, int], flags: float, dtype: torch.dtype) -> None:
    same(selective_scan, selective_problem(*size, dtype, flags))


@pytest.mark.parametrize("length", [1e-30, 1e4])
def test_selective_scan_at_the_limits_of_its_steps(length: float) -> None:
    given = selective_problem(1, 9, 3, 2, torch.float32)
    given["dt"] = torch.full_like(given["dt"], length)
    same(selective_scan, given)


def test_selective_scan_does_not_read_masked_steps() -> None:
    given = selective_problem(2, 9, 5, 2)
    for name in ("u", "dt", "B", "C"):
        given[name] = torch.where(given["mask"][..., None], given[name], torch.nan)
    assert all(x.isfinite().all() for x in run(selective_scan, "triton", given))


# causal_conv


def conv_problem(
    batch: int, steps: int, width: int, taps: int, extra: tuple[int, ...] = (), flags: float = 0.3
) -> dict[str, Any]:
    draw = Draw(batch, steps, torch.float64)
    given = {"x": draw.over_time(*extra, width), "weight": draw.normal(taps, width), "bias": draw.normal(width)}
    given |= {"history": draw.normal(batch, taps - 1, *extra, width)}
    return given | ({"reset": draw.flags(flags), "mask": draw.flags(1 - flags)} if flags else {})


@pytest.mark.parametrize("size", [(2, 9, 5, 4), (1, 2, 3, 4), (2, 11, 1, 2), (1, 6, 2, 1)])
@pytest.mark.parametrize("flags", [0.0, 0.3, 0.7])
def test_causal_conv(size: tuple[int, int, int, int], flags: float) -> None:
    same(causal_conv, conv_problem(*size, (), flags))


@pytest.mark.parametrize("alone", ["reset", "mask", "bias", "extra"])
def test_causal_conv_with_parts_left_out(alone: str) -> None:
    given = conv_problem(2, 9, 3, 3, (2,) if alone == "extra" else ())
    left_out = set() if alone == "extra" else {"reset", "mask"} - {alone}
    same(causal_conv, {name: x for name, x in given.items() if name not in left_out})
    if alone == "bias":
        same(causal_conv, given | {"bias": None})


def test_causal_conv_does_not_read_masked_steps() -> None:
    given = conv_problem(2, 9, 5, 3)
    given["x"] = torch.where(given["mask"][..., None], given["x"], torch.nan)
    assert all(x.isfinite().all() for x in run(causal_conv, "triton", given))


# matrix_memory


def matrix_problem(
    batch: int, steps: int, heads: int, keys: int, values: int, dtype: torch.dtype = torch.float64, flags: float = 0.15
) -> dict[str, Any]:
    draw = Draw(batch, steps, dtype)
    given = {"q": draw.over_time(heads, keys), "k": draw.over_time(heads, keys), "v": draw.over_time(heads, values)}
    given |= {"log_input": 2 * draw.over_time(heads), "log_forget": -draw.over_time(heads).abs()}
    given |= {"C": draw.normal(batch, heads, keys, values), "n": draw.normal(batch, heads, keys)}
    given |= {"m": draw.normal(batch, heads)}
    return given | ({"reset": draw.flags(flags), "mask": draw.flags(1 - flags)} if flags else {})


def matrix(C: Tensor, n: Tensor, m: Tensor, **given: Any) -> Any:
    """matrix_memory with the state in three arguments."""
    return matrix_memory(**given, state=(C, n, m))


@pytest.mark.parametrize("size", [(2, 39, 2, 3, 5), (1, 1, 1, 1, 1), (1, 17, 1, 20, 18)])
@pytest.mark.parametrize("flags", [0.0, 0.15])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_matrix_memory(size: tuple[int, int, int, int, int], flags: float, dtype: torch.dtype) -> None:
    # What is divided by may be small beside what it is a difference of.
    same(matrix, matrix_problem(*size, dtype, flags), scale=16)


@pytest.mark.parametrize("closed", ["log_input", "log_forget"])
@pytest.mark.parametrize("value", [-torch.inf, -1e4, 1e4])
def test_matrix_memory_at_the_limits_of_its_gates(closed: str, value: float) -> None:
    given = matrix_problem(1, 20, 1, 2, 2, flags=0.1)
    some = torch.rand(given[closed].shape, generator=torch.Generator().manual_seed(2)) < 0.3
    given[closed] = torch.where(some, min(value, 0.0) if closed == "log_forget" else value, given[closed])
    same(matrix, given, scale=16)


def test_matrix_memory_does_not_read_masked_steps() -> None:
    given = matrix_problem(2, 20, 1, 2, 2)
    for name in ("q", "k", "v", "log_input", "log_forget"):
        mask = given["mask"].view(2, 20, *[1] * (given[name].ndim - 2))
        given[name] = torch.where(mask, given[name], torch.nan)
    assert all(x.isfinite().all() for x in run(matrix, "triton", given))


# scalar_memory


def scalar_problem(
    batch: int, steps: int, heads: int, size: int, dtype: torch.dtype = torch.float64, flags: float = 0.2
) -> dict[str, Any]:
    draw = Draw(batch, steps, dtype)
    given = {"pre": 2 * draw.over_time(4, heads, size), "recurrent": 0.5 * draw.normal(heads, size, 4, size)}
    given |= {part: draw.normal(batch, heads, size) for part in ("h", "c", "m")}
    given |= {"n": draw.normal(batch, heads, size).abs()}
    return given | ({"reset": draw.flags(flags), "mask": draw.flags(1 - flags)} if flags else {})


def scalar(h: Tensor, c: Tensor, n: Tensor, m: Tensor, **given: Any) -> Any:
    """scalar_memory with the state in four arguments."""
    return scalar_memory(**given, state=(h, c, n, m))


@pytest.mark.parametrize("size", [(2, 9, 2, 3), (1, 1, 1, 1), (1, 20, 1, 5)])
@pytest.mark.parametrize("flags", [0.0, 0.2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scalar_memory(size: tuple[int, int, int, int], flags: float, dtype: torch.dtype) -> None:
    same(scalar, scalar_problem(*size, dtype, flags))


@pytest.mark.parametrize("held", [0, 64])
def test_scalar_memory_from_a_fresh_state(held: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scalars, "HELD", held)
    given = scalar_problem(2, 6, 1, 2)
    same(scalar_memory, {name: given[name] for name in ("pre", "recurrent", "reset", "mask")})


@pytest.mark.parametrize("gate", range(4))
@pytest.mark.parametrize("value", [-1e3, 1e3])
def test_scalar_memory_at_the_limits_of_its_gates(gate: int, value: float) -> None:
    given = scalar_problem(1, 7, 1, 3)
    given["pre"][:, ::2, gate] = value
    same(scalar, given)


def test_scalar_memory_does_not_read_masked_steps() -> None:
    given = scalar_problem(2, 9, 1, 2)
    given["pre"] = torch.where(given["mask"][:, :, None, None, None], given["pre"], torch.nan)
    assert all(x.isfinite().all() for x in run(scalar, "triton", given))


# All of them


def test_without_the_interpreter_tensors_must_be_on_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pliant.kernels._triton._common.INTERPRETED", False)
    with pytest.raises(UsageError, match="CUDA device"):
        linear_scan(**scan_problem(1, 2, 1), form="triton")


def op_calls() -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Each operation with arguments."""
    real = {"dtype": torch.float32, "requires_grad": True}

    def ones(*shape: int) -> Tensor:
        return torch.full(shape, 0.5, **real)

    none, all_ = torch.zeros(2, 5, dtype=torch.bool), torch.ones(2, 5, dtype=torch.bool)
    x = [ones(2, 5, 3) for _ in range(4)]
    w = [ones(2, 5, 2) for _ in range(2)]
    tables = conv.tables(none, all_, 2)
    speed = torch.full((3,), -0.5, **real)
    q = [ones(2, 5, 1, 2) for _ in range(3)]
    g = [torch.full((2, 5, 1), -0.5, **real) for _ in range(2)]
    return {
        "linear_scan": (linear._op, (x[0], x[1], ones(2, 3), none)),
        "gated_scan": (gated._op, (*x[:3], speed, ones(2, 3), none, none, all_)),
        "selective_scan": (selective._op, (x[0], x[1], ones(3, 2), *w, ones(3), ones(2, 3, 2), none, all_)),
        "causal_conv": (conv._op, (x[0], ones(2, 3), ones(3), ones(2, 1, 3), *tables)),
        "stabilizer": (matrices._stabilizer, (*g, ones(2, 1), none, all_)),
        "matrix_memory": (matrices._op, (*q, *g, ones(2, 1, 2, 2), ones(2, 1, 2), all_, 16)),
        "scalar_memory": (scalars._op, (ones(2, 5, 4, 1, 2), ones(1, 2, 4, 2), ones(4, 2, 1, 2), none, all_, True)),
    }


@pytest.mark.global_rng
@pytest.mark.parametrize("name", list(op_calls()))
def test_the_custom_operations_keep_the_rules_of_torch(name: str) -> None:
    op, arguments = op_calls()[name]
    torch.library.opcheck(op, arguments)


def test_torch_compile_takes_the_forms_in_one_graph() -> None:
    given = scan_problem(2, 9, 5, torch.float32)
    compiled = torch.compile(lambda **x: linear_scan(**x, form="triton"), fullgraph=True, backend="aot_eager")
    for one, two in zip(compiled(**given), linear_scan(**given, form="loop"), strict=True):
        close(one, two)
