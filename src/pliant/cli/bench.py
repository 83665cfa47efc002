"""`pliant bench KIND`: time and memory on this machine."""

import contextlib
import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pliant.cli.arguments import Misuse, choose, nearest, parse

KINDS = {"kernels": "KERNELS", "mixers": "MIXERS", "models": "MODELS"}
SHORTEST = 64
"""The first of the lengths of --lengths."""
QUICK = {"batch": 2, "steps": 64, "width": 32, "seconds": 0.1}


@dataclasses.dataclass(frozen=True)
class BenchOptions:
    """Time and memory here: forward, forward with backward, and a single step, in float32.

    Whoever is compared takes turns, beside a copy of as many bytes as have to be read and written. First each has to
    equal the readable form; whoever does not gets no figures, and the exit code is 1.
    """

    batch: int = 4
    """B, streams."""
    steps: int = 512
    """T, steps."""
    width: int = 64
    """D, features; even."""
    threads: int | None = None
    """Processor threads; default: as many as torch takes."""
    seconds: float = 3.0
    """How long each case is timed, after a few rounds that are made in any case; with --lengths, each length."""
    quick: bool = False
    """Small sizes and little time, to see that everything works."""
    peers: bool = False
    """Compare with the peers that are installed, too."""
    only: tuple[str, ...] = ()
    """Names of what is to be measured; default: all."""
    lengths: bool = False
    """With mixers: time against T = 64, 256, ... instead."""
    longest: int = 16384
    """The largest T of --lengths."""
    json: bool = False
    """Print everything as JSON."""
    figure: Path | None = None
    """SVG file to draw the result in."""

    def __post_init__(self) -> None:
        for name in ("batch", "steps"):
            if getattr(self, name) < 1:
                raise Misuse(f"--{name} is {getattr(self, name)}, expected at least 1")
        if self.width < 2 or self.width % 2:
            raise Misuse(f"--width is {self.width}, expected a positive even number")
        if self.threads is not None and not 1 <= self.threads <= (os.cpu_count() or 1):
            raise Misuse(f"--threads is {self.threads}, expected 1 to {os.cpu_count()}, the processors of this machine")
        if not 0 < self.seconds < float("inf"):
            raise Misuse(f"--seconds is {self.seconds:g}, expected a positive number")
        if self.longest < SHORTEST:
            raise Misuse(f"--longest is {self.longest}, expected at least {SHORTEST}")
        if self.figure is not None and not self.figure.absolute().parent.is_dir():
            raise Misuse(f"--figure: there is no folder {self.figure.absolute().parent} to draw in")


def command(arguments: list[str]) -> int:
    """The exit code of `pliant bench` with these arguments: 1 if something did not equal the readable form."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: pliant bench KIND [OPTIONS]\n\nkinds:\n  kernels   functions on tensors, in all their forms\n"
              "  mixers    layers that mix over time\n  models    models of tables\n\n"
              "Options: pliant bench KIND --help")  # fmt: skip
        return 0
    kind = choose("pliant bench", arguments[0], {name: name for name in KINDS})
    options = _quick(parse(BenchOptions, arguments[1:], f"pliant bench {kind}", None))
    if options.lengths and kind != "mixers":
        raise Misuse("--lengths is for mixers: pliant bench mixers --lengths")
    if options.lengths and options.peers:
        raise Misuse("--lengths is about our mixers alone; leave out --peers")
    with _threads(options):
        return _bench(kind, options)


def _quick(options: BenchOptions) -> BenchOptions:
    """With --quick, what was not asked for otherwise is small."""
    if not options.quick:
        return options
    plain = BenchOptions()
    return dataclasses.replace(options, **{k: v for k, v in QUICK.items() if getattr(options, k) == getattr(plain, k)})  # type: ignore[arg-type]


@contextlib.contextmanager
def _threads(options: BenchOptions) -> Iterator[None]:
    """The number of threads for all who are compared; a peer takes it from the processors that it may run on."""
    import torch

    if options.threads is None:
        yield
        return
    before, may = torch.get_num_threads(), getattr(os, "sched_getaffinity", lambda _: None)(0)
    torch.set_num_threads(options.threads)
    if may is not None and options.peers:
        os.sched_setaffinity(0, sorted(may)[: options.threads])
    try:
        yield
    finally:
        torch.set_num_threads(before)
        if may is not None:
            os.sched_setaffinity(0, may)


def _bench(kind: str, options: BenchOptions) -> int:
    from pliant import bench

    cases = _chosen(kind, getattr(bench, KINDS[kind]), options.only)
    sizes = bench.Sizes(options.batch, options.steps, options.width)
    if options.lengths:
        found = bench.measure_lengths(cases, sizes, options.longest, seconds=options.seconds, tell=_tell)
    else:
        peers, absent = bench.find_peers(bench.PEERS, [case.name for case in cases]) if options.peers else ([], [])
        if absent:
            _tell(f"not installed: {', '.join(absent)}")
        found = bench.measure(cases, sizes, seconds=options.seconds, peers=peers, tell=_tell)
        found["absent"] = absent
    _show(kind, found, options)
    return 1 if found["refused"] else 0


def _chosen(kind: str, cases: dict[str, Any], only: tuple[str, ...]) -> list[Any]:
    for name in only:
        if name not in cases:
            has = ", ".join(cases)
            raise Misuse(f"--only: there is nothing called {name!r}{nearest(name, list(cases))} {kind} has {has}")
    return [case for name, case in cases.items() if not only or name in only]


def _tell(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def _show(kind: str, found: dict[str, Any], options: BenchOptions) -> None:
    from pliant.bench import show

    table, figure = (
        (show.lengths_table, show.lengths_figure) if options.lengths else (show.times_table, show.times_figure)
    )
    if options.figure is not None:
        options.figure.write_text(figure(found), encoding="utf-8")
    if options.json:
        from pliant.core.plain import dumps
        from pliant.core.run import environment

        asked = {"batch": options.batch, "steps": options.steps, "width": options.width, "seconds": options.seconds}
        print(dumps({"bench": kind, **asked, "environment": environment(), **found}))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table(found))
    for row in found.get("left out", ()):
        console.print(f"{row['case']}: left out from T = {row['from']:,}: {row['why']}", highlight=False)
    for row in found["refused"]:
        console.print(f"{row['case']}, {row['who']}: {row['why']}; no figures", highlight=False, style="bold red")
