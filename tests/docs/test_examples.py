"""The examples run and do what they say; the README's example is a doctest; the code in the docs works."""

import doctest
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pliant.core import seeded
from tests.docs.code import names_of

ROOT = Path(__file__).parents[2]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / "examples" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.global_rng
def test_late_labels_are_learned_from() -> None:
    scores = load("late_labels").main()
    assert scores["bits"] < 0.9
    assert scores["accuracy"] > 0.8


@pytest.mark.global_rng
def test_an_environment_runs_in_the_same_loop() -> None:
    assert len(load("gym_task").main(episodes=5)) == 5


@pytest.mark.global_rng
def test_a_unit_is_made_new_in_mid_stream() -> None:
    renewed, accuracy = load("reset_unit").main(questions=100)
    assert renewed == 5
    assert accuracy > 0.2


@pytest.mark.global_rng
def test_packed_and_padded_episodes_agree() -> None:
    assert max(load("packed_episodes").main()) < 1e-6


@pytest.mark.global_rng
def test_a_forked_and_a_killed_life_go_on_to_the_same_bits() -> None:
    assert load("fork_and_resume").main() == ([], [])


def test_the_readme_example_is_right() -> None:
    failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert tried > 5
    assert failed == 0


def test_the_code_about_plasticity_holds() -> None:
    names = names_of("plasticity.md")
    assert names["both"].plasticity == pytest.approx(2.8877123795, abs=1e-9)
    assert 0 < names["found"].bits < names["found"].most and names["one"].updates == 0


def test_the_mixer_of_the_docs_keeps_the_contract() -> None:
    import torch

    with seeded(0):
        mixer = names_of("mixers.md")["LeakyAverage"](4)
    x = torch.arange(24.0).reshape(1, 6, 4)
    whole, after = mixer(x)
    first, state = mixer(x[:, :2])
    second, state = mixer(x[:, 2:], state)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    torch.testing.assert_close(state.h, after.h)


def test_every_mixer_is_in_the_docs() -> None:
    from pliant import mixers

    table = (ROOT / "docs" / "mixers.md").read_text()
    for name in mixers.__all__:
        assert name in table
