"""Plasticity and empowerment in bits: how much what an agent sees shapes what it does, and the other way round.

Every quantity of the paper is a sum of entries of one matrix, the flow between single turns,

    M[j, i] = I(A_j ; O_i | A_1..A_j-1, O_1..O_i-1)  =  G[j, i-1] + G[j-1, i] - G[j, i] - G[j-1, i-1],

with G[j, i] = H(A_1..A_j, O_1..O_i): generalized directed information over windows is the sum of a rectangle on one
side of the diagonal, so that once M is known any window takes a few look-ups. An entry counts as flow from the turn
that is earlier in the stream to the later one; on the diagonal the order of the stream decides.

Paper: Abel et al. 2025, Plasticity as the Mirror of Empowerment, arXiv:2505.10361: definitions 3.1, 4.1 and 4.5,
theorems 3.5 (conservation) and 4.8 (tension).
Departures: the paper leaves open which of action and observation comes first within an index. Here it is said, and
`mode="causal"` counts every entry once, in the direction of time; then empowerment and plasticity over the same
windows sum to a conditional mutual information, and theorem 4.8 holds. `mode="literal"` takes the plain sum of
definition 3.1 in both directions, counts the diagonal twice, and breaks the bound.
"""

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Float

from pliant.core import UsageError
from pliant.measure.flow import Flow, Mode, Order, Side, Window
from pliant.measure.law import Function, Law, Machine, Player, joint_law, uniform

__all__ = [
    "Flow", "Function", "Law", "Machine", "Order", "Player", "Tension", "bound", "conditional_information",
    "directed_information", "empowerment", "flow_matrix", "joint_law", "plasticity", "tension", "uniform",
]  # fmt: skip

Named = tuple[Literal["A", "O"], Window]


def flow_matrix(law: Law | Flow) -> Float[np.ndarray, "n n"]:
    """M[j, i] = I(A_j ; O_i | A_1..A_j-1, O_1..O_i-1) in bits, `(n, n)`, indices from 0; none is negative."""
    return _flow(law).matrix.copy()


def directed_information(law: Law | Flow, source: Named, sink: Named, delayed: bool = False) -> float:
    """Generalized directed information in bits, definition 3.1.

    I(X_a:b -> Y_c:d) = Σ_{i = max(a, c)}^{d} I(X_a:min(b, i) ; Y_i | X_1..X_a-1, Y_1..Y_i-1), whatever the order of
    the stream; `delayed` leaves out what X_i tells of Y_i.

    Args:
        law: of agent and environment, or its flow.
        source, sink: ("A", (first, last)) and ("O", (first, last)) or the other way round.
        delayed: only from strictly earlier indices.

    Raises:
        UsageError: both are of the same player, or a window is not within the stream.
    """
    windows = dict((source, sink))
    if set(windows) != {"A", "O"}:
        raise UsageError(f"directed_information: source {source[0]!r} and sink {sink[0]!r}, expected A and O or O and "
                         "A")  # fmt: skip
    sides: tuple[Side, ...] = ("before" if source[0] == "A" else "after", *(() if delayed else ("same",)))
    return _sum(law, windows["A"], windows["O"], sides)


def conditional_information(
    law: Law | Flow, *, act_window: Window | None = None, obs_window: Window | None = None
) -> float:
    """I(A_window ; O_window | all before either window) in bits, what theorem 3.5 says is conserved.

    Windows are (first, last) from 1, both in it; None is the whole stream.
    """
    return _sum(law, act_window, obs_window, ("before", "same", "after"))


def plasticity(
    law: Law | Flow, *, obs_window: Window | None = None, act_window: Window | None = None, mode: Mode = "causal"
) -> float:
    """Bits by which observations of a window shape the actions of a window, definition 4.1, of this very pair.

    The paper takes the greatest over a set of environments; that is `max` over their laws.

    Args:
        law: of agent and environment, or its flow.
        obs_window: first and last observation, from 1, both in it; None: all.
        act_window: the same for actions.
        mode: "causal" counts what an observation tells of actions that come after it in the stream; "literal" is the
            plain directed information, in which an action may be told of by an observation that follows it.

    Raises:
        UsageError: a window is not within the stream, or the mode is not known.
    """
    return _sum(law, act_window, obs_window, _flow(law).sides("O", mode))


def empowerment(
    law: Law | Flow, *, act_window: Window | None = None, obs_window: Window | None = None, mode: Mode = "causal"
) -> float:
    """Bits by which actions of a window shape the observations of a window, definition 4.5; see `plasticity`."""
    return _sum(law, act_window, obs_window, _flow(law).sides("A", mode))


def bound(law: Law | Flow, *, act_window: Window | None = None, obs_window: Window | None = None) -> float:
    """m of theorem 4.8 in bits, which empowerment and plasticity over these windows cannot exceed together."""
    return _flow(law).bound(act_window, obs_window)


class Tension(NamedTuple):
    """Where a pair stands under the bound, in bits.

    Attributes:
        empowerment, plasticity: over the same two windows.
        bound: what their sum cannot exceed.
    """

    empowerment: float
    plasticity: float
    bound: float

    @property
    def room(self) -> float:
        """How far below the bound the sum is."""
        return self.bound - self.empowerment - self.plasticity


def tension(
    law: Law | Flow, *, act_window: Window | None = None, obs_window: Window | None = None, mode: Mode = "causal"
) -> Tension:
    """Empowerment, plasticity and their bound for the same windows, theorem 4.8; see `plasticity`."""
    windows: Mapping[str, Any] = {"act_window": act_window, "obs_window": obs_window}
    law = _flow(law)
    return Tension(empowerment(law, mode=mode, **windows), plasticity(law, mode=mode, **windows), bound(law, **windows))


def _flow(law: Law | Flow) -> Flow:
    return law if isinstance(law, Flow) else law.flow


def _sum(law: Law | Flow, act_window: Window | None, obs_window: Window | None, sides: tuple[Side, ...]) -> float:
    return _flow(law).total(act_window, obs_window, *sides)
