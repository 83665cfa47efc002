"""Directed information from two recurrent predictors, for alphabets that are too large to count.

One predictor is told the turns of the sink so far and those of the source before its window; the other is told the
window, too. By how many bits the second foresees the sink better is directed information (its form E1 in
`pliant.measure.context_tree`, with recurrent models in the place of trees); the mean divergence of the two (E3) says
the same with less noise, and is never negative. Lives come one batch after the other, each foreseen before it is
learned (Dawid 1984), so that nothing has to be held out. A difference of two upper bounds is no bound: both code
lengths are told, and the estimate is too low as long as the second predictor learns more slowly than the first.
"""

import copy
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Answer, Question, UsageError, seeded
from pliant.learn.learner import Learner
from pliant.learn.rules import bptt
from pliant.measure.flow import Flow, Window
from pliant.measure.lifetimes import Lifetimes
from pliant.models import SequenceClassifier
from pliant.optim import adamw

MakeModel = Callable[[int, int], nn.Module]
"""(features, classes) -> a model as of `pliant.models`."""


def small(features: int, classes: int) -> nn.Module:
    """A gated LRU of width 32."""
    return SequenceClassifier(features, classes, width=32, depth=1)


class Codes(NamedTuple):
    """Bits for a life, over those that were scored.

    Attributes:
        bits: the estimate, by the mean divergence of the two predictors (E3).
        difference: by the difference of their code lengths (E1), and `error`: its standard error over lives.
        without, informed: code lengths of the sink's window, not told and told of the source's window.
        lives: how many were scored.
    """

    bits: float
    difference: float
    error: float
    without: float
    informed: float
    lives: int


def two_predictors(
    lives: Lifetimes, source: str, *, source_window: Window | None = None, sink_window: Window | None = None,
    make: MakeModel = small, rate: float = 5e-3, batch: int = 32, scored: float = 0.5, seed: int = 0,
) -> Codes:  # fmt: skip
    """Bits by which a source shapes the other player, in the direction of time.

    Args:
        lives: of one pair.
        source: "A" for empowerment, "O" for plasticity.
        source_window, sink_window: first and last index, from 1, both in it; None: all.
        make: makes both models.
        rate: of AdamW; falls to a tenth over all lives.
        batch: lives that are foreseen, and then learned, together.
        scored: share of the lives, the last ones, that count.
        seed: of parameters and of the order of lives.

    Raises:
        UsageError: another source, a window that is not within the lives, fewer lives than two batches, or a share of
            lives that leaves none.
    """
    if source not in ("A", "O"):
        raise UsageError(f"two_predictors: source is {source!r}, expected A or O")
    if batch < 1 or len(lives) < 2 * batch:
        raise UsageError(f"two_predictors: {len(lives)} lives, expected at least two batches of {batch}, of 1 or more")
    if not 0 < scored <= 1:
        raise UsageError(f"two_predictors: scored is {scored}, expected a share of the lives, more than 0 up to 1")
    frame = Flow(np.zeros((lives.n, lives.n)), lives.order, lives.alphabets)
    (a, b), (c, d) = frame.window(source_window), frame.window(sink_window)
    targets = torch.from_numpy((lives.observations if source == "A" else lives.actions).astype(np.int64))[:, :d]
    known = (torch.arange(d) >= c - 1).expand(batch, d)
    told = [_inputs(lives, source, seen)[:, :d] for seen in (a - 1, b)]
    with seeded(seed, "two predictors"):
        model = make(told[0].shape[-1], lives.alphabets[source == "A"])
    # Both begin alike, so that they say the same where they are told the same.
    pair = [_Reader(inputs, targets, known, copy.deepcopy(model), rate) for inputs in told]
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(lives)))
    count, kept = len(lives) // batch, []
    for step in range(count):
        rows = order[step * batch : (step + 1) * batch]
        plain, better = (reader.foresee(rows, step, rate * (1 - 0.9 * step / count)) for reader in pair)
        if step >= (1 - scored) * count:
            kept.append(_nats(plain, better, targets[rows], known))
    bits = torch.cat(kept).double() / math.log(2)
    divergence, without, informed = bits.mean(0).tolist()
    error = float((bits[:, 1] - bits[:, 2]).std()) / math.sqrt(len(bits))
    return Codes(divergence, without - informed, error, without, informed, len(bits))


class _Reader:
    """A learner that foresees the sink, told what is in `inputs` `(N, n, F)`."""

    def __init__(self, inputs: Tensor, targets: Tensor, known: Tensor, model: nn.Module, rate: float):
        self.inputs, self.targets, self.known = inputs, targets, known
        self.learner = Learner(model, adamw(model, rate), bptt(inputs.shape[1]), remember=1)

    def foresee(self, rows: Tensor, step: int, rate: float) -> Tensor:
        """Log-probabilities `(B, n, K)` of what is learned right after."""
        inputs, streams = self.inputs[rows], torch.arange(len(rows))
        start = torch.zeros(inputs.shape[:2], dtype=torch.bool)
        start[:, 0] = True
        time = step * inputs.shape[1]
        output = self.learner.predict(Question(inputs, start, torch.ones_like(start), time, streams))
        for group in self.learner.optimizer.param_groups:
            group["lr"] = rate
        self.learner.learn(Answer(self.targets[rows], self.known, self.known, time, streams))
        return output.log_softmax(-1)


def _inputs(lives: Lifetimes, source: str, seen: int) -> Tensor:
    """Before each turn of the sink, `(N, n, F)`: its own last turn, and the source's if that is of the first `seen`.

    One-hot; one more place of each stands for a turn that there is not, or that is not told.
    """
    x, y, (size_x, size_y) = lives.actions, lives.observations, lives.alphabets
    if source == "O":
        x, y, size_x, size_y = y, x, size_y, size_x
    lag = 0 if lives.order[0] == source else 1
    told = np.where(np.arange(lives.n) < seen, x, size_x)
    told = np.pad(told, ((0, 0), (lag, 0)), constant_values=size_x)[:, : lives.n]
    last = np.pad(y, ((0, 0), (1, 0)), constant_values=size_y)[:, : lives.n]
    hot = [F.one_hot(torch.from_numpy(z.astype(np.int64)), size + 1) for z, size in ((last, size_y), (told, size_x))]
    return torch.cat(hot, -1).float()


def _nats(plain: Tensor, informed: Tensor, targets: Tensor, known: Tensor) -> Tensor:
    """Of each life in nats, `(B, 3)`: divergence, code length without, and with."""
    divergence = (informed.exp() * (informed - plain)).sum(-1)
    lengths = [-said.gather(-1, targets[..., None])[..., 0] for said in (plain, informed)]
    return torch.stack([(part * known).sum(1) for part in (divergence, *lengths)], 1)
