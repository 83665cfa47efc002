"""The flow of information between single turns of a stream, and sums over windows of it."""

from dataclasses import dataclass
from functools import cached_property
from math import log2
from typing import Literal

import numpy as np
from jaxtyping import Float

from pliant.core import UsageError

Order = Literal["AO", "OA"]
Window = tuple[int, int]
"""First and last index, from 1, both in it."""
Mode = Literal["causal", "literal"]
Side = Literal["before", "same", "after"]
"""Where in the matrix: the action's index is before that of the observation, the same, or after it."""

ROUNDING = 1e-9
"""Flows above minus this are zero; one of a law that is further below would be an error of ours."""


@dataclass(frozen=True, eq=False)
class Flow:
    """The flow between single turns; any window is a few look-ups in sums that are made once.

    Attributes:
        matrix: `(n, n)` bits, M[j, i] between action j + 1 and observation i + 1 given all that is before either.
        order: which of the two comes first within an index.
        sizes: |A| and |O|.

    Raises:
        UsageError: the order is not known.
    """

    matrix: Float[np.ndarray, "n n"]
    order: Order
    sizes: tuple[int, int]

    def __post_init__(self) -> None:
        order_of(self.order)

    @property
    def n(self) -> int:
        """Indices of the stream."""
        return len(self.matrix)

    def total(self, act_window: Window | None, obs_window: Window | None, *sides: Side) -> float:
        """The sum over a rectangle of what is on these sides of the diagonal; None is the whole stream.

        Raises:
            UsageError: a window is not within the stream.
        """
        (a, b), (c, d) = self.window(act_window), self.window(obs_window)
        there = {"before": a < d, "same": max(a, c) <= min(b, d), "after": b > c}  # else exactly 0, without rounding
        tables = (self._sums[side] for side in sides if there[side])
        return sum((float(s[b, d] - s[a - 1, d] - s[b, c - 1] + s[a - 1, c - 1]) for s in tables), 0.0)

    def window(self, window: Window | None) -> Window:
        """First and last index of a window; the whole stream if there is none."""
        return within(window, self.n)

    def sides(self, source: str, mode: str) -> tuple[Side, ...]:
        """Where the flow from a source "A" or "O" is, see `sides_of`."""
        return sides_of(self.order, source, mode)

    def bound(self, act_window: Window | None, obs_window: Window | None) -> float:
        """What flow in both directions together cannot exceed, theorem 4.8."""
        lengths = (last - first + 1 for first, last in (self.window(act_window), self.window(obs_window)))
        return min(length * log2(size) for length, size in zip(lengths, self.sizes, strict=True))

    @cached_property
    def _sums(self) -> dict[Side, np.ndarray]:
        parts: dict[Side, np.ndarray] = {
            "before": np.triu(self.matrix, 1), "same": np.diag(np.diag(self.matrix)), "after": np.tril(self.matrix, -1),
        }  # fmt: skip
        return {side: np.pad(part.cumsum(0).cumsum(1), ((1, 0), (1, 0))) for side, part in parts.items()}


def sides_of(order: str, source: str, mode: str) -> tuple[Side, ...]:
    """On which sides of the diagonal the flow from a source "A" or "O" is.

    Raises:
        UsageError: the mode is neither "causal" nor "literal".
    """
    if mode not in ("causal", "literal"):
        raise UsageError(f"mode is {mode!r}, expected causal or literal")
    strictly: Side = "before" if source == "A" else "after"
    # Within an index there is only one direction of time: from the player that speaks first.
    return (strictly, "same") if mode == "literal" or order[0] == source else (strictly,)


def second_difference(entropies: Float[np.ndarray, "n1 n1"]) -> Float[np.ndarray, "n n"]:
    """M[j, i] = G[j, i-1] + G[j-1, i] - G[j, i] - G[j-1, i-1], for joint entropies G of prefixes, as it comes."""
    g = entropies
    return g[1:, :-1] + g[:-1, 1:] - g[1:, 1:] - g[:-1, :-1]


def not_negative(bits: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Bits that cannot be negative, whose rounding is taken away."""
    assert bits.min(initial=0.0) > -ROUNDING, f"{bits.min()} bits"
    return np.maximum(bits, 0.0)


def order_of(order: str) -> str:
    """The order, if it is one."""
    if order not in ("AO", "OA"):
        raise UsageError(f"order is {order!r}, expected AO (an action is the first of an index) or OA")
    return order


def within(window: Window | None, n: int) -> Window:
    """First and last index of a window of a stream of n; the whole stream if there is none.

    Raises:
        UsageError: the window is not within the stream.
    """
    first, last = window or (1, n)
    if not 1 <= first <= last <= n:
        raise UsageError(f"window ({first}, {last}) is not within the stream: expected 1 <= first <= last <= {n}")
    return first, last
