"""One step of a multi-scale state space in inference: bank, recurrences and sum in one pass over what is carried.

The equations are those of `filter_bank`, `scale_scan` and `selective_scan`; here the discretization is made on the way,
since in plain torch a step would be a few dozen calls, each of which takes longer than all that is computed.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pliant.kernels._few_rows import plain
from pliant.kernels._jit import jit_fast
from pliant.kernels._math import _rise, exp, log1p_unit
from pliant.kernels._scale_scan import _add_scaled, _dot

NEAR = 0.3
"""Up to this size of z, (exp(z) - 1) / z is a series; above, the difference loses no digits that matter."""


class Common(NamedTuple):
    """Parameters of either layer: filters `(S, 2, K, D)`, skip `(M, D)`, and of the weights of the scales a matrix
    `(M, D)`, or `(0, D)` where they do not depend on the input, and a bias `(M,)`."""

    filters: Tensor
    skip: Tensor
    weight: Tensor
    bias: Tensor


class Invariant(NamedTuple):
    """Those of a layer that is not selective: log_rate and read `(M, N, D)`, log_step `(M, D)`."""

    log_rate: Tensor
    log_step: Tensor
    read: Tensor


class Selective(NamedTuple):
    """Those of a selective one: log_rate `(M, N, D)`, step_weight `(M, R, D)` and step_bias `(M, D)`; and select
    `(R + 2 M N, D)`, from which come R numbers for the step sizes, then B `(M, N)` and C `(M, N)`."""

    log_rate: Tensor
    step_weight: Tensor
    step_bias: Tensor
    select: Tensor


class Arrays:
    """Parameters as arrays, looked at anew before each step, so that what is kept only saves time; not copied or saved.

    They hold on to the memory that they show, so that no other tensor can come to lie there.
    """

    def __init__(self) -> None:
        self._places: list[tuple[Any, ...]] = []
        self._arrays: list[np.ndarray] = []

    def __reduce__(self) -> Any:
        return Arrays, ()

    def of(self, tensors: tuple[Tensor, ...]) -> list[np.ndarray] | None:
        """None if one of them is not of float32 on the CPU."""
        places = [(part.data_ptr(), part.shape, part.stride()) for part in tensors]
        if places != self._places:
            if not plain(*tensors):
                return None
            self._places, self._arrays = places, [part.detach().numpy() for part in tensors]
        return self._arrays


def scale_step(
    x: Tensor,
    parameters: tuple[Tensor, ...],
    arrays: Arrays,
    history: Tensor,
    h: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    softmax: bool,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """One step, by one thread; None if somebody asks for gradients, something is not of float32 on the CPU, or what is
    carried has another shape, since nothing looks at that further on.

    Args:
        x: `(B, D)`.
        parameters: those of `Common`, then of `Invariant` or `Selective`.
        arrays: keeps them from step to step.
        history, h: what is carried, `(B, R, D)` and `(B, M, N, D)`.
        reset, mask: `(B,)`, as of a mixer.
        softmax: whether the weights of the scales are normalized.

    Returns:
        z `(B, D)`, history and h after the step.
    """
    (levels, _, taps, _), (batch, width) = parameters[0].shape, x.shape
    reach, states = (taps - 1) * (2**levels - 1), parameters[len(Common._fields)].shape
    if history.shape != (batch, reach, width) or h.shape != (batch, *states):
        return None
    if not plain(x, history, h) or (weights := arrays.of(parameters)) is None:
        return None
    given = [x.numpy(), history.numpy(), h.numpy()]
    flags = [NONE if flag is None else flag.contiguous().numpy() for flag in (reset, mask)]
    found = [np.empty(part.shape, np.float32) for part in given]
    run = _invariant if len(weights) == len(Common._fields) + len(Invariant._fields) else _selective
    run(*found, *flags, softmax, *given, *weights)
    z, after, last = map(torch.from_numpy, found)
    return z, after, last


NONE = np.zeros(0, np.bool_)


@jit_fast
def _split(x, filters, history, after, bands):  # type: ignore[no-untyped-def]
    """Bands `(M, D)` of one stream, and what is carried on."""
    levels, _, taps, _ = filters.shape
    at = 0
    bands[0] = x
    a = bands[0]
    for s in range(levels):
        reach = (taps - 1) << s
        # The low-pass half goes to the last row until the next level has read it.
        low, high = np.zeros_like(x), bands[s + 1]
        high[:] = 0
        for k in range(taps):
            row = history[at + (k << s)] if k < taps - 1 else a
            _add(low, filters[s, 0, k], row)
            _add(high, filters[s, 1, k], row)
        if reach > 0:
            after[at : at + reach - 1] = history[at + 1 : at + reach]
            after[at + reach - 1] = a
        a = low
        at += reach
    if levels > 0:
        bands[levels + 1] = a


@jit_fast
def _add(y, w, x):  # type: ignore[no-untyped-def]
    for d in range(y.shape[0]):
        y[d] += w[d] * x[d]


@jit_fast
def _hold(h, log_rate, length, c, u, y):  # type: ignore[no-untyped-def]
    """One state of each channel: exact for an input that is held over the step."""
    limit = u.dtype.type(NEAR)
    for d in range(y.shape[0]):
        rate = exp(log_rate[d])
        power = -rate * length[d]
        decay = exp(power)
        gain = (decay - u.dtype.type(1)) / -rate
        gain = length[d] * _rise(power) if power > -limit else gain
        now = decay * h[d] + u[d]
        h[d] = now
        y[d] += gain * c[d] * now


@jit_fast
def _euler(h, log_rate, length, b, c, u, y):  # type: ignore[no-untyped-def]
    for d in range(y.shape[0]):
        now = exp(-exp(log_rate[d]) * length[d]) * h[d] + length[d] * b * u[d]
        h[d] = now
        y[d] += c * now


@jit_fast
def _exp(y, x):  # type: ignore[no-untyped-def]
    for d in range(y.shape[0]):
        y[d] = exp(x[d])


@jit_fast
def _softplus(y):  # type: ignore[no-untyped-def]
    for d in range(y.shape[0]):
        x = y[d]
        y[d] = max(x, x - x) + log1p_unit(exp(-abs(x)))


@jit_fast
def _weigh(x, weight, bias, softmax, e):  # type: ignore[no-untyped-def]
    """Weights of the scales."""
    e[:] = bias
    for m in range(weight.shape[0]):
        e[m] += _dot(weight[m], x)
    if softmax:
        highest, total = e.max(), e.dtype.type(0)
        for m in range(e.shape[0]):
            e[m] = exp(e[m] - highest)
            total += e[m]
        for m in range(e.shape[0]):
            e[m] /= total


@jit_fast
def _begin(b, x, filters, history, h, after, last, z, reset, mask, bands):  # type: ignore[no-untyped-def]
    """Carry on what is carried and split the input; whether there is a step."""
    z[b] = 0
    last[b] = h[b]
    after[b] = history[b]
    if reset.shape[0] > 0 and reset[b]:
        last[b] = 0
        after[b] = 0
    if mask.shape[0] > 0 and not mask[b]:
        return False
    _split(x[b], filters, after[b].copy(), after[b], bands)
    return True


@jit_fast
def _invariant(z, after, last, reset, mask, softmax, x, history, h, filters, skip, weight, bias,  # type: ignore[no-untyped-def]
               log_rate, log_step, read):  # fmt: skip
    (scales, size, width), bands = log_rate.shape, np.empty_like(skip)
    length, y, e = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(scales, x.dtype)
    for b in range(x.shape[0]):
        if _begin(b, x, filters, history, h, after, last, z, reset, mask, bands):
            _weigh(x[b], weight, bias, softmax, e)
            for m in range(scales):
                _exp(length, log_step[m])
                y[:] = 0
                _add(y, skip[m], bands[m])
                for n in range(size):
                    _hold(last[b, m, n], log_rate[m, n], length, read[m, n], bands[m], y)
                _add_scaled(z[b], e[m], y)


@jit_fast
def _selective(z, after, last, reset, mask, softmax, x, history, h, filters, skip, weight, bias,  # type: ignore[no-untyped-def]
               log_rate, step_weight, step_bias, select):  # fmt: skip
    (scales, size, width), rank, bands = log_rate.shape, step_weight.shape[1], np.empty_like(skip)
    length, y, e = np.empty(width, x.dtype), np.empty(width, x.dtype), np.empty(scales, x.dtype)
    for b in range(x.shape[0]):
        if _begin(b, x, filters, history, h, after, last, z, reset, mask, bands):
            _weigh(x[b], weight, bias, softmax, e)
            for m in range(scales):
                length[:] = step_bias[m]
                for r in range(rank):
                    _add_scaled(length, _dot(select[r], x[b]), step_weight[m, r])
                _softplus(length)
                y[:] = 0
                _add(y, skip[m], bands[m])
                for n in range(size):
                    at = rank + m * size + n
                    goes_in, comes_out = _dot(select[at], x[b]), _dot(select[at + scales * size], x[b])
                    _euler(last[b, m, n], log_rate[m, n], length, goes_in, comes_out, bands[m], y)
                _add_scaled(z[b], e[m], y)
