"""Which number or label stands in a cell."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest

from pliant.core.columns import Column, Columns, bare


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


@pytest.mark.parametrize(
    ("text", "signs", "left"),
    [
        ("$1,003", "$,", "1003"), ("- $5", "$", "-5"), ("12 %", "%", "12"), ("1.234.567,8", ".", "1234567,8"),
        ("1,5", ",", "1,5"), ("0,003", ",", "0,003"), ("1,2345", ",", "1,2345"), ("12,345,67", ",", "12,345,67"),
        ("1\u202f000", "\u202f", "1000"), ("€5", "$,", "€5"),
    ],
)  # fmt: skip
def test_bare_leaves_out_units_and_whole_groups_of_three(text: str, signs: str, left: str) -> None:
    assert bare(text, signs) == left


def test_signs_are_in_the_schema_where_there_are_any() -> None:
    plain = Columns("regress", (Column("a"),), ("y",))
    assert "signs" not in plain.to_dict()
    assert Columns.from_dict(plain.to_dict()) == plain
    dressed = replace(plain, signs=(("y", "$,"),))
    again = Columns.from_dict(json.loads(json.dumps(dressed.to_dict())))
    assert again == dressed
    assert [again.bare(name, "$1,003") for name in ("y", "a")] == ["1003", "$1,003"]
    assert again.bare("y", 5.0) == 5.0
