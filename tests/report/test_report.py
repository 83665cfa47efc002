"""The page: whole, inert, the same every time, and made from whatever a run has left."""

import json
import math
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from pliant.core import UsageError
from pliant.report import write_report
from tests.report.pages import check, make_run, make_table_run, record, summary, write


def test_one_run_has_every_figure_and_table(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "digits-001")
    path = write_report([folder])
    assert path == folder / "report.html"
    page = check(path.read_text())
    assert sum(tag == "svg" for tag, _ in page.tags) == 6
    assert (
        "pliant saved 8,000 bits against no-change over 4,000 answers (2.00 per answer), accuracy 0.75; "
        "retrained every 2,000 saved 1.50 per answer at 2.0 times the compute."
    ) in page.text
    for words in ("Scores", "Temporal kappa", "held out: bits", "packages.torch 2.13.0", "Parameters 1,234", "task 0"):
        assert words in page.text
    assert [path.name for path in folder.iterdir() if path.name.endswith(".part")] == []


def test_several_runs_are_told_apart_by_what_differs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", windows=6, finished=False, change="relabel")]
    path = write_report(runs, tmp_path / "both.html")
    page = check(path.read_text())
    assert path == tmp_path / "both.html" and not (runs[0] / "report.html").exists()
    assert "change=permute" in page.text and "b (change=relabel)" in page.text
    assert sum(tag == "section" for tag, _ in page.tags) == 2


def test_equal_configs_are_told_apart_by_folder(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "x" / "one"), make_run(tmp_path / "y" / "one")]
    assert "2 one" in check(write_report(runs).read_text()).text


def test_an_opponent_that_does_better_is_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    told = summary(4000)
    told["members"]["frozen"]["bits_saved"] = 10_000
    told["members"]["pliant"]["bits_saved"] = -400
    write(folder / "summary.json", told)
    text = check(write_report([folder]).read_text()).text
    assert "pliant lost 400 bits" in text
    assert "frozen saved 2.50 per answer, more than ours, at 0.4 times the compute" in text


def test_same_folder_same_bytes(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", change="relabel")]
    first = write_report(runs, tmp_path / "page.html").read_bytes()
    assert write_report(runs, tmp_path / "page.html").read_bytes() == first


def test_what_comes_from_a_run_is_text(tmp_path: Path) -> None:
    evil = '<script>alert(1)<|script> $x_2$ "onload=a -- ]]> \u202e{{ 7*7 }}'
    first = make_run(tmp_path / evil, note=f"{evil}\x00\ud800</script>")
    row = record(0)
    row["members"][evil] = row["members"]["frozen"]
    row["task"], row["outcomes"] = evil, {evil: 3}
    (first / "records.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(record(5)) + "\n")
    page = check(write_report([first, make_run(tmp_path / "漢字 <b>")], tmp_path / "page.html").read_text())
    assert "<script>alert(1)<|script> $x_2$" in page.text and "{{ 7*7 }}" in page.text
    assert "漢字 <b>" in page.text
    assert "\u202e" not in page.text and "\x00" not in page.text


def test_unfinished_run_says_so_and_uses_its_records(tmp_path: Path) -> None:
    page = check(write_report([make_run(tmp_path / "run", windows=4, finished=False)]).read_text())
    assert "not complete: 2,000 of 4,000 answers so far" in page.text
    assert "pliant saved 3,700 bits against no-change over 2,000 answers so far (1.85 per answer)" in page.text
    assert "Brier " not in page.text.split("Bits, Brier")[0]


def test_cost_of_all_sessions_counts_and_torn_lines_do_not(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", windows=4)
    again = [{"answers": n, "session": 1, "seconds": s, "cpu": {"pliant": 0.5}, "rss": 1 << 29}
             for n, s in ((1500, 1.0), (2000, 4.0))]  # fmt: skip
    with open(folder / "timing.jsonl", "a") as file:
        file.write('{"answers": 2500, "sess\n\xff\n' + "".join(json.dumps(row) + "\n" for row in again))
    with open(folder / "records.jsonl", "a") as file:
        file.write('{"answers": 2500, "members": {"pli')
    page = check(write_report([folder]).read_text())
    assert re.search(r"pliant 1\.000 .* 3\.0 1\.0", page.text)  # 4 windows, 2 of them twice, at 0.5 s
    assert "Peak memory of the process, MiB 512" in page.text
    assert "Seconds in all; sessions 12; 2" in page.text


def test_windows_without_a_finite_score_leave_a_gap(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    rows = [record(index) for index in range(8)]
    rows[2]["members"]["pliant"]["bits"] = math.nan
    rows[3]["members"]["pliant"]["bits"] = math.inf
    del rows[4]["members"]["frozen"], rows[5]["members"], rows[6]["members"]["retrained"]["accuracy"]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = check(write_report([folder]).read_text())
    assert "pliant has no finite score in 3 of 8 windows." in page.text
    assert "nan" not in page.text.lower() and " inf" not in page.text.replace(" information", "")


def test_outcomes_that_matter_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [record(index) | {"outcomes": {"updated": 30, "asked": 1, "non-finite loss": 2}} for index in range(3)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = check(write_report([folder]).read_text()).text
    assert "non-finite loss, 6 times: the loss was not a finite number" in text and "asked" not in text


def test_a_run_whose_scores_are_all_missing_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    rows = [record(0) | {"members": {"pliant": {"answers": 500, "bits": math.nan, "accuracy": math.nan}}}]
    (folder / "records.jsonl").write_text(json.dumps(rows[0]) + "\n")
    (folder / "timing.jsonl").unlink()
    assert "no finite score against no-change" in check(write_report([folder]).read_text()).text


def test_many_windows_are_smoothed_within_a_task(tmp_path: Path) -> None:
    page = check(write_report([make_run(tmp_path / "run", windows=200)]).read_text())
    assert "running means over 5 windows, never across a change of task" in page.text


def test_nothing_recorded_yet(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", windows=0, finished=False)
    assert "Nothing was recorded yet." in check(write_report([folder]).read_text()).text
    both = check(write_report([folder, make_run(tmp_path / "other")], tmp_path / "page.html").read_text())
    assert "Nothing was recorded yet." in both.text and "pliant saved" in both.text


def test_wrong_input_gets_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="at least one"):
        write_report([])
    with pytest.raises(UsageError, match="no readable run"):
        write_report([tmp_path])
    with pytest.raises(UsageError, match="schema 2"):
        write_report([make_run(tmp_path / "newer", schema=2)])
    with pytest.raises(UsageError, match="cannot be written"):
        write_report([make_run(tmp_path / "run")], tmp_path / "missing" / "page.html")


def browse(browser: str, path: Path) -> tuple[str, list[str], list[str]]:
    """What a browser makes of a page: its document, what it says to the console, what the page asks for."""
    log = path.with_suffix(".net.json")
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
         "--disable-background-networking", "--disable-component-update", "--disable-sync",
         "--host-resolver-rules=MAP * ~NOTFOUND", f"--user-data-dir={path.with_suffix('.profile')}",
         "--enable-logging=stderr", f"--log-net-log={log}", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    events = [event.get("params", {}) for event in json.loads(log.read_text())["events"]]
    # The browser's own requests (updates, time) come from no page.
    asked = [event["url"] for event in events if event.get("initiator", "not an origin") != "not an origin"]
    return shown.stdout, re.findall("CONSOLE.*", shown.stderr), asked


@pytest.mark.slow
def test_a_browser_shows_it_and_asks_for_nothing_more(tmp_path: Path) -> None:
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium is not installed")
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", change="<script>console.error(1)</script>")]
    runs += [make_table_run(tmp_path / "c"), make_table_run(tmp_path / "d", numbers=True)]
    page = write_report(runs, tmp_path / "page.html")
    document, console, asked = browse(browser, page)
    assert document.count("<svg") == 2 + 2 * 6 + 2 * 7 and "pliant saved" in document and "Coverage" in document
    assert console == [] and asked == []
    # The same with a planted fault of each kind, so that silence means something.
    bad = tmp_path / "bad.html"
    bad.write_text(page.read_text() + "<script>console.error(1)</script><img src='https://example.invalid/a.png'>")
    _, console, asked = browse(browser, bad)
    assert len(console) == 1 and asked == ["https://example.invalid/a.png"]


def look(index: int, verdict: str) -> dict[str, Any]:
    units = {"one": {"width": 64.0, "rows": 32.0, "dead": 0.1 * index, "dormant": 0.2, "srank": 30.0 - index,
                     "moved": 0.3, "flipped": 0.2 - 0.01 * index},
             "<b>two": {"width": 8.0, "rows": 32.0, "dead": 0.0, "dormant": None, "srank": 8.0}}  # fmt: skip
    matrices = {"w": {"norm": 1.0, "rate ratio": 1 / (1 + index)}, "head": {"rate ratio": 0.01}}
    return {"verdict": verdict, "units": units, "matrices": matrices, "recurrences": {}, "whole": {},
            "roles": {"w": "matrix", "head": "head"}}  # fmt: skip


def with_looks(folder: Path, looks: dict[int, Any]) -> Path:
    make_run(folder)
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for index, found in looks.items():
        rows[index]["health"] = found
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_looks_are_drawn_with_the_newest_verdict(tmp_path: Path) -> None:
    looks = {index: look(index, f"<i>layer {index}</i> has stopped") for index in (0, 3, 7)}
    page = write_report([with_looks(tmp_path / "run", looks)]).read_text()
    parsed = check(page)
    assert "After 4,000 answers: <i>layer 7</i> has stopped." in parsed.text and "<i>" not in page
    for title in (
        "Able to learn",
        "Effective rate",
        "Dead and dormant units",
        "Movement of features",
        "Rank of features",
    ):
        assert title in parsed.text
    # The head is no matrix whose direction alone counts; the worst layers are named, as text.
    assert "(rate: w)" in parsed.text and "rate 0.12" in page and "(rank: one)" in parsed.text and "<b>two" not in page
    assert check(write_report([make_run(tmp_path / "old")]).read_text()).text.count("Able to learn") == 0


def test_plasticity_is_drawn_where_looks_tell_it(tmp_path: Path) -> None:
    looks = {index: look(index, "well") | {"whole": {"plasticity": 0.5 * index}} for index in (1, 3, 7)}
    page = write_report([with_looks(tmp_path / "run", looks)]).read_text()
    said = check(page).text
    assert "plasticity 3.50" in page and "per answer" in said and "(plasticity: " not in said
    assert (
        "random targets"
        not in check(write_report([with_looks(tmp_path / "old", {1: look(1, "well")})]).read_text()).text
    )


@pytest.mark.parametrize(
    "junk",
    [{}, [], "x", {"verdict": 3}, {"units": 3, "matrices": []}, {"units": {"one": 7}, "roles": [1]},
     {"units": {"one": {"width": "x", "dead": math.nan, "moved": 1e300}}, "verdict": {"a": ["b"]}},
     {"matrices": {"w": {"rate ratio": 1e400}}, "roles": {"w": "matrix"}, "verdict": "\u202e" * 9}],
)  # fmt: skip
def test_looks_may_be_malformed(tmp_path: Path, junk: Any) -> None:
    check(write_report([with_looks(tmp_path / "run", {1: junk, 2: look(1, "well"), 5: junk})]).read_text())
    check(write_report([with_looks(tmp_path / "alone", {5: junk})]).read_text())
