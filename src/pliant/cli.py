"""The command line.

Only the modules of the command that is called are imported, so `pliant --help` is quick.
Wrong input gets one sentence on standard error and exit code 2.
"""

import contextlib
import dataclasses
import difflib
import io
import json
import math
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pliant import __version__

T = TypeVar("T")

USAGE = """usage: pliant COMMAND [OPTIONS]

Sequence models that keep learning.

commands:
  learn digits           a model reads handwritten digits while the task keeps changing
  report RUN [RUN ...]   one HTML page about one or more runs

options:
  -h, --help             show this help, or that of a command
  --version              show the version

Start with: pliant learn digits
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit code: 0 done, 2 wrong input, 130 stopped before the end."""
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
        if not isinstance(error, _Misuse):
            from pliant.core.errors import UsageError

            if not isinstance(error, UsageError):
                raise
        print(f"pliant: {error}", file=sys.stderr)
        return 2


class _Misuse(ValueError):
    """A command line that cannot be understood; a `UsageError` that needs no torch."""


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(USAGE, end="")
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    commands: dict[str, Callable[[list[str]], int]] = {"learn": _learn, "report": _report}
    return _choose("pliant", arguments[0], commands)(arguments[1:])


def _learn(arguments: list[str]) -> int:
    kinds = {"digits": _learn_digits}
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: pliant learn digits [OPTIONS]\n\nkinds:\n  digits   scikit-learn's handwritten digits\n"
              "\nOptions: pliant learn digits --help")  # fmt: skip
        return 0
    return _choose("pliant learn", arguments[0], kinds)(arguments[1:])


def _choose(prog: str, name: str, known: dict[str, T]) -> T:
    if name in known:
        return known[name]
    raise _Misuse(f"{prog} has no command {name!r}{_nearest(name, list(known))}; it has {', '.join(known)}")


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


# learn digits


def _learn_digits(arguments: list[str]) -> int:
    import tyro

    from pliant.recipes import digits, drive

    @dataclasses.dataclass(frozen=True)
    class Options:
        config: Annotated[digits.DigitsConfig, tyro.conf.arg(name="")]
        driving: Annotated[drive.Driving, tyro.conf.arg(name="")]

    Options.__doc__ = (
        "A small recurrent model reads scikit-learn's handwritten digits while the task keeps changing.\n\n"
        "Every image is answered before its class is known; a fifth of the images is scored but never learned\n"
        "from. Honest opponents get the same questions. Leaves a run folder with a report."
    )
    prog = f"pliant {digits.COMMAND}"
    first = _parse(Options, arguments, prog, Options(digits.DigitsConfig(), drive.Driving()))
    run = drive.open_run(first.driving, "digits")
    resuming = first.driving.resume and run.exists()
    if resuming:
        saved = _saved_config(digits.DigitsConfig, run)
        # Options that are not given are those of the run, so only what was typed can differ.
        config = _parse(Options, arguments, prog, Options(saved, drive.Driving())).config
        _refuse_changes(run, saved, config)
    else:
        config = first.config
        if first.driving.resume:
            print(f"nothing to resume in {run.folder}: a new run begins", file=sys.stderr)
        run.create(digits.COMMAND, dataclasses.asdict(config), threads=first.driving.threads)
    return _run_digits(config, first.driving, run)


def _saved_config(kind: type[T], run: Any) -> T:
    from pliant.recipes import digits

    values = run.config(digits.COMMAND)
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if wrong := values.keys() ^ fields:
        raise _Misuse(f"{run.folder} has a config of another version; options that differ: {', '.join(sorted(wrong))}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _refuse_changes(run: Any, saved: Any, config: Any) -> None:
    before, now = dataclasses.asdict(saved), dataclasses.asdict(config)
    if changed := [f"{name} was {before[name]!r}, now {now[name]!r}" for name in before if before[name] != now[name]]:
        raise _Misuse(
            f"{run.folder} was begun with another config ({'; '.join(changed)}); resume it without these options "
            "or choose another --run"
        )


def _run_digits(config: Any, driving: Any, run: Any) -> int:
    from pliant.recipes import digits, drive

    drive.set_threads(run, driving.threads)
    life = digits.life(config)
    total = None if config.forever else config.answers
    with _live_table(f"pliant {digits.COMMAND}, change={config.change}, every={config.every}", total) as show:
        summary = drive.drive(run, life, every=config.every, driving=driving, show=show)
    if summary is None:
        print(f"stopped; continue with: pliant {digits.COMMAND} --resume --run {run.folder}", file=sys.stderr)
        return 130
    _tell(summary, run, driving)
    return 0


def _tell(summary: dict[str, Any], run: Any, driving: Any) -> None:
    if driving.json:
        print(json.dumps({"run": str(run.folder), **summary}))
        return
    ours, answers = summary["members"]["pliant"], summary["answers"]
    print(
        f"pliant saved {ours['bits_saved']:,.0f} bits against no-change over {answers:,} answers "
        f"({ours['bits_saved'] / answers:.2f} per answer), accuracy {ours['accuracy']:.3f}"
    )
    for name, cost in summary["cpu_seconds"].items():
        member = summary["members"][name]
        print(
            f"  {name:10} {member['bits']:6.3f} bits per answer  accuracy {member['accuracy']:.3f}  {cost:8.1f} CPU s"
        )
    print(f"report: {run.folder / 'report.html'}" if driving.report else f"run: {run.folder}")


@contextlib.contextmanager
def _live_table(title: str, total: int | None) -> Any:
    """A live table on a terminal, a line now and then elsewhere; both on standard error."""
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
    from rich.table import Table

    console = Console(stderr=True)
    progress = Progress(
        TextColumn("answers"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), console=console
    )
    task = progress.add_task("", total=total)
    told = [-math.inf]

    def table(row: dict[str, Any], saved: dict[str, float], cpu: dict[str, float]) -> Table:
        columns = ("", "bits per answer", "bits saved so far", "accuracy", "CPU s")
        grid = Table(*columns, title=f"{title} · task {row['task']}", title_justify="left")
        for name, member in row["members"].items():
            style = "bold" if name == "pliant" else ""
            cells = (f"{member['bits']:.3f}", f"{saved[name]:,.0f}", f"{member['accuracy']:.3f}", f"{cpu[name]:.1f}")
            grid.add_row(name, *cells, style=style)
        return grid

    with Live(console=console, refresh_per_second=4, auto_refresh=False) as live:

        def show(answers: int, row: dict[str, Any], saved: dict[str, float], cpu: dict[str, float]) -> None:
            progress.update(task, completed=answers)
            if console.is_terminal:
                live.update(Group(table(row, saved, cpu), progress), refresh=True)
            elif answers - told[0] >= (total or 100_000) / 10:
                told[0] = answers
                ours = row["members"]["pliant"]
                console.print(f"{answers:,} answers, task {row['task']}: {ours['bits']:.3f} bits per answer, "
                              f"accuracy {ours['accuracy']:.3f}")  # fmt: skip

        yield show


# report


@dataclasses.dataclass(frozen=True)
class ReportOptions:
    """One self-contained HTML page about one or more runs."""

    runs: tuple[Path, ...]
    """Run folders."""
    out: Path | None = None
    """The page to write; default: report.html in the first run."""
    json: bool = False
    """Print where the page is as JSON."""


def _report(arguments: list[str]) -> int:
    import tyro

    kind = Annotated[ReportOptions, tyro.conf.arg(name="")]
    if not any(not argument.startswith("-") for argument in arguments) and not {"-h", "--help"} & set(arguments):
        raise _Misuse("pliant report needs at least one run folder, such as: pliant report runs/digits-001")
    from pliant.report import write_report

    options = _parse(kind, arguments, "pliant report", None, positional=("runs",))
    page = write_report(options.runs, options.out)
    print(json.dumps({"report": str(page)}) if options.json else page)
    return 0


# arguments


def _parse(kind: Any, arguments: list[str], prog: str, default: Any, positional: tuple[str, ...] = ()) -> Any:
    """Parse with tyro; whatever is wrong becomes one sentence."""
    import tyro

    if positional:
        kind = Annotated[kind, tyro.conf.PositionalRequiredArgs]
    known = _option_names(default if default is not None else kind)
    for argument in arguments:
        name = argument.split("=")[0]
        if name.startswith("--") and name.replace("_", "-") not in known:
            raise _Misuse(f"{prog} has no option {name}{_nearest(name, sorted(known))} See {prog} --help")
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            if default is None:
                return tyro.cli(kind, args=arguments, prog=prog)
            return tyro.cli(kind, args=arguments, prog=prog, default=default)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise _Misuse(f"{prog}: {_sentence(said.getvalue())}; see {prog} --help") from None


def _option_names(of: Any) -> set[str]:
    kind = of if isinstance(of, type) else getattr(of, "__origin__", type(of))
    names = {"--help"}
    for field in dataclasses.fields(kind):
        value = getattr(of, field.name, None)
        if dataclasses.is_dataclass(value):
            names |= _option_names(value)
        else:
            option = field.name.replace("_", "-")
            names |= {f"--{option}", f"--no-{option}"}
    return names


def _sentence(box: str) -> str:
    """What tyro prints in a box, between the title and the first rule, as one line."""
    lines = [line.strip("│|╭╮╰╯ ") for line in box.splitlines()]
    lines = [line for line in lines if line]
    rules = [i for i, line in enumerate(lines) if not line.strip("─-")]
    # A plain box has a rule of its own below the title.
    said = lines[1 : rules[0]] if rules and rules[0] > 1 else lines[2 : rules[1]] if len(rules) > 1 else lines
    return " ".join(said).rstrip(".") or "the arguments could not be understood"


def _show_warning(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
    print(f"pliant: {message}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
