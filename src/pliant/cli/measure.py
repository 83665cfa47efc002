"""`pliant measure KIND`: whether a model can still learn; how much an agent is shaped by what it sees."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pliant.cli import dispersion, perplexity
from pliant.cli.arguments import Misuse, choose, parse, require


@dataclasses.dataclass(frozen=True)
class HealthOptions:
    """Whether a model can still learn: a table by layer, and one line that says what is worst.

    Of a run of pliant learn: its newest saved life, compared with its start on the first questions of its stream,
    with what the run noted on its way. Of a model saved by save_pretrained: as it is, on inputs drawn at random.
    """

    path: Path
    """Folder of a run, or of a model."""
    seed: int = 0
    """Of what is drawn: targets of a new task that a fork of the learner is given, inputs for a model alone."""
    json: bool = False
    """Print everything as JSON."""


@dataclasses.dataclass(frozen=True)
class PlasticityOptions:
    """How much what an agent sees shapes what it does, and the other way round, in bits.

    Of a log with one line of JSON for each turn, or of an agent that is let loose in a Gymnasium environment. Many
    lives of the same length are compared with each other; of one long life the rates are estimated. Of a run of pliant
    learn: forks of its newest saved life are shown random targets, which shape what they say then.
    """

    source: str
    """A log, LOG.jsonl, see docs/plasticity.md; gym:ENV, such as gym:FrozenLake-v1; or the folder of a run."""
    agent: str = "random"
    """Who acts in gym:ENV: random, q, q:epsilon=0.2,rate=0.5, or module:function, a function of (environment, seed)
    that returns one of (observation, reward, ended), which gives an action and learns as it likes."""
    lives: int = 2000
    """Lives in gym:ENV; 1 for one long life."""
    indices: int | None = None
    """Actions in each life; default: all that a log has, 3 in gym:ENV, 20,000 if it is one life."""
    bins: int | None = None
    """For continuous observations and rewards in gym:ENV: bins of each number."""
    obs_window: tuple[int, int] | None = None
    """First and last observation that count, from 1; default: all."""
    act_window: tuple[int, int] | None = None
    """First and last action that count, from 1; default: all."""
    mode: Literal["causal", "literal"] = "causal"
    """Whether within an index only the later turn is told of by the earlier, or each by the other."""
    correction: Literal["none", "miller-madow", "jackknife", "grassberger", "chao-shen"] = "jackknife"
    """Of what frequencies of few lives say too much."""
    bootstrap: int = 0
    """Draws of lives for the intervals; 0 takes them from the lives as they are."""
    permutations: int = 100
    """Deals of observations to other lives, for what chance alone would say."""
    depth: int = 5
    """Turns that context trees remember, for one long life."""
    seed: int = 0
    """Of agents, environments, draws and deals."""
    figure: Path | None = None
    """An SVG file to draw to."""
    log: Path | None = None
    """A file to write the turns of gym:ENV to."""
    json: bool = False
    """Print everything as JSON."""


def command(arguments: list[str]) -> int:
    """The exit code of `pliant measure` with these arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        kinds = "\n".join(f"  {name:<12}{about}" for name, (_, about) in KINDS.items())
        print(f"usage: pliant measure KIND [OPTIONS]\n\nkinds:\n{kinds}\n\nOptions: pliant measure KIND --help")
        return 0
    return choose("pliant measure", arguments[0], {name: run for name, (run, _) in KINDS.items()})(arguments[1:])


def _health(arguments: list[str]) -> int:
    require(arguments, "pliant measure health needs a folder, such as: pliant measure health runs/digits-001")
    import tyro

    kind = Annotated[HealthOptions, tyro.conf.arg(name="")]
    options = parse(kind, arguments, "pliant measure health", None, positional=("path",))
    from pliant.core.plain import dumps
    from pliant.measure.health import verdict
    from pliant.recipes.examine import examine

    found = examine(options.path, options.seed)
    task = found.new_task
    if options.json:
        new = None if task is None else task._asdict() | {"fell": task.fell}
        print(dumps({"verdict": verdict(found.health), "probe": found.probe, **found.health.tables(), "new_task": new,
                     "history": found.history}))  # fmt: skip
        return 0
    _tell_history(found.history)
    print(f"on {found.probe}\n")
    *table, last = str(found.health).splitlines()
    print("\n".join(table))
    if task is not None:
        print(f"a new task: random targets fell from {task.first:.3g} to {task.last:.3g} nats "
              f"in {task.updates} updates\n")  # fmt: skip
    print(last)
    return 0


def _tell_history(history: list[dict[str, Any]]) -> None:
    """Verdicts of the run on its way, equal ones in a row once."""
    before = None
    for row in history:
        said = str(row["health"].get("verdict"))
        if said != before:
            print(f"after {row.get('answers')} answers: {said}")
        before = said
    if history:
        print()


def _plasticity(arguments: list[str]) -> int:
    require(arguments, "pliant measure plasticity needs a log or an environment, such as: pliant measure plasticity "
                       "turns.jsonl, or gym:FrozenLake-v1 --agent q, or runs/digits-001")  # fmt: skip
    import tyro

    kind = Annotated[PlasticityOptions, tyro.conf.arg(name="")]
    options = parse(kind, arguments, "pliant measure plasticity", None, positional=("source",))
    if Path(options.source).is_dir():
        return _plasticity_of_run(options)
    from pliant.core import Disk, UsageError
    from pliant.core.plain import dumps
    from pliant.recipes.flow import of_lives, of_one_life

    if options.seed < 0:
        raise Misuse(f"--seed is {options.seed}, expected 0 or more")
    for path in (options.figure, options.log):  # before anything is played
        if path is not None and not path.parent.is_dir():
            raise Misuse(f"{path} cannot be written: there is no folder {path.parent}")
    turns = _turns(options)
    if len(turns.lives) == 1:
        measured = of_one_life(turns, depth=options.depth)
    else:
        names = ("indices", "act_window", "obs_window", "mode", "correction", "bootstrap", "permutations", "seed")
        measured = of_lives(turns, **{name: getattr(options, name) for name in names})
    if options.figure is not None:
        try:
            Disk().replace_file(options.figure, measured.svg().encode())
        except OSError as error:
            raise UsageError(f"{options.figure} cannot be written ({error.strerror or error})") from None
    print(dumps(measured.found) if options.json else "\n".join(measured.lines))
    return 0


def _plasticity_of_run(options: PlasticityOptions) -> int:
    from pliant.core.plain import dumps
    from pliant.recipes.examine import plasticity_of

    if options.figure is not None:
        raise Misuse(
            "pliant measure plasticity draws no figure of a run; with pliant learn --plasticity its report does"
        )
    found, probe, history = plasticity_of(Path(options.source), options.seed)
    if options.json:
        print(dumps({**found._asdict(), "probe": probe, "history": history}))
        return 0
    for answers, bits in history:
        print(f"after {answers:,} answers: {bits:.3f} bits")
    print(f"plasticity {found.bits:.3f} ± {found.error:.3f} bits per answer, of {found.most:.3f}")
    print(f"so much random targets of {probe} say of an answer to one of them, after {found.updates} updates; "
          f"from {found.forks} forks")  # fmt: skip
    return 0


def _turns(options: PlasticityOptions) -> Any:
    """What was recorded, or is recorded now."""
    from pliant.streams.turns import read_turns

    head, _, name = options.source.partition(":")
    if head != "gym":
        return read_turns(Path(options.source))
    if options.lives < 1 or (options.indices is not None and options.indices < 1):
        raise Misuse(
            f"pliant measure plasticity: {options.lives} lives of {options.indices} indices, expected 1 or more"
        )
    try:
        import gymnasium
    except ImportError:
        raise Misuse("pliant measure plasticity gym:ENV needs Gymnasium: pip install 'pliant[control]'") from None
    from pliant.measure.flow import within
    from pliant.recipes.lives import agent_named, live
    from pliant.streams.recorded import Recorded, bins_of

    make = agent_named(options.agent)
    try:
        env = gymnasium.make(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise Misuse(f"pliant measure plasticity: gym:{name} cannot be made ({error})") from None
    indices = options.indices or (20_000 if options.lives == 1 else 3)
    for window in (options.act_window, options.obs_window):  # before anything is played
        within(window, indices)
    recorded = Recorded(env, None if options.bins is None else bins_of(env, options.bins, options.seed))
    turns = live(recorded, make, options.lives, indices, options.seed)
    if options.log is not None:
        turns.write(options.log)
    return turns


KINDS = {
    "dispersion": (dispersion.command, "how sharp the heads of a model are, and up to what length they can be"),
    "health": (_health, "whether a model can still learn"),
    "perplexity": (perplexity.command, "whether perplexity picks the model that is right, over texts or logged tasks"),
    "plasticity": (_plasticity, "how much what an agent sees shapes what it does, in bits; and the other way round"),
}
"""What can be measured: the command, and what it is about."""
