"""Documents as bytes, and images as sequences."""

import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pliant.core import UsageError
from pliant.streams import images, pictures, texts

WORDS = {"neg/a.txt": b"bad", "neg/b.txt": b"much too long", "pos/c.txt": b"good", "pos/d.txt": b"", "notes.md": b"x"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, raw in WORDS.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(raw)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name, raw in WORDS.items():
            archive.writestr(f"reviews/{name}", raw)
    return tmp_path


def test_documents_are_their_first_bytes_and_end_where_they_end(folder: Path) -> None:
    seen = {}
    for path in (folder / "set", folder / "set.zip"):
        batch = texts(path, length=6, batch=3, held_out=0.0, seed=1).send(None)
        assert batch is not None and batch.question is not None
        answer = texts(path, length=6, batch=3, held_out=0.0, seed=1)
        answer.send(None)
        following = answer.send(None)
        assert following is not None
        (told,) = following.answers
        inputs, mask = batch.question.inputs, batch.question.mask
        read = [bytes(row[there].argmax(1).tolist()) for row, there in zip(inputs, mask, strict=True)]
        seen[path.name] = dict(zip(read, told.targets[:, 0].tolist(), strict=True))
        assert inputs.sum(2).equal(mask.float()) and told.target_mask.sum(1).tolist() == [1, 1, 1]
        assert all(bool(mask[i, told.target_mask[i]].all()) for i in range(3))
    assert seen["set"] == seen["set.zip"] == {b"bad": 0, b"much t": 0, b"good": 1}


def test_what_is_no_set_of_documents_is_refused(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "one" / "pos").mkdir(parents=True)
    (tmp_path / "one" / "pos" / "a.txt").write_bytes(b"a")
    (tmp_path / "cut.zip").write_bytes(b"PK")
    for path, why in ((tmp_path / "one", "1 classes"), (tmp_path / "cut.zip", "no documents"),
                      (tmp_path / "none", "0 documents")):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            texts(path)
    for wrong in ({"length": 0}, {"batch": 0}, {"held_out": 1.0}):
        with pytest.raises(UsageError, match="texts"):
            texts(folder / "set", **wrong)


def test_images_are_read_by_pixel_or_row_and_their_test_part_is_held_out(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for part, count in (("train", 6), ("test", 2)):
            for i in range(count):
                file = tmp_path / "one.png"
                Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8)).save(file)
                archive.write(file, f"{part}/class {i % 2}/{i}.png")
    found = images(tmp_path / "set.zip")
    whole = torch.cat([found.train, found.test])
    for by, shape in (("pixel", (8, 16, 3)), ("row", (8, 4, 12))):
        stream = pictures(tmp_path / "set.zip", by=by, batch=8, questions=1)
        first, last = stream.send(None), stream.send(None)
        assert first is not None and first.question is not None and last is not None
        answer = last.answers[0]
        item = answer.tags["item"][:, 0]
        assert first.question.inputs.shape == shape
        assert first.question.inputs.reshape(8, 4, 4, 3).equal(whole.movedim(1, -1)[item])
        assert answer.learn_mask.any(1).equal(item < 6)
    for wrong in ({"by": "column"}, {"batch": 0}):
        with pytest.raises(UsageError, match="pictures"):
            pictures(tmp_path / "set.zip", **wrong)
