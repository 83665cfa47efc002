"""The fast form of `matrix_memory` on a CPU: chunks, products of matrices by torch, the rest by Numba; as a custom op.

Source: as in `_matrix_memory.py`, whose equations and names these are.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pliant.kernels._autocast import own_precision
from pliant.kernels._jit import jit_fast, over_jobs
from pliant.kernels._operator import operator

SLAB = 1 << 20
"""Bytes of keys, values and memory that are worked on together, so that they stay near the processor."""


def limit(dtype: torch.dtype) -> float:
    """Largest -m of which e^-m is taken, short of overflow."""
    return 0.9 * math.log(torch.finfo(dtype).max)


# Products of matrices are by torch, for a slab of chunks at a time, and all that is between them by Numba.
# Rows of `(R, ...)` are the B H memories, of which a thread has those from `row` on; c counts its chunks in the slab.
# Values have a last column of ones, so that the last column of the memory is n. What a carried memory would be
# multiplied by zero for is not read, since it need not be finite.


@jit_fast
def _gates(log_input, log_forget, reset, mask, m0, keep, enter, m, spoils, first, stop):  # type: ignore[no-untyped-def]
    # In float64, so that f' and i' fit the m that is kept, however it is rounded.
    steps, heads = log_input.shape[1:]
    for r in range(first, stop):
        b, h = r // heads, r % heads
        before = np.float64(m0[b, h])
        for t in range(m.shape[1]):
            exists = t < steps and mask[b, t]
            fresh = t < steps and reset[b, t]
            if fresh:
                before = np.float64(0)
            keep[r, t], enter[r, t] = 1, 0
            if exists:
                carried, entering = np.float64(log_forget[b, t, h]) + before, np.float64(log_input[b, t, h])
                if carried < np.inf and entering < np.inf:
                    m[r, t] = max(carried, entering)
                    keep[r, t], enter[r, t] = math.exp(carried - m[r, t]), math.exp(entering - m[r, t])
                else:  # NaN too
                    m[r, t] = before
                    spoils[r, t] = True
            else:
                m[r, t] = before
            if fresh:
                keep[r, t] = 0
            before = np.float64(m[r, t])


@jit_fast
def _gates_back(log_input, log_forget, reset, mask, m0, m, dm, dinput, dforget, dlog_input, dlog_forget, dm0):  # type: ignore[no-untyped-def]  # fmt: skip
    # dm0 carries the gradient to m that flows back from step t + 1.
    steps, heads = log_input.shape[1:]
    for r in range(m.shape[0]):
        b, h = r // heads, r % heads
        back = dm0[b, h]
        for t in range(steps - 1, -1, -1):
            dlog_input[b, t, h] = dlog_forget[b, t, h] = 0
            before = np.float64(0.0 if reset[b, t] else m[r, t - 1] if t else m0[b, h])
            if mask[b, t]:
                back += dm[r, t]
                carried, entering = np.float64(log_forget[b, t, h]) + before, np.float64(log_input[b, t, h])
                # Equal ones share, as with torch.maximum.
                taken = back * m0.dtype.type(1.0 if entering > carried else 0.5 if entering == carried else 0.0)
                dlog_input[b, t, h] = dinput[r, t] + taken
                back -= taken
                dlog_forget[b, t, h] = dforget[r, t] + back
            if reset[b, t]:
                back = m0.dtype.type(0)
        dm0[b, h] = back


@jit_fast
def _nothing(x):  # type: ignore[no-untyped-def]
    """0 where x is finite, else NaN."""
    total = x.dtype.type(0)
    for j in range(x.shape[0]):
        total += x[j] * x.dtype.type(0)
    return total


@jit_fast
def _spoil(spoils, reset, mask, h, carried, m):  # type: ignore[no-untyped-def]
    """NaN from each step that is not finite up to the next reset, and in the memory after the last one."""
    steps, heads = h.shape[1:3]
    for r in range(spoils.shape[0]):
        spoiled = False
        for t in range(steps):
            spoiled = spoils[r, t] or (spoiled and not reset[r // heads, t])
            if spoiled and mask[r // heads, t]:
                h[r // heads, t, r % heads] = np.nan
        if spoiled:
            carried[r] = np.nan
            m[r, steps - 1] = np.nan


@jit_fast
def _load(q, k, v, mask, scale, row, start, chunks, q_, k_, v_, spoils):  # type: ignore[no-untyped-def]
    # A step that is not finite writes nothing here: products over a chunk would carry it into what came before it, and
    # over resets. See `_spoil`.
    steps, heads, keys = q.shape[1:]
    values = v.shape[3]
    size = q_.shape[1]
    for c in range(q_.shape[0]):
        r = row + c // chunks
        b, h = r // heads, r % heads
        for i in range(size):
            t = start + (c % chunks) * size + i
            v_[c, i, values] = 1
            if t < steps and mask[b, t]:
                for j in range(keys):
                    q_[c, i, j] = q[b, t, h, j]
                for j in range(keys):
                    k_[c, i, j] = k[b, t, h, j] * scale
                for j in range(values):
                    v_[c, i, j] = v[b, t, h, j]
                if not (_nothing(k_[c, i]) == 0 and _nothing(v_[c, i]) == 0):
                    spoils[r, t] = True
                    k_[c, i] = 0
                    v_[c, i, :values] = 0
            else:
                q_[c, i] = 0
                k_[c, i] = 0
                v_[c, i, :values] = 0


@jit_fast
def _next_row(row, i, keep, enter, tiny):  # type: ignore[no-untyped-def]
    """Row i of D from row i - 1."""
    zero = row.dtype.type(0)
    for s in range(i):
        x = keep * row[s]
        row[s] = x if x > tiny else zero  # what is no normal number would make processors slow
    row[i] = enter


@jit_fast
def _weigh(scores, k_, keep, enter, tiny, start, inside, leaving):  # type: ignore[no-untyped-def]
    """Scores times D, in place; `inside`: how much of the carried memory is left; `leaving`: keys as C sees them."""
    size = scores.shape[1]
    chunks = scores.shape[0] // keep.shape[0]
    row, zero, one = np.empty(size, scores.dtype), scores.dtype.type(0), scores.dtype.type(1)
    for c in range(scores.shape[0]):
        r, first = c // chunks, start + (c % chunks) * size
        left = one
        for i in range(size):
            f = keep[r, first + i]
            _next_row(row, i, f, enter[r, first + i], tiny)
            left = left * f if left * f > tiny else zero
            inside[c, i] = left
            for s in range(i + 1):
                scores[c, i, s] *= row[s]
            for s in range(i + 1, size):
                scores[c, i, s] = 0
        for s in range(size):
            for j in range(k_.shape[2]):
                leaving[c, s, j] = k_[c, s, j] * row[s]


@jit_fast
def _carry(memory, inside, carried):  # type: ignore[no-untyped-def]
    """From what each chunk adds to the memory, the memory before each chunk, in place, and after the last one."""
    chunks = memory.shape[0] // carried.shape[0]
    for r in range(carried.shape[0]):
        for c in range(r * chunks, (r + 1) * chunks):
            keep = inside[c, -1]
            for j in range(carried.shape[1]):
                added = memory[c, j]
                memory[c, j] = carried[r, j]
                carried[r, j] = added + keep * carried[r, j] if keep else added


@jit_fast
def _read(near, far, inside, m, mask, eps, limit, row, start, h, total):  # type: ignore[no-untyped-def]
    steps, heads, values = h.shape[1:]
    size, one = near.shape[1], near.dtype.type(1)
    chunks = near.shape[0] // m.shape[0]
    for c in range(near.shape[0]):
        r = c // chunks
        b, head = (row + r) // heads, (row + r) % heads
        for i in range(size):
            t = start + (c % chunks) * size + i
            if t >= steps:
                break
            if not mask[b, t]:
                h[b, t, head] = 0
                total[r, t] = 0
                continue
            if inside[c, i]:
                for j in range(values + 1):
                    near[c, i, j] += inside[c, i] * far[c, i, j]
            total[r, t] = near[c, i, values]
            floor = m.dtype.type(math.exp(min(-m[r, t], limit)))
            scale = one / (max(abs(total[r, t]), floor) + eps)
            for j in range(values):
                h[b, t, head, j] = near[c, i, j] * scale


@jit_fast
def _read_back(grad, h, total, m, mask, eps, limit, row, start, back, dm):  # type: ignore[no-untyped-def]
    """Gradients of what was read, before the division; and of m, for a fixed memory in units of 1."""
    steps, heads, values = h.shape[1:]
    size, zero, one = back.shape[1], back.dtype.type(0), back.dtype.type(1)
    chunks = back.shape[0] // m.shape[0]
    for c in range(back.shape[0]):
        r = c // chunks
        b, head = (row + r) // heads, (row + r) % heads
        for i in range(size):
            t = start + (c % chunks) * size + i
            if t >= steps or not mask[b, t]:
                back[c, i] = 0
                continue
            floor = m.dtype.type(math.exp(min(-m[r, t], limit)))
            size_of = abs(total[r, t])
            scale = one / (max(size_of, floor) + eps)
            along = zero
            for j in range(values):
                along += grad[b, t, head, j] * h[b, t, head, j]
                back[c, i, j] = grad[b, t, head, j] * scale
            along *= scale
            back[c, i, values] = 0
            if size_of > floor:
                back[c, i, values] = -along if total[r, t] > 0 else along
            dm[r, t] = -along * eps


@jit_fast
def _weigh_back(scores, dweights, q_, keep, enter, tiny, start, inside, last, reading, dinput, dforget):  # type: ignore[no-untyped-def]  # fmt: skip
    """Scores become weights and gradients of weights those of scores, in place; gradients of log gates within chunks.

    `last`: the last row of D; `reading`: queries as the carried memory sees them.
    """
    size = scores.shape[1]
    chunks = scores.shape[0] // keep.shape[0]
    both, down = np.empty((size, size), scores.dtype), np.empty(size, scores.dtype)
    zero, one = scores.dtype.type(0), scores.dtype.type(1)
    for c in range(scores.shape[0]):
        r, first = c // chunks, start + (c % chunks) * size
        row = last[c]
        left = one
        for i in range(size):
            f = keep[r, first + i]
            _next_row(row, i, f, enter[r, first + i], tiny)
            left = left * f if left * f > tiny else zero
            inside[c, i] = left
            for j in range(q_.shape[2]):
                reading[c, i, j] = q_[c, i, j] * left
            for s in range(i + 1):
                scores[c, i, s] *= row[s]
                both[i, s] = scores[c, i, s] * dweights[c, i, s]
                dweights[c, i, s] *= row[s]
            for s in range(i + 1, size):
                scores[c, i, s] = 0
                dweights[c, i, s] = 0
        # log f_t is in D_τs wherever s < t <= τ.
        down[:] = 0
        for i in range(size - 1, -1, -1):
            for s in range(i + 1):
                down[s] += both[i, s]
            across = zero
            for s in range(i):
                across += down[s]
            dforget[r, first + i] = across
        for s in range(size):
            dinput[r, first + s] = down[s]


@jit_fast
def _carry_back(back, memory, inside, carried, dlast):  # type: ignore[no-untyped-def]
    """From the gradient that each chunk's reading adds, that of the memory after each chunk, in place."""
    chunks, zero = back.shape[0] // carried.shape[0], back.dtype.type(0)
    for r in range(carried.shape[0]):
        for n in range(chunks - 1, -1, -1):
            c = r * chunks + n
            keep = inside[c, -1]
            along = zero
            for j in range(carried.shape[1]):
                added = back[c, j]
                back[c, j] = carried[r, j]
                if keep:
                    along += carried[r, j] * memory[c, j]
                carried[r, j] = added + keep * carried[r, j]
            dlast[c] = keep * along


@jit_fast
def _write_back(near_q, near_k, near_v, far_q, far_k, far_v, q_, k_, inside, last, dlast, mask, scale, row, start,  # type: ignore[no-untyped-def]
                dq, dk, dv, dinput, dforget):  # fmt: skip
    steps, heads, keys = dq.shape[1:]
    values = dv.shape[3]
    size, zero = near_q.shape[1], near_q.dtype.type(0)
    chunks = near_q.shape[0] // dinput.shape[0]
    for c in range(near_q.shape[0]):
        r, first = c // chunks, start + (c % chunks) * size
        b, h = (row + r) // heads, (row + r) % heads
        reads, writes = zero, zero
        for i in range(size):
            t = first + i
            dforget[r, t] += dlast[c] + writes
            along = zero
            for j in range(keys):
                along += k_[c, i, j] * far_k[c, i, j]
            dinput[r, t] += along * last[c, i]
            writes += along * last[c, i]
            if t >= steps:
                continue
            exists = mask[b, t]
            for j in range(keys):
                dk[b, t, h, j] = (near_k[c, i, j] + last[c, i] * far_k[c, i, j]) * scale if exists else zero
            for j in range(values):
                dv[b, t, h, j] = near_v[c, i, j] + last[c, i] * far_v[c, i, j] if exists else zero
        for i in range(size - 1, -1, -1):
            t = first + i
            f = inside[c, i]
            if f:
                along = zero
                for j in range(keys):
                    along += q_[c, i, j] * far_q[c, i, j]
                    near_q[c, i, j] += f * far_q[c, i, j]
                reads += along * f
            dforget[r, t] += reads
            if t < steps:
                for j in range(keys):
                    dq[b, t, h, j] = near_q[c, i, j] if mask[b, t] else zero


class _Plan(NamedTuple):
    """How a call is cut: B H rows, steps, K, V, steps per chunk, number of chunks."""

    rows: int
    steps: int
    keys: int
    values: int
    size: int
    chunks: int


def _plan(q: Tensor, v: Tensor, chunk: int) -> _Plan:
    batch, steps, heads, keys = q.shape
    chunks = -(-steps // chunk)
    size = -(-steps // chunks)  # chunks of the same length, so that little is left over
    return _Plan(batch * heads, steps, keys, v.shape[-1], size, chunks)


class _Arrays:
    """What the kernels read: inputs, gates, and some numbers in the float type of the call."""

    def __init__(self, plan: _Plan, tensors: tuple[Tensor, ...], reset: Tensor | None, mask: Tensor | None, eps: float):
        q, k, v, log_input, log_forget, m0 = tensors
        self.plan, self.dtype = plan, q.dtype
        number = np.float32 if q.dtype == torch.float32 else np.float64
        self.scale, self.eps, self.tiny, self.limit = (
            number(x) for x in (plan.keys**-0.5, eps, torch.finfo(q.dtype).tiny, limit(q.dtype))
        )
        self.q, self.k, self.v = _array(q), _array(k), _array(v)
        self.reset = np.zeros(q.shape[:2], np.bool_) if reset is None else _array(reset)
        self.mask = np.ones(q.shape[:2], np.bool_) if mask is None else _array(mask)
        self.log_input, self.log_forget, self.m0 = _array(log_input), _array(log_forget), _array(m0)
        self.keep, self.enter, self.m = (np.empty((plan.rows, plan.chunks * plan.size), number) for _ in range(3))
        self.spoils = np.zeros(self.m.shape, np.bool_)
        given = (*self.gates, self.keep, self.enter, self.m, self.spoils)
        # A step takes three exponentials.
        over_jobs(lambda *part: _gates(*given, *part), plan.rows, 16 * plan.rows * plan.steps)

    @property
    def gates(self) -> tuple[np.ndarray, ...]:
        """Of all rows, as they were given."""
        return self.log_input, self.log_forget, self.reset, self.mask, self.m0


class _Slab:
    """Chunks of the rows `rows` from the one numbered `first` on, as many as fit, with their inputs in one piece."""

    def __init__(self, arrays: _Arrays, rows: slice, first: int, chunks: int):
        plan = arrays.plan
        self.rows, self.first, self.chunks, self.size = rows, first, chunks, plan.size
        self.row, self.start = rows.start, first * plan.size
        self.count, self.dtype = (rows.stop - rows.start) * chunks, arrays.dtype
        self.q, self.k, self.v = (self.empty(plan.size, n) for n in (plan.keys, plan.keys, plan.values + 1))
        given = (arrays.q, arrays.k, arrays.v, arrays.mask, arrays.scale)
        _run(_load, *given, self.row, self.start, chunks, self.q, self.k, self.v, arrays.spoils)

    def empty(self, *shape: int) -> Tensor:
        return torch.empty(self.count, *shape, dtype=self.dtype)


def _slabs(plan: _Plan, rows: int, itemsize: int) -> list[tuple[int, int]]:
    """First chunk and number of chunks of each slab of so many rows."""
    held = rows * (plan.size * max(plan.size, plan.keys, plan.values) + plan.keys * plan.values) * itemsize
    each = max(1, SLAB // held)
    return [(first, min(each, plan.chunks - first)) for first in range(0, plan.chunks, each)]


def _over_rows(job: Callable[[slice], None], plan: _Plan) -> None:
    """Call `job` for parts of the rows, one per thread: products by one thread each, which need not wait for others.

    A single product is too small to be worth sharing, and threads that share one stay awake and in the way after it.
    """
    if not plan.rows:
        return
    if plan.rows < torch.get_num_threads():
        job(slice(0, plan.rows))
    else:
        elements = plan.rows * plan.steps * (plan.keys + plan.values)
        over_jobs(lambda start, stop: job(slice(start, stop)), plan.rows, elements)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


def _run(kernel: Callable[..., None], *given: Any) -> None:
    kernel(*(x.numpy() if isinstance(x, Tensor) else x for x in given))


@operator("pliant::matrix_memory")
def memory_chunks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Tensor,
    m0: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    chunk: int,
    eps: float,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """h, memory and m after the last step; then for the way back qᵀn `(R, T)` and the memory before each chunk."""
    plan = _plan(q, v, chunk)
    arrays = _Arrays(plan, (q, k, v, log_input, log_forget, m0), reset, mask, eps)
    carried = memory.reshape(plan.rows, plan.keys * memory.shape[-1]).clone(memory_format=torch.contiguous_format)
    h, total = torch.empty(v.shape, dtype=v.dtype), torch.empty(plan.rows, plan.steps, dtype=v.dtype)
    starts = torch.empty(plan.rows, plan.chunks if differentiable else 0, carried.shape[1], dtype=v.dtype)

    def job(rows: slice) -> None:
        for first, chunks in _slabs(plan, rows.stop - rows.start, q.element_size()):
            before = _slab_forward(_Slab(arrays, rows, first, chunks), arrays, carried[rows], h, total[rows])
            if differentiable:
                starts[rows, first : first + chunks] = before.view(rows.stop - rows.start, chunks, carried.shape[1])

    _over_rows(job, plan)
    if arrays.spoils.any():
        _run(_spoil, arrays.spoils, arrays.reset, arrays.mask, h, carried, arrays.m)
    m = torch.from_numpy(arrays.m[:, plan.steps - 1].copy())
    return h, carried.reshape(memory.shape), m.reshape(m0.shape), total, starts.flatten()


def _slab_forward(slab: _Slab, arrays: _Arrays, carried: Tensor, h: Tensor, total: Tensor) -> Tensor:
    """Write what a slab reads; `carried`, the memory before it, becomes that after it. The memory before each chunk."""
    keep, enter, m = (x[slab.rows] for x in (arrays.keep, arrays.enter, arrays.m))
    weights = torch.bmm(slab.q, slab.k.mT)
    inside, leaving = slab.empty(slab.size), torch.empty_like(slab.k)
    _run(_weigh, weights, slab.k, keep, enter, arrays.tiny, slab.start, inside, leaving)
    before = torch.bmm(leaving.mT, slab.v)
    _run(_carry, before.flatten(1), inside, carried)
    near, far = torch.bmm(weights, slab.v), torch.bmm(slab.q, before)
    _run(_read, near, far, inside, m, arrays.mask, arrays.eps, arrays.limit, slab.row, slab.start, h, total)
    return before


@operator("pliant::matrix_memory_backward")
@own_precision
def _memory_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Tensor,
    m0: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    chunk: int,
    eps: float,
    h: Tensor,
    last: Tensor,
    total: Tensor,
    starts: Tensor,
    grad_h: Tensor,
    grad_last: Tensor,
    grad_m: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first seven arguments."""
    plan = _plan(q, v, chunk)
    arrays = _Arrays(plan, (q, k, v, log_input, log_forget, m0), reset, mask, eps)
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype) for x in (q, k, v))
    dm, dinput, dforget = (np.zeros_like(arrays.m) for _ in range(3))
    carried = grad_last.reshape(plan.rows, plan.keys * memory.shape[-1]).clone(memory_format=torch.contiguous_format)
    before, read = (
        starts.view(plan.rows, plan.chunks, carried.shape[1]),
        _Read(_array(grad_h), _array(h), _array(total)),
    )

    def job(rows: slice) -> None:
        own = _Read(read.grad, read.h, read.total[rows])
        grads = _Gradients(dq, dk, dv, dm[rows], dinput[rows], dforget[rows])
        for first, chunks in reversed(_slabs(plan, rows.stop - rows.start, q.element_size())):
            slab = _Slab(arrays, rows, first, chunks)
            _slab_backward(slab, arrays, own, before[rows, first : first + chunks], carried[rows], grads)

    _over_rows(job, plan)
    dmemory = carried.reshape(memory.shape)
    dlog_input, dlog_forget = (torch.empty(x.shape, dtype=x.dtype) for x in (log_input, log_forget))
    # Of m at the end and at the start: the memory is in units of e^m.
    dm0 = (grad_m - _products(grad_last, last)).contiguous()
    _run(_gates_back, *arrays.gates, arrays.m, dm, dinput, dforget, dlog_input, dlog_forget, dm0)
    return dq, dk, dv, dlog_input, dlog_forget, dmemory, dm0 + _products(dmemory, memory)


class _Read(NamedTuple):
    """Gradient of h, h, and qᵀn of the thread's rows."""

    grad: np.ndarray
    h: np.ndarray
    total: np.ndarray


class _Gradients(NamedTuple):
    """Where gradients are written: `(B, T, H, ...)` of q, k, v, and of m, log i and log f of the thread's rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    m: np.ndarray
    log_input: np.ndarray
    log_forget: np.ndarray


def _products(gradient: Tensor, memory: Tensor) -> Tensor:
    """Sums of products per head; what has no gradient need not be finite."""
    return (gradient * torch.where(gradient == 0, 0, memory)).sum((-2, -1))


def _slab_backward(
    slab: _Slab, arrays: _Arrays, read: _Read, starts: Tensor, carried: Tensor, grads: _Gradients
) -> None:
    """Write the gradients of the inputs of a slab; `carried`, of the memory after it, becomes that before it."""
    keep, enter, m = (x[slab.rows] for x in (arrays.keep, arrays.enter, arrays.m))
    back = torch.empty_like(slab.v)
    _run(_read_back, *read, m, arrays.mask, arrays.eps, arrays.limit, slab.row, slab.start, back, grads.m)
    scores, dscores = torch.bmm(slab.q, slab.k.mT), torch.bmm(back, slab.v.mT)
    inside, last, reading = slab.empty(slab.size), slab.empty(slab.size), torch.empty_like(slab.q)
    gates = (keep, enter, arrays.tiny, slab.start)
    _run(_weigh_back, scores, dscores, slab.q, *gates, inside, last, reading, grads.log_input, grads.log_forget)
    after, before = torch.bmm(reading.mT, back), starts.flatten(0, 1)
    dlast = slab.empty()
    _run(_carry_back, after.flatten(1), before, inside, carried, dlast)
    before = before.view(after.shape)
    near = (torch.bmm(dscores, slab.k), torch.bmm(dscores.mT, slab.q), torch.bmm(scores.mT, back[..., :-1]))
    far = (torch.bmm(back, before.mT), torch.bmm(slab.v, after.mT), torch.bmm(slab.k, after[..., :-1]))
    rest = (slab.q, slab.k, inside, last, dlast, arrays.mask, arrays.scale, slab.row, slab.start)
    _run(_write_back, *near, *far, *rest, *grads[:3], grads.log_input, grads.log_forget)


@memory_chunks.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, log_input, log_forget, memory, m0, reset, mask, chunk, eps, differentiable
):
    batch, steps, heads, _ = q.shape
    chunks = (steps + chunk - 1) // chunk if differentiable else 0
    return (
        torch.empty_like(v, memory_format=torch.contiguous_format),
        torch.empty_like(memory, memory_format=torch.contiguous_format),
        torch.empty_like(m0, memory_format=torch.contiguous_format),
        v.new_empty(batch * heads, steps),
        # In one row, so that a graph for one chunk is also one for more.
        v.new_empty(batch * heads * chunks * memory.shape[2] * memory.shape[3]),
    )


@_memory_backward.register_fake
def _(  # type: ignore[no-untyped-def]
    q, k, v, log_input, log_forget, memory, m0, reset, mask, chunk, eps, h, last, total, starts, grad_h, grad_last,
    grad_m,
):  # fmt: skip
    given = (q, k, v, log_input, log_forget, memory, m0)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in given)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, ctx.chunk, ctx.eps, _ = inputs
    h, last, _, total, starts = output
    ctx.mark_non_differentiable(total, starts)
    ctx.set_materialize_grads(False)  # zeros for what was only kept would be as large as all of it
    ctx.save_for_backward(*tensors, h, last, total, starts)


def _gradients(ctx, grad_h, grad_last, grad_m, *_):  # type: ignore[no-untyped-def]
    *tensors, h, last, total, starts = ctx.saved_tensors
    grads = [torch.zeros_like(x) if g is None else g for x, g in ((h, grad_h), (last, grad_last), (tensors[6], grad_m))]
    found = _memory_backward(*tensors, ctx.chunk, ctx.eps, h, last, total, starts, *grads)
    return *found, None, None, None, None, None


memory_chunks.register_autograd(_gradients, setup_context=_keep)
