"""Mixers in the main job, online: what they take in bits, and in processor time. Also: do sharper weights help?

python benchmarks/mixers.py --data FOLDER        # whatever is missing in docs/results/mixers.jsonl
python benchmarks/mixers.py --draw               # docs/online.md, docs/online.svg
python benchmarks/mixers.py --ledger

FOLDER holds `streams`, the layout that `pliant.streams.named` reads. Streams are those of `pliant learn digits` and
`pliant learn series`, with all else as it is by default. Each mixer has the rate of the recipe and a third of it, tried
on each stream with a seed of its own; the one with fewer bits is run with other seeds. Set OMP_NUM_THREADS=1.

Weights of attention, of the scales of MS-SSM, and of the answers themselves (the read-out) are made sharper, each
beside the same with softmax. On tables, the default also gets as much more time as other mixers take, by its own dials.
"""

import math
import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from _ledger import DOCS, append
from _trials import Record, Trials
from streams import driven, options_of
from torch import Tensor

from pliant import mixers as known_mixers
from pliant.kernels import adaptive_softmax
from pliant.mixers import MultiScaleSSM
from pliant.mixers.multi_scale import ScaleWeights
from pliant.models import SequenceClassifier
from pliant.models.table import TableModel
from pliant.recipes import digits, series
from pliant.report.style import BLUE, ORANGE, STYLE

FILE, PAGE = DOCS / "results" / "mixers.jsonl", DOCS / "online.md"
TUNING, SEEDS, SHARES = 100, (0, 1, 2), (1.0, 1 / 3)
RATE = 3e-3
"""Of both recipes."""
DEFAULT, SOFTMAX = "GatedLRU", "WindowAttention"
SCALES, READOUT = "MS-SSM, softmax weights", "GatedLRU, adaptive read-out"
MIXERS: dict[str, tuple[str, dict[str, Any] | None]] = {
    DEFAULT: ("GatedLRU", None),
    "MS-SSM": ("MultiScaleSSM", {}),
    "MS-SSM, selective": ("MultiScaleSSM", {"selective": True}),
    "S6": ("S6", {}),
    "MultiresConv": ("MultiresConv", {}),
    SOFTMAX: ("WindowAttention", {"window": 64}),
    "WindowAttention, adaptive": ("WindowAttention", {"window": 64, "sharpen": "adaptive"}),
    "WindowAttention, perplexity": ("WindowAttention", {"window": 64, "sharpen": "perplexity"}),
    SCALES: ("MultiScaleSSM", {"weights": "softmax"}),
    "MS-SSM, adaptive weights": ("SharpScales", {}),
    READOUT: ("GatedLRU", None),
}
SHARP = {"WindowAttention, adaptive": SOFTMAX, "WindowAttention, perplexity": SOFTMAX,
         "MS-SSM, adaptive weights": SCALES, READOUT: DEFAULT}  # fmt: skip
"""Beside which softmax each stands."""
DIALS: dict[str, tuple[str, dict[str, Any]]] = {
    f"{mixer}, {dial.replace('=', ' ')}": (mixer, {dial.split("=")[0]: int(dial.split("=")[1])})
    for mixer in (DEFAULT, "MultiresConv", "MS-SSM")
    for dial in ("size=2", "size=4", "chunk=4")
}
"""Of `pliant learn series`; on tables alone."""
ROWS = {"electricity": 12_000, "weather": 12_000, "outdoor": None, "regimes": 20_000}
STREAMS = ("digits, permute", "digits, random", *ROWS)


class _SharpWeights(ScaleWeights):
    def forward(self, x: Tensor) -> Tensor:
        return adaptive_softmax(self.linear(x))


class SharpScales(MultiScaleSSM):
    """With `adaptive_softmax` in the place of softmax over scales."""

    def __init__(self, width: int):
        super().__init__(width, weights="softmax")
        self.weights.__class__ = _SharpWeights
        self.weights.kind = "channel"  # has no pass of its own for one step


class _SharpReadout:
    """A model whose answers are those of `adaptive_softmax`."""

    descend = None

    def forward(self, *args: Any, **options: Any) -> Any:
        output, state = super().forward(*args, **options)  # type: ignore[misc]
        return adaptive_softmax(output).clamp_min(1e-30).log(), state


class SharpClassifier(_SharpReadout, SequenceClassifier):
    """For digits."""


class SharpTable(_SharpReadout, TableModel):
    """For tables with classes."""


def run(data: Path, mixer: str, stream: str, rate: float, seed: int) -> Record:
    of, dials = DIALS.get(mixer, (mixer, {}))
    name, options = MIXERS[of]
    if name == SharpScales.__name__:
        known_mixers.SharpScales = SharpScales  # type: ignore[attr-defined]
        known_mixers.__all__ = [*known_mixers.__all__, name]
    sequence, table = (SharpClassifier, SharpTable) if mixer == READOUT else (SequenceClassifier, TableModel)
    more: dict[str, Any] = {"mixer": name, "mixer_options": options}
    common: dict[str, Any] = {"opponents": (), "seed": seed, "lr": rate}
    recipe: Any = digits if stream.startswith("digits") else series
    if recipe is digits:
        recipe.SequenceClassifier = SimpleNamespace(sized=partial(sequence.sized, **more))
        config: Any = digits.DigitsConfig(change=stream.split(", ")[1], **common)  # type: ignore[arg-type]
    else:
        recipe.TableModel = lambda columns, **sizes: table(columns, **(sizes | more))
        named = {"stream": "regimes"} if stream == "regimes" else options_of(stream, data)
        config = series.SeriesConfig(**named, rows=ROWS[stream], **common, **dials)
    summary, _ = driven(recipe, config)
    bits, seconds = summary["members"]["pliant"]["bits"], summary["cpu_seconds"]["pliant"]
    return {"mean": -bits, "bits": bits, "parameters": summary["parameters"], "cpu seconds": round(seconds, 1)}


def trials_in(data: Path) -> Trials:
    return Trials(FILE, partial(run, data), TUNING, ("mean", "bits", "cpu seconds"))


def work(mixers: Sequence[str], streams: Sequence[str], seeds: Sequence[int], data: Sequence[Path]) -> None:
    trials = trials_in(data[0])
    for stream in streams:
        for mixer in mixers:
            if mixer in DIALS and stream not in ROWS:
                continue
            tried = [{"mixer": mixer, "stream": stream, "rate": RATE * share, "seed": TUNING} for share in SHARES]
            rate = trials.best(tried)["rate"]
            for seed in seeds:
                trials.once(mixer=mixer, stream=stream, rate=rate, seed=seed)


HEAD = """# Mixers online

Written by `python benchmarks/mixers.py --draw` from the records in `docs/results/mixers.jsonl`; the head of the script
says what is run. Bits per answer of the streams of the main job with other mixers in place of the default, mean and
standard deviation over {seeds} seeds; less is better. *time*: processor seconds over those of the default, the median
over streams; the default has a pass of its own over all of its blocks.

| mixer | {streams} | rank | time | parameters |
{line}
"""


def by_mixer(records: Sequence[Record], seeds: Sequence[int]) -> dict[str, dict[str, list[Record]]]:
    """Runs of each mixer by stream; of those that have been run to the end."""
    found: dict[str, dict[str, list[Record]]] = {
        name: {stream: [] for stream in (ROWS if name in DIALS else STREAMS)} for name in (*MIXERS, *DIALS)
    }
    for record in records:
        key = record["key"]
        if key["seed"] in seeds:
            found[key["mixer"]][key["stream"]].append(record)
    return {name: of for name, of in found.items() if all(len(runs) >= len(seeds) for runs in of.values())}


def mean(runs: Sequence[Record], name: str = "bits") -> float:
    return statistics.fmean(run[name] for run in runs)


def ranks(found: dict[str, dict[str, list[Record]]]) -> dict[str, float]:
    """The mean over streams, 1 is the fewest bits."""
    places: dict[str, list[int]] = {name: [] for name in found}
    for stream in STREAMS:
        order = sorted(found, key=lambda name: mean(found[name][stream]))
        for place, name in enumerate(order, 1):
            places[name].append(place)
    return {name: statistics.fmean(own) for name, own in places.items()}


def slower(found: dict[str, dict[str, list[Record]]], name: str) -> float:
    ratios = [mean(found[name][s], "cpu seconds") / mean(found[DEFAULT][s], "cpu seconds") for s in STREAMS]
    return statistics.median(ratios)


def draw(records: Sequence[Record], seeds: Sequence[int]) -> None:
    everything = by_mixer(records, seeds)
    found = {name: of for name, of in everything.items() if name in MIXERS}
    rank = ranks(found)
    parts = [
        HEAD.format(seeds=len(seeds), streams=" | ".join(STREAMS), line="| --- " * (len(STREAMS) + 4) + "|").strip()
    ]
    for name in sorted(found, key=rank.__getitem__):
        of = found[name]
        cells = [f"{mean(of[s]):.3f} ± {statistics.stdev(run['bits'] for run in of[s]):.3f}" for s in STREAMS]
        size = f"{of['electricity'][0]['parameters']:,}"
        parts.append(f"| {name} | {' | '.join(cells)} | {rank[name]:.2f} | {slower(found, name):.1f} | {size} |")
    missing = [name for name in MIXERS if name not in found]
    parts += [f"\n**Not run yet: {', '.join(missing)}.**"] if missing else []
    PAGE.write_text("\n".join([*parts, *tables(everything)]) + "\n")
    figure(everything)


TABLES = """
## Bits against time on tables

The default of `pliant learn series`, and the two mixers with a filter bank, wider (`--size`) or with more updates
(`--chunk`). Bits per answer, and in brackets processor seconds of the run. Up to four times the time of the default a
gated LRU has the fewest bits on three of four tables, which keeps it the default. With eight times the filter banks
have fewer on three: `pliant learn series --mixer MultiScaleSSM --size 2`, or `MultiresConv`.

![Bits against processor seconds on four tables](online.svg)
"""
BANKS, BUDGETS, BUDGET = ("MultiresConv", "MS-SSM"), (2, 4, 8), 4
"""BUDGET: by which the default is chosen, in its time."""
SHOWN = (*(name for name in sorted((*DIALS, DEFAULT, "MultiresConv", "MS-SSM"))), "S6")


def tables(found: dict[str, dict[str, list[Record]]]) -> list[str]:
    lines = [TABLES, f"| learner | {' | '.join(ROWS)} |", "| --- " * (len(ROWS) + 1) + "|"]
    for name in (name for name in SHOWN if name in found):
        cells = [f"{mean(found[name][s]):.3f} ± {statistics.stdev(run['bits'] for run in found[name][s]):.3f} "
                 f"({mean(found[name][s], 'cpu seconds'):.1f})" for s in ROWS]  # fmt: skip
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def figure(found: dict[str, dict[str, list[Record]]]) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure

    colors = {DEFAULT: BLUE, "MultiresConv": ORANGE, "MS-SSM": "#009E73", "S6": "#666666"}
    with style.context(["default", STYLE]):
        sheet = Figure(figsize=(7.5, 5))
        for axes, stream in zip(sheet.subplots(2, 2).flat, ROWS, strict=True):
            for name in (name for name in SHOWN if name in found):
                of, runs = name.split(",")[0], found[name][stream]
                seconds, bits = mean(runs, "cpu seconds"), [run["bits"] for run in runs]
                axes.errorbar(seconds, statistics.fmean(bits), statistics.stdev(bits), fmt="o", color=colors[of], ms=4,
                              lw=1, label=of if name == of else None)  # fmt: skip
                axes.annotate(name[len(of) + 2 :], (seconds, statistics.fmean(bits)), (4, 3),
                              textcoords="offset points", fontsize=7, color=colors[of])  # fmt: skip
            axes.set(title=stream, xscale="log", xlabel="processor seconds", ylabel="bits per answer")
            axes.set_xticks([0.5, 1, 2, 5, 10, 20], ["0.5", "1", "2", "5", "10", "20"])
            axes.minorticks_off()
        sheet.legend(*sheet.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4, frameon=False)
        sheet.tight_layout(rect=(0, 0, 1, 0.94))
        sheet.savefig(DOCS / "online.svg", metadata={"Date": None})


def ledger(records: Sequence[Record], seeds: Sequence[int]) -> None:
    everything, command = by_mixer(records, seeds), "python benchmarks/mixers.py --data FOLDER; --ledger"
    found = {name: of for name, of in everything.items() if name in MIXERS}
    figures, budget = figures_of_time(everything), f"{BUDGET} times the time"
    decisive = [bits for name, bits in figures.items() if name.endswith(f", {budget}")]
    append(
        f"learn series: with at most {budget} of the default, MultiresConv or MS-SSM takes fewer bits than any gated "
        "LRU on most of four tables, and so earns to be the default", command, figures | {"seeds": len(seeds)},
        holds=sum(others is not None and others < ours for ours, others in decisive) > len(ROWS) / 2,
        note="fewest bits of the gated LRU, and of the other two, with the dials of docs/online.md",
    )  # fmt: skip
    bits = {f"{name}, {stream}": round(mean(of[stream]), 4) for name, of in found.items() for stream in STREAMS}
    rank = ranks(found)
    append(
        "learn: no other mixer has a better mean rank in bits over six streams than the default, a gated LRU", command,
        {**{f"{name}: rank": value for name, value in rank.items()}, **bits,
         **{f"{name}: time over the default": slower(found, name) for name in found}, "seeds": len(seeds)},
        holds=rank[DEFAULT] <= min(rank.values()),
    )  # fmt: skip
    for name, plain in SHARP.items():
        if {name, plain} <= set(found):
            gains = {stream: mean(found[plain][stream]) - mean(found[name][stream]) for stream in STREAMS}
            better = [gains[s] > math.sqrt(2) * statistics.stdev(run["bits"] for run in found[plain][s])
                      for s in STREAMS]  # fmt: skip
            append(
                f"learn: {name}, takes fewer bits than {plain}, beyond the spread of seeds, on most of six streams",
                command, {**gains, "streams": sum(better)}, holds=sum(better) > len(STREAMS) / 2,
                note="bits of softmax less bits with sharper weights",
            )  # fmt: skip


def within(found: dict[str, dict[str, list[Record]]], mixers: Sequence[str], stream: str, times: float) -> float | None:
    """Fewest bits of these mixers with any dial that takes so many times the time of the default, at most."""
    most = times * mean(found[DEFAULT][stream], "cpu seconds")
    bits = [mean(of[stream]) for name, of in found.items() if name.split(",")[0] in mixers
            and name in (*DIALS, *mixers) and mean(of[stream], "cpu seconds") <= most]  # fmt: skip
    return round(min(bits), 4) if bits else None


def figures_of_time(found: dict[str, dict[str, list[Record]]]) -> dict[str, Any]:
    """Fewest bits within some times the time of the default, of the gated LRU and of those with a filter bank."""
    return {f"{stream}, {times} times the time": [within(found, mixers, stream, times) for mixers in ([DEFAULT], BANKS)]
            for stream in ROWS for times in BUDGETS}  # fmt: skip


if __name__ == "__main__":
    trials_in(Path()).command(work, draw, ledger, mixers=(*MIXERS, *DIALS), streams=STREAMS, seeds=SEEDS, data=[Path()])
