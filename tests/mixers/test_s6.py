"""S6 against the numbers of its dossier (further-mixers.md, section 2)."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import UsageError, nbytes, seeded
from pliant.mixers import S6
from tests.mixers.compaction import agrees_with_compaction
from tests.suite import World, close, worlds

SIZES = {
    "A_log": (12, 3),
    "D": (12,),
    "in_proj.weight": (24, 6),
    "conv1d.weight": (12, 1, 4),
    "conv1d.bias": (12,),
    "x_proj.weight": (8, 12),
    "dt_proj.weight": (12, 2),
    "dt_proj.bias": (12,),
    "out_proj.weight": (6, 12),
}


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.53 * ((i * i + 3 * i) % 1009) + phase).reshape(shape)


def weights() -> dict[str, Tensor]:
    """Those of check B2, by the names of transformers."""
    found = {name: 0.3 * wave(shape, len(name)) for name, shape in SIZES.items()}
    found["A_log"] = torch.arange(1.0, 4, dtype=torch.float64).log().repeat(12, 1)
    found["D"] = torch.ones(12, dtype=torch.float64)
    found["dt_proj.bias"] = -3 + wave((12,), len("dt_proj.bias"))
    return found


def block() -> S6:
    with seeded(0):
        mixer = S6(6, 2, 3, 4, 2).double()
    mixer.load_mamba(weights())
    return mixer


def flags() -> dict[str, Tensor]:
    reset, mask = torch.zeros(2, 7, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    reset[0, 3] = reset[1, 5] = True
    mask[0, 4] = mask[1, 0] = mask[1, 1] = False
    return {"reset": reset, "mask": mask}


def test_check_b2_the_block_of_transformers() -> None:
    mixer = block()
    assert sum(p.numel() for p in mixer.parameters()) == 456
    y, state = mixer(wave((2, 7, 6), 0.5))
    expected = [-0.0148400636, 0.0222021695, -0.0188488625, 0.0278183065, 0.0188643022, 0.0023188493]
    torch.testing.assert_close(y[1, 6], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float(state.h.detach().sum()) == pytest.approx(0.1919610539, abs=1e-9)


def test_check_b3_with_resets_and_masks() -> None:
    y, state = block()(wave((2, 7, 6), 0.5), **flags())
    expected = [0.0009095054, 0.0114522306, -0.0055699587, 0.0128582728, 0.0078023355, 0.0096770400]
    torch.testing.assert_close(y[0, 6], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)
    assert float(state.h.detach().sum()) == pytest.approx(0.0813898462, abs=1e-9)


def test_check_b3_equals_compaction() -> None:
    agrees_with_compaction(block(), World(wave((2, 7, 6), 0.5), flags()["reset"], flags()["mask"], ()))


@given(data=st.data())
def test_resets_and_masks_are_those_of_compaction(data: st.DataObject) -> None:
    mixer = block()
    _, state = mixer(wave((3, 5, 6), 2.0))
    world = data.draw(worlds(6, torch.float64, ((),)))
    agrees_with_compaction(mixer, world, type(state)(*(part[: len(world.x)] for part in state)))


def test_check_b5_nothing_before_a_reset_has_a_gradient() -> None:
    x = wave((1, 7, 6), 0.5).requires_grad_()
    y, _ = block()(x, reset=torch.arange(7)[None] == 4)
    y[:, 4:].sum().backward()
    assert x.grad is not None
    assert not x.grad[:, :4].any()
    assert x.grad[:, 4:].all()


@pytest.mark.parametrize(("width", "parameters"), [(64, 32_640), (128, 116_480), (768, 3_770_880)])
def test_the_sizes_of_the_dossier(width: int, parameters: int) -> None:
    with seeded(0):
        mixer = S6(width)
    assert sum(p.numel() for p in mixer.parameters()) == parameters
    if width == 128:
        assert nbytes(mixer.init_state(1)) == 19_456


def test_first_values() -> None:
    for seed in range(3):
        with seeded(seed):
            mixer = S6(512)
        step = torch.nn.functional.softplus(mixer.linear_step.bias.detach())
        assert 1e-3 * (1 - 1e-3) <= float(step.min()) < 2e-3
        assert 5e-2 < float(step.max()) <= 1e-1 * (1 + 1e-3)
        assert float(step.log10().mean()) == pytest.approx(-2, abs=0.06)
        assert mixer.log_rate.detach().exp()[7].tolist() == pytest.approx(range(1, 17))
        assert float(mixer.linear_step.weight.detach().abs().max()) <= 32**-0.5
        assert not mixer.conv_bias.detach().any()
        assert mixer.skip.detach().eq(1).all()


def test_a_masked_step_does_not_let_the_state_decay() -> None:
    mixer = block()
    _, state = mixer(wave((1, 5, 6), 0.5))
    _, after = mixer(torch.full((1, 300, 6), torch.nan, dtype=torch.float64), state,
                     mask=torch.zeros(1, 300, dtype=torch.bool))  # fmt: skip
    assert after.h.equal(state.h)
    assert after.conv.equal(state.conv)


def test_step_sizes_of_twenty_stay_finite() -> None:
    for bias in (-20.0, 20.0):
        mixer = block().float()
        with torch.no_grad():
            mixer.linear_step.bias.fill_(bias)
        y, state = mixer(wave((2, 50, 6), 0.5).float())
        y.sum().backward()
        assert y.isfinite().all()
        assert state.h.isfinite().all()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_the_fast_form_is_a_sequence_of_steps_with_the_same_gradients() -> None:
    found = []
    for in_steps in (False, True):
        mixer, x = block(), wave((2, 40, 6), 0.5).requires_grad_()
        if in_steps:
            state, outputs = None, []
            for t in range(40):
                y, state = mixer.step(x[:, t], state)
                outputs.append(y)
            y = torch.stack(outputs, 1)
        else:
            y, _ = mixer(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(p.grad for p in mixer.parameters())])
    for one, two in zip(*found, strict=True):
        close(one, two)


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
    done = subprocess.run([sys.executable, "-c", COMPILE.replace("MIXER", "S6")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_built_or_loaded_is_refused() -> None:
    for wrong in ({"width": 0}, {"expand": 0}, {"state_size": 0}, {"conv_width": 0}, {"rank": 0}):
        with pytest.raises(UsageError, match=f"{next(iter(wrong))} is 0"):
            S6(**({"width": 4} | wrong))
    with seeded(0), pytest.raises(UsageError, match="load_mamba"):
        S6(6).load_mamba(weights())
