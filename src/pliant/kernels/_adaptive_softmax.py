"""Softmax whose temperature depends on its row: what keeps attention sharp as rows grow longer.

    w = softmax(β e),       β a function of the row's entropy H = H(softmax(e)), or of its number n of visible entries

- adaptive: β = max(1, -0.037 H⁴ + 0.481 H³ - 2.3 H² + 4.917 H - 1.791) where H > 0.5, else 1
- perplexity: β = max(1, exp(H) / items). exp(H) is how many entries share the weight. Where scores fill an interval
  ever more densely, as those of n draws do, twice as many entries within reach need twice the β, so `items` bounds
  how many share, at any n: more than any factor of log n can do.
- SSMax: β = s log n + b. With b = 0 and s = γ it is the critical scaling: the top of n entries keeps its share if it
  stands out by more than 1 / γ, however large n is.

Papers: Veličković et al. 2024, softmax is not Enough (for Sharp Size Generalisation), arXiv:2410.01104, section 4;
Nakanishi 2025, Scalable-Softmax, arXiv:2501.19399; Chen et al. 2025, Critical attention scaling, arXiv:2510.05554;
adaptive-temperature.md 2.2, 2.5. The perplexity rule is ours.
Facts of the published polynomial: it is above 1 for H between 0.8486 and 5.9445 alone, so its threshold of 0.5 never
acts, β is 2.4214 at most, and more than about 382 equal entries switch it off. Gradients flow through β, as published.
Departure: H is computed in float32 at least, and without the 1e-9 within the logarithm.
"""

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._autocast import own_precision
from pliant.kernels._row_softmax import HIDDEN, row_entropy, row_softmax

COEFFICIENTS = (-0.037, 0.481, -2.3, 4.917, -1.791)
"""From the highest power of H down."""
THRESHOLD = 0.5


def inverse_temperature(entropy: Tensor) -> Tensor:
    """β of the published polynomial; entropy in nats, any shape."""
    power = torch.zeros_like(entropy)
    for coefficient in COEFFICIENTS:
        power = power * entropy + coefficient
    return torch.where(entropy > THRESHOLD, power.clamp(min=1), 1)


def adaptive_softmax(
    logits: Float[Tensor, "*S"], dim: int = -1, mask: Bool[Tensor, "*M"] | None = None, *, form: str | None = None
) -> Float[Tensor, "*S"]:
    """Softmax at the published adaptive temperature.

    Args:
        logits: what softmax would be given, scaled already.
        dim: the axis of the weights.
        mask: true where visible, broadcasts to logits; None: everywhere. Entries of -inf are not visible, either.
        form: `"loop"` (readable, any device) or `"numba"` (CPU); None chooses.

    Returns:
        Weights in the dtype of logits, computed in float32 at least; zero in a row of which nothing is visible.

    Raises:
        UsageError: mask does not fit.
    """
    return tempered_softmax(logits, inverse_temperature, dim, mask, form=form)


def perplexity_softmax(
    logits: Float[Tensor, "*S"],
    dim: int = -1,
    mask: Bool[Tensor, "*M"] | None = None,
    *,
    items: float | Tensor = 2.0,
    form: str | None = None,
) -> Float[Tensor, "*S"]:
    """Softmax at β = max(1, exp(H) / items): about `items` entries share the weight at most. Else `adaptive_softmax`.

    items: above 0; a tensor broadcasts to the rows, with 1 for the axis `dim`.
    """
    if not isinstance(items, Tensor) and not items > 0:
        raise UsageError(f"perplexity_softmax: items is {items}, expected above 0")
    return tempered_softmax(logits, lambda entropy: (entropy.exp() / items).clamp(min=1), dim, mask, form=form)


def masked_softmax(
    logits: Float[Tensor, "*S"], dim: int = -1, mask: Bool[Tensor, "*M"] | None = None
) -> Float[Tensor, "*S"]:
    """Softmax with arguments and weights as of `adaptive_softmax`: rows of which nothing is visible weigh nothing."""
    if mask is None:
        return logits.softmax(dim)
    return torch.where(mask, logits, torch.finfo(logits.dtype).min).softmax(dim) * mask


def tempered_softmax(
    logits: Float[Tensor, "*S"],
    rule: Callable[[Tensor], Tensor],
    dim: int = -1,
    mask: Bool[Tensor, "*M"] | None = None,
    *,
    form: str | None = None,
) -> Float[Tensor, "*S"]:
    """Softmax at β = rule(H); `rule` is given and returns one value per row, 1 for the axis `dim`. As above."""
    return _by_rows(logits, lambda e: rule(row_entropy(e, form).movedim(-1, dim)).movedim(dim, -1), dim, mask, form)


def ssmax(
    logits: Float[Tensor, "*S"],
    dim: int = -1,
    mask: Bool[Tensor, "*M"] | None = None,
    *,
    scale: float | Tensor = 0.43,
    bias: float | Tensor = 0.0,
    form: str | None = None,
) -> Float[Tensor, "*S"]:
    """Softmax at β = scale · log n + bias, n the entries visible in the row. Else as `adaptive_softmax`.

    scale, bias: tensors broadcast to the rows, with 1 for the axis `dim`.
    """

    def rule(e: Tensor) -> Tensor:
        visible = (e > HIDDEN).sum(-1, keepdim=True).clamp(min=1).to(e.dtype)
        return (scale * visible.log().movedim(-1, dim) + bias).movedim(dim, -1)

    return _by_rows(logits, rule, dim, mask, form)


@own_precision
def _by_rows(
    logits: Tensor, rule: Callable[[Tensor], Tensor], dim: int, mask: Tensor | None, form: str | None
) -> Tensor:
    e = visible_rows(logits, dim, mask)
    return row_softmax(e, rule(e), form).movedim(-1, dim).to(logits.dtype)


def visible_rows(logits: Tensor, dim: int, mask: Tensor | None) -> Tensor:
    """Logits in at least float32 with `dim` as the last axis, and -inf where they are not visible."""
    if not logits.is_floating_point():
        raise UsageError(f"logits are {logits.dtype}, expected floating point")
    if mask is not None:
        try:
            fits = mask.dtype == torch.bool and torch.broadcast_shapes(mask.shape, logits.shape) == logits.shape
        except RuntimeError:
            fits = False
        if not fits:
            raise UsageError(
                f"mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool, true where visible, "
                f"of a shape that broadcasts to the {tuple(logits.shape)} of logits"
            )
        logits = torch.where(mask, logits, HIDDEN)
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).movedim(dim, -1)
