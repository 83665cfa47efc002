"""The page on MS-SSM, and what its tables are made by: ranks, patches, splits."""

import importlib
import re
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from pliant.core import seeded
from tests.docs.code import names_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "ms-ssm.md"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module


def test_check_14_means_and_gaps_are_those_of_the_rows() -> None:
    found: dict[str, list[float]] = {}
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if len(cells) == 9 and re.fullmatch(r"\d+\.\d+", cells[1]):
            name, *numbers = cells
            found[name] = [float(number) for number in numbers]
    assert len(found) == 9
    for name, (listops, *tasks, five, six) in found.items():
        assert five == pytest.approx(sum(tasks) / 5, abs=1e-6), name
        assert six == pytest.approx((listops + sum(tasks)) / 6, abs=6e-4), name
    ours = found["MS-SSM (S6)"]
    assert ours[6] == 86.736 and found["MS-SSM (S4)"][6] == 91.89
    assert round(ours[6] - found["Mamba"][6], 2) == 14.43
    assert round(found["S4"][6] - ours[6], 2) == 4.65
    assert round(ours[0] / found["Mamba"][0], 2) == 1.66


def test_the_code_of_the_page_does_what_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    with seeded(0):
        names = names_of("ms-ssm.md", torch=torch)
    assert names["output"].shape == (2, 5)
    assert names["forecast"](names["x"])[0].shape == (2, 50, 24, 3, 3)


def test_ranks_share_ties_and_add_up(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    classify: ModuleType = script("classify")
    monkeypatch.setattr(classify, "DRAWS", 500)
    means = np.array([[0.9, 0.5], [0.9, 0.7], [0.1, 0.8]])
    assert classify.ranks(means).tolist() == [[1.5, 3], [1.5, 2], [3, 1]]
    values = {"a": np.full((4, 2), 0.9), "b": np.full((4, 2), 0.8), "c": np.array([[0.7, 0.95]] * 4)}
    placed = classify.rank_intervals(values)
    assert placed["a"][0] == 1 and placed["a"][2] <= 2
    for mean, low, high in placed.values():
        assert 1 <= low <= mean <= high <= 3
    assert sum(mean for mean, *_ in placed.values()) == pytest.approx(6)


def test_patches_keep_every_sample_and_the_ends(script: Any) -> None:
    classify: ModuleType = script("classify")
    x = torch.arange(1.0, 15).reshape(1, 7, 2)
    mask = torch.arange(7)[None] < 4
    patches, there = classify.patches(torch.where(mask[..., None], x, 0), mask, 3)
    assert patches.shape == (1, 3, 6) and there.tolist() == [[True, True, False]]
    assert patches.flatten()[:14].tolist() == [*range(1, 9), *[0] * 6]


def test_a_quarter_of_each_class_is_held_out(script: Any) -> None:
    labels = np.repeat([0, 1, 2], [8, 2, 41])
    held = script("classify").held_out(labels)
    assert np.bincount(labels[held.numpy()]).tolist() == [2, 1, 10]


@pytest.fixture
def ett(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script on a file in which each number tells its hour."""
    module: ModuleType = script("ett")
    hours = np.arange(module.TEST + 50)
    rows = np.column_stack([hours, *(hours + 10.0**k for k in range(7))])
    np.savetxt(tmp_path / "ETTh1.csv", rows, delimiter=",", header="date,...", fmt="%.0f")
    monkeypatch.setenv("ETT", str(tmp_path))
    module.series.cache_clear()
    return module


def test_windows_are_those_of_the_standard_split(ett: ModuleType) -> None:
    scale = (ett.TRAIN**2 - 1) ** 0.5 / 12**0.5
    for first, last in ((0, ett.TRAIN), (ett.TRAIN, ett.VALID), (ett.VALID, ett.TEST)):
        seen, follow = ett.windows(first, last, 96)
        hours = follow[..., 0] * scale + (ett.TRAIN - 1) / 2
        start = max(first, ett.SEEN)
        assert len(seen) == last - start - 96 + 1
        assert hours[0, 0].item() == pytest.approx(start, abs=0.02)
        assert hours[-1, -1].item() == pytest.approx(last - 1, abs=0.02)
        torch.testing.assert_close(seen[1:, -1], follow[:-1, 0])
    part = ett.series()[: ett.TRAIN]
    assert part.mean(0).abs().max() < 1e-5 and part.var(0, correction=0).sub(1).abs().max() < 1e-4


def test_forecasters_are_what_they_are_called(ett: ModuleType) -> None:
    with seeded(0):
        linear, net, x = ett.DLinear(48), ett.Forecaster("LRU", 48), torch.randn(2, ett.SEEN, 7)
    trend = torch.stack([x[:, max(0, t - 12) : t + 13].mean(1) for t in range(12, ett.SEEN - 12)], 1)
    with torch.no_grad():
        for part in (linear.trend, linear.rest):
            part.weight.zero_(), part.bias.zero_()
        linear.trend.weight[0, 12] = linear.rest.weight[1, 12] = 1
        mean = linear(x)[..., 1]
        torch.testing.assert_close(mean[:, :, 0], trend[:, 0])
        torch.testing.assert_close(mean[:, :, 1], x[:, 12] - trend[:, 0])
        assert net(x)[..., 1].equal(x[:, -1, :, None].expand(2, 7, 48))  # before training it is no-change
        again = ett.Again(24, 48)(x)[..., 1]
    torch.testing.assert_close(again, torch.cat([x[:, -24:], x[:, -24:]], 1).transpose(1, 2))


def test_a_language_model_that_goes_on_is_scored_as_a_whole(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    length: ModuleType = script("length")
    monkeypatch.setattr(length, "SHORT", 8)
    with seeded(0):
        model, tokens = length.LanguageModel(width=8, depth=1, mixer="LRU"), torch.randint(256, (length.STREAMS, 33))
    bits, memory = length.over(model, tokens, 32)
    whole = model.nats(model(tokens[:, :-1])[0], tokens[:, 1:]) / np.log(2)
    torch.testing.assert_close(bits, whole.detach(), atol=1e-4, rtol=1e-4)
    assert memory["state bytes"][0] == memory["state bytes"][1]
    begun = length.stretches(torch.cat([torch.full((length.STREAMS, 1), 256), tokens[:, 1:]], 1))
    assert [part.shape[1] for part in begun] == [9] * 4
    assert torch.cat([part[:, 1:] for part in begun], 1).equal(tokens[:, 1:])
