"""What the columns of a table mean, and how a row of it becomes numbers.

One row is a vector of F + G float64 numbers: F features, then the G newest known labels, which are
those of `lag` steps before (or what has become known by then). A number is itself, a category its
code, a missing value NaN. The meaning is fixed before the first row is read, so nothing about the
values of later rows gets into it but the names of categories and classes.
"""

import math
import re
import zlib
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pliant.core.errors import UsageError

Task = Literal["classify", "regress", "forecast"]
MISSING = frozenset({"", "na", "n/a", "nan", "null", "none", "?", "-"})
"""Cells, in lower case and without space around them, that stand for a missing value."""


@dataclass(frozen=True)
class Column:
    """One feature.

    Attributes:
        name: as in the table.
        kind: `"number"` or `"category"`.
        values: names of the categories, the code of a name being its place here plus 1; code 0 is any other.
        buckets: if positive, there are too many categories to list, and the code is 1 + hash modulo this.
    """

    name: str
    kind: Literal["number", "category"] = "number"
    values: tuple[str, ...] = ()
    buckets: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "_codes", {value: 1 + code for code, value in enumerate(self.values)})

    @property
    def size(self) -> int:
        """How many codes there are; 0 for a number."""
        return 0 if self.kind == "number" else 1 + (self.buckets or len(self.values))

    def code(self, cell: Any) -> float:
        """A cell as a number, NaN if it is missing.

        Raises:
            ValueError: the column holds numbers and the cell is none.
        """
        text = "" if cell is None else str(cell).strip()
        if text.lower() in MISSING:
            return math.nan
        if self.kind == "number":
            return finite(cell if isinstance(cell, int | float) else text)
        if self.buckets:
            return 1.0 + zlib.crc32(text.encode("utf-8", "surrogatepass")) % self.buckets
        return float(self._codes.get(text, 0))  # type: ignore[attr-defined]


LARGEST = 1e100
"""Numbers beyond count as not finite, so that squares and sums of them stay numbers."""


def finite(cell: Any) -> float:
    """A number from a cell that has one.

    Raises:
        ValueError: it is no number, or not finite (beyond `LARGEST`).
    """
    if isinstance(cell, str) and "_" in cell:
        raise ValueError(f"{cell} is no number")  # but Python reads 1_000 as one
    value = float(cell)
    if not abs(value) <= LARGEST:
        raise ValueError(f"{cell} is not finite")
    return value


UNITS = "$€£¥₹%"
"""Signs that may stand before or behind the numbers of a column."""
GROUPING = ",.'’ \u00a0\u202f"
"""Signs that may stand between the thousands of a number."""


def bare(text: str, signs: str) -> str:
    """A number as text without `signs` (some of `UNITS` and `GROUPING`): "$," of $1,003 leaves 1003.

    A sign of `GROUPING` goes only where all groups behind it have three digits, so 1,5 keeps its comma.
    """
    text = text.strip()
    for sign in signs:
        if sign in UNITS:
            text = re.sub(r"^([-+])\s+", r"\1", text.replace(sign, "", 1).strip())
        elif re.match(rf"[-+]?[1-9]\d{{0,2}}(?:{re.escape(sign)}\d{{3}})+(?![\d{sign}])", text):
            text = text.replace(sign, "")
    return text


def _said_else(cell: Any) -> tuple[str, ...]:
    """Other names of a class that is a number or a truth value: 1.0 is 1, and true is 1."""
    if not isinstance(cell, int | float):
        return ()
    return (f"{float(cell):.17g}", *([str(bool(cell))] if cell in (0, 1) else []))


@dataclass(frozen=True)
class Columns:
    """The schema of a stream of rows.

    Attributes:
        task: `"classify"`, `"regress"` or `"forecast"`.
        features: F columns, in the order of the inputs.
        targets: names of the G target columns; one if the task is to classify.
        classes: names of the C classes, in the order of their codes; empty unless the task is to classify.
        lag: horizon + delay. The label of step s of a stream is known when its step s + lag is asked.
        season: steps after which a pattern repeats, None if unknown.
        label_as_input: whether learners may read the newest known label; a no-change reference always does.
        signs: columns of numbers that are written with units or grouped thousands, and which signs those are.
    """

    task: Task
    features: tuple[Column, ...]
    targets: tuple[str, ...]
    classes: tuple[str, ...] = ()
    lag: int = 1
    season: int | None = None
    label_as_input: bool = True
    signs: tuple[tuple[str, str], ...] = ()

    @property
    def num_features(self) -> int:
        """F + G, the size of a row of inputs."""
        return len(self.features) + len(self.targets)

    @property
    def num_outputs(self) -> int:
        """C classes, or G numbers."""
        return len(self.classes) if self.task == "classify" else len(self.targets)

    def bare(self, name: str, cell: Any) -> Any:
        """A cell of a column without the signs that are no part of its number."""
        signs = next((signs for column, signs in self.signs if column == name), "")
        return bare(cell, signs) if signs and isinstance(cell, str) else cell

    def target(self, cell: Any) -> float:
        """The label in a cell: index of its class, or the number; NaN if it is missing.

        A class may be called none or na: what stands among the classes is no missing label.

        Raises:
            ValueError: it is neither.
        """
        text = "" if cell is None else str(cell).strip()
        if (name := next((name for name in (text, *_said_else(cell)) if name in self.classes), None)) is not None:
            return float(self.classes.index(name))
        if text.lower() in MISSING:
            return math.nan
        if self.task == "classify":
            raise ValueError(f"{text!r} is none of the classes")
        try:
            return finite(cell if isinstance(cell, int | float) else text)
        except ValueError:
            raise ValueError(f"{text!r} is no finite number") from None

    def to_dict(self) -> dict[str, Any]:
        """As plain values for a JSON file."""
        # Without signs as it was before there were any, so that older runs can be gone on with.
        return {name: value for name, value in asdict(self).items() if value or name != "signs"}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "Columns":
        """What `to_dict` gave.

        Raises:
            UsageError: the values are of another version.
        """
        try:
            parts = [
                Column(part["name"], part["kind"], tuple(part["values"]), part["buckets"])
                for part in values["features"]
            ]
            rest = {name: value for name, value in values.items() if name != "features"}
            rest |= {name: tuple(rest[name]) for name in ("targets", "classes")}
            rest["signs"] = tuple((name, signs) for name, signs in values.get("signs", ()))
            return cls(features=tuple(parts), **rest)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(
                f"Columns: not the schema of a table ({error}); it was written by another version"
            ) from None
