"""x Wᵀ for a few rows of x, as in single steps of a model: W is read once, at the speed of memory.

Products of matrices are made for many rows, and with three they are a few times slower than reading W. Three thirds
of W are read side by side, since one row after the other would wait for memory. Int8 weights are

    W ≈ w · scale,  scale[n] = max_k |W[n, k]| / 127,

one scale per output, and each row of x is rounded to whole numbers of 13 bits or more, so that what is lost is lost in
the weights, and sums of whole numbers are exact. Processors multiply whole numbers of 16 bits and add pairs of products
in one instruction, which compilers find only where the pairs are written out.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from llvmlite import ir  # type: ignore[import-untyped]
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from torch import Tensor
from torch.nn import functional as F

from pliant.kernels._jit import jit_fast, over_jobs
from pliant.kernels._math import float_of_bits, rint
from pliant.kernels._operator import transformed

ROWS = 8
"""Rows up to which this is faster than `F.linear`."""

SMALL = 1 << 14
"""Entries of W below which `F.linear` takes no longer."""


AT_ONCE = 64
"""Products of whole numbers in one go, in a few registers."""

LARGEST, HALF = 127, 32767  # of int8 and int16
MAGNITUDE = np.int32(2**31 - 1)  # all bits of a float32 but its sign
F0, TINY = np.float32(0), np.float32(1e-30)
"""Stands for the largest entry of a row of zeros."""


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`, faster for a few rows in inference on a CPU. x `(..., K)`, weight `(N, K)`."""
    if weight.numel() < SMALL or not 0 < x.numel() <= ROWS * x.shape[-1] or not plain(x, weight):
        return F.linear(x, weight, bias)
    y = torch.empty(*x.shape[:-1], weight.shape[0])
    arrays = x.view(-1, x.shape[-1]).numpy(), weight.detach().numpy(), y.view(-1, weight.shape[0]).numpy()
    _share(_product, arrays, weight)
    return y if bias is None else y.add_(bias)


def linear_int8(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ with W ≈ weight · scale; weight `(N, K)` int8, scale `(N,)`. Without gradients in W."""
    if not 0 < x.numel() <= ROWS * x.shape[-1] or not plain(x, scale):
        return F.linear(x, weight.to(x.dtype) * scale[:, None].to(x.dtype), bias)
    rows = x.view(-1, x.shape[-1]).numpy()
    whole, unit = np.empty(rows.shape, np.int16), np.empty(rows.shape[0], np.float32)
    _round(rows, whole, unit)
    y = torch.empty(*x.shape[:-1], weight.shape[0])
    arrays = whole, unit, weight.numpy(), scale.numpy(), y.view(-1, weight.shape[0]).numpy()
    _share(_product_int8, arrays, weight)
    return y if bias is None else y.add_(bias)


def to_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """W `(N, K)` as int8 `(N, K)` and the scale of each row, `(N,)` float32."""
    scale = weight.detach().float().abs().amax(1).clamp_(min=float(TINY)).div_(LARGEST)
    return torch.round(weight.detach().float() / scale[:, None]).to(torch.int8), scale


def plain(*tensors: Tensor) -> bool:
    """Whether these are float32 on the CPU, and nobody asks for gradients, traces, or has another dtype in mind."""
    if transformed() or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() for x in tensors)


def _share(kernel: Callable[..., None], arrays: tuple[np.ndarray, ...], weight: Tensor) -> None:
    """Threads have some of the outputs each."""
    over_jobs(lambda first, stop: kernel(*arrays, first, stop), -(-weight.shape[0] // 3), weight.numel())


@jit_fast
def _jobs(weight):  # type: ignore[no-untyped-def]
    """Outputs by three, which are far from each other."""
    return (weight.shape[0] + 2) // 3


@jit_fast
def _product(x, weight, y, first, stop):  # type: ignore[no-untyped-def]
    """y[:, n] = x weight[n] for n from `first` to `stop` in each third of the outputs, and what is left with 0."""
    third = weight.shape[0] // 3
    for n in range(first, min(stop, third)):
        m, o = n + third, n + 2 * third
        a, b, c = weight[n], weight[m], weight[o]
        r = 0
        while r + 3 <= x.shape[0]:  # three rows of x for one load of the weights
            x0, x1, x2 = x[r], x[r + 1], x[r + 2]
            a0, a1, a2, b0, b1, b2, c0, c1, c2 = F0, F0, F0, F0, F0, F0, F0, F0, F0
            for k in range(x.shape[1]):
                s, t, u = a[k], b[k], c[k]
                a0 += s * x0[k]
                a1 += s * x1[k]
                a2 += s * x2[k]
                b0 += t * x0[k]
                b1 += t * x1[k]
                b2 += t * x2[k]
                c0 += u * x0[k]
                c1 += u * x1[k]
                c2 += u * x2[k]
            y[r, n], y[r + 1, n], y[r + 2, n] = a0, a1, a2
            y[r, m], y[r + 1, m], y[r + 2, m] = b0, b1, b2
            y[r, o], y[r + 1, o], y[r + 2, o] = c0, c1, c2
            r += 3
        while r < x.shape[0]:
            x0, a0, b0, c0 = x[r], F0, F0, F0
            for k in range(x.shape[1]):
                a0 += a[k] * x0[k]
                b0 += b[k] * x0[k]
                c0 += c[k] * x0[k]
            y[r, n], y[r, m], y[r, o] = a0, b0, c0
            r += 1
    for n in range(3 * third, weight.shape[0] if first == 0 else 0):
        for r in range(x.shape[0]):
            a0 = F0
            for k in range(x.shape[1]):
                a0 += weight[n, k] * x[r, k]
            y[r, n] = a0


@jit_fast
def _product_int8(x, unit, weight, scale, y, first, stop):  # type: ignore[no-untyped-def]
    done = x.shape[1] // AT_ONCE * AT_ONCE
    for n in range(3 * first, min(3 * stop, weight.shape[0])):
        for r in range(x.shape[0]):
            total = _dot_whole(x[r], weight[n])
            if done < x.shape[1]:
                total = np.int32(total + _dot(x[r, done:], weight[n, done:]))
            y[r, n] = np.float32(total) * (scale[n] * unit[r])


@jit_fast
def _dot(x, weight):  # type: ignore[no-untyped-def]
    total = np.int32(0)
    for k in range(x.shape[0]):  # in 32 bits throughout, which Numba would not do by itself
        total = np.int32(total + np.int32(np.int32(weight[k]) * np.int32(x[k])))
    return total


def _dot_by_pairs(typing: Any, x: Any, weight: Any) -> Any:
    """Σ x[k] weight[k] in 32 bits, of two rows of whole numbers, without what exceeds a multiple of `AT_ONCE`."""

    def code(context: Any, builder: Any, signature: Any, given: Any) -> Any:
        rows = [
            context.make_array(kind)(context, builder, row) for kind, row in zip(signature.args, given, strict=True)
        ]
        index, whole = ir.IntType(64), ir.IntType(32)
        products, pairs = ir.VectorType(whole, AT_ONCE), ir.VectorType(whole, AT_ONCE // 2)
        total = cgutils.alloca_once_value(builder, ir.Constant(pairs, [0] * pairs.count))
        with cgutils.for_range(builder, builder.udiv(rows[0].nitems, index(AT_ONCE))) as loop:
            numbers = []
            for row in rows:
                part = ir.VectorType(row.data.type.pointee, AT_ONCE).as_pointer()
                place = builder.gep(row.data, [builder.mul(loop.index, index(AT_ONCE))])
                numbers.append(builder.sext(builder.load(builder.bitcast(place, part), align=1), products))
            product = builder.mul(*numbers)
            both = [_some_of(builder, product, range(first, AT_ONCE, 2)) for first in (0, 1)]
            builder.store(builder.add(builder.load(total), builder.add(*both)), total)
        left = builder.load(total)
        while (half := left.type.count // 2) > 0:
            left = builder.add(*(_some_of(builder, left, range(at, at + half)) for at in (0, half)))
        return builder.extract_element(left, whole(0))

    return types.int32(x, weight), code


def _some_of(builder: Any, vector: Any, places: range) -> Any:
    chosen = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), list(places))
    return builder.shuffle_vector(vector, ir.Constant(vector.type, ir.Undefined), chosen)


_dot_whole: Any = intrinsic(inspect.unwrap(_dot_by_pairs))


@jit_fast
def _round(x, whole, unit):  # type: ignore[no-untyped-def]
    """Rows of x as whole numbers of `unit` each, so large that their products with int8 can be summed in 32 bits."""
    room = np.float32(min(HALF, (2**31 - 1) // (LARGEST * x.shape[1])))
    for r in range(x.shape[0]):
        # Floats without their sign are ordered as their bits are, NaN last, and of bits the maximum runs on vectors.
        bits, top = x[r].view(np.int32), np.int32(0)
        for k in range(x.shape[1]):
            top = max(top, np.int32(bits[k] & MAGNITUDE))
        largest = max(float_of_bits(top), TINY)
        unit[r] = largest / room
        for k in range(x.shape[1]):
            whole[r, k] = np.int16(rint(x[r, k] * (room / largest)))


def project(x: np.ndarray, weight: np.ndarray, scale: np.ndarray, y: np.ndarray) -> None:
    """y `(R, N)` = x `(R, K)` Wᵀ, for kernels: W of float32, or of int8 with the `scale` of each row."""
    raise NotImplementedError("within kernels only")


def _project_by_type(x, weight, scale, y):  # type: ignore[no-untyped-def]
    def floats(x, weight, scale, y):  # type: ignore[no-untyped-def]
        _product(x, weight, y, 0, _jobs(weight))

    def whole(x, weight, scale, y):  # type: ignore[no-untyped-def]
        rounded, unit = np.empty(x.shape, np.int16), np.empty(x.shape[0], np.float32)
        _round(x, rounded, unit)
        _product_int8(rounded, unit, weight, scale, y, 0, _jobs(weight))

    return inspect.unwrap(whole if weight.dtype == types.int8 else floats)


overload(project)(inspect.unwrap(_project_by_type))
