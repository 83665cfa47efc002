"""Perplexity and calibration against torchmetrics, bits per byte against lm-eval; models of transformers are read."""

import math
from pathlib import Path

import pytest
import torch

from pliant.core import generator, seeded
from pliant.measure.perplexity import TokenScores
from pliant.models import LanguageModel
from pliant.recipes.contest import contest
from pliant.recipes.language import score_model

pytestmark = pytest.mark.oracle


def scored(logits: torch.Tensor, targets: torch.Tensor) -> TokenScores:
    scores = TokenScores()
    scores.update(logits, targets)
    return scores


def test_torchmetrics_agrees_where_it_does_not_overflow() -> None:
    functional = pytest.importorskip("torchmetrics.functional")
    random = generator(0, "logits")
    logits, targets = torch.randn(4, 50, 30, generator=random), torch.randint(30, (4, 50), generator=random)
    ours = scored(logits, targets).value()
    theirs = functional.text.perplexity(logits, targets)
    assert ours.perplexity == pytest.approx(float(theirs), rel=1e-5)
    error = functional.classification.multiclass_calibration_error(
        logits.flatten(0, 1).softmax(-1), targets.flatten(), num_classes=30, n_bins=15
    )
    assert ours.calibration == pytest.approx(float(error), abs=1e-6)


def test_torchmetrics_overflows_where_we_do_not() -> None:
    functional = pytest.importorskip("torchmetrics.functional")
    for dtype, gap in ((torch.float32, 100.0), (torch.float16, 18.0)):
        logits, targets = torch.tensor([[[0.0, gap]]], dtype=dtype), torch.tensor([[0]])
        assert math.isinf(float(functional.text.perplexity(logits, targets)))
        assert scored(logits, targets).value().nll == pytest.approx(gap)
        assert math.isfinite(scored(logits, targets).value().perplexity)


def test_bits_per_byte_are_those_of_lm_eval() -> None:
    metrics = pytest.importorskip("lm_eval.api.metrics", reason="lm-eval with sacrebleu is installed by hand alone")
    random = generator(1, "lengths")
    nll, size = 5 * torch.rand(40, generator=random, dtype=torch.float64), torch.randint(1, 9, (40,), generator=random)
    scores = TokenScores()
    scores.add(nll, torch.ones(40, dtype=torch.bool), num_bytes=size)
    pairs = list(zip((-nll).tolist(), size.tolist(), strict=True))
    assert scores.value().bits_per_byte == pytest.approx(metrics.bits_per_byte(pairs), rel=1e-12)


TEXTS = ["a few words, and a few more\n", "ümlaut und ein Schneemann ☃ \N{SNAKE}\n", "x" * 90 + "\n"]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    """A tiny model of transformers with random weights, and a tokenizer of byte pairs."""
    transformers, tokenizers = pytest.importorskip("transformers"), pytest.importorskip("tokenizers")
    pairs = tokenizers.Tokenizer(tokenizers.models.BPE())
    pairs.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    pairs.train_from_iterator(TEXTS * 3, trainer)
    folder = tmp_path / "llama"
    transformers.PreTrainedTokenizerFast(tokenizer_object=pairs, bos_token="<s>").save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=pairs.get_vocab_size(), hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=32, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with seeded(0):
        transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.global_rng
def test_a_model_of_transformers_is_scored_with_its_bytes(llama: Path) -> None:
    scores = score_model(llama, TEXTS)
    columns = scores.columns()
    for number, text in enumerate(TEXTS):
        own = columns["document"] == number
        assert int(columns["num_bytes"][own].sum()) == len(text.encode())
    value = scores.value()
    # Random weights of a small scale: about uniform.
    assert value.nll == pytest.approx(math.log(300), abs=0.3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.global_rng
def test_models_of_both_kinds_meet_by_bits_per_byte(llama: Path) -> None:
    ours = llama.parent / "ours"
    with seeded(1):
        LanguageModel(width=8, depth=1).save_pretrained(ours)
    found = contest({"llama": score_model(llama, TEXTS), "ours": score_model(ours, TEXTS)}).found()
    assert found["selection"] is None
    assert not found["comparisons"][0]["same_tokens"]
    assert len({model["num_bytes"] for model in found["models"]}) == 1
