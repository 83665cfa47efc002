"""Warm starts: what is read, what is drawn for whom, what the judge makes of results."""

import gzip
import io
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from pliant.cli import main
from pliant.core import UsageError, seeded
from pliant.recipes.reproduce import Result, Trial, reproduce
from pliant.recipes.warm_start import (
    ARMS,
    LENGTHS,
    RATES,
    TUNING,
    first_trials,
    gaps,
    judge,
    network,
    run,
    then,
    warm_start,
)
from pliant.streams._images import images, kind_of


def drawn(number: int, channels: int, size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Images `(n, size, size, channels)` whose class is the brightest of ten rows, and the classes."""
    random = np.random.default_rng(seed)
    labels = random.integers(0, 10, number)
    pixels = random.integers(0, 120, (number, size, size, channels))
    pixels[np.arange(number), labels] += 130
    return pixels.astype(np.uint8), labels.astype(np.uint8)


@pytest.fixture(scope="module")
def idx(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("idx")
    for part, number in (("train", 600), ("t10k", 200)):
        pixels, labels = drawn(number, 1, 12, number)
        head = b"".join(x.to_bytes(4, "big") for x in (2051, number, 12, 12))
        with gzip.open(folder / f"{part}-images-idx3-ubyte.gz", "wb") as file:
            file.write(head + pixels.tobytes())
        with gzip.open(folder / f"{part}-labels-idx1-ubyte.gz", "wb") as file:
            file.write((2049).to_bytes(4, "big") + number.to_bytes(4, "big") + labels.tobytes())
    return folder


def test_idx_files(idx: Path) -> None:
    data = images(idx)
    assert kind_of(idx) == "fashion-mnist" and kind_of(None) == "fashion-mnist"
    assert data.train.shape == (600, 1, 12, 12) and data.test.shape == (200, 1, 12, 12)
    assert abs(float(data.train.mean())) < 1e-5 and float(data.train.std()) == pytest.approx(1, abs=1e-5)
    rows = data.train[:, 0].mean(2)[:, :10]
    assert torch.equal(rows.argmax(1), data.train_labels)


def test_a_zip_of_pictures_and_the_binary_version_are_the_same_images(tmp_path: Path) -> None:
    from PIL import Image

    (tmp_path / "bin").mkdir()
    with zipfile.ZipFile(tmp_path / "some.zip", "w") as archive:
        for part, number in (("train", 30), ("test", 12)):
            pixels, labels = drawn(number, 3, 32, number)
            order = np.argsort(labels, kind="stable")
            pixels, labels = pixels[order], labels[order]
            rows = np.concatenate([labels[:, None], pixels.transpose(0, 3, 1, 2).reshape(number, -1)], 1)
            (tmp_path / "bin" / ("data_batch_1.bin" if part == "train" else "test_batch.bin")).write_bytes(
                rows.tobytes()
            )
            for i, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
                file = io.BytesIO()
                Image.fromarray(picture).save(file, "png")
                archive.writestr(f"{part}/class {label}/{i:03d}.png", file.getvalue())
    one, two = images(tmp_path / "some.zip"), images(tmp_path / "bin")
    assert kind_of(tmp_path / "some.zip") == kind_of(tmp_path / "bin") == "cifar10"
    for a, b in zip(one, two, strict=True):
        torch.testing.assert_close(a, b)


def test_what_is_not_there_is_one_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UsageError, match="apt install dataset-fashion-mnist"):
        images(tmp_path)
    (tmp_path / "cut.zip").write_bytes(b"PK")
    assert main(["reproduce", "warm-start", "--data", str(tmp_path / "cut.zip"), "--run", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("pliant: no images can be read from") and "Traceback" not in said
    assert main(["reproduce", "grokking", "--data", str(tmp_path)]) == 2
    assert "makes its own data" in capsys.readouterr().err


@pytest.mark.parametrize("net", ["mlp", "cnn"])
@pytest.mark.parametrize("arm", ARMS)
def test_each_arm_learns_and_only_the_projected_keeps_its_lengths(idx: Path, net: str, arm: str) -> None:
    settings = {"data": "fashion-mnist", "net": net, "width": 8, "updates": 30, "batch": 50, "share": 0.5, "rate": 1e-2}
    told: list[float] = []
    trial = Trial(arm, settings | {"held_out": 0.0}, 0)
    found = run(idx, trial, lambda share, word: told.append(share))
    assert found["step"] == list(range(3, 61, 3)) and told[-1] == 1.0
    assert found["accuracy"][-1] > 0.3 and found["loss"][-1] < found["loss"][0]
    assert (abs(found["length"][-1] - 1) < 1e-3) == (arm == "projected")
    assert run(idx, trial, lambda share, word: None) == found
    if arm != "shrink-perturb":  # the first phase has nothing to do with the second, which a fresh net has alone
        fresh = run(idx, Trial(arm, settings | {"held_out": 0.0, "share": 0.0}, 0), lambda share, word: None)
        assert fresh["step"] == found["step"][10:]


def test_twenty_updates_of_the_published_configuration(idx: Path) -> None:
    length = LENGTHS["paper"]["cifar10"]
    assert (length["net"], length["width"], length["updates"]) == ("cnn", 32, 140_000)
    with seeded(0):
        model = network("cnn", (3, 32, 32), 32)
    assert [tuple(p.shape) for p in model.parameters() if p.ndim == 4] == [
        (32, 3, 5, 5),
        (32, 32, 3, 3),
        (32, 32, 3, 3),
    ]
    trial = Trial("projected", {**length, "updates": 10, "share": 0.1, "rate": 1e-3, "held_out": 0.0}, 0)
    assert len(run(idx, trial, lambda share, word: None)["step"]) == 20


def test_rates_are_chosen_by_what_was_held_out_and_equally_many_for_each_arm() -> None:
    first = first_trials("cifar10", "ten")
    assert {trial.seed for trial in first} == {TUNING} and {trial.settings["held_out"] for trial in first} == {0.1}
    tried: dict[tuple[str, float], list[float]] = {}
    for trial in first:
        tried.setdefault((trial.name, trial.settings["share"]), []).append(trial.settings["rate"])
    assert len(tried) == 7 and all(tuple(rates) == RATES["cifar10"] for rates in tried.values())
    best = {"free": 3e-3, "layer norm": 1e-3, "projected": 3e-4, "shrink-perturb": 3e-3}
    results = [(trial, {"accuracy": [0.9, 0.1 - abs(math.log(trial.settings["rate"] / best[trial.name])) / 100]})
               for trial in first]  # fmt: skip
    later = then("cifar10", "ten", results)
    assert len(later) == 33 and TUNING not in {trial.seed for trial in later}
    assert all(trial.settings["rate"] == best[trial.name] and not trial.settings["held_out"] for trial in later)
    assert {trial.settings["rate"] for trial in then("cifar10", "ten", [])} == {RATES["cifar10"][1]}
    assert first_trials("cifar10", "minute") == [] and len(then("cifar10", "minute", [])) == 7


def results(fresh: float, ends: dict[str, float]) -> list[tuple[Trial, Result]]:
    rows = []
    for seed in (0, 1, 2, TUNING):
        shift = 0.001 * seed if seed != TUNING else 0.5
        for arm in ARMS:
            settings = {"data": "cifar10", "net": "cnn", "width": 16}
            if arm != "shrink-perturb":
                rows.append((Trial(arm, settings | {"share": 0.0}, seed), {"accuracy": [0.0, fresh + shift]}))
            rows.append((Trial(arm, settings | {"share": 0.1}, seed), {"accuracy": [0.0, ends[arm] + 2 * shift]}))
    return rows


def test_the_judge_compares_each_net_with_itself() -> None:
    rows = results(0.5, {"free": 0.43, "layer norm": 0.44, "projected": 0.5, "shrink-perturb": 0.49})
    assert gaps(rows, "layer norm", 0.1) == pytest.approx([6.0, 5.9, 5.8])
    gap, closing, ends = judge(rows)
    assert [gap.verdict, closing.verdict, ends.verdict] == ["reproduced", "reproduced", "reproduced"]
    assert gap.seeds == 3 and gap.spread == "5.8 to 6.0 points with, 6.8 to 7.0 without"
    assert closing.ours.startswith("-0.1 points (50.1% fresh), free 6.9 points, layer norm alone 5.9 points; shrink")
    weak = judge(results(0.5, {"free": 0.49, "layer norm": 0.49, "projected": 0.493, "shrink-perturb": 0.49}))
    assert [claim.verdict for claim in weak] == ["direction only"] * 3
    easy = judge(results(0.5, {"free": 0.51, "layer norm": 0.51, "projected": 0.5, "shrink-perturb": 0.5}))
    assert [claim.verdict for claim in easy] == ["not reproduced", "not possible here", "not reproduced"]
    assert "too easy" in easy[1].ours


def test_the_command(idx: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reproduce", "warm-start", "--dry-run"]) == 0
    assert "54 trials, about" in capsys.readouterr().out
    assert main(["reproduce", "warm-start", "--dry-run", "--json", "--data", str(idx)]) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 54


@pytest.mark.slow
def test_a_whole_reproduction_on_little(idx: Path, tmp_path: Path) -> None:
    found = reproduce(warm_start(idx), "minute", tmp_path)
    assert len(found["claims"]) == 3 and all(claim["scale"] == "minute" for claim in found["claims"])
    assert reproduce(warm_start(idx), "minute", tmp_path) == found


def test_images_that_say_nothing_or_lack_their_labels_are_refused(tmp_path: Path) -> None:
    def write(name: str, images: np.ndarray, labels: np.ndarray, cut: int = 0) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        for part in ("train", "t10k"):
            raw = bytes(8) + (4).to_bytes(4, "big") + bytes(4) + images.tobytes()
            packed = gzip.compress(raw)
            broken = packed[:12] + bytes(20) + packed[32:]
            (folder / f"{part}-images-idx3-ubyte.gz").write_bytes(broken if cut else packed)
            (folder / f"{part}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(bytes(8) + labels.tobytes()))
        return folder

    some, labels = np.arange(160, dtype=np.uint8).reshape(10, 4, 4), np.zeros(10, np.uint8)
    assert len(images(write("good", some, labels)).train) == 10
    for folder, why in ((write("few", some, labels[:7]), "10 images and 7 labels"),
                        (write("cut", some, labels, 1), "no images"),
                        (write("flat", np.full_like(some, 3), labels), "the same everywhere")):  # fmt: skip
        with pytest.raises(UsageError, match=why):
            images(folder)
