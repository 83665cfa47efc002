"""Online normalization of raw features, as part of a stream's memory.

    n_t, m_t, v_t: count, mean and variance of x_0 … x_t;   y_t = (x_t - m_t) / sqrt(v_t)

Statistics are float64 and per stream. Step t is normalized by what is known at t, so chunks
equal steps, and nothing of the future is used. A reset does not clear them: they describe the
sensor, not the episode.

Numerics: sums are taken about the running mean (about the first value when there is none yet),
which is the merge formula of Chan, Golub & LeVeque 1983 over a growing prefix.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pliant.core import Role
from pliant.mixers.base import over_steps

CLIP = 10.0
"""Normalized values stay within this many standard deviations, so that one outlier cannot throw the model."""

ROUNDING = 1e-12
"""A spread below this share of the mean is rounding of the float64 sums, so the feature is constant."""


class NormalizerState(NamedTuple):
    """seen `(B,)` int64: existing steps so far; mean and spread (sum of squared deviations) `(B, *E, D)` float64."""

    seen: Tensor
    mean: Tensor
    spread: Tensor


class OnlineNormalizer(nn.Module):
    """Standardize each feature by what its stream has shown so far. `(B, T, *E, D) -> same`."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def init_state(
        self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None
    ) -> NormalizerState:
        mean = torch.zeros(batch, *extra, self.width, dtype=torch.float64, device=device)
        return NormalizerState(torch.zeros(batch, dtype=torch.int64, device=device), mean, mean.clone())

    @torch.no_grad()
    def forward(
        self, x: Float[Tensor, "B T *E D"], state: NormalizerState, *, mask: Bool[Tensor, "B T"] | None = None
    ) -> tuple[Float[Tensor, "B T *E D"], NormalizerState]:
        """Normalized values (a constant feature gives 0) and the statistics after the last step."""
        if x.shape[1] == 0:
            return x, state
        wide = x.double()
        exists = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask
        over = over_steps(exists, x)
        count = state.seen[:, None] + exists.long().cumsum(1)
        n = over_steps(count.clamp(min=1), x).double()

        center = self._center(wide, exists, state)
        offset = torch.where(over, wide - center[:, None], 0)
        first = offset.cumsum(1)
        spread = state.spread[:, None] + offset.square().cumsum(1) - first.square() / n
        spread = spread.clamp(min=0)
        mean = center[:, None] + first / n
        # Below the rounding of float32 inputs a feature counts as constant.
        scale = torch.sqrt(spread / n)
        constant = scale <= ROUNDING * mean.abs()
        y = torch.where(constant, 0, (wide - mean) / torch.where(constant, 1, scale)).clamp(-CLIP, CLIP)
        y = torch.where(over, y, 0).to(x.dtype)
        return y, NormalizerState(count[:, -1], mean[:, -1], spread[:, -1])

    def _center(self, wide: Tensor, exists: Tensor, state: NormalizerState) -> Tensor:
        at = exists.long().argmax(1)
        index = at.reshape(-1, *[1] * (wide.ndim - 1)).expand(-1, 1, *wide.shape[2:])
        none_yet = ((state.seen == 0) & exists.any(1)).reshape(-1, *[1] * (wide.ndim - 2))
        return torch.where(none_yet, wide.gather(1, index).squeeze(1), state.mean)

    def roles(self) -> dict[str, Role]:
        return {}
