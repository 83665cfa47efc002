"""The learner: what predict may move, what a gradient reaches, late and missing answers, bounded memory."""

import copy
from itertools import islice
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import Answer, Question, UsageError, leaves, map_state
from pliant.core.pack import differences, pack, unpack
from pliant.learn import Learner, bptt
from pliant.learn.held import SPARE
from pliant.learn.rules import Asked
from pliant.optim import Probe, Schedule, Upkeep, adamw, warmup
from pliant.streams import Stream, drift
from tests.learn.worlds import Signs, items, late, learner

MOVED_BY_PREDICT = {"memory", "output", "asked", "open"}


def go(ours: Learner, stream: Stream, replies: int | None = None) -> list[Any]:
    records, output = [], ours.output
    while replies != 0 and (batch := stream.send(output)):
        records += [ours.learn(answer) for answer in batch.answers]
        output = None if batch.question is None else ours.predict(batch.question)
        replies = None if replies is None else replies - 1
    return records


def gradients_of(ours: Learner, answer: Answer) -> tuple[dict[str, Tensor], Any]:
    """Gradients of the update that `learn` makes, caught just before the optimizer's step."""
    caught: dict[str, Tensor] = {}

    def catch(optimizer: Any, arguments: Any, options: Any) -> None:
        caught.update({n: p.grad.clone() for n, p in ours.model.named_parameters() if p.grad is not None})

    hook = ours.optimizer.register_step_pre_hook(catch)
    record = ours.learn(answer)
    hook.remove()
    return caught, record


def question(inputs: Tensor, time: int, *, reset: bool = False, rows: list[int] | None = None) -> Question:
    batch, steps = inputs.shape[:2]
    resets = torch.zeros(batch, steps, dtype=torch.bool)
    resets[:, 0] = reset
    every = torch.ones(batch, steps, dtype=torch.bool)
    return Question(inputs, resets, every, time, torch.tensor(rows if rows is not None else list(range(batch))))


def answer_to(asked: Question, targets: Tensor, **options: Any) -> Answer:
    return Answer(targets, asked.mask, asked.mask, asked.time, asked.rows, **options)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("reuse", [True, False])
def test_predict_moves_the_memory_of_the_stream_and_nothing_else(reuse: bool) -> None:
    stream = Signs()
    ours = learner(stream, reuse=reuse)
    go(ours, stream, 10)
    batch = stream.send(None)
    before, gradients = copy.deepcopy(ours.state_dict()), [p.grad for p in ours.model.parameters()]
    ours.predict(batch.question)
    after = ours.state_dict()
    assert {name for name in before if differences(before[name], after[name])} == MOVED_BY_PREDICT
    assert all(gradient is None for gradient in gradients)


def test_predict_from_two_forks_is_identical() -> None:
    stream = Signs()
    ours = learner(stream)
    go(ours, stream, 10)
    asked = stream.send(None).question
    one, two = copy.deepcopy(ours), copy.deepcopy(ours)
    assert one.predict(asked).equal(two.predict(asked))
    assert differences(one.state_dict(), two.state_dict()) == []


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("window", [1, 4, 6])
def test_reusing_the_forward_pass_gives_the_same_bits_as_repeating_it(steps: int, window: int) -> None:
    found = []
    for reuse in (True, False):
        stream = Signs(questions=20, steps=steps)
        ours = learner(stream, window=window, reuse=reuse)
        records = go(ours, stream)
        found.append((ours.state_dict(), [tuple(record) for record in records]))
    assert differences(found[0], found[1]) == []


def test_reusing_gives_the_same_gradients_to_the_bit() -> None:
    stream = Signs(steps=4)
    ours = learner(stream, window=4)
    go(ours, stream, 5)
    other = copy.deepcopy(ours)
    other.reuse = False
    batch = stream.send(ours.output)
    ours.learn(batch.answers[0])
    other.learn(batch.answers[0])
    ours.predict(batch.question)
    other.predict(batch.question)
    (answer,) = stream.send(None).answers
    assert ours._tape is not None and ours._tape[0] == answer.time
    assert other._tape is None
    one, two = gradients_of(ours, answer)[0], gradients_of(other, answer)[0]
    assert differences(one, two) == []


# What a gradient reaches


def reference(model: Any, memory: Any, inputs: Tensor, targets: Tensor, reset: Tensor | None = None) -> dict[str, Any]:
    """Gradients of the code length of the targets `(B, n)` of the last n steps of `inputs`, through all of them."""
    model.zero_grad()
    output, _ = model(inputs, memory, reset=reset)
    count = targets.shape[1]
    model.nats(output[:, -count:], targets).mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    return found


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("window", [1, 2, 5, 8, 20])
def test_a_gradient_goes_back_window_steps_also_when_questions_hold_one(window: int) -> None:
    x, targets = noise(2, 12, 3), torch.randint(2, (2, 12), generator=torch.Generator().manual_seed(1))
    ours = learner(Signs(), window=window, clip_norm=None)
    before = []
    for t in range(12):
        before.append(ours.memory)
        ours.predict(question(x[:, t : t + 1], t))
    start = max(0, 12 - window)
    memory = before[start] if before[start] is not None else ours.model.init_state(2)
    expected = reference(ours.model, memory, x[:, start:], targets[:, 11:])
    found, record = gradients_of(ours, answer_to(question(x[:, 11:], 11), targets[:, 11:]))
    assert record.outcome == "updated"
    compare(found, expected)


def test_whole_questions_are_added_while_they_fit_into_the_window() -> None:
    x, targets = noise(2, 12, 3), torch.randint(2, (2, 12), generator=torch.Generator().manual_seed(1))
    for window, start in ((3, 9), (5, 9), (6, 6), (11, 3), (12, 0)):
        ours = learner(Signs(), window=window, clip_norm=None)
        memories = []
        for k in range(4):
            memories.append(ours.memory)
            ours.predict(question(x[:, 3 * k : 3 * k + 3], 3 * k))
        memory = memories[start // 3] if start else ours.model.init_state(2)
        expected = reference(ours.model, memory, x[:, start:], targets[:, 9:])
        compare(gradients_of(ours, answer_to(question(x[:, 9:], 9), targets[:, 9:]))[0], expected)


@pytest.mark.parametrize("reuse", [True, False])
def test_inside_a_long_question_a_gradient_ends_every_window_steps(reuse: bool) -> None:
    x, targets = noise(2, 7, 3), torch.randint(2, (2, 7), generator=torch.Generator().manual_seed(1))
    ours = learner(Signs(), window=3, clip_norm=None, reuse=reuse)
    ours.model.zero_grad()
    memory, total = ours.model.init_state(2), torch.zeros(())
    for piece, to in zip(x.split(3, 1), targets.split(3, 1), strict=True):
        output, memory = ours.model(piece, map_state(Tensor.detach, memory))
        total = total + ours.model.nats(output, to).sum()
    (total / 14).backward()
    expected = {name: p.grad.clone() for name, p in ours.model.named_parameters()}
    ours.model.zero_grad()
    asked = question(x, 0)
    ours.predict(asked)
    compare(gradients_of(ours, answer_to(asked, targets))[0], expected)


@given(
    steps=st.lists(st.integers(1, 5), min_size=1, max_size=12),
    fresh=st.lists(st.booleans(), min_size=12, max_size=12),
    window=st.integers(1, 12),
)
def test_a_window_is_as_many_whole_questions_as_fit(steps: list[int], fresh: list[bool], window: int) -> None:
    past = [
        Asked.of(question(torch.zeros(1, n, 1), t, reset=new), None, torch.zeros(0))
        for t, (n, new) in enumerate(zip(steps, fresh, strict=False))
    ]
    reached = [asked.question.time for asked in bptt(window).reach(reversed(past))]
    last = len(past) - 1
    fits = [k for k in range(last + 1) if not any(fresh[k + 1 : last + 1]) and sum(steps[k:]) <= window]
    assert reached == list(range(min([last, *fits]), last + 1))
    for waiting in (set(), {last}, {0}, {0, last // 2}):
        needed = bptt(window).needed(reversed(past), waiting.__contains__)
        to_come = [k for k in range(last + 1) if not any(fresh[k + 1 : last + 1]) and sum(steps[k:]) + 1 <= window]
        reached = [bptt(window).reach(reversed(past[: time + 1])) for time in waiting]
        assert needed == set(to_come) | {asked.question.time for one in reached for asked in one}


@pytest.mark.parametrize("delay", [0, 3])
@pytest.mark.parametrize("loss", ["own", "default"])
def test_a_window_of_one_step_questions_learns_all_its_answers_at_once(delay: int, loss: str) -> None:
    x, targets = noise(2, 12, 3), torch.randint(2, (2, 12), generator=torch.Generator().manual_seed(1))
    ours = learner(Signs(), window=5, clip_norm=None)
    ours.rule = bptt(5, every=10, revisit=True)  # both targets of five answers
    if loss == "own":
        ours._sink = None
    before, asked = [ours.model.init_state(2)], []
    for t in range(5 + delay):
        asked.append(question(x[:, t : t + 1], t))
        ours.predict(asked[-1])
        before.append(ours.memory)
    for t in range(4):
        assert ours.learn(answer_to(asked[t], targets[:, t : t + 1])).outcome == "gathered"
    expected = reference(ours.model, before[0], x[:, :5], targets[:, :5])
    found, record = gradients_of(ours, answer_to(asked[4], targets[:, 4:5]))
    assert (record.outcome, record.learned) == ("updated", 10)
    compare(found, expected)


def test_a_window_with_missing_and_partial_answers_learns_what_there_is() -> None:
    x, targets = noise(2, 4, 3), torch.randint(2, (2, 4), generator=torch.Generator().manual_seed(1))
    use = torch.tensor([[True, False, True, True], [True, False, False, True]])
    found = []
    for silent in (True, False):  # a question without an answer, or with one that says nothing
        ours = learner(Signs(), window=4, clip_norm=None)
        ours.rule = bptt(4, every=5, revisit=True)
        for t in range(4):
            asked = question(x[:, t : t + 1], t)
            ours.predict(asked)
            if not (silent and t == 1):
                answer = answer_to(asked, targets[:, t : t + 1])._replace(learn_mask=use[:, t : t + 1])
                gradients, record = gradients_of(ours, answer)
        assert (record.outcome, record.learned) == ("updated", 5)
        found.append(gradients)
    output, _ = ours.model(x, ours.model.init_state(2))
    assert differences(found[0], found[1]) == []
    fresh = learner(Signs(), window=4)
    output, _ = fresh.model(x, fresh.model.init_state(2))
    fresh.model.nats(output[use], targets[use]).mean().backward()
    compare(found[0], {name: p.grad for name, p in fresh.model.named_parameters()})


def test_a_question_asked_again_is_known_anew() -> None:
    x = noise(2, 3, 3)
    ours = learner(Signs(), window=8)
    ours.rule = bptt(8, revisit=True)
    for _ in range(3):
        for t in range(3):
            asked = question(x[:, t : t + 1], t)
            ours.predict(asked)
            assert ours.learn(answer_to(asked, torch.zeros(2, 1, dtype=torch.int64))).outcome == "updated"
        assert [len(parts) for parts in ours._held.known.values()] == [1, 1, 1]
    assert ours.updates == 9


def test_what_the_optimizer_was_shown_is_not_written_over() -> None:
    stream = Signs(20)
    ours = learner(stream)
    kept: list[tuple[Tensor, Tensor]] = []
    ours.optimizer.register_step_pre_hook(
        lambda optimizer, *_: kept.extend((p.grad, p.grad.clone()) for p in ours.model.parameters())
    )
    go(ours, stream, 6)
    assert len(kept) > 20
    assert all(held.equal(copied) for held, copied in kept)


def test_a_reset_in_every_row_needs_nothing_before_it() -> None:
    x, targets = noise(2, 8, 3), torch.randint(2, (2, 8), generator=torch.Generator().manual_seed(1))
    ours = learner(Signs(), window=32)
    ours.predict(question(x[:, :4], 0))
    asked = question(x[:, 4:], 4, reset=True)
    ours.predict(asked)
    reached = ours.rule.reach(ours._held.back_from(4))
    assert [asked.question.time for asked in reached] == [4]
    assert ours._tape is not None and ours._tape[0] == 4
    assert ours.learn(answer_to(asked, targets[:, 4:])).outcome == "updated"


def test_a_question_about_some_streams_moves_and_teaches_only_those() -> None:
    x, targets = noise(2, 6, 3), torch.randint(2, (2, 6), generator=torch.Generator().manual_seed(1))
    ours = learner(Signs(batch=3), window=6, streams=3, clip_norm=None)
    memory = ours.model.init_state(2)
    ours.predict(question(noise(1, 1, 3, seed=5), 0, rows=[1]))
    one = ours.memory
    for t in range(6):
        ours.predict(question(x[:, t : t + 1], t + 1, rows=[2, 0]))
    for (_, before), (_, after) in zip(leaves(one), leaves(ours.memory), strict=True):
        assert before[1].equal(after[1])
    expected = reference(ours.model, memory, x, targets[:, 5:])
    asked = question(x[:, 5:], 6, rows=[2, 0])
    compare(gradients_of(ours, answer_to(asked, targets[:, 5:]))[0], expected)
    # A window over questions about different rows is run question by question.
    mixed = learner(Signs(batch=3), window=3, streams=3)
    for t, rows in enumerate([[0, 1], [1, 2], [2, 0]]):
        asked = question(x[:, t : t + 1], t, rows=rows)
        mixed.predict(asked)
    assert mixed.learn(answer_to(asked, targets[:, :1])).outcome == "updated"


# Late, partial and missing answers


def test_late_and_missing_answers_are_learned_from_when_they_come() -> None:
    stream = late(Signs(60))
    ours = learner(stream)
    records = go(ours, stream)
    assert len(records) == 60
    assert {record.outcome for record in records} <= {"updated", "nothing to learn"}
    assert [record.time for record in records] == list(range(60))
    assert ours.updates == sum(record.outcome == "updated" for record in records)
    assert not ours._held.open


def test_what_was_said_is_what_was_said_then() -> None:
    stream = drift.delay(Signs(30), questions=4)
    ours = learner(stream)
    outputs: dict[int, Tensor] = {}
    while batch := stream.send(ours.output):
        for answer in batch.answers:
            said = ours.said(answer)
            assert said is not None
            assert said.equal(outputs[answer.time])
            swapped = answer._replace(rows=answer.rows.flip(0))
            assert ours.said(swapped).equal(outputs[answer.time].flip(0))
            assert ours.said(answer._replace(rows=answer.rows[1:])).equal(outputs[answer.time][1:])
            ours.learn(answer)
            assert ours.said(answer) is None
        if batch.question is None:
            break
        outputs[batch.question.time] = ours.predict(batch.question)


def test_an_answer_in_parts_keeps_the_question_until_its_last() -> None:
    x = noise(2, 4, 3)
    ours = learner(Signs())
    asked = question(x, 0)
    ours.predict(asked)
    halves = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0]]).bool()
    targets = torch.zeros(2, 4, dtype=torch.int64)
    first = Answer(targets, halves, halves, 0, asked.rows, final=False)
    assert ours.learn(first)[3:5] is not None
    assert ours.said(first) is not None
    last = Answer(targets, ~halves, ~halves, 0, asked.rows)
    assert ours.learn(last).learned == 4
    assert ours.learn(last).outcome == "forgotten"
    assert ours.updates == 2


@pytest.mark.parametrize("answered", [True, False])
def test_memory_is_bounded_whatever_the_stream_does(answered: bool) -> None:
    stream = Signs(400) if answered else drift.delay(Signs(400), questions=1000)
    ours = learner(stream, window=6, remember=10)
    most = 0
    for batch in iter(lambda: stream.send(ours.output), None):
        for answer in batch.answers:
            ours.learn(answer)
        if batch.question is None:
            break
        ours.predict(batch.question)
        most = max(most, len(ours._held.asked))
    assert most <= 2 * (6 if answered else 10 + 6) + SPARE
    assert ours.forgotten == (0 if answered else 390)


def test_one_answer_that_never_comes_holds_no_more_than_itself() -> None:
    ours, most = learner(Signs(400), window=6, remember=400), 0
    asked = [question(noise(2, 1, 3, seed=t), t) for t in range(300)]
    for t, one in enumerate(asked):
        ours.predict(one)
        if t:
            ours.learn(answer_to(one, torch.zeros(2, 1, dtype=torch.int64)))
        most = max(most, len(ours._held.asked))
    assert most <= 2 * (1 + 6) + SPARE and ours.forgotten == 0
    # It is still known, and a saved learner keeps the gap behind it.
    twin = learner(Signs(400), window=6, remember=400)
    twin.load_state_dict(unpack(*pack(ours.state_dict())))
    first = answer_to(asked[0], torch.ones(2, 1, dtype=torch.int64))
    assert ours.learn(first).outcome == twin.learn(first).outcome == "updated"
    assert differences(ours.state_dict(), twin.state_dict()) == []


def test_an_answer_that_is_too_late_is_told() -> None:
    ours = learner(Signs(), remember=2)
    asked = [question(noise(2, 1, 3), t) for t in range(4)]
    for one in asked:
        ours.predict(one)
    late_answer = answer_to(asked[0], torch.zeros(2, 1, dtype=torch.int64))
    assert ours.said(late_answer) is None
    assert ours.learn(late_answer).outcome == "forgotten"


# The rest


def test_recompute_makes_the_memory_what_the_new_parameters_would_have_made_of_the_window() -> None:
    x, targets = noise(2, 6, 3), torch.zeros(2, 6, dtype=torch.int64)
    errors = {}
    for choice in ("carry", "recompute"):
        ours = learner(Signs(), window=8, after_update=choice)
        for t in range(6):
            asked = question(x[:, t : t + 1], t)
            ours.predict(asked)
        ours.learn(answer_to(asked, targets[:, :1]))
        errors[choice] = ours.memory_error()
        if choice == "recompute":
            _, memory = ours.model(x, ours.model.init_state(2))
            for (_, one), (_, two) in zip(leaves(memory), leaves(ours.memory), strict=True):
                torch.testing.assert_close(one, two)
    assert errors["recompute"] < 1e-6 < errors["carry"]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_loss_that_is_not_finite_is_an_outcome_and_changes_nothing(bad: float) -> None:
    ours = learner(Signs(), loss=lambda output, answer: output.sum() * bad)
    asked = question(noise(2, 1, 3), 0)
    ours.predict(asked)
    before = copy.deepcopy(ours.state_dict())
    record = ours.learn(answer_to(asked, torch.zeros(2, 1, dtype=torch.int64)))
    assert record.outcome == "non-finite loss"
    after = ours.state_dict()
    assert all(not differences(before[name], after[name]) for name in ("model", "optimizer", "updates"))


def test_a_gradient_that_is_not_finite_is_an_outcome_and_changes_nothing() -> None:
    ours = learner(Signs(), loss=lambda output, answer: output.sum().abs().mul(0).sqrt())
    asked = question(noise(2, 1, 3), 0)
    ours.predict(asked)
    before = copy.deepcopy(ours.state_dict()["model"])
    assert ours.learn(answer_to(asked, torch.zeros(2, 1, dtype=torch.int64))).outcome == "non-finite gradient"
    assert differences(before, ours.state_dict()["model"]) == []


def test_gradients_are_clipped_to_their_norm() -> None:
    asked = question(noise(2, 1, 3), 0)
    norms = []
    for clip in (None, 1e-3):
        ours = learner(Signs(), clip_norm=clip)
        ours.predict(asked)
        found, _ = gradients_of(ours, answer_to(asked, torch.zeros(2, 1, dtype=torch.int64)))
        norms.append(float(torch.nn.utils.get_total_norm(list(found.values()))))
    assert norms[1] == pytest.approx(1e-3, rel=1e-4)
    assert norms[0] > 1e-3


class Noting(Upkeep):
    """Reports its name, its number and a draw of the learner's generator."""

    def __init__(self, name: str):
        self.name, self.times = name, 0

    def init(self, model: Any, optimizer: Any) -> None:
        self.times = 0

    def apply(self, model: Any, optimizer: Any, probe: Probe) -> dict[str, Any]:
        self.times += 1
        draw = float(torch.rand((), generator=probe.generator))
        return {"name": self.name, "update": probe.update, "times": self.times, "draw": draw}

    def state_dict(self) -> dict[str, Any]:
        return {"times": self.times}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.times = state["times"]


def test_upkeep_is_applied_in_order_after_each_update_and_forks_with_the_life() -> None:
    stream = Signs(20)
    ours = learner(stream)
    ours.keep += [Noting("a"), Noting("b")]
    go(ours, stream, 10)
    twin, other = copy.deepcopy(ours), copy.deepcopy(stream)
    one, two = go(ours, stream), go(twin, other)
    assert repr(one) == repr(two)
    reports = one[0].upkeep
    assert [report.get("name") for report in reports] == [None, "a", "b"]
    assert reports[1]["update"] == reports[1]["times"] == one[0].update == 10


def test_hooks_of_the_optimizer_survive_a_fork() -> None:
    stream = Signs(20)
    ours = learner(stream)
    seen: list[int] = []
    ours.optimizer.register_step_post_hook(lambda optimizer, *_: seen.append(id(optimizer)))
    twin = copy.deepcopy(ours)
    go(twin, stream, 3)
    assert seen
    assert set(seen) == {id(twin.optimizer)}


def test_held_out_items_are_not_learned_from() -> None:
    stream = items(20, batch=1)
    ours = learner(stream)
    while batch := stream.send(ours.output):
        for answer in batch.answers:
            before = ours.updates
            learned = ours.learn(answer).learned
            assert learned == int(answer.learn_mask.sum()) == ours.updates - before
        if batch.question is None:
            break
        ours.predict(batch.question)


def test_targets_that_may_not_be_learned_from_teach_nothing() -> None:
    asked = question(noise(2, 4, 3), 0)
    targets = torch.randint(2, (2, 4), generator=torch.Generator().manual_seed(1))
    may = torch.tensor([[True, False, True, False], [False, False, True, True]])
    found = []
    for told in (targets, torch.where(may, targets, 1 - targets)):
        ours = learner(Signs())
        ours.predict(asked)
        record = ours.learn(answer_to(asked, told)._replace(learn_mask=may))
        found.append((ours.state_dict()["model"], record.nats, record.learned))
    assert differences(found[0], found[1]) == []
    assert found[0][2] == 4


def test_the_generator_of_upkeep_goes_on_where_it_was_saved() -> None:
    stream = Signs(20)
    ours = learner(stream)
    ours.keep.append(Noting("a"))
    go(ours, stream, 8)
    twin, other = learner(stream, seed=1), copy.deepcopy(stream)
    twin.keep.append(Noting("a"))
    twin.load_state_dict(unpack(*pack(ours.state_dict())))
    assert repr(go(twin, other)) == repr(go(ours, stream))


def test_a_stream_that_changes_shape_is_refused() -> None:
    ours = learner(Signs())
    ours.predict(question(noise(2, 1, 3), 0))
    with pytest.raises(UsageError, match="changed shape"):
        ours.predict(question(noise(2, 1, 4), 1))
    with pytest.raises(UsageError, match="changed shape"):
        ours.predict(question(noise(2, 1, 3).double(), 1))
    ours.predict(question(noise(2, 5, 3), 1))


def test_an_unknown_stream_and_a_question_asked_twice_are_refused() -> None:
    ours = learner(Signs())
    ours.predict(question(noise(2, 1, 3), 0))
    with pytest.raises(UsageError, match="streams=6"):
        ours.predict(question(noise(1, 1, 3), 1, rows=[5]))
    with pytest.raises(UsageError, match="already waiting"):
        ours.predict(question(noise(2, 1, 3), 0))


@pytest.mark.usefixtures("unchecked")
def test_arguments_out_of_range_are_refused() -> None:
    model = learner(Signs()).model
    with pytest.raises(UsageError, match="window"):
        bptt(0)
    with pytest.raises(UsageError, match="after_update"):
        Learner(model, adamw(model), after_update="guess")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="remember"):
        Learner(model, adamw(model), remember=0)
    with pytest.raises(UsageError, match="lr"):
        adamw(model, lr=-1.0)


def test_memory_may_be_carried_over_extra_axes() -> None:
    ours = learner(Signs())
    for t in range(3):
        asked = question(noise(2, 1, 5, 3, seed=t), t)
        ours.predict(asked)
    other = learner(Signs())
    other.load_state_dict(ours.state_dict())
    assert differences(ours.state_dict(), other.state_dict()) == []


def test_a_learner_loaded_from_another_shares_nothing_with_it() -> None:
    stream = Signs(30)
    ours = learner(stream)
    go(ours, stream, 10)
    twin, other = learner(stream, seed=1), copy.deepcopy(stream)
    twin.load_state_dict(ours.state_dict())
    before = copy.deepcopy(twin.state_dict())
    go(ours, stream)
    assert differences(before, twin.state_dict()) == []
    go(twin, other)
    assert differences(ours.state_dict(), twin.state_dict()) == []


def test_learning_helps() -> None:
    stream = Signs(600)
    ours = learner(stream)
    nats = [record.nats for record in go(ours, stream)]
    assert sum(nats[-100:]) < 0.5 * sum(nats[:100])


def test_a_schedule_is_a_function_of_the_update() -> None:
    stream = Signs(12)
    ours = learner(stream)
    ours.keep = [Schedule(warmup(4))]
    ours.keep[0].init(ours.model, ours.optimizer)
    rates = [record.upkeep[0]["lr"] for record in islice(go(ours, stream), 6)]
    assert rates == pytest.approx([0.005, 0.0075, 0.01, 0.01, 0.01, 0.01])
