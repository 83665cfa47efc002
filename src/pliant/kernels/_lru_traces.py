"""Traces of the linear recurrent unit, h_t = λ h_{t-1} + γ (B x_t) with complex λ and B.

    e_t = λ e_{t-1} + h_{t-1}              = dh_t/dλ          (N,)
    E_t = λ E_{t-1} + γ x_t                = dh_t/dB          (D, N)

Source: Zucchet et al. 2023, arXiv:2305.15947, section 3; online-gradients.md 2.1b. The fast form brings each row of E
through all steps while it is in the nearest cache, and passes over what stands before the last reset.
"""

import numpy as np
import torch
from jaxtyping import Bool, Complex, Float
from torch import Tensor

from pliant.kernels._jit import jit_fast, over_jobs
from pliant.kernels._traces import Border, states_before, sum_of_products
from pliant.kernels.select import select


def lru_traces(
    x: Float[Tensor, "B T S D"],
    u: Complex[Tensor, "B T S N"],
    eigenvalues: Complex[Tensor, "N"],
    gain: Float[Tensor, "N"],
    h0: Complex[Tensor, "B S N"],
    by_eigenvalue: Complex[Tensor, "B S N"],
    by_weight: Complex[Tensor, "B S I N"],
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    *,
    form: str | None = None,
) -> tuple[Complex[Tensor, "B S N"], Complex[Tensor, "B S I N"]]:
    """Both traces after the last step, from those before the first; none of it has a gradient.

    Args:
        x: inputs; u: γ B x. Zero where masked.
        eigenvalues, gain: λ and γ.
        h0: state before the first step.
        by_eigenvalue, by_weight: e and E before it; I is D, or 0 if E is not wanted.
        reset, mask: `(B, T)`.
        form: `"loop"` (readable, any device) or `"numba"` (CPU); None chooses.
    """
    forms = {"loop": _traces_loop, "numba": _traces_numba}
    traces = select("lru_traces", forms, x, form)
    return traces(x, u, eigenvalues, gain, h0, by_eigenvalue, by_weight, reset, mask)


def _traces_loop(
    x: Tensor, u: Tensor, eigenvalues: Tensor, gain: Tensor, h0: Tensor, by_eigenvalue: Tensor, by_weight: Tensor,
    reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    a = eigenvalues.expand(u.shape)
    if mask is not None:
        a = torch.where(mask[..., None, None], a, 1)
    border, before = Border(a, reset), states_before(a, u, h0, reset)
    if mask is not None:
        before = torch.where(mask[..., None, None], before, 0)
    x = border.since(x)[..., : by_weight.shape[2]].to(a.dtype)
    entering = sum_of_products(x, border.left(gain.to(a.dtype).expand(u.shape)))
    return border.onto(by_eigenvalue, border.left(before).sum(1)), border.onto(by_weight, entering)


# The fast form: real and imaginary parts side by side, so that loops run on vectors; a job is a stream and a unit.


@jit_fast
def _turn(re, im, a_re, a_im, in_re, in_im):  # type: ignore[no-untyped-def]
    for n in range(re.shape[0]):
        now = a_re[n] * re[n] - a_im[n] * im[n] + in_re[n]
        im[n] = a_re[n] * im[n] + a_im[n] * re[n] + in_im[n]
        re[n] = now


@jit_fast
def _enter(re, im, a_re, a_im, gain, x):  # type: ignore[no-untyped-def]
    for n in range(re.shape[0]):
        now = a_re[n] * re[n] - a_im[n] * im[n] + gain[n] * x
        im[n] = a_re[n] * im[n] + a_im[n] * re[n]
        re[n] = now


@jit_fast
def _advance(x, u, a, gain, h, e, rows, reset, mask, i0, i1):  # type: ignore[no-untyped-def]
    # All that is complex has its parts on axis -2.
    _, steps, side, _ = x.shape
    for i in range(i0, i1):
        b, s = i // side, i % side
        begin = 0
        if reset.shape[0] > 0:
            for t in range(steps):
                if reset[b, t]:
                    begin = t
                    h[b, s] = 0
                    e[b, s] = 0
                    rows[b, s] = 0
        state, trace = h[b, s], e[b, s]
        for t in range(begin, steps):
            if mask.shape[0] == 0 or mask[b, t]:
                _turn(trace[0], trace[1], a[0], a[1], state[0], state[1])
                _turn(state[0], state[1], a[0], a[1], u[b, t, s, 0], u[b, t, s, 1])
        for d in range(rows.shape[2]):
            row = rows[b, s, d]
            for t in range(begin, steps):
                if mask.shape[0] == 0 or mask[b, t]:
                    _enter(row[0], row[1], a[0], a[1], gain, x[b, t, s, d])


def _traces_numba(
    x: Tensor, u: Tensor, eigenvalues: Tensor, gain: Tensor, h0: Tensor, by_eigenvalue: Tensor, by_weight: Tensor,
    reset: Tensor | None, mask: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    h, e, rows = (_parts(part) for part in (h0, by_eigenvalue, by_weight))
    flags = [np.zeros((0, 0), np.bool_) if flag is None else flag.contiguous().numpy() for flag in (reset, mask)]
    given = [x.contiguous(), _parts(u), _parts(eigenvalues), gain.contiguous(), h, e, rows]
    arrays = [part.detach().numpy() for part in given]
    over_jobs(lambda *part: _advance(*arrays, *flags, *part), x.shape[0] * x.shape[2], rows.numel())
    return _numbers(e), _numbers(rows)


def _parts(z: Tensor) -> Tensor:
    """A new `(..., 2, N)` of real and imaginary parts."""
    return torch.view_as_real(z.detach().resolve_conj()).transpose(-1, -2).clone(memory_format=torch.contiguous_format)


def _numbers(parts: Tensor) -> Tensor:
    return torch.complex(parts[..., 0, :], parts[..., 1, :])
