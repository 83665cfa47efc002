"""The selective scan of `_selective_scan`, all chunks of time at once.

A program takes one stream, one chunk of `STEPS` steps and `WIDTH` channels, and its N states one after the other, so
that nothing as large as all states of all steps is ever written. First the effect of each chunk on a state, then the
state before each chunk by a scan over chunks, then outputs; backward the same from the end. What is kept for the way
back is the state before each chunk, N / STEPS of the input; everything else is computed again.

States lie as (N, M), channels side by side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels._triton._common import call, combine, flag, flags, new, power, row
from pliant.kernels._triton.linear_scan import scan

STEPS, WIDTH = 64, 16
"""Of a tile."""


@triton.jit
def _place(M, chunks, STEPS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stream, chunk, block of channels, steps `(L, 1)` and channels `(1, W)` of this program."""
    blocks = tl.cdiv(M, WIDTH)
    program = tl.program_id(0)
    chunk = program // blocks % chunks
    t = (chunk * STEPS).to(tl.int64) + tl.arange(0, STEPS)[:, None]  # offsets may exceed 2^31
    m = program % blocks * WIDTH + tl.arange(0, WIDTH)[None, :]
    return (program // blocks // chunks).to(tl.int64), chunk, program % blocks, t, m, m < M


@triton.jit
def _length(dt, reset, mask, b, t, m, is_step, inside, T, M, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    """dt, 0 where no step exists, which then changes nothing; where the state is dropped; and which steps exist."""
    exists = flag(mask, b, t, is_step, T, True)
    length = tl.load(dt + (b * T + t) * M + m, exists & inside, 0).to(wide)
    return length, flag(reset, b, t, is_step, T, False), exists


@triton.jit
def _weight(w, b, t, n, exists, T, N, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    """Column n of B or C, `(L, 1)`."""
    return tl.load(w + (b * T + t) * N + n, exists, 0).to(wide)


@triton.jit
def _reduce(x, dt, A, w, reset, mask, decays, ends, T, M, N, chunks,  # type: ignore[no-untyped-def]
            REVERSE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """What each chunk does to a state, `(B, chunks, N, M)`: decay, and what becomes of zero. From x = u and w = B; or,
    backward, to its gradient, from x = dy and w = C."""
    wide: tl.constexpr = ends.dtype.element_ty
    b, chunk, _block, t, m, inside = _place(M, chunks, STEPS, WIDTH)
    i = tl.arange(0, STEPS)[:, None]
    length, drop, exists = _length(dt, reset, mask, b, t, m, t < T, inside, T, M, wide)
    given = tl.load(x + (b * T + t) * M + m, exists & inside, 0).to(wide)
    for n in range(N):
        a = tl.where(drop, 0, tl.exp(length * tl.load(A + n * M + m, inside, 0)))
        u = given * _weight(w, b, t, n, exists, T, N, wide)
        if REVERSE:
            a, u = tl.associative_scan((a, a * u), 0, combine, reverse=True)
        else:
            a, u = tl.associative_scan((a, length * u), 0, combine)
        at = ((b * chunks + chunk) * N + n) * M + m
        end = 0 if REVERSE else STEPS - 1
        tl.store(decays + at, row(a, i, end)[None, :], inside)
        tl.store(ends + at, row(u, i, end)[None, :], inside)


@triton.jit
def _forward(u, dt, A, B, C, D, reset, mask, marks, y, T, M, N, chunks,  # type: ignore[no-untyped-def]
             STEPS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    wide: tl.constexpr = marks.dtype.element_ty
    b, chunk, _block, t, m, inside = _place(M, chunks, STEPS, WIDTH)
    length, drop, exists = _length(dt, reset, mask, b, t, m, t < T, inside, T, M, wide)
    given = tl.load(u + (b * T + t) * M + m, exists & inside, 0).to(wide)
    out = tl.load(D + m, inside, 0) * given
    for n in range(N):
        a = tl.where(drop, 0, tl.exp(length * tl.load(A + n * M + m, inside, 0)))
        a, h = tl.associative_scan((a, length * given * _weight(B, b, t, n, exists, T, N, wide)), 0, combine)
        mark = tl.load(marks + ((b * chunks + chunk) * N + n) * M + m, inside, 0)
        _, h = combine(a, mark, a, h)
        out += _weight(C, b, t, n, exists, T, N, wide) * h
    out = tl.where(exists, out, 0)
    tl.store(y + (b * T + t) * M + m, out.to(y.dtype.element_ty), (t < T) & inside)


@triton.jit
def _backward(u, dt, A, B, C, D, reset, mask, marks, backs, dy, du, ddt, dA, dB, dC, dD,  # type: ignore[no-untyped-def]
              T, M, N, batch, chunks, STEPS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Gradients from the states before each chunk and the gradients of those after it. Of dA and dD one part for each
    stream and chunk, of dB and dC `(blocks, B, N, T)` one for each block of channels."""
    wide: tl.constexpr = marks.dtype.element_ty
    b, chunk, block, t, m, inside = _place(M, chunks, STEPS, WIDTH)
    i = tl.arange(0, STEPS)[:, None]
    at = (b * T + t) * M + m
    length, drop, exists = _length(dt, reset, mask, b, t, m, t < T, inside, T, M, wide)
    given = tl.load(u + at, exists & inside, 0).to(wide)
    wanted = tl.load(dy + at, exists & inside, 0).to(wide)
    # The step before each, from which a state comes, and the one after it, to which it goes on: within the chunk.
    earlier, drop_earlier, is_earlier = _length(dt, reset, mask, b, t - 1, m, (i > 0) & (t <= T), inside, T, M, wide)
    given_earlier = tl.load(u + at - M, is_earlier & inside, 0).to(wide)
    is_later = (i < STEPS - 1) & (t + 1 < T)
    later, drop_later, _exists = _length(dt, reset, mask, b, t + 1, m, is_later, inside, T, M, wide)
    dx, dlength = tl.zeros_like(length), tl.zeros_like(length)
    for n in range(N):
        state = ((b * chunks + chunk) * N + n) * M + m
        rate = tl.load(A + n * M + m, inside, 0)
        b_n, c_n = _weight(B, b, t, n, exists, T, N, wide), _weight(C, b, t, n, exists, T, N, wide)
        # h_{t-1}, from what came before step t; taking what step t added from h_t would cancel.
        a = tl.where(drop_earlier, 0, tl.exp(earlier * rate))
        x = earlier * given_earlier * _weight(B, b, t - 1, n, is_earlier, T, N, wide)
        a, before = tl.associative_scan((a, x), 0, combine)
        _, before = combine(a, tl.load(marks + state, inside, 0), a, before)
        before = tl.where(drop, 0, before)
        a = tl.where(drop_later, 0, tl.exp(later * rate))
        a, e = tl.associative_scan((a, c_n * wanted), 0, combine, reverse=True)
        _, e = combine(a, tl.load(backs + state, inside, 0), a, e)
        decay = tl.exp(length * rate)
        now = decay * before + length * given * b_n
        power = e * decay * before
        dx += e * b_n
        dlength += power * rate
        tl.store(dA + state, tl.sum(power * length, 0)[None, :], inside)
        over_time = ((block.to(tl.int64) * batch + b) * N + n) * T + t
        tl.store(dB + over_time, tl.sum(e * length * given, 1)[:, None], t < T)
        tl.store(dC + over_time, tl.sum(wanted * now, 1)[:, None], t < T)
    dgiven = dx * length + tl.load(D + m, inside, 0) * wanted
    dlength = tl.where(exists, dx * given + dlength, 0)
    tl.store(du + at, dgiven.to(du.dtype.element_ty), (t < T) & inside)
    tl.store(ddt + at, dlength.to(ddt.dtype.element_ty), (t < T) & inside)
    tl.store(dD + (b * chunks + chunk) * M + m, tl.sum(wanted * given, 0)[None, :], inside)


def _sizes(u: Tensor, A: Tensor) -> tuple[int, int, dict[str, int]]:
    """Number of chunks, number of blocks of channels, and the tile."""
    _, steps, channels = u.shape
    tile = {"STEPS": power(steps, STEPS), "WIDTH": power(channels, WIDTH)}
    return -(-steps // tile["STEPS"]), -(-channels // tile["WIDTH"]), tile


def _over_chunks(
    x: Tensor, dt: Tensor, A: Tensor, w: Tensor, start: Tensor, reset: Tensor | None, mask: Tensor | None, reverse: bool
) -> tuple[Tensor, Tensor]:
    """States `(B, chunks, N, M)` before each chunk, in the order of the scan, and the last; A `(N, M)`, start
    `(B, N, M)`."""
    batch, steps, channels = x.shape
    chunks, blocks, tile = _sizes(x, A)
    decays, ends = (start.new_empty(batch, chunks, *A.shape) for _ in range(2))
    sizes = (steps, channels, A.shape[0], chunks)
    call(_reduce, batch * chunks * blocks, x, x, dt, A, w, reset, mask, decays, ends, *sizes, REVERSE=reverse, **tile)
    flat_decays, flat_ends = (x.flatten(2).flip(1) if reverse else x.flatten(2) for x in (decays, ends))
    after, last = scan(flat_decays, flat_ends, start.flatten(1), None)
    states = torch.cat([start.flatten(1)[:, None], after[:, :-1]], 1)
    return (states.flip(1) if reverse else states).view(decays.shape), last.view(start.shape)


@torch.library.custom_op("pliant::selective_scan_triton", mutates_args=())
def _op(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """y, the last state, and the states before each chunk."""
    batch, steps, channels = u.shape
    chunks, blocks, tile = _sizes(u, A)
    u, dt, B, C, D = (x.contiguous() for x in (u, dt, B, C, D))
    turned, start, y = A.mT.contiguous(), h0.mT.contiguous(), new(u)
    which = flags(reset), flags(mask)
    marks, last = _over_chunks(u, dt, turned, B, start, *which, False)
    sizes = (steps, channels, A.shape[1], chunks)
    call(_forward, batch * chunks * blocks, u, u, dt, turned, B, C, D, *which, marks, y, *sizes, **tile)
    return y, last.mT.contiguous(), marks


@torch.library.custom_op("pliant::selective_scan_triton_backward", mutates_args=())
def _op_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reset: Tensor | None, mask: Tensor | None,
    marks: Tensor, grad_y: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, steps, channels = u.shape
    chunks, blocks, tile = _sizes(u, A)
    u, dt, B, C, D, grad_y = (x.contiguous() for x in (u, dt, B, C, D, grad_y))
    turned, size = A.mT.contiguous(), A.shape[1]
    which = flags(reset), flags(mask)
    backs, dh0 = _over_chunks(grad_y, dt, turned, C, grad_last.mT.contiguous(), *which, True)
    du, ddt, dA = new(u), new(dt), new(marks)
    dB, dC = (marks.new_empty(blocks, batch, size, steps) for _ in range(2))
    dD = marks.new_empty(batch * chunks, channels)
    given, found = (u, dt, turned, B, C, D, *which, marks, backs, grad_y), (du, ddt, dA, dB, dC, dD)
    sizes = (steps, channels, size, batch, chunks)
    call(_backward, batch * chunks * blocks, u, *given, *found, *sizes, **tile)
    dB, dC = (x.sum(0).mT.contiguous().to(like.dtype) for x, like in ((dB, B), (dC, C)))
    return du, ddt, dA.sum((0, 1)).mT.contiguous(), dB, dC, dD.sum(0), dh0.mT.contiguous()


@_op.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    chunks, _, _ = _sizes(u, A)
    return new(u), new(h0), h0.new_empty(u.shape[0], chunks, A.shape[1], A.shape[0])


@_op_backward.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reset: Tensor | None, mask: Tensor | None,
    marks: Tensor, grad_y: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return new(u), new(dt), new(A), new(B), new(C), new(D), new(grad_last)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    u, dt, A, B, C, D, h0, reset, mask = inputs
    ctx.save_for_backward(u, dt, A, B, C, D, reset, mask, output[2])
    ctx.mark_non_differentiable(output[2])
    ctx.shape = h0.shape
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_y: Tensor | None, grad_last: Tensor | None, _):  # type: ignore[no-untyped-def]
    *_, marks = ctx.saved_tensors
    grad_y = torch.zeros_like(ctx.saved_tensors[0]) if grad_y is None else grad_y
    grad_last = marks.new_zeros(ctx.shape) if grad_last is None else grad_last
    return *_op_backward(*ctx.saved_tensors, grad_y, grad_last), None, None


_op.register_autograd(_gradients, setup_context=_keep)


def run(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As the readable form, with u, dt, B and C as narrow as they were given; A, D and h0 of one wide type."""
    if not (u.numel() and A.numel()):
        return D * u, h0.clone()
    y, last, _ = _op(u, dt, A, B, C, D, h0, reset, mask)
    return y, last
