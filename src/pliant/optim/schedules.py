"""Rates over updates."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import Role
from pliant.core.rates import norms, power_of
from pliant.core.roles import roles_of
from pliant.optim.base import Probe, Upkeep

FIRST, PLACES = "initial_norms", "followed"


class Schedule(Upkeep):
    """Multiply each group's first learning rate by `factor(update)`, where update counts from 0.

    With `effective` the factor is one of the effective rate: the rate of a group whose matrices have grown grows with
    them, by the geometric mean of their ratios to their first norms, to the power of `power_of`. With one matrix to a
    group the directions of matrices before a norm are then those of `normalize_and_project` (Lyle et al. 2024,
    arXiv:2407.01800), with no norm held. Only matrices are followed (role MATRIX): the scale of a head is the scale of
    the outputs.

    Args:
        factor: of the first rates, by updates.
        effective: whether it is one of the effective rate.
        roles: of parameters by name, for a model that does not tell them all.

    There is nothing to save but the first rates and norms, which live in the optimizer's groups.
    """

    def __init__(
        self, factor: Callable[[int], float], *, effective: bool = False, roles: Mapping[str, Role] | None = None
    ):
        self.factor, self.effective, self.roles = factor, effective, roles

    def init(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        matrices = set()
        if self.effective:
            roles = roles_of(model, self.roles)
            matrices = {id(p) for name, p in model.named_parameters() if roles[name] is Role.MATRIX and p.ndim >= 2}
        for group in optimizer.param_groups:
            group.setdefault("initial_lr", group["lr"])
            if self.effective:
                group[PLACES] = [i for i, p in enumerate(group["params"]) if id(p) in matrices]
                group.setdefault(FIRST, norms(_matrices(group)).tolist())
        set_rates(optimizer, self.factor(0))

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        return {"lr": self.set(optimizer, self.factor(probe.update))}

    def set(self, optimizer: torch.optim.Optimizer, factor: float) -> float:
        """Give each group its rate at this factor; the rate of the first group."""
        lr = set_rates(optimizer, factor)
        return self._follow(optimizer) if self.effective else lr

    def _follow(self, optimizer: torch.optim.Optimizer) -> float:
        """Give each group the rate that its present norms need; the rate of the first group."""
        power = power_of(optimizer)
        for group in optimizer.param_groups:
            now, first = norms(_matrices(group)).double().cpu(), torch.tensor(group[FIRST], dtype=torch.float64)
            grown = (now / first)[(now > 0) & (first > 0)]
            if len(grown):
                group["lr"] *= float(grown.log().mean().exp()) ** power
        return float(optimizer.param_groups[0]["lr"])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def _matrices(group: dict[str, Any]) -> list[Tensor]:
    return [group["params"][i].detach() for i in group[PLACES]]


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Give each group its first rate times `factor`; the rate of the first group."""
    for group in optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return float(optimizer.param_groups[0]["lr"])


def warmup(updates: int) -> Callable[[int], float]:
    """Rise linearly over the first `updates` updates, then stay: a stream has no end to cool down for."""
    return lambda update: min(1.0, (update + 1) / max(1, updates))


def warmup_cosine(updates: int, total: int, floor: float = 0.0) -> Callable[[int], float]:
    """Rise linearly over `updates`, fall along a half cosine to `floor` at `total`, and stay there."""

    def factor(update: int) -> float:
        if update < updates:
            return (update + 1) / updates
        done = min(1.0, (update - updates) / max(1, total - updates))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return factor


def inverse_sqrt(updates: int, scale: float, floor: float = 0.0) -> Callable[[int], float]:
    """Rise linearly over `updates`, fall as 1 / sqrt(1 + update / scale), and stay at `floor`.

    The rate for online descent with bounded regret (Zinkevich 2003 has 1/sqrt(t)); the floor is for a
    stream that changes, where the best parameters move and a rate that goes to zero loses them.
    """

    def factor(update: int) -> float:
        return min(1.0, (update + 1) / max(1, updates)) * max(floor, (1 + update / scale) ** -0.5)

    return factor
