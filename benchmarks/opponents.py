"""How much opponents gain if somebody tunes them: settings around their defaults, the best chosen in hindsight.

python benchmarks/opponents.py --data FOLDER                # whatever is missing in docs/results/opponents.jsonl
python benchmarks/opponents.py --data FOLDER --combined     # then the best of each factor, all at once
python benchmarks/opponents.py --draw                       # docs/opponents.md
python benchmarks/opponents.py --ledger                     # the ledger's line

On the streams that were looked at while our defaults were chosen. A run holds one member and no-change.
FOLDER holds `streams` and `ett`, the layouts that `pliant.streams.named` reads. Set OMP_NUM_THREADS=1.
"""

import argparse
import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _ledger import DOCS, append

from pliant.core import categorical_nats
from pliant.learn import Predictor, Retrained, prequential
from pliant.learn.references import LastLabel
from pliant.learn.trees import Boosting
from pliant.recipes import series
from pliant.recipes.panel import LEARNER, REFERENCE, Changes, Panel, Scoring, row_nats
from pliant.streams import Series

FILE = DOCS / "results" / "opponents.jsonl"
ROWS = 10_000
STREAMS = {"electricity": "streams", "weather": "streams", "ett": "ett", "outdoor": "streams"}
Setting = dict[str, float]
GRID: dict[str, dict[str, tuple[float, ...]]] = {
    LEARNER: {},
    "retrained": {"window": (0.5, 2), "passes": (2, 8), "trainings": (2, 4)},
    "boosting": {
        "window": (0.5, 2), "learning_rate": (0.05, 0.2), "max_leaf_nodes": (15,), "max_iter": (50, 200),
        "l2_regularization": (1.0,), "trainings": (2, 4),
    },
}  # fmt: skip
"""Values of each factor beside its default, one factor at a time. Trainings: how many times as many as by default, so
one every rows / 50 or rows / 100 instead of rows / 25. Window: how many times as many rows as by default, so 2.5 or 10
default intervals instead of 5; it stays the same when only the trainings change."""
REPEATS = 3
"""Runs of ours, of whose processor seconds the median counts, since all others are compared with it."""


class Tuned(Boosting):
    """Boosting whose trees are grown with other settings of the library's."""

    def __init__(self, *arguments: Any, trees: dict[str, float], **options: Any):
        super().__init__(*arguments, **options)
        classifier, regressor = self._makers
        self._makers = partial(classifier, **trees), partial(regressor, **trees)


def member(name: str, config: series.SeriesConfig, rows: Any, setting: Setting) -> Predictor:
    """Ours or an opponent as `pliant learn series` makes it, but for `setting`."""
    columns, shape = rows.columns, series.Shape.of(config, rows)
    streams = max(1, len(rows.groups))
    if name == LEARNER:
        return series.learner(config, columns, shape, streams)
    rest = dict(setting)
    every = max(1, int(shape.retrain / rest.pop("trainings", 1)))
    window = int(5 * shape.retrain * rest.pop("window", 1))
    if name == "retrained":
        passes = int(rest.pop("passes", series.PASSES))
        return Retrained(lambda number: series.learner(config, columns, shape, streams, f"retrained/{number}"),
                         every=every, window=window, passes=passes)  # fmt: skip
    iterations = int(rest.pop("max_iter", 100))
    return Tuned(columns, trees=rest, every=every, window=window, iterations=iterations, seed=config.seed,
                 remember=shape.remember)  # fmt: skip


def run(name: str, stream: str, setting: Setting, seed: int, data: Path, limit: int = ROWS) -> dict[str, Any]:
    """Scores and processor seconds of one member on the first rows of a stream."""
    config = series.SeriesConfig(stream=stream, data=str(data / STREAMS[stream]), rows=limit, seed=seed)
    rows = series.source(config)
    columns, shape = rows.columns, series.Shape.of(config, rows)
    asked = Series(rows, chunk=shape.chunk, ahead=shape.ahead, limit=limit)
    numbers = columns.task != "classify"
    changes = Changes(row_nats if numbers else categorical_nats)
    reference = {REFERENCE: LastLabel(columns, remember=shape.remember)}
    panel = Panel(member(name, config, rows, setting), reference, Scoring(numbers), changes)
    for _ in prequential(asked, panel.learner.timed, panel.watch, panel.opponents):
        pass
    panel.cut()
    scores = panel.summary()
    main = "error" if numbers else "accuracy"
    return {
        "answers": panel.answers,
        "bits": scores[LEARNER]["bits"],
        main: scores[LEARNER][main],
        "bits_of_no_change": scores[REFERENCE]["bits"],
        "cpu_seconds": panel.seconds()[LEARNER],
    }


def settings(name: str) -> Iterator[Setting]:
    """The default, then one factor at a time."""
    yield {}
    for factor, values in GRID[name].items():
        yield from ({factor: value} for value in values)


def combined(found: dict[str, list[dict[str, Any]]], name: str) -> Setting:
    """The best value of each factor, where one is better than the default."""
    bits = {json.dumps(setting): value for setting, value, *_ in tried(found[name])}
    best: Setting = {}
    for factor, values in GRID[name].items():
        value = min(values, key=lambda value: bits[json.dumps({factor: value})])
        if bits[json.dumps({factor: value})] < bits["{}"]:
            best[factor] = value
    return best


def fill(wanted: list[dict[str, Any]], data: Path) -> None:
    """Run what is not in the file yet, a line each."""
    FILE.parent.mkdir(exist_ok=True)
    done = [row["key"] for row in records()]
    wanted = [key for key in wanted if key not in done]
    for stream in dict.fromkeys(key["stream"] for key in wanted):
        run(LEARNER, stream, {}, 0, data, limit=500)  # nobody pays for the first call of the kernels
    for key in wanted:
        began = time.time()
        runs = [
            run(key["member"], key["stream"], key["setting"], key["seed"], data)
            for _ in range(REPEATS if key["member"] == LEARNER else 1)
        ]
        spent = statistics.median(one["cpu_seconds"] for one in runs)
        with open(FILE, "a") as out:
            out.write(json.dumps({"key": key, **runs[0], "cpu_seconds": round(spent, 3)}) + "\n")
        print(key, round(runs[0]["bits"], 4), round(spent, 1), "CPU s", round(time.time() - began), "s", flush=True)


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def by_stream() -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Records by stream and member."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for row in records():
        found.setdefault(row["key"]["stream"], {}).setdefault(row["key"]["member"], []).append(row)
    return found


def tried(rows: list[dict[str, Any]]) -> list[tuple[Setting, float, float, float]]:
    """Setting, bits, accuracy or error, processor seconds: means over seeds, in the order in which they were tried."""
    same: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        same.setdefault(json.dumps(row["key"]["setting"]), []).append(row)
    main = "accuracy" if rows and "accuracy" in rows[0] else "error"
    return [
        (json.loads(text), *(statistics.fmean(row[what] for row in rows) for what in ("bits", main, "cpu_seconds")))  # type: ignore[misc]
        for text, rows in same.items()
    ]


def said(setting: Setting) -> str:
    """A setting for people."""
    times = ("trainings", "window")
    named = {"learning_rate": "rate", "max_leaf_nodes": "leaves", "max_iter": "trees", "l2_regularization": "l2"}
    parts = [f"{value:g} x {name}" if name in times else f"{named.get(name, name)} {value:g}"
             for name, value in setting.items()]  # fmt: skip
    return ", ".join(parts) or "default"


def chosen(found: dict[str, list[dict[str, Any]]]) -> list[tuple[str, tuple[Setting, float, float, float]]]:
    """What a reader wants to see: each at its default, best in bits, and the cheapest no worse than ours."""
    (ours,) = tried(found[LEARNER])
    lines = [("**pliant**", ours)]
    for name in (name for name in GRID if name != LEARNER):
        if name in found:
            every = tried(found[name])
            lines += [(f"{name}, default", every[0]), (f"{name}, best of {len(every)}", min(every, key=lambda t: t[1]))]
            if enough := [one for one in every if one[1] <= ours[1]]:
                lines.append((f"{name}, cheapest as good as ours", min(enough, key=lambda one: one[3])))
    return lines


def table(lines: list[tuple[str, tuple[Setting, float, float, float]]], ours: float, main: str) -> list[str]:
    head = [
        f"| | setting | bits per answer | {main} | CPU s | compute of ours |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    return head + [
        f"| {title} | {said(setting)} | {bits:.4f} | {score:.4f} | {spent:.1f} | {spent / ours:.3g} |"
        for title, (setting, bits, score, spent) in lines
    ]


HEAD = f"""# Opponents with other settings

Written by `python benchmarks/opponents.py --draw` from the records in `docs/results`. Our one set of defaults was
chosen while looking at these four streams; here the opponents get the same: settings around their defaults, one
factor at a time, the best chosen in hindsight for each stream. Ours runs with its defaults. First {ROWS:,} rows.
Trainings and window are times the default, which is a training every {series.TRAININGS}th of the rows, here every
{ROWS // series.TRAININGS} (on shorter streams at least 200), on the last five times as many; the window stays the same
when the trainings change. On [whole streams](streams.md) trainings from scratch are further apart, and what is learned
row by row has had more time. A setting of several factors joins the best value of each. Where the best stands at the
end of what was tried, more of it may gain more. Processor seconds are rough: other jobs ran on the machine.
"""


def missing(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Settings of the grid that have not been run on a stream."""
    ran = {name: [one[0] for one in tried(found.get(name, []))] for name in GRID}
    return [f"{name} {said(one)}" for name in GRID for one in settings(name) if one not in ran[name]]


def draw() -> None:
    lines = [HEAD]
    for stream, found in by_stream().items():
        main = "accuracy" if "accuracy" in found[LEARNER][0] else "error"
        ours, seeds = tried(found[LEARNER])[0][3], {row["key"]["seed"] for row in found[LEARNER]}
        some = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
        lines += [f"## {stream}: {found[LEARNER][0]['answers']:,} answers, {some}", ""]
        lines += [*table(chosen(found), ours, main), "", "All of them:", ""]
        everyone = [(name, one) for name in GRID if name in found for one in tried(found[name])]
        lines += [*table(sorted(everyone, key=lambda line: line[1][1]), ours, main), ""]
        if left := missing(found):
            lines += [f"Not run: {'; '.join(left)}.", ""]
    (DOCS / "opponents.md").write_text("\n".join(lines))


def ledger() -> None:
    """One line: bits of ours and of each opponent at its best, and what its best costs."""
    figures: dict[str, Any] = {}
    first, left = True, 0
    for stream, found in by_stream().items():
        ((_, bits, _, ours),) = tried(found[LEARNER])
        parts = [f"ours {bits:.4f}"]
        for name in (name for name in GRID if name in found and name != LEARNER):
            every = tried(found[name])
            setting, best, _, spent = min(every, key=lambda one: one[1])
            parts.append(f"{name} {every[0][1]:.4f}, best {best:.4f} ({said(setting)}; {spent / ours:.3g} times ours)")
            first &= bits <= best
        figures[stream] = ", ".join(parts)
        left += len(missing(found))
    append(f"Ours at its defaults is ahead in bits of retrained and boosting tuned in hindsight, first {ROWS:,} rows",
           "python benchmarks/opponents.py --data FOLDER; --combined; --ledger", figures, holds=first,
           note=f"{left} settings of the grid were not run" if left else "")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--streams", nargs="*", default=list(STREAMS))
    parser.add_argument("--members", nargs="*", default=list(GRID))
    parser.add_argument("--first", type=int, help="only so many settings of each, the costly ones are last")
    parser.add_argument("--combined", action="store_true")
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--ledger", action="store_true")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    if asked.draw:
        draw()
    elif asked.ledger:
        ledger()
    else:
        several = by_stream()
        grid = [
            {"stream": stream, "member": name, "setting": setting, "seed": seed}
            for seed in asked.seeds
            for stream in asked.streams
            for name in asked.members
            for setting in ([combined(several[stream], name)] if asked.combined else [*settings(name)][: asked.first])
        ]
        fill(grid, asked.data)
