"""Layers that mix over time, all of one contract (`SequenceMixer`).

- `RGLRU`: the gated linear recurrent unit, bare
- `GatedLRU`: the recurrent block around it (branches, convolution, unit, projection)
- `GatedDelta`: gated delta net, a memory in which what a key stands for can be replaced; also KDA
- `MLSTM`: matrix memory with exponential gates, in its block (projections, convolution, norm, output gate)
- `DenseMLSTM`: the same memory in the block of xLSTM 7B (full projections, no convolution)
- `SLSTM`: scalar memory that reads its own output, with its convolution, gates and norm
- `S6`: selective state space (Mamba-1), in its block (projections, convolution, scan, output gate)
- `MultiScaleSSM`: a learned filter bank, a small state space on each of its bands, and a sum weighed by the input
- `MultiresConv`: the filter bank and a sum alone
- `LRU`: complex diagonal recurrence that does not depend on the data
- `WindowAttention`, `FullAttention`: causal attention to the last steps, or to an episode of bounded length
"""

from pliant.kernels import Memory
from pliant.mixers.attention import AttentionState, FullAttention, WindowAttention
from pliant.mixers.base import SequenceMixer, exportable
from pliant.mixers.gated_delta import GatedDelta, GatedDeltaState
from pliant.mixers.gated_lru import RGLRU, GatedLRU, GatedLRUState, RGLRUState
from pliant.mixers.lru import LRU, LRUState
from pliant.mixers.mlstm import MLSTM, DenseMLSTM, MLSTMState
from pliant.mixers.multi_scale import FoldedScaleState, MultiScaleSSM, MultiScaleState
from pliant.mixers.multires import FoldedState, MultiresConv, MultiresState
from pliant.mixers.s6 import S6, S6State
from pliant.mixers.slstm import SLSTM, SLSTMState

__all__ = [
    "LRU",
    "MLSTM",
    "RGLRU",
    "S6",
    "SLSTM",
    "DenseMLSTM",
    "FullAttention",
    "GatedDelta",
    "GatedLRU",
    "MultiScaleSSM",
    "MultiresConv",
    "SequenceMixer",
    "WindowAttention",
]

exportable(
    Memory,
    AttentionState,
    FoldedState,
    GatedDeltaState,
    GatedLRUState,
    RGLRUState,
    LRUState,
    MLSTMState,
    MultiScaleState,
    FoldedScaleState,
    MultiresState,
    S6State,
    SLSTMState,
)
