"""Stacks of xLSTM blocks: sizes, first weights, and what each block is."""

from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from pliant.core import Role, UsageError, seeded
from pliant.mixers import MLSTM, SLSTM
from pliant.models import XLSTM, XLSTMLarge
from pliant.models.xlstm import load_transformers_weights, load_xlstm_weights
from tests.suite import close


def size(make: Any) -> int:
    with FakeTensorMode():  # sizes without memory
        return sum(p.numel() for p in make().parameters())


@pytest.mark.parametrize(
    ("width", "depth", "slstm_at", "count"),
    [  # lram-xlstm.md 3
        (512, 8, (), 12_939_840),
        (512, 8, (1,), 12_934_200),
        (768, 12, (), 43_269_984),
        (768, 12, (1, 3), 43_154_768),
        (1024, 16, (), 102_089_856),
        (1024, 16, (1, 3), 101_805_168),
        (1280, 20, (), 198_836_640),
        (1280, 20, (1, 3, 5), 198_057_096),
        (1536, 28, (), 400_105_184),
    ],
)
def test_the_published_sizes(width: int, depth: int, slstm_at: tuple[int, ...], count: int) -> None:
    assert size(lambda: XLSTM(width, depth, slstm_at=slstm_at)) == count


def test_the_small_language_model_and_the_large_one() -> None:
    # lram-xlstm.md, acceptance check 8: embedding and head, which may not be shared, stand outside the stack.
    assert size(lambda: XLSTM(128, 7, slstm_at=[1])) + 2 * 128 * 50_304 == 13_642_672
    assert size(lambda: XLSTMLarge(4096, 32)) + 2 * 4096 * 50_304 == 6_865_424_896


def test_a_stack_is_its_parts_in_order() -> None:
    with seeded(0):
        model = XLSTM(8, 2, 2, slstm_at=[1])
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter)
        x = torch.randn(2, 7, 8)
    first, second = model.blocks

    def norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + 1e-5).sqrt() * weight

    assert isinstance(first.mixer, MLSTM) and first.ffn is None
    assert isinstance(second.mixer, SLSTM) and second.ffn is not None
    h = x + first.mixer(norm(x, first.norm.weight))[0]
    h = h + second.mixer(norm(h, second.norm.weight))[0]
    gate, up = (norm(h, second.ffn_norm.weight) @ second.ffn.linear_in.weight.T).chunk(2, -1)
    h = h + (F.gelu(gate) * up) @ second.ffn.linear_out.weight.T
    close(model(x)[0], norm(h, model.norm.weight))


@torch.no_grad()
def test_first_weights_have_the_published_spread() -> None:
    depth = 4
    with seeded(0):
        model, large = XLSTM(128, depth, slstm_at=[3]), XLSTMLarge(128, depth, 4)
    parts = [(model.blocks[3].ffn, 128), (large.blocks[0].ffn, 128)]
    for ffn, width in parts:
        assert float(ffn.linear_in.weight.std()) == pytest.approx((2 / 5 / width) ** 0.5, rel=0.05)
        assert float(ffn.linear_out.weight.std()) == pytest.approx(2 / depth / width**0.5, rel=0.05)
    for block in model.blocks[:3]:
        assert float(block.mixer.linear_down.weight.std()) == pytest.approx(2 / depth / 128**0.5, rel=0.05)
    # The last block of four: an even fall of the forget gates, lram-xlstm.md, check 6.
    bias = model.blocks[3].mixer.gate_bias[1, 0]
    close(bias, 5 - 12 * torch.linspace(0, 1, 32) ** 1.6)
    dense = large.blocks[1].mixer
    assert dense.gates.bias.tolist() == [-10.0] * 4 + [3.0, 4.0, 5.0, 6.0]
    assert not dense.gates.weight.any()
    assert float(dense.linear_out.weight.std()) == pytest.approx(2 / depth / 128**0.5, rel=0.05)


def test_a_stack_starts_as_the_norm_of_nearly_its_input() -> None:
    # Each block starts small, so that a deep stack begins near the identity and gradients reach its start.
    with seeded(0):
        model = XLSTM(64, 8, slstm_at=[1])
        x = torch.randn(4, 20, 64)
    x.requires_grad_()
    y, _ = model(x)
    assert float(F.cosine_similarity(y, x, dim=-1).mean().detach()) > 0.5
    y.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("make", [lambda: XLSTM(8, 2, 2, [1]), lambda: XLSTMLarge(8, 2, 2)])
def test_what_is_masked_may_be_anything(make: Any) -> None:
    with seeded(0):
        model, x = make(), torch.randn(2, 6, 8)
    mask = torch.tensor([[True, False, True, True, False, True], [False, True, True, True, True, True]])
    y, _ = model(x.masked_fill(~mask[..., None], torch.nan), mask=mask)
    close(y[0][mask[0]], model(x[:1, mask[0]])[0][0])
    assert not y[~mask].any()


def test_roles_tell_matrices_from_gains() -> None:
    with seeded(0):
        roles = XLSTM(8, 2, 2, [1]).roles()
    assert roles["blocks.1.ffn.linear_in.weight"] == Role.MATRIX
    assert roles["blocks.1.ffn_norm.weight"] == roles["norm.weight"] == roles["blocks.0.norm.weight"] == Role.GAIN
    assert roles["blocks.0.mixer.forget_gate.weight"] == Role.GATE


def test_what_cannot_be_built_or_loaded_is_refused() -> None:
    for make in (lambda: XLSTM(8, 0), lambda: XLSTM(8, 2, slstm_at=[2]), lambda: XLSTMLarge(8, 0)):
        with pytest.raises(UsageError, match="XLSTM"):
            make()
    with seeded(0), pytest.raises(UsageError, match="DenseMLSTM: width is 12"):
        XLSTMLarge(12, 1, 4)
    with seeded(0):
        small, large = XLSTM(8, 1, 2), XLSTMLarge(8, 1, 2)
    for load, model in ((load_xlstm_weights, small), (load_transformers_weights, large)):
        with pytest.raises(UsageError, match="lack"):
            load(model, {"x": torch.ones(1)})
