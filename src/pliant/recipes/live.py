"""Answer a live input with the model of a run: lines in, lines out, in constant memory.

A line asks, answers, or both; it is one JSON object:

    {"id": 7, "x": {"a": 1.5, "b": "red"}}    answered at once: {"id": 7, "p": {"no": 0.8, "yes": 0.2}}
    {"id": 7, "y": "yes"}                      the late answer to 7, in any order; learned from with --learn
    {"id": 8, "x": {...}, "y": "no"}           answered first, then the same

A number is answered by its mean and quantiles. `"group"` names the stream if the run has groups. Where
the task is to forecast, `x` may hold the target's own value in this row, which is the answer to the row
`horizon` before; nothing else need then be sent. CSV is the same: a header, a column `id` if there is
one, the features, and the target where it is known. Its delimiter is found, and decimal commas, as in files.

A line that cannot be understood is answered by {"error": ..., "line": ...}, counted, and changes nothing.
"""

import csv
import json
import math
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from pliant.core import Answer, Disk, Question, UsageError, categorical_nats
from pliant.core.columns import Columns
from pliant.core.pack import pack_file, unpack_file
from pliant.core.plain import dumps
from pliant.core.run import Run
from pliant.kernels import mixture_quantiles
from pliant.learn import Learner
from pliant.learn.life import read_life, saved_lives
from pliant.recipes import series
from pliant.recipes.panel import row_nats
from pliant.recipes.wire import MAX_LINE
from pliant.streams._cells import CALENDAR, calendar, moments, number, shown
from pliant.streams._files import _split, _unique

LEVELS = (0.05, 0.25, 0.5, 0.75, 0.95)
MAX_GROUPS = 65_536
DELIMITERS = ",;\t| "
"""What may separate the cells of CSV; a space stands for any white space."""
NO_JSON = ("NaN", "Infinity", "-Infinity")
"""Numbers that Python writes and reads as JSON although they are none."""


WRONG = (ValueError, TypeError, OverflowError)
"""What a cell can raise that is no number; the last is an integer of hundreds of digits."""


class Malformed(ValueError):
    """A line that cannot be understood; the message says why."""


class Waiting(NamedTuple):
    """A row that was answered: its place in the learner's time, its stream and its step there."""

    time: int
    group: int
    step: int


class Live:
    """The model of a run, line by line.

    Args:
        run: a finished or stopped run of `pliant learn series`.
        learn: whether answers change the model.

    Raises:
        UsageError: the folder holds no such run, or no whole life.
    """

    def __init__(self, run: Run, *, learn: bool = False):
        config = run.config(series.COMMAND)
        schema = run.read("schema.json")
        if not isinstance(schema, dict):
            raise UsageError(f"{run.folder} has no readable schema.json; learn it again")
        self.config = json.dumps(config, sort_keys=True)
        self.columns = Columns.from_dict(schema["columns"])
        self.shape = series.Shape(**schema["shape"])
        self.time_column, self.group_column = schema.get("time"), schema.get("group") or "group"
        self.learning, self.horizon = learn, self.shape.ahead
        saved = next((state for path in saved_lives(run.lives) if (state := read_life(path)) is not None), None)
        if saved is None:
            raise UsageError(f"{run.folder} holds no whole life; a run with river's trees cannot be saved, learn again")
        names = schema["groups"] or [""]
        self.groups = {name: i for i, name in enumerate(names)}
        self.grouped = bool(schema["groups"])
        self.learner = self._learner(config, len(names), saved["learner"])
        # Labels of the last rows of the run are known by now.
        stream = saved["stream"]["inner"]
        asked, values = stream["asked"].tolist(), stream["values"].numpy()
        self.steps = list(asked)
        self.known = [values[g, (count - 1) % values.shape[1]].tolist() if count else [math.nan] * values.shape[2]
                      for g, count in enumerate(asked)]  # fmt: skip
        self.newest = [count - 1 - self.horizon for count in asked]  # step that the known label answers
        self.time = 1 + max([stream["row"], *(question[0][3] for question in saved["learner"]["asked"])])
        self.waiting: OrderedDict[str, Waiting] = OrderedDict()
        self.by_step: dict[tuple[int, int], str] = {}
        self.counts: Counter[str] = Counter()
        self.nats, self.scored = 0.0, 0

    def _learner(self, config: dict[str, Any], streams: int, state: dict[str, Any]) -> Learner:
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in config.items()
        }
        learner = series.learner(series.SeriesConfig(**fields), self.columns, self.shape, streams, live=True)
        learner.load_state_dict(state)
        learner.reuse = False
        # What the run was still waiting for will not be answered here.
        learner.close()
        return learner

    def reply(self, message: Any) -> dict[str, Any] | None:
        """Take one message; what to say to it, None if there is nothing to say.

        Raises:
            Malformed: it cannot be understood, and nothing has changed.
        """
        if not isinstance(message, dict):
            raise Malformed("expected a JSON object")
        name = message.get("id")
        if isinstance(name, bool) or not isinstance(name, str | int | float) or json.dumps(name) in NO_JSON:
            raise Malformed("expected an id, a text or a number")
        key = json.dumps(name)
        if "x" not in message and "y" not in message:
            raise Malformed("expected x, y or both")
        label = self._label(message["y"]) if message.get("y") is not None else None
        said = None
        if "x" in message:
            said = {"id": message["id"], **self._ask(key, message)}
        elif key not in self.waiting:
            raise Malformed(f"no row with id {key} waits for its answer")
        if label is not None:
            self._answer(key, label)
        return said

    def _ask(self, key: str, message: dict[str, Any]) -> dict[str, Any]:
        if key in self.waiting:
            raise Malformed(f"the id {key} is already waiting for its answer")
        row, own, problems = self._row(message["x"])
        group = self._group(message.get("group"))
        self.counts.update(problems)
        step = self.steps[group]
        if own is not None:
            self._know(group, own, step)
        inputs = torch.tensor([*row, *self.known[group]], dtype=torch.float64)[None, None]
        flag = torch.zeros(1, 1, dtype=torch.bool)
        reset = torch.full_like(flag, step == 0)
        question = Question(inputs, reset, ~flag, self.time, torch.tensor([group]))
        output = self.learner.predict(question)[0, 0]
        self.waiting[key] = Waiting(self.time, group, step)
        self.by_step[group, step] = key
        self.steps[group], self.time = step + 1, self.time + 1
        if len(self.waiting) > self.learner.remember:
            lost = self.waiting.popitem(last=False)[1]
            self.by_step.pop((lost.group, lost.step), None)
            self.counts["forgotten"] += 1
        self.counts["asked"] += 1
        return self._say(output)

    def _know(self, group: int, own: list[float], step: int) -> None:
        """The target's own value in this row answers the row `horizon` before."""
        key = self.by_step.get((group, step - self.horizon))
        if key is not None and not any(map(math.isnan, own)):
            self._answer(key, own)
        elif step - self.horizon > self.newest[group]:
            self.known[group], self.newest[group] = own, step - self.horizon

    def _answer(self, key: str, label: list[float]) -> None:
        time, group, step = self.waiting.pop(key)
        self.by_step.pop((group, step), None)
        numbers = self.columns.task != "classify"
        targets = torch.tensor([[label]], dtype=torch.float64) if numbers else torch.tensor([[int(label[0])]])
        shown = torch.ones(1, 1, dtype=torch.bool)
        answer = Answer(targets, shown, shown, time, torch.tensor([group]))
        said = self.learner.said(answer)
        if said is not None:
            nats = (row_nats if numbers else categorical_nats)(said[0], targets[0])
            self.nats, self.scored = self.nats + float(nats), self.scored + 1
        if self.learning:
            self.learner.learn(answer)
        else:
            self.learner.forget(answer)
        self.counts["answered"] += 1
        if step > self.newest[group]:
            self.known[group], self.newest[group] = label, step

    def _label(self, cell: Any) -> list[float]:
        targets = self.columns.targets
        if isinstance(cell, dict):
            cells = [cell.get(name) for name in targets]
        else:
            cells = cell if isinstance(cell, list) else [cell]
        if len(cells) != len(targets):
            raise Malformed(f"y has {len(cells)} values, expected {len(targets)}")
        try:
            pairs = zip(targets, cells, strict=True)
            label = [self.columns.target(self.columns.bare(name, value)) for name, value in pairs]
        except WRONG as error:
            raise Malformed(f"y: {error}") from None
        if any(map(math.isnan, label)):
            raise Malformed("y is missing a value")
        return label

    def _row(self, x: Any) -> tuple[list[float], list[float] | None, list[str]]:
        """Features, the target's own value if the task is to forecast and the row has it, and what is wrong with it."""
        names = [column.name for column in self.columns.features]
        if isinstance(x, list):
            if len(x) != len(names):
                raise Malformed(f"x has {len(x)} values, expected {len(names)}: {', '.join(names[:20])}")
            x = dict(zip(names, x, strict=True))
        if not isinstance(x, dict):
            raise Malformed("x must be an object of features, or their list")
        own = None
        if self.horizon and any(name in x for name in self.columns.targets):
            try:
                own = [self.columns.target(self.columns.bare(name, x.get(name))) for name in self.columns.targets]
            except WRONG as error:
                raise Malformed(f"x: {error}") from None
        wall = moments([str(x[self.time_column])])[1] if self.time_column in x else np.array([math.nan])
        row, problems = [], []
        for column in self.columns.features:
            if column.name in CALENDAR and column.name not in x:
                row.append(float(calendar(column.name, wall)[0]))
                continue
            try:
                row.append(column.code(self.columns.bare(column.name, x.get(column.name))))
            except WRONG:
                problems.append("feature that is no number (read as missing)")
                row.append(math.nan)
        known = {*names, *self.columns.targets, self.time_column}
        problems += ["feature that the model does not know (left out)" for name in x if name not in known]
        return row, own, problems

    def _group(self, name: Any) -> int:
        if not self.grouped:
            return 0
        if name is None or isinstance(name, dict | list):
            raise Malformed("expected the name of a group, since the run has groups")
        name = str(name).strip()
        if name not in self.groups:
            if len(self.groups) >= MAX_GROUPS:
                raise Malformed(f"group {shown(name)} is new, and there are {MAX_GROUPS} already")
            if len(self.groups) >= (self.learner.streams or 0):
                # By a fifth, so that many new ones cost little each.
                self.learner.grow(min(MAX_GROUPS, len(self.groups) + len(self.groups) // 5 + 1))
            self.groups[name] = len(self.groups)
            self.steps.append(0)
            self.known.append([math.nan] * len(self.columns.targets))
            self.newest.append(-1 - self.horizon)
        return self.groups[name]

    def _say(self, output: torch.Tensor) -> dict[str, Any]:
        if self.columns.task == "classify":
            shares = output.double().softmax(-1).tolist()
            return {"p": dict(zip(self.columns.classes, shares, strict=True))}
        logits, means, _ = output.chunk(3, -1)
        mean = (logits.softmax(-1) * means).sum(-1).tolist()
        quantiles = mixture_quantiles(output, LEVELS).tolist()
        told = [
            {"mean": mean[g], "quantiles": dict(zip(map(str, LEVELS), quantiles[g], strict=True))}
            for g in range(len(mean))
        ]
        return told[0] if len(told) == 1 else dict(zip(self.columns.targets, told, strict=True))

    def summary(self) -> dict[str, Any]:
        """Counts, and bits per answer of what has been scored."""
        bits = self.nats / math.log(2) / self.scored if self.scored else None
        return {"asked": 0, "answered": 0, **self.counts, "scored": self.scored, "bits": bits,
                "updates": self.learner.updates, "waiting": len(self.waiting)}  # fmt: skip

    def state_dict(self) -> dict[str, Any]:
        return {
            "learner": self.learner.state_dict(),
            "schema": self.columns.to_dict(),
            "config": self.config,
            "groups": list(self.groups),
            "steps": list(self.steps),
            "known": [list(values) for values in self.known],
            "newest": list(self.newest),
            "time": self.time,
            "waiting": [(key, *entry) for key, entry in self.waiting.items()],
            "counts": dict(self.counts),
            "nats": self.nats,
            "scored": self.scored,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if json.dumps(state["schema"]) != json.dumps(self.columns.to_dict()):
            raise UsageError("the state was saved for a run over other columns; name the run that it belongs to")
        if state["config"] != self.config:
            raise UsageError("the state was saved for another run; name the run that it belongs to")
        self.learner.grow(state["learner"]["streams"])
        self.learner.load_state_dict(state["learner"])
        self.groups = {name: i for i, name in enumerate(state["groups"])}
        self.steps, self.known, self.newest = state["steps"], state["known"], state["newest"]
        self.time, self.nats, self.scored = state["time"], state["nats"], state["scored"]
        self.waiting = OrderedDict((key, Waiting(*entry)) for key, *entry in state["waiting"])
        self.by_step = {(entry.group, entry.step): key for key, entry in self.waiting.items()}
        self.counts = Counter(state["counts"])


class Lines:
    """Turns lines of text into messages for a `Live` and its replies into lines; JSON, or CSV with a header.

    Attributes:
        count, errors: lines of all connections so far, and those that could not be understood.
    """

    def __init__(self, live: Live, first: "Lines | None" = None):
        self.live, self.first = live, first or self
        self.form: str | None = None  # "json" or "csv", by the first line
        self.header: tuple[str, ...] = ()
        self.delimiter = ","
        columns = live.columns
        self.numbers = {column.name for column in columns.features if column.kind == "number"}
        self.numbers |= set() if columns.task == "classify" else set(columns.targets)
        self.place = 0  # lines of this connection
        self.count = 0
        self.errors = 0

    def another(self) -> "Lines":
        """Those of another connection, in a form of their own; they are counted here too."""
        return Lines(self.live, self.first)

    def take(self, line: bytes | None) -> str | None:
        """The reply to one line, without its line break; None if there is none. None for a line is one too long."""
        self.first.count += 1
        self.place += 1
        try:
            if line is None:
                raise Malformed(f"the line has more than {MAX_LINE:,} bytes")
            said = self._take(line.decode().strip("\r\n\ufeff"))
        except UnicodeDecodeError:
            said = self._error("the line is not UTF-8")
        except Malformed as error:
            said = self._error(str(error))
        return None if said is None else dumps(said)

    def _error(self, why: str) -> dict[str, Any]:
        self.first.errors += 1
        return {"error": why, "line": self.place}

    def _take(self, line: str) -> dict[str, Any] | None:
        # Between tabs there may be cells that are all missing.
        if not line.strip() and not (self.delimiter == "\t" and "\t" in line):
            return None
        if self.form is None:
            if not line.lstrip().startswith("{"):
                self._begin(line)
                return None
            self.form = "json"
        if self.form == "json":
            try:
                message = json.loads(line)
            except (ValueError, RecursionError):
                raise Malformed("the line is no JSON object") from None
            return self.live.reply(message)
        cells = _cells(line, self.delimiter)
        if len(cells) != len(self.header):
            raise Malformed(f"the row has {len(cells)} cells, the header {len(self.header)}")
        return self.live.reply(self._message(dict(zip(self.header, cells, strict=True))))

    def _begin(self, line: str) -> None:
        """Take the header: cells are separated by what gives the most names that the run knows."""
        columns = self.live.columns
        known = {column.name for column in columns.features} | {*columns.targets, self.live.time_column}
        headers = {sign: tuple(name.strip() for name in _cells(line, sign)) for sign in DELIMITERS}
        delimiter = max(headers, key=lambda sign: len(known & set(headers[sign])))
        if not known & set(headers[delimiter]):
            raise Malformed("expected a JSON object, or a CSV header that names features of the run")
        try:
            self.header = _unique(headers[delimiter], Path("the input"))
        except UsageError as error:
            raise Malformed(str(error)) from None
        self.form, self.delimiter = "csv", delimiter

    def _message(self, row: dict[str, Any]) -> dict[str, Any]:
        targets, live = self.live.columns.targets, self.live
        if self.delimiter != ",":
            row = {name: self._point(name, cell) if name in self.numbers else cell for name, cell in row.items()}
        features = {column.name for column in live.columns.features}
        message: dict[str, Any] = {"id": self.first.count}
        if "id" in row and "id" not in features:
            message["id"] = row.pop("id")
        column = live.group_column if live.group_column in row else "group"
        if column not in features:
            message["group"] = row.pop(column, None)
        given = [row.get(name, "") for name in targets]
        if live.horizon == 0:
            row = {name: cell for name, cell in row.items() if name not in targets}
            if all(str(cell).strip() for cell in given):
                message["y"] = given
        return message | {"x": row}

    def _point(self, name: str, cell: str) -> Any:
        """A number whose decimal sign may be a comma."""
        text = self.live.columns.bare(name, cell).replace(",", ".")
        value = number(text)
        # As text it could be taken for one with grouped thousands again.
        return text if value is None or math.isnan(value) else value

    def state_dict(self) -> dict[str, Any]:
        return {
            "live": self.live.state_dict(),
            "form": self.form,
            "header": list(self.header),
            "delimiter": self.delimiter,
            "place": self.place,
            "count": self.count,
            "errors": self.errors,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.live.load_state_dict(state["live"])
        self.form, self.header, self.delimiter = state["form"], tuple(state["header"]), state.get("delimiter", ",")
        self.count, self.errors = state["count"], state["errors"]
        self.place = state.get("place", self.count)


def _cells(line: str, delimiter: str) -> list[str]:
    if delimiter == " ":
        return _split(line, delimiter)
    try:
        return next(csv.reader([line], delimiter=delimiter, skipinitialspace=True))
    except csv.Error as error:
        raise Malformed(f"the line is no CSV ({error})") from None


def save(lines: Lines, offset: int, path: Path) -> None:
    """Write everything that a continuation needs, whole or not at all; offset: bytes of the input taken."""
    try:
        Disk().replace_file(path, pack_file(lines.state_dict() | {"offset": offset}))
    except OSError as error:
        raise UsageError(f"the state cannot be written to {path} ({error.strerror or error})") from None


def load(lines: Lines, path: Path) -> int:
    """Continue where `save` was called; returns its offset."""
    try:
        state = unpack_file(path.read_bytes())
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read as a state ({error}); give one that pliant stream saved") from None
    lines.load_state_dict(state)
    return int(state["offset"])
