"""What is measured: a problem, and ways to compute it."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """B streams, T steps, width D."""

    batch: int = 4
    steps: int = 512
    width: int = 64


@dataclass(frozen=True)
class Problem:
    """Inputs by name; gradients are taken with regard to those that are no flags, and to what `module` holds."""

    inputs: dict[str, Tensor]
    once: dict[str, Tensor]
    """The inputs of a single step, for a kernel `(B, 1, ...)`, else `(B, ...)`."""
    module: nn.Module | None = None


@dataclass(frozen=True)
class Work:
    """A way to compute a problem, with everything in place but the call.

    Attributes:
        forward: gives y, with nothing kept for a backward pass.
        both: gives y, and by name (`dx` for x) the gradients of the sum of y times `weights_like(y)`.
        step: gives the y of a single step; None if there is no such thing.
        inputs: what gradients are taken of.
        step_bytes: what a single step has to read and write.
        torch: whether autograd of torch makes the backward pass, so that what it keeps can be counted.
    """

    forward: Callable[[], Any]
    both: Callable[[], Mapping[str, Any]]
    step: Callable[[], Any] | None = None
    inputs: Mapping[str, Tensor] | None = None
    step_bytes: int = 0
    torch: bool = True


@dataclass(frozen=True)
class Case:
    """Something of ours that is measured.

    Attributes:
        name: what it is called.
        forms: ways to compute it that are timed; the first is the one that is used where nobody asks.
        readable: the way that all others have to equal.
        problem: inputs of some sizes and float type, the same numbers at every call.
        work: a way to compute a problem.
    """

    name: str
    forms: tuple[str, ...]
    readable: str
    problem: Callable[[Sizes, torch.dtype], Problem]
    work: Callable[[Problem, str], Work]


def weights_like(y: Tensor) -> Tensor:
    """Weights of the outputs in the loss, the same for all that compute the same: cosines of 0, 1, 2, ..."""
    return torch.arange(y.numel(), dtype=torch.float64).cos().float().to(y.dtype).reshape(y.shape)


def torch_work(
    run: Callable[[], Tensor], inputs: Mapping[str, Tensor], step: Callable[[], Tensor] | None = None, **more: Any
) -> Work:
    """The work of a function that torch can differentiate with regard to `inputs`."""
    leaves = {name: x.requires_grad_() for name, x in inputs.items() if x.is_floating_point()}

    def forward() -> Tensor:
        with torch.no_grad():
            return run()

    def once() -> Tensor:
        assert step is not None
        with torch.no_grad():
            return step()

    weights = weights_like(forward())

    def both() -> dict[str, Tensor]:
        y = run()
        grads = torch.autograd.grad(y, list(leaves.values()), weights, materialize_grads=True)
        return {"y": y.detach(), **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)}}

    return Work(forward, both, None if step is None else once, inputs, **more)


def nbytes(*tensors: Tensor) -> int:
    """Bytes of all elements."""
    return sum(x.numel() * x.element_size() for x in tensors)
