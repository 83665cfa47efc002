"""How far a step turns a matrix: norms, effective rates, angles.

Where a norm follows a matrix, its length says nothing and its direction everything, f(θ) = f(cθ). Then a gradient
is orthogonal to θ and shrinks as θ grows, so that a step of rate η turns θ by an angle that goes as

    η / ‖θ‖²   for plain gradient descent,        η / ‖θ‖   for steps that do not follow the scale of gradients

(RMSProp, Adam; exact for ε = 0). As matrices grow the second of these falls by itself, and with it what is learned.

Papers: Lyle et al. 2025, arXiv:2507.20057, eq. 1; Lyle et al. 2024, arXiv:2407.01800. ‖·‖ is Frobenius, of each
matrix by itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

GRADIENT, ADAPTIVE = 2, 1
"""Powers of the norm by which a rate is divided: for descent along the gradient, and for adaptive steps."""


def norms(tensors: Sequence[Tensor]) -> Tensor:
    """Frobenius norm of each tensor `(n,)`, in float32 at least; of all shards where a tensor is sharded."""
    if not tensors:
        return torch.zeros(0)
    wide = torch.float32
    for dtype in {x.dtype for x in tensors}:
        wide = torch.promote_types(wide, dtype)
    found = torch._foreach_norm(list(tensors), 2, dtype=wide)
    whole = [x.full_tensor() if hasattr(x, "full_tensor") else x for x in found]
    return torch.stack([x.real if x.is_complex() else x for x in whole])


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The part of each that this process holds: itself, or the shard of a `DTensor`, in the same memory."""
    return [x.to_local() if hasattr(x, "to_local") else x for x in tensors]


def power_of(optimizer: torch.optim.Optimizer) -> int:
    """By which power of the norm a rate is divided, from the class of an optimizer."""
    return GRADIENT if isinstance(optimizer, torch.optim.SGD) else ADAPTIVE


def angle(one: Tensor, two: Tensor) -> Tensor:
    """Angle between two tensors as vectors, in radians; exact where it is small.

    Of unit vectors u and v it is 2 atan2(‖u - v‖, ‖u + v‖), where the arc of a cosine would lose small angles.
    """
    u, v = (x.double() / torch.linalg.vector_norm(x.double()) for x in (one, two))
    return 2 * torch.atan2(torch.linalg.vector_norm(u - v), torch.linalg.vector_norm(u + v))
