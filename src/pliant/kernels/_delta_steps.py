"""The fast form of `delta_rule` on a CPU: one step after the other with the memory in the first caches, as a custom op.

With d = exp(g), e = b k and u = w v, of one head and with S' = d S_{t-1}:

    r = u - S'ᵀ e,   S_t = S' + k rᵀ,   o = S_tᵀ q.

A pass over S makes S_t, o_t, and what e_{t+1} will read. The backward pass has S at the start of every `SPAN` steps,
goes forward through them again, and back. Arrays are `(B, T, H, ...)`; a thread has some of the B H memories.
"""

import numpy as np
import torch
from torch import Tensor

from pliant.kernels._autocast import own_precision
from pliant.kernels._jit import jit_fast, over_jobs
from pliant.kernels._operator import operator

SPAN = 32
"""Steps whose memories are held at once on the way back: with 64 x 64 numbers each they fit the second cache."""

LANES = 8
"""Products in the time of one step of a plain loop, by which work is counted that may be worth threads."""


@jit_fast
def _pass(S, d, k, r, q, e, o, read):  # type: ignore[no-untyped-def]
    """S becomes d S + k rᵀ, from where o = Sᵀ q and `read` = Sᵀ e; two rows at a time, for fewer sums to be stored."""
    rows, width = S.shape
    o[:] = S.dtype.type(0)
    read[:] = S.dtype.type(0)
    for a in range(0, rows - 1, 2):
        d0, k0, q0, e0 = d[a], k[a], q[a], e[a]
        d1, k1, q1, e1 = d[a + 1], k[a + 1], q[a + 1], e[a + 1]
        one, two = S[a], S[a + 1]
        for v in range(width):
            s0 = d0 * one[v] + k0 * r[v]
            s1 = d1 * two[v] + k1 * r[v]
            o[v] += q0 * s0 + q1 * s1
            read[v] += e0 * s0 + e1 * s1
            one[v] = s0
            two[v] = s1
    if rows % 2:
        a = rows - 1
        one = S[a]
        for v in range(width):
            s = d[a] * one[v] + k[a] * r[v]
            o[v] += q[a] * s
            read[v] += e[a] * s
            one[v] = s


@jit_fast
def _read(S, e, read):  # type: ignore[no-untyped-def]
    read[:] = S.dtype.type(0)
    for a in range(S.shape[0]):
        for v in range(S.shape[1]):
            read[v] += e[a] * S[a, v]


@jit_fast
def _spread(decay, d):  # type: ignore[no-untyped-def]
    """Decays of all rows, of which one may be for all."""
    if decay.shape[0] == 1:
        d[:] = decay[0]
    else:
        d[:] = decay


@jit_fast
def _forward(q, k, u, e, decay, reset, start, o, last, starts, first, stop):  # type: ignore[no-untyped-def]
    steps, heads, rows = k.shape[1:]
    width = u.shape[3]
    S, read, r = np.empty((rows, width), k.dtype), np.empty(width, k.dtype), np.empty(width, k.dtype)
    d, reads = np.empty(rows, k.dtype), np.empty(rows, k.dtype)
    for i in range(first, stop):
        b, h = i // heads, i % heads
        S[:] = start[b, h]
        for t in range(steps):
            if reset[b, t]:
                S[:] = k.dtype.type(0)
            if starts.shape[1] and t % SPAN == 0:
                starts[i, t // SPAN] = S
            _spread(decay[b, t, h], d)
            if t == 0 or reset[b, t]:
                for a in range(rows):
                    reads[a] = d[a] * e[b, t, h, a]
                _read(S, reads, read)
            for v in range(width):
                r[v] = u[b, t, h, v] - read[v]
            reads[:] = k.dtype.type(0)
            if t + 1 < steps and not reset[b, t + 1]:
                _spread(decay[b, t + 1, h], reads)
                for a in range(rows):
                    reads[a] *= e[b, t + 1, h, a]
            _pass(S, d, k[b, t, h], r, q[b, t, h], reads, o[b, t, h], read)
        last[b, h] = S


@jit_fast
def _again(S, r, k, u, e, decay, reset, b, h, t0, t1):  # type: ignore[no-untyped-def]
    """Memories before each step from `t0` on, after its reset if it has one, S[0] being there; and what was written."""
    rows, width = S.shape[1:]
    d, reads, read = np.empty(rows, k.dtype), np.empty(rows, k.dtype), np.empty(width, k.dtype)
    for t in range(t0, t1):
        n = t - t0
        if t > t0 and reset[b, t]:
            S[n] = k.dtype.type(0)
        _spread(decay[b, t, h], d)
        for a in range(rows):
            reads[a] = d[a] * e[b, t, h, a]
        _read(S[n], reads, read)
        for v in range(width):
            r[n, v] = u[b, t, h, v] - read[v]
        for a in range(rows):
            ka = k[b, t, h, a]
            for v in range(width):
                S[n + 1, a, v] = d[a] * S[n, a, v] + ka * r[n, v]


@jit_fast
def _back(before, after, dS, d, q, k, e, r, do, dr, dq, dk, de, dd):  # type: ignore[no-untyped-def]
    """Gradients of one step; dS, of the memory after it, becomes that of the memory before it."""
    rows, width = dS.shape
    dr[:] = dS.dtype.type(0)
    for a in range(rows):
        qa, ka, read = q[a], k[a], dS.dtype.type(0)
        for v in range(width):
            g = dS[a, v] + qa * do[v]
            dS[a, v] = g
            dr[v] += ka * g
            read += after[a, v] * do[v]
        dq[a] = read
    for a in range(rows):
        da, ea, zero = d[a], e[a], dS.dtype.type(0)
        wrote, erased, decayed = zero, zero, zero
        for v in range(width):
            g, s = dS[a, v], before[a, v]
            wrote += g * r[v]
            erased += s * dr[v]
            g -= ea * dr[v]
            decayed += g * s
            dS[a, v] = da * g
        dk[a] = wrote
        de[a] = -da * erased
        dd[a] = decayed


@jit_fast
def _backward(q, k, u, e, decay, reset, starts, do, dS, dq, dk, du, de, dd, first, stop):  # type: ignore[no-untyped-def]
    steps, heads, rows = k.shape[1:]
    width = u.shape[3]
    S, r = np.empty((SPAN + 1, rows, width), k.dtype), np.empty((SPAN, width), k.dtype)
    d, dds = np.empty(rows, k.dtype), np.empty(rows, k.dtype)
    for i in range(first, stop):
        b, h = i // heads, i % heads
        for part in range(starts.shape[1] - 1, -1, -1):
            t0, t1 = part * SPAN, min(steps, (part + 1) * SPAN)
            S[0] = starts[i, part]
            _again(S, r, k, u, e, decay, reset, b, h, t0, t1)
            for t in range(t1 - 1, t0 - 1, -1):
                n = t - t0
                if t + 1 < t1 and reset[b, t + 1]:  # what was after this step was dropped before the next
                    kt, rt = k[b, t, h], r[n]
                    _spread(decay[b, t, h], d)
                    for a in range(rows):
                        for v in range(width):
                            S[n + 1, a, v] = d[a] * S[n, a, v] + kt[a] * rt[v]
                _spread(decay[b, t, h], d)
                _back(S[n], S[n + 1], dS[b, h], d, q[b, t, h], k[b, t, h], e[b, t, h], r[n], do[b, t, h],
                      du[b, t, h], dq[b, t, h], dk[b, t, h], de[b, t, h], dds)  # fmt: skip
                if dd.shape[3] == 1:
                    dd[b, t, h, 0] = dds.sum()
                else:
                    dd[b, t, h] = dds
                if reset[b, t]:
                    dS[b, h] = k.dtype.type(0)


def _flags(reset: Tensor | None, like: Tensor) -> np.ndarray:
    return np.zeros(like.shape[:2], np.bool_) if reset is None else _array(reset)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


@operator("pliant::delta_rule")
def delta_steps(
    q: Tensor, k: Tensor, u: Tensor, e: Tensor, decay: Tensor, start: Tensor, reset: Tensor | None, differentiable: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """o `(B, T, H, V)`, S after the last step, and for the way back S at the start of every `SPAN` steps.

    q, k, e `(B, T, H, K)`, u `(B, T, H, V)`, decay `(B, T, H, 1 or K)`, start `(B, H, K, V)`, of one float type.
    """
    o, last, starts = _outputs(k, u, start, differentiable)
    arrays = [_array(x) for x in (q, k, u, e, decay)]
    arrays += [_flags(reset, k), _array(start), o.numpy(), last.numpy(), _by_span(starts, k, u)]
    rows = k.shape[0] * k.shape[2]
    over_jobs(lambda first, stop: _forward(*arrays, first, stop), rows, k.numel() * u.shape[3] // LANES)
    return o, last, starts


def _outputs(k: Tensor, u: Tensor, start: Tensor, differentiable: bool) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, heads, rows = k.shape
    spans = (steps + SPAN - 1) // SPAN if differentiable else 0
    # What is kept is in one row, so that a compiled graph for one span is also one for more.
    o = torch.empty_like(u, memory_format=torch.contiguous_format)
    last = torch.empty_like(start, memory_format=torch.contiguous_format)
    return o, last, u.new_empty(batch * heads * spans * rows * u.shape[3])


def _by_span(starts: Tensor, k: Tensor, u: Tensor) -> np.ndarray:
    """What is kept as `(B H, T / SPAN, K, V)`, or `(B H, 0, K, V)`."""
    batch, steps, heads, rows = k.shape
    spans = -(-steps // SPAN) if starts.numel() else 0
    return starts.view(batch * heads, spans, rows, u.shape[3]).numpy()


@operator("pliant::delta_rule_backward")
@own_precision
def _delta_backward(
    q: Tensor, k: Tensor, u: Tensor, e: Tensor, decay: Tensor, reset: Tensor | None, starts: Tensor,
    grad_o: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first six arguments."""
    found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, u, e, decay)]
    dS = grad_last.clone(memory_format=torch.contiguous_format)
    arrays = [_array(x) for x in (q, k, u, e, decay)]
    arrays += [_flags(reset, k), _by_span(starts, k, u), _array(grad_o), dS.numpy(), *(x.numpy() for x in found)]
    rows = k.shape[0] * k.shape[2]
    over_jobs(lambda first, stop: _backward(*arrays, first, stop), rows, k.numel() * u.shape[3] // LANES)
    return *found, dS  # type: ignore[return-value]


@delta_steps.register_fake
def _(q, k, u, e, decay, start, reset, differentiable):  # type: ignore[no-untyped-def]
    return _outputs(k, u, start, differentiable)


@_delta_backward.register_fake
def _(q, k, u, e, decay, reset, starts, grad_o, grad_last):  # type: ignore[no-untyped-def]
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, u, e, decay, grad_last))


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, _, reset, _ = inputs
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, reset, output[2])


def _gradients(ctx, grad_o, grad_last, _):  # type: ignore[no-untyped-def]
    q, k, u, e, decay, reset, starts = ctx.saved_tensors
    batch, _, heads, rows = k.shape
    grad_o = torch.zeros_like(u) if grad_o is None else grad_o
    grad_last = u.new_zeros(batch, heads, rows, u.shape[3]) if grad_last is None else grad_last
    return *_delta_backward(q, k, u, e, decay, reset, starts, grad_o, grad_last), None, None


delta_steps.register_autograd(_gradients, setup_context=_keep)
