"""Mean mixing distance: how many steps back a layer looks, by its derivatives.

    d = sum_{n ≤ m} |J_{m,n}| (m - n) / sum_{n ≤ m} |J_{m,n}|,   J_{m,n} = dy_m / dx_n

for one output channel, |J| summed over the input channels; the mean over output channels. A delay of τ steps has τ, a
decaying average with h_t = a h_{t-1} + x_t has a / (1 - a).

Paper: Karami et al. 2025, MS-SSM, arXiv:2512.23824; ms-ssm.md 2.9. Its denominator is |sum J|, with which distances do
not add up to a mean where J changes its sign; `printed` takes that.
"""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from pliant.core import UsageError, generator


def mixing_distance(
    layer: Callable[[Tensor], Any],
    x: Float[Tensor, "B T ..."],
    *,
    channels: int | None = None,
    printed: bool = False,
    seed: int = 0,
) -> Float[Tensor, "B"]:
    """Of the last step, for each stream, in steps; NaN where it depends on no step at all.

    Args:
        layer: from `(B, T, ...)` to `(B, T, ...)`, or to a tuple that begins with that, as our mixers.
        x: where the derivatives are taken; floats.
        channels: so many output channels, drawn by the seed, with one backward pass for each; None means all.
        printed: the denominator as printed.

    Raises:
        UsageError: x has no steps or is no float, the output has no gradient to it, or channels is below 1.
    """
    if channels is not None and channels < 1:
        raise UsageError(f"mixing_distance: channels is {channels}, expected at least 1, or None for all")
    if x.ndim < 2 or not x.is_floating_point() or x.shape[1] < 1:
        raise UsageError(f"mixing_distance: x is {x.dtype} {tuple(x.shape)}, expected floats (B, T, ...) with steps")
    x = x.detach().requires_grad_()
    with torch.enable_grad():
        y = layer(x)
        last = (y[0] if isinstance(y, tuple) else y)[:, -1].flatten(1)
    if not last.requires_grad:
        raise UsageError("mixing_distance: the output has no gradient to the input; was it made without gradients?")
    chosen = torch.randperm(last.shape[1], generator=generator(seed, "mixing/channels"))[:channels].tolist()
    age = torch.arange(x.shape[1] - 1, -1, -1, dtype=torch.float64, device=x.device)
    total = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for channel in chosen:
        # Streams do not touch one another, so that one pass serves all of them.
        (J,) = torch.autograd.grad(last[:, channel].sum(), x, retain_graph=True)
        J = J.double().flatten(2) if J.ndim > 2 else J.double()[..., None]
        size = J.abs().sum((1, 2))
        total += (J.abs().sum(2) * age).sum(1) / (J.sum((1, 2)).abs() if printed else size)
    return total / len(chosen)


def mixing_distances(
    model: nn.Module, inputs: Tensor, *, channels: int | None = None, seed: int = 0, **how: Any
) -> dict[str, float]:
    """Of each layer of a model that mixes over time, on what it gets to read there: the mean over streams.

    Args:
        model: called as `model(inputs, **how)`; its outermost parts with the methods of a mixer are asked.
        inputs: as the model takes them.
        channels, seed: see `mixing_distance`.

    Raises:
        UsageError: nothing in the model is a mixer, or it was not called.
    """
    layers = _mixers(model)
    read: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any], None]:
        return lambda module, given: read.setdefault(name, given[0].detach())  # type: ignore[return-value]

    hooks = [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]
    try:
        with torch.no_grad():
            model(inputs, **how)
    finally:
        for hook in hooks:
            hook.remove()
    if not read:
        raise UsageError(f"mixing_distances: {type(model).__name__} called no part that mixes over time")
    return {name: float(mixing_distance(layers[name], x, channels=channels, seed=seed).mean())
            for name, x in read.items()}  # fmt: skip


def _mixers(model: nn.Module) -> dict[str, nn.Module]:
    """The outermost parts with the contract of a mixer."""
    found: dict[str, nn.Module] = {}
    for name, part in model.named_modules():
        contract = all(hasattr(part, method) for method in ("width", "init_state", "step"))
        if contract and not any(name.startswith(f"{outer}.") or outer == "" for outer in found):
            found[name] = part
    return found
