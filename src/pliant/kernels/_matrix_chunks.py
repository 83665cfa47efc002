"""The fast form of `matrix_memory` on a CPU: chunks, products of matrices by torch, the rest by Numba; as a custom op.

Source: as in `_matrix_memory.py`, whose equations and names these are.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pliant.kernels import _matrix_kernels as kernels
from pliant.kernels._autocast import own_precision
from pliant.kernels._jit import over_jobs
from pliant.kernels._operator import operator

SLAB = 1 << 20
"""Bytes of keys, values and memory that are worked on together, so that they stay near the processor."""


def limit(dtype: torch.dtype) -> float:
    """Largest -m of which e^-m is taken, short of overflow."""
    return 0.9 * math.log(torch.finfo(dtype).max)


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
        over_jobs(lambda *part: kernels.gates(*given, *part), plan.rows, 16 * plan.rows * plan.steps)

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
        _run(kernels.load, *given, self.row, self.start, chunks, self.q, self.k, self.v, arrays.spoils)

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
        _run(kernels.spoil, arrays.spoils, arrays.reset, arrays.mask, h, carried, arrays.m)
    m = torch.from_numpy(arrays.m[:, plan.steps - 1].copy())
    return h, carried.reshape(memory.shape), m.reshape(m0.shape), total, starts.flatten()


def _slab_forward(slab: _Slab, arrays: _Arrays, carried: Tensor, h: Tensor, total: Tensor) -> Tensor:
    """Write what a slab reads; `carried`, the memory before it, becomes that after it. The memory before each chunk."""
    keep, enter, m = (x[slab.rows] for x in (arrays.keep, arrays.enter, arrays.m))
    weights = torch.bmm(slab.q, slab.k.mT)
    inside, leaving = slab.empty(slab.size), torch.empty_like(slab.k)
    _run(kernels.weigh, weights, slab.k, keep, enter, arrays.tiny, slab.start, inside, leaving)
    before = torch.bmm(leaving.mT, slab.v)
    _run(kernels.carry, before.flatten(1), inside, carried)
    near, far = torch.bmm(weights, slab.v), torch.bmm(slab.q, before)
    _run(kernels.read, near, far, inside, m, arrays.mask, arrays.eps, arrays.limit, slab.row, slab.start, h, total)
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
    _run(kernels.gates_back, *arrays.gates, arrays.m, dm, dinput, dforget, dlog_input, dlog_forget, dm0)
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
    _run(kernels.read_back, *read, m, arrays.mask, arrays.eps, arrays.limit, slab.row, slab.start, back, grads.m)
    scores, dscores = torch.bmm(slab.q, slab.k.mT), torch.bmm(back, slab.v.mT)
    inside, last, reading = slab.empty(slab.size), slab.empty(slab.size), torch.empty_like(slab.q)
    gates = (keep, enter, arrays.tiny, slab.start)
    _run(kernels.weigh_back, scores, dscores, slab.q, *gates, inside, last, reading, grads.log_input, grads.log_forget)
    after, before = torch.bmm(reading.mT, back), starts.flatten(0, 1)
    dlast = slab.empty()
    _run(kernels.carry_back, after.flatten(1), before, inside, carried, dlast)
    before = before.view(after.shape)
    near = (torch.bmm(dscores, slab.k), torch.bmm(dscores.mT, slab.q), torch.bmm(scores.mT, back[..., :-1]))
    far = (torch.bmm(back, before.mT), torch.bmm(slab.v, after.mT), torch.bmm(slab.k, after[..., :-1]))
    rest = (slab.q, slab.k, inside, last, dlast, arrays.mask, arrays.scale, slab.row, slab.start)
    _run(kernels.write_back, *near, *far, *rest, *grads[:3], grads.log_input, grads.log_forget)


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
