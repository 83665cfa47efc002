"""The oracle of resets and masks: run only the steps that exist, and begin anew at each reset.

A mixer that agrees with it cannot be wrong in the same way twice, since the oracle calls the mixer
without any flags (further-mixers.md, section 0).
"""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from pliant.core import stack, take
from tests.suite import World, close, same_state


def compacted(
    module: Any, x: Tensor, state: Any = None, *, reset: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Any]:
    """Outputs and last state by runs over the existing steps alone; arguments as `SequenceMixer.forward`."""
    none = torch.zeros(x.shape[:2], dtype=torch.bool)
    reset = none if reset is None else reset
    mask = ~none if mask is None else mask
    outputs, states = [], []
    for b in range(x.shape[0]):
        start = None if state is None else take(state, torch.tensor([b]))
        y, after = _stream(module, x[b : b + 1], start, reset[b], mask[b])
        outputs.append(y)
        states.append(after)
    return torch.cat(outputs), stack(states)


def _stream(module: Any, x: Tensor, state: Any, reset: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
    fresh = module.init_state(1, tuple(x.shape[2:-1]))
    state = fresh if state is None else state
    y = None
    # Episodes begin at resets, on masked steps too; what stands before the first goes on from the state.
    edges = [0, *reset.nonzero()[:, 0].tolist(), x.shape[1]]
    for start, end in pairwise(edges):
        state = fresh if start < x.shape[1] and reset[start] else state
        here = start + mask[start:end].nonzero()[:, 0]
        if len(here):
            found, state = module(x[:, here], state)
            y = found.new_zeros(1, x.shape[1], *found.shape[2:]) if y is None else y
            y = y.index_copy(1, here, found)
    return (torch.zeros_like(x) if y is None else y), state


def agrees_with_compaction(module: Any, world: World, state: Any = None) -> None:
    """Assert that `module` on `world` gives the outputs and the last state of `compacted`."""
    y, after = module(world.x, state, **world.flags)
    expected, last = compacted(module, world.x, state, **world.flags)
    close(y, expected)
    same_state(after, last)
