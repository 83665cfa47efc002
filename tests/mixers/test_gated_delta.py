"""The gated delta block against the numbers of its dossier (further-mixers.md, section 1)."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import UsageError, nbytes, seeded
from pliant.mixers import GatedDelta
from tests.mixers.compaction import agrees_with_compaction
from tests.suite import World, close, worlds

SIZES = {
    "dt_bias": (2,),
    "A_log": (2,),
    "conv1d.weight": (20, 1, 4),
    "in_proj_qkvz.weight": (28, 6),
    "in_proj_ba.weight": (4, 6),
    "norm.weight": (4,),
    "out_proj.weight": (6, 8),
}


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.53 * ((i * i + 3 * i) % 1009) + phase).reshape(shape)


def weights() -> dict[str, Tensor]:
    """Those of check A7, by the names of Qwen3-Next."""
    offset, scale = {"norm.weight": 1.0, "A_log": -1.0, "dt_bias": -1.0}, {"norm.weight": 0.3, "A_log": 1, "dt_bias": 1}
    return {n: offset.get(n, 0.0) + scale.get(n, 0.5) * wave(shape, len(n)) for n, shape in SIZES.items()}


def block() -> GatedDelta:
    with seeded(0):
        mixer = GatedDelta(6, 2, 3, 4, eps=1e-6).double()
    mixer.load_qwen3_next(weights())
    return mixer


def test_check_a7_the_block_of_qwen3_next() -> None:
    mixer = block()
    assert sum(p.numel() for p in mixer.parameters()) == 328
    y, _ = mixer(wave((2, 7, 6), 0.5))
    expected = [0.6103456892, -0.1950759739, 0.4146890140, 0.5842289222, 0.0134144336, -0.7686749045]
    torch.testing.assert_close(y[1, 6], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


def test_check_a7_with_resets_and_masks() -> None:
    reset, mask = torch.zeros(2, 7, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    reset[0, 3] = reset[1, 5] = True
    mask[0, 4] = mask[1, 0] = mask[1, 1] = False
    y, _ = block()(wave((2, 7, 6), 0.5), reset=reset, mask=mask)
    expected = [0.9284542133, -1.0113138716, 1.0224942611, 1.2849118190, -0.1538666465, -1.0235436243]
    torch.testing.assert_close(y[0, 6], torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=0)


@pytest.mark.parametrize("per_channel", [False, True])
@given(data=st.data())
def test_flags_are_what_runs_without_flags_say(per_channel: bool, data: st.DataObject) -> None:
    world: World = data.draw(worlds(4, torch.float64, ((), (2,))))
    with seeded(0):
        mixer = GatedDelta(4, 2, 2, 3, per_channel=per_channel).double()
    agrees_with_compaction(mixer, world)


def test_one_decay_for_each_head_is_a_case_of_one_for_each_channel() -> None:
    with seeded(0):
        heads, channels = GatedDelta(4, 2, 2, 3).double(), GatedDelta(4, 2, 2, 3, per_channel=True).double()
    state = {name: p for name, p in heads.state_dict().items() if name in channels.state_dict()}
    state["decay_bias"] = heads.decay_bias.detach().expand(2, 2)
    channels.load_state_dict(state, strict=False)
    with torch.no_grad():
        # Decays that depend on the step alone, and an open gate at the end.
        heads.linear_decay.weight.zero_()
        channels.linear_decay[1].weight.zero_()
        channels.linear_gate[1].weight.zero_()
        channels.linear_gate[1].bias.fill_(100.0)
        heads.linear_gate.weight.copy_(wave((6, 4), 0.3))
    x = wave((1, 5, 4), 0.1)
    close(channels(x)[1].s, heads(x)[1].s)


def test_the_first_decays_are_those_of_their_paper_with_no_endless_memory() -> None:
    with seeded(0):
        mixer = GatedDelta(32, 512, 1, 1)
    assert mixer.roles().keys() == dict(mixer.named_parameters()).keys()
    rates = mixer.log_rate.detach().exp()
    steps = torch.nn.functional.softplus(mixer.decay_bias.detach())
    assert 1 <= float(rates.min()) < 2 < 15 < float(rates.max()) <= 16
    assert 1e-3 * 0.99 <= float(steps.min()) < 2e-3 < 5e-2 < float(steps.max()) <= 0.1 * 1.01
    assert float(steps.log().mean()) == pytest.approx(math.log(1e-2), abs=0.2)


def test_the_default_sizes_cost_about_six_squares_of_the_width() -> None:
    with seeded(0):
        mixer = GatedDelta(128)
    assert sum(p.numel() for p in mixer.parameters()) == pytest.approx(6 * 128**2, rel=0.05)


def test_the_state_has_the_size_of_the_dossier() -> None:
    with seeded(0):
        mixer = GatedDelta(64, 4, 16, 16, negative_eigenvalues=True)
    assert mixer.largest_write == 2
    assert nbytes(mixer.init_state(3)) == 3 * 6400
    state = mixer.init_state(3, (2,))
    assert state.s.shape == (3, 2, 4, 16, 16)
    assert state.conv.shape == (3, 3, 2, 192)


def test_export_of_a_sequence_and_of_a_step_is_plain_torch() -> None:
    with seeded(0):
        mixer = GatedDelta(4, 2, 2, 3)
    x = wave((2, 6, 4), 0.3).float()
    for steps in (6, 1):
        state = mixer.init_state(2)
        program = torch.export.export(mixer, (x[:, :steps], state))
        names = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert not any("pliant" in name for name in names)
        close(program.module()(x[:, :steps], state)[0], mixer(x[:, :steps], state)[0])


@pytest.mark.slow
def test_compiles_in_one_graph_with_gradients() -> None:
    import subprocess
    import sys

    code = """
import torch
from pliant.mixers import GatedDelta
torch.manual_seed(0)
mixer = GatedDelta(8, 2, 4, 4)
compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
x = torch.randn(2, 150, 8)
reset = torch.rand(2, 150) < 0.1
found = []
for run in (mixer, compiled):
    mixer.zero_grad()
    y, state = run(x, reset=reset)
    (y.square().sum() + state.s.sum()).backward()
    found.append([y.detach(), state.s.detach(), *(p.grad.clone() for p in mixer.parameters())])
for one, two in zip(*found):
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_what_cannot_be_built_or_loaded_is_refused() -> None:
    for wrong in ({"num_heads": 0}, {"num_heads": 2, "value_heads": 3}, {"conv_width": 0}, {"key_size": 0}):
        with pytest.raises(UsageError, match="GatedDelta"):
            GatedDelta(6, **wrong)
    with seeded(0):
        others = GatedDelta(6, 2, 3, 5), GatedDelta(6, 2, 3, 4, per_channel=True)
    for mixer in others:
        with pytest.raises(UsageError, match="in_proj_qkvz"):
            mixer.load_qwen3_next(weights())
