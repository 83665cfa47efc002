"""What every mixer and model promises, as one suite; a row in a file of cases is one method.

A case knows how to make a module and inputs for it. Comparisons between two ways of computing the
same are to `close`, whose tolerance is a few roundings of the dtype on values of order one.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import leaves, seeded

ROUNDINGS = 256
"""Roundings allowed between two orders of the same sums; the longest sum here has about so many terms."""


class Case(NamedTuple):
    """One row: `make()` builds the module, `features` is the trailing size of its inputs."""

    name: str
    make: Callable[[], Any]
    features: int

    def module(self, dtype: torch.dtype = torch.float32) -> Any:
        with seeded(0, self.name):
            module = self.make()
            # Nothing may be right only because a weight starts at zero.
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return module.to(dtype)


def close(one: Tensor, two: Tensor, scale: float = 1.0) -> None:
    """Equal up to rounding; flags and counters to the bit."""
    one, two = one.detach(), two.detach()
    assert one.shape == two.shape
    assert one.dtype == two.dtype
    if not one.is_floating_point():
        assert one.equal(two)
        return
    size = max(1.0, float(two.abs().max()) if two.numel() else 1.0)
    tolerance = ROUNDINGS * torch.finfo(one.dtype).eps * size * scale
    assert not one.isnan().any()
    worst = float((one - two).abs().max()) if one.numel() else 0.0
    assert worst <= tolerance, f"differ by {worst:.2e}, allowed {tolerance:.2e}"


def same_state(one: Any, two: Any) -> None:
    pairs = zip(leaves(one), leaves(two), strict=True)
    for (name, a), (other, b) in pairs:
        assert name == other
        close(a, b)


def equal_states(one: Any, two: Any) -> bool:
    return all(a.equal(b) for (_, a), (_, b) in zip(leaves(one), leaves(two), strict=True))


class World(NamedTuple):
    """Inputs of one run: x `(B, T, *E, F)`, flags `(B, T)`, and where to cut it into chunks."""

    x: Tensor
    reset: Tensor | None
    mask: Tensor | None
    cuts: Sequence[int]

    @property
    def flags(self) -> dict[str, Tensor | None]:
        return {"reset": self.reset, "mask": self.mask}

    def chunks(self) -> list[tuple[Tensor, dict[str, Tensor | None]]]:
        edges = [0, *sorted(self.cuts), self.x.shape[1]]
        spans = [slice(a, b) for a, b in pairwise(edges)]
        return [
            (self.x[:, span], {name: None if flag is None else flag[:, span] for name, flag in self.flags.items()})
            for span in spans
        ]


@st.composite
def worlds(draw: st.DrawFn, features: int, dtype: torch.dtype, extras: Sequence[tuple[int, ...]]) -> World:
    batch, steps = draw(st.integers(1, 3)), draw(st.integers(1, 12))
    extra = draw(st.sampled_from(extras))
    random = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    x = torch.randn(batch, steps, *extra, features, generator=random, dtype=torch.float64).to(dtype)
    share = draw(st.sampled_from([0.0, 0.2, 0.6]))
    reset = torch.rand(batch, steps, generator=random) < share if draw(st.booleans()) else None
    mask = torch.rand(batch, steps, generator=random) >= share if draw(st.booleans()) else None
    return World(x, reset, mask, draw(st.lists(st.integers(0, steps), max_size=4)))


def in_chunks(module: Any, world: World, state: Any = None) -> tuple[Tensor, Any]:
    outputs = []
    for x, flags in world.chunks():
        y, state = module(x, state, **flags)
        outputs.append(y)
    return torch.cat(outputs, 1), state


def in_steps(module: Any, world: World, state: Any = None) -> tuple[Tensor, Any]:
    outputs = []
    for t in range(world.x.shape[1]):
        flags = {name: None if flag is None else flag[:, t] for name, flag in world.flags.items()}
        y, state = module.step(world.x[:, t], state, **flags)
        outputs.append(y)
    return torch.stack(outputs, 1), state
