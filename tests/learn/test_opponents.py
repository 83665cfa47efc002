"""The honest opponents are what they say."""

import copy
import math

import pytest
import torch

from pliant.core import Answer, Question, UsageError
from pliant.core.pack import differences, pack, unpack
from pliant.learn import Frozen, Majority, NoChange, Retrained
from pliant.learn.opponents import _merged
from pliant.models.table import TableModel
from pliant.streams import Stream
from tests.learn.test_descend import learner as table_learner
from tests.learn.worlds import CLASSES, Signs, items, late, learner, run
from tests.learn.worlds import life as new_life
from tests.streams.test_series import drain, world


def test_majority_is_the_estimator_of_krichevsky_and_trofimov() -> None:
    stream, counts = items(20), [0.5] * CLASSES
    majority = Majority(CLASSES)
    while (batch := stream.send(None)) and batch.question is not None:
        for answer in batch.answers:
            majority.learn(answer)
            for label in answer.targets[answer.learn_mask].tolist():
                counts[label] += 1
        said = majority.predict(batch.question)
        expected = torch.tensor([math.log(count / sum(counts)) for count in counts])
        assert said.shape == (4, 4, CLASSES)
        torch.testing.assert_close(said, expected.expand_as(said))


def test_no_change_repeats_the_last_known_label_of_each_stream() -> None:
    stream = late(Signs(80, batch=3))
    ours = NoChange(CLASSES)
    last: dict[int, int] = {}
    hits = [0.5, 0.5]
    while (batch := stream.send(None)) and batch.question is not None:
        for answer in batch.answers:
            ours.learn(answer)
            for row in range(3):
                if not bool(answer.learn_mask[row, 0]):
                    continue
                label = int(answer.targets[row, 0])
                if row in last:
                    hits[int(last[row] == label)] += 1
                last[row] = label
        said = ours.predict(batch.question)
        for row in range(3):
            if row not in last:
                expected = [math.log(0.5)] * 2
            else:
                stay = hits[1] / sum(hits)
                expected = [math.log(stay if c == last[row] else 1 - stay) for c in range(2)]
            torch.testing.assert_close(said[row, 0], torch.tensor(expected))
        torch.testing.assert_close(said.exp().sum(-1), torch.ones(3, 1))


def test_no_change_sees_several_labels_of_one_stream_in_order() -> None:
    ours = NoChange(3)
    yes = torch.ones(2, 4, dtype=torch.bool)
    targets = torch.tensor([[0, 0, 1, 1], [2, 2, 2, 2]])
    ours.learn(Answer(targets, yes, yes, 0, torch.tensor([1, 0])))
    assert ours.hits.tolist() == [1.5, 5.5]
    assert ours.last.tolist() == [2, 1]


def panel_run(stream: Stream, ours: object, opponent: object, replies: int) -> None:
    for _ in range(replies):
        batch = stream.send(None)
        assert batch is not None
        for answer in batch.answers:
            ours.learn(answer)  # type: ignore[attr-defined]
            opponent.learn(answer)  # type: ignore[attr-defined]
        if batch.question is not None:
            ours.predict(batch.question)  # type: ignore[attr-defined]
            opponent.predict(batch.question)  # type: ignore[attr-defined]


def test_frozen_is_the_learner_until_it_freezes_and_then_never_learns() -> None:
    stream = Signs(60)
    ours = learner(stream)
    frozen = Frozen(ours, after=20)
    panel_run(stream, ours, frozen, 10)
    assert frozen.output is ours.output
    panel_run(stream, ours, frozen, 5)
    kept = copy.deepcopy(frozen._copy)
    assert kept is not None
    assert kept.updates == 10
    panel_run(stream, ours, frozen, 40)
    assert frozen._copy is not None
    assert differences(kept.state_dict()["model"], frozen._copy.state_dict()["model"]) == []
    # Its memory of the stream went on.
    assert differences(kept.state_dict()["memory"], frozen._copy.state_dict()["memory"]) != []
    assert frozen.output is not None
    assert not frozen.output.equal(ours.output)


def test_retrained_is_trained_when_due_on_its_window_alone() -> None:
    stream = Signs(100)
    made: list[int] = []

    def make(number: int) -> object:
        made.append(number)
        return learner(stream, seed=number)

    opponent = Retrained(make, every=30, window=12, passes=3)  # type: ignore[arg-type]
    first = opponent._current
    panel_run(stream, learner(stream), opponent, 16)
    assert opponent._current is not first
    assert made == [0, 1]
    assert opponent._current.updates == 3 * 6  # passes over six questions of two answers
    assert [question.time for question, _ in opponent._pairs] == [9, 10, 11, 12, 13, 14]
    before = copy.deepcopy(opponent._current.state_dict()["model"])
    panel_run(stream, learner(stream), opponent, 10)
    assert differences(before, opponent._current.state_dict()["model"]) == []
    panel_run(stream, learner(stream), opponent, 5)
    assert made == [0, 1, 2]


def test_what_was_said_before_a_training_stands_after_it() -> None:
    stream = late(Signs(60))
    opponent = Retrained(lambda k: learner(stream, seed=k), every=10, window=10, passes=1)
    said: dict[int, torch.Tensor] = {}
    while batch := stream.send(None):
        for answer in batch.answers:
            kept = opponent.said(answer)
            assert kept is not None
            assert kept.equal(said[answer.time])
            opponent.learn(answer)
        if batch.question is None:
            continue
        said[batch.question.time] = opponent.predict(batch.question)
    assert opponent.trainings > 2


def test_all_of_them_are_scored_on_the_same_answers() -> None:
    this = new_life()
    run(this)
    counts = {name: told["bits"].count for name, (_, told) in this.panel.members.items()}
    assert set(counts.values()) == {this.scores["bits"].count}
    assert all(told["bits"].missed == 0 for _, told in this.panel.members.values())


def test_what_nobody_answers_is_forgotten() -> None:
    yes = torch.ones(1, 1, dtype=torch.bool)
    for opponent in (Majority(2, 5), NoChange(2, 5)):
        for time in range(20):
            opponent.predict(Question(torch.zeros(1, 1, 3), yes, yes, time, torch.zeros(1, dtype=torch.int64)))
        assert len(opponent._waiting) == 5
        assert opponent.said(Answer(yes.long(), yes, yes, 0, torch.zeros(1, dtype=torch.int64))) is None


def test_arguments_out_of_range_are_refused() -> None:
    with pytest.raises(UsageError, match="after"):
        Frozen(learner(Signs()), after=-1)
    with pytest.raises(UsageError, match="window"):
        Retrained(lambda k: learner(Signs()), every=1, window=0, passes=1)


@pytest.mark.parametrize("most", [1, 4, 100])
def test_neighbors_about_the_same_streams_are_one_question(most: int) -> None:
    here = world(50, 3, 1, 0, 2, seed=4)
    asked: dict[int, Question] = {}
    pairs = []
    for batch in drain(here.stream()):
        pairs += [
            (asked[answer.time], answer) for answer in batch.answers if answer.rows.equal(asked[answer.time].rows)
        ]
        if batch.question is not None:
            asked[batch.question.time] = batch.question
    merged = _merged(pairs, most)
    assert (len(merged) == len(pairs)) == (most == 1)
    for place in (0, 1):  # questions, answers: what stands in them is the same, in the same order
        for part in range(3):
            before, after = (torch.cat([one[place][part][0] for one in some]) for some in (pairs, merged))
            torch.testing.assert_close(before, after, equal_nan=True)
    for question, answer in merged:
        assert question.mask.shape == answer.target_mask.shape and question.time == answer.time
        assert question.mask.numel() <= max(most, 2)


def test_an_answer_in_parts_is_trained_on_whole() -> None:
    here = world(80, 6, 2, 0, 4, seed=3, missing=0.0)
    model = table_learner(here.source.columns, TableModel, here.stream(), 6, 6)
    retrained = Retrained(lambda _: copy.deepcopy(model), every=10**6, window=10**6, passes=1)
    answers, parts = 0, 0
    for batch in drain(here.stream()):
        for answer in batch.answers:
            retrained.learn(answer)
            answers, parts = answers + answer.target_mask.numel(), parts + (not answer.final)
        if batch.question is not None:
            retrained.predict(batch.question)
    assert parts > 3 and answers > 60
    waiting = sum(part.target_mask.numel() for some in retrained._parts.values() for part in some)
    assert sum(answer.target_mask.numel() for _, answer in retrained._pairs) == answers - waiting
    assert all(answer.rows.equal(question.rows) for question, answer in retrained._pairs)
    twin = Retrained(lambda _: copy.deepcopy(model), every=10**6, window=10**6, passes=1)
    twin.load_state_dict(unpack(*pack(retrained.state_dict())))
    assert differences(twin.state_dict(), retrained.state_dict()) == []
