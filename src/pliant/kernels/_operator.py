"""Operators that PyTorch knows: it sees one node where we run a kernel of our own."""

from collections.abc import Callable
from typing import Any

import torch
from torch._C import _functorch as functional
from torch.autograd import forward_ad

TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_fixed_stride_order)


class Operator:
    """What `torch.library.custom_op` makes, with the same methods, for a kernel on the CPU that changes no argument.

    That one imports the whole compiler of PyTorch at the first call, which takes longer than all kernels of a process
    together, and wraps every call, which takes as long as a small kernel.
    """

    def __init__(self, name: str, kernel: Callable[..., Any]):
        self._name, self._gradients, self._setup = name, None, None
        torch.library.define(name, torch.library.infer_schema(kernel, mutates_args=()), tags=TAGS)
        torch.library.impl(name, "cpu")(kernel)
        torch.library.register_autograd(name, self._backward, setup_context=self._keep)
        space, own = name.split("::")
        self._call = getattr(getattr(torch.ops, space), own).default

    def __call__(self, *arguments: Any) -> Any:
        if forward_ad._current_level >= 0:  # whose tangents PyTorch would drop without a word
            given = (x for x in arguments if isinstance(x, torch.Tensor) and x.dtype != torch.bool)
            if any(forward_ad.unpack_dual(x).tangent is not None for x in given):
                raise RuntimeError(f"{self._name} has no derivatives in forward mode; they need the readable form")
        refuse_functional_gradients(self._name)
        return self._call(*arguments)

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """`function` makes outputs of the right shapes and dtypes."""
        torch.library.register_fake(self._name)(function)
        return function

    def register_autograd(self, gradients: Callable[..., Any], *, setup_context: Callable[..., Any]) -> None:
        """`gradients(ctx, *grads)` of the arguments, after `setup_context(ctx, inputs, output)`."""
        self._gradients, self._setup = gradients, setup_context  # type: ignore[assignment]

    def _keep(self, ctx: Any, inputs: Any, output: Any) -> None:
        if self._setup is not None:
            self._setup(ctx, inputs, output)

    def _backward(self, ctx: Any, *grads: Any) -> Any:
        if self._gradients is None:
            raise RuntimeError(f"{self._name} has no gradient; gradients of gradients need the readable form")
        return self._gradients(ctx, *grads)


def transformed() -> bool:
    """Whether `torch.func` is at work, whose tensors are not the memory that a kernel would read."""
    return not torch.compiler.is_compiling() and functional.maybe_current_level() is not None


def refuse_functional_gradients(name: str) -> None:
    """Raise where `torch.func` takes gradients: PyTorch would as well, without a word about what to do instead."""
    if not transformed():
        return
    if any(level.key() == functional.TransformType.Grad for level in functional.get_interpreter_stack() or ()):
        raise RuntimeError(
            f'{name} has no gradients for torch.func; choose the readable form, form="loop", or torch.autograd.grad'
        )


def operator(name: str) -> Callable[[Callable[..., Any]], Operator]:
    """The kernel as an operator `name`, which is `pliant::` and its own."""
    return lambda kernel: Operator(name, kernel)
