"""The contract of a layer that mixes over time."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from pliant.core import Role, UsageError, check_batch


class SequenceMixer(nn.Module, ABC):
    """Mixes over time and nothing else. `(B, T, *E, D) -> (B, T, *E, D)`.

    One call serves a whole sequence, any chunks of it and single steps, with the same numbers and
    the same final state. Extra axes E (patches of a frame) share time and are mixed separately.

    - `reset` `(B, T)`: a new episode starts at this step; whatever came before is forgotten.
    - `mask` `(B, T)`: where false, the step does not exist; the state passes through untouched and
      the output is zero. A reset counts even on a masked step.
    - `state=None`, `init_state(B, E)` and a reset mean the same.

    Write your own: subclass, implement the three abstract methods, add a row to
    `tests/mixers/cases.py`, and the conformance suite tells what is missing.
    """

    width: int
    """D, the number of features that go in and come out."""

    @abstractmethod
    def init_state(self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None) -> Any:
        """State of `batch` fresh streams with extra axes `extra`."""

    @abstractmethod
    def forward(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """Outputs and the state after the last step; `state` itself stays as it was."""

    @abstractmethod
    def roles(self) -> dict[str, Role]:
        """What each parameter is for, by name."""

    def traceable(self) -> dict[str, tuple[str, ...]]:
        """Groups of parameters whose traces this mixer can carry, and which kinds of them, the default first.

        "exact": all of the derivative of the state; "own": what stays within its channel; "instant": none, so that a
        gradient ends at the border of its chunk. A group is what its parameters' names begin with.
        """
        return {}

    def advance_traces(
        self,
        traces: Mapping[str, Tensor] | None,
        x: Tensor,
        state: Any,
        kinds: Mapping[str, str] | None = None,
        *,
        reset: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Derivatives of the state after `x`, inputs held fixed, from those of `state`; see `pliant.kernels._traces`.

        Args:
            traces: of `state`, streams on axis 0; None for a fresh state or one that nothing is known about.
            x, state, reset, mask: as `forward` gets them.
            kinds: of each group of `traceable`; None means the defaults.
        """
        return {}

    def kinds(self, given: Mapping[str, str] | None) -> dict[str, str]:
        """The kind of trace of each group: the default where none is given."""
        return {group: offered[0] for group, offered in self.traceable().items()} | dict(given or {})

    def trace_gradients(self, traces: Mapping[str, Tensor], state: Any, dstate: Any) -> dict[str, Tensor]:
        """Gradients of parameters by way of `state`, summed over streams: dL/dstate times the traces.

        Args:
            traces, state: at the border; dstate: dL/dstate, like `state`, None for a leaf that is no float.
        """
        return {}

    @final
    def step(
        self, x: Tensor, state: Any = None, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        """One time step: `forward` with T = 1. x `(B, *E, D)`, reset and mask `(B,)` -> y `(B, *E, D)`, state."""
        return forward_once(self, x, state, reset=reset, mask=mask)

    def start(self, x: Tensor, state: Any, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Any]:
        """Check the arguments of `forward`; return x with zeros where masked, and the state to begin with.

        Raises:
            UsageError: x, reset, mask or state do not fit; the message says how.
        """
        name = type(self).__name__
        if x.ndim < 3 or x.shape[-1] != self.width:
            raise UsageError(
                f"{name}: x is {tuple(x.shape)}, expected (B, T, ..., {self.width}); use step for one time step"
            )
        check_flags(name, x, reset=reset, mask=mask)
        if mask is not None:
            x = where_steps(mask, x)
        if state is None:
            return x, self.init_state(x.shape[0], tuple(x.shape[2:-1]), device=x.device)
        check_batch(state, x.shape[0], name)
        return x, state


def exportable(*states: type) -> None:
    """Give named tuples a name in files of `torch.export.save`, so that programs that carry them can be saved."""
    for state in states:
        _register_namedtuple(state, serialized_type_name=f"{state.__module__}.{state.__qualname__}")


def forward_once(module: Any, x: Tensor, state: Any, *, reset: Tensor | None, mask: Tensor | None) -> tuple[Any, Any]:
    """Call a mixer or model on one step, without the time axis."""
    reset, mask = (None if flag is None else flag.unsqueeze(1) for flag in (reset, mask))
    y, state = module(x.unsqueeze(1), state, reset=reset, mask=mask)
    return y.squeeze(1), state


def side_by_side(x: Tensor) -> Tensor:
    """x `(B, T, *E, C)` as `(B, T, S, C)`: extra axes are units that share parameters and time."""
    return x.reshape(*x.shape[:2], math.prod(x.shape[2:-1]), x.shape[-1])


def where_steps(flag: Tensor, x: Tensor) -> Tensor:
    """x `(B, T, ...)` where `flag` `(B, T)` holds, zero elsewhere, so that nothing non-finite gets through."""
    return torch.where(over_steps(flag, x), x, 0)


def over_steps(flag: Tensor, x: Tensor) -> Tensor:
    """`flag` `(B, T)` shaped so that it broadcasts over the other axes of x `(B, T, ...)`."""
    return flag.reshape(*flag.shape, *[1] * (x.ndim - 2))


def check_flags(name: str, x: Tensor, **flags: Tensor | None) -> None:
    """Raise `UsageError` unless each flag is None or a bool tensor `(B, T)` like x."""
    for which, flag in flags.items():
        if flag is not None and (flag.shape != x.shape[:2] or flag.dtype != torch.bool):
            raise UsageError(
                f"{name}: {which} is {flag.dtype} {tuple(flag.shape)}, expected torch.bool {tuple(x.shape[:2])}"
            )


def steps_since_reset(count: Tensor, steps: int, reset: Tensor | None, mask: Tensor | None) -> Tensor:
    """Existing steps of the running episode, at every step. count `(B,)` int64 carried in -> `(B, T)`."""
    shape = (count.shape[0], steps)
    reset = torch.zeros(shape, dtype=torch.bool, device=count.device) if reset is None else reset
    mask = torch.ones(shape, dtype=torch.bool, device=count.device) if mask is None else mask
    if steps == 0:
        return count.new_zeros(shape)
    existing = count[:, None] + mask.long().cumsum(1)
    # Counts only grow, so the running maximum is the count before the latest reset.
    return existing - torch.where(reset, existing - mask.long(), 0).cummax(1).values


def first_steps(fresh: Tensor, steps: int, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Which steps are the first of an episode, and whether each stream is fresh afterwards.

    fresh `(B,)` bool, reset and mask `(B, T)` or None -> `(B, T)` bool, `(B,)` bool. A stream is
    fresh while no step has existed since its start or its last reset.
    """
    count = steps_since_reset((~fresh).long(), steps, reset, mask)
    if steps == 0:
        return count.bool(), fresh
    first = count == 1 if mask is None else mask & (count == 1)
    return first, count[:, -1] == 0
