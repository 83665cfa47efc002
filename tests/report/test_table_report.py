"""The page about a stream of table rows."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from pliant.report import write_report
from pliant.report.labels import label_points
from pliant.report.load import Total
from pliant.report.paint import Point, any_size, count_answers
from pliant.report.style import COLORS, DASHES, STRANGER, color_of
from pliant.report.values import amount
from tests.report.pages import CLASSES, NUMBERS, Page, check, make_table_run, write, write_lines

EVIL = ("<script>alert(1)</script>", "$x^2$", "\u200f\u202eabc\u0000", "a" * 10_000, "\ud800 ]]> -- {{ 7*7 }}",
        "'\"><img src=x onerror=alert(1)>")  # fmt: skip
JUNK = (None, 7, -1, True, math.nan, math.inf, 1e308, 10**400, "many", [], {}, [None], [[1]], {"a": None},
        {"answers": "x"}, [{"answers": -1, "level": "x", "inside": None, "count": math.nan}])  # fmt: skip


def report(folder: Path) -> Page:
    return check(write_report([folder]).read_text())


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    write(path, json.loads(path.read_text()) | values)


def test_classes_have_every_figure_and_table(tmp_path: Path) -> None:
    page = report(make_table_run(tmp_path / "run"))
    assert sum(tag == "svg" for tag, _ in page.tags) == 7
    assert "pliant saved 800 bits against no-change over 4,000 answers (0.20 per answer), accuracy 0.90" in page.text
    assert "pliant learn series: demand in power.csv (classify)" in page.text
    for words in (
        "No-change is right 85% of the time here: this stream rewards predicting persistence",
        "a change was detected by adwin, after answer 1,000, 2,500",
        "change detected",
        "Drift of features",
        "Reliability",
        "The labels came late.",
        "group 0 900 +0.100 0.900",
        "a row was short 12 a cell held text where a number was expected 7",
        "Milliseconds to predict, pliant: median, 99th and 99.9th percentile 0.200, 0.400, 1.90",
        "Milliseconds to learn, pliant: median, 99th and 99.9th percentile 0.350, 6.50, 11.0",
        "Rows per second 250",
    ):
        assert words in page.text
    assert "Coverage" not in page.text and "Absolute error" not in page.text


def test_numbers_have_errors_and_coverage(tmp_path: Path) -> None:
    page = report(make_table_run(tmp_path / "run", numbers=True))
    assert sum(tag == "svg" for tag, _ in page.tags) == 7
    assert (
        "pliant saved 3,600 bits against no-change over 4,000 answers (0.90 per answer), absolute error 11.0, "
        "0.55 times that of no-change; retrained every 2,000 saved 0.60 per answer"
    ) in page.text
    assert "pliant learn series: demand in power.csv (forecast, horizon 24)" in page.text
    for words in ("Coverage", "Lower is better", "Error relative to no-change", "0.550", "group 0 900 +0.100 5.00"):
        assert words in page.text
    for words in ("ccuracy", "Reliability", "No-change is right"):
        assert words not in page.text


def test_errors_of_an_unfinished_run_come_from_its_records(tmp_path: Path) -> None:
    folder = make_table_run(tmp_path / "run", numbers=True)
    (folder / "summary.json").unlink()
    text = report(folder).text
    assert "4,000 answers so far (0.90 per answer), absolute error 11.0, 0.55 times that of no-change" in text
    assert "Coverage" not in text


def test_an_opponent_with_fewer_bits_is_named_for_numbers_too(tmp_path: Path) -> None:
    folder = make_table_run(tmp_path / "run", numbers=True)
    members = json.loads((folder / "summary.json").read_text())["members"]
    members["seasonal"]["bits_saved"] = 9_999
    change(folder, "summary.json", members=members)
    assert "seasonal saved 2.50 per answer, more than ours," in report(folder).text


def test_persistence_is_spoken_of_only_where_it_holds(tmp_path: Path) -> None:
    folder = make_table_run(tmp_path / "run")
    members = json.loads((folder / "summary.json").read_text())["members"]
    for accuracy, words in ((0.998, "No-change is right 99.8% of the time"), (0.8, ""), (None, "")):
        members["no-change"]["accuracy"] = accuracy
        change(folder, "summary.json", members=members)
        text = report(folder).text
        assert words in text and bool(words) == ("No-change is right" in text)


@pytest.mark.parametrize("numbers", [False, True])
def test_every_part_may_be_missing(tmp_path: Path, numbers: bool) -> None:
    folder = make_table_run(tmp_path / "run", numbers=numbers, windows=3)
    whole = json.loads((folder / "summary.json").read_text())
    write(folder / "config.json", {"schema": 1, "command": "learn series", "config": {}})
    write(folder / "summary.json", {"members": {name: {} for name in whole["members"]}})
    assert "has no finite score" not in report(folder).text.split("Bits saved")[0]
    (folder / "summary.json").unlink()
    report(folder)
    (folder / "timing.jsonl").unlink()
    report(folder)
    write(folder / "summary.json", whole)
    (folder / "records.jsonl").unlink()
    text = report(folder).text
    assert "pliant saved" in text and "Groups" in text and ("Coverage" if numbers else "Reliability") in text
    assert "Drift of features" not in text
    assert "Seconds in all 16" in text


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: type(junk).__name__)
def test_every_part_may_be_malformed(tmp_path: Path, junk: Any) -> None:
    folder = make_table_run(tmp_path / "run", numbers=True, windows=3)
    told = json.loads((folder / "summary.json").read_text())
    told["members"]["frozen"] = dict.fromkeys(told["members"]["frozen"], junk)
    told["members"]["boosting"] = junk
    told["members"]["mean"]["coverage"] = [{"level": junk, "inside": junk}, {"level": 0.5, "inside": 0.5}]
    told |= {name: junk for name in told if name != "members"}
    write(folder / "summary.json", told)
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    rows[1] |= {name: junk for name in rows[1] if name not in ("answers", "members")}
    rows[1]["members"] = dict.fromkeys(rows[1]["members"], junk)
    rows[2]["drift"] = dict.fromkeys(rows[2]["drift"], junk)
    rows[2]["members"]["pliant"] = dict.fromkeys(rows[2]["members"]["pliant"], junk)
    write_lines(folder / "records.jsonl", [*rows, junk, rows[0] | {"answers": junk}])
    write_lines(folder / "timing.jsonl", [{"answers": 500, "session": 0, "seconds": junk, "cpu": junk}, junk,
                                          {"answers": junk, "session": junk, "seconds": 1, "rss": junk}])  # fmt: skip
    write(folder / "environment.json", junk)
    text = report(folder).text
    assert "nan" not in text.lower() and " inf" not in text.replace(" information", "")
    write(folder / "summary.json", junk)
    report(folder)


def test_numbers_and_brackets_without_end(tmp_path: Path) -> None:
    folder = make_table_run(tmp_path / "run", windows=3)
    change(
        folder, "config.json", config={"answers": "\N{SUPERSCRIPT TWO}", "retrain": "9" * 5000, "task": ["classify"]}
    )
    (folder / "summary.json").write_text("[" * 200_000)
    (folder / "environment.json").write_text('{"a": ' * 900 + "1" + "}" * 900)
    report(folder)
    (folder / "records.jsonl").write_text("[" * 200_000)
    assert "Nothing was recorded yet." in report(folder).text


@pytest.mark.parametrize("numbers", [False, True])
def test_names_of_a_table_are_text(tmp_path: Path, numbers: bool) -> None:
    folder = make_table_run(tmp_path / "run", numbers=numbers, windows=3)
    told = json.loads((folder / "summary.json").read_text())
    group = {"answers": 50, "bits_saved": 5.0, "accuracy": 0.5, "error": 1.0}
    told |= {"groups": dict.fromkeys(EVIL, group), "problems": dict.fromkeys(EVIL, 3), "notes": list(EVIL),
             "changes": [{"answers": 500, "name": name} for name in EVIL]}  # fmt: skip
    told["members"] |= dict.fromkeys(EVIL, told["members"]["frozen"])
    write(folder / "summary.json", told)
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for row in rows:
        row["drift"] = {name: 0.5 * index for index, name in enumerate(EVIL)}
        row["members"] |= dict.fromkeys(EVIL, row["members"]["frozen"])
    write_lines(folder / "records.jsonl", rows)
    write_lines(folder / "timing.jsonl", [{"answers": 500, "session": 0, "seconds": 1, "cpu": dict.fromkeys(EVIL, 1)}])
    change(folder, "config.json", config={"data": EVIL[0], "target": EVIL[1], "task": "classify"} | {EVIL[3]: EVIL[3]})
    path = write_report([folder])
    source, page = path.read_text(), check(path.read_text())
    assert page.text.count("$x^2$") > 5 and "<script>alert(1)" in page.text and "{{ 7*7 }}" in page.text
    assert not re.search("[\u200f\u202e\u0000\ud800]", source)
    assert "a" * 1001 not in source and len(source) < 600_000
    ours = max(len(text) for tag, text in _svg_texts(source))
    assert ours < 120


def _svg_texts(source: str) -> list[tuple[str, str]]:
    return re.findall(r"<(text)[^>]*>([^<]*)</text>", source)


def test_same_table_run_same_bytes(tmp_path: Path) -> None:
    runs = [make_table_run(tmp_path / "a"), make_table_run(tmp_path / "b", numbers=True)]
    first = write_report(runs, tmp_path / "page.html").read_bytes()
    assert write_report(runs, tmp_path / "page.html").read_bytes() == first


def test_errors_of_several_runs_are_compared_only_in_one_unit(tmp_path: Path) -> None:
    a, b, c = (make_table_run(tmp_path / name, numbers=name != "c") for name in "abc")
    config = json.loads((a / "config.json").read_text())["config"]
    change(b, "config.json", config=config | {"horizon": 48})
    page = check(write_report([a, b], tmp_path / "page.html").read_text())
    assert "shared-error-figure_1" in {attrs.get("id") for _, attrs in page.tags} and "horizon=24" in page.text
    change(b, "config.json", config=config | {"target": "price"})
    for runs in ([a, b], [a, c]):
        page = check(write_report(runs, tmp_path / "page.html").read_text())
        ids = {attrs.get("id") for _, attrs in page.tags}
        assert not ids & {"shared-error-figure_1", "shared-accuracy-figure_1"} and "shared-bits-figure_1" in ids


def test_drift_stays_small_and_keeps_what_moved_most(tmp_path: Path) -> None:
    folder = make_table_run(tmp_path / "run", windows=450, features=60)
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for row in rows:
        row["drift"] |= {"moved": math.inf if row["answers"] > 5000 else 0.0, "never": None, "still": 0.0}
    write_lines(folder / "records.jsonl", rows)
    source = write_report([folder]).read_text()
    picture = next(svg for svg in re.findall(r"<svg.*?</svg>", source, re.DOTALL) if "Drift of features" in svg)
    texts = [text for _, text in _svg_texts(picture)]
    assert texts.count("moved") == 1 and "still" not in texts and "never" not in texts
    assert sum(text.startswith("feature ") for text in texts) == 29
    text = check(source).text
    assert "A column is the mean of 3 windows." in text and "32 features that moved less are left out." in text
    assert "<image" not in picture and picture.count("<path") < 120


def test_drift_that_is_never_known_is_left_out(tmp_path: Path) -> None:
    folder = make_table_run(tmp_path / "run", windows=1)
    assert "Drift of features" not in report(folder).text


def test_only_the_largest_groups_are_listed(tmp_path: Path) -> None:
    text = report(make_table_run(tmp_path / "run", windows=3, groups=77)).text
    assert "group 49 851" in text and "group 50" not in text and "The 27 smallest are left out." in text
    assert text.index("group 1 899") < text.index("group 2 898") < text.index("group 10 890")


def test_members_are_told_apart() -> None:
    for members in (CLASSES, NUMBERS):
        assert set(members) <= set(COLORS)
        colors = [color_of(name) for name in members]
        assert len(set(colors)) == len(colors) and STRANGER not in colors
    assert color_of("somebody") == STRANGER and set(DASHES) <= set(COLORS)


def test_names_of_nine_points_do_not_collide() -> None:
    figure = Figure(figsize=(5.4, 3.7))
    axes = figure.add_axes((0.15, 0.14, 0.79, 0.78))
    axes.set_xscale("log")
    axes.set_xlim(0.05, 2000)
    axes.set_ylim(-1, 1)
    costs = (40.0, 0.4, 0.2, 0.6, 24.0, 437.0, 280.0, 50.0, 320.0)
    scores = (0.87, -0.98, 0.0, 0.72, -0.15, 0.57, 0.67, 0.32, 0.52)
    points = [
        Point(name, Total(saved_per_answer=score, cpu=cost), color_of(name), name == "pliant")
        for name, score, cost in zip(NUMBERS, scores, costs, strict=True)
    ]
    label_points(axes, points)
    renderer = FigureCanvasAgg(figure).get_renderer()
    for text in axes.texts:
        text.update_positions(renderer)
    boxes = [Text.get_window_extent(text, renderer).padded(-1.5) for text in axes.texts]  # without leaders
    assert len(boxes) == 9
    assert not [(a, b) for a in range(9) for b in range(a) if boxes[a].overlaps(boxes[b])]


def test_numbers_of_any_size_are_short() -> None:
    values = (0.0, 0.00012345, 0.012345, 1.0, 12.345, 999.96, 123456.7, 1.5e13, -2.5, math.nan)
    assert [amount(value) for value in values] == [
        "0", "0.000123", "0.0123", "1.00", "12.3", "1,000", "123,457", "1.5e+13", "\N{MINUS SIGN}2.50", "\N{EN DASH}",
    ]  # fmt: skip
    ticks = (0.0, 0.25, 2500.0, 25_000.0, 1e6, 2.5e9, 1e15, 1e-7)
    assert [any_size(tick) for tick in ticks] == ["0", "0.25", "2500", "25k", "1M", "2.5G", "1e+15", "1e-07"]


@pytest.mark.parametrize("answers", [1, 2, 3, 7, 50, 12_345])
def test_the_axis_of_answers_names_each_whole_number_once(answers: int) -> None:
    axes = Figure().add_subplot()
    axes.set_xlim(0, answers)
    count_answers(axes)
    axes.figure.canvas.draw()
    names = [label.get_text() for label in axes.get_xticklabels()]
    assert len(set(names)) == len(names) > 1
    assert [float(name.replace(",", "")) for name in names] == axes.get_xticks().tolist()
