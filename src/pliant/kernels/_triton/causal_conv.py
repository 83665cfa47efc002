"""The convolution of `_causal_conv` in one pass: x in, y out.

Carried and given inputs are one line of rows, `(B, K - 1 + T)`. Where resets or masks break it, a table says for each
step and tap which row is read, -1 for none; it is small beside x, and made in plain torch. Backward each row gathers
from the steps that read it, so nothing is added up in a changing order; of the weights each program writes a part.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels._triton._common import call, new, power

STEPS, WIDTH = 32, 64
"""Of a tile."""


@triton.jit
def _place(length, P, STEPS: tl.constexpr, WIDTH: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stream, number of the tile, its rows `(L, 1)` of `length` and channels `(1, W)` of P."""
    blocks, tiles = tl.cdiv(P, WIDTH), tl.cdiv(length, STEPS)
    program = tl.program_id(0)
    tile = program // blocks % tiles
    t = (tile * STEPS).to(tl.int64) + tl.arange(0, STEPS)[:, None]  # offsets may exceed 2^31
    col = program % blocks * WIDTH + tl.arange(0, WIDTH)[None, :]
    return (program // blocks // tiles).to(tl.int64), tile, t, col, col < P


@triton.jit
def _source(sources, b, t, k, T, K: tl.constexpr):  # type: ignore[no-untyped-def]
    """The row that the tap k steps back reads at steps t, -1 where there is none."""
    if sources is None:
        return tl.where(t < T, t + K - 1 - k, -1)
    else:
        return tl.load(sources + (b * T + t) * K + k, t < T, -1)


@triton.jit
def _row(x, history, b, s, col, inside, T, P, K: tl.constexpr, wide: tl.constexpr):  # type: ignore[no-untyped-def]
    """Rows s of what was carried and given."""
    old = tl.load(history + (b * (K - 1) + s) * P + col, (s >= 0) & (s < K - 1) & inside, 0).to(wide)
    given = tl.load(x + (b * T + s - (K - 1)) * P + col, (s >= K - 1) & inside, 0).to(wide)
    return old + given


@triton.jit
def _forward(x, weight, bias, history, sources, y, T, P, D, K: tl.constexpr,  # type: ignore[no-untyped-def]
             STEPS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    wide: tl.constexpr = history.dtype.element_ty
    b, _tile, t, col, inside = _place(T, P, STEPS, WIDTH)
    total = tl.zeros((STEPS, WIDTH), wide)
    if bias is not None:
        exists = _source(sources, b, t, 0, T, K) >= 0
        total += tl.where(exists, tl.load(bias + col % D, inside, 0).to(wide), 0)
    for k in tl.static_range(K):
        w = tl.load(weight + (K - 1 - k) * D + col % D, inside, 0).to(wide)
        total += w * _row(x, history, b, _source(sources, b, t, k, T, K), col, inside, T, P, K, wide)
    tl.store(y + (b * T + t) * P + col, total.to(y.dtype.element_ty), (t < T) & inside)


@triton.jit
def _back_inputs(weight, readers, tails, dy, dtail, dx, dhistory, T, P, D, K: tl.constexpr,  # type: ignore[no-untyped-def]
                 STEPS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Gradients of what was carried and given: `readers` `(B, K - 1 + T, K)` names the steps that read a row, `tails`
    its place in the history after the last step."""
    wide: tl.constexpr = dhistory.dtype.element_ty
    rows = K - 1 + T
    b, _tile, s, col, inside = _place(rows, P, STEPS, WIDTH)
    j = s - T
    if tails is not None:
        j = tl.load(tails + b * rows + s, s < rows, -1)
    total = tl.load(dtail + (b * (K - 1) + j) * P + col, (j >= 0) & (s < rows) & inside, 0).to(wide)
    for k in tl.static_range(K):
        w = tl.load(weight + (K - 1 - k) * D + col % D, inside, 0).to(wide)
        t = s - (K - 1) + k
        if readers is not None:
            t = tl.load(readers + (b * rows + s) * K + k, s < rows, -1)
        total += w * tl.load(dy + (b * T + t) * P + col, (t >= 0) & (t < T) & inside, 0).to(wide)
    tl.store(dhistory + (b * (K - 1) + s) * P + col, total, (s < K - 1) & inside)
    given = (s >= K - 1) & (s < rows) & inside
    tl.store(dx + (b * T + s - (K - 1)) * P + col, total.to(dx.dtype.element_ty), given)


@triton.jit
def _back_weights(x, history, sources, dy, parts, T, P, K: tl.constexpr,  # type: ignore[no-untyped-def]
                  STEPS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    """Parts `(B tiles, K + 1, P)` of the gradients of the weights, in the order of the taps, and of the bias."""
    wide: tl.constexpr = history.dtype.element_ty
    b, tile, t, col, inside = _place(T, P, STEPS, WIDTH)
    exists = _source(sources, b, t, 0, T, K) >= 0
    wanted = tl.load(dy + (b * T + t) * P + col, exists & inside, 0).to(wide)
    to = parts + (b * tl.cdiv(T, STEPS) + tile) * (K + 1) * P + col
    for k in tl.static_range(K):
        read = _row(x, history, b, _source(sources, b, t, k, T, K), col, inside, T, P, K, wide)
        tl.store(to + (K - 1 - k) * P, tl.sum(wanted * read, 0)[None, :], inside)
    tl.store(to + K * P, tl.sum(wanted, 0)[None, :], inside)


class Tables(NamedTuple):
    """Rows that are read `(B, T, K)`, and rows that are carried on `(B, K - 1)`; -1 where there is none."""

    sources: Tensor
    tail: Tensor


def tables(reset: Tensor | None, mask: Tensor | None, taps: int) -> Tables:
    """From the flags `(B, T)`, one of which is there."""
    flag = mask if reset is None else reset
    assert flag is not None
    batch, steps = flag.shape
    at, reach = torch.arange(steps, device=flag.device), taps - 1
    exists = torch.ones_like(flag) if mask is None else mask
    episode = (torch.zeros_like(flag) if reset is None else reset).long().cumsum(1)
    # Existing steps moved to the front, after what was carried, which belongs to episode 0.
    order, place = (~exists).long().argsort(dim=1, stable=True), exists.long().cumsum(1) - 1
    carried = torch.arange(reach, device=flag.device).expand(batch, -1)
    rows = torch.cat([carried, order + reach], 1)
    of = torch.cat([torch.zeros_like(carried), episode.gather(1, order)], 1)
    read = place.clamp(min=0)[..., None] + torch.arange(reach, -1, -1, device=flag.device)
    sources = _where(of, rows, read.flatten(1), episode.repeat_interleave(taps, 1)).view(batch, steps, taps)
    tail = exists.long().sum(1, keepdim=True) + at.new_tensor(range(reach))
    return Tables(torch.where(exists[..., None], sources, -1), _where(of, rows, tail, episode[:, -1:]))


def _where(of: Tensor, rows: Tensor, read: Tensor, episode: Tensor) -> Tensor:
    return torch.where(of.gather(1, read) == episode, rows.gather(1, read), -1)


def _inverse(table: Tensor, rows: int) -> Tensor:
    """For each row and tap, the step of `table` `(B, T, K)` that reads it; -1 where none does. `(B, rows, K)`."""
    batch, steps, taps = table.shape
    found = table.new_full((batch, rows + 1, taps), -1)
    step = torch.arange(steps, device=table.device)[None, :, None].expand_as(table)
    return found.scatter_(1, torch.where(table < 0, rows, table), step)[:, :rows].contiguous()


def _cut(x: Tensor, steps: int) -> tuple[int, int, dict[str, int]]:
    """Number of tiles, number of programs, and the tile."""
    tile = {"STEPS": power(steps, STEPS), "WIDTH": power(x.shape[2], WIDTH)}
    tiles = -(-steps // tile["STEPS"])
    return tiles, x.shape[0] * tiles * -(-x.shape[2] // tile["WIDTH"]), tile


@torch.library.custom_op("pliant::causal_conv_triton", mutates_args=())
def _op(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, sources: Tensor | None, tail: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y and the history after the last step; x `(B, T, P)`, history `(B, K - 1, P)` in the type of the sums."""
    _, steps, channels = x.shape
    taps, width = weight.shape
    _, programs, tile = _cut(x, steps)
    y = _output(x, weight, bias)
    x, weight, history = x.contiguous(), weight.contiguous(), history.contiguous()
    call(_forward, programs, x, x, weight, bias, history, sources, y, steps, channels, width, K=taps, **tile)
    if tail is None:
        after = torch.cat([history, x[:, max(0, steps - taps + 1) :].to(history.dtype)], 1)
        return y, after[:, after.shape[1] - taps + 1 :].contiguous()
    index, there = tail.clamp(min=0)[..., None].expand_as(history), (tail >= 0)[..., None]
    old = history.gather(1, index.clamp(max=max(0, taps - 2)))
    given = x.gather(1, (index - taps + 1).clamp(min=0)).to(history.dtype)
    return y, torch.where(there, torch.where(index < taps - 1, old, given), 0)


def _output(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    dtype = torch.promote_types(x.dtype, weight.dtype)
    return new(x, dtype if bias is None else torch.promote_types(dtype, bias.dtype))


@torch.library.custom_op("pliant::causal_conv_triton_backward", mutates_args=())
def _op_backward(
    x: Tensor, weight: Tensor, history: Tensor, sources: Tensor | None, tail: Tensor | None, grad_y: Tensor,
    grad_after: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of x, weight, bias and history."""
    batch, steps, channels = x.shape
    taps, width = weight.shape
    x, weight, history, grad_y = (part.contiguous() for part in (x, weight, history, grad_y))
    rows = taps - 1 + steps
    readers = None if sources is None else _inverse(sources, rows)
    tails = None if tail is None else _inverse(tail[..., None], rows)
    dx, dhistory = new(x), new(history)
    _, programs, tile = _cut(x, rows)
    given = (weight, readers, tails, grad_y, grad_after.contiguous())
    call(_back_inputs, programs, x, *given, dx, dhistory, steps, channels, width, K=taps, **tile)
    tiles, programs, tile = _cut(x, steps)
    parts = history.new_empty(batch * tiles, taps + 1, channels)
    call(_back_weights, programs, x, x, history, sources, grad_y, parts, steps, channels, K=taps, **tile)
    weights = parts.sum(0).view(taps + 1, -1, width).sum(1)
    return dx, weights[:taps].to(weight.dtype), weights[taps].clone(), dhistory


@_op.register_fake
def _(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, sources: Tensor | None, tail: Tensor | None
) -> tuple[Tensor, Tensor]:
    return _output(x, weight, bias), new(history)


@_op_backward.register_fake
def _(
    x: Tensor, weight: Tensor, history: Tensor, sources: Tensor | None, tail: Tensor | None, grad_y: Tensor,
    grad_after: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return new(x), new(weight), history.new_empty(weight.shape[1]), new(history)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    x, weight, bias, history, sources, tail = inputs
    ctx.save_for_backward(x, weight, history, sources, tail)
    ctx.bias = None if bias is None else bias.dtype


def _gradients(ctx, grad_y: Tensor | None, grad_after: Tensor | None):  # type: ignore[no-untyped-def]
    x, weight, history, sources, tail = ctx.saved_tensors
    grad_y = torch.zeros_like(x) if grad_y is None else grad_y
    grad_after = torch.zeros_like(history) if grad_after is None else grad_after
    dx, dweight, dbias, dhistory = _op_backward(x, weight, history, sources, tail, grad_y, grad_after)
    return dx, dweight, None if ctx.bias is None else dbias.to(ctx.bias), dhistory, None, None


_op.register_autograd(_gradients, setup_context=_keep)


def run(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As the readable form."""
    if not (x.numel() and weight.numel()):
        from pliant.kernels._causal_conv import conv_loop

        return conv_loop(x, weight, bias, history, reset, mask, 1)
    table = (None, None) if reset is None and mask is None else tables(reset, mask, weight.shape[0])
    bias = None if bias is None else bias.contiguous()
    y, after = _op(x.flatten(2), weight, bias, history.flatten(2), *table)
    return y.view(x.shape), after.view(history.shape)
