"""The forms in Triton on a CUDA device: first that they equal the readable ones, then how long they take.

python benchmarks/gpu.py --rounds 20
python benchmarks/gpu.py --ledger

Equality: outputs, last states and all gradients, with states to start from, resets and masks, in float64 and float32,
once also under torch.compile; whoever is red gets no figures. Then `linear_scan` beside a copy of as many bytes (each
input read once and each output written once) and beside accelerated-scan and flash-linear-attention where they are
installed and compute the same; then the others beside their readable forms. What is compared takes turns in a round;
figures are quartiles over rounds, by CUDA events around work that is queued before it starts. One line of
docs/results/gpu.jsonl per run.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from _ledger import append
from torch import Tensor
from torch.nn import functional as F

from pliant import kernels
from pliant.bench.cases import ALL_KERNELS, Draw
from pliant.core.run import environment

RESULTS = Path(__file__).parents[1] / "docs" / "results" / "gpu.jsonl"
CLAIM = "linear_scan on a GPU, forward and backward: 90 % of the bandwidth of a copy at (8, 4096, 1024)"
BOUND = (8, 4096, 1024)
SHAPES = (BOUND, (1, 131072, 256), (8, 1024, 256), (2, 4096, 512), (1, 16384, 256))
UNITS = {"forward": 3, "both": 8}
"""Tensors that are read or written: a, u -> h; backward a, h, g -> da, du."""
AHEAD = 10_000_000
"""Cycles that the device waits while work is queued, some 5 ms."""
ROUNDINGS, SLACK = 256, 16
"""Roundings allowed between two orders of a sum, or so many times what the readable form errs in float32."""


class Case(NamedTuple):
    """A kernel: sizes (B, T, D) to check and to time, forms to time beside each other, arguments that are flags."""

    checked: tuple[tuple[int, int, int], ...]
    timed: tuple[int, int, int]
    beside: tuple[str, ...] = ("triton", "loop")
    flags: tuple[str, ...] = ("reset", "mask")


ODD = ((3, 37, 20), (1, 700, 40), (2, 1, 8))
CASES = {
    "linear_scan": Case((*ODD, (1, 20000, 8), (200, 300, 40)), BOUND, ("triton",), ("reset",)),
    "gated_scan": Case((*ODD, (1, 5000, 8), (200, 300, 40)), (8, 2048, 1024)),
    "gated_unit": Case(ODD, (8, 2048, 1024)),
    "matrix_memory": Case((*ODD, (2, 1000, 128)), (2, 2048, 256), ("triton", "chunkwise", "loop")),
    "scalar_memory": Case((*ODD, (2, 200, 256), (1, 50, 512)), (4, 512, 256)),
    "selective_scan": Case((*ODD, (2, 1000, 40)), (2, 2048, 256)),
    "causal_conv": Case((*ODD, (2, 1000, 40)), (8, 4096, 1024)),
}
STATES = {
    "linear_scan": lambda b, d: {"h0": (b, d)},
    "selective_scan": lambda b, d: {"h0": (b, d, 16)},
    "causal_conv": lambda b, d: {"history": (b, 3, d)},
}
"""Shapes of states to start from, of kernels whose inputs lack them."""


def draw(name: str, shape: tuple[int, int, int], dtype: torch.dtype, flags: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Inputs of a kernel on the device; floats have gradients."""
    numbers = Draw(name, dtype)
    found = ALL_KERNELS[name].draw(numbers, *shape)
    if name in STATES:
        found |= {key: numbers.normal(*size) for key, size in STATES[name](shape[0], shape[2]).items()}
    random = torch.Generator().manual_seed(1)
    share = {"reset": 0.05, "mask": 0.8}
    found |= {flag: torch.rand(shape[:2], generator=random) < share[flag] for flag in flags}
    moved = {key: x.cuda() for key, x in found.items()}
    return {key: x.requires_grad_() if x.is_floating_point() else x for key, x in moved.items()}


def call(name: str, form: str, inputs: dict[str, Tensor]) -> tuple[Tensor, ...]:
    """y and the parts of the state."""
    if name == "matrix_memory":
        inputs = {key: x for key, x in inputs.items() if not key.endswith("_gate")} | {
            "log_input": inputs["input_gate"], "log_forget": F.logsigmoid(inputs["forget_gate"]),
        }  # fmt: skip
    y, state = getattr(kernels, name)(**inputs, form=form)
    return y, *(state if isinstance(state, tuple) else (state,))


def both(run: Callable[[], tuple[Tensor, ...]], inputs: dict[str, Tensor]) -> list[Tensor]:
    """Outputs, and gradients of a loss that weighs them all."""
    found = run()
    weights = [torch.linspace(-1, 1.5, x.numel(), dtype=x.dtype, device=x.device).reshape(x.shape) for x in found]
    grads = torch.autograd.grad(found, [x for x in inputs.values() if x.requires_grad], weights)
    return [x.detach() for x in (*found, *grads)]


def difference(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest entry."""
    error = float((found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30))
    return error if error == error else float("inf")


def check(name: str) -> list[str]:
    """What is not as the readable form in float64 has it; nothing if all is well."""
    wrong, case = [], CASES[name]
    for shape in case.checked:
        wide, narrow = (draw(name, shape, dtype, case.flags) for dtype in (torch.float64, torch.float32))
        exact, plain = (both(partial(call, name, "loop", x), x) for x in (wide, narrow))
        allowed = [max(ROUNDINGS * torch.finfo(torch.float32).eps, SLACK * difference(*p)) for p in zip(plain, exact)]
        ours = partial(call, name, "triton")
        kinds = {
            "float64": (ours, wide, [1e-9 for _ in exact]),
            "float32": (ours, narrow, allowed),
        }
        if shape == case.checked[0]:
            kinds["float32 compiled"] = torch.compile(ours, fullgraph=True), narrow, allowed
        for kind, (run, inputs, most) in kinds.items():
            found = map(difference, both(partial(run, inputs), inputs), exact)
            for place, (error, limit) in enumerate(zip(found, most, strict=True)):
                if not error <= limit:
                    wrong.append(f"{name} {shape} {kind}, result {place}: {error:.1e} > {limit:.1e}")
        torch.compiler.reset()
    return wrong


def milliseconds(run: Callable[[], object]) -> float:
    """Of the device alone: it is kept waiting until the queue is full, so that gaps between launches do not count."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(AHEAD)
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def take_turns(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of each, round by round; the first rounds compile, warm up and are not kept."""
    took: dict[str, list[float]] = {who: [] for who in runs}
    for turn in range(rounds + 3):
        for who, run in runs.items():
            spent = milliseconds(run)
            if turn >= 3:
                took[who].append(spent)
    return took


def spread(values: list[float]) -> list[float]:
    """Quartiles."""
    return [round(value, 4) for value in statistics.quantiles(values, n=4)]


def passes(run: Callable[[], tuple[Tensor, ...]], inputs: dict[str, Tensor]) -> dict[str, Callable[[], object]]:
    """Forward without gradients, and forward and backward."""
    leaves = [x for x in inputs.values() if x.requires_grad]

    def forward() -> None:
        with torch.no_grad():
            run()

    def back() -> None:
        y = run()[0]
        torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)

    return {"forward": forward, "both": back}


def scan_beside_copies(shape: tuple[int, int, int], rounds: int) -> dict[str, list[float]]:
    """linear_scan beside a copy and peers: quartiles of milliseconds, and of the copy's time over each."""
    inputs = draw("linear_scan", shape, torch.float32)
    del inputs["h0"]  # which peers lack
    makers = {"ours": partial(call, "linear_scan", "triton", inputs)}
    exact = both(lambda: makers["ours"]()[:1], inputs)
    for who, make in peers(inputs):
        try:
            wrong = max(map(difference, both(make, inputs), exact))
            if wrong > 1e-3:
                raise ValueError(f"differs by {wrong:.1e}")
        except Exception as error:  # whatever a peer raises, the others go on
            print(f"  {who} at {shape}: no figures, {type(error).__name__}: {str(error)[:200]}")
        else:
            makers[who] = make
    runs = {who: passes(make, inputs) for who, make in makers.items()}
    figures = {}
    for what, units in UNITS.items():
        source = torch.ones(units * exact[0].numel() // 2, device="cuda")
        copy = partial(torch.empty_like(source).copy_, source)
        took = take_turns({"copy": copy, **{who: run[what] for who, run in runs.items()}}, rounds)
        for who, times in took.items():
            figures[f"{shape} {what} {who} ms"] = spread(times)
            if who != "copy":
                shares = [least / time for least, time in zip(took["copy"], times, strict=True)]
                figures[f"{shape} {what} copy / {who}"] = spread(shares)
    return figures


def peers(inputs: dict[str, Tensor]) -> Iterator[tuple[str, Callable[[], tuple[Tensor, ...]]]]:
    """Those that are installed, on the same inputs; what they need turned or taken the logarithm of is part of them."""
    a, u = inputs["a"], inputs["u"]
    try:
        from accelerated_scan.warp import scan as warp_scan
    except ImportError:
        pass
    else:
        yield "accelerated-scan", lambda: (warp_scan(a.mT.contiguous(), u.mT.contiguous()).mT,)
    try:
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn
    except ImportError:
        return
    yield "fla chunk_hgrn", lambda: (chunk_hgrn(u, a.log())[0],)
    yield "fla fused_recurrent_hgrn", lambda: (fused_recurrent_hgrn(u, a.log())[0],)


def beside_forms(name: str, case: Case, rounds: int) -> dict[str, list[float]]:
    """A kernel beside its other forms: quartiles of milliseconds, and of their times over ours."""
    inputs = draw(name, case.timed, torch.float32)
    runs = {form: passes(partial(call, name, form, inputs), inputs) for form in case.beside}
    figures = {}
    for what in UNITS:
        took = take_turns({form: run[what] for form, run in runs.items()}, rounds)
        for form, times in took.items():
            figures[f"{name} {case.timed} {what} {form} ms"] = spread(times)
            if form != "triton":
                ratios = [time / ours for time, ours in zip(times, took["triton"], strict=True)]
                figures[f"{name} {case.timed} {what} {form} / triton"] = spread(ratios)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("kernels", nargs="*", default=list(CASES), help=f"some of {', '.join(CASES)}")
    parser.add_argument("--rounds", type=int, default=20, help="0: no figures")
    parser.add_argument("--ledger", action="store_true", help="write down what the newest whole record says")
    options = parser.parse_args()
    if options.ledger:
        ledger()
        return
    if not torch.cuda.is_available():
        print("There is no CUDA device here, so nothing was run.", file=sys.stderr)
        sys.exit(2)
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), multiprocessing.get_context("spawn")) as pool:
        wrong = dict(zip(options.kernels, pool.map(check, options.kernels), strict=True))
    for name, lines in wrong.items():
        print(f"{name}: {'equal' if not lines else 'NOT EQUAL, no figures'}", *lines, sep="\n  ", flush=True)
    figures: dict[str, list[float]] = {}
    right = [name for name, lines in wrong.items() if not lines and options.rounds]
    if "linear_scan" in right:
        for shape in SHAPES:
            figures |= told(scan_beside_copies(shape, options.rounds))
    for name in right:
        if len(CASES[name].beside) > 1:
            figures |= told(beside_forms(name, CASES[name], options.rounds))
    save({"device": torch.cuda.get_device_name(), "wrong": wrong, "figures": figures, "rounds": options.rounds})
    sys.exit(1 if any(wrong.values()) else 0)


def ledger() -> None:
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    record = next(record for record in reversed(records) if record["figures"] and set(record["wrong"]) == set(CASES))
    found, wrong = record["figures"], record["wrong"]
    command = f"python benchmarks/gpu.py --rounds {record['rounds']}; --ledger"
    torch_version = record["environment"]["packages"]["torch"]
    note = f"medians of {record['rounds']} rounds on {record['device']}, torch {torch_version}"
    append("The forms in Triton equal the readable ones on a GPU: float64, float32, compiled", command,
           {name: "; ".join(lines) or "equal" for name, lines in wrong.items()}, holds=not any(wrong.values()),
           note=f"on {record['device']}, torch {torch_version}")  # fmt: skip
    shares = {name: values[1] for name, values in found.items() if name.endswith("copy / ours")}
    append(CLAIM, command, shares, holds=all(shares[f"{BOUND} {what} copy / ours"] >= 0.9 for what in UNITS), note=note)
    peers = {name.replace("copy / ", ""): values[1] / shares[f"{name.split(' copy')[0]} copy / ours"]
             for name, values in found.items() if "copy / " in name and name not in shares}  # fmt: skip
    append(f"linear_scan on a GPU is faster than accelerated-scan and flash-linear-attention at {BOUND}: their speed "
           "over ours", command, peers, holds=all(r < 1 for name, r in peers.items() if name.startswith(str(BOUND))),
           note=f"{note}; what they need turned, or the logarithm of, is part of them")  # fmt: skip
    readable = {name: values[1] for name, values in found.items() if name.endswith(" / triton")}
    append("The forms in Triton are faster than the readable ones", command, readable,
           holds=min(readable.values()) > 1, note=note)  # fmt: skip


def told(figures: dict[str, list[float]]) -> dict[str, list[float]]:
    for name, values in figures.items():
        print(f"  {name}: {values}", flush=True)
    return figures


def save(line: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with open(RESULTS, "a") as file:
        file.write(json.dumps(line | {"date": time.strftime("%Y-%m-%d"), "environment": environment()}) + "\n")


if __name__ == "__main__":
    main()
