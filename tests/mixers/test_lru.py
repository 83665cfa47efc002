"""The linear recurrent unit against the numbers of its dossier (further-mixers.md, section 3)."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import UsageError, nbytes, seeded
from pliant.mixers import LRU
from pliant.mixers.lru import ring
from tests.mixers.compaction import agrees_with_compaction
from tests.suite import World, close, in_steps, worlds


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.53 * ((i * i + 3 * i) % 1009) + phase).reshape(shape)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def unit() -> LRU:
    """That of check C2."""
    with seeded(0):
        mixer = LRU(2, 3).double()
    first = ring(numbers(0.2, 0.5, 0.8, 0.1, 0.4, 0.9).reshape(2, 3), 0.5, 0.99, 6.28)
    with torch.no_grad():
        for parameter, value in zip((mixer.log_decay, mixer.log_phase, mixer.log_gain), first, strict=True):
            parameter.copy_(value)
        mixer.weight_in.copy_(torch.stack([wave((3, 2), 0.1), wave((3, 2), 0.6)]))
        mixer.weight_out.copy_(torch.stack([wave((2, 3), 1.1), wave((2, 3), 1.7)]))
        mixer.skip.copy_(wave((2,), 2.2))
    return mixer


def flags() -> dict[str, Tensor]:
    reset, mask = torch.zeros(2, 6, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    reset[0, 2], mask[1, 3] = True, False
    return {"reset": reset, "mask": mask}


def near(one: Tensor, two: Tensor, tolerance: float = 1e-9) -> None:
    torch.testing.assert_close(one, two, atol=tolerance, rtol=0)


def test_check_c1_the_ring() -> None:
    log_decay, log_phase, log_gain = ring(numbers(0.25, 0.75, 0.5, 0.1).reshape(2, 2), 0.9, 0.999, 6.28)
    near(log_decay, numbers(-2.5618930863, -3.6840824224))
    near(torch.exp(-torch.exp(log_decay)), numbers(0.9257430799, 0.9751926733))
    near(log_phase.exp(), numbers(3.14, 0.628))
    near(log_gain, numbers(-0.9724561985, -1.5079751436))


def test_check_c2_outputs_and_state() -> None:
    y, _ = unit()(wave((2, 6, 2), 0.5))
    near(y[1, 5], numbers(0.6432586127, 0.4263765241))
    y, state = unit()(wave((2, 6, 2), 0.5))
    near(state.h[0, 0], numbers(0.5677763563, 0.5343839969))


def test_check_c2_steps_and_the_form_of_a_convolution_agree() -> None:
    mixer, x = unit(), wave((2, 6, 2), 0.5)
    y, _ = mixer(x)
    near(in_steps(mixer, World(x, None, None, ()))[0], y, 1e-14)
    eigenvalues, B, C = mixer.eigenvalues(), torch.complex(*mixer.weight_in), torch.complex(*mixer.weight_out)
    driven = mixer.log_gain.exp() * (x.to(B.dtype) @ B.T)
    expected = mixer.skip * x
    for t in range(6):
        for s in range(t + 1):
            expected[:, t] = expected[:, t] + ((eigenvalues ** (t - s) * driven[:, s]) @ C.T).real
    near(y, expected, 1e-14)


def test_check_c3_with_resets_and_masks() -> None:
    y, _ = unit()(wave((2, 6, 2), 0.5), **flags())
    near(y[0, 5], numbers(-0.0906991937, -0.7450266025))
    near(y[1, 5], numbers(0.5972062327, -0.6037876092))
    assert not y[1, 3].any()


@given(data=st.data())
def test_resets_and_masks_are_those_of_compaction(data: st.DataObject) -> None:
    mixer = unit()
    _, state = mixer(wave((3, 5, 2), 2.0))
    world = data.draw(worlds(2, torch.float64, ((),)))
    agrees_with_compaction(mixer, world, type(state)(*(part[: len(world.x)] for part in state)))


def test_check_c4_the_ring_is_uniform_in_its_area() -> None:
    random = torch.Generator().manual_seed(0)
    draws = torch.rand(2, 200_000, generator=random, dtype=torch.float64)
    log_decay, _, log_gain = ring(draws, 0.4, 0.9, 6.28)
    square = torch.exp(-2 * torch.exp(log_decay))
    assert float(square.mean()) == pytest.approx(0.485, abs=1e-3)
    assert 0.4**2 <= float(square.min()) <= float(square.max()) <= 0.9**2
    near(torch.exp(2 * log_gain) + square, torch.ones_like(square), 1e-15)
    assert float(ring(draws, 0.0, 1.0, 6.28)[2].exp().mean()) == pytest.approx(2 / 3, abs=2e-3)


def test_the_ends_of_a_draw_stay_finite() -> None:
    for value in ring(numbers(0, 1, 0, 1).reshape(2, 2), 0.0, 1.0, 6.28):
        assert value.float().isfinite().all()


def test_check_c5_white_input_gives_outputs_of_unit_variance() -> None:
    with seeded(0):
        mixer = LRU(64, 256)
    with torch.no_grad():
        mixer.skip.zero_()
        x = torch.randn(8, 2000, 64, generator=torch.Generator().manual_seed(1))
        y, _ = mixer(x)
    # Draws of a few slow states move the variance of one model by some percent.
    assert float(y[:, 500:].var()) == pytest.approx(1, abs=0.15)


def test_check_c6_the_gradient_of_decays() -> None:
    mixer = unit()
    reset, mask = torch.zeros(1, 6, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool)
    reset[0, 2], mask[0, 3] = True, False
    y, _ = mixer(wave((1, 6, 2), 0.5), reset=reset, mask=mask)
    y[0, 5].sum().backward()
    assert mixer.log_decay.grad is not None
    near(mixer.log_decay.grad, numbers(0.0067309380, -0.1229741649, 0.0106630604))


def test_gradients_are_those_of_finite_differences() -> None:
    mixer, x = unit(), wave((2, 6, 2), 0.5)
    names = [name for name, _ in mixer.named_parameters()]
    values = [p.detach().clone().requires_grad_() for p in mixer.parameters()]
    run = torch.func.functional_call
    assert torch.autograd.gradcheck(lambda *p: run(mixer, dict(zip(names, p, strict=True)), (x,), flags())[0], values)


def test_the_size_of_the_state() -> None:
    with seeded(0):
        assert nbytes(LRU(4, 16).init_state(1)) == 8 * 16


def test_the_gain_of_slow_states_is_exact() -> None:
    # 1 - |λ|² in float32 is off by nine percent there.
    log_gain = ring(numbers(0.5, 0.5).reshape(2, 1), 0.9999998, 1.0, 6.28)[2]
    assert float(log_gain.exp()) == pytest.approx(math.sqrt(1 - 0.9999999**2), rel=1e-6)


def test_decays_of_one_and_zero() -> None:
    mixer = unit().float()
    x = wave((1, 40, 2), 0.5).float()
    for log_decay in (-200.0, 20.0):
        with torch.no_grad():
            mixer.log_decay.fill_(log_decay)
        y, state = mixer(x)
        y.sum().backward()
        assert y.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())
        modulus = float(mixer.eigenvalues().detach().abs().max())
        assert modulus == pytest.approx(1.0 if log_decay < 0 else 0.0, abs=1e-6)
        if log_decay > 0:
            close(mixer(x[:, -1:])[1].h, state.h)


def test_a_long_sequence_in_float32() -> None:
    # 1e5 steps at |λ| = exp(-1e-5): the dossier found a relative error of 2e-3.
    with seeded(0):
        mixer = LRU(1, 4)
    with torch.no_grad():
        mixer.log_decay.fill_(math.log(1e-5))
        x = torch.randn(1, 10**5, 1, generator=torch.Generator().manual_seed(0))
        narrow = mixer(x)[1].h
        exact = mixer.double()(x.double())[1].h
    assert float((narrow - exact).abs().max() / exact.abs().max()) < 2e-2


COMPILE = """
import torch
from pliant.mixers import MIXER
mixer, x = MIXER(4), torch.randn(2, 40, 4)
y, state = mixer(x)
compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
torch.testing.assert_close(compiled(x)[0], y)
compiled(x)[0].sum().backward()
torch.testing.assert_close(torch.export.export(mixer, (x,)).module()(x)[0], y)
step = torch.export.export(mixer, (x[:, :1], state))
torch.testing.assert_close(step.module()(x[:, :1], state)[0], mixer(x[:, :1], state)[0])
assert not any("pliant" in str(node.target) for node in step.graph.nodes)
"""


@pytest.mark.slow
def test_exports_and_compiles_in_one_graph() -> None:
    # In a process of its own, since the type checks of the tests cannot be compiled.
    done = subprocess.run([sys.executable, "-c", COMPILE.replace("MIXER", "LRU")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_built_is_refused() -> None:
    for wrong in ({"width": 0}, {"state_size": 0}):
        with pytest.raises(UsageError, match="at least 1"):
            LRU(**({"width": 4} | wrong))
    for wrong in ({"min_radius": 0.9, "max_radius": 0.5}, {"max_radius": 1.5}, {"max_phase": 0.0}):
        with pytest.raises(UsageError, match="min_radius < max_radius"):
            LRU(4, **wrong)
