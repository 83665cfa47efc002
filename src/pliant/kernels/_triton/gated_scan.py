"""The recurrence of the gated LRU with its gates, `_gated_scan`, in one pass: x, p, r in and h out.

Cut as `linear_scan`. Backward everything but h is computed anew: x, p, r, h, g in and dx, dp, dr out. The sum over
streams and time that is the gradient of the rate is taken in one order, each program writing its part of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels._gated_scan import DECAY_POWER, MAX_SQRT_DERIVATIVE
from pliant.kernels._triton._common import call, combine, flag, flags, new, row, sigmoid
from pliant.kernels._triton.linear_scan import Plan, Tile, cut, scan

FORWARD, BACKWARD = Tile(64, 64, 3, 4), Tile(32, 128, 3, 4)
"""The best of some on an H100; the way back holds more arrays than that of `linear_scan`."""
STEEPEST = tl.constexpr(MAX_SQRT_DERIVATIVE)


@triton.jit
def _decay(r, c, at, exists, inside, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    """How far the decay gate is open, and log a."""
    opened = sigmoid(tl.load(r + at, exists & inside, 0).to(wide))
    return opened, opened * c


@triton.jit
def _input(x, p, log_a, at, exists, inside, is_first, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    """Input, input gate, a², and the root, 1 at a first step."""
    given = tl.load(x + at, exists & inside, 0).to(wide)
    gate = sigmoid(tl.load(p + at, exists & inside, 0).to(wide))
    square = tl.exp(2 * log_a)  # from the logarithm, since a * a rounds twice near 1
    return given, gate, square, tl.where(is_first, 1, tl.sqrt(1 - square))


@triton.jit
def _tile(x, p, r, c, first, reset, mask, b, t0, i, col, inside, T, D):  # type: ignore[no-untyped-def]
    """Decay and input of STEPS steps."""
    wide: tl.constexpr = c.dtype
    t = t0 + i
    at = (b * T + t0) * D + i * D + col
    exists = flag(mask, b, t, t < T, T, True)
    _, log_a = _decay(r, c, at, exists, inside, wide)
    given, gate, _, root = _input(x, p, log_a, at, exists, inside, flag(first, b, t, t < T, T, False), wide)
    # Where nothing exists zeros were loaded, so u is 0 there.
    return _dropped(tl.where(exists, tl.exp(log_a), 1), reset, b, t, T), root * gate * given


@triton.jit
def _dropped(a, reset, b, t, T):  # type: ignore[no-untyped-def]
    return a if reset is None else tl.where(flag(reset, b, t, t < T, T, False), 0, a)


@triton.jit
def _tile_back(r, c, g, reset, mask, b, t0, i, col, inside, T, D):  # type: ignore[no-untyped-def]
    """a_{t+1} and g_t of STEPS steps, from the end on."""
    wide: tl.constexpr = c.dtype
    t = t0 + i.shape[0] - 1 - i
    at = (b * T + t0) * D + (i.shape[0] - 1 - i) * D + col
    exists, later = flag(mask, b, t, t < T, T, True), flag(mask, b, t + 1, t + 1 < T, T, True)
    _, log_a = _decay(r, c, at + D, later, inside, wide)
    a = _dropped(tl.where(later, tl.exp(log_a), 1), reset, b, t + 1, T)
    return a, tl.load(g + at, exists & inside, 0).to(wide)


@triton.jit
def _place(D, pieces, speed, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stream, piece of time, channels of this program, and their speed."""
    blocks = tl.cdiv(D, WIDTH)
    program = tl.program_id(0)
    col = (program % blocks) * WIDTH + tl.arange(0, WIDTH)[None, :]
    c = tl.load(speed + col, col < D, 0)
    # Offsets may exceed 2^31; those within a tile do not.
    return (program // blocks // pieces).to(tl.int64), program // blocks % pieces, col, col < D, c


@triton.jit
def _reduce(x, p, r, g, speed, first, reset, mask, decays, ends, T, D, pieces, length,  # type: ignore[no-untyped-def]
            REVERSE: tl.constexpr, STEPS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """What each piece of time does to a state, or to its gradient: decay, and what becomes of zero `(B, pieces, D)`."""
    b, piece, col, inside, c = _place(D, pieces, speed, WIDTH)
    i = tl.arange(0, STEPS)[:, None]
    product, end = tl.full((1, WIDTH), 1, c.dtype), tl.zeros((1, WIDTH), c.dtype)
    start = piece * length
    tiles = tl.cdiv(tl.minimum(length, T - start), STEPS)
    for n in tl.range(0, tiles, num_stages=STAGES):
        if REVERSE:
            a, u = _tile_back(r, c, g, reset, mask, b, start + (tiles - 1 - n) * STEPS, i, col, inside, T, D)
        else:
            a, u = _tile(x, p, r, c, first, reset, mask, b, start + n * STEPS, i, col, inside, T, D)
        a, u = tl.associative_scan((a, u), 0, combine)
        a = row(a, i, STEPS - 1)[None, :]
        product, end = combine(product, end, a, row(u, i, STEPS - 1)[None, :])
    tl.store(decays + (b * pieces + piece) * D + col, product, inside)
    tl.store(ends + (b * pieces + piece) * D + col, end, inside)


@triton.jit
def _forward(x, p, r, speed, first, reset, mask, starts, h, last, T, D, pieces, length,  # type: ignore[no-untyped-def]
             STEPS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """All states, from the one before each piece, `(B, pieces, D)`."""
    b, piece, col, inside, c = _place(D, pieces, speed, WIDTH)
    i = tl.arange(0, STEPS)[:, None]
    now = tl.load(starts + (b * pieces + piece) * D + col, inside, 0)
    start = piece * length
    tiles = tl.cdiv(tl.minimum(length, T - start), STEPS)
    for n in tl.range(0, tiles, num_stages=STAGES):
        t0 = start + n * STEPS
        a, u = _tile(x, p, r, c, first, reset, mask, b, t0, i, col, inside, T, D)
        a, u = tl.associative_scan((a, u), 0, combine)
        _, u = combine(a, now, a, u)
        now = row(u, i, STEPS - 1)[None, :]
        exists = flag(mask, b, t0 + i, t0 + i < T, T, True)
        to = h + (b * T + t0) * D + i * D + col
        tl.store(to, tl.where(exists, u, 0).to(h.dtype.element_ty), (t0 + i < T) & inside)
    tl.store(last + b * D + col, now, inside & (piece == pieces - 1))


@triton.jit
def _before(h, h0, reset, source, b, t, col, inside, T, D, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    """The state that steps t start from; `source` is its step, -1 before the first, -2 where there is none."""
    if source is None:
        s = t - 1
        if reset is not None:
            s = tl.where(flag(reset, b, t, t < T, T, False), -2, s)
    else:
        s = tl.load(source + b * T + t, t < T, -2)
    start = tl.load(h0 + b * D + col, inside, 0)
    before = tl.load(h + (b * T + s) * D + col, (s >= 0) & (t < T) & inside, 0).to(wide)
    return tl.where(s == -1, start, before)


@triton.jit
def _backward(x, p, r, speed, first, reset, mask, source, starts, h, h0, g, dx, dp, dr, dspeed, dh0,  # type: ignore[no-untyped-def]
              T, D, pieces, length, STEPS: tl.constexpr, WIDTH: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Gradients, from those that come from after each piece; of the speed one part for each stream and piece."""
    b, piece, col, inside, c = _place(D, pieces, speed, WIDTH)
    wide: tl.constexpr = c.dtype
    i = tl.arange(0, STEPS)[:, None]
    back = tl.load(starts + (b * pieces + piece) * D + col, inside, 0)
    dc = tl.zeros((1, WIDTH), wide)
    start = piece * length
    tiles = tl.cdiv(tl.minimum(length, T - start), STEPS)
    for n in tl.range(0, tiles, num_stages=STAGES):
        t0 = start + (tiles - 1 - n) * STEPS
        a, u = _tile_back(r, c, g, reset, mask, b, t0, i, col, inside, T, D)
        a, u = tl.associative_scan((a, u), 0, combine)
        _, d = combine(a, back, a, u)
        back = row(d, i, STEPS - 1)[None, :]
        t = t0 + STEPS - 1 - i
        at = (b * T + t0) * D + (STEPS - 1 - i) * D + col
        exists = flag(mask, b, t, t < T, T, True)
        is_first = flag(first, b, t, t < T, T, False)
        d = tl.where(exists, d, 0)
        opened, log_a = _decay(r, c, at, exists, inside, wide)
        given, gate, square, root = _input(x, p, log_a, at, exists, inside, is_first, wide)
        dput = d * gate
        dlog = d * tl.exp(log_a) * _before(h, h0, reset, source, b, t, col, inside, T, D, wide)
        # 2 a² / max(2 n, 1/G), with G, which is exact in float32, where its inverse is not.
        slope = 2 * square * STEEPEST / tl.maximum(2 * root * STEEPEST, 1)
        dlog -= tl.where(is_first, 0, dput * given * slope)
        stored = (t < T) & inside
        tl.store(dx + at, (dput * root).to(dx.dtype.element_ty), stored)
        tl.store(dp + at, (dput * root * given * (1 - gate)).to(dp.dtype.element_ty), stored)
        tl.store(dr + at, (dlog * log_a * (1 - opened)).to(dr.dtype.element_ty), stored)
        dc += tl.sum(tl.where(exists, dlog * opened, 0), 0)[None, :]
    tl.store(dspeed + (b * pieces + piece) * D + col, dc, inside)
    tl.store(dh0 + b * D + col, back, inside & (piece == 0))


def _starts(inputs: tuple[Tensor | None, ...], start: Tensor, grad: Tensor | None, plan: Plan) -> Tensor:
    """The state before each piece `(B, pieces, D)`; with `grad`, the gradient that comes from after each."""
    if plan.pieces == 1:
        return start.contiguous()
    x, p, r, speed, first, reset, mask = inputs
    assert x is not None
    batch, steps, width = x.shape
    decays, ends = (start.new_empty(batch, plan.pieces, width) for _ in range(2))
    call(_reduce, plan.programs, x, x, p, r, grad, speed, first, reset, mask, decays, ends, steps, width, plan.pieces,
         plan.length, REVERSE=grad is not None, **plan.constants)  # fmt: skip
    order = (lambda y: y) if grad is None else (lambda y: y.flip(1))
    after, _ = scan(order(decays), order(ends), start, None)
    return order(torch.cat([start[:, None], after[:, :-1]], 1))


def _inputs(
    x: Tensor, p: Tensor, r: Tensor, speed: Tensor, first: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor | None, ...]:
    return *(part.contiguous() for part in (x, p, r, speed)), flags(first), flags(reset), flags(mask)


def source(reset: Tensor | None, mask: Tensor) -> Tensor:
    """The existing step before each step, -1 if there is none in this call, -2 after a reset. `(B, T)`."""
    steps = torch.arange(mask.shape[1], device=mask.device)
    newest = torch.where(mask, steps, -1).cummax(1).values
    newest = torch.cat([torch.full_like(newest[:, :1], -1), newest[:, :-1]], 1)
    if reset is None:
        return newest
    # A reset at a step comes before the step.
    return torch.where(torch.where(reset, steps, -1).cummax(1).values > newest, -2, newest)


@torch.library.custom_op("pliant::gated_scan_triton", mutates_args=())
def _op(
    x: Tensor, p: Tensor, r: Tensor, speed: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    _, steps, width = x.shape
    plan, inputs = cut(x, FORWARD), _inputs(x, p, r, speed, first, reset, mask)
    h, last = new(x), new(h0)
    call(_forward, plan.programs, x, *inputs, _starts(inputs, h0, None, plan), h, last, steps, width, plan.pieces,
         plan.length, **plan.constants)  # fmt: skip
    return h, last


@torch.library.custom_op("pliant::gated_scan_triton_backward", mutates_args=())
def _op_backward(
    x: Tensor, p: Tensor, r: Tensor, speed: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None, h: Tensor, grad_h: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, steps, width = x.shape
    plan, inputs, grad_h = cut(x, BACKWARD), _inputs(x, p, r, speed, first, reset, mask), grad_h.contiguous()
    dx, dp, dr, dh0 = new(x), new(p), new(r), new(h0)
    dspeed = speed.new_empty(batch * plan.pieces, width)
    starts = _starts(inputs, grad_last, grad_h, plan)
    origin = None if mask is None else source(reset, mask)
    found = (dx, dp, dr, dspeed, dh0)
    call(_backward, plan.programs, x, *inputs, origin, starts, h, h0.contiguous(), grad_h, *found, steps, width,
         plan.pieces, plan.length, **plan.constants)  # fmt: skip
    # `dh0` is the gradient of the first state, so one decay is left.
    log_a = torch.sigmoid(r[:, 0].to(speed.dtype)) * speed
    decay = log_a.exp() if mask is None else torch.where(mask[:, :1], log_a, 0).exp()
    dh0 = dh0 * decay
    return dx, dp, dr, dspeed.sum(0), dh0 if reset is None else torch.where(reset[:, :1], 0, dh0)


@_op.register_fake
def _(
    x: Tensor, p: Tensor, r: Tensor, speed: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return new(x), new(h0)


@_op_backward.register_fake
def _(
    x: Tensor, p: Tensor, r: Tensor, speed: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None, h: Tensor, grad_h: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return new(x), new(p), new(r), new(speed), new(h0)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[0])


def _gradients(ctx, grad_h: Tensor | None, grad_last: Tensor | None):  # type: ignore[no-untyped-def]
    *inputs, h = ctx.saved_tensors
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h
    grad_last = torch.zeros_like(inputs[4]) if grad_last is None else grad_last
    return *_op_backward(*inputs, h, grad_h, grad_last), None, None, None


_op.register_autograd(_gradients, setup_context=_keep)


def run(
    x: Tensor, input_gate: Tensor, decay_gate: Tensor, rate: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As `gated_scan_loop`, with inputs as narrow as they were given, and rate and state in the type of `h0`."""
    if not x.numel():
        return torch.empty_like(x), h0.clone()
    return _op(x, input_gate, decay_gate, -DECAY_POWER * rate, h0, first, reset, mask)
