"""Layers that mix over time, all of one contract (`SequenceMixer`).

- `RGLRU`: the gated linear recurrent unit, bare
- `GatedLRU`: the recurrent block around it (branches, convolution, unit, projection)
- `GatedDelta`: gated delta net, a memory in which what a key stands for can be replaced; also KDA
- `MLSTM`: matrix memory with exponential gates, in its block (projections, convolution, norm, output gate)
- `DenseMLSTM`: the same memory in the block of xLSTM 7B (full projections, no convolution)
- `SLSTM`: scalar memory that reads its own output, with its convolution, gates and norm
- `S6`: selective state space (Mamba-1), in its block (projections, convolution, scan, output gate)
- `LRU`: complex diagonal recurrence that does not depend on the data
- `WindowAttention`, `FullAttention`: causal attention to the last steps, or to an episode of bounded length
"""

from pliant.mixers.attention import FullAttention, WindowAttention
from pliant.mixers.base import SequenceMixer
from pliant.mixers.gated_delta import GatedDelta
from pliant.mixers.gated_lru import RGLRU, GatedLRU
from pliant.mixers.lru import LRU
from pliant.mixers.mlstm import MLSTM, DenseMLSTM
from pliant.mixers.s6 import S6
from pliant.mixers.slstm import SLSTM

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
    "SequenceMixer",
    "WindowAttention",
]
