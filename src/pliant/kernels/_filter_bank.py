"""A cascade of causal filters that splits each channel into time scales: the stationary wavelet transform, learned.

    a^0_t = x_t
    a^s_t = sum_k w_s[0, k] a^{s-1}_{t - lag},   d^s_t = sum_k w_s[1, k] a^{s-1}_{t - lag},   lag = 2^{s-1} (K-1-k)

for s = 1 … S: a low-pass and a high-pass half, of which the low-pass one is split again. Nothing is left out from one
level to the next (à trous), so all have the length of x. Row K-1 of a filter multiplies the current step. Steps before
the start, or before a reset, count as zero. Masked steps do not exist: filters reach over them.

Carried are the last 2^{s-1} (K-1) samples of each a^{s-1}, so (K-1)(2^S - 1) per channel, level after level.

Papers: Karami et al. 2025, MS-SSM, arXiv:2512.23824, section on multi-scale decomposition; Shi et al. 2023, Sequence
Modeling with Multiresolution Convolutional Memory, arXiv:2305.01638; ms-ssm.md 2.2.
Cost: O(B T S K D) time. The fast form keeps a^1 … a^{S-1} for the way back.
"""

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._autocast import own_precision
from pliant.kernels._causal_conv import causal_conv
from pliant.kernels._jit import jit, jit_fast, over_slices, whole_pages
from pliant.kernels._operator import operator
from pliant.kernels.select import select

OUTSIDE = -(1 << 40)
"""First step of an episode that began before this chunk; what was carried belongs to it."""


@own_precision
def filter_bank(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "S 2 K D"],
    history: Float[Tensor, "B R D"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    *,
    form: str | None = None,
) -> tuple[Float[Tensor, "M B T D"], Float[Tensor, "B R D"]]:
    """Split each channel into M = S + 2 bands: itself, S details, and what is left.

    Args:
        x: `(B, T, D)`.
        weight: `(S, 2, K, D)`, low-pass then high-pass for each level; the last of the K rows belongs to the
            current step.
        history: the R = (K-1)(2^S - 1) samples carried from before, `(B, R, D)`: for each level its inputs, oldest
            first; None means zeros.
        reset: `(B, T)`, true where what came before is dropped.
        mask: `(B, T)`, false where the step does not exist; the bands are zero there.
        form: `"loop"` (readable, any device), `"conv"` (any device) or `"numba"` (CPU); None chooses.

    Returns:
        bands: `(S+2, B, T, D)` in the dtype of `x`: x, then d^1 … d^S from fine to coarse, then a^S.
        history: for the next chunk, in at least float32.

    Raises:
        UsageError: shapes do not fit.
    """
    _check(x, weight, history, reset, mask)
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    if history is None:
        levels, _, taps, _ = weight.shape
        history = x.new_zeros(x.shape[0], (taps - 1) * (2**levels - 1), x.shape[2], dtype=wide)
    # One step is plain torch, so that a step can be exported and costs no detour.
    if form is None and (x.shape[1] <= 1 or x.device.type != "cpu"):
        form = "loop" if x.shape[1] <= 1 else "conv"
    bank = select("filter_bank", {"loop": bank_loop, "conv": _bank_conv, "numba": _bank_numba}, x, form)
    bands, last = bank(x.to(wide), weight.to(wide), history.to(wide), reset, mask)
    return bands.to(x.dtype), last


def bank_loop(
    x: Tensor, weight: Tensor, history: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One step after the other; shapes as in `filter_bank`."""
    found = []
    for t in range(x.shape[1]):
        now, there = x[:, t], None if mask is None else mask[:, t, None]
        if reset is not None:
            history = torch.where(reset[:, t, None, None], 0, history)
        if there is not None:
            now = torch.where(there, now, 0)
        bands, after = _step(now, weight, history)
        found.append(bands if there is None else torch.where(there, bands, 0))
        history = after if there is None else torch.where(there[..., None], after, history)
    bands = torch.stack(found, 2) if found else x.new_zeros(len(weight) + 2, *x.shape)
    return bands, history


def _step(a: Tensor, weight: Tensor, history: Tensor) -> tuple[Tensor, Tensor]:
    """Bands `(S+2, B, D)` of one step and what is carried on from it."""
    bands, carried, at, taps = [a], [], 0, weight.shape[2]
    for level, filters in enumerate(weight.unbind()):
        reach = (taps - 1) << level
        window = torch.cat([history[:, at : at + reach], a[:, None]], 1)
        low_and_high = (window[:, None, :: 1 << level] * filters).sum(2)
        a, detail = low_and_high.unbind(1)
        bands.append(detail)
        carried.append(window[:, 1:])
        at += reach
    return torch.stack([*bands, a]), torch.cat([*carried, history[:, at:]], 1)


def _bank_conv(
    x: Tensor, weight: Tensor, history: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """One convolution for each filter."""
    a = x if mask is None else torch.where(mask[..., None], x, 0)
    bands, carried = [a], []
    reaches = [(weight.shape[2] - 1) << level for level in range(len(weight))]
    for level, before in enumerate(history.split(reaches, 1)):
        low, high = (
            causal_conv(a, filters, None, before, reset=reset, mask=mask, dilation=1 << level)
            for filters in weight[level]
        )
        a, after = low
        bands.append(high[0])
        carried.append(after)
    return torch.stack([*bands, a]), torch.cat([*carried, history[:, sum(reaches) :]], 1)


def _check(x: Tensor, weight: Tensor, history: Tensor | None, reset: Tensor | None, mask: Tensor | None) -> None:
    if x.ndim != 3 or weight.ndim != 4 or weight.shape[1] != 2 or weight.shape[2] < 1 or not 1 <= len(weight) <= 24:
        raise UsageError(
            f"filter_bank: x is {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (B, T, D) and "
            "(S, 2, K, D) with 1 to 24 levels and at least one tap"
        )
    levels, _, taps, _ = weight.shape
    expected = {
        "weight": (weight, (levels, 2, taps, x.shape[2])),
        "history": (history, (x.shape[0], (taps - 1) * (2**levels - 1), x.shape[2])),
    }
    for name, (part, shape) in expected.items():
        if part is not None and part.shape != shape:
            raise UsageError(f"filter_bank: {name} is {tuple(part.shape)}, expected {shape} for x {tuple(x.shape)}")
    for name, flag in (("reset", reset), ("mask", mask)):
        if flag is not None and (flag.shape != x.shape[:2] or flag.dtype != torch.bool):
            raise UsageError(
                f"filter_bank: {name} is {flag.dtype} {tuple(flag.shape)}, expected torch.bool {tuple(x.shape[:2])}"
            )


# The fast form. Existing steps are numbered j = 0, 1, …; `order` says where each stands and `first` with which its
# episode began. All levels of a step follow one another, so that rows of a^s are read while they are in the cache.
# a[0] is x and a[s] is a^s; those are separate arguments, since x is not ours to copy.


@jit
def _places(reset, mask, order, first):  # type: ignore[no-untyped-def]
    """Number of existing steps of one stream, and the first of the episode that goes on after them."""
    count, began = 0, OUTSIDE
    for t in range(order.shape[0]):
        if reset.shape[0] > 0 and reset[t]:
            began = count
        if mask.shape[0] == 0 or mask[t]:
            order[count] = t
            first[count] = began
            count += 1
    return count, began


@jit_fast
def _add(low, high, v, w, x):  # type: ignore[no-untyped-def]
    for d in range(x.shape[0]):
        low[d] += v[d] * x[d]
        high[d] += w[d] * x[d]


@jit_fast
def _add_back(dx, dv, dw, v, w, x, low, high):  # type: ignore[no-untyped-def]
    for d in range(x.shape[0]):
        dx[d] += v[d] * low[d] + w[d] * high[d]
        dv[d] += low[d] * x[d]
        dw[d] += high[d] * x[d]


@jit_fast
def _carry(x, middle, history, order, count, began, taps, last, b, d0, d1):  # type: ignore[no-untyped-def]
    """The last inputs of each level, of the episode that goes on."""
    at = 0
    for s in range(middle.shape[0] + 1):
        reach = (taps - 1) << s
        for i in range(reach):
            j, row = count - reach + i, last[b, at + i, d0:d1]
            if j >= max(began, 0):
                row[:] = x[b, order[j], d0:d1] if s == 0 else middle[s - 1, b, order[j], d0:d1]
            elif j >= began:
                row[:] = history[b, at + reach + j, d0:d1]
            else:
                row[:] = 0
        at += reach


@jit_fast
def _forward(x, w, history, reset, mask, middle, bands, last, b0, b1, d0, d1):  # type: ignore[no-untyped-def]
    (levels, _, taps, _), steps = w.shape, x.shape[1]
    order, first = np.empty(steps, np.int64), np.empty(steps, np.int64)
    for b in range(b0, b1):
        count, began = _places(reset[b : b + 1].reshape(-1), mask[b : b + 1].reshape(-1), order, first)
        if count < steps:
            middle[:, b, :, d0:d1] = 0
            bands[:, b, :, d0:d1] = 0
        for j in range(count):
            t, at = order[j], 0
            bands[0, b, t, d0:d1] = x[b, t, d0:d1]
            for s in range(levels):
                high, reach = bands[s + 1, b, t, d0:d1], (taps - 1) << s
                low = middle[s, b, t, d0:d1] if s < levels - 1 else bands[levels + 1, b, t, d0:d1]
                low[:] = 0
                high[:] = 0
                for k in range(taps):
                    i = j - ((taps - 1 - k) << s)
                    if i >= max(first[j], 0):
                        row = x[b, order[i], d0:d1] if s == 0 else middle[s - 1, b, order[i], d0:d1]
                    elif i >= first[j]:
                        row = history[b, at + reach + i, d0:d1]
                    else:
                        continue
                    _add(low, high, w[s, 0, k, d0:d1], w[s, 1, k, d0:d1], row)
                at += reach
        _carry(x, middle, history, order, count, began, taps, last, b, d0, d1)


@jit_fast
def _carry_back(dx, dmiddle, dhistory, order, count, began, taps, dlast, b, d0, d1):  # type: ignore[no-untyped-def]
    at = 0
    for s in range(dmiddle.shape[0] + 1):
        reach = (taps - 1) << s
        for i in range(reach):
            j, g = count - reach + i, dlast[b, at + i, d0:d1]
            if j >= max(began, 0):
                row = dx[b, order[j], d0:d1] if s == 0 else dmiddle[s - 1, b, order[j], d0:d1]
                row += g
            elif j >= began:
                row = dhistory[b, at + reach + j, d0:d1]
                row += g
        at += reach


@jit_fast
def _backward(x, w, history, reset, mask, middle, dbands, dlast, dx, dmiddle, dw, dhistory, b0, b1, d0, d1):  # type: ignore[no-untyped-def]
    (levels, _, taps, _), steps = w.shape, x.shape[1]
    order, first = np.empty(steps, np.int64), np.empty(steps, np.int64)
    for b in range(b0, b1):
        count, began = _places(reset[b : b + 1].reshape(-1), mask[b : b + 1].reshape(-1), order, first)
        _carry_back(dx, dmiddle, dhistory, order, count, began, taps, dlast, b, d0, d1)
        for j in range(count - 1, -1, -1):
            # Steps before this one have yet to give theirs to it, so a^s of a step is complete when it is reached.
            t, at = order[j], dhistory.shape[1]
            dx[b, t, d0:d1] += dbands[0, b, t, d0:d1]
            for s in range(levels - 1, -1, -1):
                high, reach = dbands[s + 1, b, t, d0:d1], (taps - 1) << s
                low = dmiddle[s, b, t, d0:d1] if s < levels - 1 else dbands[levels + 1, b, t, d0:d1]
                at -= reach
                for k in range(taps):
                    i, before = j - ((taps - 1 - k) << s), at + reach + j - ((taps - 1 - k) << s)
                    if i >= max(first[j], 0):
                        row = x[b, order[i], d0:d1] if s == 0 else middle[s - 1, b, order[i], d0:d1]
                        drow = dx[b, order[i], d0:d1] if s == 0 else dmiddle[s - 1, b, order[i], d0:d1]
                    elif i >= first[j]:
                        row, drow = history[b, before, d0:d1], dhistory[b, before, d0:d1]
                    else:
                        continue
                    v, z, dv, dz = w[s, 0, k, d0:d1], w[s, 1, k, d0:d1], dw[b, s, 0, k, d0:d1], dw[b, s, 1, k, d0:d1]
                    _add_back(drow, dv, dz, v, z, row, low, high)


def _bank_numba(
    x: Tensor, weight: Tensor, history: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    bands, last, _ = _bank(x, weight, history, reset, mask)
    return bands, last


def _sizes(x: Tensor, weight: Tensor) -> tuple[int, int, int]:
    """Streams, channels, and the work for each."""
    return x.shape[0], x.shape[2], x.shape[1] * weight.shape[0] * weight.shape[2]


@operator("pliant::filter_bank")
def _bank(
    x: Tensor, weight: Tensor, history: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    bands, last, middle = map(whole_pages, _outputs(x, weight, history))
    arrays = [_array(x), _array(weight), _array(history), _flags(reset), _flags(mask)]
    outputs = [part.numpy() for part in (middle, bands, last)]
    over_slices(lambda *part: _forward(*arrays, *outputs, *part), *_sizes(x, weight))
    return bands, last, middle


def _outputs(x: Tensor, weight: Tensor, history: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    levels = weight.shape[0]
    return x.new_empty(levels + 2, *x.shape), _like(history), x.new_empty(levels - 1, *x.shape)


@operator("pliant::filter_bank_backward")
def _bank_backward(
    x: Tensor, weight: Tensor, history: Tensor, reset: Tensor | None, mask: Tensor | None, middle: Tensor,
    grad_bands: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    dx, dmiddle, dhistory = (whole_pages(_like(part)).zero_() for part in (x, middle, history))
    dweight = x.new_zeros(x.shape[0], *weight.shape)
    arrays = [_array(x), _array(weight), _array(history), _flags(reset), _flags(mask)]
    arrays += [_array(part) for part in (middle, grad_bands, grad_last)]
    outputs = [part.numpy() for part in (dx, dmiddle, dweight, dhistory)]
    over_slices(lambda *part: _backward(*arrays, *outputs, *part), *_sizes(x, weight))
    return dx, dweight.sum(0), dhistory


def _flags(flag: Tensor | None) -> np.ndarray:
    return np.zeros((0, 0), dtype=np.bool_) if flag is None else _array(flag)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_bank.register_fake
def _(
    x: Tensor, weight: Tensor, history: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(x, weight, history)


@_bank_backward.register_fake
def _(
    x: Tensor, weight: Tensor, history: Tensor, reset: Tensor | None, mask: Tensor | None, middle: Tensor,
    grad_bands: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(x), _like(weight), _like(history)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[2])
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_bands: Tensor | None, grad_last: Tensor | None, _):  # type: ignore[no-untyped-def]
    x, weight, history = ctx.saved_tensors[:3]
    grad_bands = x.new_zeros(len(weight) + 2, *x.shape) if grad_bands is None else grad_bands
    grad_last = torch.zeros_like(history) if grad_last is None else grad_last
    return *_bank_backward(*ctx.saved_tensors, grad_bands, grad_last), None, None


_bank.register_autograd(_gradients, setup_context=_keep)
