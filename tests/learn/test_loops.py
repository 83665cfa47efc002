"""The loops: prequential is the loop as it is written, fit is many passes."""

from itertools import islice

import pytest

from pliant.core import UsageError
from pliant.core.pack import differences
from pliant.learn import Majority, Timed, fit, prequential
from tests.learn.worlds import CLASSES, Signs, late, learner, scores


def test_prequential_is_the_loop_as_it_is_written() -> None:
    stream, other = late(Signs()), late(Signs())
    ours, theirs = learner(stream), learner(other)
    mine, his = scores(), scores()
    output = None
    while batch := stream.send(output):
        for answer in batch.answers:
            mine.update(answer, ours.said(answer))
            ours.learn(answer)
        output = None if batch.question is None else ours.predict(batch.question)
    records = list(prequential(other, theirs, his))
    assert len(records) == 64
    assert differences(ours.state_dict(), theirs.state_dict()) == []
    assert mine.value() == his.value()
    assert mine["bits"].count == sum(record.learned for record in records)


def test_scores_are_of_what_was_said_before_it_was_learned() -> None:
    stream = Signs(30)
    ours = learner(stream)
    told = scores()
    for record in prequential(stream, ours, told):
        if record.outcome == "updated" and record.update == 1:
            first = told["bits"].value() * 0.6931471805599453
            assert first == pytest.approx(record.nats, rel=1e-6)


def test_opponents_get_the_same_questions_and_answers() -> None:
    stream = late(Signs())
    ours, told = learner(stream), scores()
    panel = {"majority": (Timed(Majority(CLASSES)), scores())}
    alone, alone_told = learner(late(Signs())), scores()
    list(prequential(stream, ours, told, panel))
    list(prequential(late(Signs()), alone, alone_told))
    majority, its_scores = panel["majority"]
    assert its_scores["bits"].count == told["bits"].count
    assert majority.seconds > 0
    assert differences(ours.state_dict(), alone.state_dict()) == []


def test_a_reply_with_several_answers_is_one_record() -> None:
    class Two(Signs):
        def send(self, output):  # type: ignore[no-untyped-def]
            first = super().send(output)
            if first is None or first.question is None or first.question.time % 2 or not first.answers:
                return first
            (only,) = first.answers
            half = only.target_mask.clone()
            half[0] = False
            parts = [only._replace(target_mask=m, learn_mask=m, final=f) for m, f in ((half, False), (~half, True))]
            return first._replace(answers=tuple(parts))

    stream = Two(10)
    records = list(prequential(stream, learner(stream), scores()))
    assert sum(record.learned for record in records) == 20
    assert records[2].learned == 2


def test_fit_makes_passes_over_a_fixed_set() -> None:
    stream = Signs(10)
    pairs = [pair for index in range(10) if (pair := stream.pair(index))]
    ours = learner(stream)
    records = list(fit(ours, pairs, passes=30))
    assert len(records) == 300
    assert ours.updates == 300
    assert sum(r.nats for r in records[-10:]) < 0.5 * sum(r.nats for r in records[:10])
    assert list(islice(fit(ours, pairs, passes=0), 1)) == []
    with pytest.raises(UsageError, match="passes"):
        list(fit(ours, pairs, passes=-1))
