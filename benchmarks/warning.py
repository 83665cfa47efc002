"""What warns before a learner loses its ability to learn: diagnostics of runs of which about half collapse.

python benchmarks/warning.py                       # whatever is missing in docs/results/warning.jsonl
python benchmarks/warning.py --worlds random       # runs of one world alone, to have two processes
python benchmarks/warning.py --draw                # docs/warning.md and its figure
python benchmarks/warning.py --ledger

Runs are those of the feed-forward net of keeping.py, over 100 tasks. Every fourth task, at its end, all diagnostics
are taken on the first questions of the stream; the run does not notice.
"""

import math
import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import keeping
import torch
from _ledger import DOCS, append
from _trials import Record, Trials
from torch import Tensor

from pliant.core import Answer, Question
from pliant.learn import Learner, prequential
from pliant.learn.probe import new_task
from pliant.measure.health import DEAD, DORMANT, FEW, SLOW, STILL, Health, health
from pliant.optim import TowardInit
from pliant.report.style import BLUE, FONT, ORANGE, STYLE

TASKS, EVERY = 100, 4
TENTH = TASKS // 10
PROBE, PAIRS, PASSES = 8, 4, 8
"""Questions of the probe; of these, questions of the new task, and passes over them."""
SEEDS = (0, 1, 2)
ARMS = keeping.ARMS | {
    "project-toward-init": keeping.Arm(keeping.both(0.1, 1.0), keep=lambda s: [TowardInit(s)], project={}, normed=True),
}
SETTINGS = {
    "random": (
        ("adam", 1e-3, None), ("adam", 2e-3, None), ("adam", 3e-3, None), ("adam", 6e-3, None), ("adamw", 3e-3, 0.3),
        ("norm", 1e-3, None), ("norm", 3e-3, None), ("toward-init", 3e-3, 0.1), ("toward-init", 1e-2, 0.1),
        ("shrink-perturb", 3e-3, 1e-4), ("continual", 3e-3, 1e-3), ("isometry", 3e-3, 6.0), ("rewarm", 1e-3, 0.3),
        ("project", 1e-3, None), ("project", 3e-3, None), ("project-toward-init", 1e-3, 1.0),
    ),
    "permute": (
        ("adam", 1e-3, None), ("adam", 3e-3, None), ("adam", 6e-3, None), ("adam", 1e-2, None), ("adamw", 6e-3, 0.3),
        ("norm", 3e-3, None), ("norm", 1e-2, None), ("toward-init", 3e-3, 0.1), ("toward-init", 1e-2, 0.1),
        ("shrink-perturb", 6e-3, 1e-4), ("continual", 3e-3, 1e-3), ("isometry", 1e-2, 6.0), ("rewarm", 3e-3, 0.3),
        ("project", 3e-3, None), ("project", 1e-2, None), ("project-toward-init", 3e-3, 1.0),
    ),
}  # fmt: skip


class Watch(keeping.PerTask):
    """Keeps the first questions with their answers."""

    def __init__(self, world: str, tasks: int):
        super().__init__(keeping.WORLDS[world], tasks)
        self.questions: dict[int, Question] = {}
        self.pairs: list[tuple[Question, Answer]] = []

    def update(self, answer: Answer, said: Tensor | None) -> None:
        super().update(answer, said)
        if len(self.pairs) < PROBE:
            self.pairs.append((self.questions[answer.time], answer))


def run(world: str, arm: str, rate: float, strength: Any, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    learner = keeping.learner("feed-forward", ARMS[arm], rate, strength, seed)
    watch = Watch(world, TASKS)
    first = last = None
    moments: list[dict[str, Any]] = []
    # The first questions once more, from a stream of its own, so that the run itself is that of keeping.py.
    ahead = keeping.stream(world, 1, seed)
    output = torch.zeros(keeping.BATCH, 1, 10)
    while len(watch.questions) < PROBE:
        question = ahead.send(output if watch.questions else None).question
        watch.questions[question.time] = question
        output = torch.zeros(*question.mask.shape, 10)
    spent = time.process_time()
    stretch = EVERY * watch.every
    for _ in prequential(keeping.stream(world, TASKS, seed), learner, watch):
        if first is None and len(watch.pairs) == PROBE:
            first = last = look(learner, watch, None, None, keep=True)
        if watch.asked and watch.asked % stretch == 0 and len(moments) < watch.asked // stretch:
            last = look(learner, watch, first, last)
            task = new_task(learner, watch.pairs[:PAIRS], passes=PASSES)
            told = summary(last) | {"new task fell": task.fell, "new task accuracy": task.accuracy}
            moments.append({"task": watch.asked // watch.every} | {k: float(f"{v:.5g}") for k, v in told.items()})
    return {"accuracy": [round(x, 4) for x in watch.right.tolist()], "moments": moments,
            "cpu seconds": round(time.process_time() - spent, 1)}  # fmt: skip


def look(learner: Learner, watch: Watch, first: Health | None, last: Health | None, keep: bool = False) -> Health:
    questions, answers = zip(*watch.pairs, strict=True)
    return health(
        learner.model, torch.cat([q.inputs for q in questions]), optimizer=learner.optimizer, since=first, before=last,
        keep_parameters=keep, targets=torch.cat([a.targets for a in answers]),
        known=torch.cat([a.target_mask for a in answers]),
    )  # fmt: skip


def summary(found: Health) -> dict[str, float]:
    """The worst layer of each."""
    hidden = [row for name, row in found.matrices.items() if name != list(found.matrices)[-1]]
    units = list(found.units.values())
    return {
        "rate ratio": min(row["rate ratio"] for row in hidden),
        "norm ratio": max(row["norm ratio"] for row in hidden),
        "head norm ratio": list(found.matrices.values())[-1]["norm ratio"],
        "distance": max(row["distance"] for row in hidden),
        **{name: max(row[name] for row in units) for name in ("dead", "dormant")},
        **{name: min(row[name] / row["width"] for row in units) for name in ("srank", "effective rank")},
        **{name: min(row[name] for row in units) for name in ("moved", "flipped")},
        **found.whole,
    }


def tenths(record: Record) -> str:
    means = [statistics.fmean(record["accuracy"][i : i + TENTH]) for i in range(0, TASKS, TENTH)]
    return " ".join(f"{x:.2f}" for x in means)


TRIALS = Trials(DOCS / "results" / "warning.jsonl", run, told=tenths)


# What is made of the runs.

COLLAPSED = 0.85
"""A run collapses if the mean accuracy of its last tenth is below this share of that of its best tenth."""
FALSE_ALARMS = 0.05
ABOVE = ("norm ratio", "head norm ratio", "distance", "dead", "dormant", "churn", "loss", "gradient cosine",
         "sharpness")  # fmt: skip
"""Diagnostics of which more is worse, as their papers have it; of all others less is."""
RELATIVE = ("churn", "sharpness", "gradient norm", "moved", "flipped", "new task fell", "effective rank")
SCORE = "the score itself"


class Seen(NamedTuple):
    """A run: its place, whether and when it fell (task), and by diagnostic the value at each moment."""

    key: dict[str, Any]
    collapsed: bool
    fell: int
    tasks: list[int]
    values: dict[str, list[float]]


def seen(line: Record) -> Seen | None:
    """None if the run never learned anything to lose: no tenth is half as good again as chance."""
    score = line["accuracy"]
    means = [statistics.fmean(score[i : i + TENTH]) for i in range(0, TASKS, TENTH)]
    if max(means) < 0.15:
        return None
    running = [statistics.fmean(score[i - TENTH : i]) for i in range(TENTH, TASKS + 1)]
    fell, best = TASKS, 0.0
    for i, value in enumerate(running):
        best = max(best, value)
        if value < COLLAPSED * best:
            fell = TENTH + i
            break
    moments = line["moments"]
    values = {name: [moment[name] for moment in moments] for name in moments[0] if name != "task"}
    values |= {f"{name}, to its first": [x / max(values[name][0], 1e-9) for x in values[name]] for name in RELATIVE}
    recent = [statistics.fmean(score[max(0, m["task"] - EVERY) : m["task"]]) for m in moments]
    values[SCORE] = [x / max(recent[: i + 1]) for i, x in enumerate(recent)]
    return Seen(line["key"], means[-1] < COLLAPSED * max(means), fell, [m["task"] for m in moments], values)


def all_seen(records: Sequence[Record], seeds: Sequence[int]) -> list[Seen]:
    return [run for record in records if record["key"]["seed"] in seeds and (run := seen(record)) is not None]


def before(run: Seen, name: str, fell: int) -> float | None:
    """The last value of a diagnostic that is older than the tenth in which the score fell."""
    known = [value for task, value in zip(run.tasks, run.values[name], strict=True) if task <= fell - TENTH]
    return known[-1] if known else None


def auroc(runs: list[Seen], name: str, sign: int) -> tuple[float, int]:
    """How often the run that will collapse is worse than a healthy one of the same world at the same time; pairs."""
    won = pairs = 0.0
    for bad in (run for run in runs if run.collapsed):
        for good in (run for run in runs if not run.collapsed and run.key["world"] == bad.key["world"]):
            a, b = before(bad, name, bad.fell), before(good, name, bad.fell)
            if a is not None and b is not None and a == a and b == b:
                won += 1.0 if sign * a > sign * b else 0.5 if a == b else 0.0
                pairs += 1
    return (won / pairs if pairs else math.nan), int(pairs)


def threshold(runs: list[Seen], name: str, sign: int) -> float:
    """The mildest one at which no more than a share of the healthy runs is ever warned of."""
    worst = sorted(max(sign * x for x in run.values[name] if x == x) for run in runs if not run.collapsed)
    allowed = math.floor(FALSE_ALARMS * len(worst))
    return sign * worst[len(worst) - 1 - allowed]


def alarm(run: Seen, name: str, sign: int, limit: float) -> int | None:
    """The task after which it warns first."""
    past = (task for task, x in zip(run.tasks, run.values[name], strict=True) if sign * x > sign * limit)
    return next(past, None)


def half(run: Seen) -> bool:
    """One of two halves by settings, so that no run is judged by a threshold that its twin of another seed chose."""
    world, key = run.key["world"], (run.key["arm"], run.key["rate"], run.key["strength"])
    return [tuple(setting) for setting in SETTINGS[world]].index(key) // 2 % 2 == 0


def judge(runs: list[Seen], name: str) -> dict[str, Any]:
    """How well a diagnostic warns; each half of the runs is judged by the threshold of the other one."""
    sign = 1 if name.split(",")[0] in ABOVE else -1
    halves = [[run for run in runs if half(run) is side] for side in (True, False)]
    limits = [threshold(chosen, name, sign) for chosen in halves]
    judged = [(run, limit) for limit, rest in zip(limits, halves[::-1], strict=True) for run in rest]
    alarms = [(run, alarm(run, name, sign, limit)) for run, limit in judged]
    bad = [(run, at) for run, at in alarms if run.collapsed]
    leads = [run.fell - at for run, at in bad if at is not None and at < run.fell]
    healthy = [at for run, at in alarms if not run.collapsed]
    rank, pairs = auroc(runs, name, sign)
    return {
        "diagnostic": name,
        "worse": "above" if sign > 0 else "below",
        "auroc": rank,
        "pairs": pairs,
        "auroc, nets without norms": auroc([run for run in runs if not normed(run)], name, sign)[0],
        "threshold": float(f"{threshold(runs, name, sign):.3g}"),
        "thresholds of the halves": [float(f"{limit:.3g}") for limit in limits],
        "warned": len(leads) / len(bad),
        "lead": statistics.median(leads) if leads else math.nan,
        "false alarms": sum(at is not None for at in healthy) / len(healthy),
    }  # fmt: skip


def normed(run: Seen) -> bool:
    return ARMS[run.key["arm"]].normed


SHIPPED = {"srank": FEW, "dead": DEAD, "dormant": DORMANT, "rate ratio": SLOW, "flipped": STILL}
"""Thresholds of `verdict`."""
HEAD = """# What warns before a learner can no longer learn

Written by `python benchmarks/warning.py --draw` from `docs/results/warning.jsonl`. {runs} runs of the feed-forward net
of [keeping](keeping.md) over {tasks} tasks, {collapsed} of which collapse: the mean accuracy of the last tenth of their
tasks is below {share:.0%} of that of their best tenth. It has *fallen* at the first task after which the mean of a
tenth is below that share of the best so far. Two worlds: *random* (classes drawn anew, all must be memorized) and
*permute* (pixels in a new order). Every fourth task all diagnostics are taken, on the same first questions of the
stream; of several layers the worst counts. What is compared "to its first" is divided by the first value.

*auroc*: how often a run that will collapse is worse, a tenth of the run before it has fallen, than a healthy one of the
same world at the same time; which direction is worse is not fitted. *threshold*: the mildest one at which at most one
of twenty healthy runs is ever warned of. *warned*: share of the collapsing runs that it tells before they have fallen,
*lead*: median tasks from the warning to the fall, *false alarms*: share of the healthy runs that it ever speaks of;
these three by thresholds that were chosen on the other half of the settings.

- Dormant and dead units and the rank of features warn best where all must be memorized, at half of the collapses and
  about a tenth of the run ahead. They rank runs of the other world nearly as well, but there healthy nets live with far
  fewer units, so that no threshold serves both worlds.
- Rates, norms and distances tell nets without norms apart and say little of nets with norms, whose rates a schedule
  or a projection moves without harm.
- The new-task probe needs updates of a fork and warns no earlier. Gradient covariance, churn and sharpness warn less
  well. Sharpness was taken here by differences over a step of half a percent of the parameters' length.
- The verdict of `health` therefore speaks of rank first, then of dead and dormant units, then of rates and movement.

![Rank of features and accuracy](warning.svg)
"""


def draw(records: Sequence[Record], seeds: Sequence[int]) -> None:
    """docs/warning.md and its figure."""
    runs = all_seen(records, seeds)
    collapsed = sum(run.collapsed for run in runs)
    text = [HEAD.format(runs=len(runs), tasks=TASKS, collapsed=collapsed, share=COLLAPSED)]
    for title, rows in tables(runs).items():
        own = [run for run in runs if title in ("both", run.key["world"])]
        text.append(f"## {title}: {len(own)} runs, {sum(run.collapsed for run in own)} collapse\n")
        text.append("| diagnostic | worse | auroc | nets without norms | threshold | warned | lead | false alarms |")
        text.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
        for row in rows:
            cells = [row["diagnostic"], row["worse"], f"{row['auroc']:.2f}", f"{row['auroc, nets without norms']:.2f}",
                     f"{row['threshold']:g}", f"{row['warned']:.0%}", f"{row['lead']:g}",
                     f"{row['false alarms']:.0%}"]  # fmt: skip
            text.append(f"| {' | '.join(cells)} |")
        text.append("")
    text.append("## Thresholds of the verdict, on all runs\n")
    text.append("| diagnostic | threshold | warned, random | lead | false alarms, random | warned, permute | lead "
                "| false alarms, permute |")  # fmt: skip
    text.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    shipped = {name: [of_shipped(runs, name, world) for world in SETTINGS] for name in SHIPPED}
    for name, parts in shipped.items():
        cells = [f"{warned:.0%} | {lead:g} | {false:.0%}" for warned, lead, false in parts]
        text.append(f"| {name} | {SHIPPED[name]:g} | {' | '.join(cells)} |")
    (DOCS / "warning.md").write_text("\n".join(text) + "\n")
    paint(runs)


def ledger(records: Sequence[Record], seeds: Sequence[int]) -> None:
    runs = all_seen(records, seeds)
    told = tables(runs)
    best = told["random"][0]
    figures: dict[str, Any] = {"runs": len(runs), "collapse": sum(run.collapsed for run in runs)}
    for name in ("srank", "dead", "dormant"):
        row = next(row for row in told["random"] if row["diagnostic"] == name)
        figures |= {f"{name}, random: {key}": row[key] for key in ("auroc", "warned", "lead", "false alarms")}
        figures[f"{name}, both: auroc"] = next(row for row in told["both"] if row["diagnostic"] == name)["auroc"]
    append(
        "health warns of a collapse before the score falls (AUROC above 0.8, with no more than 10 % false alarms)",
        "python benchmarks/warning.py --ledger", figures | {"best in random": best["diagnostic"]},
        holds=len(runs) >= 60 and best["auroc"] > 0.8 and best["lead"] > 0 and best["false alarms"] <= 0.1,
        note="where all must be memorized; no threshold serves both worlds",
    )  # fmt: skip


def tables(runs: list[Seen]) -> dict[str, list[dict[str, Any]]]:
    """Of each world and of both."""
    worlds = {world: table([run for run in runs if run.key["world"] == world]) for world in SETTINGS}
    return {**worlds, "both": table(runs)}


def table(runs: list[Seen]) -> list[dict[str, Any]]:
    return sorted((judge(runs, name) for name in runs[0].values), key=lambda row: -row["auroc"])


def of_shipped(runs: list[Seen], name: str, world: str) -> tuple[float, float, float]:
    """Share warned of, median lead, share of false alarms by the threshold of the verdict."""
    sign = 1 if name in ABOVE else -1
    alarms = [(run, alarm(run, name, sign, SHIPPED[name])) for run in runs if run.key["world"] == world]
    bad, good = ([(run, at) for run, at in alarms if run.collapsed is kind] for kind in (True, False))
    leads = [run.fell - at for run, at in bad if at is not None and at < run.fell]
    lead = statistics.median(leads) if leads else math.nan
    return len(leads) / len(bad), lead, sum(at is not None for _, at in good) / len(good)


def paint(runs: list[Seen]) -> None:
    """The share of directions that is left over tasks, runs that collapse in orange, the fall marked."""
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        for axes, world in zip(figure.subplots(1, 2, sharey=True), SETTINGS, strict=True):
            for run in (run for run in runs if run.key["world"] == world):
                color = ORANGE if run.collapsed else BLUE
                axes.plot(run.tasks, run.values["srank"], color=color, linewidth=0.9, alpha=0.7)
                if run.collapsed:
                    axes.plot([run.fell], [before(run, "srank", run.fell + TENTH)], "o", color=color, markersize=3.5)
            axes.axhline(FEW, color="#666666", linewidth=1, dashes=(4, 3))
            axes.set_title(f"{world}: orange collapse, dots where the score has fallen", fontsize=FONT)
            axes.set_xlabel("tasks")
        figure.axes[0].set_ylabel("rank of features over their number")
        figure.savefig(DOCS / "warning.svg", metadata={"Date": None, "Creator": None})


def work(worlds: Sequence[str], seeds: Sequence[int]) -> None:
    for seed in seeds:
        for world in worlds:
            for arm, rate, strength in SETTINGS[world]:
                TRIALS.once(world=world, arm=arm, rate=rate, strength=strength, seed=seed)


if __name__ == "__main__":
    TRIALS.command(work, draw, ledger, worlds=list(SETTINGS), seeds=SEEDS)
