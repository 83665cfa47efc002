"""Grokking, and what projection to the initial norms does to it.

A transformer of one block learns x + y modulo 117 from a fifth of all pairs. It knows these by heart soon; when it
understands the others depends on how fast its matrices turn.

Paper: Lyle et al. 2025, What Can Grokking Teach Us About Learning Under Nonstationarity?, arXiv:2507.20057, section 4,
figures 2 and 3. Not told there, and chosen here: batches of 512 drawn with replacement, decoupled decay, embeddings
and positions N(0, 1/width), other matrices N(0, 1/inputs), one block where the table says two layers.

With norms before attention and matrices of fixed length, only gains can make attention less sharp: then it takes their
decay (figure 2, right). That is shown on a smaller net and problem, `SMALL`, which is enough to see it.
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
WIDTH, HEADS, LENGTH = 128, 4, 5
GROKKED = 0.95
STEP_SECONDS = 0.02


class Split(NamedTuple):
    """Tokens `(n, 5)` of x · y = □ and the sums `(n,)` that belong there, to learn from and to be asked about."""

    train: Tensor
    train_sums: Tensor
    test: Tensor
    test_sums: Tensor


def split(seed: int, modulus: int = MODULUS, share: float = SHARE) -> Split:
    """All pairs, of which a share drawn by `seed` may be learned from. x · y and y · x are drawn apart."""
    x, y = torch.cartesian_prod(torch.arange(modulus), torch.arange(modulus)).unbind(1)
    operation, equals, blank = (torch.full_like(x, modulus + i) for i in range(3))
    tokens, sums = torch.stack([x, operation, y, equals, blank], 1), (x + y) % modulus
    order = torch.randperm(len(x), generator=generator(seed, "split"))
    train, test = order[: int(share * len(x))], order[int(share * len(x)) :]
    return Split(tokens[train], sums[train], tokens[test], sums[test])


class Transformer(nn.Module):
    """One block without biases: attention with 4 heads, then width -> 4 width -> width; answers at the last place.

    Args:
        modulus: of the sums.
        width: of features.
        normed: whether there is RMSNorm before attention, before the second half of the block and before the head.
    """

    def __init__(self, modulus: int = MODULUS, width: int = WIDTH, normed: bool = False):
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(modulus + 3, width) * width**-0.5)
        self.places = nn.Parameter(torch.randn(LENGTH, width) * width**-0.5)
        self.query, self.key, self.value, self.out = (_matrix(width, width) for _ in range(4))
        self.up, self.down = _matrix(4 * width, width), _matrix(width, 4 * width)
        self.head = _matrix(modulus, width)
        self.norms = nn.ModuleList([nn.RMSNorm(width) if normed else nn.Identity() for _ in range(3)])

    def hidden(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """The last place before the second half of the block, and the units of that half."""
        x = self.tokens[tokens] + self.places
        h = self.norms[0](x)
        q, k, v = (
            F.linear(h, w).unflatten(-1, (HEADS, -1)).transpose(1, 2) for w in (self.query, self.key, self.value)
        )
        mixed = F.scaled_dot_product_attention(q[:, :, -1:], k, v)
        x = x[:, -1] + F.linear(mixed.transpose(1, 2).flatten(1), self.out)
        return x, torch.relu(F.linear(self.norms[1](x), self.up))

    def forward(self, tokens: Tensor) -> Tensor:
        x, units = self.hidden(tokens)
        return F.linear(self.norms[2](x + F.linear(units, self.down)), self.head)

    def roles(self) -> dict[str, Role]:
        known = {"tokens": Role.EMBEDDING, "places": Role.EMBEDDING, "head": Role.HEAD}
        return {name: Role.GAIN if name.startswith("norms") else known.get(name, Role.MATRIX)
                for name, _ in self.named_parameters()}  # fmt: skip


def _matrix(outputs: int, inputs: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(outputs, inputs) * inputs**-0.5)


ALL = (Role.MATRIX, Role.EMBEDDING, Role.HEAD)
PROJECTED = {"lr": 1e-2, "decay": 0.01, "project": 100}
FREE = {"lr": 1e-2, "decay": 0.01, "project": 0}
DECAYED = {"lr": 1e-2, "decay": 1.0, "project": 0}
REWARMED = {"lr": 1e-2, "decay": 0.01, "project": 1, "low": 3e-4, "until": 4000, "ramp": 500, "stop": True}
NORMED = {"lr": 1e-2, "decay": 0.0, "project": 1, "normed": True}
SCALE_DECAYED = NORMED | {"scale_decay": 1.0}
SETTINGS = {"projected": PROJECTED, "free": FREE, "decayed": DECAYED, "rewarmed": REWARMED, "normed": NORMED,
            "scale decayed": SCALE_DECAYED}  # fmt: skip
LENGTHS: dict[Scale, dict[str, int]] = {
    "minute": {"projected": 1000, "free": 1000},
    "ten": dict(zip(SETTINGS, (1500, 4000, 2500, 10_500, 2500, 2500), strict=True)),
    "hour": dict(zip(SETTINGS, (4000, 20_000, 4000, 20_000, 20_000, 20_000), strict=True)),
    "paper": dict.fromkeys(SETTINGS, 1_000_000),
}
SIZE = {"modulus": MODULUS, "share": SHARE, "batch": BATCH, "width": WIDTH, "normed": False, "scale_decay": 0.0,
        "stop": False}  # fmt: skip
"""What settings are where they say nothing else; with `stop` a run ends when the net has understood."""
SMALL = {"modulus": 59, "share": 0.3, "batch": 256, "width": 64}


def trials(scale: Scale) -> list[Trial]:
    """Three seeds of each, but one of two within a minute; nets with norms are small, but for the paper's scale."""
    seeds = 1 if scale == "minute" else 3
    sizes = {name: SMALL if "normed" in settings and scale != "paper" else {} for name, settings in SETTINGS.items()}
    return [Trial(name, SETTINGS[name] | sizes[name] | {"steps": steps}, seed)
            for name, steps in LENGTHS[scale].items() for seed in range(seeds)]  # fmt: skip


def run(trial: Trial, progress: Callable[[float, str], None]) -> Result:
    """Test accuracy every 50 steps at first, then every 250; and how many units flip within 250 steps."""
    settings = SIZE | dict(trial.settings)
    data = split(trial.seed, settings["modulus"], settings["share"])
    with seeded(trial.seed, "grokking"):
        model = Transformer(settings["modulus"], settings["width"], settings["normed"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings["lr"], weight_decay=settings["decay"], fused=True)
    if settings["project"]:
        normalize_and_project(optimizer, model, settings["project"], scope=ALL, scale_decay=settings["scale_decay"])
    random = generator(trial.seed, "batches")
    found: Result = {"step": [], "accuracy": [], "flipped": []}
    units = None
    for step in range(1, settings["steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = _rate(settings, step)
        rows = torch.randint(len(data.train), (settings["batch"],), generator=random)
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
            if settings["stop"] and found["accuracy"][-1] >= GROKKED:
                break
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
    if by["normed"]:
        claims.append(_scale_decay(by["normed"], by["scale decayed"]))
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
    good = max(before) < 0.3 and max(waits) < math.inf and min(moved) >= 5
    verdict: Verdict = (
        "reproduced" if good else "direction only" if statistics.median(waits) < math.inf else "not reproduced"
    )
    return Claim(
        "a projected net that has learned at a low rate understands when the rate is raised, whenever that is; "
        "its units flip more",
        "after any delay of 0 to 500,000 steps", "transcribed",
        f"{_steps(waits)} steps after the rise began at {runs[0][0].settings['until']:,}; "
        f"test accuracy before it {max(before):.3f} at most; {statistics.median(moved):.0f} times as many units flip",
        f"{min(waits):,.0f} to {max(waits):,.0f} steps", len(waits), verdict,
    )  # fmt: skip


def _scale_decay(without: Runs, decayed: Runs) -> Claim:
    steps = [steps_to(result) for _, result in decayed]
    most = [max(result["accuracy"]) for _, result in without]
    settings = SIZE | dict(decayed[0][0].settings)
    never = all(steps_to(result) == math.inf for _, result in without)
    verdict: Verdict = "not reproduced"
    if never and max(steps) < math.inf:
        verdict = "reproduced" if settings["modulus"] == MODULUS else "direction only"
    return Claim(
        "with RMSNorm and a projection at each step, a net understands if gains decay by 1 in units of the rate, "
        "and does not if they are free",
        "14,000 to 16,000 steps if they decay; test accuracy 0.20 at 1,000,000 if not", "transcribed",
        f"modulus {settings['modulus']}, {settings['share']:.0%} to learn from, width {settings['width']}: "
        f"{_steps(steps)} steps if they decay; test accuracy {max(most):.2f} at most within "
        f"{without[0][0].settings['steps']:,} if not",
        f"{_steps([min(steps), max(steps)])} steps; {min(most):.2f} to {max(most):.2f}", len(steps), verdict,
    )  # fmt: skip


def _seconds(trial: Trial) -> float:
    settings = SIZE | dict(trial.settings)
    return STEP_SECONDS * float(settings["steps"] * settings["batch"] * settings["width"]) / (BATCH * WIDTH)


GROKKING = Reproduction(
    "grokking on demand: projection and re-warming",
    "Lyle, Sokar, Pascanu, György 2025, What Can Grokking Teach Us About Learning Under Nonstationarity?, "
    "arXiv:2507.20057",
    trials, run, judge, _seconds,
)  # fmt: skip
