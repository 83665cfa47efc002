"""Parity of the stacks with xlstm 2.0.6 and with transformers (lram-xlstm.md, acceptance check 7).

xlstm asks for mlstm_kernels, whose license we do not accept, so it is no requirement of ours; to run its half:
`pip install --no-deps xlstm==2.0.6 einops dacite omegaconf packaging`.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.core import UsageError, seeded
from pliant.models import XLSTM, XLSTMLarge
from pliant.models.xlstm import load_transformers_weights, load_xlstm_weights

pytestmark = [pytest.mark.oracle, pytest.mark.global_rng, pytest.mark.filterwarnings("ignore")]

WIDTH, HEADS, STEPS, DEPTH = 32, 4, 70, 3


def close(one: Tensor, two: Tensor, error: float = 1e-5) -> None:
    torch.testing.assert_close(one, two, atol=error, rtol=error)


def xlstm_stack(slstm_at: list[int]) -> Any:
    stacks = pytest.importorskip("xlstm.xlstm_block_stack")
    from xlstm.blocks.mlstm.block import mLSTMBlockConfig
    from xlstm.blocks.mlstm.layer import mLSTMLayerConfig
    from xlstm.blocks.slstm.block import sLSTMBlockConfig
    from xlstm.blocks.slstm.layer import sLSTMLayerConfig
    from xlstm.components.feedforward import FeedForwardConfig

    slstm = sLSTMBlockConfig(
        slstm=sLSTMLayerConfig(backend="vanilla", num_heads=HEADS, dtype="float32"),
        feedforward=FeedForwardConfig(proj_factor=1.3, act_fn="gelu"),
    )
    config = stacks.xLSTMBlockStackConfig(
        mlstm_block=mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=HEADS)),
        slstm_block=slstm if slstm_at else None,
        context_length=STEPS,
        num_blocks=DEPTH,
        embedding_dim=WIDTH,
        slstm_at=slstm_at,
    )
    return stacks.xLSTMBlockStack(config)


def pair(slstm_at: list[int]) -> tuple[XLSTM, Any]:
    theirs = xlstm_stack(slstm_at)
    for name, parameter in theirs.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if name.endswith("skip") else 0.0, std=0.2)
    with seeded(0):
        ours = XLSTM(WIDTH, DEPTH, HEADS, slstm_at)
    load_xlstm_weights(ours, theirs.state_dict())
    return ours, theirs


@pytest.mark.parametrize("slstm_at", [[], [1], [0, 1, 2]])
def test_check_7_the_stack_has_the_outputs_and_gradients_of_xlstm(slstm_at: list[int]) -> None:
    ours, theirs = pair(slstm_at)
    x = torch.randn(2, STEPS, WIDTH)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = ours(mine)[0], theirs(its)
    close(y, z)
    weigh = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    (y * weigh).sum().backward()
    (z * weigh).sum().backward()
    assert mine.grad is not None and its.grad is not None
    close(mine.grad, its.grad, 1e-4)


@pytest.mark.parametrize("slstm_at", [[], [1]])
def test_check_7_the_stack_steps_as_xlstm_does(slstm_at: list[int]) -> None:
    ours, theirs = pair(slstm_at)
    x = torch.randn(2, 9, WIDTH)
    state, its = None, None
    with torch.no_grad():
        whole, _ = ours(x)
        for t in range(9):
            y, state = ours.step(x[:, t], state)
            z, its = theirs.step(x[:, t : t + 1], its)
            close(y, z[:, 0])
            close(y, whole[:, t])


def test_first_weights_of_the_feed_forward_part_have_the_spread_of_xlstm() -> None:
    theirs = xlstm_stack([1]).blocks[1].ffn
    with seeded(0):
        ours = XLSTM(WIDTH, DEPTH, HEADS, [1]).blocks[1].ffn
    assert ours is not None
    for one, two in ((ours.linear_in, theirs.proj_up), (ours.linear_out, theirs.proj_down)):
        assert one.weight.shape == two.weight.shape
        assert float(one.weight.detach().std()) == pytest.approx(float(two.weight.detach().std()), rel=0.1)


def test_blocks_at_other_places_are_refused() -> None:
    theirs = xlstm_stack([1]).state_dict()
    with seeded(0):
        ours = XLSTM(WIDTH, DEPTH, HEADS, [2])
    before = {name: p.clone() for name, p in ours.state_dict().items()}
    with pytest.raises(UsageError):
        load_xlstm_weights(ours, theirs)
    assert all(p.equal(before[name]) for name, p in ours.state_dict().items())


def transformers_pair(mode: str, monkeypatch: pytest.MonkeyPatch) -> tuple[XLSTMLarge, Any]:
    transformers = pytest.importorskip("transformers")
    # It would take parts of xlstm that need a package which is not here; its own are the same.
    monkeypatch.setattr(transformers.utils, "is_xlstm_available", lambda: False)
    if not hasattr(transformers, "xLSTMModel"):
        pytest.skip("transformers has no xLSTM yet")
    config = transformers.xLSTMConfig(
        vocab_size=50,
        hidden_size=WIDTH,
        num_heads=HEADS,
        num_hidden_layers=DEPTH,
        num_blocks=DEPTH,
        weight_mode=mode,
        chunkwise_kernel="chunkwise--native_autograd",
        sequence_kernel="native_sequence__native",
        step_kernel="native",
        chunk_size=16,
        mode="train",
        autocast_kernel_dtype="float32",
        return_last_states=True,
    )
    # Their first weights cannot be made in the fused mode (5.24), and are not needed.
    monkeypatch.setattr(transformers.xLSTMPreTrainedModel, "_init_weights", lambda self, module: None)
    theirs = transformers.xLSTMForCausalLM(config)
    for name, parameter in theirs.named_parameters():
        one = name.endswith("norm.weight") or "norm_" in name
        torch.nn.init.normal_(parameter, mean=1.0 if one else 0.0, std=0.2)
    with seeded(0):
        ours = XLSTMLarge(WIDTH, DEPTH, HEADS)
    load_transformers_weights(ours, theirs.state_dict())
    return ours, theirs.backbone


@pytest.mark.parametrize("mode", ["single", "fused"])
def test_xlstm_7b_has_the_outputs_and_gradients_of_transformers(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = transformers_pair(mode, monkeypatch)
    theirs.train()
    x = torch.randn(2, 64, WIDTH)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = ours(mine)[0], theirs(inputs_embeds=its, use_cache=False).last_hidden_state
    close(y, z, 1e-4)
    weigh = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    (y * weigh).sum().backward()
    (z * weigh).sum().backward()
    assert mine.grad is not None and its.grad is not None
    close(mine.grad, its.grad, 1e-3)
