"""AdamW with parameter groups by role.

Paper: Loshchilov & Hutter 2019, Decoupled weight decay regularization, arXiv:1711.05101. The
update itself is `torch.optim.AdamW`; ours is only who is decayed, and a shorter way to the same kernel.
"""

import inspect
from collections.abc import Callable
from itertools import repeat
from operator import attrgetter, is_
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from pliant.core import UsageError, check_roles
from pliant.core.roles import MIXING


class AdamW(torch.optim.AdamW):
    """`torch.optim.AdamW` to the bit, for many small parameters on a CPU.

    Most of a step of a small model goes into lists and into counting each parameter's steps. Here the counts
    lie side by side, so that one operation moves them all. What is not plain goes the way of torch.
    """

    _counts: torch.Tensor | None = None
    _ties: tuple[torch.Tensor, ...] = ()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        # The parent class wraps each step for hooks and the profiler, which costs as much as moving the parameters.
        return (_LISTENED if self._heard() else AdamW._step)(self, closure)

    step.hooked = True  # type: ignore[attr-defined]

    def _heard(self) -> bool:
        return bool(
            self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
            or torch.autograd._profiler_enabled()
        )

    def _step(self, closure: Callable[[], Any] | None = None) -> Any:
        jobs = None if closure is not None else self._plain()
        if jobs is None:
            # Without the hooks of the parent's step, since those of this one have run.
            with torch.set_grad_enabled(bool(self.defaults["differentiable"])):
                return _PARENT(self, closure)
        with torch.no_grad():
            self._tied().add_(1)
            for group, params, grads, states in jobs:
                beta1, beta2 = group["betas"]
                torch._fused_adamw_(
                    params,
                    grads,
                    [state["exp_avg"] for state in states],
                    [state["exp_avg_sq"] for state in states],
                    [],
                    [state["step"] for state in states],
                    amsgrad=False,
                    lr=group["lr"],
                    beta1=beta1,
                    beta2=beta2,
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )
        return None

    def _plain(self) -> list[tuple[Any, list[Any], list[Any], list[Any]]] | None:
        """What the fused kernel gets, group by group; None unless all parameters are plain and have moved before."""
        states = list(self.state.values())
        params = [p for group in self.param_groups for p in group["params"]]
        if not params or len(states) != len(params) or not all(map(is_, self.state, params)):
            return None
        dtype, jobs, at = params[0].dtype, [], 0
        for group in self.param_groups:
            own = group["params"]
            grads = [p.grad for p in own]
            if (
                not group["fused"]
                or group["amsgrad"]
                or group["maximize"]
                or group["differentiable"]
                or group["capturable"]
                or not group["decoupled_weight_decay"]
                or type(group["lr"]) is not float
                or any(map(is_, grads, repeat(None)))
                or any(map(attrgetter("is_sparse"), grads))
                or not all(map(attrgetter("is_cpu"), own))
                or any(map(dtype.__ne__, map(attrgetter("dtype"), own)))
            ):
                return None
            if own:
                jobs.append((group, own, grads, states[at : at + len(own)]))
            at += len(own)
        return jobs

    def _tied(self) -> torch.Tensor:
        """The counts of all parameters in one row; their states hold its elements."""
        states = list(self.state.values())
        if self._counts is None or not all(map(is_, [state["step"] for state in states], self._ties)):
            self._counts = torch.stack([state["step"] for state in states])
            self._ties = self._counts.unbind()
            for state, count in zip(states, self._ties, strict=True):
                state["step"] = count
        return self._counts


_LISTENED = torch.optim.Optimizer.profile_hook_step(AdamW._step)
_PARENT = inspect.unwrap(torch.optim.AdamW.step)


def adamw(
    model: nn.Module, lr: float = 2e-3, *, weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.99)
) -> AdamW:
    """`torch.optim.AdamW` that decays the weights which mix, and neither gains, biases nor recurrence decays.

    Args:
        model: has `roles()`.
        lr: rate per update.
        weight_decay: decoupled decay of parameters with a mixing role, per update in units of lr.
        betas: decay of the first and the second moment per update. The second is shorter than the
            usual 0.999, whose memory of 1,000 updates is long beside a changing stream.

    Raises:
        UsageError: lr is not positive.
    """
    if not lr > 0:
        raise UsageError(f"adamw: lr is {lr}, expected a number above 0")
    roles = model.roles()  # type: ignore[operator]
    check_roles(model, roles)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[roles[name] in MIXING].append(parameter)
    # One pass over all parameters; torch has no such form for complex ones.
    fused = all(parameter.is_floating_point() for parameter in model.parameters())
    return AdamW(
        [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}],
        lr=lr,
        betas=betas,
        fused=fused,
    )
