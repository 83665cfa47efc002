"""Traces of the gated LRU: derivatives of its states by decay, gates, convolution and the map before it.

A gate's weight reaches the states of its head, a tap or what it reads all that the gates mix it into: v_t[i] goes into
h_t[j] of its head by its own value (i = j) and by both gates of j. "exact" traces hold that for each pair (i, j), "own"
ones leave out i ≠ j.

Source: online-gradients.md 2.1a, 2.2, 2.3. The fast form passes over what stands before the last reset and over steps
that do not exist, and brings each row through all others while it is in the nearest cache; it holds no more than the
traces and some rows of one stream.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor
from torch.nn import functional as F

from pliant.kernels._jit import jit_fast, over_jobs
from pliant.kernels._traces import Border, GatedSlopes, sum_in_heads, tapped
from pliant.kernels._traces_pass import _entries, _extended, _mixed, _onto, _onto_each, _places
from pliant.kernels.select import select

Kinds = Mapping[str, str]


class Unit(NamedTuple):
    """A chunk of the unit, S side by side: decays and slopes as `gated_slopes` finds them, from its inputs v.

    v `(B, T, S, W)`; weights of both gates `(H, P, P)`, with P = W / H.
    """

    v: Tensor
    a: Tensor
    slopes: GatedSlopes
    input_weight: Tensor
    decay_weight: Tensor


class Fed(NamedTuple):
    """What feeds it: v = conv(u), u a linear map of x.

    x `(B, T, S, D)`; u `(B, T, S, W)`; ring `(B, K-1, S, W)`, the last u before the chunk; taps `(K, W)`.
    """

    x: Tensor
    u: Tensor
    ring: Tensor
    taps: Tensor


def gated_traces(
    traces: Mapping[str, Tensor] | None,
    unit: Unit,
    fed: Fed | None,
    kinds: Kinds,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    *,
    form: str | None = None,
) -> dict[str, Tensor]:
    """Traces after the last step.

    Args:
        traces: before the first, as given back; None means zeros.
        kinds: of `decay`, `input_gate`, `decay_gate` and, with `fed`, `conv` and `linear_x`.
        form: `"loop"` (readable, any device) or `"numba"` (CPU); None chooses.

    Returns:
        `decay` `(B, S, W)`; of both gates `.weight` `(B, S, P, W)` and `.bias` `(B, S, W)`; `conv_weight`
        `(B, S, K, W)`, `conv_bias` `(B, S, W)`, `linear_x.weight` `(B, S, D, W)`, `linear_x.bias` `(B, S, W)`, with P
        before W if exact; and the last inputs `(B, K-1, S, D + 1)`, ones behind them, by which the ring depends on
        `linear_x`.
    """
    advance = select("gated_traces", {"loop": _traces_loop, "numba": _traces_numba}, unit.v, form)
    return advance(traces, unit, fed, kinds, reset, mask)


def _traces_loop(
    traces: Mapping[str, Tensor] | None, unit: Unit, fed: Fed | None, kinds: Kinds, reset: Tensor | None,
    mask: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    border, heads, gained = Border(unit.a, reset), len(unit.input_weight), dict[str, Tensor]()
    slopes, v = GatedSlopes(*map(border.left, unit.slopes)), border.since(unit.v)
    after: dict[str, Tensor] = {}
    if kinds["decay"] == "exact":
        gained["decay"] = slopes.decay.sum(1)
    for gate, slope in (("input_gate", slopes.input_gate), ("decay_gate", slopes.decay_gate)):
        if kinds[gate] == "exact":
            gained |= {f"{gate}.weight": sum_in_heads(v, slope, heads), f"{gate}.bias": slope.sum(1)}
    if fed is not None and kinds["conv"] != "instant":
        read, _ = tapped(fed.u, len(fed.taps), fed.ring, reset, mask)
        read = F.pad(border.since(read), (0, 0, 0, 1), value=1.0)
        total = _own(read, unit, slopes) if kinds["conv"] == "own" else _exact(read, unit, slopes)
        gained |= {"conv_weight": total[:, :, :-1], "conv_bias": total[:, :, -1]}
    if fed is not None and kinds["linear_x"] != "instant":
        last = None if traces is None else traces["inputs"]
        read, after["inputs"] = tapped(F.pad(fed.x, (0, 1), value=1.0), len(fed.taps), last, reset, mask)
        total = _of_inputs(border.since(read), fed.taps, unit, slopes, kinds["linear_x"] == "exact")
        gained |= {"linear_x.weight": total[:, :, :-1], "linear_x.bias": total[:, :, -1]}
    return after | {name: border.onto(None if traces is None else traces[name], e) for name, e in gained.items()}


def _mixing(unit: Unit, slopes: GatedSlopes) -> list[tuple[Tensor, Tensor]]:
    """dh_t[j]/dv_t[i] as a sum of matrices times slopes of j: `(P, W)` and `(B, T, S, W)`."""
    heads, wide = len(unit.input_weight), slopes.value.dtype
    decay, value = (weight.transpose(0, 1).flatten(1) for weight in (unit.decay_weight, unit.input_weight))
    own = torch.eye(len(decay), dtype=wide, device=decay.device).repeat(1, heads)
    return [(decay, slopes.decay_gate), (value, slopes.input_gate), (own, slopes.value)]


def _by_own(unit: Unit, slopes: GatedSlopes) -> Tensor:
    """dh_t[j]/dv_t[j], `(B, T, S, W)`."""
    heads = len(unit.input_weight)
    return _summed(
        torch.diagonal(matrix.unflatten(1, (heads, -1)), dim1=0, dim2=2).flatten() * slope
        for matrix, slope in _mixing(unit, slopes)
    )


def _own(read: Tensor, unit: Unit, slopes: GatedSlopes) -> Tensor:
    """sum_t read_t[q, j] dh_t[j]/dv_t[j], `(B, S, Q, W)`."""
    return (read * _by_own(unit, slopes)[:, :, :, None]).sum(1)


def _exact(read: Tensor, unit: Unit, slopes: GatedSlopes) -> Tensor:
    """sum_t read_t[q, i] dh_t[j]/dv_t[i], `(B, S, Q, P, W)`."""
    heads = len(unit.input_weight)
    read = read.unflatten(-1, (heads, -1))
    return _summed(
        torch.einsum("btsqhi,btshj->bsqihj", read, slope.unflatten(-1, (heads, -1))).flatten(-2) * matrix
        for matrix, slope in _mixing(unit, slopes)
    )


def _of_inputs(read: Tensor, taps: Tensor, unit: Unit, slopes: GatedSlopes, exact: bool) -> Tensor:
    """The same of each input by way of all taps: `(B, S, D + 1, W)`, or P before W if exact."""
    heads = len(unit.input_weight)
    if not exact:
        return torch.einsum("btski,btskw->bsiw", read, taps * _by_own(unit, slopes)[:, :, :, None])
    # The taps of channel (h, i) at all places j of its head: (K, P, W).
    entering = taps.unflatten(1, (heads, -1)).mT.repeat_interleave(taps.shape[1] // heads, 2)
    return _summed(
        torch.einsum("bskij,kpj->bsipj", torch.einsum("btski,btsj->bskij", read, slope), entering * matrix)
        for matrix, slope in _mixing(unit, slopes)
    )


def _summed(parts: Iterable[Tensor]) -> Tensor:
    return functools.reduce(torch.add, parts)


# The fast form: for each stream a plain sequence of the steps that exist since its last reset.


@jit_fast
def _through(e, a, right, ones):  # type: ignore[no-untyped-def]
    for t in range(a.shape[0]):
        _onto(e, a[t], ones, right[t])


@jit_fast
def _entering(e, a, read, i, part, right, left):  # type: ignore[no-untyped-def]
    """A row through all steps: what is read at entry i of each head, times what comes of it."""
    for t in range(a.shape[0]):
        _entries(left, read[t], i, part)
        _onto_each(e, a[t], left, right[t])


@jit_fast
def _seen(whole, taps, steps):  # type: ignore[no-untyped-def]
    """Each input by way of all taps, at each step and unit."""
    width = whole.shape[1]
    out = np.zeros((width, steps, taps.shape[1]), whole.dtype)
    for d in range(width):
        for t in range(steps):
            for k in range(taps.shape[0]):
                read, row, tap = whole[t + k, d], out[d, t], taps[k]
                for w in range(row.shape[0]):
                    row[w] += read * tap[w]
    return out


@jit_fast
def _job(a, s, v, before, seen, wi, wa, e_decay, e_wi, e_bi, e_wa, e_ba, e_wc, e_bc, e_wx, e_bx):  # type: ignore[no-untyped-def]
    """All traces of a stream through its steps. Unwanted ones have no rows; own ones one row where exact have P."""
    (steps, inner), part, ones = a.shape, wi.shape[1], a.dtype.type(1)
    right, left = np.empty((steps, inner), a.dtype), np.empty(inner, a.dtype)
    for e, of in ((e_decay, 0), (e_ba, 1), (e_bi, 2)):
        if e.shape[0] > 0:
            _through(e, a, s[of], ones)
    for i in range(part):
        for e, of in ((e_wa, 1), (e_wi, 2)):
            if e.shape[0] > 0:
                _entering(e[i], a, v, i, part, s[of], left)
        for t in range(steps if part in (e_bc.shape[0], e_bx.shape[0]) else 0):
            _mixed(right[t], wi, wa, s[:, t], i, part)
        if e_bc.shape[0] == part:
            for k in range(e_wc.shape[0]):
                _entering(e_wc[k, i], a, before[k : k + steps], i, part, right, left)
            _through(e_bc[i], a, right, ones)
        if e_bx.shape[0] == part:
            for d in range(seen.shape[0]):
                _entering(e_wx[d, i] if d < e_wx.shape[0] else e_bx[i], a, seen[d], i, part, right, left)
    for w in range(inner):
        h, i = w // part, w % part
        for t in range(steps):
            right[t, w] = wa[h, i, i] * s[1, t, w] + wi[h, i, i] * s[2, t, w] + s[3, t, w]
    if part > 1 and e_bc.shape[0] == 1:
        for k in range(e_wc.shape[0]):
            _each(e_wc[k, 0], a, before[k : k + steps], right)
        _through(e_bc[0], a, right, ones)
    if part > 1 and e_bx.shape[0] == 1:
        for d in range(seen.shape[0]):
            _each(e_wx[d, 0] if d < e_wx.shape[0] else e_bx[0], a, seen[d], right)


@jit_fast
def _each(e, a, left, right):  # type: ignore[no-untyped-def]
    for t in range(a.shape[0]):
        _onto_each(e, a[t], left[t], right[t])


@jit_fast
def _advance(a, s0, s1, s2, s3, v, u, ring, x, last, taps, wi, wa, reset, mask,  # type: ignore[no-untyped-def]
             e_decay, e_wi, e_bi, e_wa, e_ba, e_wc, e_bc, e_wx, e_bx, i0, i1):  # fmt: skip
    _, steps, side, inner = v.shape
    for j in range(i0, i1):
        b, at = j // side, j % side
        places, dropped = _places(reset, mask, b, steps)
        before = ring[b, :, at].copy()
        if dropped:
            before[:], last[b, :, at] = 0, 0
            e_decay[j], e_wi[j], e_bi[j], e_wa[j], e_ba[j] = 0, 0, 0, 0, 0
            e_wc[j], e_bc[j], e_wx[j], e_bx[j] = 0, 0, 0, 0
        count = len(places)
        now, s = np.empty((2, count, inner), a.dtype), np.empty((4, count, inner), a.dtype)
        for n in range(count):
            t = places[n]
            now[0, n], now[1, n] = a[b, t, at], v[b, t, at]
            s[0, n], s[1, n], s[2, n], s[3, n] = s0[b, t, at], s1[b, t, at], s2[b, t, at], s3[b, t, at]
        inputs = _extended(last[b, :, at], x[b, :, at][places])
        _job(now[0], s, now[1], _extended(before, u[b, :, at][places]), _seen(inputs, taps, count), wi, wa,
             e_decay[j], e_wi[j], e_bi[j], e_wa[j], e_ba[j], e_wc[j], e_bc[j], e_wx[j], e_bx[j])  # fmt: skip
        last[b, :, at] = inputs[count:]


def _traces_numba(
    traces: Mapping[str, Tensor] | None, unit: Unit, fed: Fed | None, kinds: Kinds, reset: Tensor | None,
    mask: Tensor | None,
) -> dict[str, Tensor]:  # fmt: skip
    v, none = unit.v, unit.v[..., :0]
    given = Fed(none, none, none[:, :0], unit.a.new_zeros(1, 0)) if fed is None else fed
    if kinds.get("conv", "instant") == "instant":
        given = given._replace(u=none, ring=given.ring[..., :0])
    if kinds.get("linear_x", "instant") == "instant":
        given = given._replace(x=none)
    after, moving = _moving(traces, unit, given, kinds)
    x, last = given.x, v.new_zeros(*given.ring.shape[:3], 0)
    if x.shape[3]:
        x = F.pad(x, (0, 1), value=1.0)
        last = v.new_zeros(*last.shape[:3], x.shape[3]) if traces is None else traces["inputs"].clone()
        after["inputs"] = last
    slopes = unit.slopes.decay, unit.slopes.decay_gate, unit.slopes.input_gate, unit.slopes.value
    read = (unit.a, *slopes, v, given.u, given.ring, x, last, given.taps, unit.input_weight, unit.decay_weight)
    arrays = [part.detach().contiguous().numpy() for part in read]
    flags = [np.zeros((0, 0), np.bool_) if flag is None else flag.contiguous().numpy() for flag in (reset, mask)]
    written = [e.numpy() for e in moving]
    over_jobs(lambda *jobs: _advance(*arrays, *flags, *written, *jobs), len(moving[0]), sum(map(Tensor.numel, moving)))
    return after


def _moving(
    traces: Mapping[str, Tensor] | None, unit: Unit, fed: Fed, kinds: Kinds
) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Traces that may be written to, and those and empty ones as the loop takes them: streams and units side by side on
    the first axis, and an axis of one where that of P is left out."""
    (batch, _, side, inner), part, after, moving = unit.v.shape, unit.input_weight.shape[1], dict[str, Tensor](), []
    for group, name, *axes in (("decay", "decay"), ("input_gate", "input_gate.weight", part),
                               ("input_gate", "input_gate.bias"), ("decay_gate", "decay_gate.weight", part),
                               ("decay_gate", "decay_gate.bias"), ("conv", "conv_weight", len(fed.taps), part),
                               ("conv", "conv_bias", part), ("linear_x", "linear_x.weight", fed.x.shape[3], part),
                               ("linear_x", "linear_x.bias", part)):  # fmt: skip
        kind, shape = kinds.get(group, "instant"), (*axes, inner)
        if kind == "instant":
            moving.append(unit.v.new_zeros(batch * side, 0, *shape[1:]))
            continue
        if traces is None:
            own = (*axes[:-1], inner) if kind == "own" else shape
            after[name] = unit.v.new_zeros(batch, side, *own)
        else:
            after[name] = traces[name].clone(memory_format=torch.contiguous_format)
        moving.append(after[name].view(batch * side, *(*axes[:-1], 1, inner) if kind == "own" else shape))
    return after, moving
