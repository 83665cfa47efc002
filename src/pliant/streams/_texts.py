"""Documents by class, read as bytes: long sequences such as those of movie reviews.

A task of the kind of the Long Range Arena's text (Tay et al. 2021, arXiv:2011.04006), with 4,000 bytes of each review.
"""

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pliant.core import Answer, Question, UsageError
from pliant.streams._digits import Items
from pliant.streams.base import Stream

BYTES = 256


def texts(
    path: str | Path,
    *,
    length: int = 4000,
    batch: int = 16,
    questions: int | None = None,
    held_out: float = 0.2,
    seed: int = 0,
) -> Stream:
    """Passes over a set of documents: one question is `batch` of them, the answer their classes.

    Inputs are `(B, length, 256)` float32, one at the byte that is read, zero behind the end of a document, where steps
    are masked. Each document is an episode, its target stands at its last step. Tags: `item`, the index of the document
    in order of the names, and `held_out`.

    Args:
        path: a folder or a zip with files `CLASS/NAME.txt`, at whatever depth.
        length: T, bytes of a document that are read, from its beginning.
        batch: B, documents per question.
        questions: length of the stream; None is endless.
        held_out: share of the documents that are scored but never learned from.
        seed: decides order and what is held out.

    Raises:
        UsageError: there are no documents of two classes, or an argument is out of range.
    """
    if length < 1 or batch < 1 or not 0 <= held_out < 1:
        raise UsageError(
            f"texts: length is {length}, batch {batch} and held_out {held_out}; expected at least 1, and a share from "
            "0 up to, not including, 1"
        )
    try:
        found = sorted((name, raw) for name, raw in _files(Path(path)) if raw)
    except (OSError, zipfile.BadZipFile) as error:
        raise UsageError(f"no documents can be read from {path} ({error})") from None
    names = [name.split("/")[-2] for name, _ in found]
    classes = sorted(set(names))
    if len(classes) < 2:
        raise UsageError(
            f"{path} has {len(found)} documents of {len(classes)} classes; expected files CLASS/NAME.txt of two or more"
        )
    tokens = np.zeros((len(found), length), np.uint8)
    sizes = torch.tensor([min(len(raw), length) for _, raw in found])
    for row, (_, raw), size in zip(tokens, found, sizes.tolist(), strict=True):
        row[:size] = np.frombuffer(raw, np.uint8, size)
    labels = torch.tensor([classes.index(name) for name in names])
    mask = torch.arange(length) < sizes[:, None]
    return _Documents(torch.from_numpy(tokens), labels, len(classes), batch, questions, held_out, seed, mask)


class _Documents(Items):
    """Items whose inputs are kept as bytes `(N, T)`."""

    def __init__(self, tokens: Tensor, *args: object):
        super().__init__(tokens[..., None], *args)  # type: ignore[arg-type]
        self.spec = self.spec._replace(num_features=BYTES)

    def pair(self, index: int) -> tuple[Question, Answer] | None:
        found = super().pair(index)
        if found is None:
            return None
        question, answer = found
        inputs = F.one_hot(question.inputs[..., 0].long(), BYTES).float() * question.mask[..., None]
        return question._replace(inputs=inputs), answer


def _files(path: Path) -> Iterator[tuple[str, bytes]]:
    if path.suffix != ".zip":
        for file in path.glob("**/*/*.txt"):
            yield file.relative_to(path).as_posix(), file.read_bytes()
        return
    with zipfile.ZipFile(path) as archive:
        for name in archive.namelist():
            if name.endswith(".txt") and name.count("/") >= 1:
                yield name, archive.read(name)
