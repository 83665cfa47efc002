"""Traces of a stack of gated LRU blocks from what its single pass has kept; for Numba, see `_stack_pass`.

The readable form is `advance_traces` and `trace_gradients` of `pliant.mixers.GatedLRU`, with the default kinds of
traces. Each entry is brought through all steps of the chunk while it is in the nearest cache. Steps before the last
reset of a stream are passed over, since nothing of them is left.
"""

import math

import numba
import numpy as np

from pliant.kernels._jit import jit_fast
from pliant.kernels._stack_pass import (
    FLOOR,
    FOUR,
    ONE,
    POWER,
    TWO,
    ZERO,
    _block,
    _kept,
    _matrix,
    _pointer,
    _scalars,
    _sigmoid,
    _softplus,
)

NAMES = (
    "lru.decay",
    "lru.input_gate.weight",
    "lru.input_gate.bias",
    "lru.decay_gate.weight",
    "lru.decay_gate.bias",
    "conv_weight",
    "conv_bias",
    "linear_x.weight",
    "linear_x.bias",
    "inputs",
)
"""Traces in the order of their addresses."""


@jit_fast
def _arrays(where, layer, batch, sizes, like):  # type: ignore[no-untyped-def]
    _, width, inner, taps, heads, _, _, _, _ = sizes
    at, part = 10 * layer, inner // heads
    return (
        _matrix(where[at], batch, inner, like),
        numba.carray(_pointer(where[at + 1], like), (batch, part, inner)),
        _matrix(where[at + 2], batch, inner, like),
        numba.carray(_pointer(where[at + 3], like), (batch, part, inner)),
        _matrix(where[at + 4], batch, inner, like),
        numba.carray(_pointer(where[at + 5], like), (batch, taps, part, inner)),
        numba.carray(_pointer(where[at + 6], like), (batch, part, inner)),
        numba.carray(_pointer(where[at + 7], like), (batch, width, inner)),
        _matrix(where[at + 8], batch, inner, like),
        numba.carray(_pointer(where[at + 9], like), (batch, taps - 1, width + 1)),
    )


@jit_fast
def _across(out, e, by):  # type: ignore[no-untyped-def]
    """out[j, i] += e[i, j] by[j], eight rows at a time, so that what is written stands side by side."""
    height, width = e.shape
    i = 0
    while i + 8 <= height:
        e0, e1, e2, e3, e4, e5, e6, e7 = e[i], e[i + 1], e[i + 2], e[i + 3], e[i + 4], e[i + 5], e[i + 6], e[i + 7]
        for j in range(width):
            o, b = out[j, i : i + 8], by[j]
            o[0] += e0[j] * b
            o[1] += e1[j] * b
            o[2] += e2[j] * b
            o[3] += e3[j] * b
            o[4] += e4[j] * b
            o[5] += e5[j] * b
            o[6] += e6[j] * b
            o[7] += e7[j] * b
        i += 8
    while i < height:
        for j in range(width):
            out[j, i] += e[i, j] * by[j]
        i += 1


@jit_fast
def credit_pass(where, gradients, traces, sizes, constants, dconv, dh):  # type: ignore[no-untyped-def]
    """Gradients of parameters by way of the states before the pass, of which dconv and dh are those."""
    depth, width, inner, taps, heads, _, _, _, _ = sizes
    batch, part = dh.shape[1], inner // heads
    for layer in range(depth):
        (_, g_wx, g_bx, _, _, g_wc, g_bc, g_wi, g_bi, g_wa, g_ba, g_decay, _, _, _, _, _, _, _) = _block(
            gradients, layer, sizes, constants
        )
        decay, wi, bi, wa, ba, wc, bc, wx, bx, ring = _arrays(traces, layer, batch, sizes, constants)
        for b in range(batch):
            d = dh[layer, b]
            if not (d.any() or dconv[layer, b].any()):  # nothing goes on, and the trace may be anything
                continue
            for w in range(inner):
                g_decay[w] += d[w] * decay[b, w]
                g_bx[w] += d[w] * bx[b, w]
            for h in range(heads):
                at = h * part
                dj = d[at : at + part]
                for j in range(part):
                    g_bi[h, j] += dj[j] * bi[b, at + j]
                    g_ba[h, j] += dj[j] * ba[b, at + j]
                for i in range(part):
                    into, to, e = g_wi[h, i], g_wa[h, i], wi[b, i, at : at + part]
                    for j in range(part):
                        into[j] += dj[j] * e[j]
                    e = wa[b, i, at : at + part]
                    for j in range(part):
                        to[j] += dj[j] * e[j]
                    for k in range(taps + 1):
                        e = wc[b, k, i, at : at + part] if k < taps else bc[b, i, at : at + part]
                        total = constants[ZERO]
                        for j in range(part):
                            total += dj[j] * e[j]
                        if k < taps:
                            g_wc[k, at + i] += total
                        else:
                            g_bc[at + i] += total
            _across(g_wx, wx[b], d)
            for k in range(taps - 1):
                for w in range(inner):
                    dk = dconv[layer, b, k, w]
                    g_bx[w] += dk * ring[b, k, width]
                    for i in range(width):
                        g_wx[w, i] += dk * ring[b, k, i]


@jit_fast
def _slopes(a, c, ig, dg, scale, last, first, soft, slope, r, out, k):  # type: ignore[no-untyped-def]
    """Of a step's states: by Λ, both pre-activations (decay gate first) and the input."""
    for w in range(soft.shape[0]):
        root = k[FOUR] * scale[r, w] * scale[r, w]
        root = math.sqrt(k[FLOOR] if root < k[FLOOR] else root)
        bend = k[ZERO] if first else c[r, w] * ig[r, w] * k[TWO] * a[r, w] * a[r, w] / root
        by_log = -k[POWER] * (last[r, w] * a[r, w] - bend)
        out[0, w] = by_log * dg[r, w] * slope[w]
        out[1, w] = by_log * soft[w] * dg[r, w] * (k[ONE] - dg[r, w])
        out[2, w] = scale[r, w] * c[r, w] * ig[r, w] * (k[ONE] - ig[r, w])
        out[3, w] = scale[r, w] * ig[r, w]


@jit_fast
def _onto(e, a, left, right):  # type: ignore[no-untyped-def]
    for j in range(e.shape[0]):
        e[j] = a[j] * e[j] + left * right[j]


@jit_fast
def _onto_each(e, a, left, right):  # type: ignore[no-untyped-def]
    for j in range(e.shape[0]):
        e[j] = a[j] * e[j] + left[j] * right[j]


@jit_fast
def _entries(out, x, i, part):  # type: ignore[no-untyped-def]
    """Entry i of each head, at all places of the head."""
    for at in range(0, out.shape[0], part):
        of_head, entry = out[at : at + part], x[at + i]
        for j in range(part):
            of_head[j] = entry


@jit_fast
def _places(reset, mask, b, steps):  # type: ignore[no-untyped-def]
    """The steps of a stream that count, and whether a reset has dropped what was before; no flags have no rows."""
    begin, count, dropped, found = 0, 0, False, np.empty(steps, np.int64)
    if reset.shape[0] > 0:
        for t in range(steps):
            if reset[b, t]:
                begin, dropped = t, True
    for t in range(begin, steps):
        if mask.shape[0] == 0 or mask[b, t]:
            found[count] = t
            count += 1
    return found[:count], dropped


@jit_fast
def _extended(before, now):  # type: ignore[no-untyped-def]
    """One sequence behind the other."""
    reach = before.shape[0]
    whole = np.empty((reach + now.shape[0], now.shape[1]), now.dtype)
    whole[:reach], whole[reach:] = before, now
    return whole


@jit_fast
def _mixed(out, wi, wa, s, i, part):  # type: ignore[no-untyped-def]
    """Of each state by entry i of its head: by way of the gates, and of the value."""
    for h in range(wi.shape[0]):
        here = slice(h * part, h * part + part)
        row, to_input, to_decay, by_decay, by_input = out[here], wi[h, i], wa[h, i], s[1, here], s[2, here]
        for j in range(part):
            row[j] = to_decay[j] * by_decay[j] + to_input[j] * by_input[j]
        row[i] += s[3, h * part + i]


@jit_fast
def _heads(e_wi, e_wa, e_wc, e_bc, wi, wa, a, c, s, taps, i, left, row, one):  # type: ignore[no-untyped-def]
    """Entry i of all heads through one step: their gates, and their taps by way of all that the gates mix."""
    part = e_wi.shape[0]
    _entries(left, c, i, part)
    _onto_each(e_wi[i], a, left, s[2])
    _onto_each(e_wa[i], a, left, s[1])
    _mixed(row, wi, wa, s, i, part)
    for k in range(taps.shape[0]):
        _entries(left, taps[k], i, part)
        _onto_each(e_wc[k, i], a, left, row)
    _onto(e_bc[i], a, one, row)


@jit_fast
def advance_pass(where, traces, sizes, constants, reset, mask, seen, source, work, first):  # type: ignore[no-untyped-def]
    """Brings the traces from the states before the pass to those after it."""
    depth, width, inner, taps, heads, _, _, _, _ = sizes
    k = _scalars(constants)
    dtype = constants.dtype
    batch, steps = mask.shape
    rows, reach, part = batch * steps, taps - 1, inner // heads
    soft, slope = np.empty(inner, dtype), np.empty(inner, dtype)
    left, row = np.empty(inner, dtype), np.empty(inner, dtype)
    s, read = np.empty((steps, 4, inner), dtype), np.empty((steps, taps, inner), dtype)
    through, given = np.empty((steps, taps, inner), dtype), np.empty((steps, taps, width + 1), dtype)
    turned = np.empty((reach, width + 1), dtype)
    for layer in range(depth):
        _, _, _, _, _, wc, _, wi, _, wa, _, decay, _, _, _, _, _, _, _ = _block(where, layer, sizes, constants)
        e_decay, e_wi, e_bi, e_wa, e_ba, e_wc, e_bc, e_wx, e_bx, ring = _arrays(traces, layer, batch, sizes, constants)
        _, (n, _, _), (_, _, c, ig, dg, a, scale, last, _), _, _ = _kept(work[layer], rows, sizes)
        _softplus(decay, soft)
        for w in range(inner):
            slope[w] = _sigmoid(decay[w], k)
        for b in range(batch):
            begin = 0
            for t in range(steps):
                if reset[b, t]:
                    begin = t
                    for e in (e_decay, e_bi, e_ba, e_bx):
                        e[b] = k[ZERO]
                    for f in (e_wi, e_wa, e_bc, e_wx):
                        f[b] = k[ZERO]
                    e_wc[b] = k[ZERO]
            for t in range(begin, steps):
                r = b * steps + t
                if not mask[b, t]:
                    continue
                _slopes(a, c, ig, dg, scale, last, first[layer, b, t], soft, slope, r, s[t], k)
                for j in range(taps):
                    at = source[b, t, j]
                    given[t, j] = k[ZERO]
                    read[t, j] = k[ZERO]
                    if at >= 0:
                        read[t, j] = seen[layer, b, at]
                        if at < reach:
                            given[t, j] = ring[b, at]
                        else:
                            given[t, j, :width] = n[b * steps + at - reach]
                            given[t, j, width] = k[ONE]
                for w in range(inner):
                    h, i = w // part, w % part
                    own = wa[h, i, i] * s[t, 1, w] + wi[h, i, i] * s[t, 2, w] + s[t, 3, w]
                    for j in range(taps):
                        through[t, j, w] = own * wc[j, w]
            for j in range(reach):
                at = source[b, steps, j]
                if at < 0:
                    turned[j] = k[ZERO]
                elif at < reach:
                    turned[j] = ring[b, at]
                else:
                    turned[j, :width] = n[b * steps + at - reach]
                    turned[j, width] = k[ONE]
            for j in range(reach):
                ring[b, j] = turned[j]
            for i in range(part):
                for t in range(begin, steps):
                    if mask[b, t]:
                        r = b * steps + t
                        _heads(e_wi[b], e_wa[b], e_wc[b], e_bc[b], wi, wa, a[r], c[r], s[t], read[t], i, left, row,
                               k[ONE])  # fmt: skip
            for i in range(width + 1):
                e = e_wx[b, i] if i < width else e_bx[b]
                for t in range(begin, steps):
                    if mask[b, t]:
                        _onto(e, a[b * steps + t], given[t, 0, i], through[t, 0])
                        for j in range(1, taps):
                            factor, right = given[t, j, i], through[t, j]
                            for w in range(inner):
                                e[w] += factor * right[w]
            for t in range(begin, steps):
                if mask[b, t]:
                    decays = a[b * steps + t]
                    for w in range(inner):
                        e_decay[b, w] = decays[w] * e_decay[b, w] + s[t, 0, w]
                        e_ba[b, w] = decays[w] * e_ba[b, w] + s[t, 1, w]
                        e_bi[b, w] = decays[w] * e_bi[b, w] + s[t, 2, w]
