"""Rows as questions and late answers: every label once, in time, and never before."""

import copy
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from pliant.core import KNOWN, Answer, Batch, Question, UsageError, seeded
from pliant.core.columns import Column, Columns
from pliant.core.pack import differences, pack, unpack
from pliant.learn import Learner, bptt
from pliant.learn.references import LastLabel
from pliant.measure.scores import Accuracy, TemporalKappa
from pliant.models.table import TableModel
from pliant.optim import adamw
from pliant.recipes.watch import Watched
from pliant.streams._named import Arrays, regimes
from pliant.streams._series import Series, Source, series
from pliant.streams._table import Block

CLASSES = 3


class Rows:
    """Rows in memory, in blocks of a few; with `breaks`, the source gives up after so many."""

    def __init__(self, columns: Columns, features: np.ndarray, targets: np.ndarray, groups: np.ndarray,
                 names: tuple[str, ...] = (), size: int = 5, breaks: int | None = None):  # fmt: skip
        self.columns, self.groups, self.notes = columns, names, ()
        self.features, self.targets, self.of, self.size, self.breaks = features, targets, groups, size, breaks
        self.rows = len(features)

    def blocks(self, start: int = 0) -> Iterator[Block]:
        stop = self.rows if self.breaks is None else self.breaks
        edges = [start, *(row for row in range(0, stop, self.size) if row > start), stop]
        for first, end in itertools.pairwise(edges):
            if first < end:
                span = slice(first, end)
                counted = Counter({"row": end - first})
                yield Block(self.features[span], self.targets[span], self.of[span], first, counted)
        if self.breaks is not None:
            raise UsageError("the source breaks off")


class World(NamedTuple):
    """A source and how it is asked."""

    source: Rows
    ahead: int
    chunk: int
    limit: int | None = None

    def stream(self, **changed: Any) -> Series:
        source, ahead, chunk, limit = self._replace(**changed)
        return Series(source, chunk=chunk, ahead=ahead, limit=limit)

    @property
    def rows(self) -> int:
        return min(self.source.rows, self.source.rows if self.limit is None else self.limit)

    def steps(self) -> list[tuple[int, int]]:
        """Stream and step of each row."""
        seen: Counter[int] = Counter()
        found = []
        for group in self.source.of[: self.rows].tolist():
            found.append((group, seen[group]))
            seen[group] += 1
        return found

    def label(self, stream: int, step: int) -> np.ndarray | None:
        """Of a step, None beyond the end; step may be before the first."""
        rows = [row for row, group in enumerate(self.source.of[: self.rows].tolist()) if group == stream]
        row = step + self.ahead
        return self.source.targets[rows[row]] if 0 <= row < len(rows) else None


def world(rows: int, chunk: int = 1, delay: int = 0, horizon: int = 0, groups: int = 0, seed: int = 0,
          limit: int | None = None, missing: float = 0.2, **more: Any) -> World:  # fmt: skip
    random = np.random.default_rng(seed)
    task = "forecast" if horizon else "classify"
    names = tuple("abcd"[:groups])
    targets = ("y",) if seed % 2 or not horizon else ("y", "z")
    features = (Column("u"), Column("k", "category", ("p", "q")))
    columns = Columns(task, features, targets, () if horizon else tuple("rst"), (horizon or 1) + delay)
    shape = (rows, len(targets))
    values = random.normal(size=shape).cumsum(0) if horizon else random.integers(CLASSES, size=shape).astype(float)
    values[random.random(shape) < missing] = np.nan
    inputs = np.stack([random.normal(size=rows), random.integers(3, size=rows)], 1)
    of = random.integers(max(1, groups), size=rows)
    return World(Rows(columns, inputs, values, of, names, **more), horizon, chunk, limit)


worlds = st.fixed_dictionaries({
    "rows": st.integers(1, 40), "chunk": st.integers(1, 9), "delay": st.integers(0, 7),
    "horizon": st.sampled_from([0, 0, 1, 2, 5]), "groups": st.integers(0, 4), "seed": st.integers(0, 999),
    "limit": st.none() | st.integers(0, 45), "size": st.integers(1, 50),
})  # fmt: skip
"""Arguments of `world`."""


def drain(stream: Any, most: int = 1000) -> list[Batch]:
    batches: list[Batch] = []
    while len(batches) < most and (batch := stream.send(None)):
        batches.append(batch)
    return batches


def plain(batches: list[Batch]) -> Any:
    return [(list(map(tuple, batch.answers)), batch.question and tuple(batch.question)) for batch in batches]


def each_step(question: Question) -> Iterator[tuple[int, int]]:
    """Stream and place in the question's inputs of each of its steps, in the order of the rows."""
    for row in range(question.inputs.shape[0]):
        for step in range(question.inputs.shape[1]):
            yield row, step


@given(options=worlds)
def test_inputs_are_the_features_and_the_newest_label_that_is_known(options: dict[str, Any]) -> None:
    here = world(**options)
    questions = [batch.question for batch in drain(here.stream()) if batch.question is not None]
    found = [(question, row, step) for question in questions for row, step in each_step(question)]
    assert len(found) == here.rows
    for place, ((question, row, step), (stream, s)) in enumerate(zip(found, here.steps(), strict=True)):
        assert question.rows[row] == stream
        assert bool(question.reset[row, step]) == (s == 0)
        known = here.label(stream, s - here.source.columns.lag)
        expected = np.full(here.source.targets.shape[1], np.nan) if known is None else known
        np.testing.assert_array_equal(question.inputs[row, step, :2].numpy(), here.source.features[place])
        np.testing.assert_array_equal(question.inputs[row, step, 2:].numpy(), expected)


@given(options=worlds)
@example(options={"rows": 20, "horizon": 1, "missing": 0})
@example(options={"rows": 40, "chunk": 4, "horizon": 4, "missing": 0})
@example(options={"rows": 40, "chunk": 4, "horizon": 1, "groups": 3, "missing": 0})
@example(options={"rows": 21, "chunk": 9, "horizon": 2, "missing": 0})
def test_every_label_comes_once_in_time_and_rightly(options: dict[str, Any]) -> None:
    here = world(**options)
    columns, batches = here.source.columns, drain(here.stream())
    asked: dict[int, Question] = {}
    steps_of: dict[int, list[tuple[int, int]]] = {}
    order, place = here.steps(), 0
    so_far: Counter[int] = Counter()
    seen: Counter[tuple[int, int]] = Counter()
    closed: set[int] = set()
    for batch in batches:
        for answer in batch.answers:
            question, mine = asked[answer.time], steps_of[answer.time]
            assert answer.time not in closed
            closed |= {answer.time} if answer.final else set()
            width = question.inputs.shape[1]
            for row, stream in enumerate(answer.rows.tolist()):
                at = question.rows.tolist().index(stream)
                for step in range(width):
                    owner, s = mine[at * width + step]
                    assert owner == stream
                    label = here.label(stream, s)
                    known = label is not None and not np.isnan(label).any()
                    assert bool(answer.target_mask[row, step]) == bool(answer.learn_mask[row, step]) == known
                    assert int(answer.tags["group"][row, step]) == stream
                    if columns.task == "classify":
                        # The newest of the labels that were known when the step was asked.
                        past = [here.label(stream, before) for before in range(s - columns.lag + 1)]
                        labels = [int(one[0]) for one in past if one is not None and not np.isnan(one[0])]
                        assert int(answer.tags[KNOWN][row, step]) == [-1, *labels][-1]
                    seen[stream, s] += 1
                    if not known:
                        continue
                    assert label is not None
                    np.testing.assert_array_equal(answer.targets[row, step].numpy(), label if here.ahead else label[0])
                    # While something is asked, nothing is known before the step `lag` later is about to be.
                    if batch.question is not None:
                        assert so_far[stream] >= s + columns.lag
                        assert so_far[stream] > s + here.ahead or stream in batch.question.rows.tolist()
        if (question := batch.question) is not None:
            assert question.time not in asked
            asked[question.time] = question
            count = question.mask.numel()
            steps_of[question.time] = order[place : place + count]
            so_far.update(stream for stream, _ in order[place : place + count])
            place += count
    # A step without a label is answered too, once it is known that none will come.
    assert seen == Counter(dict.fromkeys(order, 1))
    assert closed == set(asked)
    assert list(asked) == sorted(asked)


@given(options=worlds, chunk=st.integers(1, 9))
def test_what_is_asked_and_answered_does_not_depend_on_the_chunk(options: dict[str, Any], chunk: int) -> None:
    here = world(**options)

    def rows(stream: Series) -> Any:
        batches = drain(stream)
        asked = [batch.question for batch in batches if batch.question is not None]
        inputs = [question.inputs[at] for question in asked for at in each_step(question)]
        said: dict[int, list[Any]] = {}
        for batch in batches:
            for answer in batch.answers:
                for at in answer.target_mask.nonzero().tolist():
                    said.setdefault(int(answer.rows[at[0]]), []).append(answer.targets[tuple(at)])
        return torch.stack(inputs) if inputs else None, said

    assert differences(rows(here.stream()), rows(here.stream(chunk=chunk))) == []


@given(options=worlds, position=st.integers(0, 45))
def test_a_position_is_saved_copied_and_resumed_to_the_bit(options: dict[str, Any], position: int) -> None:
    here = world(**options)
    stream = here.stream()
    drain(stream, position)
    state, twin = unpack(*pack(stream.state_dict())), copy.deepcopy(stream)
    rest, end = plain(drain(stream)), stream.state_dict()
    other = here.stream()
    drain(other, 3)
    other.load_state_dict(state)
    for again in (other, twin):
        assert differences(plain(drain(again)), rest) == []
        assert again.problems == stream.problems
        assert differences(again.state_dict(), end) == []
        assert again.send(None) is None


@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize("delay", [0, 5])
def test_temporal_kappa_compares_with_what_no_change_knows(delay: int, groups: int) -> None:
    here = world(400, chunk=7, delay=delay, groups=groups, missing=0.3)
    # Labels that stay for long, so that no-change says the last one.
    here.source.targets[:] = np.where(np.isnan(here.source.targets), np.nan, np.arange(400)[:, None] // 60 % CLASSES)
    kappa, accuracy, reference = TemporalKappa(), Accuracy(), LastLabel(here.source.columns)
    wrong, chance = TemporalKappa(), Accuracy()
    for batch in drain(here.stream()):
        for answer in batch.answers:
            said = reference.said(answer)
            assert said is not None
            knew = answer._replace(target_mask=answer.target_mask & (answer.tags[KNOWN] >= 0))
            for score in (kappa, accuracy):
                score.update(answer if score is kappa else knew, said)
            others = said.roll(1, -1)
            wrong.update(answer, others)
            chance.update(knew, others)
            reference.learn(answer)
        if batch.question is not None:
            reference.predict(batch.question)
    assert kappa.value() == 0
    stayed = accuracy.value()
    assert 0.5 < stayed < 1
    assert wrong.value() == pytest.approx((chance.value() - stayed) / (1 - stayed))


@pytest.mark.parametrize("groups", [0, 3])
def test_problems_are_counted_once_however_often_it_is_resumed(groups: int) -> None:
    here = world(40, chunk=3, groups=groups, size=7)
    stream = here.stream()
    for _ in range(60):
        state = unpack(*pack(stream.state_dict()))
        stream = here.stream()
        stream.load_state_dict(state)
        stream.send(None)
    assert stream.row == 40
    assert stream.problems == {"row": 40}


@given(options=worlds, breaks=st.integers(0, 40))
def test_a_source_that_breaks_off_ends_as_one_that_is_over_there(options: dict[str, Any], breaks: int) -> None:
    here = world(**options)
    breaks = min(breaks, here.source.rows)
    broken = copy.copy(here.source)
    broken.breaks = breaks
    stream = here.stream(source=broken)
    found = plain(drain(stream))
    limit = breaks if here.limit is None else min(breaks, here.limit)
    assert differences(found, plain(drain(here.stream(limit=limit)))) == []
    # Whether there are more rows is looked up only when they are wanted.
    if here.limit is None or here.limit > breaks:
        assert stream.error == "the source breaks off"
    assert stream.send(None) is None


def learner(columns: Columns, streams: int, window: int) -> Learner:
    with seeded(0):
        model = TableModel(columns, width=4, depth=1)
        with torch.no_grad():
            model.head.weight.normal_()
    return Learner(model, adamw(model, 1e-2), bptt(window), streams=streams, remember=4096)


def leaks(one: Series, two: Series, legal: Any) -> str | None:
    """Run a learner on both; `legal(question, row, step)` says whether a step may know what differs."""
    ours, theirs = (learner(stream.columns, stream.streams, 8) for stream in (one, two))
    while (mine := one.send(None)) is not None:
        his = two.send(None)
        assert his is not None
        if mine.question is None or his.question is None:
            return None
        first = [legal(mine.question, row, step) for row, step in each_step(mine.question)]
        if not any(first) and differences(plain([mine._replace(answers=())]), plain([his._replace(answers=())])):
            return f"question {mine.question.time} knows it"
        for answer, altered in zip(mine.answers, his.answers, strict=True):
            ours.learn(answer)
            theirs.learn(altered)
        output, other = ours.predict(mine.question), theirs.predict(his.question)
        # Within a question, the steps before the first that may know.
        for (row, step), late in zip(each_step(mine.question), first, strict=True):
            if late:
                return None
            if (
                not mine.question.inputs[row, step]
                .nan_to_num(nan=-9)
                .equal(his.question.inputs[row, step].nan_to_num(nan=-9))
            ):
                return f"input {mine.question.time} + {step} knows it"
            if not output[row, step].equal(other[row, step]):
                return f"output {mine.question.time} + {step} knows it"
    return None


@pytest.mark.parametrize(
    ("horizon", "groups", "delay", "chunk"),
    [(0, 0, 0, 1), (0, 0, 2, 4), (0, 3, 0, 4), (0, 3, 2, 1), (1, 0, 0, 4), (1, 3, 0, 4), (3, 0, 2, 4), (3, 3, 2, 4)],
)
def test_nothing_is_known_of_a_label_before_its_time(horizon: int, groups: int, delay: int, chunk: int) -> None:
    true = world(40, chunk, delay, horizon, groups, seed=3, missing=0.1)
    for row in (0, 17):
        targets = true.source.targets.copy()
        targets[row:] = targets[row:] + 1 if horizon else (targets[row:] + 1) % CLASSES
        altered = copy.copy(true.source)
        altered.targets = targets
        assert leaks(true.stream(), true.stream(source=altered), Legal(true, row)) is None


class Legal:
    """Whether a step may know the values of the rows from `row` on; asked about each step, in order."""

    def __init__(self, here: World, row: int):
        self.behind = here.source.columns.lag - here.ahead
        self.first: dict[int, int] = {}  # step of each stream whose row is altered
        for stream, step in here.steps()[row:]:
            self.first.setdefault(stream, step)
        self.asked: Counter[int] = Counter()
        self.learned = False  # what is learned from one stream, all know

    def __call__(self, question: Question, row: int, step: int) -> bool:
        stream, asking = int(question.rows[row]), question.rows.tolist()
        if row == step == 0:
            self.learned = any(
                self.asked[other] >= first + self.behind
                and (self.behind > 0 or self.asked[other] > first or other in asking)
                for other, first in self.first.items()
            )
        own = stream in self.first and self.asked[stream] >= self.first[stream] + self.behind
        self.asked[stream] += 1
        return own or self.learned


class Peeking(Series):
    """Puts the label of the row itself into the inputs."""

    def _ask(self, features: np.ndarray, groups: np.ndarray, steps: np.ndarray) -> Question:
        question = super()._ask(features, groups, steps)
        peeked = torch.from_numpy(np.nan_to_num(self.values[0, steps % self.values.shape[1], 0]))
        return question._replace(inputs=question.inputs + torch.stack([peeked, 0 * peeked, 0 * peeked], -1))


def test_a_stream_that_peeks_is_caught() -> None:
    true = world(40, missing=0)
    altered = copy.copy(true.source)
    altered.targets = (true.source.targets + (np.arange(40) >= 20)[:, None]) % CLASSES
    found = leaks(Peeking(true.source), Peeking(altered), lambda question, row, step: question.time + step > 20)
    assert found is not None
    assert "20" in found


def test_a_watched_stream_asks_the_same_is_copied_and_resumed() -> None:
    here = world(60, chunk=4, seed=5)
    stream = Watched(here.stream(), here.source.columns)
    assert differences(plain(drain(copy.deepcopy(stream))), plain(drain(here.stream()))) == []
    drain(stream, 5)
    twin, other = copy.deepcopy(stream), Watched(here.stream(), here.source.columns)
    assert type(twin) is Watched
    other.load_state_dict(unpack(*pack(stream.state_dict())))
    rest = plain(drain(stream))
    for again in (twin, other):
        assert differences(plain(drain(again)), rest) == []
        assert again.drift() == {"u": None, "k": None}
        again._window = again._window + 1
        assert set(again.drift()) == {"u", "k"}


def test_drift_is_the_move_of_the_mean_in_deviations_before() -> None:
    x = np.concatenate([np.arange(100) % 2, 5 + np.zeros(100)])[:, None]
    columns = Columns("classify", (Column("x"),), ("y",), ("a", "b"))
    stream = Watched(Series(Arrays(columns, x, x * 0), chunk=10), columns)
    drain(stream, 10)
    assert stream.drift() == {"x": None}
    drain(stream, 10)
    assert stream.drift() == {"x": pytest.approx((5 - 0.5) / 0.5)}


def test_a_forecast_of_given_rows_looks_as_far_ahead_as_they_say() -> None:
    here = world(30, horizon=5, delay=2)
    given = series(here.source, delay=2)
    assert differences(plain(drain(given)), plain(drain(here.stream()))) == []


def test_what_series_takes() -> None:
    source = regimes(rows=2000, length=500, seed=1)
    stream = series(source, chunk=64)
    assert stream.spec == (10, 3, 1, 64)
    asked = sum(int(batch.question.mask.sum()) for batch in drain(stream) if batch.question is not None)
    assert asked == 2000
    assert isinstance(source, Source)
    assert isinstance(world(3).source, Source)
    with pytest.raises(UsageError, match="chunk is 0"):
        Series(source, chunk=0)


def rows_of(source: Source, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
    blocks = list(source.blocks(start))
    assert [block.first for block in blocks[:1]] == [start] * len(blocks[:1])
    assert all(len(block.groups) for block in blocks)
    empty = (np.zeros((0, source.columns.num_features - 1)), np.zeros((0, 1)))
    return tuple(
        np.concatenate([none, *parts]) for none, *parts in zip(empty, *((b.features, b.targets) for b in blocks))
    )


@given(start=st.integers(0, 3000), seed=st.integers(0, 3))
def test_generated_rows_are_a_function_of_seed_and_place(start: int, seed: int) -> None:
    source = regimes(rows=2500, seed=seed, length=700)
    for whole, rest in zip(rows_of(source), rows_of(source, start), strict=True):
        np.testing.assert_array_equal(whole[start:], rest)


def test_a_rule_comes_back_and_noise_is_as_said() -> None:
    quiet = regimes(rows=4000, length=1000, concepts=2, noise=0.0, seed=2)
    loud = regimes(rows=4000, length=1000, concepts=2, noise=0.3, seed=2)
    labels = [np.concatenate([block.targets for block in source.blocks()]) for source in (quiet, loud)]
    # A label that is drawn is another one in two of three cases.
    assert float((labels[0] != labels[1]).mean()) == pytest.approx(0.2, abs=0.03)
    for options in ({"rows": 0}, {"length": 0}, {"concepts": 0}, {"noise": 1.5}):
        with pytest.raises(UsageError, match="regimes"):
            regimes(**options)  # type: ignore[arg-type]


def test_answers_are_plain_values_of_the_right_kind() -> None:
    for horizon, dtype in ((0, torch.int64), (2, torch.float64)):
        answers: list[Answer] = [
            answer for batch in drain(world(20, 4, horizon=horizon).stream()) for answer in batch.answers
        ]
        assert {answer.targets.dtype for answer in answers} == {dtype}
        assert all(not math.isnan(float(answer.targets.sum())) for answer in answers)
