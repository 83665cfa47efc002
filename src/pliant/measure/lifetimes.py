"""Plasticity and empowerment from samples: many lives of one agent in one environment, each of the same length.

What is estimated are the entropies G[j, i] of prefixes, from how often each was seen; everything else is a sum of
these with signs. A frequency is a biased look at a probability: for streams that tell nothing of each other the plain
estimate of n binary indices is Σ_t (2^t - 1) 2^(t-1) / (2 N ln 2) bits too high, which for n = 8 and ten thousand
lives is three bits. Corrections take most of that away, and a verdict says when they cannot.

Corrections of an entropy: Miller 1955 (first order); the jackknife, Zahl 1977; Grassberger 2003, arXiv:physics/0307138;
Chao & Shen 2003, doi:10.1023/A:1026096204727.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy as np
from jaxtyping import Int

from pliant.core import UsageError
from pliant.measure.flow import Flow, Mode, Order, Side, Window, order_of, second_difference, sides_of
from pliant.measure.law import Law

Correction = Literal["none", "miller-madow", "jackknife", "grassberger", "chao-shen"]
PER_PREFIX = 30
"""Lives for each kind of prefix of the whole windows, seen or likely, below which no verdict is "enough"."""
RESTING = 40
"""How often each symbol has to have been seen, and on how many lives the variance has to rest: all of them over the
kurtosis of their ratios, since rare lives that say much are what an interval misses until there are that many."""
UNSURE = 0.5
"""How far two corrections, of first order and the jackknife, may differ, in standard deviations of the estimate."""
DENSE = 1 << 22
"""Pairs of prefixes that are counted in a table rather than sorted."""


@dataclass(frozen=True, eq=False)
class Lifetimes:
    """What was done and seen, symbols from 0.

    Attributes:
        actions, observations: `(N, n)`, a row for each life.
        order: which of the two came first within an index.
        sizes: |A| and |O|; None: as many as the largest symbols say.

    Raises:
        UsageError: shapes differ, fewer than two lives, symbols outside of the alphabets, or alphabets of one symbol.
    """

    actions: Int[np.ndarray, "N n"]
    observations: Int[np.ndarray, "N n"]
    order: Order = "AO"
    sizes: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        order_of(self.order)
        pair = {"actions": self.actions, "observations": self.observations}
        if self.actions.shape != self.observations.shape:
            raise UsageError(f"Lifetimes: actions {self.actions.shape} and observations {self.observations.shape}, "
                             "expected two arrays of the same shape (lives, indices)")  # fmt: skip
        if len(self.actions) < 2 or not self.actions.shape[1]:
            raise UsageError(f"Lifetimes: arrays of shape {self.actions.shape}, expected at least two lives of an "
                             "index or more; for one long life there is pliant.measure.context_tree")  # fmt: skip
        sizes = self.sizes or tuple(int(rows.max()) + 1 for rows in pair.values())
        for (name, rows), size in zip(pair.items(), sizes, strict=True):
            check_symbols("Lifetimes", name, rows, size)
        object.__setattr__(self, "sizes", sizes)

    def __len__(self) -> int:
        return len(self.actions)

    @property
    def n(self) -> int:
        """Indices of a life."""
        return self.actions.shape[1]

    @property
    def alphabets(self) -> tuple[int, int]:
        """|A| and |O|."""
        assert self.sizes is not None
        return self.sizes

    def flow(self, correction: Correction = "jackknife") -> Flow:
        """The flow between single turns, estimated; with a correction an entry may be negative.

        Raises:
            UsageError: the correction is not known.
        """
        entropy = _correction(correction)
        grid = np.zeros((self.n + 1, self.n + 1))
        for j, i in np.ndindex(grid.shape):
            if j or i:  # of nothing there is none, though a correction may say so
                grid[j, i] = entropy(self._counts.of(j, i), len(self)) / math.log(2)
        return Flow(second_difference(grid), self.order, self.alphabets)

    @cached_property
    def _counts(self) -> "_Counts":
        a, o = prefixes(self.actions), prefixes(self.observations)
        alike = a[-1] * (int(o[-1].max()) + 1) + o[-1]
        _, first, counts = np.unique(alike, return_index=True, return_counts=True)
        return _Counts([ids[first] for ids in a], [ids[first] for ids in o], counts)


def check_symbols(called: str, name: str, symbols: np.ndarray, size: int) -> None:
    """Raise a `UsageError` unless these are symbols from 0 of an alphabet of at least two."""
    if size < 2:
        raise UsageError(f"{called}: an alphabet of {size} of {name}: it needs two symbols or more to carry any "
                         "information; if others can occur, give sizes=(|A|, |O|)")  # fmt: skip
    if symbols.size and (symbols.min() < 0 or symbols.max() >= size):
        bad = symbols.min() if symbols.min() < 0 else symbols.max()
        raise UsageError(f"{called}: {name} hold {bad}, expected symbols from 0 to {size - 1}")


def prefixes(rows: Int[np.ndarray, "R n"]) -> list[Int[np.ndarray, "R"]]:
    """For each length from 0 to n, numbers from 0 that are the same where rows begin alike."""
    found = [np.zeros(len(rows), np.int64)]
    for column in rows.T:
        found.append(np.unique(found[-1] * (int(rows.max()) + 1) + column, return_inverse=True)[1])
    return found


class _Counts(NamedTuple):
    """Distinct lives, by the prefixes of their actions and of their observations, and how often each was lived."""

    actions: list[np.ndarray]
    observations: list[np.ndarray]
    counts: np.ndarray

    def joint(self, j: int, i: int) -> tuple[np.ndarray, int]:
        """A number for each life, the same where j actions and i observations are, and a bound for them."""
        a, o = self.actions[j], self.observations[i]
        width = int(o.max()) + 1
        size = (int(a.max()) + 1) * width
        if size <= max(DENSE, 4 * len(a)):
            return a * width + o, size
        keys = np.unique(a * width + o, return_inverse=True)[1]
        return keys, int(keys.max()) + 1

    def of(self, j: int, i: int) -> np.ndarray:
        """How often each prefix that was seen was seen."""
        keys, size = self.joint(j, i)
        counts = np.bincount(keys, self.counts, size)
        return counts[counts > 0]


Entropy = Callable[[np.ndarray, int], float]
"""(counts that are not 0, their sum) -> nats."""


def _plain(counts: np.ndarray, lives: int) -> float:
    return math.log(lives) - float((counts * np.log(counts)).sum()) / lives


def _miller_madow(counts: np.ndarray, lives: int) -> float:
    return _plain(counts, lives) + (len(counts) - 1) / (2 * lives)


def _jackknife(counts: np.ndarray, lives: int) -> float:
    """N H - (N - 1) (mean of H without one life), in one pass: lives with the same prefix are the same loss."""
    terms = counts * np.log(counts)
    fewer = counts - 1
    without = terms.sum() - terms + fewer * np.log(np.maximum(fewer, 1))
    left_out = math.log(lives - 1) - without / (lives - 1)
    return lives * _plain(counts, lives) - (lives - 1) * float((counts * left_out).sum()) / lives


def _grassberger(counts: np.ndarray, lives: int) -> float:
    from scipy.special import digamma  # type: ignore[import-untyped]

    sign = np.where(counts % 2 == 0, 0.5, -0.5)
    g = digamma(counts) + sign * (digamma((counts + 1) / 2) - digamma(counts / 2))
    return math.log(lives) - float((counts * g).sum()) / lives


def _chao_shen(counts: np.ndarray, lives: int) -> float:
    """Frequencies times the share of the distribution that was seen, each over the chance that it is seen at all."""
    once = min(int((counts == 1).sum()), lives - 1)
    p = (1 - once / lives) * counts / lives
    return -float((p * np.log(p) / -np.expm1(lives * np.log1p(-p))).sum()) if len(counts) > 1 else 0.0


CORRECTIONS: dict[str, Entropy] = {
    "none": _plain, "miller-madow": _miller_madow, "jackknife": _jackknife, "grassberger": _grassberger,
    "chao-shen": _chao_shen,
}  # fmt: skip


def _correction(name: str) -> Entropy:
    if name not in CORRECTIONS:
        raise UsageError(f"correction is {name!r}, expected one of {', '.join(CORRECTIONS)}")
    return CORRECTIONS[name]


class Estimate(NamedTuple):
    """One quantity, in bits.

    Attributes:
        bits: the estimate, corrected; it may be a little below 0 where the truth is 0.
        low, high: an interval that holds the truth with the confidence asked for.
        plain: without a correction.
        null: mean of the plain one where observations were dealt to other lives, so that nothing flows.
        p: share of such deals that came out as high; NaN if there were none.
        needed: lives with which the corrections would agree, about; not more than there are if they do.
    """

    bits: float
    low: float
    high: float
    plain: float
    null: float
    p: float
    needed: int


class Estimates(NamedTuple):
    """Both quantities over the same windows.

    Attributes:
        empowerment, plasticity: see `Estimate`.
        bound: what their sum cannot exceed.
        lives: how many there were.
        prefixes: kinds of lives that were seen, as far as the windows go.
    """

    empowerment: Estimate
    plasticity: Estimate
    bound: float
    lives: int
    prefixes: int

    @property
    def enough(self) -> bool:
        """Whether the intervals can be relied on."""
        return self.needed <= self.lives

    @property
    def needed(self) -> int:
        """Lives for both, about."""
        return max(self.empowerment.needed, self.plasticity.needed)

    @property
    def verdict(self) -> str:
        """One line."""
        return "enough lifetimes" if self.enough else f"not enough lifetimes: need about {_round_up(self.needed):,}"


def _round_up(count: int) -> int:
    """To two digits."""
    unit = 10 ** max(0, len(str(count)) - 2)
    return -(-count // unit) * unit


def estimate(
    lives: Lifetimes,
    *,
    act_window: Window | None = None,
    obs_window: Window | None = None,
    mode: Mode = "causal",
    correction: Correction = "jackknife",
    confidence: float = 0.95,
    bootstrap: int = 0,
    permutations: int = 100,
    seed: int = 0,
) -> Estimates:
    """Empowerment and plasticity of the pair that lived these lives.

    The plain estimate is a mean over lives of logarithms of ratios, plus, of second order, half of a χ² with as many
    degrees of freedom as the correction of first order counts. The interval holds the values that the estimate is not
    too far from, given the variance that each of them implies (a score interval, Wilson 1927): the first part is
    taken to grow in proportion to the value, as it does near 0, where intervals from the variance found are too wide.
    By how far two corrections differ it is wider on either side, to the extent of the doubt whether lives suffice.

    Args:
        lives: of one pair; all from the same start.
        act_window, obs_window: first and last index, from 1, both in it; None: all. Short windows that begin early
            need fewer lives, since all that is before them is a condition.
        mode: see `pliant.measure.information.plasticity`.
        correction: of entropies.
        confidence: of the interval.
        bootstrap: lives are drawn anew so many times, and the variance is that of the plain estimate over draws; 0
            takes it from the ratios, which needs no draws and differs little.
        permutations: deals for the null; 0 for none. Where a share of more than 1 - confidence of them comes out as
            high, which holds for rare symbols too, the interval begins at 0.
        seed: of draws and deals.

    Raises:
        UsageError: a window is not within the lives; a mode or correction that is not known; a number out of range.
    """
    entropy = _correction(correction)
    if not 0 < confidence < 1 or bootstrap < 0 or bootstrap == 1 or permutations < 0 or seed < 0:
        raise UsageError(
            f"confidence is {confidence}, bootstrap {bootstrap}, permutations {permutations} and seed {seed}; expected "
            "a share between 0 and 1, 0 or at least 2 draws, and 0 or more of the others"
        )
    frame = Flow(np.zeros((lives.n, lives.n)), lives.order, lives.alphabets)
    act, obs = frame.window(act_window), frame.window(obs_window)
    random = np.random.default_rng(seed)
    both = [_Signs.of(lives.n, act, obs, sides_of(lives.order, source, mode)) for source in "AO"]
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    seen = lives._counts.of(act[1], obs[1])
    least = math.ceil(max(PER_PREFIX * (len(seen) + _unseen(seen)), len(lives) * RESTING / max(0.5, _rarest(lives))))
    found = [_one(lives, signs, entropy, z, bootstrap, random, least) for signs in both]
    nulls = _nulls(lives, both, permutations, random)
    bound = frame.bound(act, obs)
    told = [_beside(one, null, 1 - confidence, bound) for one, null in zip(found, nulls, strict=True)]
    return Estimates(told[0], told[1], bound, len(lives), len(seen))


class _Signs(NamedTuple):
    """With which sign the entropy of each prefix counts."""

    places: list[tuple[int, int]]
    signs: list[float]

    @classmethod
    def of(cls, n: int, act: Window, obs: Window, sides: Sequence[Side]) -> "_Signs":
        j, i = np.ogrid[1 : n + 1, 1 : n + 1]
        on = {"before": j < i, "same": j == i, "after": j > i}
        inside = (act[0] <= j) & (j <= act[1]) & (obs[0] <= i) & (i <= obs[1])
        mask = inside & np.logical_or.reduce([on[side] for side in sides])
        grid = np.zeros((n + 1, n + 1))
        grid[1:, :-1] += mask
        grid[:-1, 1:] += mask
        grid[1:, 1:] -= mask
        grid[:-1, :-1] -= mask
        grid[0, 0] = 0
        places = [(int(j), int(i)) for j, i in zip(*np.nonzero(grid), strict=True)]
        return cls(places, [float(grid[place]) for place in places])

    def __iter__(self) -> Iterator[tuple[int, int, float]]:  # type: ignore[override]
        return ((j, i, sign) for (j, i), sign in zip(self.places, self.signs, strict=True))

    def total(self, counts: _Counts, entropy: Entropy, lives: int) -> float:
        return sum((sign * entropy(counts.of(j, i), lives) for j, i, sign in self), 0.0)


def _one(
    lives: Lifetimes, signs: _Signs, entropy: Entropy, z: float, bootstrap: int, random: np.random.Generator, least: int
) -> Estimate:
    """One quantity; `least` lives are needed for the prefixes of the whole windows, rare ones of which bias it."""
    counts, lived = lives._counts, len(lives)
    weights = counts.counts / lived
    ratio, cells = np.zeros(len(weights)), list[tuple[float, np.ndarray]]()
    for j, i, sign in signs:
        keys, size = counts.joint(j, i)
        seen = np.bincount(keys, counts.counts, size)
        ratio -= sign * np.log(seen[keys] / lived)
        cells.append((sign, seen[seen > 0]))
    plain = float((weights * ratio).sum())
    best, leaving_out, first_order = (
        sum((sign * correct(seen, lived) for sign, seen in cells), 0.0)
        for correct in (entropy, _jackknife, _miller_madow)
    )  # fmt: skip
    freedom = max(1.0, 2 * lived * (plain - first_order)) if cells else 0.0  # less only where rare cells are missing
    variance = float((weights * (ratio - plain) ** 2).sum())
    if bootstrap:
        variance = max(0.0, lived * _resampled(counts, signs, lived, bootstrap, random) - freedom / (2 * lived))
    kinds = max((len(seen) for _, seen in cells), default=0)
    # The ratios were fitted to these very lives, which makes them less spread than they are.
    slope = variance / plain * lived / max(1, lived - kinds) if plain > 1e-12 else 0.0
    second = freedom / (2 * lived**2)
    low, high = _score(best, slope / lived, second, z)
    deviation = max((high - low) / (2 * z), math.sqrt(second))
    apart = abs(leaving_out - first_order)
    doubt = min(10.0, apart / deviation / UNSURE if deviation else 10.0) if apart > 1e-12 else 0.0
    low, high = low - apart * min(1.0, doubt), high + apart * min(1.0, doubt)
    needed = max(least, math.ceil(lived * doubt**2) if doubt > 1 else 0, _for_variance(weights, ratio - plain, lived))
    bits, below, above, plain = (value / math.log(2) for value in (best, max(0.0, low), max(0.0, high), plain))
    return Estimate(bits, below, above, plain, null=math.nan, p=math.nan, needed=needed)


def _rarest(lives: Lifetimes) -> int:
    """How often the symbol that is seen least was seen, of both alphabets."""
    pairs = zip((lives.actions, lives.observations), lives.alphabets, strict=True)
    return min(int(np.bincount(rows.ravel(), minlength=size).min()) for rows, size in pairs)


def _for_variance(weights: np.ndarray, apart: np.ndarray, lived: int) -> int:
    """Lives with which a variance would rest on enough of them, given how far each ratio is apart; 0 if none is."""
    squares = apart**2
    variance = float((weights * squares).sum())
    if variance < 1e-12:
        return 0
    return math.ceil(RESTING * float((weights * squares**2).sum()) / variance**2)


def _unseen(counts: np.ndarray) -> float:
    """How many kinds there are that were not seen, at least (Chao 1984)."""
    once, twice = float((counts == 1).sum()), float((counts == 2).sum())
    return once * (once - 1) / (2 * (twice + 1))


def _score(found: float, slope: float, second: float, z: float) -> tuple[float, float]:
    """Values x with (found - x)² <= z² (slope x + second)."""
    middle = found + z * z * slope / 2
    root = math.sqrt(max(0.0, middle**2 - found**2 + z * z * second))
    return middle - root, middle + root


def _resampled(counts: _Counts, signs: _Signs, lived: int, draws: int, random: np.random.Generator) -> float:
    """The variance of the plain estimate over lives that are drawn anew."""
    found = [
        signs.total(counts._replace(counts=random.multinomial(lived, counts.counts / lived)), _plain, lived)
        for _ in range(draws)
    ]  # fmt: skip
    return float(np.var(found, ddof=1))


def _nulls(lives: Lifetimes, several: Sequence[_Signs], deals: int, random: np.random.Generator) -> list[list[float]]:
    """Plain estimates in bits of each of several quantities, where observations were dealt to other lives."""
    actions, observations = prefixes(lives.actions), prefixes(lives.observations)
    ones = np.ones(len(lives))
    found: list[list[float]] = [[] for _ in several]
    for _ in range(deals):
        dealt = random.permutation(len(lives))
        counts = _Counts(actions, [ids[dealt] for ids in observations], ones)
        entropy = cache(lambda j, i, counts=counts: _plain(counts.of(j, i), len(lives)))
        for values, signs in zip(found, several, strict=True):
            values.append(sum((sign * entropy(j, i) for j, i, sign in signs), 0.0) / math.log(2))
    return found


def _beside(found: Estimate, null: Sequence[float], level: float, bound: float) -> Estimate:
    """With its null; where as much comes out when nothing flows, 0 is in the interval, if deals can tell.

    Nothing is above the bound, of which either quantity may be all, in the literal mode both.
    """
    p = _share(null, found.plain)
    low = 0.0 if len(null) + 1 > 1 / level and p > level else found.low
    return found._replace(low=min(low, bound), high=min(found.high, bound), null=_mean(null), p=p)


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan


def _share(null: Sequence[float], value: float) -> float:
    """The chance of a value as high under the null, with the value itself among the deals."""
    return (1 + sum(one >= value - 1e-12 for one in null)) / (1 + len(null)) if null else math.nan


def bias(n: int, lives: int) -> float:
    """Bits by which the plain estimate of n binary indices that tell nothing of each other is too high, about."""
    return sum((2**t - 1) * 2 ** (t - 1) for t in range(1, n + 1)) / (2 * lives * math.log(2))


def sampled(law: Law, lives: int, seed: int = 0) -> Lifetimes:
    """Lives drawn from a law."""
    flat = law.probabilities.reshape(-1)
    drawn = np.random.default_rng(seed).choice(len(flat), lives, p=flat)
    turns = np.stack(np.unravel_index(drawn, law.probabilities.shape), 1)
    first, second = turns[:, ::2], turns[:, 1::2]
    pair = (first, second) if law.order == "AO" else (second, first)
    return Lifetimes(*pair, law.order, law.sizes)
