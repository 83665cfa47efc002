"""Scalar memory with exponential gates and recurrent weights: the cell of the sLSTM.

    ĩ, f̃, z̃, õ = pre_t + R h_{t-1}                         R mixes the units of a head
    l_t = log σ(f̃) + m_{t-1},  m_t = max(ĩ, l_t)            stabilizer
    i = exp(ĩ - m_t),  f = exp(l_t - m_t)
    c_t = f c_{t-1} + i tanh(z̃),  n_t = f n_{t-1} + i
    h_t = σ(õ) c_t / n_t

A unit is fresh while its n is zero: then m_t = ĩ, i = 1, f = 0, whatever m and c are. After its first
step n is at least 1, since i or f is 1, so nothing here is divided by zero.

Source: Beck et al. 2024, xLSTM, arXiv:2405.04517, section 2.2; lram-xlstm.md 2.3. Departure: the published
code looks for fresh units in the whole batch at once, so that a reset of one stream may give 0/0 there.
Cost: O(B T H K²) time, one step after the other; the backward pass keeps 8 numbers per unit and step.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from pliant.core import UsageError
from pliant.kernels._autocast import own_precision
from pliant.kernels._jit import jit_exact, over_slices
from pliant.kernels._math import exp, half, log1p_unit, one, sigmoid, tanh, zero
from pliant.kernels._operator import operator
from pliant.kernels.select import select


class ScalarMemory(NamedTuple):
    """Of every unit, each `(B, H, K)`: h its output, c its memory, n its normalizer, m its stabilizer."""

    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


@own_precision
def scalar_memory(
    pre: Float[Tensor, "B T 4 H K"],
    recurrent: Float[Tensor, "H K 4 K"],
    state: ScalarMemory | tuple[Tensor, Tensor, Tensor, Tensor] | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    form: str | None = None,
) -> tuple[Float[Tensor, "B T H K"], ScalarMemory]:
    """Run the cell along axis 1.

    Args:
        pre: what the input adds to the gates, `(B, T, 4, H, K)`, gates in the order i, f, z, o.
        recurrent: `(H, K, 4, K)`; gate g of unit j gets `sum_i h[i] recurrent[head, i, g, j]`.
        state: h, c, n, m before the first step, each `(B, H, K)`; None means zeros.
        reset: `(B, T)`, true where the state is dropped before the step; None means nowhere.
        mask: `(B, T)`, false where the step does not exist; h is zero there, and the state passes.
        form: `"loop"` (readable, any device), `"numba"` (CPU) or `"triton"` (CUDA); None chooses.

    Returns:
        h: `(B, T, H, K)` in the dtype of `pre`; the state after the last step in at least float32.

    Raises:
        UsageError: shapes do not fit.
    """
    _check(pre, recurrent, state, reset, mask)
    wide = torch.promote_types(torch.promote_types(pre.dtype, recurrent.dtype), torch.float32)
    batch, steps, _, heads, size = pre.shape
    if state is None:
        start = pre.new_zeros(4, batch, heads, size, dtype=wide)
    else:
        for part in state:
            wide = torch.promote_types(wide, part.dtype)
        start = torch.stack([part.to(wide) for part in state])
    forms = {"loop": _loop, "numba": _numba, "triton": _triton}
    # Exports are plain torch, and so is one step, which then costs no detour.
    plain = form is None and (steps <= 1 or torch.compiler.is_exporting())
    run = _loop if plain else select("scalar_memory", forms, pre, form)
    h, last = run(pre.to(wide), recurrent.to(wide), start, reset, mask)
    return h.to(pre.dtype), ScalarMemory(*last.unbind())


def memory_loop(
    pre: Tensor, recurrent: Tensor, state: ScalarMemory, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, ScalarMemory]:
    """The cell as it is written above; shapes as in `scalar_memory`."""
    hs = []
    for t in range(pre.shape[1]):
        if reset is not None:
            state = ScalarMemory(*(torch.where(reset[:, t, None, None], 0, part) for part in state))
        new = _step(pre[:, t], recurrent, state)
        h = new.h
        if mask is not None:
            exists = mask[:, t, None, None]
            h = torch.where(exists, h, 0)
            new = ScalarMemory(*(torch.where(exists, after, before) for after, before in zip(new, state, strict=True)))
        state = new
        hs.append(h)
    return (torch.stack(hs, 1) if hs else pre[:, :, 0]), state


def _step(pre: Tensor, recurrent: Tensor, state: ScalarMemory) -> ScalarMemory:
    i, f, z, o = (pre + torch.einsum("bhi,higj->bghj", state.h, recurrent)).unbind(1)
    fresh = state.n == 0
    log_f = F.logsigmoid(f) + state.m
    m = torch.where(fresh, i, torch.maximum(i, log_f))
    i, f = torch.exp(i - m), torch.where(fresh, 0, torch.exp(torch.where(fresh, 0, log_f - m)))
    c = torch.where(fresh, 0, f * state.c) + i * torch.tanh(z)
    n = f * state.n + i
    return ScalarMemory(torch.sigmoid(o) * c / n, c, n, m)


def _loop(
    pre: Tensor, recurrent: Tensor, start: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    # What stands in a step that does not exist must not reach a gradient either.
    pre = pre if mask is None else torch.where(mask[:, :, None, None, None], pre, 0)
    h, state = memory_loop(pre, recurrent, ScalarMemory(*start.unbind()), reset, mask)
    return h, torch.stack(state)


def _check(pre: Tensor, recurrent: Tensor, state: Any, reset: Tensor | None, mask: Tensor | None) -> None:
    if pre.ndim != 5 or pre.shape[2] != 4:
        raise UsageError(f"scalar_memory: pre is {tuple(pre.shape)}, expected (B, T, 4, H, K)")
    batch, steps, _, heads, size = pre.shape
    if recurrent.shape != (heads, size, 4, size):
        raise UsageError(
            f"scalar_memory: recurrent is {tuple(recurrent.shape)}, expected {(heads, size, 4, size)} as pre has"
        )
    if state is not None and [part.shape for part in state] != 4 * [(batch, heads, size)]:
        raise UsageError(f"scalar_memory: state must be h, c, n, m, each of shape {(batch, heads, size)}")
    for name, flag in (("reset", reset), ("mask", mask)):
        if flag is not None and (flag.shape != (batch, steps) or flag.dtype != torch.bool):
            raise UsageError(
                f"scalar_memory: {name} is {flag.dtype} {tuple(flag.shape)}, expected torch.bool {(batch, steps)}"
            )


# The fast form. Streams and heads share nothing, so a unit of work u is one head of one stream, heads first.

KEPT, LAST_H = 8, 7
"""What is kept of each step: i, f, tanh(z̃), σ(õ), σ(-f̃), and c, n, h before the step; the place of that h."""


@jit_exact
def _add_product(out, x, weight):  # type: ignore[no-untyped-def]
    """out[j] += sum_i x[i] weight[i, j], four i at a time, so that out is loaded and stored less often."""
    size, width = weight.shape
    i = 0
    while i + 4 <= size:
        a0, a1, a2, a3 = x[i], x[i + 1], x[i + 2], x[i + 3]
        w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
        for j in range(width):
            out[j] += a0 * w0[j] + a1 * w1[j] + a2 * w2[j] + a3 * w3[j]
        i += 4
    while i < size:
        a0, w0 = x[i], weight[i]
        for j in range(width):
            out[j] += a0 * w0[j]
        i += 1


@jit_exact
def _cell(raw, now, kept):  # type: ignore[no-untyped-def]
    """One step of one head: raw `(4, K)` -> now `(4, K)` and what is kept of it `(8, K)`."""
    for j in range(raw.shape[1]):
        i, f = raw[0, j], raw[1, j]
        c, n, m = now[1, j], now[2, j], now[3, j]
        fresh = n == zero(n)
        e = exp(-abs(f))
        # log σ(f), and σ(-f), which is its slope
        log_f = (f if f < zero(f) else zero(f)) - log1p_unit(e) + m
        closed = (one(f) if f < zero(f) else e) / (one(f) + e)
        top = i if fresh or i > log_f else log_f
        i = exp(i - top)
        f = zero(f) if fresh else exp(log_f - top)
        c = zero(c) if fresh else c
        z, o = tanh(raw[2, j]), sigmoid(raw[3, j])
        kept[0, j], kept[1, j], kept[2, j], kept[3, j], kept[4, j] = i, f, z, o, closed
        kept[5, j], kept[6, j], kept[7, j] = c, n, now[0, j]
        c = f * c + i * z
        n = f * n + i
        now[0, j], now[1, j], now[2, j], now[3, j] = o * c / n, c, n, top


@jit_exact
def _cell_back(kept, d, draw):  # type: ignore[no-untyped-def]
    """d `(4, K)`, gradients of h, c, n, m after the step, become those before it, h without what R adds."""
    for j in range(d.shape[1]):
        i, f, z, o, closed = kept[0, j], kept[1, j], kept[2, j], kept[3, j], kept[4, j]
        last_c, last_n = kept[5, j], kept[6, j]
        n = f * last_n + i
        ratio = (f * last_c + i * z) / n
        dh = d[0, j]
        dc = d[1, j] + dh * o / n
        dn = d[2, j] - dh * o * ratio / n
        from_i, from_f = i * (dc * z + dn), f * (dc * last_c + dn * last_n)
        # The stabilizer is the larger of two; at a tie each has half of its gradient.
        dm = d[3, j] - from_i - from_f
        share = half(i) if i == f else (one(i) if i > f else zero(i))
        dlog_f = from_f + (one(i) - share) * dm
        draw[0, j] = from_i + share * dm
        draw[1, j] = dlog_f * closed
        draw[2, j] = dc * i * (one(z) - z * z)
        draw[3, j] = dh * ratio * o * (one(o) - o)
        d[0, j], d[1, j], d[2, j], d[3, j] = zero(i), dc * f, dn * f, dlog_f


@jit_exact
def _forward(pre, recurrent, start, reset, mask, h, last, kept, u0, u1, d0, d1):  # type: ignore[no-untyped-def]
    batch, steps, _, _, size = pre.shape
    raw = np.empty((4, size), pre.dtype)
    now = np.empty((4, size), pre.dtype)
    for u in range(u0, u1):
        head, b = u // batch, u % batch
        weight = recurrent[head]
        for part in range(4):
            for j in range(size):
                now[part, j] = start[part, b, head, j]
        for t in range(steps):
            if reset[b, t]:
                now[:] = pre.dtype.type(0)
            # Where nothing is kept, one place is written over and over.
            place = kept[head, b, t % kept.shape[2]]
            if mask[b, t]:
                for part in range(4):
                    for j in range(size):
                        raw[part, j] = pre[b, t, part, head, j]
                _add_product(raw.reshape(4 * size), now[0], weight)
                _cell(raw, now, place)
                for j in range(size):
                    h[b, t, head, j] = now[0, j]
            else:
                place[:] = pre.dtype.type(0)
                for j in range(size):
                    h[b, t, head, j] = pre.dtype.type(0)
        for part in range(4):
            for j in range(size):
                last[part, b, head, j] = now[part, j]


@jit_exact
def _backward(kept, turned, reset, mask, grad_h, dpre, dstart, u0, u1, d0, d1):  # type: ignore[no-untyped-def]
    # dstart carries the gradient that flows back from step t + 1.
    _, batch, steps, _, size = kept.shape
    d = np.empty((4, size), kept.dtype)
    draw = np.empty((4, size), kept.dtype)
    for u in range(u0, u1):
        head, b = u // batch, u % batch
        for part in range(4):
            for j in range(size):
                d[part, j] = dstart[part, b, head, j]
        for t in range(steps - 1, -1, -1):
            if mask[b, t]:
                for j in range(size):
                    d[0, j] += grad_h[b, t, head, j]
                _cell_back(kept[head, b, t], d, draw)
                _add_product(d[0], draw.reshape(4 * size), turned[head])
            else:
                draw[:] = kept.dtype.type(0)
            for part in range(4):
                for j in range(size):
                    dpre[b, t, part, head, j] = draw[part, j]
            if reset[b, t]:
                d[:] = kept.dtype.type(0)
        for part in range(4):
            for j in range(size):
                dstart[part, b, head, j] = d[part, j]


def _flags(flag: Tensor | None, other: bool, batch: int, steps: int) -> np.ndarray:
    return np.full((batch, steps), other) if flag is None else _array(flag)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


@operator("pliant::scalar_memory")
def _memory(
    pre: Tensor, recurrent: Tensor, start: Tensor, reset: Tensor | None, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, _, heads, size = pre.shape
    h, last, kept = _outputs(pre, keep)
    arrays = [_array(pre), _array(recurrent).reshape(heads, size, 4 * size), _array(start)]
    arrays += [_flags(reset, False, batch, steps), _flags(mask, True, batch, steps), h.numpy(), last.numpy()]
    arrays.append(kept.numpy())
    over_slices(lambda *part: _forward(*arrays, *part), heads * batch, 1, steps * size * size)
    return h, last, kept


def _outputs(pre: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, _, heads, size = pre.shape
    return (
        pre.new_empty(batch, steps, heads, size),
        pre.new_empty(4, batch, heads, size),
        pre.new_empty(heads, batch, steps if keep else 1, KEPT, size),
    )


@operator("pliant::scalar_memory_backward")
@own_precision
def _memory_backward(
    kept: Tensor, recurrent: Tensor, reset: Tensor | None, mask: Tensor | None, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads, batch, steps, _, size = kept.shape
    dpre = kept.new_empty(batch, steps, 4, heads, size)
    dstart = grad_last.clone(memory_format=torch.contiguous_format)
    turned = _array(recurrent.permute(0, 2, 3, 1)).reshape(heads, 4 * size, size)
    arrays = [kept.numpy(), turned, _flags(reset, False, batch, steps), _flags(mask, True, batch, steps)]
    arrays += [_array(grad_h), dpre.numpy(), dstart.numpy()]
    over_slices(lambda *part: _backward(*arrays, *part), heads * batch, 1, steps * size * size)
    return dpre, torch.einsum("hbti,btghj->higj", kept[:, :, :, LAST_H], dpre).contiguous(), dstart


@_memory.register_fake
def _(
    pre: Tensor, recurrent: Tensor, start: Tensor, reset: Tensor | None, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(pre, keep)


@_memory_backward.register_fake
def _(
    kept: Tensor, recurrent: Tensor, reset: Tensor | None, mask: Tensor | None, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads, batch, steps, _, size = kept.shape
    return (
        kept.new_empty(batch, steps, 4, heads, size),
        torch.empty_like(recurrent, memory_format=torch.contiguous_format),
        torch.empty_like(grad_last, memory_format=torch.contiguous_format),
    )


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, recurrent, _, reset, mask, _ = inputs
    ctx.save_for_backward(output[2], recurrent, reset, mask)


def _gradients(ctx, grad_h: Tensor | None, grad_last: Tensor | None, _: Tensor | None):  # type: ignore[no-untyped-def]
    kept, recurrent, reset, mask = ctx.saved_tensors
    heads, batch, steps, _, size = kept.shape
    grad_h = kept.new_zeros(batch, steps, heads, size) if grad_h is None else grad_h
    grad_last = kept.new_zeros(4, batch, heads, size) if grad_last is None else grad_last
    return *_memory_backward(kept, recurrent, reset, mask, grad_h, grad_last), None, None, None


_memory.register_autograd(_gradients, setup_context=_keep)


def _numba(
    pre: Tensor, recurrent: Tensor, start: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (pre, recurrent, start))
    h, last, _ = _memory(pre, recurrent, start, reset, mask, keep)
    return h, last


def _triton(
    pre: Tensor, recurrent: Tensor, start: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    from pliant.kernels._triton.scalar_memory import run

    return run(pre, recurrent, start, reset, mask)
