"""Tables on disk as rows of numbers, file by file or merged by time.

`scan` goes once over everything and looks at names and kinds only; `Table.blocks` then reads the
rows. Nothing in a block depends on the rows that follow it, but for the names of categories and
classes.
"""

import heapq
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from pliant.core.columns import LARGEST, Column, Columns
from pliant.core.errors import UsageError
from pliant.streams import _files
from pliant.streams._cells import CALENDAR, DAY, EPOCH, Clock, calendar, moments, numbers, shown, texts
from pliant.streams._files import Chunk, Source, Torn, stem
from pliant.streams._scan import (
    AUTO,
    Survey,
    about,
    check_arguments,
    check_names,
    check_targets,
    differing,
    find_order,
    find_time,
    group_names,
    season_of,
    sources_of,
    task_of,
)

NOT_NUMBER = "cell that is no number (read as missing)"
NOT_FINITE = "value that is not finite (read as missing)"
UNKNOWN_CLASS = "unknown class (read as missing)"
MISSING_LABEL = "missing label (not scored)"
UNREADABLE_TIME = "time that cannot be read (row kept)"
DUPLICATE_TIME = "duplicate time"

HELD = 4
"""Times `ROWS`, the rows that are held at most while files are merged."""


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
        groups: their names in order of first appearance, file by file; none if there is but one series.
        rows: how many were kept.
        longest: how many of them the largest group has.
        notes: sentences for a person.
        group: column that says which group a row belongs to.
        time: column of the time.
        dated: whether the times are dates, not plain numbers.
        merged: whether the rows of all files are read in order of time, not file by file.
    """

    columns: Columns
    groups: tuple[str, ...]
    rows: int
    longest: int
    notes: tuple[str, ...]
    group: str | None
    time: str | None
    dated: bool
    merged: bool
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
        rows, first, error = self._rows(), 0, None
        while True:
            taken: list[tuple[_Part, int]] = []
            try:
                for row in islice(rows, _files.ROWS):
                    taken.append(row)  # noqa: PERF402  (what comes before an error is kept)
            except UsageError as caught:
                error = caught
            if (skip := max(start - first, 0)) < len(taken):
                yield self._block(taken[skip:], first + skip)
            if error:
                raise error
            if len(taken) < _files.ROWS:
                return
            first += len(taken)

    def _rows(self) -> Iterator[tuple["_Part", int]]:
        """Each row as the part of a file that it stands in and its place there."""
        clock, files = Clock(len(self.groups) or 1), range(len(self._sources))
        if not self.merged:
            for file in files:
                for part in self._parts(file, clock):
                    yield from ((part, row) for row in range(len(part.groups)))
            return
        # All files are open at the same time, so each gives few rows at once.
        most = max(1, _files.ROWS // -(-len(files) // HELD))

        def timed(file: int) -> Iterator[tuple[float, int, _Part, int]]:
            for part in self._parts(file, clock, most):
                yield from ((time, file, part, row) for row, time in enumerate(part.reached.tolist()))

        # The merge compares one row of each file, so that it is decided by time and file alone.
        yield from ((part, row) for _, _, part, row in heapq.merge(*map(timed, files)))

    def _parts(self, file: int, clock: Clock, most: int | None = None) -> Iterator["_Part"]:
        """The rows of one file, up to where the time goes backwards."""
        source, now = self._sources[file], -np.inf
        for chunk in source.chunks(most):
            groups, stop, error = self._grouped(source, chunk, self._stems[file]), chunk.size, None
            reached, wall, problems = np.zeros(0), np.zeros(0), list(chunk.problems)
            if self.time is not None:
                times, wall, bad = self._times(source, chunk.cells(self.time))
                steps = clock.steps(times, groups)
                if len(back := np.flatnonzero(steps < 0)):
                    stop = int(back[0])
                    error = self._backwards(source, chunk.places[stop], times[stop], steps[stop])
                problems += [(row, UNREADABLE_TIME) for row in bad]
                problems += [(row, DUPLICATE_TIME) for row in np.flatnonzero(steps == 0).tolist()]
                reached = np.fmax.accumulate(np.append(now, times))[1:]
                now = reached[-1] if len(reached) else now
            if stop:
                yield _Part(self.columns, source, chunk, groups[:stop], wall[:stop], reached[:stop], problems)
            if error:
                raise error

    def _block(self, taken: list[tuple["_Part", int]], first: int) -> Block:
        places: dict[_Part, list[int]] = {}
        begins: dict[_Part, int] = {}
        for place, (part, row) in enumerate(taken):
            begins.setdefault(part, row)
            places.setdefault(part, []).append(place)
        size = len(taken)
        features, targets = (np.empty((size, len(names))) for names in (self.columns.features, self.columns.targets))
        groups, problems = np.empty(size, np.int64), Counter[str]()
        for part, begin in begins.items():  # the rows of a part are taken in their order
            rows = slice(begin, begin + len(places[part]))
            of_part, labels, met = part.cells
            features[places[part]], targets[places[part]] = of_part[rows], labels[rows]
            groups[places[part]] = part.groups[rows]
            problems.update(what for row, what in met if rows.start <= row < rows.stop)
        return Block(features, targets, groups, first, problems)

    def _grouped(self, source: Source, chunk: Chunk, stem: str) -> np.ndarray:
        if not self.groups:
            return np.zeros(chunk.size, np.int64)
        try:
            return np.array([self._codes[name] for name in group_names(chunk, stem, self.group)], np.int64)
        except KeyError as error:
            raise UsageError(
                f"series: {source.path} has changed since it was scanned, there is a new group {shown(error.args[0])}; "
                "start anew"
            ) from None

    @cached_property
    def _codes(self) -> dict[str, int]:
        return {name: code for code, name in enumerate(self.groups)}

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


@dataclass(eq=False)
class _Part:
    """Consecutive rows of one file, n of them; their cells are read once one of them is wanted.

    Attributes:
        columns: the schema.
        source, chunk: where the rows come from; the chunk may hold more of them.
        groups: `(n,)` int64.
        wall: `(n,)` float64, see `moments`.
        reached: `(n,)` float64, the latest time in the file up to each row, -inf if there is none.
        problems: (row, what was met there) before the cells are read; rows from n on do not count.
    """

    columns: Columns
    source: Source
    chunk: Chunk
    groups: np.ndarray
    wall: np.ndarray
    reached: np.ndarray
    problems: list[tuple[int, str]]

    @cached_property
    def cells(self) -> tuple[np.ndarray, np.ndarray, list[tuple[int, str]]]:
        """Features `(n, F)` and targets `(n, G)` as in a `Block`, and all problems."""
        size, met = len(self.groups), list(self.problems)
        features = np.empty((size, len(self.columns.features)))
        for place, column in enumerate(self.columns.features):
            if column.kind == "category":
                features[:, place] = _coded(self.chunk.cells(column.name)[:size], column)
            elif column.name in CALENDAR and column.name not in self.chunk.names:
                features[:, place] = calendar(column.name, self.wall)
            else:
                features[:, place] = self._numbers(column.name, met)
        targets = np.empty((size, len(self.columns.targets)))
        for place, name in enumerate(self.columns.targets):
            cells, before = self.chunk.cells(name)[:size], len(met)
            if self.columns.task == "classify":
                targets[:, place] = _classes(cells, self.columns, met)
            else:
                targets[:, place] = self._numbers(name, met)
            unread = {row for row, _ in met[before:]}
            gaps = np.flatnonzero(np.isnan(targets[:, place])).tolist()
            met += [(row, MISSING_LABEL) for row in gaps if row not in unread]
        return features, targets, met

    def _numbers(self, name: str, met: list[tuple[int, str]]) -> np.ndarray:
        cells, bare = self.chunk.cells(name)[: len(self.groups)], self.columns.bare
        if any(name == of for of, _ in self.columns.signs):
            cells = [bare(name, cell) for cell in cells]
        return _read(cells, self.source.comma, met)


def _coded(cells: list[Any], column: Column) -> list[float]:
    names = texts(cells)
    codes = {name: column.code(name) for name in set(names)}
    return [codes[name] for name in names]


def _classes(cells: list[Any], columns: Columns, met: list[tuple[int, str]]) -> list[float]:
    names, known = texts(cells), dict[str, float]()
    for name in set(names):
        try:
            known[name] = columns.target(name)
        except ValueError:
            met += [(row, UNKNOWN_CLASS) for row, other in enumerate(names) if other == name]
    return [known.get(name, np.nan) for name in names]


def _read(cells: list[Any], comma: bool, met: list[tuple[int, str]]) -> np.ndarray:
    values, bad = numbers(cells, comma)
    endless = np.abs(values) > LARGEST
    values[endless] = np.nan
    met += [(row, NOT_NUMBER) for row in bad]
    met += [(row, NOT_FINITE) for row in np.flatnonzero(endless).tolist()]
    return values


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

    A column holds numbers if at least 95 % of its cells do that are not missing, else categories. Numbers
    may have the sign of a unit, the same in all of them, and grouped thousands: $1,003.

    Args:
        data: .csv, .tsv, .txt, .data, .jsonl, .ndjson (all also with .gz), .parquet, or a folder of those,
            which are read in order of time if that is known, else one after another in order of their names.
            A file may lack columns other than target, group and time.
        task: `"classify"`, `"regress"` or `"forecast"`; `"auto"` chooses by what the target holds.
        target: columns to predict, one to classify.
        features: columns to predict from; None is all but target, group and time.
        group: column whose values tell apart series that stand in one file.
        time: column of ISO 8601 dates, unix time in seconds or finer, or other numbers that never go backwards within a
            group; None takes a column that plainly is one. Dates are made into a calendar of features.
        horizon: steps ahead, in rows; 1 unless the task is to forecast.
        delay: further steps until a label is known.
        season: steps after which a pattern repeats; None takes it from the interval of the dates.
        label_as_input: whether learners may read the newest known label.
        concat: whether the files of a folder are one series, one after another; otherwise each is a group.

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
    # Other columns may be missing in some of the files.
    everywhere = [*target, *(name for name in (group, time) if name is not None)]
    asked = [*everywhere, *(features or ())]
    for source in sources:
        if source.names is not None:
            where = (
                "" if source.kind != "text" else ", its first row" if source.header else ", since no row holds names"
            )
            check_names(asked if len(sources) == 1 else everywhere, source.names, source.path, where)

    survey = Survey(path, target, group, time, (*target, *(features or ()), *filter(None, [group])))
    torn: list[Torn] = []
    for file, source in enumerate(sources):
        try:
            for chunk in source.chunks():
                survey.add(chunk, file, stems[file], source.comma)
        except Torn as error:
            torn.append(error)
    if torn and not survey.rows:
        raise torn[0]
    notes += [str(error).removeprefix("series: ") for error in torn]
    if not survey.rows:
        raise UsageError(
            f"series: no line of {path} is a JSON object; write each row as one, on a line of its own"
            if all(source.kind == "json" for source in sources)
            else f"series: {path} has names of columns but no rows with as many cells as there are names; give data "
            "that has"
        )
    tallies = survey.tallies
    check_names(asked, tuple(tallies), path)
    for file, names in survey.seen.items():
        check_names(everywhere, tuple(names), sources[file].path)
    notes += differing(sources, survey.seen)
    if task == AUTO:
        alone = features is None and not tallies.keys() - {*target, group, time, *survey.watches}
        task = task_of(target, tallies, alone)
        notes.append(f"the task is to {task} {', '.join(map(shown, target))}; --task chooses another")
    classes = check_targets(task, target, tallies, notes)
    comma = any(source.comma for source in sources)
    time, dated, interval = find_time(path, time, survey.watches, tallies, comma, notes)
    merged = find_order(path, survey, time, 1 if concat else len(sources), notes)
    if features is None:
        features = [name for name in tallies if name not in {*target, group, time}]
    inputs = [tallies[name].column(name) for name in features]
    for name in (*features, *target):
        notes += about(name, tallies[name], classes=name in target and bool(classes))
    if dated and interval is not None:
        fits = {"day": interval < DAY, "week": interval <= DAY, "year": interval >= DAY}
        inputs += [Column(name) for name in CALENDAR if fits[name.split()[1]] and name not in tallies]
    if season is None and interval is not None:
        season = season_of(interval)
    dressed = [*(column.name for column in inputs if column.kind == "number"), *(() if classes else target)]
    signs = tuple((name, tallies[name].signs) for name in dressed if name in tallies and tallies[name].signs)
    columns = Columns(task, tuple(inputs), target, classes, horizon + delay, season, label_as_input, signs)  # type: ignore[arg-type]
    return Table(
        columns, tuple(survey.codes), survey.rows, max(survey.sizes.values()), tuple(notes), group, time, dated,
        merged, tuple(sources), tuple(stems),
    )  # fmt: skip
