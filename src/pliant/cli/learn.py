"""`pliant learn KIND`: begin a run or continue one."""

import dataclasses
import importlib
import math
import sys
import time
from typing import Annotated, Any, TypeVar

from pliant.cli.arguments import Misuse, choose, parse
from pliant.cli.progress import live_table

T = TypeVar("T")


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


def command(arguments: list[str]) -> int:
    """The exit code of `pliant learn` with these arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: pliant learn KIND [OPTIONS]\n\nkinds:\n  digits   scikit-learn's handwritten digits\n"
              "  series   your own table, or a known stream\n\nOptions: pliant learn KIND --help")  # fmt: skip
        return 0
    return _learn_kind(choose("pliant learn", arguments[0], {name: name for name in KINDS}), arguments[1:])


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
    first = parse(Options, arguments, prog, Options(Config(), drive.Driving()))
    run = drive.open_run(first.driving, name)
    if first.driving.resume and run.exists():
        saved = _saved_config(Config, recipe.COMMAND, run)
        # Options that are not given are those of the run, so only what was typed can differ.
        config = parse(Options, arguments, prog, Options(saved, drive.Driving())).config
        _refuse_changes(run, saved, config)
        task = recipe.task(config)
        _fits(first.driving, task)
        task.check(run)
    else:
        config, trials, cost = _tuned(first.config)
        task = recipe.task(config)
        _fits(first.driving, task)
        if first.driving.resume:
            print(f"nothing to resume in {run.folder}: a new run begins", file=sys.stderr)
        run.create(recipe.COMMAND, dataclasses.asdict(config), threads=first.driving.threads)
        task.begin(run)
        if cost:
            run.write("tune.json", trials)
            run.time(cost)
    return _run(recipe.COMMAND, task, first.driving, run)


def _tuned(config: Any) -> tuple[Any, list[dict[str, Any]], dict[str, Any]]:
    """The config with what --tune has chosen, the trials, and a line of timing, empty if there is nothing to choose."""
    if getattr(config, "tune", None) is None:
        return config, [], {}
    from pliant.recipes import series, tune
    from pliant.recipes.panel import LEARNER

    def tell(trial: Any) -> None:
        print(f"  lr {trial.lr:.4g}, chunk {trial.chunk}, size {trial.size}: {trial.bits:.4f} bits per answer "
              f"over {trial.rows:,} rows", file=sys.stderr)  # fmt: skip

    print(f"choosing settings on the first rows, for at most {config.tune:g} minutes", file=sys.stderr)
    paced = config.speed is not None or (config.stream or "").startswith(series.REPLAY)
    rows = series.source(dataclasses.replace(config, speed=math.inf if paced else None))
    wall, cpu = time.perf_counter(), time.process_time()
    best, trials = tune.tune(config, rows, config.tune, tell)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    if not trials:
        print("no setting was tried to its end in that time: the defaults are used", file=sys.stderr)
    cost = {"tuning": True, "seconds": round(wall, 6), "cpu": {LEARNER: round(cpu, 6)}}
    return best, [dataclasses.asdict(trial) for trial in trials], cost


def _fits(driving: Any, task: Any) -> None:
    if driving.plasticity and task.main != "accuracy":
        raise Misuse(f"--plasticity is told of classes, and {task.title!r} asks for numbers; leave it out")


def _saved_config(kind: type[T], command: str, run: Any) -> T:
    values = run.config(command)
    fields = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    if wrong := values.keys() ^ fields:
        raise Misuse(f"{run.folder} has a config of another version; options that differ: {', '.join(sorted(wrong))}")
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})


def _refuse_changes(run: Any, saved: Any, config: Any) -> None:
    from pliant.core.plain import dumps

    before, now = dataclasses.asdict(saved), dataclasses.asdict(config)
    # As they stand in the folder of the run, where infinity is null.
    changed = [name for name in before if dumps(before[name]) != dumps(now[name])]
    if changed:
        told = "; ".join(f"{name} was {before[name]!r}, now {now[name]!r}" for name in changed)
        raise Misuse(
            f"{run.folder} was begun with another config ({told}); resume it without these options "
            "or choose another --run"
        )


def _run(command: str, task: Any, driving: Any, run: Any) -> int:
    from pliant.recipes import drive

    drive.set_threads(run, driving.threads)
    for note in task.notes:
        print(f"pliant: {note}", file=sys.stderr)
    life = task.life()
    with live_table(f"pliant {command}, {task.title}", task.total, task.main) as show:
        summary = drive.drive(run, life, driving=driving, show=show, row=task.row, every=task.every)
    if summary is None:
        way = "continue with" if life.panel.resumable else "a run with river's trees cannot be saved; begin anew with"
        print(f"stopped; {way}: pliant {command} --resume --run {run.folder}", file=sys.stderr)
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
        from pliant.core.plain import dumps

        print(dumps({"run": str(run.folder), **summary}))
        return
    members = {name: _numbers(member) for name, member in summary["members"].items()}
    ours, answers = members["pliant"], summary["answers"]
    verb = "lost" if ours["bits_saved"] < 0 else "saved"
    print(
        f"pliant {verb} {abs(ours['bits_saved']):,.0f} bits against no-change over {answers:,} answers "
        f"({ours['bits_saved'] / max(1, answers):+.3f} per answer), {main} {ours[main]:.4g}"
    )
    for name, cost in summary["cpu_seconds"].items():
        member = members[name]
        print(f"  {name:15} {member['bits']:9.3f} bits per answer  {main} {member[main]:<9.4g} {cost:8.1f} CPU s")
    if "tuning_cpu_seconds" in summary:
        print(f"  of which pliant took {summary['tuning_cpu_seconds']:,.1f} CPU s to choose its settings")
    for call, times in summary.get("latency", {}).items():
        print(f"  {call:15} median {times['p50']:.3f} ms, 99th percentile {times['p99']:.3f} ms, "
              f"99.9th {times['p999']:.3f} ms a call")  # fmt: skip
    print(f"report: {run.folder / 'report.html'}" if driving.report else f"run: {run.folder}")


def _numbers(member: dict[str, Any]) -> dict[str, Any]:
    """What a summary says about a member; null in its file stands for what is not finite."""
    return {key: math.nan if value is None else value for key, value in member.items()}
