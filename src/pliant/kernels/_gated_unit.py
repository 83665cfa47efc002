"""The gated LRU with the matrices of its gates, a slice of rows at a time.

    p = x W_i + b_i,  r = x W_a + b_a                   block-diagonal, one block for each head
    h, h_last = gated_scan(x, p, r, ...)

The pre-activations of a slice are gone before the next begins, forward and backward, where they are computed anew.
So the whole keeps x, h and one state per slice, and products and recurrence work on what is in the cache.

Source: Griffin, arXiv:2402.19427, section 2.4. Cost: that of `gated_scan`, and O(B T D²/H) for the gates, twice as
much with the gradient as without slices.
"""

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._autocast import own_precision
from pliant.kernels._gated_scan import (
    DECAY_POWER,
    MAX_SQRT_DERIVATIVE,
    _array,
    _backward,
    _copy,
    _flags,
    _forward,
    _gated_scan_triton,
    gated_scan_loop,
)
from pliant.kernels._jit import over_slices
from pliant.kernels._operator import operator
from pliant.kernels.select import select

ROWS = 512
"""Rows of a slice; fewer make slow products, more leave the cache."""


@own_precision
def gated_unit(
    x: Float[Tensor, "B T N D"],
    input_weight: Float[Tensor, "H I I"],
    input_bias: Float[Tensor, "H I"],
    decay_weight: Float[Tensor, "H I I"],
    decay_bias: Float[Tensor, "H I"],
    rate: Float[Tensor, "D"],
    h0: Float[Tensor, "B N D"],
    first: Bool[Tensor, "B T"],
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    *,
    form: str | None = None,
) -> tuple[Float[Tensor, "B T N D"], Float[Tensor, "B N D"]]:
    """Gates and recurrence of N units side by side that share parameters and time.

    Args:
        x: input, `(B, T, N, D)`; finite also where masked, as sums over rows of its gradients hold 0 times it.
        input_weight, decay_weight: matrices of the gates, `(H, D/H, D/H)`, row times matrix.
        input_bias, decay_bias: `(H, D/H)`.
        rate: softplus(Λ), `(D,)`.
        h0: state before the first step, `(B, N, D)`.
        first, reset, mask: `(B, T)`, see `gated_scan`.
        form: `"loop"` (readable, any device), `"numba"` (CPU) or `"triton"` (CUDA); None chooses.

    Returns:
        h: `(B, T, N, D)`, in the dtype of `x`, zero where masked.
        h_last: `(B, N, D)`, computed and returned in at least float32.

    Raises:
        UsageError: shapes do not fit.
    """
    _check(x, input_weight, input_bias, decay_weight, decay_bias, rate, h0, first, reset, mask)
    wide = torch.promote_types(torch.promote_types(x.dtype, h0.dtype), torch.float32)
    forms = {"loop": gated_unit_loop, "numba": _gated_unit_numba, "triton": _gated_unit_triton}
    # One step is plain torch, so that a step can be exported and costs no detour.
    unit = gated_unit_loop if x.shape[1] <= 1 and form is None else select("gated_unit", forms, x, form)
    parts = (x, input_weight, input_bias, decay_weight, decay_bias, rate, h0)
    u, wi, bi, wa, ba, s, start = (part.to(wide) for part in parts)
    if mask is not None:  # gradients of the weights are products with all of x
        u = torch.where(mask[..., None, None], u, 0)
    h, h_last = unit(u, wi, bi, wa, ba, s, start, first, reset, mask)
    return h.to(x.dtype), h_last


def gated_unit_loop(
    x: Tensor, input_weight: Tensor, input_bias: Tensor, decay_weight: Tensor, decay_bias: Tensor, rate: Tensor,
    h0: Tensor, first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """As it is written above; arguments as in `gated_unit`, all of one float type."""
    weights = (input_weight, input_bias, decay_weight, decay_bias)
    return _with_gates(gated_scan_loop, x, *weights, rate, h0, first, reset, mask)


def _with_gates(
    scan: Callable[..., tuple[Tensor, Tensor]], x: Tensor, input_weight: Tensor, input_bias: Tensor,
    decay_weight: Tensor, decay_bias: Tensor, rate: Tensor, h0: Tensor, *flags: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    gates = (through_heads(x, input_weight, input_bias), through_heads(x, decay_weight, decay_bias))
    p, r = (gate.flatten(2) for gate in gates)
    h, last = scan(x.flatten(2), p, r, rate.repeat(x.shape[2]), h0.flatten(1), *flags)
    return h.reshape(x.shape), last.reshape(h0.shape)


def through_heads(
    x: Float[Tensor, "*S D"], weight: Float[Tensor, "H I J"], bias: Float[Tensor, "H J"]
) -> Float[Tensor, "*S E"]:
    """y[..., h, :] = x[..., h, :] @ weight[h] + bias[h], heads one after the other."""
    heads = x.unflatten(-1, weight.shape[:2])
    return (torch.einsum("...hi,hij->...hj", heads, weight) + bias).flatten(-2)


def _check(
    x: Tensor, input_weight: Tensor, input_bias: Tensor, decay_weight: Tensor, decay_bias: Tensor, rate: Tensor,
    h0: Tensor, first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> None:  # fmt: skip
    if x.ndim != 4:
        raise UsageError(f"gated_unit: x is {tuple(x.shape)}, expected (B, T, N, D)")
    batch, steps, side, width = x.shape
    heads = input_bias.shape[0]
    part = width // max(1, heads)
    for name, found, wanted in (
        ("input_weight", input_weight, (heads, part, part)),
        ("input_bias", input_bias, (heads, part)),
        ("decay_weight", decay_weight, (heads, part, part)),
        ("decay_bias", decay_bias, (heads, part)),
        ("rate", rate, (heads * part,)),
        ("h0", h0, (batch, side, heads * part)),
    ):
        if found.shape != wanted or heads * part != width:
            raise UsageError(f"gated_unit: {name} is {tuple(found.shape)}, expected {wanted} for x {tuple(x.shape)}")
    for name, flag in (("first", first), ("reset", reset), ("mask", mask)):
        if flag is not None and (flag.shape != (batch, steps) or flag.dtype != torch.bool):
            raise UsageError(
                f"gated_unit: {name} is {flag.dtype} {tuple(flag.shape)}, expected torch.bool ({batch}, {steps})"
            )


# The fast form.


def _slices(x: Tensor) -> Iterator[tuple[int, slice, slice]]:
    """Number, streams and steps of slices of some `ROWS` rows that lie together in memory."""
    batch, steps, side, _ = x.shape
    if x.numel() == 0:
        return
    count = _count(x)
    length = -(-steps // count)
    together = max(1, ROWS // (steps * side))
    for b in range(0, batch, together):
        for number, t in enumerate(range(0, steps, length)):
            yield number, slice(b, min(b + together, batch)), slice(t, min(t + length, steps))


def _count(x: Tensor) -> int:
    """Slices along time, at most; one where several streams fit into one."""
    _, steps, side, _ = x.shape
    return 1 if steps * side <= ROWS else min(steps, -(-steps * side // ROWS))


def _by_head(x: Tensor, heads: int) -> Tensor:
    """A view `(H, R, D/H)` of all rows of `(..., D)`."""
    return x.view(-1, heads, x.shape[-1] // heads).transpose(0, 1)


def _affine(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    out = bias.reshape(-1).expand(x.shape).contiguous()
    # Into the places of its rows, where a product of its own layout would have to be copied.
    _by_head(out, len(weight)).baddbmm_(_by_head(x, len(weight)), weight)
    return out


def _affine_back(dout: Tensor, x: Tensor, weight: Tensor, dx: Tensor, dweight: Tensor, dbias: Tensor) -> None:
    heads = len(weight)
    rows = _by_head(dout, heads)
    _by_head(dx, heads).baddbmm_(rows, weight.mT)
    dweight.baddbmm_(_by_head(x, heads).mT, rows)
    dbias.view(-1).add_(dout.reshape(-1, dout.shape[-1]).sum(0))


@operator("pliant::gated_unit")
def _unit(
    x: Tensor, input_weight: Tensor, input_bias: Tensor, decay_weight: Tensor, decay_bias: Tensor, speed: Tensor,
    h0: Tensor, first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """h, the last state, and the state before each slice of time `(B, slices, N, D)`."""
    x = x.contiguous()
    batch, steps, side, width = x.shape
    h, last = torch.empty_like(x), _copy(h0)
    before = torch.zeros(batch, _count(x), side, width, dtype=x.dtype)
    flags = _array(first), _flags(reset, batch, steps, False), _flags(mask, batch, steps, True)
    tiled = _array(speed.repeat(side))
    for number, bs, ts in _slices(x):
        before[bs, number] = last[bs]
        here = x[bs, ts]
        p, r = _affine(here, input_weight, input_bias), _affine(here, decay_weight, decay_bias)
        arrays = [part.flatten(2).numpy() for part in (here, p, r)]
        arrays += [tiled, *(flag[bs, ts] for flag in flags), h[bs, ts].flatten(2).numpy(), last[bs].flatten(1).numpy()]
        _over(_forward, arrays, here)
    return h, last, before


@operator("pliant::gated_unit_backward")
@own_precision
def _unit_backward(
    x: Tensor, input_weight: Tensor, input_bias: Tensor, decay_weight: Tensor, decay_bias: Tensor, speed: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None, h: Tensor, before: Tensor, grad_h: Tensor,
    grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x, grad_h = x.contiguous(), grad_h.contiguous()
    batch, steps, side, width = x.shape
    dx, dh0 = torch.empty_like(x), _copy(grad_last)
    dweights = [_new(part).zero_() for part in (input_weight, input_bias, decay_weight, decay_bias)]
    dspeed = torch.zeros(batch, side * width, dtype=x.dtype)
    flags = _array(first), _flags(reset, batch, steps, False), _flags(mask, batch, steps, True)
    tiled = _array(speed.repeat(side))
    floor = h.numpy().dtype.type(1 / MAX_SQRT_DERIVATIVE)
    for number, bs, ts in reversed(list(_slices(x))):
        here = x[bs, ts]
        p, r = _affine(here, input_weight, input_bias), _affine(here, decay_weight, decay_bias)
        dp, dr = torch.empty_like(p), torch.empty_like(r)
        arrays = [part.flatten(2).numpy() for part in (here, p, r)]
        arrays += [tiled, before[bs, number].flatten(1).numpy(), *(flag[bs, ts] for flag in flags)]
        arrays += [part[bs, ts].flatten(2).numpy() for part in (h, grad_h)] + [floor]
        arrays += [part.flatten(2).numpy() for part in (dx[bs, ts], dp, dr)]
        arrays += [dspeed[bs].numpy(), dh0[bs].flatten(1).numpy()]
        _over(_backward, arrays, here)
        _affine_back(dp, here, input_weight, dx[bs, ts], *dweights[:2])
        _affine_back(dr, here, decay_weight, dx[bs, ts], *dweights[2:])
    dwi, dbi, dwa, dba = dweights
    return dx, dwi, dbi, dwa, dba, dspeed.sum(0).view(side, width).sum(0), dh0


def _new(like: Tensor) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def _over(function, arrays, x: Tensor) -> None:  # type: ignore[no-untyped-def]
    over_slices(lambda *part: function(*arrays, *part), x.shape[0], x.shape[2] * x.shape[3], x.shape[1])


@_unit.register_fake
def _(
    x: Tensor, input_weight: Tensor, input_bias: Tensor, decay_weight: Tensor, decay_bias: Tensor, speed: Tensor,
    h0: Tensor, first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    before = x.new_empty(x.shape[0], _count(x), *x.shape[2:])
    return _new(x), _copy(h0), before


@_unit_backward.register_fake
def _(
    x: Tensor, input_weight: Tensor, input_bias: Tensor, decay_weight: Tensor, decay_bias: Tensor, speed: Tensor,
    first: Tensor, reset: Tensor | None, mask: Tensor | None, h: Tensor, before: Tensor, grad_h: Tensor,
    grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    given = (input_weight, input_bias, decay_weight, decay_bias, speed)
    dwi, dbi, dwa, dba, dspeed = (_new(part) for part in given)
    return _new(x), dwi, dbi, dwa, dba, dspeed, _copy(grad_last)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, *weights, h0, first, reset, mask = inputs
    h, _, before = output
    ctx.save_for_backward(x, *weights, first, reset, mask, h, before)
    ctx.shape = h0.shape
    ctx.mark_non_differentiable(before)


def _gradients(ctx, grad_h: Tensor | None, grad_last: Tensor | None, _):  # type: ignore[no-untyped-def]
    *inputs, h, before = ctx.saved_tensors
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h
    grad_last = h.new_zeros(ctx.shape) if grad_last is None else grad_last
    return *_unit_backward(*inputs, h, before, grad_h, grad_last), None, None, None


_unit.register_autograd(_gradients, setup_context=_keep)


def _gated_unit_numba(
    x: Tensor, input_weight: Tensor, input_bias: Tensor, decay_weight: Tensor, decay_bias: Tensor, rate: Tensor,
    h0: Tensor, first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h, last, _ = _unit(x, input_weight, input_bias, decay_weight, decay_bias, -DECAY_POWER * rate, h0, first, reset,
                       mask)  # fmt: skip
    return h, last


def _gated_unit_triton(
    x: Tensor, input_weight: Tensor, input_bias: Tensor, decay_weight: Tensor, decay_bias: Tensor, rate: Tensor,
    h0: Tensor, first: Tensor, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    weights = (input_weight, input_bias, decay_weight, decay_bias)
    return _with_gates(_gated_scan_triton, x, *weights, rate, h0, first, reset, mask)
