"""x Wᵀ for a few rows of x, as in single steps of a model: W is read once, at the speed of memory.

Products of matrices are made for many rows, and with three they are a few times slower than reading W. Four quarters
of W are read side by side, since one row after the other would wait for memory. Int8 weights are

    W ≈ w · scale,  scale[n] = max_k |W[n, k]| / 127,

one scale per output, and each row of x is rounded to whole numbers of 13 bits or more, so that what is lost is lost in
the weights, and sums of whole numbers are exact.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.kernels._jit import jit_fast, over_jobs

ROWS = 8
"""Rows up to which this is faster than `F.linear`."""

SMALL = 1 << 14
"""Entries of W below which `F.linear` takes no longer."""


LARGEST, HALF = 127, 32767  # of int8 and int16
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
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    return all(x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() for x in tensors)


def _share(kernel: Callable[..., None], arrays: tuple[np.ndarray, ...], weight: Tensor) -> None:
    """Threads have some of the outputs each."""
    over_jobs(lambda first, stop: kernel(*arrays, first, stop), -(-weight.shape[0] // 4), weight.numel())


@jit_fast
def _jobs(weight):  # type: ignore[no-untyped-def]
    """Outputs by four, which are far from each other."""
    return (weight.shape[0] + 3) // 4


@jit_fast
def _product(x, weight, y, first, stop):  # type: ignore[no-untyped-def]
    """y[:, n] = x weight[n] for n from `first` to `stop` in each quarter of the outputs, and what is left with 0."""
    quarter = weight.shape[0] // 4
    for n in range(first, min(stop, quarter)):
        m, o, p = n + quarter, n + 2 * quarter, n + 3 * quarter
        a, b, c, d = weight[n], weight[m], weight[o], weight[p]
        r = 0
        while r + 3 <= x.shape[0]:  # three rows of x for one load of the weights
            x0, x1, x2 = x[r], x[r + 1], x[r + 2]
            a0, a1, a2, b0, b1, b2, c0, c1, c2, d0, d1, d2 = F0, F0, F0, F0, F0, F0, F0, F0, F0, F0, F0, F0
            for k in range(x.shape[1]):
                s, t, u, v = a[k], b[k], c[k], d[k]
                a0 += s * x0[k]
                a1 += s * x1[k]
                a2 += s * x2[k]
                b0 += t * x0[k]
                b1 += t * x1[k]
                b2 += t * x2[k]
                c0 += u * x0[k]
                c1 += u * x1[k]
                c2 += u * x2[k]
                d0 += v * x0[k]
                d1 += v * x1[k]
                d2 += v * x2[k]
            y[r, n], y[r + 1, n], y[r + 2, n] = a0, a1, a2
            y[r, m], y[r + 1, m], y[r + 2, m] = b0, b1, b2
            y[r, o], y[r + 1, o], y[r + 2, o] = c0, c1, c2
            y[r, p], y[r + 1, p], y[r + 2, p] = d0, d1, d2
            r += 3
        while r < x.shape[0]:
            x0, a0, b0, c0, d0 = x[r], F0, F0, F0, F0
            for k in range(x.shape[1]):
                a0 += a[k] * x0[k]
                b0 += b[k] * x0[k]
                c0 += c[k] * x0[k]
                d0 += d[k] * x0[k]
            y[r, n], y[r, m], y[r, o], y[r, p] = a0, b0, c0, d0
            r += 1
    for n in range(4 * quarter, weight.shape[0] if first == 0 else 0):
        for r in range(x.shape[0]):
            a0 = F0
            for k in range(x.shape[1]):
                a0 += weight[n, k] * x[r, k]
            y[r, n] = a0


@jit_fast
def _product_int8(x, unit, weight, scale, y, first, stop):  # type: ignore[no-untyped-def]
    jobs = _jobs(weight)
    for job in range(first, stop):
        for n in range(job, weight.shape[0], jobs):
            for r in range(x.shape[0]):
                y[r, n] = _dot(x[r], weight[n]) * (scale[n] * unit[r])


@jit_fast
def _dot(x, weight):  # type: ignore[no-untyped-def]
    total = np.int32(0)
    for k in range(x.shape[0]):  # in 32 bits throughout, which Numba would not do by itself
        total = np.int32(total + np.int32(np.int32(weight[k]) * np.int32(x[k])))
    return np.float32(total)


@jit_fast
def _round(x, whole, unit):  # type: ignore[no-untyped-def]
    """Rows of x as whole numbers of `unit` each, so large that their products with int8 can be summed in 32 bits."""
    room = np.float32(min(HALF, (2**31 - 1) // (LARGEST * x.shape[1])))
    for r in range(x.shape[0]):
        top = TINY
        for k in range(x.shape[1]):
            top = max(top, abs(x[r, k]))
        unit[r] = top / room
        for k in range(x.shape[1]):
            whole[r, k] = np.int16(np.rint(x[r, k] * (room / top)))


@jit_fast
def project(x, weight, scale, y):  # type: ignore[no-untyped-def]
    """y `(R, N)` = x `(R, K)` Wᵀ, for kernels: W of float32, or of int8 with the `scale` of each row."""
    if weight.itemsize == 1:
        whole, unit = np.empty(x.shape, np.int16), np.empty(x.shape[0], np.float32)
        _round(x, whole, unit)
        _product_int8(whole, unit, weight, scale, y, 0, _jobs(weight))
    else:
        _product(x, weight, y, 0, _jobs(weight))
