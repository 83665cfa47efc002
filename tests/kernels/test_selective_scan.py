"""The selective scan: fast form = readable form, the numbers of the dossier, chunks = whole, gradients, limits."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels import selective_scan
from pliant.kernels._selective_scan import BLOCK, CHUNK
from tests.suite import close

FORMS = pytest.mark.parametrize("form", ["loop", "numba"])
INPUTS = ("u", "dt", "A", "B", "C", "D", "h0")


def problem(
    batch: int, steps: int, channels: int, size: int, dtype: torch.dtype, seed: int = 0, flags: bool = True
) -> dict[str, Any]:
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    found: dict[str, Any] = {
        "u": normal(batch, steps, channels),
        "dt": torch.nn.functional.softplus(normal(batch, steps, channels) - 1),
        "A": -torch.exp(normal(channels, size)),
        "B": normal(batch, steps, size),
        "C": normal(batch, steps, size),
        "D": normal(channels),
        "h0": normal(batch, channels, size),
    }
    if flags:
        found["reset"] = torch.rand(batch, steps, generator=random) < 0.2
        found["mask"] = torch.rand(batch, steps, generator=random) < 0.7
    return found


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    steps = draw(st.one_of(st.integers(0, 6), st.integers(CHUNK - 1, 2 * CHUNK + 2)))
    shape = draw(st.integers(1, 3)), steps, draw(st.integers(1, 9)), draw(st.integers(1, 5))
    found = problem(*shape, dtype, draw(st.integers(0, 2**31)))
    for name in ("D", "h0", "reset", "mask"):
        if draw(st.booleans()):
            found[name] = None
    return found


def run(form: str | None, given: dict[str, Any]) -> list[Tensor]:
    """Outputs, last state, and the gradients of a loss that weighs all of them differently."""
    leaves = {name: given[name].detach().clone().requires_grad_() for name in INPUTS if given[name] is not None}
    y, last = selective_scan(**(given | leaves), form=form)
    loss = (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).reshape(y.shape)).sum() + last.square().sum()
    # Without steps and without a state there is nothing to differentiate.
    gradients = (
        torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
        if loss.requires_grad
        else [None] * len(leaves)
    )
    zeros = (torch.zeros_like(x) for x in leaves.values())
    return [y.detach(), last.detach(), *(z if g is None else g for g, z in zip(gradients, zeros, strict=True))]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_the_fast_form_is_the_loop(dtype: torch.dtype, data: st.DataObject) -> None:
    given = data.draw(problems(dtype))
    for fast, loop in zip(run("numba", given), run("loop", given), strict=True):
        close(fast, loop, scale=4)


def test_many_channels_are_taken_in_blocks() -> None:
    given = problem(2, CHUNK + 3, 2 * BLOCK + 5, 3, torch.float64)
    for fast, loop in zip(run("numba", given), run("loop", given), strict=True):
        close(fast, loop)


@FORMS
def test_check_b1_by_hand(form: str) -> None:
    x = torch.tensor([1.0, -2, 3], dtype=torch.float64)[None, :, None]
    dt = torch.tensor([0.1, 0.5, 1], dtype=torch.float64)[None, :, None]
    A, D = torch.tensor([[-1.0, -2]], dtype=torch.float64), torch.tensor([0.5], dtype=torch.float64)
    B = torch.tensor([[[1.0, 2], [0, 1], [1, -1]]], dtype=torch.float64)
    C = torch.tensor([[[1.0, 1], [1, 0], [2, 1]]], dtype=torch.float64)
    none = torch.zeros(1, 3, dtype=torch.bool)
    for options, outputs, state in (
        ({}, [0.8, -0.9393469340, 4.4192481625], [3.0223130160, -3.1253778696]),
        ({"reset": none.clone().index_fill_(1, torch.tensor([2]), True)}, [0.8, -0.9393469340, 4.5], [3.0, -3.0]),
        (
            {"mask": (~none).index_fill_(1, torch.tensor([1]), False)},
            [0.8, 0, 4.6006429449],
            [3.0367879441, -2.9729329434],
        ),
        (
            {"h0": torch.tensor([[[1.0, -1]]], dtype=torch.float64)},
            [0.8861066650, -0.3905352979, 4.7822789945],
            None,
        ),
    ):
        y, last = selective_scan(x, dt, A, B, C, D, form=form, **options)
        torch.testing.assert_close(y[0, :, 0], torch.tensor(outputs, dtype=torch.float64), atol=1e-9, rtol=0)
        if state is not None:
            torch.testing.assert_close(last[0, 0], torch.tensor(state, dtype=torch.float64), atol=1e-9, rtol=0)


@FORMS
def test_check_b4_a_constant_input_has_its_fixed_point(form: str) -> None:
    for dt in (1.0, 0.1, 1e-3):
        steps = int(60 / dt)
        if form == "loop" and steps > 1000:
            continue
        ones = torch.ones(1, steps, 1, dtype=torch.float64)
        A, B, c = torch.tensor([[-0.5, -2.0]], dtype=torch.float64), torch.tensor([1.0, -3.0]), 1.5
        rows = B.double().expand(1, steps, 2)
        last = selective_scan(c * ones, dt * ones, A, rows, rows, form=form)[1][0, 0]
        torch.testing.assert_close(last, dt * B.double() * c / (1 - torch.exp(dt * A[0])), rtol=1e-9, atol=0)
        if dt == 1e-3:
            torch.testing.assert_close(last, -B.double() * c / A[0], rtol=2e-3, atol=0)


@FORMS
def test_check_b5_nothing_before_a_reset_has_a_gradient(form: str) -> None:
    given = problem(1, 9, 3, 2, torch.float64) | {"mask": None}
    given["reset"] = torch.arange(9)[None] == 5
    given["u"].requires_grad_()
    y, _ = selective_scan(**given, form=form)
    y[:, 5:].sum().backward()
    assert not given["u"].grad[:, :5].any()
    assert given["u"].grad[:, 5:].all()


@FORMS
@given(data=st.data())
def test_chunks_are_the_whole(form: str, data: st.DataObject) -> None:
    given = data.draw(problems(torch.float64))
    steps = given["u"].shape[1]
    y, last = selective_scan(**given, form=form)
    state, parts = given["h0"], []
    for start, end in pairwise([0, *sorted(data.draw(st.lists(st.integers(0, steps), max_size=4))), steps]):
        cut = {name: None if given[name] is None else given[name][:, start:end]
               for name in ("u", "dt", "B", "C", "reset", "mask")}  # fmt: skip
        part, state = selective_scan(**cut, A=given["A"], D=given["D"], h0=state, form=form)
        parts.append(part)
    close(torch.cat(parts, 1), y)
    close(state, last)


@FORMS
def test_gradients_are_those_of_finite_differences(form: str) -> None:
    given = problem(2, 5, 3, 2, torch.float64)
    flags = given["reset"], given["mask"]
    inputs = [given[name].requires_grad_() for name in INPUTS]
    assert torch.autograd.gradcheck(lambda *x: selective_scan(*x, *flags, form=form), inputs)


@FORMS
def test_what_stands_in_masked_steps_is_not_read(form: str) -> None:
    given = problem(2, 40, 3, 2, torch.float32, seed=3)
    clean = run(form, given)
    for name in ("u", "dt", "B", "C"):
        given[name] = torch.where(given["mask"][..., None], given[name], torch.nan)
    assert all(one.equal(two) for one, two in zip(run(form, given), clean, strict=True))


@FORMS
def test_a_reset_drops_what_is_not_finite_and_counts_on_a_masked_step(form: str) -> None:
    given = problem(1, 3, 2, 2, torch.float32, flags=False)
    given["mask"] = torch.tensor([[False, True, True]])
    given["reset"] = torch.tensor([[True, False, False]])
    y, last = selective_scan(**(given | {"h0": torch.full((1, 2, 2), torch.nan)}), form=form)
    fresh, after = selective_scan(**(given | {"h0": None, "reset": None}), form=form)
    assert y.equal(fresh)
    assert last.equal(after)


@FORMS
def test_extreme_decays(form: str) -> None:
    given = problem(1, 50, 2, 3, torch.float64, flags=False) | {"D": None}
    # A = 0 keeps everything: the state is a sum.
    _, last = selective_scan(**(given | {"A": torch.zeros(2, 3, dtype=torch.float64)}), form=form)
    products = torch.einsum("btm,btn->bmn", given["u"] * given["dt"], given["B"])
    close(last, given["h0"] + products)
    # exp(dt A) = 0 forgets at once, without NaN on the way back.
    for far in (-1e4, -1e30, -torch.inf):
        found = run(form, given | {"A": torch.full((2, 3), far, dtype=torch.float64)})
        close(found[1][0], products_of_the_last_step(given))
        if far > -torch.inf:
            assert all(x.isfinite().all() for x in found)


def products_of_the_last_step(given: dict[str, Any]) -> Tensor:
    return (given["u"] * given["dt"])[0, -1, :, None] * given["B"][0, -1]


@FORMS
def test_denormal_numbers_pass(form: str) -> None:
    given = problem(1, 40, 2, 3, torch.float32, flags=False) | {"D": None, "h0": None}
    given["u"] = given["u"] * 1e-40
    assert all(x.isfinite().all() for x in run(form, given))


def test_long_sequences_are_as_exact_as_their_type() -> None:
    given = problem(1, 20_000, 4, 2, torch.float64, flags=False)
    given["A"] = -torch.tensor([[1e-4, 1.0]], dtype=torch.float64).expand(4, 2)
    exact = selective_scan(**given, form="numba")
    narrow = selective_scan(**{name: value.float() for name, value in given.items()}, form="numba")
    for one, two in zip(narrow, exact, strict=True):
        assert float((one.double() - two).abs().max() / two.abs().max()) < 1e-4


@pytest.mark.slow
def test_a_million_steps() -> None:
    steps = 10**6
    ones = torch.ones(1, steps, 1)
    A, B = torch.tensor([[-1e-3, -1.0]]), torch.ones(1, steps, 2)
    u = ones.clone().requires_grad_()
    y, last = selective_scan(u, 0.1 * ones, A, B, B)
    y[:, -1].sum().backward()
    expected = 0.1 / -torch.expm1(0.1 * A.double())
    torch.testing.assert_close(last[0].double(), expected, rtol=1e-3, atol=0)
    assert u.grad is not None
    torch.testing.assert_close(u.grad.sum().double(), expected.sum(), rtol=1e-3, atol=0)


def test_narrow_inputs_are_accumulated_wide() -> None:
    given = problem(2, 60, 3, 4, torch.bfloat16)
    y, last = selective_scan(**given, form="numba")
    wide = {name: value.double() if value.is_floating_point() else value for name, value in given.items()}
    exact, last_exact = selective_scan(**wide, form="loop")
    assert y.dtype == torch.bfloat16
    assert last.dtype == torch.float32
    close(last, last_exact.float())
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-5)


def test_the_number_of_threads_changes_no_bit() -> None:
    given = problem(3, 70, 2 * BLOCK, 4, torch.float32)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append(run("numba", given))
    assert all(one.equal(two) for one, two in zip(*found, strict=True))


def test_a_gradient_to_the_last_state_alone_is_right() -> None:
    given = problem(1, 3, 1, 1, torch.float32, flags=False)
    given["h0"].requires_grad_()
    selective_scan(**given, form="numba")[1].sum().backward()
    expected = torch.exp(given["dt"].sum() * given["A"][0, 0])
    torch.testing.assert_close(given["h0"].grad[0, 0, 0], expected)


@pytest.mark.global_rng
def test_the_custom_operation_keeps_the_rules_of_torch() -> None:
    given = problem(2, CHUNK + 2, 3, 2, torch.float32)
    inputs = [given[name].requires_grad_() for name in INPUTS]
    operation = torch.ops.pliant.selective_scan.default
    torch.library.opcheck(operation, (*inputs, given["reset"], given["mask"], True))
    torch.library.opcheck(operation, (*(x.detach() for x in inputs), None, None, False))


def test_inputs_of_any_memory_layout_are_read_right() -> None:
    given = problem(2, 6, 5, 3, torch.float32)
    turned = {name: value.transpose(-1, -2).contiguous().transpose(-1, -2) if value.ndim > 2 else value
              for name, value in given.items()}  # fmt: skip
    for one, two in zip(run("numba", turned), run("numba", given), strict=True):
        assert one.equal(two)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    given = problem(2, 3, 4, 2, torch.float32)
    for name, wrong in (
        ("u", torch.zeros(2, 3)),
        ("dt", torch.zeros(2, 3, 5)),
        ("A", torch.zeros(2, 4)),
        ("B", torch.zeros(2, 3, 3)),
        ("C", torch.zeros(2, 2, 2)),
        ("D", torch.zeros(2)),
        ("h0", torch.zeros(2, 2, 4)),
        ("reset", torch.zeros(2, 4, dtype=torch.bool)),
        ("mask", torch.zeros(3, 3, dtype=torch.bool)),
        ("mask", torch.ones(2, 3)),
        ("form", "magic"),
    ):
        with pytest.raises(UsageError, match="selective_scan"):
            selective_scan(**(given | {name: wrong}))
