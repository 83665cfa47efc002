"""The linear scan beside a copy of the same number of bytes, and beside JAX.

python benchmarks/linear_scan.py --rounds 15 --jax /path/to/python --ledger

What is compared takes turns within a round; figures are medians over rounds, with the quartiles. Values and
gradients are checked first. float32, two threads.

The bound: each input read once and each output written once (forward: a, u -> h; backward: a, h, g -> da, du), at
the bandwidth of a copy of as many bytes in the same round. A tensor this large is new memory at each call, and the
system clears it page by page at the first write, so the copy has a new tensor to fill too, in three ways:
`clone` as torch does it, `large` with the same large pages as ours, `kept` into memory that was there before, which
no function that returns new tensors can do. Forward and backward are held to `large`.

JAX runs in a process of its own (`_linear_scan_jax.py`), with jitted `lax.scan` and `lax.associative_scan`.
"""

import argparse
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from _ledger import append
from torch import Tensor

from pliant.kernels import linear_scan
from pliant.kernels._jit import whole_pages

BOUND = ((8, 4096, 1024), (1, 131072, 256))
BESIDE_JAX = ((8, 1024, 256), (2, 4096, 512), (1, 16384, 256))
UNITS = {"forward": 3, "both": 8}
AIMS = {"forward": 1.3, "both": 1.5}


class Problem:
    """Inputs of one shape, and what is timed on them."""

    def __init__(self, shape: tuple[int, int, int]):
        random = torch.Generator().manual_seed(0)
        self.a = (torch.rand(shape, generator=random) * 0.2 + 0.8).requires_grad_()
        self.u = torch.randn(shape, generator=random).requires_grad_()
        self.g = torch.randn(shape, generator=random)

    def forward(self) -> list[Tensor]:
        with torch.no_grad():
            return [linear_scan(self.a, self.u)[0]]

    def both(self) -> list[Tensor]:
        h, _ = linear_scan(self.a, self.u)
        return [h.detach(), *torch.autograd.grad(h, (self.a, self.u), self.g)]

    def check(self) -> None:
        """Equal to the recurrence and its derivative in float64, on a part of the channels."""
        a, u, g = (x.detach()[:, :, :8].double().numpy() for x in (self.a, self.u, self.g))
        h, du = np.zeros_like(a), g.copy()
        steps = a.shape[1]
        for t in range(steps):
            h[:, t] = a[:, t] * h[:, t - 1] + u[:, t] if t else u[:, t]
        for t in range(steps - 2, -1, -1):
            du[:, t] += a[:, t + 1] * du[:, t + 1]
        da = du * np.concatenate([np.zeros_like(h[:, :1]), h[:, :-1]], 1)
        for found, wanted in zip(self.both(), (h, da, du), strict=True):
            error = np.abs(found[:, :, :8].numpy() - wanted).max() / np.abs(wanted).max()
            assert error < 1e-5, f"wrong by {error:.1e}"


class Copies:
    """A copy of `size` bytes read and written together, in three ways."""

    def __init__(self, size: int):
        self.source = torch.ones(size // 8)
        self.kept_target = torch.zeros(size // 8)

    def clone(self) -> None:
        self.source.clone()

    def large(self) -> None:
        whole_pages(torch.empty_like(self.source)).copy_(self.source)

    def kept(self) -> None:
        self.kept_target.copy_(self.source)


class Jax:
    """The other process; one line in, the seconds of one run out."""

    def __init__(self, python: str, problem: Problem, form: str):
        self.folder = tempfile.TemporaryDirectory()
        for name in ("a", "u", "g"):
            np.save(Path(self.folder.name, f"{name}.npy"), getattr(problem, name).detach().numpy())
        script = Path(__file__).with_name("_linear_scan_jax.py")
        self.process = subprocess.Popen([python, script, self.folder.name, form], stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE, text=True)  # fmt: skip
        self.seconds()  # compiles, and writes what it found
        for name, ours in zip(("h", "da", "du"), problem.both(), strict=True):
            theirs = torch.from_numpy(np.load(Path(self.folder.name, f"{name}.npy")))
            assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max(), f"{form}: {name} differs from JAX"

    def seconds(self) -> float:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("run\n")
        self.process.stdin.flush()
        return float(self.process.stdout.readline())

    def close(self) -> None:
        self.process.communicate()
        self.folder.cleanup()


def seconds(function: Callable[[], object]) -> float:
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def spread(values: list[float]) -> list[float]:
    """Quartiles."""
    return [round(value, 3) for value in statistics.quantiles(values, n=4)]


def against_copies(shape: tuple[int, int, int], rounds: int) -> dict[str, list[float]]:
    """Quartiles of time over bound, by what is timed and by kind of copy."""
    problem = Problem(shape)
    problem.check()
    unit = 4 * problem.a.numel()
    ratios: dict[str, list[float]] = {}
    for what, units in UNITS.items():
        copies = Copies(units * unit)
        runs = {"ours": getattr(problem, what), **{kind: getattr(copies, kind) for kind in ("large", "clone", "kept")}}
        for turn in range(rounds + 1):
            took = {name: seconds(run) for name, run in runs.items()}
            if turn:
                ratios.setdefault(f"{what} ms", []).append(1000 * took["ours"])
                for kind in ("large", "clone", "kept"):
                    ratios.setdefault(f"{what} / {kind}", []).append(took["ours"] / took[kind])
    return {name: spread(values) for name, values in ratios.items()}


def against_jax(shape: tuple[int, int, int], rounds: int, python: str) -> dict[str, list[float]]:
    """Quartiles of JAX's time over ours, by form of JAX."""
    problem = Problem(shape)
    problem.check()
    forms = {form: Jax(python, problem, form) for form in ("scan", "associative")}
    ratios: dict[str, list[float]] = {}
    for turn in range(rounds + 1):
        ours, theirs = seconds(problem.both), {form: jax.seconds() for form, jax in forms.items()}
        if turn:
            ratios.setdefault("ours ms", []).append(1000 * ours)
            ratios.setdefault("JAX / ours", []).append(min(theirs.values()) / ours)
            for form, took in theirs.items():
                ratios.setdefault(f"{form} / ours", []).append(took / ours)
    for jax in forms.values():
        jax.close()
    return {name: spread(values) for name, values in ratios.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--jax", metavar="PYTHON", help="a Python in which jax is installed")
    parser.add_argument("--ledger", action="store_true", help="write the figures down")
    options = parser.parse_args()
    torch.set_num_threads(2)
    command = f"python benchmarks/linear_scan.py --rounds {options.rounds}"
    found = {str(shape): against_copies(shape, options.rounds) for shape in BOUND}
    figures = {f"{shape} {name}": values for shape, ratios in found.items() for name, values in ratios.items()}
    holds = all(ratios[f"{what} / large"][1] <= aim for ratios in found.values() for what, aim in AIMS.items())
    report("linear_scan: at most 1.3 times the time that memory needs, with the backward pass 1.5 times", command,
           figures, holds, options.ledger, "quartiles; 'large': a copy into new memory, as of the scan")  # fmt: skip
    if options.jax:
        found = {str(shape): against_jax(shape, options.rounds, options.jax) for shape in BESIDE_JAX}
        figures = {f"{shape} {name}": values for shape, ratios in found.items() for name, values in ratios.items()}
        holds = all(ratios["JAX / ours"][1] >= 4 for ratios in found.values())
        report("linear_scan: forward and backward 4 times as fast as the best jitted form in JAX",
               f"{command} --jax PYTHON", figures, holds, options.ledger, "quartiles")  # fmt: skip


def report(claim: str, command: str, figures: dict[str, list[float]], holds: bool, ledger: bool, note: str) -> None:
    print(claim, "holds" if holds else "DOES NOT HOLD", sep="\n")
    for name, values in figures.items():
        print(f"  {name}: {values}", flush=True)
    if ledger:
        # What else the machine did: wall-clock time is shared with it.
        append(claim, command, figures | {"load": [round(os.getloadavg()[1], 1)]}, holds=holds, note=note)


if __name__ == "__main__":
    main()
