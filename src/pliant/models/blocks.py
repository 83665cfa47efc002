"""Residual blocks around mixers, and a stack of them."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role
from pliant.core.roles import prefix
from pliant.kernels import BlockWeights, gated_block, gated_block_fits
from pliant.mixers import GatedLRU, SequenceMixer
from pliant.mixers.gated_lru import DECAY_POWER, MAX_SQRT_DERIVATIVE, GatedLRUState, RGLRUState

NORM_EPS = 1e-6


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

    def roles(self) -> dict[str, Role]:
        return {
            f"{name}.{part}": role
            for name in ("linear_in", "linear_out")
            for part, role in (("weight", Role.MATRIX), ("bias", Role.BIAS))
        }


class Block(nn.Module):
    """x + mixer(norm(x)), then x + mlp(norm(x)). `(B, T, *E, D) -> (B, T, *E, D)`."""

    def __init__(self, mixer: SequenceMixer):
        super().__init__()
        self.mixer_norm = nn.RMSNorm(mixer.width, eps=NORM_EPS)
        self.mixer = mixer
        self.mlp_norm = nn.RMSNorm(mixer.width, eps=NORM_EPS)
        self.mlp = GatedMLP(mixer.width)

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: Any,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], Any]:
        if isinstance(self.mixer, GatedLRU) and gated_block_fits(x, state.lru.h, self.mlp.linear_in.weight):
            return self._at_once(self.mixer, x, state, reset, mask)
        mixed, state = self.mixer(self.mixer_norm(x), state, reset=reset, mask=mask)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), state

    def _at_once(
        self, mixer: GatedLRU, x: Tensor, state: GatedLRUState, reset: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, GatedLRUState]:
        """`forward` in one pass over a narrow model; a hook on a part of the block does not see it."""
        lru, mlp = mixer.lru, self.mlp
        weights = BlockWeights(
            self.mixer_norm.weight,
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
            self.mlp_norm.weight,
            mlp.linear_in.weight,
            mlp.linear_in.bias,
            mlp.linear_out.weight,
            mlp.linear_out.bias,
        )
        y, conv, h, fresh = gated_block(
            x, state.conv, state.lru.h, state.lru.fresh, weights, reset, mask,
            decay_power=DECAY_POWER, max_derivative=MAX_SQRT_DERIVATIVE, eps=NORM_EPS,
        )  # fmt: skip
        return y, GatedLRUState(conv, RGLRUState(h, fresh))

    def roles(self) -> dict[str, Role]:
        norms = {"mixer_norm.weight": Role.GAIN, "mlp_norm.weight": Role.GAIN}
        return norms | prefix("mixer", self.mixer.roles()) | prefix("mlp", self.mlp.roles())


class Stack(nn.Module):
    """Blocks one after the other, then a norm. The state is the tuple of the mixers' states."""

    def __init__(self, mixers: Sequence[SequenceMixer]):
        super().__init__()
        self.blocks: Sequence[Block] = nn.ModuleList(Block(mixer) for mixer in mixers)  # type: ignore[assignment]
        self.norm = nn.RMSNorm(mixers[0].width, eps=NORM_EPS)

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
        after = []
        for block, before in zip(self.blocks, state, strict=True):
            x, new = block(x, before, reset=reset, mask=mask)
            after.append(new)
        return self.norm(x), tuple(after)

    def roles(self) -> dict[str, Role]:
        roles = {"norm.weight": Role.GAIN}
        for i, block in enumerate(self.blocks):
            roles |= prefix(f"blocks.{i}", block.roles())
        return roles
