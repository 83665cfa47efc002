"""Selective scan: a diagonal linear recurrence of N states per channel, whose step size, input and output
weights come from the data.

    h_t[m, n] = exp(dt_t[m] A[m, n]) h_{t-1}[m, n] + dt_t[m] u_t[m] B_t[n]
    y_t[m]    = sum_n C_t[n] h_t[m, n] + D[m] u_t[m]

The input side is the Euler step dt B, not the exact (exp(dt A) - 1) / A B. Backward, with e_t = dL/dh_t:

    e_t = C_t dy_t + exp(dt_{t+1} A) e_{t+1},   d(dt A)_t = e_t h_{t-1} exp(dt_t A),   d(dt u)_t = sum_n e_t B_t

Paper: Gu and Dao 2023, Mamba, arXiv:2312.00752, algorithm 2; further-mixers.md 2.1.
Cost: O(B T M N) time. The fast form keeps the state of every CHUNK-th step and runs the steps between again on
the way back, so it needs (B, T / CHUNK, M, N) memory where the readable form needs (B, T, M, N) several times.
"""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._autocast import own_precision
from pliant.kernels._jit import jit_fast, over_jobs
from pliant.kernels._math import exp
from pliant.kernels._operator import operator
from pliant.kernels.select import select

Form = Callable[..., tuple[Tensor, Tensor]]

CHUNK = 32
"""Steps between two states that are kept."""
BLOCK = 128
"""Channels that one call works on: all it needs of a chunk with N = 16 is in the second cache."""


@own_precision
def selective_scan(
    u: Float[Tensor, "B T M"],
    dt: Float[Tensor, "B T M"],
    A: Float[Tensor, "M N"],
    B: Float[Tensor, "B T N"],
    C: Float[Tensor, "B T N"],
    D: Float[Tensor, "M"] | None = None,
    h0: Float[Tensor, "B M N"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    *,
    form: str | None = None,
) -> tuple[Float[Tensor, "B T M"], Float[Tensor, "B M N"]]:
    """Run the recurrence along axis 1.

    Args:
        u: input, `(B, T, M)`.
        dt: step size, `(B, T, M)`, positive.
        A: `(M, N)`, negative where the state is to decay.
        B, C: what goes in and what comes out, `(B, T, N)`.
        D: weight of the input in the output, `(M,)`; None means 0.
        h0: state before the first step, `(B, M, N)`; None means zeros.
        reset: `(B, T)`, true where the state is dropped before the step, on masked steps too.
        mask: `(B, T)`, false where the step does not exist: the state passes, y is 0, nothing else is read.
        form: `"loop"` (readable, any device), `"numba"` (CPU) or `"triton"` (CUDA); None chooses.

    Returns:
        y: `(B, T, M)`, in the dtype of `u`.
        h_last: `(B, M, N)`, computed and returned in at least float32.

    Raises:
        UsageError: shapes do not fit.
    """
    _check(u, dt, A, B, C, D, h0, reset, mask)
    wide = torch.float32
    for x in (u, dt, A, B, C, D, h0):
        wide = wide if x is None else torch.promote_types(wide, x.dtype)
    batch, _, channels = u.shape
    through = u.new_zeros(channels, dtype=wide) if D is None else D.to(wide)
    start = u.new_zeros(batch, *A.shape, dtype=wide) if h0 is None else h0.to(wide)
    # One step is plain torch, so that a step can be exported and costs no detour.
    forms: dict[str, Form] = {"loop": scan_loop, "numba": _scan_numba, "triton": _scan_triton}
    scan: Form = scan_loop if u.shape[1] <= 1 and form is None else select("selective_scan", forms, u, form)
    inputs = [u, dt, A.to(wide), B, C]
    if scan is not _scan_triton:  # which widens what it has read
        inputs = [x.to(wide) for x in inputs]
    y, h_last = scan(*inputs, through, start, reset, mask)
    return y.to(u.dtype), h_last


def scan_loop(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The recurrence as it is written above; shapes as in `selective_scan`."""
    if mask is not None:
        # With dt = 0 a step changes nothing, and what stands there reaches no gradient.
        u, dt, B, C = (torch.where(mask[..., None], x, 0) for x in (u, dt, B, C))
    h, ys = h0, []
    for t in range(u.shape[1]):
        if reset is not None:
            h = torch.where(reset[:, t, None, None], 0, h)
        x = dt[:, t] * u[:, t]
        h = torch.exp(dt[:, t, :, None] * A) * h + x[..., None] * B[:, t, None, :]
        ys.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    y = torch.stack(ys, 1) if ys else torch.empty_like(u)
    return (y if mask is None else torch.where(mask[..., None], y, 0)), h


def _check(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None,
    reset: Tensor | None, mask: Tensor | None,
) -> None:  # fmt: skip
    if u.ndim != 3 or A.ndim != 2 or dt.shape != u.shape:
        raise UsageError(
            f"selective_scan: u is {tuple(u.shape)}, dt {tuple(dt.shape)} and A {tuple(A.shape)}; "
            "expected (B, T, M) twice and (M, N)"
        )
    (batch, steps, channels), size = u.shape, A.shape[1]
    expected = {
        "A": (A, (channels, size)),
        "B": (B, (batch, steps, size)),
        "C": (C, (batch, steps, size)),
        "D": (D, (channels,)),
        "h0": (h0, (batch, channels, size)),
    }
    for name, (x, shape) in expected.items():
        if x is not None and x.shape != shape:
            raise UsageError(f"selective_scan: {name} is {tuple(x.shape)}, expected {shape}")
    for name, flag in (("reset", reset), ("mask", mask)):
        if flag is not None and (flag.shape != (batch, steps) or flag.dtype != torch.bool):
            raise UsageError(
                f"selective_scan: {name} is {flag.dtype} {tuple(flag.shape)}, expected torch.bool {(batch, steps)}"
            )


# The fast form. A job is one stream and one block of channels; states lie as (N, M), so that loops on vectors run
# over channels and no sum runs across a vector. Flags are empty where there are none.


@jit_fast
def _advance(h, after, a, dt, x, rate, b):  # type: ignore[no-untyped-def]
    for m in range(dt.shape[0]):
        decay = exp(dt[m] * rate[m])
        a[m] = decay
        after[m] = decay * h[m] + x[m] * b


@jit_fast
def _advance_and_read(h, dt, x, rate, b, c, y):  # type: ignore[no-untyped-def]
    for m in range(dt.shape[0]):
        now = exp(dt[m] * rate[m]) * h[m] + x[m] * b
        h[m] = now
        y[m] += c * now


@jit_fast
def _go_back(dh, dy, before, now, a, rate, dt, x, dx, ddt, drate, b, c):  # type: ignore[no-untyped-def]
    """One state of each channel, one step back; returns the gradients of b and c."""
    db = b - b
    dc = c - c
    for m in range(dt.shape[0]):
        e = dh[m] + c * dy[m]
        db += e * x[m]
        dc += dy[m] * now[m]
        dx[m] += e * b
        dh[m] = e * a[m]
        power = dh[m] * before[m]
        ddt[m] += power * rate[m]
        drate[m] += power * dt[m]
    return db, dc


@jit_fast
def _forward(u, dt, A, B, C, D, reset, mask, h, marks, y, i0, i1):  # type: ignore[no-untyped-def]
    _, steps, channels = u.shape
    size, blocks = A.shape[0], -(-channels // BLOCK)
    products = np.empty(BLOCK, u.dtype)
    for i in range(i0, i1):
        b, m0 = i // blocks, (i % blocks) * BLOCK
        m1 = min(channels, m0 + BLOCK)
        x = products[: m1 - m0]
        for t in range(steps):
            if marks.shape[1] > 0 and t % CHUNK == 0:
                marks[b, t // CHUNK, :, m0:m1] = h[b, :, m0:m1]
            if reset.shape[0] > 0 and reset[b, t]:
                h[b, :, m0:m1] = 0
            out = y[b, t, m0:m1]
            if mask.shape[0] > 0 and not mask[b, t]:
                out[:] = 0
                continue
            given, length, through = u[b, t, m0:m1], dt[b, t, m0:m1], D[m0:m1]
            for m in range(m1 - m0):
                x[m] = length[m] * given[m]
                out[m] = through[m] * given[m]
            for n in range(size):
                _advance_and_read(h[b, n, m0:m1], length, x, A[n, m0:m1], B[b, t, n], C[b, t, n], out)


@jit_fast
def _run_again(u, dt, A, B, reset, mask, b, t0, t1, m0, m1, none, h, a, x):  # type: ignore[no-untyped-def]
    """States after each step of [t0, t1) in h[1:], decays and inputs; h[0] is the state before them."""
    width = m1 - m0
    for t in range(t0, t1):
        j = t - t0
        before = none if reset.shape[0] > 0 and reset[b, t] else h[j]
        if mask.shape[0] > 0 and not mask[b, t]:
            h[j + 1, :, :width] = before[:, :width]
            continue
        given, length, product = u[b, t, m0:m1], dt[b, t, m0:m1], x[j, :width]
        for m in range(width):
            product[m] = length[m] * given[m]
        for n in range(A.shape[0]):
            _advance(before[n, :width], h[j + 1, n, :width], a[j, n, :width], length, product, A[n, m0:m1], B[b, t, n])


@jit_fast
def _backward(u, dt, A, B, C, D, reset, mask, marks, dy, dh, du, ddt, dA, dB, dC, dD, i0, i1):  # type: ignore[no-untyped-def]
    # dh carries the gradient that flows back from step t + 1. dA and dD have one part for each stream, dB and dC
    # one for each block, so that jobs share nothing and the order of sums does not depend on the threads.
    _, steps, channels = u.shape
    size, blocks = A.shape[0], -(-channels // BLOCK)
    h, a = np.empty((CHUNK + 1, size, BLOCK), u.dtype), np.empty((CHUNK, size, BLOCK), u.dtype)
    x, sums = np.empty((CHUNK, BLOCK), u.dtype), np.empty((2, BLOCK), u.dtype)
    none = np.zeros((size, BLOCK), u.dtype)
    for i in range(i0, i1):
        b, k = i // blocks, i % blocks
        m0 = k * BLOCK
        m1 = min(channels, m0 + BLOCK)
        width = m1 - m0
        dx, dlength = sums[0, :width], sums[1, :width]
        for chunk in range(marks.shape[1] - 1, -1, -1):
            t0 = chunk * CHUNK
            t1 = min(steps, t0 + CHUNK)
            h[0, :, :width] = marks[b, chunk, :, m0:m1]
            _run_again(u, dt, A, B, reset, mask, b, t0, t1, m0, m1, none, h, a, x)
            for t in range(t1 - 1, t0 - 1, -1):
                j = t - t0
                du_t, ddt_t = du[b, t, m0:m1], ddt[b, t, m0:m1]
                if mask.shape[0] > 0 and not mask[b, t]:
                    du_t[:] = 0
                    ddt_t[:] = 0
                    dB[k, b, t] = 0
                    dC[k, b, t] = 0
                else:
                    given, length, wanted = u[b, t, m0:m1], dt[b, t, m0:m1], dy[b, t, m0:m1]
                    before = none if reset.shape[0] > 0 and reset[b, t] else h[j]
                    dx[:] = 0
                    dlength[:] = 0
                    for n in range(size):
                        dB[k, b, t, n], dC[k, b, t, n] = _go_back(
                            dh[b, n, m0:m1], wanted, before[n, :width], h[j + 1, n, :width], a[j, n, :width],
                            A[n, m0:m1], length, x[j, :width], dx, dlength, dA[b, n, m0:m1], B[b, t, n], C[b, t, n],
                        )  # fmt: skip
                    through, dthrough = D[m0:m1], dD[b, m0:m1]
                    for m in range(width):
                        du_t[m] = dx[m] * length[m] + through[m] * wanted[m]
                        ddt_t[m] = dx[m] * given[m] + dlength[m]
                        dthrough[m] += wanted[m] * given[m]
                if reset.shape[0] > 0 and reset[b, t]:
                    dh[b, :, m0:m1] = 0


def _array(x: Tensor) -> np.ndarray:
    return x.detach().contiguous().numpy()


def _flags(flags: Tensor | None) -> np.ndarray:
    return np.zeros((0, 0), dtype=np.bool_) if flags is None else _array(flags)


def _turned(x: Tensor) -> Tensor:
    """A new tensor with the last two axes of x exchanged in memory."""
    return x.detach().transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def _jobs(u: Tensor, A: Tensor) -> tuple[int, int]:
    """Number of jobs, and the elements of all of them."""
    return u.shape[0] * -(-u.shape[2] // BLOCK), u.numel() * A.shape[1]


@operator("pliant::selective_scan")
def _scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    h, marks = _turned(h0), _marks(u, A, keep)
    inputs = [_array(u), _array(dt), _turned(A).numpy(), _array(B), _array(C), _array(D), _flags(reset), _flags(mask)]
    outputs = [h.numpy(), _by_chunk(marks, u, A), y.numpy()]
    over_jobs(lambda *part: _forward(*inputs, *outputs, *part), *_jobs(u, A))
    return y, _turned(h), marks


def _marks(u: Tensor, A: Tensor, keep: bool) -> Tensor:
    """Room for the state before each chunk; none where nothing is to be kept.

    In one row, so that a compiled graph for one chunk is also one for more.
    """
    chunks = (u.shape[1] + CHUNK - 1) // CHUNK if keep else 0
    return torch.empty(u.shape[0] * chunks * A.shape[1] * A.shape[0], dtype=u.dtype, device=u.device)


def _by_chunk(marks: Tensor, u: Tensor, A: Tensor) -> np.ndarray:
    """The same as `(B, T / CHUNK, N, M)`, or `(B, 0, N, M)`."""
    chunks = -(-u.shape[1] // CHUNK) if marks.numel() else 0
    return marks.view(u.shape[0], chunks, A.shape[1], A.shape[0]).numpy()


@operator("pliant::selective_scan_backward")
def _scan_backward(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reset: Tensor | None, mask: Tensor | None,
    marks: Tensor, grad_y: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    batch, _, channels = u.shape
    blocks = -(-channels // BLOCK)
    du, ddt = (torch.empty_like(u, memory_format=torch.contiguous_format) for _ in range(2))
    dA, dD = u.new_zeros(batch, A.shape[1], channels), u.new_zeros(batch, channels)
    dB, dC = (torch.empty(blocks, *B.shape, dtype=B.dtype) for _ in range(2))
    dh = _turned(grad_last)
    inputs = [_array(u), _array(dt), _turned(A).numpy(), _array(B), _array(C), _array(D), _flags(reset), _flags(mask)]
    inputs += [_by_chunk(marks, u, A), _array(grad_y)]
    outputs = [x.numpy() for x in (dh, du, ddt, dA, dB, dC, dD)]
    over_jobs(lambda *part: _backward(*inputs, *outputs, *part), *_jobs(u, A))
    return du, ddt, _turned(dA.sum(0)), dB.sum(0), dC.sum(0), dD.sum(0), _turned(dh)


def _like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_scan.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(u), _like(h0), _marks(u, A, keep)


@_scan_backward.register_fake
def _(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reset: Tensor | None, mask: Tensor | None,
    marks: Tensor, grad_y: Tensor, grad_last: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return _like(u), _like(dt), _like(A), _like(B), _like(C), _like(D), _like(grad_last)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    u, dt, A, B, C, D, h0, reset, mask, _ = inputs
    ctx.save_for_backward(u, dt, A, B, C, D, reset, mask, output[2])
    ctx.shape = h0.shape
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad_y: Tensor | None, grad_last: Tensor | None, _):  # type: ignore[no-untyped-def]
    u = ctx.saved_tensors[0]
    grad_y = torch.zeros_like(u) if grad_y is None else grad_y
    grad_last = u.new_zeros(ctx.shape) if grad_last is None else grad_last
    return *_scan_backward(*ctx.saved_tensors, grad_y, grad_last), None, None, None


_scan.register_autograd(_gradients, setup_context=_keep)


def _scan_numba(*inputs: Tensor | None) -> tuple[Tensor, Tensor]:
    keep = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    y, h_last, _ = _scan(*inputs, keep)
    return y, h_last


def _scan_triton(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, h0: Tensor,
    reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    from pliant.kernels._triton.selective_scan import run

    return run(u, dt, A, B, C, D, h0, reset, mask)
