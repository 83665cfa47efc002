"""The gated LRU against the numbers of its dossier (trecvit.md, section 8)."""

import pytest
import torch

from pliant.core import UsageError, seeded
from pliant.mixers import RGLRU, GatedLRU
from pliant.mixers.gated_lru import bounded_sqrt

OUTPUTS = {
    0: [0.5, 0.5, 0.5, 0.5],
    1: [0.530272, 0.502609, 0.621986, 0.601100],
    4: [0.532290, 0.502623, 0.669625, 0.888604],
}


def closed_gates(decay: list[float], num_heads: int = 1) -> RGLRU:
    """A unit whose gate weights and biases are zero, so that both gates stand at one half."""
    with seeded(0):
        unit = RGLRU(len(decay), num_heads)
    with torch.no_grad():
        for parameter in unit.parameters():
            parameter.zero_()
        unit.decay.copy_(torch.tensor(decay))
    return unit


def test_check_2_the_closed_form() -> None:
    y, _ = closed_gates([0, 1, -1, -5], 2)(torch.ones(1, 5, 4))
    for t, row in OUTPUTS.items():
        torch.testing.assert_close(y[0, t], torch.tensor(row), atol=1e-6, rtol=0)


def test_check_3_a_reset_begins_anew_to_the_bit() -> None:
    reset = torch.tensor([[True, False, False, True, False]])
    y, _ = closed_gates([0, 1, -1, -5], 2)(torch.ones(1, 5, 4), reset=reset)
    assert y[0, 3:].equal(y[0, :2])


@pytest.mark.parametrize(
    ("x", "slope"), [(0.0, 1000), (1e-8, 1000), (2.5e-7, 1000), (1e-6, 500), (1e-4, 50), (0.25, 1)]
)
def test_check_4_the_slope_of_the_root_is_bounded(x: float, slope: float) -> None:
    at = torch.tensor([x], dtype=torch.float64, requires_grad=True)
    root = bounded_sqrt(at)
    root.backward()
    assert root.item() == x**0.5
    assert at.grad is not None
    assert at.grad.item() == pytest.approx(slope, rel=1e-9)


@pytest.mark.parametrize(("decay", "slope"), [(-20.0, 2.4721e-5), (-3.0, 0.0688881), (0.0, -0.1246179)])
def test_check_5_slow_decays_have_finite_gradients(decay: float, slope: float) -> None:
    unit = closed_gates([decay, decay])
    y, _ = unit(torch.ones(1, 3, 2))
    y.sum().backward()
    assert unit.decay.grad is not None
    torch.testing.assert_close(unit.decay.grad, torch.full((2,), slope), rtol=1e-4, atol=0)
    if decay == -20:
        assert y.equal(torch.full((1, 3, 2), 0.5))


@pytest.mark.parametrize(("radius", "mean"), [(0.5, 0.777), (0.6, 0.816), (0.9, 0.950)])
def test_check_7_the_ring_of_the_first_decays(radius: float, mean: float) -> None:
    for seed in range(5):
        with seeded(seed):
            unit = RGLRU(768, 12, min_radius=radius)
        found = torch.exp(-torch.nn.functional.softplus(unit.decay.detach()))
        assert radius - 1e-4 <= float(found.min())
        assert float(found.max()) <= 0.999 + 1e-4
        assert float(found.mean()) == pytest.approx(mean, abs=0.01)


def test_check_7_the_first_weights_have_their_spread() -> None:
    for seed in range(5):
        with seeded(seed):
            block = GatedLRU(768, num_heads=12, depth=12)
        spread = {name: float(p.detach().std()) for name, p in block.named_parameters()}
        assert spread["conv_weight"] == pytest.approx(0.050, abs=0.002)
        assert spread["linear_out.weight"] == pytest.approx(0.01473, rel=0.02)
        assert spread["linear_x.weight"] == pytest.approx(768**-0.5, rel=0.02)
        assert spread["lru.input_gate.weight"] == pytest.approx(768**-0.5, rel=0.03)
        biases = [p for name, p in block.named_parameters() if name.endswith("bias")]
        assert not any(bias.detach().any() for bias in biases)


def test_check_8_the_state_is_float32_under_bfloat16() -> None:
    with seeded(0):
        block = GatedLRU(8).bfloat16()
    _, state = block(torch.ones(2, 3, 8, dtype=torch.bfloat16))
    assert state.conv.dtype == state.lru.h.dtype == torch.float32


def test_check_14_a_fast_decay_has_no_memory_and_a_closed_gate_a_perfect_one() -> None:
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, 6, 4, generator=random)
    unit = closed_gates([100.0] * 4)
    torch.testing.assert_close(unit(x)[0], 0.5 * x)
    with torch.no_grad():
        unit.decay.zero_()
        unit.decay_gate.bias.fill_(-50.0)
    y, _ = unit(x)
    torch.testing.assert_close(y, (0.5 * x[:, :1]).expand_as(x))


def test_gate_values_of_twenty_stay_finite() -> None:
    for input_bias in (-20.0, 20.0):
        for decay_bias in (-20.0, 20.0):
            unit = closed_gates([0.0, -5.0])
            with torch.no_grad():
                unit.input_gate.bias.fill_(input_bias)
                unit.decay_gate.bias.fill_(decay_bias)
            y, state = unit(torch.ones(1, 50, 2))
            y.sum().backward()
            assert y.isfinite().all()
            assert state.h.isfinite().all()
            assert all(p.grad is None or p.grad.isfinite().all() for p in unit.parameters())


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UsageError, match="3 heads"):
        RGLRU(4, 3)
    with pytest.raises(UsageError, match="min_radius < max_radius"):
        RGLRU(4, min_radius=0.9, max_radius=0.5)
    with pytest.raises(UsageError, match="conv_width"):
        GatedLRU(4, conv_width=0)
