"""Your own table from the command line, end to end."""

import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pliant.cli import main
from pliant.core.run import Run
from pliant.learn import prequential, timed
from pliant.learn.references import LastLabel
from pliant.recipes import drive, tune
from tests.strict import strict

SHORT = ["--opponents", "no-change", "--no-report", "--json"]


def write(path: Path, rows: int, seed: int = 0, *, group: bool = False) -> Path:
    """Numbers a, b with a daily rhythm, a category, a class y and a number z; hourly."""
    draw = random.Random(seed)
    lines = ["when,a,b,kind," + ("site," if group else "") + "y,z"]
    for i in range(rows):
        a, b, kind = draw.gauss(0, 1), math.sin(i * math.pi / 12) + draw.gauss(0, 0.1), draw.choice("uv")
        site = draw.choice(["north,", "south,"]) if group else ""
        when = f"2024-{1 + i // 672:02d}-{1 + i // 24 % 28:02d}T{i % 24:02d}:00"
        lines.append(f"{when},{a:.3f},{b:.3f},{kind},{site}{'yes' if a > 0 else 'no'},{2 * b + a:.3f}")
    path.write_text("\n".join(lines) + "\n")
    return path


def learn(capsys: pytest.CaptureFixture[str], data: Path, run: Path, *more: str) -> dict[str, Any]:
    """The summary that --json prints."""
    capsys.readouterr()
    assert main(["learn", "series", "--data", str(data), "--run", str(run), *SHORT, *more]) == 0
    out = capsys.readouterr().out
    assert out.count("\n") == 1
    summary = strict(out)
    assert summary.pop("run") == str(run)
    assert summary == strict((run / "summary.json").read_text())
    return dict(summary)


def records(run: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in (run / "records.jsonl").read_text().splitlines()]


CASES = {
    "classify": (["--target", "y"], 400),
    "regress": (["--target", "z", "--delay", "3"], 400),
    "forecast": (["--target", "z", "--horizon", "6"], 394),
    "forecast two": (["--target", "z", "b", "--horizon", "2", "--delay", "2"], 398),
}


@pytest.mark.parametrize(
    ("kind", "group"), [("classify", True), ("regress", False), ("forecast", True), ("forecast two", False)]
)
def test_every_task_runs_from_end_to_end(
    kind: str, group: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, answers = CASES[kind]
    data = write(tmp_path / "t.csv", 400, group=group)
    more = ["--group", "site"] if group else []
    summary = learn(capsys, data, tmp_path / "run", *options, *more)
    ahead = 400 - answers if "forecast" in kind else 0
    # Of the last rows nobody knows what comes later, in each group.
    assert summary["answers"] == 400 - ahead * (2 if group else 1)
    ours, reference = summary["members"]["pliant"], summary["members"]["no-change"]
    assert set(summary["members"]) == {"pliant", "no-change"}
    assert ours["answers"] == reference["answers"] == summary["answers"]
    assert reference["bits_saved"] == 0
    assert ours["bits_saved"] > 0
    assert ours["missed"] == 0
    rows = records(tmp_path / "run")
    assert sum(row["members"]["pliant"]["answers"] for row in rows) == summary["answers"]
    assert rows[-1]["answers"] == summary["answers"]
    assert set(rows[0]["drift"]) >= {"a", "kind"}
    if group:
        assert set(summary["groups"]) == {"north", "south"}
        assert sum(own["answers"] for own in summary["groups"].values()) == summary["answers"]
        saved = sum(own["bits_saved"] for own in summary["groups"].values())
        assert saved == pytest.approx(ours["bits_saved"])
    schema = json.loads((tmp_path / "run" / "schema.json").read_text())
    assert schema["rows"] == 400
    assert schema["groups"] == ([] if not group else schema["groups"])
    if kind == "classify":
        assert ours["accuracy"] > 0.5
    else:
        assert ours["coverage_error"] <= 0.5


def test_a_folder_of_files_is_groups_or_one_stream(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "data").mkdir()
    for i in range(3):
        write(tmp_path / "data" / f"s{i}.csv", 60, seed=i)
    summary = learn(capsys, tmp_path / "data", tmp_path / "apart", "--target", "y")
    assert {name: own["answers"] for name, own in summary["groups"].items()} == {"s0": 60, "s1": 60, "s2": 60}
    for i in range(3):  # without a time, which would go back from file to file
        (tmp_path / "data" / f"s{i}.csv").write_text("a,y\n" + "1,yes\n2,no\n" * 30)
    whole = learn(capsys, tmp_path / "data", tmp_path / "whole", "--target", "y", "--concat")
    assert whole["answers"] == 180
    assert "groups" not in whole


def test_all_opponents_get_the_same_answers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "t.csv", 400)
    names = ["majority", "mean", "seasonal", "frozen", "retrained", "boosting"]
    summary = learn(
        capsys, data, tmp_path / "run", "--target", "z", "--horizon", "3", "--opponents", *names, "--retrain", "150"
    )
    assert set(summary["members"]) == {"pliant", "mean", "no-change", "seasonal", "frozen", "retrained", "boosting"}
    assert {member["answers"] for member in summary["members"].values()} == {397}
    assert set(summary["cpu_seconds"]) == set(summary["members"])


def test_a_generated_stream_and_equal_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = []
    for name, seed in (("a", "3"), ("b", "3"), ("c", "4")):
        capsys.readouterr()
        options = ["--stream", "regimes", "--rows", "300", "--seed", seed, "--run", str(tmp_path / name)]
        assert main(["learn", "series", *options, *SHORT]) == 0
        assert json.loads(capsys.readouterr().out)["answers"] == 300
        found.append((tmp_path / name / "records.jsonl").read_bytes())
    assert found[0] == found[1] != found[2]


def test_a_shorter_run_says_what_the_longer_one_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "t.csv", 400)
    options = ["--target", "y", "--retrain", "100", "--chunk", "16"]
    learn(capsys, data, tmp_path / "long", *options)
    learn(capsys, data, tmp_path / "short", *options, "--rows", "240")
    long, short = records(tmp_path / "long"), records(tmp_path / "short")
    same = min(len(long), len(short)) - 1
    assert same > 1
    assert long[:same] == short[:same]


def test_what_tuning_took_is_part_of_our_cost_also_after_a_resume(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "candidates", lambda config, rows: iter([replace(config, lr=lr) for lr in (1e-3, 3e-3)]))
    data, run = write(tmp_path / "t.csv", 320), tmp_path / "run"
    summary = learn(capsys, data, run, "--target", "y", "--tune", "10")
    trials = strict((run / "tune.json").read_text())
    assert [trial["rows"] for trial in trials] == [300, 300]
    assert strict((run / "config.json").read_text())["config"]["lr"] == min(trials, key=lambda t: t["bits"])["lr"]
    tuning, ours = summary["tuning_cpu_seconds"], summary["cpu_seconds"]["pliant"]
    assert 0 < tuning < ours
    assert summary["rows_per_second"] == pytest.approx(320 / (ours - tuning), rel=0.01)
    # As if it had been stopped just before its end.
    (run / "summary.json").unlink()
    (tmp_path / "ledger.jsonl").unlink()
    again = learn(capsys, data, run, "--target", "y", "--resume")
    assert again["tuning_cpu_seconds"] == tuning
    assert again["cpu_seconds"]["pliant"] == pytest.approx(ours, abs=0.01)
    assert strict((tmp_path / "ledger.jsonl").read_text())["cpu_seconds"] == again["cpu_seconds"]
    assert "tuning_cpu_seconds" not in learn(capsys, data, tmp_path / "plain", "--target", "y", "--rows", "16")


class Killed(BaseException):
    """What ends a process without a word."""


@pytest.mark.parametrize("options", [["--delay", "90"], ["--group", "site", "--opponents", "no-change", "frozen"]])
def test_every_answer_is_paid_once_however_often_a_run_is_killed_or_stopped(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = itertools.count()
    clock = SimpleNamespace(perf_counter=time.perf_counter, process_time=lambda: float(next(ticks)))
    monkeypatch.setattr(timed, "time", clock)  # so each call costs one second
    data, ends = write(tmp_path / "t.csv", 400, group="--group" in options), iter([])

    def interrupted(*arguments: Any) -> Iterator[Any]:
        kind, left = next(ends, (None, 0))
        for place, record in enumerate(prequential(*arguments)):
            yield record
            if place == left and kind is not None:
                if kind == "killed":
                    raise Killed
                signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(drive, "prequential", interrupted)
    given = ["--target", "y", "--save-every", "70", *options]
    whole = learn(capsys, data, tmp_path / "whole", *given)
    run = tmp_path / "run"
    command = ["learn", "series", "--data", str(data), "--run", str(run), *SHORT, *given, "--resume"]
    ends = iter([("stopped", 3), ("killed", 12), ("killed", 2), ("stopped", 14), ("killed", 9), ("killed", 25)])
    codes = []
    while not codes or codes[-1] != 0:
        try:
            codes.append(main(command))
        except Killed:
            codes.append(-9)
    assert {130, -9, 0} == set(codes)
    again = strict((run / "summary.json").read_text())
    assert again["cpu_seconds"] == whole["cpu_seconds"]
    assert all(seconds == int(seconds) > 40 for seconds in again["cpu_seconds"].values())
    assert again["members"] == whole["members"]
    assert (run / "records.jsonl").read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()


def test_without_the_label_as_an_input_nobody_sees_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ["a,y", *(f"0,{'yes' if i // 10 % 2 else 'no'}" for i in range(400))]
    (tmp_path / "t.csv").write_text("\n".join(rows))
    seen = learn(capsys, tmp_path / "t.csv", tmp_path / "seen", "--target", "y")
    blind = learn(capsys, tmp_path / "t.csv", tmp_path / "blind", "--target", "y", "--no-label-as-input")
    assert seen["members"]["pliant"]["accuracy"] > 0.8
    assert blind["members"]["pliant"]["accuracy"] < 0.65


def test_every_option_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["learn", "series"], ["stream"]):
        with pytest.raises(SystemExit) as end:
            main([*command, "--help"])
        assert end.value.code == 0
        said = capsys.readouterr().out
        expected = (
            ("--learn", "--state", "--input")
            if command == ["stream"]
            else ("--data", "--target", "--horizon", "--delay")
        )
        for option in expected:
            assert option in said


@pytest.mark.slow
@pytest.mark.parametrize("group", [False, True])
def test_asked_to_stop_it_saves_and_goes_on_to_the_same_bytes(group: bool, tmp_path: Path) -> None:
    data = write(tmp_path / "t.csv", 800, group=group)
    bad = data.read_text().replace(",u,", ",u,", 1).split("\n")
    for place in (100, 400, 700):
        bad[place] += ",more"
    data.write_text("\n".join(bad))
    options = ["--data", str(data), "--target", "z", "--horizon", "5", "--retrain", "300", "--no-report"]
    options += ["--opponents", "mean", "seasonal", "frozen", "retrained", "--save-every", "100000"]
    options += ["--group", "site"] if group else []
    command = [sys.executable, "-m", "pliant.cli", "learn", "series", *options, "--run"]
    process = subprocess.Popen([*command, str(tmp_path / "stopped")], stderr=subprocess.PIPE, text=True)
    found = tmp_path / "stopped" / "records.jsonl"
    while process.poll() is None and not (found.exists() and found.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate()
    assert process.returncode == 130, said
    assert "learn series --resume --run" in said
    assert not (tmp_path / "stopped" / "summary.json").exists()
    for name, more in (("stopped", ["--resume"]), ("whole", [])):
        done = subprocess.run([*command, str(tmp_path / name), *more], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    assert found.read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("stopped", "whole"))
    assert one["problems"] == two["problems"] == {"row with too few or too many cells (left out)": 3}
    assert one["members"] == two["members"]


def test_a_run_that_cannot_be_saved_says_so_when_it_is_stopped_and_begins_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data, run = write(tmp_path / "t.csv", 200), tmp_path / "run"
    whole = learn(capsys, data, tmp_path / "whole", "--target", "y")
    command = ["learn", "series", "--data", str(data), "--run", str(run), *SHORT, "--target", "y", "--resume"]
    record = Run.record

    def stopping(self: Run, *rows: Any) -> None:
        record(self, *rows)
        signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(LastLabel, "resumable", False)  # as river's trees
        patch.setattr(Run, "record", stopping)
        assert main(command) == 130
    assert "cannot be saved; begin anew with: pliant learn series --resume" in capsys.readouterr().err
    assert (run / "records.jsonl").stat().st_size
    assert not (run / "lives").exists()
    # As if it had been killed before anything but the config was written.
    (run / "schema.json").unlink()
    assert main(command) == 0
    assert strict(capsys.readouterr().out)["members"] == whole["members"]
    assert (run / "records.jsonl").read_bytes() == (tmp_path / "whole" / "records.jsonl").read_bytes()
    assert (run / "schema.json").read_bytes() == (tmp_path / "whole" / "schema.json").read_bytes()


def test_another_mixer_is_chosen_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "t.csv", 200)
    bits = [learn(capsys, data, tmp_path / name, "--target", "y", "--mixer", name)["members"]["pliant"]["bits"]
            for name in ("GatedLRU", "MultiresConv", "MLSTM")]  # fmt: skip
    assert len(set(bits)) == 3 and max(bits) < 1.5
    assert main(["learn", "series", "--data", str(data), "--target", "y", "--mixer", "Attention"]) == 2
    assert "Attention" in capsys.readouterr().err
    refused = ["--mixer", "MLSTM", "--rule", "trace", "--run", str(tmp_path / "refused")]
    assert main(["learn", "series", "--data", str(data), "--target", "y", *refused]) == 2
    assert "which MLSTM has not" in capsys.readouterr().err and not (tmp_path / "refused").exists()
