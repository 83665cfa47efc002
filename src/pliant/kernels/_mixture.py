"""Quantiles of Gaussian mixtures, by bisection.

Output and units as in `pliant.core.predictive`. Each quantile lies between the least and the largest
of the components' own quantiles, so bisection starts there and is done when the interval cannot be
halved any more (at most 500 steps, since components may be as wide as 1e100).
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from pliant.kernels._jit import jit


def mixture_quantiles(output: Tensor, levels: Sequence[float]) -> Tensor:
    """Quantiles of mixtures, output `(..., 3K)`, at `levels` in (0, 1) -> `(..., len(levels))` float64."""
    logits, means, log_scales = (part.detach().double().cpu() for part in output.chunk(3, -1))
    flat = [
        part.reshape(-1, means.shape[-1]).contiguous().numpy() for part in (logits.softmax(-1), means, log_scales.exp())
    ]
    # Standard quantiles of the levels, where a component with no other would have its own.
    level = torch.tensor(levels, dtype=torch.float64)
    found = np.empty((flat[0].shape[0], len(levels)))
    _bisect(*flat, level.numpy(), torch.special.ndtri(level).numpy(), found)
    return torch.from_numpy(found).reshape(*output.shape[:-1], len(levels))


@jit
def _bisect(weights, means, scales, levels, standard, found):  # type: ignore[no-untyped-def]
    for n in range(weights.shape[0]):
        for q in range(levels.shape[0]):
            low, high = math.inf, -math.inf
            for k in range(weights.shape[1]):
                own = means[n, k] + scales[n, k] * standard[q]
                low, high = min(low, own), max(high, own)
            for _ in range(500):
                middle = 0.5 * (low + high)
                if not low < middle < high:
                    break
                below = 0.0
                for k in range(weights.shape[1]):
                    below += weights[n, k] * 0.5 * math.erfc((means[n, k] - middle) / scales[n, k] / math.sqrt(2.0))
                if below < levels[q]:
                    low = middle
                else:
                    high = middle
            found[n, q] = 0.5 * (low + high)
