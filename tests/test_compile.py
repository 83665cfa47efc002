"""Every mixer and model compiles into one graph for all lengths, exports, bears bf16 autocast; its operators are sound.

What is tested stands in `compiling.py`, which runs in a process of its own: the type checks of the tests cannot be
compiled.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import pliant.kernels  # noqa: F401, registers the operators
from tests.mixers.cases import CASES as MIXERS
from tests.models.cases import CASES as MODELS

NAMES = [case.name for case in MIXERS + MODELS]
QUICK = ["xLSTM, an mLSTM and an sLSTM block"]
CALLED_ELSEWHERE = {"pliant::gated_scan", "pliant::gated_scan_backward"}  # tests/kernels


def run(check: str, backend: str, names: list[str]) -> list[list[str]]:
    """Asserts that no case failed; what was found of each."""
    command = [sys.executable, "-m", "tests.compiling", check, backend, *names]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = [json.loads(line) for line in done.stdout.splitlines()]
    failed = {case["name"]: case["failed"] for case in cases if case["failed"]}
    assert not failed, "\n".join(f"{name}: {why}" for name, why in failed.items())
    assert [case["name"] for case in cases] == (names or NAMES)
    return [case["found"] for case in cases]


def test_some_export_bear_autocast_and_call_sound_operators() -> None:
    run("export,autocast,operators", "", QUICK)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_each_compiles_into_one_graph_for_all_lengths(name: str) -> None:
    run("compile", "aot_eager", [name])


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if "," not in name])
def test_each_compiles_into_machine_code(name: str) -> None:
    run("compile", "inductor", [name])


@pytest.mark.slow
@pytest.mark.parametrize("check", ["export", "autocast"])
def test_all_export_and_bear_autocast(check: str) -> None:
    run(check, "", [])


@pytest.mark.slow
def test_every_operator_is_called_by_some_mixer_and_sound() -> None:
    called = {name.replace(".default", "").replace(".", "::") for found in run("operators", "", []) for name in found}
    known = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("pliant::")}
    assert called | CALLED_ELSEWHERE == known
