"""docs/control.md, docs/control.svg and the ledger's line from what `switching_control.py` found."""

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np
from _ledger import DOCS, append

from pliant.report.style import BLUE, DASHED, DOTTED, ORANGE, STYLE

Run = dict[str, Any]
LATE, ENDS, LOST = 3, 4, 50
"""Late parts of a world; first and last worlds that are compared; a world is lost whose late return is below that of
an agent that has learned nothing, which has about 20, in a lucky world 40."""
LOOKS: dict[str, Any] = {
    "project": (BLUE, 2.4, "-"), "adam": (ORANGE, 2.4, "-"), "norm": ("#009E73", 1.6, "-"),
    "project-rewarm": ("#56B4E9", 1.6, DASHED), "project-isometry": ("#56B4E9", 1.6, "-"),
    "isometry": ("#E69F00", 1.2, "-"), "shrink-perturb": ("#CC79A7", 1.2, "-"), "continual": ("#8C6D31", 1.2, "-"),
    "fresh": ("#000000", 1.2, DOTTED),
}  # fmt: skip
PAIRS = (("norm", "adam"), ("project", "adam"), ("project", "norm"), ("project-rewarm", "project"),
         ("project-isometry", "project"), ("isometry", "adam"), ("shrink-perturb", "adam"), ("continual", "adam"),
         ("fresh", "adam"), ("fresh", "project"))  # fmt: skip
COLUMNS = ("arm", "rate", "mean return", "late in a world", "first worlds", "last worlds", "last - first", "lost",
           "entropy", "dead", "norm", "CPU of adam")  # fmt: skip
TEXT = """# An agent whose world is rewired

Written by `python benchmarks/switching_control.py --draw` from the records in `docs/results/control.jsonl`; the head of
the script says how its environment is made. PPO of stable-baselines3 balances gymnasium's CartPole. After each
{steps:,} steps comes another of {worlds} worlds: the four sensors in another order and with other signs, the two
actions perhaps exchanged, and gravity, masses, length and force within a factor of 1.5. Only *fresh* is told: it
begins with a new agent in each world, and is what an agent reaches that has neither lost nor kept anything.

Two hidden layers of 64 ReLU, for policy and value each. *norm* has a norm without parameters before each ReLU,
*project* also keeps the norms of matrices (`normalize_and_project`), *project-rewarm* also lets the rate fall to a
tenth and rise again when more episodes end than before (CUSUM). *isometry* is FIRE when that is so: matrices become the
nearest isometries; *project-isometry* has all of *project* too. *shrink-perturb* shrinks all weights by a thousandth
per update and adds a little noise, *continual* makes a thousandth of the hidden units new per update, those of least
use (continual backprop). Each arm had three rates, tried with a seed of its own over {tuning_worlds} worlds,
and one more beyond where an outer one was best; the best was run with {seeds} other seeds. All arms see the same worlds
and as many steps. Mean and standard deviation over seeds.

- *mean return*: of the episodes that end in each tenth of a world, which is the area under the curve of learning.
- *late in a world*: the same over the last {late} tenths. *lost*: worlds, of {worlds}, in which that is below {lost}.
- *first*, *last worlds*: mean return in the first and last {ends}.
- *CPU of adam*: *isometry*, *project-isometry* and *continual* were run on another day, and compare less well.
- *entropy* of the policy in bits and share of *dead* units of its last hidden layer, in the last {ends} worlds; *norm*
  of its matrices at the end, over that after the first world.

{table}

Differences of mean return in the same worlds, by seed:

{told}
- *project-rewarm* began its schedule anew {begun} times, *isometry* did what it does {isometries} times and
  *project-isometry* {both} times; there were {changes} changes.

An arm below *fresh* is not as good as new: nothing that it knew of other worlds makes up for what it lost. Rates were
chosen over {tuning_worlds} worlds, which does not ask for what lasts.

Means over seeds; the bands are a standard deviation of *adam* and *project*.

![Return by world, and within the last worlds](control.svg)

## In your own loop

stable-baselines3 knows nothing of keeping. Two calls after the agent is made, and one in a callback:

```python
agent = PPO("MlpPolicy", envs)
policy, heads = agent.policy, {{"action_net.weight": Role.HEAD, "value_net.weight": Role.HEAD}}
normalize_and_project(policy.optimizer, policy, roles=heads)
kept = attach(policy.optimizer, policy, [Rewarm(...)], roles=heads)

kept.tell(math.log(0.5 + ended))  # episodes of the rollout that ended: what a detector of change listens to
```

`pliant.optim.attach` hangs any upkeep on the step of any optimizer; a loop that sets rates by itself has to leave that
to upkeep that does. `ContinualBackprop` looks at hidden units: the model tells where they are by `units()`, and has to
be called as a module, which PPO does not do when it learns; the script's policy does.

## What was tried

Mean return of the tuning runs, by rate:

{tuning}
"""


def figures(run: Run) -> dict[str, float]:
    """What a run amounts to."""
    returns = np.array(run["return"])
    late = returns[:, -LATE:].mean(1)
    return {
        "return": returns.mean(),
        "first": returns[:ENDS].mean(),
        "last": returns[-ENDS:].mean(),
        "change": returns[-ENDS:].mean() - returns[:ENDS].mean(),
        "late": late.mean(),
        "lost": float((late < LOST).sum()),
        "entropy": float(np.mean(run["entropy"][-ENDS:])),
        "dead": float(np.mean(run["dead"][-ENDS:])),
        "norm": run["norm"][-1] / run["norm"][0],
    }


def of(runs: Sequence[Run], name: str) -> np.ndarray:
    return np.array([figures(run)[name] for run in runs])


def spread(values: np.ndarray, digits: int = 0, sign: str = "") -> str:
    """Mean and standard deviation over seeds."""
    return f"{statistics.fmean(values):{sign}.{digits}f} ± {statistics.stdev(values):.{digits}f}"


class Page:
    """Runs of each arm, of the seeds that all arms have."""

    def __init__(self, lines: Sequence[Run], arms: Sequence[str], rates: Sequence[float], seeds: Sequence[int],
                 tuning: int, steps: int):  # fmt: skip
        by = {(line["key"]["arm"], line["key"]["seed"]): line for line in lines}
        whole = [seed for seed in seeds if all((arm, seed) in by for arm in arms)]
        self.runs = {arm: [by[arm, seed] for seed in whole] for arm in arms}
        self.tuning = [line for line in lines if line["key"]["seed"] == tuning]
        self.rates, self.seeds, self.steps = rates, whole, steps

    def draw(self) -> None:
        """Write docs/control.md and docs/control.svg."""
        tuned = {(line["key"]["arm"], line["key"]["rate"]): f"{line['mean']:.0f}" for line in self.tuning}
        tried = [[arm, *(tuned.get((arm, rate), "") for rate in self.rates)] for arm in self.runs]
        told = [f"- *{arm}* against *{other}*: {self.against(arm, other)}; in the last worlds "
                f"{self.against(arm, other, 'last')}." for arm, other in PAIRS]  # fmt: skip
        text = TEXT.format(
            table=_table(COLUMNS, self.rows()), told="\n".join(told), seeds=len(self.seeds), steps=self.steps,
            tuning=_table(["arm", *(f"{rate:g}" for rate in self.rates)], tried), late=LATE, ends=ENDS, lost=LOST,
            tuning_worlds=self.tuning[0]["key"]["worlds"], worlds=self.runs["adam"][0]["key"]["worlds"],
            begun=self.times("project-rewarm", "rewarmed"), isometries=self.times("isometry", "isometries"),
            both=self.times("project-isometry", "isometries"), changes=self.runs["adam"][0]["key"]["worlds"] - 1,
        )  # fmt: skip
        (DOCS / "control.md").write_text(text)
        self.paint()

    def times(self, arm: str, what: str) -> str:
        """How often an arm acted, up to the end of the last world."""
        return f"{statistics.fmean(run[what][-1] for run in self.runs[arm]):.1f}"

    def rows(self) -> list[list[str]]:
        seconds = {arm: statistics.fmean(run["cpu seconds"] for run in runs) for arm, runs in self.runs.items()}
        rows = []
        for arm in sorted(self.runs, key=lambda arm: -of(self.runs[arm], "return").mean()):
            runs = self.runs[arm]
            row = [arm, f"{runs[0]['key']['rate']:g}"]
            row += [spread(of(runs, name)) for name in ("return", "late", "first", "last")]
            row += [spread(of(runs, "change"), sign="+"), spread(of(runs, "lost"), 1)]
            row += [f"{of(runs, name).mean():.2f}" for name in ("entropy", "dead", "norm")]
            rows.append([*row, f"{seconds[arm] / seconds['adam']:.2f}"])
        return rows

    def against(self, arm: str, other: str, name: str = "return") -> str:
        """Difference of two arms in the same worlds, and in how many seeds it is positive."""
        apart = of(self.runs[arm], name) - of(self.runs[other], name)
        return f"{spread(apart, sign='+')}, above in {int((apart > 0).sum())} of {len(apart)} seeds"

    def paint(self) -> None:
        """Return in each world, and the course of the last worlds; the bands are the spread over seeds."""
        from matplotlib import style
        from matplotlib.figure import Figure

        with style.context(["default", STYLE]):
            figure = Figure(figsize=(11, 3.8), layout="constrained")
            left, right = figure.subplots(1, 2, sharey=True)
            for arm in LOOKS:
                returns = np.array([run["return"] for run in self.runs[arm]])
                worlds, bins = returns.shape[1:]
                _line(left, arm, np.arange(1, worlds + 1), returns.mean(2))
                _line(right, arm, (np.arange(bins) + 0.5) * self.steps / bins / 1000, returns[:, -ENDS:].mean(1))
            left.set(xlabel="world", ylabel="mean return", ylim=(0, None))
            left.set_title("Mean return in each world", loc="left", fontsize=10)
            right.set(xlabel="thousand steps since the world changed")
            right.set_title(f"The course of the last {ENDS} worlds", loc="left", fontsize=10)
            right.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
            figure.savefig(DOCS / "control.svg", metadata={"Date": None})

    def ledger(self) -> None:
        """The line of the ledger."""
        figures = {f"{what} of {arm}": spread(of(runs, name)) for what, name in (("return", "return"), ("last", "last"))
                   for arm, runs in self.runs.items()}  # fmt: skip
        apart = [of(self.runs["project"], "return") - of(self.runs[other], "return") for other in ("adam", "norm")]
        claim = (
            "PPO in worlds whose sensors, actions and physics are drawn anew: normalize-and-project has a mean return "
            "above plain Adam and above norms alone in every seed"
        )
        append(claim, "python benchmarks/switching_control.py; --ledger", {"seeds": len(self.seeds), **figures,
               "above adam": self.against("project", "adam"), "above norm": self.against("project", "norm")},
               holds=all((one > 0).all() for one in apart))  # fmt: skip
        pairs = [("isometry", "adam"), ("project-isometry", "project"), ("continual", "adam")]
        claim = (
            "PPO in such worlds: FIRE when more episodes end than before, alone or with normalize-and-project, and "
            "continual backprop have a mean return above the same agent without, in every seed"
        )
        append(claim, "python benchmarks/switching_control.py; --ledger", {"seeds": len(self.seeds),
               **{f"{arm} above {other}": self.against(arm, other) for arm, other in pairs}},
               holds=all((of(self.runs[arm], "return") > of(self.runs[other], "return")).all()
                         for arm, other in pairs))  # fmt: skip


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, ["---"] * len(head), *rows))


def _line(axes: Any, arm: str, x: np.ndarray, y: np.ndarray) -> None:
    color, width, dashes = LOOKS[arm]
    axes.plot(x, y.mean(0), color=color, linewidth=width, linestyle=dashes, label=arm)
    if arm in ("adam", "project"):
        axes.fill_between(x, y.mean(0) - y.std(0), y.mean(0) + y.std(0), color=color, alpha=0.12, linewidth=0)
