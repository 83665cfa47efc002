"""From features to predictions: a pool over the episode, and four kinds of head.

A head maps features to a tensor that `pliant.core.predictive` reads as a predictive distribution,
and knows its own code length (`nats`).
"""

from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role, UsageError, categorical_nats, mixture_nats
from pliant.kernels import linear_scan
from pliant.mixers.base import over_steps, steps_since_reset, where_steps


def _check_targets(owner: str, targets: Tensor, shape: torch.Size) -> None:
    if targets.shape != shape:
        raise UsageError(f"{owner}: targets are {tuple(targets.shape)}, expected {tuple(shape)}")


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


class LabelHead(nn.Module):
    """Logits of C labels, any number of which may hold at once. `(..., D) -> (..., C)`."""

    def __init__(self, width: int, num_labels: int):
        super().__init__()
        self.linear = nn.Linear(width, num_labels)
        # Zero: the first answer is one bit for each label.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S C"]:
        return self.linear(x)

    def nats(self, output: Float[Tensor, "*S C"], targets: Shaped[Tensor, "*S C"]) -> Float[Tensor, "*S"]:
        """Summed over the C labels; targets are 0 or 1, of any dtype.

        Raises:
            UsageError: they have another shape or, on a CPU, lie outside.
        """
        _check_targets("LabelHead", targets, output.shape)
        if targets.is_cpu and not bool(((targets >= 0) & (targets <= 1)).all()):
            raise UsageError("LabelHead: targets lie outside of 0 … 1, expected 1 for each label that holds, else 0")
        wide = output if output.dtype == torch.float64 else output.float()
        return F.binary_cross_entropy_with_logits(wide, targets.to(wide.dtype), reduction="none").sum(-1)

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
        """Summed over the F numbers.

        Raises:
            UsageError: targets of another shape.
        """
        _check_targets("MixtureHead", targets, output.shape[:-1])
        return mixture_nats(output, targets).sum(-1)

    def roles(self) -> dict[str, Role]:
        return {"linear.weight": Role.HEAD, "linear.bias": Role.BIAS}


class ForecastHead(nn.Module):
    """F numbers at each of the next H steps, a Gaussian for each. `(..., D) -> (..., H, F, 3)`.

    The last axis is a mixture of one, as `pliant.core.predictive` reads it; its mean is linear in the features.
    """

    def __init__(self, width: int, num_targets: int, horizon: int):
        super().__init__()
        self.shape = (horizon, num_targets, 2)
        self.linear = nn.Linear(width, horizon * num_targets * 2)
        # Zero: the first answer is the standard normal of a standardized target.
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S H F 3"]:
        return F.pad(self.linear(x).unflatten(-1, self.shape), (1, 0))  # the logit of the only component

    def nats(self, output: Float[Tensor, "*S H F 3"], targets: Float[Tensor, "*S H F"]) -> Float[Tensor, "*S"]:
        """Summed over the steps and numbers.

        Raises:
            UsageError: targets of another shape.
        """
        _check_targets("ForecastHead", targets, output.shape[:-1])
        return mixture_nats(output, targets).sum((-2, -1))

    def roles(self) -> dict[str, Role]:
        return {"linear.weight": Role.HEAD, "linear.bias": Role.BIAS}


Head = ClassHead | LabelHead | MixtureHead | ForecastHead
HEADS = ("classes", "labels", "mixture", "forecast")


def check_head(owner: str, kind: str, horizon: int | None) -> None:
    """Raise `UsageError` if there is no such head, or a horizon is missing or of no use; `owner` begins the message."""
    if kind not in HEADS or (kind == "forecast") != (horizon is not None) or (horizon is not None and horizon < 1):
        raise UsageError(
            f"{owner}: head is {kind!r} and horizon {horizon}; expected one of {', '.join(HEADS)}, and a horizon of at "
            "least one step for a forecast alone"
        )


def head_of(kind: str, width: int, num_outputs: int, horizon: int | None) -> Head:
    """The head of that name."""
    if horizon is not None:
        return ForecastHead(width, num_outputs, horizon)
    simple: dict[str, Any] = {"classes": ClassHead, "labels": LabelHead, "mixture": MixtureHead}
    return simple[kind](width, num_outputs)
