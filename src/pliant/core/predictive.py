"""Predictive distributions as plain tensors, and their code lengths in nats.

Two forms cover the house. *Categorical*: logits `(..., C)`, targets int64 `(...)`. *Mixture* of K
Gaussians for a number: `(..., 3K)`, the last axis holding K logits, K means and K log standard
deviations, targets float `(...)`. A code length of a number is a density, so its level depends on
the unit of the target; differences between two models do not.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

LOG_2PI = math.log(2 * math.pi)


def categorical_nats(logits: Tensor, targets: Tensor) -> Tensor:
    """-log p(target) in nats. logits `(..., C)`, targets `(...)` int64 -> `(...)`, at least float32."""
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return -F.log_softmax(wide, dim=-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def mixture_nats(output: Tensor, targets: Tensor) -> Tensor:
    """-log density in nats of a Gaussian mixture. output `(..., 3K)`, targets `(...)` -> `(...)`."""
    logits, means, log_scales = output.chunk(3, dim=-1)
    z = (targets.unsqueeze(-1) - means) * torch.exp(-log_scales)
    log_normal = -0.5 * (z.square() + LOG_2PI) - log_scales
    return -torch.logsumexp(F.log_softmax(logits, dim=-1) + log_normal, dim=-1)


def mixture_mean(output: Tensor) -> Tensor:
    """Mean of a Gaussian mixture. output `(..., 3K)` -> `(...)`."""
    logits, means, _ = output.chunk(3, dim=-1)
    return (F.softmax(logits, dim=-1) * means).sum(-1)
