"""Upkeep in a training loop that is not ours: it hangs on the optimizer's step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import Question, Role, UsageError, generator
from pliant.core.roles import prefix, roles_of
from pliant.optim.base import Probe, Upkeep


class Attached:
    """Upkeep that follows an optimizer, made by `attach`.

    Attributes:
        updates: steps of the optimizer since it was attached.
        reports: what each upkeep said after the last step.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, model: "_Called", keep: Sequence[Upkeep], seed: int):
        self.updates = 0
        self.reports: tuple[dict[str, Any], ...] = ()
        self._model, self._keep = model, list(keep)
        self._generator = generator(seed, "attach")
        self._nats = float("nan")
        for upkeep in self._keep:
            if type(upkeep).gradient is not Upkeep.gradient:
                raise UsageError(
                    f"attach: {type(upkeep).__name__} learns from answers, which only a Learner has to give"
                )
            upkeep.init(model, optimizer)
        optimizer.register_step_post_hook(self._after_step)

    def tell(self, nats: float) -> None:
        """Say how badly it goes, which is what detectors of change listen to; the next step uses it up.

        Args:
            nats: the loss of the coming update, or anything else that rises when the world has changed, such as minus
                the return of the episodes that ended since the last call. Steps without one are passed over.
        """
        self._nats = float(nats)

    @torch.no_grad()
    def _after_step(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        self.updates += 1
        probe = Probe(self.updates, self._generator, self._model.question(self.updates), self._nats)
        self._nats = float("nan")
        self.reports = tuple(upkeep.apply(self._model, optimizer, probe) for upkeep in self._keep)

    def state_dict(self) -> dict[str, Any]:
        """All that moves, to be saved beside the model and the optimizer."""
        return {
            "updates": self.updates,
            "generator": self._generator.get_state(),
            "keep": [upkeep.state_dict() for upkeep in self._keep],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.updates = state["updates"]
        self._generator.set_state(state["generator"])
        for upkeep, saved in zip(self._keep, state["keep"], strict=True):
            upkeep.load_state_dict(saved)


def attach(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    keep: Sequence[Upkeep],
    *,
    roles: Mapping[str, Role] | None = None,
    seed: int = 0,
) -> Attached:
    """Have each step of `optimizer` end with `keep`, whoever calls it; for trainers and agents of other packages.

    Nothing in the loop has to change. Upkeep that listens for a change needs `Attached.tell` once in a while; upkeep
    that looks at units sees the inputs of the last call of `model` with gradients. A wrapper of the optimizer, such as
    `normalize_and_project`, comes first. A loop that sets rates itself overrides upkeep that does. With `Learner`, give
    it `keep=` instead: it can be saved and forked as a whole.

    Args:
        optimizer: over parameters of `model`, before its first step.
        model: any module; it is not changed, and holds nothing of this.
        keep: applied in this order after each step.
        roles: of parameters by name, for a model whose parts do not tell them all, or tell them wrong: an agent with
            two outputs has two heads, of which only the last is known as one.
        seed: of the generator that upkeep draws from.

    Raises:
        UsageError: roles are not known, or an upkeep does not fit the model.
    """
    return Attached(optimizer, _Called(model, roles), keep, seed)


class _Called(nn.Module):
    """A module of whatever kind, called as ours are: its arguments are those of its last call with gradients."""

    def __init__(self, model: nn.Module, roles: Mapping[str, Role] | None):
        super().__init__()
        self.model = model
        self._roles = prefix("model", roles_of(model, roles))
        self._last: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        model.register_forward_pre_hook(self._remember, with_kwargs=True)

    def _remember(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.is_grad_enabled():
            # Without their graph, which would be kept alive.
            self._last = tuple(map(_apart, args)), {name: _apart(value) for name, value in kwargs.items()}

    def roles(self) -> dict[str, Role]:
        return self._roles

    def question(self, time: int) -> Question:
        """The inputs of the last call, if its first argument is a tensor `(B, ...)`; else nothing."""
        args, kwargs = self._last
        first = next(iter((*args, *kwargs.values())), None)
        inputs = first.detach() if isinstance(first, Tensor) and first.ndim else torch.zeros(0)
        flags = torch.zeros(len(inputs), 1, dtype=torch.bool)
        return Question(inputs, reset=flags, mask=~flags, time=time, rows=torch.arange(len(inputs)))

    def forward(self, inputs: Tensor, state: Any = None, *, reset: Any = None, mask: Any = None) -> tuple[Any, Any]:
        args, kwargs = self._last
        if not args and not kwargs:
            raise UsageError(
                f"attach: upkeep looks at the units of {type(self.model).__name__}, which nobody has called; "
                "attach the part of it that the loop calls"
            )
        return self.model(*args, **kwargs), state


def _apart(value: Any) -> Any:
    return value.detach() if isinstance(value, Tensor) else value
