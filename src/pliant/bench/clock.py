"""Time in turns, the time of a copy, and memory."""

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.kernels._jit import whole_pages

LEAST, MOST = 3, 300
"""Rounds that are made in any case, and at most."""


def take_turns(
    runs: Mapping[str, Callable[[], object]], seconds: float, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Seconds of each run in each round.

    All have the same share of `seconds`; who has used it up stands back, but not before `LEAST` rounds. Each round
    begins with another run, so that none always follows the same, and one that is not counted goes before.
    """
    took: dict[str, list[float]] = {name: [] for name in runs}
    share = seconds / max(1, len(runs))
    with _no_garbage():
        for run in runs.values():
            run()
        for turn in range(MOST):
            going = [name for name in runs if turn < LEAST or sum(took[name]) < share]
            start = turn % max(1, len(going))
            for name in (*going[start:], *going[:start]):
                began = clock()
                runs[name]()
                took[name].append(clock() - began)
    return took


@contextmanager
def _no_garbage() -> Iterator[None]:
    gc.collect()
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def spread(values: Sequence[float]) -> dict[str, float]:
    """Least, quartiles."""
    q1, median, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return {"min": min(values), "q1": q1, "median": median, "q3": q3}


class Copy:
    """A copy that reads and writes `size` bytes in all, into memory that is as new as that of an output."""

    def __init__(self, size: int):
        self._source = torch.ones(max(1, size // 8))

    def __call__(self) -> Tensor:
        """The copy."""
        return whole_pages(torch.empty_like(self._source)).copy_(self._source)


def kept_for_backward(run: Callable[[], object], inputs: Sequence[Tensor]) -> int:
    """Bytes of the tensors that autograd keeps between forward and backward, inputs and parameters not counted.

    Each piece of memory counts once. What a function keeps elsewhere than among its saved tensors is not seen.
    """
    known = {x.untyped_storage().data_ptr() for x in inputs}
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        run()
    return sum(kept.values())


def resident_peak(run: Callable[[], Any]) -> int | None:
    """Bytes by which resident memory at its peak exceeds what stood before; None where the system does not tell.

    It counts outputs, gradients, whatever is kept or needed meanwhile, and code that is met for the first time.
    """
    if not sys.platform.startswith("linux"):
        return None
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what has been freed goes back, and is counted when it is taken again
    except AttributeError:  # another C library
        return None
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    except OSError:
        return None
    before = _resident("VmRSS")
    found = run()
    peak = _resident("VmHWM") - before
    del found
    return max(0, peak)


def _resident(which: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(which))


def available_memory() -> float:
    """Bytes that may still be taken; infinite where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return float("inf")
    return next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable")), float("inf"))
