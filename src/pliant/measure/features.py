"""What a layer's activations tell: dead and dormant units, ranks, and how far features have moved.

All take H `(n, d)`: d units on n probe inputs. effective-learning-rate.md, 2.4 and section 5, gives the sources.
"""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.linalg import eigvalsh

from pliant.core import UsageError

NOTHING = 1e-4
"""Share of a layer's mean size below which an activation counts as zero."""


def dead_units(h: Float[Tensor, "n d"]) -> float:
    """Share of units that are never above zero: after a ReLU they pass no gradient."""
    return float((h <= 0).all(0).float().mean())


def silent_units(h: Float[Tensor, "n d"]) -> float:
    """Share of units that are zero on all inputs, which for those behind a ReLU is the same as to be dead.

    Zero means at most 1e-4 of the layer's mean size, so that it can be said of smooth and gated units, whose sign says
    nothing.
    """
    return float((h.abs().amax(0) <= NOTHING * h.abs().mean()).float().mean())


def dormant_units(h: Float[Tensor, "n d"], tau: float = 0.1) -> float:
    """Share of units whose mean absolute activation is at most τ times the layer's (Sokar et al. 2023, 2302.12902)."""
    scores = h.abs().mean(0)
    return float((scores <= tau * scores.mean()).float().mean())


def linear_units(before: Float[Tensor, "n d"]) -> float:
    """Share of units whose input, before a ReLU, is above zero always: they have become linear (Lyle et al. 2024)."""
    return float((before > 0).all(0).float().mean())


def singular_values(h: Float[Tensor, "n d"]) -> Float[Tensor, "r"]:
    """Largest first, float64, from the eigenvalues of the smaller of H Hᵀ and Hᵀ H: a tenth of the time of an SVD.

    Those below 1e-7 of the largest, which this cannot tell from zero, are zero. NaN where H is not finite.
    """
    wide = h.double()
    square = wide @ wide.mT if len(h) < h.shape[1] else wide.mT @ wide
    if not bool(square.isfinite().all()):
        return wide.new_full((len(square),), torch.nan)
    values = eigvalsh(square).flip(0).clamp(min=0).sqrt()
    return values * (values > 1e-7 * values[0])


def srank(h: Float[Tensor, "n d"], delta: float = 0.01) -> int:
    """Least number of singular values that hold 1 - δ of their sum (Kumar et al. 2021, 2010.14498)."""
    return needed(singular_values(h), delta)


def approximate_rank(h: Float[Tensor, "n d"], delta: float = 0.01) -> int:
    """As `srank`, of the squares of singular values (Yang et al. 2019, 1909.12255)."""
    return needed(singular_values(h).square(), delta)


def effective_rank(h: Float[Tensor, "n d"], *, centered: bool = False) -> float:
    """e to the entropy of the singular values as probabilities (Roy & Vetterli 2007); 0 of zeros.

    centered: subtract the mean over probe inputs first; packages differ there.
    """
    return perplexity(singular_values(h - h.mean(0) if centered else h))


def stable_rank(h: Float[Tensor, "n d"]) -> float:
    """Squared Frobenius norm over the squared largest singular value; 0 of zeros. Some call `srank` by this name."""
    values = singular_values(h).square()
    return float(values.sum() / values[0]) if values.sum() > 0 else 0.0


def perplexity(values: Float[Tensor, "r"]) -> float:
    """e to the entropy of values as probabilities; 0 of zeros."""
    if not values.sum() > 0:
        return 0.0
    p = values / values.sum()
    return float((-(p * p.clamp(min=1e-300).log()).sum()).exp())


def needed(values: Float[Tensor, "r"], delta: float = 0.01) -> int:
    """Least number of values, largest first, that hold 1 - δ of their sum; 0 of zeros."""
    if not 0 < delta < 1:
        raise UsageError(f"rank: delta is {delta}, expected a number between 0 and 1")
    total = values.sum()
    if not total > 0:
        return 0
    # The sum is rounded: what is short of the share by that alone is not.
    share = values.cumsum(0) / total
    return int((share < 1 - delta - 1e-12).sum()) + 1


def similarity_moved(before: Float[Tensor, "n d"], after: Float[Tensor, "n e"]) -> float:
    """Δ_C = ‖C - C'‖ with C = F Fᵀ / ‖F Fᵀ‖_*, the trace: 0 for the same features up to scale and rotation, √2 at most.

    Lyle et al. 2025, arXiv:2507.20057, eq. 3-4; the norms are not named there, these are Frobenius. Computed from
    products of `(n, n)` or `(d, d)`, whichever is smaller.
    """
    f, g = (x.double() / x.double().norm().clamp(min=1e-300) for x in (before, after))
    if len(f) < f.shape[1]:
        return float((f @ f.mT - g @ g.mT).norm())
    own = (f.mT @ f).square().sum() + (g.mT @ g).square().sum()
    return float((own - 2 * (f.mT @ g).square().sum()).clamp(min=0).sqrt())


def flipped(before: Float[Tensor, "n d"], after: Float[Tensor, "n d"]) -> float:
    """Δ_A: share of activations that were above zero and are not, or were not and are (eq. 4 there, as a share)."""
    return float(((before > 0) != (after > 0)).float().mean())


def churn(before: Float[Tensor, "n c"], after: Float[Tensor, "n c"]) -> float:
    """Mean absolute change of outputs on inputs that an update did not see (Tang et al. 2025, 2506.00592)."""
    return float((before - after).abs().mean())
