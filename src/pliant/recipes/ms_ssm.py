"""MS-SSM on sequences to be told apart: what its parts are worth.

At `minute` and `ten` two layers of a multi-scale state space model read scikit-learn's digits (8 by 8) as 64 steps,
and answer with the mean over them. Left out, in turn, are the filter bank (a short convolution takes its place, and
one state space as many states), the recurrence, the weights from the input, and the rates of each scale's own. What
else stays when the bank goes is open in the paper: here the weight of the one scale still comes from the input, and
its input is added to its output; two further arms leave out the former, and both. At `hour` four layers, with and
without the bank, read ListOps of 20 to 512 tokens from the published distribution, four times as many expressions of
up to 128, and images pixel by pixel if `--data` says where there are some. `paper` has both in the published sizes.

Paper: Karami et al. 2025, MS-SSM, arXiv:2512.23824, tables 1, 2, 5 and 7, on PTB-XL (AUROC), ListOps and sequential
CIFAR-10 (%); there is no code, and but for `paper` neither sizes nor amounts of data are those of the paper, so that
only the direction can be told. Block, from MultiresNet: mixer, GELU, a gated linear map, residual, norm. Rates rise
and fall in one cycle; at `ten` Adam, 12 epochs of batches of 50; `paper` rises over more than the paper's one epoch.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import UsageError, numpy_generator, seeded
from pliant.core.seeds import generator
from pliant.kernels import causal_conv
from pliant.mixers import MultiScaleSSM
from pliant.recipes.reproduce import Claim, Reproduction, Result, Scale, Trial, Verdict
from pliant.streams._images import images
from pliant.streams._listops import TOKENS, expression, value_of

CLASSES, HELD_OUT, SHORT = 10, 360, 4


class Setup(NamedTuple):
    """A net and its training.

    states: of each scale. norm: `"layer"`, or `"batch"` over steps that exist. examples: that are drawn to learn from,
    and held out. lengths: of what is drawn. seconds: of a trial, about.
    """

    features: int
    width: int = 32
    depth: int = 2
    taps: int = 4
    states: int = 4
    epochs: int = 12
    batch: int = 50
    rate: float = 5e-3
    decay: float = 0.0
    dropout: float = 0.0
    norm: str = "layer"
    examples: tuple[int, int] = (0, 0)
    lengths: tuple[int, int] = (1, 1)
    seconds: float = 16.0


DIGITS, LISTOPS, IMAGES = "digits", "ListOps", "images"
SHORTER = f"{LISTOPS} of up to 128 tokens"
SETUPS = {
    DIGITS: Setup(1),
    LISTOPS: Setup(len(TOKENS), 64, 4, 4, 4, 6, 32, 3e-3, 0.03, 0.0, "layer", (16_000, 2000), (20, 512), 700.0),
    SHORTER: Setup(len(TOKENS), 64, 4, 4, 4, 6, 32, 3e-3, 0.03, 0.0, "layer", (64_000, 2000), (20, 128), 700.0),
    IMAGES: Setup(3, 64, 4, 2, 4, 6, 32, 4.5e-3, 0.01, seconds=800.0),
    f"{LISTOPS}, paper": Setup(len(TOKENS), 128, 20, 4, 128, 100, 50, 3e-3, 0.03, 0.1, "batch", (96_000, 2000),
                               (501, 1999), 3e7),
    f"{IMAGES}, paper": Setup(3, 256, 10, 2, 128, 250, 50, 4.5e-3, 0.01, 0.25, "batch", seconds=3e7),
}  # fmt: skip

FULL, BANK = "whole", "a short convolution for the bank"
ARMS: dict[str, dict[str, Any]] = {
    FULL: {},
    "selective": {"selective": True},
    "no recurrence": {"recurrence": False},
    BANK: {"bank": False},
    f"{BANK}, static weights": {"bank": False, "weights": "static"},
    f"{BANK}, static weights, nothing past the states": {"bank": False, "weights": "static", "past": False},
    "static weights": {"weights": "static"},
    "softmax weights": {"weights": "softmax"},
    "the same rates in all scales": {"own_rates": False},
}
TABLES = {  # table 5 and, of the last, table 7: PTB-XL AUROC and ListOps %
    "no recurrence": (0.936, 62.59),
    BANK: (0.916, 37.98),
    "static weights": (0.932, 61.28),
    "softmax weights": (0.921, 61.42),
    "the same rates in all scales": (0.928, 57.49),
}
WHOLE = (0.939, 63.04)
SCIFAR = 90.3
ORDER = "the bank is worth more than weights from the input, and they more than the recurrence"


class Layer(nn.Module):
    """mixer, GELU, gated linear map, residual, norm. `(B, T, D) -> (B, T, D)`."""

    def __init__(self, setup: Setup, bank: bool = True, recurrence: bool = True, past: bool = True, **options: Any):
        super().__init__()
        width, levels = setup.width, 3
        self.short = None if bank else nn.Parameter(torch.empty(SHORT, width).uniform_(-(SHORT**-0.5), SHORT**-0.5))
        states: dict[str, Any] = {"state_per_scale": setup.states}
        if not bank:
            states, levels = {"state_per_scale": (levels + 2) * setup.states}, 0
        self.mixer = MultiScaleSSM(width, levels, setup.taps, **states, **options)
        if not recurrence:
            nn.init.zeros_(self.mixer.read).requires_grad_(False)
        if not past:
            nn.init.zeros_(self.mixer.skip).requires_grad_(False)
        self.linear = nn.Linear(width, 2 * width)
        self.norm: nn.Module = nn.LayerNorm(width) if setup.norm == "layer" else nn.BatchNorm1d(width)
        self.dropout = nn.Dropout(setup.dropout)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        mixed = x if self.short is None else causal_conv(x, self.short, mask=mask)[0]
        y = self.dropout(F.gelu(self.mixer(mixed, mask=mask)[0]))
        return self._normed(x + self.dropout(F.glu(self.linear(y), -1)), mask)

    def _normed(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if isinstance(self.norm, nn.LayerNorm):
            return self.norm(x)
        exists = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
        return torch.zeros_like(x).masked_scatter(exists[..., None], self.norm(x[exists]))


class Net(nn.Module):
    """`(B, T, F)` to logits `(B, 10)`."""

    def __init__(self, setup: Setup = SETUPS[DIGITS], **arm: Any):
        super().__init__()
        self.embed = nn.Linear(setup.features, setup.width)
        self.layers = nn.ModuleList(Layer(setup, **arm) for _ in range(setup.depth))
        self.head = nn.Linear(setup.width, CLASSES)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x, mask)
        if mask is None:
            return self.head(x.mean(1))
        return self.head((x * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


class Examples(NamedTuple):
    """inputs `(n, T, F)`, or tokens `(n, T)`, that end at the last step; how many steps each has; classes `(n,)`."""

    inputs: Tensor
    lengths: Tensor
    classes: Tensor

    def part(self, rows: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Inputs, which steps exist (None: all), and classes of some."""
        lengths = self.lengths[rows]
        steps = int(lengths.max())
        x = self.inputs[rows, -steps:]
        if x.ndim == 2:
            x = F.one_hot(x.long(), len(TOKENS)).float()
        mask = torch.arange(steps) >= steps - lengths[:, None]
        return x, None if bool(mask.all()) else mask, self.classes[rows]


def data(task: str, setup: Setup, path: Path | None, seed: int) -> tuple[Examples, Examples]:
    """What is learned from, and what is held out."""
    if task == DIGITS:
        return _digits(seed)
    if task == IMAGES:
        found = images(path)
        pairs = ((found.train, found.train_labels), (found.test, found.test_labels))
        return _examples(*((x.flatten(2).mT.contiguous(), y) for x, y in pairs))
    random = numpy_generator(seed, "ms-ssm/listops")
    return _expressions(random, setup.examples[0], setup), _expressions(random, setup.examples[1], setup)


def _digits(seed: int) -> tuple[Examples, Examples]:
    from sklearn.datasets import load_digits  # half a second, so only when it is asked for

    found = load_digits()
    order = torch.randperm(len(found.target), generator=generator(seed, "split"))
    x = torch.from_numpy(found.data).float()[order, :, None] / 8 - 1
    y = torch.from_numpy(found.target).long()[order]
    return _examples((x[HELD_OUT:], y[HELD_OUT:]), (x[:HELD_OUT], y[:HELD_OUT]))


def _examples(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> tuple[Examples, Examples]:
    first, second = (Examples(x, torch.full((len(x),), x.shape[1]), y) for x, y in (one, other))
    return first, second


def _expressions(random: np.random.Generator, count: int, setup: Setup) -> Examples:
    drawn = [expression(random, *setup.lengths) for _ in range(count)]
    tokens = np.zeros((count, setup.lengths[1]), np.uint8)
    for row, one in zip(tokens, drawn, strict=True):
        row[-len(one) :] = one
    classes = torch.tensor([value_of(one.tolist()) for one in drawn])
    return Examples(torch.from_numpy(tokens), torch.tensor([len(one) for one in drawn]), classes)


def batches(lengths: Tensor, size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Rows in batches, by chance; where lengths differ, of those that are about as long as each other."""
    order = torch.randperm(len(lengths), generator=random)
    if bool((lengths == lengths[0]).all()):
        yield from order.split(size)
        return
    groups = [rows[lengths[rows].argsort()] for rows in order.split(32 * size)]
    found = [rows for group in groups for rows in group.split(size)]
    yield from (found[i] for i in torch.randperm(len(found), generator=random))


def trials(path: Path | None, scale: Scale) -> list[Trial]:
    """Five seeds of every arm, or three with and without the bank; within a minute one seed of two.

    Raises:
        UsageError: there are no images in `path`, or they are not for this scale.
    """
    if path is not None and scale not in ("hour", "paper"):
        raise UsageError(f"--data has images, which --scale {scale} does not read; take hour or paper")
    if path is not None:
        images(path)  # tells now what is wrong with them, not after hours of other trials
    if scale == "minute":
        return [Trial(name, ARMS[name], 0) for name in (FULL, BANK)]
    if scale == "ten":
        return [Trial(name, arm, seed) for seed in range(5) for name, arm in ARMS.items()]
    size, seeds = (", paper", 1) if scale == "paper" else ("", 3)
    tasks = [LISTOPS, *([SHORTER] if scale == "hour" else []), *([] if path is None else [IMAGES])]
    return [Trial(name, {"setup": task + size, **ARMS[name]}, seed)
            for seed in range(seeds) for task in tasks for name in (FULL, BANK)]  # fmt: skip


def run(path: Path | None, trial: Trial, progress: Callable[[float, str], None]) -> Result:
    """Accuracy on what is held out, after the last epoch."""
    arm = dict(trial.settings)
    name = arm.pop("setup", DIGITS)
    setup = SETUPS[name]
    train, test = data(name.split(",")[0], setup, path, trial.seed)
    if train.inputs.ndim == 3:
        setup = setup._replace(features=train.inputs.shape[2])
    with seeded(trial.seed, "ms-ssm"):
        net = Net(setup, **arm)
    with seeded(trial.seed, "dropout"):
        found = train_on(train, test, net, setup, trial.seed, progress)
    return {"accuracy": round(found, 4), "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad)}


def train_on(
    train: Examples, test: Examples, net: Net, setup: Setup, seed: int, progress: Callable[[float, str], None]
) -> float:
    """Accuracy on the test after the last epoch."""
    optimizer = torch.optim.AdamW(_groups(net, setup.decay), lr=setup.rate)
    steps = -(-len(train.classes) // setup.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, setup.rate, total_steps=setup.epochs * steps)
    random, found = generator(seed, "batches"), 0.0
    for epoch in range(setup.epochs):
        for rows in batches(train.lengths, setup.batch, random):
            x, mask, classes = train.part(rows)
            optimizer.zero_grad()
            F.cross_entropy(net(x, mask), classes).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        found = accuracy(net, test)
        progress((epoch + 1) / setup.epochs, f"accuracy {found:.3f}")
    return found


def _groups(net: Net, decay: float) -> list[dict[str, Any]]:
    """Matrices and filters decay; rates, steps, norms and biases do not."""
    named = {name: p for name, p in net.named_parameters() if p.requires_grad}
    free = {n for n, p in named.items() if p.ndim < 2 or any(part in n for part in ("log_", "step_", "skip"))}
    return [{"params": [p for n, p in named.items() if n not in free], "weight_decay": decay},
            {"params": [named[n] for n in named if n in free], "weight_decay": 0.0}]  # fmt: skip


@torch.no_grad()
def accuracy(net: Net, asked: Examples) -> float:
    """Share of right answers."""
    net.eval()
    right = 0
    for rows in asked.lengths.argsort(stable=True).split(HELD_OUT):
        x, mask, classes = asked.part(rows)
        right += int((net(x, mask).argmax(1) == classes).sum())
    net.train()
    return right / len(asked.classes)


def judge(results: Sequence[tuple[Trial, Result]]) -> list[Claim]:
    """What each part is worth beside the tables; and their order."""
    setups = list(dict.fromkeys(trial.settings["setup"] for trial, _ in results if "setup" in trial.settings))
    if setups:
        return [_of_setup(name, [row for row in results if row[0].settings["setup"] == name]) for name in setups]
    by = {name: {trial.seed: result["accuracy"] for trial, result in results if trial.name == name} for name in ARMS}
    worth = {
        name: [by[FULL][seed] - found[seed] for seed in sorted(found)] for name, found in by.items() if name in TABLES
    }
    claims = [_claim(name, gaps, by) for name, gaps in worth.items() if gaps]
    parts = (BANK, "static weights", "no recurrence")
    if all(worth[name] for name in parts):
        means = [statistics.mean(worth[name]) for name in parts]
        claims.append(
            Claim(
                ORDER,
                "ListOps: " + ", ".join(f"{WHOLE[1] - TABLES[name][1]:.2f}" for name in parts) + " points",
                "read",
                ", ".join(f"{100 * mean:.1f}" for mean in means) + " points",
                "",
                len(worth[parts[0]]),
                "direction only" if means[0] > means[1] > means[2] else "not reproduced",
            )
        )
    return claims


def _claim(name: str, gaps: list[float], by: dict[str, dict[int, float]]) -> Claim:
    ours = f"{statistics.mean(by[FULL].values()):.3f} and {statistics.mean(by[name].values()):.3f}"
    above = sum(gap > 0 for gap in gaps)
    verdict: Verdict = "direction only" if above == len(gaps) else "not reproduced"
    paper = f"AUROC {WHOLE[0]} and {TABLES[name][0]}; ListOps {WHOLE[1]} and {TABLES[name][1]} %"
    spread = f"difference {min(gaps):+.3f} to {max(gaps):+.3f}, above 0 in {above} of {len(gaps)}"
    return Claim(f"whole, and with {name}: accuracy", paper, "read", ours, spread, len(gaps), verdict)


def _of_setup(setup: str, results: Sequence[tuple[Trial, Result]]) -> Claim:
    by = {name: {trial.seed: result["accuracy"] for trial, result in results if trial.name == name}
          for name in (FULL, BANK)}  # fmt: skip
    gaps = [by[FULL][seed] - by[BANK][seed] for seed in sorted(by[FULL].keys() & by[BANK].keys())]
    above = sum(gap > 0 for gap in gaps)
    paper = f"{WHOLE[1]} and {TABLES[BANK][1]} %" if setup.startswith(LISTOPS) else f"{SCIFAR} % whole; not left out"
    verdict: Verdict = "direction only" if gaps and above == len(gaps) else "not reproduced"
    if not setup.startswith(LISTOPS):
        verdict = "not possible here"  # the paper has no such trial
    ends = f"{100 * min(gaps):+.1f} to {100 * max(gaps):+.1f}" if gaps else "none"
    return Claim(
        f"{setup}: whole, and with {BANK}: accuracy in percent", paper, "read",
        " and ".join(f"{100 * statistics.mean(of.values()):.1f}" for of in by.values() if of),
        f"difference {ends}, above 0 in {above} of {len(gaps)}",
        len(gaps) or 1, verdict,
    )  # fmt: skip


def seconds(trial: Trial) -> float:
    """About how long a trial takes here."""
    return SETUPS[trial.settings.get("setup", DIGITS)].seconds


def ms_ssm(data: Path | None = None) -> Reproduction:
    """The experiment; with color images in `data`, see `pliant.streams.images`, on these too."""
    return Reproduction(
        "MS-SSM: what its parts are worth on sequences read step by step",
        "Karami et al. 2025, arXiv:2512.23824, tables 1, 2, 5 and 7",
        partial(trials, data),
        partial(run, data),
        judge,
        seconds,
    )
