"""The place is as hostile as it says."""

import socket
import warnings

import numpy as np
import pytest
import torch

pytest_plugins = ["pytester"]


def test_empty_memory_is_poisoned() -> None:
    assert torch.empty(3).isnan().all()
    assert torch.empty_like(torch.zeros(2, 2, dtype=torch.complex64)).isnan().all()
    assert (torch.empty(3, dtype=torch.int64) != 0).all()


def test_a_warning_is_an_error() -> None:
    with pytest.raises(UserWarning, match="careful"):
        warnings.warn("careful", stacklevel=1)


def test_nothing_outside_can_be_reached() -> None:
    with socket.socket() as door, pytest.raises(RuntimeError, match="nothing but this machine"):
        door.connect(("192.0.2.1", 80))


def test_the_seed_comes_from_the_name(request: pytest.FixtureRequest) -> None:
    from tests.conftest import seed_of

    assert torch.initial_seed() == seed_of(request.node.nodeid)
    assert seed_of("a") != seed_of("b")


@pytest.mark.parametrize("draw", [lambda: np.random.rand(), lambda: torch.rand(1)])
@pytest.mark.global_rng
def test_a_draw_from_a_global_generator_is_noticed(draw: object) -> None:
    from tests.conftest import global_state

    before = global_state()
    draw()  # type: ignore[operator]
    assert global_state() != before
