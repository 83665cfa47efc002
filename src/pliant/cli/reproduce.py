"""`pliant reproduce NAME`: a paper's number beside ours."""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from pliant.cli.arguments import Misuse, choose, parse

NAMES = {
    "grokking": ("pliant.recipes.grokking", "GROKKING", "grokking on demand: projection and re-warming"),
    "ms-ssm": ("pliant.recipes.ms_ssm", "ms_ssm", "memory at many time scales: what its parts are worth"),
    "perplexity": ("pliant.recipes.perplexity", "PERPLEXITY", "perplexity against accuracy: copying and parity"),
    "plasticity": ("pliant.recipes.plasticity", "PLASTICITY", "plasticity and empowerment of small learners, in bits"),
    "sharp": ("pliant.recipes.sharp", "SHARPNESS", "softmax disperses: the largest of up to 16,384 items"),
    "warm-start": ("pliant.recipes.warm_start", "warm_start", "the gap of a warm start, and what closes it; images"),
}
"""Where each is: a reproduction, or what makes one from `--data`; and what it is about."""


@dataclasses.dataclass(frozen=True)
class ReproduceOptions:
    """Run a paper's experiment and print what it claims beside what came out here.

    What is done is kept in the folder of the run, so the same command continues what was stopped.
    """

    scale: Literal["minute", "ten", "hour", "paper"] = "ten"
    """About how long it takes on two processors, all seeds together; paper: the published configuration."""
    run: Path | None = None
    """Folder for the results; default: runs/reproduce-NAME-SCALE."""
    data: Path | None = None
    """Images, for those that need some: a folder with the IDX files of Fashion-MNIST (default: where Debian's
    dataset-fashion-mnist puts them) or with CIFAR-10's binary version; or a zip of train/ and test/CLASS/*.jpg."""
    dry_run: bool = False
    """Only say what would be run, and about how long it would take."""
    json: bool = False
    """Print the claims as JSON."""


def command(arguments: list[str]) -> int:
    """The exit code of `pliant reproduce` with these arguments."""
    if not arguments or arguments[0] in ("-h", "--help"):
        names = "\n".join(f"  {name:<12}{about}" for name, (_, _, about) in NAMES.items())
        print(f"usage: pliant reproduce NAME [OPTIONS]\n\nnames:\n{names}\n\nOptions: pliant reproduce NAME --help")
        return 0
    name = arguments[0]
    where, attribute, _ = choose("pliant reproduce", name, NAMES)
    options = parse(ReproduceOptions, arguments[1:], f"pliant reproduce {name}", None)
    from importlib import import_module

    what = getattr(import_module(where), attribute)
    if callable(what):
        what = what(options.data)
    elif options.data is not None:
        raise Misuse(f"pliant reproduce {name}: makes its own data, got --data {options.data}")
    if options.dry_run:
        return _dry_run(what, options)
    from pliant.recipes.reproduce import reproduce

    folder = options.run or Path("runs") / f"reproduce-{name}-{options.scale}"
    found = reproduce(what, options.scale, folder, tell=lambda line: print(line, file=sys.stderr, flush=True))
    _show(found, what, options)
    if what.page is not None and not options.json:
        print(f"\npage: {folder / 'page.html'}")
    return 0


def _dry_run(what: Any, options: ReproduceOptions) -> int:
    from pliant.core.plain import dumps

    trials = [*what.trials(options.scale), *what.then(options.scale, [])]
    seconds = sum(what.seconds(trial) for trial in trials)
    if options.json:
        rows = [{"name": trial.name, "seed": trial.seed, "settings": dict(trial.settings)} for trial in trials]
        print(dumps({"trials": rows, "seconds": seconds}))
        return 0
    for trial in trials:
        print(f"{trial.name}, seed {trial.seed}: {', '.join(f'{k} {_short(v)}' for k, v in trial.settings.items())}")
    print(f"{len(trials)} trials, about {_time(seconds)}")
    return 0


def _short(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def _time(seconds: float) -> str:
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def _show(found: dict[str, Any], what: Any, options: ReproduceOptions) -> None:
    if options.json:
        from pliant.core.plain import dumps

        print(dumps(found))
        return
    print(f"{what.title}\n{what.cite}")
    for claim in found["claims"]:
        print(f"\n{claim['claim']}\n  paper   {claim['paper']} ({claim['known']})\n  ours    {claim['ours']}\n"
              f"  spread  {claim['spread']}, {claim['seeds']} seed{'s' * (claim['seeds'] > 1)}\n"
              f"  {claim['verdict']}")  # fmt: skip
