"""Traces of a multi-scale state space: derivatives of its states by rates, steps and the taps of its filter bank.

    d a^s_t / d w_s[0, k] = a^{s-1}_{t - lag}                            each tap by what it reads, and from there on
    d a^r_t / d w_s[0, k] = sum_l w_r[0, l] d a^{r-1}_{t - lag} / d w_s[0, k],   r > s

so the derivatives by a tap are bands of the same cascade, in which the filters of its level are that tap alone; what is
carried of the levels above are samples of derivatives. A tap of level s reaches d^s … d^S and a^S, so d^s depends on
s K taps, those of its own high-pass filter and of the low-pass filters before it, and a^S on S K. Rows of a trace go
level by level, tap by tap, and then by what the tap reaches (`rows_of`).

Source: online-gradients.md 2.1e. The fast form is for states that do not depend on the data: it passes over what
stands before the last reset and over steps that do not exist, and brings each row through all others while it is in the
nearest cache.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from pliant.kernels._filter_bank import filter_bank
from pliant.kernels._jit import jit_fast, over_jobs
from pliant.kernels._traces import Border, states_before
from pliant.kernels._traces_pass import _extended, _places
from pliant.kernels.select import select


class Rows(NamedTuple):
    """Of each of P rows of the trace of a bank its band and its tap, an index into `(S, 2, K)`; of each of Q rows of
    samples its place in the history, and its tap."""

    band: Tensor
    tap: Tensor
    place: Tensor
    place_tap: Tensor


@cache
def rows_of(levels: int, taps: int) -> Rows:
    reached = [(m, 2 * s * taps + k + (taps if m == s + 1 else 0))
               for s in range(levels) for k in range(taps) for m in range(s + 1, levels + 2)]  # fmt: skip
    samples = [(place, 2 * s * taps + k) for s in range(levels) for k in range(taps)
               for place in range(carried(s, taps), carried(levels - 1, taps))]  # fmt: skip
    found = (torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).unbind(1) for pairs in (reached, samples))
    return Rows(*next(found), *next(found))


def carried(level: int, taps: int) -> int:
    """Samples in the history of a bank that belong to levels 0 … level."""
    return (taps - 1) * (2 ** (level + 1) - 1)


def invariant_traces(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "S 2 K D"],
    decay: Shaped[Tensor, "M N D"],
    step: Float[Tensor, "M D"],
    history: Float[Tensor, "B R D"],
    h: Shaped[Tensor, "B M N D"],
    rates: Shaped[Tensor, "B M N D"] | None,
    bank: Shaped[Tensor, "B P N D"] | None,
    samples: Float[Tensor, "B Q D"] | None,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    *,
    form: str | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Traces after the last step of h_t[m, n] = decay[m, n] h_{t-1}[m, n] + b_t[m], decay = exp(step A).

    Args:
        x, weight, history, reset, mask: see `filter_bank`; without levels there is one band, x.
        decay, step: of each band.
        h: states before the first step.
        rates: dh/dA before it; None if that is not wanted.
        bank, samples: dh by the taps, and samples of derivatives, rows as of `rows_of`; None if they are not wanted.
        form: `"loop"` (readable, any device) or `"numba"` (CPU, real); None chooses.

    Returns:
        rates, bank and samples, as they were given.
    """
    form = "loop" if form is None and decay.is_complex() else form
    traces = select("invariant_traces", {"loop": _traces_loop, "numba": _traces_numba}, x, form)
    return traces(x, weight, decay, step, history, h, rates, bank, samples, reset, mask)


def _traces_loop(
    x: Tensor, weight: Tensor, decay: Tensor, step: Tensor, history: Tensor, h: Tensor, rates: Tensor | None,
    bank: Tensor | None, samples: Tensor | None, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    bands = filter_bank(x, weight, history, reset, mask)[0] if len(weight) else x[None]
    shape = (*x.shape[:2], 1, *decay.shape)
    a, gains = decay.expand(shape), torch.ones_like(decay.real).expand(shape)
    drive = bands.movedim(0, 2)[:, :, None, :, None].expand(shape)
    if mask is not None:
        there = mask[..., None, None, None, None]
        a, gains, drive = torch.where(there, a, 1), torch.where(there, gains, 0), torch.where(there, drive, 0)
    border = Border(a, reset)
    if rates is not None:
        before = states_before(a, drive.to(a.dtype), h[:, None], reset)
        before = before if mask is None else torch.where(there, before, 0)
        gained = border.left(a * step[:, None] * before).sum(1)
        rates = border.onto(rates[:, None], gained)[:, 0]
    if bank is not None and samples is not None and len(weight):
        bank, samples = bank_traces(x, weight, history, border, gains, bank, samples, reset, mask)
    return rates, bank, samples


def bank_traces(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "S 2 K D"],
    history: Float[Tensor, "B R D"],
    border: Border,
    gains: Float[Tensor, "B T 1 M N D"],
    bank: Shaped[Tensor, "B P N D"],
    samples: Float[Tensor, "B Q D"],
    reset: Bool[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B T"] | None,
) -> tuple[Shaped[Tensor, "B P N D"], Float[Tensor, "B Q D"]]:
    """Both after a chunk of which `border` says what is left; gains: by which states take in their bands."""
    levels, _, taps, _ = weight.shape
    found, after, p, q = [], [], 0, 0
    for s in range(levels):
        wide, long = levels + 1 - s, history.shape[1] - carried(s, taps)
        own = samples[:, q : q + taps * long].unflatten(1, (taps, long))
        bands, last = bands_by_taps(x, weight, history, s, own, reset, mask)
        above = border.of(slice(s + 1, None))
        by = bands.permute(3, 1, 2, 0, 4)[:, :, :, None, :, None]  # (K, B, T, 1, M - s - 1, 1, D)
        for k, tap in enumerate(by):
            gained = above.left(tap * gains[:, :, :, s + 1 :]).sum(1)
            found.append(above.onto(bank[:, None, p + k * wide : p + (k + 1) * wide], gained)[:, 0])
        after.append(last.flatten(1, 2))
        p, q = p + taps * wide, q + taps * long
    return torch.cat(found, 1), torch.cat(after, 1)


def bands_by_taps(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "S 2 K D"],
    history: Float[Tensor, "B R D"],
    level: int,
    samples: Float[Tensor, "B K L D"],
    reset: Bool[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "M B T K D"], Float[Tensor, "B K L D"]]:
    """Derivatives of the bands that the taps of a level reach, and samples of derivatives for the next chunk.

    Args:
        x, weight, history, reset, mask: see `filter_bank`.
        level: of the taps, from 0.
        samples: derivatives of the inputs of all levels above by each tap, oldest first.

    Returns:
        `(S - level + 1, B, T, K, D)`: first of the band of the level by its high-pass taps, then of those above by its
        low-pass taps; and samples.
    """
    width, taps, at = x.shape[2], weight.shape[2], carried(level, weight.shape[2])
    filters = weight[:, :, :, None].repeat(1, 1, 1, taps, 1)
    filters[level] = torch.eye(taps, dtype=weight.dtype, device=weight.device)[None, :, :, None]
    before = history[:, None, :at].expand(-1, taps, -1, -1)
    both = torch.cat([before, samples], 2).transpose(1, 2).flatten(2)
    # Taps stand side by side as channels, which a bank does not mix.
    bands, last = filter_bank(x.repeat(1, 1, taps), filters.flatten(3), both, reset, mask)
    after = last[:, at:].unflatten(2, (taps, width)).transpose(1, 2)
    return bands[level + 1 :].unflatten(3, (taps, width)), after


# The fast form: for each stream a plain sequence of the steps that exist since its last reset.


@jit_fast
def _filtered(whole, filters, dilation, out):  # type: ignore[no-untyped-def]
    """What `filters` `(K, D)` make of the last steps of a sequence that begins as far before them as they reach."""
    for t in range(out.shape[0]):
        row = out[t]
        row[:] = 0
        for k in range(filters.shape[0]):
            w, read = filters[k], whole[t + k * dilation]
            for d in range(row.shape[0]):
                row[d] += w[d] * read[d]


@jit_fast
def _enter(e, decay, source):  # type: ignore[no-untyped-def]
    """Trace `(N, D)` of a band through all steps of what enters."""
    for n in range(e.shape[0]):
        row, a = e[n], decay[n]
        for t in range(source.shape[0]):
            now = source[t]
            for d in range(row.shape[0]):
                row[d] = a[d] * row[d] + now[d]


@jit_fast
def _by_rate(e, h, decay, step, source):  # type: ignore[no-untyped-def]
    for n in range(e.shape[0]):
        row, state, a = e[n], h[n], decay[n]
        for t in range(source.shape[0]):
            now = source[t]
            for d in range(row.shape[0]):
                row[d] = a[d] * (row[d] + step[d] * state[d])
                state[d] = a[d] * state[d] + now[d]


@jit_fast
def _of_level(e, rows, read, weight, decay, level):  # type: ignore[no-untyped-def]
    """All that the taps of a level reach: e `(K, M', N, D)`, rows `(K, L, D)`; read: what the level reads."""
    levels, _, taps, width = weight.shape
    steps = read.shape[0] - (taps - 1) * 2**level
    low, high = np.empty((steps, width), read.dtype), np.empty((steps, width), read.dtype)
    for k in range(taps):
        begin = k * 2**level
        now, at = read[begin : begin + steps], 0
        _enter(e[k, 0], decay[level + 1], now)
        for r in range(level + 1, levels):
            reach = (taps - 1) * 2**r
            whole = _extended(rows[k, at : at + reach], now)
            _filtered(whole, weight[r, 1], 2**r, high)
            _filtered(whole, weight[r, 0], 2**r, low)
            _enter(e[k, r - level], decay[r + 1], high)
            rows[k, at : at + reach] = whole[steps:]
            now, at = low.copy(), at + reach
        _enter(e[k, levels - level], decay[levels + 1], now)


@jit_fast
def _advance(x, weight, decay, step, history, h, rates, bank, samples, reset, mask, i0, i1):  # type: ignore[no-untyped-def]
    levels, _, taps, width = weight.shape
    size = decay.shape[1]
    for b in range(i0, i1):
        places, dropped = _places(reset, mask, b, x.shape[1])
        now = x[b][places]
        before, state = history[b].copy(), h[b].copy()
        if dropped:
            before[:], state[:] = 0, 0
            rates[b], bank[b], samples[b] = 0, 0, 0
        band, at, p, q = np.empty_like(now), 0, 0, 0
        if rates.shape[1] > 0:
            _by_rate(rates[b, 0], state[0], decay[0], step[0], now)
        for s in range(levels):
            reach = (taps - 1) * 2**s
            whole, wide, long = _extended(before[at : at + reach], now), levels + 1 - s, before.shape[0] - at - reach
            if rates.shape[1] > 0:
                _filtered(whole, weight[s, 1], 2**s, band)
                _by_rate(rates[b, s + 1], state[s + 1], decay[s + 1], step[s + 1], band)
            if bank.shape[1] > 0:
                e = bank[b, p : p + taps * wide].reshape(taps, wide, size, width)
                _of_level(e, samples[b, q : q + taps * long].reshape(taps, long, width), whole, weight, decay, s)
            low = np.empty_like(now)
            _filtered(whole, weight[s, 0], 2**s, low)
            now, at, p, q = low, at + reach, p + taps * wide, q + taps * long
        if levels > 0 and rates.shape[1] > 0:
            _by_rate(rates[b, levels + 1], state[levels + 1], decay[levels + 1], step[levels + 1], now)


def _traces_numba(
    x: Tensor, weight: Tensor, decay: Tensor, step: Tensor, history: Tensor, h: Tensor, rates: Tensor | None,
    bank: Tensor | None, samples: Tensor | None, reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    after = tuple(None if e is None else e.clone(memory_format=torch.contiguous_format) for e in (rates, bank, samples))
    moving = (none if e is None else e for e, none in zip(after, (h[:, :0], h[:, :0], history[:, :0]), strict=True))
    flags = [np.zeros((0, 0), np.bool_) if flag is None else flag.contiguous().numpy() for flag in (reset, mask)]
    arrays = [part.detach().contiguous().numpy() for part in (x, weight, decay, step, history, h, *moving)]
    over_jobs(lambda *part: _advance(*arrays, *flags, *part), len(x), sum(e.numel() for e in after if e is not None))
    return after  # type: ignore[return-value]
