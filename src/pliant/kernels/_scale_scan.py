"""Diagonal state spaces side by side, one for each time scale of a channel, that do not depend on the data.

    h_t[m, n] = a[m, n] h_{t-1}[m, n] + u_t[m]
    y_t[m]    = Re(sum_n c[m, n] h_t[m, n]) + skip[m] u_t[m],    z_t = sum_m e_t[m] y_t[m]

for scales m and states n, channel by channel; real or complex. Backward, with g_t = dL/dz_t and λ_t = dL/dh_t:

    λ_t = e_t g_t c + a λ_{t+1},   du_t = sum_n λ_t + skip e_t g_t,   da += λ_t h_{t-1},   dc += e_t g_t h_t

Papers: Karami et al. 2025, MS-SSM, arXiv:2512.23824; Gu et al. 2022, S4D, arXiv:2206.11893; ms-ssm.md 2.1 and 2.6.
Cost: O(B T M N D) time. The fast form keeps the state of every CHUNK-th step and runs the steps between again on the
way back. By FFT: O(B T log T M D + T M N D), whatever N.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._autocast import own_precision
from pliant.kernels._jit import jit_fast, over_jobs
from pliant.kernels._linear_scan import linear_scan
from pliant.kernels._operator import operator
from pliant.kernels._selective_scan import selective_scan
from pliant.kernels.select import select

Form = Callable[..., tuple[Tensor, Tensor]]

CHUNK = 16
"""Steps between two states that are kept."""
BLOCK = 128
"""Channels that one call works on: all it needs of a chunk with M N = 20 is in the second cache."""


@own_precision
def scale_scan(
    u: Float[Tensor, "M B T D"],
    decay: Shaped[Tensor, "M N D"],
    read: Shaped[Tensor, "M N D"],
    skip: Float[Tensor, "M D"] | None = None,
    scales: Float[Tensor, "B T M"] | None = None,
    h0: Shaped[Tensor, "B M N D"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    *,
    form: str | None = None,
) -> tuple[Float[Tensor, "B T D"], Shaped[Tensor, "B M N D"]]:
    """Run the recurrences along axis 2 of u and sum their outputs over the scales.

    Args:
        u: input of each scale, `(M, B, T, D)`.
        decay: a, `(M, N, D)`, real or complex.
        read: c, `(M, N, D)`, like `decay`.
        skip: weight of the input in the output, `(M, D)`; None means 0.
        scales: weight e of each scale at each step, `(B, T, M)`; None means 1.
        h0: state before the first step, `(B, M, N, D)`, like `decay`; None means zeros.
        reset: `(B, T)`, true where the state is dropped before the step, on masked steps too.
        mask: `(B, T)`, false where the step does not exist: the state passes, z is 0, nothing else is read.
        form: `"loop"` (readable, any device), `"scan"` (all states at once, any device), `"fft"` (any device; without
            flags; rounding and what is not finite spread over the whole sequence) or `"numba"` (CPU, real); None
            chooses, and never the convolution.

    Returns:
        z: `(B, T, D)`, in the dtype of `u`.
        h_last: `(B, M, N, D)`, computed and returned in at least float32.

    Raises:
        UsageError: shapes do not fit, or the form takes no flags or no complex numbers.
    """
    _check(u, decay, read, skip, scales, h0, reset, mask)
    wide = torch.float32
    for x in (u, decay.real, read.real, skip, scales):
        wide = wide if x is None else torch.promote_types(wide, x.dtype)
    inner = torch.promote_types(wide, decay.dtype)
    batch, (groups, _, width) = u.shape[1], decay.shape
    through = decay.real.new_zeros(groups, width, dtype=wide) if skip is None else skip.to(wide)
    start = decay.new_zeros(batch, *decay.shape, dtype=inner) if h0 is None else h0.to(inner)
    if form == "fft" and not u.numel():
        form = "loop"
    if form is None:
        # One step is plain torch, so that a step can be exported and costs no detour.
        form = "loop" if u.shape[2] <= 1 else "scan" if inner.is_complex or u.device.type != "cpu" else "numba"
    forms: dict[str, Form] = {"loop": scan_loop, "scan": _scan_all, "fft": _convolve, "numba": _scan_numba}
    scan = select("scale_scan", forms, u, form)
    weights = None if scales is None else scales.to(wide)
    z, last = scan(u.to(wide), decay.to(inner), read.to(inner), through, weights, start, reset, mask)
    return z.to(u.dtype), last


def scan_loop(
    u: Tensor, decay: Tensor, read: Tensor, skip: Tensor, scales: Tensor | None, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence as it is written above; shapes as in `scale_scan`."""
    h, zs = h0, []
    for t in range(u.shape[2]):
        x, weights, there = u[:, :, t].transpose(0, 1), None if scales is None else scales[:, t, :, None], None
        if reset is not None:
            h = torch.where(reset[:, t, None, None, None], 0, h)
        if mask is not None:
            there = mask[:, t, None, None]
            x = torch.where(there, x, 0)
            weights = None if weights is None else torch.where(there, weights, 0)
        now = decay * h + x[:, :, None]
        y = (read * now).sum(2).real + skip * x
        z = (y if weights is None else weights * y).sum(1)
        zs.append(z if there is None else torch.where(there[:, 0], z, 0))
        h = now if there is None else torch.where(there[..., None], now, h)
    return (torch.stack(zs, 1) if zs else u.new_zeros(u.shape[1:])), h


def _scan_all(
    u: Tensor, decay: Tensor, read: Tensor, skip: Tensor, scales: Tensor | None, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One scan over all states, which are all there at once."""
    x = u.movedim(0, 2)  # (B, T, M, D)
    if mask is not None:
        x = torch.where(mask[..., None, None], x, 0)
        scales = None if scales is None else torch.where(mask[..., None], scales, 0)
    shape = (*x.shape[:2], *decay.shape)
    a = decay if mask is None else torch.where(mask[..., None, None, None], decay, 1)
    a, v = a.expand(shape), x[:, :, :, None].to(decay.dtype).expand(shape)
    h, last = linear_scan(a.flatten(2), v.flatten(2), h0.flatten(1), reset)
    y = (read * h.reshape(shape)).sum(3).real + skip * x
    z = (y if scales is None else scales[..., None] * y).sum(2)
    return (z if mask is None else torch.where(mask[..., None], z, 0)), last.reshape(h0.shape)


def _convolve(
    u: Tensor, decay: Tensor, read: Tensor, skip: Tensor, scales: Tensor | None, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Convolve with sum_n c a^t over twice the length, so that nothing comes round to the beginning."""
    if reset is not None or mask is not None:
        raise UsageError("scale_scan: the form 'fft' takes neither reset nor mask; leave them out or the form to us")
    steps = u.shape[2]
    if not steps:
        return u.new_zeros(u.shape[1:]), h0
    powers = decay[..., None] ** torch.arange(steps + 1, device=u.device)  # (M, N, D, T + 1)
    kernel = torch.einsum("mnd,mndt->mtd", read, powers[..., :-1]).real
    spectrum = torch.fft.rfft(kernel, 2 * steps, 1)[:, None] * torch.fft.rfft(u, 2 * steps, 2)
    y = torch.fft.irfft(spectrum, 2 * steps, 2)[:, :, :steps] + skip[:, None, None] * u
    y = y + torch.einsum("mnd,mndt,bmnd->mbtd", read, powers[..., 1:], h0).real
    last = powers[..., -1] * h0 + torch.einsum("mbtd,mndt->bmnd", u.to(decay.dtype), powers[..., :-1].flip(-1))
    return (y.sum(0) if scales is None else torch.einsum("mbtd,btm->btd", y, scales)), last


@own_precision
def selective_scales(
    u: Float[Tensor, "M B T D"],
    dt: Float[Tensor, "M B T D"],
    A: Shaped[Tensor, "M N D"],
    B: Float[Tensor, "B T M N"],
    C: Shaped[Tensor, "B T M N"],
    skip: Float[Tensor, "M D"],
    h0: Shaped[Tensor, "B M N D"],
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
) -> tuple[Float[Tensor, "M B T D"], Shaped[Tensor, "B M N D"]]:
    """A selective scan for each scale, whose A may be complex: y `(M, B, T, D)` and the last state; `selective_scan`.

    Outputs of masked steps are zero if `u` is zero there.
    """
    real = torch.promote_types(torch.promote_types(u.dtype, dt.dtype), torch.float32)
    if u.shape[2] > 1 and not A.is_complex():
        found = [selective_scan(u[m].to(real), dt[m].to(real), A[m].mT, B[:, :, m].to(real), C[:, :, m].to(real),
                                skip[m].to(real), h0[:, m].mT, reset, mask) for m in range(len(u))]  # fmt: skip
        y = torch.stack([y for y, _ in found])
        return y.to(u.dtype), torch.stack([last.mT for _, last in found], 1)
    x, dt = (torch.stack(part.to(real).unbind(), 2) for part in (u, dt))  # (B, T, M, D)
    if mask is not None:
        dt = torch.where(mask[..., None, None], dt, 0)
    a = torch.exp(dt[:, :, :, None] * A)
    v = (dt * x)[:, :, :, None] * B[..., None].to(a.dtype)
    h, last = linear_scan(a.flatten(2), v.flatten(2), h0.flatten(1), reset)
    y = (C[..., None].to(a.dtype) * h.reshape(a.shape)).sum(3).real + skip.to(real) * x
    return y.movedim(2, 0).to(u.dtype), last.reshape(h0.shape)


def _check(
    u: Tensor, decay: Tensor, read: Tensor, skip: Tensor | None, scales: Tensor | None, h0: Tensor | None,
    reset: Tensor | None, mask: Tensor | None,
) -> None:  # fmt: skip
    if u.ndim != 4 or decay.ndim != 3:
        raise UsageError(
            f"scale_scan: u is {tuple(u.shape)} and decay {tuple(decay.shape)}; expected (M, B, T, D) and (M, N, D)"
        )
    (groups, batch, steps, width), size = u.shape, decay.shape[1]
    expected = {
        "decay": (decay, (groups, size, width)),
        "read": (read, (groups, size, width)),
        "skip": (skip, (groups, width)),
        "scales": (scales, (batch, steps, groups)),
        "h0": (h0, (batch, groups, size, width)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise UsageError(f"scale_scan: {name} is {tuple(x.shape)}, expected {shape}")
    for name, flag in (("reset", reset), ("mask", mask)):
        if flag is not None and (flag.shape != (batch, steps) or flag.dtype != torch.bool):
            raise UsageError(
                f"scale_scan: {name} is {flag.dtype} {tuple(flag.shape)}, expected torch.bool {(batch, steps)}"
            )


# The fast form. A job is one stream and one block of channels. Flags and scales are empty where there are none.


@jit_fast
def _advance(h, after, a, x):  # type: ignore[no-untyped-def]
    for d in range(x.shape[0]):
        after[d] = a[d] * h[d] + x[d]


@jit_fast
def _advance_and_read(h, a, x, c, y):  # type: ignore[no-untyped-def]
    for d in range(x.shape[0]):
        now = a[d] * h[d] + x[d]
        h[d] = now
        y[d] += c[d] * now


@jit_fast
def _product(y, a, x):  # type: ignore[no-untyped-def]
    for d in range(x.shape[0]):
        y[d] = a[d] * x[d]


@jit_fast
def _scaled(y, e, x):  # type: ignore[no-untyped-def]
    for d in range(x.shape[0]):
        y[d] = e * x[d]


@jit_fast
def _add_scaled(y, e, x):  # type: ignore[no-untyped-def]
    for d in range(x.shape[0]):
        y[d] += e * x[d]


@jit_fast
def _add_product(y, a, x):  # type: ignore[no-untyped-def]
    for d in range(x.shape[0]):
        y[d] += a[d] * x[d]


@jit_fast
def _dot(a, x):  # type: ignore[no-untyped-def]
    total = x.dtype.type(0)
    for d in range(x.shape[0]):
        total += a[d] * x[d]
    return total


@jit_fast
def _go_back(dh, dy, now, before, a, c, y, dx, da, dc):  # type: ignore[no-untyped-def]
    """One state of each channel, one step back; y is what this state gave to the output."""
    for d in range(dy.shape[0]):
        e = dh[d] + c[d] * dy[d]
        dc[d] += dy[d] * now[d]
        y[d] += c[d] * now[d]
        dx[d] += e
        da[d] += e * before[d]
        dh[d] = e * a[d]


@jit_fast
def _forward(u, decay, read, skip, scales, reset, mask, h, marks, z, i0, i1):  # type: ignore[no-untyped-def]
    (groups, _, steps, width), size = u.shape, decay.shape[1]
    blocks, sums = -(-width // BLOCK), np.empty(BLOCK, u.dtype)
    for i in range(i0, i1):
        b, d0 = i // blocks, (i % blocks) * BLOCK
        d1 = min(width, d0 + BLOCK)
        y = sums[: d1 - d0]
        for t in range(steps):
            if marks.shape[1] > 0 and t % CHUNK == 0:
                marks[b, t // CHUNK, :, :, d0:d1] = h[b, :, :, d0:d1]
            if reset.shape[0] > 0 and reset[b, t]:
                h[b, :, :, d0:d1] = 0
            out = z[b, t, d0:d1]
            out[:] = 0
            if mask.shape[0] > 0 and not mask[b, t]:
                continue
            for m in range(groups):
                x = u[m, b, t, d0:d1]
                _product(y, skip[m, d0:d1], x)
                for n in range(size):
                    _advance_and_read(h[b, m, n, d0:d1], decay[m, n, d0:d1], x, read[m, n, d0:d1], y)
                _add_scaled(out, scales[b, t, m] if scales.shape[0] > 0 else x.dtype.type(1), y)


@jit_fast
def _run_again(u, decay, reset, mask, b, t0, t1, d0, d1, none, h):  # type: ignore[no-untyped-def]
    """States after each step of [t0, t1) in h[1:]; h[0] is the state before them."""
    width = d1 - d0
    for t in range(t0, t1):
        j = t - t0
        before = none if reset.shape[0] > 0 and reset[b, t] else h[j]
        if mask.shape[0] > 0 and not mask[b, t]:
            h[j + 1, :, :, :width] = before[:, :, :width]
            continue
        for m in range(decay.shape[0]):
            x = u[m, b, t, d0:d1]
            for n in range(decay.shape[1]):
                _advance(before[m, n, :width], h[j + 1, m, n, :width], decay[m, n, d0:d1], x)


@jit_fast
def _backward(u, decay, read, skip, scales, reset, mask, marks, dz, dh, du, ddecay, dread, dskip, dscales, i0, i1):  # type: ignore[no-untyped-def]
    # dh carries the gradient that flows back from step t + 1. Gradients of weights have one part for each stream, those
    # of scales one for each block, so that jobs share nothing and the order of sums does not depend on the threads.
    (groups, _, steps, width), size = u.shape, decay.shape[1]
    blocks, rows = -(-width // BLOCK), np.empty((2, BLOCK), u.dtype)
    h, none = np.empty((CHUNK + 1, groups, size, BLOCK), u.dtype), np.zeros((groups, size, BLOCK), u.dtype)
    for i in range(i0, i1):
        b, k = i // blocks, i % blocks
        d0 = k * BLOCK
        d1 = min(width, d0 + BLOCK)
        w = d1 - d0
        y, dy = rows[0, :w], rows[1, :w]
        for chunk in range(marks.shape[1] - 1, -1, -1):
            t0 = chunk * CHUNK
            t1 = min(steps, t0 + CHUNK)
            h[0, :, :, :w] = marks[b, chunk, :, :, d0:d1]
            _run_again(u, decay, reset, mask, b, t0, t1, d0, d1, none, h)
            for t in range(t1 - 1, t0 - 1, -1):
                j = t - t0
                before = none if reset.shape[0] > 0 and reset[b, t] else h[j]
                if mask.shape[0] > 0 and not mask[b, t]:
                    du[:, b, t, d0:d1] = 0
                    if scales.shape[0] > 0:
                        dscales[k, b, t] = 0
                else:
                    g = dz[b, t, d0:d1]
                    for m in range(groups):
                        x, dx = u[m, b, t, d0:d1], du[m, b, t, d0:d1]
                        _scaled(dy, scales[b, t, m] if scales.shape[0] > 0 else x.dtype.type(1), g)
                        _product(y, skip[m, d0:d1], x)
                        _product(dx, skip[m, d0:d1], dy)
                        _add_product(dskip[b, m, d0:d1], dy, x)
                        for n in range(size):
                            a, c = decay[m, n, d0:d1], read[m, n, d0:d1]
                            da, dc = ddecay[b, m, n, d0:d1], dread[b, m, n, d0:d1]
                            now, last = h[j + 1, m, n, :w], before[m, n, :w]
                            _go_back(dh[b, m, n, d0:d1], dy, now, last, a, c, y, dx, da, dc)
                        if scales.shape[0] > 0:
                            dscales[k, b, t, m] = _dot(g, y)
                if reset.shape[0] > 0 and reset[b, t]:
                    dh[b, :, :, d0:d1] = 0


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


def _flags(flags: Tensor | None) -> np.ndarray:
    return np.zeros((0, 0), dtype=np.bool_) if flags is None else _array(flags)


def _weights(scales: Tensor | None, u: Tensor) -> np.ndarray:
    return _array(u.new_zeros(0, 0, 0) if scales is None else scales)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _jobs(u: Tensor, decay: Tensor) -> tuple[int, int]:
    """Number of jobs, and the elements of all of them."""
    return u.shape[1] * -(-u.shape[3] // BLOCK), u.numel() * decay.shape[1]


def _scan_numba(
    u: Tensor, decay: Tensor, read: Tensor, skip: Tensor, scales: Tensor | None, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    if decay.is_complex() or read.is_complex():
        raise UsageError("scale_scan: the form 'numba' takes real numbers; leave the form to us")
    inputs = (u, decay, read, skip, scales, h0)
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    z, last, _ = _scan(*inputs, reset, mask, keep)
    return z, last


@operator("pliant::scale_scan")
def _scan(
    u: Tensor, decay: Tensor, read: Tensor, skip: Tensor, scales: Tensor | None, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    z, marks = torch.empty(u.shape[1:], dtype=u.dtype), _marks(u, decay, keep)
    h = h0.detach().clone(memory_format=torch.contiguous_format)
    inputs = [_array(u), _array(decay), _array(read), _array(skip), _weights(scales, u), _flags(reset), _flags(mask)]
    kept = _by_chunk(marks, u, decay) if keep else np.empty((0, 0, 0, 0, 0), h.numpy().dtype)
    outputs = [h.numpy(), kept, z.numpy()]
    over_jobs(lambda *part: _forward(*inputs, *outputs, *part), *_jobs(u, decay))
    return z, h, marks


def _marks(u: Tensor, decay: Tensor, keep: bool) -> Tensor:
    """Room for the state before each chunk, in one row; none where nothing is to be kept."""
    chunks = (u.shape[2] + CHUNK - 1) // CHUNK if keep else 0
    groups, size, width = decay.shape
    return torch.empty(u.shape[1] * chunks * groups * size * width, dtype=u.dtype, device=u.device)


def _by_chunk(marks: Tensor, u: Tensor, decay: Tensor) -> np.ndarray:
    """The same as `(B, T / CHUNK, M, N, D)`; N may be 0."""
    return marks.view(u.shape[1], -(-u.shape[2] // CHUNK), *decay.shape).numpy()


@operator("pliant::scale_scan_backward")
def _scan_backward(
    u: Tensor, decay: Tensor, read: Tensor, skip: Tensor, scales: Tensor | None, reset: Tensor | None,
    mask: Tensor | None, marks: Tensor, grad_z: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    _, batch, steps, width = u.shape
    du, dh = _like(u), grad_last.detach().clone(memory_format=torch.contiguous_format)
    ddecay, dread, dskip = (u.new_zeros(batch, *x.shape) for x in (decay, read, skip))
    dscales = u.new_empty(-(-width // BLOCK) if scales is not None else 0, batch, steps, u.shape[0])
    inputs = [_array(u), _array(decay), _array(read), _array(skip), _weights(scales, u), _flags(reset), _flags(mask)]
    inputs += [_by_chunk(marks, u, decay), _array(grad_z)]
    outputs = [x.numpy() for x in (dh, du, ddecay, dread, dskip, dscales)]
    over_jobs(lambda *part: _backward(*inputs, *outputs, *part), *_jobs(u, decay))
    return du, ddecay.sum(0), dread.sum(0), dskip.sum(0), dscales.sum(0), dh


@_scan.register_fake
def _(
    u: Tensor, decay: Tensor, read: Tensor, skip: Tensor, scales: Tensor | None, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return u.new_empty(u.shape[1:]), _like(h0), _marks(u, decay, keep)


@_scan_backward.register_fake
def _(
    u: Tensor, decay: Tensor, read: Tensor, skip: Tensor, scales: Tensor | None, reset: Tensor | None,
    mask: Tensor | None, marks: Tensor, grad_z: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dscales = u.new_empty(u.shape[1], u.shape[2], u.shape[0])
    return _like(u), _like(decay), _like(read), _like(skip), dscales, _like(grad_last)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    u, decay, read, skip, scales, h0, reset, mask, _ = inputs
    ctx.save_for_backward(u, decay, read, skip, scales, reset, mask, output[2])
    ctx.shape = h0.shape
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_z: Tensor | None, grad_last: Tensor | None, _):  # type: ignore[no-untyped-def]
    u, scales = ctx.saved_tensors[0], ctx.saved_tensors[4]
    grad_z = u.new_zeros(u.shape[1:]) if grad_z is None else grad_z
    grad_last = u.new_zeros(ctx.shape) if grad_last is None else grad_last
    *found, dscales, dh = _scan_backward(*ctx.saved_tensors, grad_z, grad_last)
    return *found, None if scales is None else dscales, dh, None, None, None


_scan.register_autograd(_gradients, setup_context=_keep)
