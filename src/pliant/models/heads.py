"""From features to predictions: a pool over the episode, and two kinds of head.

A head maps features to a tensor that `pliant.core.predictive` reads as a predictive distribution,
and knows its own code length (`nats`).
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from pliant.core import Role, categorical_nats, mixture_nats
from pliant.kernels import linear_scan
from pliant.mixers.base import over_steps, steps_since_reset, where_steps


class PoolState(NamedTuple):
    """total `(B, *E, D)` float: sum over the episode; steps `(B,)` int64: those of it that exist."""

    total: Tensor
    steps: Tensor


class MeanPool(nn.Module):
    """Mean of the features since the last reset, at every step. `(B, T, *E, D) -> same`."""

    def __init__(self, width: int):
        super().__init__()
        self.width = width

    def init_state(self, like: Tensor, batch: int, extra: tuple[int, ...] = ()) -> PoolState:
        """A fresh state in the float type and on the device of `like`."""
        dtype = torch.promote_types(like.dtype, torch.float32)
        total = torch.zeros(batch, *extra, self.width, dtype=dtype, device=like.device)
        return PoolState(total, torch.zeros(batch, dtype=torch.int64, device=like.device))

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: PoolState,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], PoolState]:
        if mask is not None:
            x = where_steps(mask, x)
        flat = x.flatten(2)
        totals, total = linear_scan(torch.ones_like(flat), flat, state.total.flatten(1), reset)
        count = steps_since_reset(state.steps, x.shape[1], reset, mask)
        mean = totals.reshape(x.shape) / over_steps(count.clamp(min=1), x)
        last = count[:, -1] if x.shape[1] else state.steps
        return mean.to(x.dtype), PoolState(total.reshape(state.total.shape), last)


class ClassHead(nn.Module):
    """Logits of C classes. `(..., D) -> (..., C)`."""

    def __init__(self, width: int, num_classes: int):
        super().__init__()
        self.linear = nn.Linear(width, num_classes)
        # Zero: the first answer is the uniform one, log2 C bits, and never worse than guessing.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S C"]:
        return self.linear(x)

    def nats(self, output: Float[Tensor, "*S C"], targets: Int[Tensor, "*S"]) -> Float[Tensor, "*S"]:
        return categorical_nats(output, targets)

    def roles(self) -> dict[str, Role]:
        return {"linear.weight": Role.HEAD, "linear.bias": Role.BIAS}


class MixtureHead(nn.Module):
    """A mixture of K Gaussians for each of F numbers. `(..., D) -> (..., F, 3K)`."""

    def __init__(self, width: int, num_targets: int, components: int = 4):
        super().__init__()
        self.shape = (num_targets, 3 * components)
        self.linear = nn.Linear(width, num_targets * 3 * components)
        nn.init.zeros_(self.linear.weight)
        with torch.no_grad():
            # Means spread over the range of a standardized target, so that components differ from the start.
            start = torch.zeros(self.shape)
            start[:, components : 2 * components] = torch.linspace(-1, 1, components) if components > 1 else 0.0
            self.linear.bias.copy_(start.flatten())

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S F K"]:
        return self.linear(x).unflatten(-1, self.shape)

    def nats(self, output: Float[Tensor, "*S F K"], targets: Float[Tensor, "*S F"]) -> Float[Tensor, "*S"]:
        """Summed over the F numbers."""
        return mixture_nats(output, targets).sum(-1)

    def roles(self) -> dict[str, Role]:
        return {"linear.weight": Role.HEAD, "linear.bias": Role.BIAS}
