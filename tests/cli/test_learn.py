"""The main job from the command line."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pliant.cli import main

SHORT = ["--answers", "640", "--every", "320", "--retrain", "320", "--size", "1", "--save-every", "160"]


def learn(folder: Path, *more: str) -> int:
    return main(["learn", "digits", "--run", str(folder), "--no-report", *SHORT, *more])


@pytest.mark.parametrize("change", ["permute", "relabel", "random"])
@pytest.mark.parametrize("by", ["row", "pixel"])
def test_every_kind_of_change_runs_and_is_told(
    change: str, by: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert learn(tmp_path / "run", "--change", change, "--by", by, "--json", "--delay", "1") == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["answers"] == 640
    assert set(summary["members"]) == {"pliant", "majority", "no-change", "frozen", "retrained"}
    assert summary["members"]["no-change"]["bits_saved"] == 0
    assert sum(member["answers"] for member in summary["members"].values()) == 5 * 640
    assert {"first visit", "held out"} <= set(summary["members"]["pliant"]["visits"])
    rows = [json.loads(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert rows[-1]["answers"] == 640
    assert [row["task"] for row in rows] == [(row["answers"] - 1) // 320 for row in rows]
    assert sum(row["members"]["pliant"]["answers"] for row in rows) == 640


def test_equal_runs_are_equal_to_the_byte_and_other_seeds_are_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        assert learn(tmp_path / name, "--seed", seed) == 0
    a, b, c = ((tmp_path / name / "records.jsonl").read_bytes() for name in "abc")
    assert a == b != c


def test_resuming_a_finished_run_changes_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert learn(tmp_path / "run") == 0
    before = (tmp_path / "run" / "records.jsonl").read_bytes()
    assert main(["learn", "digits", "--run", str(tmp_path / "run"), "--resume", "--no-report"]) == 0
    assert (tmp_path / "run" / "records.jsonl").read_bytes() == before


def test_the_report_and_the_ledger_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["learn", "digits", "--run", str(tmp_path / "run"), *SHORT]) == 0
    assert "<svg" in (tmp_path / "run" / "report.html").read_text()
    (line,) = (tmp_path / "ledger.jsonl").read_text().splitlines()
    assert json.loads(line)["recipe"] == "learn digits"
    capsys.readouterr()
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"report": str(tmp_path / "page.html")}


def test_without_a_run_folder_the_next_number_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["learn", "digits", "--no-report", *SHORT]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").glob("digits-*")) == ["digits-001", "digits-002"]
    assert main(["learn", "digits", "--no-report", "--resume"]) == 0
    assert not (tmp_path / "runs" / "digits-003").exists()


def test_help_is_quick_and_imports_no_torch() -> None:
    code = (
        "import sys; from pliant.cli import main; main(['--help']); main(['learn']); assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


@pytest.mark.parametrize("arguments", [["--help"], ["learn", "--help"], ["--version"], []])
def test_help_is_printed(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 0
    assert capsys.readouterr().out


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["learn", "digits", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for option in ("--change", "--every", "--window", "--resume", "--seed", "--json"):
        assert option in said


@pytest.mark.slow
def test_killed_at_random_moments_and_resumed_the_run_is_the_same_to_the_bit() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "kill_resume.py"
    done = subprocess.run([sys.executable, str(script), "--kills", "20"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_memory_is_flat() -> None:
    script = Path(__file__).parents[2] / "benchmarks" / "forever_memory.py"
    command = [sys.executable, str(script), "--steps", "20000", "--opponents", "majority"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_saves_and_can_be_continued_to_the_same_bytes(number: int, tmp_path: Path) -> None:
    options = [*SHORT, "--answers", "2000", "--no-report", "--save-every", "100000"]
    command = [sys.executable, "-m", "pliant.cli", "learn", "digits", *options, "--run"]
    process = subprocess.Popen([*command, str(tmp_path / "stopped")], stderr=subprocess.PIPE, text=True)
    records = tmp_path / "stopped" / "records.jsonl"
    while process.poll() is None and not (records.exists() and records.stat().st_size):
        time.sleep(0.05)
    process.send_signal(number)
    _, said = process.communicate()
    assert process.returncode == 130
    assert "--resume --run" in said
    assert not (tmp_path / "stopped" / "summary.json").exists()
    for name, more in (("stopped", ["--resume"]), ("whole", [])):
        assert subprocess.run([*command, str(tmp_path / name), *more], capture_output=True).returncode == 0
    assert records.read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()
