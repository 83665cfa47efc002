"""One environment step of an xLSTM (3 tokens, 8 blocks of width 512, batch 1, one thread), beside floor and peer.

python benchmarks/xlstm_step.py --peer /path/to/python --rounds 200 --ledger

The floor is a sum over as many floats as the weights have, in the same rounds: what reading them once takes, from the
fastest of several fresh arrays. How fast an array is read depends on where the system has laid its pages; small pages
made it 1.5 to 3.7 ms from process to process, and large ones 1.5 to 1.7, so all tensors of 2 MB or more, of the peer
as well, are on large pages here (THP_MEM_ALLOC_ENABLE, a switch of torch). A sum over each of the weights themselves
stands beside the floor. The peer is `step` of xlstm 2.0.6, three times, in a process of its own with the same weights;
outputs are compared first. Figures are medians of processor time over the rounds, in which all take turns, and of
ratios within a round. Age: the state after `--age` steps beside that after 10.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["THP_MEM_ALLOC_ENABLE"] = "1"  # before torch is there

import numpy as np
import torch
from _ledger import append
from torch import Tensor

from pliant.core import nbytes, seeded
from pliant.models import XLSTM
from pliant.models.quantize import quantize_weights
from pliant.models.xlstm import XLSTMState, load_xlstm_weights

WIDTH, DEPTH, HEADS, TOKENS, CHECKED = 512, 8, 4, 3, 12
FLOORS = 4  # fresh arrays, of which the fastest is the floor
AIMS = {"ours / reading the weights": 1.5, "ours / xlstm": 1 / 3, "int8 / float32": 0.5}


def peer(folder: Path) -> None:
    """The other process: write weights and outputs, then answer each line with the seconds of one step."""
    from xlstm.blocks.mlstm.block import mLSTMBlockConfig
    from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
    from xlstm.xlstm_block_stack import xLSTMBlockStack, xLSTMBlockStackConfig

    torch.set_num_threads(1)
    torch.manual_seed(0)
    layer = mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=HEADS))
    stack = xLSTMBlockStack(
        xLSTMBlockStackConfig(mlstm_block=layer, context_length=64, num_blocks=DEPTH, embedding_dim=WIDTH)
    )
    x = torch.from_numpy(np.load(folder / "x.npy"))
    np.savez(folder / "weights.npz", **{name: weight.numpy() for name, weight in stack.state_dict().items()})
    state: Any = None

    def step(at: int) -> list[Tensor]:
        nonlocal state
        outputs = []
        for token in range(TOKENS * at, TOKENS * (at + 1)):
            y, state = stack.step(x[:, token : token + 1], state)
            outputs.append(y)
        return outputs

    with torch.no_grad():
        np.save(folder / "y.npy", torch.cat([y for at in range(CHECKED) for y in step(at)], 1).numpy())
        print("ready", flush=True)
        for _ in sys.stdin:
            print(seconds(lambda: step(0)), flush=True)


def seconds(run: Callable[[], Any]) -> float:
    before = time.thread_time()
    run()
    return time.thread_time() - before


def aged(model: XLSTM, steps: int) -> XLSTMState:
    """The state after so many environment steps, in chunks, which is the same."""
    random, state = torch.Generator().manual_seed(1), None
    for done in range(0, steps, 1000):
        x = torch.randn(1, TOKENS * min(1000, steps - done), WIDTH, generator=random)
        _, state = model(x, state)
    assert state is not None
    return state


def measure(python: str, rounds: int, age: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        x = torch.randn(1, TOKENS * CHECKED, WIDTH, generator=torch.Generator().manual_seed(0))
        np.save(folder / "x.npy", x.numpy())
        command = [python, __file__, "--worker", name]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            to, back = process.stdin, process.stdout
            assert to and back
            assert back.readline().strip() == "ready", "the peer does not run"

            def theirs() -> float:
                to.write("step\n")
                to.flush()
                return float(back.readline())

            with torch.no_grad():
                figures = _measure(folder, x, theirs, rounds, age)
            to.close()
    return figures


def _measure(folder: Path, x: Tensor, theirs: Callable[[], float], rounds: int, age: int) -> dict[str, Any]:
    with seeded(0):
        model = XLSTM(WIDTH, DEPTH, HEADS)
    load_xlstm_weights(model, {name: torch.from_numpy(w) for name, w in np.load(folder / "weights.npz").items()})
    small = quantize_weights(model)
    figures = {**errors(model, small, x, torch.from_numpy(np.load(folder / "y.npy")))}
    weights = [p.detach() for p in model.parameters()]
    size = sum(p.numel() for p in weights)
    floors, between, token = [torch.ones(size) for _ in range(FLOORS)], torch.ones(size), x[:, :TOKENS]
    young, old = (model(token, aged(model, steps - 1))[1] for steps in (10, age))
    runs: dict[str, Callable[[], Any]] = {
        "ours": lambda: model(token, young),
        "int8": lambda: small(token, young),
        "ours, aged": lambda: model(token, old),
        "reading the weights where they lie": lambda: [weight.sum() for weight in weights],
        **{f"reading {i}": floor.sum for i, floor in enumerate(floors)},
    }
    runs["xlstm"] = theirs
    taken: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 5):
        order = list(runs)[turn % len(runs) :] + list(runs)[: turn % len(runs)]
        for name in order:
            between.sum()  # all find the caches alike, whoever was before them
            time_taken = theirs() if name == "xlstm" else seconds(runs[name])
            if turn >= 5:
                taken[name].append(time_taken)
    readings = [taken.pop(f"reading {i}") for i in range(FLOORS)]
    taken["reading the weights"] = min(readings, key=statistics.median)
    figures |= {f"{name} ms": round(1e3 * statistics.median(values), 3) for name, values in taken.items()}
    figures["reading the weights, slowest array ms"] = round(1e3 * max(map(statistics.median, readings)), 3)
    pairs = [("ours", "reading the weights"), ("ours", "xlstm"), ("int8", "ours"), ("ours, aged", "ours")]
    for one, other in pairs:
        ratios = [a / b for a, b in zip(taken[one], taken[other], strict=True)]
        name = {"int8": "int8 / float32", "ours, aged": "aged / young"}.get(one, f"{one} / {other}")
        figures[name] = round(statistics.median(ratios), 3)
    return figures | {"weights MB": round(4e-6 * size, 1), "state MB": round(1e-6 * nbytes(young), 1), "age": age}


def errors(model: XLSTM, small: XLSTM, x: Tensor, expected: Tensor) -> dict[str, float]:
    """Largest differences over the largest output: from the peer, and of int8."""
    outputs = {}
    for name, run in (("ours", model), ("int8", small)):
        state, parts = None, []
        for part in x.split(TOKENS, 1):
            y, state = run(part, state)
            parts.append(y)
        outputs[name] = torch.cat(parts, 1)
    with torch.enable_grad():  # the readable form: modules one after the other, weights as they are rounded
        readable = small(x)[0].detach()
    top = expected.abs().max()
    pairs = {
        "differs from xlstm by": (outputs["ours"], expected),
        "int8 differs from float32 by": (outputs["int8"], outputs["ours"]),
        "int8 differs from its readable form by": (outputs["int8"], readable),
    }
    found = {name: float((a - b).abs().max() / top) for name, (a, b) in pairs.items()}
    assert found["differs from xlstm by"] < 1e-4, f"the peer computes something else: {found}"
    return {name: float(f"{value:.2g}") for name, value in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--peer", metavar="PYTHON", help="with torch and xlstm 2.0.6")
    parser.add_argument("--worker", metavar="FOLDER", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--age", type=int, default=100_000)
    parser.add_argument("--ledger", action="store_true", help="write the figures down")
    options = parser.parse_args()
    if options.worker:
        return peer(Path(options.worker))
    if not options.peer:
        parser.error("--peer is needed")
    figures = measure(options.peer, options.rounds, options.age)
    held = {name: figures[name] <= aim for name, aim in AIMS.items()} | {
        "aged / young": abs(figures["aged / young"] - 1) <= 0.1
    }
    for name, value in figures.items():
        print(f"  {name}: {value}" + ("" if held.get(name, True) else "  DOES NOT HOLD"))
    if options.ledger:
        missed = [name for name, holds in held.items() if not holds]
        append(
            "one step (3 tokens) of xLSTM, 8 blocks of width 512, one thread: 1.5 times reading the weights, a third "
            "of xlstm's time, int8 half of float32, flat to 100,000 steps",
            f"python benchmarks/xlstm_step.py --peer PYTHON --rounds {options.rounds} --age {options.age}",
            figures,
            holds=not missed,
            note="processor time" + (f"; not held: {', '.join(missed)}" if missed else ""),
        )


if __name__ == "__main__":
    main()
