"""Health of what has been saved: a run with its history, or a model alone."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core import Answer, Question, UsageError, generator, seeded
from pliant.core.columns import Columns
from pliant.core.run import Run
from pliant.learn import Learner
from pliant.learn.life import read_life, saved_lives
from pliant.learn.probe import NewTask, Plasticity, new_task, plasticity
from pliant.measure.health import Health, health
from pliant.models import SequenceClassifier
from pliant.models.table import TableModel
from pliant.recipes import digits, series
from pliant.recipes.checkup import Checkup, pairs_of, side_by_side

CONFIG, WEIGHTS = "config.json", "model.safetensors"
ROWS, STEPS = 16, 32
"""Streams and steps of the probe of a model whose data are not known."""
MODELS: dict[str, type[Any]] = {"num_features": SequenceClassifier, "columns": TableModel}
"""Models by an argument that each of their config files names."""


@dataclass(frozen=True)
class Examined:
    """What was found.

    Attributes:
        health: now.
        probe: what it was found on, in words.
        new_task: how far a fork comes with random targets; None without a learner.
        history: looks that the run took, as rows of its records with answers, update and health.
    """

    health: Health
    probe: str
    new_task: NewTask | None = None
    history: list[dict[str, Any]] = field(default_factory=list)


def examine(path: Path, seed: int = 0) -> Examined:
    """Look at what is saved in a folder: a run of `pliant learn`, or a model by `save_pretrained`.

    Args:
        path: the folder.
        seed: of what is drawn: targets of the new task, inputs of a model whose data are not known.

    Raises:
        UsageError: nothing of the kind is there, or it is not whole.
    """
    if not path.is_dir():
        kind = "is a file" if path.exists() else "is not there"
        raise UsageError(f"{path} {kind}; give the folder of a run of pliant learn, or of a model by save_pretrained")
    config = _read(path / CONFIG)
    if "command" in config:
        return _examine_run(Run(path), seed)
    return _examine_model(path, config, seed)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path.parent} has no readable {CONFIG}; give the folder of a run of pliant learn, or of a "
                         "model by save_pretrained")  # fmt: skip
    return found


class Look(NamedTuple):
    """What a look of a run found: after so many answers and updates, bits."""

    answers: int
    update: int
    bits: float


class RunPlasticity(NamedTuple):
    """Plasticity of the newest saved life of a run.

    Attributes:
        found: now, after `update` updates.
        probe: what it was found on, in words.
        history: looks that the run took on its way, if it was asked to.
    """

    found: Plasticity
    update: int
    probe: str
    history: list[Look]


def plasticity_of(folder: Path, seed: int = 0) -> RunPlasticity:
    """Of a run, see `pliant.learn.probe.plasticity`.

    Args:
        folder: of a run of `pliant learn` whose targets are classes.
        seed: of the random targets.

    Raises:
        UsageError: nothing of the kind is there, or it is not whole.
    """
    run = Run(folder)
    _read(folder / CONFIG)
    learner, checkup, probe = _probed(run)
    found = plasticity(learner, pairs_of(checkup.questions, checkup.answers), seed=seed)
    looks = [(row, row["health"].get("whole", {}).get("plasticity")) for row in _looks(run)]
    history = [Look(int(row["answers"]), int(row["update"]), bits) for row, bits in looks if bits is not None]
    return RunPlasticity(found, learner.updates, probe, history)


def _looks(run: Run) -> list[dict[str, Any]]:
    return [row for row in run.lines("records.jsonl") if isinstance(row.get("health"), dict)]


def _probed(run: Run) -> tuple[Learner, Checkup, str]:
    """The learner of the newest life, and the probe of the run, also in words."""
    learner, state = _life_of(run)
    checkup = Checkup()
    if "checkup" in state:
        checkup.load_state_dict(state["checkup"])
    else:  # saved by a version that kept no probe
        checkup.questions = [Question(*question) for question, *_ in state["learner"]["asked"]]
    if not checkup.questions:
        raise UsageError(f"{run.folder} has been asked nothing yet; let it run for a while")
    return learner, checkup, f"the {'first' if 'checkup' in state else 'last'} {checkup.steps:,} steps of the run"


def _examine_run(run: Run, seed: int) -> Examined:
    learner, checkup, probe = _probed(run)
    inputs, reset, mask, *known = _probe(checkup.questions, checkup.answers)
    more: dict[str, Any] = {} if not known else {"targets": known[0], "known": known[1] & mask}
    found = health(
        learner.model, inputs, reset=reset, mask=mask, optimizer=learner.optimizer, since=checkup.first, **more
    )  # fmt: skip
    pairs = pairs_of(checkup.questions, checkup.answers)
    return Examined(found, probe, new_task(learner, pairs, seed=seed) if pairs else None, _looks(run))


def _life_of(run: Run) -> tuple[Learner, dict[str, Any]]:
    """The learner of the newest whole life, and the state of that life."""
    state = next((state for path in saved_lives(run.lives) if (state := read_life(path)) is not None), None)
    if state is None:
        raise UsageError(f"{run.folder} holds no whole life; a run with river's trees cannot be saved, learn again")
    config, command = run.config(), run.command()
    fields: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
    }
    try:
        if command == digits.COMMAND:
            ours = digits.DigitsConfig(**fields)
            learner = digits.learner(ours, digits.stream(ours))
        elif command == series.COMMAND:
            schema = run.read("schema.json")
            columns, shape = Columns.from_dict(schema["columns"]), series.Shape(**schema["shape"])
            learner = series.learner(series.SeriesConfig(**fields), columns, shape, max(1, len(schema["groups"])))
        else:
            raise UsageError(f"{run.folder} is a run of 'pliant {command}'; give one of pliant learn")
        learner.load_state_dict(state["learner"])
    except UsageError:
        raise
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError):
        raise UsageError(f"{run.folder} was made by another version, or altered; learn again") from None
    return learner, state


def _probe(questions: list[Question], answers: list[Answer]) -> list[Tensor]:
    """Inputs, reset and mask of the questions as one, then targets and where they are known, if any are."""
    pairs = {question.time: answer for question, answer in pairs_of(questions, answers)}
    parts: list[tuple[Tensor, ...]] = [(q.inputs, q.reset, q.mask) for q in questions]
    if pairs:
        some = next(iter(pairs.values())).targets
        for i, question in enumerate(questions):
            blank = some.new_zeros(*question.mask.shape, *some.shape[2:])
            answer = pairs.get(question.time)
            told = (blank, torch.zeros_like(question.mask)) if answer is None else (answer.targets, answer.target_mask)
            parts[i] = (*parts[i], *told)
    return side_by_side([question.rows for question in questions], parts)


def _examine_model(folder: Path, config: dict[str, Any], seed: int) -> Examined:
    kind = next((kind for name, kind in MODELS.items() if name in config), None)
    if kind is None or not (folder / WEIGHTS).exists():
        known = " or ".join(kind.__name__ for kind in MODELS.values())
        raise UsageError(f"{folder} holds no model by save_pretrained of {known} ({CONFIG} and {WEIGHTS})")
    try:
        # It says on standard output that it loads, and draws weights before it has them.
        with seeded(seed), redirect_stdout(io.StringIO()):
            model: nn.Module = kind.from_pretrained(folder)
    except Exception as error:
        raise UsageError(f"{folder} holds a {kind.__name__} that cannot be read ({error})".split("\n")[0]) from None
    return Examined(health(model, _drawn(model, seed)), f"{ROWS * STEPS} steps drawn at random, since it has no data")


def _drawn(model: Any, seed: int) -> Tensor:
    """Inputs of the right kind: normal numbers, codes of categories each as likely as any other."""
    draw = generator(seed, "probe")
    if isinstance(model, SequenceClassifier):
        return torch.randn(ROWS, STEPS, model.num_features, generator=draw)
    columns: Columns = model.columns
    x = torch.randn(ROWS, STEPS, columns.num_features, generator=draw, dtype=torch.float64)
    sizes = [column.size for column in columns.features]
    sizes += [len(columns.classes)] if columns.task == "classify" else []
    for i, size in enumerate(sizes):
        if size:
            x[..., i] = torch.randint(size, x.shape[:-1], generator=draw).double()
    return x
