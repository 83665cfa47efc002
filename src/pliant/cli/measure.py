"""`pliant measure KIND`, and the shortest of the kinds: whether a model can still learn."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

from pliant.cli import dispersion, perplexity, plasticity
from pliant.cli.arguments import choose, parse, require


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


KINDS = {
    "dispersion": (dispersion.command, "how sharp the heads of a model are, and up to what length they can be"),
    "health": (_health, "whether a model can still learn"),
    "perplexity": (perplexity.command, "whether perplexity picks the model that is right, over texts or logged tasks"),
    "plasticity": (
        plasticity.command,
        "how much what an agent sees shapes what it does, in bits; and the other way round",
    ),
}
"""What can be measured: the command, and what it is about."""
