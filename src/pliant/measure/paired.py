"""Whether two models differ, over documents that both have seen, and whether NLL picks the most accurate of many.

Tokens of a document depend on each other, so documents are what is resampled and tested.
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from pliant.core import UsageError, numpy_generator

CHUNK = 1 << 22
"""Draws of a bootstrap that are held at a time."""
FEWEST = 6
"""Documents below which all of them may well be on one side by chance."""


class Interval(NamedTuple):
    """A difference and its bootstrap interval."""

    value: float
    low: float
    high: float

    @property
    def resolved(self) -> bool:
        """Whether the interval leaves zero out."""
        return self.low > 0 or self.high < 0


def bootstrap(
    sums: Float[np.ndarray, "D"],
    counts: Float[np.ndarray, "D"],
    *,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Σ sums / Σ counts over documents, and its percentile interval when documents are drawn again with replacement.

    Percentiles are those at which a few documents cover as a t interval would (expanded percentiles, Hesterberg 2015,
    doi:10.1080/00031305.2015.1089789): at Φ(-√(D / (D - 1)) t), t the quantile of Student's distribution.

    Args:
        sums: what is averaged, such as a difference between two models, summed over each document.
        counts: how many tokens or bytes that sum is over.
        level: of the interval.
        resamples: how often the documents are drawn.
        seed: of the draws; equal documents in any order give intervals that differ by chance alone.

    Returns:
        The ratio and its interval; without an interval (NaN) where there are fewer than six documents.
    """
    value = float(sums.sum() / counts.sum())
    documents = len(sums)
    if documents < FEWEST or not math.isfinite(value):
        return Interval(value, math.nan, math.nan)
    random, found = numpy_generator(seed, "bootstrap"), np.empty(resamples)
    for some in np.array_split(found, -(-resamples * documents // CHUNK)):
        drawn = random.integers(documents, size=(len(some), documents))
        some[:] = sums[drawn].sum(1) / counts[drawn].sum(1)
    tail = _tail(level, documents)
    low, high = np.quantile(found, [tail, 1 - tail])
    return Interval(value, float(low), float(high))


def _tail(level: float, documents: int) -> float:
    from statistics import NormalDist

    from scipy.special import stdtrit  # type: ignore[import-untyped]

    t = float(stdtrit(documents - 1, (1 + level) / 2))
    return NormalDist().cdf(-math.sqrt(documents / (documents - 1)) * t)


def mcnemar(only_a: int, only_b: int) -> float:
    """Exact two-sided p of McNemar's test: how probable so uneven a split of the differing answers is by chance.

    McNemar 1947, Psychometrika 12; 2 P(X <= min(b, c)) with X ~ Binomial(b + c, 1/2), at most 1.

    Args:
        only_a, only_b: answers that only one of the two had right.
    """
    number, least = only_a + only_b, min(only_a, only_b)
    if 2 * least == number:
        return 1.0
    logs = [_log_choose(number, k) - number * math.log(2) for k in range(least + 1)]
    return min(1.0, 2 * math.fsum(map(math.exp, logs)))


def _log_choose(n: int, k: int) -> float:
    return math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1)


def paired_p(differences: Float[np.ndarray, "D"]) -> float:
    """Two-sided p of z = Σ d / √Σ d², d how many more answers of a document one model had right; 1 if all are zero.

    With one answer a document this is McNemar's test without correction; with several it is its form for clusters
    (Durkalski et al. 2003, Statistics in Medicine 22).
    """
    size = math.sqrt(float(np.square(differences, dtype=np.float64).sum()))
    return two_sided(float(differences.sum()) / size) if size else 1.0


def two_sided(z: float) -> float:
    """P(|Z| >= |z|) of a standard normal Z."""
    return math.erfc(abs(z) / math.sqrt(2))


class Selection(NamedTuple):
    """How well picking the lowest NLL picks the most accurate of several models.

    Attributes:
        picked, best: indices of the model with the lowest NLL, and with the highest accuracy.
        regret: accuracy lost by picking by NLL.
        discordance: share of pairs of which the one with the lower NLL is less accurate; (1 - tau) / 2 without ties.
        tau: Kendall's tau-a between -NLL and accuracy.
        pearson: correlation of NLL and accuracy as the paper gives it, negative where they agree; NaN if undefined.
    """

    picked: int
    best: int
    regret: float
    discordance: float
    tau: float
    pearson: float


def selection(nlls: Float[np.ndarray, "M"], accuracies: Float[np.ndarray, "M"]) -> Selection:
    """What is lost by picking the lowest of `nlls`, in nats, instead of the highest of `accuracies`; NaN is the last.

    Raises:
        UsageError: fewer than two models, or not one accuracy for each.
    """
    nlls, accuracies = np.asarray(nlls, np.float64), np.asarray(accuracies, np.float64)
    if len(nlls) < 2 or nlls.shape != accuracies.shape:
        raise UsageError(f"selection: got {len(nlls)} NLLs and {len(accuracies)} accuracies, expected two of each or "
                         "more")  # fmt: skip
    nlls = np.where(np.isnan(nlls), np.inf, nlls)
    first, second = np.triu_indices(len(nlls), 1)
    # Not by differences: that of two infinite NLLs is no number.
    agree = _order(nlls, second, first) * _order(accuracies, first, second)
    picked, best = int(nlls.argmin()), int(accuracies.argmax())
    with np.errstate(invalid="ignore", divide="ignore"):
        pearson = float(np.corrcoef(nlls, accuracies)[0, 1]) if np.isfinite(nlls).all() else math.nan
    return Selection(picked, best, float(accuracies[best] - accuracies[picked]), float((agree < 0).mean()),
                     float(agree.mean()), pearson)  # fmt: skip


def _order(values: Float[np.ndarray, "M"], one: np.ndarray, two: np.ndarray) -> np.ndarray:
    """Sign of the first minus the second."""
    return (values[one] > values[two]).astype(int) - (values[one] < values[two]).astype(int)


def correlation_interval(correlation: float, number: int, level: float = 0.95) -> tuple[float, float]:
    """Fisher's interval of a Pearson correlation of `number` independent pairs; checkpoints of a run are not."""
    if number <= 3 or not -1 < correlation < 1:
        return math.nan, math.nan
    from statistics import NormalDist

    reach = NormalDist().inv_cdf((1 + level) / 2) / math.sqrt(number - 3)
    middle = math.atanh(correlation)
    return math.tanh(middle - reach), math.tanh(middle + reach)


def discordant(right_a: Bool[np.ndarray, "N"], right_b: Bool[np.ndarray, "N"]) -> tuple[int, int]:
    """How many answers only the first had right, and only the second."""
    return int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
