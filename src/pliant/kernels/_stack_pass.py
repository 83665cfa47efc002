"""The arithmetic of a stack of gated LRU blocks, forward and backward, for Numba; see `_gated_block`.

Rows are the B T steps; everything but the convolution and the recurrence is done for all of them at once,
serially: gradients of parameters are sums over rows, so they are not split over threads. Parameters come
as addresses.
"""

import inspect
import math
from typing import Any

import numba
import numpy as np
from numba import types
from numba.extending import intrinsic

from pliant.kernels._jit import jit_exact, jit_fast
from pliant.kernels._math import power_of_two, rint

GELU, CUBIC = math.sqrt(2 / math.pi), 0.044715
DEGREE = 13
"""Of the series of exp on ±log(2)/2: the first term left out is 4e-18 of the sum."""

# Places in `_constants`.
ZERO, HALF, ONE, TWO, FOUR, POWER, FLOOR, EPS, SLOPE, CUBE, CUBE_SLOPE, LIMIT, LOG2E, LOG2_HIGH, LOG2_LOW = range(15)

_CONSTANTS: dict[Any, Any] = {}


def constants_of(scalar: Any, power: float, bound: float, eps: float) -> Any:
    """The numbers below in the float type of the pass: a literal would make Numba compute in float64."""
    key = (scalar, power, bound, eps)
    if key not in _CONSTANTS:
        limit = 87.0 if scalar is np.float32 else 708.0
        # log(2) in two parts, of which the first has few digits, so that whole multiples of it are exact.
        high = np.float32(0.693359375)
        values = [0.0, 0.5, 1.0, 2.0, 4.0, power, 1 / bound**2, eps, 2 * GELU, CUBIC, 3 * CUBIC, limit, 1 / math.log(2)]
        values += [float(high), -2.121944400546905827679e-4]
        values += [1 / math.factorial(n) for n in range(DEGREE, -1, -1)]
        _CONSTANTS[key] = np.array(values, scalar)
    return _CONSTANTS[key]


def _pointer_to(typing: Any, address: Any, like: Any) -> Any:
    pointer = types.CPointer(like.dtype)
    return pointer(types.int64, like), lambda context, builder, _, given: builder.inttoptr(
        given[0], context.get_value_type(pointer)
    )


_pointer = intrinsic(inspect.unwrap(_pointer_to))


@jit_exact
def _exp(x, k):  # type: ignore[no-untyped-def]
    # x = n log 2 + r: within 2 roundings of exp x, where x is within the limits to which it is held.
    limit = k[LIMIT]
    x = -limit if x < -limit else x
    x = limit if x > limit else x
    n = rint(x * k[LOG2E])
    r = (x - n * k[LOG2_HIGH]) - n * k[LOG2_LOW]
    # The series is written out, since an index that is not a constant keeps a loop from running on vectors.
    total = (((((k[15] * r + k[16]) * r + k[17]) * r + k[18]) * r + k[19]) * r + k[20]) * r + k[21]
    total = (((((total * r + k[22]) * r + k[23]) * r + k[24]) * r + k[25]) * r + k[26]) * r + k[27]
    return (total * r + k[28]) * power_of_two(n)


@jit_exact
def _scalars(a):  # type: ignore[no-untyped-def]
    return (a[0], a[1], a[2], a[3], a[4], a[5], a[6], a[7], a[8], a[9], a[10], a[11], a[12], a[13], a[14], a[15], a[16],
            a[17], a[18], a[19], a[20], a[21], a[22], a[23], a[24], a[25], a[26], a[27], a[28])  # fmt: skip


@jit_fast
def _sigmoid(x, k):  # type: ignore[no-untyped-def]
    return k[ONE] / (k[ONE] + _exp(-x, k))


@jit_fast
def _gelu_gate(x, k):  # type: ignore[no-untyped-def]
    # (1 + tanh(u)) / 2 = σ(2u)
    return _sigmoid(k[SLOPE] * (x + k[CUBE] * x * x * x), k)


@jit_fast
def _gelu_slope(x, gate, k):  # type: ignore[no-untyped-def]
    return gate + x * gate * (k[ONE] - gate) * k[SLOPE] * (k[ONE] + k[CUBE_SLOPE] * x * x)


# Products over rows. Blocks of four, since a row of weights that was loaded should serve more than once.


@jit_fast
def _spread(out, bias):  # type: ignore[no-untyped-def]
    for r in range(out.shape[0]):
        for i in range(bias.shape[0]):
            out[r, i] = bias[i]


@jit_fast
def _dots(out, x, weight, to, at):  # type: ignore[no-untyped-def]
    """out[r, to + i] += sum_j weight[i, j] x[r, at + j]"""
    rows, size = x.shape[0], weight.shape[1]
    r = 0
    while r + 4 <= rows:
        x0, x1, x2, x3 = x[r, at:], x[r + 1, at:], x[r + 2, at:], x[r + 3, at:]
        for i in range(weight.shape[0]):
            w = weight[i]
            s0, s1, s2, s3 = out[r, to + i], out[r + 1, to + i], out[r + 2, to + i], out[r + 3, to + i]
            for j in range(size):
                s0 += w[j] * x0[j]
                s1 += w[j] * x1[j]
                s2 += w[j] * x2[j]
                s3 += w[j] * x3[j]
            out[r, to + i], out[r + 1, to + i], out[r + 2, to + i], out[r + 3, to + i] = s0, s1, s2, s3
        r += 4
    while r < rows:
        x0 = x[r, at:]
        for i in range(weight.shape[0]):
            w = weight[i]
            s0 = out[r, to + i]
            for j in range(size):
                s0 += w[j] * x0[j]
            out[r, to + i] = s0
        r += 1


@jit_fast
def _rows(out, x, weight, to, at):  # type: ignore[no-untyped-def]
    """out[r, to + j] += sum_i x[r, at + i] weight[i, j]"""
    size, width = weight.shape
    for r in range(x.shape[0]):
        o = out[r, to : to + width]
        i = 0
        while i + 4 <= size:
            a0, a1, a2, a3 = x[r, at + i], x[r, at + i + 1], x[r, at + i + 2], x[r, at + i + 3]
            w0, w1, w2, w3 = weight[i], weight[i + 1], weight[i + 2], weight[i + 3]
            for j in range(width):
                o[j] += a0 * w0[j] + a1 * w1[j] + a2 * w2[j] + a3 * w3[j]
            i += 4
        while i < size:
            a0, w0 = x[r, at + i], weight[i]
            for j in range(width):
                o[j] += a0 * w0[j]
            i += 1


@jit_fast
def _outer(out, x, y, at, to):  # type: ignore[no-untyped-def]
    """out[i, j] += sum_r x[r, at + i] y[r, to + j]"""
    rows, width = x.shape[0], out.shape[1]
    r = 0
    while r + 4 <= rows:
        y0, y1, y2, y3 = y[r, to:], y[r + 1, to:], y[r + 2, to:], y[r + 3, to:]
        for i in range(out.shape[0]):
            o = out[i]
            a0, a1, a2, a3 = x[r, at + i], x[r + 1, at + i], x[r + 2, at + i], x[r + 3, at + i]
            for j in range(width):
                o[j] += a0 * y0[j] + a1 * y1[j] + a2 * y2[j] + a3 * y3[j]
        r += 4
    while r < rows:
        y0 = y[r, to:]
        for i in range(out.shape[0]):
            o, a0 = out[i], x[r, at + i]
            for j in range(width):
                o[j] += a0 * y0[j]
        r += 1


@jit_fast
def _columns(out, x):  # type: ignore[no-untyped-def]
    for r in range(x.shape[0]):
        for i in range(out.shape[0]):
            out[i] += x[r, i]


@jit_fast
def _affine(out, x, weight, bias):  # type: ignore[no-untyped-def]
    _spread(out, bias)
    _dots(out, x, weight, 0, 0)


@jit_fast
def _affine_back(dout, x, weight, dx, dweight, dbias):  # type: ignore[no-untyped-def]
    _columns(dbias, dout)
    _outer(dweight, dout, x, 0, 0)
    _rows(dx, dout, weight, 0, 0)


@jit_fast
def _heads(out, x, weight, bias):  # type: ignore[no-untyped-def]
    size = weight.shape[1]
    for h in range(weight.shape[0]):
        for r in range(x.shape[0]):
            for j in range(size):
                out[r, h * size + j] = bias[h, j]
        _rows(out, x, weight[h], h * size, h * size)


@jit_fast
def _heads_back(dout, x, weight, dx, dweight, dbias):  # type: ignore[no-untyped-def]
    size = weight.shape[1]
    for h in range(weight.shape[0]):
        at = h * size
        for r in range(x.shape[0]):
            for j in range(size):
                dbias[h, j] += dout[r, at + j]
        _outer(dweight[h], x, dout, at, at)
        _dots(dx, dout, weight[h], at, at)


@jit_fast
def _norm(out, x, gain, k):  # type: ignore[no-untyped-def]
    total = k[ZERO]
    for j in range(x.shape[0]):
        total += x[j] * x[j]
    scale = k[ONE] / math.sqrt(total / x.dtype.type(x.shape[0]) + k[EPS])
    for j in range(x.shape[0]):
        out[j] = x[j] * scale * gain[j]
    return scale


@jit_fast
def _norm_back(dout, x, gain, scale, dx, dgain, k):  # type: ignore[no-untyped-def]
    along = k[ZERO]
    for j in range(x.shape[0]):
        along += dout[j] * gain[j] * x[j]
        dgain[j] += dout[j] * x[j] * scale
    along *= scale * scale * scale / x.dtype.type(x.shape[0])
    for j in range(x.shape[0]):
        dx[j] += dout[j] * gain[j] * scale - along * x[j]


@jit_fast
def _vector(address, size, like):  # type: ignore[no-untyped-def]
    return numba.carray(_pointer(address, like), (size,))


@jit_fast
def _matrix(address, height, width, like):  # type: ignore[no-untyped-def]
    return numba.carray(_pointer(address, like), (height, width))


@jit_fast
def _block(where, layer, sizes, like):  # type: ignore[no-untyped-def]
    """The arrays of `BlockWeights` of a block."""
    _, width, inner, taps, heads, hidden, _, _, _ = sizes
    at, part = 19 * layer, inner // heads
    return (
        _vector(where[at], width, like),
        _matrix(where[at + 1], inner, width, like),
        _vector(where[at + 2], inner, like),
        _matrix(where[at + 3], inner, width, like),
        _vector(where[at + 4], inner, like),
        _matrix(where[at + 5], taps, inner, like),
        _vector(where[at + 6], inner, like),
        numba.carray(_pointer(where[at + 7], like), (heads, part, part)),
        _matrix(where[at + 8], heads, part, like),
        numba.carray(_pointer(where[at + 9], like), (heads, part, part)),
        _matrix(where[at + 10], heads, part, like),
        _vector(where[at + 11], inner, like),
        _matrix(where[at + 12], width, inner, like),
        _vector(where[at + 13], width, like),
        _vector(where[at + 14], width, like),
        _matrix(where[at + 15], 2 * hidden, width, like),
        _vector(where[at + 16], 2 * hidden, like),
        _matrix(where[at + 17], width, hidden, like),
        _vector(where[at + 18], width, like),
    )


@jit_fast
def _ends(where, sizes, like):  # type: ignore[no-untyped-def]
    """Gain of the last norm, and the arrays of `Ends`, empty without them."""
    depth, width, _, _, _, _, inputs, entries, outputs = sizes
    at = 19 * depth
    last = at + 5 if outputs else at
    return (
        _vector(where[at], width, like),
        _matrix(where[min(at + 1, last)], width, inputs, like),
        _vector(where[min(at + 2, last)], width, like),
        _matrix(where[min(at + 3, last)], entries, width, like),
        _matrix(where[min(at + 4, last)], outputs, width, like),
        _vector(where[min(at + 5, last)], outputs, like),
    )


@jit_fast
def _fields(work, rows, sizes):  # type: ignore[no-untyped-def]
    """What a block keeps of each row.

    1/rms twice `(2, R)`; n, x', m `(3, R, D)`; y-branch, its gate, c, input gate, decay gate, a, scale, h before,
    h after `(9, R, W)`; p and q `(R, 2F)`; gate of p `(R, F)`.
    """
    _, width, inner, _, _, hidden, _, _, _ = sizes
    a = 2 * rows
    b = a + 3 * rows * width
    c = b + 9 * rows * inner
    d = c + 2 * rows * hidden
    return (
        work[:a].reshape(2, rows),
        work[a:b].reshape(3, rows, width),
        work[b:c].reshape(9, rows, inner),
        work[c:d].reshape(rows, 2 * hidden),
        work[d:].reshape(rows, hidden),
    )


@jit_fast
def _kept(work, rows, sizes):  # type: ignore[no-untyped-def]
    scales, d, w, pq, gate = _fields(work, rows, sizes)
    return scales, (d[0], d[1], d[2]), (w[0], w[1], w[2], w[3], w[4], w[5], w[6], w[7], w[8]), pq, gate


@jit_fast
def _trace(source, reset, mask, reach):  # type: ignore[no-untyped-def]
    """Places of the inputs that each tap reads at each step, and after the last; -1 where there is none."""
    batch, steps = mask.shape
    ring = np.empty(reach + 1, np.int64)
    for b in range(batch):
        for j in range(reach):
            ring[j] = j
        for t in range(steps):
            if reset[b, t]:
                for j in range(reach):
                    ring[j] = -1
            if mask[b, t]:
                ring[reach] = reach + t
                for j in range(reach + 1):
                    source[b, t, j] = ring[j]
                for j in range(reach):
                    ring[j] = ring[j + 1]
        for j in range(reach):
            source[b, steps, j] = ring[j]


@jit_fast
def _softplus(decay, soft):  # type: ignore[no-untyped-def]
    for w in range(decay.shape[0]):
        soft[w] = max(decay[w], 0) + math.log1p(math.exp(-abs(decay[w])))


@jit_fast
def forward_pass(where, before, sizes, constants, reset, mask, numbers, codes, offset,  # type: ignore[no-untyped-def]
             layers, seen, source, work, first, top, fed, y, conv_after, h_after, fresh_after):  # fmt: skip
    depth, width, inner, taps, _, hidden, inputs, _, outputs = sizes
    k = _scalars(constants)
    batch, steps = mask.shape
    rows, reach = batch * steps, taps - 1
    gain, w_embed, b_embed, table, w_head, b_head = _ends(where, sizes, constants)
    soft = np.empty(inner, constants.dtype)
    inside = np.empty((rows, inner), constants.dtype)
    middle = np.empty((rows, hidden), constants.dtype)
    _trace(source, reset, mask, reach)
    if outputs:
        for r in range(rows):
            for j in range(inputs):
                fed[r, j] = numbers[r, j]
        _affine(layers[0], fed, w_embed, b_embed)
        for r in range(rows):
            for j in range(codes.shape[1]):
                for i in range(width):
                    layers[0, r, i] += table[int(codes[r, j]), i]
    for layer in range(depth):
        (g1, wx, bx, wy, by, wc, bc, wi, bi, wa, ba, decay, wo, bo, g2, win, bin_, wout, bout) = _block(
            where, layer, sizes, constants
        )
        scales, (n, x1, m), (side, gate, c, ig, dg, a, scale, last, now), pq, pgate = _kept(work[layer], rows, sizes)
        x, out = layers[layer], layers[layer + 1]
        conv, h, fresh = seen[layer], h_after[layer], fresh_after[layer]
        conv_before = numba.carray(_pointer(before[3 * layer], constants), (batch, reach, inner))
        h_before = _matrix(before[3 * layer + 1], batch, inner, constants)
        fresh_before = numba.carray(_pointer(before[3 * layer + 2], mask), (batch,))
        for b in range(batch):
            for t in range(steps):
                r = b * steps + t
                if mask[b, t]:
                    scales[0, r] = _norm(n[r], x[r], g1, k)
                else:
                    scales[0, r] = k[ZERO]
                    for i in range(width):
                        n[r, i] = k[ZERO]
        _affine(side, n, wy, by)
        for b in range(batch):
            for j in range(reach):
                for w in range(inner):
                    conv[b, j, w] = conv_before[b, j, w]
            _affine(conv[b, reach:], n[b * steps : (b + 1) * steps], wx, bx)
            for t in range(steps):
                r = b * steps + t
                for w in range(inner):
                    c[r, w] = bc[w]
                if mask[b, t]:
                    for j in range(taps):
                        at = source[b, t, j]
                        if at >= 0:
                            for w in range(inner):
                                c[r, w] += wc[j, w] * conv[b, at, w]
            for j in range(reach):
                at = source[b, steps, j]
                for w in range(inner):
                    conv_after[layer, b, j, w] = conv[b, at, w] if at >= 0 else k[ZERO]
        _heads(ig, c, wi, bi)
        _heads(dg, c, wa, ba)
        _softplus(decay, soft)
        for r in range(rows):
            for w in range(inner):
                ig[r, w] = _sigmoid(ig[r, w], k)
                gate[r, w] = _gelu_gate(side[r, w], k)
            for w in range(inner):
                dg[r, w] = _sigmoid(dg[r, w], k)
                log_a = -k[POWER] * dg[r, w] * soft[w]
                a[r, w] = _exp(log_a, k)
                scale[r, w] = math.sqrt(k[ONE] - _exp(k[TWO] * log_a, k))
        for b in range(batch):
            fresh[b] = fresh_before[b]
            for w in range(inner):
                h[b, w] = h_before[b, w]
            for t in range(steps):
                r = b * steps + t
                if reset[b, t]:
                    fresh[b] = True
                    for w in range(inner):
                        h[b, w] = k[ZERO]
                first[layer, b, t] = fresh[b]
                if not mask[b, t]:
                    continue
                if fresh[b]:
                    for w in range(inner):
                        scale[r, w] = k[ONE]
                fresh[b] = False
                for w in range(inner):
                    last[r, w] = h[b, w]
                    h[b, w] = a[r, w] * h[b, w] + c[r, w] * ig[r, w] * scale[r, w]
                    now[r, w] = h[b, w]
                    inside[r, w] = now[r, w] * side[r, w] * gate[r, w]
        _affine(x1, inside, wo, bo)
        for b in range(batch):
            for t in range(steps):
                r = b * steps + t
                for i in range(width):
                    x1[r, i] = x[r, i] + x1[r, i] if mask[b, t] else x[r, i]
                scales[1, r] = _norm(m[r], x1[r], g2, k)
        _affine(pq, m, win, bin_)
        for r in range(rows):
            for f in range(hidden):
                pgate[r, f] = _gelu_gate(pq[r, f], k)
                middle[r, f] = pq[r, f] * pgate[r, f] * pq[r, hidden + f]
        _affine(out, middle, wout, bout)
        for r in range(rows):
            for i in range(width):
                out[r, i] += x1[r, i]
    for r in range(rows):
        top[r, width] = _norm(top[r, :width], layers[depth, r], gain, k)
    if outputs:
        _affine(y, top, w_head, b_head)
        if offset.size:
            for r in range(rows):
                for i in range(outputs):
                    y[r, i] += constants.dtype.type(offset[r, i])
    else:
        for r in range(rows):
            for i in range(width):
                y[r, i] = top[r, i]


@jit_fast
def backward_pass(where, gradients, sizes, constants, reset, mask, codes, layers, seen,  # type: ignore[no-untyped-def]
              source, work, first, top, fed, dy, dconv, dh, dx):  # fmt: skip
    # dx is the gradient of the newest block's output, and becomes that of its input; dh that which flows back
    # from step t + 1; dseen that of the inputs of the convolution.
    depth, width, inner, taps, _, hidden, _, _, outputs = sizes
    k = _scalars(constants)
    dtype = constants.dtype
    batch, steps = mask.shape
    rows, reach = batch * steps, taps - 1
    gain, _, _, _, w_head, _ = _ends(where, sizes, constants)
    g_gain, g_w_embed, g_b_embed, g_table, g_w_head, g_b_head = _ends(gradients, sizes, constants)
    soft, slope = np.empty(inner, dtype), np.empty(inner, dtype)
    inside, dinside = np.empty((rows, inner), dtype), np.empty((rows, inner), dtype)
    dside, dc = np.empty((rows, inner), dtype), np.empty((rows, inner), dtype)
    dig, ddg = np.empty((rows, inner), dtype), np.empty((rows, inner), dtype)
    middle, dmiddle = np.empty((rows, hidden), dtype), np.empty((rows, hidden), dtype)
    dpq, dn, dtop = np.empty((rows, 2 * hidden), dtype), np.empty((rows, width), dtype), np.empty((rows, width), dtype)
    dseen = np.empty((batch, reach + steps, inner), dtype)
    dx[:] = k[ZERO]
    if outputs:
        dtop[:] = k[ZERO]
        _affine_back(dy, top, w_head, dtop, g_w_head, g_b_head)
        for r in range(rows):
            _norm_back(dtop[r], layers[depth, r], gain, top[r, width], dx[r], g_gain, k)
    else:
        for r in range(rows):
            _norm_back(dy[r], layers[depth, r], gain, top[r, width], dx[r], g_gain, k)
    for layer in range(depth - 1, -1, -1):
        g1, wx, _, wy, _, wc, _, wi, _, wa, _, decay, wo, _, g2, win, _, wout, _ = _block(
            where, layer, sizes, constants
        )
        (g_g1, g_wx, g_bx, g_wy, g_by, g_wc, g_bc, g_wi, g_bi, g_wa, g_ba, g_decay, g_wo, g_bo, g_g2, g_win, g_bin,
         g_wout, g_bout) = _block(gradients, layer, sizes, constants)  # fmt: skip
        scales, (n, x1, m), (side, gate, c, ig, dg, a, scale, last, now), pq, pgate = _kept(work[layer], rows, sizes)
        x, conv = layers[layer], seen[layer]
        dmiddle[:] = k[ZERO]
        for r in range(rows):
            for f in range(hidden):
                middle[r, f] = pq[r, f] * pgate[r, f] * pq[r, hidden + f]
        _affine_back(dx, middle, wout, dmiddle, g_wout, g_bout)
        for r in range(rows):
            for f in range(hidden):
                dpq[r, f] = dmiddle[r, f] * pq[r, hidden + f] * _gelu_slope(pq[r, f], pgate[r, f], k)
                dpq[r, hidden + f] = dmiddle[r, f] * pq[r, f] * pgate[r, f]
        dn[:] = k[ZERO]
        _affine_back(dpq, m, win, dn, g_win, g_bin)
        for r in range(rows):
            _norm_back(dn[r], x1[r], g2, scales[1, r], dx[r], g_g2, k)
        # Steps that do not exist take no part in what follows.
        for b in range(batch):
            for t in range(steps):
                r = b * steps + t
                for i in range(width):
                    dtop[r, i] = dx[r, i] if mask[b, t] else k[ZERO]
                for w in range(inner):
                    inside[r, w] = now[r, w] * side[r, w] * gate[r, w] if mask[b, t] else k[ZERO]
        dinside[:] = k[ZERO]
        _affine_back(dtop, inside, wo, dinside, g_wo, g_bo)
        _softplus(decay, soft)
        for w in range(inner):
            slope[w] = _sigmoid(decay[w], k)
        for b in range(batch):
            for t in range(steps - 1, -1, -1):
                r = b * steps + t
                if mask[b, t]:
                    for w in range(inner):
                        dside[r, w] = dinside[r, w] * now[r, w] * _gelu_slope(side[r, w], gate[r, w], k)
                        dnow = dh[layer, b, w] + dinside[r, w] * side[r, w] * gate[r, w]
                        du = dnow * scale[r, w]
                        dig[r, w] = du * c[r, w] * ig[r, w] * (k[ONE] - ig[r, w])
                        dc[r, w] = du * ig[r, w]
                        # d sqrt(1 - a²) with its derivative bounded, and d(1 - a²) = -2 a² d log a
                        root = k[FOUR] * scale[r, w] * scale[r, w]
                        root = math.sqrt(k[FLOOR] if root < k[FLOOR] else root)
                        bend = k[ZERO] if first[layer, b, t] else c[r, w] * ig[r, w] * k[TWO] * a[r, w] * a[r, w] / root
                        dlog = dnow * (last[r, w] * a[r, w] - bend)
                        ddg[r, w] = -k[POWER] * soft[w] * dlog * dg[r, w] * (k[ONE] - dg[r, w])
                        g_decay[w] -= k[POWER] * dg[r, w] * dlog * slope[w]
                        dh[layer, b, w] = dnow * a[r, w]
                else:
                    for w in range(inner):
                        dside[r, w] = dig[r, w] = ddg[r, w] = dc[r, w] = k[ZERO]
                if reset[b, t]:
                    for w in range(inner):
                        dh[layer, b, w] = k[ZERO]
        _heads_back(dig, c, wi, dc, g_wi, g_bi)
        _heads_back(ddg, c, wa, dc, g_wa, g_ba)
        _columns(g_bc, dc)
        dn[:] = k[ZERO]
        dseen[:] = k[ZERO]
        for b in range(batch):
            for j in range(reach):
                at = source[b, steps, j]
                if at >= 0:
                    for w in range(inner):
                        dseen[b, at, w] += dconv[layer, b, j, w]
            for t in range(steps):
                if mask[b, t]:
                    r = b * steps + t
                    for j in range(taps):
                        at = source[b, t, j]
                        if at >= 0:
                            for w in range(inner):
                                g_wc[j, w] += dc[r, w] * conv[b, at, w]
                                dseen[b, at, w] += dc[r, w] * wc[j, w]
            span = slice(b * steps, (b + 1) * steps)
            _affine_back(dseen[b, reach:], n[span], wx, dn[span], g_wx, g_bx)
            for j in range(reach):
                for w in range(inner):
                    dconv[layer, b, j, w] = dseen[b, j, w]
        _affine_back(dside, n, wy, dn, g_wy, g_by)
        for b in range(batch):
            for t in range(steps):
                if mask[b, t]:
                    r = b * steps + t
                    _norm_back(dn[r], x[r], g1, scales[0, r], dx[r], g_g1, k)
    if outputs:
        _columns(g_b_embed, dx)
        _outer(g_w_embed, dx, fed, 0, 0)
        for r in range(rows):
            for j in range(codes.shape[1]):
                for i in range(width):
                    g_table[int(codes[r, j]), i] += dx[r, i]
