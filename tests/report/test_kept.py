"""The figure that a kept run opens with."""

import json
from pathlib import Path
from typing import Any

import pytest

from pliant.report import write_report
from pliant.report.kept import kept_figure
from pliant.report.load import load
from tests.report.pages import make_run


def kept_run(folder: Path, windows: int = 8, per_task: int = 4, **config: Any) -> Path:
    """A run beside `plain`, which is right in 0.9 less 0.1 for each task; the learner is right in 0.8."""
    make_run(folder, windows=windows, keep=["toward-init", "isometry"], **config)
    rows = [json.loads(line) for line in (folder / "records.jsonl").read_text().splitlines()]
    for index, row in enumerate(rows):
        row["task"] = index // per_task
        row["members"]["plain"] = {"answers": 500, "bits": 1.0, "accuracy": 0.9 - 0.1 * row["task"]}
        row["members"]["pliant"]["accuracy"] = 0.8
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_it_stands_first_and_says_where_both_have_gone(tmp_path: Path) -> None:
    run = kept_run(tmp_path / "run", windows=12)
    page = write_report([run]).read_text()
    assert page.index("Kept able to learn") < page.index("Bits saved per answer against")
    assert "without --keep toward-init,isometry. pliant went from 0.80 to 0.80; plain went from 0.80 to 0.70." in page


def test_it_is_left_out_where_nothing_is_kept(tmp_path: Path) -> None:
    assert kept_figure(load(make_run(tmp_path / "run")), "x") is None


@pytest.mark.parametrize(("windows", "unit"), [(90, "3 tasks"), (40, "task"), (41, "2 tasks")])
def test_many_tasks_are_told_several_at_a_time(windows: int, unit: str, tmp_path: Path) -> None:
    found = kept_figure(load(kept_run(tmp_path / "run", windows=windows, per_task=1)), "x")
    assert found is not None
    assert f"over each {unit}, answered" in found.caption


def test_windows_count_by_their_answers(tmp_path: Path) -> None:
    run = kept_run(tmp_path / "run", windows=8)
    rows = [json.loads(line) for line in (run / "records.jsonl").read_text().splitlines()]
    rows[-1]["members"]["pliant"] |= {"answers": 1500, "accuracy": 0.4}
    rows[-2]["members"]["pliant"] |= {"accuracy": None}
    (run / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = kept_figure(load(run), "x")
    assert found is not None
    # The last task: twice 500 answers at 0.8, 1500 at 0.4, and 500 without a score.
    assert "pliant went from 0.80 to 0.56" in found.caption


def test_what_a_config_says_is_text(tmp_path: Path) -> None:
    run = kept_run(tmp_path / "run")
    config = json.loads((run / "config.json").read_text())
    config["config"]["keep"] = ["<script>alert(1)</script>"]
    (run / "config.json").write_text(json.dumps(config))
    assert "<script>alert" not in write_report([run]).read_text()
