"""The command line.

Only the modules of the command that is called are imported, so `pliant --help` is quick.
Wrong input gets one sentence on standard error and exit code 2.
"""

import contextlib
import dataclasses
import difflib
import importlib
import io
import json
import math
import sys
import time
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
  learn series           a model learns your own table, row by row, beside what is done today
  stream RUN             answer a live input with the model of a run, line by line
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
    commands: dict[str, Callable[[list[str]], int]] = {"learn": _learn, "stream": _stream, "report": _report}
    return _choose("pliant", arguments[0], commands)(arguments[1:])


def _learn(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: pliant learn KIND [OPTIONS]\n\nkinds:\n  digits   scikit-learn's handwritten digits\n"
              "  series   your own table, or a known stream\n\nOptions: pliant learn KIND --help")  # fmt: skip
        return 0
    return _learn_kind(_choose("pliant learn", arguments[0], {name: name for name in KINDS}), arguments[1:])


def _choose(prog: str, name: str, known: dict[str, T]) -> T:
    if name in known:
        return known[name]
    raise _Misuse(f"{prog} has no command {name!r}{_nearest(name, list(known))}; it has {', '.join(known)}")


def _nearest(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f", did you mean {close[0]!r}?" if close else ""


# learn


@dataclasses.dataclass(frozen=True)
class _Kind:
    """What `pliant learn` can learn: a module of recipes, its config, and a paragraph for its help."""

    module: str
    config: str
    about: str

    def recipe(self) -> Any:
        return importlib.import_module(f"pliant.recipes.{self.module}")


KINDS = {
    "digits": _Kind(
        "digits",
        "DigitsConfig",
        "A small recurrent model reads scikit-learn's handwritten digits while the task keeps changing.\n\n"
        "Every image is answered before its class is known; a fifth of the images is scored but never learned\n"
        "from. Honest opponents get the same questions. Leaves a run folder with a report.",
    ),
    "series": _Kind(
        "series",
        "SeriesConfig",
        "A small recurrent model learns your own table, row by row.\n\n"
        "Every row is answered before its label is known, by a predictive distribution. Opponents that stand for\n"
        "what is done today get the same rows. Leaves a run folder with a report.\n\n"
        "  pliant learn series --data sales.csv --target sold --horizon 7\n"
        "  pliant learn series --data sensors/ --target state --time when",
    ),
}


def _learn_kind(name: str, arguments: list[str]) -> int:
    import tyro

    from pliant.recipes import drive

    kind, recipe = KINDS[name], KINDS[name].recipe()
    Config = getattr(recipe, kind.config)

    @dataclasses.dataclass(frozen=True)
    class Options:
        config: Annotated[Config, tyro.conf.arg(name="")]  # type: ignore[valid-type]
        driving: Annotated[drive.Driving, tyro.conf.arg(name="")]

    Options.__doc__ = kind.about
    prog = f"pliant {recipe.COMMAND}"
    first = _parse(Options, arguments, prog, Options(Config(), drive.Driving()))
    run = drive.open_run(first.driving, name)
    if first.driving.resume and run.exists():
        saved = _saved_config(Config, recipe.COMMAND, run)
        # Options that are not given are those of the run, so only what was typed can differ.
        config = _parse(Options, arguments, prog, Options(saved, drive.Driving())).config
        _refuse_changes(run, saved, config)
        task = recipe.task(config)
        task.check(run)
    else:
        config, trials = _tuned(first.config)
        task = recipe.task(config)
        if first.driving.resume:
            print(f"nothing to resume in {run.folder}: a new run begins", file=sys.stderr)
        run.create(recipe.COMMAND, dataclasses.asdict(config), threads=first.driving.threads)
        task.begin(run)
        if trials:
            run.write("tune.json", trials)
    return _run(recipe.COMMAND, task, first.driving, run)


def _tuned(config: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The config with what --tune has chosen, and the trials; as it is if there is nothing to choose."""
    if getattr(config, "tune", None) is None:
        return config, []
    from pliant.recipes import series, tune

    def tell(trial: Any) -> None:
        print(f"  lr {trial.lr:.4g}, chunk {trial.chunk}, size {trial.size}: {trial.bits:.4f} bits per answer "
              f"over {trial.rows:,} rows", file=sys.stderr)  # fmt: skip

    print(f"choosing settings on the first rows, for at most {config.tune:g} minutes", file=sys.stderr)
    paced = config.speed is not None or (config.stream or "").startswith(series.REPLAY)
    rows = series.source(dataclasses.replace(config, speed=math.inf if paced else None))
    best, trials = tune.tune(config, rows, config.tune, tell)
    if not trials:
        print("no setting was tried to its end in that time: the defaults are used", file=sys.stderr)
    return best, [dataclasses.asdict(trial) for trial in trials]


def _saved_config(kind: type[T], command: str, run: Any) -> T:
    values = run.config(command)
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


def _run(command: str, task: Any, driving: Any, run: Any) -> int:
    from pliant.recipes import drive

    drive.set_threads(run, driving.threads)
    for note in task.notes:
        print(f"pliant: {note}", file=sys.stderr)
    with _live_table(f"pliant {command}, {task.title}", task.total, task.main) as show:
        summary = drive.drive(run, task.life(), driving=driving, show=show, row=task.row, every=task.every)
    if summary is None:
        print(f"stopped; continue with: pliant {command} --resume --run {run.folder}", file=sys.stderr)
        return 130
    _tell(summary, run, driving, task.main)
    for problem, count in summary.get("problems", {}).items():
        print(f"pliant: {problem}: {count:,}", file=sys.stderr)
    if summary.get("stopped"):
        print(f"pliant: {summary['stopped']}", file=sys.stderr)
        return 2
    return 0


def _tell(summary: dict[str, Any], run: Any, driving: Any, main: str) -> None:
    if driving.json:
        print(json.dumps({"run": str(run.folder), **summary}))
        return
    ours, answers = summary["members"]["pliant"], summary["answers"]
    verb = "saved" if ours["bits_saved"] >= 0 else "lost"
    print(
        f"pliant {verb} {abs(ours['bits_saved']):,.0f} bits against no-change over {answers:,} answers "
        f"({ours['bits_saved'] / max(1, answers):+.3f} per answer), {main} {ours[main]:.4g}"
    )
    for name, cost in summary["cpu_seconds"].items():
        member = summary["members"][name]
        print(f"  {name:15} {member['bits']:9.3f} bits per answer  {main} {member[main]:<9.4g} {cost:8.1f} CPU s")
    for call, times in summary.get("latency", {}).items():
        print(f"  {call:15} median {times['p50']:.3f} ms, 99th percentile {times['p99']:.3f} ms, "
              f"99.9th {times['p999']:.3f} ms a call")  # fmt: skip
    print(f"report: {run.folder / 'report.html'}" if driving.report else f"run: {run.folder}")


@contextlib.contextmanager
def _live_table(title: str, total: int | None, main: str) -> Any:
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
        columns = ("", "bits per answer", "bits saved so far", main, "CPU s")
        place = "" if row["task"] is None else f" · task {row['task']}"
        grid = Table(*columns, title=title + place, title_justify="left")
        for name, member in row["members"].items():
            style = "bold" if name == "pliant" else ""
            cells = (f"{member['bits']:.3f}", f"{saved[name]:,.0f}", f"{member[main]:.4g}", f"{cpu[name]:.1f}")
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
                place = "" if row["task"] is None else f", task {row['task']}"
                console.print(f"{answers:,} answers{place}: {ours['bits']:.3f} bits per answer, "
                              f"{main} {ours[main]:.4g}")  # fmt: skip

        yield show


# stream


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
            raise _Misuse(f"--save-every is {self.save_every}, expected at least 1 line")


def _stream(arguments: list[str]) -> int:
    if not any(not argument.startswith("-") for argument in arguments) and not {"-h", "--help"} & set(arguments):
        raise _Misuse("pliant stream needs the folder of a run, such as: pliant stream runs/series-001")
    import tyro

    kind = Annotated[StreamOptions, tyro.conf.arg(name="")]
    options = _parse(kind, arguments, "pliant stream", None, positional=("run",))
    from pliant.learn.timed import Latency
    from pliant.recipes import drive, live, wire

    if options.state is not None and not options.state.absolute().parent.is_dir():
        raise _Misuse(f"--state: there is no folder {options.state.absolute().parent} to save the state in")
    run = drive.Run(options.run)
    lines = live.Lines(live.Live(run, learn=options.learn))
    drive.set_threads(run, 1)
    offset = live.load(lines, options.state) if options.state is not None and options.state.exists() else 0
    clock, saved = Latency(), [lines.count]

    def take(line: bytes) -> str | None:
        began = time.perf_counter()
        reply = lines.take(line)
        clock.add(time.perf_counter() - began)
        return reply

    def after(taken: int) -> None:
        if options.state is not None and lines.count - saved[0] >= options.save_every:
            saved[0] = lines.count
            live.save(lines, taken, options.state)

    with drive.stop_signal() as stop:
        taken = wire.serve(options.input, take, stop, after, offset)
        if options.state is not None:
            live.save(lines, taken, options.state)
    times = {name: 1000 * clock.quantile(share) for name, share in (("p50", 0.5), ("p99", 0.99), ("p999", 0.999))}
    summary = {"lines": lines.count, "errors": lines.errors, **lines.live.summary(), "milliseconds": times}
    _tell_stream(summary, options.json)
    return 0


def _tell_stream(summary: dict[str, Any], as_json: bool) -> None:
    """On standard error, since standard output holds the replies."""
    if as_json:
        print(json.dumps(summary), file=sys.stderr)
        return
    bits = "" if summary["bits"] is None else f", {summary['bits']:.3f} bits per answer"
    times = ", ".join(f"{name} {value:.3f} ms" for name, value in summary["milliseconds"].items() if value == value)
    print(
        f"{summary['lines']:,} lines: {summary['asked']:,} asked, {summary['answered']:,} answered{bits}, "
        f"{summary['errors']:,} malformed; {times} a line",
        file=sys.stderr,
    )


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
