"""Sets of labeled images, from files that are there; and a stream that reads them as sequences."""

import gzip
import io
import zipfile
import zlib
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pliant.core import UsageError
from pliant.streams._digits import Items
from pliant.streams.base import Stream

FASHION = Path("/usr/share/datasets/fashion-mnist")
"""Where the Debian package dataset-fashion-mnist puts its files."""


class Images(NamedTuple):
    """Images `(n, channels, height, width)`, standardized by channel with the training part, and classes `(n,)`."""

    train: Tensor
    train_labels: Tensor
    test: Tensor
    test_labels: Tensor


def pictures(
    path: str | Path | None = None,
    *,
    by: str = "pixel",
    batch: int = 16,
    questions: int | None = None,
    seed: int = 0,
) -> Stream:
    """Passes over a set of images: one question is `batch` of them, the answer their classes.

    Inputs are `(B, H W, C)` float32 (`by="pixel"`) or `(B, H, W C)` (`by="row"`), standardized. Each image is an
    episode, its target stands at its last step. The test part is asked about, but never learned from. Tags: `item` and
    `held_out`, as in `digits`; of N images in all the last are the test part.

    Args:
        path: see `images`.
        by: what a step reads, `"pixel"` or `"row"`.
        batch: B, images per question.
        questions: length of the stream; None is endless.
        seed: decides the order.

    Raises:
        UsageError: as `images`, or an argument is out of range.
    """
    if by not in ("pixel", "row") or batch < 1:
        raise UsageError(f"pictures: by is {by!r} and batch {batch}, expected pixel or row, and at least 1")
    found = images(None if path is None else Path(path))
    labels = torch.cat([found.train_labels, found.test_labels])
    pixels = torch.cat([found.train, found.test]).movedim(1, -1)
    pixels = pixels.flatten(1, 2) if by == "pixel" else pixels.flatten(2)
    held = torch.arange(len(labels)) >= len(found.train)
    return Items(pixels.contiguous(), labels, int(labels.max()) + 1, batch, questions, held, seed)


def kind_of(path: Path | None) -> str:
    """What is to be read: `"cifar10"` from a zip or a folder with `.bin` files, else `"fashion-mnist"`."""
    path = path or FASHION
    return "cifar10" if path.suffix == ".zip" or any(path.glob("*_batch*.bin")) else "fashion-mnist"


@cache
def images(path: Path | None) -> Images:
    """Read a set of images.

    Args:
        path: a folder with the four IDX files of Fashion-MNIST or MNIST, gzipped; a folder with the binary version of
            CIFAR-10; or a zip of pictures `train/CLASS/NAME.jpg` and `test/CLASS/NAME.jpg`, all of one size. None takes
            the folder of Debian's package dataset-fashion-mnist.

    Raises:
        UsageError: there is no such set, or a part of it cannot be read.
    """
    path = path or FASHION
    try:
        if path.suffix == ".zip":
            parts = _zip(path)
        elif any(path.glob("*_batch*.bin")):
            parts = _cifar(path)
        else:
            parts = _idx(path)
        _check(parts)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise UsageError(
            f"no images can be read from {path} ({error}); give --data a folder with the IDX files of Fashion-MNIST "
            "(Debian: apt install dataset-fashion-mnist), one with CIFAR-10's binary version, or a zip of "
            "train/CLASS/*.jpg and test/CLASS/*.jpg"
        ) from None
    train, test = (torch.from_numpy(np.array(x)).float() for x in parts[::2])
    spread, mean = torch.std_mean(train, (0, 2, 3), keepdim=True)
    labels = [torch.from_numpy(np.array(y)).long() for y in parts[1::2]]
    # Channels last in memory: convolutions of few channels and norms over them are faster then.
    fast = [((x - mean) / spread).contiguous(memory_format=torch.channels_last) for x in (train, test)]
    return Images(fast[0], labels[0], fast[1], labels[1])


Parts = list[Any]


def _check(parts: Parts) -> None:
    """Raise `ValueError` unless each image has a label, and something is seen in all channels."""
    for name, x, y in (("train", *parts[:2]), ("test", *parts[2:])):
        if len(x) != len(y) or not len(x):
            raise ValueError(f"{len(x)} images and {len(y)} labels to {name}")
    if (parts[0].min((0, 2, 3)) == parts[0].max((0, 2, 3))).any():
        raise ValueError("a channel is the same everywhere")


def _idx(path: Path) -> Parts:
    found: Parts = []
    for part in ("train", "t10k"):
        with gzip.open(path / f"{part}-images-idx3-ubyte.gz") as file:
            raw = file.read()
        size = int.from_bytes(raw[8:12], "big")
        found.append(np.frombuffer(raw, np.uint8, offset=16).reshape(-1, 1, size, size))
        with gzip.open(path / f"{part}-labels-idx1-ubyte.gz") as file:
            found.append(np.frombuffer(file.read(), np.uint8, offset=8))
    return found


def _cifar(path: Path) -> Parts:
    found: Parts = []
    for pattern in ("data_batch_*.bin", "test_batch.bin"):
        raw = b"".join(file.read_bytes() for file in sorted(path.glob(pattern)))
        rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
        found += [rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0]]
    return found


def _zip(path: Path) -> Parts:
    from PIL import Image

    found: Parts = []
    with zipfile.ZipFile(path) as archive:
        names = sorted(name for name in archive.namelist() if name.lower().endswith((".jpg", ".jpeg", ".png")))
        names = [name for name in names if name.count("/") >= 2]
        classes = sorted({name.split("/")[-2] for name in names})
        for part in ("train", "test"):
            own = [name for name in names if name.split("/")[0] == part]
            pictures = [np.asarray(Image.open(io.BytesIO(archive.read(name))).convert("RGB")) for name in own]
            if not pictures:
                raise ValueError(f"nothing in {part}/CLASS/")
            labels = [classes.index(name.split("/")[-2]) for name in own]
            found += [np.stack(pictures).transpose(0, 3, 1, 2), np.array(labels)]
    return found
