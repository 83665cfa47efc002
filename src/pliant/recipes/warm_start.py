"""Warm starts: a net that has learned a part of the data first ends worse than one that begins with all of them.

First a random 10 or 50 % is learned, then everything, with the rate rising and falling anew; as many updates each time.
The gap is the test accuracy of the same net trained on everything alone (fresh), less that of the warm-started one.

Paper: Lyle et al. 2025, What Can Grokking Teach Us About Learning Under Nonstationarity?, arXiv:2507.20057, section 5
and figure 4. Free net there: norms before nonlinearities, lengths of matrices free. Its fresh net is the one that has
had all the data in the first phase. The effect itself: Ash & Adams 2020, arXiv:1910.08475, whose shrink and perturb
stands beside it. Not told there, and chosen here: strides 2, batches without replacement, a linear warm-up of 1/20,
one rate of a few for every arm, by a tenth of the training data that a run of its own holds out.

Departures: pixels are few here, and so are channels and updates; see `LENGTHS`.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role, seeded
from pliant.core.rates import norms
from pliant.core.roles import roles_of
from pliant.core.seeds import generator
from pliant.optim import Probe, ShrinkPerturb, normalize_and_project, normalized, warmup_cosine
from pliant.optim.schedules import set_rates
from pliant.recipes.reproduce import Claim, Reproduction, Result, Scale, Trial, Verdict
from pliant.streams._images import Images, images, kind_of

RATES = {"fashion-mnist": (3e-4, 1e-3, 3e-3), "cifar10": (3e-4, 1e-3, 3e-3, 1e-2)}
"""The same for each arm."""
TUNING = 100
"""Seed of the runs by which rates are chosen; no other run has it."""
KEEP, NOISE = 0.4, 0.4
"""Shrink and perturb at the switch: θ <- 0.4 θ + 0.4 ε, ε with the deviation of the initial θ."""
FRESH = 0.0
SHARES = (0.1, 0.5)
ARMS = ("free", "layer norm", "projected", "shrink-perturb")
LENGTHS: dict[Scale, dict[str, dict[str, Any]]] = {
    "minute": {
        "fashion-mnist": {"net": "mlp", "width": 64, "updates": 300, "batch": 500},
        "cifar10": {"net": "mlp", "width": 64, "updates": 300, "batch": 200},
    },
    "ten": {
        "fashion-mnist": {"net": "mlp", "width": 128, "updates": 1200, "batch": 500},
        "cifar10": {"net": "cnn", "width": 16, "updates": 800, "batch": 200},
    },
    "hour": {
        "fashion-mnist": {"net": "cnn", "width": 16, "updates": 1200, "batch": 500},
        "cifar10": {"net": "cnn", "width": 32, "updates": 1500, "batch": 200},
    },
    "paper": {
        "fashion-mnist": {"net": "cnn", "width": 32, "updates": 140_000, "batch": 128},
        "cifar10": {"net": "cnn", "width": 32, "updates": 140_000, "batch": 128},
    },
}
IMAGE_SECONDS = {
    ("fashion-mnist", "mlp"): 9e-8,
    ("fashion-mnist", "cnn"): 2.8e-6,
    ("cifar10", "mlp"): 2.5e-7,
    ("cifar10", "cnn"): 3.8e-6,
}
"""For an image of one update and a unit of width, on one processor."""


def network(net: str, shape: Sequence[int], width: int) -> nn.Sequential:
    """Without norms: an MLP with two layers of `width`, or three convolutions of `width` channels and a wider layer.

    `shape` is (channels, height, width) of an image.
    """
    channels, height, breadth = shape
    if net == "mlp":
        return nn.Sequential(
            nn.Flatten(), nn.Linear(channels * height * breadth, width), nn.ReLU(),
            nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10),
        )  # fmt: skip
    places = -(-height // 8) * -(-breadth // 8)
    return nn.Sequential(
        nn.Conv2d(channels, width, 5, stride=2, padding=2), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Conv2d(width, width, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(places * width, 4 * width), nn.ReLU(), nn.Linear(4 * width, 10),
    )  # fmt: skip


def first_trials(kind: str, scale: Scale) -> list[Trial]:
    """Runs that choose a rate for each arm; none at the smallest scale, which takes the middle one."""
    if scale == "minute":
        return []
    length = {"data": kind, **LENGTHS[scale][kind]}
    return [
        Trial(arm, {**length, "share": share, "rate": rate, "held_out": 0.1}, TUNING)
        for arm, share in _arms(SHARES[:1]) for rate in RATES[kind]
    ]  # fmt: skip


def then(kind: str, scale: Scale, results: Sequence[tuple[Trial, Result]]) -> list[Trial]:
    """Each arm with several seeds, at the rate that did best in the end on what was held out."""
    seeds = {"minute": 1, "ten": 3, "hour": 5, "paper": 5}[scale]
    length = {"data": kind, **LENGTHS[scale][kind]}
    best = {(arm, is_warm): (0.0, RATES[kind][1]) for arm in ARMS for is_warm in (True, False)}
    for trial, result in results:
        key = trial.name, bool(trial.settings["share"])
        best[key] = max(best[key], (result["accuracy"][-1], trial.settings["rate"]))
    return [
        Trial(arm, {**length, "share": share, "rate": best[arm, bool(share)][1], "held_out": 0.0}, s)
        for s in range(seeds) for arm, share in _arms(SHARES[:1] if scale == "minute" else SHARES)
    ]  # fmt: skip


def _arms(shares: Sequence[float]) -> list[tuple[str, float]]:
    """Fresh nets of each kind, and warm starts; shrink and perturb is the free net after the switch."""
    return [(arm, FRESH) for arm in ARMS[:3]] + [(arm, share) for share in shares for arm in ARMS]


def run(path: Path | None, trial: Trial, progress: Callable[[float, str], None]) -> Result:
    """Test accuracy ten times a phase (or accuracy on what is held out), lengths of matrices over their first."""
    settings = trial.settings
    data = _held_out(images(path), settings["held_out"], trial.seed)
    with seeded(trial.seed, "warm-start"):
        model: nn.Module = network(settings["net"], data.train.shape[1:], settings["width"])
        if trial.name in ("layer norm", "projected"):
            model = normalized(model)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(model.parameters(), lr=settings["rate"], fused=True)
    if trial.name == "projected":
        normalize_and_project(optimizer, model)
    for group in optimizer.param_groups:
        group["initial_lr"] = settings["rate"]
    perturb = ShrinkPerturb(1 - KEEP, NOISE)
    perturb.init(model, optimizer)
    roles = roles_of(model)
    matrices = [p.detach() for name, p in model.named_parameters() if roles[name] is Role.MATRIX]
    first = norms(matrices)
    updates = settings["updates"]
    found: Result = {"step": [], "accuracy": [], "length": [], "loss": []}
    order = torch.randperm(len(data.train), generator=generator(trial.seed, "subset"))
    for phase, rows in enumerate((order[: round(settings["share"] * len(order))], order)):
        if phase == 0 and not settings["share"]:
            continue
        if phase == 1 and settings["share"] and trial.name == "shrink-perturb":
            with torch.no_grad():
                perturb.apply(model, optimizer, Probe(1, generator(trial.seed, "noise"), cast(Any, None)))
        batches = _batches(rows, settings["batch"], generator(trial.seed, f"batches {phase}"))
        factor = warmup_cosine(max(1, updates // 20), updates)
        total = torch.zeros(())
        for update in range(updates):
            set_rates(optimizer, factor(update))
            batch = next(batches)
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.train[batch]), data.train_labels[batch])
            loss.backward()
            optimizer.step()
            total += loss.detach()
            if (update + 1) % max(1, updates // 10) == 0:
                found["step"].append(phase * updates + update + 1)
                found["accuracy"].append(round(accuracy(model, data.test, data.test_labels), 4))
                found["length"].append(round(float((norms(matrices) / first).mean()), 3))
                found["loss"].append(round(float(total) / max(1, updates // 10), 4))
                total.zero_()
                progress((phase * updates + update + 1) / (2 * updates), f"accuracy {found['accuracy'][-1]:.3f}")
    return found


def _held_out(data: Images, share: float, seed: int) -> Images:
    """Where a share is held out it takes the place of the test."""
    if not share:
        return data
    order = torch.randperm(len(data.train), generator=generator(seed, "held out"))
    out, rest = order[: int(share * len(order))], order[int(share * len(order)) :]
    return Images(data.train[rest], data.train_labels[rest], data.train[out], data.train_labels[out])


def _batches(rows: Tensor, size: int, random: torch.Generator) -> Iterator[Tensor]:
    """Rows in one random order after the other, `size` of them a time."""
    waiting = rows[:0]
    while True:
        while len(waiting) < size:
            waiting = torch.cat([waiting, rows[torch.randperm(len(rows), generator=random)]])
        yield waiting[:size]
        waiting = waiting[size:]


@torch.no_grad()
def accuracy(model: nn.Module, inputs: Tensor, labels: Tensor) -> float:
    """Share of right answers."""
    right = [model(x).argmax(-1) == y for x, y in zip(inputs.split(1000), labels.split(1000), strict=True)]
    return float(torch.cat(right).float().mean())


Runs = Sequence[tuple[Trial, Result]]
VISIBLE = 0.5
PAPER = {0.1: (0.734, 0.676, 0.793, 0.795), 0.5: (0.734, 0.718, 0.793, 0.801)}
"""Figure 4: test accuracy of the free net, fresh and warm, and of the projected one; CIFAR-10 with 50,000 images."""


def final(results: Runs, arm: str, share: float) -> list[float]:
    """Test accuracy at the end, by seed."""
    own = {trial.seed: result["accuracy"][-1] for trial, result in results
           if trial.name == arm and trial.settings["share"] == share and trial.seed != TUNING}  # fmt: skip
    return [own[seed] for seed in sorted(own)]


def gaps(results: Runs, arm: str, share: float) -> list[float]:
    """Fresh less warm in points, by seed; shrink and perturb has the fresh net of the free one."""
    fresh = final(results, "free" if arm == "shrink-perturb" else arm, FRESH)
    return [100 * (a - b) for a, b in zip(fresh, final(results, arm, share), strict=True)]


def judge(results: Runs) -> list[Claim]:
    """Figure 4 of the paper."""
    shares = sorted({trial.settings["share"] for trial, _ in results} - {FRESH})
    return [make(results, share) for share in shares for make in (_gap, _closing, _ends)]


def _clear(values: Sequence[float]) -> bool:
    """Whether there is a gap to speak of: in every seed, and of half a point in the mean."""
    return min(values) > 0 and statistics.mean(values) >= VISIBLE


def _gap(results: Runs, share: float) -> Claim:
    fresh, warm, *_ = PAPER[share]
    plain, normed = gaps(results, "free", share), gaps(results, "layer norm", share)
    verdict: Verdict = "not reproduced"
    if _clear(normed) or _clear(plain):
        like = _clear(normed) and statistics.mean(normed) >= 50 * (fresh - warm)
        verdict = "reproduced" if like else "direction only"
    return Claim(
        f"{_where(results)}: a free net that has first learned {share:.0%} of the data ends below the same net fresh",
        f"{100 * (fresh - warm):.1f} points below, with layer norm", "transcribed",
        f"{_points(normed)} below with layer norm ({_percent(final(results, 'layer norm', FRESH))} fresh), "
        f"{_points(plain)} without ({_percent(final(results, 'free', FRESH))} fresh)",
        f"{_range(normed)} points with, {_range(plain)} without", len(normed), verdict,
    )  # fmt: skip


def _closing(results: Runs, share: float) -> Claim:
    fresh, warm = PAPER[share][2:]
    held, plain, normed = (gaps(results, arm, share) for arm in ("projected", "free", "layer norm"))
    other = gaps(results, "shrink-perturb", share)
    most = max(plain, normed, key=statistics.mean)
    verdict: Verdict = "not reproduced"
    if not _clear(most):
        verdict = "not possible here"
    elif all(mine < free for mine, free in zip(held, most, strict=True)):
        verdict = "reproduced" if statistics.mean(held) <= statistics.mean(most) / 4 else "direction only"
    nothing = "; the set is too easy: there is no gap to close" if verdict == "not possible here" else ""
    return Claim(
        f"{_where(results)}: with projection and a rate that rises again the gap after {share:.0%} closes",
        f"{100 * (fresh - warm):.1f} points", "transcribed",
        f"{_points(held)} ({_percent(final(results, 'projected', FRESH))} fresh), free {_points(plain)}, "
        f"layer norm alone {_points(normed)}; shrink and perturb without norms {_points(other)}{nothing}",
        f"{_range(held)} points", len(held), verdict,
    )  # fmt: skip


def _ends(results: Runs, share: float) -> Claim:
    _, free, _, projected = PAPER[share]
    held, *others = (final(results, arm, share) for arm in ("projected", "layer norm", "free", "shrink-perturb"))
    ahead = [100 * (a - b) for a, b in zip(held, others[0], strict=True)]
    verdict: Verdict = "not reproduced"
    if statistics.mean(ahead) > 0:
        clear = min(ahead) > 0 and statistics.mean(ahead) >= 50 * (projected - free)
        verdict = "reproduced" if clear else "direction only"
    return Claim(
        f"{_where(results)}: after a start on {share:.0%} the projected net ends above the free one",
        f"{projected:.1%} projected, {free:.1%} free, with layer norm", "transcribed",
        f"{_percent(held)} projected, {_percent(others[0])} free with layer norm, {_percent(others[1])} free without, "
        f"{_percent(others[2])} shrink and perturb",
        f"{_range(ahead)} points ahead of layer norm", len(ahead), verdict,
    )  # fmt: skip


def _where(results: Runs) -> str:
    settings = results[-1][0].settings
    return f"{settings['data']}, {settings['net']} of width {settings['width']}"


def _percent(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1%}"


def _points(values: Sequence[float]) -> str:
    return f"{statistics.mean(values):.1f} points"


def _range(values: Sequence[float]) -> str:
    return f"{min(values):.1f} to {max(values):.1f}"


def seconds(trial: Trial) -> float:
    """About, on one processor."""
    s = trial.settings
    return float(IMAGE_SECONDS[s["data"], s["net"]] * s["width"] * s["batch"] * s["updates"] * (2 if s["share"] else 1))


def warm_start(data: Path | None = None) -> Reproduction:
    """The experiment on images that are in `data`, see `images`."""
    kind = kind_of(data)
    return Reproduction(
        "warm starts: the gap to a fresh net, and what closes it",
        "Lyle, Sokar, Pascanu, György 2025, What Can Grokking Teach Us About Learning Under Nonstationarity?, "
        "arXiv:2507.20057",
        partial(first_trials, kind), partial(run, data), judge, seconds, partial(then, kind),
    )  # fmt: skip
