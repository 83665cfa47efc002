"""Parity with the published code of the sLSTM (lram-xlstm.md, acceptance check 7).

xlstm asks for mlstm_kernels, whose license we do not accept, so it is no requirement of ours; to run this:
`pip install --no-deps xlstm==2.0.6 einops dacite omegaconf packaging`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.core import seeded
from pliant.mixers import SLSTM
from pliant.mixers.slstm import load_xlstm_weights

pytestmark = [pytest.mark.oracle, pytest.mark.global_rng, pytest.mark.filterwarnings("ignore")]

WIDTH, HEADS = 16, 2


@pytest.fixture
def layers() -> Any:
    return pytest.importorskip("xlstm.blocks.slstm.layer")


def pair(layers: Any, random_weights: bool = True) -> tuple[SLSTM, Any]:
    """Our mixer and their layer, with the same weights, in the second of three blocks."""
    config = layers.sLSTMLayerConfig(
        embedding_dim=WIDTH, num_heads=HEADS, backend="vanilla", dtype="float32", _block_idx=1, _num_blocks=3
    )
    theirs = layers.sLSTMLayer(config)
    theirs.reset_parameters()
    with seeded(0):
        ours = SLSTM(WIDTH, HEADS, 1, 3)
    if random_weights:
        for parameter in theirs.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
        load_xlstm_weights(ours, theirs.state_dict())
    return ours, theirs


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_the_layer_has_their_outputs_and_gradients(layers: Any) -> None:
    ours, theirs = pair(layers)
    x = torch.randn(3, 20, WIDTH)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, _ = ours(mine)
    z = theirs(its)
    close(y, z)
    weigh = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    (y * weigh).sum().backward()
    (z * weigh).sum().backward()
    assert mine.grad is not None and its.grad is not None
    close(mine.grad, its.grad)
    for name, slot in (("fgate", 0), ("igate", 1), ("zgate", 2), ("ogate", 3)):
        close(ours.gate_weight.grad[slot], getattr(theirs, name).weight.grad.transpose(1, 2))
    kernel = theirs.slstm_cell._recurrent_kernel_.grad.reshape(HEADS, 4, -1, WIDTH // HEADS).permute(0, 3, 1, 2)
    close(ours.recurrent.grad, kernel)
    close(ours.gate_bias.grad.flatten(), theirs.slstm_cell._bias_.grad)
    close(ours.norm_weight.grad, theirs.group_norm.weight.grad)
    close(ours.conv_weight.grad.T, theirs.conv1d.conv.weight.grad[:, 0])


def test_the_layer_steps_as_theirs_does(layers: Any) -> None:
    ours, theirs = pair(layers)
    x = torch.randn(2, 9, WIDTH)
    state, its = None, {"conv_state": None, "slstm_state": None}
    with torch.no_grad():
        for t in range(9):
            y, state = ours.step(x[:, t], state)
            z, its = theirs.step(x[:, t : t + 1], **its)
            close(y, z[:, 0])
    assert state is not None
    close(torch.stack(state[1:]), its["slstm_state"].reshape(4, 2, WIDTH))
    close(state.conv, its["conv_state"][0][:, 1:])


def test_first_biases_are_theirs(layers: Any) -> None:
    ours, theirs = pair(layers, random_weights=False)
    close(ours.gate_bias.flatten(), theirs.slstm_cell._bias_)
