"""Diagonal linear recurrence.

    h_t = a_t h_{t-1} + u_t,        t = 0 … T-1, element by element, real or complex

Backward, with g_t = dL/dh_t (dL/dh_last added to the last) and * the complex conjugate:

    d_t = g_t + a_{t+1}* d_{t+1},   dL/du_t = d_t,   dL/da_t = d_t h_{t-1}*,   dL/dh_{-1} = a_0* d_0

A reset at t replaces h_{t-1} by zero.
Cost: O(B T D) time; the backward pass keeps a and h. The fast form waits for memory: it reads and writes about
what a copy of the same bytes does.
"""

from collections.abc import Iterator
from threading import Semaphore

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._autocast import own_precision
from pliant.kernels._jit import SMALL, at_once, jit, over_slices, populate, whole_pages
from pliant.kernels._operator import operator
from pliant.kernels.select import select


@own_precision
def linear_scan(
    a: Shaped[Tensor, "B T D"],
    u: Shaped[Tensor, "B T D"],
    h0: Shaped[Tensor, "B D"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    *,
    form: str | None = None,
) -> tuple[Shaped[Tensor, "B T D"], Shaped[Tensor, "B D"]]:
    """Run h_t = a_t h_{t-1} + u_t along axis 1.

    Args:
        a: decay, `(B, T, D)`, real or complex.
        u: input, `(B, T, D)`.
        h0: state before the first step, `(B, D)`; None means zeros.
        reset: `(B, T)`, true where the state is dropped before the step; None means nowhere.
        form: `"loop"` (readable, any device), `"numba"` (CPU) or `"triton"` (CUDA); None chooses.

    Returns:
        h: `(B, T, D)`, in the dtype of `u`.
        h_last: `(B, D)`, computed and returned in at least float32.

    Raises:
        UsageError: shapes do not fit.
    """
    _check(a, u, h0, reset)
    wide = torch.promote_types(torch.promote_types(a.dtype, u.dtype), torch.float32)
    if h0 is not None:
        wide = torch.promote_types(wide, h0.dtype)
    start = u.new_zeros(u.shape[0], u.shape[2], dtype=wide) if h0 is None else h0.to(wide)
    # One step is plain torch, so that a step can be exported and costs no detour.
    forms = {"loop": scan_loop, "numba": _scan_numba, "triton": _scan_triton}
    out = wide if wide.is_complex else u.dtype
    scan = scan_loop if u.shape[1] <= 1 and form is None else select("linear_scan", forms, u, form)
    if scan is not _scan_triton:  # which widens what it has read
        a, u = a.to(wide), u.to(wide)
    h, h_last = scan(a, u, start, reset)
    return h.to(out), h_last


def scan_loop(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written above; shapes as in `linear_scan`."""
    h, hs = h0, []
    for t in range(u.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None], 0, h)
        h = a[:, t] * h + u[:, t]
        hs.append(h)
    return (torch.stack(hs, 1) if hs else torch.empty_like(u)), h


def _check(a: Tensor, u: Tensor, h0: Tensor | None, reset: Tensor | None) -> None:
    if u.ndim != 3 or a.shape != u.shape:
        raise UsageError(
            f"linear_scan: a is {tuple(a.shape)} and u is {tuple(u.shape)}; both must be the same (B, T, D)"
        )
    batch, steps, width = u.shape
    if h0 is not None and h0.shape != (batch, width):
        raise UsageError(f"linear_scan: h0 is {tuple(h0.shape)}, expected ({batch}, {width})")
    if reset is not None and (reset.shape != (batch, steps) or reset.dtype != torch.bool):
        raise UsageError(
            f"linear_scan: reset is {reset.dtype} {tuple(reset.shape)}, expected torch.bool ({batch}, {steps})"
        )


# The fast form. Arrays are read and written in one direction only: forward along rising addresses, backward along
# strictly falling ones (rows taken from left to right on a way that goes up run at a third of the speed). No
# branch stands inside a loop over steps, so stretches between resets are looked for first. Loops run over
# slices [b0, b1) x [d0, d1), see over_slices.
#
# `a` and the gradient of h may be one row for all steps or streams, where an expanded tensor repeats it; `reset`
# is empty where there is none.

FEW_THREADS = 3
"""Up to here, fewer streams than threads do not share rows: half a row at a time is read at a third of the speed."""
TILE = 1 << 18
"""Bytes of each array that the backward pass takes at a time, so that it finds them in the cache again."""


@jit
def _next_reset(reset, b, t, end):  # type: ignore[no-untyped-def]
    """The first reset at t or later, or `end`."""
    if reset.shape[0] > 0:
        for s in range(t, end):
            if reset[b, s]:
                return s
    return end


@jit
def _latest_reset(reset, b, t, start):  # type: ignore[no-untyped-def]
    """The last reset at t or earlier, or start - 1."""
    if reset.shape[0] > 0:
        for s in range(t, start - 1, -1):
            if reset[b, s]:
                return s
    return start - 1


@jit
def _forward(a, u, reset, h, last, b0, b1, d0, d1):  # type: ignore[no-untyped-def]
    # last is the state before the first step, and then after each. What was just written to h cannot be read
    # back as fast.
    at, steps = a.shape[1] - 1, u.shape[1]
    for b in range(b0, b1):
        ab = min(b, a.shape[0] - 1)
        t = 0
        while t < steps:
            end = _next_reset(reset, b, t, steps)
            for s in range(t, end):
                x, y, now, state = a[ab, min(s, at), d0:d1], u[b, s, d0:d1], h[b, s, d0:d1], last[b, d0:d1]
                for d in range(d1 - d0):
                    e = x[d] * state[d] + y[d]
                    now[d] = e
                    state[d] = e
            if end < steps:
                y, now, state = u[b, end, d0:d1], h[b, end, d0:d1], last[b, d0:d1]
                for d in range(d1 - d0):
                    now[d] = y[d]
                    state[d] = y[d]
            t = end + 1


@jit
def _backward_scan(a, reset, g, du, dh0, b, t0, t1, d0, d1):  # type: ignore[no-untyped-def]
    """du over steps [t0, t1); dh0 carries the gradient that flows back from step t + 1."""
    ab, at = min(b, a.shape[0] - 1), a.shape[1] - 1
    gb, gt = min(b, g.shape[0] - 1), g.shape[1] - 1
    t = t1 - 1
    while t >= t0:
        first = _latest_reset(reset, b, t, t0)
        for s in range(t, first, -1):
            x, y, dy, back = a[ab, min(s, at), d0:d1], g[gb, min(s, gt), d0:d1], du[b, s, d0:d1], dh0[b, d0:d1]
            for d in range(d1 - d0 - 1, -1, -1):
                e = y[d] + back[d]
                dy[d] = e
                back[d] = e * x[d].conjugate()
        if first >= t0:
            y, dy, back = g[gb, min(first, gt), d0:d1], du[b, first, d0:d1], dh0[b, d0:d1]
            for d in range(d1 - d0):
                dy[d] = y[d] + back[d]
                back[d] = 0
        t = first - 1


@jit
def _backward_product(h, h0, reset, du, da, b, t0, t1, d0, d1):  # type: ignore[no-untyped-def]
    """da over steps [t0, t1), from the du of those steps."""
    t = t1 - 1
    while t >= t0:
        first = _latest_reset(reset, b, t, t0)
        for s in range(t, max(first, 0), -1):
            before, dy, dx = h[b, s - 1, d0:d1], du[b, s, d0:d1], da[b, s, d0:d1]
            for d in range(d1 - d0 - 1, -1, -1):
                dx[d] = dy[d] * before[d].conjugate()
        if first >= t0:
            dx = da[b, first, d0:d1]
            for d in range(d1 - d0):
                dx[d] = 0
        elif t0 == 0:
            before, dy, dx = h0[b, d0:d1], du[b, 0, d0:d1], da[b, 0, d0:d1]
            for d in range(d1 - d0):
                dx[d] = dy[d] * before[d].conjugate()
        t = first - 1


@jit
def _backward(a, h, h0, reset, g, da, du, dh0, tile, b0, b1, d0, d1):  # type: ignore[no-untyped-def]
    # Two loops with three arrays each are faster than one with five.
    for b in range(b0, b1):
        t1 = h.shape[1]
        while t1 > 0:
            t0 = max(0, t1 - tile)
            _backward_scan(a, reset, g, du, dh0, b, t0, t1, d0, d1)
            _backward_product(h, h0, reset, du, da, b, t0, t1, d0, d1)
            t1 = t0


def _array(x: Tensor) -> np.ndarray:
    return x.detach().resolve_conj().resolve_neg().contiguous().numpy()


def _copy(x: Tensor) -> Tensor:
    return x.resolve_conj().resolve_neg().clone(memory_format=torch.contiguous_format)


def _rows(x: Tensor) -> np.ndarray:
    """x `(B, T, D)` as an array, with one row where an expanded axis repeats it."""
    for axis in (0, 1):
        if x.stride(axis) == 0 and x.shape[axis]:
            x = x.narrow(axis, 0, 1)
    return _array(x)


def _flags(reset: Tensor | None) -> np.ndarray:
    return np.zeros((0, 0), dtype=np.bool_) if reset is None else _array(reset)


def _by_rows(x: Tensor) -> bool:
    """Whether there are fewer streams than threads, but too few threads to share rows."""
    return x.shape[0] < torch.get_num_threads() <= FEW_THREADS and x.numel() >= SMALL


def _tiles(x: Tensor) -> Iterator[tuple[int, int, int]]:
    """Stream and steps of the tiles of x `(B, T, D)`, steps falling."""
    batch, steps, _ = x.shape
    tile = _tile(x)
    for b in range(batch):
        for t1 in range(steps, 0, -tile):
            yield b, max(0, t1 - tile), t1


def _tile(x: Tensor) -> int:
    return max(1, TILE // max(1, x.shape[2] * x.element_size()))


@operator("pliant::linear_scan")
def _scan(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, steps, width = u.shape
    h = whole_pages(torch.empty_like(u, memory_format=torch.contiguous_format))
    last = _copy(h0)
    arrays = [_rows(a), _array(u), _flags(reset), h.numpy(), last.numpy()]
    if _by_rows(u):
        at_once([lambda: _forward(*arrays, 0, batch, 0, width), lambda: populate(h)])
    else:
        over_slices(lambda *part: _forward(*arrays, *part), batch, width, steps)
    return h, last


@operator("pliant::linear_scan_backward")
def _scan_backward(
    a: Tensor, h: Tensor, h0: Tensor, reset: Tensor | None, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, width = h.shape
    da, du = whole_pages(torch.empty_like(h)), whole_pages(torch.empty_like(h))
    dh0 = _copy(grad_last)
    x, now, start, flags, g = _rows(a), _array(h), _array(h0), _flags(reset), _rows(grad_h)
    dx, dy, back = da.numpy(), du.numpy(), dh0.numpy()
    if _by_rows(h):
        ready = Semaphore(0)

        def products() -> None:
            for tile in _tiles(h):
                ready.acquire()
                _backward_product(now, start, flags, dy, dx, *tile, 0, width)

        def scans() -> None:
            for tile in _tiles(h):
                _backward_scan(x, flags, g, dy, back, *tile, 0, width)
                ready.release()

        # The product of a tile needs nothing but its scan, so it follows in another thread.
        at_once([scans, products])
    else:
        arrays = [x, now, start, flags, g, dx, dy, back, _tile(h)]
        over_slices(lambda *part: _backward(*arrays, *part), batch, width, steps)
    return da, du, dh0


@_scan.register_fake
def _(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u, memory_format=torch.contiguous_format), torch.empty_like(
        h0, memory_format=torch.contiguous_format
    )


@_scan_backward.register_fake
def _(
    a: Tensor, h: Tensor, h0: Tensor, reset: Tensor | None, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(h),
        torch.empty_like(h),
        torch.empty_like(grad_last, memory_format=torch.contiguous_format),
    )


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    a, _, h0, reset = inputs
    ctx.save_for_backward(a, output[0], h0, reset)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_h: Tensor | None, grad_last: Tensor | None):  # type: ignore[no-untyped-def]
    a, h, h0, reset = ctx.saved_tensors
    grad_h = h.new_zeros(()).expand_as(h) if grad_h is None else grad_h
    grad_last = torch.zeros_like(h0) if grad_last is None else grad_last
    return *_scan_backward(a, h, h0, reset, grad_h, grad_last), None


_scan.register_autograd(_gradients, setup_context=_keep)


def _scan_numba(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return _scan(a, u, h0, reset)


def _scan_triton(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    from pliant.kernels._triton.linear_scan import run

    return run(a, u, h0, reset)
