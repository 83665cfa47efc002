"""Language models: bytes as tokens, generation that can be stopped anywhere, one matrix at both ends, saving."""

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pliant.core import UsageError, generator, nbytes, seeded
from pliant.models import ByteTokenizer, LanguageModel


def made(seed: int = 0, **options: object) -> LanguageModel:
    with seeded(seed):
        return LanguageModel(7, **{"width": 8, "depth": 2, "mixer": "GatedLRU", **options})  # type: ignore[arg-type]


ATTENTION = {"mixer": "FullAttention", "mixer_options": {"max_steps": 40}}


@pytest.mark.parametrize("text", ["", "plain", "Žliobaitė → 50 %\n", "\0", "\N{SNAKE}"])
def test_bytes_are_tokens_after_one_that_begins(text: str) -> None:
    tokenizer = ByteTokenizer()
    tokens = tokenizer.encode(text)
    assert tokens[0] == tokenizer.start == 256
    assert tokens[1:].tolist() == list(text.encode())
    assert tokenizer.decode(tokens) == text


def test_bytes_that_are_no_text_are_decoded_too() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode(b"\xff").tolist() == [256, 255]
    assert tokenizer.decode(torch.tensor([97, 255])) == "a\N{REPLACEMENT CHARACTER}"


@pytest.mark.parametrize("options", [{}, ATTENTION])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_generation_stopped_and_continued_is_the_same_as_in_one_go(options: dict, temperature: float) -> None:
    model, prompt = made(**options), torch.tensor([[0, 1, 2], [3, 3, 3]])
    whole, after = model.generate(prompt, 9, temperature=temperature, generator=generator(0, "draw"))
    random = generator(0, "draw")
    first, state = model.generate(prompt, 4, temperature=temperature, generator=random)
    rest, end = model.generate(first[:, -1:], 5, state, temperature=temperature, generator=random)
    assert torch.cat([first, rest], 1).equal(whole)
    assert nbytes(end) == nbytes(after)


def test_each_greedy_token_is_the_most_probable_after_all_before_it() -> None:
    model, prompt = made(), torch.tensor([[0, 1, 2], [3, 3, 3]])
    tokens, _ = model.generate(prompt, 6)
    logits, _ = model(torch.cat([prompt, tokens], 1))
    assert logits[:, 2:-1].argmax(-1).equal(tokens)


def test_tokens_are_drawn_as_often_as_the_model_says() -> None:
    model, many = made(), 20_000
    prompt = torch.tensor([[1, 2]])
    drawn, _ = model.generate(prompt.expand(many, 2), 1, temperature=0.5, generator=generator(0, "draw"))
    shares = torch.bincount(drawn.flatten(), minlength=7) / many
    expected = (model(prompt)[0][0, -1] / 0.5).softmax(-1)
    # Four standard errors of a share of one half.
    assert (shares - expected).abs().max() < 4 * 0.5 * many**-0.5


def test_one_matrix_is_at_both_ends() -> None:
    model = made(depth=1)
    assert sum(p.numel() for p in model.parameters()) == 7 * 8 + sum(p.numel() for p in model.stack.parameters())
    features, _ = model.stack(F.embedding(torch.tensor([[2]]), model.embed.weight) * 8**0.5, model.init_state(1).stack)
    assert model(torch.tensor([[2]]))[0].equal(features @ model.embed.weight.T)


def test_code_lengths_are_those_of_the_next_token() -> None:
    model, tokens = made(), torch.tensor([[0, 1, 2, 3]])
    logits, _ = model(tokens)
    nats = model.nats(logits[:, :-1], tokens[:, 1:])
    expected = F.cross_entropy(logits[0, :-1], tokens[0, 1:], reduction="none")
    torch.testing.assert_close(nats[0], expected)


@pytest.mark.parametrize("options", [{}, ATTENTION])
def test_it_learns_what_comes_next(options: dict) -> None:
    model, tokens = made(**options), torch.arange(30).remainder(5)[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model.nats(model(tokens[:, :-1])[0], tokens[:, 1:]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert float(loss.detach()) < 0.1
    assert model.generate(tokens[:, :5], 5)[0].tolist() == [[0, 1, 2, 3, 4]]


def test_a_model_is_saved_and_loaded_by_its_configuration(tmp_path: Path) -> None:
    model = made(**ATTENTION)
    model.save_pretrained(tmp_path)
    with seeded(1):
        loaded = LanguageModel.from_pretrained(tmp_path)
    tokens = torch.tensor([[1, 2, 3]])
    assert loaded(tokens)[0].equal(model(tokens)[0])


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    for options in ({"width": 0}, {"mixer": "Magic"}, {"depth": 0}):
        with pytest.raises(UsageError, match="LanguageModel"):
            made(**options)
    model = made()
    with pytest.raises(UsageError, match=r"0 to 7, expected 0 to 6"):
        model(torch.tensor([[0, 7]]))
    with pytest.raises(UsageError, match="use step"):
        model(torch.tensor([1, 2]))
    with pytest.raises(UsageError, match="start token"):
        model.generate(torch.zeros(1, 0, dtype=torch.int64), 3)
    with pytest.raises(UsageError, match="with a generator"):
        model.generate(torch.tensor([[1]]), 3, temperature=1.0)
