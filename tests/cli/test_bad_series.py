"""Wrong tables: one sentence and exit code 2 where nothing can be learned, counted and reported where something can."""

import gzip
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pliant.cli import main
from pliant.recipes import series

ROWS = 80
Capture = pytest.CaptureFixture[str]


def cells(rows: int = ROWS) -> list[list[str]]:
    draw = random.Random(0)
    found = []
    for _ in range(rows):
        a, b = draw.gauss(0, 1), draw.gauss(0, 1)
        found.append([f"{a:.3f}", f"{b:.3f}", draw.choice("uvw"), "yes" if a > 0 else "no"])
    return found


def table(path: Path, rows: list[list[str]] | None = None, names: str = "a,b,kind,y") -> Path:
    lines = [",".join(row) for row in (cells() if rows is None else rows)]
    path.write_text("\n".join([names, *lines]) + "\n")
    return path


def learn(data: Path, *more: str) -> int:
    target = [] if "--target" in more or "--stream" in more else ["--target", "y"]
    chosen = [*target, "--opponents", "no-change", "--chunk", "8", *more]
    where = [] if "--run" in more else ["--run", str(data.parent / "run")]
    return main(["learn", "series", "--data", str(data), *chosen, *where])


def refused(capsys: Capture, data: Path, *more: str) -> str:
    capsys.readouterr()
    assert learn(data, *more) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pliant: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


def kept(capsys: Capture, data: Path, *more: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """The summary and what was said; the problems in it are among what was said."""
    capsys.readouterr()
    assert learn(data, *more) == code
    err = capsys.readouterr().err
    assert "Traceback" not in err
    summary = json.loads((data.parent / "run" / "summary.json").read_text())
    for problem, count in summary["problems"].items():
        assert f"pliant: {problem}: {count:,}\n" in err
    if "--no-report" not in more:
        assert (data.parent / "run" / "report.html").stat().st_size > 1000
    return summary, err


# Fatal.


@pytest.mark.parametrize(
    ("content", "more", "says"),
    [
        (None, [], ["no", "bad.csv"]),
        ("", [], ["empty"]),
        ("\n\n", [], ["empty"]),
        ("a,b,kind,y\n", [], ["no rows"]),
        ("table", ["--target", "yy"], ["no column 'yy'", "nearest is 'y'", "'kind'"]),
        ("table", ["--features", "a", "bb"], ["no column 'bb'", "nearest is 'b'"]),
        ("table", ["--features", "a", "y"], ["target 'y' is also a feature"]),
        ("table", ["--group", "site"], ["no column 'site'"]),
        ("table", ["--time", "when"], ["no column 'when'"]),
        ("table", ["--time", "kind"], ["holds no times"]),
        ("table", ["--group", "y"], ["also the group"]),
        ("table", ["--task", "regress"], ["must hold numbers", "'yes'"]),
        ("table", ["--task", "guess"], ["--task"]),
        ("table", ["--horizon", "3"], ["must hold numbers"]),
        ("table", ["--horizon", "0"], ["--horizon is 0"]),
        ("table", ["--delay", "-1"], ["--delay is -1"]),
        ("table", ["--chunk", "0"], ["--chunk is 0", "1 to 4096"]),
        ("table", ["--window", "0"], ["--window is 0"]),
        ("table", ["--size", "17"], ["--size is 17"]),
        ("table", ["--rows", "1"], ["--rows is 1"]),
        ("table", ["--retrain", "0"], ["--retrain is 0"]),
        ("table", ["--season", "0"], ["--season is 0"]),
        ("table", ["--lr", "nan"], ["--lr is nan"]),
        ("table", ["--lr", "0"], ["--lr is 0"]),
        ("table", ["--save-every", "0"], ["--save-every is 0"]),
        ("table", ["--opponents", "fate"], ["fate"]),
        ("table", ["--chunks", "3"], ["'--chunk'"]),
        ("table", ["--stream", "lectricity"], ["'lectricity'", "electricity"]),
        ("table", ["--stream", "electricity"], ["electricity.csv"]),
        ("table", ["--stream", "regimes", "--target", "y"], ["target of its own", "--target"]),
        ("table", ["--stream", "electricity", "--group", "x"], ["electricity", "target of its own", "--group"]),
        ("table", ["--stream", "electricity", "--features", "x"], ["--features"]),
        ("table", ["--stream", "weather", "--time", "x"], ["--time"]),
        ("table", ["--stream", "ett", "--season", "7"], ["--season"]),
        ("table", ["--stream", "ett", "--task", "regress"], ["--task"]),
        ("table", ["--stream", "regimes", "--concat"], ["--concat"]),
        ("table", ["--stream", "electricity", "--horizon", "3"], ["electricity is not to forecast", "--horizon"]),
        ("table", ["--stream", "drifting", "--horizon", "1"], ["--horizon"]),
        ("table", ["--stream", "regimes"], ["regimes is not read from a folder", "--data"]),
        ("table", ["--stream", "replay:x.csv", "--target", "y"], ["replay:x.csv", "--data"]),
        ("table", ["--stream", "replay:", "--target", "y"], ["names no file", "replay:FILE"]),
        ("table", ["--target", "a", "--horizon", "80"], ["at row 81", "end with row 80"]),
        ("table", ["--target", "a", "--horizon", "50", "--delay", "30"], ["at row 81", "end with row 80"]),
        ("table", ["--target", "a", "--horizon", "20", "--rows", "20"], ["at row 21", "end with row 20"]),
        ("table", ["--delay", "79"], ["at row 81", "end with row 80"]),
        ("table", ["--target", "a", "--group", "kind", "--horizon", "40"], ["at row 41", "largest group ends with"]),
        ("a,b,kind,y\n1,2,u,yes\n2,3,v,no\n", ["--group", "kind"], ["at row 2", "largest group ends with row 1"]),
        ("a,b,kind,y\n1,2,u,yes\n2,3,v,yes\n", [], ["only one class", "'yes'"]),
        ("a,b,kind,y\n1,2,u,\n2,3,v,\n", [], ["missing"]),
        ("a,a,kind,y\n1,2,u,yes\n2,3,v,no\n", [], ["more than one column called 'a'"]),
        (b"\x00\x01\x02\x03\x04\xff\xfe" * 50, [], ["binary"]),
    ],
)  # fmt: skip
def test_one_sentence_names_what_is_wrong(
    content: str | bytes | None, more: list[str], says: list[str], tmp_path: Path, capsys: Capture
) -> None:
    data = tmp_path / "bad.csv"
    if content == "table":
        table(data)
    elif content is not None:
        data.write_bytes(content if isinstance(content, bytes) else content.encode())
    said = refused(capsys, data, *more)
    for part in says:
        assert part in said
    # Nothing has begun.
    assert not (tmp_path / "run").exists()


def test_what_is_missing_altogether_is_asked_for(capsys: Capture, tmp_path: Path) -> None:
    for arguments, says in (([], "--data FILE"), (["--data", str(table(tmp_path / "t.csv"))], "--target COLUMN")):
        assert main(["learn", "series", *arguments]) == 2
        assert says in capsys.readouterr().err


def test_a_stream_by_name_honours_or_refuses_every_option() -> None:
    rows = series.source(series.SeriesConfig(stream="regimes", rows=300, delay=4, label_as_input=False))
    assert (rows.columns.lag, rows.columns.label_as_input, rows.rows) == (5, False, 300)


def test_files_of_a_folder_without_the_target(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "data").mkdir()
    table(tmp_path / "data" / "a.csv")
    table(tmp_path / "data" / "b.csv", names="a,b,kind,z")
    said = refused(capsys, tmp_path / "data")
    assert "b.csv has no column 'y'" in said


def test_a_folder_without_tables(tmp_path: Path, capsys: Capture) -> None:
    (tmp_path / "data").mkdir()
    assert "holds no table" in refused(capsys, tmp_path / "data")
    (tmp_path / "data" / "notes.md").write_text("nothing")
    assert "holds no table" in refused(capsys, tmp_path / "data")


# Counted.


def alter(change: Callable[[list[list[str]]], None]) -> list[list[str]]:
    rows = cells()
    change(rows)
    return rows


def put(places: dict[int, tuple[int, str]]) -> Callable[[list[list[str]]], None]:
    def change(rows: list[list[str]]) -> None:
        for row, (column, cell) in places.items():
            rows[row][column] = cell

    return change


@pytest.mark.parametrize(
    ("change", "problems", "answers"),
    [
        (put({5: (0, "much"), 40: (1, "1_000")}), {"cell that is no number (read as missing)": 2}, 80),
        (put({5: (0, "inf"), 6: (0, "-inf"), 7: (1, "1e999"), 8: (0, "nan")}),
         {"value that is not finite (read as missing)": 3}, 80),
        (put({3: (3, ""), 50: (3, "?")}), {"missing label (not scored)": 2}, 78),
        (lambda rows: rows[9].pop(), {"row with too few or too many cells (left out)": 1}, 79),
        (lambda rows: rows[20].append("more"), {"row with too few or too many cells (left out)": 1}, 79),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_cell_or_a_row_is_counted(
    change: Any, problems: dict[str, int], answers: int, tmp_path: Path, capsys: Capture
) -> None:
    summary, _ = kept(capsys, table(tmp_path / "t.csv", alter(change)), "--no-report")
    assert summary["problems"] == problems
    assert summary["answers"] == answers


def timed(moments: list[str]) -> list[list[str]]:
    return [[moment, *row] for moment, row in zip(moments, cells(len(moments)), strict=True)]


def hours(count: int) -> list[str]:
    return [f"2024-01-{1 + i // 24:02d}T{i % 24:02d}:00" for i in range(count)]


def test_a_duplicate_time_is_counted(tmp_path: Path, capsys: Capture) -> None:
    moments = hours(60)
    moments[31] = moments[30]
    moments[40] = "soon"
    data = table(tmp_path / "t.csv", timed(moments), "when,a,b,kind,y")
    summary, _ = kept(capsys, data, "--time", "when", "--no-report")
    assert summary["problems"] == {"duplicate time": 1, "time that cannot be read (row kept)": 1}
    assert summary["answers"] == 60


def test_a_time_that_goes_back_ends_the_run_and_keeps_what_came_before(tmp_path: Path, capsys: Capture) -> None:
    moments = hours(60)
    moments[50] = moments[10]
    data = table(tmp_path / "t.csv", timed(moments), "when,a,b,kind,y")
    summary, err = kept(capsys, data, "--time", "when", code=2)
    assert summary["answers"] == 50
    assert "line 52" in summary["stopped"]
    assert err.splitlines()[-1] == f"pliant: {summary['stopped']}"
    records = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert records[-1]["answers"] == 50
    assert any((tmp_path / "run" / "lives").iterdir())


def test_a_gzip_that_ends_early(tmp_path: Path, capsys: Capture) -> None:
    rows = cells(3000)
    whole = "\n".join(["a,b,kind,y", *(",".join(row) for row in rows)]).encode()
    data = tmp_path / "t.csv.gz"
    packed = gzip.compress(whole)
    data.write_bytes(packed[: len(packed) // 3])
    summary, err = kept(capsys, data, "--chunk", "64", "--no-report", code=2)
    assert 100 < summary["answers"] < 2000
    assert "breaks off" in summary["stopped"]
    assert "breaks off" in err


def test_constant_columns_and_a_target_that_stays(tmp_path: Path, capsys: Capture) -> None:
    rows = [["7", b, "u", "3.5"] for _, b, _, _ in cells()]
    summary, err = kept(capsys, table(tmp_path / "t.csv", rows), "--task", "regress", "--no-report")
    assert summary["answers"] == ROWS
    assert "column 'a' is constant" in err
    assert summary["members"]["pliant"]["error"] == pytest.approx(0, abs=0.5)


def test_plasticity_is_not_told_of_numbers(tmp_path: Path, capsys: Capture) -> None:
    data, run = table(tmp_path / "t.csv", [[a, b, "u", b] for a, b, _, _ in cells()]), tmp_path / "run"
    assert main(["learn", "series", "--data", str(data), "--target", "y", "--plasticity", "--run", str(run)]) == 2
    assert "--plasticity is told of classes" in capsys.readouterr().err and not run.exists()


def test_categories_only(tmp_path: Path, capsys: Capture) -> None:
    rows = [[kind, y] for _, _, kind, y in cells()]
    summary, err = kept(capsys, table(tmp_path / "t.csv", rows, "kind,y"), "--no-report")
    assert summary["answers"] == ROWS
    assert "zero-element" not in err


@pytest.mark.slow
def test_very_many_categories(tmp_path: Path, capsys: Capture) -> None:
    rows = [["1", str(i % 7), f"name {i}", "yes" if i % 3 else "no"] for i in range(100_000)]
    summary, err = kept(capsys, table(tmp_path / "t.csv", rows), "--chunk", "1024", "--rows", "4096")
    assert summary["answers"] == 4096
    assert "more than 256 categories" in err
    assert (tmp_path / "run" / "schema.json").stat().st_size < 10_000


def test_classes_that_are_too_many(tmp_path: Path, capsys: Capture) -> None:
    rows = [["1", "2", "u", f"name {i}"] for i in range(1200)]
    assert "more than 1000 classes" in refused(capsys, table(tmp_path / "t.csv", rows))


def test_mixed_encodings(tmp_path: Path, capsys: Capture) -> None:
    rows = cells()
    data = table(tmp_path / "t.csv", rows)
    lines = data.read_bytes().split(b"\n")
    lines[5] = (
        lines[5]
        .replace(b",u,", b",v,")
        .replace(b",w,", b",v,")
        .replace(b",v,", "ü".encode("latin-1").join([b",", b","]))
    )
    lines[9] = "1,2,ü,yes".encode()
    lines[11] = b"1,2,\x00u,no"
    data.write_bytes(b"\n".join(lines))
    summary, _ = kept(capsys, data, "--no-report")
    assert summary["problems"] == {"undecodable bytes (replaced)": 1, "NUL bytes (left out)": 1}
    assert summary["answers"] == ROWS


def test_nothing_in_a_table_gets_into_the_page_as_markup_or_a_formula(tmp_path: Path, capsys: Capture) -> None:
    evil = "<script>alert(1)</script>"
    rows = [[a, b, '=HYPERLINK("http://x")', f"{evil}{y}"] for a, b, _, y in cells()]
    rows[3][2] = "<b>bold</b>"
    quoted = [[a, b, '"' + kind.replace('"', '""') + '"', y] for a, b, kind, y in rows]
    names = f"{evil},<img src=x onerror=1>,=1+1,y"
    summary, _ = kept(capsys, table(tmp_path / "t.csv", quoted, names))
    assert summary["answers"] == ROWS
    page = (tmp_path / "run" / "report.html").read_text()
    for raw in ("<script>alert", "<img src=x", "<b>bold"):
        assert raw not in page


def test_groups_with_evil_names(tmp_path: Path, capsys: Capture) -> None:
    rows = [[a, b, ("<i>x</i>", "../up", "")[i % 3], y] for i, (a, b, _, y) in enumerate(cells())]
    summary, _ = kept(capsys, table(tmp_path / "t.csv", rows), "--group", "kind")
    assert set(summary["groups"]) == {"<i>x</i>", "../up", ""}
    assert "<i>x" not in (tmp_path / "run" / "report.html").read_text()


# Going on.


def test_a_run_is_not_resumed_over_other_data_or_with_another_config(tmp_path: Path, capsys: Capture) -> None:
    data, run = table(tmp_path / "t.csv"), tmp_path / "run"
    assert learn(data, "--no-report") == 0
    before = (run / "records.jsonl").read_bytes()
    assert "--resume" in refused(capsys, data)
    said = refused(capsys, data, "--resume", "--lr", "0.5", "--seed", "7")
    assert "lr was None, now 0.5" in said
    assert "seed was 0, now 7" in said
    assert "chunk" not in said
    table(data, cells(ROWS + 1))
    assert "the data of" in refused(capsys, data, "--resume")
    table(data, names="a,b,sort,y")
    assert "have changed" in refused(capsys, data, "--resume")
    data.unlink()
    assert "t.csv" in refused(capsys, data, "--resume")
    table(data)
    assert main(["learn", "series", "--resume", "--run", str(run), "--no-report"]) == 0
    assert (run / "records.jsonl").read_bytes() == before
    capsys.readouterr()
    assert main(["learn", "digits", "--resume", "--run", str(run)]) == 2
    assert "learn series" in capsys.readouterr().err
