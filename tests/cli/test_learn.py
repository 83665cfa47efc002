"""The main job from the command line."""

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from pliant.cli import main
from pliant.core.run import Run
from tests.strict import strict

SHORT = ["--answers", "528", "--every", "264", "--retrain", "500", "--size", "1"]
TINY = ["--answers", "64", "--every", "32", "--batch", "8", "--retrain", "64", "--size", "1", "--no-report"]
Capture = pytest.CaptureFixture[str]


def learn(folder: Path, *more: str) -> int:
    return main(["learn", "digits", "--run", str(folder), "--no-report", *SHORT, *more])


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with its report, alone in a folder; it must not be changed."""
    folder = tmp_path_factory.mktemp("digits")
    assert main(["learn", "digits", "--run", str(folder / "run"), *SHORT]) == 0
    return folder / "run"


@pytest.fixture
def copied(done: Path, tmp_path: Path) -> Path:
    """The same, to do with as one likes."""
    shutil.copytree(done.parent, tmp_path / "copy")
    return tmp_path / "copy" / "run"


@pytest.mark.parametrize(
    ("change", "by"), [("permute", "row"), ("relabel", "row"), ("random", "row"), ("permute", "pixel")]
)
def test_every_kind_of_change_runs_and_is_told(change: str, by: str, tmp_path: Path, capsys: Capture) -> None:
    assert learn(tmp_path / "run", "--change", change, "--by", by, "--json", "--delay", "1") == 0
    summary = strict(capsys.readouterr().out)
    assert summary["answers"] == 528
    assert set(summary["members"]) == {"pliant", "plain", "majority", "no-change", "frozen", "retrained"}
    assert summary["members"]["no-change"]["bits_saved"] == 0
    assert sum(member["answers"] for member in summary["members"].values()) == 6 * 528
    assert {"first visit", "held out"} <= set(summary["members"]["pliant"]["visits"])
    rows = [strict(line) for line in (tmp_path / "run" / "records.jsonl").read_text().splitlines()]
    assert rows[-1]["answers"] == 528
    assert [row["task"] for row in rows] == [(row["answers"] - 1) // 264 for row in rows]
    assert sum(row["members"]["pliant"]["answers"] for row in rows) == 528


@pytest.mark.parametrize(("rule", "by"), [("trace", "pixel"), ("trace", "row"), ("immediate", "row")])
def test_every_learning_rule_runs(rule: str, by: str, tmp_path: Path, capsys: Capture) -> None:
    """A chunk that is a whole image has no past before it: there traces are back-propagation over the image."""
    bits = []
    for name in ("bptt", rule):
        assert main(["learn", "digits", "--run", str(tmp_path / name), *TINY, "--by", by, "--rule", name, "--opponents",
                     "majority", "--json"]) == 0  # fmt: skip
        bits.append(strict(capsys.readouterr().out)["members"]["pliant"]["bits"])
    assert (bits[1] == pytest.approx(bits[0], abs=1e-6)) == (by == "pixel") and abs(bits[0] - bits[1]) < 0.5


def test_equal_runs_are_equal_to_the_byte_and_other_seeds_are_not(done: Path, tmp_path: Path, capsys: Capture) -> None:
    for name, seed in (("same", "0"), ("other", "4")):
        assert learn(tmp_path / name, "--seed", seed) == 0
    one, same, other = ((run / "records.jsonl").read_bytes() for run in (done, tmp_path / "same", tmp_path / "other"))
    assert one == same != other


def test_plain_is_the_run_without_keep_and_several_ways_may_stand_between_commas(tmp_path: Path) -> None:
    kept, plain = tmp_path / "kept", tmp_path / "plain"
    assert learn(kept, "--keep", "normalize-project,", "rewarm", "--opponents", "plain,majority") == 0
    assert learn(plain, "--keep", "--opponents", "majority") == 0
    with_, without = (json.loads((run / "summary.json").read_text())["members"] for run in (kept, plain))
    assert set(with_) - set(without) == {"plain"}
    assert with_["plain"]["total_bits"] == without["pliant"]["total_bits"] != with_["pliant"]["total_bits"]
    assert json.loads((kept / "config.json").read_text())["config"]["keep"] == ["normalize-project", "rewarm"]


def test_resuming_a_finished_run_changes_nothing_but_the_report(copied: Path, capsys: Capture) -> None:
    files = [copied / "records.jsonl", copied / "summary.json", copied / "timing.jsonl", copied.parent / "ledger.jsonl"]
    before = [file.read_bytes() for file in files]
    capsys.readouterr()
    (copied / "report.html").unlink()
    assert main(["learn", "digits", "--run", str(copied), "--resume"]) == 0
    assert [file.read_bytes() for file in files] == before
    assert (copied / "report.html").exists()
    assert "bits against no-change over 528 answers" in capsys.readouterr().out
    assert main(["learn", "digits", "--run", str(copied), "--resume", "--no-report", "--json"]) == 0
    said = strict(capsys.readouterr().out)
    assert said == {"run": str(copied), **strict(before[1])}
    assert said["latency"]["learn"]["p50"] > 0


def test_a_summary_with_nulls_is_told(copied: Path, capsys: Capture) -> None:
    summary = strict((copied / "summary.json").read_bytes())
    for member in summary["members"].values():
        member |= dict.fromkeys(("bits", "bits_saved", "accuracy"))
    (copied / "summary.json").write_text(json.dumps(summary))
    assert main(["learn", "digits", "--run", str(copied), "--resume"]) == 0
    assert "nan bits" in capsys.readouterr().out


def test_the_report_and_the_ledger_are_written(done: Path, tmp_path: Path, capsys: Capture) -> None:
    assert "<svg" in (done / "report.html").read_text()
    (line,) = (done.parent / "ledger.jsonl").read_text().splitlines()
    assert strict(line)["recipe"] == "learn digits"
    for name in ("config.json", "environment.json", "summary.json"):
        strict((done / name).read_bytes())
    capsys.readouterr()
    assert main(["report", str(done), "--out", str(tmp_path / "page.html"), "--json"]) == 0
    assert strict(capsys.readouterr().out) == {"report": str(tmp_path / "page.html")}


def test_without_a_run_folder_the_next_number_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["learn", "digits", *TINY]) == 0
    assert sorted(path.name for path in (tmp_path / "runs").glob("digits-*")) == ["digits-001", "digits-002"]
    assert main(["learn", "digits", "--no-report", "--resume"]) == 0
    assert not (tmp_path / "runs" / "digits-003").exists()
    assert len((tmp_path / "runs" / "ledger.jsonl").read_text().splitlines()) == 2


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
    # A docstring of several lines is one paragraph: "none if" stands before what comes after it in the source.
    keep = said[said.index("Ways in which") : said.index("--retrain")]
    assert all(len(line.strip("│ ")) > 30 for line in keep.splitlines()[:-2])


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
def test_asked_to_stop_it_saves_and_can_be_continued_to_the_same_bytes(
    number: int, done: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Run.record

    def stopping(self: Run, *rows: Any) -> None:
        record(self, *rows)
        signal.raise_signal(number)

    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "record", stopping)
        assert learn(run) == 130
    assert f"--resume --run {run}" in capsys.readouterr().err
    assert not (run / "summary.json").exists()
    assert not (tmp_path / "ledger.jsonl").exists()
    whole = (done / "records.jsonl").read_bytes()
    assert whole.startswith((run / "records.jsonl").read_bytes())
    assert whole != (run / "records.jsonl").read_bytes()
    assert learn(run, "--resume") == 0
    assert (run / "records.jsonl").read_bytes() == whole
    assert len((tmp_path / "ledger.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_is_asked_to_stop_can_be_continued_to_the_same_bytes(number: int, tmp_path: Path) -> None:
    options = ["--answers", "2000", "--every", "320", "--retrain", "320", "--size", "1", "--no-report"]
    command = [sys.executable, "-m", "pliant.cli", "learn", "digits", *options, "--save-every", "100000", "--run"]
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
