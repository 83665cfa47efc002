"""Parity of the delta rule and its blocks with transformers (further-mixers.md, checks A2, A6 and A7).

Their kernels compute in float32 whatever they are given.
"""

import warnings
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from pliant.core import seeded
from pliant.kernels import delta_rule
from pliant.mixers import GatedDelta
from tests.suite import close

pytestmark = [pytest.mark.oracle, pytest.mark.global_rng]

HEADS, KEY, VALUE, WIDTH = 2, 3, 4, 6


def modeling(name: str) -> Any:
    with warnings.catch_warnings(action="ignore"):
        return pytest.importorskip(f"transformers.models.{name}.modeling_{name}")


def compare(ours: Any, theirs: Any, pairs: dict[str, str]) -> None:
    """Outputs, and gradients of the inputs and of the parameters in `pairs`, ours to theirs."""
    x = torch.randn(2, 70, WIDTH)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = ours(mine)[0], theirs(its)
    z = z[0] if isinstance(z, tuple) else z
    close(y, z)
    weigh = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    (y * weigh).sum().backward()
    (z * weigh).sum().backward()
    close(mine.grad, its.grad)
    for a, b in pairs.items():
        close(ours.get_parameter(a).grad.flatten(), theirs.get_parameter(b).grad.flatten())


@pytest.mark.parametrize("value_heads", [2, 4])
def test_the_block_is_that_of_qwen3_next(value_heads: int) -> None:
    module = modeling("qwen3_next")
    config = module.Qwen3NextConfig(
        hidden_size=WIDTH, linear_num_key_heads=HEADS, linear_num_value_heads=value_heads, linear_key_head_dim=KEY,
        linear_value_head_dim=VALUE, linear_conv_kernel_dim=4, num_hidden_layers=1,
    )  # fmt: skip
    theirs = module.Qwen3NextGatedDeltaNet(config, 0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    ours = GatedDelta(WIDTH, HEADS, KEY, VALUE, value_heads, eps=config.rms_norm_eps)
    ours.load_qwen3_next(theirs.state_dict())
    pairs = {"linear_out.weight": "out_proj.weight", "norm_gain": "norm.weight"}
    compare(ours, theirs, pairs | {"log_rate": "A_log", "decay_bias": "dt_bias"})


def kimi(module: Any) -> Any:
    config = module.KimiLinearConfig(
        hidden_size=WIDTH, linear_num_heads=HEADS, linear_head_dim=VALUE, linear_conv_kernel_dim=4, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    theirs = module.KimiLinearDeltaAttention(config, 0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(std=0.5)
    return theirs, config.rms_norm_eps


def test_the_block_with_decays_per_channel_is_that_of_kimi_linear() -> None:
    theirs, eps = kimi(modeling("kimi_linear"))
    with seeded(0):
        ours = GatedDelta(WIDTH, HEADS, VALUE, VALUE, per_channel=True, eps=eps)
    with torch.no_grad():
        ours.linear_qkv.weight.copy_(torch.cat([getattr(theirs, f"{n}_proj").weight for n in "qkv"]))
        ours.conv_weight.copy_(theirs.conv1d.weight[:, 0].T)
    pairs = {
        "write_gate.weight": "b_proj.weight",
        "linear_decay.0.weight": "forget_gate.f_a_proj.weight",
        "linear_decay.1.weight": "forget_gate.f_b_proj.weight",
        "log_rate": "forget_gate.A_log",
        "decay_bias": "forget_gate.dt_bias",
        "linear_gate.0.weight": "g_a_proj.weight",
        "linear_gate.1.weight": "g_b_proj.weight",
        "norm_gain": "o_norm.weight",
        "linear_out.weight": "o_proj.weight",
    }
    with torch.no_grad():
        for a, b in pairs.items():
            mine = ours.get_parameter(a)
            mine.copy_(theirs.get_parameter(b).reshape(mine.shape))
    compare(ours, theirs, pairs)


@pytest.mark.parametrize("name", ["recurrent", "chunk"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_the_kernel_is_theirs(name: str, per_channel: bool) -> None:
    if per_channel:
        rule = getattr(modeling("kimi_linear"), f"{name}_kimi_delta_attention")
    else:
        rule = getattr(modeling("qwen3_next"), f"torch_{name}_gated_delta_rule")
    q, k = (F.normalize(torch.randn(2, 80, HEADS, KEY), dim=-1) for _ in range(2))
    v, beta = torch.randn(2, 80, HEADS, VALUE), torch.rand(2, 80, HEADS)
    g = -F.softplus(torch.randn(2, 80, HEADS, KEY) if per_channel else torch.randn(2, 80, HEADS))
    start = torch.randn(2, HEADS, KEY, VALUE)
    z, last = rule(q, k, v, g=g, beta=beta, initial_state=start, output_final_state=True)
    for chunk in (16, 64):
        o, state = delta_rule(q * KEY**-0.5, k, v, g, beta, beta, start, chunk=chunk)
        close(o, z)
        close(state, last)
