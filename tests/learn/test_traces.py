"""A learner by traces: what its updates add up to, and that it is as much a life as any other."""

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import Answer, Question, UsageError, seeded
from pliant.core.state import map_state
from pliant.kernels import _gated_block as kernel
from pliant.learn import Learner, Life, Trace, bptt, fit, immediate, trace, trace_bytes
from pliant.models import SequenceClassifier
from pliant.models.table import TableModel
from pliant.optim import Isometry, Replay, adamw, normalize_and_project
from tests.learn.worlds import Signs, late, run, scores
from tests.streams.test_series import world as table

FED = ("embed.", "stack.blocks.0.mixer_norm.")
"""What feeds the recurrence of the first block, by which gradients end at borders."""
WHOLE = {"linear_x": "exact"}


def model(depth: int = 1, mixer: str = "GatedLRU", width: int = 4, **options: Any) -> SequenceClassifier:
    with seeded(0):
        model = SequenceClassifier(3, 2, width=width, depth=depth, mixer=mixer, mixer_options=options).double()
        with torch.no_grad():
            model.head.linear.weight.normal_()
            for name, p in model.named_parameters():
                if "bias" in name:
                    p.normal_(std=0.1)
    return model


class Sum(torch.optim.Optimizer):
    """Adds up gradients, each as often as it has targets, and moves nothing."""

    def __init__(self, model: SequenceClassifier):
        super().__init__(model.parameters(), {})
        self.model = model
        self.total = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
        self.last = {name: torch.zeros_like(p) for name, p in model.named_parameters()}

    def step(self, closure: Any = None) -> None:
        self.last = {
            n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in self.model.named_parameters()
        }

    def add(self, learned: int) -> None:
        for name, gradient in self.last.items():
            self.total[name] += learned * gradient


def learner(rule: Any, depth: int = 1, mixer: str = "GatedLRU", streams: int = 2, **options: Any) -> Learner:
    made = model(depth, mixer)
    return Learner(made, Sum(made), rule, streams=streams, clip_norm=None, **options)


def learn(ours: Learner, answer: Answer) -> Any:
    record = ours.learn(answer)
    if record.outcome == "updated":
        ours.optimizer.add(record.learned)  # type: ignore[attr-defined]
    return record


def world(steps: int, streams: int = 2, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(streams, steps, 3, generator=random, dtype=torch.float64)
    targets = torch.randint(2, (streams, steps), generator=random)
    return (
        x,
        targets,
        torch.rand(streams, steps, generator=random) < 0.1,
        torch.rand(streams, steps, generator=random) < 0.8,
    )


def asked(world: Any, rows: Sequence[int], start: int, stop: int, time: int) -> tuple[Question, Answer]:
    x, targets, reset, mask = (part[list(rows), start:stop] for part in world)
    streams = torch.tensor(rows)
    return Question(x, reset, mask, time, streams), Answer(targets, mask, mask, time, streams)


def expected(ours: Learner, world: Any) -> dict[str, Tensor]:
    """The gradient of the sum over all steps that exist, through the whole past."""
    x, targets, reset, mask = world
    output, _ = ours.model(x, ours.model.init_state(len(x)), reset=reset, mask=mask)
    loss = ours.model.nats(output[mask], targets[mask]).sum()  # type: ignore[operator]
    names = dict(ours.model.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))


def compare(ours: Learner, world: Any, but: tuple[str, ...] = FED) -> None:
    found, total = expected(ours, world), ours.optimizer.total  # type: ignore[attr-defined]
    for name, gradient in found.items():
        if not name.startswith(but):
            torch.testing.assert_close(total[name], gradient, rtol=1e-12, atol=1e-12, msg=name)


@st.composite
def lives(draw: st.DrawFn) -> tuple[list[int], list[int], int, int | None]:
    """Lengths of questions, how much later each is answered, chunk and every."""
    lengths = draw(st.lists(st.integers(1, 4), min_size=2, max_size=7))
    delays = draw(st.lists(st.integers(0, 3), min_size=len(lengths), max_size=len(lengths)))
    return lengths, delays, draw(st.integers(1, 6)), draw(st.sampled_from([None, 1, 5]))


@given(case=lives())
@settings(max_examples=6, deadline=None)
def test_updates_add_up_to_the_gradient_through_the_whole_past(case: Any) -> None:
    """One layer; questions of any lengths, answers late and out of order (A5, A6, A9)."""
    lengths, delays, chunk, every = case
    here = world(sum(lengths), seed=chunk)
    ours = learner(trace(chunk, every=every, policy=WHOLE))
    waiting: list[tuple[int, Answer]] = []
    start = 0
    for i, (length, delay) in enumerate(zip(lengths, delays, strict=True)):
        question, answer = asked(here, [0, 1], start, start + length, i)
        start += length
        ours.predict(question)
        waiting.append((i + delay, answer))
        for due, known in waiting:
            if due == i:
                learn(ours, known)
    for due, known in waiting:
        if due >= len(lengths):
            learn(ours, known)
    if ours._held.due:  # the last chunk is not full: what would come makes it so
        question, answer = asked(world(8, seed=99), [0, 1], 0, 8, 99)
        ours.predict(question)
        learn(ours, answer._replace(learn_mask=answer.learn_mask & False))
    compare(ours, here)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ["RGLRU", "LRU", "S6", "MultiScaleSSM"])
@pytest.mark.parametrize("chunk", [1, 5])
def test_the_same_for_other_recurrences(mixer: str, chunk: int) -> None:
    here = world(15)
    ours = learner(trace(chunk, policy={"linear_select": "exact"} if mixer == "S6" else None), mixer=mixer)
    for t in range(15):
        question, answer = asked(here, [0, 1], t, t + 1, t)
        ours.predict(question)
        learn(ours, answer)
    untraced = tuple(f"stack.blocks.0.mixer.{name}" for name in ("conv_", "linear_in.")) if mixer == "S6" else ()
    compare(ours, here, FED + untraced)


@pytest.mark.parametrize("chunk", [1, 4])
def test_the_last_recurrent_layer_is_exact_and_those_below_are_not(chunk: int) -> None:
    """A7."""
    here = world(20)
    ours = learner(trace(chunk, policy=WHOLE), depth=2)
    for t in range(20):
        question, answer = asked(here, [0, 1], t, t + 1, t)
        ours.predict(question)
        learn(ours, answer)
    compare(ours, here, ("embed.", "stack.blocks.0.", "stack.blocks.1.mixer_norm."))
    found, name = expected(ours, here), "stack.blocks.0.mixer.lru.decay"
    apart = (ours.optimizer.total[name] - found[name]).norm() / found[name].norm()  # type: ignore[attr-defined]
    assert 1e-4 < apart < 0.7


def test_one_chunk_of_all_steps_is_back_propagation() -> None:
    here = world(12)
    ours = learner(trace(12), depth=2)
    for t in range(12):
        question, answer = asked(here, [0, 1], t, t + 1, t)
        ours.predict(question)
        record = learn(ours, answer)
    assert record.outcome == "updated" and ours.updates == 1
    compare(ours, here, ("-",))


def test_immediate_derivatives_are_traces_that_are_dropped() -> None:
    """A12: a window of one step, and traces that nothing is carried in."""
    here, found = world(9), []
    for rule in (immediate(), trace(1, policy=dict.fromkeys(("conv", "linear_x", "lru"), "instant"))):
        ours = learner(rule, depth=2)
        for t in range(9):
            question, answer = asked(here, [0, 1], t, t + 1, t)
            ours.predict(question)
            learn(ours, answer)
        found.append(ours.optimizer.total)  # type: ignore[attr-defined]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("chunk", [1, 3])
def test_questions_about_some_streams(chunk: int) -> None:
    here = world(8, streams=3)
    ours = learner(trace(chunk, policy=WHOLE), streams=3)
    at = [0, 0, 0]
    for time, rows in enumerate([[0], [2, 1], [1], [0, 2], [2], [0, 1, 2], [1, 0]] * 3):
        start = at[rows[0]]
        rows = [row for row in rows if at[row] == start and start < 8]
        if not rows:
            continue
        question, answer = asked(here, rows, start, start + 1, time)
        ours.predict(question)
        learn(ours, answer)
        for row in rows:
            at[row] += 1
    for row in range(3):  # to the end of each
        question, answer = asked(here, [row], at[row], 8, 100 + row)
        if at[row] < 8:
            ours.predict(question)
            learn(ours, answer)
    if ours._held.due:
        question, answer = asked(world(8, streams=3, seed=99), [0, 1, 2], 0, 8, 999)
        ours.predict(question)
        learn(ours, answer._replace(learn_mask=answer.learn_mask & False))
    compare(ours, here)


def test_missing_answers_move_the_border_and_teach_nothing() -> None:
    here = world(12)
    here[3][:] = True
    known = torch.tensor([True, False, True, True, False, False] * 2)
    ours = learner(trace(2, policy=WHOLE))
    for t in range(12):
        question, answer = asked(here, [0, 1], t, t + 1, t)
        ours.predict(question)
        learn(ours, answer._replace(learn_mask=answer.learn_mask & known[t]))
    assert not ours._held.asked and not ours._held.due
    x, targets, reset, _ = here
    output, _ = ours.model(x, ours.model.init_state(2), reset=reset)
    loss = ours.model.nats(output[:, known], targets[:, known]).sum()  # type: ignore[operator]
    names = dict(ours.model.named_parameters())
    for name, gradient in zip(names, torch.autograd.grad(loss, list(names.values())), strict=True):
        if not name.startswith(FED):
            found = ours.optimizer.total[name]  # type: ignore[attr-defined]
            torch.testing.assert_close(found, gradient, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.slow
def test_a_question_that_nobody_answers_is_waited_for_only_so_long() -> None:
    here = world(60)
    ours = learner(trace(2), remember=8)
    most = 0
    for t in range(60):
        question, answer = asked(here, [0, 1], t, t + 1, t)
        ours.predict(question)
        if t != 5:
            learn(ours, answer)
        most = max(most, len(ours._held.asked))
    assert most <= 10 and ours.forgotten == 1 and ours.updates > 20
    assert ours.learn(asked(here, [0, 1], 5, 6, 5)[1]).outcome == "forgotten"
    silent = learner(trace(2), remember=8)
    for t in range(60):
        silent.predict(asked(here, [0, 1], t, t + 1, t)[0])
        assert len(silent._held.asked) <= 10
    assert silent.traces is not None and silent.traces.values


@pytest.mark.parametrize("chunk", [1, 4])
def test_bytes_are_known_before_and_stay(chunk: int) -> None:
    """A11."""
    ours = learner(trace(chunk))
    here = world(48)
    sizes = set()
    for t in range(48):
        question, answer = asked(here, [0, 1], t, t + 1, t)
        ours.predict(question)
        learn(ours, answer)
        if t >= 20:
            assert ours.traces is not None
            sizes.add((ours.traces.nbytes(), len(ours._held.asked) if t % chunk == chunk - 1 else 0))
    assert sizes == {(trace_bytes(ours.model, trace(chunk), 2), 0)}


def traced_life() -> Life:
    stream = late(Signs(70))
    with seeded(0):
        net = SequenceClassifier(3, 2, width=4, depth=2)
    ours = Learner(net, adamw(net, 1e-2), trace(4), streams=2)
    return Life(learner=ours, stream=stream, scores=scores())


@pytest.mark.slow
def test_memory_at_its_peak_is_that_of_the_hundredth_step() -> None:
    """A11: what torch allocates in a step and its update, ten thousand steps later."""
    ours, peaks = Learner(net := model(2), adamw(net, 1e-3), trace(4), streams=1), list[int]()
    here = world(100, streams=1)
    for t in range(10_000):
        question, answer = asked(here, [0], t % 100, t % 100 + 1, t)
        if t not in (103, 9_999):
            ours.predict(question)
            ours.learn(answer)
            continue
        with torch.profiler.profile(profile_memory=True) as profiled:
            ours.predict(question)
            assert ours.learn(answer).outcome == "updated"
        events = [e for e in profiled.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
        sizes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        peaks.append(max(sum(sizes[: i + 1]) for i in range(len(sizes))))
    assert peaks[0] == peaks[1] > 0


def test_where_nothing_is_remembered_all_rules_are_one() -> None:
    """A12: with a reset at each step, that is a = 0, no gradient goes further than the step."""
    x, targets, reset, mask = world(12)
    here, totals = (x, targets, torch.ones_like(reset), mask), []
    for rule in (trace(1), trace(4), bptt(1), bptt(32), immediate()):
        ours = learner(rule)
        for t in range(12):
            question, answer = asked(here, [0, 1], t, t + 1, t)
            ours.predict(question)
            learn(ours, answer)
        totals.append(ours.optimizer.total)  # type: ignore[attr-defined]
    for other in totals[1:]:
        for name, gradient in totals[0].items():
            if "conv" not in name and not name.startswith(FED):  # a convolution remembers, too, but for the reset
                torch.testing.assert_close(other[name], gradient, rtol=1e-12, atol=1e-13, msg=name)


def test_a_saved_and_a_forked_life_go_on_to_the_same_bits(tmp_path: Any) -> None:
    this = traced_life()
    run(this, 37)
    assert this.learner.traces.values and this.learner._held.due
    this.save(tmp_path)
    twin, other = this.fork(), traced_life()
    other.load(tmp_path)
    assert this.diff(twin) == this.diff(other) == []
    records = [run(one) for one in (this, twin, other)]
    assert records[0] == records[1] == records[2] and len(records[0]) > 20
    assert this.diff(twin) == this.diff(other) == []


def test_a_loss_that_is_not_finite_changes_nothing_but_the_border() -> None:
    here, nats = world(8), model().nats
    here[3][:] = True
    factors = [1.0] * 4 + [math.nan] + [1.0] * 3
    loss = lambda output, answer: nats(output, answer.targets).mean() * factors[answer.time]  # noqa: E731
    ours, other = learner(trace(1, policy=WHOLE), loss=loss), learner(trace(1, policy=WHOLE))
    outcomes = []
    for t in range(8):
        question, answer = asked(here, [0, 1], t, t + 1, t)
        for each in (ours, other):
            each.predict(question)
        outcomes.append(learn(ours, answer).outcome)
        learn(other, answer)
    assert outcomes == ["updated"] * 4 + ["non-finite loss"] + ["updated"] * 3
    assert ours.traces is not None and other.traces is not None
    for part, e in ours.traces.values["stack.blocks.0.mixer"].items():
        assert e.equal(other.traces.values["stack.blocks.0.mixer"][part])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["adamw", "sgd", "kept"])
def test_it_learns_with_any_optimizer_and_keeper_and_recomputed_memory(kind: str) -> None:
    here = world(60)
    net = model(2)
    optimizer = torch.optim.SGD(net.parameters(), 0.01) if kind == "sgd" else adamw(net, 1e-2)
    keep = [Replay(20, 2), Isometry(every=9)] if kind == "kept" else []
    if kind == "kept":
        optimizer = normalize_and_project(optimizer, net)
    ours = Learner(net, optimizer, trace(4, every=2), keep, streams=2, after_update="recompute")
    for t in range(60):
        question, answer = asked(here, [0, 1], t, t + 1, t)
        ours.predict(question)
        ours.learn(answer)
        assert ours.memory_error() < 1e-6
    assert ours.updates > 30


def test_a_loss_of_ones_own_and_many_passes() -> None:
    here, found = world(12), []
    pairs = [asked(here, [0, 1], t, t + 4, t) for t in (0, 4, 8)]
    nats = model().nats
    for loss in (None, lambda output, answer: nats(output, answer.targets)[answer.learn_mask].mean()):
        ours = learner(trace(3, policy=WHOLE), loss=loss)
        for record in fit(ours, pairs, passes=2):
            assert record.outcome == "updated"
        found.append(ours.optimizer.last)  # type: ignore[attr-defined]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("questions", [3, 5, 7])
def test_many_passes_learn_all_answers_whatever_the_chunk(questions: int) -> None:
    here = world(4 * questions)
    pairs = [asked(here, [0, 1], 4 * i, 4 * i + 4, i) for i in range(questions)]
    for rule in (trace(), trace(7), bptt(8, every=30, revisit=True)):
        ours = learner(rule)
        found = list(fit(ours, pairs, passes=3))
        assert ours.finish() is None
        if isinstance(rule, Trace):
            assert sum(record.learned for record in found) == 3 * int(here[3].sum())


def test_questions_may_have_any_times() -> None:
    here = world(8)
    ours = learner(trace(4, policy=WHOLE))
    for t, time in enumerate((8, 0, 4, 2, 3, 1, 20, 10)):
        question, answer = asked(here, [0, 1], t, t + 1, time)
        ours.predict(question)
        learn(ours, answer)
    assert ours.updates == 2
    compare(ours, here)


@pytest.mark.parametrize("rule", [trace(4), bptt(8, every=4, revisit=True)])
def test_what_was_gathered_is_forgotten_at_a_restart(rule: Any) -> None:
    here, ours = world(12), learner(rule)
    for t in (0, 1):
        question, answer = asked(here, [0, 1], t, t + 1, t)
        ours.predict(question)
        ours.learn(answer)
    ours.restart()
    found = []
    for t in range(4):
        question, answer = asked(here, [0, 1], t + 4, t + 5, t)
        ours.predict(question)
        found.append(ours.learn(answer).learned)
    assert sum(found) <= int(here[3][:, 4:8].sum())


def test_a_question_that_nobody_answers_does_not_keep_others_from_being_learned() -> None:
    here, updates = world(200), []
    for every_so_often in (0, 50):
        ours = learner(trace(4))
        for t in range(200):
            question, answer = asked(here, [0, 1], t, t + 1, t)
            ours.predict(question)
            if not every_so_often or t % every_so_often != 7:
                ours.learn(answer)
        updates.append(ours.updates)
    assert updates[0] == 50 and updates[1] >= 45


def test_a_state_of_another_rule_policy_or_precision_is_refused() -> None:
    here = world(8)

    def lived(rule: Any, narrow: bool = False) -> Learner:
        ours = learner(rule)
        if narrow:
            ours.model.float()
        for t in range(8):
            question, answer = asked(here, [0, 1], t, t + 1, t)
            ours.predict(question._replace(inputs=question.inputs.float()) if narrow else question)
            ours.learn(answer)
        return ours

    state = lived(trace(2)).state_dict()
    for rule in (trace(2, policy={"conv": "own"}), trace(2, policy=WHOLE), trace(2, policy={"linear_x": "instant"})):
        with pytest.raises(UsageError, match="of other kinds, shapes or types"):
            learner(rule).load_state_dict(state)
        with pytest.raises(UsageError, match="of other kinds, shapes or types"):
            learner(trace(2)).load_state_dict(lived(rule).state_dict())
    with pytest.raises(UsageError, match="of other kinds, shapes or types"):
        learner(trace(2)).load_state_dict(lived(trace(2), narrow=True).state_dict())
    for one, other in ((trace(2), bptt(2)), (bptt(2), trace(2))):
        with pytest.raises(UsageError, match="under another learning rule"):
            learner(other).load_state_dict(lived(one).state_dict())
    learner(trace(4)).load_state_dict(state)


def test_traces_follow_a_model_to_another_precision() -> None:
    here, ours = world(24), learner(trace(4))
    ours.memory = ours.model.init_state(2)  # type: ignore[operator]
    for narrow in (False, True, False):
        dtype = torch.float32 if narrow else torch.float64
        ours.model.to(dtype)
        ours.memory = map_state(lambda e, dtype=dtype: e.to(dtype) if e.is_floating_point() else e, ours.memory)
        for t in range(8):
            question, answer = asked(here, [0, 1], t, t + 1, t)
            ours.predict(question._replace(inputs=question.inputs.float()) if narrow else question)
            assert ours.learn(answer).outcome in ("gathered", "updated")
        ours._shape = None
    assert ours.traces is not None
    assert all(e.dtype == torch.float64 for e in ours.traces.values["stack.blocks.0.mixer"].values())


@pytest.mark.usefixtures("unchecked")
def test_numbers_that_are_none_are_refused() -> None:
    for call, said in (
        (lambda: trace(2.5), "chunk is 2.5"),  # type: ignore[arg-type]
        (lambda: trace(math.nan), "chunk is nan"),  # type: ignore[arg-type]
        (lambda: trace("8"), "chunk is '8'"),  # type: ignore[arg-type]
        (lambda: trace(every=2.5), "every is 2.5"),  # type: ignore[arg-type]
        (lambda: trace(policy="exact"), "policy is 'exact'"),  # type: ignore[arg-type]
        (lambda: bptt(2.5), "window is 2.5"),  # type: ignore[arg-type]
        (lambda: trace_bytes(model(), bptt(3)), "expected a rule by trace"),  # type: ignore[arg-type]
        (lambda: trace_bytes(model(), trace(), -1), "-1 streams"),
        (lambda: learner(trace()).grow(1), "1 streams, expected at least the 2"),
    ):
        with pytest.raises(UsageError, match=said):
            call()


def test_what_a_policy_says_of_a_part_goes_before_what_it_says_of_the_whole() -> None:
    whole, part = ({"lru": "instant"} | more for more in ({}, {"lru.decay": "exact"}))
    assert trace_bytes(model(), trace(policy=part)) > trace_bytes(model(), trace(policy=whole))


def test_new_streams_have_traces_of_nothing() -> None:
    here = world(6, streams=3)
    ours = learner(trace(1, policy=WHOLE))
    for t in range(6):
        rows = [0, 1] if t < 3 else [0, 1, 2]
        if t == 3:
            ours.grow(3)
        question, answer = asked(here, rows, t, t + 1, t)
        ours.predict(question)
        learn(ours, answer)
    here[2][2, 3] = True
    for part in here[1:2]:
        assert part.shape == (3, 6)
    here[3][2, :3] = False
    compare(ours, here)


@contextmanager
def refused(words: str) -> Iterator[None]:
    with pytest.raises(UsageError, match=words):
        yield


def test_what_cannot_be_traced_is_refused() -> None:
    with refused("chunk is 0"):
        trace(0)
    with refused("every is 0"):
        trace(every=0)
    for mixer in ("MLSTM", "SLSTM", "GatedDelta"):
        with refused(f"no layer of SequenceClassifier has traces: {mixer} is no element-wise recurrence; use bptt"):
            Learner(net := model(mixer=mixer, width=8), Sum(net), trace())
    with refused("the policy names lstm"):
        learner(trace(policy={"lstm": "own"}))
    with refused("GatedLRU has no 'own' traces of lru.decay"):
        learner(trace(policy={"lru": "own"}))
    with refused("is called twice"):
        twice = model(2)
        twice.stack.blocks[1].mixer = twice.stack.blocks[0].mixer
        ours = Learner(twice, torch.optim.SGD(twice.parameters(), 0.1), trace(1), streams=2)
        question, answer = asked(world(1), [0, 1], 0, 1, 0)
        ours.predict(question)
        ours.learn(answer)


@pytest.mark.slow
def test_frozen_layers_have_no_traces_and_pass_errors_on() -> None:
    here = world(10)
    plain, frozen = learner(trace(1, policy=WHOLE), depth=2), model(2)
    frozen.stack.blocks[1].requires_grad_(False)
    ours = Learner(frozen, Sum(frozen), trace(1, policy=WHOLE), streams=2, clip_norm=None)
    for each in (ours, plain):
        for t in range(10):
            question, answer = asked(here, [0, 1], t, t + 1, t)
            each.predict(question)
            learn(each, answer)
    assert ours.traces is not None and not ours.traces.values["stack.blocks.1.mixer"]
    name = "stack.blocks.0.mixer.lru.decay"
    assert ours.optimizer.total[name].equal(plain.optimizer.total[name])  # type: ignore[attr-defined]


def test_rules_are_values() -> None:
    assert trace(4) == Trace(4) and trace(policy={"conv": "own"}).policy == (("conv", "own"),)
    assert immediate() == bptt(1)


@pytest.mark.parametrize(
    ("chunk", "every", "some", "dtype", "length"),
    [
        (1, None, False, torch.float64, 1),
        (4, 2, False, torch.float64, 1),
        (3, None, True, torch.float64, 1),
        (1, None, False, torch.float32, 1),
        (2, None, True, torch.float64, 5),
        (3, 1, False, torch.float64, 4),
    ],
)
def test_a_single_pass_has_the_traces_of_all_layers(
    chunk: int, every: int | None, some: bool, dtype: torch.dtype, length: int
) -> None:
    """The fast form is the readable one, but for rounding: parameters after a life, and traces."""
    x, *rest = world(20)
    here, lives = (x.to(dtype), *rest), list[Learner]()
    close = {"rtol": 1e-10, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-6}
    for quick in (True, False):
        net = model(2, width=12, num_heads=2).to(dtype)
        ours = Learner(net, torch.optim.SGD(net.parameters(), 0.1), trace(chunk, every=every), streams=2)
        assert ours.traces is not None
        ours.traces.at_once = quick
        for t in range(0, 20, length):
            question, answer = asked(here, [t % 2] if some and t % 3 else [0, 1], t, t + length, t)
            ours.predict(question)
            use = answer.learn_mask & (torch.arange(length) >= length - 2)  # some pieces have nothing to learn
            ours.learn(answer._replace(learn_mask=use))
        assert ours.traces.at_once == quick and ours.updates >= 3
        lives.append(ours)
    for one, two in zip(lives[0].model.parameters(), lives[1].model.parameters(), strict=True):
        torch.testing.assert_close(one, two, **close)
    first, second = (ours.traces for ours in lives)
    assert first is not None and second is not None
    for name, traces in second.values.items():
        for part, e in traces.items():
            torch.testing.assert_close(first.values[name][part], e, **close)


@pytest.mark.slow
@pytest.mark.parametrize("groups", [0, 3])
def test_a_table_is_learned_by_traces_without_autograd(groups: int) -> None:
    here, lives = table(40, 1, 2, 0, groups, seed=5, missing=0.2), []
    for quick in (True, False):
        stream = here.stream()
        with seeded(0):
            net = TableModel(here.source.columns, width=8, depth=2).double()
        ours = Learner(net, adamw(net, 1e-2), trace(4), streams=stream.streams)
        assert ours.traces is not None
        ours.traces.at_once = quick
        said = []
        while batch := stream.send(None):
            for answer in batch.answers:
                ours.learn(answer)
            if batch.question is not None:
                said.append(ours.predict(batch.question))
        assert ours.traces.at_once == quick and ours.updates > 5
        lives.append(said)
    for one, two in zip(*lives, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("touched", [False, True])
def test_the_pass_that_answered_serves_the_gradient_unless_parameters_have_moved(
    touched: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass a step; a life with two of them is the same to the bit."""
    passes, forward = list[int](), kernel.forward_pass
    monkeypatch.setattr(kernel, "forward_pass", lambda *given: (passes.append(1), forward(*given)))
    rows, nets = table(30, 1, 0, 0, 0, seed=5, missing=0.2), []
    for twice in (False, True):
        with seeded(0):
            net = TableModel(rows.source.columns, width=8, depth=2).double()
        ours, stream, counts = Learner(net, adamw(net, 1e-2), trace(1), streams=1), rows.stream(), set[int]()
        while batch := stream.send(None):
            for answer in batch.answers:
                if twice and touched:
                    with torch.no_grad():
                        net.head.bias.mul_(1.0)
                elif twice:
                    assert ours._sink is not None
                    ours._sink.last = None
                if ours.learn(answer).outcome == "updated":
                    counts.add(len(passes))
            if batch.question is not None:
                passes.clear()
                ours.predict(batch.question).zero_()  # what was answered is not what is kept
        assert ours.updates > 20 and counts == {2 if twice else 1}
        nets.append(net)
    assert all(one.equal(two) for one, two in zip(*(net.parameters() for net in nets), strict=True))


@pytest.mark.parametrize("mixer", ["LRU", "MultiScaleSSM"])
def test_the_pass_that_answered_serves_traces_of_layers_that_have_no_single_pass(
    mixer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One forward pass a step, also where nothing is learned; a life with two is the same but for rounding."""
    here, lives = world(20), list[Learner]()
    for reuse in (True, False):
        ours, passes = learner(trace(1), 2, mixer, reuse=reuse), list[int]()
        ours.optimizer = torch.optim.SGD(ours.model.parameters(), 0.1)
        ours.model.stack.blocks[0].mixer.register_forward_hook(lambda *_: passes.append(1))  # type: ignore[operator]  # noqa: B023
        for t in range(20):
            question, answer = asked(here, [t % 2] if t % 3 else [0, 1], t, t + 1, t)
            ours.predict(question)
            ours.learn(answer if t % 4 else answer._replace(learn_mask=torch.zeros_like(answer.learn_mask)))
        assert len(passes) == 20 * (1 if reuse else 2) and 5 < ours.updates < 20
        lives.append(ours)
    for one, two in zip(*(ours.model.parameters() for ours in lives), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
    first, second = (ours.traces for ours in lives)
    assert first is not None and second is not None and first.values.keys() == second.values.keys()
    for name, traces in second.values.items():
        for part, e in traces.items():
            torch.testing.assert_close(first.values[name][part], e, rtol=1e-12, atol=1e-13)


def test_a_layer_that_somebody_listens_to_is_called() -> None:
    here, net = world(6), model(2)
    ours = Learner(net, adamw(net, 1e-2), trace(2), streams=2)
    heard: list[int] = []
    net.stack.blocks[0].mixer.linear_x.register_forward_hook(lambda *_: heard.append(1))
    for t in range(6):
        question, answer = asked(here, [0, 1], t, t + 1, t)
        ours.predict(question)
        ours.learn(answer)
    assert ours.updates == 3 and len(heard) > 6


def lived(ours: Learner, here: Any, steps: int, **hooks: Any) -> Learner:
    """Lives one step at a time; hooks: called between question and answer, or with what was answered."""
    for t in range(steps):
        question, answer = asked(here, [0, 1], t, t + 1, t)
        said = ours.predict(question)
        if "said" in hooks:
            hooks["said"](said)
        if "between" in hooks:
            ours = hooks["between"](ours, t)
        ours.learn(answer if t % 3 else answer._replace(learn_mask=torch.zeros_like(answer.learn_mask)))
    return ours


def descending(mixer: str, rule: Any, **options: Any) -> Learner:
    net = model(2, mixer, 8)
    return Learner(net, torch.optim.SGD(net.parameters(), 0.5), rule, streams=2, **options)


@pytest.mark.parametrize("rule", [trace(1), bptt(1)])
@pytest.mark.parametrize("mixer", ["LRU", "MultiScaleSSM"])
def test_what_was_answered_may_be_written_to_and_parameters_moved_before_the_answer_comes(
    mixer: str, rule: Any
) -> None:
    def shrink(ours: Learner, t: int) -> Learner:
        if t == 5:
            with torch.no_grad():
                for p in ours.model.parameters():
                    p.mul_(0.99)
        return ours

    here = world(8)
    one = lived(descending(mixer, rule), here, 8, said=Tensor.zero_, between=shrink)
    two = lived(descending(mixer, rule, reuse=False), here, 8, between=shrink)
    for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("mixer", ["LRU", "MultiScaleSSM", "GatedLRU"])
def test_a_fork_between_question_and_answer_goes_on_to_the_same_bits(mixer: str) -> None:
    def rule() -> Learner:
        ours = descending(mixer, trace(1))
        ours.model.float()
        return ours

    x, *rest = world(12)
    here = (x.float(), *rest)
    one = lived(rule(), here, 12)
    two = lived(rule(), here, 12, between=lambda ours, t: copy.deepcopy(ours) if t in (3, 7) else ours)
    assert all(p.equal(q) for p, q in zip(one.model.parameters(), two.model.parameters(), strict=True))


@pytest.mark.parametrize("kind", ["extra axes", "bfloat16", "no normalizer"])
def test_a_first_chunk_that_teaches_nothing_does_no_harm(kind: str) -> None:
    x, targets, _, _ = world(6)
    net = model(1)
    if kind == "no normalizer":
        with seeded(0):
            net = SequenceClassifier(3, 2, width=4, depth=1, normalize=False).double()
    if kind == "extra axes":
        x, targets = x[:, :, None].repeat(1, 1, 2, 1), targets[:, :, None].repeat(1, 1, 2)
    net = net.bfloat16() if kind == "bfloat16" else net
    ours = Learner(net, torch.optim.SGD(net.parameters(), 0.1), trace(1), streams=2)
    one, outcomes = torch.ones(2, 1, dtype=torch.bool), []
    for t in range(6):
        ours.predict(Question(x[:, t : t + 1], ~one, one, t, torch.arange(2)))
        answer = Answer(targets[:, t : t + 1], one, one & (t > 0), t, torch.arange(2))
        outcomes.append(ours.learn(answer).outcome)
    assert outcomes == ["nothing to learn"] + ["updated"] * 5


def test_a_loss_that_reads_parameters_has_its_own_gradient_too() -> None:
    """Weight decay in the loss, with questions of several chunks, whether or not there is a single pass."""
    here, nets = world(12), []
    for quick in (True, False):
        net = model(1)
        plain = net.nats
        net.nats = lambda said, true, net=net, plain=plain: (  # type: ignore[method-assign, misc]
            plain(said, true) + 0.01 * sum(p.square().sum() for p in net.stack.parameters())
        )
        ours = Learner(net, torch.optim.SGD(net.parameters(), 0.1), trace(2), streams=2)
        assert ours.traces is not None
        ours.traces.at_once = quick
        for t in (0, 4, 8):
            question, answer = asked(here, [0, 1], t, t + 4, t)
            ours.predict(question)
            assert ours.learn(answer).outcome == "updated"
        nets.append(net)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("mixer", ["LRU", "GatedLRU"])
def test_after_a_reset_what_was_not_finite_before_it_is_gone(mixer: str) -> None:
    x, targets, _, _ = world(6)
    x = x.clone()
    x[0, 1] = math.nan
    with seeded(0):
        net = SequenceClassifier(3, 2, width=4, depth=1, mixer=mixer, normalize=False).double()
    ours, outcomes = Learner(net, torch.optim.SGD(net.parameters(), 0.1), trace(1), streams=2), []
    one = torch.ones(2, 1, dtype=torch.bool)
    for t in range(6):
        reset = one & (t == 3) & torch.tensor([[True], [False]])
        ours.predict(Question(x[:, t : t + 1], reset, one, t, torch.arange(2)))
        outcomes.append(ours.learn(Answer(targets[:, t : t + 1], one, one, t, torch.arange(2))).outcome)
    assert outcomes == ["updated", "non-finite loss", "non-finite loss", "updated", "updated", "updated"]
