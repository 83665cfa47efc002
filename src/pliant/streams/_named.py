"""Streams by name: known data sets in a folder, those that river and aeon carry, and a generator.

electricity   Elec2 (Harries 1999): price up or down, half-hourly, New South Wales 1996-98
weather       NOAA daily weather (Elwell & Polikar 2011): rain or not
outdoor       garden objects approached outdoors (Losing et al. 2015): which of 40
ett           ETTh1 (Zhou et al. 2021, arXiv:2012.07436): oil temperature, hourly
river:NAME    a data set that the package river carries, such as river:Bananas
aeon:NAME     a labelled collection of series that the package aeon carries, one series a row, such as aeon:GunPoint
regimes       generated: the rule from features to class comes and goes (`regimes`)
drifting      generated: the rule turns slowly into another, and that into the next
"""

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pliant.core import UsageError, numpy_generator
from pliant.core.columns import Column, Columns, Task
from pliant.streams._series import Source
from pliant.streams._table import Block, scan

BLOCK = 1024
MAX_CLASSES = 1000


class Arrays:
    """Rows that are in memory: features `(N, F)`, targets `(N, G)`."""

    def __init__(self, columns: Columns, features: np.ndarray, targets: np.ndarray):
        self.columns, self.rows = columns, len(features)
        self.groups: tuple[str, ...] = ()
        self.features, self.targets = features.astype(np.float64), targets.astype(np.float64)
        self.notes: tuple[str, ...] = ()

    def blocks(self, start: int = 0) -> Iterator[Block]:
        for first in range(start, self.rows, BLOCK):
            features = self.features[first : first + BLOCK]
            groups = np.zeros(len(features), np.int64)
            yield Block(features, self.targets[first : first + BLOCK], groups, first, Counter())


class Layout(NamedTuple):
    """How a known data set lies in a folder."""

    files: tuple[str, ...]
    task: Task
    target: str
    season: int | None
    horizon: int = 1


LAYOUTS = {
    "electricity": Layout(("electricity.csv",), "classify", "class", 48),
    "weather": Layout(("NEweather_data.csv", "NEweather_class.csv"), "classify", "rain", None),
    "outdoor": Layout(("outdoorStream.data", "outdoorStream.labels"), "classify", "object", None),
    "ett": Layout(("ETTh1.csv",), "forecast", "OT", 24, 24),
}
OTHERS = ("river:NAME", "aeon:NAME", "regimes", "drifting", "replay:FILE")


def named(
    name: str, folder: str | Path | None, *, horizon: int | None = None, delay: int = 0, seed: int = 0,
    rows: int | None = None, label_as_input: bool = True,
) -> Source:  # fmt: skip
    """The rows of a stream by its name.

    Args:
        name: see the top of this page.
        folder: where the files of a known data set are.
        horizon: steps to forecast; None means what is usual for the set.
        delay: steps by which a label comes later.
        seed: of what is generated.
        rows: how many are generated.
        label_as_input: see `Columns`.

    Raises:
        UsageError: the name is unknown, its files or package are not there, or it has no use for a horizon or a folder.
    """
    kind, _, rest = name.partition(":")
    known = name in LAYOUTS or kind in ("regimes", "drifting", "river", "aeon")
    if known and horizon is not None and (name not in LAYOUTS or LAYOUTS[name].task != "forecast"):
        raise UsageError(f"the stream {name} is not to forecast; leave --horizon out")
    if known and folder is not None and name not in LAYOUTS:
        raise UsageError(f"the stream {name} is not read from a folder; leave --data out")
    if kind in ("regimes", "drifting"):
        count = 1_000_000 if rows is None else rows
        return regimes(rows=count, seed=seed, delay=delay, gradual=kind == "drifting", label_as_input=label_as_input)
    if kind in ("river", "aeon"):
        task, pairs = (_river if kind == "river" else _aeon)(rest)
        return from_pairs(pairs, task=task, lag=1 + delay, label_as_input=label_as_input)
    if name not in LAYOUTS:
        raise UsageError(f"there is no stream {name!r}; known ones are {', '.join([*LAYOUTS, *OTHERS])}")
    layout = LAYOUTS[name]
    paths = [_find(name, folder, file) for file in layout.files]
    if len(paths) == 1:
        horizon = layout.horizon if horizon is None else horizon
        return scan(
            paths[0], task=layout.task, target=(layout.target,), horizon=horizon, delay=delay, season=layout.season,
            label_as_input=label_as_input,
        )  # fmt: skip
    separator = "," if paths[0].suffix == ".csv" else None
    features, labels = (np.loadtxt(path, delimiter=separator, ndmin=2) for path in paths)
    columns = tuple(Column(f"c{i}") for i in range(features.shape[1]))
    classes, codes = np.unique(labels[:, 0].astype(np.int64), return_inverse=True)
    schema = Columns(layout.task, columns, (layout.target,), tuple(map(str, classes)), 1 + delay, layout.season,
                     label_as_input)  # fmt: skip
    return Arrays(schema, features, codes.reshape(-1, 1))


def _find(name: str, folder: str | Path | None, file: str) -> Path:
    if folder is None:
        files = ", ".join(LAYOUTS[name].files)
        raise UsageError(f"{name} is read from a folder that holds {files}; name it with --data")
    path = Path(folder) / file
    if not path.is_file():
        raise UsageError(f"{name}: there is no {file} in {folder}; give the folder that holds it")
    return path


def from_pairs(
    pairs: Iterable[tuple[Mapping[str, Any], Any]], *, task: Task, lag: int = 1, season: int | None = None,
    target: str = "target", label_as_input: bool = True,
) -> Arrays:  # fmt: skip
    """Rows from (features by name, label) pairs as river gives them, all held in memory.

    A feature that a row does not name is missing there. A feature is a number if all its values are
    numbers (or truth values), else a category.

    Raises:
        UsageError: there are no rows, or labels of one class only, or of more than 1,000.
    """
    rows = list(pairs)
    if not rows:
        raise UsageError("from_pairs: got no rows; give at least two")
    names = list(dict.fromkeys(name for features, _ in rows for name in features))
    columns = tuple(_column(name, [features.get(name) for features, _ in rows]) for name in names)
    classes: tuple[str, ...] = ()
    if task == "classify":
        found = sorted({label for _, label in rows}, key=lambda label: (str(type(label)), label))
        classes = tuple(map(str, found))
        if not 2 <= len(classes) <= MAX_CLASSES:
            raise UsageError(f"from_pairs: got {len(classes)} classes, expected 2 to {MAX_CLASSES}")
    schema = Columns(task, columns, (target,), classes, lag, season, label_as_input)
    code = {name: i for i, name in enumerate(classes)}
    labels = np.array([code[str(label)] if classes else float(label) for _, label in rows], dtype=np.float64)
    cells = [[column.code(_plain(features.get(column.name))) for column in columns] for features, _ in rows]
    return Arrays(schema, np.array(cells, dtype=np.float64).reshape(len(rows), -1), labels[:, None])


def _column(name: str, values: list[Any]) -> Column:
    there = [_plain(value) for value in values if value is not None]
    if all(isinstance(value, int | float) for value in there):
        return Column(str(name))
    return Column(str(name), "category", tuple(sorted({str(value).strip() for value in there})[:256]))


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


def _river(name: str) -> tuple[Task, Iterable[tuple[Mapping[str, Any], Any]]]:
    try:
        from river import datasets
    except ImportError:
        raise UsageError("river:NAME needs the package river; install it with: pip install river") from None
    kinds = {key: kind for key, kind in vars(datasets).items() if isinstance(kind, type)}
    known = [
        key
        for key, kind in kinds.items()
        if issubclass(kind, datasets.base.FileDataset) and not issubclass(kind, datasets.base.RemoteDataset)
    ]
    if name not in known:
        raise UsageError(f"river carries no data set {name!r}; it has {', '.join(sorted(known))}")
    data = getattr(datasets, name)()
    return ("regress" if data.task == datasets.base.REG else "classify"), data


def _aeon(name: str) -> tuple[Task, Iterable[tuple[Mapping[str, Any], Any]]]:
    try:
        from aeon.datasets import load_classification
    except ImportError:
        raise UsageError("aeon:NAME needs the package aeon; install it with: pip install aeon") from None
    try:
        series, labels = load_classification(name)
    except Exception as error:  # aeon raises whatever its download raises
        raise UsageError(f"aeon carries no collection {name!r} ({type(error).__name__}); try GunPoint") from None
    rows = [{f"{channel}.{step}": float(value) for (channel, step), value in np.ndenumerate(case)} for case in series]
    return "classify", zip(rows, labels.tolist(), strict=True)


class _Regimes:
    """Blocks of generated rows, each a function of the seed and its place."""

    def __init__(self, rows: int, seed: int, length: int, concepts: int, noise: float, delay: int, gradual: bool,
                 label_as_input: bool):  # fmt: skip
        self.rows, self.seed, self.length, self.noise, self.gradual = rows, seed, length, noise, gradual
        features = (*(Column(f"x{i}") for i in range(8)), Column("site", "category", ("a", "b", "c", "d")))
        self.columns = Columns("classify", features, ("class",), ("0", "1", "2"), 1 + delay, None,
                               label_as_input)  # fmt: skip
        self.groups: tuple[str, ...] = ()
        self.notes: tuple[str, ...] = ()
        random = numpy_generator(seed, "regimes/rules")
        self.weights = random.normal(size=(concepts, 3, 8))
        self.offsets = random.normal(size=(concepts, 3, 4))
        self.order = numpy_generator(seed, "regimes/order").integers(concepts, size=2 + rows // length)

    def blocks(self, start: int = 0) -> Iterator[Block]:
        for number in range(start // BLOCK, -(-self.rows // BLOCK)):
            first = number * BLOCK
            block = self._block(number, min(BLOCK, self.rows - first))
            skip = max(0, start - first)
            features, targets = (part[skip:] for part in block)
            if not len(features):
                return
            yield Block(features, targets, np.zeros(len(features), np.int64), first + skip, Counter())

    def _block(self, number: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        random = numpy_generator(self.seed, f"regimes/{number}")
        place = number * BLOCK + np.arange(BLOCK)
        span = np.minimum(place, self.rows - 1) // self.length
        concept, following = self.order[span], self.order[span + 1]
        slow = np.sin(place[:, None] * 2 * np.pi / np.array([97.0, 1009.0]))
        x = random.normal(size=(BLOCK, 8))
        x[:, :2] = 0.5 * x[:, :2] + slow
        site = random.integers(4, size=BLOCK)
        rule = np.einsum("ncf,nf->nc", self.weights[concept], x) + self.offsets[concept, :, site]
        if self.gradual:
            then = np.einsum("ncf,nf->nc", self.weights[following], x) + self.offsets[following, :, site]
            rule += (place / self.length % 1)[:, None] * (then - rule)
        label = rule.argmax(1)
        wrong = random.random(BLOCK) < self.noise
        label = np.where(wrong, random.integers(3, size=BLOCK), label)
        features = np.concatenate([x, 1.0 + site[:, None]], 1)
        return features[:size], label[:size, None].astype(np.float64)


def regimes(
    *,
    rows: int = 1_000_000,
    seed: int = 0,
    length: int = 5000,
    concepts: int = 5,
    noise: float = 0.1,
    delay: int = 0,
    gradual: bool = False,
    label_as_input: bool = True,
) -> Source:
    """A generated stream of three classes whose rule comes and goes.

    Eight numbers, two of them with slow rhythms, and one category. The class is the largest of three
    linear functions of them; which functions is the regime, one of `concepts`, drawn anew every `length`
    rows, so that old ones come back; with `gradual` each turns into the next over that time. A share
    `noise` of the labels is drawn at random.
    """
    for name, value in (("rows", rows), ("length", length), ("concepts", concepts)):
        if value < 1:
            raise UsageError(f"regimes: {name} is {value}, expected at least 1")
    if not 0 <= noise <= 1:
        raise UsageError(f"regimes: noise is {noise}, expected 0 to 1")
    return _Regimes(rows, seed, length, concepts, noise, delay, gradual, label_as_input)


class Replay:
    """Rows of another source, no faster than so many a second, as if they came in now."""

    def __init__(self, source: Source, speed: float):
        self._source, self._speed = source, speed

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_source"], name)

    def blocks(self, start: int = 0) -> Iterator[Block]:
        began, given = time.monotonic(), 0
        for block in self._source.blocks(start):
            for i in range(len(block.groups)):
                time.sleep(max(0.0, began + given / self._speed - time.monotonic()))
                given += 1
                problems = block.problems if i == 0 else Counter[str]()
                one = slice(i, i + 1)
                yield Block(block.features[one], block.targets[one], block.groups[one], block.first + i, problems)


def replay(source: Source, *, speed: float) -> Source:
    """The rows of `source`, `speed` of them a second at most.

    Raises:
        UsageError: speed is not positive.
    """
    if not speed > 0:
        raise UsageError(f"replay: speed is {speed}, expected rows per second above 0")
    return Replay(source, speed)
