"""Boosting learns from its window when it is due, and goes on from what was saved."""

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch

from pliant.core import Question, UsageError
from pliant.core.columns import Column, Columns
from pliant.core.pack import differences, pack, unpack
from pliant.learn.references import WIDTHS, LastLabel, Marginal
from pliant.learn.trees import Boosting
from tests.learn.test_references import nats, part

TASKS = ("classify", "regress", "forecast")


def table(
    task: Any, lag: int = 1, rows: int = 2, steps: int = 150, **more: Any
) -> tuple[Columns, Question, np.ndarray]:
    """A rule of a number and a category, as one question, and its labels `(rows, steps, 1)`."""
    random = np.random.default_rng(0)
    x, kind = random.normal(size=(rows, steps)), random.integers(1, 4, size=(rows, steps))
    labels = np.where(kind == 2, -x, x) + 0.1 * random.normal(size=x.shape)
    labels = np.digitize(labels, [-0.5, 0.5]).astype(float) if task == "classify" else labels
    # A forecast is of the difference to the last known label.
    labels = labels.cumsum(1) if task == "forecast" else labels
    labels = labels[..., None]
    features = np.stack([x, kind], -1)
    features[random.random(features.shape) < 0.05] = np.nan
    known = np.full_like(labels, np.nan)
    known[:, lag:] = labels[:, :-lag]
    known[random.random(known.shape) < 0.05] = np.nan
    of = Columns(task, (Column("x"), Column("kind", "category", ("a", "b", "c"))), ("y",),
                 tuple("abc") if task == "classify" else (), lag, **more)  # fmt: skip
    no = torch.zeros(rows, steps, dtype=torch.bool)
    return of, Question(torch.tensor(np.concatenate([features, known], -1)), no, ~no, 0, torch.arange(rows)), labels


def boosting(of: Columns, **more: Any) -> Boosting:
    return Boosting(of, **{"every": 40, "window": 120, "iterations": 10, **more})


def walk(one: Any, question: Question, start: int = 0, end: int | None = None, steps: int = 10) -> torch.Tensor:
    end = question.mask.shape[1] if end is None else end
    return torch.cat([one.predict(part(question, t, min(t + steps, end))) for t in range(start, end, steps)], 1)


def cost(output: torch.Tensor, labels: np.ndarray) -> float:
    if output.shape[-1] != 3:
        return nats(output, labels)
    return -float(output.gather(-1, torch.tensor(labels).long()).mean())


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("lag", [1, 3, 24])
def test_it_learns_a_rule_that_the_references_cannot_see(task: str, lag: int) -> None:
    of, question, labels = table(task, lag, steps=250)
    ours, marginal, last = (walk(one, question) for one in (boosting(of), Marginal(of), LastLabel(of)))
    assert ours.shape == marginal.shape
    assert ours.isfinite().all()
    # At a greater lag most of a sum is noise that no one can know.
    margin = 0.15 if task != "forecast" or lag == 1 else -0.3
    assert cost(ours[:, 150:], labels[:, 150:]) < cost(marginal[:, 150:], labels[:, 150:]) - margin
    assert cost(ours[:, 150:], labels[:, 150:]) < cost(last[:, 150:], labels[:, 150:]) - margin


@pytest.mark.parametrize("task", TASKS)
def test_a_life_goes_on_from_what_was_saved(task: str) -> None:
    of, question, _ = table(task, 3)
    one, other = boosting(of), boosting(of)
    other_start = walk(other, question, 0, 50)
    assert walk(one, question, 0, 70)[:, :50].equal(other_start)
    saved = pack(one.state_dict())
    twin = copy.deepcopy(one)
    rest = walk(one, question, 70)
    other.load_state_dict(unpack(*saved))
    assert pack(other.state_dict()) == saved == pack(twin.state_dict())
    assert other.fits == 2
    assert walk(other, question, 70).equal(rest)
    assert walk(twin, question, 70).equal(rest)
    assert differences(one.state_dict(), other.state_dict()) == []
    fresh = boosting(of)
    fresh.load_state_dict(unpack(*pack(boosting(of).state_dict())))
    assert walk(fresh, question, 0, 50).equal(other_start)


def test_it_fits_when_due_and_on_its_window_alone() -> None:
    of, question, labels = table("classify", 2, rows=1)
    question.inputs[..., -1] = torch.tensor(np.concatenate([[np.nan] * 2, labels[0, :-2, 0]]))
    one = boosting(of, every=20, window=30)
    for t in range(150):
        # The label of step t - 2 comes with step t, after a fit that was due before.
        assert one.labels == max(0, t - 2)
        walk(one, question, t, t + 1, 1)
        assert one.fits == max(0, t - 2) // 20
        if t - 2 == 60:
            assert one._data is not None
            assert one._data[1][:, 0].tolist() == labels[0, 30:60, 0].tolist()
            np.testing.assert_array_equal(one._data[0][:, :3], question.inputs[0, 30:60].numpy())
            assert one._data[0][:, 3].tolist() == question.inputs[0, 29:59, 2].tolist()


def test_before_the_first_fit_it_is_what_is_known_without_a_model() -> None:
    of, question, _ = table("classify")
    assert walk(boosting(of, every=1000), question).equal(walk(Marginal(of), question))
    of, question, _ = table("forecast")
    k = len(WIDTHS)
    assert walk(boosting(of, every=1000), question)[..., k : 2 * k].equal(walk(LastLabel(of), question)[..., k : 2 * k])


def test_the_label_is_an_input_only_if_it_may_be() -> None:
    of, question, _ = table("classify", label_as_input=False)
    one = boosting(of)
    walk(one, question)
    assert one._data is not None
    assert one._data[0].shape[1] == 2


@pytest.mark.parametrize("chunk", [1, 7])
def test_it_reads_the_label_known_before_the_newest_and_the_group(chunk: int) -> None:
    rows, steps = 3, 60
    of = Columns("classify", (Column("x"),), ("y",), tuple("abcd"))
    random = np.random.default_rng(1)
    known = np.where(random.random((rows, steps)) < 0.3, np.nan, random.integers(4, size=(rows, steps)))
    yes = torch.ones(rows, steps, dtype=torch.bool)
    reset = yes & (torch.arange(steps) == 20) & (torch.arange(rows)[:, None] == 1)
    inputs = torch.tensor(np.stack([random.normal(size=known.shape), known], -1))
    one, seen = boosting(of, groups=rows), []
    look = one._look
    one._look = lambda *given: seen.append(look(*given)) or seen[-1]  # type: ignore[method-assign]
    walk(one, Question(inputs, reset, yes, 0, torch.arange(rows)), steps=chunk)
    for row in range(rows):
        told = np.array([x for part_ in seen for x, _ in part_[row]])
        np.testing.assert_array_equal(told[:, :2], inputs[row].numpy())
        assert set(told[:, 3]) == {row}
        for step in range(steps):
            start = 20 if row == 1 and step >= 20 else 0
            before = [label for label in known[row, start:step] if label == label]
            np.testing.assert_equal(told[step, 2], [np.nan, *before][-1])


@pytest.mark.parametrize("task", ["classify", "regress"])
def test_it_learns_what_only_the_group_or_the_label_before_tells(task: Any) -> None:
    random, steps = np.random.default_rng(0), 200
    x = random.integers(2, size=(2, steps)).astype(float)
    of = Columns(task, (Column("x"),), ("y",), ("0", "1") if task == "classify" else ())
    by_group = np.stack([x[0], 1 - x[1]])
    by_past = random.integers(2, size=(2, steps)).astype(float)
    by_past[:, 2:] = 0
    for t in range(2, steps):
        by_past[:, t] = np.where(x[:, t] > 0, by_past[:, t - 2], random.integers(2, size=2))
    for labels, sure in ((by_group, np.ones_like(x) > 0), (by_past, x > 0)):
        known = np.concatenate([np.full((2, 1), np.nan), labels[:, :-1]], 1)
        no = torch.zeros(2, steps, dtype=torch.bool)
        inputs = torch.tensor(np.stack([x, known], -1))
        said = walk(boosting(of, groups=2, window=200), Question(inputs, no, ~no, 0, torch.arange(2)))[:, 150:]
        k = len(WIDTHS)
        value = said[..., 1].exp() if task == "classify" else said[:, :, 0, k]
        right = ((value > 0.5).numpy() == labels[:, 150:])[sure[:, 150:]]
        assert right.mean() > 0.9


def test_a_class_that_no_fit_has_seen_keeps_a_probability() -> None:
    of, question, _ = table("classify", rows=1)
    question.inputs[..., -1] = torch.where(question.inputs[..., -1].isnan(), math.nan, 1.0)
    said = walk(boosting(of), question)
    assert said.isfinite().all()
    torch.testing.assert_close(said.exp().sum(-1), torch.ones(1, 150, dtype=torch.float64))
    assert said[0, -1].exp()[1] > 0.95
    assert said[0, -1].exp()[0] > 1e-6


@pytest.mark.parametrize("task", TASKS)
def test_nothing_wild_stops_it(task: str) -> None:
    of, question, _ = table(task)
    question.inputs[:, :, 0] = math.nan
    question.inputs[:, ::7, 0] = 1e300
    if task != "classify":
        question.inputs[:, ::9, -1] = 1e12
        question.inputs[:, 100::9, -1] = 1e300
    question.mask[0, 20:40] = False
    question.reset[1, 50] = True
    said = walk(boosting(of), question)
    assert said.isfinite().all()
    assert not said[~question.mask].any()
    question.inputs[..., -1] = math.nan
    assert walk(boosting(of), question).isfinite().all()


def test_arguments_out_of_range_are_refused() -> None:
    of, _, _ = table("classify")
    for name in ("every", "window", "iterations"):
        with pytest.raises(UsageError, match=name):
            boosting(of, **{name: 0})


@pytest.mark.parametrize("task", ["classify", "regress"])
def test_a_column_without_any_value_in_the_window_is_no_obstacle(task: str) -> None:
    features, classes = (Column("a"), Column("b")), ("0", "1") if task == "classify" else ()
    of = Columns(task, features, ("y",), classes)  # type: ignore[arg-type]
    random = np.random.default_rng(0)
    inputs = random.normal(size=(1, 200, 3))
    inputs[0, 1:, 2] = inputs[0, :-1, 0] > 0  # the newest known label
    inputs[:, :150, 1], inputs[0, 0, 2] = np.nan, np.nan
    one = Boosting(of, every=50, window=80, iterations=5)
    for t in range(200):
        every = torch.ones(1, 1, dtype=torch.bool)
        said = one.predict(Question(torch.tensor(inputs[:, t : t + 1]), every & (t == 0), every, t, torch.tensor([0])))
        assert said.isfinite().all()
    assert one.fits >= 3
