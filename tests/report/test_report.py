"""The page: whole, inert, the same every time, and made from whatever a run has left."""

import json
import math
import re
import shutil
import subprocess
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from pliant.core import UsageError
from pliant.report import write_report

MEMBERS = {"pliant": 1.0, "majority": 3.3, "no-change": 3.0, "frozen": 2.5, "retrained": 1.5}
VOID = {"meta", "link", "br", "img", "input", "hr"}


def make_run(folder: Path, windows: int = 8, finished: bool = True, schema: int = 1, **config: Any) -> Path:
    """A run folder with plain curves; 500 answers a window, a task every 2,000."""
    folder.mkdir(parents=True)
    config = {"change": "permute", "answers": 4000, "retrain": 2000} | config
    _write(folder / "config.json", {"schema": schema, "command": "learn digits", "config": config})
    _write(folder / "environment.json", {"pliant": "0.1.0", "packages": {"torch": "2.13.0"}, "commit": None})
    records = [_record(index) for index in range(windows)]
    timing = [{"answers": row["answers"], "session": 0, "seconds": 2.0 * (index + 1), "rss": 400 << 20,
               "cpu": {"pliant": 0.5, "majority": 0.01, "no-change": 0.01, "frozen": 0.2, "retrained": 1.0}}
              for index, row in enumerate(records)]  # fmt: skip
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in records))
    (folder / "timing.jsonl").write_text("".join(json.dumps(row) + "\n" for row in timing))
    if finished:
        _write(folder / "summary.json", _summary(500 * windows))
    return folder


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def _record(index: int) -> dict[str, Any]:
    worse = 0.1 * (index % 4)
    members = {name: {"answers": 500, "bits": bits + worse, "accuracy": 0.5} for name, bits in MEMBERS.items()}
    members["no-change"]["bits"] = 3.0
    return {"answers": 500 * (index + 1), "update": 31, "task": index // 4, "nats": 1.0, "outcomes": {"updated": 31},
            "members": members}  # fmt: skip


def _summary(answers: int) -> dict[str, Any]:
    bins = [{"count": 10, "confidence": 0.1 * i, "accuracy": 0.09 * i} for i in range(1, 10)]
    members = {
        name: {"answers": answers, "bits": bits, "total_bits": bits * answers, "bits_saved": (3.0 - bits) * answers,
               "accuracy": 0.75, "brier": 0.3, "calibration": 0.04, "kappa": 0.7, "temporal_kappa": 0.6,
               "visits": {"first visit": {"accuracy": 0.71, "bits": 1.1}, "held out": {"accuracy": 0.72, "bits": 1.2}},
               "reliability": [*bins, {"count": 0, "confidence": math.nan, "accuracy": math.nan}], "missed": 0}
        for name, bits in MEMBERS.items()
    }  # fmt: skip
    return {"answers": answers, "updates": 250, "reference": "no-change", "members": members, "parameters": 1234}


class Page(HTMLParser):
    """Tags, texts and attributes of a page; complains about tags that do not match."""

    def __init__(self, page: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def check(page: str) -> Page:
    """What holds for every page."""
    parsed = Page(page)
    ids = [attrs["id"] for _, attrs in parsed.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    for svg in re.findall(r"<svg.*?</svg>", page, re.DOTALL):
        root = ElementTree.fromstring(svg)
        assert root.get("role") == "img" and root.get("aria-label")
    for tag, attrs in parsed.tags:
        assert tag not in {"script", "iframe", "object", "img"}
        assert not any(name.startswith("on") for name in attrs)
        links = [attrs[name] or "" for name in ("href", "src", "xlink:href") if name in attrs]
        assert all(link == "data:," or (link.startswith("#") and link[1:] in ids) for link in links)
        for name in re.findall(r"url\(#?(.*?)\)", " ".join(value or "" for value in attrs.values())):
            assert name in ids
    assert "http:" not in page.replace("http://www.w3.org/2000/svg", "") and "https:" not in page
    assert "@import" not in page
    return parsed


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
    summary = _summary(4000)
    summary["members"]["frozen"]["bits_saved"] = 10_000
    summary["members"]["pliant"]["bits_saved"] = -400
    _write(folder / "summary.json", summary)
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
    row = _record(0)
    row["members"][evil] = row["members"]["frozen"]
    row["task"], row["outcomes"] = evil, {evil: 3}
    (first / "records.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(_record(5)) + "\n")
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
    rows = [_record(index) for index in range(8)]
    rows[2]["members"]["pliant"]["bits"] = math.nan
    rows[3]["members"]["pliant"]["bits"] = math.inf
    del rows[4]["members"]["frozen"], rows[5]["members"], rows[6]["members"]["retrained"]["accuracy"]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = check(write_report([folder]).read_text())
    assert "pliant has no finite score in 3 of 8 windows." in page.text
    assert "nan" not in page.text.lower() and " inf" not in page.text.replace(" information", "")


def test_outcomes_that_matter_are_named(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run")
    rows = [_record(index) | {"outcomes": {"updated": 30, "asked": 1, "non-finite loss": 2}} for index in range(3)]
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = check(write_report([folder]).read_text()).text
    assert "non-finite loss, 6 times: the loss was not a finite number" in text and "asked" not in text


def test_a_run_whose_scores_are_all_missing_is_shown(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "run", finished=False)
    rows = [_record(0) | {"members": {"pliant": {"answers": 500, "bits": math.nan, "accuracy": math.nan}}}]
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
    page = write_report(runs, tmp_path / "page.html")
    document, console, asked = browse(browser, page)
    assert document.count("<svg") == 3 + 2 * 6 and "pliant saved" in document
    assert console == [] and asked == []
    # The same with a planted fault of each kind, so that silence means something.
    bad = tmp_path / "bad.html"
    bad.write_text(page.read_text() + "<script>console.error(1)</script><img src='https://example.invalid/a.png'>")
    _, console, asked = browse(browser, bad)
    assert len(console) == 1 and asked == ["https://example.invalid/a.png"]
