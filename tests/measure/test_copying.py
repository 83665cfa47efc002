"""Strings copied wrongly at a low perplexity. Numbered checks are those of perplexity-selection.md, section 8."""

import math

import pytest
import torch
from torch import Tensor, nn

from pliant.core import UsageError, generator, seeded
from pliant.measure.copying import copy_bound, copy_length, wrong_but_low
from pliant.models import LanguageModel


def toy(tokens: Tensor, sharpness: float = 6.0) -> Tensor:
    """P(0) = σ(s (1 - 2 m)) with m the mean of the symbols before the stop, whatever comes after it."""
    length = tokens.shape[1] // 2
    logit = sharpness * (1 - 2 * tokens[:, :length].double().mean(1))
    logits = torch.stack([logit, torch.zeros_like(logit), torch.full_like(logit, -torch.inf)], -1)
    return logits[:, None].expand(-1, tokens.shape[1], -1)


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


BETA = {10: 0.488196, 100: 0.061591, 1000: 0.008494, 10_000: 0.003079, 1_000_000: 0.0024817}


def test_check_10_a_continuous_model_with_exact_answers() -> None:
    for row in wrong_but_low(toy, list(BETA), at=-1):
        n = row.length
        assert row.nll == pytest.approx(0.0024756851, abs=1e-9)
        assert row.nll_flipped == pytest.approx(BETA[n], abs=6e-7)
        near = 6 * (1 - 2 / n)
        assert row.nll_flipped == pytest.approx(-((n - 1) * log_sigmoid(near) + log_sigmoid(-near)) / n, abs=1e-12)
        assert row.copied and not row.flipped_copied
        assert row.at == n - 1
        assert row.flipped == pytest.approx(math.exp(log_sigmoid(-near)))
        # What it says is independent of the prefix.
        assert (row.nll_target, row.nll_flipped_target) == pytest.approx((row.nll, row.nll_flipped))


def test_check_11_the_bound_holds_and_the_printed_one_does_not() -> None:
    assert copy_length(0.01, 1e-8) == 3685
    assert copy_length(0.1, 1e-8) == 369
    for row in wrong_but_low(toy, [10, 30, 100, 1000, 10_000], at=0):
        assert abs(row.nll_flipped - row.nll) <= copy_bound(row.length, row.gap, row.flipped)
    margin, floor, difference = 0.1, 1e-8, 0.01
    assert (margin - math.log(0.5 + margin) + math.log(floor)) / (difference + margin) < 0


def model(mixer: str, seed: int = 0) -> LanguageModel:
    with seeded(seed):
        made = LanguageModel(3, width=8, depth=1, mixer=mixer)
    with torch.no_grad():
        made.embed.weight.mul_(4)
    return made.double()


@torch.no_grad()
def one_by_one(made: LanguageModel, string: list[int], prefix: str) -> tuple[list[int], float]:
    """What is said, and the mean code length of the string."""
    tokens, said, nll = [*string, 2], [], 0.0
    for k in range(len(string)):
        logs = made(torch.tensor([tokens]))[0][0, -1].log_softmax(-1)
        said.append(int(logs[:2].argmax()))
        nll -= float(logs[string[k]])
        tokens.append(said[-1] if prefix == "greedy" else string[k])
    return said, nll / len(string)


@pytest.mark.parametrize("mixer", ["GatedLRU", "WindowAttention"])
def test_passes_over_whole_strings_say_what_steps_say(mixer: str) -> None:
    made = model(mixer)
    for seed in range(3):
        alpha = (torch.rand(7, generator=generator(seed, "string")) < 0.5).long()
        (row,) = wrong_but_low(made, [7], source=lambda n, alpha=alpha: alpha, at=3)
        flipped = alpha.clone()
        flipped[3] = 1 - flipped[3]
        for string, nll, target, copied in (
            (alpha, row.nll, row.nll_target, row.copied),
            (flipped, row.nll_flipped, row.nll_flipped_target, row.flipped_copied),
        ):
            said, expected = one_by_one(made, string.tolist(), "greedy")
            assert nll == pytest.approx(expected, abs=1e-9)
            assert target == pytest.approx(one_by_one(made, string.tolist(), "target")[1], abs=1e-9)
            assert copied == (said == string.tolist())


def test_check_12_the_two_prefixes_agree_where_the_copy_is_right() -> None:
    def copier(tokens: Tensor) -> Tensor:
        """Copies surely, and is less sure after it has seen a symbol that it would not have said; never flips 0."""
        n = tokens.shape[1] // 2
        logits = torch.zeros(*tokens.shape, 3, dtype=torch.float64)
        logits[..., 0] = 3 - 2.5 * (tokens == 1).double()
        logits[:, :n] = 0
        return logits

    (row,) = wrong_but_low(copier, [6], at=2)
    assert row.copied and not row.flipped_copied
    assert row.nll == row.nll_target
    assert row.nll_flipped < row.nll_flipped_target


def test_the_place_of_lowest_perplexity_is_found() -> None:
    made = model("GatedLRU", 3)
    (best,) = wrong_but_low(made, [9])
    rows = [wrong_but_low(made, [9], at=place)[0] for place in range(9)]
    wrong = [row.nll_flipped for row in rows if not row.flipped_copied]
    assert best.nll_flipped == pytest.approx(min(wrong) if wrong else min(row.nll_flipped for row in rows), abs=1e-12)


@pytest.mark.usefixtures("unchecked")
def test_other_tokens_and_answers_of_other_packages() -> None:
    class Answer:
        def __init__(self, logits: Tensor):
            self.logits = logits

    def other(tokens: Tensor) -> Answer:
        inner = torch.where(tokens == 7, 1, 0)[:, 1:]
        assert (tokens[:, 0] == 9).all()
        wide = torch.full((*tokens.shape, 10), -torch.inf, dtype=torch.float64)
        wide[:, 1:, 5], wide[:, 1:, 7] = toy(inner)[..., 0], toy(inner)[..., 1]
        return Answer(wide)

    ours = wrong_but_low(toy, [12], at=-1)
    assert wrong_but_low(other, [12], at=-1, symbols=(5, 7), stop=6, begin=[9]) == ours


@pytest.mark.usefixtures("unchecked")
def test_models_that_cannot_copy_at_all_are_refused() -> None:
    random = generator(0, "restless")

    def restless(tokens: Tensor) -> Tensor:
        return torch.randn(*tokens.shape, 3, dtype=torch.float64, generator=random)

    class Dropped(nn.Module):
        def forward(self, tokens: Tensor) -> Tensor:
            return toy(tokens) if not self.training else restless(tokens)

    with pytest.raises(UsageError, match="differs from call to call"):
        wrong_but_low(restless, [200])
    with pytest.raises(UsageError, match="no numbers"):
        wrong_but_low(lambda tokens: toy(tokens) * math.nan, [4])
    model = Dropped()
    assert wrong_but_low(model, [12], at=-1) == wrong_but_low(toy, [12], at=-1) and model.training
    for call in (lambda: copy_bound(0, 0.1, 0.1), lambda: copy_length(0.0, 0.1)):
        with pytest.raises(UsageError, match="expected"):
            call()
    with pytest.raises(UsageError, match="has no place 5"):
        wrong_but_low(toy, [3], at=5)
    with pytest.raises(UsageError, match="expected 3 symbols"):
        wrong_but_low(toy, [3], source=lambda n: torch.full((n,), 2))
