"""Gated delta net: a memory of fixed size in which the value under a key can be replaced.

    q, k, v = silu(conv(x W_qkv));  q, k of length one per head, q / sqrt(K)
    β = σ(x W_b),  g = -A softplus(x W_a + b_a)               write gate; logarithm of the decay, A > 0
    S_t = exp(g_t) S_{t-1} + k_t (β_t (v_t - (exp(g_t) S_{t-1})^T k_t))^T,  o_t = S_t^T q_t
    y = (rms(o) ⊙ silu(x W_z)) W_o                            rms per head

A step of gradient descent of size β on |S^T k - v|², after a decay. With `per_channel` it is Kimi delta attention:
g for each channel of the keys, W_a and W_z each the product of two narrow matrices, and σ in place of silu at the end.

Papers: Yang et al. 2024, Gated Delta Networks, arXiv:2412.06464, section 3; Kimi Linear, arXiv:2510.26692, section 3
(per_channel); Grazzi et al. 2024, arXiv:2411.12537 (negative eigenvalues). Reference code: flash-linear-attention,
transformers (`qwen3_next`, `kimi_linear`). Departures: A starts in (1, 16) and not in (0, 16), so that no head of a
stream starts with a memory that hardly ever forgets: half-lives start between 0.4 and 700 steps.
Cost: see `delta_rule`; H K V + (taps - 1) (2 K + V) H numbers of state per stream, whatever the length.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role, UsageError
from pliant.core.roles import prefix
from pliant.kernels import causal_conv, delta_rule
from pliant.mixers.base import SequenceMixer, where_steps

LENGTH_EPS = 1e-6  # further-mixers.md 1.1, inside of the root
FIRST_RATES = (1.0, 16.0)
FIRST_STEPS = (1e-3, 1e-1)  # of softplus, further-mixers.md 1.2


class GatedDeltaState(NamedTuple):
    """conv `(B, taps-1, *E, C)`: the last inputs of the convolution, oldest first; s `(B, *E, H, K, V)`: memory."""

    conv: Tensor
    s: Tensor


class GatedDelta(SequenceMixer):
    """The block without norm and residual. `(B, T, *E, D) -> (B, T, *E, D)`.

    Args:
        width: D.
        num_heads: heads of queries and keys.
        key_size: K; None means three quarters of the width over all heads, at least 1.
        value_size: V; None means 2 K.
        value_heads: H, heads of values and of the memory, a multiple of `num_heads`; None means `num_heads`.
        conv_width: taps of the convolution over time.
        per_channel: a decay for each channel of the keys (Kimi delta attention), not one for each head.
        negative_eigenvalues: β in (0, 2) and not in (0, 1): a write may turn the sign of what it replaces,
            which is what counting modulo two takes.
        eps: of the norm.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        key_size: int | None = None,
        value_size: int | None = None,
        value_heads: int | None = None,
        conv_width: int = 4,
        per_channel: bool = False,
        negative_eigenvalues: bool = False,
        eps: float = 1e-5,
    ):
        super().__init__()
        key_size = max(1, 3 * width // (4 * max(1, num_heads))) if key_size is None else key_size
        value_size = 2 * key_size if value_size is None else value_size
        value_heads = num_heads if value_heads is None else value_heads
        if min(width, num_heads, key_size, value_size, value_heads, conv_width) < 1 or value_heads % num_heads:
            raise UsageError(
                f"GatedDelta: {num_heads} heads of keys and {value_heads} of values, sizes {key_size}, {value_size}, "
                f"{conv_width} taps, width {width}; each must be at least 1, heads of values a multiple of keys'"
            )
        self.width, self.num_heads, self.value_heads = width, num_heads, value_heads
        self.key_size, self.value_size = key_size, value_size
        self.per_channel, self.eps = per_channel, eps
        self.largest_write = 2.0 if negative_eigenvalues else 1.0
        keys, values = num_heads * key_size, value_heads * value_size
        self.linear_qkv = nn.Linear(width, 2 * keys + values, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, 2 * keys + values))
        self.write_gate = nn.Linear(width, value_heads, bias=False)
        self.linear_decay: nn.Module
        self.linear_gate: nn.Module
        if per_channel:
            self.linear_decay = _narrow(width, value_size, value_heads * key_size, bias=False)
            self.linear_gate = _narrow(width, value_size, values, bias=True)
        else:
            self.linear_decay = nn.Linear(width, value_heads, bias=False)
            self.linear_gate = nn.Linear(width, values, bias=False)
        self.log_rate = nn.Parameter(torch.empty(value_heads))
        self.decay_bias = nn.Parameter(torch.empty(value_heads, key_size if per_channel else 1))
        self.norm_gain = nn.Parameter(torch.ones(value_size))
        self.linear_out = nn.Linear(values, width, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.uniform_(self.conv_weight, -(self.conv_weight.shape[0] ** -0.5), self.conv_weight.shape[0] ** -0.5)
        with torch.no_grad():
            self.log_rate.copy_(torch.empty_like(self.log_rate).uniform_(*FIRST_RATES).log())
            step = torch.empty_like(self.decay_bias).uniform_(*map(math.log, FIRST_STEPS)).exp()
            self.decay_bias.copy_(step + torch.log(-torch.expm1(-step)))  # softplus of this is step

    def init_state(
        self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None
    ) -> GatedDeltaState:
        weight = self.conv_weight
        device = weight.device if device is None else device
        dtype = torch.promote_types(weight.dtype, torch.float32)
        conv = torch.zeros(batch, weight.shape[0] - 1, *extra, weight.shape[1], dtype=dtype, device=device)
        return GatedDeltaState(
            conv=conv, s=conv.new_zeros(batch, *extra, self.value_heads, self.key_size, self.value_size)
        )

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: GatedDeltaState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], GatedDeltaState]:
        x, state = self.start(x, state, reset, mask)
        mixed, conv = causal_conv(self.linear_qkv(x), self.conv_weight, None, state.conv, reset=reset, mask=mask)
        wide = state.s.dtype
        q, k, v = self._heads(F.silu(mixed).to(wide))
        log_decay, write = self._gates(x, wide)
        # All axes between time and the last are so many heads, since they share time.
        q, k, v, log_decay, write = (part.flatten(2, -2) for part in (q, k, v, log_decay, write))
        o, s = delta_rule(q, k, v, log_decay, write, write, state.s.flatten(1, -3), reset, mask)
        o = F.rms_norm(o, (self.value_size,), self.norm_gain.to(wide), self.eps).to(x.dtype)
        gate = self._out_gate(x)
        y = self.linear_out(o.reshape(gate.shape) * gate)
        y = y if mask is None else where_steps(mask, y)
        return y, GatedDeltaState(conv=conv, s=s.reshape(state.s.shape))

    def _heads(self, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q and k `(B, T, *E, H, K)` of length one, v `(B, T, *E, H, V)`."""
        keys = self.num_heads * self.key_size
        q, k, v = mixed.split([keys, keys, self.value_heads * self.value_size], -1)
        repeats = self.value_heads // self.num_heads
        q, k = (_unit(x.unflatten(-1, (self.num_heads, -1))).repeat_interleave(repeats, -2) for x in (q, k))
        return q * self.key_size**-0.5, k, v.unflatten(-1, (self.value_heads, -1))

    def _gates(self, x: Tensor, wide: torch.dtype) -> tuple[Tensor, Tensor]:
        """Logarithm of the decay `(B, T, *E, H, K or 1)` and write gate `(B, T, *E, H, 1)`."""
        step = self.linear_decay(x).unflatten(-1, self.decay_bias.shape).to(wide) + self.decay_bias.to(wide)
        log_decay = -self.log_rate.to(wide).exp()[:, None] * F.softplus(step)
        write = self.largest_write * torch.sigmoid(self.write_gate(x).to(wide))
        return log_decay, write[..., None]

    def _out_gate(self, x: Tensor) -> Tensor:
        z = self.linear_gate(x)
        return torch.sigmoid(z) if self.per_channel else F.silu(z)

    def roles(self) -> dict[str, Role]:
        gate = Role.GATE if self.per_channel else Role.MATRIX
        own = {
            "linear_qkv.weight": Role.MATRIX,
            "conv_weight": Role.CONV,
            "write_gate.weight": Role.GATE,
            "log_rate": Role.DECAY,
            "decay_bias": Role.DECAY,
            "norm_gain": Role.GAIN,
            "linear_out.weight": Role.MATRIX,
        }
        if not self.per_channel:
            return own | {"linear_decay.weight": Role.GATE, "linear_gate.weight": gate}
        narrow = {"0.weight": Role.MATRIX, "1.weight": Role.GATE}
        return own | prefix("linear_decay", narrow) | prefix("linear_gate", narrow | {"1.bias": Role.BIAS})

    def load_qwen3_next(self, weights: Mapping[str, Tensor]) -> None:
        """Take the parameters of a `linear_attn` layer of transformers' Qwen3-Next, by its names without prefix.

        Our sizes must be those of the layer, `eps` its `rms_norm_eps`, and decays one for each head. Its input
        matrices are interleaved by heads of keys.

        Raises:
            UsageError: `per_channel`, or other sizes.
        """
        share = self.value_heads // self.num_heads
        sizes = [self.key_size] * 2 + [share * self.value_size] * 2
        expected = {"in_proj_qkvz.weight": self.num_heads * sum(sizes), "in_proj_ba.weight": 2 * self.value_heads}
        for name, rows in expected.items():
            if self.per_channel or weights[name].shape != (rows, self.width):
                raise UsageError(
                    f"GatedDelta.load_qwen3_next: {name} is {tuple(weights[name].shape)}, expected "
                    f"{(rows, self.width)} in a mixer with a decay for each head"
                )
        mixed = weights["in_proj_qkvz.weight"].unflatten(0, (self.num_heads, -1)).split(sizes, 1)
        q, k, v, z = (part.flatten(0, 1) for part in mixed)
        gates = weights["in_proj_ba.weight"].unflatten(0, (self.num_heads, -1)).split(share, 1)
        write, decay = (part.flatten(0, 1) for part in gates)
        self.load_state_dict(
            {
                "linear_qkv.weight": torch.cat([q, k, v]),
                "conv_weight": weights["conv1d.weight"][:, 0].T,
                "write_gate.weight": write,
                "linear_decay.weight": decay,
                "linear_gate.weight": z,
                "log_rate": weights["A_log"],
                "decay_bias": weights["dt_bias"][:, None],
                "norm_gain": weights["norm.weight"],
                "linear_out.weight": weights["out_proj.weight"],
            }
        )


def _narrow(width: int, middle: int, out: int, *, bias: bool) -> nn.Sequential:
    """A matrix of rank `middle` at most."""
    return nn.Sequential(nn.Linear(width, middle, bias=False), nn.Linear(middle, out, bias=bias))


def _unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + LENGTH_EPS)
