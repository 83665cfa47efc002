"""The reproduction of copying and parity: what trials note, and what is claimed of them."""

from typing import Any

import numpy as np
import pytest

from pliant.core import generator
from pliant.recipes import perplexity
from pliant.recipes.perplexity import KEPT, PLACES, _copy, _parity, correlations, judge, run, trials
from pliant.recipes.reproduce import Trial


def quiet(share: float, word: str) -> None:
    pass


def test_strings_to_copy_and_parities() -> None:
    for seed in range(5):
        tokens, targets = _copy(generator(seed, "strings"))
        length = targets.shape[1]
        assert tokens.shape[1] == 2 * length
        assert tokens[:, :length].equal(targets) and (tokens[:, length] == 2).all()
        assert tokens[:, length + 1 :].equal(targets[:, :-1])
    bits, parity = _parity(9, 4, generator(0, "bits"))
    assert parity.tolist() == [[sum(row[: k + 1]) % 2 for k in range(9)] for row in bits.tolist()]


def test_a_few_updates_of_the_published_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {trial.settings["steps"] for trial in trials("paper") if trial.name == "parity"} == {5000}
    for name, value in (("CHECKPOINTS", 2), ("ASKED", 4), ("LENGTHS", (3, 5))):
        monkeypatch.setattr(perplexity, name, value)
    found = run(Trial("parity", {"mixer": "FullAttention", "steps": 4}, 0), quiet)
    assert found["step"] == [2, 4]
    for place in PLACES:
        nll, accuracy, right, wrong, entropy = np.array(found[place]).T
        np.testing.assert_allclose(nll, accuracy * right + (1 - accuracy) * wrong, atol=1e-4)
        assert (entropy > 0).all()
    # All positions together are those that were trained on and those beyond.
    parts = 16 * np.array(found["seen"])[:, :2] + 112 * np.array(found["beyond"])[:, :2]
    np.testing.assert_allclose(np.array(found["all"])[:, :2], parts / 128, atol=1e-5)
    copied = run(Trial("copy", {"mixer": "GatedLRU", "steps": 2}, 0), quiet)
    assert [row["length"] for row in copied["found"]] == [3, 5]


def made(places: dict[str, tuple[float, float]]) -> dict[str, Any]:
    """Checkpoints whose accuracy goes from the first number to the second while they get surer and worse, or better."""
    found: dict[str, Any] = {"step": list(range(50))}
    for place, (start, end) in places.items():
        accuracy = np.linspace(start, end, 50)
        nll = np.linspace(0.7, 0.2 if place == "trained" else 2.0, 50) if start != end else np.tile([0.7, 0.8], 25)
        entropy = 1 - np.linspace(0, 0.5, 50)
        found[place] = np.stack([nll, accuracy, nll, nll, entropy], 1).tolist()
    return found


def test_a_pooled_correlation_is_not_taken_for_one_beyond() -> None:
    pooled = made({"trained": (0.5, 1), "all": (0.5, 0.56), "seen": (0.5, 1), "beyond": (0.5, 0.5), "last": (0.5, 0.5)})
    rng = np.random.default_rng(0)
    for place in ("beyond", "last"):
        for row in pooled[place]:
            row[KEPT.index("accuracy")] += 0.005 * rng.standard_normal()
    rows = [{"length": n, "at": n - 1, "gap": 1 / n, "least": 0.99, "flipped": 0.0, "nll": 0.001, "nll_flipped": 1 / n,
             "nll_target": 0.001, "nll_flipped_target": 1 / n, "copied": True, "flipped_copied": False}
            for n in (4, 8, 16, 32, 64)]  # fmt: skip
    results = [(Trial("parity", {"mixer": "FullAttention", "steps": 50}, 0), pooled),
               (Trial("copy", {"mixer": "FullAttention", "steps": 50}, 0), {"last": rows, "found": rows})]  # fmt: skip
    assert correlations([results[0]], "all")[0] > 0.99
    claims = {claim.claim.split(":")[0] + str(i): claim for i, claim in enumerate(judge(results))}
    verdicts = [claim.verdict for claim in claims.values()]
    assert verdicts == ["reproduced", "reproduced", "direction only", "not reproduced", "reproduced"]
    beyond = list(claims.values())[3]
    assert "chance" in beyond.ours
