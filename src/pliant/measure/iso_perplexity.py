"""Models of equal perplexity: how much more often right a surer one has to be.

Paper: Veličković et al. 2026, Perplexity Cannot Always Tell Right from Wrong, arXiv:2601.22950, section 4 and eq. 7;
K classes, the free lunch and the general form are ours (perplexity-selection.md 2.5 and 2.6). Code lengths are in nats.
"""

import math
from typing import Any, NamedTuple

from pliant.core import UsageError

# Homogeneous confidence: a model that puts 1 - γ on its choice and γ on the other classes, whatever it is asked.


def code_length(accuracy: float, gamma: float, classes: int = 2) -> float:
    """L(a, γ) = -a log(1 - γ) - (1 - a) log(γ / (K - 1)), eq. 10 for K = 2; nats.

    Args:
        accuracy: a, share of right answers.
        gamma: mass on the wrong classes together, spread evenly.
        classes: K.

    Raises:
        UsageError: a share is not one, or K is below 2.
    """
    if not (0 <= accuracy <= 1 and 0 <= gamma <= 1 and classes >= 2):
        raise UsageError(
            f"code_length: accuracy {accuracy}, gamma {gamma}, classes {classes}; expected shares from 0 to 1 and at "
            "least 2 classes"
        )
    parts = ((accuracy, 1 - gamma), (1 - accuracy, gamma / (classes - 1)))
    return sum((math.inf if p == 0 else -share * math.log(p) for share, p in parts if share), 0.0)


def critical_accuracy(accuracy: float, gamma: float, new_gamma: float, classes: int = 2) -> float:
    """a' = (L(a, γ) + log γ') / (log γ' - log(1 - γ')), eq. 11: the accuracy at which a new model has the same L.

    Perplexity prefers the new model, which puts 1 - γ' on its choice, if and only if it is right more often than that;
    for γ' above (K - 1) / K, less often. Outside of 0 to 1, no accuracy makes it tie.

    Args:
        accuracy, gamma: of the old model, see `code_length`.
        new_gamma: γ'; 0 gives the limit, 1.
        classes: K; the mass on wrong classes is spread evenly over K - 1.

    Returns:
        a'; NaN at γ' = (K - 1) / K, where L is log K at any accuracy.

    Raises:
        UsageError: as `code_length`.
    """
    old = code_length(accuracy, gamma, classes)
    if new_gamma == 0:
        return 1.0
    right, wrong = code_length(1.0, new_gamma, classes), code_length(0.0, new_gamma, classes)
    return critical_accuracy_at(old, right, wrong)


class FreeLunch(NamedTuple):
    """How a model that is right more often than it is sure may be beaten by one that is right less often.

    Attributes:
        least: lowest critical accuracy.
        gamma: at which γ' it is: 1 - least, a calibrated model.
        end: below this γ' the critical accuracy is above that of the old model.
    """

    least: float
    gamma: float
    end: float


def free_lunch(accuracy: float, gamma: float) -> FreeLunch | None:
    """For two classes; None where a <= 1 - γ: then every gain of confidence asks for a gain of accuracy.

    The lowest critical accuracy is H_b⁻¹(L) on the branch above ½, H_b the binary entropy in nats.
    """
    if not (0 < gamma <= 0.5) or accuracy <= 1 - gamma:
        return None
    old = code_length(accuracy, gamma)
    least = 1 - _crossing(lambda g: code_length(1 - g, g) - old, 0.0, 0.5)
    end = _crossing(lambda g: old - code_length(accuracy, g), 0.0, 1 - accuracy) if accuracy < 1 else 0.0
    return FreeLunch(least, 1 - least, end)


def _crossing(rises: Any, low: float, high: float) -> float:
    """Where a rising function of `low` to `high` is zero, to the last bit."""
    while low < (middle := (low + high) / 2) < high:
        low, high = (middle, high) if rises(middle) < 0 else (low, middle)
    return middle


def tempered(gamma: float, temperature: float) -> float:
    """γ' of a choice between two after its logits were divided by a temperature, eq. 7."""
    if not (0 < gamma < 1 and temperature > 0):
        raise UsageError(f"tempered: gamma {gamma}, temperature {temperature}; expected 0 < gamma < 1 and a positive "
                         "temperature")  # fmt: skip
    odds = (math.log1p(-gamma) - math.log(gamma)) / temperature
    return math.exp(-odds) / (1 + math.exp(-odds)) if odds > 0 else 1 / (1 + math.exp(odds))


# Any model: how sure it is when right, and when wrong.


def critical_accuracy_at(nll: float, right_nll: float, wrong_nll: float) -> float:
    """(L_A - l_W) / (l_R - l_W): perplexity prefers B if and only if B is right more often (where l_R < l_W).

    Args:
        nll: L_A of the model to beat.
        right_nll, wrong_nll: l_R and l_W of B. Eq. 11 has -log(1 - γ') and -log γ'.

    Returns:
        Below 0 and above 1, B wins or loses at any accuracy; NaN where l_R = l_W.
    """
    return (nll - wrong_nll) / (right_nll - wrong_nll) if right_nll != wrong_nll else math.nan
