"""What a run folder says. Any part of it may be missing, cut off or made up."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from pliant.core.run import Run
from pliant.report.style import BLUE, OURS, PALETTE, REFERENCE
from pliant.report.values import MAX_LABEL, Floats, as_dict, as_list, clean, flat, is_count, mean, number, text

Tasks = list[tuple[float, float, str]]
"""Start, end and name of each task, in answers."""


@dataclass(frozen=True)
class Total:
    """What a member came to over the whole run; NaN where unknown."""

    answers: float = math.nan
    bits: float = math.nan
    saved: float = math.nan
    saved_per_answer: float = math.nan
    accuracy: float = math.nan
    error: float = math.nan
    cpu: float = math.nan


@dataclass(frozen=True)
class Loaded:
    """A run folder as read. `names` are its members, ours first; `label` and `color` tell it from other runs."""

    name: str
    label: str
    command: str
    config: dict[str, str]
    environment: dict[str, str]
    color: str
    records: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    summary: dict[str, Any] | None
    reference: str
    names: list[str]
    totals: dict[str, Total]

    @property
    def answers(self) -> int:
        """Answers so far."""
        if self.records:
            return int(self.records[-1]["answers"])
        told = as_dict(self.summary).get("answers")
        return int(told or 0) if is_count(told) else 0

    @cached_property
    def measure(self) -> str:
        """What stands beside bits: `accuracy` of classes or `error` of numbers."""
        for key in ("accuracy", "error"):
            if any(math.isfinite(getattr(total, key)) for total in self.totals.values()):
                return key
        return "error" if self.config.get("task") in ("regress", "forecast") else "accuracy"

    def told(self, key: str) -> dict[str, Any]:
        """An object at the top of the summary, empty if there is none."""
        return as_dict(as_dict(self.summary).get(key))

    def member(self, name: str) -> dict[str, Any]:
        """A member's part of the summary, empty if there is none."""
        return as_dict(self.told("members").get(name))

    @property
    def changes(self) -> list[tuple[int, str]]:
        """Where a change was detected, in answers, and by what."""
        rows = map(as_dict, as_list(as_dict(self.summary).get("changes")))
        return sorted((row["answers"], text(row.get("name", ""))) for row in rows if is_count(row.get("answers")))


def load(folder: Path) -> Loaded:
    """Read a run folder.

    Raises:
        UsageError: no run in it, or one of a newer version.
    """
    run = Run(folder)
    config = run.config()
    records = [row for row in _lines(run, "records.jsonl") if is_count(row.get("answers"))]
    summary = _read(run, "summary.json")
    summary = summary if isinstance(summary, dict) else None
    reference = as_dict(summary).get("reference")
    reference = reference if isinstance(reference, str) else REFERENCE
    found = [*as_dict(as_dict(summary).get("members"))]
    found += [name for row in records for name in as_dict(row.get("members"))]
    names = sorted(dict.fromkeys(found), key=lambda name: name != OURS)
    name = text(folder.resolve().name)
    loaded = Loaded(
        name=name,
        label=name,
        command=text(run.command()),
        config=flat(clean(config | _settled(run))),
        environment=flat(as_dict(_read(run, "environment.json"))),
        color=BLUE,
        records=records,
        timing=[row for row in _lines(run, "timing.jsonl") if row],
        summary=summary,
        reference=reference,
        names=names,
        totals={},
    )
    loaded.totals.update({name: _total(loaded, name) for name in names})
    return loaded


def _read(run: Run, name: str) -> Any:
    try:
        return clean(run.read(name))
    except RecursionError:  # brackets without end
        return None


def _lines(run: Run, name: str) -> list[dict[str, Any]]:
    try:
        return [as_dict(clean(row)) for row in run.lines(name)]
    except RecursionError:
        return []


def _settled(run: Run) -> dict[str, Any]:
    """What a config left to the data: task, target and horizon of a table; empty for other runs."""
    schema = as_dict(_read(run, "schema.json"))
    columns, shape = as_dict(schema.get("columns")), as_dict(schema.get("shape"))
    found = {"task": columns.get("task"), "target": columns.get("targets"), "horizon": shape.get("ahead")}
    if not all(isinstance(found[name], kind) for name, kind in (("task", str), ("target", list), ("horizon", int))):
        return {}
    return found


def labelled(runs: list[Loaded]) -> list[Loaded]:
    """Label each run by what differs between the configs, or by its name if that is no use; and color them."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differ = [key for key in keys if len({run.config.get(key) for run in runs}) > 1]
    labels = [", ".join(f"{key}={run.config[key]}" for key in differ if key in run.config) for run in runs]
    if len(set(labels)) < len(labels) or any(not 0 < len(label) <= MAX_LABEL for label in labels):
        labels = [run.name for run in runs]
    if len(set(labels)) < len(labels):
        labels = [f"{number} {label}" for number, label in enumerate(labels, 1)]
    colors = islice(cycle(PALETTE), len(runs))
    return [replace(run, label=label, color=color) for run, label, color in zip(runs, labels, colors, strict=True)]


def _total(run: Loaded, name: str) -> Total:
    """Totals from the summary; what it lacks is worked out from the records."""
    counts, bits = column(run, name, "answers"), column(run, name, "bits")
    saved = column(run, run.reference, "bits") - bits
    known = run.member(name)

    def value(key: str, otherwise: float) -> float:
        return number(known[key]) if key in known else otherwise

    answers = value("answers", float(np.nansum(counts)))
    total_saved = value("bits_saved", mean(saved, counts) * answers)
    return Total(
        answers=answers,
        bits=value("bits", mean(bits, counts)),
        saved=total_saved,
        saved_per_answer=total_saved / answers if answers else math.nan,
        accuracy=value("accuracy", mean(column(run, name, "accuracy"), counts)),
        error=value("error", mean(column(run, name, "error"), counts)),
        cpu=_cost(run, name),
    )


def _cost(run: Loaded, name: str) -> float:
    """CPU seconds of a member in all sessions; from the summary if there is no timing."""
    spent = [number(as_dict(row.get("cpu")).get(name)) for row in run.timing]
    spent = [seconds for seconds in spent if math.isfinite(seconds)]
    cost = sum(spent) if spent else number(run.told("cpu_seconds").get(name))
    return cost if math.isfinite(cost) else math.nan


def column(run: Loaded, name: str, key: str) -> Floats:
    """A value of a member in every window `(n,)`, NaN where it is missing or not finite."""
    values = [number(as_dict(as_dict(row.get("members")).get(name)).get(key)) for row in run.records]
    found = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(found), found, np.nan)


def answers(run: Loaded) -> Floats:
    """Answers at the end of every window `(n,)`."""
    return np.array([row["answers"] for row in run.records], dtype=np.float64)


def tasks(run: Loaded) -> Tasks:
    """The tasks of a run; empty if it knows none."""
    found: Tasks = []
    before = 0.0
    for row in run.records:
        if row.get("task") is None:
            return []
        name, end = text(row["task"]), float(row["answers"])
        if found and found[-1][2] == name:
            found[-1] = (found[-1][0], end, name)
        else:
            found.append((before, end, name))
        before = end
    return found


@dataclass(frozen=True)
class Speed:
    """Seconds that windows took; those that a session began in the middle are left out."""

    ends: Floats
    answers: Floats
    wall: Floats
    cpu: Floats
    total: float
    sessions: int


def speed(run: Loaded) -> Speed:
    """What timing.jsonl says."""
    ends = [0, *(int(row["answers"]) for row in run.records)]
    size = {end: end - start for start, end in pairwise(ends)}
    last: dict[Any, float] = {}
    ends_at: dict[Any, float] = {}
    windows, part = [], 0.0
    for row in run.timing:
        session, end, seconds = row.get("session"), row.get("answers"), number(row.get("seconds"))
        if not isinstance(session, int) or not isinstance(end, int) or not math.isfinite(seconds):
            continue
        ends_at[session], cpu = seconds, number(as_dict(row.get("cpu")).get(OURS))
        if row.get("part") is True:  # of a window that goes on
            part += cpu
            continue
        if session in last or session == 0:
            windows.append((end, float(size.get(end, 0)), seconds - last.get(session, 0.0), cpu + part))
        last[session], part = seconds, 0.0
    kept = np.array([window for window in windows if window[1] > 0], dtype=np.float64).reshape(-1, 4)
    return Speed(kept[:, 0], kept[:, 1], kept[:, 2], kept[:, 3], sum(ends_at.values(), 0.0), len(ends_at))


@dataclass(frozen=True)
class Drift:
    """How far features lie from their means before, `values` (features, columns) in standard deviations.

    `edges` (columns + 1,) are in answers; a column is the mean over `width` windows. `left_out` features moved less.
    """

    names: list[str]
    values: Floats
    edges: Floats
    width: int
    left_out: int


def drift(run: Loaded, most: int, columns: int, clip: float) -> Drift | None:
    """The `most` features with the largest drift, in at most `columns` columns; values end at `clip`."""
    peaks: dict[str, float] = {}
    rows = [
        {name: value for name, raw in as_dict(row.get("drift")).items() if not math.isnan(value := number(raw))}
        for row in run.records
    ]
    for row in rows:
        for name, value in row.items():
            peaks[name] = max(peaks.get(name, 0.0), abs(value))
    names = sorted(peaks, key=lambda name: -peaks[name])[:most]
    if not names:
        return None
    values = np.clip([[row.get(name, math.nan) for row in rows] for name in names], -clip, clip)
    width = -(-len(rows) // columns)
    starts = np.arange(0, len(rows), width)
    counts = np.add.reduceat(np.isfinite(values), starts, axis=1, dtype=np.float64)
    sums = np.add.reduceat(np.nan_to_num(values), starts, axis=1)
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    ends = np.maximum.accumulate(answers(run))
    edges = np.concatenate([[0.0], ends[np.append(starts[1:] - 1, len(rows) - 1)]])
    return Drift(names, means, edges, width, len(peaks) - len(names))
