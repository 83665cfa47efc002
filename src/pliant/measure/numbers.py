"""Scores of predictive distributions of numbers, Gaussian mixtures in the form of `pliant.core.predictive`."""

import math

import torch
from torch import Tensor

from pliant.measure.scores import _Sums

BINS = 20


class Coverage(_Sums):
    """How far the shares of targets inside the central intervals lie from what the intervals promise.

    A target at F(y) of its predictive distribution is inside the central interval of level p if
    |2 F(y) - 1| <= p. The value is the mean over the levels 0.05, 0.10, … 0.95 of |share - p|, 0 for a
    calibrated forecast and at most 0.5 (the probability integral transform: Dawid 1984; Gneiting,
    Balabdaoui & Raftery 2007). `table()` holds the shares.
    """

    def _sizes(self) -> tuple[int, ...]:
        return (BINS + 1,)  # by level; then what was NaN

    def _add(self, said: Tensor, targets: Tensor) -> Tensor:
        logits, means, log_scales = said.double().chunk(3, -1)
        z = (targets.double().unsqueeze(-1) - means) * torch.exp(-log_scales)
        below = (logits.softmax(-1) * torch.special.ndtr(z)).sum(-1)
        level = (2 * below - 1).abs()
        # The share of a target's numbers, so that a row counts once however many it has.
        where = torch.where(level.isnan(), BINS, (level.nan_to_num() * BINS).long().clamp(0, BINS - 1)).flatten()
        share = torch.full(where.shape, 1 / max(1, level[0].numel()), dtype=torch.float64)
        return torch.zeros(BINS + 1, dtype=torch.float64).index_add(0, where, share)

    def _inside(self) -> Tensor:
        return self.sums[:BINS].cumsum(0)[:-1] / self.count

    def value(self) -> float:
        if not self.count or float(self.sums[BINS]):
            return math.nan
        levels = torch.arange(1, BINS, dtype=torch.float64) / BINS
        return float((self._inside() - levels).abs().mean())

    def table(self) -> list[dict[str, float]]:
        """The levels and the share of targets inside their intervals; empty before the first answer."""
        if not self.count:
            return []
        return [{"level": (i + 1) / BINS, "inside": share} for i, share in enumerate(self._inside().tolist())]
