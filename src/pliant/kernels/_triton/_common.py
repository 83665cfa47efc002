"""What the kernels share: the operator of the scan, sizes of tiles, and calls."""

import os
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.core import UsageError

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether kernels run in Triton's interpreter, which takes tensors on the CPU."""


@triton.jit
def combine(a1, u1, a2, u2):  # type: ignore[no-untyped-def]
    """h -> a1 h + u1, then h -> a2 h + u2. A decay of 0 forgets, also what is not finite."""
    return a1 * a2, tl.where(a2 == 0, u2, a2 * u1 + u2)


@triton.jit
def combine_complex(a1, b1, u1, v1, a2, b2, u2, v2):  # type: ignore[no-untyped-def]
    """The same for the numbers a + ib and u + iv."""
    none = (a2 == 0) & (b2 == 0)
    u = tl.where(none, u2, a2 * u1 - b2 * v1 + u2)
    v = tl.where(none, v2, a2 * v1 + b2 * u1 + v2)
    return a1 * a2 - b1 * b2, a1 * b2 + b1 * a2, u, v


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """1 / (1 + exp(-x)), without overflow."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x < 0, e, 1) / (1 + e)


@triton.jit
def row(x, i, at):  # type: ignore[no-untyped-def]
    """The row of x `(L, D)` whose number i `(L, 1)` is `at`."""
    return tl.sum(tl.where(i == at, x, 0), 0)


@triton.jit
def flag(given, b, t, is_step, T, other: tl.constexpr):  # type: ignore[no-untyped-def]
    """The flag of steps t `(L, 1)`, false where there is no step; `other` where there are no flags."""
    if given is None:
        return is_step & other
    else:
        return tl.load(given + b * T + t, is_step, 0) != 0


def call(kernel: Any, programs: int, like: Tensor, *arguments: Any, **constants: Any) -> None:
    """Run so many programs of a kernel on the device of `like`."""
    if not (like.is_cuda or INTERPRETED):
        raise UsageError("the forms in Triton take tensors on a CUDA device; on a CPU, set TRITON_INTERPRET=1 and wait")
    with torch.cuda.device_of(like):
        kernel[(programs,)](*arguments, **constants)


def flags(x: Tensor | None) -> Tensor | None:
    """Flags as bytes."""
    return None if x is None else x.contiguous().view(torch.uint8)


def new(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for a tensor of that shape, in one piece."""
    return torch.empty_like(like, dtype=dtype, memory_format=torch.contiguous_format)


def power(size: int, most: int) -> int:
    """The power of two that a tile of at most `most` needs for so many elements."""
    return min(most, triton.next_power_of_2(max(1, size)))


@cache
def processors(device: torch.device) -> int:
    """Number of multiprocessors; 1 in the interpreter."""
    return 1 if device.type == "cpu" else torch.cuda.get_device_properties(device).multi_processor_count
