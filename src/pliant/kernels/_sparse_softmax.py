"""Weights that are not exponential: entmax, sparsemax, Stieltjes. All are p_i = f(e_i - t); the sum of 1 gives t.

- α-entmax: p_i = max(0, (α - 1) e_i - t)^(1 / (α - 1)). The largest entry has all the weight once it stands out by
  1 / (α - 1), however many there are. α = 2 is sparsemax; α toward 1 is softmax.
- Stieltjes: p_i = (t - e_i)^(-q), t above the largest entry. With q fixed, the margin that the largest of n entries
  needs for half of the weight grows as n^(1/q): faster than the log n of softmax, in the end.

t is found by halving, from bounds that hold for any row: where the largest entry alone has 1, and where it has 1/n.
Backward, with s_i = dp_i/de_i at fixed t (p^(2 - α); q p^(1 + 1/q)): dL/de_i = s_i (g_i - Σ s g / Σ s).

Papers: Martins & Astudillo 2016, From Softmax to Sparsemax, arXiv:1602.02068; Peters et al. 2019, Sparse
Sequence-to-Sequence Models, arXiv:1905.05702; adaptive-temperature.md 2.5.
"""

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._adaptive_softmax import visible_rows
from pliant.kernels._autocast import own_precision
from pliant.kernels._row_softmax import HIDDEN

HALVINGS = {torch.float32: 32, torch.float64: 60}


def entmax(
    logits: Float[Tensor, "*S"], dim: int = -1, mask: Bool[Tensor, "*M"] | None = None, *, alpha: float = 1.5
) -> Float[Tensor, "*S"]:
    """α-entmax along `dim`, α above 1; arguments and weights otherwise as of `adaptive_softmax`."""
    if not 1 < alpha < math.inf:
        raise UsageError(f"entmax: alpha is {alpha:g}, expected above 1 and finite; softmax is the limit of 1")
    return _weights(logits, dim, mask, _Entmax, alpha)


def sparsemax(
    logits: Float[Tensor, "*S"], dim: int = -1, mask: Bool[Tensor, "*M"] | None = None
) -> Float[Tensor, "*S"]:
    """The point of the simplex that is nearest to the logits; arguments and weights as of `adaptive_softmax`."""
    return entmax(logits, dim, mask, alpha=2.0)


def stieltjes(
    logits: Float[Tensor, "*S"], dim: int = -1, mask: Bool[Tensor, "*M"] | None = None, *, power: float = 4.0
) -> Float[Tensor, "*S"]:
    """(t - e)^(-power) along `dim`; arguments and weights otherwise as of `adaptive_softmax`."""
    if not 0 < power < math.inf:
        raise UsageError(f"stieltjes: power is {power:g}, expected above 0 and finite")
    return _weights(logits, dim, mask, _Stieltjes, power)


@own_precision
def _weights(logits: Tensor, dim: int, mask: Tensor | None, kind: Any, parameter: float) -> Tensor:
    e = visible_rows(logits, dim, mask)
    return (kind.apply(e, parameter) if e.shape[-1] else e).movedim(-1, dim).to(logits.dtype)


class _Rooted(torch.autograd.Function):
    """p of rows `(..., N)`; what kinds differ in are bounds of t for a largest entry of 0, p at t, and dp/de from p."""

    @staticmethod
    def solve(ctx: Any, e: Tensor, kind: Any, parameter: float) -> Tensor:
        hidden = e == HIDDEN
        top = e.amax(-1, keepdim=True)
        x = torch.where(hidden, HIDDEN, e - top)
        count = (~hidden).sum(-1, keepdim=True).clamp(min=1).to(e.dtype)
        low, high = kind.bounds(count, parameter)
        for _ in range(HALVINGS[e.dtype]):
            middle = (low + high) / 2
            above = kind.share(x, middle, parameter).sum(-1, keepdim=True) > 1
            # Shares fall as t rises: at `low` they are too much, at `high` too little.
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        p = torch.where(hidden, 0, kind.share(x, low, parameter))
        p = torch.where(top == HIDDEN, 0, p / p.sum(-1, keepdim=True))
        ctx.save_for_backward(p)
        ctx.parameter = parameter
        return p

    @staticmethod
    def slope(ctx: Any, grad: Tensor, kind: Any) -> tuple[Tensor, None]:
        (p,) = ctx.saved_tensors
        s = torch.where(p > 0, kind.rise(p, ctx.parameter), 0)
        total = s.sum(-1, keepdim=True)
        mean = (s * grad).sum(-1, keepdim=True) / torch.where(total > 0, total, 1)
        return s * (grad - mean), None


class _Entmax(_Rooted):
    @staticmethod
    def forward(ctx: Any, e: Tensor, alpha: float) -> Tensor:
        return _Rooted.solve(ctx, e, _Entmax, alpha)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Rooted.slope(ctx, grad, _Entmax)

    @staticmethod
    def bounds(count: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
        return torch.full_like(count, -1), -(count ** (1 - alpha))

    @staticmethod
    def share(x: Tensor, t: Tensor, alpha: float) -> Tensor:
        return ((alpha - 1) * x - t).clamp(min=0) ** (1 / (alpha - 1))

    @staticmethod
    def rise(p: Tensor, alpha: float) -> Tensor:
        return p ** (2 - alpha)


class _Stieltjes(_Rooted):
    @staticmethod
    def forward(ctx: Any, e: Tensor, power: float) -> Tensor:
        return _Rooted.solve(ctx, e, _Stieltjes, power)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _Rooted.slope(ctx, grad, _Stieltjes)

    @staticmethod
    def bounds(count: Tensor, power: float) -> tuple[Tensor, Tensor]:
        return torch.ones_like(count), count ** (1 / power)

    @staticmethod
    def share(x: Tensor, t: Tensor, power: float) -> Tensor:
        return (t - x) ** -power

    @staticmethod
    def rise(p: Tensor, power: float) -> Tensor:
        return power * p ** (1 + 1 / power)
