"""Code length of classes and its gradient in one go, for few rows on a CPU."""

import math

import numpy as np
import torch
from torch import Tensor

from pliant.kernels._jit import jit


def softmax_slope(logits: Tensor, targets: Tensor, use: Tensor | None = None) -> tuple[float, Tensor | None]:
    """Mean code length of classes in nats, and its gradient with regard to the logits.

    Args:
        logits: `(B, T, C)` float, with no gradient of its own.
        targets: `(B, T)` int64, from 0 to C - 1 where used.
        use: `(B, T)` bool, which of them count; None for all.

    Returns:
        The mean of -log softmax(logits)[target] over those used, summed in float64, and its gradient
        `(B, T, C)`; None for the gradient unless the mean is finite.
    """
    given = logits.contiguous().numpy()
    rows = given.reshape(-1, given.shape[-1])
    slope = np.zeros_like(rows)
    chosen = np.ones(len(rows), np.bool_) if use is None else use.contiguous().numpy().reshape(-1)
    nats = _slope(rows, targets.contiguous().numpy().reshape(-1), chosen, slope)
    return nats, torch.from_numpy(slope.reshape(given.shape)) if math.isfinite(nats) else None


@jit
def _slope(logits, targets, use, slope):  # type: ignore[no-untyped-def]
    rows, classes = logits.shape
    count, nats = 0, 0.0
    for r in range(rows):
        count += use[r]
    for r in range(rows):
        if not use[r]:
            continue
        top = np.float64(logits[r, 0])
        for c in range(1, classes):
            top = max(top, np.float64(logits[r, c]))
        total = 0.0
        for c in range(classes):
            total += math.exp(logits[r, c] - top)
        nats += math.log(total) - (logits[r, targets[r]] - top)
        for c in range(classes):
            slope[r, c] = math.exp(logits[r, c] - top) / total / count
        slope[r, targets[r]] -= 1 / count
    return nats / count if count else math.nan
