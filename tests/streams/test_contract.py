"""The conformance suite of streams: the same again, in order, resumable, and without a leak."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch

from pliant.core import Answer, Batch, Question
from pliant.core.pack import differences, pack, unpack
from pliant.streams import Stream, drift
from pliant.streams.base import Passive
from tests.learn.worlds import items, learner
from tests.streams.cases import CASES, QUESTIONS, Case

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def drain(stream: Stream, most: int = 1000) -> list[Batch]:
    batches: list[Batch] = []
    while len(batches) < most and (batch := stream.send(None)):
        batches.append(batch)
    return batches


def plain(batch: Batch) -> Any:
    """As nested plain values, which can be compared to the bit."""
    return [tuple(answer) for answer in batch.answers], None if batch.question is None else tuple(batch.question)


def same(one: list[Batch], two: list[Batch]) -> bool:
    return differences([plain(batch) for batch in one], [plain(batch) for batch in two]) == []


def make(case: Case) -> Stream:
    return case.wrap(case.source())


@every_case
def test_the_same_seed_gives_the_same_and_two_streams_do_not_disturb_each_other(case: Case) -> None:
    expected = drain(make(case))
    one, two = make(case), make(case)
    found: list[Batch] = []
    while batch := one.send(None):
        found.append(batch)
        two.send(None)
        two.send(None)
    assert same(found, expected)


@every_case
@pytest.mark.parametrize("position", [0, 1, 7, QUESTIONS, QUESTIONS + 2])
def test_a_position_is_saved_and_resumed_to_the_bit(case: Case, position: int) -> None:
    stream = make(case)
    drain(stream, position)
    state = unpack(*pack(stream.state_dict()))
    twin = copy.deepcopy(stream)
    rest = drain(stream)
    other = make(case)
    drain(other, 3)
    other.load_state_dict(state)
    assert same(drain(other), rest)
    assert same(drain(twin), rest)


@every_case
def test_every_question_is_asked_once_answered_once_and_then_it_ends(case: Case) -> None:
    stream = make(case)
    batches = drain(stream)
    assert stream.send(None) is None
    questions = [batch.question for batch in batches if batch.question is not None]
    answers = [answer for batch in batches for answer in batch.answers]
    assert len(questions) == len(answers) == QUESTIONS
    times = [question.time for question in questions]
    assert times == sorted(set(times)) == [answer.time for answer in answers]
    assert all(batch.question is None for batch in batches[QUESTIONS:])
    for i, batch in enumerate(batches):
        assert all(i == times.index(answer.time) + 1 + case.delay for answer in batch.answers)


@every_case
def test_questions_have_the_shape_that_the_spec_says(case: Case) -> None:
    stream = make(case)
    features, outputs, rows, steps = stream.spec
    for batch in drain(stream):
        if (question := batch.question) is not None:
            assert question.inputs.shape == (rows, steps, features)
            assert question.reset.shape == question.mask.shape == (rows, steps)
            assert question.reset.dtype == question.mask.dtype == torch.bool
            assert question.rows.equal(torch.arange(rows))
        for answer in batch.answers:
            assert answer.targets.shape == answer.target_mask.shape == answer.learn_mask.shape == (rows, steps)
            assert 0 <= int(answer.targets.min()) <= int(answer.targets.max()) < outputs
            assert not (answer.learn_mask & ~answer.target_mask).any()


# No leak


class Tamper(Stream):
    """Alters every target of the questions from time `start` on, right at the source."""

    def __init__(self, inner: Stream, start: int):
        self.inner, self.spec, self.start = inner, inner.spec, start

    def send(self, output: torch.Tensor | None) -> Batch | None:
        batch = self.inner.send(output)
        return batch and Batch(tuple(map(self._alter, batch.answers)), batch.question)

    def _alter(self, answer: Answer) -> Answer:
        if answer.time < self.start:
            return answer
        return answer._replace(targets=(answer.targets + 1) % self.spec.num_outputs)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.inner.load_state_dict(state)


def leaks(build: Callable[[Callable[[Stream], Stream]], Stream], start: int, delay: int) -> str | None:
    """Run a learner on a stream and on its twin with another future; where the two differ too early.

    `build(tamper)` makes the stream, with `tamper` around its source. The altered answers may be
    known `delay` questions after the one that follows theirs, not before.
    """
    true, other = build(lambda source: source), build(lambda source: Tamper(source, start))
    ours, theirs = learner(true), learner(other)
    one = two = None
    while (mine := true.send(one)) is not None:
        his = other.send(two)
        assert his is not None
        asked, also = mine.question, his.question
        steps = true.spec.steps
        if asked is not None and asked.time > start + delay * steps:
            return None
        if differences(plain(mine), plain(his)):
            return f"what was said before question {asked and asked.time} knows the answer to {start}"
        for answer, altered in zip(mine.answers, his.answers, strict=True):
            ours.learn(answer)
            theirs.learn(altered)
        if asked is None or also is None:
            return None
        one, two = ours.predict(asked), theirs.predict(also)
        if not one.equal(two):
            return f"the output for question {asked.time} knows the answer to {start}"
    return None


def times(case: Case) -> list[int]:
    return [batch.question.time for batch in drain(make(case)) if batch.question is not None]


@every_case
@pytest.mark.parametrize("place", [0, 11, QUESTIONS - 2])
def test_another_future_has_the_same_past(case: Case, place: int) -> None:
    found = leaks(lambda tamper: case.wrap(tamper(case.source())), times(case)[place], case.delay)
    assert found is None


def test_other_labels_of_images_not_met_yet_have_the_same_past() -> None:
    true = items(12)
    order = true._order(0)
    for start in (0, 3, 5):
        labels = true.labels.clone()
        labels[order[start * 4 :]] = 1 - labels[order[start * 4 :]]
        one, two = drain(items(6)), drain(items(6, labels=labels))
        assert same(one[: start + 1], two[: start + 1])
        assert not same(one[start + 1 :], two[start + 1 :])


class _Leaky(Stream):
    """Looks one reply ahead and does something with it that it must not."""

    def __init__(self, inner: Stream):
        self.inner, self.spec = inner, inner.spec
        self.ahead = inner.send(None)

    def send(self, output: torch.Tensor | None) -> Batch | None:
        now, self.ahead = self.ahead, self.inner.send(output)
        return now and self.use(now, self.ahead)

    def use(self, now: Batch, ahead: Batch | None) -> Batch:
        raise NotImplementedError

    state_dict = load_state_dict = NotImplemented  # type: ignore[assignment]


class InTheInputs(_Leaky):
    """The coming target is added to the inputs."""

    def use(self, now: Batch, ahead: Batch | None) -> Batch:
        if now.question is None or ahead is None or not ahead.answers:
            return now
        hint = 1e-3 * ahead.answers[0].targets[..., None]
        return now._replace(question=now.question._replace(inputs=now.question.inputs + hint))


class TooEarly(_Leaky):
    """The answer to a question comes together with it."""

    def use(self, now: Batch, ahead: Batch | None) -> Batch:
        return now._replace(answers=now.answers + (ahead.answers if ahead else ()))


class InTheMask(_Leaky):
    """A step of class 1 is marked by a reset."""

    def use(self, now: Batch, ahead: Batch | None) -> Batch:
        if now.question is None or ahead is None or not ahead.answers:
            return now
        return now._replace(question=now.question._replace(reset=ahead.answers[0].targets == 1))


@pytest.mark.parametrize("leaky", [InTheInputs, TooEarly, InTheMask])
@pytest.mark.parametrize("place", [0, 11])
def test_a_stream_that_leaks_is_caught(leaky: type[_Leaky], place: int) -> None:
    found = leaks(lambda tamper: leaky(tamper(items(QUESTIONS))), place * 4, 0)
    assert found is not None
    assert f"answer to {place * 4}" in found


# What each wrapper does


def answers_of(stream: Stream) -> list[Answer]:
    return [answer for batch in drain(stream) for answer in batch.answers]


def questions_of(stream: Stream) -> list[Question]:
    return [batch.question for batch in drain(stream) if batch.question is not None]


def test_permute_reorders_inputs_and_changes_nothing_else() -> None:
    natural, moved = questions_of(items(40)), questions_of(drift.permute(items(40), every=30, seed=1))
    for i, (one, two) in enumerate(zip(natural, moved, strict=True)):
        assert one.inputs.flatten(1).sort(1).values.equal(two.inputs.flatten(1).sort(1).values)
        assert differences(tuple(one._replace(inputs=two.inputs)), tuple(two)) == []
        for row in range(4):
            assert one.inputs[row].equal(two.inputs[row]) == ((4 * i + row) // 30 == 0)
    # One order for a whole task, another one in the next.
    flat = torch.cat([question.inputs.flatten(1) for question in moved])
    items_flat = torch.cat([question.inputs.flatten(1) for question in natural])
    orders = [(items_flat[k, :, None] == flat[k, None, :]).int().argmax(0).tolist() for k in range(160)]
    assert all(orders[k] == orders[30 * (k // 30)] for k in range(160))
    assert len({tuple(order) for order in orders}) == 6


def test_tasks_that_return_are_the_same_again() -> None:
    whole, back = drift.permute(items(40), every=30, seed=1), drift.permute(items(40), every=30, returning=2, seed=1)
    natural = torch.cat([question.inputs.flatten(1) for question in questions_of(items(40))])
    moved = torch.cat([question.inputs.flatten(1) for question in questions_of(back)])
    for k in range(160):
        assert moved[k].equal(natural[k, drift.permutation(k // 30 % 2, natural.shape[1], seed=1)])
    new = torch.cat([question.inputs.flatten(1) for question in questions_of(whole)])
    assert new[:60].equal(moved[:60]) and not new[90:120].equal(moved[90:120])
    back = drift.permute(items(40), every=30, returning=2)
    tags = torch.cat([answer.tags["task"][:, 0] for answer in answers_of(back)])
    assert tags.tolist() == [k // 30 % 2 for k in range(160)]


def test_relabel_renames_classes_and_changes_nothing_else() -> None:
    one, two = answers_of(items(40)), answers_of(drift.relabel(items(40), every=30, seed=3))
    for task in range(6):
        pairs = {
            (int(a.targets[r, 0]), int(b.targets[r, 0]))
            for i, (a, b) in enumerate(zip(one, two, strict=True))
            for r in range(4)
            if (4 * i + r) // 30 == task
        }
        assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 2
        assert task or pairs == {(0, 0), (1, 1)}
    assert differences([tuple(q) for q in questions_of(items(40))],
                       [tuple(q) for q in questions_of(drift.relabel(items(40), every=30))]) == []  # fmt: skip


def test_redraw_gives_each_item_one_class_per_task() -> None:
    said = answers_of(drift.redraw(items(60), every=80, items=24, seed=1))
    drawn: dict[tuple[int, int], set[int]] = {}
    for answer in said:
        for row in range(4):
            key = int(answer.tags["task"][row, 0]), int(answer.tags["item"][row, 0])
            drawn.setdefault(key, set()).add(int(answer.targets[row, 0]))
    assert all(len(classes) == 1 for classes in drawn.values())
    differ = sum(drawn[0, item] != drawn[1, item] for item in range(24))
    assert 4 <= differ <= 20


def test_visits_tell_first_from_later_ones_and_held_out_ones() -> None:
    source = items(60)
    met: set[tuple[int, int]] = set()
    for answer in answers_of(drift.visits(drift.permute(source, every=44), items=24)):
        now = [(int(answer.tags["task"][row, 0]), int(answer.tags["item"][row, 0])) for row in range(4)]
        for row, key in enumerate(now):
            held_out = bool(source.held_out[key[1]])
            expected = 2 if held_out else int(key in met)
            assert int(answer.tags["visit"][row, -1]) == expected
        met |= set(now)


def test_a_fixed_share_is_held_out_and_never_learned_from() -> None:
    source = items(60)
    assert int(source.held_out.sum()) == 6
    for answer in answers_of(source):
        held = source.held_out[answer.tags["item"][:, 0]]
        assert answer.target_mask[:, -1].all()
        assert not answer.learn_mask[held].any()
        assert answer.learn_mask[~held, -1].all()


def test_each_pass_shows_every_item_once() -> None:
    shown = torch.cat([answer.tags["item"][:, 0] for answer in answers_of(items(60))])
    for turn in range(10):
        assert shown[24 * turn : 24 * (turn + 1)].sort().values.equal(torch.arange(24))
    assert not shown[:24].equal(shown[24:48])


def test_hide_withholds_about_its_rate_and_delay_moves_nothing_else() -> None:
    shown = torch.cat([answer.target_mask[:, -1] for answer in answers_of(drift.hide(items(60), rate=0.4))])
    assert 0.45 < float(shown.float().mean()) < 0.75
    assert same_answers(answers_of(items(40)), answers_of(drift.delay(items(40), questions=7)))


def same_answers(one: list[Answer], two: list[Answer]) -> bool:
    return differences([tuple(a) for a in one], [tuple(a) for a in two]) == []


def test_shards_together_are_the_whole() -> None:
    whole = questions_of(items(20))
    parts = [questions_of(drift.shard(items(20), rank=rank, world=3)) for rank in range(3)]
    for i, question in enumerate(whole):
        for rank in range(3):
            assert parts[rank][i].inputs.equal(question.inputs[rank::3])


def test_a_passive_stream_is_a_function_of_the_index() -> None:
    source: Passive = items(20)
    later = source.pair(15)
    source.pair(2)
    assert later is not None
    again = source.pair(15)
    assert again is not None
    assert differences(tuple(later[0]), tuple(again[0])) == []


def test_what_is_out_of_range_is_refused() -> None:
    from pliant.core import UsageError
    from pliant.streams import digits

    for call in (
        lambda: digits(by="column"),
        lambda: digits(batch=0),
        lambda: digits(held_out=1.0),
        lambda: drift.permute(items(), every=0),
        lambda: drift.permute(items(), every=10, returning=0),
        lambda: drift.delay(items(), questions=-1),
        lambda: drift.hide(items(), rate=2.0),
        lambda: drift.shard(items(), rank=4, world=3),
        lambda: drain(drift.redraw(drift.shard(Untagged(), rank=0, world=1), every=3, items=3)),
    ):
        with pytest.raises(UsageError):
            call()


class Untagged(Passive):
    def __init__(self) -> None:
        super().__init__(items().spec)

    def pair(self, index: int) -> tuple[Question, Answer] | None:
        question, answer = items().pair(index) or (None, None)
        assert question is not None
        assert answer is not None
        return question, answer._replace(tags={})
