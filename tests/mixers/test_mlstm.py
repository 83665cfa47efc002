"""The mLSTM against the numbers of its dossier (lram-xlstm.md, section 8), and what the contract does not ask."""

import math
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from pliant.core import UsageError, detach, seeded
from pliant.kernels import matrix_memory
from pliant.mixers import MLSTM
from pliant.mixers.mlstm import load_xlstm_weights
from tests.mixers.compaction import agrees_with_compaction
from tests.suite import World, close, in_steps, same_state

# Width, blocks and parameters of a stack of mLSTM blocks alone, with its norms (section 3).
STACKS = ((512, 8, 12_939_840), (768, 12, 43_269_984), (1024, 16, 102_089_856), (1280, 20, 198_836_640),
          (1536, 28, 400_105_184))  # fmt: skip


def small(dtype: torch.dtype = torch.float64) -> MLSTM:
    with seeded(0):
        mixer = MLSTM(6, 2, 16)
        for parameter in mixer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    return mixer.to(dtype)


def long_world(steps: int, batch: int = 2, seed: int = 0) -> World:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, steps, 6, generator=random, dtype=torch.float64)
    reset, mask = (torch.rand(batch, steps, generator=random) < share for share in (0.03, 0.7))
    return World(x, reset, mask, [steps // 3, steps // 3 + 1, 2 * steps // 3])


def test_check_6_the_first_weights() -> None:
    for seed in range(3):
        with seeded(seed):
            mixer = MLSTM(512, depth=8)
        assert mixer.forget_gate.bias.tolist() == [3, 4, 5, 6]
        assert not mixer.input_gate.weight.any()
        assert not mixer.forget_gate.weight.any()
        assert mixer.skip.eq(1).all()
        assert mixer.norm_weight.eq(1).all()
        spread = {name: float(p.detach().std()) for name, p in mixer.named_parameters()}
        for name in ("linear_up.weight", "query", "key", "value"):
            assert spread[name] == pytest.approx(math.sqrt(2 / 5 / 512), rel=0.03)
        assert spread["linear_down.weight"] == pytest.approx(2 / 8 / math.sqrt(512), rel=0.02)
        # Uniform in ±1/√4, whose deviation is that over √3.
        assert spread["conv_weight"] == pytest.approx(0.5 / math.sqrt(3), rel=0.03)
        assert float(mixer.conv_weight.detach().abs().max()) <= 0.5
        assert float(mixer.input_gate.bias.detach().abs().max()) < 0.5


@pytest.mark.parametrize(("width", "depth", "parameters"), STACKS)
def test_check_8_parameter_counts(width: int, depth: int, parameters: int) -> None:
    with seeded(0):
        block = sum(p.numel() for p in MLSTM(width).parameters())
    assert depth * (block + width) + width == parameters


def test_check_9_states_of_those_who_scale_the_query_differ_by_a_root() -> None:
    random = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 5, 1, 8, generator=random, dtype=torch.float64) for _ in range(3))
    gate = torch.zeros(1, 5, 1, dtype=torch.float64)
    h, state = matrix_memory(q, k, v, gate, gate)
    C = torch.einsum("bthk,bthv->bhkv", k, v)
    torch.testing.assert_close(C / state.C, torch.full_like(C, 2.828427), atol=1e-6, rtol=0)
    torch.testing.assert_close(k.sum(1) / state.n, torch.full_like(state.n, 2.828427), atol=1e-6, rtol=0)
    again, _ = matrix_memory(
        q[:, :1], k[:, :1], v[:, :1], gate[:, :1], gate[:, :1], (C / 8**0.5, k.sum(1) / 8**0.5, state.m)
    )
    assert again.isfinite().all()
    assert h.isfinite().all()


def test_check_10_any_length_and_padding_on_the_left() -> None:
    mixer = small()
    x = long_world(333).x
    y, state = mixer(x)
    padding = torch.full((2, 100, 6), torch.nan, dtype=torch.float64)
    mask = torch.cat([torch.zeros(2, 100, dtype=torch.bool), torch.ones(2, 333, dtype=torch.bool)], 1)
    padded, after = mixer(torch.cat([padding, x], 1), mask=mask)
    close(padded[:, 100:], y)
    same_state(after, state)


@pytest.mark.parametrize("steps", [31, 64, 150])
def test_long_sequences_with_flags_are_their_steps(steps: int) -> None:
    mixer, world = small(), long_world(steps)
    _, state = mixer(long_world(5, seed=1).x)
    y, after = mixer(world.x, state, **world.flags)
    other, end = in_steps(mixer, world, state)
    close(y, other)
    same_state(after, end)
    agrees_with_compaction(mixer, world, state)


def test_gate_values_of_twenty_stay_finite() -> None:
    for input_bias in (-20.0, 20.0):
        for forget_bias in (-20.0, 20.0):
            mixer = small(torch.float32)
            with torch.no_grad():
                mixer.input_gate.bias.fill_(input_bias)
                mixer.forget_gate.bias.fill_(forget_bias)
            y, state = mixer(long_world(80).x.float())
            y.sum().backward()
            assert y.isfinite().all()
            assert state.memory.C.isfinite().all()
            assert all(p.grad is not None and p.grad.isfinite().all() for p in mixer.parameters())


def test_heads_are_independent_until_the_last_projection() -> None:
    mixer = small()
    x = long_world(20).x
    with torch.no_grad():
        for gate in (mixer.input_gate, mixer.forget_gate):  # which read all of them
            gate.weight.zero_()
        before = mixer(x)[1].memory.C
        mixer.value[2:] += 1  # of the second head
        after = mixer(x)[1].memory.C
    assert after[:, 0].equal(before[:, 0])
    assert not after[:, 1].equal(before[:, 1])


def test_weights_are_loaded_under_the_names_of_xlstm() -> None:
    ours, other = small(), small()
    named: dict[str, Tensor] = {
        "proj_up.weight": ours.linear_up.weight,
        "proj_down.weight": ours.linear_down.weight,
        "conv1d.conv.weight": ours.conv_weight.T[:, None],
        "conv1d.conv.bias": ours.conv_bias,
        "mlstm_cell.outnorm.weight": ours.norm_weight - 1,
        "learnable_skip": ours.skip,
    }
    named |= {f"{part[0]}_proj.weight": getattr(ours, part) for part in ("query", "key", "value")}
    for gate in ("input", "forget"):
        named |= {f"mlstm_cell.{gate[0]}gate.{part}": getattr(getattr(ours, f"{gate}_gate"), part)
                  for part in ("weight", "bias")}  # fmt: skip
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    load_xlstm_weights(other, named)
    x = long_world(9).x
    close(other(x)[0], ours(x)[0])
    with pytest.raises(UsageError, match="differing: learnable_skip"):
        load_xlstm_weights(other, {name: x for name, x in named.items() if name != "learnable_skip"})
    with seeded(0):
        larger = MLSTM(7, 2, 16)
    with pytest.raises(UsageError, match="does not fit linear_up"):
        load_xlstm_weights(larger, named)


@pytest.mark.usefixtures("unchecked")
def test_a_sequence_and_a_step_can_be_exported_in_plain_torch() -> None:
    mixer = small(torch.float32)
    x = long_world(40).x.float()
    state = detach(mixer(x)[1])
    for given in ((x,), (x[:, :1], state)):
        program = torch.export.export(mixer, given)
        called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert not [name for name in called if "pliant" in name]
        close(program.module()(*given)[0], mixer(*given)[0])


def test_what_cannot_be_built_is_refused() -> None:
    with pytest.raises(UsageError, match="num_heads is 3, expected a divisor of the inner width 64"):
        MLSTM(20, 3)
    with pytest.raises(UsageError, match="block_size"):
        MLSTM(4, 2, 10)
    with pytest.raises(UsageError, match="conv_width"):
        MLSTM(4, conv_width=0)


@pytest.mark.slow
def test_compiles_in_one_graph_and_once_for_all_lengths() -> None:
    code = """
import torch
from pliant.mixers import MLSTM
torch._dynamo.config.error_on_recompile = False
mixer = MLSTM(8, 2, 16)
compiled = torch.compile(mixer, fullgraph=True, dynamic=True, backend="aot_eager")
for steps in (16, 24, 40):
    x = torch.randn(2, steps, 8)
    y, state = compiled(x)
    torch.testing.assert_close(y, mixer(x)[0])
    y.sum().backward()
print(torch._dynamo.utils.counters["stats"]["unique_graphs"])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 1
