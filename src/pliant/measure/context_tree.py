"""Rates of flow from one long life, by universal predictors: context-tree weighting on pairs, actions, observations.

Three trees predict the next pair, the next action and the next observation from the last D of their kind; each mixes
all trees of depth up to D (Willems, Shtarkov & Tjalkens 1995), with the predictor of Krichevsky & Trofimov in each
node, (count + 1/2) / (all + K/2). The bits by which the tree on pairs foresees a turn better than the tree on its kind
alone are an estimate of directed information per index, for a stationary pair. With x the turn that comes first:

    E1  log Q(y | x, past) - log Q(y | y's past)                     what was foreseen of what came
    E2  H[Q(y | y's past)] - H[Q(x, y | past)] + H[Q(x | past)]      of what might come
    E3  Σ_y Q(y | x, past) log [Q(y | x, past) / Q(y | y's past)]    the mean of E1 over y; never negative
    E4  the mean of E3 over x; never negative

and back, from y to the x that follows, with Q(x | past) and Q(x | x's past) in the place of the two.

Paper: Jiao, Permuter, Zhao, Kim & Weissman 2013, Universal Estimation of Directed Information, arXiv:1201.2334.
Cost: three paths of D + 1 nodes for each index, whatever its number; memory grows with the contexts that occur.
"""

import inspect
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numba
import numpy as np
from jaxtyping import Float, Int

from pliant.core import UsageError
from pliant.measure.flow import Order, not_negative, order_of
from pliant.measure.lifetimes import check_symbols

Estimator = Literal["E1", "E2", "E3", "E4"]
ESTIMATORS: tuple[Estimator, ...] = ("E1", "E2", "E3", "E4")
CHUNK = 1 << 14
"""Indices that are looked at before there is memory for the next."""


def _jit(function: Callable[..., Any]) -> Callable[..., Any]:
    function = inspect.unwrap(function)  # the type checks of the tests wrap every function, numba wants it bare
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy")(function)
    except RuntimeError:  # numba: no place for its cache
        return numba.njit(nogil=True, error_model="numpy")(function)


class Rates(NamedTuple):
    """Bits per index, in the direction of time.

    Attributes:
        empowerment: from actions to observations.
        plasticity: from observations to actions.
        indices: how many they are a mean over.
    """

    empowerment: float
    plasticity: float
    indices: int

    @property
    def information(self) -> float:
        """Both together: the rate of mutual information."""
        return self.empowerment + self.plasticity


class ContextTrees:
    """Reads a life in pieces of any length, and has the rates so far at any time.

    Args:
        sizes: |A| and |O|.
        depth: D, turns of each kind that are remembered; the first D indices are only remembered.
        order: which turn comes first within an index.
        memory: bytes that the trees may take.

    Raises:
        UsageError: alphabets of one symbol, a depth below 1, trees of one node for each context that would not fit.
    """

    def __init__(self, sizes: tuple[int, int], *, depth: int = 5, order: Order = "AO", memory: float = 2e9):
        order_of(order)
        for name, size in zip(("actions", "observations"), sizes, strict=True):
            check_symbols("ContextTrees", name, np.zeros(0, np.int64), size)
        if depth < 1:
            raise UsageError(f"ContextTrees: depth is {depth}, expected at least 1")
        self.sizes, self.depth, self.order, self.memory = sizes, depth, order, memory
        first, second = sizes if order == "AO" else sizes[::-1]
        self.trees = [_Tree(size, depth) for size in (first * second, first, second)]
        self.past = np.zeros((2, 0), np.int64)
        self.sums = np.zeros((2, len(ESTIMATORS)))
        self.indices = 0

    def update(self, actions: Int[np.ndarray, "T"], observations: Int[np.ndarray, "T"]) -> Float[np.ndarray, "2 4 T1"]:
        """Read on. Gives the terms of the indices that were read, in bits: empowerment and plasticity, E1 to E4.

        Raises:
            UsageError: not equally many of both, symbols outside of the alphabets, or trees that would not fit.
        """
        if actions.shape != observations.shape:
            raise UsageError(f"ContextTrees: {len(actions)} actions and {len(observations)} observations, expected as "
                             "many of both")  # fmt: skip
        for name, symbols, size in zip(("actions", "observations"), (actions, observations), self.sizes, strict=True):
            check_symbols("ContextTrees", name, symbols, size)
        pair = [actions, observations] if self.order == "AO" else [observations, actions]
        terms = [self._read(np.stack(pair)[:, i : i + CHUNK].astype(np.int64)) for i in range(0, len(actions), CHUNK)]
        return np.concatenate(terms, 2) if terms else np.zeros((2, len(ESTIMATORS), 0))

    def rates(self, estimator: Estimator = "E3") -> Rates:
        """The means so far; NaN before the first index that has a whole past.

        Raises:
            UsageError: the estimator is not known.
        """
        if estimator not in ESTIMATORS:
            raise UsageError(f"estimator is {estimator!r}, expected one of {', '.join(ESTIMATORS)}")
        with np.errstate(invalid="ignore"):
            mean = self.sums[:, ESTIMATORS.index(estimator)] / self.indices
        return Rates(float(mean[0]), float(mean[1]), self.indices)

    def _read(self, new: np.ndarray) -> np.ndarray:
        whole = np.concatenate([self.past, new], 1)
        self.past = whole[:, -self.depth :].copy()
        steps = max(0, whole.shape[1] - self.depth)
        kept = sum(tree.nodes_with(steps) * tree.node_bytes for tree in self.trees)
        if kept > self.memory:
            raise UsageError(f"ContextTrees: with alphabets of {self.sizes[0]} and {self.sizes[1]} symbols and depth "
                             f"{self.depth} the trees may take {kept / 1e9:.1f} GB; take a smaller depth or coarser "
                             "symbols")  # fmt: skip
        for tree in self.trees:
            tree.make_room(steps)
        terms = np.empty((2, len(ESTIMATORS), steps))
        second = self.trees[2].size
        symbols = (whole[0] * second + whole[1], whole[0], whole[1])
        used = _walk(*symbols, *(part for tree in self.trees for part in tree.parts), self.depth, terms,
                     np.array([tree.used for tree in self.trees]))  # fmt: skip
        for tree, count in zip(self.trees, used, strict=True):
            tree.used = int(count)
        terms[:, 2:] = not_negative(terms[:, 2:])  # divergences
        if self.order == "OA":
            terms = terms[::-1]
        self.sums += terms.sum(2)
        self.indices += steps
        return terms


class _Tree:
    """Nodes of contexts that have occurred; node 0 is the empty one."""

    def __init__(self, size: int, depth: int):
        self.size, self.depth, self.used = size, depth, 1
        self.most = 1 + sum(size**d for d in range(1, depth + 1))
        self.counts = np.zeros((1, size), np.int64)
        self.children = np.zeros((1, size), np.int64)  # 0: there is none yet
        self.log_beta = np.zeros(1)

    @property
    def parts(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return self.counts, self.children, self.log_beta

    @property
    def node_bytes(self) -> int:
        return 16 * self.size + 8

    def nodes_with(self, steps: int) -> int:
        """Nodes there may be after so many more steps."""
        return int(min(self.most, self.used + steps * self.depth))

    def make_room(self, steps: int) -> None:
        more = self.nodes_with(steps) - len(self.counts)
        if more > 0:
            self.counts = np.pad(self.counts, ((0, more), (0, 0)))
            self.children = np.pad(self.children, ((0, more), (0, 0)))
            self.log_beta = np.pad(self.log_beta, (0, more))


@_jit
def _foresee(
    symbols: np.ndarray, at: int, counts: np.ndarray, children: np.ndarray, log_beta: np.ndarray, used: int,
    path: np.ndarray, estimates: np.ndarray, mixed: np.ndarray,
) -> int:  # fmt: skip
    """Probabilities `mixed` `(D + 1, K)` of the next symbol, by the tree below each node of the path; the first counts.

    A node with β = P_KT / Π P_w(children) mixes its own estimate and that of the node below it as β to 1.
    """
    depth, size = len(path) - 1, counts.shape[1]
    node = 0
    for d in range(depth + 1):
        if d:
            symbol = symbols[at - d]
            below = children[node, symbol]
            if not below:
                below = used
                children[node, symbol] = below
                used += 1
            node = below
        path[d] = node
        total = 0
        for k in range(size):
            total += counts[node, k]
        for k in range(size):
            estimates[d, k] = (counts[node, k] + 0.5) / (total + 0.5 * size)
    for k in range(size):
        mixed[depth, k] = estimates[depth, k]
    for d in range(depth - 1, -1, -1):
        weight = 1.0 / (1.0 + np.exp(-log_beta[path[d]]))
        for k in range(size):
            mixed[d, k] = weight * estimates[d, k] + (1.0 - weight) * mixed[d + 1, k]
    return used


@_jit
def _learn(
    symbol: int, counts: np.ndarray, log_beta: np.ndarray, path: np.ndarray, estimates: np.ndarray, mixed: np.ndarray
) -> None:
    depth = len(path) - 1
    for d in range(depth + 1):
        if d < depth:
            change = np.log(estimates[d, symbol] / mixed[d + 1, symbol])
            # Beyond this the other has no weight in double precision, and could not get it back in time.
            log_beta[path[d]] = min(max(log_beta[path[d]] + change, -700.0), 700.0)
        counts[path[d], symbol] += 1


@_jit
def _bits(p: np.ndarray) -> float:
    total = 0.0
    for k in range(len(p)):
        total -= p[k] * np.log2(p[k])
    return total


@_jit
def _walk(
    both: np.ndarray, first: np.ndarray, second: np.ndarray,
    both_counts: np.ndarray, both_children: np.ndarray, both_beta: np.ndarray,
    first_counts: np.ndarray, first_children: np.ndarray, first_beta: np.ndarray,
    second_counts: np.ndarray, second_children: np.ndarray, second_beta: np.ndarray,
    depth: int, terms: np.ndarray, used: np.ndarray,
) -> np.ndarray:  # fmt: skip
    """Fill `terms` `(2, 4, T)`, there and back, for the indices after the first `depth`; the nodes used then."""
    n_first, n_second = first_counts.shape[1], second_counts.shape[1]
    paths = np.zeros((3, depth + 1), np.int64)
    q_both, mix_both = np.zeros((depth + 1, n_first * n_second)), np.zeros((depth + 1, n_first * n_second))
    q_first, mix_first = np.zeros((depth + 1, n_first)), np.zeros((depth + 1, n_first))
    q_second, mix_second = np.zeros((depth + 1, n_second)), np.zeros((depth + 1, n_second))
    given = np.zeros(n_first)  # Q(x | past) of the pairs
    for t in range(depth, len(both)):
        used[0] = _foresee(both, t, both_counts, both_children, both_beta, used[0], paths[0], q_both, mix_both)
        used[1] = _foresee(first, t, first_counts, first_children, first_beta, used[1], paths[1], q_first, mix_first)
        used[2] = _foresee(second, t, second_counts, second_children, second_beta, used[2], paths[2], q_second,
                           mix_second)  # fmt: skip
        pair, own, other = mix_both[0], mix_first[0], mix_second[0]
        x, y, at = first[t], second[t], t - depth
        for i in range(n_first):
            given[i] = 0.0
            for j in range(n_second):
                given[i] += pair[i * n_second + j]
        there3, there4, back3 = 0.0, 0.0, 0.0
        for i in range(n_first):
            divergence = 0.0
            for j in range(n_second):
                joint = pair[i * n_second + j]
                divergence += joint * np.log2(joint / (given[i] * other[j]))
            there4 += divergence
            if i == x:
                there3 = divergence / given[i]
            back3 += given[i] * np.log2(given[i] / own[i])
        terms[0, 0, at] = np.log2(pair[x * n_second + y] / (given[x] * other[y]))
        terms[0, 1, at] = _bits(other) - _bits(pair) + _bits(given)
        terms[0, 2, at] = there3
        terms[0, 3, at] = there4
        terms[1, 0, at] = np.log2(given[x] / own[x])
        terms[1, 1, at] = _bits(own) - _bits(given)
        terms[1, 2, at] = back3
        terms[1, 3, at] = back3
        _learn(both[t], both_counts, both_beta, paths[0], q_both, mix_both)
        _learn(x, first_counts, first_beta, paths[1], q_first, mix_first)
        _learn(y, second_counts, second_beta, paths[2], q_second, mix_second)
    return used


def rates(
    actions: Int[np.ndarray, "T"], observations: Int[np.ndarray, "T"], *, sizes: tuple[int, int] | None = None,
    depth: int = 5, order: Order = "AO", estimator: Estimator = "E3",
) -> Rates:  # fmt: skip
    """Bits per index of one long life, see `ContextTrees`; sizes are those of the symbols that occur if not given.

    Raises:
        UsageError: as `ContextTrees`, or a life that is not longer than the depth.
    """
    if len(actions) <= depth:
        raise UsageError(f"rates: a life of {len(actions)} indices, expected more than the depth, {depth}")
    if sizes is None:
        sizes = int(actions.max()) + 1, int(observations.max()) + 1
    trees = ContextTrees(sizes, depth=depth, order=order)
    trees.update(actions, observations)
    return trees.rates(estimator)
