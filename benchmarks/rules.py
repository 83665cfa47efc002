"""Learning rules on the streams of the main job: bits against compute.

python benchmarks/rules.py --data FOLDER           # whatever is missing in docs/results/rules.jsonl
python benchmarks/rules.py --draw                  # its part of docs/rules.md
python benchmarks/rules.py --ledger

FOLDER holds `streams` and `ett`, the layouts that `pliant.streams.named` reads. Needs river. Everything but the rule is
what the recipe does by itself; digits are read pixel by pixel, 64 steps each.
"""

import importlib
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from _ledger import DOCS, append
from _trials import Record, Trials
from defaults import STREAMS
from streams import driven, options_of

from pliant.learn import Rule, bptt, immediate, trace
from pliant.recipes import digits, series

FILE, PAGE = DOCS / "results" / "rules.jsonl", DOCS / "rules.md"
SEEDS = (0, 1, 2)
PIXELS = "digits by pixel"
KEEP, KEPT = ("normalize-project", "isometry"), (", kept", ("electricity", "regimes 100k"))
"""Whether rules and keeping go together: what marks such a stream, and of which there is one."""
PLACES = [*STREAMS, PIXELS, *(stream + KEPT[0] for stream in KEPT[1])]
ANSWERS, EVERY = 8000, 2000
RULES: dict[str, Callable[..., Rule]] = {
    "as by default": bptt,
    "trace": lambda window, every=1, revisit=False: trace(16),
    "trace, each answer": lambda window, every=1, revisit=False: trace(16, every=max(1, every)),
    "bptt(16)": lambda window, every=1, revisit=False: bptt(16, every=every, revisit=every > 1),
    "immediate": lambda window, every=1, revisit=False: immediate(),
}
"""From what the recipe asks of its rule."""


def run(data: Path, stream: str, rule: str, seed: int) -> Record:
    common: dict[str, Any] = {"opponents": (), "seed": seed}
    for name in ("pliant.recipes.digits", "pliant.recipes.series"):
        recipe: Any = importlib.import_module(name)
        recipe.rule_named = lambda name, window, steps, **more: RULES[rule](window, **more)
    if stream == PIXELS:
        config = digits.DigitsConfig(by="pixel", answers=ANSWERS, every=EVERY, **common)
        summary, _ = driven(digits, config)
    else:
        keep = KEEP if stream.endswith(KEPT[0]) else ()
        options = options_of(stream.removesuffix(KEPT[0]), data)
        summary, _ = driven(series, series.SeriesConfig(**options, **common, keep=keep))
    return {"bits": summary["members"]["pliant"]["bits"], "answers": summary["answers"],
            "cpu seconds": round(summary["cpu_seconds"]["pliant"], 2)}  # fmt: skip


def trials_in(data: Path) -> Trials:
    return Trials(FILE, partial(run, data), told=lambda record: f"{record['bits']:.4f}")


def work(streams: Sequence[str], rules: Sequence[str], seeds: Sequence[int], data: Sequence[Path]) -> None:
    trials = trials_in(data[0])
    for seed in seeds:
        for stream in streams:
            for rule in rules:
                trials.once(stream=stream, rule=rule, seed=seed)


BEGIN, END = "<!-- streams, by `python benchmarks/rules.py --draw` -->", "<!-- end of streams -->"
ABOUT = """
Bits per answer, and microseconds of processor time for each, on the streams of the main job, {seeds} seeds; all else as
`pliant learn` does by itself. By default the answers within a window are learned from again at each update.
*trace, each answer*: an update after each question's answers, which is the same run where a question holds a chunk.
*kept*: with `--keep normalize-project,isometry`.
"""


def by_rule(records: Sequence[Record], seeds: Sequence[int]) -> dict[str, dict[str, list[Record]]]:
    """Runs of each rule by stream; of those with all seeds."""
    found: dict[str, dict[str, list[Record]]] = {}
    for record in records:
        key = record["key"]
        if key["seed"] in seeds:
            found.setdefault(key["rule"], {}).setdefault(key["stream"], []).append(record)
    return {rule: {stream: runs for stream, runs in of.items() if len(runs) == len(seeds)}
            for rule, of in found.items()}  # fmt: skip


def bits(runs: Sequence[Record]) -> float:
    return statistics.fmean(run["bits"] for run in runs)


def micros(runs: Sequence[Record]) -> float:
    return statistics.median(1e6 * run["cpu seconds"] / run["answers"] for run in runs)


def draw(records: Sequence[Record], seeds: Sequence[int]) -> None:
    found = by_rule(records, seeds)
    streams = [stream for stream in PLACES if any(stream in by for by in found.values())]
    rows = [f"| | {' | '.join(found)} |", "| --- " * (len(found) + 1) + "|"]
    for stream in streams:
        cells = [f"{bits(by[stream]):.4f}, {micros(by[stream]):,.0f} µs" if stream in by else ""
                 for by in found.values()]  # fmt: skip
        rows.append(f"| {stream} | {' | '.join(cells)} |")
    before, rest = PAGE.read_text().split(BEGIN)
    text = "\n".join([before + BEGIN, ABOUT.format(seeds=len(seeds)), *rows, "", END])
    PAGE.write_text(text + rest.split(END)[1])


def ledger(records: Sequence[Record], seeds: Sequence[int]) -> None:
    found = by_rule(records, seeds)
    ours = found["as by default"]
    others = {rule: by for rule, by in found.items() if set(by) == set(ours) and rule != "as by default"}
    ahead = {rule: {stream: bits(by[stream]) - bits(ours[stream]) for stream in ours} for rule, by in others.items()}
    append(
        "learn: no learning rule takes fewer bits than the default on more than a third of the streams",
        "python benchmarks/rules.py --data FOLDER; --ledger",
        {**{f"{rule}, {stream}: bits above the default": value for rule, by in ahead.items()
            for stream, value in by.items()}, "seeds": len(seeds)},
        holds=all(sum(value < -0.002 for value in by.values()) <= len(by) / 3 for by in ahead.values()),
    )  # fmt: skip


if __name__ == "__main__":
    trials_in(Path()).command(
        work, draw, ledger, streams=PLACES, rules=list(RULES), seeds=SEEDS, data=[Path("shared/data")]
    )
