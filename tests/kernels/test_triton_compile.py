"""The kernels in Triton compile for GPUs, where there is none: what the interpreter takes, the compiler may not.

Run by `make triton`. Compute capability 8.0 and 9.0; no program needs more shared memory than 8.6 and 8.9 have.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed; make triton installs it in an environment of its own")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("compiles, so the interpreter must be off", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from pliant.kernels._triton import causal_conv, gated_scan, linear_scan, matrix_memory, scalar_memory, selective_scan

POINTERS = {torch.float32: "*fp32", torch.float64: "*fp64", torch.bfloat16: "*bf16", torch.uint8: "*u8",
            torch.int64: "*i64"}  # fmt: skip
SHARED = 99 * 1024
FLAGS = torch.zeros(2, 512, dtype=torch.bool)


class Compiler:
    """Stands for `call`: compiles a kernel for these arguments, as they would be specialized, and runs nothing."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)
        self.kernels: dict[str, Any] = {}

    def __call__(self, kernel: Any, programs: int, like: Tensor, *arguments: Any, **constants: Any) -> None:
        assert programs > 0
        options = {name: constants.pop(name) for name in ("num_warps", "num_stages") if name in constants}
        signature, fixed, hints = {}, dict(constants), {}
        for place, (name, value) in enumerate(zip(kernel.arg_names, arguments)):
            if value is None or (isinstance(value, int) and value == 1):
                fixed[name] = value
                continue
            is_tensor = isinstance(value, Tensor)
            signature[name] = POINTERS[value.dtype] if is_tensor else "fp32" if isinstance(value, float) else "i32"
            if is_tensor or (isinstance(value, int) and value % 16 == 0):
                hints[(place,)] = [["tt.divisibility", 16]]
        signature |= dict.fromkeys(fixed, "constexpr")
        found = triton.compile(ASTSource(kernel, signature, fixed, hints), target=self.target, options=options)
        assert found.metadata.shared <= SHARED, f"{kernel.__name__} needs {found.metadata.shared} bytes"
        self.kernels[kernel.__name__] = found


@pytest.fixture(params=[80, 90])
def compiler(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Compiler:
    found = Compiler(request.param)
    for module in (linear_scan, gated_scan, selective_scan, causal_conv, matrix_memory, scalar_memory):
        monkeypatch.setattr(module, "call", found)
    monkeypatch.setattr(linear_scan, "processors", lambda _: 1)
    return found


def both_ways(module: Any, *inputs: Tensor | None) -> None:
    """Compile what the op calls forward and backward."""
    leaves = [x.requires_grad_() if x is not None and (x.is_floating_point() or x.is_complex()) else x for x in inputs]
    found = [x for x in module._op(*leaves) if x.requires_grad]
    wanted = [x for x in leaves if x is not None and x.requires_grad]
    torch.autograd.grad(found, wanted, [torch.ones_like(x) for x in found])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64])
@pytest.mark.parametrize("pieces", [False, True])
def test_linear_scan(compiler: Compiler, dtype: torch.dtype, pieces: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_scan, "processors", lambda _: 1000 if pieces else 1)
    a, u = (torch.ones(2, 512, 64, dtype=dtype) for _ in range(2))
    h0 = torch.ones(2, 64, dtype=torch.promote_types(dtype, torch.float32))
    both_ways(linear_scan, a, u, h0, FLAGS)
    assert set(compiler.kernels) == {"_forward", "_backward"} | ({"_reduce"} if pieces else set())
    # Loads are asynchronous, so that they do not wait for the state.
    assert all("cp.async" in kernel.asm["ptx"] for kernel in compiler.kernels.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [False, True])
def test_gated_scan(compiler: Compiler, dtype: torch.dtype, flags: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_scan, "processors", lambda _: 1000 if flags else 1)
    x, p, r = (torch.ones(2, 512, 64, dtype=dtype) for _ in range(3))
    given = (torch.ones(64), torch.ones(2, 64), FLAGS, *2 * [FLAGS if flags else None])
    both_ways(gated_scan, x, p, r, *given)
    assert "cp.async" in compiler.kernels["_forward"].asm["ptx"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [False, True])
def test_selective_scan(compiler: Compiler, dtype: torch.dtype, flags: bool) -> None:
    u, dt = (torch.ones(2, 512, 64, dtype=dtype) for _ in range(2))
    weights = [torch.ones(2, 512, 16, dtype=dtype) for _ in range(2)]
    given = (torch.ones(64, 16), *weights, torch.ones(64), torch.ones(2, 64, 16), *2 * [FLAGS if flags else None])
    both_ways(selective_scan, u, dt, *given)
    assert set(compiler.kernels) == {"_reduce", "_forward", "_backward"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("flags", [False, True])
def test_causal_conv(compiler: Compiler, dtype: torch.dtype, flags: bool) -> None:
    given = (torch.ones(2, 512, 64, dtype=dtype), torch.ones(4, 32), torch.ones(32), torch.ones(2, 3, 64))
    both_ways(causal_conv, *given, *(causal_conv.tables(FLAGS, ~FLAGS, 4) if flags else (None, None)))
    assert set(compiler.kernels) == {"_forward", "_back_inputs", "_back_weights"}


@pytest.mark.parametrize("flags", [False, True])
def test_matrix_memory(compiler: Compiler, flags: bool) -> None:
    q, k, v = (torch.ones(2, 512, 2, 64) for _ in range(3))
    gates = [torch.zeros(2, 512, 2) for _ in range(2)]
    state = matrix_memory.Memory(torch.ones(2, 2, 64, 64), torch.ones(2, 2, 64), torch.ones(2, 2))
    leaves = [x.requires_grad_() for x in (q, k, v, *gates, *state)]
    given = FLAGS if flags else None
    h, last = matrix_memory.run(*leaves[:5], matrix_memory.Memory(*leaves[5:]), given, given, 64, 1e-6)
    torch.autograd.grad((h, *last), leaves, [torch.ones_like(x) for x in (h, *last)])
    parts = {"_stabilize", "_reduce", "_carry", "_read", "_back_scores", "_back_keys", "_back_values"}
    assert parts <= set(compiler.kernels)


@pytest.mark.parametrize("size", [64, 128])
@pytest.mark.parametrize("flags", [False, True])
def test_scalar_memory(compiler: Compiler, size: int, flags: bool) -> None:
    given = (torch.ones(2, 512, 4, 2, size), torch.ones(2, size, 4, size), torch.ones(4, 2, 2, size))
    leaves = [x.requires_grad_() for x in given]
    found = scalar_memory.run(*leaves, *2 * [FLAGS if flags else None])
    torch.autograd.grad(found, leaves, [torch.ones_like(x) for x in found])
    assert set(compiler.kernels) == {"_forward", "_backward"}
