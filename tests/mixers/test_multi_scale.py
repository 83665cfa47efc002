"""MultiScaleSSM and MultiresConv against the checks of their dossier (ms-ssm.md, section 8)."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor
from torch.nn import functional as F

from pliant.core import UsageError, nbytes, seeded
from pliant.kernels import linear_scan, selective_scan
from pliant.mixers import MultiresConv, MultiScaleSSM
from pliant.mixers.multi_scale import first_rates, zero_order_hold
from pliant.mixers.multires import FilterBank, FoldedFilter, wavelet
from tests.mixers.compaction import agrees_with_compaction
from tests.suite import World, close, in_chunks, same_state, worlds

KINDS: list[dict[str, Any]] = [
    {},
    {"selective": True},
    {"weights": "softmax"},
    {"weights": "channel"},
    {"weights": "static"},
    {"weights": "static", "complex_states": True},
    {"weights": "static", "levels": 0},
    {"weights": "static", "levels": 0, "complex_states": True},
    {"selective": True, "complex_states": True},
]
every_kind = pytest.mark.parametrize("kind", KINDS, ids=str)


def mixer(width: int = 5, **kind: Any) -> MultiScaleSSM:
    with seeded(0):
        return MultiScaleSSM(width, **kind).double()


def wave(*shape: int) -> Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.53 * ((i * i + 3 * i) % 1009)).reshape(shape)


def test_check_1_the_rates_of_figure_2() -> None:
    decay = torch.exp(-0.2 * first_rates(3, 3)).sort(1).values
    expected = [[0.1653, 0.2019, 0.2466], [0.3012, 0.3679, 0.4493], [0.5488, 0.6703, 0.8187]]
    torch.testing.assert_close(decay, torch.tensor(expected), atol=5e-5, rtol=0)


@pytest.mark.parametrize(("levels", "size"), [(0, 4), (1, 1), (3, 4), (5, 7)])
def test_check_1_all_rates_decay_and_are_one_to_m_n(levels: int, size: int) -> None:
    A = mixer(2, levels=levels, state_per_scale=size).rates().detach()
    scales = levels + 2 if levels else 1
    assert bool((A < 0).all())
    for channel in range(2):
        found = -A[..., channel].flatten().sort(descending=True).values
        torch.testing.assert_close(found, torch.arange(1.0, scales * size + 1).double(), rtol=1e-6, atol=0)
    assert bool((A[:-1].amax(1) < A[1:].amin(1)).all())  # coarser scales remember longer
    same = mixer(2, levels=levels, state_per_scale=size, own_rates=False).rates().detach()
    assert bool((same == same[-1]).all())
    assert float(-same.min()) == pytest.approx(size)


def test_complex_states_start_as_s4d_lin() -> None:
    A = mixer(1, state_per_scale=3, complex_states=True).rates().detach().flatten()
    assert A.real.tolist() == pytest.approx(15 * [-0.5])
    assert sorted((A.imag / math.pi).tolist()) == pytest.approx(range(15))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.get("weights") == "static"], ids=str)
def test_check_6_a_delayed_input_has_a_delayed_output(kind: dict[str, Any]) -> None:
    module, x = mixer(**kind), wave(2, 40, 5)
    for delay in (1, 2, 3, 7, 8, 21, 33):
        late = F.pad(x, (0, 0, delay, 0))[:, :40]
        close(module(late)[0], F.pad(module(x)[0], (0, 0, delay, 0))[:, :40])


@pytest.mark.parametrize("weights", ["linear", "channel", "static"])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("steps", [1, 3, 22, 61])
def test_check_7_convolution_is_the_recurrence(weights: str, rotate: bool, steps: int) -> None:
    kind = {"weights": weights, "complex_states": rotate}
    one, two, x = mixer(**kind), mixer(**kind, form="fft"), wave(2, steps, 5)
    _, state = one(wave(2, 30, 5))
    y, after = one(x, state)
    z, last = two(x, state)
    close(z, y)
    same_state(last, after)
    flags = {"reset": torch.arange(steps)[None].expand(2, -1) == 2}
    close(two(x, state, **flags)[0], one(x, state, **flags)[0])  # by the recurrence, where there are flags


def test_check_8_the_zero_order_hold() -> None:
    A = torch.tensor([-1.0, -1e-8, -1e-3, -640.0], dtype=torch.float64, requires_grad=True)
    dt = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    decay, gain = zero_order_hold(A, dt)
    torch.testing.assert_close(decay[0], torch.tensor(0.904837, dtype=torch.float64), atol=1e-6, rtol=0)
    torch.testing.assert_close(gain[0], torch.tensor(0.0951626, dtype=torch.float64), atol=1e-7, rtol=0)
    assert abs(gain[1].item() - 0.1) < 1e-8
    (decay + gain).sum().backward()
    assert A.grad is not None and A.grad.isfinite().all()


@pytest.mark.parametrize("rotate", [False, True])
def test_the_zero_order_hold_is_exact_on_both_sides_of_its_series(rotate: bool) -> None:
    size = torch.logspace(-6, 1, 200, dtype=torch.float64)
    A = torch.polar(size, torch.full_like(size, 2.0)) if rotate else -size
    exact = torch.expm1(A) / A
    close(*(torch.view_as_real(x + 0j) for x in (zero_order_hold(A, torch.ones_like(size))[1], exact)))
    narrow = zero_order_hold(A.to(torch.complex64) if rotate else A.float(), torch.ones(200))[1]
    torch.testing.assert_close(narrow.to(exact.dtype), exact, rtol=1e-6, atol=1e-6)
    half = torch.tensor([-0.011, -0.009], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a: zero_order_hold(a, torch.ones_like(a)), half)


def test_check_9_without_a_bank_it_is_a_diagonal_state_space() -> None:
    module, x = mixer(levels=0, weights="static", state_per_scale=3), wave(2, 30, 5)
    A, dt = module.rates()[0].T.detach(), module.log_step[0].detach().exp()[:, None]  # (D, N)
    decay = torch.exp(dt * A).flatten().expand(2, 30, -1)
    u = (torch.expm1(dt * A) / A * x[..., None]).flatten(2)
    h, _ = linear_scan(decay, u, form="loop")
    y = (h.unflatten(2, A.shape) * module.read[0].T).sum(-1) + module.skip[0] * x
    close(module(x)[0], y)


def test_check_9_without_a_bank_it_is_a_selective_scan() -> None:
    module, x = mixer(levels=0, weights="static", selective=True, state_per_scale=3), wave(2, 30, 5)
    step, B, C = module.linear_select(x).split([1, 3, 3], -1)
    dt = F.softplus(step @ module.step_weight[0] + module.step_bias[0])
    y, _ = selective_scan(x, dt, module.rates()[0].T, B, C, module.skip[0])
    assert module(x)[0].equal(y)


def test_check_11_parameters_of_the_bank_and_size_of_the_state() -> None:
    for levels, taps, size in ((3, 4, 4), (3, 2, 4), (1, 4, 2)):
        module = mixer(128, levels=levels, taps=taps, state_per_scale=size).float()
        assert sum(p.numel() for name, p in module.named_parameters() if name.startswith("bank")) == 256 * levels * taps
        reach = (taps - 1) * (2**levels - 1)
        assert nbytes(module.init_state(1)) == 4 * 128 * (reach + (levels + 2) * size)
    assert nbytes(mixer(128).float().init_state(1).history) == 4 * 128 * 21


def test_check_13_weights_keep_their_sign() -> None:
    module, x = mixer(levels=1), wave(1, 20, 5)
    plain = mixer(levels=1, weights="static")
    with torch.no_grad():
        module.weights.linear.weight.zero_()
        module.weights.linear.bias.copy_(torch.tensor([1.0, -2.0, 0.0]))
        plain.load_state_dict({name: value for name, value in module.state_dict().items() if "linear" not in name},
                              strict=False)  # fmt: skip
        plain.weights.static.copy_(module.weights.linear.bias)
    close(module(x)[0], plain(x)[0])
    with torch.no_grad():
        plain.weights.static.copy_(torch.tensor([1.0, 2.0, 0.0]))
    assert float((module(x)[0] - plain(x)[0]).detach().abs().max()) > 0.1


def test_check_13_softmax_weights_add_to_one() -> None:
    weights = mixer(weights="softmax").weights(wave(2, 7, 5))
    assert weights is not None
    close(weights.sum(-1), torch.ones(2, 7, dtype=torch.float64))
    assert bool((weights > 0).all())


@given(data=st.data())
def test_resets_and_masks_are_those_of_compaction(data: st.DataObject) -> None:
    module = mixer(selective=data.draw(st.booleans()), levels=data.draw(st.integers(0, 3)))
    _, state = module(wave(3, 5, 5))
    world = data.draw(worlds(5, torch.float64, ((),)))
    agrees_with_compaction(module, world, type(state)(*(part[: len(world.x)] for part in state)))


def test_masked_steps_do_not_move_what_is_carried() -> None:
    module = mixer()
    _, state = module(wave(1, 30, 5))
    nothing = torch.full((1, 300, 5), torch.nan, dtype=torch.float64)
    _, after = module(nothing, state, mask=torch.zeros(1, 300, dtype=torch.bool))
    assert after.h.equal(state.h) and after.history.equal(state.history)


@every_kind
def test_folded_it_is_the_same(kind: dict[str, Any]) -> None:
    module, x = mixer(**kind), wave(2, 70, 5)
    folded = module.fold()
    assert isinstance(folded, FoldedFilter) == (kind.get("weights") == "static")
    reset, mask = torch.zeros(2, 70, dtype=torch.bool), torch.ones(2, 70, dtype=torch.bool)
    reset[0, 40] = True
    mask[1, 20:30] = False
    for flags in ({}, {"reset": reset, "mask": mask}):
        y, _ = module(x, **flags)
        world = World(x, flags.get("reset"), flags.get("mask"), [1, 2, 3, 30])
        z, state = in_chunks(folded, world)
        close(z, y)
        assert nbytes(state) == nbytes(folded.init_state(2))
    narrow = module.float()
    assert float((narrow.fold()(x.float())[0] - narrow(x.float())[0]).detach().abs().max()) < 1e-5
    assert not any(p.requires_grad for p in folded.parameters())


def test_multires_is_a_weighed_sum_of_bands() -> None:
    """Check 5: with the order of weights and taps of the reference, whose filters are shared."""
    with seeded(0):
        module = MultiresConv(3, levels=4, taps=3).double()
    x = wave(2, 50, 3)
    low, high = module.bank.weight[0].movedim(-1, 1)[:, :, None]  # (D, 1, K)
    a, details = x.mT, []
    for level in range(4):
        padded = F.pad(a, (2 << level, 0))
        details.append(F.conv1d(padded, high, dilation=1 << level, groups=3))
        a = F.conv1d(padded, low, dilation=1 << level, groups=3)
    raw, *of_details, rest = module.weight
    y = x.mT * raw[:, None] + a * rest[:, None] + sum(w[:, None] * d for w, d in zip(of_details, details, strict=True))
    close(module(x)[0], y.mT)
    folded = module.fold()
    close(folded(x)[0], module(x)[0])
    assert nbytes(folded.init_state(1)) == nbytes(module.init_state(1)) == 8 * 3 * 2 * 15


def test_filters_to_start_with() -> None:
    for name, taps in (("haar", 2), ("haar", 5), ("daubechies", 2), ("daubechies", 4), ("daubechies", 12)):
        low, high = wavelet(name, taps)
        assert float(low.sum()) == pytest.approx(1)
        assert abs(float(high.sum())) < 1e-9
        if name == "daubechies":  # orthonormal, but for the factor 1/sqrt(2), with K / 2 vanishing moments
            for shift in range(0, taps, 2):
                expected = 0.5 if shift == 0 else 0.0
                assert float(low[shift:] @ low[: taps - shift]) == pytest.approx(expected, abs=1e-9)
                assert float(high[shift:] @ low[: taps - shift]) == pytest.approx(0, abs=1e-9)
            k = torch.arange(taps, dtype=torch.float64)
            assert all(abs(float((k**p) @ high)) < 1e-6 * taps**p for p in range(taps // 2))
    with seeded(0):
        drawn = FilterBank(64, 3, 4).weight.detach()
    assert 0.48 < float(drawn.max()) <= 0.5 and float(drawn.var()) == pytest.approx(1 / 12, rel=0.1)


@pytest.mark.parametrize("selective", [False, True])
def test_a_step_calls_parts_that_somebody_listens_to(selective: bool) -> None:
    module, heard = mixer(selective=selective).float(), []
    parts = set(module.modules()) - {module}
    with torch.no_grad():
        y, _ = module.step(torch.ones(1, 5))
        for part in parts:
            part.register_forward_hook(lambda part, *_: heard.append(part))
        close(module.step(torch.ones(1, 5))[0], y)
    assert set(heard) == parts


def test_narrow_layers_keep_rates_steps_and_states_wide() -> None:
    for selective in (False, True):
        module = mixer(selective=selective).bfloat16()
        y, state = module(wave(2, 9, 5).bfloat16())
        assert y.dtype == torch.bfloat16
        assert state.h.dtype == state.history.dtype == module.rates().dtype == torch.float32


def test_time_constants_are_those_of_the_states() -> None:
    module = mixer(levels=0, weights="static")
    decay, _ = module.system()
    close(module.time_constants(), -1 / decay.log().flatten())


def test_what_cannot_be_built_is_refused() -> None:
    for wrong, said in (
        ({"width": 0}, "width is 0"),
        ({"levels": -1}, "levels is -1"),
        ({"levels": 17}, "levels 17"),
        ({"taps": 0}, "taps is 0"),
        ({"state_per_scale": 0}, "state_per_scale is 0"),
        ({"rank": 0}, "rank is 0"),
        ({"weights": "magic"}, "'magic'"),
        ({"form": "numba"}, "'numba'"),
        ({"filters": "magic"}, "'magic'"),
        ({"filters": "daubechies", "taps": 3}, "3 taps"),
        ({"filters": "haar", "taps": 1}, "1 taps"),
    ):
        with seeded(0), pytest.raises(UsageError, match=said):
            MultiScaleSSM(**({"width": 4} | wrong))


@pytest.mark.parametrize("selective", [False, True])
def test_a_step_refuses_states_of_other_shapes(selective: bool) -> None:
    """What one step runs looks at no bounds, so shapes have to be looked at before."""
    with seeded(0):
        layer = MultiScaleSSM(4, selective=selective)
        others = [MultiScaleSSM(4, state_per_scale=2), MultiScaleSSM(4, 2), MultiScaleSSM(4, taps=2), MultiScaleSSM(5)]
    states = [other.init_state(2) for other in others] + [layer.init_state(2, (3,))]
    with torch.no_grad():
        assert layer.step(torch.ones(2, 4), layer.init_state(2))[0].isfinite().all()
        for state in states:
            with pytest.raises((UsageError, TypeCheckError)):  # the latter in tests alone
                layer.step(torch.ones(2, 4), state)


def test_a_matrix_that_was_exchanged_for_another_in_the_same_place_is_read_anew() -> None:
    with seeded(0):
        layer = MultiScaleSSM(5)
    x, matrix = torch.arange(5.0)[None], layer.weights.linear.weight
    with torch.no_grad():
        layer.step(x)
        matrix.data = matrix.data.T
        fast = layer.step(x)[0]
    torch.testing.assert_close(fast, layer(x[:, None])[0][:, 0].detach(), rtol=1e-5, atol=1e-5)


def test_a_layer_and_what_fold_makes_of_it_do_not_continue_each_other() -> None:
    with seeded(0):
        layer = MultiScaleSSM(3)
    folded, x = layer.fold(), torch.ones(1, 4, 3)
    for one, other in ((layer, folded), (folded, layer)):
        _, state = one(x)
        assert one(x, state)[0].shape == x.shape
        with pytest.raises(UsageError, match="do not continue each other"):
            other(x, state)


@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 0, 3), (2, 5, 0, 3)])
def test_by_fft_nothing_gives_nothing(shape: tuple[int, ...]) -> None:
    with seeded(0):
        layer = MultiScaleSSM(3, form="fft")
    y, state = layer(torch.zeros(shape))
    assert y.shape == shape and state.h.isfinite().all()


def test_arguments_that_would_be_passed_over_are_refused() -> None:
    for wrong in ({"filters": "foo"}, {"taps": -2}):
        with pytest.raises(UsageError, match="MultiScaleSSM"):
            MultiScaleSSM(3, 0, **wrong)
