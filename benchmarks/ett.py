"""ETTh1, the next 96, 192, 336 and 720 hours: small recurrent nets, a DLinear and no-change, on the standard split.

python benchmarks/ett.py --draw                     # a section of docs/ms-ssm.md, and docs/ett.svg
python benchmarks/ett.py --ledger
ETT=FOLDER python benchmarks/ett.py                 # whatever is missing in docs/results/ett.jsonl

FOLDER holds ETTh1.csv (Zhou et al. 2021, arXiv:2012.07436). Standard split: 12, 4 and 4 months; scale: mean and
deviation of the train part; all seven numbers; every window, the last batch too, which some published figures leave
out. All see 336 hours. Learned are the mean and the deviation of each hour, for all seven numbers by the same
parameters (but for the deviations of DLinear); the rate is chosen at 96 hours on the validation part, as is the moment
at which training stops. DLinear: Zeng et al. 2023, Are transformers effective for time series forecasting,
arXiv:2205.13504. Set OMP_NUM_THREADS=1.
"""

import math
import os
import statistics
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _ledger import DOCS, append
from _ms_ssm_page import put, spread, table
from _trials import Record, Trials
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import mixture_nats, seeded
from pliant.core.seeds import generator
from pliant.models import SequenceClassifier
from pliant.report.style import BLUE, ORANGE, STYLE

TRAIN, VALID, TEST = 8640, 11520, 14400
HORIZONS = (96, 192, 336, 720)
SEEN, PATCH, TREND = 336, 16, 25
NETS = {"MS-SSM": "MultiScaleSSM", "gated LRU": "GatedLRU"}
REFERENCES = {"no-change": 1, "yesterday": 24}
"""The newest values again and again: the last hour, or the last day."""
METHODS = (*NETS, "DLinear", *REFERENCES)
RATES = (1e-3, 3e-3, 1e-2)
WIDTH, DEPTH, UPDATES, BATCH, LOOKS, THIN = 32, 2, 360, 32, 6, 8
"""LOOKS: at the validation part, at every THIN-th window of it."""
TUNING, SEEDS = 100, (0, 1, 2)


@cache
def series() -> Tensor:
    """`(hours, 7)` in units of the train part."""
    file = Path(os.environ.get("ETT", "../shared/data/ett")) / "ETTh1.csv"
    raw = np.loadtxt(file, delimiter=",", skiprows=1, usecols=range(1, 8), max_rows=TEST)
    return torch.from_numpy((raw - raw[:TRAIN].mean(0)) / raw[:TRAIN].std(0)).float()


def windows(first: int, last: int, horizon: int, every: int = 1) -> tuple[Tensor, Tensor]:
    """What is seen `(n, SEEN, 7)` and what follows `(n, H, 7)`, the latter from `first` up to `last`."""
    found = series()[max(0, first - SEEN) : last].unfold(0, SEEN + horizon, 1)[::every].transpose(1, 2)
    return found[:, :SEEN], found[:, SEEN:]


class Forecaster(nn.Module):
    """The rest of a window `(n, 7, H, 3)`, as a mixture of one, each number by itself, above its newest value."""

    def __init__(self, mixer: str, horizon: int):
        super().__init__()
        self.net = SequenceClassifier(PATCH, 1, width=WIDTH, depth=DEPTH, mixer=mixer, head="forecast",
                                      horizon=horizon, normalize=False)  # fmt: skip

    def forward(self, seen: Tensor) -> Tensor:
        newest = seen[:, -1]
        features = (seen - newest[:, None]).unflatten(1, (-1, PATCH)).movedim(2, -1)  # (n, T, 7, PATCH)
        output = self.net(features)[0][:, -1, ..., 0, :]
        return output + F.pad(newest[..., None, None], (1, 1))


class DLinear(nn.Module):
    """A moving average and what is left of it, a linear map for each; and a deviation for each number and hour."""

    def __init__(self, horizon: int):
        super().__init__()
        self.trend, self.rest = nn.Linear(SEEN, horizon), nn.Linear(SEEN, horizon)
        self.log_deviation = nn.Parameter(torch.zeros(7, horizon))

    def forward(self, seen: Tensor) -> Tensor:
        x = seen.transpose(1, 2)
        trend = F.avg_pool1d(F.pad(x, (TREND // 2, TREND // 2), mode="replicate"), TREND, 1)
        mean = self.trend(trend) + self.rest(x - trend)
        return torch.stack([torch.zeros_like(mean), mean, self.log_deviation.expand_as(mean)], -1)


class Again(nn.Module):
    """The last values once more, with the deviation that this has for each hour in the train part."""

    def __init__(self, period: int, horizon: int):
        super().__init__()
        self.period, self.horizon = period, horizon
        seen, follow = windows(0, TRAIN, horizon, THIN)
        error = follow.transpose(1, 2) - self.mean(seen)
        self.log_deviation = error.square().mean(0).sqrt().log()  # (7, H)

    def mean(self, seen: Tensor) -> Tensor:
        last = seen[:, -self.period :].transpose(1, 2)
        return last.repeat(1, 1, -(-self.horizon // self.period))[..., : self.horizon]

    def forward(self, seen: Tensor) -> Tensor:
        mean = self.mean(seen)
        return torch.stack([torch.zeros_like(mean), mean, self.log_deviation.expand_as(mean)], -1)


def score(model: nn.Module, seen: Tensor, follow: Tensor) -> dict[str, float]:
    """Squared and absolute error, and bits, each a number and hour."""
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for x, y in zip(seen.split(64), follow.transpose(1, 2).split(64), strict=True):
            output = model(x)
            error = output[..., 1] - y
            nats = mixture_nats(output, y)
            sums += torch.stack([part.double().sum() for part in (error.square(), error.abs(), nats)])
    squared, absolute, nats_ = (sums / follow.numel()).tolist()
    return {"mse": round(squared, 4), "mae": round(absolute, 4), "bits": round(nats_ / math.log(2), 4)}


def run(method: str, horizon: int, rate: float, seed: int) -> Record:
    torch.set_num_threads(1)
    began = time.process_time()
    valid, test = windows(TRAIN, VALID, horizon, THIN), windows(VALID, TEST, horizon)
    if method in REFERENCES:
        model: nn.Module = Again(REFERENCES[method], horizon)
        best = score(model, *valid)["mse"]
    else:
        with seeded(seed, "ett"):
            model = DLinear(horizon) if method == "DLinear" else Forecaster(NETS[method], horizon)
        best = learn(model, rate, horizon, seed, valid)
    found = {"mean": -best} if seed == TUNING else {"mean": -best, **score(model, *test)}
    parameters = sum(p.numel() for p in model.parameters())
    return found | {"parameters": parameters, "windows": len(test[0]),
                    "cpu seconds": round(time.process_time() - began, 1)}  # fmt: skip


def learn(model: nn.Module, rate: float, horizon: int, seed: int, valid: tuple[Tensor, Tensor]) -> float:
    """Train, and go back to where the validation part had its least squared error, which is returned."""
    seen, follow = windows(0, TRAIN, horizon)
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=UPDATES)
    random, best, kept = generator(seed, "ett/batches"), math.inf, model.state_dict()
    for update in range(1, UPDATES + 1):
        rows = torch.randint(len(seen), (BATCH,), generator=random)
        optimizer.zero_grad()
        mixture_nats(model(seen[rows]), follow[rows].transpose(1, 2)).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if update % (UPDATES // LOOKS) == 0 and (error := score(model, *valid)["mse"]) < best:
            best, kept = error, {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(kept)
    return best


TRIALS = Trials(DOCS / "results" / "ett.jsonl", run, tuning=TUNING)


def work(methods: Sequence[str], horizons: Sequence[int], seeds: Sequence[int]) -> None:
    for method in methods:
        rate = 0.0
        if method not in REFERENCES:
            tried = [{"method": method, "horizon": HORIZONS[0], "rate": rate, "seed": TUNING} for rate in RATES]
            rate = TRIALS.best(tried)["rate"]
        for seed in [0] if method in REFERENCES else seeds:
            for horizon in horizons:
                TRIALS.once(method=method, horizon=horizon, rate=rate, seed=seed)


# What is made of the runs.


def of(records: Sequence[Record], method: str, horizon: int, seeds: Sequence[int], what: str) -> list[float]:
    return [record[what] for record in records if (record["key"]["method"], record["key"]["horizon"]) ==
            (method, horizon) and record["key"]["seed"] in seeds]  # fmt: skip


def draw(records: Sequence[Record], seeds: Sequence[int]) -> None:
    there = [name for name in METHODS if all(of(records, name, horizon, seeds, "mse") for horizon in HORIZONS)]
    left = [name for name in METHODS if name not in there]
    lines = [f"Mean and deviation over {len(seeds)} seeds." + (f" **Not run yet: {', '.join(left)}.**" if left else "")]
    for what, title in (("mse", "Squared error"), ("mae", "Absolute error"), ("bits", "Bits a value")):
        rows = [[name, *(spread(of(records, name, h, seeds, what)) for h in HORIZONS)] for name in there]
        lines += ["", f"{title}:", "", *table(("method", *(f"{h} hours" for h in HORIZONS)), rows)]
    rows = [[name, *(f"{statistics.fmean(of(records, name, h, seeds, 'cpu seconds')):.0f}" for h in HORIZONS),
             f"{of(records, name, HORIZONS[-1], seeds, 'parameters')[0]:,}"] for name in there]  # fmt: skip
    lines += ["", "Processor seconds of a run, and parameters at 720 hours:", ""]
    put("ett", [*lines, *table(("method", *map(str, HORIZONS), "parameters"), rows), "", "![Squared error](ett.svg)"])
    figure(records, seeds, there)


def figure(records: Sequence[Record], seeds: Sequence[int], there: Sequence[str]) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure

    colors = dict(zip(METHODS, (BLUE, "#56B4E9", ORANGE, "#666666", "#999999"), strict=True))
    with style.context(["default", STYLE]):
        sheet = Figure(figsize=(5.4, 3.2))
        axes = sheet.subplots()
        for name in there:
            means = [statistics.fmean(of(records, name, horizon, seeds, "mse")) for horizon in HORIZONS]
            axes.plot(range(len(HORIZONS)), means, "o-", color=colors[name], ms=4, label=name)
        axes.set_xticks(range(len(HORIZONS)), [str(horizon) for horizon in HORIZONS])
        axes.set_xlabel("hours ahead")
        axes.set_ylabel("squared error")
        axes.set_ylim(0, None)
        axes.legend(frameon=False)
        sheet.tight_layout()
        sheet.savefig(DOCS / "ett.svg", metadata={"Date": None})


def ledger(records: Sequence[Record], seeds: Sequence[int]) -> None:
    figures: dict[str, Any] = {
        f"{name}, squared error": [round(statistics.fmean(of(records, name, h, seeds, "mse")), 4) for h in HORIZONS]
        for name in METHODS
    }
    ours, theirs = (figures[f"{name}, squared error"] for name in ("MS-SSM", "DLinear"))
    append(
        "ETTh1 at 96, 192, 336 and 720 hours: MS-SSM has less squared error than DLinear at each",
        "ETT=FOLDER python benchmarks/ett.py; --draw; --ledger", figures,
        holds=all(a < b for a, b in zip(ours, theirs, strict=True)), note=f"{len(seeds)} seeds, last batch kept",
    )  # fmt: skip


if __name__ == "__main__":
    TRIALS.command(work, draw, ledger, methods=METHODS, horizons=HORIZONS, seeds=SEEDS)
