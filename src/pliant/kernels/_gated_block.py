"""One residual block of a gated LRU in a single pass, for small models on a CPU.

    n = rms(x) g_1;  c = conv(W_x n + b_x);  v = RG-LRU(c);  x' = x + W_o (v ⊙ gelu(W_y n + b_y)) + b_o
    m = rms(x') g_2; [p, q] = W_in m + b_in;                 y = x' + W_out (gelu(p) ⊙ q) + b_out

The readable form is `pliant.models.blocks.Block` around `pliant.mixers.GatedLRU`, of which this is
the same function with the same gradients. At one step of a narrow model nearly all time goes into
starting some sixty operations and their derivatives; here it is one of each.

Forward keeps what backward needs in one workspace row per step. Both run serially over streams
and steps; gradients of parameters are sums over both, so they are not split over threads.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pliant.kernels._jit import jit_fast

MAX_WIDTH = 256
MAX_STEPS = 1024
"""Widths and B x T beyond which products of whole matrices are faster than this."""

GELU, CUBIC = math.sqrt(2 / math.pi), 0.044715


class BlockWeights(NamedTuple):
    """Parameters of a block: D width, W width of the recurrence, K taps, H heads, F width of the MLP."""

    norm: Tensor  # (D,)
    x_weight: Tensor  # (W, D)
    x_bias: Tensor  # (W,)
    y_weight: Tensor  # (W, D)
    y_bias: Tensor  # (W,)
    conv_weight: Tensor  # (K, W)
    conv_bias: Tensor  # (W,)
    input_weight: Tensor  # (H, W/H, W/H)
    input_bias: Tensor  # (H, W/H)
    decay_weight: Tensor  # (H, W/H, W/H)
    decay_bias: Tensor  # (H, W/H)
    decay: Tensor  # (W,)
    out_weight: Tensor  # (D, W)
    out_bias: Tensor  # (D,)
    mlp_norm: Tensor  # (D,)
    in_weight: Tensor  # (2F, D)
    in_bias: Tensor  # (2F,)
    mlp_weight: Tensor  # (D, F)
    mlp_bias: Tensor  # (D,)


def gated_block_fits(x: Tensor, h: Tensor, in_weight: Tensor) -> bool:
    """Whether the single pass serves: few steps of a narrow model, in one float type, on the CPU, and not traced."""
    return (
        x.device.type == "cpu"
        and x.ndim == 3
        and 0 < x.shape[0] * x.shape[1] <= MAX_STEPS
        and in_weight.shape[0] <= 4 * MAX_WIDTH
        and x.dtype in (torch.float32, torch.float64)
        and x.dtype == h.dtype == in_weight.dtype
        and in_weight.device.type == "cpu"
        and type(in_weight) is torch.nn.Parameter  # no tensor subclass, so no transform under way
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.peek_interpreter_stack()
        and not torch.is_autocast_enabled("cpu")
    )


def gated_block(
    x: Tensor,
    conv: Tensor,
    h: Tensor,
    fresh: Tensor,
    weights: BlockWeights,
    reset: Tensor | None,
    mask: Tensor | None,
    *,
    decay_power: float,
    max_derivative: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run the block over `(B, T, D)`.

    Args:
        x: `(B, T, D)` float32 or float64, the type of everything else that is a float.
        conv: `(B, K-1, W)`, the last inputs of the convolution, oldest first.
        h: `(B, W)`, state of the recurrence.
        fresh: `(B,)` bool, no step yet.
        weights: the parameters.
        reset, mask: `(B, T)` bool or None.
        decay_power, max_derivative, eps: the constants C and G of the unit, and that of the norms.

    Returns:
        y `(B, T, D)`, and conv, h and fresh after the last step.
    """
    constants = (decay_power, max_derivative, eps)
    y, conv, h, fresh = _Block.apply(x, conv, h, fresh, reset, mask, constants, *weights)
    return y, conv, h, fresh


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, conv, h, fresh, reset, mask, constants, *weights):  # type: ignore[no-untyped-def]
        batch, steps, width = x.shape
        reach, inner = conv.shape[1:]
        hidden = weights[-2].shape[1]
        arrays = tuple(_array(weight) for weight in weights)
        inputs = (_array(x), _array(conv), _array(h), _array(fresh), _flags(reset, x, False), _flags(mask, x, True))
        # Results first, then what the backward pass reads.
        y, h_after, fresh_after = np.empty_like(inputs[0]), inputs[2].copy(), inputs[3].copy()
        dtype = y.dtype
        seen = np.empty((batch, reach + steps, inner), dtype)
        source = np.empty((batch, steps + 1, reach + 1), np.int64)
        work = np.empty((batch, steps, _work_size(width, inner, hidden)), dtype)
        first = np.empty((batch, steps), np.bool_)
        conv_after = np.empty((batch, reach, inner), dtype)
        kept = (seen, source, work, first)
        _forward(*inputs, arrays, *(dtype.type(c) for c in constants), y, conv_after, h_after, fresh_after, *kept)
        ctx.arrays = (inputs, arrays, constants, h_after, kept)
        # Parameters must not have moved in between; autograd checks that for what it saved itself.
        ctx.save_for_backward(*weights)
        fresh_out = torch.from_numpy(fresh_after)
        ctx.mark_non_differentiable(fresh_out)
        return torch.from_numpy(y), torch.from_numpy(conv_after), torch.from_numpy(h_after), fresh_out

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dconv_after, dh_after, _):  # type: ignore[no-untyped-def]
        weights = ctx.saved_tensors
        inputs, arrays, constants, _, kept = ctx.arrays
        x, conv, h = inputs[:3]
        dtype = x.dtype
        # One buffer, so that a single call clears the gradients of all parameters.
        flat = np.zeros(sum(a.size for a in arrays), dtype)
        gradients, at = [], 0
        for a in arrays:
            gradients.append(flat[at : at + a.size].reshape(a.shape))
            at += a.size
        dx, dseen = np.empty_like(x), np.zeros_like(kept[0])
        dh = np.zeros_like(h) if dh_after is None else _array(dh_after).copy()
        dy = np.zeros_like(x) if dy is None else _array(dy)
        dconv = np.zeros_like(conv) if dconv_after is None else _array(dconv_after)
        _backward(
            *inputs, arrays, *(dtype.type(c) for c in constants), *kept, dy, dconv, dx, dseen, dh, tuple(gradients)
        )
        result = [torch.from_numpy(gradient) for gradient in gradients]
        assert len(result) == len(weights)
        carried = torch.from_numpy(dseen[:, : conv.shape[1]].copy())
        return torch.from_numpy(dx), carried, torch.from_numpy(dh), None, None, None, None, *result


def _array(x: Tensor) -> Any:
    return x.detach().contiguous().numpy()


def _flags(flag: Tensor | None, x: Tensor, value: bool) -> Any:
    return np.full(x.shape[:2], value) if flag is None else _array(flag)


def _work_size(width: int, inner: int, hidden: int) -> int:
    return 2 + 3 * width + 8 * inner + 2 * hidden


# A row of the workspace: 1/rms twice, n (D), x' (D), m (D), then of width W: y-branch, c, input gate,
# decay gate, a, scale, h before, h; then p and q (2F).


@jit_fast
def _dots(out, weight, x, bias):  # type: ignore[no-untyped-def]
    for i in range(weight.shape[0]):
        total = bias[i]
        for j in range(weight.shape[1]):
            total += weight[i, j] * x[j]
        out[i] = total


@jit_fast
def _dots_back(dout, weight, x, dx, dweight, dbias):  # type: ignore[no-untyped-def]
    for i in range(weight.shape[0]):
        d = dout[i]
        dbias[i] += d
        for j in range(weight.shape[1]):
            dx[j] += d * weight[i, j]
            dweight[i, j] += d * x[j]


@jit_fast
def _heads(out, weight, bias, x):  # type: ignore[no-untyped-def]
    size = weight.shape[1]
    for k in range(weight.shape[0]):
        for j in range(size):
            out[k * size + j] = bias[k, j]
        for i in range(size):
            for j in range(size):
                out[k * size + j] += x[k * size + i] * weight[k, i, j]
    for j in range(out.shape[0]):
        out[j] = 1 / (1 + math.exp(-out[j]))


@jit_fast
def _heads_back(dout, weight, x, dx, dweight, dbias):  # type: ignore[no-untyped-def]
    size = weight.shape[1]
    for k in range(weight.shape[0]):
        for j in range(size):
            dbias[k, j] += dout[k * size + j]
        for i in range(size):
            total = dx[k * size + i]
            for j in range(size):
                total += dout[k * size + j] * weight[k, i, j]
                dweight[k, i, j] += dout[k * size + j] * x[k * size + i]
            dx[k * size + i] = total


@jit_fast
def _gelu(x):  # type: ignore[no-untyped-def]
    return 0.5 * x * (1 + math.tanh(GELU * (x + CUBIC * x * x * x)))


@jit_fast
def _gelu_slope(x):  # type: ignore[no-untyped-def]
    t = math.tanh(GELU * (x + CUBIC * x * x * x))
    return 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * GELU * (1 + 3 * CUBIC * x * x)


@jit_fast
def _norm(out, x, gain, eps):  # type: ignore[no-untyped-def]
    total = x[0] * x[0]
    for j in range(1, x.shape[0]):
        total += x[j] * x[j]
    scale = 1 / math.sqrt(total / x.shape[0] + eps)
    for j in range(x.shape[0]):
        out[j] = x[j] * scale * gain[j]
    return scale


@jit_fast
def _norm_back(dout, x, gain, scale, dx, dgain):  # type: ignore[no-untyped-def]
    along = dout[0] * gain[0] * x[0]
    dgain[0] += dout[0] * x[0] * scale
    for j in range(1, x.shape[0]):
        along += dout[j] * gain[j] * x[j]
        dgain[j] += dout[j] * x[j] * scale
    along *= scale * scale * scale / x.shape[0]
    for j in range(x.shape[0]):
        dx[j] += dout[j] * gain[j] * scale - along * x[j]


@jit_fast
def _forward(x, conv, h0, fresh0, reset, mask, weights, power, bound, eps, y, conv_after, h, fresh, seen, source, work,
             first):  # type: ignore[no-untyped-def]  # fmt: skip
    (g1, wx, bx, wy, by, wc, bc, wi, bi, wa, ba, decay, wo, bo, g2, win, bin_, wout, bout) = weights
    batch, steps, width = x.shape
    reach, inner = conv.shape[1:]
    hidden = wout.shape[1]
    soft = np.empty_like(decay)
    for w in range(inner):
        soft[w] = max(decay[w], 0) + math.log1p(math.exp(-abs(decay[w])))
    inside = np.empty(inner, x.dtype)
    middle = np.empty(hidden, x.dtype)
    ring = np.empty(reach + 1, np.int64)
    for b in range(batch):
        seen[b, :reach] = conv[b]
        for k in range(reach):
            ring[k] = k
        for t in range(steps):
            row = work[b, t]
            n, x1, m = row[2 : 2 + width], row[2 + width : 2 + 2 * width], row[2 + 2 * width : 2 + 3 * width]
            at = 2 + 3 * width
            side, c, ig = row[at : at + inner], row[at + inner : at + 2 * inner], row[at + 2 * inner : at + 3 * inner]
            at += 3 * inner
            dg, a, scale = row[at : at + inner], row[at + inner : at + 2 * inner], row[at + 2 * inner : at + 3 * inner]
            at += 3 * inner
            before, now = row[at : at + inner], row[at + inner : at + 2 * inner]
            pq = row[at + 2 * inner :]
            if reset[b, t]:
                fresh[b] = True
                for w in range(inner):
                    h[b, w] = 0
                for k in range(reach):
                    ring[k] = -1
            x1[:] = x[b, t]
            if mask[b, t]:
                row[0] = _norm(n, x[b, t], g1, eps)
                _dots(seen[b, reach + t], wx, n, bx)
                _dots(side, wy, n, by)
                ring[reach] = reach + t
                for w in range(inner):
                    c[w] = bc[w]
                for k in range(reach + 1):
                    source[b, t, k] = ring[k]
                    if ring[k] >= 0:
                        for w in range(inner):
                            c[w] += wc[k, w] * seen[b, ring[k], w]
                for k in range(reach):
                    ring[k] = ring[k + 1]
                _heads(ig, wi, bi, c)
                _heads(dg, wa, ba, c)
                first[b, t] = fresh[b]
                for w in range(inner):
                    log_a = -power * dg[w] * soft[w]
                    a[w] = math.exp(log_a)
                    scale[w] = 1 if fresh[b] else math.sqrt(1 - math.exp(2 * log_a))
                    before[w] = h[b, w]
                    h[b, w] = a[w] * h[b, w] + c[w] * ig[w] * scale[w]
                    now[w] = h[b, w]
                    inside[w] = now[w] * _gelu(side[w])
                fresh[b] = False
                for i in range(width):
                    total = bo[i]
                    for w in range(inner):
                        total += wo[i, w] * inside[w]
                    x1[i] += total
            row[1] = _norm(m, x1, g2, eps)
            _dots(pq, win, m, bin_)
            for f in range(hidden):
                middle[f] = _gelu(pq[f]) * pq[hidden + f]
            _dots(y[b, t], wout, middle, bout)
            for i in range(width):
                y[b, t, i] += x1[i]
        for k in range(reach):
            source[b, steps, k] = ring[k]
            if ring[k] >= 0:
                conv_after[b, k] = seen[b, ring[k]]
            else:
                conv_after[b, k] = 0


@jit_fast
def _backward(x, conv, h0, fresh0, reset, mask, weights, power, bound, eps, seen, source, work, first, dy, dconv_after,
              dx, dseen, dh, gradients):  # type: ignore[no-untyped-def]  # fmt: skip
    # dh carries the gradient that flows back from step t + 1; dseen that of the inputs of the convolution.
    (g1, wx, bx, wy, by, wc, bc, wi, bi, wa, ba, decay, wo, bo, g2, win, bin_, wout, bout) = weights
    (g_g1, g_wx, g_bx, g_wy, g_by, g_wc, g_bc, g_wi, g_bi, g_wa, g_ba, g_decay, g_wo, g_bo, g_g2, g_win, g_bin, g_wout,
     g_bout) = gradients  # fmt: skip
    batch, steps, width = x.shape
    reach, inner = conv.shape[1:]
    hidden = wout.shape[1]
    soft, slope = np.empty_like(decay), np.empty_like(decay)
    for w in range(inner):
        soft[w] = max(decay[w], 0) + math.log1p(math.exp(-abs(decay[w])))
        slope[w] = 1 / (1 + math.exp(-decay[w]))
    dm, dx1, dn = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(width, x.dtype)
    dmiddle, middle = np.empty(hidden, x.dtype), np.empty(hidden, x.dtype)
    dpq = np.empty(2 * hidden, x.dtype)
    dinside, inside = np.empty(inner, x.dtype), np.empty(inner, x.dtype)
    dside, dc = np.empty(inner, x.dtype), np.empty(inner, x.dtype)
    dig, ddg = np.empty(inner, x.dtype), np.empty(inner, x.dtype)
    for b in range(batch):
        for k in range(reach):
            if source[b, steps, k] >= 0:
                for w in range(inner):
                    dseen[b, source[b, steps, k], w] += dconv_after[b, k, w]
        for t in range(steps - 1, -1, -1):
            row = work[b, t]
            n, x1, m = row[2 : 2 + width], row[2 + width : 2 + 2 * width], row[2 + 2 * width : 2 + 3 * width]
            at = 2 + 3 * width
            side, c, ig = row[at : at + inner], row[at + inner : at + 2 * inner], row[at + 2 * inner : at + 3 * inner]
            at += 3 * inner
            dg, a, scale = row[at : at + inner], row[at + inner : at + 2 * inner], row[at + 2 * inner : at + 3 * inner]
            at += 3 * inner
            before, now = row[at : at + inner], row[at + inner : at + 2 * inner]
            pq = row[at + 2 * inner :]

            for f in range(hidden):
                middle[f] = _gelu(pq[f]) * pq[hidden + f]
                dmiddle[f] = 0
            _dots_back(dy[b, t], wout, middle, dmiddle, g_wout, g_bout)
            for f in range(hidden):
                dpq[f] = dmiddle[f] * pq[hidden + f] * _gelu_slope(pq[f])
                dpq[hidden + f] = dmiddle[f] * _gelu(pq[f])
            for i in range(width):
                dm[i] = 0
                dx1[i] = dy[b, t, i]
            _dots_back(dpq, win, m, dm, g_win, g_bin)
            _norm_back(dm, x1, g2, row[1], dx1, g_g2)
            for i in range(width):
                dx[b, t, i] = dx1[i]

            if mask[b, t]:
                for w in range(inner):
                    inside[w] = now[w] * _gelu(side[w])
                    dinside[w] = 0
                    dc[w] = 0
                _dots_back(dx1, wo, inside, dinside, g_wo, g_bo)
                for w in range(inner):
                    dside[w] = dinside[w] * now[w] * _gelu_slope(side[w])
                    dnow = dh[b, w] + dinside[w] * _gelu(side[w])
                    du = dnow * scale[w]
                    dig[w] = du * c[w] * ig[w] * (1 - ig[w])
                    dc[w] += du * ig[w]
                    dlog = dnow * before[w] * a[w]
                    if not first[b, t]:
                        square = a[w] * a[w]
                        # d sqrt(1 - a^2) with its derivative bounded, and d(1 - a^2) = -2 a^2 d log a
                        root = math.sqrt(max(4 * scale[w] * scale[w], 1 / (bound * bound)))
                        dlog -= dnow * c[w] * ig[w] * 2 * square / root
                    ddg[w] = -power * soft[w] * dlog * dg[w] * (1 - dg[w])
                    g_decay[w] -= power * dg[w] * dlog * slope[w]
                    dh[b, w] = dnow * a[w]
                _heads_back(dig, wi, c, dc, g_wi, g_bi)
                _heads_back(ddg, wa, c, dc, g_wa, g_ba)
                for w in range(inner):
                    g_bc[w] += dc[w]
                for k in range(reach + 1):
                    at = source[b, t, k]
                    if at >= 0:
                        for w in range(inner):
                            g_wc[k, w] += dc[w] * seen[b, at, w]
                            dseen[b, at, w] += dc[w] * wc[k, w]
                for i in range(width):
                    dn[i] = 0
                _dots_back(dseen[b, reach + t], wx, n, dn, g_wx, g_bx)
                _dots_back(dside, wy, n, dn, g_wy, g_by)
                _norm_back(dn, x[b, t], g1, row[0], dx[b, t], g_g1)
            if reset[b, t]:
                for w in range(inner):
                    dh[b, w] = 0
