"""One row per mixer; the conformance suite runs on each."""

from pliant.kernels import adaptive_softmax
from pliant.mixers import (
    LRU,
    MLSTM,
    RGLRU,
    S6,
    SLSTM,
    DenseMLSTM,
    FullAttention,
    GatedDelta,
    GatedLRU,
    MultiresConv,
    MultiScaleSSM,
    WindowAttention,
)
from pliant.mixers.sharpen import ASEntmax
from tests.suite import Case

CASES = (
    Case("RGLRU", lambda: RGLRU(6), 6),
    Case("RGLRU, three heads, small radius", lambda: RGLRU(6, 3, min_radius=0.1, max_radius=0.5), 6),
    Case("GatedLRU", lambda: GatedLRU(6), 6),
    Case("GatedLRU, wider, two heads, two taps", lambda: GatedLRU(4, 8, 2, conv_width=2), 4),
    Case("GatedLRU, one tap", lambda: GatedLRU(4, conv_width=1), 4),
    Case("GatedDelta", lambda: GatedDelta(6, 2, 3, 4), 6),
    Case("GatedDelta, per channel, grouped, one tap", lambda: GatedDelta(4, 1, 2, 3, 2, 1, True, True), 4),
    Case("MLSTM", lambda: MLSTM(4, 2, 8), 4),
    Case("MLSTM, one head, blocks of two, one tap", lambda: MLSTM(3, 1, 6, conv_width=1, block_size=2), 3),
    Case("DenseMLSTM", lambda: DenseMLSTM(8, 2), 8),
    Case("SLSTM", lambda: SLSTM(8), 8),
    Case("SLSTM, one head, last block, one tap", lambda: SLSTM(5, 1, 2, 3, conv_width=1), 5),
    Case("S6", lambda: S6(6, state_size=3), 6),
    Case("S6, one channel per feature, one tap, one state", lambda: S6(3, 1, 1, 1), 3),
    Case("MultiScaleSSM", lambda: MultiScaleSSM(4, state_per_scale=2), 4),
    Case("MultiScaleSSM, selective", lambda: MultiScaleSSM(4, 2, 3, 2, True, weights="softmax"), 4),
    Case("MultiScaleSSM, no bank", lambda: MultiScaleSSM(3, 0, state_per_scale=3, weights="static"), 3),
    Case(
        "MultiScaleSSM, complex, per channel",
        lambda: MultiScaleSSM(3, 1, 2, 2, weights="channel", complex_states=True),
        3,
    ),
    Case(
        "MultiScaleSSM, complex, selective, one tap",
        lambda: MultiScaleSSM(3, 2, 1, 1, True, weights="static", complex_states=True),
        3,
    ),
    Case("MultiresConv", lambda: MultiresConv(4, 3), 4),
    Case("MultiresConv, filters of their own, three taps", lambda: MultiresConv(3, 2, 3, shared=False), 3),
    Case("LRU", lambda: LRU(4), 4),
    Case("LRU, more states than features, slow", lambda: LRU(3, 5, 0.9, 0.999, 0.3), 3),
    Case("WindowAttention", lambda: WindowAttention(8, 2, 4), 8),
    Case("WindowAttention, this step alone", lambda: WindowAttention(4, 1, 1), 4),
    Case("FullAttention", lambda: FullAttention(4, 2, 33), 4),
    Case("FullAttention, one head", lambda: FullAttention(2, 1, 33), 2),
    Case("WindowAttention, adaptive softmax", lambda: WindowAttention(8, 2, 4, sharpen=adaptive_softmax), 8),
    Case("FullAttention, ASEntmax", lambda: FullAttention(4, 2, 33, sharpen=ASEntmax(2, 2)), 4),
)
