"""Strings that a model copies wrongly, though it gives them a low perplexity.

The task: symbols b_1 ... b_n, a stop, and then the same symbols again. A model that copies α surely, whatever its
length, and whose output moves little when one of many symbols does, must say α on a prompt that differs from α in one
place. The n - 1 places where that is right make the perplexity low.

Paper: Veličković et al. 2026, Perplexity Cannot Always Tell Right from Wrong, arXiv:2601.22950, section 3 (lemma 3.1,
proposition 3.2), after Pasten et al. 2025, arXiv:2505.10606.
Departures: the bound has other constants, since those of eq. 17 are negative as printed (perplexity-selection.md 2.3);
the place that is flipped is searched for, where the paper takes the last.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from pliant.core import UsageError

TRIES = 16
"""Places that are tried for a length, if none is given."""


class Copied(NamedTuple):
    """A string α and its neighbor β, which differs at one place. Code lengths are nats per symbol.

    Attributes:
        length: n.
        at: the place that differs, from 0.
        gap: largest difference of a probability between the two, over places and tokens, each after what was said.
        least: lowest probability of a symbol of α.
        flipped: probability that β gives the symbol which differs.
        nll, nll_flipped: of α and of β, the running prefix being what the model itself said (eq. 3).
        nll_target, nll_flipped_target: the running prefix being the string, as when a model is trained.
        copied, flipped_copied: whether what the model says is the string.
    """

    length: int
    at: int
    gap: float
    least: float
    flipped: float
    nll: float
    nll_flipped: float
    nll_target: float
    nll_flipped_target: float
    copied: bool
    flipped_copied: bool


@torch.no_grad()
def wrong_but_low(
    model: Callable[[Tensor], Any],
    lengths: Sequence[int],
    *,
    source: Callable[[int], Int[Tensor, "N"]] | None = None,
    at: int | None = None,
    symbols: tuple[int, int] = (0, 1),
    stop: int = 2,
    begin: Sequence[int] = (),
) -> list[Copied]:
    """For each length the neighbor of a string that is copied wrongly with the lowest perplexity.

    Args:
        model: tokens `(B, T)` int64 to logits of the next token `(B, T, V)`; alone, first of a tuple, or as `.logits`.
        lengths: n of the strings.
        source: gives α of n symbols as 0 and 1 `(n,)`; None: all zero.
        at: place to flip, negative from the end; None tries 16 of them, the last among them.
        symbols: tokens that stand for 0 and 1; where both are as probable, the first is said.
        stop: token between the string and its copy.
        begin: tokens before the string.

    Returns:
        One row per length; where no neighbor is copied wrongly, the one of lowest perplexity.

    Raises:
        UsageError: there is no such place in a string, α is no string of such symbols, or the model gives no numbers,
            or not the same ones for the same tokens, or looks ahead.
    """
    training = isinstance(model, nn.Module) and model.training
    if training:
        model.eval()  # type: ignore[attr-defined]
    try:
        return [_nearest(model, length, source, at, symbols, stop, begin) for length in lengths]
    finally:
        if training:
            model.train()  # type: ignore[attr-defined]


def _nearest(
    model: Callable[[Tensor], Any], length: int, source: Callable[[int], Tensor] | None, at: int | None,
    symbols: tuple[int, int], stop: int, begin: Sequence[int],
) -> Copied:  # fmt: skip
    alpha = torch.zeros(length, dtype=torch.int64) if source is None else source(length).long()
    places = _places(length, at)
    if alpha.shape != (length,) or not ((alpha == 0) | (alpha == 1)).all():
        raise UsageError(f"wrong_but_low: source gave {tuple(alpha.shape)}, expected {length} symbols, 0 or 1")
    strings = alpha.repeat(len(places) + 1, 1)
    rows = torch.arange(1, len(places) + 1)
    strings[rows, torch.tensor(places)] = 1 - strings[rows, torch.tensor(places)]
    task = _Task(model, torch.tensor(symbols), stop, torch.tensor(begin, dtype=torch.int64))
    said, greedy = task.say(strings, guess=alpha.expand_as(strings))
    target = task.log_probabilities(strings, strings)
    nlls, nlls_target = (-task.of(strings, logs).mean(1) for logs in (greedy, target))
    right = (said == strings).all(1)
    best = min(rows.tolist(), key=lambda row: (bool(right[row]), float(nlls[row])))
    gap = float((greedy[best].exp() - greedy[0].exp()).abs().max())
    sure = task.of(strings, greedy).exp()
    return Copied(length, places[best - 1], gap, float(sure[0].min()), float(sure[best, places[best - 1]]),
                  float(nlls[0]), float(nlls[best]), float(nlls_target[0]), float(nlls_target[best]),
                  bool(right[0]), bool(right[best]))  # fmt: skip


def _places(length: int, at: int | None) -> list[int]:
    if length < 1 or (at is not None and not -length <= at < length):
        raise UsageError(f"wrong_but_low: a string of {length} symbols has no place {at}")
    if at is not None:
        return [at % length]
    return sorted({round(i * (length - 1) / (TRIES - 1)) for i in range(TRIES)})


class _Task(NamedTuple):
    model: Callable[[Tensor], Any]
    symbols: Tensor
    stop: int
    begin: Tensor

    def log_probabilities(self, strings: Int[Tensor, "B N"], prefixes: Int[Tensor, "B N"]) -> Float[Tensor, "B N V"]:
        """Of the next token at each place of the copy, after the place's prefix; float64."""
        head = self.begin.expand(len(strings), -1)
        stop = torch.full_like(strings[:, :1], self.stop)
        tokens = torch.cat([head, self.symbols[strings], stop, self.symbols[prefixes[:, :-1]]], 1)
        made = self.model(tokens)
        logits = made[0] if isinstance(made, tuple) else getattr(made, "logits", made)
        logs = logits[:, -strings.shape[1] :].double().log_softmax(-1)
        if logs.isnan().any():
            raise UsageError("wrong_but_low: the model gives logits that are no numbers (NaN)")
        return logs

    def of(self, strings: Int[Tensor, "B N"], logs: Float[Tensor, "B N V"]) -> Float[Tensor, "B N"]:
        """Log probability of each symbol of the strings."""
        return logs.gather(-1, self.symbols[strings][..., None])[..., 0]

    def say(self, strings: Int[Tensor, "B N"], guess: Int[Tensor, "B N"]) -> tuple[Tensor, Tensor]:
        """What greedy decoding says `(B, N)`, and the log probabilities on its way.

        From a guess of all of it: a guess that comes out again is what step by step would have been said, and each
        pass settles one more place at least, mostly many.
        """
        said = guess
        for _ in range(strings.shape[1] + 1):
            logs = self.log_probabilities(strings, said)
            both = logs[..., self.symbols]
            after = (both[..., 1] > both[..., 0]).long()
            if after.equal(said):
                return said, logs
            said = after
        raise UsageError("wrong_but_low: what the model says after a prefix differs from call to call, or depends on "
                         "what comes after it")  # fmt: skip


def copy_bound(length: int, gap: float, floor: float) -> float:
    """(1/n) log(1/ε) + 2 ε' >= |nll of α - nll of β|, nats per symbol, if α is copied with more than ½ throughout.

    Args:
        length: n.
        gap: ε', largest difference of a probability between the two prompts.
        floor: ε, lowest probability that the model gives anything.

    Raises:
        UsageError: n below 1, or ε that is no probability above 0.
    """
    if length < 1 or not 0 < floor <= 1:
        raise UsageError(f"copy_bound: length {length} and floor {floor}, expected 1 or more, and 0 < floor <= 1")
    return math.log(1 / floor) / length + 2 * gap


def copy_length(difference: float, floor: float) -> int:
    """⌈2 log(1/ε) / ξ⌉: from this n on the place that is wrong adds less than half of the difference ξ, in nats.

    Raises:
        UsageError: ξ that is not above 0, or ε that is no probability above 0.
    """
    if not difference > 0 or not 0 < floor <= 1:
        raise UsageError(
            f"copy_length: difference {difference} and floor {floor}, expected above 0, and 0 < floor <= 1"
        )
    return math.ceil(2 * math.log(1 / floor) / difference)
