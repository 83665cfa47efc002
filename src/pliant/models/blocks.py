"""Residual blocks around mixers, and a stack of them."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain, repeat
from operator import attrgetter
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from pliant.core import Role
from pliant.core.roles import prefix
from pliant.core.units import Units
from pliant.kernels import BlockWeights, gated_block, gated_block_fits
from pliant.kernels._gated_block import Ends, Weights
from pliant.mixers import GatedLRU, SequenceMixer
from pliant.mixers.gated_lru import (
    DECAY_POWER,
    MAX_SQRT_DERIVATIVE,
    RGLRU,
    BlockDiagonal,
    GatedLRUState,
    RGLRUState,
)

NORM_EPS = 1e-6
NORMS: dict[str, Callable[[int], nn.Module]] = {
    "rms": partial(nn.RMSNorm, eps=NORM_EPS),
    "layer": partial(nn.LayerNorm, eps=NORM_EPS),
}
"""Norms that see one step of one stream, so that a stream may have them; BatchNorm is for `BidirectionalClassifier`."""


def norm_roles(name: str, norm: nn.Module) -> dict[str, Role]:
    """Roles of the parameters of a norm."""
    return {f"{name}.{part}": Role.GAIN if part == "weight" else Role.BIAS for part, _ in norm.named_parameters()}


class GatedMLP(nn.Module):
    """out = (gelu(x W_g + b_g) ⊙ (x W_u + b_u)) W_o + b_o. `(..., D) -> (..., D)`; hidden width F = 2 D.

    Griffin (arXiv:2402.19427, section 2.3) has F = 3 D; 2 D gives more width for the same cost at our sizes.
    """

    def __init__(self, width: int, expand: int = 2):
        super().__init__()
        self.linear_in = nn.Linear(width, 2 * expand * width)
        self.linear_out = nn.Linear(expand * width, width)
        for linear in (self.linear_in, self.linear_out):
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        gate, up = self.linear_in(x).chunk(2, dim=-1)
        return self.linear_out(F.gelu(gate, approximate="tanh") * up)

    def units(self) -> list[Units]:
        number = self.linear_out.in_features
        return [Units(self.linear_out, ((self.linear_in, 0), (self.linear_in, number)))]

    def roles(self) -> dict[str, Role]:
        return {
            f"{name}.{part}": role
            for name in ("linear_in", "linear_out")
            for part, role in (("weight", Role.MATRIX), ("bias", Role.BIAS))
        }


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)). `(B, T, *E, D) -> (B, T, *E, D)`. norm: a name in `NORMS`."""

    def __init__(self, mixer: SequenceMixer, norm: str = "rms"):
        super().__init__()
        self.mixer_norm: Any = NORMS[norm](mixer.width)
        self.mixer = mixer
        self.mlp_norm: Any = NORMS[norm](mixer.width)
        self.mlp = GatedMLP(mixer.width)

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: Any,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], Any]:
        mixed, state = self.mixer(self.mixer_norm(x), state, reset=reset, mask=mask)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state

    def roles(self) -> dict[str, Role]:
        norms = norm_roles("mixer_norm", self.mixer_norm) | norm_roles("mlp_norm", self.mlp_norm)
        return norms | prefix("mixer", self.mixer.roles()) | prefix("mlp", self.mlp.roles())


class AtOnce:
    """Says whether one pass may stand for all modules of a stack, and has the parameters that it reads.

    It may not where somebody would notice: a hook on a part, a part that was exchanged or is of another
    class, a parameter that is a subclass of a tensor. All that is looked at anew before each pass, so what
    is remembered here only saves time; it is not copied with the model, nor saved.
    """

    def __init__(self) -> None:
        self._root: nn.Module | None = None
        self._weights: Weights | None = None

    def __reduce__(self) -> Any:
        return AtOnce, ()

    def weights(
        self, root: nn.Module, stack: "Stack", x: Tensor, states: Any, ends: tuple[nn.Module, ...] = ()
    ) -> Weights | None:
        """Parameters for a pass over `x` `(B, T, ...)` from `states`; None if the modules have to be called.

        root: whose forward asks; hooks on it are not passed by. ends: embed, codes and head around the stack.
        """
        if not gated_block_fits(x, stack.norm.weight.shape[0]) or _has_any_global_hook():
            return None
        weights = self._weights
        if self._root is not root or weights is None or not self._same() or not weights.as_made():
            self._root, self._weights = root, self._found(root, stack, ends)
            weights = self._weights
            if weights is None or not weights.as_made():
                return None
        if len(states) != weights.depth:
            return None
        conv = (x.shape[0], weights.reach, weights.inner)
        h = (x.shape[0], weights.inner)
        for state in states:
            if type(state) is not GatedLRUState or state.conv.shape != conv or state.lru.h.shape != h:
                return None
            if not state.conv.dtype == state.lru.h.dtype == weights.dtype or state.lru.fresh.shape != h[:1]:
                return None
        return weights

    def _same(self) -> bool:
        """Whether modules and parameters are those that were found, and nobody listens to them."""
        children = list(chain.from_iterable(map(dict.values, self._modules)))
        parameters = list(chain.from_iterable(map(dict.values, self._places)))
        return (
            # Those that were found are held, so their ids are theirs alone.
            list(map(id, children)) == self._child_ids
            and list(map(id, parameters)) == self._ids
            and list(map(type, children)) == self._types
            and not any(self._hooks)
            and not any(map(dict.__contains__, self._names, repeat("forward")))
            and not any(map(any, map(_listeners, parameters)))
        )

    def _found(self, root: nn.Module, stack: "Stack", ends: tuple[nn.Module, ...]) -> Weights | None:
        blocks = list(stack.blocks)
        if not all(type(block) is Block and type(block.mixer) is GatedLRU for block in blocks):
            return None
        owners = list(root.modules())
        parts = [module for module in owners if module is not root]
        if not {type(part) for part in parts} <= PLAIN | {Block, Stack}:
            return None
        self._modules = [owner._modules for owner in owners]
        self._children = [child for children in self._modules for child in children.values()]
        self._child_ids, self._types = list(map(id, self._children)), list(map(type, self._children))
        self._places = [owner._parameters for owner in owners]
        self._parameters = [p for parameters in self._places for p in parameters.values()]
        self._ids = list(map(id, self._parameters))
        self._names = [part.__dict__ for part in parts]
        self._hooks = [hooks for part in parts for hooks in _hooks(part)]
        if not self._same():
            return None
        try:
            return Weights([_weights_of(block) for block in blocks], stack.norm.weight, _ends_of(ends))
        except (ValueError, AttributeError):
            return None


PLAIN = frozenset({nn.Linear, nn.RMSNorm, nn.Embedding, nn.ModuleList, BlockDiagonal, RGLRU, GatedLRU, GatedMLP})
"""Classes whose forward the pass has in it."""


_listeners = attrgetter("_backward_hooks", "_post_accumulate_grad_hooks")


def heard(module: nn.Module) -> bool:
    """Whether somebody listens to the calls of a module, or has put another forward in its place."""
    return any(_hooks(module)) or "forward" in module.__dict__


def _hooks(module: nn.Module) -> Iterator[Any]:
    for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
        yield getattr(module, name)


def _weights_of(block: Block) -> BlockWeights:
    mixer, mlp = block.mixer, block.mlp
    assert isinstance(mixer, GatedLRU)
    lru = mixer.lru
    return BlockWeights(
        block.mixer_norm.weight,
        mixer.linear_x.weight,
        mixer.linear_x.bias,
        mixer.linear_y.weight,
        mixer.linear_y.bias,
        mixer.conv_weight,
        mixer.conv_bias,
        lru.input_gate.weight,
        lru.input_gate.bias,
        lru.decay_gate.weight,
        lru.decay_gate.bias,
        lru.decay,
        mixer.linear_out.weight,
        mixer.linear_out.bias,
        block.mlp_norm.weight,
        mlp.linear_in.weight,
        mlp.linear_in.bias,
        mlp.linear_out.weight,
        mlp.linear_out.bias,
    )


def _ends_of(ends: tuple[Any, ...]) -> Ends | None:
    if not ends:
        return None
    embed, codes, head = ends
    return Ends(embed.weight, embed.bias, codes.weight, head.weight, head.bias)


CONSTANTS: dict[str, Any] = {"decay_power": DECAY_POWER, "max_derivative": MAX_SQRT_DERIVATIVE, "eps": NORM_EPS}


def through(
    weights: Weights,
    x: Tensor | None,
    states: Any,
    reset: Tensor | None,
    mask: Tensor | None,
    numbers: Tensor | None = None,
    codes: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, tuple[GatedLRUState, ...]]:
    """`gated_block` from and to the states of mixers."""
    more: dict[str, Any] = {"numbers": numbers, "codes": codes, "offset": offset}
    y, after = gated_block(x, flat_states(states), weights, reset, mask, **CONSTANTS, **more)
    return y, tuple(GatedLRUState(conv, RGLRUState(h, fresh)) for conv, h, fresh in after)


def flat_states(states: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """As `gated_block` takes them."""
    return [(state.conv, *state.lru) for state in states]


class Stack(nn.Module):
    """Blocks one after the other, then a norm. The state is the tuple of the mixers' states."""

    def __init__(self, mixers: Sequence[SequenceMixer], norm: str = "rms"):
        super().__init__()
        self.blocks: Sequence[Block] = nn.ModuleList(Block(mixer, norm) for mixer in mixers)  # type: ignore[assignment]
        self.norm: Any = NORMS[norm](mixers[0].width)
        self._at_once = AtOnce()

    def init_state(
        self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None
    ) -> tuple[Any, ...]:
        return tuple(block.mixer.init_state(batch, extra, device=device) for block in self.blocks)

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: tuple[Any, ...],
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], tuple[Any, ...]]:
        if weights := self._at_once.weights(self, self, x, state):
            return through(weights, x, state, reset, mask)
        after = []
        for block, before in zip(self.blocks, state, strict=True):
            x, new = block(x, before, reset=reset, mask=mask)
            after.append(new)
        return self.norm(x), tuple(after)

    def roles(self) -> dict[str, Role]:
        roles = norm_roles("norm", self.norm)
        for i, block in enumerate(self.blocks):
            roles |= prefix(f"blocks.{i}", block.roles())
        return roles
