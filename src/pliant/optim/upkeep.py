"""Upkeep: what is done to a model after an update, so that it stays able to learn.

- `Rewarm`: the schedule of the rate begins anew, on a cycle or when the loss has risen
- `TowardInit`: L2 to the initial parameters
- `ShrinkPerturb`: parameters shrink a little and get a little noise
- `Isometry`: matrices become isometries at a change (FIRE)
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import Role, UsageError
from pliant.core.change import Detector
from pliant.core.rates import norms
from pliant.core.roles import MIXING, roles_of
from pliant.optim.base import Probe, Upkeep
from pliant.optim.schedules import Schedule

_CONVS = nn.modules.conv._ConvNd


class Rewarm(Schedule):
    """A schedule whose clock is set to zero again when the stream has changed, and nothing else is.

    Paper: Lyle et al. 2025, arXiv:2507.20057, algorithm 1: a rate that has risen is to fall again.

    Args:
        factor: as of `Schedule`, by updates since the clock was set, as of `warmup_cosine`.
        cycle: updates from one beginning to the next; None means that only `detector` says.
        detector: gets the loss of each update in nats and says when its level has risen, such as
            `pliant.core.change.Cusum`, or `Foreign(river.drift.ADWIN)`; None: only `cycle` says.
        peak: factor of all rates after the first beginning; some learners want a higher one.
        rest: updates after a beginning in which the detector is not heard.
        effective, roles: as of `Schedule`.
    """

    def __init__(
        self,
        factor: Callable[[int], float],
        *,
        cycle: int | None = None,
        detector: Detector | None = None,
        peak: float = 1.0,
        rest: int = 0,
        effective: bool = False,
        roles: Mapping[str, Role] | None = None,
    ):
        super().__init__(factor, effective=effective, roles=roles)
        if cycle is None and detector is None:
            raise UsageError("Rewarm: neither a cycle nor a detector says when to begin anew")
        if (cycle is not None and cycle < 1) or peak <= 0 or rest < 0:
            raise UsageError(f"Rewarm: cycle is {cycle}, peak {peak} and rest {rest}; expected positive numbers")
        self.cycle, self.detector, self.peak, self.rest = cycle, detector, peak, rest
        self.clock, self.times = 0, 0

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        self.clock += 1
        risen = self.detector is not None and self.detector.update(probe.nats) and self.clock > self.rest
        again = risen or (self.cycle is not None and self.clock >= self.cycle)
        if again:
            self.clock, self.times = 0, self.times + 1
        lr = self.set(optimizer, self.factor(self.clock) * (self.peak if self.times else 1.0))
        return {"lr": lr, "rewarmed": True} if again else {"lr": lr}

    def state_dict(self) -> dict[str, Any]:
        detector = {} if self.detector is None else self.detector.state_dict()
        return {"clock": self.clock, "times": self.times, "detector": detector}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.clock, self.times = state["clock"], state["times"]
        if self.detector is not None:
            self.detector.load_state_dict(state["detector"])


class Scoped(Upkeep):
    """Upkeep of the parameters with some roles, of those that the optimizer moves."""

    scope: Collection[Role] = MIXING

    def init(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        roles = roles_of(model)
        moved = {id(p) for group in optimizer.param_groups for p in group["params"] if p.requires_grad}
        self.params: list[Tensor] = [
            p for name, p in model.named_parameters() if roles[name] in self.scope and id(p) in moved
        ]
        self.begin(model)

    @abstractmethod
    def begin(self, model: nn.Module) -> None:
        """Take what is needed of the initial parameters, in `self.params`."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


class TowardInit(Scoped):
    """θ <- θ + strength · rate · (θ_0 - θ): decoupled L2 to the initial parameters.

    Paper: Kumar, Marklund, Van Roy 2023, arXiv:2308.11958 (there as a term of the loss). Keeps a copy of the
    parameters.

    Args:
        strength: in units of the rate.
    """

    scope = frozenset(Role)

    def __init__(self, strength: float = 0.01):
        if strength < 0:
            raise UsageError(f"TowardInit: strength is {strength}, expected at least 0")
        self.strength = strength

    def begin(self, model: nn.Module) -> None:
        self.first = [p.detach().clone() for p in self.params]

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        place = {id(p): i for i, p in enumerate(self.params)}
        for group in optimizer.param_groups:
            own = [place[id(p)] for p in group["params"] if id(p) in place]
            params, first = [self.params[i] for i in own], [self.first[i] for i in own]
            torch._foreach_lerp_(params, first, min(1.0, self.strength * float(group["lr"])))
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"first": self.first}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        torch._foreach_copy_(self.first, list(state["first"]))


class ShrinkPerturb(Scoped):
    """θ <- (1 - shrink) θ + noise · ε, where ε is normal with the deviation of the initial θ.

    Paper: Ash & Adams 2020, arXiv:1910.08475 (once per task there); each step as in Dohare et al. 2024, Nature 632.

    Args:
        shrink: share by which a parameter is reduced.
        noise: deviation of what is added, in units of that of the initial parameters, each tensor by itself.
        every: updates from one time to the next.
    """

    def __init__(self, shrink: float = 1e-3, noise: float = 1e-2, every: int = 1):
        if not 0 <= shrink <= 1 or noise < 0 or every < 1:
            raise UsageError(
                f"ShrinkPerturb: shrink is {shrink}, noise {noise}, every {every}; expected 0 to 1, >= 0, >= 1"
            )
        self.shrink, self.noise, self.every = shrink, noise, every

    def begin(self, model: nn.Module) -> None:
        sizes = torch.tensor([max(1, p.numel()) for p in self.params])
        self.spread = (norms([p.detach() for p in self.params]).cpu() / sizes.sqrt()).tolist()

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        if probe.update % self.every:
            return {}
        torch._foreach_mul_(self.params, 1 - self.shrink)
        total = sum(p.numel() for p in self.params)
        drawn = torch.randn(total, generator=probe.generator).split([p.numel() for p in self.params])
        fitting = [x.view(p.shape).to(p) for x, p in zip(drawn, self.params, strict=True)]
        torch._foreach_mul_(fitting, [self.noise * spread for spread in self.spread])
        torch._foreach_add_(self.params, fitting)
        return {}

    def state_dict(self) -> dict[str, Any]:
        return {"spread": self.spread}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.spread = list(state["spread"])


class Isometry(Scoped):
    """W <- U Vᵀ of W = U S Vᵀ: the isometry nearest to W, when the stream has changed (FIRE).

    It keeps as much of W as an isometry can, in the sense of Frobenius, and has no direction in which signals or
    gradients vanish. Paper: Han et al. 2026, arXiv:2602.08040. What stands in several blocks is done block by block,
    and so are real and imaginary parts.

    Args:
        every: updates from one time to the next; None means that only `detector` says.
        detector: gets the loss of each update in nats, says when its level has risen.
    """

    scope = frozenset({Role.MATRIX})

    def __init__(self, *, every: int | None = None, detector: Detector | None = None):
        if every is None and detector is None:
            raise UsageError("Isometry: neither a number of updates nor a detector says when")
        if every is not None and every < 1:
            raise UsageError(f"Isometry: every is {every}, expected at least 1 update")
        self.every, self.detector = every, detector

    def begin(self, model: nn.Module) -> None:
        self.params = [p for p in self.params if p.ndim >= 2]
        self.rows = {id(p) for part in model.modules() if isinstance(part, _CONVS) for p in part.parameters(False)}

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        risen = self.detector is not None and self.detector.update(probe.nats)
        if not risen and (self.every is None or probe.update % self.every):
            return {}
        for p in self.params:
            p.copy_(nearest_isometry(p, rows=id(p) in self.rows))
        return {"isometry": True}

    def state_dict(self) -> dict[str, Any]:
        return {"detector": {} if self.detector is None else self.detector.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.detector is not None:
            self.detector.load_state_dict(state["detector"])


def nearest_isometry(weight: Tensor, *, rows: bool = False) -> Tensor:
    """U Vᵀ of `(..., O, I)`; with `rows` of `(O, ...)`, as of a convolution: all that one output reads is a row."""
    flat = weight.flatten(1) if rows else weight
    u, _, vh = torch.linalg.svd(flat.float() if flat.dtype.itemsize < 4 else flat, full_matrices=False)
    return (u @ vh).to(weight.dtype).reshape(weight.shape)
