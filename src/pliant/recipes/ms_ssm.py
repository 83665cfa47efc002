"""MS-SSM on small pictures read pixel by pixel: what its parts are worth.

Two layers of a multi-scale state space model read scikit-learn's digits (8 by 8) as 64 steps, and answer with the mean
over them. Left out, in turn, are the filter bank (a short convolution takes its place, and one state space as many
states), the recurrence, the weights from the input, and the rates of each scale's own. What else stays when the bank
goes is open in the paper: here the weight of the one scale still comes from the input, and its input is added to its
output; two further arms leave out the former, and both.

Paper: Karami et al. 2025, MS-SSM, arXiv:2512.23824, tables 5 and 7, on PTB-XL (AUROC) and ListOps (%); there is no
code, and neither data nor sizes are those of the paper here, so that only the direction can be told. Block, from
MultiresNet: mixer, GELU, a gated linear map, residual, LayerNorm. Adam, 12 epochs of batches of 50, rates up to 0.005
in one cycle.
"""

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import seeded
from pliant.core.seeds import generator
from pliant.kernels import causal_conv
from pliant.mixers import MultiScaleSSM
from pliant.recipes.reproduce import Claim, Reproduction, Result, Scale, Trial, Verdict

WIDTH, DEPTH, CLASSES, EPOCHS, BATCH, RATE = 32, 2, 10, 12, 50, 5e-3
HELD_OUT = 360
TAPS, STATES = 4, 20
TRIAL_SECONDS = 16.0

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
ORDER = "the bank is worth more than weights from the input, and they more than the recurrence"


class Layer(nn.Module):
    """mixer, GELU, gated linear map, residual, norm. `(B, T, D) -> (B, T, D)`."""

    def __init__(self, bank: bool = True, recurrence: bool = True, past: bool = True, **options: Any):
        super().__init__()
        self.short = None if bank else nn.Parameter(torch.empty(TAPS, WIDTH).uniform_(-(TAPS**-0.5), TAPS**-0.5))
        more: dict[str, Any] = {} if bank else {"levels": 0, "state_per_scale": STATES}
        self.mixer = MultiScaleSSM(WIDTH, **more, **options)
        if not recurrence:
            nn.init.zeros_(self.mixer.read).requires_grad_(False)
        if not past:
            nn.init.zeros_(self.mixer.skip).requires_grad_(False)
        self.linear = nn.Linear(WIDTH, 2 * WIDTH)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        mixed = x if self.short is None else causal_conv(x, self.short)[0]
        return self.norm(x + F.glu(self.linear(F.gelu(self.mixer(mixed)[0])), -1))


class Net(nn.Module):
    """`(B, T, 1)` to logits `(B, 10)`."""

    def __init__(self, **arm: Any):
        super().__init__()
        self.embed = nn.Linear(1, WIDTH)
        self.layers = nn.Sequential(*(Layer(**arm) for _ in range(DEPTH)))
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(self.embed(x)).mean(1))


def data(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pictures `(n, 64, 1)` and their classes to learn from, and those that are held out."""
    from sklearn.datasets import load_digits  # half a second, so only when it is asked for

    found = load_digits()
    order = torch.randperm(len(found.target), generator=generator(seed, "split"))
    x = torch.from_numpy(found.data).float()[order, :, None] / 8 - 1
    y = torch.from_numpy(found.target).long()[order]
    return x[HELD_OUT:], y[HELD_OUT:], x[:HELD_OUT], y[:HELD_OUT]


def trials(scale: Scale) -> list[Trial]:
    """Five seeds of every arm; within a minute one seed of two."""
    if scale == "minute":
        return [Trial(name, ARMS[name], 0) for name in (FULL, BANK)]
    return [Trial(name, arm, seed) for seed in range(5) for name, arm in ARMS.items()]


def run(trial: Trial, progress: Callable[[float, str], None]) -> Result:
    """Accuracy on what is held out, after the last epoch."""
    train, classes, test, expected = data(trial.seed)
    with seeded(trial.seed, "ms-ssm"):
        net = Net(**trial.settings)
    optimizer = torch.optim.Adam([p for p in net.parameters() if p.requires_grad], lr=RATE)
    steps = -(-len(train) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=EPOCHS * steps)
    random, accuracy = generator(trial.seed, "batches"), 0.0
    for epoch in range(EPOCHS):
        for rows in torch.randperm(len(train), generator=random).split(BATCH):
            optimizer.zero_grad()
            F.cross_entropy(net(train[rows]), classes[rows]).backward()
            nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            accuracy = float((net(test).argmax(1) == expected).float().mean())
        progress((epoch + 1) / EPOCHS, f"accuracy {accuracy:.3f}")
    return {"accuracy": round(accuracy, 4), "parameters": sum(p.numel() for p in net.parameters() if p.requires_grad)}


def judge(results: Sequence[tuple[Trial, Result]]) -> list[Claim]:
    """What each part is worth beside the tables; and their order."""
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


def seconds(trial: Trial) -> float:
    """About how long a trial takes here."""
    return TRIAL_SECONDS


MS_SSM = Reproduction(
    "MS-SSM: what its parts are worth on digits read pixel by pixel",
    "Karami et al. 2025, arXiv:2512.23824, tables 5 and 7",
    trials,
    run,
    judge,
    seconds,
)
