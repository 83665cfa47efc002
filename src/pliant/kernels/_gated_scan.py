"""The recurrence of the gated LRU from the pre-activations of its gates, in one pass over memory.

    i_t = σ(p_t),  log a_t = -C σ(r_t) s,  C = 8                    p, r pre-activations, s = softplus(Λ)
    h_t = a_t h_{t-1} + n_t i_t x_t,  n_t = sqrt(1 - a_t²), 1 at the first step of an episode

The derivative of the root is held at G = 1000, since the exact one explodes as the decay goes to 1.

Backward, with d_t = dL/dh_t + a_{t+1} d_{t+1}:

    dx_t = d_t n_t i_t,   dp_t = d_t n_t x_t i_t (1 - i_t),   dL/dlog a_t = d_t a_t h_{t-1} - 2 a_t² d_t i_t x_t n'_t

with n' = 1 / max(2 n, 1/G), 0 at a first step. Gates, decays and roots are computed anew there, so all that
is kept is what came in and h.

Papers: De et al. 2024, Griffin, arXiv:2402.19427, section 2.4; Pătrăucean et al. 2024, arXiv:2412.14294, section 3.
Cost: O(B T D) time and, beside inputs and outputs, O(D) memory.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._autocast import own_precision
from pliant.kernels._jit import jit_exact, over_slices
from pliant.kernels._linear_scan import linear_scan
from pliant.kernels._math import exp, one, sigmoid, two
from pliant.kernels._operator import operator
from pliant.kernels.select import select

DECAY_POWER = 8.0  # C, trecvit.md 2.1
MAX_SQRT_DERIVATIVE = 1000.0  # G, trecvit.md 2.1
BLOCK = 256
"""Channels that are taken through time together: their rows of scratch stay in the nearest cache."""


class _BoundedSqrt(torch.autograd.Function):
    """sqrt whose derivative is at most G."""

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.sqrt(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        (x,) = ctx.saved_tensors
        return grad / torch.sqrt(torch.clamp(4 * x, min=MAX_SQRT_DERIVATIVE**-2))


def bounded_sqrt(x: Float[Tensor, "*S"]) -> Float[Tensor, "*S"]:
    """sqrt(x) with its derivative clipped at 1000 (trecvit.md 2.1)."""
    return _BoundedSqrt.apply(x)


@own_precision
def gated_scan(
    x: Float[Tensor, "B T D"],
    input_gate: Float[Tensor, "B T D"],
    decay_gate: Float[Tensor, "B T D"],
    rate: Float[Tensor, "D"],
    h0: Float[Tensor, "B D"],
    first: Bool[Tensor, "B T"],
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    *,
    form: str | None = None,
) -> tuple[Float[Tensor, "B T D"], Float[Tensor, "B D"]]:
    """Gates, decay, bounded root and recurrence along axis 1.

    Args:
        x: input, `(B, T, D)`.
        input_gate, decay_gate: what their sigmoids are taken of, `(B, T, D)`.
        rate: softplus(Λ), `(D,)`; the decay of an open gate is exp(-8 rate).
        h0: state before the first step, `(B, D)`.
        first: `(B, T)`, true at the first existing step of an episode, which enters at full size.
        reset: `(B, T)`, true where the state is dropped before the step; None means nowhere.
        mask: `(B, T)`, false where the step does not exist; None means that all do.
        form: `"loop"` (readable, any device), `"numba"` (CPU) or `"triton"` (CUDA); None chooses.

    Returns:
        h: `(B, T, D)`, in the dtype of `x`, zero where masked.
        h_last: `(B, D)`, computed and returned in at least float32.

    Raises:
        UsageError: shapes do not fit.
    """
    _check(x, input_gate, decay_gate, rate, h0, first, reset, mask)
    wide = torch.promote_types(torch.promote_types(x.dtype, h0.dtype), torch.float32)
    # One step is plain torch, so that a step can be exported and costs no detour.
    forms = {"loop": gated_scan_loop, "numba": _gated_scan_numba, "triton": _gated_scan_triton}
    scan = gated_scan_loop if x.shape[1] <= 1 and form is None else select("gated_scan", forms, x, form)
    u, p, r = x, input_gate, decay_gate
    if scan is not _gated_scan_triton:  # which widens what it has read
        u, p, r = (part.to(wide) for part in (u, p, r))
    h, h_last = scan(u, p, r, rate.to(wide), h0.to(wide), first, reset, mask)
    return h.to(x.dtype), h_last


def gated_scan_loop(
    x: Tensor, input_gate: Tensor, decay_gate: Tensor, rate: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence as it is written above; arguments as in `gated_scan`, all of one float type."""
    if mask is not None:  # where it is false not even NaN may reach a gradient
        x, input_gate, decay_gate = (torch.where(mask[..., None], part, 0) for part in (x, input_gate, decay_gate))
    log_a = -DECAY_POWER * torch.sigmoid(decay_gate) * rate
    # The square comes from the logarithm, since a * a rounds twice near 1.
    scale = bounded_sqrt(1 - torch.exp(2 * log_a))
    a, u = torch.exp(log_a), x * torch.sigmoid(input_gate) * torch.where(first[..., None], 1, scale)
    if mask is None:
        return linear_scan(a, u, h0, reset, form="loop")
    exists = mask[..., None]
    h, last = linear_scan(torch.where(exists, a, 1), torch.where(exists, u, 0), h0, reset, form="loop")
    return torch.where(exists, h, 0), last


def _check(x: Tensor, input_gate: Tensor, decay_gate: Tensor, rate: Tensor, h0: Tensor,
           first: Tensor, reset: Tensor | None, mask: Tensor | None) -> None:  # fmt: skip
    if x.ndim != 3 or input_gate.shape != x.shape or decay_gate.shape != x.shape:
        raise UsageError(
            f"gated_scan: x, input_gate and decay_gate are {tuple(x.shape)}, {tuple(input_gate.shape)} and "
            f"{tuple(decay_gate.shape)}; all must be the same (B, T, D)"
        )
    batch, steps, width = x.shape
    if rate.shape != (width,) or h0.shape != (batch, width):
        raise UsageError(
            f"gated_scan: rate is {tuple(rate.shape)} and h0 is {tuple(h0.shape)}, "
            f"expected ({width},) and ({batch}, {width})"
        )
    for name, flag in (("first", first), ("reset", reset), ("mask", mask)):
        if flag is not None and (flag.shape != (batch, steps) or flag.dtype != torch.bool):
            raise UsageError(
                f"gated_scan: {name} is {flag.dtype} {tuple(flag.shape)}, expected torch.bool ({batch}, {steps})"
            )


# The fast form. Loops run over slices [b0, b1) x [d0, d1), see over_slices. Each loop over channels writes to few
# arrays: with many, the compiler gives up proving that they do not overlap, and does not use vectors.


@jit_exact
def _sigmoids(gate, out):  # type: ignore[no-untyped-def]
    for d in range(out.shape[0]):
        out[d] = sigmoid(gate[d])


@jit_exact
def _squares(log_a, out):  # type: ignore[no-untyped-def]
    # The square comes from the logarithm, since a * a rounds twice near 1.
    for d in range(out.shape[0]):
        out[d] = exp(two(log_a[d]) * log_a[d])


@jit_exact
def _forward(x, p, r, speed, first, reset, mask, h, last, b0, b1, d0, d1):  # type: ignore[no-untyped-def]
    # last holds the state before the first step, and then that after the newest.
    for start in range(d0, d1, BLOCK):
        at = slice(start, min(start + BLOCK, d1))
        size = at.stop - at.start
        u, log_a, square = np.empty(size, x.dtype), np.empty(size, x.dtype), np.empty(size, x.dtype)
        c = speed[at]
        for b in range(b0, b1):
            now = last[b, at]
            for t in range(x.shape[1]):
                if reset[b, t]:
                    now[:] = 0
                row = h[b, t, at]
                if not mask[b, t]:
                    row[:] = 0
                    continue
                gate, put = r[b, t, at], x[b, t, at]
                for d in range(size):
                    log_a[d] = sigmoid(gate[d]) * c[d]
                _sigmoids(p[b, t, at], u)
                if not first[b, t]:
                    _squares(log_a, square)
                    for d in range(size):
                        u[d] *= math.sqrt(one(square[d]) - square[d])
                for d in range(size):
                    now[d] = exp(log_a[d]) * now[d] + u[d] * put[d]
                row[:] = now


@jit_exact
def _before(reset, mask, b, t):  # type: ignore[no-untyped-def]
    """The step whose state step t starts from; -1 for the state that came in, -2 for none."""
    s = t
    while s >= 0:
        if reset[b, s]:
            return -2
        s -= 1
        if s >= 0 and mask[b, s]:
            return s
    return -1


@jit_exact
def _to_input(x, i, root, du, dx, dp):  # type: ignore[no-untyped-def]
    for d in range(dx.shape[0]):
        dx[d] = du[d] * root[d]
    for d in range(dx.shape[0]):
        dp[d] = dx[d] * x[d] * (one(x[d]) - i[d])


@jit_exact
def _backward(x, p, r, speed, h0, first, reset, mask, h, g, floor, dx, dp, dr, dspeed, dnow,  # type: ignore[no-untyped-def]
              b0, b1, d0, d1):  # fmt: skip
    # dnow carries the gradient that flows back from step t + 1. du is dL/d(n x), and dlog is dL/dlog a.
    for start in range(d0, d1, BLOCK):
        at = slice(start, min(start + BLOCK, d1))
        size = at.stop - at.start
        i, opened, log_a = np.empty(size, x.dtype), np.empty(size, x.dtype), np.empty(size, x.dtype)
        root, du, dlog = np.empty(size, x.dtype), np.empty(size, x.dtype), np.empty(size, x.dtype)
        nothing, c = np.zeros(size, x.dtype), speed[at]
        for b in range(b0, b1):
            dh, dc = dnow[b, at], dspeed[b, at]
            for t in range(x.shape[1] - 1, -1, -1):
                if mask[b, t]:
                    gate, put, given, dgate = r[b, t, at], x[b, t, at], g[b, t, at], dr[b, t, at]
                    source = _before(reset, mask, b, t)
                    before = nothing if source == -2 else h0[b, at] if source == -1 else h[b, source, at]
                    _sigmoids(p[b, t, at], i)
                    for d in range(size):
                        dh[d] += given[d]
                        du[d] = dh[d] * i[d]
                    _sigmoids(gate, opened)
                    for d in range(size):
                        log_a[d] = opened[d] * c[d]
                    if first[b, t]:
                        root[:] = 1
                        dlog[:] = 0
                    else:
                        _squares(log_a, root)
                        for d in range(size):
                            square = root[d]
                            root[d] = math.sqrt(one(square) - square)
                            dlog[d] = du[d] * put[d] * two(square) * square / max(two(square) * root[d], floor)
                    _to_input(put, i, root, du, dx[b, t, at], dp[b, t, at])
                    for d in range(size):
                        dh[d] *= exp(log_a[d])
                        dlog[d] = dh[d] * before[d] - dlog[d]
                    for d in range(size):
                        dgate[d] = dlog[d] * log_a[d] * (one(log_a[d]) - opened[d])
                        dc[d] += dlog[d] * opened[d]
                else:
                    dx[b, t, at] = 0
                    dp[b, t, at] = 0
                    dr[b, t, at] = 0
                if reset[b, t]:
                    dh[:] = 0


def _flags(flag: Tensor | None, batch: int, steps: int, value: bool) -> np.ndarray:
    return np.full((batch, steps), value) if flag is None else _array(flag)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


@operator("pliant::gated_scan")
def _scan(
    x: Tensor, p: Tensor, r: Tensor, speed: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    batch, steps, width = x.shape
    h, last = torch.empty_like(x, memory_format=torch.contiguous_format), _copy(h0)
    flags = [_array(first), _flags(reset, batch, steps, False), _flags(mask, batch, steps, True)]
    arrays = [*map(_array, (x, p, r, speed)), *flags, h.numpy(), last.numpy()]
    over_slices(lambda *part: _forward(*arrays, *part), batch, width, steps)
    return h, last


@operator("pliant::gated_scan_backward")
def _scan_backward(
    x: Tensor, p: Tensor, r: Tensor, speed: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None, h: Tensor, grad_h: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, steps, width = x.shape
    dx, dp, dr = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(3))
    # One row for each stream, so that streams can be taken in parallel and their sum has one order.
    dspeed, dh0 = torch.zeros_like(h0, memory_format=torch.contiguous_format), _copy(grad_last)
    flags = [_array(first), _flags(reset, batch, steps, False), _flags(mask, batch, steps, True)]
    arrays = [*map(_array, (x, p, r, speed, h0)), *flags, _array(h), _array(grad_h)]
    arrays += [h.numpy().dtype.type(1 / MAX_SQRT_DERIVATIVE)]
    arrays += [part.numpy() for part in (dx, dp, dr, dspeed, dh0)]
    over_slices(lambda *part: _backward(*arrays, *part), batch, width, steps)
    return dx, dp, dr, dspeed.sum(0), dh0


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


@_scan.register_fake
def _(
    x: Tensor, p: Tensor, r: Tensor, speed: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return torch.empty_like(x, memory_format=torch.contiguous_format), _copy(h0)


@_scan_backward.register_fake
def _(
    x: Tensor, p: Tensor, r: Tensor, speed: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None, h: Tensor, grad_h: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dp, dr = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(3))
    return dx, dp, dr, torch.empty_like(speed), _copy(grad_last)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[0])


def _gradients(ctx, grad_h: Tensor | None, grad_last: Tensor | None):  # type: ignore[no-untyped-def]
    *inputs, h = ctx.saved_tensors
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h
    grad_last = torch.zeros_like(inputs[4]) if grad_last is None else grad_last
    return *_scan_backward(*inputs, h, grad_h, grad_last), None, None, None


_scan.register_autograd(_gradients, setup_context=_keep)


def _gated_scan_numba(
    x: Tensor, input_gate: Tensor, decay_gate: Tensor, rate: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return _scan(x, input_gate, decay_gate, -DECAY_POWER * rate, h0, first, reset, mask)


def _gated_scan_triton(
    x: Tensor, input_gate: Tensor, decay_gate: Tensor, rate: Tensor, h0: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from pliant.kernels._triton.gated_scan import run

    return run(x, input_gate, decay_gate, rate, h0, first, reset, mask)
