"""Parity with the published code of the mLSTM (lram-xlstm.md, acceptance checks 7 and 9).

xlstm asks for mlstm_kernels, whose license we do not accept, so it is no requirement of ours; to run this:
`pip install --no-deps xlstm==2.0.6`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.core import seeded
from pliant.kernels import matrix_memory
from pliant.mixers import MLSTM
from pliant.mixers.mlstm import load_xlstm_weights

pytestmark = [pytest.mark.oracle, pytest.mark.global_rng, pytest.mark.filterwarnings("ignore")]

WIDTH, HEADS, STEPS = 24, 4, 70


@pytest.fixture
def layers() -> Any:
    return pytest.importorskip("xlstm.blocks.mlstm.layer")


@pytest.fixture
def backends() -> Any:
    return pytest.importorskip("xlstm.blocks.mlstm.backends")


def loaded(theirs: Any, depth: int = 1) -> MLSTM:
    """Our mixer with the weights of their layer."""
    with seeded(0):
        ours = MLSTM(WIDTH, HEADS, depth=depth)
    load_xlstm_weights(ours, theirs.state_dict())
    return ours


def pair(layers: Any) -> tuple[MLSTM, Any]:
    theirs = layers.mLSTMLayer(layers.mLSTMLayerConfig(embedding_dim=WIDTH, num_heads=HEADS, context_length=STEPS))
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name == "learnable_skip" else 0.0, std=0.3)
    return loaded(theirs), theirs


def close(one: Tensor, two: Tensor, error: float = 1e-5) -> None:
    torch.testing.assert_close(one, two, atol=error, rtol=error)


def test_check_7_the_layer_has_their_outputs_and_gradients(layers: Any) -> None:
    ours, theirs = pair(layers)
    x = torch.randn(3, STEPS, WIDTH)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, _ = ours(mine)
    z = theirs(its)
    close(y, z)
    weigh = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    (y * weigh).sum().backward()
    (z * weigh).sum().backward()
    assert mine.grad is not None and its.grad is not None
    close(mine.grad, its.grad, 1e-4)
    # Gradients are named as weights are, but for the 1 that the norm adds.
    with seeded(0):
        gradients = MLSTM(WIDTH, HEADS)
    load_xlstm_weights(gradients, {name: p.grad for name, p in theirs.named_parameters()})
    with torch.no_grad():
        gradients.norm_weight.sub_(1)
    for (name, parameter), (_, expected) in zip(ours.named_parameters(), gradients.named_parameters(), strict=True):
        assert parameter.grad is not None, name
        largest = float(expected.abs().max())
        close(parameter.grad / largest, expected.detach() / largest, 1e-4)


def test_check_7_the_layer_steps_as_theirs_does(layers: Any) -> None:
    ours, theirs = pair(layers)
    x = torch.randn(2, 9, WIDTH)
    state, its = None, {"mlstm_state": None, "conv_state": None}
    with torch.no_grad():
        for t in range(9):
            y, state = ours.step(x[:, t], state)
            z, its = theirs.step(x[:, t : t + 1], **its)
            close(y, z[:, 0])
        assert state is not None
        for one, two in zip(state.memory, its["mlstm_state"], strict=True):
            close(one, two.reshape(one.shape))
        close(state.conv, its["conv_state"][0][:, 1:])


def test_check_7_a_stack_has_their_outputs() -> None:
    stacks = pytest.importorskip("xlstm.xlstm_block_stack")
    blocks = pytest.importorskip("xlstm.blocks.mlstm.block")
    layer = pytest.importorskip("xlstm.blocks.mlstm.layer").mLSTMLayerConfig(num_heads=HEADS)
    config = stacks.xLSTMBlockStackConfig(
        mlstm_block=blocks.mLSTMBlockConfig(mlstm=layer), context_length=STEPS, num_blocks=3, embedding_dim=WIDTH
    )
    theirs = stacks.xLSTMBlockStack(config)
    x = h = torch.randn(2, STEPS, WIDTH)
    with torch.no_grad():
        for block in theirs.blocks:
            y, _ = loaded(block.xlstm, 3)(F.layer_norm(h, (WIDTH,), 1 + block.xlstm_norm.weight))
            h = h + y
        close(F.layer_norm(h, (WIDTH,), 1 + theirs.post_blocks_norm.weight), theirs(x))


def test_first_weights_have_their_spread(layers: Any) -> None:
    config = layers.mLSTMLayerConfig(embedding_dim=256, num_heads=HEADS, context_length=1, _num_blocks=3)
    theirs = layers.mLSTMLayer(config)
    with seeded(0):
        first, ours = MLSTM(256, depth=3), MLSTM(256)
    load_xlstm_weights(ours, theirs.state_dict())
    for (name, one), (_, two) in zip(first.named_parameters(), ours.named_parameters(), strict=True):
        if name == "input_gate.bias":  # four numbers by chance
            continue
        assert float(one.detach().std()) == pytest.approx(float(two.detach().std()), rel=0.1), name
    close(first.forget_gate.bias, ours.forget_gate.bias)


@pytest.mark.parametrize("form", ["loop", "parallel", "chunkwise", "numba"])
def test_check_9_the_memory_is_theirs_but_for_a_root(backends: Any, form: str) -> None:
    q, k, v = (torch.randn(2, 64, HEADS, 8, dtype=torch.float64) for _ in range(3))
    log_input, forget = (torch.randn(2, 64, HEADS, dtype=torch.float64) for _ in range(2))
    swapped = [x.transpose(1, 2) for x in (q, k, v)]
    h, state = matrix_memory(q, k, v, log_input, F.logsigmoid(forget), form=form, eps=0.0)
    z, (C, n, m) = backends.chunkwise_simple(
        *(x.contiguous() for x in swapped),
        log_input.mT.contiguous(),
        forget.mT.contiguous(),
        chunk_size=16,
        return_last_state=True,
        eps=0.0,
    )
    close(h, z.transpose(1, 2), 1e-10)
    close(state.C * 8**0.5, C, 1e-10)
    close(state.n * 8**0.5, n, 1e-10)
    close(state.m, m.flatten(2).squeeze(-1), 1e-10)
    gates = (log_input.mT[..., None], forget.mT[..., None])
    close(h, backends.parallel_stabilized_simple(*swapped, *gates, eps=0.0).transpose(1, 2), 1e-10)
