"""Speed of exact plasticity and empowerment, beside evaluation of every window by its definition; and of context trees.

python benchmarks/information.py --ledger

One core, processor time, medians over rounds. Memory is the most that a process of its own had resident, less what it
had before the law was there. The literal form takes the law as an array, too, and each term of each window as four
entropies of marginals of it, in NumPy; it keeps nothing between windows.
"""

import argparse
import json
import math
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
from _ledger import append

from pliant.measure.context_tree import rates
from pliant.measure.information import Law, directed_information, flow_matrix, joint_law

COMMAND = "python benchmarks/information.py --ledger"
N, LITERAL = 10, (4, 6, 8)
SAMPLES, DEPTH = 1_000_000, 5


def agent(actions: tuple[int, ...], observations: tuple[int, ...]) -> list[float]:
    """A Q-learner that explores a fifth of the time, from its history each time."""
    q = [0.0, 0.0]
    for a, o in zip(actions, observations, strict=True):
        q[a] += 0.1 * (o - q[a])
    best = 0.5 if q[0] == q[1] else float(q[1] > q[0])
    one = 0.1 + 0.8 * best
    return [1 - one, one]


def arms(actions: tuple[int, ...], observations: tuple[int, ...]) -> list[float]:
    return [0.8, 0.2] if actions[-1] == 0 else [0.2, 0.8]


def given(n: int, seed: int = 0) -> Law:
    """Any probabilities are a law."""
    p = np.random.default_rng(seed).random((2,) * (2 * n))
    return Law(p / p.sum())


def windows(n: int) -> Iterator[tuple[int, int, int, int]]:
    pairs = list(combinations_with_replacement(range(1, n + 1), 2))
    return ((a, b, c, d) for a, b in pairs for c, d in pairs)


def ours(law: Law) -> list[float]:
    law = Law(law.probabilities, law.order)  # nothing kept from before
    return [directed_information(law, ("A", (a, b)), ("O", (c, d))) for a, b, c, d in windows(law.n)]


def literal(law: Law) -> list[float]:
    """Σ_i I(A_a:min(b, i) ; O_i | A_<a, O_<i)."""
    p, n = law.probabilities, law.n

    def entropy(actions: int, observations: int) -> float:
        """Of the first so many of each."""
        away = [2 * t for t in range(actions, n)] + [2 * t + 1 for t in range(observations, n)]
        q = p.sum(tuple(away)).reshape(-1)
        q = q[q > 0]
        return -float((q * np.log2(q)).sum())

    def term(a: int, b: int, i: int) -> float:
        last = min(b, i)
        return entropy(last, i - 1) + entropy(a - 1, i) - entropy(last, i) - entropy(a - 1, i - 1)

    return [math.fsum(term(a, b, i) for i in range(max(a, c), d + 1)) for a, b, c, d in windows(n)]


def seconds(function: Callable[[], Any]) -> float:
    began = time.process_time()
    function()
    return time.process_time() - began


def resident() -> float:
    """The most megabytes so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(part: str) -> dict[str, float]:
    done = subprocess.run([sys.executable, __file__, "--part", part], capture_output=True, text=True, check=True)
    return dict(json.loads(done.stdout))


def part_flow() -> dict[str, float]:
    flow_matrix(given(3))  # what is loaded only once
    before = resident()
    law = given(N)
    with_law = resident()
    spent = seconds(lambda: flow_matrix(law))
    return {"seconds": spent, "megabytes": resident() - before, "of these the law and what made it": with_law - before}


def part_law() -> dict[str, float]:
    joint_law(agent, arms, 2)
    before = resident()
    return {"seconds": seconds(lambda: joint_law(agent, arms, N)), "megabytes": resident() - before}


def several(part: str, rounds: int) -> dict[str, float]:
    found = [in_a_process(part) for _ in range(rounds)]
    return {name: statistics.median(one[name] for one in found) for name in found[0]}


def beside_literal(n: int, rounds: int) -> dict[str, float]:
    law = given(n)
    error = max(abs(a - b) for a, b in zip(ours(law), literal(law), strict=True))
    assert error < 1e-11, f"differs by {error}"
    pairs = [(seconds(lambda: ours(law)), seconds(lambda: literal(law))) for _ in range(rounds)]
    mine, theirs = (statistics.median(values) for values in zip(*pairs, strict=True))
    return {"windows": float(len(list(windows(n)))), "ours ms": 1000 * mine, "literal ms": 1000 * theirs,
            "times": statistics.median(b / a for a, b in pairs)}  # fmt: skip


def trees(rounds: int) -> dict[str, float]:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, SAMPLES)
    y = np.roll(x, 1) ^ (rng.random(SAMPLES) < 0.1)
    rates(x[:100], y[:100], depth=DEPTH)  # compiles
    spent = [seconds(lambda: rates(x, y, depth=DEPTH)) for _ in range(rounds)]
    found = rates(x, y, depth=DEPTH)
    return {"seconds": statistics.median(spent), "bits there, truth 0.5310": found.empowerment,
            "bits back, truth 0": found.plasticity}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ledger", action="store_true")
    parser.add_argument("--part", choices=["flow", "law"])
    options = parser.parse_args()
    if options.part:
        print(json.dumps(part_flow() if options.part == "flow" else part_law()))
        return
    flow, law, tree = several("flow", options.rounds), several("law", 3), trees(options.rounds)
    by_n = {n: beside_literal(n, 3) for n in LITERAL}
    lines: list[tuple[str, dict[str, Any], bool]] = [
        (f"flow matrix of a given law, n={N}, two symbols each: under 1 s and 500 MB on one core", flow,
         flow["seconds"] < 1 and flow["megabytes"] < 500),
        (f"law of n={N} from plain Python functions, two symbols each: under 15 s", law, law["seconds"] < 15),
        (f"all windows of n={max(by_n)} from the flow matrix at least 50 times as fast as each by its definition",
         {f"n={n}, {name}": value for n, row in by_n.items() for name, value in row.items()},
         by_n[max(by_n)]["times"] >= 50),
        (f"a million samples through context trees of depth {DEPTH}: under 10 s", tree, tree["seconds"] < 10),
    ]  # fmt: skip
    for claim, figures, holds in lines:
        print(claim, "holds" if holds else "DOES NOT HOLD", figures)
        if options.ledger:
            append(claim, COMMAND, figures, holds=holds)


if __name__ == "__main__":
    main()
