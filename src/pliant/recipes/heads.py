"""The heads of a saved model on a text."""

from pathlib import Path

import torch

from pliant.core import UsageError
from pliant.measure.dispersion import Head, heads, watched
from pliant.mixers.drop_in import sharpen_transformer
from pliant.models.language import ByteTokenizer
from pliant.recipes.language import read_model, read_text, room_of


def heads_on(model: Path, text: Path, tokens: int = 1024, share: float = 0.5) -> list[Head]:
    """How sharp each head is, on the first tokens of a text.

    Args:
        model: folder of a language model, ours or of transformers; see `pliant.recipes.language.score_model`.
        text: a file.
        tokens: at most, and no more than the model takes.
        share: that `limit` of each head is about.

    Raises:
        UsageError: one of them cannot be read, the text is too short, or the model has no attention.
    """
    said = read_text(text)
    made, tokenizer = read_model(model)
    if tokenizer is None:
        numbers = ByteTokenizer().encode(said.encode()[: tokens - 1])
    else:
        sharpen_transformer(made, None)
        numbers = torch.tensor(tokenizer(said, verbose=False)["input_ids"], dtype=torch.int64)
    numbers = numbers[: min(tokens, room_of(made) or tokens)]
    if len(numbers) < 2:
        raise UsageError(f"{text} has {len(numbers)} token{'' if len(numbers) == 1 else 's'}, expected at least 2")
    with torch.no_grad(), watched(made) as watches:
        made(numbers[None])
    return heads(watches, share)
