"""The command line.

What a command needs is imported once it is called, so `pliant --help` is quick.
Wrong input gets one sentence on standard error and exit code 2.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from pliant import __version__
from pliant.cli import bench, learn, measure, report, reproduce, stream
from pliant.cli.arguments import Misuse, choose

__all__ = ["main"]

USAGE = """usage: pliant COMMAND [OPTIONS]

Sequence models that keep learning.

commands:
  learn digits           a model reads handwritten digits while the task keeps changing
  learn series           a model learns your own table, row by row, beside what is done today
  stream RUN             answer a live input with the model of a run, line by line
  measure health WHAT    whether the model of a run, or a saved one, can still learn
  measure perplexity A B whether perplexity picks the one of two models that is right
  measure dispersion M   how sharp the heads of a model are, and up to what length they can be
  measure plasticity LOG bits by which what an agent sees shapes what it does, and back
  report RUN [RUN ...]   one HTML page about one or more runs
  bench KIND             time and memory of kernels, mixers or models on this machine
  reproduce NAME         a paper's number beside ours

options:
  -h, --help             show this help, or that of a command
  --version              show the version

Start with: pliant learn digits
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 1 a check is red, 2 wrong input, 130 stopped before the end."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _show_warning
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as in `pliant ... | head`.
        sys.stderr.close()
        return 0
    except ValueError as error:
        if not isinstance(error, Misuse):
            from pliant.core.errors import UsageError

            if not isinstance(error, UsageError):
                raise
        print(f"pliant: {error}", file=sys.stderr)
        return 2


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {
        "learn": learn.command, "stream": stream.command, "report": report.command,
        "bench": bench.command, "measure": measure.command, "reproduce": reproduce.command,
    }  # fmt: skip
    return choose("pliant", arguments[0], commands)(arguments[1:])


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"pliant: {message}", file=sys.stderr)
