"""Stacks of xLSTM blocks, over features that are embedded already.

    x + mLSTM(norm(x))                              xLSTM: an mLSTM block
    x + sLSTM(norm(x)),  then x + ffn(norm(x))      xLSTM: an sLSTM block
    x + DenseMLSTM(norm(x)),  then x + ffn(norm(x)) xLSTM 7B
    ffn(x) = (act(x W_g) ⊙ x W_u) W_d

one after the other, and a last norm. Norms are LayerNorm and act is GELU in the first, RMSNorm and SiLU in xLSTM 7B.

Papers: Beck et al. 2024, xLSTM, arXiv:2405.04517, section 2.4 and appendix A; Beck et al. 2025, xLSTM 7B,
arXiv:2503.13427. Reference code: `xLSTMBlockStack` of xlstm 2.0.6 and `xLSTMModel` of transformers; lram-xlstm.md 2.4,
from which the initialisation is.
Departures: gains of norms are stored as they are, not less 1; resets and masks are ours.
"""

import copy
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role, UsageError
from pliant.core.roles import prefix
from pliant.kernels import Memory
from pliant.kernels._few_rows import plain
from pliant.kernels._mlstm_steps import BlockWeights, StepWeights, few_steps, mlstm_blocks_steps, takes
from pliant.mixers import MLSTM, SLSTM, SequenceMixer
from pliant.mixers.base import where_steps
from pliant.mixers.linear import Linear
from pliant.mixers.mlstm import DenseMLSTM, MLSTMState
from pliant.mixers.mlstm import load_xlstm_weights as load_mlstm
from pliant.mixers.slstm import load_xlstm_weights as load_slstm
from pliant.models._steps import Kept
from pliant.models.quantize import QuantizedLinear

NORM_EPS, LARGE_NORM_EPS = 1e-5, 1e-6
EXPAND, LARGE_EXPAND = 1.3, 8 / 3  # inner width of the feed-forward part over the width, lram-xlstm.md 2.3 and 2.4
ROUND_UP = 64  # its inner width is a multiple of it


class FeedForward(nn.Module):
    """`(..., D) -> (..., D)`, see above; F = `expand` D, rounded up to a multiple of 64, features within."""

    def __init__(self, width: int, expand: float, activation: Callable[[Tensor], Tensor], depth: int):
        super().__init__()
        inner = math.ceil(expand * width / ROUND_UP) * ROUND_UP
        self.activation = activation
        self.linear_in = Linear(width, 2 * inner, bias=False)
        self.linear_out = Linear(inner, width, bias=False)
        nn.init.normal_(self.linear_in.weight, std=math.sqrt(2 / (5 * width)))
        nn.init.normal_(self.linear_out.weight, std=2 / depth / math.sqrt(width))

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        gate, up = self.linear_in(x).chunk(2, dim=-1)
        return self.linear_out(self.activation(gate) * up)

    def roles(self) -> dict[str, Role]:
        return {"linear_in.weight": Role.MATRIX, "linear_out.weight": Role.MATRIX}


class Block(nn.Module):
    """x + mixer(norm(x)), then x + ffn(norm(x)) if there is one. `(B, T, *E, D) -> (B, T, *E, D)`."""

    def __init__(self, mixer: SequenceMixer, norm: Callable[[int], nn.Module], ffn: FeedForward | None = None):
        super().__init__()
        self.norm = norm(mixer.width)
        self.mixer = mixer
        self.ffn_norm = None if ffn is None else norm(mixer.width)
        self.ffn = ffn

    def forward(
        self, x: Tensor, state: Any, *, reset: Tensor | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, Any]:
        mixed, state = self.mixer(self.norm(x), state, reset=reset, mask=mask)
        x = x + mixed
        if self.ffn is not None and self.ffn_norm is not None:
            x = x + self.ffn(self.ffn_norm(x))
        return x, state

    def roles(self) -> dict[str, Role]:
        roles = {"norm.weight": Role.GAIN} | prefix("mixer", self.mixer.roles())
        if self.ffn is not None:
            roles |= {"ffn_norm.weight": Role.GAIN} | prefix("ffn", self.ffn.roles())
        return roles


TOGETHER = 4
"""Blocks in one pass; fewer take one each. Numba compiles for each number of them, so there are two."""

Run = tuple[range, tuple[BlockWeights, ...]]
"""Blocks by their numbers, and their weights; none if the blocks are called one by one."""


def _runs(stack: nn.Module) -> list[Run]:
    """The blocks of a stack in order, those together that few steps can take in one pass."""
    assert isinstance(stack, BlockStack)
    runs: list[Run] = []
    weights = [_as_arrays(block) for block in stack.blocks]
    for kind, run in groupby(weights, key=lambda w: None if w is None else (w.up.dtype, w.down.dtype)):
        found = list(run)
        while found:
            size, first = TOGETHER if len(found) >= TOGETHER else 1, runs[-1][0].stop if runs else 0
            taken, found = found[:size], found[size:]
            runs.append((range(first, first + size), () if kind is None else tuple(w for w in taken if w)))
    return runs


def _as_arrays(block: Block) -> BlockWeights | None:
    """For `mlstm_blocks_steps`; None if the block is no mLSTM block, or its weights are of another kind."""
    norm, mixer = block.norm, block.mixer
    if type(norm) is not nn.LayerNorm or norm.bias is not None or type(mixer) is not MLSTM or block.ffn is not None:
        return None
    inner = mixer.step_weights()
    ends: list[np.ndarray] = []
    for linear in (mixer.linear_up, mixer.linear_down):
        if isinstance(linear, QuantizedLinear):
            ends += [linear.int8.numpy(), linear.scale.numpy()]
        elif type(linear) in (Linear, nn.Linear) and plain(linear.weight):
            ends += [linear.weight.detach().numpy(), np.empty(0, np.float32)]
        else:
            return None
    if not plain(norm.weight, *inner):
        return None
    return BlockWeights(norm.weight.detach().numpy(), *ends, StepWeights(*(x.detach().numpy() for x in inner)))


class XLSTMState(NamedTuple):
    """The states of the mixers, in their order."""

    blocks: tuple[Any, ...]


class BlockStack(SequenceMixer):
    """Blocks, then a norm. `(B, T, *E, D) -> (B, T, *E, D)`."""

    def __init__(self, width: int, blocks: Sequence[Block], norm: nn.Module):
        super().__init__()
        self.width = width
        self.blocks: Sequence[Block] = nn.ModuleList(blocks)  # type: ignore[assignment]
        self.norm = norm
        self._arrays = Kept(_runs)

    def init_state(self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None) -> XLSTMState:
        return XLSTMState(tuple(block.mixer.init_state(batch, extra, device=device) for block in self.blocks))

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: XLSTMState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], XLSTMState]:
        x, state = self.start(x, state, reset, mask)
        after: list[Any] = []
        for places, weights in (self._arrays.of(self) if few_steps(x) else None) or [(range(len(self.blocks)), ())]:
            before = [state.blocks[i] for i in places]
            if weights and all(takes(*part) for part in before):
                x, made = mlstm_blocks_steps(x, weights, before, reset, mask, NORM_EPS)
                after += [MLSTMState(conv, Memory(*memory)) for conv, memory in made]
                continue
            for i in places:
                x, new = self.blocks[i](x, state.blocks[i], reset=reset, mask=mask)
                after.append(new)
        y = self.norm(x)
        return (y if mask is None else where_steps(mask, y)), XLSTMState(tuple(after))

    def roles(self) -> dict[str, Role]:
        roles = {"norm.weight": Role.GAIN}
        for i, block in enumerate(self.blocks):
            roles |= prefix(f"blocks.{i}", block.roles())
        return roles


class XLSTM(BlockStack):
    """The xLSTM stack of 2024. `(B, T, *E, D) -> (B, T, *E, D)`.

    Args:
        width: D.
        depth: blocks.
        num_heads: heads of every block.
        slstm_at: which blocks, counted from 0, are sLSTM blocks; the others are mLSTM blocks.

    Raises:
        UsageError: depth is not positive, or `slstm_at` names a block that is not there.
    """

    def __init__(self, width: int, depth: int, num_heads: int = 4, slstm_at: Collection[int] = ()):
        _check_depth("XLSTM", depth)
        if wrong := [i for i in slstm_at if not 0 <= i < depth]:
            raise UsageError(f"XLSTM: slstm_at names block {wrong[0]}, expected 0 to depth - 1 = {depth - 1}")
        blocks = []
        for i in range(depth):
            if i in slstm_at:
                mixer: SequenceMixer = SLSTM(width, num_heads, i, depth)
                blocks.append(Block(mixer, _layer_norm, FeedForward(width, EXPAND, F.gelu, depth)))
            else:
                blocks.append(Block(MLSTM(width, num_heads, depth=depth), _layer_norm))
        super().__init__(width, blocks, _layer_norm(width))


class XLSTMLarge(BlockStack):
    """The stack of xLSTM 7B, without embedding and head. `(B, T, *E, D) -> (B, T, *E, D)`.

    Args:
        width: D, a multiple of twice the heads.
        depth: blocks.
        num_heads: heads of every block.

    Raises:
        UsageError: depth is not positive, or the width does not fit.
    """

    def __init__(self, width: int, depth: int, num_heads: int = 8):
        _check_depth("XLSTMLarge", depth)
        blocks = []
        for _ in range(depth):
            ffn = FeedForward(width, LARGE_EXPAND, F.silu, depth)
            blocks.append(Block(DenseMLSTM(width, num_heads, depth), _rms_norm, ffn))
        super().__init__(width, blocks, _rms_norm(width))


def _layer_norm(width: int) -> nn.Module:
    return nn.LayerNorm(width, eps=NORM_EPS, bias=False)


def _rms_norm(width: int) -> nn.Module:
    return nn.RMSNorm(width, eps=LARGE_NORM_EPS)


def _check_depth(name: str, depth: int) -> None:
    if depth < 1:
        raise UsageError(f"{name}: depth is {depth}, expected at least 1")


def load_xlstm_weights(model: XLSTM, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of an `xLSTMBlockStack` of xlstm 2.0.6 into `model`.

    Args:
        model: of the same sizes, with sLSTM blocks at the same places.
        weights: the stack's state_dict.

    Raises:
        UsageError: names or shapes do not fit; nothing has been copied then.
    """
    filled, rest = copy.deepcopy(model), dict(weights)
    found = {"norm.weight": 1 + _take(rest, "post_blocks_norm.weight")}
    for i, block in enumerate(filled.blocks):
        begin = f"blocks.{i}.xlstm."
        layer = {name.removeprefix(begin): rest.pop(name) for name in list(rest) if name.startswith(begin)}
        if isinstance(block.mixer, SLSTM):
            load_slstm(block.mixer, layer)
        elif isinstance(block.mixer, MLSTM):
            load_mlstm(block.mixer, layer)
        found[f"blocks.{i}.norm.weight"] = 1 + _take(rest, f"blocks.{i}.xlstm_norm.weight")
        if block.ffn is not None:
            found[f"blocks.{i}.ffn_norm.weight"] = 1 + _take(rest, f"blocks.{i}.ffn_norm.weight")
            for ours, theirs in (("linear_in", "proj_up"), ("linear_out", "proj_down")):
                found[f"blocks.{i}.ffn.{ours}.weight"] = _take(rest, f"blocks.{i}.ffn.{theirs}.weight")
    _fill(model, filled.state_dict() | found, rest)


def load_transformers_weights(model: XLSTMLarge, weights: Mapping[str, Tensor]) -> None:
    """Copy the weights of an `xLSTMModel` of transformers, or of `xLSTMForCausalLM`, into `model`.

    Args:
        model: of the same sizes; the configuration has `qk_dim_factor` 0.5, `v_dim_factor` 1, no biases.
        weights: their state_dict, in either `weight_mode`; embeddings and head are left aside.

    Raises:
        UsageError: names or shapes do not fit; nothing has been copied then.
    """
    outside = ("embeddings.weight", "lm_head.weight")
    rest = {name.removeprefix("backbone."): weight for name, weight in weights.items()}
    rest = {name: weight for name, weight in rest.items() if name not in outside}
    single = ("q.weight", "k.weight", "v.weight", "ogate_preact.weight")
    found = {"norm.weight": _take(rest, "out_norm.weight")}
    for i in range(len(model.blocks)):
        theirs, ours, layer = f"blocks.{i}.", f"blocks.{i}.", f"blocks.{i}.mlstm_layer."
        found |= {
            f"{ours}norm.weight": _take(rest, f"{theirs}norm_mlstm.weight"),
            f"{ours}mixer.linear_in.weight": _joined(rest, layer, "qkv_opreact.weight", single),
            f"{ours}mixer.norm_weight": _take(rest, f"{layer}multihead_norm.weight"),
            f"{ours}mixer.linear_out.weight": _take(rest, f"{layer}out_proj.weight"),
            f"{ours}ffn_norm.weight": _take(rest, f"{theirs}norm_ffn.weight"),
            f"{ours}ffn.linear_out.weight": _take(rest, f"{theirs}ffn.proj_down.weight"),
        }
        up = ("proj_up_gate.weight", "proj_up.weight")
        found[f"{ours}ffn.linear_in.weight"] = _joined(rest, f"{theirs}ffn.", "proj_up_gate_z.weight", up)
        for part in ("weight", "bias"):
            gates = (f"igate_preact.{part}", f"fgate_preact.{part}")
            found[f"{ours}mixer.gates.{part}"] = _joined(rest, layer, f"ifgate_preact.{part}", gates)
    _fill(model, found, rest)


def _take(rest: dict[str, Tensor], name: str) -> Tensor:
    if name not in rest:
        raise UsageError(f"the weights lack {name}; build the model with the blocks that they are of")
    return rest.pop(name)


def _joined(rest: dict[str, Tensor], begin: str, fused: str, parts: Sequence[str]) -> Tensor:
    if begin + fused in rest:
        return rest.pop(begin + fused)
    return torch.cat([_take(rest, begin + part) for part in parts])


def _fill(model: nn.Module, found: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> None:
    if rest:
        raise UsageError(f"the weights have {min(rest)}, for which the model has no place; build it with their sizes")
    for name, parameter in model.named_parameters():
        if found[name].shape != parameter.shape:
            raise UsageError(
                f"the weights have {tuple(found[name].shape)} for {name} of {tuple(parameter.shape)}; "
                "build the model with their sizes"
            )
    model.load_state_dict(dict(found))
