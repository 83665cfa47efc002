"""Which label stands in a cell."""

import math
from typing import Any

import pytest

from pliant.core.columns import Columns


def columns(*classes: str) -> Columns:
    return Columns("classify" if classes else "regress", (), ("y",), classes)


@pytest.mark.parametrize(
    ("classes", "cell", "expected"),
    [
        (("0", "1"), 1, 1), (("0", "1"), 1.0, 1), (("0", "1"), True, 1), (("0", "1"), " 0 ", 0),
        (("False", "True"), True, 1), (("False", "True"), 1, 1), (("False", "True"), "False", 0),
        (("0.5", "2"), 0.5, 0), (("none", "some"), "none", 0),
        (("a", "b"), None, math.nan), (("a", "b"), "?", math.nan),
    ],
)  # fmt: skip
def test_a_class_is_found_by_its_name_also_as_a_number_or_truth_value(
    classes: tuple[str, ...], cell: Any, expected: float
) -> None:
    found = columns(*classes).target(cell)
    assert found == expected or (math.isnan(found) and math.isnan(expected))


@pytest.mark.parametrize("cell", ["c", 2, 0.5, [1]])
def test_what_is_no_class_is_told(cell: Any) -> None:
    with pytest.raises(ValueError, match="none of the classes"):
        columns("0", "1").target(cell)


@pytest.mark.parametrize("cell", ["1,5", "1_000", "much", 1e101, "inf"])
def test_what_is_no_number_is_told(cell: Any) -> None:
    with pytest.raises(ValueError, match="no finite number"):
        columns().target(cell)
