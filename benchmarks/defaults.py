"""What `pliant learn` does by itself, and why: ways of keeping on every stream of the main job, in bits.

python benchmarks/defaults.py --data FOLDER        # whatever is missing in docs/results/defaults.jsonl
python benchmarks/defaults.py --draw               # docs/defaults.md
python benchmarks/defaults.py --ledger

FOLDER holds `streams` and `ett`, the layouts that `pliant.streams.named` reads. Needs river.

digits: each way has three rates, tried with a seed of its own on all three changes; the rate with the fewest bits over
the three is run with other seeds. series: the rate of the recipe, which follows its own rule, for all ways.
"""

import importlib
import statistics
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from _ledger import DOCS, append
from _trials import Record, Trials
from streams import STREAMS as NAMED
from streams import driven, options_of

from pliant.optim import normalize_and_project
from pliant.recipes import digits, series

FILE, PAGE = DOCS / "results" / "defaults.jsonl", DOCS / "defaults.md"
TUNING_SEED, SEEDS = 100, (0, 1, 2)
RATES = (1e-3, 3e-3, 1e-2)
CHANGES = ("permute", "relabel", "random")
STREAMS = [name for name in NAMED if name != "regimes 1M"]


class Way(NamedTuple):
    """Of keeping; joint: projection holds the joint length of gain and bias of each norm too."""

    keep: tuple[str, ...] = ()
    joint: bool = False

    def __str__(self) -> str:
        names = ["normalize-project (joint)" if self.joint and n == "normalize-project" else n for n in self.keep]
        return ", ".join(names) or "none"


PROJECT, FIRE, INIT = "normalize-project", "isometry", "toward-init"
WAYS = (
    Way(), Way((PROJECT,)), Way((FIRE,)), Way((INIT,)), Way(("shrink-perturb",)), Way((PROJECT, FIRE)),
    Way((PROJECT, FIRE), joint=True), Way((PROJECT, FIRE, INIT), joint=True), Way((FIRE, INIT)),
)  # fmt: skip


def default_of(config: Any) -> Way:
    """What a recipe does by itself."""
    return Way(config.keep, joint=isinstance(config, digits.DigitsConfig))


def run(data: Path, recipe: str, stream: str, way: str, rate: float | None, seed: int) -> Record:
    """Bits and the main score of the recipe, in all and over its first and last fifth."""
    one = next(one for one in WAYS if str(one) == way)
    common: dict[str, Any] = {"keep": one.keep, "opponents": (), "seed": seed}
    gains = "joint" if one.joint else "free"
    # By import_module, since the package has a function of the name of this module.
    keeping: Any = importlib.import_module("pliant.optim.keeping")
    keeping.normalize_and_project = lambda *made, **_: normalize_and_project(*made, gains=gains)
    if recipe == "digits":
        summary, rows = driven(digits, digits.DigitsConfig(change=stream, lr=rate, **common))  # type: ignore[arg-type]
    else:
        summary, rows = driven(series, series.SeriesConfig(**options_of(stream, data), **common))
    bits = [row["members"]["pliant"]["bits"] for row in rows if row["members"]["pliant"]["answers"]]
    fifth, ours = max(1, len(bits) // 5), summary["members"]["pliant"]
    main = "accuracy" if "accuracy" in ours else "error"
    return {
        "bits": ours["bits"], main: ours[main], "first": statistics.fmean(bits[:fifth]),
        "last": statistics.fmean(bits[-fifth:]), "cpu seconds": round(summary["cpu_seconds"]["pliant"], 1),
    }  # fmt: skip


def keys(recipe: str, way: Way, streams: Sequence[str], rate: float | None, seeds: Sequence[int]) -> Iterator[Record]:
    for stream in streams:
        for seed in seeds:
            yield {"recipe": recipe, "stream": stream, "way": str(way), "rate": rate, "seed": seed}


def trials_in(data: Path) -> Trials:
    return Trials(FILE, partial(run, data), told=lambda record: f"{record['bits']:.4f}")


def tuned(trials: Trials, way: Way) -> float:
    """The rate with the fewest bits over all changes."""

    def bits(rate: float) -> float:
        return statistics.fmean(trials.once(**key)["bits"] for key in keys("digits", way, CHANGES, rate, [TUNING_SEED]))

    return min(RATES, key=bits)


def work(recipes: Sequence[str], seeds: Sequence[int], data: Sequence[Path]) -> None:
    trials = trials_in(data[0])
    for way in WAYS:
        if "digits" in recipes:
            for key in keys("digits", way, CHANGES, tuned(trials, way), seeds):
                trials.once(**key)
        if "series" in recipes:
            for key in keys("series", way, STREAMS, None, seeds):
                trials.once(**key)


HEAD = """# What is on by default, and why

Written by `python benchmarks/defaults.py --draw` from the records in `docs/results/defaults.jsonl`. Each way of keeping
a learner able to learn (`--keep`) on every stream of the main job, in bits per answer; less is better. Mean and
standard deviation over {seeds} seeds.

By default `pliant learn digits` keeps with **{digits}**, and `pliant learn series` with **{series}**.
*joint*: the projection holds the joint length of gain and bias of each norm too, as `--keep normalize-project` does for
digits; for tables both are free.
"""
OF_DIGITS = """
## digits: forty thousand answers, ten tasks

Each way had three rates, tried with a seed of its own on all three changes; the rate with the fewest bits over the
three is run. *last - first*: bits per answer in the last fifth of the run less those in the first, where tasks change
the order of pixels; below zero, late tasks are learned faster than early ones.
"""
OF_SERIES = """
## series: the seven streams, at the rate of the recipe

Bits per answer more than without keeping, from the same seed; below zero is better.
"""


def draw(records: Sequence[Record], seeds: Sequence[int]) -> None:
    found = by_way(records)
    shown = [str(default_of(recipe)) for recipe in (digits.DigitsConfig(), series.SeriesConfig())]
    parts = [HEAD.format(seeds=len(seeds), digits=shown[0], series=shown[1])]
    parts += [OF_DIGITS, *digits_table({way: of for (recipe, way), of in found.items() if recipe == "digits"})]
    tables = {way: of for (recipe, way), of in found.items() if recipe == "series"}
    parts += [OF_SERIES, *series_table(tables)] if tables else []
    if len(found) < 2 * len(WAYS):
        parts[0] += "\n**Not complete:** ways and streams that are not here have not been run.\n"
    PAGE.write_text("\n".join(parts) + "\n")


Runs = dict[str, list[Record]]
"""Of a way, by stream."""


def by_way(found: Sequence[Record]) -> dict[tuple[str, str], Runs]:
    ways: dict[tuple[str, str], Runs] = {}
    for record in found:
        key = record["key"]
        if key["seed"] != TUNING_SEED:
            ways.setdefault((key["recipe"], key["way"]), {}).setdefault(key["stream"], []).append(record)
    return ways


def spread(values: list[float], sign: str = "") -> str:
    apart = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):{sign}.3f} ± {apart:.3f}"


def over_changes(runs: Runs) -> float:
    return statistics.fmean(record["bits"] for change in CHANGES for record in runs[change])


def digits_table(ways: dict[str, Runs]) -> list[str]:
    whole = {way: runs for way, runs in ways.items() if set(CHANGES) <= set(runs)}
    rows = [f"| way | rate | {' | '.join(CHANGES)} | mean | last - first |", "| --- " * (len(CHANGES) + 4) + "|"]
    for way in sorted(whole, key=lambda way: over_changes(whole[way])):
        runs = whole[way]
        bits = [spread([record["bits"] for record in runs[change]]) for change in CHANGES]
        change = spread([record["last"] - record["first"] for record in runs["permute"]], "+")
        rate = runs["permute"][0]["key"]["rate"]
        rows.append(f"| {way} | {rate:g} | {' | '.join(bits)} | {over_changes(runs):.3f} | {change} |")
    return rows


def over_none(runs: Runs, none: Runs, stream: str) -> list[float]:
    base = {record["key"]["seed"]: record["bits"] for record in none.get(stream, [])}
    return [r["bits"] - base[r["key"]["seed"]] for r in runs.get(stream, []) if r["key"]["seed"] in base]


def series_table(ways: dict[str, Runs]) -> list[str]:
    none = ways.get(str(Way()), {})
    streams = [stream for stream in STREAMS if stream in none]
    rows = [f"| way | {' | '.join(streams)} |", "| --- " * (len(streams) + 1) + "|"]
    rows.append("| none, bits | " + " | ".join(f"{spread([r['bits'] for r in none[s]])}" for s in streams) + " |")
    for way, runs in ways.items():
        if way == str(Way()):
            continue
        more = [over_none(runs, none, stream) for stream in streams]
        rows.append(f"| {way} | {' | '.join(spread(values, '+') if values else '' for values in more)} |")
    return rows


def ledger(records: Sequence[Record], seeds: Sequence[int]) -> None:
    found = by_way(records)
    ways = {way: of for (recipe, way), of in found.items() if recipe == "digits" and set(CHANGES) <= set(of)}
    default = str(default_of(digits.DigitsConfig()))
    bits = {way: over_changes(runs) for way, runs in ways.items()}
    append(
        "learn digits: no way of keeping takes fewer bits over the three changes than the default",
        "python benchmarks/defaults.py --ledger",
        {**{f"{way}: bits": value for way, value in bits.items()}, "seeds": len(seeds), "rates each": len(RATES)},
        holds=next((value for way, value in bits.items() if way == default), float("inf"))
        <= min(bits.values()) + 0.005,
        note="a difference below 0.005 bits counts as none",
    )
    tables = {way: of for (recipe, way), of in found.items() if recipe == "series" and set(STREAMS) <= set(of)}
    more = {way: {stream: statistics.fmean(over_none(runs, tables["none"], stream)) for stream in STREAMS}
            for way, runs in tables.items() if way != "none"}  # fmt: skip
    if more:
        append(
            "learn series: no way of keeping takes 0.01 bits a row less than none, which is the default, on more than "
            "one of the seven streams",
            "python benchmarks/defaults.py --ledger",
            {f"{way}, {stream}": value for way, by in more.items() for stream, value in by.items()}
            | {"seeds": len(seeds)},
            holds=all(sum(value < -0.01 for value in by.values()) <= 1 for by in more.values()),
        )


if __name__ == "__main__":
    trials_in(Path()).command(work, draw, ledger, recipes=("digits", "series"), seeds=SEEDS, data=(Path(),))
