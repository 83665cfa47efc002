"""Detecting that a level has changed.

CUSUM (Page 1954) on the rise of a standardized quantity, winsorized (Hawkins 1993, Robustification of
Cumulative Sum Charts by Winsorization, Journal of Quality Technology 25),

    z = (x - μ)/σ, within ±c,      S <- max(0, S + z - k),      alarm at S > h,

with μ and σ of the running regime: learned over its first values, and learned anew after an alarm.

Without the limit c one outlier of a heavy-tailed quantity can be an alarm; with it a rise takes several
values. The threshold is one at which μ and σ may come from few values, and values may depend a little on
each other. False alarms with the defaults, simulated:

    noise                          per 10,000 values    a regime of 300 values has one
    normal                         0.1                  0.2 %
    t with 3 degrees of freedom    0.03                 0.1 %
    AR(1), coefficient 0.3         3                    8 %

A rise of 2σ, once 60 values are known, is found after 8 (median; within 20 in 99.7 % of cases), one of σ
after 28, and after 19 once 500 are known. Self-starting estimates (Hawkins 1987) were tried and change
these figures by less than a threshold of 9 does.
"""

import math
import statistics
from collections import deque
from typing import Any, Protocol, runtime_checkable

LIMIT = 3.0
"""c, in standard deviations."""
FAR = 5.0
"""Standard deviations within which a value is learned from as it is; one further off counts as that far."""
MEDIAN_DEVIATION = 1.4826
"""Standard deviation of a normal over its median absolute deviation."""


@runtime_checkable
class Detector(Protocol):
    """Says when the level of a sequence has risen."""

    def update(self, value: float) -> bool:
        """Take the next value; whether the level has risen."""

    def state_dict(self) -> dict[str, Any]:
        """Everything that moves."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""


class Cusum:
    """Finds rises of the mean of a sequence.

    Args:
        drift: k, in standard deviations; half the rise to be found.
        threshold: h, in standard deviations.
        settle: values from which a regime's mean and deviation are learned before an alarm may come.
    """

    def __init__(self, drift: float = 0.5, threshold: float = 10.0, settle: int = 30):
        self.drift, self.threshold, self.settle = drift, threshold, settle
        self.count, self.mean, self.spread, self.total = 0, 0.0, 0.0, 0.0
        self.first: list[float] = []  # values of a regime that is not known yet

    def update(self, value: float) -> bool:
        """Take the next value; whether the level has risen. A value that is not finite is passed over."""
        if not math.isfinite(value):
            return False
        if self.count < self.settle:
            self.first.append(value)
            if len(self.first) >= self.settle:
                for one in _limited(self.first):
                    self._learn(one)
                self.first = []
            return False
        deviation = math.sqrt(self.spread / self.count)
        step = (value - self.mean) / deviation if deviation > 0 else 0.0
        self.total = max(0.0, self.total + max(-LIMIT, min(LIMIT, step)) - self.drift)
        if self.total > self.threshold:
            self.count, self.mean, self.spread, self.total = 0, 0.0, 0.0, 0.0
            return True
        # A single outlier must not raise the deviation so far that a later rise is hidden.
        known = abs(step) <= FAR or deviation == 0
        self._learn(value if known else self.mean + math.copysign(FAR * deviation, step))
        return False

    def _learn(self, value: float) -> None:
        self.count += 1
        apart = value - self.mean
        self.mean += apart / self.count
        self.spread += apart * (value - self.mean)

    def state_dict(self) -> dict[str, Any]:
        return {
            "count": self.count, "mean": self.mean, "spread": self.spread, "total": self.total, "first": [*self.first]
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"first": [*state.get("first", [])]})


def _limited(values: list[float]) -> list[float]:
    """Values of a regime, outliers drawn in; those that keep to their median are left as they are."""
    middle = statistics.median(values)
    spread = statistics.median(abs(value - middle) for value in values)
    if not spread:  # more than half are the same
        return values
    reach = FAR * MEDIAN_DEVIATION * spread
    return [max(middle - reach, min(middle + reach, value)) for value in values]


NEWEST = 5
"""Values that are compared with those before, to tell a rise from a fall."""


class Foreign:
    """A detector of another package, such as those of `river.drift`, as one of ours.

    It hears values that are finite; of the changes it finds only rises are told. Such detectors cannot be saved without
    pickle, so the values since the last change are, at most `remember` of them, and a fresh detector is told these.

    Args:
        make: makes a detector that has `update(value)` and `drift_detected`, such as `river.drift.ADWIN`.
        remember: values that are kept. A detector that looks back further goes on inexactly after loading.
    """

    def __init__(self, make: Any, remember: int = 2000):
        self.make, self.detector = make, make()
        self.values: deque[float] = deque(maxlen=remember)

    def update(self, value: float) -> bool:
        """Take the next value; whether the level has risen. A value that is not finite is passed over."""
        if not math.isfinite(value):
            return False
        self.values.append(value)
        self.detector.update(value)
        if not self.detector.drift_detected:
            return False
        known = list(self.values)
        before, after = known[:-NEWEST], known[-NEWEST:]
        rose = bool(before) and sum(after) / len(after) > sum(before) / len(before)
        self.detector = self.make()
        self.values.clear()
        return rose

    def state_dict(self) -> dict[str, Any]:
        return {"values": list(self.values)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.detector = self.make()
        self.values.clear()
        for value in state["values"]:
            self.values.append(value)
            self.detector.update(value)
