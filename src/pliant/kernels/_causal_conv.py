"""Depthwise causal convolution with carried inputs, resets and masks.

    y_t = b + sum_{s=0}^{K-1} w[K-1-s] x_{t - s Δ},     row K-1 multiplies the current step, Δ is the dilation

Steps before the start, or before a reset, count as zero. Masked steps do not exist: the window
reaches over them to the step before.

Source: `Conv1D` of Griffin (De et al. 2024, arXiv:2402.19427, section 2.4), trecvit.md 2.3.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._jit import jit, jit_fast, over_slices
from pliant.kernels._operator import operator
from pliant.kernels.select import select

SMALL_CONV = 1 << 17
"""Elements below which sums in plain torch, of which there are a few, are as fast as anything."""
NOWHERE = -(1 << 40)
"""Where a tap reads what was dropped by a reset."""


def causal_conv(
    x: Float[Tensor, "B T *E D"],
    weight: Float[Tensor, "K D"],
    bias: Float[Tensor, "D"] | None = None,
    history: Float[Tensor, "B L *E D"] | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    dilation: int = 1,
    form: str | None = None,
) -> tuple[Float[Tensor, "B T *E D"], Float[Tensor, "B L *E D"]]:
    """Convolve each channel over time.

    Args:
        x: `(B, T, *E, D)`.
        weight: `(K, D)`; the last row belongs to the current step.
        bias: `(D,)`.
        history: the L = (K - 1) dilation inputs before this chunk, `(B, L, *E, D)`, oldest first; None means zeros.
        reset: `(B, T)`, true where what came before is dropped.
        mask: `(B, T)`, false where the step does not exist; y is zero there.
        dilation: existing steps from one tap to the next.
        form: `"loop"` (readable, any device), `"numba"` (CPU) or `"triton"` (CUDA); None chooses.

    Returns:
        y: `(B, T, *E, D)` in the dtype of `x`, and the history for the next chunk in at least float32.

    Raises:
        UsageError: dilation is not positive, or shapes do not fit.
    """
    _check(x, weight, bias, history, reset, mask, dilation)
    reach = (weight.shape[0] - 1) * dilation
    keep = torch.promote_types(x.dtype, torch.float32)
    if history is None:
        history = x.new_zeros(x.shape[0], reach, *x.shape[2:], dtype=keep)
    small = reset is None and mask is None and x.numel() < SMALL_CONV
    if form is None and (x.shape[1] <= 1 or torch.compiler.is_exporting() or (small and x.device.type == "cpu")):
        form = "loop"
    conv = select("causal_conv", {"loop": conv_loop, "numba": _conv_numba, "triton": _conv_triton}, x, form)
    return conv(x, weight, bias, history.to(keep), reset, mask, dilation)


def _check(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor | None, reset: Tensor | None, mask: Tensor | None,
    dilation: int,
) -> None:  # fmt: skip
    if x.ndim < 3 or weight.ndim != 2 or weight.shape[0] < 1 or dilation < 1:
        raise UsageError(
            f"causal_conv: x is {tuple(x.shape)}, weight {tuple(weight.shape)} and dilation {dilation}; "
            "expected (B, T, ..., D), (K, D) with at least one tap, and at least 1"
        )
    expected = {
        "weight": (weight, (weight.shape[0], x.shape[-1])),
        "bias": (bias, (x.shape[-1],)),
        "history": (history, (x.shape[0], (weight.shape[0] - 1) * dilation, *x.shape[2:])),
    }
    for name, (part, shape) in expected.items():
        if part is not None and part.shape != shape:
            raise UsageError(f"causal_conv: {name} is {tuple(part.shape)}, expected {shape} for x {tuple(x.shape)}")
    for name, flag in (("reset", reset), ("mask", mask)):
        if flag is not None and (flag.shape != x.shape[:2] or flag.dtype != torch.bool):
            raise UsageError(
                f"causal_conv: {name} is {flag.dtype} {tuple(flag.shape)}, expected torch.bool {tuple(x.shape[:2])}"
            )


def conv_loop(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, reset: Tensor | None, mask: Tensor | None,
    dilation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Sums over taps in plain torch; shapes as in `causal_conv`."""
    batch, steps = x.shape[:2]
    reach, keep = history.shape[1], history.dtype
    taps = list(zip(range(0, reach + 1, dilation), weight, strict=True))  # where each reads, and its row
    x = x if mask is None else _where(mask, x)  # not even their gradient may read masked steps
    padded = torch.cat([history.to(x.dtype), x], dim=1)
    if mask is None and reset is None:
        y = padded[:, :steps] * weight[0]
        for at, row in taps[1:]:
            y = y + padded[:, at : at + steps] * row
        return (y if bias is None else y + bias), padded[:, steps:].to(keep)

    # Episode of each step; what was carried belongs to episode 0.
    none = x.new_zeros(batch, steps, dtype=torch.bool)
    episode = (none if reset is None else reset).long().cumsum(1)
    last = episode[:, -1:] if steps else episode.new_zeros(batch, 1)
    end = torch.full_like(last, steps)
    if mask is not None:
        # Move the existing steps to the front, convolve there, and read each result back from its place.
        order = (~mask).long().argsort(dim=1, stable=True)
        place = mask.long().cumsum(1) - 1
        end = mask.long().sum(1, keepdim=True)
        padded = torch.cat([history.to(x.dtype), _pick(x, order)], dim=1)
        episode = episode.gather(1, order)
    episode = torch.cat([episode.new_zeros(batch, reach), episode], dim=1)
    now = episode[:, reach:]

    y = torch.zeros_like(x)
    for at, row in taps:
        same = episode[:, at : at + steps] == now
        y = y + _where(same, padded[:, at : at + steps]) * row
    y = y if bias is None else y + bias
    if mask is not None:
        y = _where(mask, _pick(y, place.clamp(min=0)))
    tail = end + torch.arange(reach, device=x.device)
    return y, _where(episode.gather(1, tail) == last, _pick(padded, tail)).to(keep)


def _stuffed(weight: Tensor, dilation: int) -> Tensor:
    """The same taps with zeros between them."""
    if dilation == 1:
        return weight
    stuffed = weight.new_zeros((len(weight) - 1) * dilation + 1, weight.shape[1])
    return stuffed.index_copy(0, torch.arange(len(weight), device=weight.device) * dilation, weight)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x `(B, T, ...)` at the steps `index` `(B, T')`."""
    shape = (*index.shape, *x.shape[2:])
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(shape))


def _where(flag: Tensor, x: Tensor) -> Tensor:
    """x where `flag` `(B, T)` holds, zero elsewhere, so that nothing non-finite gets through."""
    return torch.where(flag.reshape(*flag.shape, *[1] * (x.ndim - 2)), x, 0)


def _conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, reset: Tensor | None, mask: Tensor | None,
    dilation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from pliant.kernels._triton.causal_conv import run

    return run(x, _stuffed(weight, dilation), bias, history, reset, mask)


# The fast form. Rows of C = E D channels, of which a slice has `d0` to `d1`. What a step reads is named by where it
# stands: a step of x from 0 on, a row of the history from -1 down (the newest is -1), or NOWHERE.


@jit
def _sources(ring, at, taps, dilation, sources):  # type: ignore[no-untyped-def]
    """Places of the taps that are before the current step, oldest first, out of a ring whose oldest stands at `at`."""
    for k in range(taps - 1):
        sources[k] = ring[(at + k * dilation) % ring.shape[0]]


@jit
def _begin(ring):  # type: ignore[no-untyped-def]
    for i in range(ring.shape[0]):
        ring[i] = i - ring.shape[0]


@jit_fast
def _add(y, w, x):  # type: ignore[no-untyped-def]
    for d in range(y.shape[0]):
        y[d] += w[d] * x[d]


@jit_fast
def _add_back(dx, dw, w, x, g):  # type: ignore[no-untyped-def]
    for d in range(g.shape[0]):
        dx[d] += w[d] * g[d]
        dw[d] += x[d] * g[d]


@jit_fast
def _forward(x, weight, bias, history, reset, mask, dilation, y, last, b0, b1, d0, d1):  # type: ignore[no-untyped-def]
    steps, taps, reach = x.shape[1], weight.shape[0], history.shape[1]
    ring, sources = np.empty(max(1, reach), np.int64), np.empty(taps, np.int64)
    for b in range(b0, b1):
        _begin(ring)
        at = 0
        for t in range(steps):
            row = y[b, t, d0:d1]
            if reset[b, t]:
                ring[:] = NOWHERE
            if not mask[b, t]:
                row[:] = x.dtype.type(0)
                continue
            _sources(ring, at, taps, dilation, sources)
            sources[taps - 1] = t
            row[:] = bias[d0:d1]
            for k in range(taps):
                if sources[k] >= 0:
                    _add(row, weight[k, d0:d1], x[b, sources[k], d0:d1])
                elif sources[k] > NOWHERE:
                    _add(row, weight[k, d0:d1], history[b, reach + sources[k], d0:d1])
            if reach:
                ring[at] = t
                at = (at + 1) % reach
        for i in range(reach):
            source = ring[(at + i) % reach]
            if source >= 0:
                last[b, i, d0:d1] = x[b, source, d0:d1]
            elif source > NOWHERE:
                last[b, i, d0:d1] = history[b, reach + source, d0:d1]
            else:
                last[b, i, d0:d1] = x.dtype.type(0)


@jit_fast
def _backward(x, weight, history, reset, mask, dilation, grad_y, grad_last, dx, dweight, dbias, dhistory,  # type: ignore[no-untyped-def]
              b0, b1, d0, d1):  # fmt: skip
    steps, taps, reach = x.shape[1], weight.shape[0], history.shape[1]
    ring, sources, zero = np.empty(max(1, reach), np.int64), np.empty(taps, np.int64), x.dtype.type(0)
    for b in range(b0, b1):
        _begin(ring)
        at = 0
        dhistory[b, :, d0:d1] = zero
        dweight[b, :, d0:d1] = zero
        dbias[b, d0:d1] = zero
        for t in range(steps):
            dx[b, t, d0:d1] = zero
            if reset[b, t]:
                ring[:] = NOWHERE
            if not mask[b, t]:
                continue
            _sources(ring, at, taps, dilation, sources)
            sources[taps - 1] = t
            g = grad_y[b, t, d0:d1]
            dbias[b, d0:d1] += g
            for k in range(taps):
                n, w, dw = sources[k], weight[k, d0:d1], dweight[b, k, d0:d1]
                if n >= 0:
                    _add_back(dx[b, n, d0:d1], dw, w, x[b, n, d0:d1], g)
                elif n > NOWHERE:
                    _add_back(dhistory[b, reach + n, d0:d1], dw, w, history[b, reach + n, d0:d1], g)
            if reach:
                ring[at] = t
                at = (at + 1) % reach
        for i in range(reach):
            source = ring[(at + i) % reach]
            if source >= 0:
                dx[b, source, d0:d1] += grad_last[b, i, d0:d1]
            elif source > NOWHERE:
                dhistory[b, reach + source, d0:d1] += grad_last[b, i, d0:d1]


def _conv_numba(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, reset: Tensor | None, mask: Tensor | None,
    dilation: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    wide, copies = history.dtype, math.prod(x.shape[2:-1])
    bias = weight.new_zeros(weight.shape[1]) if bias is None else bias
    parts = (x.to(wide).flatten(2), weight.to(wide).repeat(1, copies), bias.to(wide).repeat(copies))
    y, last = _conv(*parts, history.flatten(2), reset, mask, dilation)
    return y.view(x.shape).to(x.dtype), last.view(history.shape)


@operator("pliant::causal_conv")
def _conv(
    x: Tensor, weight: Tensor, bias: Tensor, history: Tensor, reset: Tensor | None, mask: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor]:
    """x `(B, T, C)`, weight `(K, C)`, bias `(C,)`, history `(B, (K - 1) dilation, C)` -> y, the history after it."""
    y, last = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, history))
    arrays = [_array(part) for part in (x, weight, bias, history)]
    flags = _flags(reset, x, False), _flags(mask, x, True)
    over_slices(lambda *part: _forward(*arrays, *flags, dilation, y.numpy(), last.numpy(), *part),
                x.shape[0], x.shape[2], x.shape[1] * weight.shape[0])  # fmt: skip
    return y, last


@operator("pliant::causal_conv_backward")
def _conv_backward(
    x: Tensor, weight: Tensor, history: Tensor, reset: Tensor | None, mask: Tensor | None, dilation: int,
    grad_y: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, steps, width = x.shape
    dx, dhistory = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, history))
    dweight, dbias = x.new_empty(batch, *weight.shape), x.new_empty(batch, width)
    arrays = [_array(part) for part in (x, weight, history)]
    arrays += [_flags(reset, x, False), _flags(mask, x, True)]
    grads = [_array(grad_y), _array(grad_last), *(part.numpy() for part in (dx, dweight, dbias, dhistory))]
    over_slices(lambda *part: _backward(*arrays, dilation, *grads, *part), batch, width, steps * weight.shape[0])
    return dx, dweight.sum(0), dbias.sum(0), dhistory


def _flags(flag: Tensor | None, x: Tensor, other: bool) -> np.ndarray:
    return np.full(x.shape[:2], other) if flag is None else _array(flag)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


@_conv.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor, history: Tensor, reset: Tensor | None, mask: Tensor | None, dilation: int
) -> tuple[Tensor, Tensor]:
    y, last = (torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, history))
    return y, last


@_conv_backward.register_fake
def _(
    x: Tensor, weight: Tensor, history: Tensor, reset: Tensor | None, mask: Tensor | None, dilation: int,
    grad_y: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dweight, dhistory = (
        torch.empty_like(part, memory_format=torch.contiguous_format) for part in (x, weight, history)
    )
    return dx, dweight, x.new_empty(x.shape[2]), dhistory


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, _, history, reset, mask, ctx.dilation = inputs
    ctx.save_for_backward(x, weight, history, reset, mask)


def _gradients(ctx, grad_y: Tensor | None, grad_last: Tensor | None):  # type: ignore[no-untyped-def]
    x, weight, history, reset, mask = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_last = torch.zeros_like(history) if grad_last is None else grad_last
    found = _conv_backward(x, weight, history, reset, mask, ctx.dilation, grad_y, grad_last)
    return *found, None, None, None


_conv.register_autograd(_gradients, setup_context=_keep)
