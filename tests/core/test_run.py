"""What stands in the folder of a run."""

import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant.core.plain import dumps
from pliant.core.run import Run
from tests.strict import strict

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


def finite(value: Any) -> Any:
    if isinstance(value, list):
        return [finite(inner) for inner in value]
    if isinstance(value, dict):
        return {key: finite(inner) for key, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


@given(VALUES)
def test_what_is_not_finite_is_null_and_all_else_as_it_was(value: Any) -> None:
    assert strict(dumps(value)) == finite(value)
    assert strict(dumps(value, indent=2)) == finite(value)


def test_tuples_are_arrays_and_the_value_is_left_alone() -> None:
    value = {"a": (1, math.nan), "b": [{"c": -math.inf}]}
    assert dumps(value) == '{"a": [1, null], "b": [{"c": null}]}'
    assert value["b"] == [{"c": -math.inf}]
    with pytest.raises(TypeError):
        dumps({"a": object()})


def test_files_of_a_run_are_strict_and_a_cut_off_line_is_left_out(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.create("learn digits", {"lr": math.inf}, threads=1)
    run.write("summary.json", {"bits": math.nan})
    run.time({"tuning": True, "cpu": {"pliant": 1.5}})
    with run.begin(keep=0):
        run.record({"nats": math.nan, "answers": 1}, {"seconds": 0.5, "rss": math.inf})
    with open(run.folder / "timing.jsonl", "ab") as file:
        file.write(b'{"seco')
    run.time({"seconds": 1})
    assert strict((run.folder / "records.jsonl").read_bytes()) == {"nats": None, "answers": 1}
    assert strict((run.folder / "summary.json").read_bytes()) == {"bits": None}
    assert run.config() == {"lr": None}
    assert run.lines("timing.jsonl") == [
        {"tuning": True, "cpu": {"pliant": 1.5}}, {"seconds": 0.5, "rss": None}, {"seconds": 1}
    ]  # fmt: skip


def test_records_that_are_cut_back_are_as_long_as_they_are(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    run.create("learn digits", {}, threads=1)
    with run.begin(keep=0):
        run.record({"row": 1}, {})
        kept = run.sync()
        run.record({"row": 2}, {})  # a kill comes before the next save
    for _ in range(2):  # and again before anything is written
        with run.begin(keep=kept):
            assert run.sync() == kept
    with run.begin(keep=kept):
        run.record({"row": 2}, {})
        assert run.sync() == 2 * kept
    assert run.lines("records.jsonl") == [{"row": 1}, {"row": 2}]
