"""One row per model; the conformance suite of the mixers runs on each."""

from typing import Any

import torch

from pliant.models import XLSTM, LanguageModel, SequenceClassifier, XLSTMLarge
from tests.suite import Case

GATES = {"num_heads": 2}


class Drawn(LanguageModel):
    """Reads numbers `(B, T, *E, 1)` as tokens, since that is what the suite draws; NaN is a token that is not there."""

    def forward(self, x: Any, state: Any = None, **flags: Any) -> Any:
        if x.shape[-1] == 1:
            x = torch.where(x.isnan(), -1, (8 * x).long() % self.num_tokens)[..., 0]
        return super().forward(x, state, **flags)


CASES = (
    Case("classifier, per step", lambda: SequenceClassifier(3, 4, width=8, depth=2, mixer_options=GATES), 3),
    Case("classifier, pooled", lambda: SequenceClassifier(3, 4, width=8, depth=1, readout="mean"), 3),
    Case("mixture, pooled", lambda: SequenceClassifier(3, 2, width=8, depth=1, readout="mean", head="mixture"), 3),
    Case(
        "labels, layer norm, not normalized",
        lambda: SequenceClassifier(3, 2, width=8, depth=1, mixer="LRU", head="labels", norm="layer", normalize=False),
        3,
    ),
    Case("forecast", lambda: SequenceClassifier(3, 2, width=8, depth=1, mixer="RGLRU", head="forecast", horizon=3), 3),
    Case("bare recurrence", lambda: SequenceClassifier(3, 4, width=8, depth=1, mixer="RGLRU"), 3),
    Case("multi-scale, sized", lambda: SequenceClassifier.sized(1, 3, 4, mixer="MultiScaleSSM"), 3),
    # A norm over two or four features of a head is close to their sign, and lets no rounding stay small.
    Case("xLSTM, an mLSTM and an sLSTM block", lambda: XLSTM(16, 2, 2, slstm_at=[1]), 16),
    Case("xLSTM 7B", lambda: XLSTMLarge(8, 1, 2), 8),
    Case("language", lambda: Drawn(5, width=8), 1),
    Case("language, attention", lambda: Drawn(5, width=8, mixer="FullAttention", mixer_options={"max_steps": 33}), 1),
)
