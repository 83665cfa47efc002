"""From cells to numbers, names and times."""

import math
import re
from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np

from pliant.core.columns import GROUPING, MISSING, UNITS, bare


def shown(value: Any) -> str:
    """A name or a cell in a message: in quotes, on one line, not too long."""
    text = str(value)
    return repr(text if len(text) <= 40 else text[:37] + "...")


def number(cell: Any, comma: bool = False) -> float | None:
    """The number in a cell, NaN if it is missing, None if there is none; may be infinite."""
    if cell is None:
        return math.nan
    if isinstance(cell, str):
        cell = cell.strip()
        if cell.lower() in MISSING:
            return math.nan
        if "_" in cell:  # Python reads 1_000 as a number
            return None
        cell = cell.replace(",", ".") if comma else cell
    try:
        return float(cell)
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        return None


def numbers(cells: Sequence[Any], comma: bool = False) -> tuple[np.ndarray, list[int]]:
    """The numbers in n cells, and the places of those that are neither a number nor missing.

    Args:
        cells: n of them.
        comma: whether the decimal sign may be a comma.

    Returns:
        `(n,)` float64, NaN where there is no number, possibly infinite; and the places.
    """
    try:
        if cells and isinstance(cells[0], str) and "_" in "".join(cells):
            raise ValueError
        return np.fromiter(map(float, cells), np.float64, len(cells)), []
    except (OverflowError, TypeError, ValueError):
        known = {cell: number(cell, comma) for cell in set(cells)}
    read = [known[cell] for cell in cells]
    bad = [place for place, value in enumerate(read) if value is None]
    for place in bad:
        read[place] = math.nan
    return np.array(read, np.float64), bad


DRESSED = re.compile(rf"[-+]?\s*[{UNITS}]?\s*[-+]?\d[\d{re.escape(GROUPING)}]*[{UNITS}]?")
"""What looks like a number in a language that people speak."""


def signs_of(cell: Any, comma: bool = False) -> tuple[str, str] | None:
    """The sign of a unit and that between thousands without which a cell is a number; each may be empty.

    None if the cell is no number without them either.
    """
    if not isinstance(cell, str) or not DRESSED.fullmatch(cell.strip()):
        return None
    unit = next((sign for sign in UNITS if sign in cell), "")
    for grouping in ("", *GROUPING):
        if number(bare(cell, unit + grouping), comma) is not None:
            return unit, grouping
    return None


def texts(cells: Sequence[Any]) -> list[str]:
    """Cells as names of categories, classes or groups; empty if missing."""
    return ["" if cell is None else str(cell).strip() for cell in cells]


EPOCH = datetime(1970, 1, 1)
DAY = 86_400.0  # seconds


WRITTEN = re.compile(
    r"(?P<day>\d{1,2})\.(?P<month>\d{1,2})\.(?P<year>\d{4})(?:,? +(?P<clock>\d.*))?"
    r"|(?P<year_>\d{4})/(?P<month_>\d{1,2})/(?P<day_>\d{1,2})(?:[ T]+(?P<clock_>\d.*))?"
)
"""Dates as people write them, as far as they can be read in one way only: 31.5.2024 12:00, 2024/5/31."""


def _iso(text: str) -> str:
    """A date in ISO 8601, or the text itself."""
    if re.fullmatch(r"\d{4}-\d\d", text):
        return text + "-01"
    if (found := WRITTEN.fullmatch(text)) is None:
        return text
    year, month, day, clock = (found[name] or found[name + "_"] for name in ("year", "month", "day", "clock"))
    clock = f"0{clock}" if clock and clock[1:2] == ":" else clock  # 9:30
    return f"{year}-{month:0>2}-{day:0>2}" + (f" {clock}" if clock else "")


def _moment(cell: Any) -> tuple[float, float]:
    text = "" if cell is None else str(cell).strip()
    if text.lower() in MISSING:
        return math.nan, math.nan
    try:
        time = datetime.fromisoformat(_iso(text))
    except ValueError:
        return math.inf, math.nan
    wall = (time.replace(tzinfo=None) - EPOCH).total_seconds()
    offset = time.utcoffset()
    return wall - (offset.total_seconds() if offset else 0.0), wall


def moments(cells: Sequence[Any]) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """The times in n cells: ISO 8601, or a date as in `WRITTEN`.

    Returns:
        `(n,)` seconds since 1970 UTC (a time without zone is taken as UTC), `(n,)` seconds since 1970 on
        the clock on the wall, both float64 and NaN where there is no time; and the places of cells that
        are neither a time nor missing.
    """
    known = {cell: _moment(cell) for cell in set(cells)}
    pairs = np.array([known[cell] for cell in cells], np.float64).reshape(-1, 2)
    bad = np.flatnonzero(np.isinf(pairs[:, 0]))
    pairs[bad] = math.nan
    return pairs[:, 0], pairs[:, 1], bad.tolist()


class Clock:
    """Whether time goes on in each of so many groups."""

    def __init__(self, groups: int) -> None:
        self.last = np.full(groups, -np.inf)

    def steps(self, times: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """Time since the row before of the same group that has one.

        Args:
            times: `(n,)`, NaN where there is none.
            groups: `(n,)` int64.

        Returns:
            `(n,)`: NaN for a row without time, inf for the first of its group.
        """
        steps = np.full(len(times), np.nan)
        timed = np.flatnonzero(~np.isnan(times))
        if len(timed):
            order = timed[np.argsort(groups[timed], kind="stable")]
            group, time = groups[order], times[order]
            leads = np.diff(group, prepend=-1) != 0
            steps[order] = time - np.where(leads, self.last[group], np.roll(time, 1))
            ends = np.append(leads[1:], True)
            self.last[group[ends]] = time[ends]
        return steps


CALENDAR = tuple(f"time: {unit} {wave}" for unit in ("day", "week", "year") for wave in ("sin", "cos"))
"""Names of the features that are made from dates."""


def calendar(name: str, wall: np.ndarray) -> np.ndarray:
    """One feature of the calendar.

    Args:
        name: one of `CALENDAR`.
        wall: `(n,)` seconds since 1970 on the clock on the wall, NaN where unknown.

    Returns:
        `(n,)`: sine or cosine of the share of the day, the week (from Monday) or the year that is over.
    """
    unit, wave = name.split()[1:]
    if unit == "day":
        share = wall / DAY % 1
    elif unit == "week":
        share = (wall / DAY + 3) / 7 % 1  # 1970 began on a Thursday
    else:
        share, known = np.full(len(wall), np.nan), ~np.isnan(wall)
        date = wall[known].astype("datetime64[s]")
        year = date.astype("datetime64[Y]")
        length = (year + 1).astype("datetime64[s]") - year.astype("datetime64[s]")
        share[known] = (date - year.astype("datetime64[s]")) / length
    return np.sin(2 * np.pi * share) if wave == "sin" else np.cos(2 * np.pi * share)
