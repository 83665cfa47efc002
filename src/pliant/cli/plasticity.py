"""`pliant measure plasticity`: how much an agent, or a learner, is shaped by what it sees, in bits."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any, Literal

from pliant.cli.arguments import Misuse, parse, require
from pliant.cli.figure import check_folder, draw_to


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


NAME = "pliant measure plasticity"
ALWAYS = {"source", "figure", "json"}
OF_LIVES = {"act_window", "obs_window", "mode", "correction", "bootstrap", "permutations", "seed"}
OF_GYM = {"agent", "lives", "indices", "bins", "log", "seed"}
APPLY = {
    "a run": ALWAYS | {"seed"},
    "a log of many lives": ALWAYS | OF_LIVES | {"indices"},
    "a log of one life": ALWAYS | {"indices", "depth"},
    "gym:ENV with many lives": ALWAYS | OF_GYM | OF_LIVES,
    "gym:ENV with one life": ALWAYS | OF_GYM | {"depth"},
}
"""Options that say something of each kind of source."""


def command(arguments: list[str]) -> int:
    """The exit code of `pliant measure plasticity` with these arguments."""
    require(arguments, f"{NAME} needs a log or an environment, such as: {NAME} turns.jsonl, or gym:FrozenLake-v1 "
                       "--agent q, or runs/digits-001")  # fmt: skip
    import tyro

    kind = Annotated[PlasticityOptions, tyro.conf.arg(name="")]
    options = parse(kind, arguments, NAME, None, positional=("source",))
    if options.seed < 0:
        raise Misuse(f"--seed is {options.seed}, expected 0 or more")
    for path in (options.figure, options.log):  # before anything is played
        check_folder(path)
    return _of_run(options) if Path(options.source).is_dir() else _of_turns(options)


def _of_turns(options: PlasticityOptions) -> int:
    from pliant.core.plain import dumps
    from pliant.recipes.flow import of_lives, of_one_life

    turns = _turns(options)
    if len(turns.lives) == 1:
        measured = of_one_life(turns, indices=options.indices, depth=options.depth)
    else:
        measured = of_lives(turns, **{name: getattr(options, name) for name in OF_LIVES | {"indices"}})
    draw_to(options.figure, measured.svg)
    print(dumps(measured.found) if options.json else "\n".join(measured.lines))
    return 0


def _of_run(options: PlasticityOptions) -> int:
    _apply(options, "a run")
    from pliant.core.plain import dumps
    from pliant.recipes.examine import plasticity_of
    from pliant.report.flow import of_learner

    found, update, probe, history = plasticity_of(Path(options.source), options.seed)
    draw_to(options.figure, lambda: of_learner([(look.update, look.bits) for look in history], (update, found.bits),
                                      found.error, found.most))  # fmt: skip
    if options.json:
        print(dumps({**found._asdict(), "update": update, "probe": probe,
                     "history": [look._asdict() for look in history]}))  # fmt: skip
        return 0
    for look in history:
        print(f"after {look.answers:,} answers: {look.bits:.3f} bits")
    print(f"plasticity {found.bits:.3f} ± {found.error:.3f} bits per answer, of {found.most:.3f}")
    print(f"so much random targets of {probe} say of an answer to one of them, after {found.updates} updates; "
          f"from {found.forks} forks")  # fmt: skip
    return 0


def _apply(options: PlasticityOptions, source: str) -> None:
    """Refuse what was asked for and would be ignored."""
    given = [field.name for field in dataclasses.fields(options)
             if field.name not in APPLY[source] and getattr(options, field.name) != field.default]  # fmt: skip
    if given:
        raise Misuse(f"{NAME}: --{given[0].replace('_', '-')} says nothing of {source}")


def _turns(options: PlasticityOptions) -> Any:
    """What was recorded, or is recorded now."""
    from pliant.streams.turns import read_turns

    head, _, name = options.source.partition(":")
    if head != "gym":
        turns = read_turns(Path(options.source))
        _apply(options, "a log of one life" if len(turns.lives) == 1 else "a log of many lives")
        return turns
    _apply(options, "gym:ENV with one life" if options.lives == 1 else "gym:ENV with many lives")
    if options.lives < 1 or (options.indices is not None and options.indices < 1):
        raise Misuse(f"{NAME}: {options.lives} lives of {options.indices} indices, expected 1 or more")
    try:
        import gymnasium
    except ImportError:
        raise Misuse(f"{NAME} gym:ENV needs Gymnasium: pip install 'pliant[control]'") from None
    from pliant.measure.flow import within
    from pliant.recipes.lives import agent_named, live
    from pliant.streams.recorded import Recorded, bins_of

    make = agent_named(options.agent)
    try:
        env = gymnasium.make(name)
    except (gymnasium.error.Error, ImportError) as error:
        raise Misuse(f"{NAME}: gym:{name} cannot be made ({error})") from None
    indices = options.indices or (20_000 if options.lives == 1 else 3)
    for window in (options.act_window, options.obs_window):  # before anything is played
        within(window, indices)
    recorded = Recorded(env, None if options.bins is None else bins_of(env, options.bins, options.seed))
    turns = live(recorded, make, options.lives, indices, options.seed)
    if options.log is not None:
        turns.write(options.log)
    return turns
