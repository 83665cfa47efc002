"""Int8 weights for inference: a quarter of what a step reads."""

import copy
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor, nn

from pliant.core import UsageError
from pliant.kernels._few_rows import linear_int8, to_int8

M = TypeVar("M", bound=nn.Module)


class QuantizedLinear(nn.Module):
    """x Wᵀ + b with W as int8 and one scale per output: each weight is off by at most 1/254 of the largest of its row.

    Inputs and sums stay floats. `(..., K) -> (..., N)`; gradients flow to x, and there is no parameter to learn.
    """

    int8: Tensor
    scale: Tensor
    bias: Tensor | None

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight, scale = to_int8(linear.weight)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("int8", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().clone())

    @property
    def weight(self) -> Float[Tensor, "N K"]:
        """The weights as floats, for modules that read them by name."""
        return self.int8 * self.scale[:, None]

    def forward(self, x: Float[Tensor, "*S K"]) -> Float[Tensor, "*S N"]:
        return linear_int8(x, self.int8, self.scale, self.bias)


def quantize_weights(model: M, *, least: int = 1 << 14) -> M:
    """A copy of `model` for inference, whose linear layers have int8 weights; `model` stays as it is.

    Every `nn.Linear` with `least` weights or more is exchanged, wherever it is: symmetric, one scale per output.

    Raises:
        UsageError: the model has no linear layer of that size within.
    """
    model = copy.deepcopy(model)
    found = [
        (part, name, child)
        for part in model.modules()
        for name, child in part.named_children()
        if isinstance(child, nn.Linear) and child.weight.numel() >= least
    ]
    if not found:
        raise UsageError(f"quantize_weights: the model has no linear layer of {least} weights or more within")
    for part, name, child in found:
        setattr(part, name, QuantizedLinear(child))
    return model.eval()
