"""Where bits prefer one member and accuracy another, and why.

Bits are the main score; a member that is right more often may still need more of them, if it is too sure of what is
wrong or not sure enough of what is right (docs/perplexity.md). Said only where both differences are resolved: windows
of the run are resampled, of both members together.
"""

import numpy as np

from pliant.measure.paired import bootstrap
from pliant.report.load import Loaded, column
from pliant.report.values import MAX_NAME, as_dict, as_list, number, percent, short, show

FEWEST = 8
"""Windows below which nothing is said."""


def disagreements(run: Loaded) -> list[str]:
    """A sentence for each opponent that bits and accuracy place differently against our own member."""
    if run.measure != "accuracy" or len(run.names) < 2:
        return []
    return [said for other in run.names[1:] if (said := _pair(run, run.names[0], other))]


def _pair(run: Loaded, ours: str, other: str) -> str:
    bits, right, counts = (column(run, other, key) for key in ("bits", "accuracy", "answers"))
    bits, right = column(run, ours, "bits") - bits, column(run, ours, "accuracy") - right
    known = np.isfinite(bits) & np.isfinite(right) & (counts > 0)
    if known.sum() < FEWEST:
        return ""
    counts = counts[known]
    more, better = (bootstrap(values[known] * counts, counts) for values in (bits, right))
    if not more.resolved or not better.resolved or (more.value > 0) != (better.value > 0):
        return ""
    sharp, accurate = (other, ours) if more.value > 0 else (ours, other)
    return (
        f"Bits and accuracy disagree: {short(sharp, MAX_NAME)} needs {show(abs(more.value))} bits per answer less than "
        f"{short(accurate, MAX_NAME)}, which is right more often, by {show(100 * abs(better.value), 1)} "
        f"points{_why(run, accurate)}."
    )


def _why(run: Loaded, name: str) -> str:
    """How sure the member is that has more right and yet needs more bits, from its reliability."""
    rows = [as_dict(row) for row in as_list(run.member(name).get("reliability"))]
    values = np.array([[number(row.get(key)) for key in ("count", "confidence", "accuracy")] for row in rows])
    values = values.reshape(-1, 3)
    values = values[np.isfinite(values).all(1) & (values[:, :1] > 0).all(1)]
    if not len(values):
        return ""
    sure, right = (float(np.average(values[:, i], weights=values[:, 0])) for i in (1, 2))
    how = "too sure" if sure > right else "not sure enough"
    return f", but {how}: it gives its answers {percent(sure)} on average and is right {percent(right)} of the time"
