"""Estimates of plasticity and empowerment against exact values: bias and coverage over lives, alphabets, windows.

python benchmarks/estimators.py --part lives    # resumes; docs/results/estimators.jsonl
python benchmarks/estimators.py --part trees
python benchmarks/estimators.py --part neural
python benchmarks/estimators.py --draw --ledger

Each place (a system, two windows, so many lives) has 400 trials, each with lives of its own. Lives are 3, 10, 30 and
100 times the kinds of them that can occur. The page and the figure are docs/estimators.md and docs/estimators.svg.
"""

import argparse
import json
import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from _ledger import DOCS, append

from pliant.measure.context_tree import ESTIMATORS, ContextTrees
from pliant.measure.information import Law, empowerment, joint_law, plasticity
from pliant.measure.lifetimes import estimate, sampled
from pliant.recipes.plasticity import EXAMPLES, bits, fair, flip

RESULTS = DOCS / "results" / "estimators.jsonl"
COMMAND = "python benchmarks/estimators.py --draw --ledger"
TRIALS, MORE, TIMES = 400, 1600, (3, 10, 30, 100)
"""Of a place, and of one where the verdict is "enough" in some trials and not in others."""
WHICH = ("empowerment", "plasticity")
FEW = 0.25
"""Share of trials with enough lives below which a place has no coverage to speak of: these are the lucky ones."""
DRAWN = ((2, 3, 3, "OA"), (3, 2, 3, "AO"), (2, 2, 4, "OA"), (2, 2, 3, "AO"), (3, 3, 2, "OA"), (2, 4, 2, "AO"))
"""Systems whose probabilities are drawn: |A|, |O|, indices, order."""
UNEVEN = ("coins of", "rare", "uneven")
"""How the names of systems begin in which some symbols or kinds of lives are rare."""
FRESH = "fresh"
"""Those that were first looked at when all was chosen."""
Line = dict[str, Any]


def drawn(sizes: tuple[int, int], n: int, order: Any, seed: int, even: float = 1.0) -> Law:
    """An agent and an environment whose probabilities are drawn; the less `even`, the surer they are."""
    rng = np.random.default_rng(seed)
    tables: dict[str, list[np.ndarray]] = {"A": [], "O": []}
    shape: list[int] = []
    for _ in range(n):
        for name in order:
            size = sizes["AO".index(name)]
            tables[name].append(rng.dirichlet(np.full(size, even), tuple(shape)).reshape(*shape, size))
            shape.append(size)
    return joint_law(tables["A"], tables["O"], n, order)


def systems() -> dict[str, Law]:
    loop = EXAMPLES["loop"]
    return {
        "loop, n=3": joint_law(loop.agent, loop.environment, 3),
        "loop, n=4": joint_law(loop.agent, loop.environment, 4),
        "fair coins, n=2": joint_law(fair, fair, 2),
        "fair coins, n=4": joint_law(fair, fair, 4),
        "noisy echo, n=4": joint_law(lambda a, o: flip(o[-1], 0.1), fair, 4, "OA"),
        "faint echo, n=3": joint_law(lambda a, o: flip(o[-1] if o else 0, 0.45), fair, 3),
        "2 actions, 3 observations, n=3": drawn((2, 3), 3, "AO", 1),
        "4 actions, 3 observations, n=2": drawn((4, 3), 2, "OA", 2),
        **{
            f"drawn, |A|={a}, |O|={o}, n={n}": drawn((a, o), n, order, 10 + i)
            for i, (a, o, n, order) in enumerate(DRAWN)
        },
        "coins of 0.02 and 0.1, n=2": joint_law(lambda a, o: flip(0, 0.02), lambda a, o: flip(0, 0.1), 2),
        "coins of 0.005, n=2": joint_law(lambda a, o: flip(0, 0.005), lambda a, o: flip(0, 0.005), 2),
        "rare action, n=2": joint_law(lambda a, o: flip(0, 0.005), lambda a, o: flip(a[-1], 0.1), 2),
        "uneven, n=3": drawn((2, 2), 3, "AO", 20, 0.2),
        "uneven, 3 and 2, n=2": drawn((3, 2), 2, "OA", 21, 0.2),
        "fresh, n=3": drawn((2, 2), 3, "OA", 30, 0.3),
        "fresh, 3 and 3, n=2": drawn((3, 3), 2, "AO", 31, 0.3),
        "fresh, 2 and 4, n=2": drawn((2, 4), 2, "OA", 32, 0.5),
        "fresh, even, n=3": drawn((2, 3), 3, "OA", 33),
        "fresh, rare echo, n=3": joint_law(lambda a, o: flip(o[-1], 0.05), lambda a, o: flip(0, 0.03), 3, "OA"),
    }


def windows(n: int) -> tuple[dict[str, tuple[int, int]], ...]:
    return ({"act_window": (1, n), "obs_window": (1, n)}, {"act_window": (2, n), "obs_window": (1, n - 1)})


def done() -> list[Line]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def keep(line: Line) -> None:
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


def places() -> Iterator[tuple[dict[str, Any], Law]]:
    for name, law in systems().items():
        for window in windows(law.n):
            for times in TIMES:
                lives = times * int((law.probabilities > 0).sum())
                yield {"part": "lives", "system": name, **{k: list(w) for k, w in window.items()}, "lives": lives}, law


def lives() -> None:
    known = [{k: line[k] for k in ("part", "system", "act_window", "obs_window", "lives")}
             for line in done() if line["part"] == "lives"]  # fmt: skip
    for key, law in places():
        if key in known:
            continue
        window: dict[str, Any] = {name: tuple(key[name]) for name in ("act_window", "obs_window")}
        truth = {"empowerment": empowerment(law, **window), "plasticity": plasticity(law, **window)}
        rows = _trials(law, key["lives"], window, truth, range(TRIALS))
        enough = [int(rows[which][:, 3].sum()) for which in WHICH]
        if any(FEW * TRIALS <= count < TRIALS for count in enough):
            more = _trials(law, key["lives"], window, truth, range(TRIALS, MORE))
            rows = {which: np.concatenate([rows[which], more[which]]) for which in WHICH}
        keep(key | {which: _summary(truth[which], rows[which]) for which in WHICH})
        print(key, flush=True)


def _trials(
    law: Law, lives: int, window: dict[str, Any], truth: dict[str, float], seeds: Iterable[int]
) -> dict[str, np.ndarray]:
    """Of each quantity `(trials, 5)`: plain, corrected, whether the interval holds the truth, enough, its width."""
    rows: dict[str, list[list[float]]] = {which: [] for which in WHICH}
    for seed in seeds:
        found = estimate(sampled(law, lives, seed), **window, permutations=0)
        for which in WHICH:
            one = getattr(found, which)
            held = one.low - 1e-9 <= truth[which] <= one.high + 1e-9
            rows[which].append([one.plain, one.bits, held, one.needed <= found.lives, one.high - one.low])
    return {which: np.array(own) for which, own in rows.items()}


def _summary(truth: float, rows: np.ndarray) -> Line:
    enough = rows[:, 3] > 0
    return {
        "truth": truth, "plain bias": rows[:, 0].mean() - truth, "bias": rows[:, 1].mean() - truth,
        "deviation": rows[:, 1].std(), "trials": len(rows), "width": rows[:, 4].mean(), "held": int(rows[:, 2].sum()),
        "enough": int(enough.sum()), "held of enough": int(rows[enough, 2].sum()),
        "deviation of enough": rows[enough, 1].std() if enough.any() else 0.0,
    }  # fmt: skip


def trees() -> None:
    for length in (4000, 30_000):
        found = {name: [] for name in ESTIMATORS}
        back = {name: [] for name in ESTIMATORS}
        for seed in range(10):
            rng = np.random.default_rng(seed)
            x = rng.integers(0, 2, length)
            y = np.roll(x, 1) ^ (rng.random(length) < 0.1)
            read = ContextTrees((2, 2), depth=3)
            read.update(x, y)
            for name in ESTIMATORS:
                found[name].append(read.rates(name).empowerment)
                back[name].append(read.rates(name).plasticity)
        keep({"part": "trees", "length": length, "truth": 1 - bits(0.1), "there": found, "back": back})


def neural() -> None:
    import torch

    from pliant.learn.directed import two_predictors

    torch.set_num_threads(1)
    one = EXAMPLES["loop"]
    law = joint_law(one.agent, one.environment, one.n, one.order)
    seen = {(line["which"], line["seed"]) for line in done() if line["part"] == "neural"}
    for seed in range(5):
        for which, source in (("empowerment", "A"), ("plasticity", "O")):
            if (which, seed) not in seen:
                found = two_predictors(sampled(law, 16_000, seed), source, seed=seed)
                keep({"part": "neural", "which": which, "seed": seed, "truth": getattr(one, which),
                      **found._asdict()})  # fmt: skip


def covered(lines: list[Line]) -> list[tuple[Line, str, Line]]:
    """Places with enough lives, and something to find out: where flow is certain, so is the interval."""
    every = [(line, which, line[which]) for line in lines for which in WHICH]
    return [(line, which, one) for line, which, one in every
            if one["enough"] >= FEW * one["trials"] and one["deviation of enough"] > 1e-9]  # fmt: skip


def draw(ledger: bool) -> None:
    by = {part: [line for line in done() if line["part"] == part] for part in ("lives", "trees", "neural")}
    good = covered(by["lives"])
    shares = np.array([one["held of enough"] / one["enough"] for _, _, one in good])
    pooled = sum(one["held of enough"] for *_, one in good) / sum(one["enough"] for *_, one in good)
    inside = int(((shares >= 0.92) & (shares <= 0.98)).sum())
    lucky = [line[which] for line in by["lives"] for which in WHICH
             if 0 < line[which]["enough"] < FEW * line[which]["trials"]]  # fmt: skip
    within = {name: [.92 <= share <= .98 for (line, _, _), share in zip(good, shares, strict=True)
                     if line["system"].startswith(name)] for name in (UNEVEN, FRESH)}  # fmt: skip
    text = [
        HEAD.format(
            uneven=sum(within[UNEVEN]),
            of_uneven=len(within[UNEVEN]),
            fresh=sum(within[FRESH]),
            of_fresh=len(within[FRESH]),
            pooled=pooled,
            lucky=sum(one["held of enough"] for one in lucky) / max(1, sum(one["enough"] for one in lucky)),
            inside=inside,
            places=len(shares),
            low=shares.min(),
            high=shares.max(),
        )
    ]
    text += [_table_of_lives(by["lives"]), TREES, _table_of_trees(by["trees"]), NEURAL, _table_neural(by["neural"])]
    (DOCS / "estimators.md").write_text("\n".join(text) + "\n")
    _figure(by["lives"])
    print(text[0])
    if ledger:
        _append(by, shares, pooled, inside)


def _append(by: dict[str, list[Line]], shares: np.ndarray, pooled: float, inside: int) -> None:
    append("where there are enough lives, 95 % intervals hold the exact value in 92 to 98 % of trials", COMMAND,
           {"places": len(shares), "within 92 to 98 %": inside, "all trials": pooled, "least": float(shares.min()),
            "most": float(shares.max())}, holds=inside == len(shares))  # fmt: skip
    error = {f"{name}, {line['length']} samples": float(np.mean(line["there"][name])) - line["truth"]
             for line in by["trees"] for name in ESTIMATORS}  # fmt: skip
    last = [abs(value) for name, value in error.items() if "30000" in name]
    append("context trees find the rate of a delayed channel within 0.015 bits with 30,000 samples", COMMAND, error,
           holds=max(last) < 0.015)  # fmt: skip
    worst = max(abs(line["bits"] - line["truth"]) for line in by["neural"])
    append("two recurrent predictors find the flow of the loop, n=5, within 0.05 bits from 16,000 lives", COMMAND,
           {"runs": len(by["neural"]), "largest error": worst}, holds=worst < 0.05)  # fmt: skip


HEAD = """# Estimates against exact values

Written by `python benchmarks/estimators.py --draw` from `docs/results/estimators.jsonl`. Systems whose law is known
live many times; each row is 400 trials, or 1,600 if only some have lives enough. *Plain* is what frequencies say,
*corrected* the jackknife, both as bias: mean less truth, in bits. *Enough* is the share of trials with the verdict
"enough lifetimes", *held* how many of these had the truth in their 95 % interval.

Where there were enough, intervals held the truth in {pooled:.1%} of all trials, and in {low:.1%} to {high:.1%} of those
of one row; {inside} of {places} rows lie within 92 to 98 %, where chance alone moves a row by 1.1 points. Rows in which
estimates with that verdict are all the same do not count, nor those with fewer than a quarter of such trials: these
are the lucky ones that saw nothing of what is rare, {lucky:.1%} of which held the truth. How wide intervals are, and
how many lives are enough, was chosen on these systems, with other lives, but for the five whose names begin with
*fresh*: {fresh} of their {of_fresh} rows lie within, and {uneven} of {of_uneven} of the five before them, in which some
symbols or kinds of lives are rare.

![Bias and coverage](estimators.svg)

## Many lives
"""
TREES = """
## One long life

A fair bit comes out one index later, flipped one time in ten: 1 - h(0.1) bits per index there, none back. Context trees
of depth 3, ten seeds, mean and deviation.
"""
NEURAL = """
## Two recurrent predictors

The loop of five indices, 16,000 lives, each foreseen before it is learned; code lengths in bits of the sink's turns.
"""


def _row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def _table(head: list[str], rows: list[str]) -> str:
    return "\n".join([_row(*head), _row(*["---"] * len(head)), *rows])


def _table_of_lives(lines: list[Line]) -> str:
    rows, names = [], list(systems())
    for line in sorted(lines, key=lambda line: (names.index(line["system"]), line["act_window"], line["lives"])):
        (a, b), (c, d) = line["act_window"], line["obs_window"]
        for which in WHICH:
            one = line[which]
            pair = f"A {a}:{b} -> O {c}:{d}" if which == "empowerment" else f"O {c}:{d} -> A {a}:{b}"
            held = f"{one['held of enough'] / one['enough']:.1%}" if one["enough"] else ""
            rows.append(_row(line["system"], pair, f"{line['lives']:,}", f"{one['truth']:.4f}",
                             f"{one['plain bias']:+.4f}", f"{one['bias']:+.4f}", f"{one['deviation']:.4f}",
                             f"{one['enough'] / one['trials']:.0%}", held))  # fmt: skip
    return _table(["system", "flow", "lives", "truth", "plain", "corrected", "deviation", "enough", "held"], rows)


def _spread(values: list[float], digits: int = 4) -> str:
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def _table_of_trees(lines: list[Line]) -> str:
    rows = [_row(f"{line['length']:,}", name, f"{line['truth']:.4f}", _spread(line["there"][name]),
                 _spread(line["back"][name])) for line in lines for name in ESTIMATORS]  # fmt: skip
    return _table(["samples", "form", "truth", "there", "back"], rows)


def _table_neural(lines: list[Line]) -> str:
    rows = []
    for which in WHICH:
        own = [line for line in lines if line["which"] == which]
        rows.append(_row(which, f"{own[0]['truth']:.4f}", *(_spread([line[name] for line in own])
                         for name in ("bits", "difference", "without", "informed")), len(own)))  # fmt: skip
    head = ["", "truth", "by divergence", "by difference", "not told the source", "told the source", "seeds"]
    return _table(head, rows)


def _figure(lines: list[Line]) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure

    from pliant.report.paint import plain
    from pliant.report.style import BLUE, ORANGE, STYLE

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(11, 3.8), layout="constrained")
        axes = figure.add_subplot(1, 2, 1)
        for key, color, name in (("plain bias", ORANGE, "plain"), ("bias", BLUE, "corrected")):
            points = [(line["lives"], abs(line[which][key])) for line in lines for which in WHICH
                      if line[which]["deviation"] > 1e-9]  # fmt: skip
            x, y = np.array(points).T
            axes.loglog(x, np.maximum(y, 1e-5), "o", color=color, markersize=4, alpha=0.7, label=name)
        axes.set_xlabel("lives")
        axes.set_ylabel("bias, bits (absolute)")
        axes.legend(frameon=False)
        axes = figure.add_subplot(1, 2, 2)
        axes.axhspan(0.92, 0.98, color="#f1f1ee", linewidth=0)
        axes.axhline(0.95, color="#888888", linewidth=1)
        for enough, color, name in ((False, "#bbbbbb", "not enough lives"), (True, BLUE, "enough lives")):
            spread = "deviation of enough" if enough else "deviation"
            points = [(line["lives"], _share(line[which], enough)) for line in lines for which in WHICH
                      if line[which][spread] > 1e-9]  # fmt: skip
            x, y = np.array(points).T
            axes.semilogx(x, y, "o", color=color, markersize=4, label=name)
        axes.set_ylim(0.5, 1.01)
        axes.set_xlabel("lives")
        axes.set_ylabel("trials whose interval holds the truth")
        axes.legend(frameon=False, loc="lower right")
        for axis in (figure.axes[0].xaxis, figure.axes[0].yaxis, axes.xaxis):
            axis.set_major_formatter(plain)
        figure.savefig(DOCS / "estimators.svg", metadata={"Date": None})


def _share(one: Line, enough: bool) -> float:
    """Of the trials with that verdict, if there are enough of them."""
    count = one["enough"] if enough else one["trials"] - one["enough"]
    held = one["held of enough"] if enough else one["held"] - one["held of enough"]
    return held / count if count >= FEW * one["trials"] else math.nan


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=["lives", "trees", "neural"])
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--ledger", action="store_true")
    options = parser.parse_args()
    if options.part:
        {"lives": lives, "trees": trees, "neural": neural}[options.part]()
    if options.draw:
        draw(options.ledger)


if __name__ == "__main__":
    main()
