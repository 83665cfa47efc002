"""Diagonal linear recurrence.

    h_t = a_t h_{t-1} + u_t,        t = 0 … T-1, element by element, real or complex

Backward, with g_t = dL/dh_t (dL/dh_last added to the last) and * the complex conjugate:

    d_t = g_t + a_{t+1}* d_{t+1},   dL/du_t = d_t,   dL/da_t = d_t h_{t-1}*,   dL/dh_{-1} = a_0* d_0

A reset at t replaces h_{t-1} by zero.
Cost: O(B T D) time; the backward pass keeps a and h.
"""

import numpy as np
import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._jit import jit, over_slices
from pliant.kernels.select import select


def linear_scan(
    a: Shaped[Tensor, "B T D"],
    u: Shaped[Tensor, "B T D"],
    h0: Shaped[Tensor, "B D"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    *,
    form: str | None = None,
) -> tuple[Shaped[Tensor, "B T D"], Shaped[Tensor, "B D"]]:
    """Run h_t = a_t h_{t-1} + u_t along axis 1.

    Args:
        a: decay, `(B, T, D)`, real or complex.
        u: input, `(B, T, D)`.
        h0: state before the first step, `(B, D)`; None means zeros.
        reset: `(B, T)`, true where the state is dropped before the step; None means nowhere.
        form: `"loop"` (readable, any device) or `"numba"` (CPU); None chooses.

    Returns:
        h: `(B, T, D)`, in the dtype of `u`.
        h_last: `(B, D)`, computed and returned in at least float32.

    Raises:
        UsageError: shapes do not fit.
    """
    _check(a, u, h0, reset)
    wide = torch.promote_types(torch.promote_types(a.dtype, u.dtype), torch.float32)
    if h0 is not None:
        wide = torch.promote_types(wide, h0.dtype)
    start = u.new_zeros(u.shape[0], u.shape[2], dtype=wide) if h0 is None else h0.to(wide)
    # One step is plain torch, so that a step can be exported and costs no detour.
    forms = {"loop": scan_loop, "numba": _scan_numba}
    scan = scan_loop if u.shape[1] <= 1 and form is None else select("linear_scan", forms, u, form)
    h, h_last = scan(a.to(wide), u.to(wide), start, reset)
    out = u.dtype if u.is_complex() or not h.is_complex() else wide
    return h.to(out), h_last


def scan_loop(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written above; shapes as in `linear_scan`."""
    h, hs = h0, []
    for t in range(u.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None], 0, h)
        h = a[:, t] * h + u[:, t]
        hs.append(h)
    return (torch.stack(hs, 1) if hs else torch.empty_like(u)), h


def _check(a: Tensor, u: Tensor, h0: Tensor | None, reset: Tensor | None) -> None:
    if u.ndim != 3 or a.shape != u.shape:
        raise UsageError(
            f"linear_scan: a is {tuple(a.shape)} and u is {tuple(u.shape)}; both must be the same (B, T, D)"
        )
    batch, steps, width = u.shape
    if h0 is not None and h0.shape != (batch, width):
        raise UsageError(f"linear_scan: h0 is {tuple(h0.shape)}, expected ({batch}, {width})")
    if reset is not None and reset.shape != (batch, steps):
        raise UsageError(f"linear_scan: reset is {tuple(reset.shape)}, expected ({batch}, {steps})")


# The fast form. Loops run over slices [b0, b1) x [d0, d1), see over_slices.


@jit
def _forward(a, u, h0, reset, h, b0, b1, d0, d1):  # type: ignore[no-untyped-def]
    for b in range(b0, b1):
        for t in range(u.shape[1]):
            if reset[b, t]:
                for d in range(d0, d1):
                    h[b, t, d] = u[b, t, d]
            elif t == 0:
                for d in range(d0, d1):
                    h[b, t, d] = a[b, t, d] * h0[b, d] + u[b, t, d]
            else:
                for d in range(d0, d1):
                    h[b, t, d] = a[b, t, d] * h[b, t - 1, d] + u[b, t, d]


@jit
def _backward(a, h, h0, reset, g, da, du, dh0, b0, b1, d0, d1):  # type: ignore[no-untyped-def]
    # dh0 carries the gradient that flows back from step t + 1.
    for b in range(b0, b1):
        for t in range(a.shape[1] - 1, -1, -1):
            for d in range(d0, d1):
                du[b, t, d] = g[b, t, d] + dh0[b, d]
            if reset[b, t]:
                for d in range(d0, d1):
                    da[b, t, d] = 0
                    dh0[b, d] = 0
            elif t == 0:
                for d in range(d0, d1):
                    da[b, t, d] = du[b, t, d] * np.conj(h0[b, d])
                    dh0[b, d] = du[b, t, d] * np.conj(a[b, t, d])
            else:
                for d in range(d0, d1):
                    da[b, t, d] = du[b, t, d] * np.conj(h[b, t - 1, d])
                    dh0[b, d] = du[b, t, d] * np.conj(a[b, t, d])


def _flags(reset: Tensor | None, batch: int, steps: int) -> np.ndarray:
    if reset is None:
        return np.zeros((batch, steps), dtype=np.bool_)
    return _array(reset)


def _array(x: Tensor) -> np.ndarray:
    return x.detach().resolve_conj().contiguous().numpy()


@torch.library.custom_op("pliant::linear_scan", mutates_args=(), device_types="cpu")
def _scan(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    batch, steps, width = u.shape
    h = torch.empty_like(u, memory_format=torch.contiguous_format)
    arrays = [_array(a), _array(u), _array(h0), _flags(reset, batch, steps), h.numpy()]
    over_slices(lambda *part: _forward(*arrays, *part), batch, width, steps)
    return h, h[:, -1].clone() if steps else h0.clone()


@torch.library.custom_op("pliant::linear_scan_backward", mutates_args=(), device_types="cpu")
def _scan_backward(
    a: Tensor, h: Tensor, h0: Tensor, reset: Tensor | None, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    batch, steps, width = a.shape
    da, du = torch.empty_like(h), torch.empty_like(h)
    dh0 = grad_last.resolve_conj().clone(memory_format=torch.contiguous_format)
    arrays = [_array(a), _array(h), _array(h0), _flags(reset, batch, steps), _array(grad_h)]
    arrays += [da.numpy(), du.numpy(), dh0.numpy()]
    over_slices(lambda *part: _backward(*arrays, *part), batch, width, steps)
    return da, du, dh0


@_scan.register_fake
def _(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u, memory_format=torch.contiguous_format), torch.empty_like(
        h0, memory_format=torch.contiguous_format
    )


@_scan_backward.register_fake
def _(
    a: Tensor, h: Tensor, h0: Tensor, reset: Tensor | None, grad_h: Tensor, grad_last: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.empty_like(h),
        torch.empty_like(h),
        torch.empty_like(grad_last, memory_format=torch.contiguous_format),
    )


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    a, _, h0, reset = inputs
    ctx.save_for_backward(a, output[0], h0, reset)


def _gradients(ctx, grad_h: Tensor | None, grad_last: Tensor | None):  # type: ignore[no-untyped-def]
    a, h, h0, reset = ctx.saved_tensors
    grad_h = torch.zeros_like(h) if grad_h is None else grad_h
    grad_last = torch.zeros_like(h0) if grad_last is None else grad_last
    return *_scan_backward(a, h, h0, reset, grad_h, grad_last), None


_scan.register_autograd(_gradients, setup_context=_keep)


def _scan_numba(a: Tensor, u: Tensor, h0: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    return _scan(a, u, h0, reset)
