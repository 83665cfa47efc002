"""Tables on disk: what is read, what is counted, what is refused, and that a position is a row."""

import gzip
import json
import math
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from pliant.core import UsageError
from pliant.core.columns import Column
from pliant.streams import _files, _scan
from pliant.streams._cells import CALENDAR, moments
from pliant.streams._series import series
from pliant.streams._table import (
    DUPLICATE_TIME,
    MISSING_LABEL,
    NOT_FINITE,
    NOT_NUMBER,
    UNKNOWN_CLASS,
    UNREADABLE_TIME,
    Block,
    Table,
    scan,
)

CLASSIFY: dict[str, Any] = {"task": "classify", "target": ["y"]}
REGRESS: dict[str, Any] = {"task": "regress", "target": ["y"]}
FORECAST: dict[str, Any] = {"task": "forecast", "target": ["y"]}


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def whole(table: Table, start: int = 0) -> tuple[Block, str]:
    """All blocks as one, and the error that ended them."""
    blocks, error = [], ""
    try:
        for block in table.blocks(start):
            assert len(block.features) == len(block.targets) == len(block.groups) <= _files.ROWS
            assert block.features.shape[1] == len(table.columns.features)
            assert not blocks or block.first == blocks[-1].first + len(blocks[-1].features)
            assert all(count > 0 for count in block.problems.values())
            blocks.append(block)
    except UsageError as caught:
        error = str(caught)
    columns = table.columns
    return Block(
        np.concatenate([np.empty((0, len(columns.features))), *(block.features for block in blocks)]),
        np.concatenate([np.empty((0, len(columns.targets))), *(block.targets for block in blocks)]),
        np.concatenate([np.empty(0, np.int64), *(block.groups for block in blocks)]),
        blocks[0].first if blocks else start,
        sum((block.problems for block in blocks), Counter()),
    ), error


def is_sentence(message: str, *parts: str) -> None:
    assert "\n" not in message
    assert not re.search(r"[.!?]\s+[A-Z]", message), message
    assert not message.endswith(".")
    assert len(message) < 500
    for part in parts:
        assert part in message, message


def refused(data: Path, *parts: str, **options: Any) -> None:
    with pytest.raises(UsageError) as caught:
        scan(data, **(CLASSIFY | options))
    is_sentence(str(caught.value), *parts)


GOOD = "a,b,y\n1,red,u\n2,blue,v\n3,red,u\n"


def test_a_plain_file(tmp_path: Path) -> None:
    table = scan(write(tmp_path / "x.csv", GOOD), **CLASSIFY)
    assert table.columns.features == (Column("a"), Column("b", "category", ("blue", "red")))
    assert table.columns.classes == ("u", "v")
    assert (table.rows, table.groups, table.notes, table.columns.lag) == (3, (), (), 1)
    (block,) = table.blocks()
    np.testing.assert_array_equal(block.features, [[1, 2], [2, 1], [3, 2]])
    np.testing.assert_array_equal(block.targets, [[0], [1], [0]])
    assert (block.first, block.problems) == (0, Counter())


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|", " ", "   "])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", [".csv", ".tsv", ".txt", ".data", ".csv.gz"])
def test_delimiters_line_ends_and_suffixes(tmp_path: Path, delimiter: str, end: str, suffix: str) -> None:
    raw = b"\xef\xbb\xbf" + GOOD.replace(",", delimiter).replace("\n", end).encode()
    path = write(tmp_path / f"x{suffix}", gzip.compress(raw) if suffix.endswith(".gz") else raw)
    table = scan(path, **CLASSIFY)
    assert [column.name for column in table.columns.features] == ["a", "b"]
    np.testing.assert_array_equal(whole(table)[0].features, [[1, 2], [2, 1], [3, 2]])


def test_decimal_commas(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "a;b;y\n3,14;x,y;1,5\n-2,5e1;z;2\n1.5;;1.234,5\n" + "1;z;2\n" * 20)
    block, _ = whole(scan(path, **REGRESS))
    np.testing.assert_array_equal(block.features[:3, 0], [3.14, -25, 1.5])
    np.testing.assert_array_equal(block.targets[:3, 0], [1.5, 2, 1234.5])
    assert not block.problems
    headless = scan(write(tmp_path / "n.csv", "3,14;2,71\n1,5;2,5\n"), task="regress", target=["c1"])
    np.testing.assert_array_equal(whole(headless)[0].targets[:, 0], [2.71, 2.5])


def test_quoted_cells(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", 'a,"b, c",y\n1,"two\nlines",u\n2, "say ""x"", y",v\n')
    table = scan(path, **CLASSIFY)
    assert [column.name for column in table.columns.features] == ["a", "b, c"]
    assert table.columns.features[1].values == ('say "x", y', "two\nlines")
    assert whole(table)[0].problems == {}


def test_an_open_quote_costs_one_row(tmp_path: Path) -> None:
    rows = "".join(f"{row},z,{'uv'[row % 2]}\n" for row in range(500))
    for where in (0, 250, 499):
        lines = rows.splitlines(keepends=True)
        lines[where] = '7,"z,u\n'
        block, _ = whole(scan(write(tmp_path / "x.csv", "a,b,y\n" + "".join(lines)), **CLASSIFY))
        assert len(block.features) >= 499, where
        assert sum(block.problems.values()) <= 1


def test_no_header(tmp_path: Path) -> None:
    table = scan(write(tmp_path / "x.csv", "1,,3\n2,5,4\n"), task="classify", target=["c2"])
    assert [column.name for column in table.columns.features] == ["c0", "c1"]
    assert table.rows == 2 and "c0" in table.notes[0]
    dated = scan(write(tmp_path / "x.csv", "2020-01-01,1\n2020-01-02,2\n"), task="regress", target=["c1"])
    assert (dated.time, dated.rows, dated.columns.season) == ("c0", 2, 7)


def test_names(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "<script>, a b ,,y\n=1+1,@SUM,1,u\n=2,@MAX,2,v\n")
    table = scan(path, **CLASSIFY)
    assert [column.name for column in table.columns.features] == ["<script>", "a b", "column 3"]
    assert table.columns.features[0].values == ("=1+1", "=2")
    chosen = scan(path, **CLASSIFY, features=["column 3"])
    assert chosen.columns.features == (Column("column 3"),)


def test_json_lines_whose_keys_appear_and_vanish(tmp_path: Path) -> None:
    rows = [{"a": 1, "y": True}, {"b": "x", "y": False}, {"a": None, "b": "z", "c": [1], "y": True}, {"y": "other"}]
    lines = [json.dumps(row) for row in rows]
    lines[1:1] = ["", "[1]", "{broken", '{"a": 1e999, "y": true}', '{"a": ' + "9" * 400 + ', "y": true}']
    for name, raw in (
        ("x.jsonl", "\n".join(lines).encode()),
        ("x.ndjson.gz", gzip.compress("\n".join(lines).encode())),
    ):
        table = scan(write(tmp_path / name, raw), **CLASSIFY)
        assert table.columns.classes == ("False", "True", "other")
        assert [(column.name, column.kind) for column in table.columns.features] == [
            ("a", "number"),
            ("b", "category"),
            ("c", "category"),
        ]
        block, _ = whole(table)
        nan = math.nan
        expected = [[1, nan, nan], [nan] * 3, [nan] * 3, [nan, 1, nan], [nan, 2, 1], [nan] * 3]
        np.testing.assert_array_equal(block.features, expected)
        np.testing.assert_array_equal(block.targets[:, 0], [1, 1, 1, 0, 1, 2])
        assert block.problems == {_files.NO_OBJECT: 2, NOT_FINITE: 2}


def test_a_key_that_appears_late_is_a_feature_from_the_beginning(tmp_path: Path) -> None:
    def row(place: int) -> dict[str, Any]:
        early, late = place < 2000, place >= 5000
        return {"y": place % 2} | ({"old": place} if early else {}) | ({"new": "x"} if late else {})

    lines = "".join(json.dumps(row(place)) + "\n" for place in range(6000))
    table = scan(write(tmp_path / "x.jsonl", lines), **CLASSIFY)
    assert table.columns.features == (Column("old"), Column("new", "category", ("x",)))
    block, _ = whole(table)
    place = np.arange(6000)
    np.testing.assert_array_equal(block.features[:, 0], np.where(place < 2000, place, math.nan))
    np.testing.assert_array_equal(block.features[:, 1], np.where(place >= 5000, 1, math.nan))


def test_parquet_round_trip(tmp_path: Path) -> None:
    count = 2500
    times = np.datetime64("2021-03-01T00:00:00.000000001", "ns") + np.arange(count) * np.timedelta64(1, "h")
    columns = {
        "when": pyarrow.array(times),
        "a": pyarrow.array([None if row % 7 == 0 else row / 3 for row in range(count)]),
        "b": pyarrow.array(["even" if row % 2 else "odd" for row in range(count)]).dictionary_encode(),
        "flag": pyarrow.array([row % 3 == 0 for row in range(count)]),
        "y": pyarrow.array(range(count)),
    }
    parquet.write_table(pyarrow.table(columns), tmp_path / "x.parquet", row_group_size=700)
    table = scan(tmp_path / "x.parquet", **FORECAST, horizon=3, delay=2)
    assert (table.rows, table.time, table.columns.season, table.columns.lag) == (count, "when", 24, 5)
    block, _ = whole(table)
    row = np.arange(count)
    np.testing.assert_array_equal(block.features[:, 0], np.where(row % 7 == 0, math.nan, row / 3))
    np.testing.assert_array_equal(block.features[:, 1], np.where(row % 2, 1, 2))
    np.testing.assert_array_equal(block.features[:, 2], row % 3 == 0)
    np.testing.assert_allclose(block.features[:, 3], np.sin(2 * np.pi * row / 24), atol=1e-9)
    np.testing.assert_array_equal(block.targets[:, 0], row)
    np.testing.assert_array_equal(whole(table, 1234)[0].features, block.features[1234:])


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parquet.write_table(pyarrow.table({"y": [1, 2]}), tmp_path / "x.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    refused(tmp_path / "x.parquet", "pip install 'pliant[series]'")


def test_what_is_counted(tmp_path: Path) -> None:
    rows = ["1,red,u"] * 40
    rows += [
        "x,red,u",
        "1_000,red,u",
        "inf,red,u",
        "-1e999,red,v",
        "?,NA,?",
        "nan,,",
        "1,red",
        "1,red,u,9",
        "",
        "  ",
    ]
    content = "\n".join(["a,b,y", *rows]).encode() + b"\n2,gr\xfcn,v\n3,r\0ed,v\n4,gr\xc3\xbcn,v"
    block, _ = whole(scan(write(tmp_path / "x.csv", content), **CLASSIFY))
    assert block.problems == {
        NOT_NUMBER: 2,
        NOT_FINITE: 2,
        MISSING_LABEL: 2,
        _files.RAGGED: 2,
        _files.UNDECODABLE: 1,
        _files.NUL: 1,
    }
    np.testing.assert_array_equal(np.isnan(block.features).sum(0), [6, 2])
    np.testing.assert_array_equal(np.isnan(block.targets).sum(), 2)
    assert block.features[-1, 1] == block.features[-3, 1] != block.features[-2, 1]


def test_a_number_column_is_decided_from_all_rows(tmp_path: Path) -> None:
    def kind(numeric: int, other: int) -> str:
        cells = ["x"] * other + ["1"] * numeric + [""] * 50
        content = "a,y\n" + "".join(f"{cell},{place % 2}\n" for place, cell in enumerate(cells))
        return scan(write(tmp_path / "x.csv", content), **CLASSIFY).columns.features[0].kind

    assert kind(95, 5) == kind(1, 0) == kind(0, 0) == "number"
    assert kind(94, 6) == kind(0, 1) == "category"


def test_classes_are_sorted_as_numbers_if_they_are(tmp_path: Path) -> None:
    assert scan(write(tmp_path / "x.csv", "a,y\n1,10\n1,9\n1,-1\n"), **CLASSIFY).columns.classes == ("-1", "9", "10")
    assert scan(write(tmp_path / "x.csv", "a,y\n1,10\n1,9\n1,b\n"), **CLASSIFY).columns.classes == ("10", "9", "b")


def test_a_class_may_be_called_none(tmp_path: Path) -> None:
    def labels(cells: str, **options: Any) -> tuple[tuple[str, ...], list[float], int]:
        content = "a,y\n" + "".join(f"1,{cell}\n" for cell in cells.split("|"))
        table = scan(write(tmp_path / "x.csv", content), **(CLASSIFY | options))
        named = [note for note in table.notes if "read as a class" in note]
        assert len(named) == len({*table.columns.classes} & {"none", "None", "null", "na", "n/a", "-"})
        block, _ = whole(table)
        assert block.problems[MISSING_LABEL] == np.isnan(block.targets).sum()
        return table.columns.classes, block.targets[:, 0].tolist(), block.problems[MISSING_LABEL]

    assert labels("none|mild|none") == (("mild", "none"), [1, 0, 1], 0)
    assert labels("+|-|+|")[::2] == (("+", "-"), 1)
    assert labels("u|null|na|n/a|None|u")[0] == ("None", "n/a", "na", "null", "u")
    assert labels("u|v|NA|N/A|NULL|?||nan|NaN")[::2] == (("u", "v"), 7)
    assert labels("0|1|none|na|-|?|")[::2] == (("0", "1"), 5)
    assert labels("0|1.5|none|na|-|?|", task="regress")[2] == 5
    refused(write(tmp_path / "x.csv", "a,y\n1,none\n1,none\n"), "missing")


def test_unknown_classes_after_the_scan(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", GOOD)
    table = scan(path, **CLASSIFY)
    write(path, GOOD + "4,green,w\n")
    block, _ = whole(table)
    assert block.problems == {UNKNOWN_CLASS: 1}
    assert block.features[-1].tolist() == [4, 0] and math.isnan(block.targets[-1, 0])


@pytest.mark.parametrize("count", [256, 257, 100_000])
def test_many_categories(tmp_path: Path, count: int) -> None:
    content = "a,y\n" + "".join(f"k{place},{place % 2}\n" for place in range(count))
    table = scan(write(tmp_path / "x.csv", content), **CLASSIFY)
    (column,) = table.columns.features
    assert (len(column.values), column.buckets) == ((256, 0) if count == 256 else (0, 4096))
    codes = whole(table)[0].features[:, 0]
    assert codes.min() >= 1 and codes.max() < column.size
    assert codes[17] == column.code("k17")


def test_notes(tmp_path: Path) -> None:
    table = scan(write(tmp_path / "x.csv", "a,5.1,b,y\n1,2,,u\n1,3,,v\n"), **CLASSIFY)
    assert any("'a' is constant" in note for note in table.notes)
    assert any("'5.1' is a number" in note for note in table.notes)
    assert any("'b' is missing" in note for note in table.notes)
    for note in table.notes:
        is_sentence(note)


# Time


def dated(step: str, rows: int = 30, start: str = "2021-03-01") -> list[str]:
    times = np.datetime64(start, "s") + np.arange(rows) * np.timedelta64(*step.split())  # type: ignore[call-overload]
    return [str(time) for time in times]


@pytest.mark.parametrize(
    ("step", "season", "units"),
    [
        ("15 m", 96, "day week"),
        ("1 h", 24, "day week"),
        ("7 h", None, "day week"),
        ("24 h", 7, "week year"),
        ("720 h", 12, "year"),
        ("168 h", None, "year"),
        ("1 s", None, "day week"),
    ],
)
def test_the_calendar_and_the_season(tmp_path: Path, step: str, season: int | None, units: str) -> None:
    number, unit = step.split()
    start, delta = np.datetime64("2021-03-01", "s"), np.timedelta64(int(number), unit)
    times = start + np.arange(60) * delta
    content = "when,a,y\n" + "".join(f"{str(time).replace('T', ' ')},1,{row}\n" for row, time in enumerate(times))
    table = scan(write(tmp_path / "x.csv", content), **FORECAST)
    assert (table.time, table.dated, table.columns.season) == ("when", True, season)
    names = [column.name for column in table.columns.features]
    assert names == ["a", *(name for name in CALENDAR if name.split()[1] in units.split())]
    features = whole(table)[0].features
    days = (times - np.datetime64("2021-01-01", "s")) / np.timedelta64(1, "D")
    shares = {"day": days, "week": (days + 4) / 7, "year": days / 365}  # 2021 began on a Friday
    for place, name in enumerate(names[1:], 1):
        _, unit, wave = name.split()
        within = (days < 365) | (unit != "year")
        expected = getattr(np, wave)(2 * np.pi * shares[unit])
        np.testing.assert_allclose(features[within, place], expected[within], atol=1e-9)
    assert scan(tmp_path / "x.csv", **FORECAST, season=5).columns.season == 5


def test_times_as_numbers(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "t,y\n" + "".join(f"{1.6e9 + 3600 * row},{row}\n" for row in range(5)))
    table = scan(path, **FORECAST, time="t")
    assert (table.dated, table.columns.season, table.columns.features) == (False, 24, ())
    counted = scan(write(path, "t,y\n10,1\n20,2\n30,1\n"), **FORECAST, time="t")
    assert counted.columns.season is None
    assert scan(path, **FORECAST).time is None


def test_zones(tmp_path: Path) -> None:
    cells = [
        "2021-10-31T02:30:00+02:00",
        "2021-10-31T02:30:00+01:00",
        "2021-10-31T03:30:00+01:00",
        "2021-10-31T02:40:00Z",
    ]
    content = "time,y\n" + "".join(f"{cell},{row}\n" for row, cell in enumerate(cells))
    table = scan(write(tmp_path / "x.csv", content), **FORECAST)
    block, error = whole(table)
    assert not error and table.columns.season == 24
    angle = np.arctan2(block.features[:, 0], block.features[:, 1]) / (2 * np.pi) * 24
    np.testing.assert_allclose(angle, [2.5, 2.5, 3.5, 2 + 2 / 3])


def test_a_time_column_is_found_only_if_it_plainly_is_one(tmp_path: Path) -> None:
    def found(cells: list[str], name: str = "when", **options: Any) -> Table:
        content = f"{name},date,y\n" + "".join(f"{cell},,{row}\n" for row, cell in enumerate(cells))
        return scan(write(tmp_path / "x.csv", content), **(FORECAST | options))

    hours = dated("1 h")
    assert found(hours).time == "when"
    assert found([*hours[:9], "", *hours[9:]]).time == "when"
    assert found([*hours, "soon"]).time is None
    assert found(hours, features=["when"]).time is None
    assert found([time for time in hours for _ in range(3)]).time is None
    backwards = found([*hours[5:], *hours[:5]])
    assert backwards.time is None and any("backwards" in note for note in backwards.notes)
    both = "a,date,y\n" + "".join(f"{time},{time},{row}\n" for row, time in enumerate(hours))
    assert scan(write(tmp_path / "x.csv", both), **FORECAST).time == "date"


def test_rows_that_stand_newest_first_are_refused(tmp_path: Path) -> None:
    days = [f"2024-03-{day:02d}" for day in range(28, 8, -1)]
    said = "the rows of .*x.csv stand newest first by column 'when', .*; sort them oldest first"

    def made(times: list[str], more: str = "") -> Path:
        rows = [f"{time},{'ab'[row % 2]},{row},{more.format(1 + row)}" for row, time in enumerate(times)]
        return write(tmp_path / "x.csv", "\n".join(["when,k,y,also", *rows]))

    numbers = [str(1.7e9 - 60 * row) for row in range(20)]
    for times, options in ((days, {}), (days, {"time": "when"}), (numbers, {"time": "when"}), (days, {"group": "k"})):
        with pytest.raises(UsageError, match=said):
            scan(made(times), **FORECAST, **options)
    # A single late row in between is no excuse; groups one after another, each newest first, are none either.
    with pytest.raises(UsageError, match=said):
        scan(made(days[:10] + days[:1] + days[10:]), **FORECAST)
    with pytest.raises(UsageError, match=said):
        scan(made(days * 2), **FORECAST)
    # Where another column goes on, or somebody says that it is no time, the rows stand as they should.
    assert scan(made(days, "2024-04-{:02d}"), **FORECAST).time == "also"
    assert scan(made(days), **FORECAST, features=["when"]).time is None


@pytest.mark.parametrize("unit", [1, 1e3, 1e6, 1e9])
@pytest.mark.parametrize(("step", "season"), [(3600, 24), (60, 1440), (86400, 7)])
def test_the_unit_of_unix_time_is_known_by_its_size(unit: float, step: int, season: int, tmp_path: Path) -> None:
    times = [f"{int((1.7e9 + step * row) * unit)}" for row in range(30)]
    path = write(tmp_path / "x.csv", "t,y\n" + "".join(f"{time},{row}\n" for row, time in enumerate(times)))
    assert scan(path, **FORECAST, time="t").columns.season == season


def test_problems_of_time(tmp_path: Path) -> None:
    cells = [*dated("1 h", 5), "2021-03-01T04:00:00", "?", "soon", "2021-03-01T06:00:00"]
    content = "when,y\n" + "".join(f"{cell},{row}\n" for row, cell in enumerate(cells))
    block, error = whole(scan(write(tmp_path / "x.csv", content), **FORECAST, time="when"))
    assert not error and block.problems == {DUPLICATE_TIME: 1, UNREADABLE_TIME: 1}
    np.testing.assert_array_equal(np.isnan(block.features[:, 0]), [False] * 6 + [True] * 2 + [False])


def test_time_that_goes_backwards_delivers_what_came_before(tmp_path: Path) -> None:
    count = 2000
    lines = [f"{10 * row},{row}" for row in range(count)]
    lines[1500] = "5,0"
    path = write(tmp_path / "x.csv", "\n".join(["t,y", "1,2,3", *lines]))
    table = scan(path, **FORECAST, time="t")
    assert table.rows == count
    for start in (0, 1000, 1024, 1400, 1500, 1700):
        block, error = whole(table, start)
        np.testing.assert_array_equal(block.targets[:, 0], np.arange(start, 1500))
        is_sentence(error, "line 1503", "x.csv", "14990", " 5,", "sort the file by 't'")
    dates = "\n".join(["when,y", "2021-01-02,1", "2021-01-01,2"])
    _, error = whole(scan(write(path, dates), **FORECAST, time="when"))
    is_sentence(error, "2021-01-02 00:00:00", "2021-01-01 00:00:00")


# Groups and folders


def test_groups(tmp_path: Path) -> None:
    content = "who,t,y\n" + "".join(f"{'ba'[row % 2]},{row // 2 + 10 * (row % 2)},{row}\n" for row in range(8))
    table = scan(write(tmp_path / "x.csv", content), **FORECAST, group="who", time="t")
    assert table.groups == ("b", "a") and table.columns.features == ()
    block, error = whole(table)
    assert not error and block.groups.tolist() == [0, 1] * 4
    assert whole(scan(tmp_path / "x.csv", **FORECAST, time="t"))[1]
    content += "b,2,0\n"
    block, error = whole(scan(write(tmp_path / "x.csv", content), **FORECAST, group="who", time="t"))
    assert len(block.targets) == 8
    is_sentence(error, "within its group", "from 3 to 2")


def test_folders(tmp_path: Path) -> None:
    write(tmp_path / "b.csv", "a,y\n1,10\n2,20\n")
    write(tmp_path / "a.csv.gz", gzip.compress(b"y,a\n30,3\n"))
    write(tmp_path / "c.csv", "")
    write(tmp_path / "README.md", "not a table")
    write(tmp_path / ".hidden.csv", "z\n1\n")
    (tmp_path / "folder.csv").mkdir()
    table = scan(tmp_path, **REGRESS)
    assert table.groups == ("a", "b") and any("c.csv" in note for note in table.notes)
    block, _ = whole(table)
    assert block.groups.tolist() == [0, 1, 1]
    np.testing.assert_array_equal(block.targets[:, 0], [30, 10, 20])
    together = scan(tmp_path, **REGRESS, concat=True)
    assert together.groups == () and whole(together)[0].groups.tolist() == [0, 0, 0]
    within = scan(tmp_path, task="regress", target=["a"], group="y")
    assert within.groups == ("a/30", "b/10", "b/20")
    write(tmp_path / "d.csv", "a,z\n1,10\n")
    refused(tmp_path, "d.csv", "no column 'y'", **REGRESS)


def test_files_of_different_columns(tmp_path: Path) -> None:
    write(tmp_path / "a.csv", "a,kind,y\n1,red,10\n2,blue,20\n")
    write(tmp_path / "b.csv", "y,b\n30,3\n")
    write(tmp_path / "c.csv", "kind,y,b,a\nred,40,4,5\n")
    table = scan(tmp_path, **REGRESS)
    assert [column.name for column in table.columns.features] == ["a", "kind", "b"]
    block, _ = whole(table)
    nan = math.nan
    np.testing.assert_array_equal(block.features, [[1, 2, nan], [2, 1, nan], [nan, nan, 3], [5, 2, 4]])
    assert block.problems == {}
    (note,) = (note for note in table.notes if "there is no column" in note)
    is_sentence(note, "'b' in a.csv", "2 more columns")
    assert scan(tmp_path, **REGRESS, features=["b"]).columns.features == (Column("b"),)
    refused(tmp_path, "'c'", features=["c"], **REGRESS)
    refused(tmp_path, "b.csv", "no column 'kind'", group="kind", **REGRESS)
    refused(tmp_path, "b.csv", "no column 'a'", time="a", **REGRESS)
    write(tmp_path / "d.jsonl", '{"a": 1}\n')
    refused(tmp_path, "d.jsonl", "no column 'y'", **REGRESS)


# Files side by side


def at_times(folder: Path, **files: list[int | str]) -> Path:
    """A file for each list of times; y counts the rows."""
    for name, times in files.items():
        write(folder / f"{name}.csv", "t,y\n" + "".join(f"{time},{row}\n" for row, time in enumerate(times)))
    return folder


def order(table: Table, start: int = 0) -> str:
    """Group and row in its file of each row, and whether an error ended them."""
    block, error = whole(table, start)
    pairs = zip(block.groups.tolist(), block.targets[:, 0].tolist(), strict=True)
    return " ".join(f"{table.groups[group]}{row:.0f}" for group, row in pairs) + " !" * bool(error)


def test_files_that_overlap_are_read_in_order_of_time(tmp_path: Path) -> None:
    at_times(tmp_path, b=[10, 20, 20, 40], a=[20, 30], c=[1, 2, 50])
    table = scan(tmp_path, **FORECAST, time="t")
    assert table.merged and (table.rows, table.longest, table.groups) == (9, 4, ("a", "b", "c"))
    assert order(table) == "c0 c1 b0 a0 b1 b2 a1 b3 c2"
    assert any("in order of 't'" in note for note in table.notes)
    assert whole(table)[0].problems == {DUPLICATE_TIME: 1}  # within b; other groups have a time of their own
    together = scan(tmp_path, **FORECAST, concat=True)
    np.testing.assert_array_equal(whole(together)[0].targets[:, 0], [0, 1, 0, 1, 2, 3, 0, 1, 2])
    assert not together.merged
    for known in ("when", None):  # dates are found, but only in all files or in none
        for name in "ab":
            head = "when,y\n" + "".join(f"{time},{row}\n" for row, time in enumerate(dated("1 h", 3)))
            write(tmp_path / f"{name}.csv", head)
        write(tmp_path / "c.csv", "when,y\n2020-01-01,0\n" if known else "a,y\n1,0\n")
        found = scan(tmp_path, **FORECAST)
        assert (found.merged, found.time) == (known is not None, "when")
        assert order(found) == ("c0 a0 b0 a1 b1 a2 b2" if known else "a0 a1 a2 b0 b1 b2 c0")
    assert any("one after another" in note and "no column is the time" in note for note in found.notes)


def test_rows_without_a_time_stay_with_those_before(tmp_path: Path) -> None:
    at_times(tmp_path, a=["?", 10, "?", 40], b=[5, 20, "?", 30])
    assert order(scan(tmp_path, **FORECAST, time="t")) == "a0 b0 a1 a2 b1 b2 b3 a3"


def test_what_ends_one_of_several_files_ends_the_run_there(tmp_path: Path) -> None:
    at_times(tmp_path, a=[10, 20, 15, 60], b=[5, 15, 30])
    table = scan(tmp_path, **FORECAST, time="t")
    for start, rest in enumerate(["b0 a0 b1 a1 !", "a0 b1 a1 !", "b1 a1 !", "a1 !", " !"]):
        assert order(table, start) == rest
    is_sentence(whole(table)[1], "line 4 of", "a.csv", "from 20 to 15")
    full = gzip.compress(("t,y\n" + "".join(f"{row},{row * 7919 % 1000}\n" for row in range(3000))).encode())
    write(tmp_path / "a.csv.gz", full[: len(full) // 2])
    (tmp_path / "a.csv").unlink()
    at_times(tmp_path, b=list(range(0, 3000, 300)), c=[100])
    torn = scan(tmp_path, **REGRESS, time="t")
    assert torn.groups == ("a", "b", "c")
    block, error = whole(torn)
    is_sentence(error, "a.csv.gz", "breaks off")
    assert 3 < (block.groups == 1).sum() < 10 and (block.groups == 2).sum() == 1


def test_more_files_than_can_be_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_times(tmp_path, a=[1, 3], b=[2, 4], c=[0, 5])
    monkeypatch.setattr(_scan, "MOST_OPEN", 2)
    table = scan(tmp_path, **FORECAST, time="t")
    assert not table.merged and order(table) == "a0 a1 b0 b1 c0 c1"
    assert any("one after another" in note and "more than 2" in note and "--group" in note for note in table.notes)


def test_groups_one_after_another_are_noted(tmp_path: Path) -> None:
    def notes(rows: str, **options: Any) -> bool:
        content = "who,t,y\n" + "".join(f"{who},{time},1\n" for who, time in rows.split())
        table = scan(write(tmp_path / "x.csv", content), **(FORECAST | {"time": "t", "group": "who"} | options))
        for note in table.notes:
            is_sentence(note)
        return any("'who' come one after another" in note for note in table.notes)

    assert notes("a1 a2 b1 b2")
    assert not notes("a1 b1 a2 b2")
    assert not notes("a1 a2 b3 b4")  # sorted by time as it is
    assert not notes("a1 a2 b1 b2", time=None)
    assert not notes("a1 a2 a3")


TIMES = st.lists(st.sampled_from([0, 1, 1, 2, 9, "?"]), min_size=1, max_size=12)


@given(st.lists(TIMES, min_size=2, max_size=5), st.integers(0, 40), st.sampled_from([1, 2, 5, 1024]))
def test_a_merge_is_a_stable_sort_from_any_row_on(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[int | str]], start: int, most: int
) -> None:
    folder, expected = tmp_path_factory.mktemp("merge"), []
    for file, steps in enumerate(files):
        now, times, reached = 0, [], -math.inf
        for row, step in enumerate(steps):
            if isinstance(step, int):
                reached = now = now + step
            times.append(now if isinstance(step, int) else step)
            expected.append((reached, file, row))
        at_times(folder, **{"abcde"[file]: times})
    try:
        table = scan(folder, **FORECAST, time="t")
    except UsageError:  # there is no time at all
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_files, "ROWS", most)
        found = order(table, start)
    assert found == " ".join(f"{'abcde'[file]}{row}" for _, file, row in sorted(expected)[start:])


def test_a_stream_of_merged_files_goes_on_from_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    at_times(tmp_path, a=list(range(0, 60, 2)), b=list(range(0, 60, 3)), c=list(range(50, 80)))
    monkeypatch.setattr(_files, "ROWS", 7)

    def stream() -> Any:
        return series(tmp_path, target=["y"], task="forecast", time="t", horizon=2, delay=1, chunk=4)

    def drain(asked: Any) -> list[str]:
        found = []
        while batch := asked.send(None):
            found.append(repr(batch))
        return found

    full = drain(stream())
    assert any("rows=tensor([0, 1])" in batch for batch in full)  # a question of two streams
    for taken in range(0, len(full), 3):
        begun, later = stream(), stream()
        for _ in range(taken):
            begun.send(None)
        later.load_state_dict(begun.state_dict())
        assert drain(later) == full[taken:]


def test_a_folder_of_several_kinds(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", '{"date": "2021-01-01", "y": 1, "more": 2}\n{"date": "2021-01-02", "y": 2}\n')
    write(tmp_path / "b.csv", "y,a\n3,4\n")
    parquet.write_table(pyarrow.table({"a": [5, 6], "y": [7, 8]}), tmp_path / "c.parquet")
    table = scan(tmp_path, **REGRESS)
    assert (table.groups, table.time, table.rows) == (("a", "b", "c"), "date", 5)
    block, _ = whole(table)
    names = [column.name for column in table.columns.features]
    assert names == ["more", "a", "time: week sin", "time: week cos", "time: year sin", "time: year cos"]
    nan = math.nan
    np.testing.assert_array_equal(block.features[:, 0], [2, nan, nan, nan, nan])
    np.testing.assert_array_equal(block.features[:, 1], [nan, nan, 4, 5, 6])
    np.testing.assert_array_equal(np.isnan(block.features[:, 2:]).all(1), [False, False, True, True, True])


# What is refused


def test_refused_arguments(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", "a,b,y,z\n1,red,1,5\n2,red,2,6\n")
    refused(path, "'guess'", "classify", task="guess")
    refused(path, "0 targets", target=[])
    refused(path, "2 targets", target=["y", "z"])
    refused(path, "horizon is 2", horizon=2)
    refused(path, "horizon is 0", horizon=0, task="forecast")
    refused(path, "delay is -1", delay=-1)
    refused(path, "season is 0", season=0)
    refused(path, "'y'", "a feature", features=["a", "y"])
    refused(path, "'y'", "the group", group="y")
    refused(path, "'y'", "the time", time="y")
    refused(path, "'a'", "both", group="a", time="a")
    refused(path, "'a'", "twice", features=["a", "a"])
    refused(path, "'Y'", "nearest is 'y'", "'a', 'b', 'y', 'z'", target=["Y"])
    refused(path, "'nothing like it'", features=["nothing like it"])
    refused(path, "'b'", "must hold numbers", "'red'", task="regress", target=["b"])
    refused(path, "'b'", "only one class", target=["b"])
    refused(path, "'b'", "no times", "'red'", time="b")
    with pytest.raises(UsageError):
        next(scan(path, **CLASSIFY).blocks(-1))
    assert scan(path, **FORECAST, horizon=4, delay=3).columns.lag == 7
    assert scan(path, **CLASSIFY, delay=3).columns.lag == 4


def test_many_columns_are_not_all_named(tmp_path: Path) -> None:
    path = write(tmp_path / "x.csv", ",".join(f"col{place}" for place in range(30)) + "\n")
    refused(path, "'col19' and 10 more", target=["z"])


@pytest.mark.parametrize("name", ["x.csv", "x.csv.gz", "x.jsonl"])
def test_refused_because_nothing_is_there(tmp_path: Path, name: str) -> None:
    for content in (b"", b"\n \n\r\n", b"\xef\xbb\xbf"):
        path = write(tmp_path / name, gzip.compress(content) if name.endswith(".gz") else content)
        refused(path, name)


def test_refused_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path / "none.csv", "none.csv")
    refused(tmp_path, "holds no table", ".csv")
    refused(write(tmp_path / "x.csv", "a,y\n"), "no rows", "x.csv")
    refused(write(tmp_path / "x.csv", "a,y\n1\n2,3,4\n"), "no rows", "x.csv")
    refused(write(tmp_path / "x.csv", "a,b,a,y\n1,2,3,4\n"), "more than one column called 'a'")
    refused(write(tmp_path / "x.csv", "a,y\n1,\n2,?\n"), "'y'", "missing")
    refused(write(tmp_path / "x.xlsx", GOOD), "x.xlsx", ".csv, .tsv, .txt, .data, .jsonl, .ndjson, .parquet")
    refused(write(tmp_path / "x.parquet.gz", GOOD), "x.parquet.gz")
    refused(write(tmp_path / "x.parquet", GOOD), "x.parquet", "cannot be read as parquet")
    refused(write(tmp_path / "x.csv.gz", GOOD), "x.csv.gz", "nothing")
    random = np.random.default_rng(0).bytes(5000)
    for content in (random, bytes(range(128, 256)) * 9, GOOD.encode("utf-16"), b"\0" * 1000):
        refused(write(tmp_path / "x.csv", content), "x.csv", "is binary")
    rows = "".join(f"{place},{place}\n" for place in range(1001))
    refused(write(tmp_path / "x.csv", "a,y\n" + rows), "'y'", "more than 1000 classes")
    many = "".join(f"{place % 2},g{place}\n" for place in range(4097))
    refused(write(tmp_path / "x.csv", "y,a\n" + many), "more than 4096 groups", "'a'", group="a")
    opened = write(tmp_path / "x.csv", GOOD)
    table = scan(opened, **CLASSIFY)
    opened.unlink()
    _, error = whole(table)
    is_sentence(error, "x.csv", "cannot be opened")


def test_a_gzip_that_ends_early(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    rows = "".join(f"{a!r},{'uv'[row % 2]}\n" for row, a in enumerate(random.random(5000).tolist()))
    full = gzip.compress(("a,y\n" + rows).encode())
    values = [float(line.split(",")[0]) for line in rows.splitlines()]
    for content in (full[: len(full) // 2], full[:-4], full[:-8] + b"abcdefgh"):
        table = scan(write(tmp_path / "x.csv.gz", content), **CLASSIFY)
        assert any("breaks off" in note for note in table.notes)
        block, error = whole(table)
        is_sentence(error, "x.csv.gz", "breaks off after line", "restore")
        assert 1000 < table.rows == len(block.features) <= 5000
        assert block.features[:, 0].tolist() == values[: table.rows]
        np.testing.assert_array_equal(whole(table, 700)[0].features, block.features[700:])
    refused(write(tmp_path / "x.csv.gz", full[:15]), "x.csv.gz")


PIECES = st.sampled_from(
    [
        *(bytes([code]) for code in b'ay1,,; "\t\n\n\0\xff{}_-e'),
        b"2.5",
        b"\r\n",
        b"\xef\xbb\xbf",
        b"2020-01-01",
        b"c0",
        b'{"a": 1, "y": 2}\n',
        b"a,y\n",
        b"1,2\n",
        b"\x1f\x8b",
    ],
)


@given(
    st.one_of(st.binary(max_size=60), st.lists(PIECES, max_size=40).map(b"".join)),
    st.sampled_from([".csv", ".data", ".jsonl", ".csv.gz", ".jsonl.gz", ".parquet"]),
    st.booleans(),
    st.sampled_from([*({"task": task, "target": [y]} for task in ("regress", "classify") for y in ("y", "c0"))]),
)
@settings(max_examples=200)
def test_whatever_stands_in_a_file_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str, packed: bool, task: dict[str, Any]
) -> None:
    path = tmp_path_factory.mktemp("any") / f"x{suffix}"
    path.write_bytes(gzip.compress(content) if packed and suffix.endswith(".gz") else content)
    try:
        table = scan(path, **task)
    except UsageError as refusal:
        is_sentence(str(refusal), "series: ")
        return
    block, error = whole(table)
    assert len(block.features) == table.rows > 0 and not error
    assert not np.isinf(block.features).any() and not np.isinf(block.targets).any()


# A position is a row

CELL = st.sampled_from(["1", "2.5", "-3e2", "", "?", "x", "inf", "1_0", " 4 ", "é"])
STEP = st.sampled_from(["1", "1", "1", "1", "0", "?", "soon", "-50"])
ROW = st.tuples(CELL, CELL, st.sampled_from("uvw"), st.sampled_from("pq"), STEP)
BAD = st.sampled_from(
    [b"", b"   ", b"1,2", b"1,2,3,4,5,6,7", b'1,"2,u', b"\xff", b'"', b"1,\0", b'1,"two\nlines",u,p,1']
)
LINES = st.lists(st.one_of(ROW, ROW, ROW, BAD), max_size=40)


@given(LINES, st.integers(0, 45), st.booleans())
def test_a_start_does_not_change_what_is_read(
    tmp_path_factory: pytest.TempPathFactory, lines: list[Any], start: int, timed: bool
) -> None:
    path, now = tmp_path_factory.mktemp("start") / "x.csv", 100
    raw = [b"a,b,y,who,t", b"1,red,u,p,1", b"1,red,v,q,1"]
    for line in lines:
        if isinstance(line, tuple):
            *cells, step = line
            now += int(step) if step.lstrip("-").isdigit() else 0
            line = ",".join([*cells, str(now) if step.lstrip("-").isdigit() else step]).encode("latin-1")
        raw.append(line)
    path.write_bytes(b"\n".join(raw))
    table = scan(path, **CLASSIFY, group="who", time="t" if timed else None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_files, "ROWS", 1)
        by_row = [*_until_error(table, 0)]
        patch.setattr(_files, "ROWS", 5)
        full, error = whole(table)
        tail, same_error = whole(table, start)
    assert error == same_error
    assert len(full.features) == len(by_row) and (error or len(by_row) == table.rows)
    for name in ("features", "targets", "groups"):
        np.testing.assert_array_equal(getattr(tail, name), getattr(full, name)[start:])
    assert tail.problems == sum((block.problems for block in by_row[start:]), Counter())
    assert full.problems == sum((block.problems for block in by_row), Counter())


def _until_error(table: Table, start: int) -> Any:
    try:
        yield from table.blocks(start)
    except UsageError:
        return


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("files", [1, 40])
def test_memory_does_not_grow_with_the_data(tmp_path: Path, files: int) -> None:
    row = ",".join(["0.12345678"] * 10)
    for number in range(files):
        with open(tmp_path / f"{number}.csv", "w") as file:
            file.write(",".join(f"a{place}" for place in range(10)) + ",y\n")
            for place in range(number, 200_000, files):
                file.write(f"{row},{place}\n")
    code = f"""
import re
from pliant.streams._table import scan
peak = lambda: int(re.search(r"VmHWM:\\s+(\\d+)", open("/proc/self/status").read())[1])
before = peak()
table = scan({str(tmp_path)!r}, task="forecast", target=["a0"], time="y")
rows = sum(len(block.features) for block in table.blocks())
print(table.rows, rows, peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    rows, read, grown = map(int, done.stdout.split())
    assert rows == read == 200_000 and grown < 50_000  # KiB


@pytest.mark.parametrize("cell", ["05.03.2024 09:30", "5.3.2024 9:30", "2024/03/05 09:30", "5.3.2024, 09:30"])
def test_dates_that_can_be_read_in_one_way_only_are_times(cell: str) -> None:
    seconds, wall, bad = moments([cell, "2024-03-05 09:30"])
    assert bad == [] and seconds[0] == seconds[1] == wall[0]


@pytest.mark.parametrize("cell", ["05/03/2024", "31.13.2024", "5.3.24", "1.2.2024.3", "version 1.2.2024"])
def test_what_could_mean_two_dates_or_none_is_no_time(cell: str) -> None:
    assert moments([cell])[2] == [0]


def test_a_first_row_of_values_and_words_that_come_again_is_no_header(tmp_path: Path) -> None:
    rows = [f"{i}\t{i % 7 / 2}\t{'yes' if i % 3 else 'no'}" for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join(rows))
    table = scan(tmp_path / "a.txt", task="auto", target=["c2"])
    assert table.rows == 40 and table.columns.classes == ("no", "yes")


@pytest.mark.parametrize("header", ["country\t2019\tanswer", "a\tb\tc"])
def test_years_as_names_of_columns_are_a_header(tmp_path: Path, header: str) -> None:
    rows = [f"{'xyz'[i % 3]}\t{i % 7 / 2}\t{'yes' if i % 3 else 'no'}" for i in range(40)]
    (tmp_path / "a.txt").write_text("\n".join([header, *rows]))
    assert scan(tmp_path / "a.txt", task="auto", target=[header.split("\t")[2]]).rows == 40


@pytest.mark.parametrize("first", [0, 2019])
def test_columns_that_are_called_by_numbers_one_after_the_other_have_a_header(first: int, tmp_path: Path) -> None:
    names = [str(first + i) for i in range(3)]
    rows = [f"{i},{i % 7 / 2},{i % 5}" for i in range(40)]
    (tmp_path / "a.csv").write_text("\n".join([",".join(names), *rows]))
    assert scan(tmp_path / "a.csv", task="auto", target=[names[2]]).rows == 40


def test_true_and_false_of_json_are_classes(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"a": i / 3, "y": i % 3 == 0}) for i in range(40)))
    columns = scan(tmp_path / "a.jsonl", task="auto", target=["y"]).columns
    assert columns.task == "classify" and columns.classes == ("False", "True")
    _, _, first, *_ = next(iter(series(tmp_path / "a.jsonl", target=["y"]).source.blocks())).targets[:4, 0]
    assert first == 0


def _column(path: Path, name: str, cells: list[str], delimiter: str = ",") -> Path:
    """A table of the numbers 0, 1, … and that column, in quotes where need be."""
    rows = [f'"{cell}"' if delimiter in cell else cell for cell in cells]
    return write(path, "\n".join([f"a{delimiter}{name}", *(f"{i}{delimiter}{cell}" for i, cell in enumerate(rows))]))


@pytest.mark.parametrize(
    ("cells", "delimiter", "read"),
    [
        (["1,003", "873", "1,234,567", "2,500.5", "-4,000"], ",", [1003, 873, 1234567, 2500.5, -4000]),
        (["$5", "-$1,003.50", "$0.25", "?", "$12"], ",", [5, -1003.5, 0.25, math.nan, 12]),
        (["12%", "3.5 %", "0%", "100%", "-1%"], ",", [12, 3.5, 0, 100, -1]),
        (["1.234,56 €", "99,5 €", "2.000 €", "7 €", "0,5 €"], ";", [1234.56, 99.5, 2000, 7, 0.5]),
        (["1,003", "1,234,567", "12", "873.5", "9"], "\t", [1003, 1234567, 12, 873.5, 9]),
        (["1'003", "12", "1'234'567", "5.5", "9"], ",", [1003, 12, 1234567, 5.5, 9]),
    ],
)
def test_numbers_as_people_write_them(cells: list[str], delimiter: str, read: list[float], tmp_path: Path) -> None:
    for seen in (cells, [*cells] * 10):
        table = scan(_column(tmp_path / "a.csv", "y", seen, delimiter), task="auto", target=["y"])
        assert table.columns.task == "regress"
        assert any(note.startswith("the cells of column 'y', such as ") for note in table.notes)
        block, _ = whole(table)
        assert np.array_equal(block.targets[: len(read), 0], read, equal_nan=True)
        # As a feature the same.
        assert np.array_equal(
            whole(scan(tmp_path / "a.csv", task="regress", target=["a"]))[0].features[: len(read), 0],
            read,
            equal_nan=True,
        )


@pytest.mark.parametrize(
    ("cells", "delimiter"),
    [
        (["12,5", "1,25", "3,75"], ","),  # decimal commas where commas part cells
        (["$5", "€5", "$7"], ","),
        (["5%", "0.5", "7"], ","),
        (["1.234,56", "1,234.56", "2.000,5"], ";"),
    ],
)
def test_numbers_that_can_be_read_in_two_ways_are_words_and_a_note_says_so(
    cells: list[str], delimiter: str, tmp_path: Path
) -> None:
    table = scan(_column(tmp_path / "a.csv", "y", cells * 10, delimiter), task="auto", target=["y"])
    assert table.columns.task == "classify"
    (note,) = (note for note in table.notes if "look like numbers" in note)
    assert note.startswith("column 'y' is read as words, though cells such as ")
    assert note.endswith("write all of them as 1234.5 to have them read so")
    assert scan(tmp_path / "a.csv", task="regress", target=["a"]).columns.features[0].kind == "category"


def test_words_dates_and_lists_are_no_numbers_with_signs(tmp_path: Path) -> None:
    for cells in (["a1,000", "b2"], ["31.5.2024", "1.6.2024"], ["10.0.0.1", "10.0.0.2"], ["0,003 m", "1"]):
        table = scan(_column(tmp_path / "a.csv", "k", cells * 10), task="regress", target=["a"])
        assert not table.columns.signs
        assert not any("look like numbers" in note for note in table.notes)


def test_commas_before_three_digits_that_may_be_decimal_signs_are_told(tmp_path: Path) -> None:
    table = scan(_column(tmp_path / "a.csv", "y", ["1,003", "2,500", "873"] * 10, ";"), task="regress", target=["y"])
    assert whole(table)[0].targets[:3, 0].tolist() == [1.003, 2.5, 873]
    assert any(note.startswith("the commas of column 'y' are read as decimal signs") for note in table.notes)
    table = scan(_column(tmp_path / "a.csv", "y", ["1,003", "2,5", "873"] * 10, ";"), task="regress", target=["y"])
    assert not any("commas" in note for note in table.notes)


WORDS = [
    f"{color},{size},{answer}" for color in ("red", "blue") for size in ("big", "small") for answer in ("no", "yes")
]


@pytest.mark.parametrize("first", ["", "id{},"])
def test_a_table_of_words_without_names_has_no_header(first: str, tmp_path: Path) -> None:
    rows = [first.format(row) + WORDS[row % 8] for row in range(40)]
    path = write(tmp_path / "a.csv", "\n".join(rows))
    names = [f"c{place}" for place in range(rows[0].count(",") + 1)]
    table = scan(path, task="auto", target=[names[-1]])
    assert (table.rows, table.columns.classes) == (40, ("no", "yes"))
    refused(path, "no column 'y'; choose from 'c0', 'c1'", "since no row holds names")
    # With names, were they repeated among the rows, it has one.
    header = ",".join("pqrs"[: len(names)])
    write(path, "\n".join([header, *rows, header, *rows]))
    assert scan(path, task="auto", target=["p"]).columns.features[0].name == "q"
    refused(path, "no column 'y'; choose from 'p', 'q'", ", its first row")


def test_files_without_rows_say_what_they_lack(tmp_path: Path) -> None:
    parquet.write_table(pyarrow.table({"y": pyarrow.array([], pyarrow.float64())}), tmp_path / "rows.parquet")
    parquet.write_table(pyarrow.table({}), tmp_path / "columns.parquet")
    refused(tmp_path / "rows.parquet", "has no rows")
    refused(tmp_path / "columns.parquet", "has no columns")
    for text in ('[{"y": 1},\n {"y": 2}]', " [[1, 2]]"):
        refused(write(tmp_path / "a.jsonl", text), "begins with a JSON array", "an object on each line")
    refused(write(tmp_path / "b.jsonl", '{"y":\n[1, 2]}'), "no line of", "is a JSON object")
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "rows.parquet").rename(folder / "a.parquet")
    write(folder / "b.csv", "y\n1\n2\n3\n")
    table = scan(folder, **FORECAST)
    assert table.rows == 3
    assert any("a.parquet is empty and left out" in note for note in table.notes)


def test_what_is_said_of_a_column_with_one_value_that_may_be_missing(tmp_path: Path) -> None:
    def notes(cells: list[str], target: str) -> str:
        content = "a,k,y\n" + "".join(f"{row},{cell},{row % 2}\n" for row, cell in enumerate(cells * 9))
        return "\n".join(scan(write(tmp_path / "x.csv", content), task="auto", target=[target]).notes)

    assert "column 'k' is constant" in notes(["DoS"], "y")
    said = notes(["DoS", "None"], "y")
    assert "column 'k' holds 'DoS' or is missing; 'None' stands for a missing value there" in said
    assert "constant" not in said
    assert "column 'k' holds '5' or is missing; nothing stands for a missing value there" in notes(["5", ""], "y")
    said = notes(["DoS", "None"], "k")
    assert "'None' is read as a class of target 'k'" in said
    assert "constant" not in said and "or is missing" not in said
    refused(
        write(tmp_path / "x.csv", "a,y\n1,DoS\n2,NA\n3,DoS\n"), "only one class, 'DoS'", "'NA' stands for a missing"
    )
