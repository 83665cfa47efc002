"""`pliant measure plasticity`: logs of many lives and of one, environments, what is refused."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pliant.cli import main
from pliant.measure.information import empowerment, joint_law
from pliant.measure.lifetimes import sampled
from pliant.streams.turns import Life, Turns
from tests.measure.systems import fair, flip

LOOP = joint_law(lambda a, o: flip(o[-1], 0.1) if a else fair(a, o), lambda a, o: flip(a[-1], 0.1), 2)


def told(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["measure", "plasticity", *arguments, "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["measure", "plasticity", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("pliant: ") and err.count("\n") == 1
    return err


@pytest.fixture
def log(tmp_path: Path) -> Path:
    lives = sampled(LOOP, 1000, seed=0)
    pairs = zip(lives.actions.tolist(), lives.observations.tolist(), strict=True)
    Turns("AO", (2, 2), {k: Life(a, o) for k, (a, o) in enumerate(pairs)}).write(tmp_path / "log.jsonl")
    return tmp_path / "log.jsonl"


def test_many_lives(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(capsys, str(log), "--permutations", "20")
    assert (found["lives"], found["indices"], found["order"], found["verdict"]) == (1000, 2, "AO", "enough lifetimes")
    assert found["alphabet"] == {"actions": 2, "observations": 2} and found["bound"] == 2
    assert found["empowerment"]["low"] <= empowerment(LOOP) <= found["empowerment"]["high"]
    assert np.array(found["flow"]).shape == (2, 2) and len(found["growing"]["plasticity"]) == 2
    short = told(capsys, str(log), "--act-window", "1", "1", "--obs-window", "1", "1", "--permutations", "0")
    assert short["empowerment"]["bits"] == pytest.approx(found["growing"]["empowerment"][0], abs=1e-12)
    assert main(["measure", "plasticity", str(log), "--permutations", "0"]) == 0
    out = capsys.readouterr().out
    assert "A 1:2 -> O 1:2" in out and out.splitlines()[-1] == "enough lifetimes"


def test_one_long_life(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    a = rng.integers(0, 2, 3000)
    o = np.roll(a, 1) ^ (rng.random(3000) < 0.1)
    Turns("AO", (2, 2), {0: Life(a.tolist(), o.tolist())}).write(tmp_path / "log.jsonl")
    found = told(capsys, str(tmp_path / "log.jsonl"), "--depth", "3")
    assert found["rates"]["E1"]["empowerment"] == pytest.approx(0.5, abs=0.04)
    assert found["rates"]["E1"]["plasticity"] == pytest.approx(0, abs=0.02)
    assert len(found["over time"]["index"]) == 30
    assert main(["measure", "plasticity", str(tmp_path / "log.jsonl")]) == 0
    assert "bits per index by E3" in capsys.readouterr().out


@pytest.mark.slow
def test_pictures(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    drawn = log.with_name("flow.svg")
    assert main(["measure", "plasticity", str(log), "--figure", str(drawn), "--permutations", "0"]) == 0
    assert all(words in drawn.read_text() for words in ("<svg", "flow between single turns", "both under their bound"))
    Turns("AO", (2, 2), {0: Life([0, 1] * 50, [1, 1, 0, 0] * 25)}).write(log)
    assert main(["measure", "plasticity", str(log), "--figure", str(drawn)]) == 0
    assert "bits per index" in drawn.read_text() and "flow between" not in drawn.read_text()
    capsys.readouterr()
    assert "cannot be written" in refused(capsys, str(log), "--figure", str(log / "inside.svg"))


def test_an_agent_in_an_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "lake.jsonl"
    asked = ["gym:FrozenLake-v1", "--lives", "60", "--indices", "2", "--permutations", "0"]
    found = told(capsys, *asked, "--agent", "q:epsilon=0.5,first=1", "--log", str(log))
    assert (found["lives"], found["indices"], found["order"]) == (60, 2, "OA")
    assert told(capsys, str(log), "--permutations", "0") == found  # the log holds what was measured
    (tmp_path / "mine.py").write_text("def make(env, seed):\n    return lambda observation, reward, ended: 0\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        still = told(capsys, *asked, "--agent", "mine:make")
    assert still["empowerment"]["bits"] == 0 and still["plasticity"]["bits"] == 0


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["none.jsonl"], "none.jsonl cannot be read"),
        (["."], "no readable config.json"),
        ([], "needs a log or an environment"),
        (["gym:Nowhere-v1"], "gym:Nowhere-v1 cannot be made"),
        (["gym:CartPole-v1"], "on the command line --bins 3"),
        (["gym:FrozenLake-v1", "--agent", "clever"], "expected random, q or module:function"),
        (["gym:FrozenLake-v1", "--agent", "q:speed=1"], "q has no setting 'speed'; it has epsilon"),
        (["gym:FrozenLake-v1", "--agent", "q:epsilon"], "'epsilon' is no setting"),
        (["gym:FrozenLake-v1", "--agent", "nothing.here:make"], "cannot be imported"),
        (["gym:FrozenLake-v1", "--agent", "q:rate=nan"], "rate is nan, expected 0 to 1"),
        (["gym:FrozenLake-v1", "--agent", "q:epsilon=7"], "epsilon is 7, expected 0 to 1"),
        (["gym:FrozenLake-v1", "--agent", ":make"], "expected random, q or module:function"),
        (["gym:FrozenLake-v1", "--agent", "..x:make"], "expected random, q or module:function"),
        (["gym:FrozenLake-v1", "--agent", "math:pi"], "is 3.14159"),
        (["gym:FrozenLake-v1", "--seed", "-1"], "--seed is -1"),
        (["gym:FrozenLake-v1", "--lives", "0"], "0 lives"),
        (["gym:FrozenLake-v1", "--lives", "5", "--act-window", "2", "9"], "is not within the stream"),
        (["gym:FrozenLake-v1", "--lives", "1", "--indices", "4"], "one life of 4 indices says nothing"),
    ],
)
def test_misuse(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--indices", "-1"], "--indices is -1"),
        (["--bootstrap", "1"], "bootstrap 1"),
        (["--permutations", "-2"], "permutations -2"),
        (["--seed", "-3"], "--seed is -3"),
        (["--agent", "q"], "--agent says nothing of a log of many lives"),
        (["--depth", "3"], "--depth says nothing of a log of many lives"),
        (["--log", "other.jsonl"], "--log says nothing of a log of many lives"),
    ],
)
def test_numbers_out_of_range(arguments: list[str], said: str, log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert said in refused(capsys, str(log), *arguments)


def test_a_long_life_may_have_deep_contexts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ones = [0, 1] * 1000
    Turns("AO", (2, 2), {0: Life(ones, ones)}).write(tmp_path / "log.jsonl")
    assert told(capsys, str(tmp_path / "log.jsonl"), "--depth", "1200")["rates"]


def test_what_would_be_ignored_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = tmp_path / "log.jsonl"
    Turns("AO", (2, 2), {0: Life([0, 1] * 100, [1, 0] * 100)}).write(one)
    assert "--mode says nothing of a log of one life" in refused(capsys, str(one), "--mode", "literal")
    lake = ["gym:FrozenLake-v1", "--lives", "1"]
    assert "--act-window says nothing of gym:ENV with one life" in refused(capsys, *lake, "--act-window", "1", "2")
    assert "--lives says nothing of a run" in refused(capsys, str(tmp_path), "--lives", "3")
    assert told(capsys, str(one), "--indices", "50")["indices"] == 50


def test_a_log_may_begin_with_a_byte_order_mark(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = told(capsys, str(log), "--permutations", "0")
    log.write_bytes(b"\xef\xbb\xbf" + log.read_bytes())
    assert told(capsys, str(log), "--permutations", "0") == plain


def test_a_log_that_breaks_off(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = log.read_text().splitlines()
    log.write_text("\n".join(lines[:-1]))
    assert "life 999 ends without the observation of index 2" in refused(capsys, str(log))
    log.write_text("\n".join(lines[:5] + lines[6:]))
    assert "line 6: life 1 has the observation of index 1 where the action of index 1" in refused(capsys, str(log))
    assert "cannot be written" in refused(capsys, "gym:FrozenLake-v1", "--lives", "2", "--log", "/nowhere/log")
