"""Sharp attention within models of transformers, and sparse weights beside the package entmax.

`pip install --no-deps entmax==1.3` for the second half.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from pliant.core import UsageError, seeded
from pliant.kernels import adaptive_softmax, entmax, sparsemax
from pliant.measure.dispersion import heads, watched
from pliant.mixers.drop_in import sharpen_transformer

pytestmark = [pytest.mark.oracle, pytest.mark.global_rng, pytest.mark.filterwarnings("ignore")]


def model(kind: str) -> Any:
    transformers = pytest.importorskip("transformers")
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=4, n_positions=64)
    elif kind == "bert":
        config = transformers.BertConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=32,
            max_position_embeddings=64, is_decoder=False,
        )  # fmt: skip
    else:
        config = transformers.LlamaConfig(
            vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            intermediate_size=32, max_position_embeddings=64,
        )  # fmt: skip
    with seeded(0):
        made = (transformers.AutoModelForMaskedLM if kind == "bert" else transformers.AutoModelForCausalLM).from_config(
            config, attn_implementation="eager"
        )
        with torch.no_grad():  # sharper than at the start
            for name, parameter in made.named_parameters():
                if parameter.ndim == 2 and "embed" not in name:
                    parameter.mul_(8)
    return made.eval()


def tokens(steps: int = 24) -> Tensor:
    return torch.randint(50, (2, steps), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_with_softmax_models_say_what_they_said(kind: str, padded: bool) -> None:
    net, given = model(kind), {"input_ids": tokens()}
    if padded:
        given["attention_mask"] = (torch.arange(24) < torch.tensor([24, 15])[:, None]).long()
    seen = given.get("attention_mask", torch.ones(2, 24)).bool()
    expected = net(**given).logits[seen]
    torch.testing.assert_close(sharpen_transformer(net, None)(**given).logits[seen], expected, atol=1e-4, rtol=1e-4)
    assert (sharpen_transformer(net, adaptive_softmax)(**given).logits[seen] - expected).abs().max() > 1e-3


@torch.no_grad()
def test_generation_with_memory_is_that_without() -> None:
    net = sharpen_transformer(model("llama"))
    found = [net.generate(tokens(6), max_new_tokens=8, do_sample=False, use_cache=use) for use in (False, True)]
    assert found[0].equal(found[1])


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_heads_are_watched(kind: str) -> None:
    net = model(kind)
    weights = net(tokens(), output_attentions=True).attentions
    sharpen_transformer(net, None)
    with watched(net) as watches:
        net(tokens())
    found = heads(watches)
    assert len(found) == 8 and found[0].keys == [2, 4, 8, 16, 24]
    for head in found:
        layer = list(watches).index(head.layer)
        expected = weights[layer][:, head.head, 16:].amax(-1).mean()
        assert head.top[-1] == pytest.approx(float(expected), rel=1e-4)


def test_models_without_the_registry_are_refused() -> None:
    pytest.importorskip("transformers")
    with pytest.raises(UsageError, match="no attention"):
        sharpen_transformer(torch.nn.Linear(2, 2))


def test_check_13_sparse_weights_are_those_of_the_package() -> None:
    package = pytest.importorskip("entmax")
    row = 2 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(sparsemax(row), package.sparsemax(row, dim=-1), atol=1e-9, rtol=0)
    torch.testing.assert_close(entmax(row), package.entmax15(row, dim=-1), atol=1e-9, rtol=0)
    for alpha in (1.2, 1.7, 3.0):
        other = package.entmax_bisect(row, alpha=alpha, dim=-1)
        torch.testing.assert_close(entmax(row, alpha=alpha), other, atol=1e-7, rtol=0)
