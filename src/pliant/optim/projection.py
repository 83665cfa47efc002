"""Normalize-and-project: matrices keep the length that they began with, so that a rate is what it says.

    W~_t = W_{t-1} + η_t u_t,        W_t = W~_t ‖W_0‖ / ‖W~_t‖        (Frobenius, each matrix by itself)

Papers: Lyle et al. 2024, arXiv:2407.01800; Lyle et al. 2025, arXiv:2507.20057, eq. 2 (which says unit sphere in words
and initial norm in the equation; it is the latter). Hyperball: Wen et al. 2026, arXiv:2606.16899, where the length of
the update is fixed too, to η ‖W_0‖.

What is projected are parameters of role MATRIX. Not the head, since a loss depends on its scale; not gates, whose scale
is how sharp they are; not decays, gains, biases; not depthwise convolutions, which are a few taps for each channel.
A block-diagonal matrix is one matrix.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from pliant.core import Role, UsageError
from pliant.core.rates import local, norms, power_of
from pliant.core.roles import NORMS, doubts_of, roles_of

logger = logging.getLogger("pliant.optim")

NORM, COUNT, JOINT = "projected_norms", "steps_to_projection", "joint_norms"
Gains = Literal["free", "joint"]
Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)
COUPLED = (
    torch.optim.SGD, torch.optim.ASGD, torch.optim.Adam, torch.optim.Adamax, torch.optim.RMSprop, torch.optim.Adagrad,
    torch.optim.Adadelta, torch.optim.Rprop, torch.optim.LBFGS, torch.optim.NAdam, torch.optim.RAdam,
)  # fmt: skip
"""Optimizers of torch whose weight decay is a part of the gradient, unless their groups say otherwise."""


def normalize_and_project(
    optimizer: Optimizer,
    model: nn.Module,
    every: int = 1,
    *,
    scope: Collection[Role] = (Role.MATRIX,),
    roles: Mapping[str, Role] | None = None,
    gains: Gains = "free",
    scale_decay: float = 0.0,
    hyperball: bool = False,
) -> Optimizer:
    """Have each step of `optimizer` end with a projection of matrices to their present norms; returns `optimizer`.

    Norms stand in the optimizer's groups, so they are saved and loaded with it: a model that is made anew from
    another seed and then loaded is projected to the norms of the first. Decoupled weight decay of what is projected
    is switched off, since it changes no direction, and a line of the log says so. Memory: a number for each
    parameter that is projected.

    Args:
        optimizer: over parameters of `model`, before its first step. Its groups are divided where only a part of one is
            projected.
        model: who says what its parameters are for, or see `roles`; `normalized` adds the norms that it may lack.
        every: steps from one projection to the next. One goes over the matrices twice: little beside a foreach step of
            AdamW, half of a fused one, where 16 make it little again (docs/ledger.md).
        scope: roles that are projected.
        roles: roles of parameters by name, for a model that does not tell them all.
        gains: `"joint"` rescales gain and bias of each norm together to their first joint length, which is right where
            the nonlinearity that follows is homogeneous.
        scale_decay: decoupled decay of gains per step, in units of the rate. With norms before attention and a
            projection nothing else can lower the scale of queries and keys.
        hyperball: fix the length of each update as well, to the rate times the norm; then the rate is the
            tangent of the angle by which a step turns a matrix. `every` has to be 1.

    Raises:
        UsageError: an argument is out of range, roles are not known, the optimizer has been wrapped before, or
            a schedule of `torch.optim.lr_scheduler` has been made for it.
    """
    if every < 1 or (hyperball and every != 1):
        raise UsageError(f"normalize_and_project: every is {every}, expected at least 1 step, and 1 with hyperball")
    if scale_decay < 0 or gains not in ("free", "joint"):
        raise UsageError(
            f"normalize_and_project: gains is {gains!r} and scale_decay {scale_decay}, expected free or joint and >= 0"
        )
    if any(hasattr(hook, "projects") for hook in optimizer._optimizer_step_post_hooks.values()):
        raise UsageError("normalize_and_project: this optimizer projects already")
    known = roles_of(model, roles)
    parts = {id(p): name for name, p in model.named_parameters()}
    # A copy of an optimizer has its groups and not its hooks.
    if not any(NORM in group for group in optimizer.param_groups):
        _divide(optimizer, lambda p: known.get(parts.get(id(p), "")) in scope and p.ndim >= 2)
    _name_doubts(optimizer, model, known, parts, roles or {})
    # Places, not parameters: hooks are shared with copies of the optimizer, which have parameters of their own.
    places = {id(p): (g, i) for g, group in enumerate(optimizer.param_groups) for i, p in enumerate(group["params"])}
    gained = [places[id(p)] for p in _norm_gains(model, known) if id(p) in places and p.requires_grad]
    pairs = [[places[id(p)] for p in pair] for pair in _norm_pairs(model, known, parts)
             if gains == "joint" and all(id(p) in places and p.requires_grad for p in pair)]  # fmt: skip
    lengths = [float(torch.linalg.vector_norm(norms(_at(optimizer, pair)))) for pair in pairs]
    optimizer.param_groups[0].setdefault(JOINT, lengths)
    before: list[Tensor] = []

    def remember(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        before[:] = [p.detach().clone() for group in _projected(optimizer) for p in group["params"]]

    @torch.no_grad()
    def project(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        if scale_decay and gained:
            rates = [1 - optimizer.param_groups[g]["lr"] * scale_decay for g, _ in gained]
            torch._foreach_mul_(_at(optimizer, gained), rates)
        for group in _projected(optimizer):
            if hyperball:
                _shorten(group, [before.pop(0) for _ in group["params"]])
            group[COUNT] -= 1
            if group[COUNT] <= 0:
                group[COUNT] = every
                _rescale(group["params"], group[NORM])
        for pair, length in zip(pairs, optimizer.param_groups[0][JOINT], strict=True):
            _rescale_together(_at(optimizer, pair), length)

    project.projects = True  # type: ignore[attr-defined]
    for group in _projected(optimizer):
        group[COUNT] = every
    if hyperball:
        optimizer.register_step_pre_hook(remember)
    optimizer.register_step_post_hook(project)
    return optimizer


def effective_rate(optimizer: torch.optim.Optimizer, model: nn.Module, *, power: int | None = None) -> dict[str, float]:
    """Rate over norm of every matrix by name, η/‖W‖, or η/‖W‖² for an optimizer that follows the gradient's scale.

    Args:
        optimizer: whose groups have the rates.
        model: whose parameters they are; those with at least two axes are told.
        power: of the norm; None takes 2 for `torch.optim.SGD` and 1 for all others.
    """
    power = power_of(optimizer) if power is None else power
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, float] = {}
    for group in optimizer.param_groups:
        matrices = [p.detach() for p in group["params"] if p.ndim >= 2 and id(p) in names]
        lengths = norms(matrices).double().tolist()
        rate = float(group["lr"])
        own = [names[id(p)] for p in group["params"] if p.ndim >= 2 and id(p) in names]
        found |= {
            name: rate / length**power if length else torch.inf for name, length in zip(own, lengths, strict=True)
        }
    order = {name: i for i, name in enumerate(names.values())}
    return dict(sorted(found.items(), key=lambda item: order[item[0]]))


def _at(optimizer: torch.optim.Optimizer, places: Sequence[tuple[int, int]]) -> list[Tensor]:
    """Parameters by number of their group and place in it."""
    return [optimizer.param_groups[g]["params"][i].detach() for g, i in places]


def _projected(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    return [group for group in optimizer.param_groups if group.get(NORM)]


def _divide(optimizer: torch.optim.Optimizer, chosen: Callable[[Tensor], bool]) -> None:
    """Put what is projected into groups of its own, with its norms and without decoupled decay."""
    groups, quiet = [], 0
    for group in optimizer.param_groups:
        split = {True: [p for p in group["params"] if chosen(p)], False: [p for p in group["params"] if not chosen(p)]}
        for projected, params in split.items():
            if not params and (split[not projected] or projected):
                continue
            own = {**group, "params": params, NORM: norms([p.detach() for p in params]).tolist() if projected else []}
            if projected and _decoupled(optimizer, own) and own.get("weight_decay"):
                own["weight_decay"] = 0.0
                quiet += len(params)
            groups.append(own)
    if not any(group[NORM] for group in groups):
        raise UsageError("normalize_and_project: no parameter of the optimizer has a role that is projected")
    if len(groups) > len(optimizer.param_groups) and hasattr(optimizer.step, "_wrapped_by_lr_sched"):
        # It would go on with the groups that there were.
        raise UsageError("normalize_and_project: this optimizer has a schedule of torch already; wrap it first")
    if zero := sum(length == 0 for group in groups for length in group[NORM]):
        logger.warning("%d matrices are zero and have no length to keep; they are left free", zero)
    if quiet:
        logger.info("weight decay is off for %d projected matrices: it would change no direction", quiet)
    optimizer.param_groups[:] = groups


def _decoupled(optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> bool:
    """Whether weight decay shrinks parameters, and is not a part of the gradient."""
    return bool(group.get("decoupled_weight_decay", not isinstance(optimizer, COUPLED)))


def _name_doubts(
    optimizer: torch.optim.Optimizer, model: nn.Module, known: Mapping[str, Role], names: Mapping[int, str],
    given: Mapping[str, Role],
) -> None:  # fmt: skip
    """Say which of the matrices that are projected could as well be something else."""
    doubts = doubts_of(model, known)
    projected = [names[id(p)] for group in _projected(optimizer) for p in group["params"] if id(p) in names]
    if told := [f"{name} ({doubts[name]})" for name in projected if name in doubts and name not in given]:
        logger.warning("projected as matrices, unless roles= says otherwise: %s", "; ".join(told))


def _rescale(params: list[Tensor], lengths: list[float]) -> None:
    now = norms(params)
    wanted = torch.tensor(lengths, dtype=now.dtype, device=now.device)
    # A matrix of zeros has no direction, one that began so has no length to keep, and what is not finite is left for
    # whoever looks at the loss.
    _multiply(params, torch.where((now > 0) & (wanted > 0) & now.isfinite(), wanted / now, 1))


def _rescale_together(pair: list[Tensor], length: float) -> None:
    now = torch.linalg.vector_norm(norms(pair))
    _multiply(pair, torch.where(now > 0, length / now, 1).expand(len(pair)))


def _shorten(group: dict[str, Any], before: list[Tensor]) -> None:
    """Give each update the length rate x norm."""
    params = group["params"]
    updates = torch._foreach_sub(params, before)
    now = norms(updates)
    lengths = torch.tensor(group[NORM], dtype=now.dtype, device=now.device)
    _multiply(updates, torch.where(lengths > 0, torch.where(now > 0, lengths * group["lr"] / now, 0), 1))
    torch._foreach_copy_(local(params), torch._foreach_add(local(before), local(updates)))


def _multiply(tensors: Sequence[Tensor], factors: Tensor) -> None:
    own = local(tensors)
    torch._foreach_mul_(own, [factor.to(x.dtype) for factor, x in zip(factors.unbind(), own, strict=True)])


def _norm_gains(model: nn.Module, roles: Mapping[str, Role]) -> list[Tensor]:
    """Gains of norms; other gains, such as skips, scale what no norm follows or stand as logarithms."""
    found = []
    for path, part in model.named_modules():
        for own, p in part.named_parameters(recurse=False):
            name = f"{path}.{own}".removeprefix(".")
            if roles.get(name) is Role.GAIN and (isinstance(part, NORMS) or "norm" in own):
                found.append(p)
    return found


def _norm_pairs(model: nn.Module, roles: Mapping[str, Role], names: Mapping[int, str]) -> list[list[Tensor]]:
    """Gain and bias of each norm."""
    pairs: list[list[Tensor]] = []
    for part in model.modules():
        own = {names[id(p)]: p for p in part.parameters(recurse=False)}
        if isinstance(part, NORMS) and any(roles[name] is Role.GAIN for name in own):
            pairs.append(list(own.values()))
    return pairs
