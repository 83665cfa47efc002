"""A hostile place for tests.

Empty tensors are poisoned, warnings are errors (pyproject.toml), nothing but this machine can be
reached, the seed comes from the test's name, and a test that changes the global random state fails.
"""

import hashlib
import random
import socket
from collections.abc import Iterator
from typing import Any

import jaxtyping
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

settings.register_profile(
    "pliant", deadline=None, max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck)
)
settings.load_profile("pliant")
torch.set_num_threads(1)  # here, since fixtures of modules come before those of tests

POISON = {True: float("nan"), False: 0x5A}


def poisoned(make: Any) -> Any:
    """A maker of uninitialized tensors whose result holds what no one can want."""

    def empty(*arguments: Any, **options: Any) -> torch.Tensor:
        tensor = make(*arguments, **options)
        if type(tensor) is torch.Tensor and tensor.device.type == "cpu" and tensor.numel() and not tensor.requires_grad:
            tensor.fill_(POISON[tensor.is_floating_point() or tensor.is_complex()])
        return tensor

    return empty


@pytest.fixture(autouse=True)
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
    monkeypatch.setattr(torch.Tensor, "new_empty", poisoned(torch.Tensor.new_empty))


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> Any:
        if self.family != socket.AF_UNIX and address[0] not in ("127.0.0.1", "localhost", "::1"):
            raise RuntimeError(f"a test tried to reach {address}; tests use nothing but this machine")
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


def seed_of(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")


def global_state() -> tuple[Any, ...]:
    numpy_state = np.random.get_state()
    # Not that of `random`: the type checker of the tests draws from it. Nothing in pliant imports it.
    return numpy_state[1].tobytes(), numpy_state[2], torch.get_rng_state().numpy().tobytes()


@pytest.fixture(autouse=True)
def own_randomness(request: pytest.FixtureRequest) -> Iterator[None]:
    seed = seed_of(request.node.nodeid)
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    before = global_state()
    yield
    if request.node.get_closest_marker("global_rng") is None:
        assert global_state() == before, (
            "the test changed the global random state; use generators or pliant.core.seeded"
        )


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Shapes are not checked from outside, so that our own errors can be seen."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """A test that has set other numbers of threads leaves one."""
    yield
    torch.set_num_threads(1)
