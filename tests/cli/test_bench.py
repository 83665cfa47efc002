"""`pliant bench`: figures on standard output, progress on standard error, exit codes."""

import json
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pliant import bench
from pliant.cli import main

TINY = ("--batch", "2", "--steps", "9", "--width", "8", "--seconds", "0.001")
SCAN = ("bench", "kernels", *TINY, "--only", "linear_scan")


def add_wrong_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    def make(problem: bench.Problem) -> bench.Work:
        work = bench.KERNELS["linear_scan"].work(problem, "loop")
        return replace(work, both=lambda: {**work.both(), "y": work.forward() + 1})

    absent = bench.Peer("absent", "no_such_package", "linear_scan", make)
    monkeypatch.setattr(bench, "PEERS", (bench.Peer("wrong", "torch", "linear_scan", make), absent))


def test_json_and_a_figure(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    assert main([*SCAN, "--json", "--threads", "1", "--figure", str(tmp_path / "times.svg")]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert (found["bench"], found["steps"], found["refused"], found["absent"]) == ("kernels", 9, [], [])
    assert found["environment"]["threads"] == 1
    assert [case["name"] for case in found["cases"]] == ["linear_scan"]
    assert err == "[1/1] linear_scan: numba, loop\n"
    ElementTree.parse(tmp_path / "times.svg")
    assert torch.get_num_threads() == threads


def test_a_wrong_peer_has_no_speed_and_sets_the_exit_code(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    add_wrong_peer(monkeypatch)
    assert main([*SCAN, "--peers"]) == 1
    out, err = capsys.readouterr()
    assert "not installed: no_such_package\n" in err
    *table, last = out.splitlines()
    assert last.startswith("linear_scan, wrong: y differs by ")
    assert not any("wrong" in line for line in table)
    assert sum("numba" in line for line in table) == 3
    assert main(SCAN) == 0  # nobody asked for peers


def test_lengths(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pliant.bench.compare.CHECK_STEPS", 9)
    asked = ["bench", "mixers", *TINY, "--only", "RGLRU", "--lengths", "--longest", "64"]
    assert main([*asked, "--figure", str(tmp_path / "lengths.svg")]) == 0
    out, err = capsys.readouterr()
    assert "RGLRU" in out
    assert "64 steps: RGLRU" in err
    assert "RGLRU" in (tmp_path / "lengths.svg").read_text()


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench"]) == 0
    assert main(["bench", "--help"]) == 0
    with pytest.raises(SystemExit) as stop:
        main(["bench", "kernels", "--help"])
    assert stop.value.code == 0
    assert "--peers" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["mixer"], "has no command 'mixer', did you mean 'mixers'?; it has kernels, mixers, models"),
        (["kernels", "--bach", "3"], "no option --bach, did you mean '--batch'?"),
        (["kernels", "--batch", "0"], "--batch is 0, expected at least 1"),
        (["kernels", "--steps", "-1"], "--steps is -1, expected at least 1"),
        (["kernels", "--width", "7"], "--width is 7, expected a positive even number"),
        (["kernels", "--threads", "9999"], "--threads is 9999, expected 1 to "),
        (["kernels", "--seconds", "nan"], "--seconds is nan, expected a positive number"),
        (["kernels", "--seconds", "soon"], "pliant bench kernels: "),
        (["kernels", "--only", "linear_scam"], "nothing called 'linear_scam', did you mean 'linear_scan'?"),
        (["kernels", "--lengths"], "--lengths is for mixers"),
        (["mixers", "--lengths", "--peers"], "leave out --peers"),
        (["mixers", "--lengths", "--longest", "8"], "--longest is 8, expected at least 64"),
        (["models", "--figure", "/no/such/folder/x.svg"], "there is no folder /no/such/folder"),
    ],
)
def test_wrong_input_is_one_sentence(capsys: pytest.CaptureFixture[str], arguments: list[str], says: str) -> None:
    assert main(["bench", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("pliant: ") and err.count("\n") == 1
    assert says in err
