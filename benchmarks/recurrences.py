"""Recurrences, forward and backward, beside those of xlstm and mambapy; with more steps, more threads, and bfloat16.

python benchmarks/recurrences.py peers --rounds 9 --ledger     # in a Python with pliant, xlstm and mambapy
python benchmarks/recurrences.py lengths --ledger
python benchmarks/recurrences.py threads --ledger
python benchmarks/recurrences.py forms --ledger
python benchmarks/recurrences.py bfloat16 --ledger

All take turns within a round, and ratios are taken round by round; figures are their quartiles. Outputs and gradients
are compared with the readable form in float64 before anything is timed, see `pliant.bench`. xlstm asks for packages
that it does not need for this: install it with --no-deps, and einops, dacite, omegaconf and packaging beside it.
"""

import argparse
import os
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from random import Random
from typing import Any

import torch
from _ledger import append

from pliant.bench import KERNELS, MIXERS, PEERS, Case, Sizes, find_peers
from pliant.bench.compare import check, makers_of

Run = Callable[[], object]


@dataclass(frozen=True)
class Claim:
    """A case of ours that is to be so many times as fast as each of some peers."""

    case: Case
    sizes: Sizes
    aims: Mapping[str, float]


CLAIMS = {
    "mLSTM": Claim(KERNELS["matrix_memory"], Sizes(2, 2048, 256), {"xlstm parallel": 10, "xlstm chunkwise": 2}),
    "sLSTM": Claim(MIXERS["SLSTM"], Sizes(4, 512, 256), {"xlstm sLSTMLayer vanilla": 10}),
    "selective_scan": Claim(KERNELS["selective_scan"], Sizes(2, 2048, 256), {"mambapy": 3}),
}
FORM_LENGTHS = (1, 2, 4, 8, 16, 64, 256, 1024)
LENGTHS = tuple(2**n for n in range(11, 17))
BUSY = {
    "matrix_memory": (KERNELS["matrix_memory"], Sizes(4, 2048, 256)),
    "delta_rule": (KERNELS["delta_rule"], Sizes(4, 2048, 256)),
    "selective_scan": (KERNELS["selective_scan"], Sizes(4, 2048, 256)),
    "scalar_memory": (KERNELS["scalar_memory"], Sizes(8, 512, 256)),
    "gated_unit": (KERNELS["gated_unit"], Sizes(4, 1024, 512)),
    "GatedLRU": (MIXERS["GatedLRU"], Sizes(4, 1024, 512)),
    "MLSTM": (MIXERS["MLSTM"], Sizes(4, 1024, 256)),
    "GatedDelta": (MIXERS["GatedDelta"], Sizes(4, 1024, 256)),
    "S6": (MIXERS["S6"], Sizes(4, 1024, 256)),
    "linear map, for comparison": (None, Sizes(4, 1024, 1024)),
}
"""Work that is bound by arithmetic, not by memory."""


def quartiles(values: list[float]) -> list[float]:
    return [round(value, 3) for value in statistics.quantiles(values, n=4)]


def turns(
    runs: Mapping[str, Run], rounds: int, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run in each round, in an order that is drawn anew; the round before is not counted."""
    took: dict[str, list[float]] = {name: [] for name in runs}
    order, random = list(runs), Random(0)
    for turn in range(-1, rounds):
        random.shuffle(order)
        for name in order:
            began = clock()
            runs[name]()
            if turn >= 0:
                took[name].append(clock() - began)
    return took


def ratios(took: Mapping[str, list[float]], over: str) -> dict[str, list[float]]:
    """By how much each takes longer than `over`, quartiles over rounds."""
    return {
        f"{name} / {over}": quartiles([a / b for a, b in zip(took[name], took[over], strict=True)])
        for name in took if name != over
    }  # fmt: skip


def peers(rounds: int, ledger: bool) -> None:
    for name, claim in CLAIMS.items():
        found, absent = find_peers([peer for peer in PEERS if peer.name in claim.aims], [claim.case.name])
        if absent:
            print(f"{name}: {', '.join(absent)} not installed")
            continue
        ours = claim.case.forms[0]
        makers = {who: make for who, make in makers_of(claim.case, found).items() if who == ours or who in claim.aims}
        red = {who: one.why for who, one in check(claim.case, makers, claim.sizes).items() if one.why}
        if red:
            raise SystemExit(f"{name}: no figures, {red}")
        problem = claim.case.problem(claim.sizes, torch.float32)
        took = turns({who: make(problem).both for who, make in makers.items()}, rounds)
        over = ratios(took, ours)
        say(
            f"{name}, {text(claim.sizes)}, forward and backward: "
            + ", ".join(f"{aim:g} times as fast as {who}" for who, aim in claim.aims.items()),
            f"peers --rounds {rounds}",
            {f"{who} ms": quartiles([1000 * x for x in values]) for who, values in took.items()} | over,
            all(over[f"{who} / {ours}"][1] >= aim for who, aim in claim.aims.items()),
            ledger,
        )


def lengths(rounds: int, ledger: bool) -> None:
    """matrix_memory with T doubled again and again."""
    case, works = KERNELS["matrix_memory"], {}
    for steps in LENGTHS:
        works[steps] = case.work(case.problem(Sizes(2, steps, 256), torch.float32), case.forms[0]).both
    took = turns({str(steps): run for steps, run in works.items()}, rounds)
    figures = {f"T {steps} ms": quartiles([1000 * x for x in values]) for steps, values in took.items()}
    grown = {}
    for short, long in pairwise(LENGTHS):
        grown |= ratios({name: took[name] for name in (str(short), str(long))}, str(short))
    say(
        "mLSTM, B 2, 4 heads of 64, forward and backward: time at most 2.2 times when T doubles, up to 65,536",
        f"lengths --rounds {rounds}", figures | grown, all(values[1] <= 2.2 for values in grown.values()), ledger,
    )  # fmt: skip


def threads(rounds: int, ledger: bool) -> None:
    """Two threads over one."""
    figures = {}
    for name, (case, sizes) in BUSY.items():
        run = linear_map(sizes) if case is None else case.work(case.problem(sizes, torch.float32), case.forms[0]).both

        def with_threads(number: int, run: Run = run) -> Run:
            def go() -> None:
                torch.set_num_threads(number)
                run()

            return go

        took = turns({str(n): with_threads(n) for n in (1, 2)}, rounds)
        figures[f"{name}, {text(sizes)}"] = ratios(took, "2")["1 / 2"]
        print(name, figures[f"{name}, {text(sizes)}"], flush=True)
    torch.set_num_threads(2)
    ours = [values[1] for name, values in figures.items() if "comparison" not in name]
    say("Two threads are 1.7 times as fast as one where arithmetic is the bound, forward and backward",
        f"threads --rounds {rounds}", figures, all(value >= 1.7 for value in ours), ledger)  # fmt: skip


def forms(rounds: int, ledger: bool) -> None:
    """What is taken where nobody asks, over the fastest form, by kernel, float type and length."""
    figures, worst = {}, 0.0
    for name, case in KERNELS.items():
        for dtype in (torch.float32, torch.float64):
            for steps in FORM_LENGTHS:
                problem = case.problem(Sizes(2, steps, 64), dtype)
                runs = {"default": case.work(problem, None).both}
                runs |= {form: case.work(problem, form).both for form in case.forms if form != "loop" or steps <= 64}
                took = {who: statistics.median(values) for who, values in turns(runs, rounds).items()}
                best = min(took, key=lambda who: took[who])
                over = took["default"] / took[best]
                if over > 1.25:
                    figures[f"{name} {str(dtype)[6:]} T {steps}"] = f"{over:.2f} times {best}"
                worst = max(worst, over)
        print(name, {key: value for key, value in figures.items() if key.startswith(name)}, flush=True)
    figures["worst"] = round(worst, 2)
    say("The form taken by default is at most 1.5 times as slow as the fastest, forward and backward, B 2, width 64",
        f"forms --rounds {rounds}", figures, worst <= 1.5, ledger)  # fmt: skip


def linear_map(sizes: Sizes) -> Run:
    """What torch makes of two threads."""
    layer = torch.nn.Linear(sizes.width, sizes.width)
    x = torch.randn(sizes.batch * sizes.steps, sizes.width, requires_grad=True)
    return lambda: torch.autograd.grad(layer(x).sum(), [x, *layer.parameters()])


def bfloat16(rounds: int, ledger: bool) -> None:
    """Mixers under autocast to bfloat16 over float32, by width."""
    figures = {}
    for name in ("GatedLRU", "MLSTM", "SLSTM", "GatedDelta", "S6", "LRU", "WindowAttention"):
        for width in (64, 256, 1024):
            sizes, case = Sizes(4, 256, width), MIXERS[name]
            run = case.work(case.problem(sizes, torch.float32), case.forms[0]).both

            def low(run: Run = run) -> None:
                with torch.autocast("cpu", torch.bfloat16):
                    run()

            took = turns({"float32": run, "bfloat16": low}, rounds)
            figures[f"{name}, width {width}"] = ratios(took, "bfloat16")["float32 / bfloat16"]
            print(name, width, figures[f"{name}, width {width}"], flush=True)
    say("Autocast to bfloat16 pays here: time in float32 over that in bfloat16, B 4, T 256, forward and backward",
        f"bfloat16 --rounds {rounds}", figures, any(values[1] > 1 for values in figures.values()), ledger)  # fmt: skip


def text(sizes: Sizes) -> str:
    return f"B {sizes.batch}, T {sizes.steps}, width {sizes.width}"


def say(claim: str, command: str, figures: dict[str, Any], holds: bool, ledger: bool) -> None:
    print(claim, "holds" if holds else "DOES NOT HOLD", *(f"  {k}: {v}" for k, v in figures.items()), sep="\n")
    if ledger:
        figures = figures | {"load": round(os.getloadavg()[0], 1)}
        append(claim, f"python benchmarks/recurrences.py {command}", figures, holds=holds, note="quartiles of ratios")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = {function.__name__: function for function in (peers, lengths, threads, forms, bfloat16)}
    parser.add_argument("what", choices=what)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ledger", action="store_true", help="write the figures down")
    options = parser.parse_args()
    torch.set_num_threads(2)
    warnings.simplefilter("ignore")
    what[options.what](options.rounds, options.ledger)


if __name__ == "__main__":
    main()
