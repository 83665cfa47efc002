"""The package as a whole: what it exports, and what importing it costs."""

import importlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pliant

FLOORS = ("core", "kernels", "streams", "optim", "measure", "mixers", "models", "learn", "recipes", "report", "cli")


def test_importing_pliant_imports_no_torch() -> None:
    code = "import pliant, sys; assert 'torch' not in sys.modules; print(pliant.__version__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == pliant.__version__


@pytest.mark.parametrize("floor", FLOORS)
def test_every_public_name_exists_and_is_explained(floor: str) -> None:
    module = importlib.import_module(f"pliant.{floor}")
    assert module.__doc__
    for name in getattr(module, "__all__", ()):
        thing = getattr(module, name)
        assert name == "State" or thing.__doc__, f"pliant.{floor}.{name} has no docstring"


def test_the_names_that_others_import_are_there() -> None:
    from pliant.core import UsageError  # noqa: F401
    from pliant.kernels import causal_conv, linear_scan  # noqa: F401
    from pliant.learn import Learner, Life, bptt, fit, prequential  # noqa: F401
    from pliant.mixers import RGLRU, GatedLRU, SequenceMixer  # noqa: F401
    from pliant.models.classifier import SequenceClassifier  # noqa: F401
    from pliant.streams import digits, drift  # noqa: F401


def test_nothing_draws_from_the_random_module() -> None:
    source = Path(pliant.__file__).parent
    assert not [
        path for path in source.rglob("*.py") if re.search(r"^\s*(import|from) random\b", path.read_text(), re.M)
    ]
