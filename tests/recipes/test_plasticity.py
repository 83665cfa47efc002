"""The reproduction of small learners: what is played is what the law says, judges read results rightly, one page."""

import copy
from pathlib import Path

import numpy as np
import pytest

from pliant.measure.information import joint_law
from pliant.recipes import plasticity
from pliant.recipes.plasticity import PLASTICITY, bandit, judge, played, q_learner, run, trials
from pliant.recipes.reproduce import Result, Trial, reproduce


@pytest.fixture(scope="module")
def results() -> list[tuple[Trial, Result]]:
    few = [Trial(t.name, {**t.settings, "lives": 30_000} if "lives" in t.settings else dict(t.settings), t.seed)
           for t in trials("minute") if t.seed == 0]  # fmt: skip
    return [(trial, run(trial, lambda share, word: None)) for trial in few]


def test_a_learner_plays_as_its_law_says() -> None:
    """Ties, exploration, initial values: frequencies of all streams of five pulls, by a chi-squared."""
    for epsilon, first in ((0.3, 0.0), (0.1, 0.5)):
        p = joint_law(q_learner(epsilon, first), bandit(0.2, 0.8), 5).probabilities.reshape(-1)
        lives = played(epsilon, first, 40_000, seed=1)
        turns = np.stack([lives.actions, lives.observations], 2).reshape(40_000, 10)
        seen = np.bincount(turns @ (1 << np.arange(10)[::-1]), minlength=1024)
        likely = p > 5 / 40_000
        assert seen[p == 0].sum() == 0
        statistic = ((seen - 40_000 * p)[likely] ** 2 / (40_000 * p[likely])).sum()
        assert abs(statistic - likely.sum()) < 4 * np.sqrt(2 * likely.sum())


def test_claims(results: list[tuple[Trial, Result]]) -> None:
    claims = judge(results)
    assert [claim.verdict for claim in claims] == [
        "direction only", "not reproduced", "direction only", "direction only", "direction only",
    ]  # fmt: skip
    assert "0.3982 at ε = 0.1" in claims[0].ours and "0.5561 at ε = 1" in claims[0].ours
    assert claims[2].ours.endswith("on it are echo, exclusive or")
    worse = copy.deepcopy(results)
    by = {trial.name: result for trial, result in worse}
    by["exploration"]["rows"][2]["plasticity"] = 0.5
    by["pairs"]["points"][0] = [2.0, 2.0, 3.0]
    by["closed forms"]["echo"][1] += 1e-6
    for row in by["exploration"]["rows"]:
        row["enough"], row["estimates"]["plasticity"] = True, [9.0, 9.0, 9.0]
    assert [claim.verdict for claim in judge(worse)] == ["not reproduced"] * 5


@pytest.mark.slow
def test_one_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plasticity, "LIVES", {"minute": 500})
    monkeypatch.setattr(plasticity, "EPSILONS", (0.0, 1.0))
    monkeypatch.setattr(plasticity, "FIRSTS", (-1.0, -0.5, 0.0, 0.5, 1.0))
    reproduce(PLASTICITY, "minute", tmp_path)
    page = (tmp_path / "page.html").read_text()
    assert "<svg" in page and "win-stay, sure arms" in page and "not reproduced" in page
    again = page
    reproduce(PLASTICITY, "minute", tmp_path)
    assert (tmp_path / "page.html").read_text() == again
