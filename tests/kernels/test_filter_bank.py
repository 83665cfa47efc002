"""The filter bank: taps, forms, chunks, flags, gradients."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pliant.core import UsageError
from pliant.kernels import filter_bank
from tests.suite import World, close, worlds

FORMS = ("loop", "conv", "numba")
every_form = pytest.mark.parametrize("form", FORMS)
HAAR = torch.tensor([[0.5, 0.5], [-0.5, 0.5]], dtype=torch.float64)


def problem(batch: int, steps: int, width: int, levels: int, taps: int, flags: bool = True) -> dict[str, Any]:
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64)

    given = {
        "x": normal(batch, steps, width),
        "weight": normal(levels, 2, taps, width),
        "history": normal(batch, (taps - 1) * (2**levels - 1), width),
    }
    chance = torch.rand(2, batch, steps, generator=random)
    return given | ({"reset": chance[0] < 0.15, "mask": chance[1] < 0.7} if flags else {})


def run(form: str, given: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = {name: x.clone().requires_grad_() if x.is_floating_point() else x for name, x in given.items()}
    ends = filter_bank(**leaves, form=form)
    loss = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in ends)
    inputs = [x for x in leaves.values() if x.is_floating_point()]
    return [*ends, *torch.autograd.grad(loss, inputs)]


def haar(levels: int, width: int = 1, dtype: torch.dtype = torch.float64) -> Tensor:
    return HAAR[..., None].expand(levels, 2, 2, width).to(dtype)


@every_form
def test_the_last_tap_belongs_to_the_current_step_and_lags_double(form: str) -> None:
    x = torch.arange(1.0, 7.0, dtype=torch.float64).reshape(1, 6, 1)
    taps = torch.tensor([10.0, 1.0], dtype=torch.float64)
    weight = torch.stack([taps, 100 * taps])[None, ..., None].expand(2, 2, 2, 1)
    bands, history = filter_bank(x, weight, form=form)
    raw, d1, d2, a2 = bands[:, 0, :, 0]
    assert raw.tolist() == [1, 2, 3, 4, 5, 6]
    a1 = torch.tensor([1.0, 12, 23, 34, 45, 56])
    assert d1.tolist() == (100 * a1).tolist()
    assert a2.tolist() == [1, 12, 33, 154, 275, 396]  # a1_t + 10 a1_{t-2}
    assert d2.tolist() == (100 * a2).tolist()
    assert history.flatten().tolist() == [6, 45, 56]


@every_form
@pytest.mark.parametrize("levels", [1, 3])
def test_it_is_a_cascade_of_dilated_convolutions_of_torch(form: str, levels: int) -> None:
    given = problem(2, 37, 5, levels, 4, flags=False) | {"history": None}
    bands, _ = filter_bank(**given, form=form)
    a, expected = given["x"].mT, [given["x"]]
    for level, filters in enumerate(given["weight"]):
        padded = F.pad(a, (3 << level, 0))
        a, d = (F.conv1d(padded, f.T[:, None], groups=5, dilation=1 << level) for f in filters)
        expected.append(d.mT)
    close(bands, torch.stack([*expected, a.mT]))


@pytest.mark.parametrize("form", ["conv", "numba"])
@pytest.mark.parametrize("flags", [False, True])
@pytest.mark.parametrize(("levels", "taps"), [(1, 1), (3, 4), (4, 2)])
def test_forms_agree_with_the_readable_one(form: str, flags: bool, levels: int, taps: int) -> None:
    given = problem(3, 40, 3, levels, taps, flags)
    for one, two in zip(run(form, given), run("loop", given), strict=True):
        close(one, two)


@given(data=st.data())
def test_chunks_are_the_whole(data: st.DataObject) -> None:
    world: World = data.draw(worlds(3, torch.float64, ((),)))
    levels, taps = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    form = data.draw(st.sampled_from([None, *FORMS]))
    weight = problem(1, 1, 3, levels, taps)["weight"]
    whole, last = filter_bank(world.x, weight, **world.flags, form=form)
    carried, parts = None, []
    for x, flags in world.chunks():
        part, carried = filter_bank(x, weight, carried, **flags, form=form)
        parts.append(part)
    assert carried is not None
    close(torch.cat(parts, 2), whole)
    close(carried, last)


@pytest.mark.parametrize("form", ["loop", "conv"])
def test_gradients_are_right(form: str) -> None:
    given = problem(2, 4, 1, 2, 2)
    inputs = [given[name].requires_grad_() for name in ("x", "weight", "history")]
    assert torch.autograd.gradcheck(lambda *x: filter_bank(*x, given["reset"], given["mask"], form=form), inputs)


@every_form
@pytest.mark.parametrize("levels", [1, 4])
def test_half_sums_and_half_differences_add_to_the_input(form: str, levels: int) -> None:
    """ms-ssm.md, acceptance check 2."""
    x = problem(2, 50, 3, 1, 1)["x"].float()
    bands, _ = filter_bank(x, haar(levels, 3, torch.float32), form=form)
    assert float((bands[1:].sum(0) - x).abs().max()) < 1e-6


@pytest.mark.parametrize(("taps", "lengths"), [(2, [2, 4, 8]), (4, [4, 10, 22])])
def test_filters_reach_as_far_as_is_carried(taps: int, lengths: list[int]) -> None:
    """ms-ssm.md, acceptance check 3."""
    impulse = torch.zeros(1, 30, 1, dtype=torch.float64)
    impulse[0, 4] = 1
    bands, history = filter_bank(impulse, torch.ones(3, 2, taps, 1, dtype=torch.float64))
    for band, length in zip(bands[1:, 0, :, 0], [*lengths, lengths[-1]], strict=True):
        assert band.nonzero().flatten().tolist() == list(range(4, 4 + length))
    assert history.shape[1] == lengths[-1] - 1


def test_a_constant_is_all_in_what_is_left() -> None:
    """ms-ssm.md, acceptance check 10."""
    bands, _ = filter_bank(torch.ones(1, 20, 1, dtype=torch.float64), haar(3))
    left = bands[4, 0, :, 0]
    assert left[:8].tolist() == [k / 8 for k in range(1, 9)]
    assert bool((left[7:] == 1).all())
    for level, detail in enumerate(bands[1:4, 0, :, 0]):
        assert not detail[2 ** (level + 1) - 1 :].any()


def test_the_number_of_threads_changes_no_bit() -> None:
    given = problem(3, 400, 32, 3, 4)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run("numba", given))
    assert all(one.equal(two) for one, two in zip(*found, strict=True))


def test_narrow_inputs_are_carried_wide() -> None:
    given = problem(2, 40, 3, 3, 4, flags=False)
    exact = filter_bank(**given)[0]
    bands, history = filter_bank(**{name: x.bfloat16() for name, x in given.items()})
    assert bands.dtype == torch.bfloat16
    assert history.dtype == torch.float32
    assert float((bands.double() - exact).abs().max() / exact.abs().max()) < 2**-6


@pytest.mark.global_rng
def test_the_custom_operation_keeps_the_rules_of_torch() -> None:
    given = problem(2, 9, 3, 2, 3)
    inputs = [given[name].float().requires_grad_() for name in ("x", "weight", "history")]
    operation = torch.ops.pliant.filter_bank.default
    torch.library.opcheck(operation, (*inputs, given["reset"], given["mask"]))
    torch.library.opcheck(operation, (*(x.detach() for x in inputs), None, None))


def test_inputs_of_any_memory_layout_are_read_right() -> None:
    given = problem(2, 6, 5, 2, 3)
    turned = {name: x.transpose(-1, -2).contiguous().transpose(-1, -2) for name, x in given.items()}
    for one, two in zip(run("numba", turned), run("numba", given), strict=True):
        assert one.equal(two)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    given = problem(2, 3, 4, 2, 3)
    for name, wrong in (
        ("x", torch.zeros(2, 3)),
        ("weight", torch.zeros(2, 3, 3, 4)),
        ("weight", torch.zeros(2, 2, 3, 5)),
        ("weight", torch.zeros(0, 2, 3, 4)),
        ("history", torch.zeros(2, 5, 4)),
        ("reset", torch.zeros(2, 4, dtype=torch.bool)),
        ("mask", torch.ones(2, 3)),
        ("form", "magic"),
    ):
        with pytest.raises(UsageError, match="filter_bank"):
            filter_bank(**(given | {name: wrong}))
