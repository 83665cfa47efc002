"""Kernels choose their own precision, whatever autocast says."""

from collections.abc import Callable
from functools import wraps
from itertools import chain
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


def own_precision(kernel: Callable[P, R]) -> Callable[P, R]:
    """`kernel` with autocast off: sums of decays, states and all that stands beside them need float32 at least."""

    @wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        device = next((x.device.type for x in chain(args, kwargs.values()) if isinstance(x, Tensor)), "cpu")
        if not torch.is_autocast_enabled(device):
            return kernel(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return kernel(*args, **kwargs)

    return run
