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
    from pliant.kernels import (  # noqa: F401
        adaptive_softmax,
        causal_conv,
        linear_scan,
        matrix_memory,
        scalar_memory,
        selective_scan,
    )
    from pliant.learn import Learner, Life, bptt, fit, immediate, prequential, trace  # noqa: F401
    from pliant.measure.dispersion import sharp_limit  # noqa: F401
    from pliant.measure.health import health  # noqa: F401
    from pliant.measure.information import (  # noqa: F401
        directed_information,
        empowerment,
        flow_matrix,
        joint_law,
        plasticity,
    )
    from pliant.measure.perplexity import TokenScores, compare, critical_accuracy  # noqa: F401
    from pliant.mixers import (  # noqa: F401
        MLSTM,
        RGLRU,
        SLSTM,
        FullAttention,
        GatedLRU,
        MultiScaleSSM,
        SequenceMixer,
        WindowAttention,
    )
    from pliant.models.classifier import SequenceClassifier  # noqa: F401
    from pliant.models.language import LanguageModel  # noqa: F401
    from pliant.optim import effective_rate, normalize_and_project  # noqa: F401
    from pliant.streams import digits, drift  # noqa: F401


def test_nothing_draws_from_the_random_module() -> None:
    source = Path(pliant.__file__).parent
    assert not [
        path for path in source.rglob("*.py") if re.search(r"^\s*(import|from) random\b", path.read_text(), re.M)
    ]
