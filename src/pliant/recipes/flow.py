"""Plasticity and empowerment of a log of turns: many lives are compared, one long life is read by context trees."""

from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from pliant.core import UsageError
from pliant.measure.context_tree import ESTIMATORS, ContextTrees
from pliant.measure.flow import Mode, Window
from pliant.measure.lifetimes import Correction, Estimate, Estimates, Lifetimes, estimate
from pliant.report.flow import Curve, picture
from pliant.streams.turns import Turns

BLOCKS = 30
"""Parts of one life that are drawn."""


class Measured(NamedTuple):
    """What a log says.

    Attributes:
        found: plain values, for JSON.
        lines: in words.
        curve, matrix: what there is to draw.
    """

    found: dict[str, Any]
    lines: list[str]
    curve: Curve
    matrix: np.ndarray | None = None

    def svg(self) -> str:
        """A picture, which takes a second."""
        if self.matrix is None:
            return picture(self.curve, unit="bits per index")
        return picture(self.curve, matrix=self.matrix, order=self.found["order"])


def of_lives(
    turns: Turns, *, indices: int | None = None, act_window: Window | None = None, obs_window: Window | None = None,
    mode: Mode = "causal", correction: Correction = "jackknife", bootstrap: int = 0, permutations: int = 100,
    seed: int = 0,
) -> Measured:  # fmt: skip
    """Estimates from many lives, see `pliant.measure.lifetimes.estimate`.

    Raises:
        UsageError: as there; lives of different lengths.
    """
    lives = Lifetimes(*turns.arrays(indices), turns.order, turns.sizes)
    settings: dict[str, Any] = {"mode": mode, "correction": correction, "seed": seed}
    windows: dict[str, Any] = {"act_window": act_window or (1, lives.n), "obs_window": obs_window or (1, lives.n)}
    whole = estimate(lives, **windows, **settings, bootstrap=bootstrap, permutations=permutations)
    flow = lives.flow(correction)
    growing = [estimate(lives, act_window=(1, k), obs_window=(1, k), **settings, permutations=0)
               for k in range(1, lives.n + 1)]  # fmt: skip
    e, p = (
        np.array([[getattr(one, which)[part] for one in growing] for part in range(3)])
        for which in ("empowerment", "plasticity")
    )
    curve = Curve("indices from the first", np.arange(1, lives.n + 1), e, p, growing[-1].bound)
    found = {
        "order": lives.order, "alphabet": _alphabet(turns), "lives": len(lives), "indices": lives.n, **windows,
        "mode": mode, "correction": correction, "empowerment": whole.empowerment._asdict(),
        "plasticity": whole.plasticity._asdict(), "bound": whole.bound, "prefixes": whole.prefixes,
        "enough": whole.enough, "needed": whole.needed, "verdict": whole.verdict, "flow": flow.matrix.tolist(),
        "growing": {which: [getattr(one, which).bits for one in growing] for which in ("empowerment", "plasticity")},
    }  # fmt: skip
    return Measured(found, _said(lives, whole, windows), curve, flow.matrix)


def _said(lives: Lifetimes, whole: Estimates, windows: dict[str, Window]) -> list[str]:
    (a, b), (c, d) = windows["act_window"], windows["obs_window"]
    parts = {"plasticity": f"O {c}:{d} -> A {a}:{b}", "empowerment": f"A {a}:{b} -> O {c}:{d}"}
    return [
        f"{len(lives):,} lives of {lives.n} indices, {lives.alphabets[0]} actions, {lives.alphabets[1]} observations, "
        f"{'an action' if lives.order == 'AO' else 'an observation'} first",
        *(f"{which:<12}{windows_:<20}{_range(getattr(whole, which))}" for which, windows_ in parts.items()),
        f"{'bound':<12}{'of their sum':<20}{whole.bound:.3f}",
        whole.verdict,
    ]


def _range(one: Estimate) -> str:
    chance = f", by chance {one.null:.3f} without correction, p = {one.p:.2g}" if np.isfinite(one.p) else ""
    return f"{one.bits:.3f} bits ({one.low:.3f} to {one.high:.3f}{chance})"


def of_one_life(turns: Turns, *, indices: int | None = None, depth: int = 5) -> Measured:
    """Rates of one long life, see `pliant.measure.context_tree`.

    Raises:
        UsageError: more than one life, or one that is not longer than the depth.
    """
    if len(turns.lives) != 1:
        raise UsageError(f"of_one_life: the log has {len(turns.lives)} lives")
    actions, observations = (rows[0] for rows in turns.arrays(indices))
    if len(actions) <= depth + 1:
        raise UsageError(f"one life of {len(actions)} indices says nothing of its rates; record a longer one, or many")
    trees = ContextTrees(turns.sizes, depth=depth, order=turns.order)
    terms = trees.update(actions, observations)[:, ESTIMATORS.index("E3")]
    edges = np.unique(np.linspace(0, terms.shape[1], BLOCKS + 1).astype(int))
    blocks = np.stack([terms[:, i:j].mean(1) for i, j in pairwise(edges)], 1)
    bound = float(np.log2(min(turns.sizes)))
    by_name = {name: trees.rates(name) for name in ESTIMATORS}
    found = {
        "order": turns.order, "alphabet": _alphabet(turns), "lives": 1, "indices": len(actions), "depth": depth,
        "rates": {name: {"empowerment": one.empowerment, "plasticity": one.plasticity}
                  for name, one in by_name.items()},
        "bound": bound, "over time": {"index": (edges[1:] + depth).tolist(), "empowerment": blocks[0].tolist(),
                                      "plasticity": blocks[1].tolist()},
    }  # fmt: skip
    first = "an action" if turns.order == "AO" else "an observation"
    lines = [
        f"one life of {len(actions):,} indices, {turns.sizes[0]} actions, {turns.sizes[1]} observations, {first} first",
        *(f"{which:<12}{getattr(by_name['E3'], which):.4f} bits per index by E3, "
          f"{getattr(by_name['E1'], which):.4f} by E1" for which in ("plasticity", "empowerment")),
        f"{'bound':<12}{bound:.4f} of their sum",
        f"by context trees of depth {depth}, which hold if the pair is stationary and remembers no more",
    ]  # fmt: skip
    curve = Curve("index", (edges[1:] + depth).astype(np.float64), blocks[0], blocks[1], bound)
    return Measured(found, lines, curve)


def _alphabet(turns: Turns) -> dict[str, int]:
    return dict(zip(("actions", "observations"), turns.sizes, strict=True))
