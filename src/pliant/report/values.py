"""JSON values of any kind as numbers and text, and numbers as people read them."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

NONE, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"
ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
MAX_LABEL, MAX_NAME, MAX_TEXT = 24, 40, 1000
"""Letters of a name in a figure, of a name in a table or sentence, of anything else."""
DEEP = 20
MOST = 1e30
"""A number beyond it would overflow in sums and axes; it is not known rather than that large."""


def clean(value: Any, depth: int = 0) -> Any:
    """A JSON value in which every string prints and nothing lies deeper than `DEEP`."""
    if isinstance(value, str):
        return text(value)
    if isinstance(value, dict):
        return ELLIPSIS if depth > DEEP else {text(key): clean(inner, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return ELLIPSIS if depth > DEEP else [clean(inner, depth + 1) for inner in value]
    return value


def number(value: Any) -> float:
    """A JSON value as a number, NaN if it is none."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    return float(value) if abs(value) < MOST or abs(value) == math.inf else math.nan


def is_count(value: Any) -> bool:
    """Whether a JSON value is a whole number that counts something."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def as_dict(value: Any) -> dict[str, Any]:
    """An object, empty if it is none."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """An array, empty if it is none."""
    return value if isinstance(value, list) else []


def as_count(value: str) -> int | None:
    """The whole number that a text spells, None if it spells none."""
    return int(value) if value.isdecimal() and len(value) <= 15 else None


def mean(values: Floats, counts: Floats) -> float:
    """Mean weighted by counts over what is known, NaN if nothing is."""
    known = np.isfinite(values) & np.isfinite(counts) & (counts > 0)
    return float(np.average(values[known], weights=counts[known])) if known.any() else math.nan


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as `outer.inner` and text."""
    pairs: dict[str, str] = {}
    for key, value in tree.items():
        name = prefix + text(key)
        if isinstance(value, dict):
            pairs |= flat(value, name + ".")
        else:
            pairs[name] = ", ".join(map(text, value)) if isinstance(value, list) else text(value)
    return pairs


def text(value: Any) -> str:
    """As text in which every character prints; others could break XML or turn the writing direction."""
    plain = str(value)
    if plain.isprintable():
        return plain
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in plain)


def short(label: str, most: int = MAX_LABEL) -> str:
    """A text cut to `most` letters."""
    return label if len(label) <= most else label[: most - 1] + ELLIPSIS


def show(value: float, digits: int = 2, sign: str = "") -> str:
    """A number with a fixed number of digits after the point."""
    if not math.isfinite(value):
        return NONE
    form = f"{sign},.{digits}f" if abs(value) < 1e12 else f"{sign}.3g"
    return f"{value:{form}}".replace("-", MINUS)


def signed(value: float, digits: int = 2) -> str:
    """As `show`, with a sign in any case."""
    return show(value, digits, "+")


def amount(value: float) -> str:
    """A number of any size in three digits, or all those before the point."""
    if not math.isfinite(value) or value == 0:
        return show(value, 0)
    digits = 2 - math.floor(math.log10(abs(value)))
    return show(value, max(digits, 0)) if digits <= 6 else f"{value:.2e}".replace("-", MINUS)


def zero(text: str) -> str:
    """A signed number, without its sign if it is zero."""
    return text[1:] if text[1:] and not text.strip(f"+{MINUS}0.") else text


def percent(share: float) -> str:
    """A share, with a digit more where whole percents would say all or nothing."""
    return f"{share:.0%}" if 0.01 <= share < 0.995 else f"{share:.1%}"


def relative(value: float, one: float) -> str:
    """How many times `one`."""
    return show_ratio(value / one) + TIMES if one > 0 and math.isfinite(value) else NONE


def show_ratio(value: float) -> str:
    """A ratio in about two digits."""
    if not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
