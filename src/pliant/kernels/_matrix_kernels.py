"""Numba kernels of the fast form of `matrix_memory` on a CPU, without its products of matrices.

Source: as in `_matrix_memory.py`, whose equations and names these are. `_matrix_chunks.py` has the products, for a slab
of chunks at a time, and calls what is here between them.

Rows of `(R, ...)` are the B H memories, of which a thread has those from `row` on; c counts its chunks in the slab.
Values have a last column of ones, so that the last column of the memory is n. What a carried memory would be
multiplied by zero for is not read, since it need not be finite.
"""

import math

import numpy as np

from pliant.kernels._jit import jit_fast


@jit_fast
def gates(log_input, log_forget, reset, mask, m0, keep, enter, m, spoils, first, stop):  # type: ignore[no-untyped-def]
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
def gates_back(log_input, log_forget, reset, mask, m0, m, dm, dinput, dforget, dlog_input, dlog_forget, dm0):  # type: ignore[no-untyped-def]  # fmt: skip
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
def spoil(spoils, reset, mask, h, carried, m):  # type: ignore[no-untyped-def]
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
def load(q, k, v, mask, scale, row, start, chunks, q_, k_, v_, spoils):  # type: ignore[no-untyped-def]
    # A step that is not finite writes nothing here: products over a chunk would carry it into what came before it, and
    # over resets. See `spoil`.
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
def weigh(scores, k_, keep, enter, tiny, start, inside, leaving):  # type: ignore[no-untyped-def]
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
def carry(memory, inside, carried):  # type: ignore[no-untyped-def]
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
def read(near, far, inside, m, mask, eps, limit, row, start, h, total):  # type: ignore[no-untyped-def]
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
def read_back(grad, h, total, m, mask, eps, limit, row, start, back, dm):  # type: ignore[no-untyped-def]
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
def weigh_back(scores, dweights, q_, keep, enter, tiny, start, inside, last, reading, dinput, dforget):  # type: ignore[no-untyped-def]  # fmt: skip
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
def carry_back(back, memory, inside, carried, dlast):  # type: ignore[no-untyped-def]
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
def write_back(near_q, near_k, near_v, far_q, far_k, far_v, q_, k_, inside, last, dlast, mask, scale, row, start,  # type: ignore[no-untyped-def]
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
