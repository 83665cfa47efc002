"""Softmax of rows at an inverse temperature of each row, and the entropy by which that may be chosen.

    w_i = exp(β e_i) / Σ_j exp(β e_j),      H = -Σ_i p_i log p_i  with  p = w at β = 1,  in nats

With m = max e, l = Σ exp(e_i - m) and s = Σ exp(e_i - m)(e_i - m), one pass gives H = log l - s / l. Sums of parts of a
row are put together by scaling those with the lower m by the difference, as attention in blocks of keys does.
Entries of -inf are not there: they weigh nothing, and a row of nothing else has weights and an entropy of zero.

Backward, with x = e - m, g = dL/dw and c_i = w_i (g_i - Σ_j w_j g_j):

    dH/de_i = -p_i (x_i - s / l),       dL/de_i = β c_i,        dL/dβ = Σ_i c_i x_i

Paper: Veličković et al. 2024, softmax is not Enough (for Sharp Size Generalisation), arXiv:2410.01104, appendix on
attention in O(n) memory; adaptive-temperature.md 2.3. Departure: without the 1e-9 that its listing adds within log, by
which H would be lower by 1e-9 n at most.
"""

from collections.abc import Iterable
from functools import reduce
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._jit import jit_fast, over_jobs
from pliant.kernels._math import exp, zero
from pliant.kernels._operator import operator
from pliant.kernels.select import select

HIDDEN = float("-inf")


def row_entropy(logits: Tensor, form: str | None = None) -> Tensor:
    """H of each row in nats. `(..., N)`, float32 or float64 -> `(..., 1)`."""
    if logits.shape[-1] == 0:
        return logits.sum(-1, keepdim=True)
    top = _finite(logits.detach().amax(-1, keepdim=True))
    forms = {"loop": entropy_loop, "numba": lambda e, top: _entropy(e, top)[0]}
    return select("row_entropy", forms, logits, _small(logits, form))(logits, top)


def row_softmax(logits: Tensor, scale: Tensor, form: str | None = None) -> Tensor:
    """w of each row. logits `(..., N)`, float32 or float64; scale: β, `(..., 1)` or what broadcasts to it."""
    if logits.shape[-1] == 0:
        return logits
    forms = {"loop": softmax_loop, "numba": lambda e, scale: _softmax(e, scale.expand(*e.shape[:-1], 1))}
    return select("row_softmax", forms, logits, _small(logits, form))(logits, scale.to(logits.dtype))


def entropy_loop(logits: Tensor, top: Tensor) -> Tensor:
    """As written above; top `(..., 1)`: the largest of each row, 0 where there is none."""
    return _sums(logits, top).entropy()


def softmax_loop(logits: Tensor, scale: Tensor) -> Tensor:
    """As written above."""
    hidden = logits == HIDDEN
    # Less what is large before it is scaled, since a product of it would round away what tells entries apart.
    x = scale * torch.where(hidden, 0, logits - _finite(logits.detach().amax(-1, keepdim=True)))
    top = _finite(torch.where(hidden, HIDDEN, x.detach()).amax(-1, keepdim=True))
    share = torch.where(hidden, 0, (x - top).exp())
    return share / (share.sum(-1, keepdim=True) + hidden.all(-1, keepdim=True))


class _Sums(NamedTuple):
    """m, l and s of rows, `(..., 1)` each; l is 0 where nothing has come."""

    top: Tensor
    total: Tensor
    moment: Tensor

    def entropy(self) -> Tensor:
        total = self.total + (self.total == 0)
        return total.log() - self.moment / total


def _sums(logits: Tensor, top: Tensor) -> _Sums:
    hidden = logits == HIDDEN
    x = torch.where(hidden, 0, logits - top)
    share = torch.where(hidden, 0, x.exp())
    return _Sums(top, share.sum(-1, keepdim=True), (share * x).sum(-1, keepdim=True))


def _together(one: _Sums, two: _Sums) -> _Sums:
    """Those of two parts of a row. Σ exp(e - m')(e - m') = exp(m - m') (s + (m - m') l)."""
    top = torch.maximum(*(torch.where(part.total > 0, part.top, HIDDEN) for part in (one, two)))
    total, moment = torch.zeros_like(top), torch.zeros_like(top)
    for part in (one, two):
        down = torch.where(part.total > 0, part.top - top, 0)
        total = total + down.exp() * part.total
        moment = moment + down.exp() * (part.moment + down * part.total)
    return _Sums(_finite(top), total, moment)


def entropy_of_blocks(blocks: Iterable[Tensor]) -> Tensor:
    """H `(..., 1)` of rows that come in blocks `(..., n)`, which need not be there at the same time.

    m, l and s of what has come are all that is kept.

    Raises:
        UsageError: there are no blocks.
    """
    parts = (_sums(block, _finite(block.amax(-1, keepdim=True))) for block in blocks)
    try:
        return reduce(_together, parts).entropy()
    except TypeError:
        raise UsageError("entropy_of_blocks: there are no blocks") from None


def _finite(top: Tensor) -> Tensor:
    return torch.where(top == HIDDEN, 0, top)


def _small(logits: Tensor, form: str | None) -> str | None:
    """A single query, as in a step, is plain torch, so that it can be exported."""
    single = logits.ndim < 2 or logits.shape[-2] <= 1
    return "loop" if form is None and (single or torch.compiler.is_exporting()) else form


@jit_fast
def _entropy_rows(e, top, entropy, total, mean, r0, r1):  # type: ignore[no-untyped-def]
    for r in range(r0, r1):
        row, m = e[r], top[r]
        count, moment = zero(m), zero(m)
        for i in range(row.shape[0]):
            x = row[i] - m
            p = exp(x)
            count += p
            moment += p * (x if p != zero(x) else p)  # not 0 times -inf
        seen = count != zero(m)
        total[r] = count if seen else np.inf  # on the way back, so that nothing comes of it
        mean[r] = moment / count if seen else zero(m)
        entropy[r] = np.log(count) - mean[r] if seen else zero(m)


@jit_fast
def _entropy_slope(e, top, total, mean, g, d, r0, r1):  # type: ignore[no-untyped-def]
    for r in range(r0, r1):
        row, out, m, middle, by = e[r], d[r], top[r], mean[r], -g[r] / total[r]
        for i in range(row.shape[0]):
            x = row[i] - m
            p = exp(x)
            out[i] = by * p * (x - middle if p != zero(x) else p)


@jit_fast
def _softmax_rows(e, top, scale, w, r0, r1):  # type: ignore[no-untyped-def]
    for r in range(r0, r1):
        row, out, beta = e[r], w[r], scale[r]
        total = _positive(row, top[r], beta, out) if beta > zero(beta) else _any_sign(row, top[r], beta, out)
        if total != zero(total):
            total = 1 / total
            for i in range(row.shape[0]):
                out[i] *= total


@jit_fast
def _positive(row, m, beta, out):  # type: ignore[no-untyped-def]
    total = zero(m)
    for i in range(row.shape[0]):
        p = exp(beta * (row[i] - m))
        total += p
        out[i] = p
    return total


@jit_fast
def _any_sign(row, m, beta, out):  # type: ignore[no-untyped-def]
    # The rare case apart, since a condition within a loop keeps it from running on vectors.
    for i in range(row.shape[0]):
        if row[i] != -np.inf and row[i] < m:
            m = row[i]
    total = zero(m)
    for i in range(row.shape[0]):
        p = exp(beta * (row[i] - m)) if row[i] != -np.inf else zero(m)
        total += p
        out[i] = p
    return total


@jit_fast
def _softmax_slope(e, scale, w, g, d, ds, r0, r1):  # type: ignore[no-untyped-def]
    for r in range(r0, r1):
        row, weight, slope, out, beta = e[r], w[r], g[r], d[r], scale[r]
        mean, by = zero(beta), zero(beta)
        for i in range(row.shape[0]):
            mean += weight[i] * slope[i]
        for i in range(row.shape[0]):
            c = weight[i] * (slope[i] - mean)
            by += c * (row[i] if weight[i] != zero(c) else c)
            out[i] = beta * c
        ds[r] = by


def _rows(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(-1, x.shape[-1]).numpy()


def _column(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().view(-1).numpy()


@operator("pliant::row_entropy")
def _entropy(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    found = tuple(torch.empty_like(top, memory_format=torch.contiguous_format) for _ in range(3))
    arrays = [_rows(logits), _column(top), *map(_column, found)]
    over_jobs(lambda r0, r1: _entropy_rows(*arrays, r0, r1), top.numel(), logits.numel())
    return found[0], found[1], found[2]


@operator("pliant::row_entropy_backward")
def _entropy_backward(logits: Tensor, top: Tensor, total: Tensor, mean: Tensor, grad: Tensor) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    arrays = [_rows(logits), *map(_column, (top, total, mean, grad)), _rows(out)]
    over_jobs(lambda r0, r1: _entropy_slope(*arrays, r0, r1), top.numel(), logits.numel())
    return out


@operator("pliant::row_softmax")
def _softmax(logits: Tensor, scale: Tensor) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    arrays = [_rows(logits), _column(_finite(logits.amax(-1))), _column(scale), _rows(out)]
    over_jobs(lambda r0, r1: _softmax_rows(*arrays, r0, r1), scale.numel(), logits.numel())
    return out


@operator("pliant::row_softmax_backward")
def _softmax_backward(logits: Tensor, scale: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    by = torch.empty_like(scale, memory_format=torch.contiguous_format)
    arrays = [_rows(logits), _column(scale), _rows(weights), _rows(grad), _rows(out), _column(by)]
    over_jobs(lambda r0, r1: _softmax_slope(*arrays, r0, r1), scale.numel(), logits.numel())
    return out, by


@_entropy.register_fake
def _(logits: Tensor, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    one, two, three = (torch.empty_like(top, memory_format=torch.contiguous_format) for _ in range(3))
    return one, two, three


@_entropy_backward.register_fake
def _(logits: Tensor, top: Tensor, total: Tensor, mean: Tensor, grad: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_softmax.register_fake
def _(logits: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@_softmax_backward.register_fake
def _(logits: Tensor, scale: Tensor, weights: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
    contiguous = torch.contiguous_format
    return torch.empty_like(logits, memory_format=contiguous), torch.empty_like(scale, memory_format=contiguous)


def _keep_entropy(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[1], output[2])


def _entropy_gradients(ctx, grad: Tensor, *_: Tensor):  # type: ignore[no-untyped-def]
    return _entropy_backward(*ctx.saved_tensors, grad), None


def _keep_softmax(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output)


def _softmax_gradients(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return _softmax_backward(*ctx.saved_tensors, grad)


_entropy.register_autograd(_entropy_gradients, setup_context=_keep_entropy)
_softmax.register_autograd(_softmax_gradients, setup_context=_keep_softmax)
