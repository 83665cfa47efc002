"""One gated LRU block (convolution, gates, scan, projections), forward and backward, beside its peers.

python benchmarks/gated_lru.py --peers /path/to/python --rounds 9 --ledger

Width 512, 8 heads, B 4, T 1024, float32. The peers are `RecurrentGemmaRecurrentBlock` of transformers, and the block
of recurrentgemma under `jax.jit`, with the same weights, each in a process of its own, one of which works at a
time: they take turns within a round. Outputs and gradients are checked first. Figures are medians over rounds of
the ratios within a round, with the quartiles. Where others are at work on the machine, take one thread: then
processor time is what counts.

Memory is the peak of resident memory over what stood before (inputs, weights and code), so it holds activations,
outputs, gradients and what a pass needs meanwhile. It is measured in the first pass of processes whose allocator
gives back at once what is freed.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from _ledger import append

from pliant.core import seeded
from pliant.mixers import GatedLRU

WIDTH, HEADS, BATCH, STEPS = 512, 8, 4, 1024
AIMS = {"transformers": 10.0, "jax": 1.3}
WORKER = Path(__file__).with_name("_gated_lru_worker.py")
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


def problem(folder: Path) -> None:
    random = np.random.default_rng(0)
    for name in ("x", "g"):
        np.save(folder / f"{name}.npy", random.standard_normal((BATCH, STEPS, WIDTH), np.float32))
    with seeded(0):
        block = GatedLRU(WIDTH, num_heads=HEADS)
        with torch.no_grad():
            block.conv_weight.mul_(5)  # as large as a trained one
    np.savez(folder / "weights.npz", **{name: p.detach().numpy() for name, p in block.named_parameters()})


class Worker:
    """A process that makes one pass when asked."""

    def __init__(self, name: str, python: str, folder: Path, threads: int, environment: dict[str, str]):
        # XLA takes a minute to compile this, so that is done once.
        jax = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled")}
        settings = os.environ | environment | jax | {"OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [python, str(WORKER), name, str(folder), str(threads)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=settings,
        )  # fmt: skip

    def run(self) -> tuple[float, float, int]:
        """Wall and processor time in seconds, and bytes."""
        to, back = _pipes(self.process)
        to.write("run\n")
        to.flush()
        wall, cpu, peak = back.readline().split()
        return float(wall), float(cpu), int(peak)

    def close(self) -> None:
        self.process.communicate()


def _pipes(process: "subprocess.Popen[str]") -> tuple[IO[str], IO[str]]:
    assert process.stdin and process.stdout
    return process.stdin, process.stdout


@contextmanager
def workers(peers: str, folder: Path, threads: int, environment: dict[str, str]) -> Iterator[dict[str, Worker]]:
    with ExitStack() as stack:
        found = {}
        for name, python in (("ours", sys.executable), *((name, peers) for name in AIMS)):
            found[name] = Worker(name, python, folder, threads, environment)
            stack.callback(found[name].close)
        yield found


def check(folder: Path) -> dict[str, float]:
    """Largest difference from ours, over the largest entry, of outputs and gradients."""
    ours = dict(np.load(folder / "ours.npz"))
    worst = {}
    for peer in AIMS:
        theirs = dict(np.load(folder / f"{peer}.npz"))
        assert ours.keys() == theirs.keys()
        errors = {name: np.abs(ours[name] - theirs[name]).max() / np.abs(ours[name]).max() for name in ours}
        worst[peer] = float(max(errors.values()))
        assert worst[peer] < 1e-3, f"{peer} computes something else: {errors}"
    return worst


def spread(values: list[float]) -> list[float]:
    """Quartiles."""
    return [round(value, 3) for value in statistics.quantiles(values, n=4)]


def measure(peers: str, rounds: int, threads: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        problem(folder)
        with workers(peers, folder, threads, GIVE_BACK) as found:
            memory = {name: worker.run()[2] for name, worker in found.items()}
        figures: dict[str, Any] = {f"{name} differs by": error for name, error in check(folder).items()}
        taken: dict[str, list[tuple[float, float, int]]] = {}
        with workers(peers, folder, threads, {}) as found:
            for turn in range(rounds + 1):
                for name, worker in found.items():
                    took = worker.run()
                    if turn:
                        taken.setdefault(name, []).append(took)
    for which, kind in enumerate(("wall", "processor")):
        seconds = {name: [took[which] for took in all_] for name, all_ in taken.items()}
        figures |= {f"{name} {kind} s": spread(values) for name, values in seconds.items()}
        for peer in AIMS:
            ratios = [theirs / mine for theirs, mine in zip(seconds[peer], seconds["ours"], strict=True)]
            figures[f"{peer} / ours, {kind}"] = spread(ratios)
    figures["others at work"] = round(os.getloadavg()[1] - 1, 1)
    figures |= {f"{name} MiB": round(peak / 2**20, 1) for name, peak in memory.items()}
    figures |= {f"ours / {peer}, memory": round(memory["ours"] / memory[peer], 3) for peer in AIMS}
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peers", metavar="PYTHON", required=True, help="with transformers and recurrentgemma[jax]")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--ledger", action="store_true", help="write the figures down")
    options = parser.parse_args()
    figures = measure(options.peers, options.rounds, options.threads)
    kind = "wall" if options.threads > 1 else "processor"
    fast = all(figures[f"{peer} / ours, {kind}"][1] >= aim for peer, aim in AIMS.items())
    small = all(figures[f"ours / {peer}, memory"] <= 0.5 for peer in AIMS)
    for name, value in figures.items():
        print(f"  {name}: {value}")
    print("speed", "holds" if fast else "DOES NOT HOLD", "memory", "holds" if small else "DOES NOT HOLD")
    if options.ledger:
        command = f"python benchmarks/gated_lru.py --peers PYTHON --rounds {options.rounds} --threads {options.threads}"
        append("gated LRU block, forward and backward: 10 times as fast as transformers, 1.3 times as jitted "
               "recurrentgemma, half of their memory", command, figures, holds=fast and small,
               note=f"quartiles; speed {'holds' if fast else 'does not hold'}, "
                    f"memory {'holds' if small else 'does not hold'}")  # fmt: skip


if __name__ == "__main__":
    main()
