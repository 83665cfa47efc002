"""Lines in, lines out: what is answered, what is refused, and that a stop is not seen afterwards."""

import copy
import csv
import io
import itertools
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from pliant.cli import main
from pliant.core import UsageError
from pliant.core.pack import differences, unpack_file
from pliant.core.run import Run
from pliant.learn.life import read_life, saved_lives
from pliant.recipes import series, wire
from pliant.recipes.live import LEVELS, Lines, Live, load, save
from pliant.streams._series import Series
from tests.strict import strict

ROWS, MORE, HORIZON = 240, 60, 3


def table(kind: str, rows: int = ROWS + MORE) -> list[dict[str, str]]:
    draw = random.Random(kind)
    found = []
    for i in range(rows):
        a, b, c = draw.gauss(0, 1), draw.gauss(0, 1), draw.choice("uvw")
        row = {"a": f"{a:.3f}", "b": f"{b:.3f}", "c": c}
        if kind == "classes":
            row["y"] = "yes" if a + b > 0 else "no"
        elif kind == "forecast":
            row = {"when": f"2024-01-{1 + i // 24:02d} {i % 24:02d}:00", **row, "y": f"{i % 7 + a / 9:.3f}"}
        else:
            row |= {"site": draw.choice("NS"), "y": f"{2 * a - b:.3f}", "z": f"{b:.3f}"}
        found.append(row)
    return found


def write(path: Path, rows: list[dict[str, str]]) -> Path:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


class Made(NamedTuple):
    """A run over the first rows of a table, whose other rows come live."""

    folder: Path
    rows: list[dict[str, str]]

    def live(self, **options: Any) -> Live:
        return Live(Run(self.folder), **options)

    @property
    def more(self) -> list[dict[str, str]]:
        return self.rows[ROWS:]


OPTIONS = {
    "classes": ["--target", "y", "--delay", "2"],
    "forecast": ["--target", "y", "--horizon", str(HORIZON)],
    "groups": ["--target", "y", "z", "--group", "site", "--task", "regress"],
}


CONFIGS: dict[str, dict[str, Any]] = {
    "classes": {"target": ("y",), "delay": 2},
    "forecast": {"target": ("y",), "horizon": HORIZON},
    "groups": {"target": ("y", "z"), "group": "site", "task": "regress"},
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Made]:
    done: dict[str, Made] = {}

    def make(kind: str) -> Made:
        if kind not in done:
            folder, rows = tmp_path_factory.mktemp(kind), table(kind)
            data = write(folder / "data.csv", rows)
            arguments = ["--data", str(data), "--rows", str(ROWS), "--opponents", "no-change", "--no-report", "--json"]
            assert main(["learn", "series", *arguments, *OPTIONS[kind], "--run", str(folder / "run")]) == 0
            done[kind] = Made(folder / "run", rows)
        return done[kind]

    return make


@pytest.fixture
def classes(made: Callable[[str], Made], capsys: pytest.CaptureFixture[str]) -> Made:
    return made("classes")


@pytest.fixture
def forecast(made: Callable[[str], Made], capsys: pytest.CaptureFixture[str]) -> Made:
    return made("forecast")


@pytest.fixture
def groups(made: Callable[[str], Made], capsys: pytest.CaptureFixture[str]) -> Made:
    return made("groups")


def features(row: dict[str, str], *without: str) -> dict[str, str]:
    return {name: cell for name, cell in row.items() if name not in ("y", "z", "site", *without)}


# What is said.


def test_a_class_is_told_by_probabilities(classes: Made) -> None:
    said = classes.live().reply({"id": 7, "x": {"a": 1.5, "b": "0.2", "c": "u"}})
    assert said is not None
    assert said["id"] == 7
    assert list(said["p"]) == ["no", "yes"]
    assert sum(said["p"].values()) == pytest.approx(1)
    assert said["p"]["yes"] > 0.5


def is_number(told: dict[str, Any]) -> None:
    assert set(told) == {"mean", "quantiles"}
    quantiles = list(told["quantiles"].values())
    assert list(told["quantiles"]) == list(map(str, LEVELS))
    assert quantiles == sorted(quantiles)
    assert quantiles[0] < told["mean"] < quantiles[-1]


def test_a_number_is_told_by_its_mean_and_quantiles(forecast: Made, groups: Made) -> None:
    one = forecast.live().reply({"id": "x", "x": features(forecast.more[0])})
    assert one is not None
    is_number({name: value for name, value in one.items() if name != "id"})
    several = groups.live().reply({"id": "x", "x": features(groups.more[0]), "group": "N"})
    assert several is not None
    assert set(several) == {"id", "y", "z"}
    is_number(several["y"])
    is_number(several["z"])


def test_a_late_answer_is_known_from_then_on(classes: Made) -> None:
    live = classes.live()
    asked = []
    predict = live.learner.predict
    live.learner.predict = lambda question: asked.append(question.inputs[0, 0, -1].item()) or predict(question)  # type: ignore[method-assign]
    ask = lambda name, **more: live.reply({"id": name, "x": features(classes.more[0]), **more})  # noqa: E731
    before = live.known[0]
    ask(0)
    ask(1)
    assert live.reply({"id": 1, "y": "yes"}) is None
    ask(2)
    assert live.reply({"id": 0, "y": "no"}) is None  # older than what is known
    ask(3, y="no")
    ask(4)
    assert asked == [*before, *before, 1, 1, 0]
    summary = live.summary()
    assert (summary["asked"], summary["answered"], summary["waiting"], summary["scored"]) == (5, 3, 2, 3)
    assert summary["bits"] > 0


def test_a_forecast_is_answered_by_the_value_some_rows_on(forecast: Made) -> None:
    live = forecast.live(learn=True)
    for i, row in enumerate(forecast.more[:20]):
        live.reply({"id": i, "x": features(row) | {"y": float(row["y"])}})
        assert list(live.waiting) == [str(k) for k in range(max(0, i - HORIZON + 1), i + 1)]
    assert live.summary()["answered"] == 20 - HORIZON
    # What is said outright is right too, and its own value then answers nothing twice.
    live.reply({"id": 19, "y": 3.5})
    assert "19" not in live.waiting
    for i in range(20, 24):
        live.reply({"id": i, "x": features(forecast.more[i]) | {"y": forecast.more[i]["y"]}})
    assert live.summary()["answered"] == 24 - HORIZON
    # A missing value answers nothing.
    live.reply({"id": 24, "x": features(forecast.more[24]) | {"y": None}})
    assert "21" in live.waiting


@pytest.mark.parametrize("kind", ["classes", "forecast", "groups"])
def test_live_rows_are_seen_as_the_file_would_have_shown_them(
    kind: str, made: Callable[[str], Made], capsys: pytest.CaptureFixture[str]
) -> None:
    here = made(kind)
    live, reference = here.live(), here.live().learner
    asked: list[Any] = []
    predict = live.learner.predict
    live.learner.predict = lambda question: asked.append(question) or predict(question)  # type: ignore[method-assign]
    config = series.SeriesConfig(data=str(here.folder.parent / "data.csv"), **CONFIGS[kind])
    rows = series.source(config)
    stream = Series(rows, chunk=1, ahead=live.horizon)
    expected = []
    while batch := stream.send(None):
        if batch.question is not None:
            expected.append(batch.question)
    expected = expected[ROWS:]
    lag, late = live.columns.lag, 0
    for i, row in enumerate(here.more):
        message: dict[str, Any] = {"id": i, "x": features(row)}
        if kind == "forecast":
            message["x"]["y"] = row["y"]
        elif kind == "groups":
            message |= {"group": row["site"], "y": [row["y"], row["z"]]}
        elif i >= lag:
            assert live.reply({"id": i - lag, "y": here.more[i - lag]["y"]}) is None
        said = live.reply(message)
        assert said is not None
        late = lag if kind == "classes" else 0  # the run's last labels are known at once
        if i < late:
            reference.predict(asked[-1])
            continue
        assert differences(tuple(asked[-1]._replace(time=0)), tuple(expected[i]._replace(time=0))) == []
        output = reference.predict(asked[-1])[0, 0]
        assert said == {"id": i, **live._say(output)}


def test_nothing_moves_but_the_memory_unless_it_is_to_learn(classes: Made) -> None:
    for learn in (False, True):
        live = classes.live(learn=learn)
        before = copy.deepcopy(live.learner.state_dict())
        for i, row in enumerate(classes.more):
            live.reply({"id": i, "x": features(row), "y": row["y"]})
        after = live.learner.state_dict()
        moved = {name.split(".")[0] for name in differences(before, after)}
        assert ({"model", "optimizer", "updates"} <= moved) == learn
        assert ({"model", "optimizer", "updates", "generator", "keep"} & moved == set()) != learn
        # An update takes as many answers as it took in the run.
        assert live.summary()["updates"] - before["updates"] == (len(classes.more) // live.shape.chunk if learn else 0)


def test_a_new_group_is_a_fresh_stream_and_leaves_the_others_alone(groups: Made) -> None:
    plain, live = groups.live(), groups.live()
    row = features(groups.more[0])
    fresh = [live.reply({"id": f"new {i}", "x": row, "group": f"G{i}"}) for i in range(9)]
    assert len(live.groups) == 11
    assert live.learner.streams >= 11
    # All new ones are told the same, as nothing is known of any.
    assert len({json.dumps({k: v for k, v in said.items() if k != "id"}) for said in fresh if said}) == 1
    for name in "NSNN":
        asked = {"id": name, "x": row, "group": name, "y": [1, 2]}
        assert live.reply(dict(asked)) == plain.reply(dict(asked))


def test_ids_of_all_kinds_and_again_once_they_are_answered(classes: Made) -> None:
    live, row = classes.live(), features(classes.more[0])
    for name in (0, "0", 0.5, -3, "é\n", "", 10**30):
        said = live.reply({"id": name, "x": row})
        assert said is not None
        assert said["id"] == name
    live.reply({"id": "0", "y": "yes"})
    assert live.reply({"id": "0", "x": row}) is not None
    assert len(live.waiting) == 7


def test_at_most_so_many_rows_wait_and_then_the_oldest_is_forgotten(classes: Made) -> None:
    live, row = classes.live(), features(classes.more[0])
    live.learner.remember = 5
    for i in range(8):
        live.reply({"id": i, "x": row})
    assert list(live.waiting) == ["3", "4", "5", "6", "7"]
    assert live.summary()["forgotten"] == 3
    assert len(live.by_step) == 5
    assert live.learner.state_dict()["open"] == [entry.time for entry in live.waiting.values()]


def test_features_as_a_list_missing_and_unknown_ones_are_counted(classes: Made) -> None:
    one, two, row = classes.live(), classes.live(), classes.more[0]
    assert one.reply({"id": 1, "x": [row["a"], row["b"], row["c"]]}) == two.reply({"id": 1, "x": features(row)})
    assert one.summary() == two.summary()
    said = one.reply({"id": 2, "x": {"a": "much", "d": 3, "b": [1], "c": 10**400}})
    assert said is not None
    assert one.counts["feature that is no number (read as missing)"] == 2
    assert one.counts["feature that the model does not know (left out)"] == 1
    assert one.reply({"id": 3, "x": {}}) is not None
    assert one.reply({"id": 4, "x": {"a": 10**400, "b": 1e308, "c": None}}) is not None
    assert one.counts["feature that is no number (read as missing)"] == 4  # 1e308 too: beyond 1e100 is not finite


def test_what_is_not_finite_is_said_as_null(classes: Made, forecast: Made) -> None:
    for here in (classes, forecast):
        lines = Lines(here.live())
        predict = lines.live.learner.predict
        lines.live.learner.predict = lambda question, of=predict: of(question) * math.nan  # type: ignore[method-assign]
        said = strict(lines.take(json.dumps({"id": 1, "x": features(here.more[0])}).encode()) or "")
        assert said["p"]["yes"] is None if here is classes else said["mean"] is None


# What is refused.

ROW = {"a": 1, "b": 2, "c": "u"}
BAD: list[tuple[Any, str]] = [
    ("{", "JSON"),
    ("[" * 100_000, "JSON"),
    ('{"id": 1, "x": ' + "[" * 100_000, "JSON"),
    ("[1, 2]", "JSON"),
    ("7", "JSON"),
    ("a,b", "JSON"),
    ({}, "id"),
    ({"x": ROW}, "id"),
    ({"id": None, "x": ROW}, "id"),
    ({"id": True, "x": ROW}, "id"),
    ({"id": [1], "x": ROW}, "id"),
    ({"id": {}, "x": ROW}, "id"),
    ('{"id": NaN, "x": {"a": 1}}', "id"),
    ('{"id": 1e999, "x": {"a": 1}}', "id"),
    ({"id": 1}, "x, y or both"),
    ({"id": 1, "y": "yes"}, "no row with id 1"),
    ({"id": "w", "x": ROW}, "already waiting"),
    ({"id": "w", "y": "perhaps"}, "'perhaps' is none of the classes"),
    ({"id": "w", "y": ["yes", "no"]}, "y has 2 values"),
    ({"id": "w", "y": {"other": 1}}, "missing"),
    ({"id": "w", "y": " n/a "}, "missing"),
    ({"id": 1, "x": ROW, "y": "perhaps"}, "none of the classes"),
    ({"id": 1, "x": [1, 2]}, "x has 2 values, expected 3"),
    ({"id": 1, "x": "a"}, "x must be"),
    ({"id": 1, "x": None}, "x must be"),
    (b"\xff\xfe{}", "UTF-8"),
]


@pytest.mark.parametrize(("line", "says"), BAD, ids=[str(line)[:30] for line, _ in BAD])
def test_a_malformed_line_is_answered_by_an_error_and_changes_nothing(line: Any, says: str, classes: Made) -> None:
    lines = Lines(classes.live(learn=True))
    assert lines.take(json.dumps({"id": "w", "x": ROW}).encode()) is not None
    before = lines.live.state_dict()
    raw = line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
    said = json.loads(lines.take(raw) or "null")
    assert set(said) == {"error", "line"}
    assert said["line"] == 2
    assert says in said["error"]
    assert "\n" not in said["error"]
    assert differences(before, lines.live.state_dict()) == []
    assert (lines.count, lines.errors) == (2, 1)
    # And it goes on.
    assert "p" in json.loads(lines.take(json.dumps({"id": 2, "x": ROW}).encode()) or "null")


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"id": 1, "x": {"a": 1}}, "group"),
        ({"id": 1, "x": {"a": 1, "odd": 2}, "group": None}, "group"),
        ({"id": 1, "x": {"a": 1}, "group": {"N": 1}}, "group"),
        ({"id": 1, "x": {"a": 1}, "group": "N", "y": 5}, "y has 1 values, expected 2"),
        ({"id": 1, "x": {"a": 1}, "group": "N", "y": [5, "many"]}, "y: "),
        ({"id": 1, "x": {"a": 1}, "group": "N", "y": [5, 10**400]}, "y: "),
        ({"id": 1, "x": {"a": 1}, "group": "N", "y": {"y": 1}}, "missing"),
    ],
)
def test_a_malformed_line_about_groups_and_numbers(message: Any, says: str, groups: Made) -> None:
    lines = Lines(groups.live())
    before = lines.live.state_dict()
    said = json.loads(lines.take(json.dumps(message).encode()) or "null")
    assert says in said["error"]
    assert differences(before, lines.live.state_dict()) == []


@pytest.mark.parametrize("x", [{"y": "much"}, {"y": 10**400}, {"when": [1], "y": [3]}])
def test_a_malformed_value_in_a_forecast(x: Any, forecast: Made) -> None:
    lines = Lines(forecast.live())
    before = lines.live.state_dict()
    said = json.loads(lines.take(json.dumps({"id": 1, "x": x}).encode()) or "null")
    assert said["error"].startswith("x: ")
    assert differences(before, lines.live.state_dict()) == []
    assert "mean" in json.loads(lines.take(b'{"id": 1, "x": {"when": [1], "a": {}}}') or "null")


def test_more_groups_than_can_be_are_refused(groups: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pliant.recipes.live.MAX_GROUPS", 3)
    lines = Lines(groups.live())
    said = [lines.take(json.dumps({"id": name, "x": {}, "group": name}).encode()) or "" for name in "ABN"]
    assert ["error" in json.loads(line) for line in said] == [False, True, False]
    assert "3 already" in said[1]


# CSV.


def test_csv_names_the_group_as_the_run_does(groups: Made) -> None:
    one, two = Lines(groups.live()), Lines(groups.live())
    names = list(groups.more[0])
    assert one.take(",".join(names).encode()) is None
    assert two.take(",".join("group" if name == "site" else name for name in names).encode()) is None
    for row in groups.more[:5]:
        line = ",".join(str(row[name]) for name in names).encode()
        said = one.take(line)
        assert said is not None and "error" not in said
        assert said == two.take(line)


def test_csv_is_the_same_as_json(classes: Made, groups: Made) -> None:
    for here in (classes, groups):
        json_lines, csv_lines = Lines(here.live(learn=True)), Lines(here.live(learn=True))
        names = ["id", "group", *[name for name in here.more[0] if name != "site"]]
        assert csv_lines.take((",".join(names) + "\r").encode()) is None
        for i, row in enumerate(here.more):
            targets = [name for name in ("y", "z") if name in row]
            message: dict[str, Any] = {"id": f"r{i}", "x": features(row), "group": row.get("site")}
            known = i % 3 > 0
            cells = {"id": f"r{i}", "group": row.get("site", ""), **row} | ({} if known else dict.fromkeys(targets, ""))
            if known:
                message["y"] = [row[name] for name in targets]
            text = io.StringIO()
            csv.writer(text).writerow([cells[name] for name in names])
            assert csv_lines.take(text.getvalue().encode()) == json_lines.take(json.dumps(message).encode())
        assert differences(csv_lines.live.state_dict(), json_lines.live.state_dict()) == []


@pytest.mark.parametrize("delimiter", [";", "\t", "|", " "])
def test_the_delimiter_is_found_and_with_it_decimal_commas(delimiter: str, classes: Made, groups: Made) -> None:
    for here in (classes, groups):
        plain, other = Lines(here.live(learn=True)), Lines(here.live(learn=True))
        names = ["id", *here.more[0]]
        assert plain.take(",".join(names).encode()) is None
        assert other.take(delimiter.join(names).encode()) is None
        for i, row in enumerate(here.more[:9]):
            cells = [f"r{i}", *row.values()]
            if i == 5:
                cells[1] = ""
            if delimiter != " ":
                cells[2] = f' "{cells[2]}"' if i % 2 else f" {cells[2]}"
            said = plain.take(",".join(cells).encode())
            if delimiter == " ":
                cells = [cell or "?" for cell in cells]
            assert other.take(delimiter.join(cell.replace(".", ",") for cell in cells).encode()) == said
        assert differences(plain.live.state_dict(), other.live.state_dict()) == []


def test_numbers_with_units_and_grouped_thousands_are_read_as_in_the_run(groups: Made) -> None:
    plain, other = Lines(groups.live(learn=True)), Lines(groups.live(learn=True))
    other.live.columns = replace(other.live.columns, signs=(("a", "$."), ("b", "%,")))
    assert plain.take(b"id;group;a;b") is other.take(b"id;group;a;b") is None
    rows = [("1234.5", "$1.234,5", "12", "12 %"), ("-0.5", "- $0,5", "1003", "1,003%"), ("1.234", "$1,234", "?", "?")]
    for i, (a, a_dressed, b, b_dressed) in enumerate(rows):
        said = plain.take(f"{i};N;{a};{b}".encode())
        assert said is not None
        assert "error" not in said
        assert other.take(f"{i};N;{a_dressed};{b_dressed}".encode()) == said
    assert not other.live.counts - Counter({"asked": 3})
    said = plain.take(b"9;N;1003;5")
    assert other.live.reply({"id": "9", "group": "N", "x": {"a": "$1.003", "b": "5%"}}) == json.loads(said or "")


def test_a_header_is_cut_where_it_names_the_most_columns_of_the_run(classes: Made) -> None:
    for header, delimiter in (("a", ","), ("what is it,a,b", ","), ("x,y z;a;b", ";"), ("a b c", " ")):
        lines = Lines(classes.live())
        assert lines.take(header.encode()) is None
        assert lines.delimiter == delimiter
    lines = Lines(classes.live())
    assert "more than one column called 'a'" in (lines.take(b"a;b;a") or "")
    assert (lines.form, lines.take(b"\ta\tb\tc")) == (None, None)  # the first column has no name
    assert lines.header[0] == "column 1"
    assert "p" in json.loads(lines.take(b"\t\t\t") or "null")
    assert lines.take(b" ") is None


def test_categories_and_classes_keep_their_commas(classes: Made) -> None:
    lines, seen = Lines(classes.live()), []
    lines.live.reply = lambda message: seen.append(message) or {}  # type: ignore[method-assign]
    assert lines.take(b"a;c;y") is None
    assert lines.take(b"1,5;u,v;yes,no") is not None
    assert seen == [{"id": 2, "group": None, "x": {"a": 1.5, "c": "u,v"}, "y": ["yes,no"]}]


def test_csv_of_a_forecast_needs_nothing_but_the_rows(forecast: Made) -> None:
    lines = Lines(forecast.live())
    for row in csv.reader((forecast.folder.parent / "data.csv").read_text().splitlines()):
        if row[0] == "when" or row[0] >= "2024-01-11":
            lines.take(",".join(row).encode())
    assert lines.live.summary()["answered"] == MORE - HORIZON
    assert lines.errors == 0


def test_csv_that_cannot_be_understood(classes: Made) -> None:
    lines = Lines(classes.live())
    for bad in (b"1,2,3", b'"', b"x\ry", b"\xff", b'"' + b"x" * 200_000 + b'"', b"id,what"):
        assert "error" in json.loads(lines.take(bad) or "null"), bad[:20]
    assert lines.take(b"") is None
    assert lines.take("\ufeffa,c,b,id".encode()) is None
    before = lines.live.state_dict()
    for bad in (b"1,2", b"1,2,3,4,5", b"1\r2,u,3,4", b"x" * 200_000 + b",u,3,4"):
        assert "error" in json.loads(lines.take(bad) or "null"), bad[:20]
    assert differences(before, lines.live.state_dict()) == []
    one = json.loads(lines.take(b"0.5,u,-1,7") or "null")
    assert one == classes.live().reply({"id": "7", "x": {"a": 0.5, "b": -1, "c": "u"}})


# A stop is not seen afterwards.


def messages(here: Made, count: int = MORE) -> list[bytes]:
    """JSON lines: answers late, some missing, some before their row."""
    found, late = [], []
    for i in range(count):
        row = here.more[i % MORE]
        ask: dict[str, Any] = {"id": i, "x": features(row)}
        if "site" in row:
            ask["group"] = row["site"] if i % 11 else f"new {i}"
        found.append(ask)
        late.append({"id": i, "y": [row[name] for name in ("y", "z") if name in row]})
        if i % 4 == 3:
            found += [late[i - 1], late[i - 3], late[i]]
        if i % 7 == 0:
            found.append({"id": -1, "y": "?"})
    return [json.dumps(message).encode() for message in found]


@pytest.mark.parametrize("kind", ["classes", "groups", "forecast"])
@pytest.mark.parametrize("cut", [0, 1, 17, 80])
def test_a_state_that_is_saved_goes_on_to_the_bit(
    kind: str, cut: int, made: Callable[[str], Made], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    here = made(kind)
    whole, first, second = (Lines(here.live(learn=True)) for _ in range(3))
    lines = messages(here)
    expected = [whole.take(line) for line in lines]
    found = [first.take(line) for line in lines[:cut]]
    save(first, 1234, tmp_path / "state")
    assert load(second, tmp_path / "state") == 1234
    assert differences(first.state_dict(), second.state_dict()) == []
    found += [second.take(line) for line in lines[cut:]]
    assert found == expected
    assert differences(whole.state_dict(), second.state_dict()) == []


def test_a_state_that_does_not_fit_is_refused(classes: Made, groups: Made, tmp_path: Path) -> None:
    lines = Lines(groups.live())
    save(lines, 0, tmp_path / "state")
    with pytest.raises(UsageError, match="other columns"):
        load(Lines(classes.live()), tmp_path / "state")
    data = (tmp_path / "state").read_bytes()
    for bad in (b"", b"{}", data[:-1], data[: len(data) // 2], data + b" "):
        (tmp_path / "state").write_bytes(bad)
        with pytest.raises(UsageError, match="cannot be read as a state"):
            load(lines, tmp_path / "state")
    with pytest.raises(UsageError, match="cannot be written"):
        save(lines, 0, tmp_path / "none" / "state")


def test_the_last_life_is_not_touched(classes: Made) -> None:
    before = {path: path.read_bytes() for path in classes.folder.rglob("*") if path.is_file()}
    lines = Lines(classes.live(learn=True))
    for line in messages(classes):
        lines.take(line)
    assert before == {path: path.read_bytes() for path in classes.folder.rglob("*") if path.is_file()}
    assert read_life(saved_lives(classes.folder / "lives")[0]) is not None


# Where lines come from.


def served(data: bytes, pieces: list[int], offset: int = 0) -> tuple[list[bytes | None], list[int]]:
    """Lines that are taken, and the bytes taken after each piece."""
    split, found, places = wire._Split(), list[bytes | None](), list[int]()
    edges = [offset, *pieces, len(data)]
    for a, b in itertools.pairwise(edges):
        found += list(split.lines(data[a:b]))
        places.append(offset + split.taken)
    found += list(split.lines(b""))
    assert offset + split.taken == len(data)
    return found, places


def test_lines_are_cut_alike_however_they_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wire, "MAX_LINE", 10)
    data = b"one\ntwo\r\n\n" + b"x" * 35 + b"\nthree\n" + b"y" * 11 + b"\nend"
    whole, _ = served(data, [])
    assert whole == [b"one", b"two\r", b"", None, b"three", None, b"end"]
    for size in (1, 2, 3, 7, 20):
        found, places = served(data, list(range(size, len(data), size)))
        assert found == whole
        # Wherever it is stopped, the rest is read from the beginning of a line.
        for place in places[:-1]:
            assert place == 0 or data[place - 1 : place] == b"\n"
            assert whole[data[:place].count(b"\n") :] == served(data, [], place)[0]


def test_the_state_is_saved_after_so_many_lines_whatever_comes_at_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = b"".join(b"%d\n" % i for i in range(100)) + b"100"
    (tmp_path / "in").write_bytes(data)
    lines: list[bytes] = []
    saved: list[tuple[int, int]] = []

    def save(taken: int) -> None:
        # What has been answered has been sent, and the rest of the input begins with the next line.
        sent = capsys.readouterr().out.splitlines()
        assert sent == [line.decode() for line in lines[len(lines) - len(sent) :]]
        assert data[taken:].split(b"\n")[0] == (b"%d" % len(lines) if taken < len(data) else b"")
        saved.append((len(lines), taken))

    def take(line: bytes | None) -> str:
        assert line is not None
        lines.append(line)
        return line.decode()

    assert wire.serve(str(tmp_path / "in"), lambda: take, save, 30, []) == len(data)
    assert [count for count, _ in saved] == [30, 60, 90]
    lines.clear()
    assert wire.serve(str(tmp_path / "in"), lambda: take, lambda taken: None, 1, [], saved[1][1]) == len(data)
    assert [int(line) for line in lines] == list(range(60, 101))


def test_asked_to_stop_it_answers_what_has_arrived(capsys: pytest.CaptureFixture[str]) -> None:
    stop: list[int] = []
    client = socket.socket()
    client.settimeout(20)

    def take(line: bytes | None) -> str:
        if line == b"first":
            client.sendall(b"second\nthi")
            stop.append(signal.SIGTERM)
        return "" if line is None else line.decode()

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = threading.Thread(
        target=wire.serve, args=(f"tcp://127.0.0.1:{port}", lambda: take, lambda taken: None, 100, stop)
    )
    server.start()
    while "listening" not in capsys.readouterr().err:
        time.sleep(0.01)
    client.connect(("127.0.0.1", port))
    client.sendall(b"first\n")
    with client.makefile() as replies:
        assert list(replies) == ["first\n", "second\n"]
    client.close()
    server.join(20)
    assert not server.is_alive()


def test_each_connection_has_a_form_of_its_own(classes: Made) -> None:
    whole = Lines(classes.live())
    one, two, three = whole.another(), whole.another(), whole.another()
    said = json.loads(one.take(b'{"id": "a", "x": {"a": 1, "b": 2}}') or "")
    # Each header is one, also that of the second who sends CSV.
    for lines in (two, three):
        assert lines.take(b"a;b") is None
        assert json.loads(lines.take(b"1,0;2") or "")["p"].keys() == said["p"].keys()
    assert json.loads(one.take(b"a,b") or "") == {"error": "the line is no JSON object", "line": 2}
    assert json.loads(two.take(None) or "") == {"error": "the line has more than 1,048,576 bytes", "line": 3}
    # A second header is a row like others; all speak to one model.
    assert three.take(b"x;y") is not None
    assert two.live is whole.live
    assert (whole.count, whole.errors, whole.live.counts["asked"]) == (8, 2, 4)


def pliant(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pliant.cli", "stream", *arguments]
    return subprocess.Popen(command, **({"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options))


@pytest.fixture
def running() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    started: list[subprocess.Popen[bytes]] = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen[bytes]:
        started.append(pliant(*arguments, **options))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            if pipe is not None:
                pipe.close()


def expected(here: Made, lines: list[bytes]) -> tuple[list[str | None], Any]:
    """The reply to each line, and the state at the end."""
    whole = Lines(here.live(learn=True))
    torch.set_num_threads(1)
    return [whole.take(line) for line in lines], whole.state_dict()


def told(replies: list[str | None]) -> list[str]:
    return [said for said in replies if said is not None]


def test_standard_input_is_answered_line_by_line_and_stopped(
    classes: Made, tmp_path: Path, running: Callable[..., subprocess.Popen[bytes]]
) -> None:
    lines = messages(classes)
    replies, end = expected(classes, lines)
    arguments = [str(classes.folder), "--learn", "--state", str(tmp_path / "state")]
    for part in (slice(0, 33), slice(33, None)):
        process = running(*arguments, stdin=subprocess.PIPE)
        assert process.stdin is not None
        assert process.stdout is not None
        # Ended by a row, whose reply is the last one.
        process.stdin.write(b"\n".join(lines[part]) + b"\n")
        process.stdin.flush()
        # It answers at once, not when its input ends.
        for said in told(replies[part]):
            assert process.stdout.readline().decode().rstrip("\n") == said
        time.sleep(0.3)  # lines without a reply may still be taken
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        assert process.returncode == 0
        assert process.stdout.read() == b""
    state = unpack_file((tmp_path / "state").read_bytes())
    assert differences({name: state[name] for name in end}, end) == []


@pytest.mark.slow
def test_a_file_is_gone_on_with_where_it_was_stopped_or_killed(
    classes: Made, tmp_path: Path, running: Callable[..., subprocess.Popen[bytes]]
) -> None:
    lines = messages(classes, 1200)
    source = tmp_path / "input.jsonl"
    source.write_bytes(b"\n".join(lines))
    replies, end = expected(classes, lines)
    arguments = [str(classes.folder), "--learn", "--input", str(source)]
    # Stopped: nothing is answered twice.
    found: list[str] = []
    stops = 0
    for _ in range(20):
        process = running(*arguments, "--state", str(tmp_path / "stopped"))
        assert process.stdout is not None
        found.append(process.stdout.readline().decode().rstrip("\n"))
        process.send_signal(signal.SIGTERM)
        # Not communicate, which would pass over what readline has read beyond its line.
        found += process.stdout.read().decode().splitlines()
        assert process.wait(120) == 0
        stops += 1
        if len(found) >= len(told(replies)):
            break
    assert stops > 1
    process = running(*arguments, "--state", str(tmp_path / "stopped"))  # what is left has no replies
    assert process.communicate(timeout=120)[0] == b""
    assert found == told(replies)
    state = unpack_file((tmp_path / "stopped").read_bytes())
    assert state.pop("offset") == source.stat().st_size
    assert differences(state, end) == []
    # Killed: the state is an old or a new one, and the end the same.
    saved = tmp_path / "killed"
    for turn in range(3):
        process = running(*arguments, "--state", str(saved), "--save-every", "20", stdout=subprocess.DEVNULL)
        while process.poll() is None and not saved.exists():
            time.sleep(0.01)
        time.sleep(0.3 * turn)
        process.kill()
        process.wait()
        unpack_file(saved.read_bytes())
    process = running(*arguments, "--state", str(saved))
    process.communicate(timeout=300)
    assert process.returncode == 0
    state = unpack_file(saved.read_bytes())
    assert state.pop("offset") == source.stat().st_size
    assert differences(state, end) == []


def test_connections_are_answered_over_themselves(
    classes: Made, tmp_path: Path, running: Callable[..., subprocess.Popen[bytes]]
) -> None:
    process = running(str(classes.folder), "--input", "tcp://127.0.0.1:0", "--json", "--state", str(tmp_path / "state"))
    assert process.stderr is not None
    place = re.search(rb"listening at tcp://127.0.0.1:(\d+)", process.stderr.readline())
    assert place is not None
    here = ("127.0.0.1", int(place.group(1)))
    with socket.create_connection(here, 20) as one, socket.create_connection(here, 20) as two:
        first, second = one.makefile("rwb"), two.makefile("rwb")
        for i in range(5):
            for name, file in (("one", first), ("two", second)):
                file.write(json.dumps({"id": f"{name} {i}", "x": ROW}).encode() + b"\n")
                file.flush()
                assert json.loads(file.readline())["id"] == f"{name} {i}"
        # A row may be answered over another connection; a broken line concerns nobody else.
        second.write(b'{"id": "one 0", "y": "yes"}\n{"id": "one 0", "y": "yes"}\n{bad\n{"id": 9, "x": ')
        second.flush()
        assert "no row" in json.loads(second.readline())["error"]
        assert "JSON" in json.loads(second.readline())["error"]
        second.close()
        two.close()
        first.write(json.dumps({"id": "last", "x": ROW}).encode() + b"\n")
        first.flush()
        assert json.loads(first.readline())["id"] == "last"
    process.send_signal(signal.SIGTERM)
    err = process.stderr.read()
    assert process.wait(60) == 0
    summary = json.loads(err.decode().splitlines()[-1])
    # The last line of the second connection was not finished, but it had an end.
    assert (summary["asked"], summary["answered"]) == (11, 1)
    assert summary["errors"] in (2, 3)
    assert (tmp_path / "state").exists()


@pytest.mark.slow
def test_a_reader_that_has_gone_is_no_error(classes: Made, running: Callable[..., subprocess.Popen[bytes]]) -> None:
    read, write = os.pipe()
    command = [sys.executable, "-m", "pliant.cli", "stream", str(classes.folder)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    os.close(read)
    _, err = process.communicate(b"\n".join(messages(classes, 5)) + b"\n", timeout=60)
    assert b"Traceback" not in err


# The command.


def test_what_cannot_be_is_one_sentence(
    classes: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "state").write_text("torn")
    run = str(classes.folder)
    for arguments, says in [
        ([], "needs the folder of a run"),
        ([str(tmp_path / "empty")], "no readable run"),
        ([run, "--input", str(tmp_path / "none")], "cannot be read"),
        ([run, "--input", str(tmp_path)], "cannot be read"),
        ([run, "--input", "tcp://127.0.0.1"], "cannot listen"),
        ([run, "--input", "tcp://127.0.0.1:99999"], "cannot listen"),
        ([run, "--input", "tcp://no.such.host.invalid:1"], "cannot listen"),
        ([run, "--state", str(tmp_path / "state")], "cannot be read as a state"),
        ([run, "--save-every", "0"], "at least 1"),
        ([run, "--lern"], "'--learn'"),
    ]:
        assert main(["stream", *arguments]) == 2, arguments
        out, err = capsys.readouterr()
        assert (out, err.count("\n"), says in err) == ("", 1, True), err
    (tmp_path / "short").write_text("")
    lines = Lines(classes.live())
    save(lines, 10, tmp_path / "ahead")
    assert main(["stream", run, "--input", str(tmp_path / "short"), "--state", str(tmp_path / "ahead")]) == 2
    assert "shorter" in capsys.readouterr().err


def test_a_file_in_this_process(classes: Made, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "in.jsonl"
    lines = messages(classes)
    source.write_bytes(b"\n".join(lines))
    assert main(["stream", str(classes.folder), "--input", str(source), "--learn", "--json"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines() == told(expected(classes, lines)[0])
    summary = json.loads(err)
    assert summary["lines"] == len(lines)
    assert summary["asked"] == MORE
    assert summary["milliseconds"]["p50"] > 0
    assert main(["stream", str(classes.folder), "--input", str(source)]) == 0
    assert f"{MORE} asked" in capsys.readouterr().err
