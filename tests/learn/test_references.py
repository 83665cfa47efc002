"""References on streams of rows are what they say, however the stream is cut."""

import copy
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import Answer, Question, UsageError, mixture_nats, seeded
from pliant.core.columns import Column, Columns
from pliant.core.pack import differences, pack, unpack
from pliant.learn.references import FINE, WIDTHS, LastLabel, Marginal, ResidualDensity, RowByRow, Seasonal
from pliant.models.table import TableModel

STEPS, ROWS, CLASSES = 40, 3, 4
CASES = [(leaf, task) for leaf in (Marginal, LastLabel, Seasonal) for task in ("classify", "regress", "forecast")]
LAGS = (1, 3, 24)


def columns(task: Any = "classify", lag: int = 1, season: int | None = 5, **more: Any) -> Columns:
    features = (Column("x"), Column("kind", "category", ("a", "b")))
    classes = tuple("abcd") if task == "classify" else ()
    return Columns(task, features, ("y",) if task == "classify" else ("y", "z"), classes, lag, season, **more)


def walk(task: str, steps: int = STEPS, rows: int = ROWS, seed: int = 0) -> np.ndarray:
    """Labels `(rows, steps, G)`, some of them missing."""
    random = np.random.default_rng(seed)
    if task == "classify":
        labels = random.integers(CLASSES, size=(rows, steps // 3 + 1, 1)).repeat(3, 1)[:, :steps].astype(float)
    else:
        labels = random.normal(size=(rows, steps, 2)).cumsum(1)
    labels[random.random(labels.shape) < 0.1] = np.nan
    return labels


def whole(of: Columns, labels: np.ndarray, *, gaps: bool = False, seed: int = 0) -> Question:
    """One question about everything; the label channel is that of `lag` existing steps before in the episode."""
    rows, steps, targets = labels.shape
    random = np.random.default_rng(seed)
    features = random.normal(size=(rows, steps, 2))
    features[..., 1] = random.integers(3, size=(rows, steps))
    features[random.random(features.shape) < 0.1] = np.nan
    mask, reset = (random.random((2, rows, steps)) < np.array([0.8, 0.05])[:, None, None]) if gaps else (
        np.ones((rows, steps), bool), np.zeros((rows, steps), bool))  # fmt: skip
    known = np.full((rows, steps, targets), np.nan)
    for row in range(rows):
        lived: list[int] = []
        for step in range(steps):
            lived = [] if reset[row, step] else lived
            if mask[row, step]:
                lived.append(step)
                if len(lived) > of.lag:
                    known[row, step] = labels[row, lived[-1 - of.lag]]
            else:
                known[row, step] = features[row, step] = 1e300
    inputs = torch.tensor(np.concatenate([features, known], -1))
    return Question(inputs, torch.tensor(reset), torch.tensor(mask), 0, torch.arange(rows))


def part(question: Question, start: int, end: int) -> Question:
    cut = slice(start, end)
    return question._replace(
        inputs=question.inputs[:, cut], reset=question.reset[:, cut], mask=question.mask[:, cut], time=start
    )


def answers(one: RowByRow, question: Question, cuts: list[int]) -> Tensor:
    """What is said to the question, asked in parts."""
    bounds = [0, *cuts, question.mask.shape[1]]
    return torch.cat([one.predict(part(question, a, b)) for a, b in itertools.pairwise(bounds)], 1)


def nats(output: Tensor, labels: np.ndarray) -> float:
    """Mean over all known numbers, nats."""
    known = ~np.isnan(labels)
    return float(mixture_nats(output, torch.tensor(labels))[torch.tensor(known)].mean())


@pytest.mark.parametrize(("leaf", "task"), CASES)
def test_rows_one_by_one_and_in_chunks_are_answered_the_same(leaf: Any, task: str) -> None:
    @given(
        cuts=st.lists(st.integers(0, STEPS), max_size=6).map(sorted),
        lag=st.sampled_from(LAGS),
        seed=st.integers(0, 99),
    )
    def check(cuts: list[int], lag: int, seed: int) -> None:
        of = columns(task, lag)
        question = whole(of, walk(task, seed=seed), gaps=True, seed=seed)
        together, single, cut = leaf(of), leaf(of), leaf(of)
        said = together.predict(question)
        assert said.isfinite().all()
        assert not said[~question.mask].any()
        assert answers(cut, question, cuts).equal(said)
        if seed % 5 == 0:
            assert answers(single, question, list(range(1, STEPS))).equal(said)

    check()


@pytest.mark.parametrize(("leaf", "task"), CASES)
def test_a_life_goes_on_from_what_was_saved(leaf: Any, task: str) -> None:
    of = columns(task, 3)
    question = whole(of, walk(task), gaps=True)
    one, other = leaf(of), leaf(of)
    one.predict(part(question, 0, 31))
    saved = pack(one.state_dict())
    twin = copy.deepcopy(one)
    rest = one.predict(part(question, 31, STEPS))
    other.load_state_dict(unpack(*saved))
    assert pack(other.state_dict()) == saved == pack(twin.state_dict())
    assert other.predict(part(question, 31, STEPS)).equal(rest)
    assert twin.predict(part(question, 31, STEPS)).equal(rest)
    assert differences(one.state_dict(), other.state_dict()) == []


def test_classes_so_far_are_counted_as_by_krichevsky_and_trofimov() -> None:
    of, labels = columns(lag=3), walk("classify")
    said = Marginal(of).predict(whole(of, labels)).exp()
    for step in range(STEPS):
        known = labels[:, : max(0, step - 2)].ravel()
        # The last stream is asked last, when the labels of all streams at this step are known.
        counts = [float((known == c).sum()) + 0.5 for c in range(CLASSES)]
        torch.testing.assert_close(said[-1, step], torch.tensor(counts, dtype=torch.float64) / sum(counts))


def test_the_mean_of_a_stream_is_the_center_of_its_marginal() -> None:
    of, labels = columns("regress", 2), walk("regress")
    means = Marginal(of).predict(whole(of, labels)).chunk(3, -1)[1]
    for step in range(3, STEPS):
        for row in range(ROWS):
            expected = np.nanmean(labels[row, : step - 1], 0)
            assert means[row, step, :, 0].numpy() == pytest.approx(expected, nan_ok=False)


def last_known(labels: np.ndarray, row: int, step: int, lag: int, g: int = 0) -> float:
    known = [value for value in labels[row, : max(0, step - lag + 1), g] if value == value]
    return known[-1] if known else math.nan


@pytest.mark.parametrize("lag", LAGS)
def test_no_change_is_the_last_known_label_as_often_as_it_was_right(lag: int) -> None:
    of, labels = columns(lag=lag), walk("classify", rows=1)
    said = LastLabel(of).predict(whole(of, labels)).exp()[0]
    hits, guesses = [0.5, 0.5], []
    for step in range(STEPS):
        label = labels[0, step - lag, 0] if step >= lag else math.nan
        if label == label and guesses[step - lag] == guesses[step - lag]:
            hits[int(guesses[step - lag] == label)] += 1
        guess = last_known(labels, 0, step, lag)
        guesses.append(guess)
        right = hits[1] / sum(hits)
        expected = [0.25] * 4 if guess != guess else [right if c == guess else (1 - right) / 3 for c in range(4)]
        assert said[step].tolist() == pytest.approx(expected)


@pytest.mark.parametrize("task", ["classify", "regress"])
@pytest.mark.parametrize("lag", [1, 3, 5, 7, 24])
@pytest.mark.parametrize("season", [1, 4, 5, 7])
def test_a_season_is_in_phase_and_as_new_as_can_be_known(task: str, lag: int, season: int) -> None:
    of, labels = columns(task, lag, season), walk(task)
    output = Seasonal(of).predict(whole(of, labels))
    for row in range(ROWS):
        for step in range(STEPS):
            back = next(m * season for m in range(1, STEPS) if m * season >= lag)
            value = labels[row, step - back, 0] if step >= back else math.nan
            if value != value:
                value = last_known(labels, row, step, lag)
            if task == "regress":
                center = 0.0 if value != value else value
                assert output[row, step, 0, len(WIDTHS)] == center
            elif value == value:
                others = [c for c in range(CLASSES) if c != value]
                assert len(output[row, step, others].unique()) == 1
            else:
                assert output[row, step].unique().numel() == 1


def test_a_pattern_that_repeats_is_found_and_its_hits_are_counted_apart() -> None:
    of = columns(lag=3, season=6)
    labels = np.resize(np.array([0.0, 1, 2, 3, 2, 1]), 200)[None, :, None]
    one = Seasonal(of)
    said = one.predict(whole(of, labels))
    assert (said[0, 10:].argmax(-1).numpy() == labels[0, 10:, 0]).all()
    assert one.hits[1] == [0.5, 200 - 6 - 3 + 0.5]
    assert sum(one.hits[0]) == 1 + 6 - 3


def test_a_reset_drops_the_labels_and_keeps_the_experience() -> None:
    of = columns()
    question = whole(of, np.ones((1, 20, 1)))
    question.reset[0, 10] = True
    question.inputs[0, 10, -1] = math.nan
    one = LastLabel(of)
    said = one.predict(question)[0].exp()
    assert said[10].tolist() == pytest.approx([0.25] * 4)
    assert said[11, 1] == said[9, 1]
    # A reset on a step that does not exist counts.
    question.mask[0, 10] = False
    again = LastLabel(of).predict(question)[0]
    assert not again[10].any()
    assert again[11].exp()[1] == pytest.approx(float(said[9, 1]))


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e9])
def test_the_density_of_a_random_walk_comes_close_to_the_true_one(scale: float) -> None:
    of = columns("forecast")
    labels = scale * np.random.default_rng(0).normal(size=(1, 3000, 2)).cumsum(1)
    output = LastLabel(of).predict(whole(of, labels))
    entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(scale)
    assert nats(output[:, 1000:], labels[:, 1000:]) < entropy + 0.06
    assert nats(output[:, 1:], labels[:, 1:]) < entropy + 0.15
    # All errors a thousand times as large from some point on: the scale follows.
    labels[:, 1500:] *= 1e3
    output = LastLabel(of).predict(whole(of, labels))
    assert nats(output[:, 2000:], labels[:, 2000:]) < entropy + math.log(1e3) + 0.1
    assert nats(output[:, 1500:], labels[:, 1500:]) < entropy + math.log(1e3) + 0.5


def test_exact_repeats_earn_a_bounded_number_of_bits() -> None:
    random = np.random.default_rng(0)
    labels = np.where(random.random((1, 4000, 2)) < 0.9, 0.0, random.normal(size=(1, 4000, 2)))
    output = LastLabel(columns("regress")).predict(whole(columns("regress"), labels))
    narrow = output.chunk(3, -1)[2].exp().min(-1).values
    assert (narrow[:, 100:] > 0.5e-3 * 0.25).all()
    constant = LastLabel(columns("regress")).predict(whole(columns("regress"), np.full((1, 4000, 2), 7.0)))
    assert nats(constant[:, 1:], np.full((1, 3999, 2), 7.0)) > -math.log(1e7)


@pytest.mark.parametrize("leaf", [Marginal, LastLabel, Seasonal])
@pytest.mark.parametrize("wild", ["spikes", "jump", "constant", "zero", "missing", "alternating", "tiny", "huge"])
def test_wild_numbers_never_give_a_density_that_is_not_one(leaf: Any, wild: str) -> None:
    of, random = columns("forecast", 3), np.random.default_rng(0)
    labels = random.normal(size=(2, 1500, 2))
    match wild:
        case "spikes":
            labels[:, ::97] *= 1e12
        case "jump":
            labels[:, :700] = 0.0
            labels[:, 700:] += 1e6
        case "constant":
            labels[:] = 1e12
        case "zero":
            labels[:] = 0.0
        case "missing":
            labels[:] = math.nan
        case "alternating":
            labels[:, ::2], labels[:, 1::2] = -1.7e308, 1.7e308
        case "tiny":
            labels *= 1e-300
        case "huge":
            labels *= 1e300
    output = leaf(of).predict(whole(of, labels))
    assert output.isfinite().all()
    if wild not in ("alternating", "huge"):
        known = torch.tensor(np.nan_to_num(labels))
        assert mixture_nats(output, known).isfinite().all()
    if wild in ("spikes", "jump"):
        assert nats(output[:, 5:], labels[:, 5:]) < 30


def test_the_parameters_of_a_density_are_numbers_that_can_be_taken_back() -> None:
    one, random = ResidualDensity(), np.random.default_rng(0)
    for value in random.normal(size=50).tolist():
        one.learn(value, 0.0)
    again = ResidualDensity.of(one.numbers())
    assert again.numbers() == one.numbers()
    said = np.zeros((2, 3 * len(WIDTHS)))
    one.around(2.0, said[0])
    again.around(2.0, said[1])
    assert (said[0] == said[1]).all()
    assert one.shares.weights().sum() == pytest.approx(1)
    assert one.shares.weights()[FINE:].sum() < 0.05


@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("task", ["classify", "regress"])
def test_while_no_label_is_known_it_is_about_as_good_as_a_fresh_model(task: str, scale: float) -> None:
    of = columns(task, lag=100)
    labels = walk(task, 90, seed=1) if task == "classify" else scale * np.random.default_rng(0).normal(size=(1, 90, 2))
    question = whole(of, labels)
    reference = LastLabel(of).predict(question)
    with seeded(0), torch.no_grad():
        fresh, _ = TableModel(of).double()(question.inputs)
    if task == "classify":
        torch.testing.assert_close(reference, fresh.log_softmax(-1))
    else:
        assert abs(nats(reference, labels) - nats(fresh, labels)) < 1.0


def test_what_was_said_is_remembered_until_the_final_answer() -> None:
    of = columns("regress")
    question, one = whole(of, walk("regress")), LastLabel(of, remember=2)
    said = [one.predict(part(question, t, t + 1)) for t in range(3)]
    yes, rows = torch.ones(1, 1, dtype=torch.bool), torch.tensor([1])
    answer = Answer(torch.zeros(1, 1, 2, dtype=torch.float64), yes, yes, 2, rows)
    assert one.said(answer._replace(time=0)) is None
    assert one.learn(answer._replace(time=0)).outcome == "forgotten"
    told = one.said(answer)
    assert told is not None
    assert told.equal(said[2][1:2])
    assert one.output is said[2]
    one.learn(answer._replace(final=False))
    assert one.said(answer) is not None
    one.learn(answer)
    assert one.said(answer) is None


def test_what_does_not_fit_is_refused() -> None:
    of = columns()
    with pytest.raises(UsageError, match="season"):
        Seasonal(columns(season=None))
    with pytest.raises(UsageError, match="lag"):
        LastLabel(columns(lag=0))
    question = whole(of, walk("classify"))
    with pytest.raises(UsageError, match="numbers per row"):
        LastLabel(of).predict(question._replace(inputs=question.inputs[..., 1:]))
    with pytest.raises(UsageError, match="classes"):
        LastLabel(of).predict(question._replace(inputs=question.inputs + 0.5))
