"""Agents and environments, and quantities of their streams by definition, one history after the other."""

import math
from collections import defaultdict
from functools import cache
from typing import Any

import numpy as np

from pliant.measure.information import Law, joint_law

Stream = tuple[tuple[int, ...], tuple[int, ...]]


def fair(actions: Any, observations: Any) -> list[float]:
    return [0.5, 0.5]


def sure(symbol: int, size: int = 2) -> list[float]:
    return [float(k == symbol) for k in range(size)]


def flip(symbol: int, p: float) -> list[float]:
    """The symbol, or with probability p the other one of two."""
    return [p, 1 - p] if symbol else [1 - p, p]


def h(p: float) -> float:
    return 0.0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def drawn(size: int, seed: int, sharp: float = 1.0) -> Any:
    """A player whose probabilities are drawn anew for each history; the sharper the nearer they are to 0 and 1."""

    def player(actions: tuple[int, ...], observations: tuple[int, ...]) -> np.ndarray:
        key = np.random.SeedSequence([seed, len(actions), len(observations), *actions, *observations])
        return np.random.default_rng(key).dirichlet(np.full(size, 1 / sharp))

    return player


def drawn_tables(
    sizes: tuple[int, int], n: int, order: Any, seed: int, sharp: float = 1.0
) -> dict[str, list[np.ndarray]]:
    """Tables of an agent "A" and an environment "O", the fast way to `drawn`."""
    rng = np.random.default_rng(seed)
    tables: dict[str, list[np.ndarray]] = {"A": [], "O": []}
    shape: list[int] = []
    for _ in range(n):
        for name in order:
            size = sizes["AO".index(name)]
            tables[name].append(rng.dirichlet(np.full(size, 1 / sharp), tuple(shape)).reshape(*shape, size))
            shape.append(size)
    return tables


def random_law(sizes: tuple[int, int], n: int, order: Any, seed: int, sharp: float = 1.0) -> Law:
    tables = drawn_tables(sizes, n, order, seed, sharp)
    return joint_law(tables["A"], tables["O"], n, order)


class Literal:
    """Everything from a dictionary of streams, by marginals of one set of turns after the other."""

    def __init__(self, law: Law):
        p, order = law.probabilities, law.order
        self.p: dict[Stream, float] = {}
        for index in zip(*np.nonzero(p), strict=True):
            symbols = tuple(int(k) for k in index)
            first, second = symbols[::2], symbols[1::2]
            self.p[(first, second) if order == "AO" else (second, first)] = float(p[index])
        self.entropy = cache(self._entropy)

    def _entropy(self, actions: tuple[int, ...], observations: tuple[int, ...]) -> float:
        """Of these indices, from 1."""
        sums: dict[Any, float] = defaultdict(float)
        for (a, o), p in self.p.items():
            sums[tuple(a[i - 1] for i in actions), tuple(o[i - 1] for i in observations)] += p
        return -math.fsum(p * math.log2(p) for p in sums.values())

    def information(self, x: Any, y: Any, given: Any) -> float:
        """I(X ; Y | Z), each a pair of indices of actions and of observations."""

        def joined(*parts: Any) -> float:
            indices = [tuple(sorted({i for part in parts for i in part[k]})) for k in (0, 1)]
            return self.entropy(indices[0], indices[1])

        return joined(x, given) + joined(y, given) - joined(x, y, given) - joined(given)

    def directed(self, source: str, a: int, b: int, c: int, d: int, delayed: bool = False) -> float:
        """Definition 3.1, its terms one after the other; or the hooked form, strictly delayed."""

        def part(mine: bool, indices: range) -> Any:
            own = (tuple(indices), ())
            return own if mine == (source == "A") else own[::-1]

        def both(x: Any, y: Any) -> Any:
            return (x[0] + y[0], x[1] + y[1])

        lag = int(delayed)
        return math.fsum(
            self.information(
                part(True, range(a, min(b, i - lag) + 1)), part(False, range(i, i + 1)),
                both(part(True, range(1, a)), part(False, range(1, i))),
            )
            for i in range(max(a + lag, c), d + 1)
        )  # fmt: skip
