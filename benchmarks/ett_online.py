"""ETTh1 online: all seven numbers 96, 192, 336 and 720 hours on, each learned from when it has come, and not before.

ETT=FOLDER python benchmarks/ett_online.py          # whatever is missing in docs/results/ett-online.jsonl
python benchmarks/ett_online.py --draw              # a section of docs/ms-ssm.md
python benchmarks/ett_online.py --ledger

FOLDER holds ETTh1.csv. The main job, `pliant learn series --horizon H`, over all 17,420 hours from the first, with
mixers in place of the default and with all else as it is; beside it what stands there by itself: no-change, the value
of the same hour of the newest day that is known (seasonal), and the mean. The rate of the recipe, three times and a
third of it are tried at 96 hours with a seed of their own; the fewest bits decide. Set OMP_NUM_THREADS=1.
"""

import math
import os
import statistics
from collections.abc import Sequence
from pathlib import Path

from _ledger import DOCS, append
from _ms_ssm_page import put, spread, table
from _trials import Record, Trials
from streams import driven

from pliant.recipes import series

NUMBERS = ("HUFL", "HULL", "MUFL", "MULL", "LUFL", "LULL", "OT")
HORIZONS = (96, 192, 336, 720)
NETS: dict[str, series.MixerName] = {
    "gated LRU": "GatedLRU",
    "MS-SSM": "MultiScaleSSM",
    "MultiresConv": "MultiresConv",
}
OPPONENTS: tuple[series.Opponent, ...] = ("no-change", "seasonal", "mean")
OF_ITSELF = "opponents"
METHODS = (*NETS, OF_ITSELF)
SHARES = (1.0, 3.0, 1 / 3)
TUNING, SEEDS = 100, (0, 1, 2)


def run(method: str, horizon: int, share: float, seed: int) -> Record:
    """Bits and relative error of the learner; of a run with all opponents theirs."""
    file = Path(os.environ.get("ETT", "../shared/data/ett")) / "ETTh1.csv"
    config = series.SeriesConfig(
        data=str(file), target=NUMBERS, time="date", season=24, horizon=horizon, seed=seed,
        mixer=NETS.get(method, "GatedLRU"),
        lr=share * series.LR / math.sqrt(horizon), opponents=OPPONENTS if method == OF_ITSELF else ("no-change",),
    )  # fmt: skip
    summary, _ = driven(series, config)
    names = OPPONENTS if method == OF_ITSELF else ("pliant",)
    found = {who: {what: summary["members"][who][what] for what in ("bits", "relative_error")} for who in names}
    best = found[names[0]]["bits"]
    return {"mean": -best, "members": found, "answers": summary["answers"],
            "cpu seconds": round(summary["cpu_seconds"]["pliant"], 1)}  # fmt: skip


TRIALS = Trials(DOCS / "results" / "ett-online.jsonl", run, tuning=TUNING)


def work(methods: Sequence[str], horizons: Sequence[int], seeds: Sequence[int]) -> None:
    for method in methods:
        share = 1.0
        if method in NETS:
            tried = [{"method": method, "horizon": HORIZONS[0], "share": share, "seed": TUNING} for share in SHARES]
            share = TRIALS.best(tried)["share"]
        for seed in seeds if method in NETS else [0]:
            for horizon in horizons:
                TRIALS.once(method=method, horizon=horizon, share=share, seed=seed)


def found(records: Sequence[Record], seeds: Sequence[int], what: str) -> dict[str, list[list[float]]]:
    """By name and horizon what was measured for each seed."""
    there = {name: [[r["members"]["pliant"][what] for r in records
                     if (r["key"]["method"], r["key"]["horizon"]) == (name, horizon) and r["key"]["seed"] in seeds]
                    for horizon in HORIZONS] for name in NETS}  # fmt: skip
    alone = {r["key"]["horizon"]: r["members"] for r in records if r["key"]["method"] == OF_ITSELF}
    there |= {name: [[alone[h][name][what]] if h in alone else [] for h in HORIZONS] for name in OPPONENTS}
    return {name: values for name, values in there.items() if all(values)}


def draw(records: Sequence[Record], seeds: Sequence[int]) -> None:
    lines = [f"Mean and deviation over {len(seeds)} seeds of the nets."]
    for what, title, digits in (("bits", "Bits an hour, all seven numbers together", 2),
                                ("relative_error", "Absolute error over that of no-change", 3)):  # fmt: skip
        of = found(records, seeds, what)
        rows = [[name, *(spread(values, digits) for values in of[name])] for name in of]
        lines += ["", f"{title}:", "", *table(("learner", *(f"{h} hours" for h in HORIZONS)), rows)]
    seconds = {name: [r["cpu seconds"] for r in records if r["key"]["method"] == name] for name in NETS}
    times = "; ".join(f"{name} {statistics.median(own):.0f}" for name, own in seconds.items() if own)
    lines += ["", f"Processor seconds of a run: {times}."]
    put("ett online", lines)


def ledger(records: Sequence[Record], seeds: Sequence[int]) -> None:
    bits = {name: [round(statistics.fmean(own), 3) for own in of] for name, of in found(records, seeds, "bits").items()}
    error = {f"{name}, relative error": [round(statistics.fmean(own), 4) for own in of]
             for name, of in found(records, seeds, "relative_error").items()}  # fmt: skip
    append(
        "ETTh1 online at 96, 192, 336 and 720 hours, labels as late as they come: MS-SSM takes fewer bits than the "
        "gated LRU, no-change, the same hour of the day before, and the mean, at each horizon",
        "ETT=FOLDER python benchmarks/ett_online.py; --draw; --ledger", bits | error,
        holds=all(mine <= min(others) for mine, *others in zip(bits["MS-SSM"], *(
            own for name, own in bits.items() if name not in ("MS-SSM", "MultiresConv")), strict=True)),
        note=f"{len(seeds)} seeds; bits an hour, all seven numbers together",
    )  # fmt: skip


if __name__ == "__main__":
    TRIALS.command(work, draw, ledger, methods=METHODS, horizons=HORIZONS, seeds=SEEDS)
