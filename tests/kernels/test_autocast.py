"""Autocast to bfloat16: kernels keep their precision, forward and backward, whatever it says."""

import pytest
import torch
from torch.utils._pytree import tree_leaves

from pliant.bench import KERNELS, MIXERS, Sizes
from pliant.core import seeded
from pliant.mixers import MLSTM


@pytest.mark.parametrize("name", KERNELS)
def test_a_kernel_under_autocast_is_the_kernel(name: str) -> None:
    case = KERNELS[name]
    for form in case.forms:
        work = case.work(case.problem(Sizes(2, 20, 16), torch.float32), form)
        wanted = work.forward()
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(work.forward(), wanted), form


@pytest.mark.parametrize("name", [name for name, case in KERNELS.items() if case.forms[0] == "numba"])
def test_the_way_back_of_a_fast_form_is_the_same_under_autocast(name: str) -> None:
    case = KERNELS[name]
    work = case.work(case.problem(Sizes(2, 20, 16), torch.float32), case.forms[0])
    wanted = work.both()
    with torch.autocast("cpu", torch.bfloat16):
        for which, found in work.both().items():
            assert torch.equal(found, wanted[which]), which


@pytest.mark.parametrize("name", MIXERS)
def test_a_mixer_under_autocast_has_products_in_bfloat16_and_is_close(name: str) -> None:
    case = MIXERS[name]
    work = case.work(case.problem(Sizes(2, 20, 16), torch.float32), case.forms[0])
    wanted = work.both()
    with torch.autocast("cpu", torch.bfloat16):
        found = work.both()
    assert found["y"].isfinite().all()
    # Eight bits of mantissa; layers are a few products deep.
    assert (found["y"] - wanted["y"]).abs().max() < 0.05 * wanted["y"].abs().max()
    assert all(gradient.isfinite().all() for gradient in found.values())
    if name not in ("RGLRU", "MultiresConv"):  # whose products are part of kernels, or that has none
        assert not torch.equal(found["y"], wanted["y"])


def test_state_stays_in_float32_under_autocast() -> None:
    with seeded(0):
        mixer, x = MLSTM(16, 2), torch.randn(2, 5, 16)
    with torch.autocast("cpu", torch.bfloat16):
        _, state = mixer(x)
        _, state = mixer(x, state)
    assert {x.dtype for x in tree_leaves(state) if x.is_floating_point()} == {torch.float32}
