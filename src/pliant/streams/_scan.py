"""What the scan of a table keeps and decides: names, kinds, classes and the time."""

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pliant.core.columns import MISSING, Column, Task
from pliant.core.errors import UsageError
from pliant.streams._cells import DAY, Clock, moments, number, numbers, shown, texts
from pliant.streams._files import KNOWN, Empty, Source, kind_of

AUTO = "auto"
FEW_NUMBERS = 20  # whole numbers in a target that are taken for classes
BUCKETS = 4096
MOST_VALUES = 256  # categories of a column that are listed
MOST_CLASSES = 1000
MOST_GROUPS = 4096
MOST_COLUMNS = 10_000
MOSTLY = 0.95  # of the cells are numbers in a column of numbers
TIMED_ROWS = 1000  # from which the sampling interval comes
UNIX = 1e8  # numbers beyond are seconds since 1970; smaller ones count something else
MONTH = (28 * DAY, 31 * DAY)
TIME_NAMES = ("datetime", "timestamp", "date", "time", "ds", "date_time", "date time")


class Tally:
    """What the scan keeps of one column.

    Attributes:
        filled: cells that are not missing.
        numeric: those of them that are numbers.
        values: distinct ones, None once there are more than `limit`.
        example: a cell that is no number.
    """

    def __init__(self, limit: int):
        self.limit, self.filled, self.numeric = limit, 0, 0
        self.values: set[str] | None = set()
        self.example: Any = None

    def add(self, cells: list[Any], comma: bool) -> None:
        values, bad = numbers(cells, comma)
        numeric = int((~np.isnan(values)).sum())
        self.numeric += numeric
        self.filled += numeric + len(bad)
        if bad and self.example is None:
            self.example = cells[bad[0]]
        if self.values is not None:
            self.values |= {name for name in set(texts(cells)) if name.lower() not in MISSING}
            if len(self.values) > self.limit:
                self.values = None

    @property
    def is_number(self) -> bool:
        return self.numeric >= MOSTLY * self.filled

    def column(self, name: str) -> Column:
        if self.is_number:
            return Column(name)
        if self.values is None:
            return Column(name, "category", buckets=BUCKETS)
        return Column(name, "category", tuple(sorted(self.values)))


class Watch:
    """A column that is the time, or may be: all its cells are dates and never go backwards."""

    def __init__(self) -> None:
        self.clock = Clock(MOST_GROUPS)
        self.read, self.bad, self.back = 0, 0, False
        self.cells: list[Any] = []
        self.groups = np.zeros(0, np.int64)

    def add(self, cells: list[Any], groups: np.ndarray) -> None:
        times, _, bad = moments(cells)
        self.read += int((~np.isnan(times)).sum())
        self.bad += len(bad)
        self.back = self.back or bool((self.clock.steps(times, groups) < 0).any())
        room = TIMED_ROWS - len(self.cells)
        self.cells += cells[:room]
        self.groups = np.append(self.groups, groups[:room])

    def steps(self, dated: bool, comma: bool) -> tuple[np.ndarray, float]:
        """Between the first rows, and the first of their times; seconds if they are dates."""
        times = moments(self.cells)[0] if dated else numbers(self.cells, comma)[0]
        steps = Clock(MOST_GROUPS).steps(times, self.groups)
        return steps[np.isfinite(steps)], float(times[np.isfinite(times)][:1].sum())

    def goes_on(self) -> bool:
        """Whether most rows have a later time than the one before; else the time stands in more than one column."""
        steps, _ = self.steps(True, False)
        return len(steps) > 0 and bool(np.median(steps) > 0)


def check_arguments(
    task: str,
    target: tuple[str, ...],
    features: Sequence[str] | None,
    group: str | None,
    time: str | None,
    horizon: int,
    delay: int,
    season: int | None,
) -> None:
    if task not in (AUTO, *get_args(Task)):
        raise UsageError(f"series: task is {shown(task)}, expected one of {', '.join(get_args(Task))}, {AUTO}")
    if not target or (task == "classify" and len(target) > 1):
        wanted = "exactly one" if task == "classify" else "at least one"
        raise UsageError(f"series: got {len(target)} targets to {task}, expected {wanted}; name it")
    if horizon < 1 or (task != "forecast" and horizon > 1):
        wanted = "at least 1" if task == "forecast" else f"1 to {task}, or the task forecast"
        raise UsageError(f"series: horizon is {horizon}, expected {wanted}")
    if delay < 0:
        raise UsageError(f"series: delay is {delay}, expected at least 0")
    if season is not None and season < 1:
        raise UsageError(f"series: season is {season}, expected at least 1 step, or None")
    for names, what in ((target, "target"), (features or (), "feature")):
        if twice := [name for name, count in Counter(names).items() if count > 1]:
            raise UsageError(f"series: {what} {shown(twice[0])} is named twice; name it once")
    for name in target:
        for others, what in ((features or (), "a feature"), ((group,), "the group"), ((time,), "the time")):
            if name in others:
                raise UsageError(
                    f"series: target {shown(name)} is also {what}, which would tell it; leave it out there"
                )
    if group is not None and group == time:
        raise UsageError(f"series: column {shown(group)} is both group and time; choose one")


def sources_of(path: Path, notes: list[str]) -> list[Source]:
    if not path.exists():
        raise UsageError(f"series: there is no {path}; give a file or a folder with data")
    if not path.is_dir():
        if not path.is_file():
            raise UsageError(f"series: {path} is no file that can be read twice; save the data to a file first")
        sources = [Source.open(path)]
    else:
        files = sorted(file for file in path.iterdir() if not file.name.startswith(".") and file.is_file())
        sources = []
        for file in (file for file in files if kind_of(file) is not None):
            try:
                sources.append(Source.open(file))
            except Empty:
                notes.append(f"{file.name} is empty and left out")
        if not sources:
            raise UsageError(
                f"series: the folder {path} holds no table; give one with files whose names end in {KNOWN}"
            )
    named = [source for source in sources if source.names is not None]
    for source in named[1:]:
        if differing := sorted({*(named[0].names or ())} ^ {*(source.names or ())}):
            raise UsageError(
                f"series: {source.path} has not the same columns as {named[0].path.name}, {shown(differing[0])} is in "
                "one of them only; give files with the same columns"
            )
    for source in named:
        numeric = [name for name in source.names or () if source.header and number(name) is not None]
        if source.kind == "text" and numeric:
            notes.append(
                f"the first row of {source.path.name} is read as names, though {shown(numeric[0])} is a number"
            )
        elif not source.header:
            notes.append(f"{source.path.name} has no names of columns, they are called c0, c1, …")
    return sources


def check_names(asked: Sequence[str], names: tuple[str, ...], path: Path) -> None:
    for name in asked:
        if name in names:
            continue
        folded = {other.casefold(): other for other in reversed(names)}
        nearest = difflib.get_close_matches(name.casefold(), folded, 1)
        hint = f", the nearest is {shown(folded[nearest[0]])}" if nearest else ""
        listed = ", ".join(map(shown, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise UsageError(f"series: {path} has no column {shown(name)}{hint}; choose from {listed}")


def task_of(target: tuple[str, ...], tallies: dict[str, Tally], alone: bool) -> str:
    """What to do with targets, if nobody says: classify what has names or few whole numbers.

    Args:
        target: names of the columns.
        tallies: what is in them.
        alone: there are no features, so that the past is all there is to predict a number from.
    """
    tally = tallies[target[0]]
    few = tally.values is not None and len(tally.values) <= FEW_NUMBERS and all(map(_whole, tally.values))
    if len(target) == 1 and (not tally.is_number or few):
        return "classify"
    return "forecast" if alone else "regress"


def _whole(name: str) -> bool:
    value = number(name)
    return value is not None and value == np.round(value)


def check_targets(task: str, target: tuple[str, ...], tallies: dict[str, Tally]) -> tuple[str, ...]:
    """The classes, in the order of their codes."""
    for name in target:
        tally = tallies[name]
        if not tally.filled:
            raise UsageError(f"series: every cell of target {shown(name)} is missing; choose another target")
        if task != "classify" and not tally.is_number:
            raise UsageError(
                f"series: target {shown(name)} must hold numbers to {task}, but there is {shown(tally.example)}; "
                "choose another target or the task classify"
            )
    if task != "classify":
        return ()
    values = tallies[target[0]].values
    if values is None:
        raise UsageError(
            f"series: target {shown(target[0])} has more than {MOST_CLASSES} classes; choose another target, or the "
            "task regress if it holds numbers"
        )
    if len(values) == 1:
        raise UsageError(
            f"series: target {shown(target[0])} has only one class, {shown(*values)}, expected at least two; choose "
            "another target"
        )
    read = {name: number(name) for name in values}
    if all(value is not None and np.isfinite(value) for value in read.values()):
        return tuple(sorted(values, key=lambda name: (read[name], name)))
    return tuple(sorted(values))


def find_time(
    time: str | None, watches: dict[str, Watch], tallies: dict[str, Tally], comma: bool, notes: list[str]
) -> tuple[str | None, bool, float | None]:
    """The column of the time, whether it holds dates, and the median interval in seconds, None if unknown."""
    if time is None:
        dates = [name for name, watch in watches.items() if watch.read]
        notes += [
            f"column {shown(name)} is read as a category and not used as the time, since its dates go backwards"
            for name in dates
            if watches[name].back
        ]
        usable = [name for name in dates if not watches[name].back and watches[name].goes_on()]
        if not usable:
            return None, False, None
        time = min(usable, key=lambda name: name.casefold() not in TIME_NAMES)
        notes.append(f"column {shown(time)} is used as the time")
    dated = watches[time].read > tallies[time].numeric
    if not dated and not tallies[time].numeric:
        what = f"such as {shown(tallies[time].example)}" if tallies[time].filled else "all missing"
        raise UsageError(
            f"series: column {shown(time)} holds no times ({what}), expected ISO 8601 such as 2024-05-31 12:00, or "
            "numbers; choose another column or rewrite them"
        )
    steps, start = watches[time].steps(dated, comma)
    steps = steps[steps > 0]
    if not len(steps) or not (dated or start > UNIX):
        return time, dated, None
    return time, dated, float(np.median(steps))


def season_of(interval: float) -> int | None:
    """Steps of `interval` seconds after which a pattern repeats, None if that cannot be told."""
    if interval < DAY:
        steps = round(DAY / interval) if DAY / interval <= 10_000 else 0
        return steps if steps >= 2 and abs(DAY / interval - steps) < 1e-6 * steps else None
    if interval == DAY:
        return 7
    return 12 if MONTH[0] <= interval <= MONTH[1] else None


def about(name: str, tally: Tally) -> list[str]:
    if not tally.filled:
        return [f"column {shown(name)} is missing everywhere"]
    if tally.values is not None and len(tally.values) == 1:
        return [f"column {shown(name)} is constant"]
    if tally.values is None and not tally.is_number:
        return [f"column {shown(name)} has more than {tally.limit} categories, which are hashed into {BUCKETS}"]
    return []
