"""Blocks of a model as arrays, for steps in one pass; looked at anew before each, so what is kept only saves time."""

from collections.abc import Callable
from itertools import chain
from typing import Any, Generic, TypeVar

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

A = TypeVar("A")


class Kept(Generic[A]):
    """What `make` gave for a module, made anew when a part or a tensor of it is another one, or lies elsewhere.

    None while somebody listens to a part of it, who would not be called. Not copied with the module, nor saved.
    """

    def __init__(self, make: Callable[[nn.Module], A | None]):
        self._make = make
        self._seen: tuple[Any, ...] | None = None
        self._made: A | None = None

    def __reduce__(self) -> Any:
        return Kept, (self._make,)

    def of(self, module: nn.Module) -> A | None:
        if _has_any_global_hook():
            return None
        if self._seen is None or self._look() != self._seen:
            parts = list(module.modules())
            self._parts = [part._modules for part in parts]
            self._tensors = [tensors for part in parts for tensors in (part._parameters, part._buffers)]
            names = ("_forward_hooks", "_forward_pre_hooks")
            self._hooks = [getattr(part, name) for part in parts[1:] for name in names]
            self._overrides = [part.__dict__ for part in parts[1:]]
            self._seen, self._made = self._look(), self._make(module)
        if any(self._hooks) or any("forward" in own for own in self._overrides):
            return None
        return self._made

    def _look(self) -> tuple[Any, ...]:
        """The parts, which are held and so keep their identity, and where the tensors lie."""
        parts = tuple(chain.from_iterable(part.values() for part in self._parts))
        return parts, tuple(None if t is None else (t.data_ptr(), t.dtype) for t in chain.from_iterable(
            tensors.values() for tensors in self._tensors))  # fmt: skip
