"""Looks at a learner on its way: without a trace, exact over a stop, in the records and in what is saved."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pliant.cli import main
from pliant.core import Answer, Batch, Question, generator, seeded
from pliant.core.run import Run
from pliant.learn import Learner, Life, bptt
from pliant.measure.health import health
from pliant.models import SequenceClassifier
from pliant.optim import adamw
from pliant.recipes import checkup, digits, drive
from pliant.recipes.checkup import Checkup, side_by_side

CONFIG = digits.DigitsConfig(answers=2400, size=1, opponents=("majority",), keep=(), every=1200)


def carry_out(folder: Path, stop_after: int | None = None, plasticity: bool = False) -> tuple[Run, Life]:
    run, life = Run(folder), digits.life(CONFIG)
    if not run.exists():
        run.create(digits.COMMAND, {**vars(CONFIG)}, threads=1)
    rows = 0

    def show(answers: int, *_: Any) -> None:
        nonlocal rows
        rows += 1
        if rows == stop_after:
            import os
            import signal

            os.kill(os.getpid(), signal.SIGINT)

    driving = drive.Driving(report=False, save_every=10**9, plasticity=plasticity)
    drive.drive(run, life, driving=driving, show=show, row=200, every=1200)
    return run, life


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Life]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkup, "EVERY", 3000)
        return carry_out(tmp_path_factory.mktemp("runs") / "whole")


def test_a_run_holds_looks_that_are_exact_over_a_stop(
    tmp_path: Path, whole: tuple[Run, Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "EVERY", 3000)
    run, _ = whole
    looks = [row for row in run.lines("records.jsonl") if "health" in row]
    assert [row["answers"] for row in looks] == [208, 608, 1008, 1408, 1808, 2208]
    assert set(looks[-1]["health"]) == {"verdict", "units", "matrices", "recurrences", "roles", "whole"}
    assert looks[-1]["health"]["whole"]["churn"] > 0 and "churn" not in looks[0]["health"]["whole"]
    assert run.read("summary.json")["health_cpu_seconds"] > 0
    carry_out(tmp_path / "parts", stop_after=5)
    again, _ = carry_out(tmp_path / "parts")
    assert (again.folder / "records.jsonl").read_bytes() == (run.folder / "records.jsonl").read_bytes()


def test_plasticity_is_told_at_each_look_and_changes_nothing(
    tmp_path: Path, whole: tuple[Run, Life], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checkup, "EVERY", 3000)
    run, _ = carry_out(tmp_path / "run", stop_after=4, plasticity=True)
    rows = list(run.lines("records.jsonl"))
    bits = {row["answers"]: row["health"]["whole"].pop("plasticity") for row in rows if "health" in row}
    assert rows == list(whole[0].lines("records.jsonl"))[: len(rows)]
    assert list(bits) == [208, 608] and all(0 < one < 3.33 for one in bits.values())
    assert main(["measure", "plasticity", str(run.folder), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0 < found["bits"] < found["most"] == pytest.approx(3.3219, abs=1e-4) and found["forks"] == 16
    assert [(look["answers"], look["bits"]) for look in found["history"]] == list(bits.items())
    assert main(["measure", "plasticity", str(run.folder), "--figure", str(tmp_path / "bits.svg")]) == 0
    assert "updates" in (tmp_path / "bits.svg").read_text()
    assert f"plasticity {found['bits']:.3f} ± {found['error']:.3f} bits per answer" in capsys.readouterr().out


def test_the_run_is_the_one_without_looks(
    tmp_path: Path, whole: tuple[Run, Life], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkup, "PROBE", 10**9)  # never ready
    run, life = carry_out(tmp_path / "blind")
    assert not any("health" in row for row in run.lines("records.jsonl"))
    ours, theirs = (one.learner.model.state_dict() for one in (life, whole[1]))
    assert all(torch.equal(p, theirs[name]) for name, p in ours.items())


def test_measure_health_of_a_run(whole: tuple[Run, Life], capsys: pytest.CaptureFixture[str]) -> None:
    run, life = whole
    before = sorted((path, path.read_bytes()) for path in run.folder.rglob("*") if path.is_file())
    assert main(["measure", "health", str(run.folder), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    name = "stack.blocks.0.mlp.linear_out"
    assert told["units"][name]["rows"] == 256 and len(told["history"]) == 6
    assert told["matrices"]["head.linear.weight"]["norm"] == pytest.approx(
        float(life.learner.model.head.linear.weight.detach().norm()), rel=1e-6
    )
    assert told["new_task"]["fell"] > 0 and told["whole"]["sharpness"]
    assert main(["measure", "health", str(run.folder)]) == 0
    text = capsys.readouterr().out
    assert told["verdict"] == text.splitlines()[-1] and "after 208 answers: " in text and "a new task: " in text
    assert sorted((path, path.read_bytes()) for path in run.folder.rglob("*") if path.is_file()) == before


@pytest.mark.parametrize("changed", [{"change": "zzz"}, {"keep": ["toward-init"]}, {"keep": ["zzz"]}, {"size": "big"}])
def test_an_altered_config_is_told_in_a_sentence(
    whole: tuple[Run, Life], changed: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0].folder, folder)
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= changed
    (folder / "config.json").write_text(json.dumps(config))
    assert main(["measure", "health", str(folder)]) == 2
    said = capsys.readouterr()
    assert said.out == "" and len(said.err.strip().splitlines()) == 1


def test_measure_health_of_a_saved_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with seeded(0):
        model = SequenceClassifier(3, 2, width=8, depth=1)
    model.save_pretrained(tmp_path / "model")
    assert main(["measure", "health", str(tmp_path / "model"), "--json", "--seed", "3"]) == 0
    told = json.loads(capsys.readouterr().out)
    x = torch.randn(16, 32, 3, generator=generator(3, "probe"))
    assert told["units"] == health(model, x).units and told["new_task"] is None and told["history"] == []
    (tmp_path / "model" / "model.safetensors").write_bytes(b"torn")
    assert main(["measure", "health", str(tmp_path / "model")]) == 2
    error = capsys.readouterr().err
    assert "cannot be read" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "needs a folder"),
        (["nowhere"], "is not there"),
        (["model.pt"], "is a file"),
        (["empty"], "no readable config.json"),
        (["strange"], "no model by save_pretrained"),
        (["lifeless"], "no whole life"),
        (["lifeless", "--sed", "1"], "--seed"),
    ],
)
def test_wrong_input_gets_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.pt").write_bytes(b"\x80\x04pickle")
    for name in ("empty", "strange"):
        Path(name).mkdir()
    Path("strange/config.json").write_text('{"num_features": 3}')
    Run("lifeless").create(digits.COMMAND, {**vars(CONFIG)}, threads=1)
    assert main(["measure", "health", *arguments]) == 2
    out, error = capsys.readouterr()
    assert not out and said in error and error.count("\n") == 1 and "Traceback" not in error


def test_measure_asks_for_a_kind_and_helps(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["measure"]) == 0 and "health" in capsys.readouterr().out
    assert main(["measure", "helth"]) == 2 and "did you mean 'health'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["measure", "health", "--help"])
    assert "Folder of a run, or of a model" in capsys.readouterr().out


def question(time: int, rows: list[int], steps: int) -> Question:
    shape = (len(rows), steps)
    on = torch.ones(shape, dtype=torch.bool)
    x = torch.arange(len(rows) * steps, dtype=torch.float32).reshape(*shape, 1) + 100 * time
    return Question(x, ~on, on, time, torch.tensor(rows))


def test_questions_about_other_streams_stand_in_rows_of_their_own() -> None:
    asked = [question(0, [2, 0], 2), question(1, [0], 1)]
    x, mask = side_by_side([q.rows for q in asked], [(q.inputs, q.mask) for q in asked])
    assert x.squeeze(-1).tolist() == [[2, 3, 100], [0, 1, 0]]
    assert mask.tolist() == [[True, True, True], [True, True, False]]


def test_a_probe_keeps_the_first_questions_and_their_answers_and_comes_back() -> None:
    one = Checkup()
    for time in range(40):
        asked = question(time, [0, 1], 8)
        late = question(time - 3, [0, 1], 8)
        answer = Answer(torch.zeros(2, 8, dtype=torch.long), late.mask, late.mask, time - 3, late.rows)
        one.take(Batch((answer,) if time >= 3 else (), asked))
    assert [q.time for q in one.questions] == list(range(16)) == [a.time for a in one.answers]
    assert one.due() and one.asked == 40 * 16
    with seeded(0):
        model = SequenceClassifier(1, 2, width=8, depth=1)
    learner = Learner(model, adamw(model), bptt(8), streams=2)
    one.look(learner)
    assert not one.due()
    two = Checkup()
    two.load_state_dict(one.state_dict())
    with torch.no_grad():
        model.embed.weight.add_(1)
    assert one.look(learner) == two.look(learner)
