"""Perplexity beside accuracy. Numbered checks are those of perplexity-selection.md, section 8."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pliant.core import UsageError, generator
from pliant.measure.paired import bootstrap, correlation_interval, mcnemar, paired_p, selection, two_sided
from pliant.measure.perplexity import (
    TokenScores,
    code_length,
    compare,
    critical_accuracy,
    critical_accuracy_at,
    decompose,
    free_lunch,
    tempered,
)
from pliant.measure.token_scores import token_statistics


def drawn(classes: int, seed: int = 0, tokens: int = 300, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    random = generator(seed, "logits")
    logits = scale * torch.randn(tokens, classes, generator=random, dtype=torch.float64)
    return logits, torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]


def scored(logits: torch.Tensor, targets: torch.Tensor, **more: object) -> TokenScores:
    scores = TokenScores()
    scores.update(logits, targets, **more)  # type: ignore[arg-type]
    return scores


# Scores of tokens


@pytest.mark.parametrize("classes", [2, 7, 1000])
@pytest.mark.parametrize("masked", [False, True])
def test_check_1_code_length_is_made_of_right_and_wrong(classes: int, masked: bool) -> None:
    logits, targets = drawn(classes)
    mask = torch.rand(300, generator=generator(1, "mask")) < 0.7 if masked else None
    a = scored(logits, targets, mask=mask).value()
    b = scored(logits.roll(1, 1) + logits, targets, mask=mask).value()
    for found in (a, b):
        whole = found.accuracy * found.right_nll + (1 - found.accuracy) * found.wrong_nll
        assert found.nll == pytest.approx(whole, abs=1e-10)
        assert found.wrong_nll >= math.log(2) - 1e-12
    assert sum(decompose(a, b)) == pytest.approx(b.nll - a.nll, abs=1e-10)


def test_statistics_are_what_their_definitions_say() -> None:
    logits, targets = drawn(7)
    shares = logits.softmax(-1)
    found = token_statistics(logits, targets)
    torch.testing.assert_close(found.nll, -shares.gather(1, targets[:, None])[:, 0].log())
    torch.testing.assert_close(found.entropy, torch.distributions.Categorical(shares).entropy())
    torch.testing.assert_close(found.confidence, shares.amax(1))
    torch.testing.assert_close(found.brier, (shares - torch.nn.functional.one_hot(targets, 7)).square().sum(1))
    assert found.right.equal(shares.argmax(1) == targets)


def test_logits_of_any_size_are_scored_exactly() -> None:
    gap = torch.tensor([[1e4, 0.0, -3e38], [0.0, 100.0, 0.0], [-torch.inf, 0.0, 0.0]], dtype=torch.float32)
    found = token_statistics(gap, torch.tensor([1, 0, 1]))
    assert found.nll.tolist() == [1e4, 100.0, math.log(2)]
    assert found.entropy.tolist() == pytest.approx([0, 0, math.log(2)], abs=1e-12)
    assert scored(gap, torch.tensor([1, 0, 1])).value().perplexity == math.inf
    # Far below what float32 tells near 1e4 in steps of 1e-3.
    near = torch.tensor([[1e4, 1e4 - 2**-10]])
    assert float(token_statistics(near, torch.tensor([0])).nll) == pytest.approx(
        math.log1p(math.exp(-(2**-10))), abs=1e-7
    )
    nothing = token_statistics(torch.tensor([[0.0, -torch.inf]]), torch.tensor([1]))
    assert nothing.nll.tolist() == [math.inf]
    assert math.isnan(scored(torch.tensor([[0.0, torch.nan]]), torch.tensor([1])).value().nll)


def test_check_13_a_gap_of_a_hundred_is_a_number() -> None:
    for dtype, gap in ((torch.float32, 100.0), (torch.float16, 18.0), (torch.bfloat16, 100.0)):
        value = scored(torch.tensor([[0.0, gap]], dtype=dtype), torch.tensor([0])).value()
        assert value.nll == pytest.approx(gap, rel=1e-7)
        assert value.perplexity == pytest.approx(math.exp(gap), rel=1e-5)


def test_first_of_equal_logits_is_the_choice() -> None:
    assert token_statistics(torch.zeros(3, 3), torch.arange(3)).right.tolist() == [True, False, False]


@given(cuts=st.lists(st.integers(0, 60), max_size=4), keep=st.booleans())
def test_parts_merged_are_one_pass(cuts: list[int], keep: bool) -> None:
    logits, targets = drawn(5, tokens=60)
    more = {"document": torch.arange(60) // 7, "position": torch.arange(60) % 7, "num_bytes": torch.arange(60) % 3}
    whole = TokenScores(keep)
    whole.update(logits, targets, **more)
    merged = whole.fresh()
    for a, b in pairwise([0, *sorted(cuts), 60]):
        part = whole.fresh()
        part.update(logits[a:b], targets[a:b], **{name: x[a:b] for name, x in more.items()})
        merged = merged.merge(part)
    assert merged.value() == pytest.approx(whole.value(), rel=1e-12)
    loaded = whole.fresh()
    loaded.load_state_dict(whole.state_dict())
    assert loaded.value() == whole.value()
    if keep:
        assert all(x.equal(y) for x, y in zip(merged.columns().values(), loaded.columns().values(), strict=True))
        assert compare(merged, loaded).nll.value == 0


def test_positions_are_split_by_powers_of_two() -> None:
    logits, targets = drawn(5, tokens=40)
    scores = scored(logits[None], targets[None])
    found = scores.by_position()
    assert [(part.start, part.stop) for part, _ in found] == [
        (0, 1),
        (1, 2),
        (2, 4),
        (4, 8),
        (8, 16),
        (16, 32),
        (32, 64),
    ]
    nll = token_statistics(logits, targets).nll
    for part, value in found:
        assert value.nll == pytest.approx(float(nll[part.start : part.stop].mean()))
    assert sum(value.tokens for _, value in found) == 40


def test_calibration_and_reliability() -> None:
    # Nine times right at a confidence of 0.8: off by 0.1.
    logits = torch.tensor([[math.log(0.8), math.log(0.2)]]).expand(10, 2)
    scores = scored(logits, torch.tensor([0] * 9 + [1]))
    assert scores.value().calibration == pytest.approx(0.1, abs=1e-6)
    (row,) = scores.reliability()
    assert (row["count"], row["accuracy"]) == (10, 0.9)


def test_check_15_bits_per_byte() -> None:
    scores = TokenScores(keep=False)
    scores.add(torch.full((1000,), 2.5), torch.ones(1000, dtype=torch.bool), num_bytes=torch.full((1000,), 4))
    scores.add(torch.zeros(1), torch.ones(1, dtype=torch.bool), num_bytes=torch.tensor([200]))
    assert scores.value().bits_per_byte == pytest.approx(0.8587470482, abs=1e-9)


# Iso-perplexity

TABLE_A = {
    0.45: (0.698172, 0.575305, 0.641580, 0.719759, 0.786541, 0.871524),
    0.40: (0.713558, 0.578798, 0.646241, 0.723197, 0.788318, 0.871399),
    0.30: (0.780324, 0.575156, 0.643835, 0.720431, 0.784280, 0.866121),
    0.20: (0.916291, 0.565449, 0.630930, 0.706227, 0.769751, 0.852833),
    0.10: (1.203973, 0.551802, 0.608523, 0.678276, 0.740176, 0.825827),
    0.05: (1.523513, 0.542310, 0.591055, 0.654205, 0.713128, 0.799614),
}
TABLE_B = {
    0.5: (0.713558, 0.578798, 0.646241, 0.723197, 0.788318, 0.871399),
    0.6: (0.673012, 0.626652, 0.675489, 0.741651, 0.801076, 0.878748),
    0.7: (0.632465, 0.674506, 0.704737, 0.760104, 0.813835, 0.886097),
    0.8: (0.591919, 0.722360, 0.733985, 0.778558, 0.826593, 0.893445),
    0.9: (0.551372, 0.770214, 0.763233, 0.797011, 0.839351, 0.900794),
    0.95: (0.531099, 0.794141, 0.777857, 0.806238, 0.845730, 0.904468),
}
SHARES = (0.25, 0.5, 0.75, 0.9, 0.99)


def test_check_2_the_tables_of_the_dossier() -> None:
    cases = [(0.5, gamma, row) for gamma, row in TABLE_A.items()] + [(a, 0.4, row) for a, row in TABLE_B.items()]
    for accuracy, gamma, (length, *critical) in cases:
        assert code_length(accuracy, gamma) == pytest.approx(length, abs=1e-6)
        found = [critical_accuracy(accuracy, gamma, gamma * (1 - share)) for share in SHARES]
        assert found == pytest.approx(critical, abs=1e-6)


@given(accuracy=st.floats(0, 1), gamma=st.floats(1e-6, 0.49))
def test_check_3_no_change_needs_no_change(accuracy: float, gamma: float) -> None:
    assert critical_accuracy(accuracy, gamma, gamma) == pytest.approx(accuracy, abs=1e-12)


@given(accuracy=st.floats(0.5, 0.99), gamma=st.floats(0.02, 0.48))
def test_check_3_monotone_only_for_a_model_that_is_sure_enough(accuracy: float, gamma: float) -> None:
    curve = [critical_accuracy(accuracy, gamma, gamma * (1 - k / 400)) for k in range(400)]
    if accuracy < 1 - gamma - 1e-3:
        assert all(a < b for a, b in pairwise(curve))
    elif accuracy > 1 - gamma + 0.01:
        assert curve[1] < curve[0]


def test_check_3_a_model_of_nearly_perfect_confidence_needs_nearly_perfect_accuracy() -> None:
    assert 0.94 < critical_accuracy(0.5, 0.4, 0.4e-6) < 1
    assert critical_accuracy(0.5, 0.4, 0.0) == 1.0
    assert math.isnan(critical_accuracy(0.7, 0.4, 0.5))


LUNCHES = {0.7: (0.672401, 0.211368), 0.8: (0.721092, 0.069004), 0.9: (0.759746, 0.004186), 0.95: (0.776663, 0.000024)}


def test_checks_4_and_5_how_far_a_less_accurate_model_may_win() -> None:
    for accuracy, (least, end) in LUNCHES.items():
        found = free_lunch(accuracy, 0.4)
        assert found is not None
        assert found.least == pytest.approx(least, abs=1e-6)
        assert found.end == pytest.approx(end, abs=1e-6)
        # The lowest of eq. 11 is there, where the new model is calibrated, and has the same entropy.
        grid = np.linspace(1e-4, 0.4, 4000)
        curve = [critical_accuracy(accuracy, 0.4, float(gamma)) for gamma in grid]
        assert found.least <= min(curve) + 1e-12
        assert grid[int(np.argmin(curve))] == pytest.approx(found.gamma, abs=2e-4)
        # There it is level, to second order.
        assert critical_accuracy(accuracy, 0.4, found.gamma) == pytest.approx(found.least, abs=1e-9)
        beside = [critical_accuracy(accuracy, 0.4, found.gamma + step) for step in (-1e-6, 1e-6)]
        assert beside[1] - beside[0] == pytest.approx(0, abs=1e-10)
        assert code_length(found.least, 1 - found.least) == pytest.approx(code_length(accuracy, 0.4), abs=1e-12)
    assert free_lunch(0.6, 0.4) is None
    assert free_lunch(0.5, 0.4) is None


@given(accuracy=st.floats(0, 1), gamma=st.floats(0.01, 0.6), new=st.floats(0.01, 0.6), classes=st.integers(2, 50))
def test_check_6_the_general_form_has_eq_11_in_it(accuracy: float, gamma: float, new: float, classes: int) -> None:
    if abs(new - (classes - 1) / classes) < 1e-3:
        return
    right, wrong = -math.log(1 - new), -math.log(new / (classes - 1))
    length = -accuracy * math.log(1 - gamma) - (1 - accuracy) * math.log(gamma / (classes - 1))
    found = critical_accuracy(accuracy, gamma, new, classes)
    assert found == pytest.approx(critical_accuracy_at(length, right, wrong), rel=1e-12, abs=1e-12)
    # And at that accuracy the two tie.
    assert found * right + (1 - found) * wrong == pytest.approx(length, abs=1e-9)


def test_check_8_temperature_and_the_bound_of_boole() -> None:
    assert tempered(0.1, 0.5) == pytest.approx(1 - 0.9878048780, abs=1e-10)
    assert tempered(0.1, 2.0) == pytest.approx(0.25, abs=1e-12)
    assert tempered(0.1, 1e-3) == 0.0 == 1 - tempered(0.9, 1e-3)
    for gamma in (0.001, 0.01, 0.1):
        assert tempered(gamma, 1.0) == pytest.approx(gamma, rel=1e-12)
        assert all(1 - (1 - gamma) ** n <= n * gamma + 1e-15 for n in (1, 10, 100))
    assert pytest.approx(0.182093, abs=1e-6) == 1 - 0.99**20


# Two models


def pair(tokens: int = 1000) -> tuple[TokenScores, TokenScores]:
    """The worked example of 2.6: 60 % right with 0.6, wrong with 0.3; 70 % right with 0.9, wrong with 0.02."""
    made = []
    for share, sure, left in ((0.6, 0.6, 0.3), (0.7, 0.9, 0.02)):
        right = torch.arange(tokens) < share * tokens
        scores = TokenScores()
        scores.add(-torch.where(right, *torch.tensor([sure, left], dtype=torch.float64).log()), right)
        made.append(scores)
    return made[0], made[1]


def test_check_6_perplexity_picks_the_less_accurate_model() -> None:
    a, b = pair()
    found = compare(a, b, names=("small", "large"))
    assert (found.a.nll, found.b.nll) == pytest.approx((0.7880844960, 1.2473592626), abs=1e-9)
    assert found.critical[0] == pytest.approx(0.8206502462, abs=1e-9)
    assert found.parts == pytest.approx((-0.2249904835, -0.2635523203, 0.9478175704), abs=1e-9)
    assert sum(found.parts) == pytest.approx(found.b.nll - found.a.nll, abs=1e-12)
    assert (found.only_a, found.only_b) == (0, 100)
    assert found.verdict == "perplexity picks the less accurate model"
    assert found.sentence.startswith("perplexity picks the less accurate model: it prefers small by 0.4593 nats")
    assert "82.1 %" in found.sentence and "small is less sure when wrong" in found.sentence


def test_check_7_swapping_the_two_turns_every_sign_and_keeps_the_verdict() -> None:
    a, b = pair()
    one, two = compare(a, b), compare(b, a)
    assert [-part for part in one.parts] == pytest.approx(two.parts, abs=1e-12)
    assert one.nll.value == pytest.approx(-two.nll.value)
    assert one.critical == two.critical[::-1]
    assert one.verdict == two.verdict


def test_check_9_a_calibrated_model_made_surer_is_worse_in_confidence_only() -> None:
    random = generator(0, "truth")
    logits = 1.5 * torch.randn(20_000, 4, generator=random, dtype=torch.float64)
    targets = torch.multinomial(logits.softmax(-1), 1, generator=random)[:, 0]
    documents = torch.arange(20_000) // 20
    calm = scored(logits, targets, document=documents)
    for temperature in (0.9, 0.5, 0.1):
        sure = scored(logits / temperature, targets, document=documents)
        found = compare(calm, sure)
        # Exactly, the expected code length grows; by the sample, too.
        expected = [-(logits.softmax(-1) * (logits / t).log_softmax(-1)).sum(-1).mean() for t in (1, temperature)]
        assert expected[0] < expected[1]
        assert found.verdict == "confidence only"
        assert found.nll.value > 0
        assert found.parts.accuracy == 0
        assert found.accuracy.value == 0


def test_agree_and_unresolved() -> None:
    logits, targets = drawn(5, tokens=2000)
    documents = torch.arange(2000) // 10
    good = scored(logits, targets, document=documents)
    worse = scored(logits.roll(1, 0), targets, document=documents)
    assert compare(good, worse).verdict == "agree"
    assert compare(good, worse).sentence.startswith("agree: A has the lower perplexity")
    noise = torch.randn(2000, 5, generator=generator(2, "noise"), dtype=torch.float64)
    near = compare(good, scored(logits + 0.01 * noise, targets, document=documents))
    assert near.verdict == "unresolved"
    alone = compare(scored(logits, targets), scored(logits.roll(1, 0), targets))
    assert alone.verdict == "unresolved"
    assert "1 document cannot tell, give 6 or more" in alone.sentence
    sure = scored(torch.where(torch.eye(5, dtype=torch.bool)[targets], -torch.inf, logits), targets, document=documents)
    assert "no probability" in compare(good, sure).sentence
    none = scored(torch.full_like(logits, math.nan), targets, document=documents)
    assert "loud gave no numbers" in compare(good, none, names=("good", "loud")).sentence
    assert selection(np.array([math.nan, 1.0, 2.0]), np.array([0.1, 0.9, 0.2])).picked == 1


def test_a_difference_over_few_documents_is_rarely_told_where_there_is_none() -> None:
    random = np.random.default_rng(0)
    for documents in (2, 5, 6, 8):
        found = [bootstrap(random.normal(size=documents), np.ones(documents), resamples=1000) for _ in range(400)]
        assert sum(one.resolved for one in found) <= 0.1 * len(found)  # percentiles as they are: 17 % of six
        assert math.isnan(found[0].low) == (documents < 6)


def test_answers_without_documents_stay_apart_when_scores_are_merged() -> None:
    whole, parts = TokenScores(), [TokenScores(), TokenScores()]
    for part in parts:
        nll, right = torch.tensor([0.1, 0.7, 0.4], dtype=torch.float64), torch.tensor([True, False, True])
        part.add(nll, right)
        whole.add(nll, right)
    merged = parts[0].merge(parts[1])
    assert len(merged.columns()["document"].unique()) == 6
    assert all(merged.columns()[name].equal(whole.columns()[name]) for name in ("document", "nll", "right"))


@pytest.mark.usefixtures("unchecked")
def test_scores_that_do_not_fit_are_refused() -> None:
    scores, logits, targets = TokenScores(), torch.zeros(2, 3, 5), torch.zeros(2, 3, dtype=torch.int64)
    for options, said in (
        ({"mask": torch.ones(2, 3, dtype=torch.int64)}, "mask is torch.int64"),
        ({"mask": torch.ones(3, 2, dtype=torch.bool)}, r"mask is torch.bool \(3, 2\)"),
        ({"document": torch.zeros(7, dtype=torch.int64)}, r"document is \(7,\)"),
    ):
        with pytest.raises(UsageError, match=said):
            scores.update(logits, targets, **options)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="target is"):
        scores.add(torch.zeros(3), torch.ones(3, dtype=torch.bool), target=torch.zeros(2, dtype=torch.int64))
    scores.update(logits[0, 0], targets[0, 0])
    state = scores.state_dict()
    for name, wrong in (("sums", state["sums"][:1]), ("sums", 2 * state["sums"]), ("bins", state["bins"].float())):
        with pytest.raises(UsageError, match="do not fit each other"):
            TokenScores().load_state_dict(state | {name: wrong})


def test_check_14_mcnemar_and_z() -> None:
    assert mcnemar(10, 25) == pytest.approx(0.016673848, abs=1e-9)
    assert mcnemar(25, 10) == mcnemar(10, 25)
    assert mcnemar(3, 3) == mcnemar(0, 0) == 1.0
    gains = np.array([-1.0] * 10 + [1.0] * 25 + [0.0] * 365)
    assert paired_p(gains) == pytest.approx(0.011230, abs=1e-6)
    shares = np.array([240, 255]) / 400
    unpaired = (shares[1] - shares[0]) / math.sqrt((shares * (1 - shares) / 400).sum())
    assert two_sided(unpaired) == pytest.approx(0.2745, abs=5e-4)


@given(b=st.integers(0, 60), c=st.integers(0, 60))
def test_mcnemar_is_the_binomial_test(b: int, c: int) -> None:
    assert mcnemar(b, c) == pytest.approx(stats.binomtest(min(b, c), max(1, b + c)).pvalue if b + c else 1, rel=1e-9)


def test_mcnemar_in_a_comparison_is_exact_where_each_document_has_one_answer() -> None:
    right = torch.zeros(2, 400, dtype=torch.bool)
    right[:, :230], right[0, 230:240], right[1, 240:265] = True, True, True
    a, b = TokenScores(), TokenScores()
    for scores, own in ((a, right[0]), (b, right[1])):
        scores.add(torch.where(own, 0.5, 2.0), own)
    assert compare(a, b).p == mcnemar(10, 25)
    assert (compare(a, b).only_a, compare(a, b).only_b) == (10, 25)


def test_check_14_documents_in_another_order_are_the_same_and_in_one_model_alone_an_error() -> None:
    logits, targets = drawn(5)
    documents = torch.arange(300) // 10
    order = torch.randperm(30, generator=generator(0, "order"))
    moved = (order[:, None] * 10 + torch.arange(10)).flatten()
    other = logits.roll(1, 0)
    one = compare(scored(logits, targets, document=documents), scored(other, targets, document=documents))
    numbers = {"document": documents, "position": torch.arange(300) % 10}
    both = compare(scored(logits[moved], targets[moved], **numbers), scored(other[moved], targets[moved], **numbers))
    assert both.p == pytest.approx(one.p)
    assert both.nll.value == pytest.approx(one.nll.value)
    assert both.nll.low == pytest.approx(one.nll.low, rel=0.1)
    with pytest.raises(UsageError, match="same documents under the same numbers"):
        compare(scored(logits, targets, **numbers), scored(other[moved], targets[moved], **numbers))


def test_other_tokens_of_the_same_bytes_are_compared_by_bits_per_byte() -> None:
    logits, targets = drawn(5)
    one = scored(logits, targets, document=torch.arange(300) // 10, num_bytes=2)
    two = scored(logits[::2] * 0.5, targets[::2], document=torch.arange(150) // 5, num_bytes=4)
    found = compare(one, two)
    assert not found.same_tokens and math.isnan(found.accuracy.value)
    assert found.nll.value == pytest.approx(found.b.bits_per_byte - found.a.bits_per_byte)
    assert "do not read the same tokens" in found.sentence
    with pytest.raises(UsageError, match="neither the same tokens nor the same bytes"):
        compare(one, scored(logits[::2], targets[::2], document=torch.arange(150) // 5, num_bytes=3))
    with pytest.raises(UsageError, match="kept no tokens"):
        compare(one, TokenScores(keep=False))


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    inside = 0
    for trial in range(200):
        effect = random.normal(0.3, 1.0, 60)  # a document's own difference, which all of its tokens share
        counts = random.integers(1, 30, 60).astype(float)
        found = bootstrap(effect * counts, counts, resamples=400, seed=trial)
        inside += found.low <= 0.3 <= found.high
    # 0.95 ± 4 standard errors, and a little less since documents are few and of uneven length.
    assert 0.86 <= inside / 200 <= 0.99


def test_correlation_intervals_of_the_dossier() -> None:
    assert correlation_interval(0.31, 50) == pytest.approx((0.035, 0.542), abs=5e-4)
    assert correlation_interval(-0.94, 50) == pytest.approx((-0.966, -0.896), abs=5e-4)


@given(values=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=12, unique=True))
def test_selection_is_counted_over_pairs(values: list[tuple[int, int]]) -> None:
    nlls, accuracies = np.array(values, float).T
    found = selection(nlls, accuracies / 10)
    pairs = [(i, j) for i in range(len(values)) for j in range(i)]
    signs = [np.sign(nlls[j] - nlls[i]) * np.sign(accuracies[i] - accuracies[j]) for i, j in pairs]
    assert found.tau == pytest.approx(np.mean(signs))
    assert found.discordance == pytest.approx(np.mean([sign < 0 for sign in signs]))
    if len(set(nlls)) == len(set(accuracies)) == len(values):
        assert found.discordance == pytest.approx((1 - found.tau) / 2)
        assert found.tau == pytest.approx(stats.kendalltau(-nlls, accuracies).statistic)
    assert found.regret == pytest.approx(accuracies.max() / 10 - accuracies[nlls.argmin()] / 10)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    logits, targets = drawn(5)
    with pytest.raises(UsageError, match="expected integer targets"):
        scored(logits, targets[:5])
    with pytest.raises(UsageError, match="vocabulary has 5 tokens"):
        scored(logits, targets + 3)
    scored(logits, targets - 100, mask=torch.zeros(300, dtype=torch.bool))
    for arguments in ((1.1, 0.1, 0.1), (0.5, -0.1, 0.1), (0.5, 0.1, 0.1, 1), (0.5, 0.1, 2.0)):
        with pytest.raises(UsageError, match="expected shares"):
            critical_accuracy(*arguments)
    with pytest.raises(UsageError, match="two of each"):
        selection(np.zeros(1), np.zeros(1))
    with pytest.raises(UsageError, match="no token"):
        compare(TokenScores(), TokenScores())
    with pytest.raises(UsageError, match="positive temperature"):
        tempered(0.1, 0.0)
