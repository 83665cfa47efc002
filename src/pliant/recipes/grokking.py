"""Grokking, and what projection to the initial norms does to it.

A transformer of one block learns x + y modulo 117 from a fifth of all pairs. It knows these by heart soon; when it
understands the others depends on how fast its matrices turn.

Paper: Lyle et al. 2025, What Can Grokking Teach Us About Learning Under Nonstationarity?, arXiv:2507.20057, section 4,
figures 2 and 3. Not told there, and chosen here: batches of 512 drawn with replacement, decoupled decay, embeddings
and positions N(0, 1/width), other matrices N(0, 1/inputs), one block where the table says two layers.
"""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role, seeded
from pliant.core.seeds import generator
from pliant.measure.features import flipped
from pliant.optim import normalize_and_project
from pliant.recipes.reproduce import Claim, Reproduction, Result, Scale, Trial, Verdict

MODULUS, SHARE, BATCH = 117, 0.2, 512
WIDTH, HEADS, HIDDEN, LENGTH = 128, 4, 512, 5
GROKKED = 0.95
STEP_SECONDS = 0.02


class Split(NamedTuple):
    """Tokens `(n, 5)` of x · y = □ and the sums `(n,)` that belong there, to learn from and to be asked about."""

    train: Tensor
    train_sums: Tensor
    test: Tensor
    test_sums: Tensor


def split(seed: int, modulus: int = MODULUS) -> Split:
    """All pairs, of which a fifth drawn by `seed` may be learned from. x · y and y · x are drawn apart."""
    x, y = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus)).unbind(1)
    operation, equals, blank = (torch.full_like(x, modulus + i) for i in range(3))
    tokens, sums = torch.stack([x, operation, y, equals, blank], 1), (x + y) % modulus
    order = torch.randperm(len(x), generator=generator(seed, "split"))
    train, test = order[: int(SHARE * len(x))], order[int(SHARE * len(x)) :]
    return Split(tokens[train], sums[train], tokens[test], sums[test])


class Transformer(nn.Module):
    """One block without norms and biases: attention with 4 heads, then 128 -> 512 -> 128; answers at the last place."""

    def __init__(self, modulus: int = MODULUS):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(modulus + 3, WIDTH) * WIDTH**-0.5)
        self.places = nn.Parameter(torch.randn(LENGTH, WIDTH) * WIDTH**-0.5)
        self.query, self.key, self.value, self.out = (_matrix(WIDTH, WIDTH) for _ in range(4))
        self.up, self.down = _matrix(HIDDEN, WIDTH), _matrix(WIDTH, HIDDEN)
        self.head = _matrix(modulus, WIDTH)

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The last place before the second half of the block, and the units of that half."""
        x = self.tokens[tokens] + self.places
        q, k, v = (
            F.linear(x, w).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q[:, :, -1:], k, v)
        x = x[:, -1] + F.linear(mixed.transpose(1, 2).flatten(1), self.out)
        return x, torch.relu(F.linear(x, self.up))

    def forward(self, tokens: Tensor) -> Tensor:
        x, units = self.hidden(tokens)
        return F.linear(x + F.linear(units, self.down), self.head)

    def roles(self) -> dict[str, Role]:
        return {name: Role.EMBEDDING if name in ("tokens", "places") else Role.HEAD if name == "head" else Role.MATRIX
                for name, _ in self.named_parameters()}  # fmt: skip


def _matrix(outputs: int, inputs: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)


ALL = (Role.MATRIX, Role.EMBEDDING, Role.HEAD)
PROJECTED = {"lr": 1e-2, "decay": 0.01, "project": 100}
FREE = {"lr": 1e-2, "decay": 0.01, "project": 0}
DECAYED = {"lr": 1e-2, "decay": 1.0, "project": 0}
REWARMED = {"lr": 1e-2, "decay": 0.01, "project": 1, "low": 3e-4, "until": 4000, "ramp": 500}
LENGTHS: dict[Scale, dict[str, int]] = {
    "minute": {"projected": 1000, "free": 1000},
    "ten": {"projected": 1500, "free": 4000, "decayed": 2500, "rewarmed": 5500},
    "hour": {"projected": 4000, "free": 20_000, "decayed": 4000, "rewarmed": 8000},
    "paper": {"projected": 1_000_000, "free": 1_000_000, "decayed": 1_000_000, "rewarmed": 1_000_000},
}
SETTINGS = {"projected": PROJECTED, "free": FREE, "decayed": DECAYED, "rewarmed": REWARMED}


def trials(scale: Scale) -> list[Trial]:
    """Three seeds of each of the four, but one of two within a minute."""
    seeds = 1 if scale == "minute" else 3
    return [Trial(name, SETTINGS[name] | {"steps": steps}, seed)
            for name, steps in LENGTHS[scale].items() for seed in range(seeds)]  # fmt: skip


def run(trial: Trial, progress: Callable[[float, str], None]) -> Result:
    """Test accuracy every 50 steps at first, then every 250; and how many units flip within 250 steps."""
    settings = trial.settings
    data = split(trial.seed)
    with seeded(trial.seed, "grokking"):
        model = Transformer()
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=settings["decay"], fused=True)
    if settings["project"]:
        normalize_and_project(optimizer, model, settings["project"], scope=ALL)
    random = generator(trial.seed, "batches")
    found: Result = {"step": [], "accuracy": [], "flipped": []}
    units = None
    for step in range(1, settings["steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = _rate(settings, step)
        rows = torch.randint(len(data.train), (BATCH,), generator=random)
        optimizer.zero_grad()
        F.cross_entropy(model(data.train[rows]), data.train_sums[rows]).backward()
        optimizer.step()
        if step % 250 == 0 or (step % 50 == 0 and step <= 2000):
            found["step"].append(step)
            found["accuracy"].append(round(_accuracy(model, data), 4))
        if step % 250 == 0:
            with torch.no_grad():
                now = model.hidden(data.test[:512])[1]
            found["flipped"].append([step, 0.0 if units is None else round(flipped(units, now), 4)])
            units = now
            progress(step / settings["steps"], f"test accuracy {found['accuracy'][-1]:.3f}")
    return found


def _rate(settings: Any, step: int) -> float:
    """Constant, or low until a step and then rising to the rate within some more."""
    if "until" not in settings:
        return float(settings["lr"])
    share = min(1.0, max(0.0, (step - settings["until"]) / settings["ramp"]))
    return settings["low"] + share * (settings["lr"] - settings["low"])


@torch.no_grad()
def _accuracy(model: nn.Module, data: Split) -> float:
    right = [model(x).argmax(-1) == y
             for x, y in zip(data.test.split(2048), data.test_sums.split(2048), strict=True)]  # fmt: skip
    return float(torch.cat(right).float().mean())


def steps_to(result: Result, level: float = GROKKED) -> float:
    """First step at which the test accuracy was at least `level`; infinite if there was none."""
    pairs = zip(result["step"], result["accuracy"], strict=True)
    return next((float(step) for step, accuracy in pairs if accuracy >= level), math.inf)


def judge(results: Sequence[tuple[Trial, Result]]) -> list[Claim]:
    """Figures 2 and 3 of the paper."""
    by = {name: [(trial, result) for trial, result in results if trial.name == name] for name in SETTINGS}
    claims = [_earlier(by["projected"], by["free"])]
    if by["decayed"]:
        claims.append(_decayed(by["decayed"]))
    if by["rewarmed"]:
        claims.append(_on_demand(by["rewarmed"]))
    return claims


Runs = list[tuple[Trial, Result]]


def _steps(values: Sequence[float]) -> str:
    return ", ".join("never" if value == math.inf else f"{value:,.0f}" for value in values)


def _earlier(projected: Runs, free: Runs) -> Claim:
    fast, slow = ([steps_to(result) for _, result in runs] for runs in (projected, free))
    # A run that has not understood yet will need more than it had.
    least = [min(steps, trial.settings["steps"]) for steps, (trial, _) in zip(slow, free, strict=True)]
    ratios = [b / a for a, b in zip(fast, least, strict=True)]
    verdict: Verdict = "not reproduced"
    if all(a < b for a, b in zip(fast, slow, strict=True)):
        verdict = "reproduced" if min(ratios) >= 2.5 else "direction only"
    at_least = "" if math.inf not in slow else "at least "
    return Claim(
        "rate 1e-2, decay 0.01: with projection to initial norms, 95 % of the test is right many times earlier",
        "3,000, 3,000, 3,000 steps projected; 110,000, 340,000, 200,000 free", "transcribed",
        f"{_steps(fast)} steps projected; {_steps(slow)} free, of {free[0][0].settings['steps']:,}; "
        f"{at_least}{statistics.median(ratios):.1f} times",
        f"{at_least}{min(ratios):.1f} to {max(ratios):.1f} times", len(fast), verdict,
    )  # fmt: skip


def _decayed(runs: Runs) -> Claim:
    steps = [steps_to(result) for _, result in runs]
    verdict: Verdict = (
        "reproduced" if max(steps) <= 4000 else "direction only" if min(steps) < math.inf else "not reproduced"
    )
    return Claim("rate 1e-2, decay 1: free norms understand as early", "1,000, 2,000, 2,000 steps", "transcribed",
                 f"{_steps(steps)} steps", f"{_steps([min(steps), max(steps)])}", len(steps), verdict)  # fmt: skip


def _on_demand(runs: Runs) -> Claim:
    waits, before, moved = [], [], []
    for trial, result in runs:
        start = trial.settings["until"]
        before.append(max(a for step, a in zip(result["step"], result["accuracy"], strict=True) if step <= start))
        waits.append(steps_to(result) - start)
        flips = dict(map(tuple, result["flipped"]))
        moved.append(max(v for step, v in flips.items() if step > start) / max(flips[start], 1e-6))
    good = max(before) < 0.3 and max(waits) <= 1500
    verdict: Verdict = (
        "reproduced" if good and min(moved) >= 5 else "direction only" if max(waits) < math.inf else "not reproduced"
    )
    return Claim(
        "a projected net that has learned at a low rate understands when the rate is raised, whenever that is; "
        "its units flip more",
        "after any delay of 0 to 500,000 steps", "transcribed",
        f"{_steps(waits)} steps after the rise began at {runs[0][0].settings['until']:,}; "
        f"test accuracy before it {max(before):.3f} at most; {statistics.median(moved):.0f} times as many units flip",
        f"{min(waits):,.0f} to {max(waits):,.0f} steps", len(waits), verdict,
    )  # fmt: skip


GROKKING = Reproduction(
    "grokking on demand: projection and re-warming",
    "Lyle, Sokar, Pascanu, György 2025, What Can Grokking Teach Us About Learning Under Nonstationarity?, "
    "arXiv:2507.20057",
    trials, run, judge, lambda trial: STEP_SECONDS * trial.settings["steps"],
)  # fmt: skip
