"""Detecting that a level has changed.

CUSUM (Page 1954) on the rise of a standardized quantity,

    S <- max(0, S + (x - μ)/σ - k),      alarm at S > h,

with μ and σ of the running regime: learned over its first values, and learned anew after an alarm.
With k = 0.5 and h = 5 a standard normal sequence with known μ, σ gives a false alarm about every 930
values and a rise of one σ is found after about 10 (Siegmund's approximation; effective-learning-rate.md).
"""

import math
from typing import Any


class Cusum:
    """Finds rises of the mean of a sequence.

    Args:
        drift: k, in standard deviations; half the rise to be found.
        threshold: h, in standard deviations.
        settle: values from which a regime's mean and deviation are learned before an alarm may come.
    """

    def __init__(self, drift: float = 0.5, threshold: float = 5.0, settle: int = 30):
        self.drift, self.threshold, self.settle = drift, threshold, settle
        self.count, self.mean, self.spread, self.total = 0, 0.0, 0.0, 0.0

    def update(self, value: float) -> bool:
        """Take the next value; whether the level has risen. A value that is not finite is passed over."""
        if not math.isfinite(value):
            return False
        if self.count >= self.settle:
            deviation = math.sqrt(self.spread / self.count)
            step = (value - self.mean) / deviation if deviation > 0 else 0.0
            self.total = max(0.0, self.total + step - self.drift)
            if self.total > self.threshold:
                self.count, self.mean, self.spread, self.total = 0, 0.0, 0.0, 0.0
                return True
        self.count += 1
        apart = value - self.mean
        self.mean += apart / self.count
        self.spread += apart * (value - self.mean)
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "spread": self.spread, "total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
