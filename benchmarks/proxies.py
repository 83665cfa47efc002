"""How well what is seen inside a learner tells its plasticity in bits, while its rate falls and rises again.

python benchmarks/proxies.py                       # whatever is missing in docs/results/proxies.jsonl
python benchmarks/proxies.py --worlds random       # runs of one world alone, to have two processes
python benchmarks/proxies.py --draw                # docs/proxies.md and its figure
python benchmarks/proxies.py --ledger

Runs are those of the recurrent net of keeping.py at one rate, which stays, falls along a half cosine to a hundredth, or
does so four times over, with and without a projection of matrices. Every other task a look at the learner
tells its plasticity and all that `health` has; the run does not notice.
"""

import math
import statistics
import time
import warnings
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import keeping
import numpy as np
import torch
from _ledger import DOCS, append
from _trials import Record, Trials
from scipy.stats import spearmanr
from warning import summary

from pliant.learn import prequential
from pliant.learn.probe import new_task
from pliant.optim import Rewarm, warmup_cosine
from pliant.recipes.checkup import Checkup, Overheard, pairs_of
from pliant.report.style import BLUE, DASHED, ORANGE, STYLE

TASKS, EVERY, CYCLES = 40, 2, 4
RATE, WARM, FLOOR = 3e-3, 50, 0.01
SEEDS = (0, 1, 2)
COURSES = ("stays", "falls", "falls and rises")
ARMS = [f"{course}{also}" for course in COURSES for also in ("", ", projected")]
DRAWS = 2000


def learner(world: str, arm: str, seed: int) -> Any:
    course, _, projected = arm.partition(", ")
    updates = TASKS * keeping.WORLDS[world].questions // (CYCLES if course == COURSES[2] else 1)
    falling = warmup_cosine(WARM, updates, floor=FLOOR)
    keep = [] if course == COURSES[0] else [Rewarm(falling, cycle=updates)]
    made = keeping.Arm(((RATE, None),), keep=lambda _: list(keep), project={} if projected else None)
    return keeping.learner("recurrent", made, RATE, None, seed)


def run(world: str, arm: str, seed: int) -> Record:
    torch.set_num_threads(1)
    one, checkup = learner(world, arm, seed), Checkup(plasticity=True)
    scores = keeping.PerTask(keeping.WORLDS[world], TASKS)
    stretch, moments, began = EVERY * scores.every, list[dict[str, Any]](), time.process_time()
    for _ in prequential(Overheard(keeping.stream(world, TASKS, seed), checkup), one, scores):
        if checkup.ready and checkup.first is None:
            moments.append({"task": 0} | look(checkup, one))
        # Away from where a rate begins to rise, of which forks would have a part.
        if scores.asked % stretch == stretch // 2 and len(moments) <= scores.asked // stretch + 1:
            moments.append({"task": scores.asked / scores.every} | look(checkup, one))
    accuracy = [round(x, 4) for x in scores.right.tolist()]
    return {"mean": statistics.fmean(accuracy), "accuracy": accuracy, "moments": moments,
            "cpu seconds": round(time.process_time() - began, 1)}  # fmt: skip


def look(checkup: Checkup, one: Any) -> dict[str, float]:
    bits = checkup.look(one)["whole"].get("plasticity", math.nan)
    assert checkup.last is not None and checkup.first is not None
    told = {"rate": one.optimizer.param_groups[0]["lr"]}
    if checkup.last is not checkup.first and "churn" in checkup.last.whole:
        told |= summary(checkup.last)
        told["new task fell"] = new_task(one, pairs_of(checkup.questions, checkup.answers)).fell
    return {"bits": bits, **{name: float(f"{value:.5g}") for name, value in told.items()}}


TRIALS = Trials(DOCS / "results" / "proxies.jsonl", run)


def work(worlds: Sequence[str], arms: Sequence[str], seeds: Sequence[int]) -> None:
    for world in worlds:
        for seed in seeds:
            for arm in arms:
                TRIALS.once(world=world, arm=arm, seed=seed)


# What is made of the runs.

HEAD = """# What tells plasticity

Written by `python benchmarks/proxies.py --draw` from the records in `docs/results/proxies.jsonl`. Plasticity in bits
is `pliant.learn.probe.plasticity`: how much random targets of the first questions, shown ten times to 16 forks of a
learner, say of its answer to one of them right after; log2 10 = 3.32 bits at most. Here it is asked for every
{every} tasks in the life of the recurrent net of [keeping](keeping.md), whose rate stays, falls along a half cosine to
a hundredth, or does so {cycles} times over, with and without a projection of matrices; {seeds} seeds, {tasks} tasks.

![Plasticity over lives](proxies.svg)

The tables have rank correlations (Spearman) of bits with what `health` tells of the worst layer at the same moment:
over all moments of all lives, and the mean over lives of that within each; with 95 % intervals from {draws:,} draws
of lives.
"""
TAIL = """
Bits are about what a learner can come to say, and not about how: the same number may come from a high rate of stiff
matrices or a low one of loose ones. A proxy that follows the rate follows bits where the rate is what changes; where
it stays, what is left is what a proxy has to tell by itself (last column: only lives whose rate stays).
"""


def lives_of(records: Sequence[Record], world: str, seeds: Sequence[int]) -> list[Record]:
    return [r for r in records if r["key"]["world"] == world and r["key"]["seed"] in seeds]


def proxies_of(lives: Sequence[Record]) -> list[str]:
    """Names of what is told at every moment but the first, at which nothing has moved yet."""
    return [name for name in lives[0]["moments"][-1] if name not in ("task", "bits")]


def pairs(life: Record, name: str) -> np.ndarray:
    """Bits and a proxy at each moment after the first that has both, `(n, 2)`; at the first only the rate is known."""
    rows = [(m["bits"], m.get(name, math.nan)) for m in life["moments"] if m["task"]]
    return np.array([row for row in rows if all(map(math.isfinite, row))]).reshape(-1, 2)


def correlation(rows: np.ndarray) -> float:
    """NaN where one of both does not change."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return float(spearmanr(rows[:, 0], rows[:, 1]).statistic) if len(rows) > 2 else math.nan


def pooled(parts: Sequence[np.ndarray]) -> float:
    return correlation(np.concatenate(parts))


def within(parts: Sequence[np.ndarray]) -> float:
    found = [c for c in map(correlation, parts) if math.isfinite(c)]
    return statistics.fmean(found) if found else math.nan


def with_interval(of: Any, lives: Sequence[Record], name: str) -> tuple[float, float, float]:
    """A correlation, and its interval over draws of lives."""
    parts = [pairs(life, name) for life in lives]
    if of is within:  # means of what is known of each life
        each = np.array([correlation(part) for part in parts])
        each = each[np.isfinite(each)]
        if not len(each):
            return math.nan, math.nan, math.nan
        drawn = each[np.random.default_rng(0).integers(len(each), size=(DRAWS, len(each)))].mean(1)
    else:
        draws = np.random.default_rng(0).integers(len(parts), size=(DRAWS // 10, len(parts)))
        drawn = np.array([of([parts[i] for i in row]) for row in draws])
    if np.isnan(drawn).all():
        return math.nan, math.nan, math.nan
    low, high = np.nanquantile(drawn, [0.025, 0.975])
    return of(parts), float(low), float(high)


def told(found: tuple[float, float, float]) -> str:
    return "" if math.isnan(found[0]) else f"{found[0]:+.2f} ({found[1]:+.2f} to {found[2]:+.2f})"


def table(lives: Sequence[Record]) -> list[str]:
    still = [life for life in lives if life["key"]["arm"].startswith(COURSES[0])]
    rows = [(name, with_interval(pooled, lives, name), with_interval(within, lives, name),
             with_interval(within, still, name)) for name in proxies_of(lives)]  # fmt: skip
    rows.sort(key=lambda row: -abs(row[2][0]) if math.isfinite(row[2][0]) else 0.0)
    head = ["| proxy | all moments | within lives | within lives whose rate stays |", "| --- | --- | --- | --- |"]
    return head + [f"| {name} | {told(a)} | {told(b)} | {told(c)} |" for name, a, b, c in rows]


def draw(records: Sequence[Record], seeds: Sequence[int]) -> None:
    parts = [HEAD.format(every=EVERY, cycles=CYCLES, tasks=TASKS, draws=DRAWS, seeds=len(seeds))]
    worlds = [world for world in keeping.WORLDS if lives_of(records, world, seeds)]
    for world in worlds:
        parts += [f"\n## {world}\n", *table(lives_of(records, world, seeds))]
    (DOCS / "proxies.md").write_text("\n".join([*parts, TAIL]))
    paint(records, worlds, seeds)


def paint(records: Sequence[Record], worlds: Sequence[str], seeds: Sequence[int]) -> None:
    """Bits over tasks, a line for each arm: the mean over seeds."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        for world, axes in zip(worlds, figure.subplots(1, len(worlds), sharey=True, squeeze=False)[0], strict=True):
            for arm in ARMS:
                runs = [life["moments"] for life in lives_of(records, world, seeds) if life["key"]["arm"] == arm]
                if not runs:
                    continue
                course, _, projected = arm.partition(", ")
                color = dict(zip(COURSES, (BLUE, "#555555", ORANGE), strict=True))[course]
                bits = np.array([[moment["bits"] for moment in moments] for moments in runs])
                axes.plot([moment["task"] for moment in runs[0]], bits.mean(0), color=color, label=arm,
                          linestyle=DASHED if projected else "-", linewidth=1.8)  # fmt: skip
            axes.set(xlabel="task", ylim=(0, math.log2(10)))
            axes.set_title(world, loc="left", fontsize=10)
        figure.axes[0].set_ylabel("plasticity, bits per answer")
        figure.axes[-1].legend(title="the rate", frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(DOCS / "proxies.svg", metadata={"Date": None})


def ledger(records: Sequence[Record], seeds: Sequence[int]) -> None:
    for world in keeping.WORLDS:
        lives = lives_of(records, world, seeds)
        if len(lives) < len(ARMS) * len(seeds):
            continue
        found = {name: with_interval(within, lives, name) for name in proxies_of(lives)}
        best = sorted(found, key=lambda name: -abs(found[name][0]) if math.isfinite(found[name][0]) else 0.0)[:5]
        falls, rises = (statistics.fmean(life["moments"][-1]["bits"] for life in lives if life["key"]["arm"] == arm)
                        for arm in (COURSES[1], COURSES[0]))  # fmt: skip
        append(
            f"plasticity in bits, recurrent net, {world}: it falls as the rate falls, and comes back where that rises",
            "python benchmarks/proxies.py; --ledger",
            {"bits at the end, rate that stayed": rises, "rate that fell": falls,
             "after a rise over before it": over_rises(lives), "lives": len(lives),
             **{f"{name}: rank correlation within lives": told(found[name]) for name in best}},
            holds=falls < rises and over_rises(lives) > 1,
        )  # fmt: skip


def over_rises(lives: Sequence[Record]) -> float:
    """Bits at the look after the rate has risen over those at the look before, the geometric mean over rises."""
    ratios = []
    for life in (life for life in lives if life["key"]["arm"].startswith(COURSES[2])):
        moments = life["moments"]
        ratios += [math.log(max(b["bits"], 1e-3) / max(a["bits"], 1e-3))
                   for a, b in pairwise(moments[1:]) if b["rate"] > 2 * a["rate"]]  # fmt: skip
    return math.exp(statistics.fmean(ratios)) if ratios else math.nan


if __name__ == "__main__":
    TRIALS.command(work, draw, ledger, worlds=list(keeping.WORLDS), arms=ARMS, seeds=SEEDS)
