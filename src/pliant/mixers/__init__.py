"""Layers that mix over time, all of one contract (`SequenceMixer`).

- `RGLRU`: the gated linear recurrent unit, bare
- `GatedLRU`: the recurrent block around it (branches, convolution, unit, projection)
"""

from pliant.mixers.base import SequenceMixer
from pliant.mixers.gated_lru import RGLRU, GatedLRU

__all__ = ["RGLRU", "GatedLRU", "SequenceMixer"]
