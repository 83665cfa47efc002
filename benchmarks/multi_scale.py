"""MultiScaleSSM: a step of training beside stock convolutions and the scan of mambapy, one step of a stream, its age.

python benchmarks/multi_scale.py train --ledger     # needs the package mambapy
python benchmarks/multi_scale.py forms --ledger     # forms of its kernels, forward and backward
python benchmarks/multi_scale.py step --ledger
python benchmarks/multi_scale.py age --ledger       # 100,000 steps of a stream
python benchmarks/multi_scale.py digits --run FOLDER --ledger    # what `pliant reproduce ms-ssm --run FOLDER` found

All by one thread. What is compared takes turns in one process, outputs are compared first, and figures are medians
of processor time over the rounds. The peer of `train` has the same blocks and parameters; its bank is one depthwise
`Conv1d` for each level, and its scan that of mambapy over all scales at once.
"""

import argparse
import gc
import json
import resource
import statistics
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _ledger import DOCS, append
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import nbytes, seeded
from pliant.kernels import filter_bank, scale_scan
from pliant.mixers import MultiScaleSSM
from pliant.mixers.multires import FilterBank
from pliant.models import SequenceClassifier
from pliant.models.blocks import Stack
from pliant.recipes import ms_ssm

BATCH, STEPS, WIDTH, DEPTH, LEVELS = 8, 1024, 128, 2, 3
STREAM_DEPTH = 4
KINDS = {"invariant": False, "selective": True}


class Stock(nn.Module):
    """The same layer from a stock convolution for each level and the parallel scan of mambapy."""

    def __init__(self, own: MultiScaleSSM):
        super().__init__()
        self.own, self.width = own, own.width

    def forward(self, x: Tensor, state: Any, *, reset: Any = None, mask: Any = None) -> tuple[Tensor, Any]:
        from mambapy.pscan import pscan

        own, u = self.own, self.bands(x)  # (B, T, M D)
        if own.selective:
            decay, inputs, C = self.selected(x, u)
        else:
            a, c = own.system()
            decay = a.transpose(1, 2).flatten(0, 1).expand(*u.shape, -1)
            inputs, C = u[..., None].expand_as(decay), c.transpose(1, 2).flatten(0, 1)
        h = pscan(decay.contiguous(), inputs.contiguous())
        y = ((h * C).sum(-1) + own.skip.flatten() * u).unflatten(-1, (own.scales, -1))
        return (own.weights.at(x)[..., None] * y).sum(2), state

    def bands(self, x: Tensor) -> Tensor:
        assert isinstance(self.own.bank, FilterBank)
        a, found = x.mT, [x.mT]
        for level, filters in enumerate(self.own.bank.weight):
            both = filters.permute(2, 0, 1).reshape(2 * self.width, 1, -1)
            padded = F.pad(a, ((filters.shape[1] - 1) << level, 0))
            a, d = F.conv1d(padded, both, dilation=1 << level, groups=self.width).unflatten(1, (-1, 2)).unbind(2)
            found.append(d)
        return torch.cat([*found, a], 1).mT

    def selected(self, x: Tensor, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        own = self.own
        scales, size, width = own.log_rate.shape
        step, B, C = own.linear_select(x).split([own.step_weight.shape[1], scales * size, scales * size], -1)
        matrix = own.step_weight.transpose(0, 1).flatten(1)
        dt = F.softplus(step @ matrix + own.step_bias.flatten())
        A = own.rates().transpose(1, 2).flatten(0, 1)
        B, C = (part.unflatten(-1, (scales, 1, size)).expand(-1, -1, -1, width, -1).flatten(2, 3) for part in (B, C))
        return torch.exp(dt[..., None] * A), (dt * u)[..., None] * B, C


def train(rounds: int) -> dict[str, float]:
    figures: dict[str, float] = {}
    x = torch.randn(BATCH, STEPS, WIDTH, generator=torch.Generator().manual_seed(0))
    for kind, selective in KINDS.items():
        with seeded(0):
            ours = Stack([MultiScaleSSM(WIDTH, LEVELS, selective=selective) for _ in range(DEPTH)])
        theirs = Stack([block.mixer for block in ours.blocks])
        theirs.load_state_dict(ours.state_dict())
        for block in theirs.blocks:
            block.mixer = Stock(block.mixer)  # type: ignore[assignment]
        states = ours.init_state(BATCH)
        runs = {"ours": _training(ours, x, states), "stock": _training(theirs, x, states)}
        with torch.no_grad():
            one, two = (stack(x, states)[0] for stack in (ours, theirs))
            figures[f"{kind}, outputs differ by"] = float((one - two).abs().max() / two.abs().max())
        taken = _in_turn(runs, rounds)
        figures |= {f"{kind}, {name} ms": round(1e3 * statistics.median(times), 1) for name, times in taken.items()}
        ratios = [b / a for a, b in zip(taken["ours"], taken["stock"], strict=True)]
        figures[f"{kind}, times faster"] = round(statistics.median(ratios), 2)
    return figures


def _training(stack: nn.Module, x: Tensor, states: Any) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(stack.parameters(), 1e-5)

    def run() -> None:
        optimizer.zero_grad()
        stack(x, states)[0].square().mean().backward()
        optimizer.step()

    return run


def _in_turn(runs: dict[str, Callable[[], Any]], rounds: int, warm: int = 1) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + warm):
        for name in list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]:
            gc.collect() if warm == 1 else None
            before = time.thread_time()
            runs[name]()
            if turn >= warm:
                taken[name].append(time.thread_time() - before)
    return taken


def forms(rounds: int) -> dict[str, float]:
    """Forward and backward passes of the forms of both kernels, and of stock convolutions."""
    figures: dict[str, float] = {}
    random = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=random, requires_grad=True) for s in (
        (BATCH, STEPS, WIDTH), (LEVELS, 2, 4, WIDTH)))  # fmt: skip
    with seeded(0):
        stock = Stock(MultiScaleSSM(WIDTH, LEVELS))
    runs = {f"filter_bank, {form}": _both(lambda form=form: filter_bank(x, weight, form=form)[0], [x, weight])
            for form in ("numba", "conv")}  # fmt: skip
    runs["filter_bank, stock Conv1d"] = _both(lambda: stock.bands(x), [x, *stock.own.bank.parameters()])
    for size in (4, 16, 64):
        shapes = {"u": (LEVELS + 2, BATCH, STEPS, WIDTH), "decay": (LEVELS + 2, size, WIDTH)}
        u, a = (torch.rand(s, generator=random).requires_grad_() for s in shapes.values())
        c = torch.randn(a.shape, generator=random, requires_grad=True)
        for form in ("numba", "fft"):
            call = lambda u=u, a=a, c=c, form=form: scale_scan(u, a, c, form=form)[0]  # noqa: E731
            runs[f"scale_scan, N {size}, {form}"] = _both(call, [u, a, c])
    for name, times in _in_turn(runs, rounds).items():
        figures[f"{name} ms"] = round(1e3 * statistics.median(times), 1)
    return figures


def _both(call: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        y = call()
        torch.autograd.grad(y, leaves, torch.ones_like(y))

    return run


def step(rounds: int) -> dict[str, float]:
    """p50 and p95 of one step of a classifier of four layers, and of the same with its layers folded.

    Folded layers are of plain torch; what is not folded takes one pass of a kernel.
    """
    figures: dict[str, float] = {}
    x = torch.randn(1, WIDTH, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for kind, options in (
            ("invariant", {}),
            ("selective", {"selective": True}),
            ("static", {"weights": "static"}),
        ):
            with seeded(0):
                model = SequenceClassifier(
                    WIDTH,
                    10,
                    width=WIDTH,
                    depth=STREAM_DEPTH,
                    mixer="MultiScaleSSM",
                    mixer_options={"levels": LEVELS, **options},
                )
            runs = {}
            for name in ("whole", "folded"):
                if name == "folded":
                    for block in model.stack.blocks:
                        block.mixer = block.mixer.fold()  # type: ignore[operator]
                runs[name] = _stream(model, x)
                for _ in range(30):
                    runs[name]()
                times = [_seconds(runs[name]) for _ in range(rounds)]
                marks = statistics.quantiles(times, n=20)
                figures[f"{kind}, {name}, p50 ms"] = round(1e3 * statistics.median(times), 3)
                figures[f"{kind}, {name}, p95 ms"] = round(1e3 * marks[-1], 3)
    return figures


def _stream(model: SequenceClassifier, x: Tensor) -> Callable[[], None]:
    state: Any = None

    def run() -> None:
        nonlocal state
        _, state = model.step(x, state)

    return run


def _seconds(run: Callable[[], None]) -> float:
    before = time.perf_counter()
    run()
    return time.perf_counter() - before


def age(steps: int) -> dict[str, float]:
    """Memory and time of a stream after 1,000 steps and after all of them."""
    with seeded(0):
        model = SequenceClassifier(WIDTH, 10, width=WIDTH, depth=STREAM_DEPTH, mixer="MultiScaleSSM")
    inputs = torch.randn(1000, 1, WIDTH, generator=torch.Generator().manual_seed(0))
    state, figures, times = None, {}, deque[float](maxlen=500)
    with torch.inference_mode():
        for t in range(steps):
            before = time.thread_time()
            _, state = model.step(inputs[t % 1000], state)
            times.append(time.thread_time() - before)
            if t + 1 in (1000, steps):
                figures[f"state bytes after {t + 1}"] = nbytes(state)
                figures[f"peak MB after {t + 1}"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1)
                figures[f"p50 ms of the last 500 of {t + 1}"] = round(1e3 * statistics.median(times), 3)
    return figures


def digits(folder: Path) -> dict[str, Any]:
    """Accuracies of the arms over the seeds that all of them have; the trials go to docs/results/ms-ssm.jsonl."""
    rows = {}
    for line in (folder / "trials.jsonl").read_text().splitlines():
        row = json.loads(line)
        rows[row["key"]] = row["result"]
    trials = [trial for trial in ms_ssm.trials(None, "ten") if trial.key in rows]
    seeds = [seed for seed in range(5) if sum(trial.seed == seed for trial in trials) == len(ms_ssm.ARMS)]
    kept = [(trial, rows[trial.key]) for trial in trials if trial.seed in seeds]
    lines = [{"name": trial.name, "seed": trial.seed, **result} for trial, result in kept]
    (DOCS / "results" / "ms-ssm.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    figures: dict[str, Any] = {"seeds": len(seeds)}
    for name in ms_ssm.ARMS:
        figures[name] = [round(result["accuracy"], 3) for trial, result in kept if trial.name == name]
    figures |= {claim.claim: f"{claim.ours}; {claim.spread}; {claim.verdict}" for claim in ms_ssm.judge(kept)}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["train", "forms", "step", "age", "digits"])
    parser.add_argument("--rounds", type=int, default=0)
    parser.add_argument("--run", type=Path, help="of digits: the folder of the reproduction")
    parser.add_argument("--ledger", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.what == "train":
        figures = train(options.rounds or 5)
        holds = all(value >= 2 for name, value in figures.items() if "faster" in name)
        claim = f"a training step of two MultiScaleSSM blocks is twice as fast as stock Conv1d and mambapy's scan, B {BATCH}, T {STEPS}, width {WIDTH}"  # noqa: E501
    elif options.what == "forms":
        figures = forms(options.rounds or 5)
        pairs = [(f"scale_scan, N {size}, numba ms", f"scale_scan, N {size}, fft ms") for size in (4, 16, 64)]
        pairs.append(("filter_bank, numba ms", "filter_bank, stock Conv1d ms"))
        holds = all(figures[ours] < figures[other] for ours, other in pairs)
        claim = f"the bank takes less than stock Conv1d, and the recurrence less than FFT up to N = 64, B {BATCH}, T {STEPS}, width {WIDTH}"  # noqa: E501
    elif options.what == "step":
        figures = step(options.rounds or 1000)
        holds = all(value < 1 for name, value in figures.items() if "whole, p50" in name)
        claim = f"one step of a classifier of {STREAM_DEPTH} MultiScaleSSM layers of width {WIDTH}, S = {LEVELS}, takes less than 1 ms at p50 on one core"  # noqa: E501
    elif options.what == "digits":
        figures = digits(options.run)
        holds = "direction only" in figures[claim := ms_ssm.ORDER]
        claim += ", on digits read pixel by pixel"
    else:
        steps = options.rounds or 100_000
        figures = age(steps)
        grown = figures[f"peak MB after {steps}"] - figures["peak MB after 1000"]
        figures["grown by MB"] = round(grown, 1)
        holds = figures[f"state bytes after {steps}"] == figures["state bytes after 1000"] and grown < 8
        claim = f"{steps} steps of such a stream need no more memory than 1,000"
    for name, value in figures.items():
        print(f"{name:44} {value}")
    command = f"python benchmarks/multi_scale.py {options.what}" + (" --run FOLDER" if options.run else "")
    if options.ledger:
        append(claim, command, figures, holds=holds)


if __name__ == "__main__":
    main()
