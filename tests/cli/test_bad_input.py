"""Wrong input: one sentence on standard error, exit code 2, no traceback, nothing lost."""

import json
import os
import shutil
from pathlib import Path

import pytest

from pliant.cli import main

SHORT = ["--answers", "64", "--every", "32", "--batch", "8", "--retrain", "32", "--size", "1"]


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The sentence with which the command line refuses `arguments`."""
    assert main(list(arguments)) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pliant: ")
    assert err.count("\n") == 1, err
    assert "Traceback" not in err
    return err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("digits") / "run"
    assert main(["learn", "digits", "--run", str(folder), "--no-report", *SHORT]) == 0
    return folder


@pytest.fixture
def run(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    return Path(shutil.copytree(made, tmp_path / "run"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["lern"], "'learn'"),
        (["learn", "digit"], "'digits'"),
        (["learn", "digits", "--evry", "3"], "'--every'"),
        (["learn", "digits", "--sice", "2"], "'--size'"),
        (["report", "--oot", "x", "y"], "'--out'"),
        (["learn", "digits", "--every", "many"], "--every"),
        (["learn", "digits", "--every"], "--every"),
        (["learn", "digits", "--change", "sometimes"], "permute"),
        (["learn", "digits", "stray"], "stray"),
        (["learn", "digits", "--size", "0"], "1 to 16"),
        (["learn", "digits", "--size", "17"], "1 to 16"),
        (["learn", "digits", "--window", "0"], "1 to 4096"),
        (["learn", "digits", "--window", "5000"], "1 to 4096"),
        (["learn", "digits", "--every", "0"], "at least 1"),
        (["learn", "digits", "--delay", "-1"], "at least 0"),
        (["learn", "digits", "--lr", "nan"], "above 0"),
        (["learn", "digits", "--threads", "10000"], "processors"),
        (["report"], "at least one run"),
        (["report", "no/such/folder"], "no/such/folder"),
    ],
)
def test_one_sentence_names_what_is_wrong(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refused(capsys, *arguments)
    assert not any(tmp_path.iterdir())


def test_a_run_is_not_overwritten(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (run / "records.jsonl").read_bytes()
    assert "--resume" in refused(capsys, "learn", "digits", "--run", str(run), *SHORT)
    assert (run / "records.jsonl").read_bytes() == before


def test_a_newer_schema_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(head | {"schema": 99}))
    assert "schema 99" in refused(capsys, "learn", "digits", "--run", str(run), "--resume")
    assert "schema 99" in refused(capsys, "report", str(run))


def test_the_run_of_another_command_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = json.loads((run / "config.json").read_text())
    (run / "config.json").write_text(json.dumps(head | {"command": "learn series"}))
    assert "learn series" in refused(capsys, "learn", "digits", "--run", str(run), "--resume")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"schema": 1}', '{"schema": "x", "command": 3, "config": []}'])
def test_a_broken_config_is_refused(text: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "config.json").write_text(text)
    assert str(run) in refused(capsys, "learn", "digits", "--run", str(run), "--resume")


def test_resuming_with_a_changed_config_lists_what_differs(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    said = refused(capsys, "learn", "digits", "--run", str(run), "--resume", "--lr", "0.5", "--seed", "7")
    assert "lr was 0.003, now 0.5" in said
    assert "seed was 0, now 7" in said
    assert "every" not in said


def test_a_life_that_was_made_by_a_newer_version_is_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from pliant.core.files import digest

    for manifest in run.glob("lives/*/manifest.json"):
        body = json.loads(manifest.read_text())["body"] | {"schema": 99}
        manifest.write_text(json.dumps({"body": body, "sha256": digest(json.dumps(body).encode())}))
    assert "schema 99" in refused(capsys, "learn", "digits", "--run", str(run), "--resume")


def test_an_unwritable_folder_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert "cannot be written" in refused(capsys, "learn", "digits", "--run", str(tmp_path / "file" / "run"), *SHORT)
    if os.geteuid() != 0:  # nothing is unwritable for root
        (tmp_path / "locked").mkdir(mode=0o500)
        said = refused(capsys, "learn", "digits", "--run", str(tmp_path / "locked" / "run"), *SHORT)
        assert "cannot be written" in said


def test_records_that_were_cut_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "records.jsonl").write_text("")
    assert "shorter" in refused(capsys, "learn", "digits", "--run", str(run), "--resume")
