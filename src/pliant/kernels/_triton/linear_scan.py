"""The diagonal linear recurrence of `_linear_scan`, which waits for memory: as few bytes as possible, all in flight.

One program takes one stream and some channels through time, `STEPS` steps at a time. A row of a tile is `LINE` bytes,
so every access is whole cache lines; loads of the next tiles do not wait for the state and are in flight
while a tile is scanned (`num_stages`). Forward that reads a and u once and writes h once, backward it reads a, g, h
and writes da and du: as little as there can be. A multiprocessor of an H100 needs some 20 KB in flight; one program has
32 KB, so one program each should fill the machine, as (8, 4096, 1024) does with 256.

With fewer programs than that, time is cut into pieces as well. Then a and u are read twice, which costs 5 bytes where 3
would do, and is worth it from about half a machine down.

Complex numbers are pairs of reals, taken apart and put together within a tile, so that lines stay whole.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels._triton._common import call, combine, combine_complex, flags, new, power, processors, row


class Tile(NamedTuple):
    """What a program works on at a time: steps, bytes of a row, tiles that are being loaded or worked on, and warps."""

    steps: int
    line: int
    stages: int
    warps: int


FORWARD, BACKWARD = Tile(64, 128, 3, 4), Tile(32, 128, 3, 4)
"""The best of thirteen each on an H100. Forward, half the line is 2 % faster, but 30 % slower where time is cut."""


@triton.jit
def _parts(x, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Real and imaginary parts `(L, D)` of x `(L, D PARTS)`; where there is but one, that twice."""
    if PARTS == 2:
        return tl.split(tl.reshape(x, (x.shape[0], x.shape[1] // 2, 2)))
    else:
        return x, x


@triton.jit
def _whole(re, im, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    if PARTS == 2:
        return tl.reshape(tl.join(re, im), (re.shape[0], re.shape[1] * 2))
    else:
        return re


@triton.jit
def _scan(ar, ai, ur, ui, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Decays up to each row, and what the rows make of a state of zero."""
    if PARTS == 2:
        return tl.associative_scan((ar, ai, ur, ui), 0, combine_complex)
    else:
        a, u = tl.associative_scan((ar, ur), 0, combine)
        return a, a, u, u


@triton.jit
def _apply(ar, ai, ur, ui, re, im, PARTS: tl.constexpr):  # type: ignore[no-untyped-def]
    """a h + u, by the same rules as the scan."""
    if PARTS == 2:
        _, _, u, v = combine_complex(ar, ai, re, im, ar, ai, ur, ui)
        return u, v
    else:
        _, u = combine(ar, re, ar, ur)
        return u, u


@triton.jit
def _tile(a, u, reset, b, t0, i, col, inside, T, a_b, a_t, u_b, u_t,  # type: ignore[no-untyped-def]
          WIDE: tl.constexpr, PARTS: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    """Decay and input of STEPS steps, in the order of the scan, i `(L, 1)`; backward a_{t+1}* and g_t from the end."""
    b, t0 = b.to(tl.int64), t0.to(tl.int64)  # offsets may exceed 2^31; those within a tile do not
    t = i
    s = t
    if REVERSE:
        t = i.shape[0] - 1 - i
        s = t + 1
    is_step = t0 + s < T
    decay = tl.load(a + b * a_b + t0 * a_t + s * a_t + col, is_step & inside, 0).to(WIDE)
    given = tl.load(u + b * u_b + t0 * u_t + t * u_t + col, (t0 + t < T) & inside, 0).to(WIDE)
    ar, ai = _parts(decay, PARTS)
    ur, ui = _parts(given, PARTS)
    # What is no step changes nothing; nor does the step after the last, on whose side the gradient of the state comes.
    ar = tl.where(is_step, ar, 1)
    if REVERSE:
        ai = -ai
    if reset is not None:
        drop = tl.load(reset + b * T + t0 + s, is_step, 0) != 0
        ar, ai = tl.where(drop, 0, ar), tl.where(drop, 0, ai)
    return ar, ai, ur, ui


@triton.jit
def _place(D, pieces, PARTS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stream, piece of time, and channels of this program."""
    blocks = tl.cdiv(D, WIDTH)
    program = tl.program_id(0)
    col = (program % blocks) * WIDTH * PARTS + tl.arange(0, WIDTH * PARTS)[None, :]
    return program // blocks // pieces, program // blocks % pieces, col, col < D * PARTS


@triton.jit
def _reduce(a, u, reset, decays, ends, T, D, pieces, length, a_b, a_t, u_b, u_t,  # type: ignore[no-untyped-def]
            PARTS: tl.constexpr, REVERSE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr,
            STAGES: tl.constexpr):  # fmt: skip
    """What each piece of time does to a state: its decay, and what it makes of zero, `(B, pieces, D)`."""
    wide: tl.constexpr = ends.dtype.element_ty
    b, piece, col, inside = _place(D, pieces, PARTS, WIDTH)
    i = tl.arange(0, STEPS)[:, None]
    pr = tl.full((1, WIDTH), 1, wide)
    pi, er, ei = tl.zeros((1, WIDTH), wide), tl.zeros((1, WIDTH), wide), tl.zeros((1, WIDTH), wide)
    start = piece * length
    tiles = tl.cdiv(tl.minimum(length, T - start), STEPS)
    for n in tl.range(0, tiles, num_stages=STAGES):
        t0 = start + ((tiles - 1 - n) if REVERSE else n) * STEPS
        ar, ai, ur, ui = _tile(a, u, reset, b, t0, i, col, inside, T, a_b, a_t, u_b, u_t, wide, PARTS, REVERSE)
        ar, ai, ur, ui = _scan(ar, ai, ur, ui, PARTS)
        ar, ai = row(ar, i, STEPS - 1)[None, :], row(ai, i, STEPS - 1)[None, :]
        ur, ui = row(ur, i, STEPS - 1)[None, :], row(ui, i, STEPS - 1)[None, :]
        er, ei = _apply(ar, ai, ur, ui, er, ei, PARTS)
        if PARTS == 2:
            pr, pi = ar * pr - ai * pi, ar * pi + ai * pr
        else:
            pr = ar * pr
    at = (b.to(tl.int64) * pieces + piece) * D * PARTS + col
    tl.store(decays + at, _whole(pr, pi, PARTS), inside)
    tl.store(ends + at, _whole(er, ei, PARTS), inside)


@triton.jit
def _forward(a, u, starts, reset, h, last, T, D, pieces, length, a_b, a_t, u_b, u_t,  # type: ignore[no-untyped-def]
             PARTS: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """All states, from the one before each piece, `(B, pieces, D)`."""
    wide: tl.constexpr = starts.dtype.element_ty
    b, piece, col, inside = _place(D, pieces, PARTS, WIDTH)
    i = tl.arange(0, STEPS)[:, None]
    wide_b = b.to(tl.int64)
    now = tl.load(starts + (wide_b * pieces + piece) * D * PARTS + col, inside, 0)
    re, im = _parts(now, PARTS)
    start = piece * length
    tiles = tl.cdiv(tl.minimum(length, T - start), STEPS)
    for n in tl.range(0, tiles, num_stages=STAGES):
        t0 = start + n * STEPS
        ar, ai, ur, ui = _tile(a, u, reset, b, t0, i, col, inside, T, a_b, a_t, u_b, u_t, wide, PARTS, False)
        ar, ai, ur, ui = _scan(ar, ai, ur, ui, PARTS)
        ur, ui = _apply(ar, ai, ur, ui, re, im, PARTS)
        to = h + (wide_b * T + t0) * D * PARTS + i * D * PARTS + col
        tl.store(to, _whole(ur, ui, PARTS).to(h.dtype.element_ty), (t0 + i < T) & inside)
        re, im = row(ur, i, STEPS - 1)[None, :], row(ui, i, STEPS - 1)[None, :]
    tl.store(last + wide_b * D * PARTS + col, _whole(re, im, PARTS), inside & (piece == pieces - 1))


@triton.jit
def _backward(a, g, starts, reset, h, h0, da, du, first, T, D, pieces, length, a_b, a_t, g_b, g_t,  # type: ignore[no-untyped-def]
              PARTS: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """da and du from the d that comes from after each piece, and d of the first step `(B, D)`."""
    wide: tl.constexpr = starts.dtype.element_ty
    b, piece, col, inside = _place(D, pieces, PARTS, WIDTH)
    i = tl.arange(0, STEPS)[:, None]
    wide_b = b.to(tl.int64)
    re, im = _parts(tl.load(starts + (wide_b * pieces + piece) * D * PARTS + col, inside, 0), PARTS)
    before_all = tl.load(h0 + wide_b * D * PARTS + col, inside, 0)
    start = piece * length
    tiles = tl.cdiv(tl.minimum(length, T - start), STEPS)
    for n in tl.range(0, tiles, num_stages=STAGES):
        t0 = start + (tiles - 1 - n) * STEPS
        ar, ai, ur, ui = _tile(a, g, reset, b, t0, i, col, inside, T, a_b, a_t, g_b, g_t, wide, PARTS, True)
        ar, ai, ur, ui = _scan(ar, ai, ur, ui, PARTS)
        ur, ui = _apply(ar, ai, ur, ui, re, im, PARTS)
        t = t0 + STEPS - 1 - i
        here = (wide_b * T + t0) * D * PARTS + (STEPS - 1 - i) * D * PARTS + col
        exists = (t < T) & inside
        tl.store(du + here, _whole(ur, ui, PARTS).to(du.dtype.element_ty), exists)
        before = tl.load(h + here - D * PARTS, exists & (t > 0), 0).to(wide)
        xr, xi = _parts(tl.where(t == 0, before_all, before), PARTS)
        if PARTS == 2:
            yr, yi = ur * xr + ui * xi, ui * xr - ur * xi
        else:
            yr, yi = ur * xr, ui * xi
        if reset is not None:
            drop = tl.load(reset + wide_b * T + t, t < T, 0) != 0
            yr, yi = tl.where(drop, 0, yr), tl.where(drop, 0, yi)
        tl.store(da + here, _whole(yr, yi, PARTS).to(da.dtype.element_ty), exists)
        re, im = row(ur, i, STEPS - 1)[None, :], row(ui, i, STEPS - 1)[None, :]
    tl.store(first + wide_b * D * PARTS + col, _whole(re, im, PARTS), inside & (piece == 0))


class Plan(NamedTuple):
    """How a call is cut: pieces of time and their length, the number of programs, and constants of the kernel."""

    pieces: int
    length: int
    programs: int
    constants: dict[str, int]


def cut(x: Tensor, tile: Tile) -> Plan:
    """How to cut a call with inputs like x `(B, T, D)` into tiles, or smaller ones."""
    batch, steps, channels = x.shape
    size, width = power(steps, tile.steps), power(channels, tile.line // x.element_size())
    alone, machine = batch * -(-channels // width), processors(x.device)
    tiles, pieces = -(-steps // size), 1
    if 2 * alone < machine:
        pieces = max(1, min(tiles // 4, -(-2 * machine // max(1, alone))))
    length = size * -(-tiles // pieces)
    pieces = -(-steps // length)
    constants = {"STEPS": size, "WIDTH": width, "STAGES": tile.stages, "num_warps": tile.warps}
    return Plan(pieces, length, alone * pieces, constants)


def _reals(x: Tensor) -> Tensor:
    """x with the numbers of a row in one piece, complex ones as two reals after each other."""
    x = x.resolve_conj().resolve_neg()
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    return torch.view_as_real(x).flatten(-2) if x.is_complex() else x


def _start(a: Tensor, u: Tensor, start: Tensor, reset: Tensor | None, plan: Plan, reverse: bool) -> Tensor:
    """The state before each piece in the order of the scan, `(B, pieces, D)`."""
    if plan.pieces == 1:
        return start.contiguous()
    batch, steps, width = u.shape
    decays, ends = (start.new_empty(batch, plan.pieces, width) for _ in range(2))
    x, y, found = _reals(a), _reals(u), (_reals(decays), _reals(ends))
    sizes = (steps, width, plan.pieces, plan.length, *x.stride()[:2], *y.stride()[:2])
    call(_reduce, plan.programs, u, x, y, flags(reset), *found, *sizes,
         PARTS=1 + u.is_complex(), REVERSE=reverse, **plan.constants)  # fmt: skip
    if reverse:
        decays, ends = decays.flip(1), ends.flip(1)
    after, _ = scan(decays, ends, start, None)
    states = torch.cat([start[:, None], after[:, :-1]], 1)
    return states.flip(1) if reverse else states


def scan(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence without its gradient; T > 0."""
    _, steps, width = u.shape
    plan = cut(u, FORWARD)
    h, last = new(u), new(h0)
    x, y, starts = _reals(a), _reals(u), _reals(_start(a, u, h0, reset, plan, False))
    sizes = (steps, width, plan.pieces, plan.length, *x.stride()[:2], *y.stride()[:2])
    call(_forward, plan.programs, u, x, y, starts, flags(reset), _reals(h), _reals(last), *sizes,
         PARTS=1 + u.is_complex(), **plan.constants)  # fmt: skip
    return h, last


@torch.library.custom_op("pliant::linear_scan_triton", mutates_args=())
def _op(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return scan(a, u, h0, reset)


@torch.library.custom_op("pliant::linear_scan_triton_backward", mutates_args=())
def _op_backward(
    a: Tensor, h: Tensor, h0: Tensor, reset: Tensor | None, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    _, steps, width = h.shape
    plan = cut(h, BACKWARD)
    da, du, first = new(h, a.dtype), new(h), new(h0)
    x, g, starts = _reals(a), _reals(grad_h), _reals(_start(a, grad_h, grad_last, reset, plan, True))
    sizes = (steps, width, plan.pieces, plan.length, *x.stride()[:2], *g.stride()[:2])
    kept = (_reals(h), _reals(h0.contiguous()))
    found = (_reals(da), _reals(du), _reals(first))
    call(_backward, plan.programs, h, x, g, starts, flags(reset), *kept, *found, *sizes,
         PARTS=1 + h.is_complex(), **plan.constants)  # fmt: skip
    dh0 = a[:, 0].conj() * first
    return da, du, dh0 if reset is None else torch.where(reset[:, 0, None], 0, dh0)


@_op.register_fake
def _(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return new(u), new(h0)


@_op_backward.register_fake
def _(
    a: Tensor, h: Tensor, h0: Tensor, reset: Tensor | None, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return new(h, a.dtype), new(h), new(h0)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    a, _, h0, reset = inputs
    ctx.save_for_backward(a, output[0], h0, reset)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_h: Tensor | None, grad_last: Tensor | None):  # type: ignore[no-untyped-def]
    a, h, h0, reset = ctx.saved_tensors
    grad_h = h.new_zeros(()).expand_as(h) if grad_h is None else grad_h
    grad_last = torch.zeros_like(h0) if grad_last is None else grad_last
    return *_op_backward(a, h, h0, reset, grad_h, grad_last), None


_op.register_autograd(_gradients, setup_context=_keep)


def run(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """As `scan_loop`, with a and u as narrow as they were given, and the state in the type of `h0`."""
    if not u.numel():
        return torch.empty_like(u), h0
    if h0.is_complex():
        a, u = a.to(h0.dtype), u.to(h0.dtype)
    return _op(a, u, h0, reset)
