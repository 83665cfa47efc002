"""Parity with the published code of the gated LRU (trecvit.md, acceptance check 15)."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.core import seeded
from pliant.mixers import RGLRU, GatedLRU

pytestmark = [pytest.mark.oracle, pytest.mark.global_rng]

WIDTH, LRU_WIDTH, HEADS = 8, 12, 2


@pytest.fixture
def modules() -> Any:
    with warnings.catch_warnings(action="ignore"):
        return pytest.importorskip("recurrentgemma.torch.modules")


def blocks(modules: Any) -> tuple[GatedLRU, Any]:
    """Our block and theirs, with the same weights."""
    with seeded(0):
        ours = GatedLRU(WIDTH, LRU_WIDTH, HEADS)
        for parameter in ours.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    theirs = modules.RecurrentBlock(width=WIDTH, num_heads=HEADS, lru_width=LRU_WIDTH, conv1d_temporal_width=4)
    pairs = {
        "linear_x": "linear_x",
        "linear_y": "linear_y",
        "linear_out": "linear_out",
    }
    state = {f"{b}.{part}": getattr(getattr(ours, a), part) for a, b in pairs.items() for part in ("weight", "bias")}
    state |= {"conv_1d.w": ours.conv_weight, "conv_1d.b": ours.conv_bias, "rg_lru.a_param": ours.lru.decay}
    for mine, its in (("input_gate", "input_gate"), ("decay_gate", "a_gate")):
        gate = getattr(ours.lru, mine)
        state |= {f"rg_lru.{its}.w": gate.weight, f"rg_lru.{its}.b": gate.bias}
    theirs.load_state_dict({name: value.detach().clone() for name, value in state.items()})
    return ours, theirs


def positions(reset: Tensor) -> Tensor:
    """Index within the episode, which is how that code says where one begins."""
    found = torch.zeros(reset.shape, dtype=torch.int64)
    for t in range(1, reset.shape[1]):
        found[:, t] = torch.where(reset[:, t], 0, found[:, t - 1] + 1)
    return found


def close(one: Tensor, two: Tensor) -> None:
    torch.testing.assert_close(one, two, atol=1e-5, rtol=1e-5)


def test_the_block_has_their_outputs_and_gradients(modules: Any) -> None:
    ours, theirs = blocks(modules)
    x = torch.randn(3, 11, WIDTH)
    reset = torch.rand(3, 11) < 0.25
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, _ = ours(mine, reset=reset)
    z, _ = theirs(its, positions(reset))
    close(y, z)
    weigh = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    (y * weigh).sum().backward()
    (z * weigh).sum().backward()
    close(mine.grad, its.grad)
    close(ours.lru.decay.grad, theirs.rg_lru.a_param.grad)
    close(ours.conv_weight.grad, theirs.conv_1d.w.grad)
    close(ours.linear_out.weight.grad, theirs.linear_out.weight.grad)
    close(ours.lru.decay_gate.weight.grad, theirs.rg_lru.a_gate.w.grad)


def test_the_block_steps_as_theirs_does(modules: Any) -> None:
    ours, theirs = blocks(modules)
    x = torch.randn(2, 9, WIDTH)
    with torch.no_grad():
        whole, _ = ours(x)
        cache = theirs.init_cache(2, LRU_WIDTH, torch.float32)
        state = None
        for t in range(9):
            y, state = ours.step(x[:, t], state)
            z, cache = theirs(x[:, t : t + 1], torch.full((2, 1), t), cache)
            close(y, z[:, 0])
            close(y, whole[:, t])
        close(state.lru.h, cache.rg_lru_state)


def test_the_unit_is_that_of_transformers() -> None:
    with warnings.catch_warnings(action="ignore"):
        theirs_module = pytest.importorskip("transformers.models.recurrent_gemma.modeling_recurrent_gemma")
        from transformers import RecurrentGemmaConfig
    config = RecurrentGemmaConfig(num_attention_heads=HEADS, lru_width=LRU_WIDTH, hidden_size=LRU_WIDTH)
    theirs = theirs_module.RecurrentGemmaRglru(config)
    with seeded(0):
        ours = RGLRU(LRU_WIDTH, HEADS)
    with torch.no_grad():
        theirs.recurrent_param.copy_(ours.decay)
        for mine, its in (("input_gate", "input_gate"), ("decay_gate", "recurrent_gate")):
            gate = getattr(ours, mine)
            getattr(theirs, f"{its}_weight").copy_(gate.weight)
            getattr(theirs, f"{its}_bias").copy_(gate.bias)
        x = torch.randn(2, 7, LRU_WIDTH)
        close(ours(x)[0], theirs(x, torch.arange(7).expand(2, 7)))
