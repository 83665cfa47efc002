"""Perplexity beside accuracy: what a better perplexity is made of, and whether it picks the model that is right.

Mean code length, the logarithm of perplexity, is exactly

    L = a l_R + (1 - a) l_W

with a the share of tokens that the model has right (argmax, the first of several), l_R and l_W the mean code length of
the tokens that it has right and wrong. A model may so have the lower perplexity because it is right more often, or
because it is surer when right, or less sure when wrong.

- `TokenScores`, `Summary`: scores of tokens (`pliant.measure.token_scores`)
- `critical_accuracy` and what belongs to it: closed forms (`pliant.measure.iso_perplexity`)
- `compare`: two models on the same tokens, with a verdict; `decompose`: what their difference is made of
- `selection` and tests for pairs: `pliant.measure.paired`; `wrong_but_low`: `pliant.measure.copying`

Paper: Veličković et al. 2026, Perplexity Cannot Always Tell Right from Wrong, arXiv:2601.22950, section 4; the
decomposition and the statistics are ours (perplexity-selection.md 2.6 and 2.8).
"""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from pliant.core import UsageError
from pliant.measure.iso_perplexity import (
    FreeLunch,
    code_length,
    critical_accuracy,
    critical_accuracy_at,
    free_lunch,
    tempered,
)
from pliant.measure.paired import FEWEST, Interval, Selection, bootstrap, discordant, mcnemar, paired_p, selection
from pliant.measure.token_scores import Summary, TokenScores

__all__ = [
    "Comparison", "FreeLunch", "Interval", "Parts", "Selection", "Summary", "TokenScores", "code_length", "compare",
    "critical_accuracy", "critical_accuracy_at", "decompose", "free_lunch", "intervals", "selection", "tempered",
]  # fmt: skip


class Parts(NamedTuple):
    """L_B - L_A as a sum, with bars for means of A and B.

    Attributes:
        accuracy: Δa (l̄_R - l̄_W), of being right more or less often.
        right: ā Δl_R, of being more or less sure when right.
        wrong: (1 - ā) Δl_W, of being more or less sure when wrong.
    """

    accuracy: float
    right: float
    wrong: float


def decompose(a: Summary, b: Summary) -> Parts:
    """The three parts of L_B - L_A; NaN where a model has nothing right or nothing wrong."""
    mean = (a.accuracy + b.accuracy) / 2
    right, wrong = (a.right_nll + b.right_nll) / 2, (a.wrong_nll + b.wrong_nll) / 2
    return Parts((b.accuracy - a.accuracy) * (right - wrong), mean * (b.right_nll - a.right_nll),
                 (1 - mean) * (b.wrong_nll - a.wrong_nll))  # fmt: skip


Verdict = Literal["agree", "perplexity picks the less accurate model", "confidence only", "unresolved"]


class Comparison(NamedTuple):
    """Two models on the same tokens, B against A.

    Attributes:
        names: of A and B.
        a, b: their summaries.
        nll: L_B - L_A and its interval, nats a token; bits a byte if the tokens are not the same.
        accuracy: a_B - a_A and its interval.
        critical: accuracy that B needs at its confidence to have the perplexity of A, and A that of B.
        parts: what L_B - L_A is made of.
        only_a, only_b: tokens that only one of them has right.
        p: of McNemar's test, exact if each document has one answer, else by document.
        documents: how many.
        same_tokens: false where only the bytes are the same; then nothing is known about accuracy.
        verdict: see `Verdict`.
        sentence: the verdict with its reasons.
    """

    names: tuple[str, str]
    a: Summary
    b: Summary
    nll: Interval
    accuracy: Interval
    critical: tuple[float, float]
    parts: Parts
    only_a: int
    only_b: int
    p: float
    documents: int
    same_tokens: bool
    verdict: Verdict
    sentence: str


def compare(
    a: TokenScores,
    b: TokenScores,
    *,
    names: Sequence[str] = ("A", "B"),
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Comparison:
    """Whether perplexity and accuracy prefer the same of two models.

    A difference of code lengths counts if its bootstrap interval leaves zero out, one of accuracies if McNemar's p is
    below 1 - level; documents are resampled and tested, not tokens.

    Args:
        a, b: scores of the same documents, with `keep`.
        names: what they are called.
        level, resamples, seed: of the bootstrap.

    Raises:
        UsageError: tokens were not kept, there are none, or they are neither of the same tokens nor of the same bytes.
    """
    if not (a.keep and b.keep):
        raise UsageError("compare: these scores kept no tokens; make them with TokenScores(keep=True)")
    one, two = ({name: column.numpy() for name, column in scores.columns().items()} for scores in (a, b))
    if not len(one["nll"]) or not len(two["nll"]):
        raise UsageError("compare: one of the scores has seen no token")
    first, second = a.value(), b.value()
    same = _same_tokens(one, two)
    options: dict[str, Any] = {"level": level, "resamples": resamples, "seed": seed}
    unknown = Interval(math.nan, math.nan, math.nan)
    if not same:
        sums = _by_document(two, two["nll"]) - _by_document(one, one["nll"])
        size = _by_document(one, one["num_bytes"])
        found = Comparison((names[0], names[1]), first, second, bootstrap(sums / math.log(2), size, **options), unknown,
                           (math.nan, math.nan), Parts(math.nan, math.nan, math.nan), 0, 0, math.nan, len(size), False,
                           "unresolved", "")  # fmt: skip
        return found._replace(sentence=_of_bytes(found, level))
    with np.errstate(invalid="ignore"):
        apart = two["nll"] - one["nll"]
    gained = two["right"].astype(np.float64) - one["right"]
    counts, gains = _by_document(one, np.ones(len(apart))), _by_document(one, gained)
    only_a, only_b = discordant(one["right"], two["right"])
    p = mcnemar(only_a, only_b) if counts.max() == 1 else paired_p(gains)
    critical = (critical_accuracy_at(first.nll, second.right_nll, second.wrong_nll),
                critical_accuracy_at(second.nll, first.right_nll, first.wrong_nll))  # fmt: skip
    found = Comparison(
        (names[0], names[1]), first, second, bootstrap(_by_document(one, apart), counts, **options),
        bootstrap(gains, counts, **options), critical, decompose(first, second), only_a, only_b, p, len(counts), True,
        "unresolved", "",
    )  # fmt: skip
    found = found._replace(verdict=_verdict(found, 1 - level))
    return found._replace(sentence=_sentence(found, level))


def intervals(scores: TokenScores, **options: Any) -> tuple[Interval, Interval]:
    """Code length and accuracy of one model with their intervals over documents; options are those of `bootstrap`."""
    rows = {name: column.numpy() for name, column in scores.columns().items()}
    if not len(rows["nll"]):
        raise UsageError("intervals: these scores have seen no token, or kept none")
    counts = _by_document(rows, np.ones(len(rows["nll"])))
    nll, accuracy = (bootstrap(_by_document(rows, rows[name]), counts, **options) for name in ("nll", "right"))
    return nll, accuracy


def _same_tokens(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> bool:
    """True if all tokens are the same, false if documents have the same bytes. Raises `UsageError` if neither."""
    alike = ("document", "target", "num_bytes")
    if len(one["nll"]) == len(two["nll"]):
        if all(np.array_equal(one[name], two[name]) for name in alike):
            return True
        if np.array_equal(one["document"], two["document"]):
            raise UsageError(
                "compare: the two have as many tokens in each document, but not the same ones; give scores of the "
                "same documents under the same numbers"
            )
    (here, size), (there, other) = ((np.unique(rows["document"]), _by_document(rows, rows["num_bytes"]))
                                    for rows in (one, two))  # fmt: skip
    if not np.array_equal(here, there) or not np.array_equal(size, other) or not size.all():
        raise UsageError("compare: the two are about neither the same tokens nor the same bytes of the same documents; "
                         "score both on the same texts")  # fmt: skip
    return False


def _by_document(rows: dict[str, np.ndarray], values: np.ndarray) -> np.ndarray:
    """Sums over each document, float64; rows are in order of documents."""
    starts = np.flatnonzero(np.diff(rows["document"], prepend=rows["document"][0] - 1))
    return np.add.reduceat(values.astype(np.float64), starts)


def _verdict(found: Comparison, chance: float) -> Verdict:
    if found.nll.resolved and not found.only_a and not found.only_b:
        return "confidence only"
    if not found.nll.resolved or not found.p < chance:
        return "unresolved"
    agree = (found.nll.value < 0) == (found.accuracy.value > 0)
    return "agree" if agree else "perplexity picks the less accurate model"


def _sentence(found: Comparison, level: float) -> str:
    preferred, other = found.names if found.nll.value > 0 else found.names[::-1]
    by = f"{abs(found.nll.value):.4g} nats a token ({_range_of(found.nll, level)})"
    right = f"{_points(abs(found.accuracy.value))} (p = {found.p:.2g})"
    if found.verdict == "confidence only":
        return f"confidence only: both are right at the same tokens; perplexity prefers {preferred} by {by}"
    if found.verdict == "unresolved":
        return _unresolved(found, level)
    if found.verdict == "agree":
        return f"agree: {preferred} has the lower perplexity, by {by}, and is right more often, by {right}"
    needs = found.critical[0 if other == found.names[1] else 1]
    has = (found.b if other == found.names[1] else found.a).accuracy
    how = f"would tie only if right {100 * needs:.1f} % of the time" if 0 <= needs <= 1 else "loses at any accuracy"
    return (
        f"perplexity picks the less accurate model: it prefers {preferred} by {by}, though {other} is right more "
        f"often, by {right}; as sure as it is, {other} {how} and is right {100 * has:.1f} %, {_why(found)}"
    )


def _unresolved(found: Comparison, level: float) -> str:
    doubts = []
    if not math.isfinite(found.nll.value):
        none = [name for name, one in zip(found.names, (found.a, found.b), strict=True) if math.isnan(one.nll)]
        why = f"{' and '.join(none)} gave no numbers" if none else "a token was given no probability"
        doubts.append(f"in perplexity ({why})")
    elif math.isnan(found.nll.low):
        doubts.append(f"in perplexity ({found.nll.value:+.3g} nats a token)")
    elif not found.nll.resolved:
        doubts.append(f"in perplexity ({_range_of(found.nll, level, ' nats a token')})")
    if not found.p < 1 - level:
        doubts.append(f"in accuracy ({_points(found.accuracy.value, '+')}, p = {found.p:.2g})")
    few = f"{found.documents} document{'' if found.documents == 1 else 's'}"
    several = "" if found.documents >= FEWEST else f"; {few} cannot tell, give {FEWEST} or more"
    return f"unresolved: the difference {' and that '.join(doubts)} could be chance{several}"


def _why(found: Comparison) -> str:
    """What outweighs accuracy: the part that is most in the direction of the whole."""
    sign = math.copysign(1, found.nll.value)
    right, wrong = sign * found.parts.right, sign * found.parts.wrong
    preferred = found.names[0] if sign > 0 else found.names[1]
    return f"since {preferred} is " + ("surer when right" if right > wrong else "less sure when wrong")


def _of_bytes(found: Comparison, level: float) -> str:
    lower = found.names[0] if found.nll.value > 0 else found.names[1]
    said = f"{lower} needs {abs(found.nll.value):.4g} bits a byte less"
    said += "" if math.isnan(found.nll.low) else f" ({_range_of(found.nll, level)})"
    return f"unresolved: the two do not read the same tokens, so their accuracies cannot be paired; {said}"


def _range_of(interval: Interval, level: float, unit: str = "") -> str:
    return f"{interval.low:+.3g} to {interval.high:+.3g}{unit} at {level:.0%}"


def _points(share: float, sign: str = "") -> str:
    return f"{100 * share:{sign}.2f} points"
