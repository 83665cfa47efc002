"""Reproductions: their trials are kept and continued, their judges read results rightly."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest

from pliant.cli import main
from pliant.core import Role, UsageError, seeded
from pliant.recipes.grokking import GROKKING, SETTINGS, Transformer, judge, run, split, steps_to, trials
from pliant.recipes.reproduce import Claim, Reproduction, Result, Trial, reproduce


def count(trial: Trial, progress: Callable[[float, str], None]) -> Result:
    progress(1.0, "")
    return {"value": trial.seed}


def made(run: Callable[..., Result] = count) -> Reproduction:
    def judge(results: object) -> list[Claim]:
        total = sum(result["value"] for _, result in results)  # type: ignore[attr-defined]
        return [Claim("sum", "3", "read", str(total), "", 3, "reproduced")]

    return Reproduction(
        "sums", "nobody", lambda scale: [Trial("one", {}, s) for s in range(3)], run, judge, lambda t: 1
    )


def test_a_stopped_reproduction_goes_on_and_a_cut_line_is_run_again(tmp_path: Path) -> None:
    ran: list[int] = []

    def stops(trial: Trial, progress: Callable[[float, str], None]) -> Result:
        if trial.seed == 2 and len(ran) < 3:
            ran.append(-1)
            raise KeyboardInterrupt
        ran.append(trial.seed)
        return {"value": trial.seed}

    with pytest.raises(KeyboardInterrupt):
        reproduce(made(stops), "minute", tmp_path / "run")
    file = tmp_path / "run" / "trials.jsonl"
    file.write_bytes(file.read_bytes()[:-20])  # as a kill may leave it
    told: list[str] = []
    found = reproduce(made(stops), "minute", tmp_path / "run", tell=told.append)
    assert ran == [0, 1, -1, 1, 2]
    assert told[0] == "[1/3] one, seed 0: kept from before"
    (claim,) = found["claims"]
    assert (claim["ours"], claim["scale"], claim["verdict"]) == ("3", "minute", "reproduced")
    assert reproduce(made(stops), "minute", tmp_path / "run") == found and len(ran) == 5


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        reproduce(made(), "minute", tmp_path / "file")


# Grokking; numbered checks are those of effective-learning-rate.md, section 8


def test_check_11_parameters_and_split() -> None:
    with seeded(0):
        model = Transformer()
    assert sum(p.numel() for p in model.parameters()) == 227_584
    data = split(0)
    assert [len(part) for part in data] == [2737, 2737, 10952, 10952]
    pairs = {(int(x), int(y)) for x, _, y, _, _ in [*data.train.tolist(), *data.test.tolist()]}
    assert len(pairs) == 117**2
    assert all((row[0] + row[2]) % 117 == total
               for row, total in zip(data.test[:50].tolist(), data.test_sums[:50].tolist(), strict=True))  # fmt: skip
    assert set(model.roles().values()) == {Role.EMBEDDING, Role.MATRIX, Role.HEAD}
    with seeded(0):
        normed = Transformer(59, width=64, normed=True)
    assert sum(role is Role.GAIN for role in normed.roles().values()) == 3
    assert normed(data.test[:2] % 59).shape == (2, 59)


def test_twenty_updates_of_the_published_configuration() -> None:
    for trial in trials("paper"):
        assert trial.settings["steps"] == 1_000_000
    found = run(Trial("projected", SETTINGS["projected"] | {"steps": 50}, 0), lambda share, word: None)
    assert found["step"] == [50] and 0 <= found["accuracy"][0] < 0.1


def test_the_judge_reads_when_the_test_was_right() -> None:
    def result(steps: list[int], accuracy: list[float], flips: list[list[float]] | None = None) -> Result:
        return {"step": steps, "accuracy": accuracy, "flipped": flips or []}

    assert steps_to(result([1, 2], [0.5, 0.96])) == 2 and steps_to(result([1], [0.5])) == math.inf
    fast, slow = result([500, 1000], [0.5, 1.0]), result([500, 4000], [0.01, 0.07])
    rewarmed = result([4000, 4500, 4750], [0.01, 0.5, 1.0], [[4000, 0.02], [4500, 0.2]])
    rows = [(Trial("projected", SETTINGS["projected"] | {"steps": 1500}, s), fast) for s in range(3)]
    rows += [(Trial("free", SETTINGS["free"] | {"steps": 4000}, s), slow) for s in range(3)]
    rows += [(Trial("decayed", SETTINGS["decayed"] | {"steps": 2500}, s), fast) for s in range(3)]
    rows += [(Trial("rewarmed", SETTINGS["rewarmed"] | {"steps": 5500}, s), rewarmed) for s in range(3)]
    claims = judge(rows)
    assert [claim.verdict for claim in claims] == ["reproduced"] * 3
    assert claims[0].spread == "at least 4.0 to 4.0 times" and "at least 4.0 times" in claims[0].ours
    assert claims[2].ours.startswith("750, 750, 750 steps after")
    small = [t for t in trials("ten") if t.name in ("normed", "scale decayed")]
    rows += [(trial, fast if trial.name == "scale decayed" else slow) for trial in small]
    assert judge(rows)[3].verdict == "direction only"
    assert "1,000, 1,000, 1,000 steps if they decay; test accuracy 0.07 at most" in judge(rows)[3].ours
    rows[0] = (rows[0][0], slow)
    assert judge(rows)[0].verdict == "not reproduced"


def test_the_command_says_what_it_would_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "grokking", "--scale", "minute", "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith("2 trials, about 40 seconds\n")
    assert main(["reproduce", "grokking", "--dry-run", "--json", "--scale", "paper"]) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 18
    assert main(["reproduce", "groking"]) == 2
    assert "did you mean 'grokking'?" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_check_12_and_13_grokking_early_late_and_on_demand(tmp_path: Path) -> None:
    found = reproduce(GROKKING, "ten", tmp_path)
    assert [claim["verdict"] for claim in found["claims"]] == ["reproduced"] * 3 + ["direction only"]


@pytest.mark.slow
def test_check_14_with_norms_and_projection_it_takes_decay_of_gains() -> None:
    def found(name: str) -> Result:
        (trial,) = (trial for trial in trials("ten") if trial.name == name and trial.seed == 0)
        return run(trial, lambda share, word: None)

    decayed, free = found("scale decayed"), found("normed")
    assert steps_to(decayed) < math.inf
    assert max(free["accuracy"]) < 0.7


def test_trials_may_depend_on_the_results_of_the_first(tmp_path: Path) -> None:
    def then(scale: str, results: list[tuple[Trial, Result]]) -> list[Trial]:
        return [Trial("two", {"best": max((r["value"] for _, r in results), default=-1)}, 7)]

    what = dataclasses.replace(made(), then=then)
    assert what.then("ten", [])[0].settings == {"best": -1}
    (claim,) = reproduce(what, "ten", tmp_path)["claims"]
    assert claim["ours"] == str(0 + 1 + 2 + 7)
    keys = [json.loads(json.loads(line)["key"]) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert keys[-1] == ["two", {"best": 2}, 7]
