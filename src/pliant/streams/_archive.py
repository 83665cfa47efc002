"""Collections of labelled series of the UCR and UEA archives, with the split that everybody uses.

Dau et al. 2018, The UCR time series archive, arXiv:1810.07758; Bagnall et al. 2018, The UEA multivariate time series
classification archive, arXiv:1811.00075. They are read by the package aeon, which carries a few of them; nothing is
downloaded here, and others are read from a folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from pliant.core import UsageError
from pliant.streams._digits import Items
from pliant.streams.base import Stream


class Labelled(NamedTuple):
    """inputs `(N, T, F)` float32, zero behind the end of a series and where a value is missing; mask `(N, T)`: which
    steps there are; labels `(N,)` int64."""

    inputs: Float[Tensor, "N T F"]
    mask: Bool[Tensor, "N T"]
    labels: Int[Tensor, "N"]


class Collection(NamedTuple):
    """The standard split of a set. classes: the names of its labels 0 … C - 1, in their order as text."""

    train: Labelled
    test: Labelled
    classes: tuple[str, ...]


def collection(name: str, folder: str | Path | None = None) -> Collection:
    """A set of the archives, such as GunPoint, both parts padded to the longest series of either.

    Args:
        name: as the archives have it.
        folder: holds `NAME/NAME_TRAIN.ts` and `NAME/NAME_TEST.ts`; None means the sets that aeon carries.

    Raises:
        UsageError: aeon is not installed, or the files are not there or hold no classes.
    """
    try:
        from aeon import datasets
    except ImportError:
        raise UsageError(
            "the UCR and UEA sets need the package aeon; install it with: pip install 'pliant[archive]'"
        ) from None
    home = Path(datasets.__file__).parent / "data" if folder is None else Path(folder)
    if not _there(home, name):
        known = sorted(path.name for path in home.glob("*") if _there(home, path.name))
        raise UsageError(f"there is no set {name!r} in {home}; there are {', '.join(known) or 'none'}")
    try:
        parts = [datasets.load_classification(name, split=part, extract_path=str(home)) for part in ("train", "test")]
    except ValueError as error:  # a set for regression
        raise UsageError(f"the set {name!r} cannot be read as classes ({error})") from None
    classes = sorted({str(label) for _, labels in parts for label in labels})
    longest = max(series.shape[1] for found, _ in parts for series in found)
    train, test = (
        _labelled(found, [classes.index(str(label)) for label in labels], longest) for found, labels in parts
    )
    return Collection(train, test, tuple(classes))


def _there(home: Path, name: str) -> bool:
    return all((home / name / f"{name}_{part}.ts").is_file() for part in ("TRAIN", "TEST"))


def _labelled(found: Sequence[np.ndarray] | np.ndarray, labels: list[int], longest: int) -> Labelled:
    """Series `(F, T)`, as aeon has them, side by side."""
    inputs = torch.zeros(len(found), longest, found[0].shape[0])
    mask = torch.zeros(len(found), longest, dtype=torch.bool)
    for row, series in enumerate(found):
        inputs[row, : series.shape[1]] = torch.from_numpy(np.nan_to_num(series.T)).float()
        mask[row, : series.shape[1]] = True
    return Labelled(inputs, mask, torch.tensor(labels))


def archive(
    name: str, *, folder: str | Path | None = None, batch: int = 16, questions: int | None = None, seed: int = 0
) -> Stream:
    """Passes over a set of the UCR and UEA archives: one question is `batch` series, the answer their classes.

    Each series is an episode, its target stands at its last step. The test part of the standard split is asked about,
    but never learned from. Tags: `item` and `held_out`, as in `digits`; of N series in all the last are the test part.

    Args:
        name, folder: see `collection`.
        batch: B, series per question.
        questions: length of the stream; None is endless.
        seed: decides the order.

    Raises:
        UsageError: as `collection`, or `batch` is below 1.
    """
    if batch < 1:
        raise UsageError(f"archive: batch is {batch}, expected at least 1")
    train, test, classes = collection(name, folder)
    inputs, mask, labels = (torch.cat(parts) for parts in zip(train, test, strict=True))
    held = torch.arange(len(labels)) >= len(train.labels)
    return Items(inputs, labels, len(classes), batch, questions, held, seed, mask)
