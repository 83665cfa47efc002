"""`pliant stream RUN`: answer a live input."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

from pliant.cli.arguments import Misuse, parse, require


@dataclasses.dataclass(frozen=True)
class StreamOptions:
    """Answer a live input with the model of a run, one line at a time.

    Lines are JSON: {"id": 7, "x": {"a": 1.5}} is answered at once by a predictive distribution, and
    {"id": 7, "y": "yes"} is the late answer, in any order. Or CSV with a header.
    """

    run: Path
    """Folder of a run of pliant learn series."""
    input: str = "-"
    """Where lines come from: - for standard input, a file, or tcp://HOST:PORT to listen there."""
    learn: bool = False
    """Learn from the answers."""
    state: Path | None = None
    """File to continue from if it exists, and to save to at the end, when stopped, and now and then."""
    save_every: int = 10_000
    """Lines between two saves of the state."""
    json: bool = False
    """Print the summary as JSON on standard error."""

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise Misuse(f"--save-every is {self.save_every}, expected at least 1 line")


def command(arguments: list[str]) -> int:
    """The exit code of `pliant stream` with these arguments."""
    require(arguments, "pliant stream needs the folder of a run, such as: pliant stream runs/series-001")
    import tyro

    kind = Annotated[StreamOptions, tyro.conf.arg(name="")]
    options = parse(kind, arguments, "pliant stream", None, positional=("run",))
    from pliant.learn.timed import Latency
    from pliant.recipes import drive, live, wire

    if options.state is not None and not options.state.absolute().parent.is_dir():
        raise Misuse(f"--state: there is no folder {options.state.absolute().parent} to save the state in")
    run = drive.Run(options.run)
    lines = live.Lines(live.Live(run, learn=options.learn))
    drive.set_threads(run, 1)
    offset = live.load(lines, options.state) if options.state is not None and options.state.exists() else 0
    clock = Latency()

    def begin() -> wire.Take:
        # Each connection has a form and a header of its own.
        reader = lines.another() if options.input.startswith(wire.TCP) else lines

        def take(line: bytes | None) -> str | None:
            began = time.perf_counter()
            reply = reader.take(line)
            clock.add(time.perf_counter() - began)
            return reply

        return take

    def save(taken: int) -> None:
        if options.state is not None:
            live.save(lines, taken, options.state)

    with drive.stop_signal() as stop:
        save(wire.serve(options.input, begin, save, options.save_every, stop, offset))
    times = {name: 1000 * clock.quantile(share) for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))}
    summary = {"lines": lines.count, "errors": lines.errors, **lines.live.summary(), "milliseconds": times}
    _tell_stream(summary, options.json)
    return 0


def _tell_stream(summary: dict[str, Any], as_json: bool) -> None:
    """On standard error, since standard output holds the replies."""
    if as_json:
        from pliant.core.plain import dumps

        print(dumps(summary), file=sys.stderr)
        return
    bits = "" if summary["bits"] is None else f", {summary['bits']:.3f} bits per answer"
    times = ", ".join(f"{name} {value:.3f} ms" for name, value in summary["milliseconds"].items() if value == value)
    print(
        f"{summary['lines']:,} lines: {summary['asked']:,} asked, {summary['answered']:,} answered{bits}, "
        f"{summary['errors']:,} malformed; {times} a line",
        file=sys.stderr,
    )
