"""Logs of agents and environments that take turns: one line of JSON for each turn, in the order of the stream.

    {"order": "OA", "actions": 2, "observations": 3}
    {"life": 0, "index": 1, "observation": 2}
    {"life": 0, "index": 1, "action": 0}
    {"life": 0, "index": 2, "observation": 1}

The first line says which turn comes first within an index, and how many symbols there are of each. Lives are numbered,
each begins with the same state of agent and environment, and they may be mixed line by line. A turn that is missing or
stands in the wrong place is told with its line.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pliant.core import Disk, UsageError

Kind = Literal["action", "observation"]
KINDS: dict[str, Kind] = {"A": "action", "O": "observation"}

MOST = 1 << 20
"""Symbols of an alphabet."""


@dataclass
class Life:
    """The turns of one life so far, symbols from 0."""

    actions: list[int] = field(default_factory=list)
    observations: list[int] = field(default_factory=list)

    def turns(self, kind: Kind) -> list[int]:
        """Those of one player."""
        return self.actions if kind == "action" else self.observations

    def due(self, order: str) -> tuple[Kind, int]:
        """What comes next, and its index from 1."""
        first, second = (KINDS[name] for name in order)
        a, b = len(self.turns(first)), len(self.turns(second))
        return (first, a + 1) if a == b else (second, b + 1)


@dataclass
class Turns:
    """Lives of one agent in one environment.

    Attributes:
        order: "AO" or "OA", which turn comes first within an index.
        sizes: |A| and |O|.
        lives: by number.

    Raises:
        UsageError: an order that is none.
    """

    order: Literal["AO", "OA"]
    sizes: tuple[int, int]
    lives: dict[int, Life] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.order not in ("AO", "OA"):
            raise UsageError(f'Turns: order is {self.order!r}, expected "AO" or "OA"')

    def arrays(self, indices: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Actions and observations `(lives, indices)`.

        Args:
            indices: the first so many of each life; None: all, which must be equally many.

        Raises:
            UsageError: no lives, one that is shorter, or `indices` below 1.
        """
        if indices is not None and indices < 1:
            raise UsageError(f"--indices is {indices}, expected at least 1")
        if not self.lives:
            raise UsageError("the log holds no turns")
        lengths = {number: len(life.actions) for number, life in self.lives.items()}
        wanted = max(lengths.values()) if indices is None else indices
        short = min(lengths, key=lengths.__getitem__)
        if lengths[short] < wanted:
            advice = f"; take the first {lengths[short]} of each with --indices" if lengths[short] else ""
            raise UsageError(f"life {short} has {lengths[short]} indices and {wanted} are needed of each{advice}")
        pair = ([life.actions[:wanted] for life in self.lives.values()],
                [life.observations[:wanted] for life in self.lives.values()])  # fmt: skip
        return np.array(pair[0], np.int64), np.array(pair[1], np.int64)

    def lines(self) -> Iterator[str]:
        """The log, one life after the other."""
        yield json.dumps({"order": self.order, "actions": self.sizes[0], "observations": self.sizes[1]})
        kinds = [KINDS[name] for name in self.order]
        for number, life in self.lives.items():
            for index in range(len(life.turns(kinds[0]))):
                for kind in kinds:
                    if index < len(life.turns(kind)):
                        yield json.dumps({"life": number, "index": index + 1, kind: life.turns(kind)[index]})

    def write(self, path: Path) -> None:
        """Write the log.

        Raises:
            UsageError: it cannot be written.
        """
        try:
            Disk().replace_file(path, ("\n".join(self.lines()) + "\n").encode())
        except OSError as error:
            raise UsageError(f"{path} cannot be written ({error.strerror or error})") from None


def read_turns(path: Path) -> Turns:
    """Read a log.

    Raises:
        UsageError: no such file, a line that is none, a turn that is missing or stands in the wrong place, a symbol
            outside of its alphabet, or a life that ends within an index.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:
            return parse(file, str(path))
    except UnicodeDecodeError:
        raise UsageError(f"{path} is no text, expected a log with one line of JSON for each turn") from None
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror or error})") from None


def parse(lines: Iterable[str], called: str) -> Turns:
    """A log from its lines; see `read_turns`."""
    turns = None
    for number, text in enumerate(lines, 1):
        if not text.strip():
            continue
        where = f"{called}, line {number}"
        row = _row(text, where)
        if turns is None:
            turns = _head(row, where)
        else:
            _take(turns, row, where)
    if turns is None:
        raise UsageError(f"{called} is empty, expected a log with one line of JSON for each turn")
    for number, life in turns.lives.items():
        kind, index = life.due(turns.order)
        if kind != KINDS[turns.order[0]]:
            raise UsageError(f"{called}: life {number} ends without the {kind} of index {index}")
    return turns


def _row(text: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):  # no JSON, a number too long, or too deep
        row = None
    if not isinstance(row, dict):
        raise UsageError(f'{where} is no object in JSON, expected one such as {{"life": 0, "index": 1, "action": 0}}')
    return row


def _head(row: dict[str, Any], where: str) -> Turns:
    if row.get("order") not in ("AO", "OA"):
        raise UsageError(f"{where}: the first line must say which turn comes first, such as "
                         '{"order": "AO", "actions": 2, "observations": 2}')  # fmt: skip
    actions, observations = row.get("actions"), row.get("observations")
    if not all(isinstance(size, int) and 2 <= size <= MOST for size in (actions, observations)):
        raise UsageError(f"{where}: {actions} actions and {observations} observations, expected how many symbols there "
                         f"are of each, two to {MOST:,}")  # fmt: skip
    return Turns(row["order"], (int(row["actions"]), int(row["observations"])))


def _take(turns: Turns, row: dict[str, Any], where: str) -> None:
    kinds: list[Kind] = [kind for kind in KINDS.values() if kind in row]
    if len(kinds) != 1 or not _is_whole(row.get("life")) or not _is_whole(row.get("index")):
        raise UsageError(f"{where}: expected a life, an index, and either an action or an observation, got "
                         f"{', '.join(row) or 'nothing'}")  # fmt: skip
    (kind,) = kinds
    life = turns.lives.setdefault(row["life"], Life())
    due = life.due(turns.order)
    if (kind, row["index"]) != due:
        raise UsageError(f"{where}: life {row['life']} has the {kind} of index {row['index']} where the {due[0]} of "
                         f"index {due[1]} should be; a turn is missing, or the order is not {turns.order}")  # fmt: skip
    size = turns.sizes[kind == "observation"]
    if not _is_whole(row[kind]) or not 0 <= row[kind] < size:
        raise UsageError(f"{where}: {kind} {row[kind]!r}, expected a symbol from 0 to {size - 1}")
    life.turns(kind).append(row[kind])


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
