"""Texts under models: tokens, bytes and documents are counted rightly, however they are cut."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pliant.core import UsageError, seeded
from pliant.models import ByteTokenizer, LanguageModel
from pliant.recipes.contest import contest
from pliant.recipes.language import CHUNK, _bytes_of, _target, documents, score_ours, score_transformers


@given(text=st.text(max_size=30), cuts=st.lists(st.integers(0, 30), max_size=9))
def test_bytes_of_tokens_are_those_of_the_text(text: str, cuts: list[int]) -> None:
    ends = sorted(min(cut, len(text)) for cut in cuts)
    # Several tokens of a letter have the same span; a token may leave the space before it out.
    spans = [(max(0, end - 1), end) for end in ends]
    found = _bytes_of(text, spans)
    assert sum(found) == (len(text.encode()) if spans else 0)
    assert all(size >= 0 for size in found)


def test_files_are_cut_at_line_ends_and_lines_of_json_are_documents(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\nthree\nfour")
    (tmp_path / "b.jsonl").write_text('{"text": "five\\nsix"}\n\n{"text": ""}\n{"text": "seven"}\n')
    both = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    assert documents(both, piece=8) == ["one\ntwo\n", "three\nfour", "five\nsix", "seven"]
    assert documents(both, piece=1, limit=2) == ["one\n", "two\n"]
    with pytest.raises(UsageError, match="holds no text"):
        documents([tmp_path / "b.jsonl"], limit=0)


@pytest.mark.parametrize("mixer", ["GatedLRU", "FullAttention"])
def test_documents_beside_each_other_are_scored_as_each_alone(mixer: str) -> None:
    with seeded(0):
        model = LanguageModel(width=8, depth=1, mixer=mixer)
    texts = ["a", "some words, and more of them", "ü" * (CHUNK // 2 + 5)]
    scores = score_ours(model, texts).columns()
    for number, text in enumerate(texts):
        tokens = ByteTokenizer().encode(text)
        with torch.no_grad():
            logits, _ = model(tokens[None, :-1])
        own = scores["document"] == number
        assert scores["target"][own].equal(tokens[1:])
        assert scores["position"][own].equal(torch.arange(len(tokens) - 1))
        torch.testing.assert_close(scores["nll"][own].float(), model.nats(logits[0], tokens[1:]), rtol=1e-4, atol=1e-5)
    assert int(scores["num_bytes"].sum()) == sum(len(text.encode()) for text in texts)


def test_documents_longer_than_the_model_has_room_for_are_scored_in_windows() -> None:
    with seeded(0):
        model = LanguageModel(width=8, depth=1, mixer="FullAttention", mixer_options={"max_steps": 40})
    text = "some words, and more of them " * 4
    scores, tokens = score_ours(model, [text, "short"]).columns(), ByteTokenizer().encode(text)
    own = scores["nll"][scores["document"] == 0]
    with torch.no_grad():
        logits = [model(tokens[None, i : i + 40])[0] for i in range(0, len(tokens) - 1, 40)]
    whole = torch.cat(logits, 1)[0, : len(tokens) - 1]
    torch.testing.assert_close(own.float(), model.nats(whole, tokens[1:]), rtol=1e-4, atol=1e-5)


def test_lines_of_json_end_at_line_feeds_alone(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in ("one\u2028two", "three\x85four"))
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    assert documents([tmp_path / "a.jsonl"]) == ["one\u2028two", "three\x85four"]
    (tmp_path / "b.jsonl").write_text('{"text": "\\ud800"}')
    with pytest.raises(UsageError, match="line 1: expected an object"):
        documents([tmp_path / "b.jsonl"])


class Pairs:
    """A tokenizer of two letters each, as one of transformers; `Fixed` is a model that always says the same."""

    bos_token_id, eos_token_id, is_fast = None, 0, True

    def __call__(self, text: str, **options: Any) -> dict[str, Any]:
        spans = [(i, min(i + 2, len(text))) for i in range(0, len(text), 2)]
        return {"input_ids": [1 + ord(text[a]) % 6 for a, _ in spans], "offset_mapping": spans}


class Fixed:
    device = torch.device("cpu")
    config = SimpleNamespace(max_position_embeddings=4)

    def __init__(self) -> None:
        self.seen: list[list[int]] = []

    def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
        self.seen += input_ids.tolist()
        return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))


@pytest.mark.usefixtures("unchecked")
def test_models_of_transformers_see_windows_after_a_first_token() -> None:
    model, tokenizer = Fixed(), Pairs()
    scores = score_transformers(model, tokenizer, ["abcdefghijk", "é"])
    tokens = tokenizer("abcdefghijk")["input_ids"]
    assert model.seen == [[0, *tokens[:3]], tokens[3:5], [0]]
    columns = scores.columns()
    assert columns["target"].tolist() == [*tokens, *tokenizer("é")["input_ids"]]
    assert columns["num_bytes"].tolist() == [2, 2, 2, 2, 2, 1, 2]
    assert columns["position"].tolist() == [0, 1, 2, 3, 4, 5, 0]
    tokenizer.eos_token_id = None  # type: ignore[assignment]
    with pytest.raises(UsageError, match="no token to begin a text"):
        score_transformers(model, tokenizer, ["a"])


def test_models_with_other_tokens_are_compared_by_their_bytes() -> None:
    with seeded(0):
        model = LanguageModel(width=8, depth=1)
    texts = ["abcdefghij", "klmnop", "qrstuvwx"]
    found = contest({"bytes": score_ours(model, texts), "pairs": score_transformers(Fixed(), Pairs(), texts)})
    assert found.picked == "pairs" and found.selection is None
    (one,) = found.comparisons
    assert not one.same_tokens
    assert "bits a byte" in found.lines()[-1]
    json.dumps(found.found())


def test_a_choice_may_be_named_by_its_number_or_its_text() -> None:
    assert _target("1", [" a", " b"], 1, 1.0) == 1
    assert _target("b", [" a", " b"], 0, 0.0) == 1
    # Choices that are numbers themselves: what fits the accuracy that was logged.
    assert _target("1", [" 1", " 2"], 1, 1.0) == 1
    assert _target("1", [" 1", " 2"], 1, 0.0) == 0
    with pytest.raises(IndexError):
        _target("c", [" a", " b"], 0, None)
