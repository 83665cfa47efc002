"""UCR and UEA sets: padding, the standard split, the stream; aeon itself is not needed, a stand-in reads files."""

import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from pliant.core import UsageError
from pliant.streams import archive, collection

SERIES = {"train": ([3, 5], ["b", "a"]), "test": ([4, 2, 6], ["a", "c", "b"])}
"""Lengths and labels."""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with one set, and a package that reads it: series `(2, T)`, whose values tell channel, row and step."""

    def load(name: str, split: str, extract_path: str) -> tuple[list[np.ndarray], np.ndarray]:
        assert (Path(extract_path) / name / f"{name}_{split.upper()}.ts").exists()
        if name == "Numbers":
            raise ValueError("no classes")
        lengths, labels = SERIES[split]
        found = [100 * row + np.stack([np.arange(n) + 1, 10.0 + np.arange(n)]) for row, n in enumerate(lengths)]
        found[0][0, 1] = np.nan
        return found, np.array(labels)

    home = tmp_path / "data"
    for name in ("Waves", "Numbers"):
        (home / name).mkdir(parents=True)
        for part in ("TRAIN", "TEST"):
            (home / name / f"{name}_{part}.ts").touch()
    datasets = SimpleNamespace(load_classification=load, __file__=str(tmp_path / "__init__.py"))
    monkeypatch.setitem(sys.modules, "aeon", SimpleNamespace(datasets=datasets))
    return home


def test_series_are_padded_and_the_split_is_kept(home: Path) -> None:
    train, test, classes = collection("Waves")
    assert classes == ("a", "b", "c")
    assert train.inputs.shape == (2, 6, 2) and test.inputs.shape == (3, 6, 2)
    assert train.mask.sum(1).tolist() == [3, 5] and test.mask.sum(1).tolist() == [4, 2, 6]
    assert train.labels.tolist() == [1, 0] and test.labels.tolist() == [0, 2, 1]
    assert train.inputs[0].tolist() == [[1, 10], [0, 11], [3, 12], [0, 0], [0, 0], [0, 0]]
    assert test.inputs[2, 5].tolist() == [206, 215]
    assert all(a.equal(b) for a, b in zip(collection("Waves", home).test, test, strict=True))


def test_the_stream_asks_about_all_and_learns_from_the_train_part_alone(home: Path) -> None:
    stream, seen = archive("Waves", batch=2, questions=5, seed=3), {}
    _, test, _ = collection("Waves")
    for index in range(5):
        question, answer = stream.pair(index)  # type: ignore[attr-defined]
        for row, item in enumerate(answer.tags["item"][:, 0].tolist()):
            seen[item] = question.inputs[row]
            length = [3, 5, 4, 2, 6][item]
            assert question.mask[row].sum() == length
            at = torch.arange(6) == length - 1
            assert answer.target_mask[row].equal(at)
            assert answer.learn_mask[row].equal(at & torch.tensor(item < 2))
            assert int(answer.targets[row, length - 1]) == [1, 0, 0, 2, 1][item]
    assert sorted(seen) == [0, 1, 2, 3, 4]
    assert seen[3].equal(test.inputs[1])
    assert stream.spec == (2, 3, 2, 6)


def test_what_is_not_there_is_refused(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="there are Numbers, Waves"):
        collection("Gun")
    with pytest.raises(UsageError, match="there are none"):
        collection("Waves", home / "Waves")
    with pytest.raises(UsageError, match="as classes"):
        collection("Numbers")
    with pytest.raises(UsageError, match="batch is 0"):
        archive("Waves", batch=0)
    monkeypatch.setitem(sys.modules, "aeon", None)
    with pytest.raises(UsageError, match="need the package aeon"):
        collection("Waves")
