"""A few steps of the mLSTM in one pass over its memory, for inference on a CPU: all that is between its projections.

    c = SiLU(conv(a));  q, k, v, gates from c and a;  h from the memory;  (LayerNorm_head(h) ⊙ g + s ⊙ c) ⊙ SiLU(z)

as `pliant.mixers.MLSTM` has it. With D_ts = i'_s f'_{s+1} … f'_t, as in `matrix_memory`, `SPAN` steps at a time need
C only once: what each reads from C before the first of them, and C after the last, in the same sweep over its rows.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pliant.kernels._few_rows import plain, project
from pliant.kernels._jit import jit_fast, over_jobs
from pliant.kernels._math import exp, one, zero

SPAN = 3
"""Steps that share a sweep over C, as many as a step of an environment has tokens (return, observation, action)."""

STEPS = 8
"""Steps that are few: more are faster in chunks."""

LOWEST = -1e30  # a closed input gate, as in `matrix_memory`
LARGEST = 80.0  # the exponent of e^-m, short of overflow in float32


class StepWeights(NamedTuple):
    """Parameters of an `MLSTM` but for its projections: conv `(L, M)` and `(M,)`, q, k, v `(M/I, I, I)`, gates
    `(H, 3M)` and `(H,)`, norm and skip `(M,)`; all float32, tensors or arrays."""

    conv: Any
    conv_bias: Any
    query: Any
    key: Any
    value: Any
    input_gate: Any
    input_bias: Any
    forget_gate: Any
    forget_bias: Any
    norm: Any
    skip: Any


@jit_fast
def _silu(x):  # type: ignore[no-untyped-def]
    for j in range(x.shape[0]):
        x[j] = x[j] / (one(x[j]) + exp(-x[j]))


@jit_fast
def _convolve(up, history, reset, mask, weight, bias, c):  # type: ignore[no-untyped-def]
    """One stream: c `(T, M)` from the first half of `up` `(T, 2M)`; `history` `(L-1, M)` moves on."""
    reach = history.shape[0]
    for t in range(up.shape[0]):
        if reset[t]:
            history[:] = np.float32(0)
        if not mask[t]:
            c[t] = np.float32(0)
            continue
        for j in range(c.shape[1]):
            c[t, j] = bias[j] + weight[reach, j] * up[t, j]
        for s in range(reach):
            for j in range(c.shape[1]):
                c[t, j] += weight[s, j] * history[s, j]
        for s in range(reach - 1):
            history[s] = history[s + 1]
        if reach:
            for j in range(c.shape[1]):
                history[reach - 1, j] = up[t, j]
        _silu(c[t])


@jit_fast
def _blocks(x, weight, y):  # type: ignore[no-untyped-def]
    """y[n, o] = Σ_i weight[n, o, i] x[n, i]."""
    count, size, _ = weight.shape
    if size == 4:  # written out, as is fastest for a size that is known
        for n in range(count):
            w = weight[n]
            a, b, c, d = x[4 * n], x[4 * n + 1], x[4 * n + 2], x[4 * n + 3]
            for o in range(4):
                y[4 * n + o] = w[o, 0] * a + w[o, 1] * b + w[o, 2] * c + w[o, 3] * d
        return
    for n in range(count):
        for o in range(size):
            total = np.float32(0)
            for i in range(size):
                total += weight[n, o, i] * x[n * size + i]
            y[n * size + o] = total


@jit_fast
def _dot(x, y):  # type: ignore[no-untyped-def]
    total = np.float32(0)
    for i in range(x.shape[0]):
        total += x[i] * y[i]
    return total


@jit_fast
def _decays(gates, reset, mask, m, D, keep, m0):  # type: ignore[no-untyped-def]
    """D `(SPAN, SPAN)`, `keep` `(SPAN,)` of what was before, and m `(SPAN,)`, from gates `(T, 2)` and m before."""
    carried, before = np.float64(1), np.float64(m0)
    for t in range(gates.shape[0]):
        f, i = np.float64(1), np.float64(0)
        if reset[t]:
            before, carried = np.float64(0), np.float64(0)
        if mask[t]:
            x = np.float64(gates[t, 1])
            log_f = min(x, np.float64(0)) - math.log1p(math.exp(-abs(x))) + before
            log_i = max(np.float64(gates[t, 0]), LOWEST)
            top = max(log_f, log_i)
            m[t] = top
            f, i = np.float64(math.exp(log_f - m[t])), np.float64(math.exp(log_i - m[t]))
            before = np.float64(m[t])
        else:
            m[t] = before
        carried *= f
        keep[t] = carried
        for s in range(t):
            D[t, s] = np.float32(0) if reset[t] else D[t - 1, s] * f
        D[t, t] = i


@jit_fast
def _sweep(C, q, k, v, keep, after, read):  # type: ignore[no-untyped-def]
    """read `(SPAN, V)` = q `(SPAN, K)` C; after = keep C + kᵀ v, where a C that is not kept need not be finite."""
    read[:] = zero(keep)
    read0, read1, read2 = read[0], read[1], read[2]
    v0, v1, v2 = v[0], v[1], v[2]
    half = (C.shape[0] + 1) // 2
    for i in range(half):  # two rows that are far from each other, since one after the other would wait for memory
        n = min(i + half, C.shape[0] - 1)
        p0, p1, p2 = q[0, i], q[1, i], q[2, i]
        q0, q1, q2 = q[0, n], q[1, n], q[2, n]
        if i + half > n:  # of an odd number the last is read once
            q0, q1, q2 = zero(keep), zero(keep), zero(keep)
        j0, j1, j2 = k[0, i], k[1, i], k[2, i]
        k0, k1, k2 = k[0, n], k[1, n], k[2, n]
        x, y, x_, y_ = C[i], C[n], after[i], after[n]
        for j in range(C.shape[1]):
            read0[j] += p0 * x[j] + q0 * y[j]
            read1[j] += p1 * x[j] + q1 * y[j]
            read2[j] += p2 * x[j] + q2 * y[j]
            a, b = (keep * x[j] if keep else zero(keep)), (keep * y[j] if keep else zero(keep))
            x_[j] = a + j0 * v0[j] + j1 * v1[j] + j2 * v2[j]
            y_[j] = b + k0 * v0[j] + k1 * v1[j] + k2 * v2[j]


@jit_fast
def _finish(h, gain, skip, c, z, eps, y):  # type: ignore[no-untyped-def]
    """y = (LayerNorm(h) gain + skip c) SiLU(z), of one head at one step."""
    width = np.float32(h.shape[0])
    mean, square = np.float32(0), np.float32(0)
    for j in range(h.shape[0]):
        mean += h[j]
    mean /= width
    for j in range(h.shape[0]):
        square += (h[j] - mean) * (h[j] - mean)
    scale = one(eps) / np.sqrt(square / width + eps)
    for j in range(h.shape[0]):
        y[j] = ((h[j] - mean) * scale * gain[j] + skip[j] * c[j]) * z[j] / (one(eps) + exp(-z[j]))


@jit_fast
def _before(up, reset, mask, w, conv, inputs, gates):  # type: ignore[no-untyped-def]
    """inputs `(B, T, 4, M)`: c, q, k, v; gates `(B, T, 2, H)`: ĩ, f̃; conv, the history, moves on."""
    batch, steps, _, width = inputs.shape
    for b in range(batch):
        c = np.empty((steps, width), np.float32)
        _convolve(up[b], conv[b], reset[b], mask[b], w.conv, w.conv_bias, c)
        for t in range(steps):
            if not mask[b, t]:
                inputs[b, t] = np.float32(0)
                continue
            inputs[b, t, 0] = c[t]
            _blocks(c[t], w.query, inputs[b, t, 1])
            _blocks(c[t], w.key, inputs[b, t, 2])
            _blocks(up[b, t, :width], w.value, inputs[b, t, 3])
            qkv = inputs[b, t, 1:].reshape(3 * width)
            for h in range(gates.shape[3]):
                gates[b, t, 0, h] = w.input_bias[h] + _dot(w.input_gate[h], qkv)
                gates[b, t, 1, h] = w.forget_bias[h] + _dot(w.forget_gate[h], qkv)


@jit_fast
def _heads(up, reset, mask, w, inputs, gates, C, n, m, C_, n_, m_, eps, norm_eps, y, first, stop):  # type: ignore[no-untyped-def]
    """Memories `first` to `stop` of the B H: C, n and m become C_, n_ and m_."""
    steps, width = y.shape[1:]
    heads, size = n.shape[1:]
    q, k = np.empty((SPAN, size), np.float32), np.empty((SPAN, size), np.float32)
    v, read = np.empty((SPAN, size), np.float32), np.empty((SPAN, size), np.float32)
    D, numbers = np.empty((SPAN, SPAN), np.float32), np.empty((3, SPAN), np.float32)
    keep, tops, totals = numbers[0], numbers[1], numbers[2]
    answers, spare = np.empty((SPAN, size), np.float32), np.empty((2, size if steps > SPAN else 0, size), np.float32)
    scale = np.float32(1 / math.sqrt(size))
    for u in range(first, stop):
        b, h = u // heads, u % heads
        low, high = h * size, (h + 1) * size
        n_[b, h], m_[b, h] = n[b, h], m[b, h]
        for start in range(0, steps, SPAN):
            end = min(start + SPAN, steps)
            count = end - start
            q[count:], k[count:], v[count:] = np.float32(0), np.float32(0), np.float32(0)
            for t in range(count):
                q[t] = inputs[b, start + t, 1, low:high]
                k[t] = inputs[b, start + t, 2, low:high]
                v[t] = inputs[b, start + t, 3, low:high]
            _decays(gates[b, start:end, :, h], reset[b, start:end], mask[b, start:end], tops, D, keep, m_[b, h])
            for t in range(count):
                totals[t] = keep[t] * _dot(q[t], n_[b, h]) if keep[t] else zero(scale)
                answers[t] = zero(scale)
                for s in range(t + 1):
                    if D[t, s]:  # what is forgotten need not be finite
                        near = D[t, s] * scale * _dot(q[t], k[s])
                        totals[t] += near
                        for j in range(size):
                            answers[t, j] += near * v[s, j]
            last = count - 1
            for j in range(size):
                n_[b, h, j] = keep[last] * n_[b, h, j] if keep[last] else zero(scale)
            for s in range(count):
                if D[last, s]:
                    for j in range(size):
                        k[s, j] *= scale * D[last, s]
                        n_[b, h, j] += k[s, j]
                else:
                    k[s], v[s] = zero(scale), zero(scale)
            # All but the last write beside, so that none reads what it writes.
            turn = start // SPAN % 2
            before, after = C[b, h] if start == 0 else spare[1 - turn], C_[b, h] if end == steps else spare[turn]
            _sweep(before, q, k, v, keep[last], after, read)
            for t in range(count):
                floor = np.float32(math.exp(-max(tops[t], -LARGEST)))
                over = one(scale) / (max(abs(totals[t]), floor) + eps)
                for j in range(size):
                    answers[t, j] = over * (answers[t, j] + (keep[t] * read[t, j] if keep[t] else zero(scale)))
                place = start + t
                if mask[b, place]:
                    z = up[b, place, width + low : width + high]
                    c = inputs[b, place, 0, low:high]
                    gain, skip = w.norm[low:high], w.skip[low:high]
                    _finish(answers[t], gain, skip, c, z, norm_eps, y[b, place, low:high])
                else:
                    y[b, place, low:high] = zero(scale)
            m_[b, h] = tops[last]


@jit_fast
def _layer_norm(x, weight, eps, y):  # type: ignore[no-untyped-def]
    width = np.float32(x.shape[1])
    for r in range(x.shape[0]):
        mean, square = zero(eps), zero(eps)
        for j in range(x.shape[1]):
            mean += x[r, j]
        mean /= width
        for j in range(x.shape[1]):
            square += (x[r, j] - mean) * (x[r, j] - mean)
        scale = one(eps) / np.sqrt(square / width + eps)
        for j in range(x.shape[1]):
            y[r, j] = (x[r, j] - mean) * scale * weight[j]


@jit_fast
def _block(x, reset, mask, w, conv, C, n, m, conv_, C_, n_, m_, eps, norm_eps, out):  # type: ignore[no-untyped-def]
    batch, steps, width = x.shape
    heads, inner = n.shape[1], w.inner.skip.shape[0]
    up, y = np.empty((batch, steps, 2 * inner), np.float32), np.empty((batch, steps, inner), np.float32)
    inputs, gates = np.empty((batch, steps, 4, inner), np.float32), np.empty((batch, steps, 2, heads), np.float32)
    rows, flat = x.reshape(batch * steps, width), out.reshape(batch * steps, width)
    _layer_norm(rows, w.norm, norm_eps, flat)
    project(flat, w.up, w.up_scale, up.reshape(batch * steps, 2 * inner))
    conv_[:] = conv
    _before(up, reset, mask, w.inner, conv_, inputs, gates)
    _heads(up, reset, mask, w.inner, inputs, gates, C, n, m, C_, n_, m_, eps, norm_eps, y, 0, batch * heads)
    project(y.reshape(batch * steps, inner), w.down, w.down_scale, flat)
    for r in range(batch * steps):
        for j in range(width):
            flat[r, j] += rows[r, j]


@jit_fast
def _blocks_in_turn(x, reset, mask, weights, before, after, eps, norm_eps, out):  # type: ignore[no-untyped-def]
    out[:] = x
    for i in range(len(weights)):
        conv, C, n, m = before[i]
        conv_, C_, n_, m_ = after[i]
        x = out.copy()
        _block(x, reset, mask, weights[i], conv, C, n, m, conv_, C_, n_, m_, eps, norm_eps, out)


def few_steps(x: Tensor) -> bool:
    """Whether x `(B, T, ...)` is few steps without extra axes, in inference, float32 on the CPU."""
    return x.ndim == 3 and 0 < x.shape[1] <= STEPS and 0 < x.shape[0] <= STEPS // x.shape[1] and plain(x)


def takes(conv: Tensor, memory: tuple[Tensor, Tensor, Tensor]) -> bool:
    """Whether a state is of float32 on the CPU."""
    return all(x.dtype == torch.float32 and x.is_cpu for x in (conv, *memory))


class BlockWeights(NamedTuple):
    """An mLSTM block as arrays: norm `(D,)`, up `(2M, D)`, down `(D, M)` in float32 or int8 with scales `(2M,)`, `(D,)`
    (of float32 `(0,)`), and what is between."""

    norm: np.ndarray
    up: np.ndarray
    up_scale: np.ndarray
    down: np.ndarray
    down_scale: np.ndarray
    inner: StepWeights


def mlstm_blocks_steps(
    x: Tensor,
    weights: tuple[BlockWeights, ...],
    states: Sequence[tuple[Tensor, tuple[Tensor, Tensor, Tensor]]],
    reset: Tensor | None,
    mask: Tensor | None,
    norm_eps: float,
    eps: float = 1e-6,
) -> tuple[Tensor, list[tuple[Tensor, tuple[Tensor, ...]]]]:
    """x + mLSTM(norm(x)) of a few steps for one block after the other, by one thread.

    One call for all of them: between two calls, Python would have to be fetched anew, past which the weights of a
    block have just streamed.

    Args:
        x: `(B, T, D)`.
        weights: of each block, all of one kind.
        states: conv and memory of each block, see `mlstm_steps`.
        reset, mask, norm_eps, eps: as there.

    Returns:
        what comes out of the last block, and the states after the last step.
    """
    keep_freed_memory()
    flags = _flags(reset, False, x), _flags(mask, True, x)
    before = tuple(tuple(part.contiguous().numpy() for part in (conv, *memory)) for conv, memory in states)
    after = tuple(tuple(np.empty(part.shape, np.float32) for part in parts) for parts in before)
    y = np.empty(x.shape, np.float32)
    _blocks_in_turn(x.numpy(), *flags, weights, before, after, np.float32(eps), np.float32(norm_eps), y)
    made = [[torch.from_numpy(part) for part in parts] for parts in after]
    return torch.from_numpy(y), [(conv, tuple(memory)) for conv, *memory in made]


@cache
def keep_freed_memory() -> None:
    """Have glibc keep what is freed, up to 64 MiB, instead of giving it back to the system.

    A memory of a megabyte that is made and freed at every step would be handed out anew, page by page, which takes
    longer than all that is done with it. glibc learns from the largest block that was freed.
    """
    np.empty(2**25 - 2**16, np.uint8)


def mlstm_steps(
    up: Tensor,
    weights: StepWeights,
    conv: Tensor,
    memory: tuple[Tensor, Tensor, Tensor],
    reset: Tensor | None,
    mask: Tensor | None,
    norm_eps: float,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    """What goes into the projection down, `(B, T, M)`, and conv and memory after the last step.

    Args:
        up: `(B, T, 2M)`, what came from the projection up, T up to `STEPS`; it and all others in float32.
        weights: see there.
        conv: `(B, L-1, M)`, the last inputs of the convolution, oldest first.
        memory: C `(B, H, K, K)`, n `(B, H, K)`, m `(B, H)`.
        reset, mask: `(B, T)`, as of a mixer.
        norm_eps, eps: of the norm and of the memory.
    """
    batch, steps, width = up.shape
    width //= 2
    heads = memory[1].shape[1]
    w = StepWeights(*(x.detach().numpy() for x in weights))
    y, conv = torch.empty(batch, steps, width), conv.clone(memory_format=torch.contiguous_format)
    after = tuple(torch.empty(x.shape) for x in memory)
    inputs, gates = np.empty((batch, steps, 4, width), np.float32), np.empty((batch, steps, 2, heads), np.float32)
    given = up.numpy(), _flags(reset, False, up), _flags(mask, True, up), w
    _before(*given, conv.numpy(), inputs, gates)
    arrays = inputs, gates, *(x.contiguous().numpy() for x in memory), *(x.numpy() for x in after)
    numbers = np.float32(eps), np.float32(norm_eps), y.numpy()
    over_jobs(lambda *part: _heads(*given, *arrays, *numbers, *part), batch * heads, memory[0].numel())
    return y, conv, after


def _flags(flag: Tensor | None, other: bool, x: Tensor) -> np.ndarray:
    return _same_flags(*x.shape[:2], other) if flag is None else flag.contiguous().numpy()


@cache
def _same_flags(batch: int, steps: int, flag: bool) -> np.ndarray:
    return np.full((batch, steps), flag)
