"""Scores of predicted tokens, in one pass over logits of any size and with memory that need not grow.

Code lengths and entropies are in nats. What cannot be scored is not passed over: a probability of zero for the token
that came is a code length of infinity, and logits that are NaN make the means NaN.
"""

import math
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pliant.core import UsageError

ROOM = 1 << 18
"""Numbers that are worked on at a time, so that they stay in a processor's cache."""
BINS = 15
RANGES = 32
"""Positions 0, 1, 2 to 3, 4 to 7, ... are summed apart."""


class TokenStatistics(NamedTuple):
    """Of n predicted tokens, each `(n,)`: nll, confidence, entropy, brier float64; right bool.

    nll: -log p(target), nats. right: the most probable token, the first of several, is the target. confidence: its
    probability. entropy: of the whole distribution, nats. brier: squared distance of all probabilities from the truth.
    """

    nll: Tensor
    right: Tensor
    confidence: Tensor
    entropy: Tensor
    brier: Tensor


def token_statistics(logits: Float[Tensor, "N V"], targets: Int[Tensor, "N"]) -> TokenStatistics:
    """What `TokenStatistics` names, for logits of any size.

    Nothing overflows: with m the greatest logit, -log p_t = (m - x_t) + log Σ exp(x - m), whose first part is exact in
    float64 for logits in float32. Memory beside the logits is constant. A logit may be -inf, a probability of zero.
    """
    found = []
    rows = max(1, ROOM // max(1, logits.shape[-1]))
    for x, target in zip(logits.split(rows), targets.split(rows), strict=True):
        x = x if x.dtype == torch.float64 else x.float()
        most, best = x.max(-1, keepdim=True)
        at_target = x.gather(-1, target[:, None])
        shifted = x - most
        shares = shifted.exp()
        total = shares.sum(-1, keepdim=True)
        log_total = total.double().log()
        # Where a share is zero, so is what it adds, also if its logit is -inf.
        mean = (shares * shifted.clamp_(min=torch.finfo(x.dtype).min)).sum(-1, keepdim=True) / total
        nll = (most.double() - at_target.double()) + log_total
        square = shares.square_().sum(-1, keepdim=True).double() / total.double().square()
        right = (best == target[:, None]) & ~most.isnan()
        brier = 1 - 2 * (-nll).exp() + square
        found.append(torch.cat([nll, right.double(), 1 / total.double(), log_total - mean.double(), brier], 1))
    nll, right, confidence, entropy, brier = torch.cat(found).unbind(1) if found else logits.new_zeros(5, 0).double()
    return TokenStatistics(nll, right > 0, confidence, entropy, brier)


class Summary(NamedTuple):
    """Means over tokens. Nats, but `bits_per_byte`; NaN is what is not known or has no token.

    Attributes:
        tokens: how many.
        nll: L, the logarithm of perplexity.
        accuracy: a.
        right_nll, wrong_nll: l_R and l_W.
        confidence, entropy, brier: of the predictions; brier is 0 to 2.
        calibration: expected error of the confidence, 15 bins of equal width.
        num_bytes: of the text that the tokens stand for, 0 if that is not known.
    """

    tokens: int
    nll: float
    accuracy: float
    right_nll: float
    wrong_nll: float
    confidence: float
    entropy: float
    brier: float
    calibration: float
    num_bytes: int

    @property
    def perplexity(self) -> float:
        """exp L, infinite where that is more than a float holds."""
        return math.exp(self.nll) if self.nll < 709 else math.inf if self.nll >= 709 else math.nan

    @property
    def bits_per_byte(self) -> float:
        """Code length of the text over its bytes, the same question to every tokenizer."""
        return self.nll * self.tokens / (self.num_bytes * math.log(2)) if self.num_bytes else math.nan


COLUMNS = {
    "document": torch.int64,
    "position": torch.int64,
    "target": torch.int64,
    "num_bytes": torch.int64,
    "nll": torch.float64,
    "right": torch.bool,
    "confidence": torch.float32,
    "entropy": torch.float32,
}
"""What is kept of each token: 49 bytes."""
SUMS = ("count", "nll", "confidence", "entropy", "brier", "num_bytes")


class TokenScores:
    """Scores of predicted tokens, one call after the other.

    Args:
        keep: also keep what `compare` pairs, 49 bytes a token; else memory is constant.
    """

    def __init__(self, keep: bool = True):
        self.keep = keep
        # By right or not, position and what is summed; by bin of the confidence: count, confidence, right.
        self.sums = torch.zeros(2, RANGES, len(SUMS), dtype=torch.float64)
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)
        self._columns: dict[str, list[Tensor]] = {name: [] for name in COLUMNS}

    def update(
        self,
        logits: Float[Tensor, "*S V"],
        targets: Int[Tensor, "*S"],
        *,
        mask: Bool[Tensor, "*S"] | None = None,
        document: Int[Tensor, "..."] | int = 0,
        position: Int[Tensor, "..."] | int | None = None,
        num_bytes: Int[Tensor, "..."] | int = 0,
    ) -> None:
        """Score predictions of tokens.

        Args:
            logits: of the tokens, float32 at least is computed with.
            targets: the tokens that came.
            mask: true where they count.
            document: of each token, by number, in a shape that broadcasts to that of the targets, as the next two;
                tokens of a document depend on each other.
            position: of each token in its document; None counts on along the last axis of `targets`, from 0.
            num_bytes: of the text that each token stands for, 0 if it is not known.

        Raises:
            UsageError: shapes do not fit, or a target is no token of the vocabulary.
        """
        if logits.shape[:-1] != targets.shape or targets.is_floating_point():
            raise UsageError(
                f"TokenScores: logits {tuple(logits.shape)} for targets {targets.dtype} {tuple(targets.shape)}, "
                f"expected integer targets {tuple(logits.shape[:-1])}"
            )
        if targets.ndim == 0:
            logits, targets = logits[None], targets[None]
            mask = mask if mask is None else mask[None]
        if mask is not None and (mask.dtype != torch.bool or mask.shape != targets.shape):
            raise UsageError(f"TokenScores: mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool "
                             f"{tuple(targets.shape)}")  # fmt: skip
        if position is None:
            position = torch.arange(targets.shape[-1], device=targets.device)
        use = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask
        more = {"document": document, "position": position, "num_bytes": num_bytes}
        rows = {name: _like(x, name, use)[use].cpu() for name, x in more.items()}
        known = targets[use].long()
        if len(known) and not 0 <= int(known.min()) <= int(known.max()) < logits.shape[-1]:
            raise UsageError(
                f"TokenScores: targets go from {int(known.min())} to {int(known.max())}, but the vocabulary has "
                f"{logits.shape[-1]} tokens; mask those that do not count"
            )
        flat = logits.detach().flatten(0, -2) if mask is None else logits.detach()[use]
        found = token_statistics(flat.reshape(-1, logits.shape[-1]), known)
        self.add(**{name: value.cpu() for name, value in found._asdict().items()}, target=known.cpu(), **rows)

    def add(
        self,
        nll: Float[Tensor, "N"],
        right: Bool[Tensor, "N"],
        *,
        confidence: Float[Tensor, "N"] | None = None,
        entropy: Float[Tensor, "N"] | None = None,
        brier: Float[Tensor, "N"] | None = None,
        document: Int[Tensor, "N"] | None = None,
        position: Int[Tensor, "N"] | None = None,
        target: Int[Tensor, "N"] | None = None,
        num_bytes: Int[Tensor, "N"] | None = None,
    ) -> None:
        """Count answers whose numbers are known already; what is left out is unknown, and each is a document.

        Documents that are not numbered have numbers of their own below 0.

        Raises:
            UsageError: an argument is not of the shape of `nll`.
        """
        unknown, zero = torch.full_like(nll, math.nan), torch.zeros_like(nll, dtype=torch.int64)
        after = int(self.sums[:, :, 0].sum())
        rows = {
            "nll": nll, "right": right,
            "confidence": unknown if confidence is None else confidence,
            "entropy": unknown if entropy is None else entropy,
            "document": -1 - torch.arange(after, after + len(nll)) if document is None else document,
            "position": zero if position is None else position,
            "target": zero if target is None else target,
            "num_bytes": zero if num_bytes is None else num_bytes,
        }  # fmt: skip
        if wrong := [name for name, row in rows.items() if row.shape != nll.shape or row.ndim != 1]:
            shape = tuple(rows[wrong[0]].shape)
            raise UsageError(f"TokenScores: {wrong[0]} is {shape}, expected one for each of {tuple(nll.shape)} answers")
        summed = [torch.ones_like(nll), nll, rows["confidence"], rows["entropy"], unknown if brier is None else brier,
                  rows["num_bytes"]]  # fmt: skip
        where = right.long() * RANGES + _range(rows["position"])
        flat = self.sums.reshape(2 * RANGES, -1)
        adds = torch.stack([column.double() for column in summed], 1)
        self.sums = flat.index_add(0, where, adds).reshape(self.sums.shape)
        sure = rows["confidence"].double()
        bins = (sure * BINS).nan_to_num().long().clamp(0, BINS - 1)
        self.bins = self.bins.index_add(1, bins, torch.stack([torch.ones_like(sure), sure, right.double()]))
        if self.keep:
            for name, dtype in COLUMNS.items():
                self._columns[name].append(rows[name].to(dtype))

    def value(self) -> Summary:
        """Means over all tokens."""
        return _summary(self.sums.sum(1), self.bins)

    def by_position(self) -> list[tuple[range, Summary]]:
        """Means over positions 0, 1, 2 to 3, 4 to 7, ... of a document that hold tokens; calibration is not split."""
        held = self.sums[:, :, 0].any(0).tolist()
        return [(range(2**i // 2, 2**i), _summary(self.sums[:, i], None)) for i in range(RANGES) if held[i]]

    def reliability(self) -> list[dict[str, float]]:
        """The bins of the confidence that hold tokens: count, mean confidence, accuracy."""
        return [{"count": count, "confidence": sure / count, "accuracy": right / count}
                for count, sure, right in self.bins.T.tolist() if count]  # fmt: skip

    def columns(self) -> dict[str, Tensor]:
        """What was kept of each token, by document and position; `COLUMNS` names it."""
        whole = {name: torch.cat([torch.empty(0, dtype=COLUMNS[name]), *parts])
                 for name, parts in self._columns.items()}  # fmt: skip
        order = np.lexsort((whole["position"].numpy(), whole["document"].numpy()))
        return {name: column[torch.from_numpy(order)] for name, column in whole.items()}

    def merge(self, other: "TokenScores") -> "TokenScores":
        """Scores as if one had seen what this one and then `other` saw; both stay as they are.

        Documents of the same number are the same one; those that are not numbered are never.
        """
        both = TokenScores(self.keep and other.keep)
        both.sums, both.bins = self.sums + other.sums, self.bins + other.bins
        if both.keep:
            both._columns = {name: [*parts, *other._columns[name]] for name, parts in self._columns.items()}
            seen = int(self.sums[:, :, 0].sum())
            moved = [torch.where(numbers < 0, numbers - seen, numbers) for numbers in other._columns["document"]]
            both._columns["document"] = [*self._columns["document"], *moved]
        return both

    def fresh(self) -> "TokenScores":
        """Empty scores of the same settings."""
        return TokenScores(self.keep)

    def state_dict(self) -> dict[str, Any]:
        """Everything counted so far."""
        return {"sums": self.sums, "bins": self.bins, "columns": self.columns() if self.keep else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            UsageError: the parts do not fit each other.
        """
        columns = state["columns"]
        parts = {"sums": (state["sums"], self.sums), "bins": (state["bins"], self.bins)}
        fits = all(x.shape == like.shape and x.dtype == like.dtype for x, like in parts.values())
        if columns is not None and fits:
            count = int(state["sums"][:, :, 0].sum())
            fits = columns.keys() == COLUMNS.keys() and all(
                columns[name].shape == (count,) and columns[name].dtype == dtype for name, dtype in COLUMNS.items()
            )
        if not fits:
            raise UsageError("TokenScores: sums, bins and columns of the state do not fit each other")
        self.sums, self.bins = state["sums"], state["bins"]
        self.keep = columns is not None
        self._columns = {name: [] if columns is None else [columns[name]] for name in COLUMNS}


def _like(x: Tensor | int, name: str, use: Tensor) -> Tensor:
    x = torch.as_tensor(x, device=use.device)
    try:
        return x.expand(use.shape)
    except RuntimeError:
        raise UsageError(f"TokenScores: {name} is {tuple(x.shape)}, expected what broadcasts to the {tuple(use.shape)} "
                         "of targets") from None  # fmt: skip


def _range(position: Tensor) -> Tensor:
    """0 for position 0, i for 2^(i-1) to 2^i - 1."""
    return torch.frexp(position.double())[1].long().clamp(0, RANGES - 1)


def _summary(sums: Tensor, bins: Tensor | None) -> Summary:
    """sums `(2, 6)`: of wrong and of right tokens."""
    wrong, right = sums.tolist()
    count, nll, *means, num_bytes = (a + b for a, b in zip(wrong, right, strict=True))
    apart = math.nan if bins is None or not count else float((bins[1] - bins[2]).abs().sum()) / count
    confidence, entropy, brier = (_over(mean, count) for mean in means)
    return Summary(int(count), _over(nll, count), _over(right[0], count), _over(right[1], right[0]),
                   _over(wrong[1], wrong[0]), confidence, entropy, brier, apart, int(num_bytes))  # fmt: skip


def _over(total: float, count: float) -> float:
    return total / count if count else math.nan
