"""Hidden units: which weights make each of them, and which read it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Units:
    """Units that one linear map reads.

    Attributes:
        reader: its input feature j is the activation of unit j; column j of its weight is what leaves the unit.
        writers: linear maps and the first of their rows; row `first + j` of each is a part of what enters unit j.
    """

    reader: nn.Linear
    writers: tuple[tuple[nn.Linear, int], ...]

    @property
    def number(self) -> int:
        return self.reader.in_features


_BETWEEN = (
    nn.ReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus,
    nn.Hardtanh, nn.Hardswish, nn.PReLU, nn.Identity, nn.Dropout, nn.LayerNorm, nn.RMSNorm, nn.BatchNorm1d,
)  # fmt: skip
"""Modules between two linear maps that leave units where they are."""


def units_of(module: nn.Module) -> list[Units]:
    """Hidden units of a module, in order: as its parts declare them by `units()`, and in each `nn.Sequential`."""
    if callable(declare := getattr(module, "units", None)):
        return list(declare())
    if not isinstance(module, nn.Sequential):
        return [one for child in module.children() for one in units_of(child)]
    found: list[Units] = []
    before: nn.Linear | None = None
    for part in _flat(module):
        if isinstance(part, nn.Linear):
            if before is not None and before.out_features == part.in_features:
                found.append(Units(part, ((before, 0),)))
            before = part
        elif not isinstance(part, _BETWEEN):
            found += units_of(part)
            before = None
    return found


def _flat(module: nn.Sequential) -> Iterator[nn.Module]:
    for part in module:
        if isinstance(part, nn.Sequential) and not callable(getattr(part, "units", None)):
            yield from _flat(part)
        else:
            yield part


def of_steps(h: Tensor, mask: Tensor | None) -> Tensor:
    """Rows `(n, d)` of steps that exist, `mask` `(B, T)`; all, if a row does not stand for steps alone."""
    if mask is None or len(h) % max(1, mask.numel()) or bool(mask.all()):
        return h
    return h[mask.flatten().repeat_interleave(len(h) // mask.numel())]


@contextmanager
def activations(units: list[Units]) -> Iterator[list[Tensor | None]]:
    """What each of `units` was at the last call within, `(rows, number)`; no trace is left."""
    seen: list[Tensor | None] = [None] * len(units)
    hooks = []
    for i, one in enumerate(units):

        def keep(module: nn.Module, inputs: tuple[Tensor, ...], i: int = i) -> None:
            seen[i] = inputs[0].detach().reshape(-1, inputs[0].shape[-1])

        hooks.append(one.reader.register_forward_pre_hook(keep))
    try:
        with torch.no_grad():
            yield seen
    finally:
        for hook in hooks:
            hook.remove()
