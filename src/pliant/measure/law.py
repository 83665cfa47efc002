"""The exact law of an agent and an environment that take turns, both with few symbols.

A stream of n indices holds one action and one observation each; `order` says which comes first, "AO" for
A_1 O_1 A_2 O_2 ... or "OA" for O_1 A_1 O_2 A_2 .... Agent and environment are the same kind of thing, a player: what
has been said so far -> probabilities of its next symbol. The law is an array with one axis for each turn, in the order
of the stream.

    p(a_1..a_n, o_1..o_n) = Π_t λ(a_t | a_<t, o_<t) e(o_t | a_≤t, o_<t)          for order "AO"

Paper: Abel et al. 2025, Plasticity as the Mirror of Empowerment, arXiv:2505.10361, section 2.
Cost: (|A||O|)^n numbers, which must fit in memory.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import product
from typing import Any

import numpy as np
from jaxtyping import Float

from pliant.core import UsageError
from pliant.measure.flow import Flow, Order, not_negative, order_of, second_difference

Symbols = tuple[int, ...]
Function = Callable[[Symbols, Symbols], Any]
"""(actions so far, observations so far) -> probabilities, a sequence of numbers."""

TOLERANCE = 1e-6
"""By how much a sum of probabilities may miss 1, so that those in float32 pass; they are divided by their sum."""
COPIES = 10
"""Arrays of the size of a law that are held at once while it is made, and one more for each hidden state."""
BLOCK = 1 << 16


@dataclass(frozen=True, eq=False)
class Machine:
    """A player with finitely many hidden states, in any order of the stream.

    On its own turn it says a symbol that its state draws, and moves; on the other's turn it hears one, and moves.

    Attributes:
        start: `(S,)` probabilities of the first state.
        emit: `(S, K)` probabilities of its symbols in each state.
        say: `(S, K, S)` probabilities of the next state when it has said a symbol; K may be 1 where it does not matter.
        hear: `(S, L, S)` the same when it has heard one of the other's L symbols, with 1 for L alike.

    Raises:
        UsageError: shapes do not fit, or rows are not probabilities.
    """

    start: Float[np.ndarray, "S"]
    emit: Float[np.ndarray, "S K"]
    say: Float[np.ndarray, "S K1 S"]
    hear: Float[np.ndarray, "S L S"]

    def __post_init__(self) -> None:
        for name in ("start", "emit", "say", "hear"):
            rows = np.asarray(getattr(self, name), np.float64)
            object.__setattr__(self, name, checked(rows, f"Machine: {name}"))
        (s,), (rows, k), say, hear = (getattr(self, name).shape for name in ("start", "emit", "say", "hear"))
        if rows != s or say not in ((s, k, s), (s, 1, s)) or hear != (s, hear[1], s):
            raise UsageError(f"Machine: start {(s,)}, emit {(rows, k)}, say {say} and hear {hear} do not fit; expected "
                             "(S,), (S, K), (S, K, S) and (S, L, S)")  # fmt: skip


Table = Sequence[np.ndarray]
"""For each of its turns an array: one axis for each turn before it, of size 1 where it does not matter, and the last
over its symbols."""
Player = Function | Table | Machine


@dataclass(frozen=True, eq=False)
class Law:
    """Probabilities of all streams of n indices.

    Attributes:
        probabilities: one axis for each turn, in the order of the stream.
        order: "AO" or "OA", which turn comes first within an index.

    Raises:
        UsageError: not alternately |A| and |O| symbols, fewer than two of either, or not probabilities.
    """

    probabilities: np.ndarray
    order: Order = "AO"

    def __post_init__(self) -> None:
        shape = self.probabilities.shape
        order_of(self.order)
        if len(shape) < 2 or len(shape) % 2 or shape != shape[:2] * (len(shape) // 2):
            raise UsageError(f"Law: an array of shape {shape} has no axis for each turn, such as (2, 3, 2, 3) for n=2")
        for name, size in zip(self.order, shape[:2], strict=True):
            _alphabet("Law", name, size)
        flat = checked(np.asarray(self.probabilities, np.float64).reshape(-1), "Law")
        object.__setattr__(self, "probabilities", flat.reshape(shape))

    @property
    def n(self) -> int:
        """Indices of the stream."""
        return self.probabilities.ndim // 2

    @property
    def sizes(self) -> tuple[int, int]:
        """|A| and |O|."""
        first, second = self.probabilities.shape[:2]
        return (first, second) if self.order == "AO" else (second, first)

    @cached_property
    def entropies(self) -> Float[np.ndarray, "n1 n1"]:
        """G[j, i] = H(A_1..A_j, O_1..O_i) in bits, for 0 <= j, i <= n."""
        first, second = self.probabilities.shape[:2]
        grid = np.zeros((self.n + 1, self.n + 1))
        prefix = self.probabilities.reshape(-1)
        for t in range(self.n, 0, -1):
            # From (X_1..X_t, Y_1..Y_t) away with X_t, X_t-1, ..., and from (X_1..X_t, Y_1..Y_t-1) with the last Y's:
            # each array is a fraction of the one before, so all of them together take a few passes over the law.
            for i, part in _shorter(prefix, first, second, t):
                grid[i, t] = entropy(part)
            prefix = _sum_out(prefix, second, 1)
            for i, part in _shorter(prefix, second, first, t - 1):
                grid[t, i] = entropy(part)
            prefix = _sum_out(prefix, first, 1)
        return grid if self.order == "AO" else grid.T.copy()

    @cached_property
    def flow(self) -> Flow:
        """Information between single turns."""
        return Flow(not_negative(second_difference(self.entropies)), self.order, self.sizes)

    def prefixes(self) -> Iterator[np.ndarray]:
        """Laws of the first 0, 1, ..., 2n turns, one axis each, the shortest first."""
        found = [self.probabilities]
        while found[-1].ndim:
            found.append(found[-1].sum(-1))
        return reversed(found)


def _shorter(part: np.ndarray, size: int, other: int, count: int) -> Iterator[tuple[int, np.ndarray]]:
    """`part`, then with one more symbol summed out each time, of the player with `size` symbols, the last first.

    Args:
        part: a law of turns that end with one of the other player, flat.
        size, other: symbols of the player, and of the other.
        count: symbols of the player in it; given beside each part.
    """
    yield count, part
    after = other
    for left in range(count - 1, -1, -1):
        part = _sum_out(part, size, after)
        after *= other
        yield left, part


def _sum_out(part: np.ndarray, size: int, after: int) -> np.ndarray:
    """Without the axis of `size` that has `after` numbers behind it; sums of slices, faster than a sum over 2."""
    parts = part.reshape(-1, size, after)
    return reduce(np.add, (parts[:, k] for k in range(size))).reshape(-1)


def entropy(p: np.ndarray) -> float:
    """Bits of probabilities `(n,)`; those that are 0 add nothing."""
    return math.fsum(_entropy(p[i : i + BLOCK]) for i in range(0, len(p), BLOCK))


def _entropy(p: np.ndarray) -> float:
    p = p[p > 0]
    return -float((p * np.log2(p)).sum())


def joint_law(agent: Player, environment: Player, n: int, order: Order = "AO", *, memory: float | None = None) -> Law:
    """The law of what an agent and an environment say in n indices, exactly.

    Args:
        agent: `(actions, observations) -> probabilities over A`, both the tuples so far; or for each index an array,
            see `Table`; or a `Machine`. Histories that cannot occur are not asked about.
        environment: the same, over O. In order "AO" it sees one action more than observations.
        n: indices.
        order: which of the two speaks first.
        memory: bytes that may be taken; None: half of what this machine has.

    Raises:
        UsageError: what a player says are not probabilities of at least two symbols, always equally many; or the law
            would take more than `memory`, which is told before it is made.
    """
    if n < 1 or (memory is not None and memory <= 0):
        raise UsageError(f"joint_law: n is {n} and memory {memory}, expected at least 1 and some bytes")
    order_of(order)
    players = {"A": _voice(agent, "the agent", "A"), "O": _voice(environment, "the environment", "O")}
    history, p, sizes = _History(), np.ones(1), dict[str, int]()
    for turn in range(2 * n):
        name, last = order[turn % 2], turn == 2 * n - 1
        said = players[name].speak(history)
        if name not in sizes:
            sizes[name] = said.shape[1]
            _alphabet("joint_law", name, said.shape[1])
            if len(sizes) == 2:
                _fits(sizes, n, sum(player.states for player in players.values()), memory)
        if said.shape[1] != sizes[name]:
            raise UsageError(f"joint_law: {players[name].called} gave {sizes[name]} probabilities at first and "
                             f"{said.shape[1]} on turn {turn + 1}; it needs as many each time")  # fmt: skip
        p_next = p[:, None] * said
        if last:
            law = np.zeros((math.prod(sizes.values()) ** n // sizes[name], sizes[name]))
            law[history.flat] = p_next
            return Law(law.reshape([sizes[name] for name in order] * n), order)
        parent, symbol = np.nonzero(p_next)
        p = p_next[parent, symbol]
        history.move(name, sizes[name], parent, symbol)
        for other, player in players.items():
            player.move(other == name, parent, symbol)
    raise AssertionError


def needed(sizes: tuple[int, int], n: int, states: int = 0) -> float:
    """Bytes that making a law of these alphabets takes, about, with so many hidden states of machines."""
    turns = n * math.log2(math.prod(sizes))
    return (COPIES + states) * 8.0 * 2.0**turns if turns < 1000 else math.inf


def _fits(sizes: dict[str, int], n: int, states: int, memory: float | None) -> None:
    pair = sizes["A"], sizes["O"]
    allowed = _memory() / 2 if memory is None else memory
    if (wanted := needed(pair, n, states)) > allowed:
        most = int(max(0.0, math.log(allowed / needed(pair, 0, states)) / math.log(math.prod(pair))))
        advice = f"take n up to {most}" if most else "take smaller alphabets"
        raise UsageError(f"joint_law: {pair[0]} actions and {pair[1]} observations over n={n} indices would take about "
                         f"{_bytes(wanted)}, and {_bytes(allowed)} are allowed; {advice}, or estimate from samples "
                         "(pliant.measure.lifetimes)")  # fmt: skip


def _memory() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (AttributeError, ValueError, OSError):
        return 8.0 * 2**30


def _bytes(count: float) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:,.0f} {unit}" if count < 1e15 else f"{count / size:.1e} {unit}"
    return f"{count / 1e3:.0f} kB"


class _History:
    """The streams so far that can occur, H of them: their places in the law, and what each player has said."""

    def __init__(self) -> None:
        self.flat = np.zeros(1, np.int64)
        self.index = {"A": np.zeros(1, np.int32), "O": np.zeros(1, np.int32)}
        self.length = {"A": 0, "O": 0}
        self.size = {"A": 1, "O": 1}

    def move(self, name: str, size: int, parent: np.ndarray, symbol: np.ndarray) -> None:
        self.flat = self.flat[parent] * size + symbol
        self.index = {key: index[parent] for key, index in self.index.items()}
        self.index[name] = (self.index[name] * size + symbol).astype(np.int32)
        self.length[name] += 1
        self.size[name] = size

    def tuples(self) -> Iterator[tuple[Symbols, Symbols]]:
        """Actions and observations of each; there are far fewer tuples of either than pairs."""
        a, o = (list(product(range(self.size[name]), repeat=self.length[name])) for name in "AO")
        pairs = zip(self.index["A"].tolist(), self.index["O"].tolist(), strict=True)
        return ((a[j], o[i]) for j, i in pairs)


class _Voice(ABC):
    called: str
    states = 0  # that are not told by what was said

    @abstractmethod
    def speak(self, history: _History) -> np.ndarray:
        """Probabilities `(H, K)` of what is said next."""

    def move(self, mine: bool, parent: np.ndarray, symbol: np.ndarray) -> None:  # noqa: B027  (most need not)
        """Take what can have been said, by the player itself or the other: after which history, and which symbol."""


def _voice(player: Player, called: str, name: str) -> _Voice:
    if isinstance(player, Machine):
        return _OfMachine(player, called)
    if callable(player):
        return _OfFunction(player, called)
    if isinstance(player, Sequence) and all(isinstance(part, np.ndarray) for part in player):
        return _OfTable(player, called, name)
    raise UsageError(f"joint_law: {called} is {type(player).__name__}, expected a function, a Machine or a list of "
                     "arrays, one for each of its turns")  # fmt: skip


class _OfFunction(_Voice):
    def __init__(self, function: Function, called: str):
        self.function, self.called = function, called

    def speak(self, history: _History) -> np.ndarray:
        tuples = history.tuples()
        first = np.asarray(self.function(*next(tuples)), np.float64)
        if first.ndim != 1:
            raise UsageError(f"joint_law: {self.called} gave an array of shape {first.shape}, expected probabilities "
                             "in one dimension")  # fmt: skip
        said = np.empty((len(history.flat), len(first)))
        said[0] = first
        for row, (actions, observations) in enumerate(tuples, 1):
            answer = self.function(actions, observations)
            if len(answer) != len(first):
                raise UsageError(f"joint_law: {self.called} gave {len(answer)} probabilities after actions {actions} "
                                 f"and observations {observations}, and {len(first)} before")  # fmt: skip
            said[row] = answer
        if (wrong := _wrong(said)) is not None:
            actions, observations = next(pair for i, pair in enumerate(history.tuples()) if i == wrong)
            raise UsageError(f"joint_law: {self.called} gave {said[wrong].tolist()} after actions {actions} and "
                             f"observations {observations}; {_rule(said[wrong])}")  # fmt: skip
        return checked(said, self.called)


class _OfTable(_Voice):
    def __init__(self, arrays: Table, called: str, name: str):
        self.arrays, self.called, self.name = arrays, called, name
        self.shape: tuple[int, ...] = ()

    def speak(self, history: _History) -> np.ndarray:
        turn = history.length[self.name]
        if turn >= len(self.arrays):
            raise UsageError(f"joint_law: {self.called} has arrays for {len(self.arrays)} turns, needed is one for "
                             "each index")  # fmt: skip
        array = np.asarray(self.arrays[turn], np.float64)
        before = sum(history.length.values())
        if array.ndim != before + 1:
            raise UsageError(f"joint_law: {self.called} has an array of shape {array.shape} for index {turn + 1}, "
                             f"expected {before} axes for the turns before it and one for its symbols")  # fmt: skip
        said = array[tuple(self._places(history, array.shape[:-1]))].reshape(-1, array.shape[-1])
        return checked(said, f"joint_law: {self.called}")

    def _places(self, history: _History, shape: tuple[int, ...]) -> list[np.ndarray]:
        left, places = history.flat, list[np.ndarray]()
        # The sizes of earlier turns alternate; the last turn was the other's unless this is the first.
        other = "O" if self.name == "A" else "A"
        for axis in range(len(shape) - 1, -1, -1):
            size = history.size[other if (len(shape) - axis) % 2 else self.name]
            if shape[axis] not in (1, size):
                raise UsageError(f"joint_law: {self.called} has an array of shape {shape} for the turns before, whose "
                                 f"axis {axis} should be {size} or 1")  # fmt: skip
            left, place = np.divmod(left, size)
            places.append(place if shape[axis] > 1 else np.zeros_like(place))
        return places[::-1]


class _OfMachine(_Voice):
    """Goes forward with what is known of the hidden state, `(H, S)`, given the history alone."""

    def __init__(self, machine: Machine, called: str):
        self.machine, self.called, self.states = machine, called, len(machine.start)
        self.belief = machine.start[None]

    def speak(self, history: _History) -> np.ndarray:
        return self.belief @ self.machine.emit

    def move(self, mine: bool, parent: np.ndarray, symbol: np.ndarray) -> None:
        belief = self.belief[parent]
        if mine:
            belief *= self.machine.emit.T[symbol]
            belief /= belief.sum(1, keepdims=True)
        moves = self.machine.say if mine else self.machine.hear
        if moves.shape[1] == 1:
            self.belief = belief @ moves[:, 0]
            return
        if len(symbol) and symbol.max() >= moves.shape[1]:
            raise UsageError(f"joint_law: {self.called} hears {moves.shape[1]} symbols, and the other says more")
        self.belief = np.empty_like(belief)
        for k in range(moves.shape[1]):
            self.belief[symbol == k] = belief[symbol == k] @ moves[:, k]


def uniform(size: int) -> Machine:
    """A player that draws each symbol evenly, whatever it hears.

    Raises:
        UsageError: fewer than one symbol.
    """
    if size < 1:
        raise UsageError(f"uniform: {size} symbols, expected at least 1")
    return Machine(np.ones(1), np.full((1, size), 1 / size), np.ones((1, 1, 1)), np.ones((1, 1, 1)))


def _alphabet(called: str, name: str, size: int) -> None:
    if size < 2:
        what = {"A": "actions", "O": "observations"}[name]
        raise UsageError(f"{called}: {size} of {what}: an alphabet needs two symbols or more to carry any information")


def checked(rows: np.ndarray, called: str) -> np.ndarray:
    """Probabilities over the last axis, divided by their sums, which differ from 1 by rounding only.

    Raises:
        UsageError: they are negative, not finite, or do not sum to 1.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    if (row := _wrong(flat)) is not None:
        said = flat[row].tolist() if flat.shape[1] <= 8 else f"{flat.shape[1]} numbers"
        raise UsageError(f"{called} holds {said}; {_rule(flat[row])}")
    return rows / rows.sum(-1, keepdims=True)


def _wrong(rows: np.ndarray) -> int | None:
    """The first row that holds no probabilities."""
    good = (rows >= 0).all(1) & (np.abs(rows.sum(1) - 1) <= TOLERANCE)  # NaN is not good
    return None if good.all() else int(np.argmin(good))


def _rule(row: np.ndarray) -> str:
    if not np.isfinite(row).all():
        return "probabilities must be finite"
    if (row < 0).any():
        return f"probabilities must not be negative, and one is {row.min():g}"
    return f"probabilities must sum to 1, and these sum to {row.sum():g}"
