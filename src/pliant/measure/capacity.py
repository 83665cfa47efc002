"""The most that could be: empowerment of an environment over all agents, plasticity of an agent over all environments.

- `capacity`: of a channel, by the algorithm of Blahut and Arimoto (1972); actions chosen at once, without looking.
- `closed_loop_capacity`: directed information with choices that depend on what was seen (Naiss & Permuter 2013,
  Extension of the Blahut-Arimoto algorithm for maximizing directed information, arXiv:1012.5071), whose inner maximum
  is written here as a dynamic program with a soft maximum.
- `reach`: n-step empowerment of the states of a world (Klyubin, Polani & Nehaniv 2005).
- `plasticity_values`: the Bellman equation for plasticity (Lucas & Precup 2026, arXiv:2609.10776).

Every capacity comes with a lower and an upper bound, both of them proven by what was found, not hoped for.
"""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import lru_cache
from itertools import product
from typing import Any, Literal, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from pliant.core import UsageError
from pliant.measure.flow import Order
from pliant.measure.law import Law, Player, checked, joint_law, uniform

FEW = 1 << 20
"""Choices that may be tried one by one."""


class Capacity(NamedTuple):
    """Bits, between two bounds.

    Attributes:
        lower: attained by `inputs`.
        upper: what no inputs exceed.
        inputs: probabilities of inputs: of a channel `(X,)`; of a closed loop for each turn of the source an array,
            one axis for each turn before it and the last over its symbols, which `joint_law` takes as a player.
        rounds: improvements made; the bounds may still be apart if there were as many as were allowed.
    """

    lower: float
    upper: float
    inputs: Any
    rounds: int


def capacity(channel: Float[np.ndarray, "X Y"], *, tolerance: float = 1e-10, rounds: int = 100_000) -> Capacity:
    """The most bits that one use of a channel carries.

    Args:
        channel: `(X, Y)` probabilities of what comes out, for each input.
        tolerance: bits that the bounds may be apart at the end.
        rounds: improvements at most.

    Raises:
        UsageError: rows are not probabilities.
    """
    w = checked(np.asarray(channel, np.float64), "capacity: channel")
    w = w[:, w.any(0)]
    w_log_w = np.where(w > 0, w * np.log2(np.where(w > 0, w, 1.0)), 0.0).sum(1)
    p = np.full(len(w), 1 / len(w))
    for done in range(rounds + 1):
        q = p @ w
        divergence = w_log_w - w @ np.log2(q, where=q > 0, out=np.zeros_like(q))
        top = float(divergence.max())
        weight = p * np.exp2(divergence - top)
        lower = top + math.log2(weight.sum())
        if top - lower <= tolerance or done == rounds:
            # The lower bound is that of the inputs after the step, which are those that are given back.
            return Capacity(lower, top, weight / weight.sum(), done)
        p = weight / weight.sum()
    raise AssertionError


def closed_loop_capacity(
    responder: Player, n: int, *, source: Literal["A", "O"] = "A", symbols: int, order: Order = "AO",
    tolerance: float = 1e-9, rounds: int = 2000, memory: float | None = None,
) -> Capacity:  # fmt: skip
    """The most bits that can flow from a source to a responder that is given, over n indices, in the causal mode.

    With source "A" the responder is an environment, and this is its empowerment over all agents; with "O" it is an
    agent, and this is its plasticity over all environments. The source may look at everything before it chooses.

    One round takes the posterior q(x|y) of all sources given all responses under the present choices r, and makes the
    choices that are best for it, from the last turn to the first:

        V = log q(x^n | y^n);  at a turn of the responder  V <- Σ_y p(y | before) V
        at one of the source   r(x | before) = 2^V(x) / Σ 2^V,  V <- log Σ_x 2^V

    The last V is a lower bound and grows from round to round. With q(y) the law of responses under r, the most that any
    choices can make of the mean of log p(y^n || x^n) / q(y^n), by the same recursion with a maximum for the soft one,
    is an upper bound.

    Args:
        responder: as a player of `joint_law`.
        n: indices.
        source: who chooses.
        symbols: how many symbols the source has.
        order: which turn comes first within an index.
        tolerance: bits that the bounds may be apart at the end.
        rounds: at most.
        memory: bytes the law may take, see `joint_law`.

    Raises:
        UsageError: as `joint_law` and `uniform`; another source.
    """
    if source not in ("A", "O"):
        raise UsageError(f"closed_loop_capacity: source is {source!r}, expected A or O")
    other = uniform(symbols)
    agent, environment = (other, responder) if source == "A" else (responder, other)
    loop = _Loop(joint_law(agent, environment, n, order, memory=memory), source)
    choices, lower = loop.even(), -math.inf
    for done in range(rounds + 1):
        law = loop.law(choices)
        upper = loop.upper(law)
        better, found = loop.improved(law)
        lower = max(lower, found)
        if upper - lower <= tolerance or done == rounds:
            return Capacity(lower, upper, better, done)
        choices = better
    raise AssertionError


class _Loop:
    """Tables of a responder, and the recursions over turns from the last to the first."""

    def __init__(self, even: Law, source: str):
        self.mine = [name == source for name in even.order * even.n]
        self.responds: list[np.ndarray | None] = []
        prefixes = list(even.prefixes())
        for turn, mine in enumerate(self.mine):
            before, after = prefixes[turn][..., None], prefixes[turn + 1]
            table = np.divide(after, before, where=before > 0, out=np.zeros_like(after))
            self.responds.append(None if mine else table)
        self.sources = tuple(turn for turn, mine in enumerate(self.mine) if mine)
        self.shape = even.probabilities.shape

    def even(self) -> list[np.ndarray]:
        return [np.full(self.shape[: turn + 1], 1 / self.shape[turn]) for turn in self.sources]

    def law(self, choices: Sequence[np.ndarray]) -> np.ndarray:
        p, tables = np.ones(()), iter(choices)
        for table in self.responds:
            p = p[..., None] * (next(tables) if table is None else table)
        return p

    def improved(self, law: np.ndarray) -> tuple[list[np.ndarray], float]:
        """Choices that are best for the posterior under a law, and what they are surely worth."""
        with np.errstate(divide="ignore", invalid="ignore"):
            value = np.log2(law / law.sum(self.sources, keepdims=True))  # log q(x|y), -inf where it cannot be
        found: list[np.ndarray] = []
        for turn in reversed(range(len(self.shape))):
            table = self.responds[turn]
            if table is not None:
                value = _mean(table, value)
                continue
            top = np.maximum(value.max(-1, keepdims=True), -1e300)
            weight = np.exp2(value - top)
            total = weight.sum(-1, keepdims=True)
            # After what cannot be, any choice is as good.
            found.append(np.where(total > 0, weight, 1.0) / np.where(total > 0, total, self.shape[turn]))
            value = (top + np.log2(np.where(total > 0, total, 1.0)))[..., 0]
        return found[::-1], float(value)

    def upper(self, law: np.ndarray) -> float:
        responses = law.sum(self.sources, keepdims=True)
        causal: np.ndarray = np.zeros(())
        with np.errstate(divide="ignore", invalid="ignore"):
            for table, size in zip(self.responds, self.shape, strict=True):
                causal = causal[..., None] + (np.zeros(size) if table is None else np.log2(table))
            value = causal - np.log2(responses)
        for table in reversed(self.responds):
            value = value.max(-1) if table is None else _mean(table, value)
        return float(value)


def _mean(table: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Σ_y p(y) V(y), in which what has no probability does not count, whatever its value."""
    return np.asarray((table * np.where(table > 0, value, 0.0)).sum(-1))


Moves = Int[np.ndarray, "S A"] | Float[np.ndarray, "S A S"]
"""For each state and action the next state, or probabilities of it."""


def grid(height: int, width: int, walls: Iterable[tuple[int, int]] = ()) -> Int[np.ndarray, "S 5"]:
    """Moves of a grid whose cells are the states, row by row: stay, up, down, left, right; the edge and walls block.

    Raises:
        UsageError: a wall is outside.
    """
    closed = set(walls)
    if bad := [cell for cell in closed if not (0 <= cell[0] < height and 0 <= cell[1] < width)]:
        raise UsageError(f"grid: wall {bad[0]} is outside of {height} x {width} cells")
    moves = np.empty((height * width, 5), np.int64)
    for row, column in product(range(height), range(width)):
        for action, (down, right) in enumerate(((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))):
            to = row + down, column + right
            free = 0 <= to[0] < height and 0 <= to[1] < width and to not in closed
            moves[row * width + column, action] = to[0] * width + to[1] if free else row * width + column
    return moves


def explored(
    step: Callable[[Any, int], Any], start: Iterable[Any], actions: int, depth: int
) -> tuple[list[Any], Moves]:
    """States that a world of one's own can come to, and its moves among them; states at the end of `depth` stay.

    Args:
        step: (state, action) -> the next state, or a dictionary of next states with their probabilities; states are
            hashable.
        start: states to begin with.
        actions: how many there are.
        depth: steps from the start that are looked at.

    Raises:
        UsageError: probabilities that are none.
    """
    states = {state: index for index, state in enumerate(dict.fromkeys(start))}
    rows: list[list[dict[int, float]]] = []
    fresh = list(states)
    for _ in range(depth):
        now, fresh = fresh, []
        for state in now:
            rows.append([])
            for action in range(actions):
                after = step(state, action)
                after = after if isinstance(after, Mapping) else {after: 1.0}
                for other in after:
                    if other not in states:
                        states[other] = len(states)
                        fresh.append(other)
                rows[-1].append({states[other]: p for other, p in after.items()})
    rows += [[{index: 1.0}] * actions for index in range(len(rows), len(states))]
    if all(len(row) == 1 for state in rows for row in state):
        return list(states), np.array([[next(iter(row)) for row in state] for state in rows])
    moves = np.zeros((len(states), actions, len(states)))
    for s, a in product(range(len(states)), range(actions)):
        moves[s, a, list(rows[s][a])] = list(rows[s][a].values())
    return list(states), checked(moves, "explored: step")


def reach(
    moves: Moves, n: int, states: Sequence[int] | None = None, *, tolerance: float = 1e-9
) -> Float[np.ndarray, "R"]:
    """Bits of n-step empowerment: the capacity from n actions, chosen at once, to the state n steps later.

    In a world without chance that is the logarithm of the number of states within reach; otherwise every sequence of
    actions is an input of a channel, and there may not be more than a million of them.

    Args:
        moves: of the world, see `grid` and `explored`.
        n: steps.
        states: for which; None: for all.
        tolerance: bits that the bounds of a capacity may be apart; the lower one is given.

    Raises:
        UsageError: rows are not probabilities, states that there are not, or too many sequences.
    """
    chosen = np.arange(len(moves)) if states is None else np.asarray(states)
    if n < 0 or (chosen.size and not 0 <= chosen.min() <= chosen.max() < len(moves)):
        raise UsageError(f"reach: {n} steps from states {chosen.tolist()}, expected 0 or more, and states from 0 to "
                         f"{len(moves) - 1}")  # fmt: skip
    if moves.ndim == 2:
        if moves.min() < 0 or moves.max() >= len(moves):
            raise UsageError(f"reach: moves lead to state {moves.max()}, and there are {len(moves)}")
        return np.log2(_within(moves, n, chosen).sum(1))
    p = checked(moves, "reach: moves")
    count = p.shape[1] ** n
    if count * len(p) > 64 * FEW or count > FEW:
        raise UsageError(f"reach: {p.shape[1]} actions over {n} steps are {count:,} sequences, at most {FEW:,} can be "
                         "tried; take fewer steps")  # fmt: skip
    return np.array([capacity(_channel(p, n, int(state)), tolerance=tolerance).lower for state in chosen])


def _within(moves: np.ndarray, n: int, chosen: np.ndarray) -> Bool[np.ndarray, "R S"]:
    reached = np.zeros((len(chosen), len(moves)), bool)
    reached[np.arange(len(chosen)), chosen] = True
    for _ in range(n):
        start, state = np.nonzero(reached)
        reached = np.zeros_like(reached)
        for action in range(moves.shape[1]):
            reached[start, moves[state, action]] = True
    return reached


def _channel(p: np.ndarray, n: int, state: int) -> np.ndarray:
    """`(A^n, S)` probabilities of the last state."""
    rows = np.eye(len(p))[[state]]
    for _ in range(n):
        rows = np.einsum("rs,sat->rat", rows, p).reshape(-1, len(p))
    return rows


def plasticity_values(
    moves: Float[np.ndarray, "S A S"], *, discount: float = 0.9, tolerance: float = 1e-9
) -> tuple[Float[np.ndarray, "S A"], Int[np.ndarray, "S A S"]]:
    """V*(s, a) and the best answers a' to (s, a, s') of an agent that wants to be shaped by what it sees.

    The reward is I(S' ; A' | s, a), what the next state tells of the action after it. For a given (s, a) it is convex
    in the answers, so that the best of them are sure ones, and it is the entropy of the action then:

        V*(s, a) = max over f: S -> A of  H(q) + γ Σ_s' p(s'|s, a) V*(s', f(s')),  q(a') = Σ_{s': f(s') = a'} p(s'|s, a)

    Args:
        moves: `(S, A, S)` probabilities of the next state.
        discount: γ, less than 1.
        tolerance: bits within which values are right.

    Returns:
        values in bits `(S, A)`, and answers `(S, A, S)`, 0 for states that cannot follow.

    Raises:
        UsageError: rows are not probabilities, or some have so many next states that not all answers can be tried.
    """
    if not 0 <= discount < 1:
        raise UsageError(f"plasticity_values: discount is {discount}, expected 0 <= discount < 1")
    p = checked(moves, "plasticity_values: moves")
    states, actions, _ = p.shape
    tried = [_answers(row, actions) for row in p.reshape(-1, states)]
    values = np.zeros((states, actions))
    while True:
        best = [_best(one, discount, values) for one in tried]
        now = np.array([value for value, _ in best]).reshape(states, actions)
        change, values = np.abs(now - values).max(), now
        if change * discount <= tolerance * (1 - discount):
            break
    answers = np.zeros((states * actions, states), np.int64)
    for row, ((_, choice), one) in enumerate(zip(best, tried, strict=True)):
        answers[row, one.states] = one.choices[choice]
    return values, answers.reshape(states, actions, states)


class _Answers(NamedTuple):
    states: np.ndarray  # (R,) that can follow
    p: np.ndarray  # (R,) their probabilities
    choices: np.ndarray  # (F, R) an action for each, the same array for all that have R states
    bits: np.ndarray  # (F,) entropy of the action


def _answers(row: np.ndarray, actions: int) -> _Answers:
    states = np.flatnonzero(row)
    count = actions ** len(states)
    if count > FEW:
        raise UsageError(f"plasticity_values: {len(states)} states may follow, and {actions} answers to each are "
                         f"{count:,} choices; at most {FEW:,} can be tried")  # fmt: skip
    choices = _choices(actions, len(states))
    mass = np.stack([(choices == action) @ row[states] for action in range(actions)], 1)
    bits = -np.where(mass > 0, mass * np.log2(np.where(mass > 0, mass, 1.0)), 0.0).sum(1)
    return _Answers(states, row[states], choices, bits)


@lru_cache(maxsize=4)
def _choices(actions: int, states: int) -> np.ndarray:
    return np.ascontiguousarray(np.indices((actions,) * states, np.uint8 if actions < 256 else np.int64)
                                .reshape(states, -1).T)  # fmt: skip


def _best(one: _Answers, discount: float, values: np.ndarray) -> tuple[float, int]:
    worth = one.bits + discount * (values[one.states, one.choices] @ one.p)
    choice = int(np.argmax(worth))
    return float(worth[choice]), choice
