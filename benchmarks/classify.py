"""Small recurrent nets on eight real sets of the UCR and UEA archives: who classifies series best, by mean rank?

python benchmarks/classify.py                          # whatever is missing in docs/results/classify.jsonl
python benchmarks/classify.py --methods S6 Hydra       # some of the methods alone, to have two processes
python benchmarks/classify.py --draw                   # a section of docs/ms-ssm.md, and docs/classify.svg
python benchmarks/classify.py --ledger

Needs the package aeon (pip install 'pliant[archive]'), which carries the sets, MiniRocket and Hydra. Nets have about
the parameters of MS-SSM at width 32, two blocks, and read at most 160 steps: longer series in patches of several
samples. Each method has four settings; the one with the best mean accuracy over all sets, on a quarter of their train
parts that is held out, is run with other seeds on the standard split. Set OMP_NUM_THREADS=1.
"""

import math
import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from _ledger import DOCS, append
from _ms_ssm_page import put, spread, table
from _trials import Record, Trials
from torch import Tensor, nn

from pliant.core import seeded
from pliant.core.seeds import generator, numpy_generator
from pliant.models import SequenceClassifier
from pliant.report.style import BLUE, ORANGE, STYLE
from pliant.streams import collection

SETS = ("ACSF1", "ArrowHead", "BasicMotions", "GunPoint", "ItalyPowerDemand", "JapaneseVowels", "OSULeaf",
        "PickupGestureWiimoteZ")  # fmt: skip
OURS = "MS-SSM"
NETS: dict[str, tuple[str, dict[str, Any]]] = {
    OURS: ("MultiScaleSSM", {}),
    "MS-SSM, selective": ("MultiScaleSSM", {"selective": True}),
    "gated LRU": ("GatedLRU", {"num_heads": 2}),
    "S6": ("S6", {}),
    "MultiresConv": ("MultiresConv", {}),
    "transformer": ("FullAttention", {"num_heads": 2, "max_steps": 160}),
}
PEERS = ("MiniRocket", "Hydra")
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
KERNELS = {"MiniRocket": (2_500, 5_000, 10_000, 20_000), "Hydra": (16, 32, 64, 128)}
"""Settings: learning rates of nets; kernels of MiniRocket, groups of kernels of Hydra."""
SETTINGS = (0, 1, 2, 3)
WIDTH, DEPTH, LONGEST, UPDATES, BATCH, DECAY = 32, 2, 160, 160, 16, 0.01
TUNING, SEEDS, DRAWS = 100, (0, 1, 2, 3, 4), 10_000


class Part(NamedTuple):
    inputs: Tensor
    mask: Tensor
    labels: Tensor


def parts(name: str, tuning: bool) -> tuple[Part, Part, int]:
    """What is learned from and what is asked, standardized by the first, in patches; and the number of classes."""
    train, test, classes = collection(name)
    if tuning:
        held = held_out(train.labels.numpy())
        train, test = (type(train)(*(part[rows] for part in train)) for rows in (~held, held))
    there = train.inputs[train.mask]
    mean, deviation = there.mean(0), there.std(0).clamp(min=1e-6)
    size = -(-train.inputs.shape[1] // LONGEST)
    learned, asked = (
        Part(*patches(torch.where(part.mask[..., None], (part.inputs - mean) / deviation, 0), part.mask, size),
             part.labels) for part in (train, test)
    )  # fmt: skip
    return learned, asked, len(classes)


def held_out(labels: np.ndarray) -> Tensor:
    """A quarter of each class, at least one, by chance."""
    random, held = numpy_generator(TUNING, "classify/held out"), np.zeros(len(labels), bool)
    for label in np.unique(labels):
        rows = random.permutation(np.flatnonzero(labels == label))
        held[rows[: max(1, round(len(rows) / 4))]] = True
    return torch.from_numpy(held)


def patches(inputs: Tensor, mask: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """`size` samples become the features of one step, which is there if one of them is."""
    missing = -inputs.shape[1] % size
    inputs = nn.functional.pad(inputs, (0, 0, 0, missing))
    mask = nn.functional.pad(mask, (0, missing))
    return inputs.unflatten(1, (-1, size)).flatten(2), mask.unflatten(1, (-1, size)).any(-1)


def net(method: str, features: int, classes: int, width: int) -> SequenceClassifier:
    mixer, options = NETS[method]
    return SequenceClassifier(features, classes, width=width, depth=DEPTH, mixer=mixer, mixer_options=options,
                              readout="mean", normalize=False)  # fmt: skip


@cache
def width_of(method: str, features: int, classes: int) -> int:
    """The width at which the method has about the parameters of ours."""

    def count(method: str, width: int) -> int:
        with seeded(0, "count"):
            return sum(p.numel() for p in net(method, features, classes, width).parameters())

    aim = count(OURS, WIDTH)
    return min(range(16, 49, 4), key=lambda width: abs(count(method, width) - aim))


def run(method: str, data: str, setting: int, seed: int) -> Record:
    torch.set_num_threads(1)
    began = time.process_time()
    found = (train if method in NETS else fit)(method, data, setting, seed)
    return found | {"cpu seconds": round(time.process_time() - began, 1)}


def train(method: str, data: str, setting: int, seed: int) -> Record:
    learned, asked, classes = parts(data, seed == TUNING)
    features, rate = learned.inputs.shape[-1], RATES[setting]
    width = width_of(method, features, classes)
    with seeded(seed, "classify"):
        model = net(method, features, classes, width)
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=UPDATES)
    random, queue = generator(seed, "classify/batches"), torch.empty(0, dtype=torch.int64)
    for _ in range(UPDATES):
        while len(queue) < BATCH:
            queue = torch.cat([queue, torch.randperm(len(learned.labels), generator=random)])
        rows, queue = queue[:BATCH], queue[BATCH:]
        optimizer.zero_grad()
        model.nats(answers(model, learned, rows), learned.labels[rows]).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        said = torch.cat([answers(model, asked, rows) for rows in torch.arange(len(asked.labels)).split(64)])
        bits = float(model.nats(said, asked.labels).mean()) / math.log(2)
    parameters = sum(p.numel() for p in model.parameters())
    right = accuracy(said.argmax(-1).numpy(), asked.labels.numpy())
    return {"mean": right, "bits": round(bits, 4), "width": width, "parameters": parameters}


def answers(model: SequenceClassifier, part: Part, rows: Tensor) -> Tensor:
    """Logits `(rows, C)` at the last step of each series, where the pool has seen all of it."""
    mask = part.mask[rows]
    mask = mask[:, : int(mask.sum(1).max())]
    y, _ = model(part.inputs[rows][:, : mask.shape[1]], mask=None if mask.all() else mask)
    return y[torch.arange(len(rows)), mask.sum(1) - 1]


def fit(method: str, data: str, setting: int, seed: int) -> Record:
    """A classifier of aeon, on whole series; where lengths differ, on the set of equal lengths that aeon carries."""
    from aeon.classification import convolution_based
    from aeon.datasets import load_classification

    (x, y), (asked, labels) = (
        load_classification(data, split=part, load_equal_length=True) for part in ("train", "test")
    )
    if seed == TUNING:
        held = held_out(y).numpy()
        x, y, asked, labels = x[~held], y[~held], x[held], y[held]
    setting = KERNELS[method][setting]
    if method == "Hydra":
        model = convolution_based.HydraClassifier(n_groups=setting, random_state=seed)
    else:
        model = convolution_based.MiniRocketClassifier(n_kernels=setting, random_state=seed)
    with seeded(seed, "classify"):
        said = model.fit(x, y).predict(asked)
    return {"mean": accuracy(said, labels)}


def accuracy(said: np.ndarray, labels: np.ndarray) -> float:
    return round(float((said == labels).mean()), 4)


TRIALS = Trials(DOCS / "results" / "classify.jsonl", run, tuning=TUNING)


def work(methods: Sequence[str], sets: Sequence[str], seeds: Sequence[int]) -> None:
    for method in methods:
        tried = [
            [TRIALS.once(method=method, data=data, setting=setting, seed=TUNING)["mean"] for data in sets]
            for setting in SETTINGS
        ]
        best = max(SETTINGS, key=lambda setting: statistics.fmean(tried[setting]))
        for seed in seeds:
            for data in sets:
                TRIALS.once(method=method, data=data, setting=best, seed=seed)


# What is made of the runs.


def chosen(records: Sequence[Record], method: str) -> int | None:
    """The setting with the best mean over all sets; None while one of them is missing."""
    tried: dict[int, list[float]] = defaultdict(list)
    for record in records:
        key = record["key"]
        if key["method"] == method and key["seed"] == TUNING:
            tried[key["setting"]].append(record["mean"])
    if [len(tried[setting]) for setting in SETTINGS] != [len(SETS)] * len(SETTINGS):
        return None
    return max(SETTINGS, key=lambda setting: statistics.fmean(tried[setting]))


def scores(records: Sequence[Record], seeds: Sequence[int]) -> dict[str, np.ndarray]:
    """Accuracy `(sets, seeds)` of each method that has been run to the end."""
    found: dict[str, np.ndarray] = {}
    for method in (*NETS, *PEERS):
        best = chosen(records, method)
        by = {(r["key"]["data"], r["key"]["seed"]): r["mean"] for r in records
              if r["key"]["method"] == method and r["key"]["setting"] == best}  # fmt: skip
        if all((data, seed) in by for data in SETS for seed in seeds):
            found[method] = np.array([[by[data, seed] for seed in seeds] for data in SETS])
    return found


def ranks(means: np.ndarray) -> np.ndarray:
    """Rank 1 … M of each method in each set, ties shared. `(M, sets)` -> same."""
    above = (means[None] > means[:, None]).sum(1)
    same = (means[None] == means[:, None]).sum(1)
    return 1 + above + (same - 1) / 2


def rank_intervals(found: dict[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    """Mean rank over sets, and 95 % of what it is when sets, and seeds within them, are drawn again."""
    values = np.stack(list(found.values()))  # (M, sets, seeds)
    random, drawn = numpy_generator(0, "classify/bootstrap"), []
    for _ in range(DRAWS):
        sets = random.integers(values.shape[1], size=values.shape[1])
        seeds = random.integers(values.shape[2], size=(values.shape[0], values.shape[1], values.shape[2]))
        means = np.take_along_axis(values, seeds, 2).mean(2)
        drawn.append(ranks(means[:, sets]).mean(1))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    mean = ranks(values.mean(2)).mean(1)
    return {name: (mean[i], low[i], high[i]) for i, name in enumerate(found)}


def draw(records: Sequence[Record], seeds: Sequence[int]) -> None:
    found = scores(records, seeds)
    placed = rank_intervals(found)
    order = sorted(found, key=lambda name: placed[name][0])
    missing = [name for name in (*NETS, *PEERS) if name not in found]
    rows = []
    for name in order:
        runs = [r for r in records if r["key"]["method"] == name and r["key"]["seed"] in seeds]
        mean, low, high = placed[name]
        sizes = {r["parameters"] for r in runs if "parameters" in r}
        size = f"{min(sizes):,} to {max(sizes):,}" if sizes else ""
        seconds = statistics.fmean(r["cpu seconds"] for r in runs)
        rows.append([name, f"{mean:.2f} ({low:.2f} to {high:.2f})", f"{found[name].mean():.3f}", size, f"{seconds:.1f}",
                     str(chosen(records, name))])  # fmt: skip
    head = ("method", "mean rank (95 %)", "mean accuracy", "parameters", "CPU s a run", "setting")
    lines = [f"{len(SETS)} sets, {len(seeds)} seeds." + (f" **Not run yet: {', '.join(missing)}.**" if missing else "")]
    lines += [
        "",
        "![Mean ranks](classify.svg)",
        "",
        *table(head, rows),
        "",
        "Accuracy, mean and deviation over seeds:",
        "",
    ]
    each = [[data, *(spread(list(found[name][i])) for name in order)] for i, data in enumerate(SETS)]
    put("classify", [*lines, *table(("set", *order), each)])
    figure(placed, order)


def figure(placed: dict[str, tuple[float, float, float]], order: Sequence[str]) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        sheet = Figure(figsize=(7.5, 0.34 * len(order) + 0.9))
        axes = sheet.subplots()
        for row, name in enumerate(reversed(order)):
            mean, low, high = placed[name]
            color = BLUE if name.startswith(OURS) else ORANGE if name in PEERS else "#666666"
            axes.plot([low, high], [row, row], color=color, lw=2, alpha=0.5)
            axes.plot([mean], [row], "o", color=color, ms=5)
        axes.set_yticks(range(len(order)), list(reversed(order)))
        axes.set_xlabel(f"mean rank over {len(SETS)} sets, 1 is best; 95 % over sets and seeds")
        sheet.tight_layout()
        sheet.savefig(DOCS / "classify.svg", metadata={"Date": None})


def ledger(records: Sequence[Record], seeds: Sequence[int]) -> None:
    found = scores(records, seeds)
    placed = rank_intervals(found)
    best = min(placed, key=lambda name: placed[name][0])
    figures: dict[str, Any] = {
        name: f"rank {mean:.2f} ({low:.2f} to {high:.2f}), accuracy {found[name].mean():.3f}"
        for name, (mean, low, high) in placed.items()
    }
    append(
        "MS-SSM has the best mean rank on eight real sets of the UCR and UEA archives, equal parameters and tuning",
        "python benchmarks/classify.py; --draw; --ledger", figures, holds=best.startswith(OURS),
        note=f"{len(seeds)} seeds; best is {best}",
    )  # fmt: skip


if __name__ == "__main__":
    TRIALS.command(work, draw, ledger, methods=(*NETS, *PEERS), sets=SETS, seeds=SEEDS)
