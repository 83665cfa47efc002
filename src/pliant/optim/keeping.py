"""Ways to stay able to learn, and to retain what was learned, by name."""

from collections.abc import Callable, Collection
from typing import Literal

import torch
from torch import nn

from pliant.core import UsageError
from pliant.core.change import Cusum
from pliant.optim.base import Upkeep
from pliant.optim.continual import ContinualBackprop
from pliant.optim.memory import EWC, Replay
from pliant.optim.projection import Gains, normalize_and_project
from pliant.optim.schedules import Schedule
from pliant.optim.upkeep import Isometry, Rewarm, ShrinkPerturb, TowardInit

Keeper = Literal[
    "normalize-project", "rewarm", "toward-init", "shrink-perturb", "continual-backprop", "isometry", "replay", "ewc"
]  # fmt: skip


def changed() -> Cusum:
    """A detector on the loss of each update: quick to know a level, slow to cry."""
    return Cusum(settle=20, threshold=6.0)


KEEPERS: dict[Keeper, Callable[[], Upkeep]] = {
    "toward-init": lambda: TowardInit(0.1),
    "shrink-perturb": lambda: ShrinkPerturb(1e-4, 1e-3),
    "continual-backprop": lambda: ContinualBackprop(1e-3),
    "isometry": lambda: Isometry(detector=changed()),
    "replay": Replay,
    # The sampled information is for classes alone.
    "ewc": lambda: EWC(1.0, detector=changed(), fisher="empirical"),
}


def check(names: Collection[str]) -> None:
    """Raise `UsageError` if a name is not known or given twice."""
    known = ("normalize-project", "rewarm", *KEEPERS)
    for name in names:
        if name not in known:
            raise UsageError(f"keep has {name!r}, expected some of {', '.join(known)}")
    if len(set(names)) < len(names):
        raise UsageError(f"keep names a way twice: {', '.join(names)}")


def keeping(
    names: Collection[str],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    factor: Callable[[int], float],
    *,
    again: Callable[[int], float] | None = None,
    gains: Gains = "free",
) -> list[Upkeep]:
    """What a learner gets as `keep` so that it stays able to learn in these ways; may wrap the optimizer's step.

    Args:
        names: of the ways; each may be named once, and order does not matter. None: the rate follows `factor`,
            and nothing is kept. Strengths are those that did best on small images (docs/keeping.md, docs/returning.md);
            for others give the upkeep itself to a learner.
        model: with roles.
        optimizer: over its parameters, before the first step.
        factor: of the rate, by updates.
        again: of the rate, by updates since the last change, for "rewarm"; None is `factor`.
        gains: of norms, for "normalize-project".

    Raises:
        UsageError: a name is not known or given twice.
    """
    check(names)
    if "normalize-project" in names:
        normalize_and_project(optimizer, model, gains=gains)
    rate = Rewarm(again or factor, detector=changed(), rest=20) if "rewarm" in names else Schedule(factor)
    return [rate, *(make() for name, make in KEEPERS.items() if name in names)]
