"""From files to cells.

A `Source` is one file. It is read from its beginning every time, at most `ROWS` rows at once, and
what is wrong with a row is counted and passed over. Only what makes the rest of a file worthless is
an error.
"""

import csv
import gzip
import io
import json
import math
import re
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice, pairwise
from pathlib import Path
from typing import IO, Any, cast

from pliant.core.errors import UsageError
from pliant.streams._cells import moments, number, shown, signs_of

ROWS = 1024
"""Rows in one chunk, at most."""
KINDS = dict.fromkeys((".csv", ".tsv", ".txt", ".data"), "text") | {
    ".jsonl": "json",
    ".ndjson": "json",
    ".parquet": "parquet",
}
KNOWN = f"{', '.join(KINDS)}, all but .parquet also with .gz"
SAMPLE = 1 << 18  # bytes from which the delimiter is found
HEAD = 200  # rows among which words of the first are looked for
FEW = 20  # rows, up to which it may be chance that no word of a column comes twice
UNREADABLE = (OSError, ValueError, NotImplementedError)  # what pyarrow raises is one of these
LONGEST = 1 << 24  # characters of a line
MOST_LINES = 200  # of one row whose quoted cells go over several lines

RAGGED = "row with too few or too many cells (left out)"
NO_OBJECT = "line that is no JSON object (left out)"
UNDECODABLE = "undecodable bytes (replaced)"
NUL = "NUL bytes (left out)"


class Empty(UsageError):
    """A file without anything in it."""


class Torn(UsageError):
    """A file that breaks off; what came before the break has been delivered."""


@dataclass(frozen=True)
class Chunk:
    """Up to `ROWS` consecutive rows.

    Attributes:
        size: n, how many.
        names: the columns; of JSON those that appear in these rows.
        read: gives the n cells of one of them.
        places: numbers of their lines (of a parquet file: rows) in the file, from 1.
        problems: (index of a row, what was met at this row or between it and the next).
    """

    size: int
    names: tuple[str, ...]
    read: Callable[[str], list[Any]]
    places: Sequence[int]
    problems: Sequence[tuple[int, str]] = ()

    def cells(self, name: str) -> list[Any]:
        """The n cells of a column, all missing if these rows have no such column."""
        return self.read(name) if name in self.names else [None] * self.size


def _counted(values: list[float | None]) -> bool:
    """Whether these are at least three whole numbers, each one more than that before."""
    return len(values) > 2 and all(
        a is not None and b is not None and a % 1 == 0 and b == a + 1 for a, b in pairwise(values)
    )


def _no_header(first: list[str], rows: list[list[str]], comma: bool) -> bool:
    """Whether the first row is one like the others.

    That is, all its cells are values, or words that come again below them; some may also be names that occur once in a
    column where all do. A row that is like the first in all cells says nothing: names may be repeated.
    """
    values = [number(cell, comma) for cell in first]
    values = [
        0.0 if value is None and signs_of(cell, comma) else value for cell, value in zip(first, values, strict=True)
    ]
    if _counted(values) and rows and not _counted([number(cell, comma) for cell in rows[0]]):
        return False  # columns that are called 0, 1, 2 or 2019, 2020, 2021
    timed = moments(first)[2]
    words = {place for place, value in enumerate(values) if value is None and place in timed}
    known = any(value is None or not math.isnan(value) for place, value in enumerate(values) if place not in words)
    rows = [row for row in rows if len(row) == len(first) and row != first]
    again = {place for place in words if any(first[place] == row[place] for row in rows)}
    ids = {place for place in words - again if FEW < len(rows) == len({row[place] for row in rows})}
    return words == again | ids and (len(again) > 1 or (known and (bool(again) or not ids)))


@dataclass(frozen=True)
class Source:
    """One file, looked at but not read.

    Attributes:
        path: where it is.
        kind: `"text"`, `"json"` or `"parquet"`.
        names: of the columns; None for JSON, where they appear as the rows come.
        delimiter: of a text file; a space stands for any white space.
        header: whether the names stand in the first row.
    """

    path: Path
    kind: str
    names: tuple[str, ...] | None = None
    delimiter: str = ","
    header: bool = True

    @classmethod
    def open(cls, path: Path) -> "Source":
        """Look at the beginning of a file.

        Raises:
            Empty: nothing is in it.
            UsageError: it cannot be read as a table; the message says why.
        """
        kind = kind_of(path)
        if kind is None:
            raise UsageError(f"series: {path} is of a kind that cannot be read; give a file whose name ends in {KNOWN}")
        if kind == "parquet":
            with _parquet(path) as file:
                if not file.metadata.num_rows or not file.schema_arrow.names:
                    lacking = "rows" if file.schema_arrow.names else "columns"
                    raise Empty(f"series: {path} has no {lacking}; give a file with rows")
                return cls(path, kind, _unique(tuple(file.schema_arrow.names), path))
        sample = _sample(path)
        if kind == "json":
            if sample.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
                raise UsageError(
                    f"series: {path} begins with a JSON array, expected an object on each line; write the elements "
                    "one a line, without the brackets around them and the commas between them"
                )
            return cls(path, kind)
        lines = _decoded(sample)
        delimiter = _delimiter(lines[:-1] if len(sample) >= SAMPLE and len(lines) > 1 else lines)
        with _opened(path) as file:
            begin = [row for _, row in islice(_records(_Lines(file, path), delimiter, None), HEAD)]
        first = begin[0] if begin else []
        if not first:
            raise Empty(f"series: {path} holds blank lines only; give a file with rows")
        if _no_header(first, begin[1:], comma=delimiter != ","):
            return cls(path, kind, tuple(f"c{place}" for place in range(len(first))), delimiter, header=False)
        return cls(path, kind, _unique(tuple(name.strip() for name in first), path), delimiter)

    @property
    def comma(self) -> bool:
        """Whether the decimal sign may be a comma."""
        return self.kind == "text" and self.delimiter != ","

    def chunks(self, most: int | None = None) -> Iterator[Chunk]:
        """All rows from the first on, at most `most` of them at once; None means `ROWS`.

        Raises:
            Torn: the file breaks off here.
            UsageError: the file cannot be opened.
        """
        most = most or ROWS
        if self.kind == "parquet":
            yield from self._batches(most)
            return
        index = {name: place for place, name in enumerate(self.names or ())}

        def chunk() -> Chunk:
            kept = rows
            if self.kind == "text":
                return Chunk(len(kept), tuple(index), lambda name: [row[index[name]] for row in kept], places, problems)
            names = tuple(dict.fromkeys(name for row in kept for name in row))
            return Chunk(len(kept), names, lambda name: [row.get(name) for row in kept], places, problems)

        rows: list[Any] = []
        places: list[int] = []
        problems: list[tuple[int, str]] = []
        torn = None
        with _opened(self.path) as file:
            lines = _Lines(file, self.path)
            found: Iterator[tuple[int, Any]]
            if self.kind == "text":
                width = len(index)
                found = _records(lines, self.delimiter, width)
                if self.header:
                    next(found, None)
            else:
                width, found = 0, _objects(lines)
            try:
                for place, row in found:
                    # What is wrong between two rows belongs to the one before, so that a position is a row.
                    if row is None or (width and len(row) != width):
                        lines.met.append(RAGGED if width else NO_OBJECT)
                        problems += [(max(len(rows) - 1, 0), what) for what in lines.met]
                        lines.met.clear()
                        continue
                    if len(rows) == most:
                        yield chunk()
                        rows, places, problems = [], [], []
                    rows.append(row)
                    places.append(place)
                    if lines.met:
                        problems += [(len(rows) - 1, what) for what in lines.met]
                        lines.met.clear()
            except Torn as error:
                torn = error
        if rows or problems:
            yield chunk()
        if torn:
            raise torn

    def _batches(self, most: int) -> Iterator[Chunk]:
        index, done = {name: place for place, name in enumerate(self.names or ())}, 0
        with _parquet(self.path) as file:
            try:
                for batch in file.iter_batches(most, use_threads=False):
                    places = range(done + 1, done + 1 + batch.num_rows)
                    yield Chunk(batch.num_rows, tuple(index), partial(_column, batch, index), places)
                    done += batch.num_rows
            except UNREADABLE as error:
                raise Torn(
                    f"series: {self.path} cannot be read beyond row {done} ({_reason(error)}); restore the file, "
                    "the rows before were read"
                ) from None


def kind_of(path: Path) -> str | None:
    """How a file is read, None if it is not."""
    name = path.name.lower()
    kind = KINDS.get(Path(name.removesuffix(".gz")).suffix)
    return None if kind == "parquet" and name.endswith(".gz") else kind


def stem(path: Path) -> str:
    """The name of a file without what says how it is read."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return Path(name).stem


def _unique(names: tuple[str, ...], path: Path) -> tuple[str, ...]:
    names = tuple(name or f"column {place}" for place, name in enumerate(names, 1))
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        raise UsageError(
            f"series: {path} has more than one column called {shown(twice[0])}; give each column a name of its own, "
            "in a first row if there is none"
        )
    return names


def _reason(error: Exception) -> str:
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return re.split(r"[.!?]\s", " ".join(text.split()))[0].rstrip(".")[:120] or type(error).__name__


def _opened(path: Path) -> io.TextIOWrapper:
    opened = gzip.open if path.suffix.lower() == ".gz" else open
    try:
        raw = cast(IO[bytes], opened(path, "rb"))
    except OSError as error:
        raise UsageError(f"series: {path} cannot be opened ({_reason(error)}); give a file that can be read") from None
    return io.TextIOWrapper(raw, encoding="utf-8-sig", errors="surrogateescape")


def _sample(path: Path) -> bytes:
    sample, broken = b"", None
    with _opened(path) as file:
        try:
            while len(sample) < SAMPLE and (more := file.buffer.read1(SAMPLE)):  # type: ignore[attr-defined]
                sample += more
        except (EOFError, OSError, zlib.error) as error:
            broken = error
    if broken and not sample:
        raise UsageError(f"series: nothing in {path} can be read ({_reason(broken)}); restore it or give another file")
    if not sample.strip():
        raise Empty(f"series: {path} is empty; give a file with rows")
    control = sum(sample.count(code) for code in range(32) if code not in b"\t\n\f\r")
    escaped = 0
    if not sample.isascii():
        escaped = sum("\udc80" <= sign <= "\udcff" for sign in sample.decode("utf-8", "surrogateescape"))
    if control > 2 + len(sample) / 10 or escaped > 2 + 0.8 * len(sample):
        raise UsageError(f"series: {path} is binary, expected a table as text; give it in UTF-8, or as parquet")
    return sample


def _decoded(sample: bytes) -> list[str]:
    return io.TextIOWrapper(io.BytesIO(sample), encoding="utf-8-sig", errors="replace").read().split("\n")


def _split(line: str, delimiter: str) -> list[str]:
    if delimiter != " ":
        return line.rstrip("\n").split(delimiter)
    if '"' not in line:
        return line.split()
    return [part.strip('"') for part in re.findall(r'"[^"]*"|\S+', line)]


def _delimiter(lines: list[str]) -> str:
    """What separates the cells: the same number of them in each row, and the more numbers the better."""
    lines = [line for line in lines if line.strip()][:100]
    best, chosen = (False, 0.0, 0.0), ","
    for delimiter in ",;\t| ":
        width = len(_split(lines[0], delimiter)) if lines else 0
        found = _records(_Lines(io.StringIO("\n".join(lines)), Path()), delimiter, width)
        rows = [row for _, row in found]
        width, usual = Counter(map(len, rows)).most_common(1)[0] if rows else (0, 0)
        if width < 2 or len(rows[0]) < 2:
            continue
        cells = [cell for row in rows for cell in row]
        numeric = sum(number(cell, delimiter != ",") is not None for cell in cells) / len(cells)
        share = usual / len(rows)
        key = (len(rows[0]) == width and share >= 0.8, numeric, share)
        if key > best:
            best, chosen = key, delimiter
    return chosen


class _Unclosed(Exception):
    pass


class _Lines:
    """Lines of a text file, cleaned. Those of the row that is being read are `pending` and can be put back."""

    def __init__(self, file: io.TextIOBase, path: Path):
        self._read, self._path = partial(file.readline, LONGEST), path
        self._again: deque[str] = deque()
        self.pending: list[str] = []
        self.met: list[str] = []
        self.number = 0

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        if len(self.pending) >= MOST_LINES:
            raise _Unclosed
        line = self._again.popleft() if self._again else self._clean()
        self.pending.append(line)
        self.number += 1
        return line

    def back(self) -> str:
        """The first pending line; the others will be read again."""
        first, *others = self.pending
        self._again.extendleft(reversed(others))
        self.number -= len(others)
        self.pending = [first]
        return first

    def _clean(self) -> str:
        try:
            line = self._read()
        except (EOFError, OSError, zlib.error) as error:
            raise Torn(
                f"series: {self._path} breaks off after line {self.number} ({_reason(error)}); restore the file, "
                "the rows before were read"
            ) from None
        if not line:
            raise StopIteration
        if "\0" in line:
            line = line.replace("\0", "")
            self.met.append(NUL)
        if not line.isascii():
            try:
                line.encode()
            except UnicodeEncodeError:
                line = line.encode("utf-8", "surrogateescape").decode("latin-1")
                self.met.append(UNDECODABLE)
        return line


def _records(lines: _Lines, delimiter: str, width: int | None) -> Iterator[tuple[int, list[str]]]:
    """Number of the first line and cells of each row that is not blank."""
    if delimiter == " ":
        for line in lines:
            lines.pending.clear()
            if line.strip():
                yield lines.number, _split(line, delimiter)
        return
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
    while True:
        row: list[str] | None = None
        try:
            row = next(reader)
        except StopIteration:
            return
        except (csv.Error, _Unclosed):
            pass
        if row is None or (width is not None and len(lines.pending) > 1 and len(row) != width):
            # A quote that nobody closed would swallow the rows that follow: it is a sign like others.
            row = _split(lines.back(), delimiter)
            reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=True)
        place = lines.number - len(lines.pending) + 1
        lines.pending.clear()
        if len(row) > 1 or (row and row[0].strip()):
            yield place, row


def _objects(lines: _Lines) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Number of the line and cells of each row of JSON that is not blank; None where there is no object."""
    for line in lines:
        lines.pending.clear()
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if not isinstance(row, dict):
            yield lines.number, None
            continue
        for name, cell in row.items():
            if isinstance(cell, dict | list):
                row[name] = json.dumps(cell)
        yield lines.number, row


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet  # type: ignore
    except ImportError:
        raise UsageError(f"series: {path} needs pyarrow to be read; pip install 'pliant[series]'") from None
    try:
        return parquet.ParquetFile(path)
    except UNREADABLE as error:
        raise UsageError(f"series: {path} cannot be read as parquet ({_reason(error)}); restore it") from None


def _column(batch: Any, index: dict[str, int], name: str) -> list[Any]:
    import pyarrow  # type: ignore

    column = batch.column(index[name])
    if pyarrow.types.is_timestamp(column.type):
        column = column.cast(pyarrow.timestamp("us", column.type.tz), safe=False)
    return [_plain(cell) for cell in column.to_pylist()]


def _plain(cell: Any) -> Any:
    if cell is None or isinstance(cell, str | int | float):
        return cell
    return cell.decode("utf-8", "replace") if isinstance(cell, bytes) else str(cell)
