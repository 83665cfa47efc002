"""AdamW with parameter groups by role.

Paper: Loshchilov & Hutter 2019, Decoupled weight decay regularization, arXiv:1711.05101. The
update itself is `torch.optim.AdamW`; ours is only who is decayed.
"""

import torch
from torch import nn

from pliant.core import UsageError, check_roles
from pliant.core.roles import MIXING


def adamw(
    model: nn.Module, lr: float = 2e-3, *, weight_decay: float = 0.01, betas: tuple[float, float] = (0.9, 0.99)
) -> torch.optim.AdamW:
    """`torch.optim.AdamW` that decays the weights which mix, and neither gains, biases nor recurrence decays.

    Args:
        model: has `roles()`.
        lr: rate per update.
        weight_decay: decoupled decay of parameters with a mixing role, per update in units of lr.
        betas: decay of the first and the second moment per update. The second is shorter than the
            usual 0.999, whose memory of 1,000 updates is long beside a changing stream.

    Raises:
        UsageError: lr is not positive.
    """
    if not lr > 0:
        raise UsageError(f"adamw: lr is {lr}, expected a number above 0")
    roles = model.roles()  # type: ignore[operator]
    check_roles(model, roles)
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[roles[name] in MIXING].append(parameter)
    # One pass over all parameters; torch has no such form for complex ones.
    fused = all(parameter.is_floating_point() for parameter in model.parameters())
    return torch.optim.AdamW(
        [{"params": groups[True], "weight_decay": weight_decay}, {"params": groups[False], "weight_decay": 0.0}],
        lr=lr,
        betas=betas,
        fused=fused,
    )
