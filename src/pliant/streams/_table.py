"""Tables on disk as rows of numbers, in the order of the files.

`scan` goes once over everything and looks at names and kinds only; `Table.blocks` then reads the
rows. Nothing in a block depends on the rows that follow it, but for the names of categories and
classes.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from pliant.core.columns import LARGEST, Column, Columns
from pliant.core.errors import UsageError
from pliant.streams._cells import CALENDAR, DAY, EPOCH, Clock, calendar, moments, numbers, shown, texts
from pliant.streams._files import Chunk, Source, Torn, stem
from pliant.streams._scan import (
    AUTO,
    MOST_CLASSES,
    MOST_COLUMNS,
    MOST_GROUPS,
    MOST_VALUES,
    Tally,
    Watch,
    about,
    check_arguments,
    check_names,
    check_targets,
    find_time,
    season_of,
    sources_of,
    task_of,
)

NOT_NUMBER = "cell that is no number (read as missing)"
NOT_FINITE = "value that is not finite (read as missing)"
UNKNOWN_CLASS = "unknown class (read as missing)"
UNREADABLE_TIME = "time that cannot be read (row kept)"
DUPLICATE_TIME = "duplicate time"


@dataclass(frozen=True)
class Block:
    """Up to 1024 consecutive rows.

    Attributes:
        features: `(n, F)` float64, NaN where missing, categories as codes.
        targets: `(n, G)` float64, index of the class or the number in this very row; NaN where missing.
        groups: `(n,)` int64, index into `Table.groups`, 0 if there are none.
        first: index of the first of the rows, counted over the rows that are kept.
        problems: how often what was met in these rows.
    """

    features: np.ndarray
    targets: np.ndarray
    groups: np.ndarray
    first: int
    problems: Counter[str]


@dataclass(frozen=True)
class Table:
    """What `scan` found, ready to be read.

    Attributes:
        columns: the schema; the calendar, if any, stands after the features of the files.
        groups: their names in order of first appearance; none if there is but one series.
        rows: how many were kept.
        notes: sentences for a person.
        group: column that says which group a row belongs to.
        time: column of the time.
        dated: whether the times are dates, not plain numbers.
    """

    columns: Columns
    groups: tuple[str, ...]
    rows: int
    notes: tuple[str, ...]
    group: str | None
    time: str | None
    dated: bool
    _sources: tuple[Source, ...]
    _stems: tuple[str, ...]

    def blocks(self, start: int = 0) -> Iterator[Block]:
        """The rows from number `start` on; which rows share a block does not depend on it.

        Raises:
            UsageError: time goes backwards, or a file breaks off or has changed since the scan. All rows
                before have been delivered.
        """
        if start < 0:
            raise UsageError(f"blocks: start is {start}, expected the number of a row, from 0")
        codes = {name: code for code, name in enumerate(self.groups)}
        clock, first = Clock(len(codes) or 1), 0
        for source, name in zip(self._sources, self._stems, strict=True):
            for chunk in source.chunks():
                skip, stop = min(max(start - first, 0), chunk.size), chunk.size
                begin, first = first + skip, first + chunk.size
                if skip == stop and self.time is None:
                    continue
                groups = self._groups(source, chunk, name, codes)
                wall, error, problems = np.zeros(0), None, Counter[str]()
                if self.time is not None:
                    times, wall, bad = self._times(source, chunk.cells(self.time))
                    steps = clock.steps(times, groups)
                    if len(back := np.flatnonzero(steps < 0)):
                        stop = int(back[0])
                        error = self._backwards(source, chunk.places[stop], times[stop], steps[stop])
                    problems[UNREADABLE_TIME] += sum(skip <= row < stop for row in bad)
                    problems[DUPLICATE_TIME] += int((steps[skip:stop] == 0).sum())
                problems.update(what for row, what in chunk.problems if skip <= row < stop)
                if skip < stop:
                    yield self._block(source, chunk, slice(skip, stop), groups, wall, begin, problems)
                if error:
                    raise error

    def _block(
        self,
        source: Source,
        chunk: Chunk,
        part: slice,
        groups: np.ndarray,
        wall: np.ndarray,
        first: int,
        problems: Counter[str],
    ) -> Block:
        size = part.stop - part.start
        features = np.empty((size, len(self.columns.features)))
        for place, column in enumerate(self.columns.features):
            if column.kind == "category":
                features[:, place] = _coded(chunk.cells(column.name)[part], column)
            elif column.name in CALENDAR and column.name not in chunk.names:
                features[:, place] = calendar(column.name, wall[part])
            else:
                features[:, place] = _finite(chunk.cells(column.name)[part], source.comma, problems)
        targets = np.empty((size, len(self.columns.targets)))
        for place, name in enumerate(self.columns.targets):
            if self.columns.task == "classify":
                targets[:, place] = self._classes(chunk.cells(name)[part], problems)
            else:
                targets[:, place] = _finite(chunk.cells(name)[part], source.comma, problems)
        return Block(features, targets, groups[part], first, +problems)

    def _classes(self, cells: list[Any], problems: Counter[str]) -> list[float]:
        names = texts(cells)
        known = {}
        for name, count in Counter(names).items():
            try:
                known[name] = self.columns.target(name)
            except ValueError:
                known[name] = np.nan
                problems[UNKNOWN_CLASS] += count
        return [known[name] for name in names]

    def _groups(self, source: Source, chunk: Chunk, stem: str, codes: dict[str, int]) -> np.ndarray:
        if not self.groups:
            return np.zeros(chunk.size, np.int64)
        try:
            return np.array([codes[name] for name in _group_names(chunk, stem, self.group)], np.int64)
        except KeyError as error:
            raise UsageError(
                f"series: {source.path} has changed since it was scanned, there is a new group {shown(error.args[0])}; "
                "start anew"
            ) from None

    def _times(self, source: Source, cells: list[Any]) -> tuple[np.ndarray, np.ndarray, list[int]]:
        if self.dated:
            return moments(cells)
        values, bad = numbers(cells, source.comma)
        values[np.isinf(values)] = np.nan
        return values, values, bad

    def _backwards(self, source: Source, place: int, time: float, step: float) -> UsageError:
        now, before = (
            str(EPOCH + timedelta(seconds=value)) if self.dated else f"{value:.16g}"
            for value in (float(time), float(time - step))
        )
        row = "row" if source.kind == "parquet" else "line"
        within = "" if not self.groups else " within its group"
        return UsageError(
            f"series: in {row} {place} of {source.path} the time goes back{within} from {before} to {now}, expected "
            f"rows in order of time; sort the file by {shown(self.time)}"
        )


def _coded(cells: list[Any], column: Column) -> list[float]:
    names = texts(cells)
    codes = {name: column.code(name) for name in set(names)}
    return [codes[name] for name in names]


def _finite(cells: list[Any], comma: bool, problems: Counter[str]) -> np.ndarray:
    values, bad = numbers(cells, comma)
    endless = np.abs(values) > LARGEST
    values[endless] = np.nan
    problems[NOT_NUMBER] += len(bad)
    problems[NOT_FINITE] += int(endless.sum())
    return values


def _group_names(chunk: Chunk, stem: str, group: str | None) -> list[str]:
    if group is None:
        return [stem] * chunk.size
    names = texts(chunk.cells(group))
    return [f"{stem}/{name}" for name in names] if stem else names


def scan(
    data: str | Path,
    *,
    task: str,
    target: Sequence[str],
    features: Sequence[str] | None = None,
    group: str | None = None,
    time: str | None = None,
    horizon: int = 1,
    delay: int = 0,
    season: int | None = None,
    label_as_input: bool = True,
    concat: bool = False,
) -> Table:
    """Look over a file, or a folder of files, and fix what its columns mean.

    A column holds numbers if at least 95 % of its cells do that are not missing, else categories.

    Args:
        data: .csv, .tsv, .txt, .data, .jsonl, .ndjson (all also with .gz), .parquet, or a folder of those,
            which are then read in the order of their names.
        task: `"classify"`, `"regress"` or `"forecast"`; `"auto"` chooses by what the target holds.
        target: columns to predict, one to classify.
        features: columns to predict from; None is all but target, group and time.
        group: column whose values tell apart series that stand in one file.
        time: column of ISO 8601 dates, unix seconds or other numbers that never go backwards within a
            group; None takes a column that plainly is one. Dates are made into a calendar of features.
        horizon: steps ahead, in rows; 1 unless the task is to forecast.
        delay: further steps until a label is known.
        season: steps after which a pattern repeats; None takes it from the interval of the dates.
        label_as_input: whether learners may read the newest known label.
        concat: whether the files of a folder are one series; otherwise each is a group.

    Raises:
        UsageError: an argument is out of range, the data cannot be read, or cannot serve the task.
    """
    target = (target,) if isinstance(target, str) else tuple(target)
    check_arguments(task, target, features, group, time, horizon, delay, season)
    path, notes = Path(data), list[str]()
    sources = sources_of(path, notes)
    stems = [""] * len(sources)
    if path.is_dir() and not concat:
        twice = Counter(stem(source.path) for source in sources)
        stems = [source.path.name if twice[stem(source.path)] > 1 else stem(source.path) for source in sources]
    asked = [*target, *(features or ()), *(name for name in (group, time) if name is not None)]
    for source in sources:
        if source.names is not None:
            check_names(asked, source.names, source.path)

    never_time = {*target, *(features or ()), group}
    tallies: dict[str, Tally] = {}
    watches: dict[str, Watch] = {}
    codes: dict[str, int] = {}
    rows = 0
    try:
        for source, name in zip(sources, stems, strict=True):
            for chunk in source.chunks():
                groups = np.zeros(chunk.size, np.int64)
                if name or group is not None:
                    names = _group_names(chunk, name, group)
                    groups = np.array([codes.setdefault(name, len(codes)) for name in names], np.int64)
                    if len(codes) > MOST_GROUPS:
                        where = "" if group is None else f" in column {shown(group)}"
                        raise UsageError(f"series: {path} has more than {MOST_GROUPS} groups{where}; choose fewer")
                for column in chunk.names:
                    if column not in tallies:
                        tallies[column] = Tally(MOST_CLASSES if column in target else MOST_VALUES)
                        # A column that comes later, as in JSON, is the time only if somebody says so.
                        if column == time or (time is None and not rows and column not in never_time):
                            watches[column] = Watch()
                    cells, tally = chunk.cells(column), tallies[column]
                    tally.add(cells, source.comma)
                    if column in watches:
                        watches[column].add(cells, groups)
                        if time is None and (watches[column].bad or tally.numeric):
                            del watches[column]
                if len(tallies) > MOST_COLUMNS:
                    raise UsageError(f"series: {path} has more than {MOST_COLUMNS} columns; give data with fewer")
                rows += chunk.size
    except Torn as error:
        if not rows:
            raise
        notes.append(str(error).removeprefix("series: "))
    if not rows:
        raise UsageError(
            f"series: {path} has names of columns but no rows with as many cells as there are names; give data that has"
        )
    check_names(asked, tuple(tallies), path)
    if task == AUTO:
        alone = features is None and not tallies.keys() - {*target, group, time, *watches}
        task = task_of(target, tallies, alone)
        notes.append(f"the task is to {task} {', '.join(map(shown, target))}; --task chooses another")
    classes = check_targets(task, target, tallies)
    comma = any(source.comma for source in sources)
    time, dated, interval = find_time(time, watches, tallies, comma, notes)
    if features is None:
        features = [name for name in tallies if name not in {*target, group, time}]
    inputs = [tallies[name].column(name) for name in features]
    for name in (*features, *target):
        notes += about(name, tallies[name])
    if dated and interval is not None:
        fits = {"day": interval < DAY, "week": interval <= DAY, "year": interval >= DAY}
        inputs += [Column(name) for name in CALENDAR if fits[name.split()[1]] and name not in tallies]
    if season is None and interval is not None:
        season = season_of(interval)
    columns = Columns(task, tuple(inputs), target, classes, horizon + delay, season, label_as_input)  # type: ignore[arg-type]
    return Table(columns, tuple(codes), rows, tuple(notes), group, time, dated, tuple(sources), tuple(stems))
