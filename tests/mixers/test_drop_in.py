"""Sharp attention in the place of nn.MultiheadAttention: the same with softmax, and seen by layers of torch."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.core import UsageError, seeded
from pliant.kernels import adaptive_softmax
from pliant.mixers.drop_in import SharpMultihead, sharpen_transformer


def soft(logits: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(dim)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(**more: Any) -> nn.MultiheadAttention:
    with seeded(0):
        return nn.MultiheadAttention(8, 2, dtype=torch.float64, **more)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("masks", ["", "padding", "attn", "heads", "both", "floats"])
def test_with_softmax_it_is_theirs(batch_first: bool, bias: bool, average: bool, masks: str) -> None:
    module = theirs(batch_first=batch_first, bias=bias)
    ours = SharpMultihead.of(module, soft)
    shape = (3, 5, 8) if batch_first else (5, 3, 8)
    q, k = drawn(*shape), drawn(*shape, seed=1)
    more: dict[str, Any] = {}
    if masks in ("padding", "both", "floats"):
        more["key_padding_mask"] = torch.arange(5) >= torch.tensor([5, 3, 2])[:, None]
    if masks in ("attn", "both", "floats"):
        more["attn_mask"] = torch.ones(5, 5, dtype=torch.bool).triu(1)
    if masks == "heads":
        more["attn_mask"] = (torch.arange(5) > torch.arange(5)[:, None]).expand(6, 5, 5)
    if masks == "floats":
        more = {name: torch.zeros(mask.shape).double().masked_fill(mask, -torch.inf) for name, mask in more.items()}
    for found, expected in zip(
        ours(q, k, k, average_attn_weights=average, **more), module(q, k, k, average_attn_weights=average, **more),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(found, expected)
    assert ours(q, k, k, need_weights=False)[1] is None
    one = 0 if batch_first else 1
    torch.testing.assert_close(
        ours(*(x.select(one, 0) for x in (q, k, k))), module(*(x.select(one, 0) for x in (q, k, k)))
    )


def test_parameters_are_shared_and_go_by_the_same_names() -> None:
    module = theirs()
    ours = SharpMultihead.of(module)
    assert dict(ours.named_parameters()).keys() == dict(module.named_parameters()).keys()
    assert all(one is two for one, two in zip(ours.parameters(), module.parameters(), strict=True))
    assert ours.sharpen is adaptive_softmax and copy.deepcopy(ours)(*[drawn(4, 1, 8)] * 3)[0].shape == (4, 1, 8)


@pytest.mark.parametrize("training", [False, True])
def test_layers_of_torch_do_not_pass_it_by(training: bool) -> None:
    with seeded(0):
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, dtype=torch.float64)
    layer.train(training)
    x, padding = 3 * drawn(2, 9, 8), torch.arange(9) >= torch.tensor([9, 7])[:, None]
    with torch.no_grad():
        before = layer(x, src_key_padding_mask=padding)
        layer.self_attn = SharpMultihead.of(layer.self_attn, soft)
        torch.testing.assert_close(layer(x, src_key_padding_mask=padding)[0], before[0])
        layer.self_attn.sharpen = adaptive_softmax
        assert (layer(x, src_key_padding_mask=padding)[0] - before[0]).abs().max() > 1e-3


def test_what_it_cannot_do_is_refused() -> None:
    ours, x = SharpMultihead.of(theirs(dropout=0.1)), drawn(4, 1, 8)
    with pytest.raises(UsageError, match="dropout"):
        ours(x, x, x)
    ours.eval()
    with pytest.raises(UsageError, match="biases"):
        ours(x, x, x, attn_mask=torch.ones(4, 4, dtype=torch.float64))
    for more in ({"add_zero_attn": True}, {"kdim": 3}, {"add_bias_kv": True}):
        with pytest.raises(UsageError, match="not supported"):
            SharpMultihead.of(theirs(**more))
    with pytest.raises(UsageError, match="transformers"):
        sharpen_transformer(nn.Identity())
