"""Plasticity and empowerment of small learners, exactly and by Monte Carlo.

A Q-learner in a bandit with two arms, ε-greedy, plays five times; O_1:3 -> A_2:5 are the windows of the paper's
experiment. Systems whose bits are known in closed form, and pairs that are drawn, under the bound of theorem 4.8.

Paper: Abel et al. 2025, Plasticity as the Mirror of Empowerment, arXiv:2505.10361, section 5 and appendix E. Not told
in what could be read, and chosen here: arms that pay with probability 0.2 and 0.8, a rate of 0.1, ties broken evenly,
exploration among both arms, ε = 0.1 where initial values vary, actions first; for empowerment the same windows.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from pliant.measure.flow import Order
from pliant.measure.information import Law, Tension, joint_law, plasticity, tension
from pliant.measure.lifetimes import Lifetimes, estimate
from pliant.recipes.plasticity_page import page
from pliant.recipes.reproduce import Claim, Reproduction, Result, Scale, Trial, Verdict

N, RATE, PAYS = 5, 0.1, (0.2, 0.8)
WINDOWS: dict[str, Any] = {"act_window": (2, 5), "obs_window": (1, 3)}
EPSILONS = (0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0)
FIRSTS = tuple(round(-1 + 0.25 * k, 2) for k in range(9))
LIVES: dict[Scale, int] = {"minute": 20_000, "ten": 100_000, "hour": 500_000, "paper": 500_000}
SEEDS: dict[Scale, int] = {"minute": 2, "ten": 10, "hour": 20, "paper": 20}
PAIRS = 400
LIFE_SECONDS = 4e-5
"""For each life of a sweep."""

Symbols = tuple[int, ...]
Player = Callable[[Symbols, Symbols], Sequence[float]]


def fair(actions: Symbols, observations: Symbols) -> list[float]:
    """A coin."""
    return [0.5, 0.5]


def sure(symbol: int) -> list[float]:
    """One of two, for certain."""
    return [1.0 - symbol, float(symbol)]


def flip(symbol: int, p: float) -> list[float]:
    """The symbol, or with probability p the other one of two."""
    return [p, 1 - p] if symbol else [1 - p, p]


def bandit(*pays: float) -> Player:
    """Arms that pay 1 with these probabilities, else 0."""
    return lambda actions, observations: [1 - pays[actions[-1]], pays[actions[-1]]]


def win_stay(actions: Symbols, observations: Symbols) -> list[float]:
    """Win-stay, lose-shift; the first pull is a coin's."""
    return flip(actions[-1], 1.0 - observations[-1]) if actions else [0.5, 0.5]


def q_learner(epsilon: float, first: float = 0.0) -> Player:
    """Tabular Q-learning of two arms, as a function of its history."""

    def agent(actions: Symbols, observations: Symbols) -> list[float]:
        q = [first, first]
        for a, o in zip(actions, observations, strict=True):
            q[a] += RATE * (o - q[a])
        best = 0.5 if q[0] == q[1] else float(q[1] > q[0])
        one = epsilon / 2 + (1 - epsilon) * best
        return [1 - one, one]

    return agent


def played(epsilon: float, first: float, lives: int, seed: int) -> Lifetimes:
    """The same learner, playing."""
    draws = np.random.default_rng(seed)
    q = np.full((lives, 2), first)
    actions, observations = np.zeros((lives, N), np.int64), np.zeros((lives, N), np.int64)
    every = np.arange(lives)
    for t in range(N):
        even = draws.integers(0, 2, lives)
        blind = (q[:, 0] == q[:, 1]) | (draws.random(lives) < epsilon)
        a = np.where(blind, even, q[:, 1] > q[:, 0])
        o = draws.random(lives) < np.array(PAYS)[a]
        q[every, a] += RATE * (o - q[every, a])
        actions[:, t], observations[:, t] = a, o
    return Lifetimes(actions, observations, "AO", (2, 2))


def bits(p: float) -> float:
    """h(p), the entropy of a coin."""
    return 0.0 if p in (0, 1) else -p * math.log2(p) - (1 - p) * math.log2(1 - p)


def _paid(n: int, q: float) -> float:
    """H(O_1..O_n) of win-stay with arms that pay q and 1 - q: they are as if drawn from a mixture of two coins."""
    mixed = [0.5 * (q**k * (1 - q) ** (n - k) + q ** (n - k) * (1 - q) ** k) for k in range(n + 1)]
    return -sum(math.comb(n, k) * m * math.log2(m) for k, m in enumerate(mixed))


class Example(NamedTuple):
    """A pair whose bits are known.

    Attributes:
        agent, environment, n, order: of the law.
        empowerment, plasticity: over all indices.
        naive: the same two in mode "literal", where known.
    """

    agent: Player
    environment: Player
    n: int
    order: Order
    empowerment: float
    plasticity: float
    naive: tuple[float | None, float | None] = (None, None)


_LATE, _NOISY = 5 - 1, 5 * (1 - bits(0.1))
EXAMPLES: dict[str, Example] = {
    "echo": Example(lambda a, o: sure(o[-1]), fair, 5, "OA", 0, 5, (5, 5)),
    "echo, one index late": Example(lambda a, o: sure(o[-1] if o else 0), fair, 5, "AO", 0, _LATE, (0, None)),
    "environment that is deaf": Example(fair, lambda a, o: [0.3, 0.7], 5, "AO", 0, 0, (0, 0)),
    "noisy echo": Example(lambda a, o: flip(o[-1], 0.1), fair, 5, "OA", 0, _NOISY, (None, _NOISY)),
    "copy, two indices late": Example(lambda a, o: sure(o[-3] if len(o) > 2 else 0), fair, 5, "OA", 0, 3, (None, 3)),
    "actuator": Example(fair, lambda a, o: flip(a[-1], 0.1), 5, "AO", _NOISY, 0, (_NOISY, _NOISY)),
    "loop": Example(lambda a, o: flip(o[-1], 0.1) if a else [0.5, 0.5], lambda a, o: flip(a[-1], 0.1), 5, "AO",
                    1 - bits(0.1) + 4 * (bits(0.18) - bits(0.1)), 4 * (bits(0.18) - bits(0.1))),
    "win-stay, arms alike": Example(win_stay, bandit(0.8, 0.8), 5, "AO", 0, 4 * bits(0.8), (0, None)),
    "win-stay, arms differ": Example(win_stay, bandit(0.8, 0.2), 5, "AO", _paid(5, 0.8) - 5 * bits(0.8),
                                     4 * bits(0.8)),
    "win-stay, sure arms": Example(win_stay, bandit(1.0, 0.0), 5, "AO", 1, 0, (1, None)),
    "common cause": Example(lambda a, o: sure(a[0]) if a else [0.5, 0.5], lambda a, o: sure(a[0]), 3, "AO", 1, 0,
                            (1, 1)),
    "exclusive or": Example(fair, lambda a, o: sure(a[-1] ^ (a[-2] if len(a) > 1 else 0)), 4, "AO", 4, 0, (4, None)),
}  # fmt: skip
"""The eleven of the notes, the first of them also one index late."""


def trials(scale: Scale) -> list[Trial]:
    """Closed forms and pairs once, each sweep with several seeds."""
    sweeps = [Trial(name, {"lives": LIVES[scale]}, seed)
              for name in ("exploration", "initial values") for seed in range(SEEDS[scale])]  # fmt: skip
    return [Trial("closed forms", {}, 0), Trial("pairs", {"pairs": PAIRS}, 0), *sweeps]


def run(trial: Trial, progress: Callable[[float, str], None]) -> Result:
    """Exact values, and those of lives that were played."""
    if trial.name == "closed forms":
        return {name: [*tension(_law(one)), one.empowerment, one.plasticity] for name, one in EXAMPLES.items()}
    if trial.name == "pairs":
        return {"points": [list(_drawn(seed)) for seed in range(trial.settings["pairs"])]}
    along = EPSILONS if trial.name == "exploration" else FIRSTS
    rows = []
    for index, value in enumerate(along):
        epsilon, first = (value, 0.0) if trial.name == "exploration" else (0.1, value)
        law = joint_law(q_learner(epsilon, first), bandit(*PAYS), N)
        lives = played(epsilon, first, trial.settings["lives"], 1000 * trial.seed + index)
        found = estimate(lives, **WINDOWS, permutations=0)
        rows.append({
            "at": value, "empowerment": tension(law, **WINDOWS).empowerment,
            "plasticity": tension(law, **WINDOWS).plasticity, "literal": plasticity(law, **WINDOWS, mode="literal"),
            "bound": found.bound, "enough": found.enough,
            "estimates": {which: list(getattr(found, which)[:3]) for which in ("empowerment", "plasticity")},
        })  # fmt: skip
        progress((index + 1) / len(along), "")
    return {"rows": rows}


def _law(one: Example) -> Law:
    return joint_law(one.agent, one.environment, one.n, one.order)


def _drawn(seed: int) -> Tension:
    """A pair whose streams of three indices have probabilities that are drawn, the later ones nearly sure."""
    random = np.random.default_rng(seed)
    order: Order = ("AO", "OA")[seed % 2]  # type: ignore[assignment]
    law = random.dirichlet(np.full(64, (1.0, 0.1, 0.03, 0.01)[seed % 4])).reshape((2,) * 6)
    return tension(Law(law, order))


Runs = Sequence[tuple[Trial, Result]]


def judge(results: Runs) -> list[Claim]:
    """Figure 4 of the paper, its theorem 4.8, and closed forms."""
    by: dict[str, Runs] = {
        name: [(trial, result) for trial, result in results if trial.name == name]
        for name in ("closed forms", "pairs", "exploration", "initial values")
    }
    return [_exploration(by["exploration"]), _initial(by["initial values"]), _bound(by), _closed(by["closed forms"]),
            _covered([*by["exploration"], *by["initial values"]])]  # fmt: skip


def _exact(runs: Runs, name: str) -> dict[float, float]:
    return {row["at"]: row[name] for row in runs[0][1]["rows"]}


def _spread(runs: Runs, which: str) -> str:
    """How far the estimates of seeds are from each other at most."""
    table = np.array([[row["estimates"][which][0] for row in result["rows"]] for _, result in runs])
    deviation = table.std(0, ddof=1).max() if len(table) > 1 else math.nan
    return f"estimates from {runs[0][0].settings['lives']:,} lives deviate by {deviation:.4f} at most"


def _exploration(runs: Runs) -> Claim:
    found = _exact(runs, "plasticity")
    values = list(found.values())
    falls = all(a > b for a, b in pairwise(values)) and abs(values[-1]) < 1e-9
    verdict: Verdict = "direction only" if falls else "not reproduced"
    naive = _exact(runs, "literal")[1.0]
    return Claim(
        "plasticity of a Q-learner in a bandit falls with exploration, and is none at ε = 1",
        "falls to 0; values not known", "secondary",
        ", ".join(f"{value:.4f} at ε = {at:g}" for at, value in found.items())
        + f"; both directions taken literally it would be {naive:.4f} at ε = 1",
        _spread(runs, "plasticity"), len(runs), verdict,
    )  # fmt: skip


def _initial(runs: Runs) -> Claim:
    e, p = _exact(runs, "empowerment"), _exact(runs, "plasticity")
    rises = all(e[a] <= e[b] + 1e-12 for a, b in pairwise(FIRSTS))
    above = all(e[at] > p[at] for at in FIRSTS if at > 0)
    verdict: Verdict = "direction only" if rises and above else "not reproduced"
    return Claim(
        "empowerment rises with optimistic initial values, and is above plasticity there",
        "rises, generally above; values, arms, rate and windows not known", "secondary",
        "; ".join(f"{at:g}: E {e[at]:.3f}, P {p[at]:.3f}" for at in (-1.0, -0.5, 0.0, 0.5, 1.0))
        + f". Optimism makes the learner try both arms and go by what they pay: P rises to {max(p.values()):.3f}",
        _spread(runs, "empowerment"), len(runs), verdict,
    )  # fmt: skip


def _bound(by: dict[str, Runs]) -> Claim:
    points = [Tension(*point) for point in by["pairs"][0][1]["points"]]
    rows = [row for name in ("exploration", "initial values") for row in by[name][0][1]["rows"]]
    points += [Tension(row["empowerment"], row["plasticity"], row["bound"]) for row in rows]
    closed = {name: Tension(*row[:3]) for name, row in by["closed forms"][0][1].items() if name != "seconds"}
    attained = [name for name, point in closed.items() if abs(point.room) < 1e-9]
    points += closed.values()
    broken = sum(point.room < -1e-9 for point in points)
    verdict: Verdict = "direction only" if not broken and attained else "not reproduced"
    return Claim(
        "empowerment and plasticity over the same windows do not exceed their bound together (theorem 4.8)",
        "never; the bound is tight", "secondary",
        f"{broken} of {len(points)} pairs exceed it; on it are {', '.join(attained)}",
        "exact", 1, verdict,
    )  # fmt: skip


def _closed(runs: Runs) -> Claim:
    (_, result), *_ = runs
    rows = {name: row for name, row in result.items() if name != "seconds"}
    worst = max(abs(row[k] - row[k + 3]) for row in rows.values() for k in (0, 1))
    verdict: Verdict = "direction only" if worst < 1e-9 else "not reproduced"
    return Claim(
        f"systems with a closed form: {'; '.join(rows)}",
        "formulas derived here", "inferred",
        f"{len(rows)} systems, wrong by {worst:.1e} bits at most; a learner with sure arms has no plasticity, since in "
        f"a deterministic world there is nothing to see that was not settled; with arms that pay 0.8 it has "
        f"{rows['win-stay, arms alike'][1]:.4f} bits",
        "exact", 1, verdict,
    )  # fmt: skip


def _covered(runs: Runs) -> Claim:
    held, asked = 0, 0
    for _, result in runs:
        for row in result["rows"]:
            for which in ("empowerment", "plasticity"):
                _, low, high = row["estimates"][which]
                asked += row["enough"]
                held += row["enough"] and low - 1e-9 <= row[which] <= high + 1e-9
    share = held / max(1, asked)
    verdict: Verdict = "direction only" if share >= 0.9 else "not reproduced"
    return Claim(
        "Monte Carlo finds the exact values: 95 % intervals hold them, where there are enough lives",
        "means with confidence intervals", "secondary",
        f"{share:.1%} of {asked} intervals", f"{len(runs)} sweeps", len(runs), verdict,
    )  # fmt: skip


PLASTICITY = Reproduction(
    "plasticity and empowerment, in bits",
    "Abel et al. 2025, Plasticity as the Mirror of Empowerment, arXiv:2505.10361",
    trials, run, judge,
    lambda trial: LIFE_SECONDS * trial.settings["lives"] if "lives" in trial.settings else 1.0,
    page=page,
)  # fmt: skip
