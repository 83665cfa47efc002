"""The mLSTM: a matrix memory with exponential gates, in the block that projects up before it.

    a, z = x W_up                                            twice the inner width M
    c = SiLU(conv(a));  q = c W_q, k = c W_k, v = a W_v      block-diagonal, blocks of 4
    ĩ = [q k v] W_i + b_i,  f̃ = [q k v] W_f + b_f            one of each per head
    h = matrix_memory(q, k, v, log i = ĩ, log f = log σ(f̃))  see `pliant.kernels.matrix_memory`
    y = ((LayerNorm_head(h) ⊙ g + s ⊙ c) ⊙ SiLU(z)) W_down

The norm and the residual around it belong to the model.

Paper: Beck et al. 2024, xLSTM, arXiv:2405.04517, section 2.3 and appendix A (figure 11). Reference code: xlstm 2.0.6
(`mLSTMLayer`); lram-xlstm.md 2.2, from which the initialisation is.
Departures: none in the numbers. The code keeps the gain of the norm as its difference from 1; here it is itself.
State is at least float32, and so are the gates. Resets and masks are ours.
Cost: O(T M (D + M / heads)) time; O(M² / heads) state per stream, whatever the length.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role, UsageError
from pliant.kernels import Memory, causal_conv, matrix_memory
from pliant.kernels._few_rows import plain
from pliant.kernels._mlstm_steps import StepWeights, few_steps, mlstm_steps, takes
from pliant.mixers.base import SequenceMixer, where_steps
from pliant.mixers.linear import Linear

ROUND_UP = 64  # the inner width is a multiple of it, lram-xlstm.md 2.2
FORGET_BIAS = (3.0, 6.0)  # of the first and the last head, lram-xlstm.md 2.2
INPUT_BIAS_SPREAD = 0.1  # lram-xlstm.md 2.2
NORM_EPS = 1e-5
GATE_CAP, DENSE_INPUT_BIAS, DENSE_NORM_EPS = 15.0, -10.0, 1e-6  # of xLSTM 7B, lram-xlstm.md 2.4


class MLSTMState(NamedTuple):
    """conv `(B, K-1, *E, M)`: the last inputs of the convolution, oldest first; memory: C, n, m per head.

    With width M/H of a head: C `(B, *E, H, M/H, M/H)` with rows of keys, n `(B, *E, H, M/H)`, m `(B, *E, H)`.
    """

    conv: Tensor
    memory: Memory


class MLSTM(SequenceMixer):
    """The mLSTM block, without norm and residual. `(B, T, *E, D) -> (B, T, *E, D)`.

    Args:
        width: D.
        num_heads: heads, each with a memory of its own; divides `inner_width`.
        inner_width: M, width of what is remembered; None means 2 D, rounded up to a multiple of 64.
        conv_width: taps of the convolution over time.
        block_size: features that are mixed with each other into queries, keys and values; divides `inner_width`.
        depth: blocks in the whole model; the output starts smaller by 1/depth.
    """

    def __init__(
        self,
        width: int,
        num_heads: int = 4,
        inner_width: int | None = None,
        conv_width: int = 4,
        block_size: int = 4,
        depth: int = 1,
    ):
        super().__init__()
        inner = -(-2 * width // ROUND_UP) * ROUND_UP if inner_width is None else inner_width
        for name, parts in (("num_heads", num_heads), ("block_size", block_size)):
            if inner < 1 or parts < 1 or inner % parts:
                raise UsageError(f"MLSTM: {name} is {parts}, expected a divisor of the inner width {inner}")
        if conv_width < 1:
            raise UsageError(f"MLSTM: conv_width is {conv_width}, expected at least 1")
        self.width, self.num_heads = width, num_heads
        self.linear_up = Linear(width, 2 * inner, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, inner))
        self.conv_bias = nn.Parameter(torch.empty(inner))
        # (blocks, out, in)
        self.query, self.key, self.value = (
            nn.Parameter(torch.empty(inner // block_size, block_size, block_size)) for _ in range(3)
        )
        self.input_gate = nn.Linear(3 * inner, num_heads)
        self.forget_gate = nn.Linear(3 * inner, num_heads)
        self.norm_weight = nn.Parameter(torch.ones(inner))
        self.skip = nn.Parameter(torch.ones(inner))
        self.linear_down = Linear(inner, width, bias=False)
        self._initialize(depth)

    def _initialize(self, depth: int) -> None:
        # The width of the block sets the spread everywhere, also where fewer features are summed.
        for weight in (self.linear_up.weight, self.query, self.key, self.value):
            nn.init.normal_(weight, std=math.sqrt(2 / (5 * self.width)))
        nn.init.normal_(self.linear_down.weight, std=2 / depth / math.sqrt(self.width))
        for part in (self.conv_weight, self.conv_bias):
            nn.init.uniform_(part, -(self.conv_weight.shape[0] ** -0.5), self.conv_weight.shape[0] ** -0.5)
        for gate in (self.input_gate, self.forget_gate):
            nn.init.zeros_(gate.weight)
        nn.init.normal_(self.input_gate.bias, std=INPUT_BIAS_SPREAD)
        with torch.no_grad():
            self.forget_gate.bias.copy_(torch.linspace(*FORGET_BIAS, self.num_heads))

    def init_state(self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None) -> MLSTMState:
        reach, inner = self.conv_weight.shape[0] - 1, self.skip.shape[0]
        size = inner // self.num_heads
        device = self.skip.device if device is None else device
        dtype = torch.promote_types(self.skip.dtype, torch.float32)
        conv = torch.zeros(batch, reach, *extra, inner, dtype=dtype, device=device)
        return MLSTMState(conv, fresh_memory(conv, (batch, *extra, self.num_heads), size, size))

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: MLSTMState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], MLSTMState]:
        x, state = self.start(x, state, reset, mask)
        up = self.linear_up(x)
        if few_steps(up) and plain(*self.step_weights()) and takes(state.conv, state.memory):
            y, conv, memory = mlstm_steps(up, self.step_weights(), state.conv, state.memory, reset, mask, NORM_EPS)
            return self.linear_down(y), MLSTMState(conv, Memory(*memory))
        a, z = up.chunk(2, -1)
        c, conv = causal_conv(a, self.conv_weight, self.conv_bias, state.conv, reset=reset, mask=mask)
        c = F.silu(c)
        h, memory = self._remember(a, c, state.memory, reset, mask)
        y = self.linear_down((h + self.skip * c) * F.silu(z))
        y = y if mask is None else where_steps(mask, y)
        return y, MLSTMState(conv=conv, memory=memory)

    def _remember(
        self, a: Tensor, c: Tensor, memory: Memory, reset: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Memory]:
        """What the memory answers, normed, `(B, T, *E, M)`."""
        q, k, v = block_diagonal(c, self.query), block_diagonal(c, self.key), block_diagonal(a, self.value)
        log_input, log_forget = self._gates(torch.cat([q, k, v], -1))
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)) for x in (q, k, v))
        h, memory = remember(q, k, v, log_input, log_forget, memory, reset, mask)
        return F.layer_norm(h, h.shape[-1:], eps=NORM_EPS).reshape(a.shape) * self.norm_weight, memory

    def step_weights(self) -> StepWeights:
        """All parameters but those of the projections."""
        gates = (self.input_gate.weight, self.input_gate.bias, self.forget_gate.weight, self.forget_gate.bias)
        own = (self.conv_weight, self.conv_bias, self.query, self.key, self.value)
        return StepWeights(*own, *gates, self.norm_weight, self.skip)

    def _gates(self, qkv: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithms of the input and the forget gate, `(B, T, *E, H)`, at least float32."""
        wide = torch.promote_types(qkv.dtype, torch.float32)
        weight = torch.cat([self.input_gate.weight, self.forget_gate.weight]).to(wide)
        bias = torch.cat([self.input_gate.bias, self.forget_gate.bias]).to(wide)
        log_input, forget = F.linear(qkv.to(wide), weight, bias).chunk(2, -1)
        return log_input, F.logsigmoid(forget)

    def roles(self) -> dict[str, Role]:
        gates = {f"{gate}.{part}": role
                 for gate in ("input_gate", "forget_gate")
                 for part, role in (("weight", Role.GATE), ("bias", Role.BIAS))}  # fmt: skip
        matrices = dict.fromkeys(("linear_up.weight", "query", "key", "value", "linear_down.weight"), Role.MATRIX)
        rest = {"conv_weight": Role.CONV, "conv_bias": Role.BIAS, "norm_weight": Role.GAIN, "skip": Role.GAIN}
        return matrices | gates | rest


class DenseMLSTM(SequenceMixer):
    """The mLSTM of xLSTM 7B, without norm and residual: no convolution, full projections. `(B, T, *E, D) -> same`.

        q, k, v, o = x W_in                                 D/2, D/2, D and D features
        ĩ, f̃ = cap(x W_g + b_g),  cap(a) = 15 tanh(a / 15)  one of each per head
        y = (LayerNorm_head(h) ⊙ g ⊙ σ(o)) W_out            h what the memory answers, as above

    Paper: Beck et al. 2025, xLSTM 7B, arXiv:2503.13427, section 3; lram-xlstm.md 2.4. Reference code:
    `xLSTMLayer` of transformers. The state is a `Memory` with extra axes before the heads.

    Args:
        width: D, even.
        num_heads: divides D/2.
        depth: blocks in the whole model; the output starts smaller by 1/depth.
    """

    def __init__(self, width: int, num_heads: int = 8, depth: int = 1):
        super().__init__()
        if width < 1 or num_heads < 1 or width % (2 * num_heads):
            raise UsageError(f"DenseMLSTM: width is {width}, expected a multiple of twice the {num_heads} heads")
        self.width, self.num_heads = width, num_heads
        self.linear_in = Linear(width, 3 * width, bias=False)
        self.gates = nn.Linear(width, 2 * num_heads)
        self.norm_weight = nn.Parameter(torch.ones(width))
        self.linear_out = Linear(width, width, bias=False)
        nn.init.normal_(self.linear_in.weight, std=math.sqrt(2 / (5 * width)))
        nn.init.normal_(self.linear_out.weight, std=2 / depth / math.sqrt(width))
        nn.init.zeros_(self.gates.weight)
        with torch.no_grad():
            self.gates.bias[:num_heads] = DENSE_INPUT_BIAS
            self.gates.bias[num_heads:] = torch.linspace(*FORGET_BIAS, num_heads)

    def init_state(self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None) -> Memory:
        values = self.width // self.num_heads
        like = self.norm_weight if device is None else torch.empty(0, dtype=self.norm_weight.dtype, device=device)
        return fresh_memory(like, (batch, *extra, self.num_heads), values // 2, values)

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: Memory | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], Memory]:
        x, state = self.start(x, state, reset, mask)
        half, width = self.width // 2, self.width
        *qkv, o = self.linear_in(x).split([half, half, width, width], -1)
        q, k, v = (part.unflatten(-1, (self.num_heads, -1)) for part in qkv)
        wide = torch.promote_types(x.dtype, torch.float32)
        log_input, forget = (GATE_CAP * torch.tanh(self.gates(x).to(wide) / GATE_CAP)).chunk(2, -1)
        h, state = remember(q, k, v, log_input, F.logsigmoid(forget), state, reset, mask)
        h = F.layer_norm(h, h.shape[-1:], eps=DENSE_NORM_EPS).reshape(x.shape) * self.norm_weight
        return self.linear_out(torch.sigmoid(o) * h), state  # zero where masked, as h is

    def roles(self) -> dict[str, Role]:
        matrices = dict.fromkeys(("linear_in.weight", "linear_out.weight"), Role.MATRIX)
        return matrices | {"gates.weight": Role.GATE, "gates.bias": Role.BIAS, "norm_weight": Role.GAIN}


def fresh_memory(like: Tensor, lead: tuple[int, ...], keys: int, values: int) -> Memory:
    """A memory of zeros, at least float32, for each index of the axes `lead`."""
    dtype = torch.promote_types(like.dtype, torch.float32)
    return Memory(*(like.new_zeros((*lead, *at), dtype=dtype) for at in ((keys, values), (keys,), ())))


def remember(
    q: Float[Tensor, "B T *E H K"],
    k: Float[Tensor, "B T *E H K"],
    v: Float[Tensor, "B T *E H V"],
    log_input: Float[Tensor, "B T *E H"],
    log_forget: Float[Tensor, "B T *E H"],
    memory: Memory,
    reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Float[Tensor, "B T *E H V"], Memory]:
    """`matrix_memory` with extra axes, which are just more heads to it; the axes of `memory` are B, E, H first."""
    given = Memory(*(x.flatten(1, q.ndim - 3) for x in memory))
    q, k, flat = (x.flatten(2, -2) for x in (q, k, v))
    log_input, log_forget = log_input.flatten(2), log_forget.flatten(2)
    h, after = matrix_memory(q, k, flat, log_input, log_forget, given, reset=reset, mask=mask)
    return h.reshape(v.shape), Memory(*(x.reshape(old.shape) for x, old in zip(after, memory, strict=True)))


def block_diagonal(x: Float[Tensor, "*S D"], weight: Float[Tensor, "N O I"]) -> Float[Tensor, "*S M"]:
    """y[..., n, :] = weight[n] @ x[..., n, :]; x in N blocks of I features, y in N blocks of O."""
    blocks = x.unflatten(-1, (weight.shape[0], weight.shape[2]))
    return torch.einsum("...ni,noi->...no", blocks, weight).flatten(-2)


def load_xlstm_weights(mixer: MLSTM, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of an `mLSTMLayer` of xlstm 2.0.6 into `mixer`.

    Args:
        mixer: of the same sizes.
        weights: the layer's state_dict, with names as `proj_up.weight` and `mlstm_cell.igate.bias`.

    Raises:
        UsageError: names or shapes do not fit; nothing has been copied then.
    """
    names = {
        "linear_up.weight": "proj_up.weight",
        "conv_weight": "conv1d.conv.weight",
        "conv_bias": "conv1d.conv.bias",
        "query": "q_proj.weight",
        "key": "k_proj.weight",
        "value": "v_proj.weight",
        "input_gate.weight": "mlstm_cell.igate.weight",
        "input_gate.bias": "mlstm_cell.igate.bias",
        "forget_gate.weight": "mlstm_cell.fgate.weight",
        "forget_gate.bias": "mlstm_cell.fgate.bias",
        "norm_weight": "mlstm_cell.outnorm.weight",
        "skip": "learnable_skip",
        "linear_down.weight": "proj_down.weight",
    }
    if wrong := set(names.values()) ^ weights.keys():
        raise UsageError(
            f"load_xlstm_weights: these are not the weights of an mLSTM layer; differing: {', '.join(sorted(wrong))}"
        )
    found = {ours: weights[theirs] for ours, theirs in names.items()}
    found["conv_weight"] = found["conv_weight"][:, 0].T  # (M, 1, K), where the last tap is the current step too
    found["norm_weight"] = 1 + found["norm_weight"]
    for name, parameter in mixer.named_parameters():
        if found[name].shape != parameter.shape:
            raise UsageError(
                f"load_xlstm_weights: {names[name]} is {tuple(weights[names[name]].shape)}, which does not fit "
                f"{name} of {tuple(parameter.shape)}; build the mixer with the sizes of the layer"
            )
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            parameter.copy_(found[name])
