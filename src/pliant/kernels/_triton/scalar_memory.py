"""The scalar memory of `_scalar_memory`: steps wait for each other, so what counts is how long one takes.

A program takes one head of one stream through all steps. Its state and, for heads of up to `HELD` units, its weights
stay in registers all the while; the weights of wider heads come from the cache. Backward in the same way from what
was kept of each step; the gradient of the weights is one product at the end.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels._autocast import own_precision
from pliant.kernels._scalar_memory import KEPT, LAST_H, _loop
from pliant.kernels._triton._common import call, flags, new, power, sigmoid

HELD, WIDEST = 64, 128
"""Units of a head whose weights fit into the registers of 8 warps, and those of which one gate's do."""


@triton.jit
def _is(given, b, t, T, other: tl.constexpr):  # type: ignore[no-untyped-def]
    """The flag of a step."""
    if given is None:
        return other
    else:
        return tl.load(given + b * T + t) != 0


@triton.jit
def _log1p(e):  # type: ignore[no-untyped-def]
    """log(1 + e) for e >= 0; what is lost in 1 + e is made up for."""
    w = 1 + e
    d = tl.where(w == 1, 1, w - 1)
    return tl.where(w == 1, e, tl.log(w) * (e / d))


@triton.jit
def _tanh(z):  # type: ignore[no-untyped-def]
    e = tl.exp(-2 * tl.abs(z))
    return tl.where(z < 0, -1, 1) * (1 - e) / (1 + e)


@triton.jit
def _weights(recurrent, head, g: tl.constexpr, K, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Weights of gate g at [i, j]."""
    i, j = tl.arange(0, SIZE)[:, None], tl.arange(0, SIZE)[None, :]
    return tl.load(recurrent + ((head * K + i) * 4 + g) * K + j, (i < K) & (j < K), 0)


@triton.jit
def _place(batch, H, K, SIZE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Head, stream, place in a state `(B, H, K)`, and which units there are."""
    head, b = tl.program_id(0) // batch, (tl.program_id(0) % batch).to(tl.int64)  # offsets may exceed 2^31
    j = tl.arange(0, SIZE)
    return head, b, (b * H + head) * K + j, j < K


@triton.jit
def _forward(pre, recurrent, start, reset, mask, y, last, kept, T, batch, H, K,  # type: ignore[no-untyped-def]
             KEEP: tl.constexpr, HOLD: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    head, b, at, inside = _place(batch, H, K, SIZE)
    j = tl.arange(0, SIZE)
    part = batch * H * K
    h, c = tl.load(start + at, inside, 0), tl.load(start + part + at, inside, 0)
    n, m = tl.load(start + 2 * part + at, inside, 0), tl.load(start + 3 * part + at, inside, 0)
    if HOLD:
        wi, wf = _weights(recurrent, head, 0, K, SIZE), _weights(recurrent, head, 1, K, SIZE)
        wz, wo = _weights(recurrent, head, 2, K, SIZE), _weights(recurrent, head, 3, K, SIZE)
    for t in range(T):
        exists = _is(mask, b, t, T, True)
        if reset is not None:
            drop = _is(reset, b, t, T, False)
            h, c, n, m = tl.where(drop, 0, h), tl.where(drop, 0, c), tl.where(drop, 0, n), tl.where(drop, 0, m)
        here = pre + (b * T + t) * 4 * H * K + head * K + j
        read = inside & exists
        i, f = tl.load(here, read, 0), tl.load(here + H * K, read, 0)
        z, o = tl.load(here + 2 * H * K, read, 0), tl.load(here + 3 * H * K, read, 0)
        if not HOLD:
            wi, wf = _weights(recurrent, head, 0, K, SIZE), _weights(recurrent, head, 1, K, SIZE)
            wz, wo = _weights(recurrent, head, 2, K, SIZE), _weights(recurrent, head, 3, K, SIZE)
        i += tl.sum(h[:, None] * wi, 0)
        f += tl.sum(h[:, None] * wf, 0)
        z += tl.sum(h[:, None] * wz, 0)
        o += tl.sum(h[:, None] * wo, 0)
        fresh = n == 0
        e = tl.exp(-tl.abs(f))
        log_f = tl.minimum(f, 0) - _log1p(e) + m
        closed = tl.where(f < 0, 1, e) / (1 + e)  # σ(-f), the slope of log σ(f)
        top = tl.where(fresh, i, tl.maximum(i, log_f))
        i = tl.exp(i - top)
        f = tl.where(fresh, 0, tl.exp(tl.where(fresh, 0, log_f - top)))
        z, o, old_c = _tanh(z), sigmoid(o), tl.where(fresh, 0, c)
        if KEEP:
            to = kept + ((head * batch + b) * T + t) * 8 * K + j
            tl.store(to, i, inside)
            tl.store(to + K, f, inside)
            tl.store(to + 2 * K, z, inside)
            tl.store(to + 3 * K, o, inside)
            tl.store(to + 4 * K, closed, inside)
            tl.store(to + 5 * K, old_c, inside)
            tl.store(to + 6 * K, n, inside)
            tl.store(to + 7 * K, h, inside)
        new_c, new_n = f * old_c + i * z, f * n + i
        out = o * new_c / new_n
        tl.store(y + ((b * T + t) * H + head) * K + j, tl.where(exists, out, 0), inside)
        h, c = tl.where(exists, out, h), tl.where(exists, new_c, c)
        n, m = tl.where(exists, new_n, n), tl.where(exists, top, m)
    tl.store(last + at, h, inside)
    tl.store(last + part + at, c, inside)
    tl.store(last + 2 * part + at, n, inside)
    tl.store(last + 3 * part + at, m, inside)


@triton.jit
def _backward(kept, recurrent, reset, mask, dy, dlast, dpre, dstart, T, batch, H, K,  # type: ignore[no-untyped-def]
              HOLD: tl.constexpr, SIZE: tl.constexpr):  # fmt: skip
    head, b, at, inside = _place(batch, H, K, SIZE)
    j = tl.arange(0, SIZE)
    part = batch * H * K
    dh, dc = tl.load(dlast + at, inside, 0), tl.load(dlast + part + at, inside, 0)
    dn, dm = tl.load(dlast + 2 * part + at, inside, 0), tl.load(dlast + 3 * part + at, inside, 0)
    if HOLD:
        wi, wf = _weights(recurrent, head, 0, K, SIZE), _weights(recurrent, head, 1, K, SIZE)
        wz, wo = _weights(recurrent, head, 2, K, SIZE), _weights(recurrent, head, 3, K, SIZE)
    for back in range(T):
        t = T - 1 - back
        exists = _is(mask, b, t, T, True)
        here = kept + ((head * batch + b) * T + t) * 8 * K + j
        # What is no unit divides by 1 below.
        i, f = tl.load(here, inside, 1), tl.load(here + K, inside, 0)
        z, o = tl.load(here + 2 * K, inside, 0), tl.load(here + 3 * K, inside, 0)
        closed, old_c = tl.load(here + 4 * K, inside, 0), tl.load(here + 5 * K, inside, 0)
        old_n = tl.load(here + 6 * K, inside, 0)
        g = dh + tl.load(dy + ((b * T + t) * H + head) * K + j, inside & exists, 0)
        n = f * old_n + i
        ratio = (f * old_c + i * z) / n
        to_c, to_n = dc + g * o / n, dn - g * o * ratio / n
        from_i, from_f = i * (to_c * z + to_n), f * (to_c * old_c + to_n * old_n)
        # The stabilizer is the larger of two; at a tie each has half of its gradient.
        top = dm - from_i - from_f
        share = tl.where(i == f, 0.5, tl.where(i > f, 1.0, 0.0))
        to_log_f = from_f + (1 - share) * top
        di, df = tl.where(exists, from_i + share * top, 0), tl.where(exists, to_log_f * closed, 0)
        dz, do = tl.where(exists, to_c * i * (1 - z * z), 0), tl.where(exists, g * ratio * o * (1 - o), 0)
        to = dpre + (b * T + t) * 4 * H * K + head * K + j
        tl.store(to, di, inside)
        tl.store(to + H * K, df, inside)
        tl.store(to + 2 * H * K, dz, inside)
        tl.store(to + 3 * H * K, do, inside)
        if not HOLD:
            wi, wf = _weights(recurrent, head, 0, K, SIZE), _weights(recurrent, head, 1, K, SIZE)
            wz, wo = _weights(recurrent, head, 2, K, SIZE), _weights(recurrent, head, 3, K, SIZE)
        before = tl.sum(wi * di[None, :] + wf * df[None, :] + wz * dz[None, :] + wo * do[None, :], 1)
        dh, dc = tl.where(exists, before, dh), tl.where(exists, to_c * f, dc)
        dn, dm = tl.where(exists, to_n * f, dn), tl.where(exists, to_log_f, dm)
        if reset is not None:
            drop = _is(reset, b, t, T, False)
            dh, dc, dn, dm = tl.where(drop, 0, dh), tl.where(drop, 0, dc), tl.where(drop, 0, dn), tl.where(drop, 0, dm)
    tl.store(dstart + at, dh, inside)
    tl.store(dstart + part + at, dc, inside)
    tl.store(dstart + 2 * part + at, dn, inside)
    tl.store(dstart + 3 * part + at, dm, inside)


def _how(size: int) -> dict[str, int]:
    warps = 4 if size <= 32 else 8 if size <= 64 else 16  # for the registers that the weights need
    return {"HOLD": size <= HELD, "SIZE": power(size, WIDEST), "num_warps": warps}


@torch.library.custom_op("pliant::scalar_memory_triton", mutates_args=())
def _op(
    pre: Tensor, recurrent: Tensor, start: Tensor, reset: Tensor | None, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """h, the last state, and what is kept of each step `(H, B, T, 8, K)`, see `_scalar_memory.KEPT`."""
    batch, steps, _, heads, size = pre.shape
    y, last, kept = _outputs(pre, start, keep)
    given = (pre.contiguous(), recurrent.contiguous(), start.contiguous(), flags(reset), flags(mask))
    call(_forward, heads * batch, pre, *given, y, last, kept, steps, batch, heads, size, KEEP=keep, **_how(size))
    return y, last, kept


def _outputs(pre: Tensor, start: Tensor, keep: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, _, heads, size = pre.shape
    kept = pre.new_empty(heads, batch, steps if keep else 1, KEPT, size)
    return pre.new_empty(batch, steps, heads, size), new(start), kept


@torch.library.custom_op("pliant::scalar_memory_triton_backward", mutates_args=())
@own_precision
def _op_backward(
    kept: Tensor, recurrent: Tensor, reset: Tensor | None, mask: Tensor | None, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads, batch, steps, _, size = kept.shape
    dpre, dstart = kept.new_empty(batch, steps, 4, heads, size), new(dlast)
    given = (kept, recurrent.contiguous(), flags(reset), flags(mask), dy.contiguous(), dlast.contiguous())
    call(_backward, heads * batch, kept, *given, dpre, dstart, steps, batch, heads, size, **_how(size))
    return dpre, torch.einsum("hbti,btghj->higj", kept[:, :, :, LAST_H], dpre).contiguous(), dstart


@_op.register_fake
def _(
    pre: Tensor, recurrent: Tensor, start: Tensor, reset: Tensor | None, mask: Tensor | None, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(pre, start, keep)


@_op_backward.register_fake
def _(
    kept: Tensor, recurrent: Tensor, reset: Tensor | None, mask: Tensor | None, dy: Tensor, dlast: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    heads, batch, steps, _, size = kept.shape
    return kept.new_empty(batch, steps, 4, heads, size), new(recurrent), new(dlast)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    _, recurrent, _, reset, mask, _ = inputs
    ctx.save_for_backward(output[2], recurrent, reset, mask)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, dy: Tensor | None, dlast: Tensor | None, _):  # type: ignore[no-untyped-def]
    kept, recurrent, reset, mask = ctx.saved_tensors
    heads, batch, steps, _, size = kept.shape
    dy = kept.new_zeros(batch, steps, heads, size) if dy is None else dy
    dlast = kept.new_zeros(4, batch, heads, size) if dlast is None else dlast
    return *_op_backward(kept, recurrent, reset, mask, dy, dlast), None, None, None


_op.register_autograd(_gradients, setup_context=_keep)


def run(
    pre: Tensor, recurrent: Tensor, start: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the readable form, which serves heads of more than `WIDEST` units."""
    if pre.shape[-1] > WIDEST or not pre.numel():
        return _loop(pre, recurrent, start, reset, mask)
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (pre, recurrent, start))
    y, last, _ = _op(pre, recurrent, start, reset, mask, keep)
    return y, last
