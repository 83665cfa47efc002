"""What the scan of a table keeps and decides: names, kinds, classes and the time."""

import difflib
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np

from pliant.core.columns import MISSING, UNITS, Column, Task, bare
from pliant.core.errors import UsageError
from pliant.streams._cells import DAY, DRESSED, Clock, moments, number, numbers, shown, signs_of, texts
from pliant.streams._files import KNOWN, Chunk, Empty, Source, kind_of

AUTO = "auto"
FEW_NUMBERS = 20  # whole numbers in a target that are taken for classes
BUCKETS = 4096
MOST_VALUES = 256  # categories of a column that are listed
MOST_CLASSES = 1000
MOST_GROUPS = 4096
MOST_COLUMNS = 10_000
MOST_OPEN = 128  # files that are merged, and so are open at the same time
MOSTLY = 0.95  # of the cells are numbers in a column of numbers
TIMED_ROWS = 1000  # from which the sampling interval comes
UNIX = 1e8  # numbers beyond are seconds since 1970; smaller ones count something else
FINER = {1e17: 1e9, 1e14: 1e6, 1e11: 1e3}  # numbers beyond are nano-, micro- or milliseconds, so many to a second
LEAST_FALLS = 2  # of the time, from which rows are said to stand newest first
MONTH = (28 * DAY, 31 * DAY)
GAPS = frozenset({"", "?", "NA", "N/A", "NULL"})
"""Of what stands for a missing value, that which is never the name of a class; nor is nan, however it is written."""
TIME_NAMES = ("datetime", "timestamp", "date", "time", "ds", "date_time", "date time")


class Tally:
    """What the scan keeps of one column.

    Attributes:
        filled: cells that are not missing.
        numeric: those of them that are numbers.
        dressed: those that are numbers without the sign of a unit and one between thousands, by these signs.
        alike: those that look like numbers, whether they can be read or not.
        commas: cells with a comma as the decimal sign, and how many of them have three digits behind it; not all are
            counted.
        values: distinct ones, None once there are more than `limit`.
        missing: cells that are.
        words: distinct ones of them that could be names of classes, such as none.
        gaps: other distinct ones that are not empty, such as NA.
        example: a cell that is no number.
    """

    def __init__(self, limit: int):
        self.limit, self.filled, self.missing, self.numeric = limit, 0, 0, 0
        self.dressed: Counter[tuple[str, str]] = Counter()
        self.alike, self.commas = 0, [0, 0]
        self.values: set[str] | None = set()
        self.words: set[str] = set()
        self.gaps: set[str] = set()
        self.example: Any = None

    def add(self, cells: list[Any], comma: bool) -> None:
        values, bad = numbers(cells, comma)
        numeric = int((~np.isnan(values)).sum())
        self.numeric += numeric
        self.filled += numeric + len(bad)
        self.missing += len(cells) - numeric - len(bad)
        if bad and self.example is None:
            self.example = cells[bad[0]]
        self._look([cells[place] for place in bad], cells if comma else [], comma)
        if self.values is not None:
            names = set(texts(cells))
            gaps = {name for name in names if name.lower() in MISSING}
            self.values |= names - gaps
            words = {name for name in gaps - GAPS if name.lower() != "nan"}
            self.words, self.gaps = self.words | words, self.gaps | (gaps - words - {""})
            if len(self.values) > self.limit:
                self.values = None

    def _look(self, bad: list[Any], cells: list[Any], comma: bool) -> None:
        """Take note of how numbers are written in cells that are none, and in all those with decimal commas."""
        for cell, count in Counter(bad).items():
            if not isinstance(cell, str) or not DRESSED.fullmatch(cell.strip()):
                continue
            if any(sign in cell for sign in f",{UNITS}"):
                self.alike += count
            if (signs := signs_of(cell, comma)) is not None:
                self.dressed[signs] += count
        if self.commas[0] == self.commas[1]:  # else some comma is a decimal sign for sure
            decimal = {cell for cell in cells if isinstance(cell, str) and "," in cell}
            self.commas[0] += len(decimal)
            self.commas[1] += sum(bare(cell, ",") != cell.strip() for cell in decimal)

    def _written(self) -> tuple[str, int]:
        """Signs to be left out of the cells, and how many are numbers then; all have the same unit."""
        units = Counter({"": self.numeric})
        for (unit, _), count in self.dressed.items():
            units[unit] += count
        unit, count = units.most_common(1)[0]
        groupings = {grouping for of, grouping in self.dressed if of == unit and grouping}
        if len(groupings) > 1:  # 1.234,56 and 1,234.56
            return unit, count - sum(self.dressed[unit, grouping] for grouping in groupings)
        return unit + "".join(groupings), count

    @property
    def is_number(self) -> bool:
        return self._written()[1] >= MOSTLY * self.filled

    @property
    def signs(self) -> str:
        """Of units and between thousands, in a column of numbers."""
        return self._written()[0] if self.is_number else ""

    @property
    def unclear(self) -> bool:
        """Whether the cells look like numbers, but are not all written alike or in a way that can be read."""
        return not self.is_number and self.numeric + self.alike >= MOSTLY * self.filled

    def column(self, name: str) -> Column:
        if self.is_number:
            return Column(name)
        if self.values is None:
            return Column(name, "category", buckets=BUCKETS)
        return Column(name, "category", tuple(sorted(self.values)))


class Watch:
    """A column that is the time, or may be: all its cells are dates and never go backwards.

    Attributes:
        read: cells that are dates.
        bad: cells that are neither a date nor missing.
        rises, falls: how often time goes on, or backwards, within a group.
        restarts: whether time goes backwards within a file, be it from one group to another.
    """

    def __init__(self) -> None:
        self.clock, self.within, self.file = Clock(MOST_GROUPS), Clock(1), 0
        self.read, self.bad, self.rises, self.falls, self.restarts = 0, 0, 0, 0, False
        self.cells: list[Any] = []
        self.groups = np.zeros(0, np.int64)

    def add(self, cells: list[Any], groups: np.ndarray, file: int, comma: bool) -> None:
        """Cells of the file of that number, and the groups they belong to."""
        times, _, bad = moments(cells)
        self.read += int((~np.isnan(times)).sum())
        self.bad += len(bad)
        plain = numbers(cells, comma)[0] if len(bad) == len(cells) else times
        steps = self.clock.steps(plain, groups)
        self.rises += int(((steps > 0) & np.isfinite(steps)).sum())
        self.falls += int((steps < 0).sum())
        if file != self.file:
            self.within, self.file = Clock(1), file
        if not self.restarts:
            self.restarts = bool((self.within.steps(plain, np.zeros_like(groups)) < 0).any())
        room = TIMED_ROWS - len(self.cells)
        self.cells += cells[:room]
        self.groups = np.append(self.groups, groups[:room])

    @property
    def newest_first(self) -> bool:
        """Whether time goes backwards nearly always, so that the future would tell the past."""
        return self.falls >= LEAST_FALLS and self.falls >= MOSTLY * (self.falls + self.rises)

    def steps(self, dated: bool, comma: bool) -> tuple[np.ndarray, float]:
        """Between the first rows, and the first of their times; seconds if they are dates."""
        times = moments(self.cells)[0] if dated else numbers(self.cells, comma)[0]
        steps = Clock(MOST_GROUPS).steps(times, self.groups)
        return steps[np.isfinite(steps)], float(times[np.isfinite(times)][:1].sum())

    def goes_on(self) -> bool:
        """Whether most rows have a later time than the one before; else the time stands in more than one column."""
        steps, _ = self.steps(True, False)
        return len(steps) > 0 and bool(np.median(steps) > 0)


class Survey:
    """What the scan keeps of all files, which it reads one after another.

    Args:
        path: of the file or folder, for messages.
        target, group, time: names of columns; a time of None is any column that may be one.
        chosen: columns that are not the time.

    Attributes:
        tallies: what is in each column, in order of first appearance.
        watches: columns that are the time, or may be.
        codes: of the groups, by their names, in order of first appearance.
        sizes: rows of each group; of all, if there are no groups.
        changes: how often a row is of another group than the row before.
        seen: names of the columns in each file that has rows.
    """

    def __init__(
        self, path: Path, target: tuple[str, ...], group: str | None, time: str | None, chosen: Sequence[str]
    ) -> None:
        self.path, self.target, self.group, self.time, self.chosen = path, target, group, time, chosen
        self.tallies: dict[str, Tally] = {}
        self.watches: dict[str, Watch] = {}
        self.codes: dict[str, int] = {}
        self.sizes: Counter[int] = Counter()
        self.seen: dict[int, set[str]] = {}
        self.changes, self._last = 0, -1

    @property
    def rows(self) -> int:
        return self.sizes.total()

    def add(self, chunk: Chunk, file: int, stem: str, comma: bool) -> None:
        """Rows of the file of that number; `stem` is the group that the file is, empty if it is none.

        Raises:
            UsageError: there are too many groups or columns.
        """
        if not chunk.size:
            return
        groups = self._grouped(chunk, stem)
        for name in chunk.names:
            if name not in self.tallies:
                self.tallies[name] = Tally(MOST_CLASSES if name in self.target else MOST_VALUES)
                # A column that comes later, as in JSON, is the time only if somebody says so.
                if name == self.time or (self.time is None and not self.rows and name not in self.chosen):
                    self.watches[name] = Watch()
            cells, tally = chunk.cells(name), self.tallies[name]
            tally.add(cells, comma)
            if name in self.watches:
                self.watches[name].add(cells, groups, file, comma)
                if self.time is None and (self.watches[name].bad or tally.numeric):
                    del self.watches[name]
        if len(self.tallies) > MOST_COLUMNS:
            raise UsageError(f"series: {self.path} has more than {MOST_COLUMNS} columns; give data with fewer")
        self.sizes.update(groups.tolist())
        self.seen.setdefault(file, set()).update(chunk.names)

    def _grouped(self, chunk: Chunk, stem: str) -> np.ndarray:
        if not stem and self.group is None:
            return np.zeros(chunk.size, np.int64)
        names = group_names(chunk, stem, self.group)
        groups = np.array([self.codes.setdefault(name, len(self.codes)) for name in names], np.int64)
        if len(self.codes) > MOST_GROUPS:
            where = "" if self.group is None else f" in column {shown(self.group)}"
            raise UsageError(f"series: {self.path} has more than {MOST_GROUPS} groups{where}; choose fewer")
        self.changes += int((np.diff(groups, prepend=self._last) != 0).sum())
        self._last = int(groups[-1])
        return groups


def group_names(chunk: Chunk, stem: str, group: str | None) -> list[str]:
    """The group of each row: its file, what stands in column `group`, or both."""
    if group is None:
        return [stem] * chunk.size
    names = texts(chunk.cells(group))
    return [f"{stem}/{name}" for name in names] if stem else names


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
    for source in (source for source in sources if source.names is not None):
        numeric = [name for name in source.names or () if source.header and number(name) is not None]
        if source.kind == "text" and numeric:
            notes.append(
                f"the first row of {source.path.name} is read as names, though {shown(numeric[0])} is a number"
            )
        elif not source.header:
            notes.append(f"{source.path.name} has no names of columns, they are called c0, c1, …")
    return sources


def check_names(asked: Sequence[str], names: tuple[str, ...], path: Path, where: str = "") -> None:
    """Refuse names of columns that there are not; `where` tells of those that there are."""
    for name in asked:
        if name in names:
            continue
        folded = {other.casefold(): other for other in reversed(names)}
        nearest = difflib.get_close_matches(name.casefold(), folded, 1)
        hint = f", the nearest is {shown(folded[nearest[0]])}" if nearest else ""
        listed = ", ".join(map(shown, names[:20])) + (f" and {len(names) - 20} more" if len(names) > 20 else "")
        raise UsageError(f"series: {path} has no column {shown(name)}{hint}; choose from {listed}{where}")


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
    value = 0.0 if name in ("True", "False") else number(name)
    return value is not None and bool(value == np.round(value))


def check_targets(
    task: str, target: tuple[str, ...], tallies: dict[str, Tally], notes: list[str]
) -> tuple[str, ...]:  # fmt: skip
    """The classes, in the order of their codes.

    Among words, none is a class like any other; among numbers it is a missing label.
    """
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
    if not all(map(_finite, values)):
        values = values | tallies[target[0]].words
    if len(values) == 1:
        gaps = tallies[target[0]].gaps
        missing = f"; {shown(min(gaps))} stands for a missing label, so give such a class another name" if gaps else ""
        raise UsageError(
            f"series: target {shown(target[0])} has only one class, {shown(*values)}, expected at least two; choose "
            f"another target{missing}"
        )
    notes += [
        f"{shown(word)} is read as a class of target {shown(target[0])}; leave cells empty whose label is missing"
        for word in sorted(values & tallies[target[0]].words)
    ]
    if all(map(_finite, values)):
        return tuple(sorted(values, key=lambda name: (number(name), name)))
    return tuple(sorted(values))


def _finite(name: str) -> bool:
    value = number(name)
    return value is not None and bool(np.isfinite(value))


def _check_order(path: Path, watches: dict[str, Watch]) -> None:
    """Refuse rows that stand newest first by one of these columns, unless another one goes on."""
    falling = [name for name, watch in watches.items() if watch.newest_first]
    if falling and not any(watch.rises > watch.falls for watch in watches.values()):
        raise UsageError(
            f"series: the rows of {path} stand newest first by column {shown(falling[0])}, so that the future would "
            "be used to tell the past; sort them oldest first (if that column is no time, name the columns to "
            "predict from with --features, this one among them)"
        )


def find_time(
    path: Path, time: str | None, watches: dict[str, Watch], tallies: dict[str, Tally], comma: bool, notes: list[str]
) -> tuple[str | None, bool, float | None]:
    """The column of the time, whether it holds dates, and the median interval in seconds, None if unknown."""
    if time is None:
        dates = [name for name, watch in watches.items() if watch.read]
        _check_order(path, {name: watches[name] for name in dates})
        notes += [
            f"column {shown(name)} is read as a category and not used as the time, since its dates go backwards"
            for name in dates
            if watches[name].falls
        ]
        usable = [name for name in dates if not watches[name].falls and watches[name].goes_on()]
        if not usable:
            return None, False, None
        time = min(usable, key=lambda name: name.casefold() not in TIME_NAMES)
        notes.append(f"column {shown(time)} is used as the time")
    _check_order(path, {time: watches[time]})
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
    unit = 1.0 if dated else next((unit for least, unit in FINER.items() if start > least), 1.0)
    return time, dated, float(np.median(steps)) / unit


def season_of(interval: float) -> int | None:
    """Steps of `interval` seconds after which a pattern repeats, None if that cannot be told."""
    if interval < DAY:
        steps = round(DAY / interval) if DAY / interval <= 10_000 else 0
        return steps if steps >= 2 and abs(DAY / interval - steps) < 1e-6 * steps else None
    if interval == DAY:
        return 7
    return 12 if MONTH[0] <= interval <= MONTH[1] else None


def find_order(path: Path, survey: Survey, time: str | None, files: int, notes: list[str]) -> bool:
    """Whether files are merged by time, which needs a time in each; notes tell where order decides who learns what.

    Args:
        path: of the file or folder.
        survey: of all files.
        time: column of the time.
        files: how many there are whose groups are their own.
        notes: for a person, more are added.
    """
    timed = time is not None and all(time in names for names in survey.seen.values())
    merged = timed and 1 < files <= MOST_OPEN
    first = "so the model learns all of the first before it answers the second"
    if merged:
        notes.append(f"the rows of all files in {path.name} are read in order of {shown(time)}")
    elif files > 1:
        why, cure = "no column is the time in each of them", "a column of times in each makes them run at once"
        if timed:
            why = f"there are more than {MOST_OPEN}"
            cure = f"one file sorted by {shown(time)}, with --group, makes them run at once"
        notes.append(f"the files in {path.name} are read one after another, since {why}, {first}; {cure}")
    follow = survey.changes == len(survey.codes) > files
    if time is not None and follow and survey.watches[time].restarts:
        notes.append(
            f"the groups in column {shown(survey.group)} come one after another, {first}; rows sorted by "
            f"{shown(time)} make them run at once"
        )
    return merged


def differing(sources: Sequence[Source], seen: dict[int, set[str]]) -> list[str]:
    """A note on the columns that some files have and others lack; none if all have the same."""
    every = set().union(*seen.values())
    lacking = {file: every - names for file, names in seen.items() if names != every}
    if not lacking:
        return []
    file, names = next(iter(lacking.items()))
    others = len(set().union(*lacking.values())) - 1
    more = f", and {others} more column{'s' * (others > 1)} in this or other files" if others else ""
    return [
        f"there is no column {shown(min(names))} in {sources[file].path.name}{more}; what a file lacks is missing there"
    ]


def about(name: str, tally: Tally, classes: bool) -> list[str]:
    """A note on a column, if there is something to say; of classes it is known that there are several."""
    if not tally.filled:
        return [f"column {shown(name)} is missing everywhere"]
    if tally.unclear:
        return [
            f"column {shown(name)} is read as words, though cells such as {shown(tally.example)} look like numbers; "
            "write all of them as 1234.5 to have them read so"
        ]
    if tally.is_number and tally.commas[0] and tally.commas[0] == tally.commas[1] and "," not in tally.signs:
        return [f"the commas of column {shown(name)} are read as decimal signs; leave them out if they part thousands"]
    if tally.signs:
        return [f"the cells of column {shown(name)}, such as {shown(tally.example)}, are read as numbers"]
    if tally.values is not None and len(tally.values) == 1 and not classes:
        if not tally.missing:
            return [f"column {shown(name)} is constant"]
        gap = next((shown(word) for word in sorted(tally.words | tally.gaps)), "nothing")
        held = f"holds {shown(*tally.values)} or is missing"
        return [f"column {shown(name)} {held}; {gap} stands for a missing value there"]
    if tally.values is None and not tally.is_number:
        return [f"column {shown(name)} has more than {tally.limit} categories, which are hashed into {BUCKETS}"]
    return []
