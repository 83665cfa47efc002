"""What gradients on a probe tell: whether examples pull together, and how curved the loss is.

A model is asked through a function from its parameters to the losses of n examples, so that nothing is moved: trials
with other parameters happen beside it.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call

from pliant.core import generator
from pliant.measure.features import needed, singular_values

Losses = Callable[[Mapping[str, Tensor]], Tensor]
"""From parameters by name to the losses of n examples, `(n,)`."""
EXAMPLES, ITERATIONS = 32, 10


def losses_of(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    state: Any = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Losses:
    """The losses of a model on a probe, one for each place that has a known target.

    Args:
        model: one of ours is called with `state`, `reset` and `mask`, any other with `inputs` alone.
        inputs: as the model takes them.
        targets: as the loss takes them.
        state: of the streams before them; None is fresh.
        reset: `(B, T)` bool.
        mask: `(B, T)` bool, true where a step exists.
        known: where a target is known, of the shape of the losses; None: wherever a step exists.
        loss: (output, targets) -> one loss per place; None takes `model.nats`.
    """
    nats = model.nats if loss is None else loss
    known = mask if known is None else known

    def losses(parameters: Mapping[str, Tensor]) -> Tensor:
        if hasattr(model, "init_state"):
            flags = {"reset": reset, "mask": mask}
            output, _ = functional_call(model, dict(parameters), (inputs, state), flags)
        else:
            output = functional_call(model, dict(parameters), (inputs,))
        found = nats(output, targets)  # type: ignore[operator]
        return found.flatten() if known is None else found[known].flatten()

    return losses


def parameters_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by name, as tensors that share their memory and whose gradients are asked for here alone."""
    return {name: p.detach().requires_grad_() for name, p in model.named_parameters() if p.requires_grad}


def example_gradients(losses: Losses, parameters: Mapping[str, Tensor], most: int = EXAMPLES) -> Float[Tensor, "n P"]:
    """Gradients of the losses of `most` examples, evenly spread over all there are; one backward pass for each."""
    with torch.enable_grad():
        found = losses(parameters)
    places = torch.linspace(0, len(found) - 1, min(most, len(found))).round().long().tolist()
    return torch.stack([_gradient(found[i], parameters, keep=True) for i in places])


def gradient_covariance(gradients: Float[Tensor, "n P"], delta: float = 0.01) -> dict[str, float]:
    """Of gradients g_i with C_ij = <g_i, g_j> / (‖g_i‖ ‖g_j‖): Lyle et al. 2023, arXiv:2303.01486, section 4.

    `gradient cosine` is the mean of C off its diagonal: 1 where all examples pull the same way and the network can no
    longer tell them apart. `gradient rank` is the least number of singular values of the directions g_i / ‖g_i‖ that
    hold 1 - δ of their sum, over n. `gradient norm` is that of the mean gradient. Examples without a gradient
    count for the norm alone; both others are NaN if less than two are left.
    """
    lengths = gradients.double().norm(dim=1)
    found = {"gradient cosine": torch.nan, "gradient rank": torch.nan}
    units = gradients.double()[lengths > 0] / lengths[lengths > 0, None]
    if (n := len(units)) > 1 and bool(units.isfinite().all()):
        cosines = units @ units.mT
        found["gradient cosine"] = float((cosines.sum() - cosines.trace()) / (n * (n - 1)))
        found["gradient rank"] = needed(singular_values(units), delta) / n
    return found | {"gradient norm": float(gradients.double().mean(0).norm())}


def sharpness(losses: Losses, parameters: Mapping[str, Tensor], iterations: int = ITERATIONS, seed: int = 0) -> float:
    """The eigenvalue of largest size of the Hessian of the mean loss, by power iteration; few iterations fall short.

    Hessian-vector products come from autograd; where it has no second derivatives, as of our kernels, they are
    (∇L(θ + εv) - ∇L(θ - εv)) / 2ε with ‖v‖ = 1 and ε the cube root of the rounding error.

    Its part in the loss of plasticity: Lewandowski et al. 2023, arXiv:2312.00246.

    Args:
        losses: of the probe.
        parameters: where.
        iterations: at least 1; each takes as long as two gradients.
        seed: of the first direction.
    """
    flat = torch.cat([p.detach().flatten() for p in parameters.values()])
    v = torch.randn(flat.shape, generator=generator(seed, "sharpness"), dtype=flat.dtype)
    times_hessian = _exact(losses, parameters) or _differences(losses, parameters, flat)
    value = 0.0
    for _ in range(iterations):
        v = v / v.norm().clamp(min=torch.finfo(v.dtype).tiny)
        product = times_hessian(v)
        value, v = float(v @ product), product
    return value


def _exact(losses: Losses, parameters: Mapping[str, Tensor]) -> Callable[[Tensor], Tensor] | None:
    """Hessian times a vector; None if some part of the loss has no second derivative."""
    with torch.enable_grad():
        gradient = _gradient(losses(parameters).mean(), parameters, again=True)

    def product(v: Tensor) -> Tensor:
        return _gradient(gradient @ v, parameters, keep=True)

    try:
        # To every leaf, since a part that refuses would be passed by on the way to some, and its share called zero.
        torch.autograd.grad(gradient.sum(), _leaves(gradient), retain_graph=True, allow_unused=True)
    except RuntimeError:
        return None
    return product


def _leaves(tensor: Tensor) -> list[Tensor]:
    """Tensors that its graph ends in."""
    found, seen, waiting = [], set(), [tensor.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if (leaf := getattr(node, "variable", None)) is not None:
            found.append(leaf)
        waiting += [following for following, _ in node.next_functions]
    return found


def _differences(losses: Losses, parameters: Mapping[str, Tensor], flat: Tensor) -> Callable[[Tensor], Tensor]:
    step = torch.finfo(flat.dtype).eps ** (1 / 3)

    def product(v: Tensor) -> Tensor:
        up, down = (_gradient_at(losses, parameters, flat + sign * step * v) for sign in (1, -1))
        return (up - down) / (2 * step)

    return product


def _gradient_at(losses: Losses, parameters: Mapping[str, Tensor], flat: Tensor) -> Tensor:
    parts = flat.split([p.numel() for p in parameters.values()])
    moved = {
        name: part.view(p.shape).clone().requires_grad_()
        for (name, p), part in zip(parameters.items(), parts, strict=True)
    }
    with torch.enable_grad():
        return _gradient(losses(moved).mean(), moved)


def _gradient(loss: Tensor, parameters: Mapping[str, Tensor], keep: bool = False, again: bool = False) -> Tensor:
    """As one vector. keep: the graph serves once more; again: the gradient has a gradient of its own."""
    wanted = list(parameters.values())
    found = torch.autograd.grad(loss, wanted, retain_graph=keep or again, create_graph=again, allow_unused=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(wanted, found, strict=True)])
