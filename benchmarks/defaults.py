"""What `pliant learn` does by itself, and why: ways of keeping on every stream of the main job, in bits.

python benchmarks/defaults.py --data FOLDER        # whatever is missing in docs/results/defaults.jsonl
python benchmarks/defaults.py --draw               # docs/defaults.md
python benchmarks/defaults.py --ledger

FOLDER holds `streams` and `ett`, the layouts that `pliant.streams.named` reads. Needs river.

digits: each way has three rates, tried with a seed of its own on all three changes; the rate with the fewest bits over
the three is run with other seeds. series: the rate of the recipe, which follows its own rule, for all ways.
"""

import argparse
import dataclasses
import functools
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _ledger import DOCS, append

import pliant.optim.keeping as keeping
from pliant.core.run import Run
from pliant.optim import normalize_and_project
from pliant.recipes import digits, drive, series

FILE, PAGE = DOCS / "results" / "defaults.jsonl", DOCS / "defaults.md"
TUNING_SEED, SEEDS = 100, (0, 1, 2)
RATES = (1e-3, 3e-3, 1e-2)
CHANGES = ("permute", "relabel", "random")
STREAMS: dict[str, dict[str, Any]] = {
    "electricity": {"stream": "electricity", "data": "streams"},
    "weather": {"stream": "weather", "data": "streams"},
    "outdoor": {"stream": "outdoor", "data": "streams"},
    "ett": {"stream": "ett", "data": "ett"},
    "river:TrumpApproval": {"stream": "river:TrumpApproval"},
    "river:ImageSegments": {"stream": "river:ImageSegments"},
    "regimes": {"stream": "regimes", "rows": 50_000},
}


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


def run(way: Way, key: dict[str, Any], data: Path) -> dict[str, Any]:
    """Bits and the main score of the recipe, in all and over its first and last fifth."""
    recipe: Any = digits if key["recipe"] == "digits" else series
    if recipe is digits:
        options: dict[str, Any] = {"change": key["stream"], "lr": key["rate"]}
    else:
        options = dict(STREAMS[key["stream"]])
        options |= {"data": str(data / options["data"])} if "data" in options else {}
    config = (digits.DigitsConfig if recipe is digits else series.SeriesConfig)(
        **options, keep=way.keep, opponents=(), seed=key["seed"]
    )
    gains = "joint" if way.joint else "free"
    keeping.normalize_and_project = functools.partial(normalize_and_project, gains=gains)  # type: ignore[assignment]
    torch.set_num_threads(1)
    task = recipe.task(config)
    with tempfile.TemporaryDirectory() as folder:
        folder_run = Run(Path(folder) / "run")
        folder_run.create(recipe.COMMAND, dataclasses.asdict(config), threads=1)
        task.begin(folder_run)
        driving = drive.Driving(report=False, save_every=10**9)
        summary = drive.drive(folder_run, task.life(), driving=driving, show=lambda *_: None, row=task.row)
        lines = (Path(folder) / "run" / "records.jsonl").read_text().splitlines()
    assert summary is not None
    rows = [json.loads(line)["members"]["pliant"] for line in lines]
    rows = [row for row in rows if row["answers"]]
    fifth = max(1, len(rows) // 5)
    ours = summary["members"]["pliant"]
    main = "accuracy" if "accuracy" in ours else "error"
    return {
        "bits": ours["bits"],
        main: ours[main],
        "first": statistics.fmean(row["bits"] for row in rows[:fifth]),
        "last": statistics.fmean(row["bits"] for row in rows[-fifth:]),
        "cpu_seconds": summary["cpu_seconds"]["pliant"],
    }


def records() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FILE.read_text().splitlines()] if FILE.exists() else []


def once(key: dict[str, Any], way: Way, data: Path) -> dict[str, Any]:
    """The record of a run, which is made if it is not there."""
    for record in records():
        if record["key"] == key:
            return record
    record = {"key": key, **run(way, key, data)}
    FILE.parent.mkdir(exist_ok=True)
    with open(FILE, "a") as file:
        file.write(json.dumps(record) + "\n")
    print(*key.values(), f"{record['bits']:.4f}", f"{record['cpu_seconds']:.0f} s", flush=True)
    return record


def keys(recipe: str, way: Way, streams: tuple[str, ...], rates: tuple[Any, ...], seeds: tuple[int, ...]) -> Iterator:
    for rate in rates:
        for stream in streams:
            for seed in seeds:
                yield {"recipe": recipe, "stream": stream, "way": str(way), "rate": rate, "seed": seed}


def of_digits(way: Way, data: Path, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    def bits(rate: float) -> float:
        tried = keys("digits", way, CHANGES, (rate,), (TUNING_SEED,))
        return statistics.fmean(once(key, way, data)["bits"] for key in tried)

    best = min(RATES, key=bits)
    return [once(key, way, data) for key in keys("digits", way, CHANGES, (best,), seeds)]


def of_series(way: Way, data: Path, seeds: tuple[int, ...]) -> list[dict[str, Any]]:
    return [once(key, way, data) for key in keys("series", way, tuple(STREAMS), (None,), seeds)]


HEAD = """# What is on by default, and why

Written by `python benchmarks/defaults.py --draw` from the records in `docs/results/defaults.jsonl`. Each way of keeping
a learner able to learn (`--keep`) on every stream of the main job, in bits per answer; less is better. Mean and
standard deviation over {seeds} seeds.

By default `pliant learn digits` keeps with **{digits}**, and `pliant learn series` with **{series}**.
*joint*: the projection holds the joint length of gain and bias of each norm too.
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


def draw() -> None:
    found = by_way(records())
    seeds = max((len(runs) for of in found.values() for runs in of.values()), default=0)
    shown = [", ".join(recipe.keep) or "none" for recipe in (digits.DigitsConfig(), series.SeriesConfig())]
    parts = [HEAD.format(seeds=seeds, digits=shown[0], series=shown[1])]
    parts += [OF_DIGITS, *digits_table({way: of for (recipe, way), of in found.items() if recipe == "digits"})]
    tables = {way: of for (recipe, way), of in found.items() if recipe == "series"}
    parts += [OF_SERIES, *series_table(tables)] if tables else []
    if len(found) < 2 * len(WAYS):
        parts[0] += "\n**Not complete:** ways and streams that are not here have not been run.\n"
    PAGE.write_text("\n".join(parts) + "\n")


Runs = dict[str, list[dict[str, Any]]]
"""Of a way, by stream."""


def by_way(found: list[dict[str, Any]]) -> dict[tuple[str, str], Runs]:
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


def ledger() -> None:
    found = by_way(records())
    ways = {way: of for (recipe, way), of in found.items() if recipe == "digits" and set(CHANGES) <= set(of)}
    default = ", ".join(digits.DigitsConfig().keep) or "none"
    bits = {way: over_changes(runs) for way, runs in ways.items()}
    append(
        "learn digits: no way of keeping takes fewer bits over the three changes than the default",
        "python benchmarks/defaults.py --ledger",
        {**{f"{way}: bits": value for way, value in bits.items()}, "seeds": len(SEEDS), "rates each": len(RATES)},
        holds=next((value for way, value in bits.items() if way == default), float("inf"))
        <= min(bits.values()) + 0.005,
        note="a difference below 0.005 bits counts as none",
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path)
    parser.add_argument("--recipes", nargs="*", default=["digits", "series"])
    parser.add_argument("--draw", action="store_true")
    parser.add_argument("--ledger", action="store_true")
    options = parser.parse_args()
    if options.draw or options.ledger:
        draw()
        return ledger() if options.ledger else None
    for recipe in options.recipes:
        for way in WAYS:
            (of_digits if recipe == "digits" else of_series)(way, options.data, SEEDS)


if __name__ == "__main__":
    main()
