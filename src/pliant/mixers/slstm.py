"""sLSTM: scalar memory with exponential gates, which reads its own output.

    c = SiLU(conv(x))                                       causal, depthwise
    ĩ, f̃ = W_i c, W_f c;  z̃, õ = W_z x, W_o x               block-diagonal: a block is a head
    h_t = cell(gates_t + R h_{t-1} + b)                     `pliant.kernels.scalar_memory`
    y = norm(h) ⊙ g                                         over each head

Only what reads its own output can keep track of a state that its input does not name (a parity, say).

Paper: Beck et al. 2024, xLSTM, arXiv:2405.04517, section 2.2 and figure 10. Reference code: xlstm 2.0.6
(`sLSTMLayer`); lram-xlstm.md 2.3. The up and down projections after it belong to the block, not to the mixer.
Departures: streams begin anew one by one; gates have the names of what they do (that code has the input
and the forget gate swapped, see `load_xlstm_weights`); the gain of the norm is stored as it is, not less 1.
Cost: O(T·D²/H) time, step after step; O(D) state per stream, whatever the length.
"""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role, UsageError
from pliant.kernels import ScalarMemory, causal_conv, scalar_memory
from pliant.mixers.base import SequenceMixer

EPS = 1e-5  # of the norm, lram-xlstm.md 2.3


class SLSTMState(NamedTuple):
    """conv `(B, K-1, *E, D)`: last inputs, oldest first; h, c, n, m `(B, *E, D)`: see `ScalarMemory`."""

    conv: Tensor
    h: Tensor
    c: Tensor
    n: Tensor
    m: Tensor


class SLSTM(SequenceMixer):
    """Convolution, gates, cell and norm of an sLSTM block. `(B, T, *E, D) -> (B, T, *E, D)`.

    Args:
        width: D.
        num_heads: divides `width`; units mix within a head, and a head has two units or more.
        block_index, num_blocks: which block of the stack this is, from 0. The forget gates of a head start
            spread from open to closed; the spread is more even the later the block.
        conv_width: taps of the convolution over time.
    """

    def __init__(self, width: int, num_heads: int = 4, block_index: int = 0, num_blocks: int = 1, conv_width: int = 4):
        super().__init__()
        if width < 1 or num_heads < 1 or width % num_heads or width // num_heads < 2:
            raise UsageError(
                f"SLSTM: width {width} cannot be split into {num_heads} heads of at least two units; "
                "choose a smaller divisor of the width"
            )
        if not 0 <= block_index < num_blocks:
            raise UsageError(f"SLSTM: block_index is {block_index}, expected 0 to num_blocks - 1 = {num_blocks - 1}")
        if conv_width < 1:
            raise UsageError(f"SLSTM: conv_width is {conv_width}, expected at least 1")
        self.width, self.num_heads = width, num_heads
        size = width // num_heads
        self.conv_weight = nn.Parameter(torch.empty(conv_width, width))
        self.conv_bias = nn.Parameter(torch.empty(width))
        # Gates in the order i, f, z, o; the layout of R is that of `scalar_memory`.
        self.gate_weight = nn.Parameter(torch.empty(4, num_heads, size, size))
        self.recurrent = nn.Parameter(torch.zeros(num_heads, size, 4, size))
        self.gate_bias = nn.Parameter(torch.zeros(4, num_heads, size))
        self.norm_weight = nn.Parameter(torch.ones(width))
        self._initialize(block_index, num_blocks)

    def _initialize(self, block_index: int, num_blocks: int) -> None:
        bound = self.conv_weight.shape[0] ** -0.5
        nn.init.uniform_(self.conv_weight, -bound, bound)
        nn.init.uniform_(self.conv_bias, -bound, bound)
        nn.init.normal_(self.gate_weight, std=math.sqrt(2 / (5 * self.width)))
        # From +5 down to -7 within each head, lram-xlstm.md 2.3.
        place = torch.linspace(0, 1, self.gate_bias.shape[-1])
        depth = block_index / max(1, num_blocks - 1)
        with torch.no_grad():
            self.gate_bias[1] = 5 - 12 * place ** (0.3 + 1.3 * depth)

    def init_state(self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None) -> SLSTMState:
        device = self.recurrent.device if device is None else device
        dtype = torch.promote_types(self.recurrent.dtype, torch.float32)
        conv = torch.zeros(batch, self.conv_weight.shape[0] - 1, *extra, self.width, dtype=dtype, device=device)
        return SLSTMState(conv, *(conv.new_zeros(batch, *extra, self.width) for _ in range(4)))

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: SLSTMState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], SLSTMState]:
        x, state = self.start(x, state, reset, mask)
        c, conv = causal_conv(x, self.conv_weight, self.conv_bias, state.conv, reset=reset, mask=mask)
        cell = ScalarMemory(*(part.reshape(-1, *self.gate_bias.shape[1:]) for part in state[1:]))
        streams = math.prod(x.shape[2:-1])
        reset, mask = (None if flag is None else flag.repeat_interleave(streams, 0) for flag in (reset, mask))
        h, last = scalar_memory(self._gates(F.silu(c), x), self.recurrent, cell, reset=reset, mask=mask)
        y = F.layer_norm(h, h.shape[-1:], eps=EPS).flatten(2) * self.norm_weight
        y = y.reshape(x.shape[0], streams, x.shape[1], self.width).transpose(1, 2).reshape(x.shape)
        return y, SLSTMState(conv, *(part.reshape(state.h.shape) for part in last))

    def _gates(self, c: Tensor, x: Tensor) -> Tensor:
        """What the inputs add to the gates, `(B E, T, 4, H, K)`: extra axes are streams to the cell."""
        blocks = []
        for source, weight in ((c, self.gate_weight[:2]), (x, self.gate_weight[2:])):
            heads = source.flatten(2, -2).transpose(1, 2).flatten(0, 1) if x.ndim > 3 else source
            blocks.append(torch.einsum("bthi,ghij->btghj", heads.unflatten(-1, self.gate_bias.shape[1:]), weight))
        return torch.cat(blocks, 2) + self.gate_bias

    def roles(self) -> dict[str, Role]:
        return {
            "conv_weight": Role.CONV,
            "conv_bias": Role.BIAS,
            # z is squashed too, by a tanh.
            "gate_weight": Role.GATE,
            "recurrent": Role.GATE,
            "gate_bias": Role.BIAS,
            "norm_weight": Role.GAIN,
        }


XLSTM_GATES = ("fgate", "igate", "zgate", "ogate")
"""The names in xlstm of the weights of i, f, z, o: the first two are swapped there, and stay so (its issue 98)."""


def load_xlstm_weights(mixer: SLSTM, weights: Mapping[str, Any]) -> None:
    """Copy the weights of an `sLSTMLayer` of xlstm 2.0.6 into `mixer`.

    `weights` is the `state_dict()` of that layer, of either back end; they differ in the layout of the
    recurrent weights and the biases.

    Raises:
        UsageError: a weight is missing or has another shape; nothing has been copied then.
    """
    heads, size, _, _ = mixer.recurrent.shape
    needed = ["conv1d.conv.weight", "conv1d.conv.bias", "group_norm.weight", *(f"{g}.weight" for g in XLSTM_GATES)]
    needed += ["slstm_cell._recurrent_kernel_", "slstm_cell._bias_"]
    if missing := [name for name in needed if name not in weights]:
        raise UsageError(f"load_xlstm_weights: the weights lack {', '.join(missing)}; give an sLSTMLayer's state_dict")
    conv, conv_bias, gain, *gates, recurrent, bias = (weights[name] for name in needed)
    if recurrent.shape == (heads, 4 * size, size):  # the vanilla back end
        recurrent, bias = recurrent.transpose(1, 2), bias.reshape(4, heads, -1).transpose(0, 1)
    found = {
        "conv_weight": conv.flatten(1).T,
        "conv_bias": conv_bias,
        "norm_weight": 1 + gain,
        "gate_weight": torch.stack([gate.transpose(1, 2) for gate in gates]),
        "recurrent": recurrent.reshape(*recurrent.shape[:2], 4, -1),
        "gate_bias": bias.reshape(heads, 4, -1).transpose(0, 1),
    }
    for name, parameter in mixer.named_parameters():
        if found[name].shape != parameter.shape:
            raise UsageError(
                f"load_xlstm_weights: {name} would be {tuple(found[name].shape)}, expected {tuple(parameter.shape)}; "
                "make the mixer with the width, heads and taps of that layer"
            )
    mixer.load_state_dict(found)
