"""Which form is taken: by name, by device, by what is installed."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pliant.core import UsageError
from pliant.kernels import select as module
from pliant.kernels.select import select

pytestmark = pytest.mark.usefixtures("unchecked")  # stand-ins for tensors
FORMS: dict[str, Any] = {name: lambda name=name: name for name in ("loop", "numba", "triton")}


def on(device: str) -> Any:
    """Stands for a tensor there."""
    return SimpleNamespace(device=torch.device(device))


@pytest.fixture(autouse=True)
def said_anew() -> None:
    module._say_once.cache_clear()


def test_the_device_chooses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HAS_TRITON", True)
    assert select("scan", FORMS, on("cpu"), None)() == "numba"
    assert select("scan", FORMS, on("cuda"), None)() == "triton"
    assert select("scan", FORMS, on("mps"), None)() == "loop"
    assert select("scan", FORMS, on("cuda"), "loop")() == "loop"


def test_what_is_slower_than_it_might_be_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "HAS_TRITON", False)
    with caplog.at_level(logging.WARNING):
        assert select("scan", FORMS, on("cuda"), None)() == "loop"
        assert select("scan", FORMS, on("cuda"), None)() == "loop"
        assert select("conv", {"loop": FORMS["loop"]}, on("cuda"), None)() == "loop"
    assert len(caplog.messages) == 2
    assert "needs the package triton" in caplog.messages[0]


def test_a_form_must_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "HAS_TRITON", False)
    with pytest.raises(UsageError, match="no form 'fast'"):
        select("scan", FORMS, on("cpu"), "fast")
    with pytest.raises(UsageError, match="needs the package triton"):
        select("scan", FORMS, on("cuda"), "triton")
