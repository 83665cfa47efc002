"""State spaces side by side: forms, chunks, flags, gradients, and a step in one pass."""

import copy
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import UsageError, seeded
from pliant.kernels import scale_scan, selective_scan
from pliant.kernels._scale_scan import BLOCK, CHUNK, selective_scales
from pliant.mixers import MultiScaleSSM
from tests.suite import World, close, worlds

INPUTS = ("u", "decay", "read", "skip", "scales", "h0")


def problem(scales: int, size: int, batch: int, steps: int, width: int, rotate: bool = False, flags: bool = True,
            dtype: torch.dtype = torch.float64) -> dict[str, Any]:  # fmt: skip
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    system = (scales, size, width)
    given = {"u": normal(scales, batch, steps, width), "decay": normal(*system).sigmoid(), "read": normal(*system),
             "skip": normal(scales, width), "scales": normal(batch, steps, scales),
             "h0": normal(batch, *system)}  # fmt: skip
    if rotate:
        given["decay"] = torch.polar(given["decay"], normal(*system))
        given["read"] = torch.complex(given["read"], normal(*system))
        given["h0"] = torch.complex(given["h0"], normal(batch, *system))
    chance = torch.rand(2, batch, steps, generator=random)
    return given | ({"reset": chance[0] < 0.1, "mask": chance[1] < 0.7} if flags else {})


def run(form: str | None, given: dict[str, Any]) -> list[Tensor]:
    """Outputs and gradients."""
    leaves = {name: x.clone().requires_grad_() if name in INPUTS else x for name, x in given.items()}
    z, last = scale_scan(**leaves, form=form)
    ends = [z, torch.view_as_real(last) if last.is_complex() else last]
    loss = sum((x * torch.linspace(-1, 2, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in ends)
    return [*ends, *torch.autograd.grad(loss, [x for name, x in leaves.items() if name in INPUTS])]


@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("flags", [False, True])
@pytest.mark.parametrize("alone", [False, True])
def test_forms_agree_with_the_readable_one(rotate: bool, flags: bool, alone: bool) -> None:
    """ms-ssm.md, acceptance check 7: convolution, scan and steps, also where the length is no power of two."""
    given = problem(3, 2, 2, 2 * CHUNK + 5, 3, rotate, flags)
    if alone:
        del given["skip"], given["scales"], given["h0"]
    expected = run("loop", given)
    for form in ("scan", *([] if flags else ["fft"]), *([] if rotate else ["numba"])):
        for one, two in zip(run(form, given), expected, strict=True):
            close(torch.view_as_real(one) if one.is_complex() else one,
                  torch.view_as_real(two) if two.is_complex() else two)  # fmt: skip


def test_many_channels_and_no_states() -> None:
    for width, size in ((2 * BLOCK + 3, 1), (3, 0)):
        given = problem(2, size, 2, 9, width)
        for one, two in zip(run("numba", given), run("loop", given), strict=True):
            close(one, two)


@given(data=st.data())
def test_chunks_are_the_whole(data: st.DataObject) -> None:
    world: World = data.draw(worlds(6, torch.float64, ((),)))
    form = data.draw(st.sampled_from([None, "loop", "scan", "numba"]))
    given = {name: x for name, x in problem(2, 2, 1, 1, 3).items() if name in ("decay", "read", "skip")}

    def call(x: Tensor, h: Tensor | None, flags: dict[str, Tensor | None]) -> tuple[Tensor, Tensor]:
        return scale_scan(x.unflatten(2, (2, 3)).movedim(2, 0), **given, scales=x[..., :2], h0=h, **flags, form=form)

    whole, last = call(world.x, None, world.flags)
    h, parts = None, []
    for x, flags in world.chunks():
        part, h = call(x, h, flags)
        parts.append(part)
    assert h is not None
    close(torch.cat(parts, 1), whole)
    close(h, last)


@pytest.mark.parametrize("form", ["loop", "scan", "fft"])
def test_gradients_are_right(form: str) -> None:
    given = problem(2, 1, 2, 4, 2, flags=form != "fft")
    inputs = [given[name].requires_grad_() for name in INPUTS]
    flags = [given.get(name) for name in ("reset", "mask")]
    assert torch.autograd.gradcheck(lambda *x: scale_scan(*x, *flags, form=form), inputs)


@pytest.mark.parametrize("flags", [False, True])
def test_selective_scales_are_selective_scans(flags: bool) -> None:
    random = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(shape, generator=random, dtype=torch.float64)  # noqa: E731
    given = problem(3, 2, 2, 7, 4, flags=flags)
    dt, A, B, C = draw(3, 2, 7, 4).exp(), -draw(3, 2, 4).exp(), draw(2, 7, 3, 2), draw(2, 7, 3, 2)
    marks = [given.get(name) for name in ("reset", "mask")]
    if flags:
        given["u"] = torch.where(given["mask"][..., None], given["u"], 0)
    y, last = selective_scales(given["u"], dt, A, B, C, given["skip"], given["h0"], *marks)
    for m in range(3):
        z, h = selective_scan(given["u"][m], dt[m], A[m].mT, B[:, :, m], C[:, :, m], given["skip"][m],
                              given["h0"][:, m].mT, *marks, form="loop")  # fmt: skip
        close(y[m], z)
        close(last[:, m], h.mT)
    # Rotating states that do not rotate.
    z, h = selective_scales(given["u"], dt, A + 0j, B, C + 0j, given["skip"], given["h0"] + 0j, *marks)
    there = given["mask"][..., None] if flags else torch.ones(1, dtype=torch.bool)
    close(torch.where(there, z, 0), y)
    close(h.real, last)


def test_the_number_of_threads_changes_no_bit() -> None:
    given = problem(2, 2, 3, 70, 2 * BLOCK, dtype=torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run("numba", given))
    assert all(one.equal(two) for one, two in zip(*found, strict=True))


def test_long_sequences_are_as_exact_as_their_type() -> None:
    given = problem(2, 2, 1, 20_000, 3, flags=False)
    given["decay"] = 1 - torch.tensor([2.0**-13, 0.125], dtype=torch.float64)[:, None].expand(2, 2, 3)
    exact = scale_scan(**given)
    narrow = scale_scan(**{name: x.float() for name, x in given.items()})
    for one, two in zip(narrow, exact, strict=True):
        assert float((one.double() - two).abs().max() / two.abs().max()) < 1e-4


@pytest.mark.global_rng
def test_the_custom_operation_keeps_the_rules_of_torch() -> None:
    given = problem(2, 2, 2, CHUNK + 2, 3, dtype=torch.float32)
    inputs = [given[name].requires_grad_() for name in INPUTS]
    operation = torch.ops.pliant.scale_scan.default
    torch.library.opcheck(operation, (*inputs, given["reset"], given["mask"], True))
    inputs[4] = None
    torch.library.opcheck(operation, (*(x if x is None else x.detach() for x in inputs), None, None, False))


@pytest.mark.parametrize("kind", [{}, {"selective": True}, {"weights": "softmax"}, {"weights": "static"}, {"levels": 0},
                                  {"levels": 0, "selective": True}, {"taps": 1}, {"state_per_scale": 1}])  # fmt: skip
def test_a_step_in_one_pass_is_the_step(kind: dict[str, Any]) -> None:
    """In inference; with gradients it is plain torch."""
    with seeded(0):
        mixer, x = MultiScaleSSM(20, **kind), torch.randn(3, 9, 20)
        chance = torch.rand(2, 3, 9)
    one = two = None
    for t in range(9):
        flags = {"reset": chance[0, :, t] < 0.2, "mask": chance[1, :, t] < 0.7} if t > 3 else {}
        y, one = mixer.step(x[:, t], one, **flags)
        with torch.no_grad():
            z, two = mixer.step(x[:, t], two, **flags)
        close(z, y)
        close(two.h, one.h)
        close(two.history, one.history)


@torch.no_grad()
def test_a_step_follows_its_parameters() -> None:
    """Changed in place, put elsewhere, of another type, copied."""
    with seeded(0):
        mixer, other, x = MultiScaleSSM(4), MultiScaleSSM(4), torch.randn(1, 4)
    expected = other.step(x)[0]
    assert not mixer.step(x)[0].equal(expected)
    twin = copy.deepcopy(mixer)
    for name, parameter in mixer.named_parameters():
        parameter.copy_(other.get_parameter(name))
    assert mixer.step(x)[0].equal(expected)
    assert not twin.step(x)[0].equal(expected)
    for name, parameter in twin.named_parameters():
        parameter.data = other.get_parameter(name).clone()
    assert twin.step(x)[0].equal(expected)
    close(mixer.double().step(x.double())[0].float(), expected)
    close(mixer.float().step(x)[0], expected)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    given = problem(2, 3, 2, 5, 4)
    for name, wrong in (
        ("u", torch.zeros(2, 2, 5)),
        ("decay", torch.zeros(2, 3, 5)),
        ("read", torch.zeros(2, 2, 4)),
        ("skip", torch.zeros(4)),
        ("scales", torch.zeros(2, 5, 3)),
        ("h0", torch.zeros(2, 2, 4, 3)),
        ("reset", torch.zeros(2, 4, dtype=torch.bool)),
        ("mask", torch.ones(2, 5)),
        ("form", "magic"),
        ("form", "fft"),
    ):
        with pytest.raises(UsageError, match="scale_scan"):
            scale_scan(**(given | {name: wrong}))
    with pytest.raises(UsageError, match="real numbers"):
        scale_scan(**problem(1, 1, 1, 2, 1, rotate=True), form="numba")
