"""Upkeep that retains: replay and elastic weight consolidation."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.core import Answer, Question, UsageError, generator, seeded
from pliant.core.change import Cusum
from pliant.learn import Learner, Life, bptt, prequential
from pliant.models import SequenceClassifier
from pliant.optim import EWC, Lesson, Probe, Replay, ShrinkPerturb, Upkeep, attach
from pliant.optim.memory import Reservoir
from pliant.streams import digits, drift


class Sgd(torch.optim.SGD):
    """Keeps the gradients that it was given."""

    def step(self, closure: Any = None) -> Any:
        self.seen = [p.grad.clone() for group in self.param_groups for p in group["params"]]
        return super().step(closure)


class Unscored:
    def update(self, answer: Answer, said: Tensor | None) -> None: ...


def live(stream: Any, learner: Any) -> Any:
    """The records of a whole life."""
    return prequential(stream, learner, Unscored())


def lesson(values: Tensor, use: Tensor | None = None) -> Lesson:
    """One row of one step for each value."""
    flags = torch.zeros(len(values), 1, dtype=torch.bool)
    targets = values.long()[:, None]
    use = ~flags if use is None else use
    return Lesson(values[:, None, None].double(), flags, ~flags, (values[:, None].clone(),), targets, use)


def model_of(double: bool = False) -> SequenceClassifier:
    with seeded(0):
        model = SequenceClassifier(8, 10, width=16, depth=1, readout="mean")
    return model.double() if double else model


def learner(keep: list[Upkeep], *, double: bool = False, lr: float = 0.05, clip: float | None = None) -> Learner:
    model = model_of(double)
    return Learner(model, Sgd(model.parameters(), lr=lr), bptt(8), keep, clip_norm=clip, streams=16)


def first_pair(double: bool = False) -> tuple[Question, Answer]:
    stream = digits(batch=16, held_out=0.0)
    question = stream.send(None).question  # type: ignore[union-attr]
    answer = stream.send(None).answers[0]  # type: ignore[union-attr]
    assert question is not None
    return (question._replace(inputs=question.inputs.double()) if double else question), answer


def state_like() -> Any:
    return (torch.zeros(1, 1),)


# The reservoir


def test_every_row_is_kept_with_the_same_chance() -> None:
    size, offered, times = 5, 40, 1500
    counts, draw = torch.zeros(offered), generator(3, "reservoir")
    for _ in range(times):
        memory = Reservoir(size)
        for part in torch.arange(float(offered)).split([7, 1, 20, 12]):
            memory.offer(lesson(part), draw)
        counts[memory.parts["targets"][:, 0]] += 1
    assert counts.sum() == size * times
    share = size / offered
    # Inclusion of a row has variance share (1 - share) per time, and rows of one time exclude each other.
    chi_square = float(((counts - times * share) ** 2).sum() / (times * share * (1 - share)) * (offered - 1) / offered)
    assert 16 < chi_square < 73  # all but one in a thousand on either side, 39 degrees of freedom


def test_a_row_stays_together_and_nothing_unlearnable_is_kept() -> None:
    memory, values = Reservoir(6), torch.arange(1.0, 21.0)
    use = (values % 2 == 0)[:, None]
    memory.offer(lesson(values, use), generator(0, "x"))
    drawn = memory.draw(100, generator(0, "y"), state_like)
    assert len(drawn.inputs) == 6 and memory.seen == 10
    assert torch.equal(drawn.inputs[:, 0, 0], drawn.targets[:, 0].double())
    assert torch.equal(drawn.before[0][:, 0].double(), drawn.inputs[:, 0, 0])
    assert bool((drawn.targets % 2 == 0).all()) and len(set(drawn.targets[:, 0].tolist())) == 6


def test_shorter_questions_end_in_steps_that_do_not_exist() -> None:
    memory, long = Reservoir(4), lesson(torch.tensor([3.0, 4.0]))
    long = long._replace(**{
        name: getattr(long, name).repeat(1, 3, *([1] * (getattr(long, name).ndim - 2)))
        for name in ("inputs", "reset", "mask", "targets", "use")
    })  # fmt: skip
    for one in (lesson(torch.tensor([1.0])), long, lesson(torch.tensor([2.0]))):
        memory.offer(one, generator(0, "x"))
    held = memory.rows(torch.arange(4), state_like)
    assert held.mask.sum(1).tolist() == [1, 3, 3, 1] and torch.equal(held.mask, held.use)
    assert held.inputs[:, :, 0].sum(1).tolist() == [1, 9, 12, 2]


# Replay


def test_to_replay_the_same_question_doubles_its_gradient() -> None:
    question, answer = first_pair(double=True)
    memory, ends = Replay(16, 16), []
    for keep in ([memory], [], [memory]):  # the third has what the first put there
        one = learner(keep, double=True, lr=0.0)
        one.predict(question)
        one.learn(answer)
        ends.append(one.optimizer.seen)
    for first, single, twice in zip(*ends, strict=True):
        assert torch.equal(first, single)
        torch.testing.assert_close(twice, 2 * single, rtol=1e-6, atol=1e-9)


def test_what_is_replayed_starts_from_the_state_that_it_had() -> None:
    """The second half of each image comes as a question of its own, in the middle of an episode."""
    question, answer = first_pair()
    halves = [part._replace(time=8 + 4 * i) for i, part in enumerate(_halves(question))]
    one = learner([memory := Replay(16, 16)], lr=0.0)
    with torch.no_grad():
        for p in one.model.head.parameters():  # type: ignore[union-attr]
            p.copy_(torch.arange(p.numel()).reshape(p.shape).sin())
    said = [one.predict(half) for half in halves]
    late = answer._replace(targets=answer.targets[:, 4:], target_mask=answer.target_mask[:, 4:],
                           learn_mask=answer.target_mask[:, 4:], time=12)  # fmt: skip
    one.learn(late)
    held = memory.memory.rows(torch.arange(16), lambda: one.model.init_state(1))  # type: ignore[operator]
    output, _ = one.model(held.inputs, held.before, reset=held.reset, mask=held.mask)
    torch.testing.assert_close(output, said[1], rtol=1e-5, atol=1e-6)
    fresh, _ = one.model(held.inputs, one.model.init_state(16), reset=held.reset, mask=held.mask)  # type: ignore[operator]
    assert not torch.allclose(fresh, said[1], atol=1e-3)


def _halves(question: Question) -> list[Question]:
    parts = zip(*(part.split(4, 1) for part in question[:3]), strict=True)
    return [Question(*part, question.time, question.rows) for part in parts]


@pytest.mark.parametrize(("every", "revisit"), [(1, False), (1, True), (40, True)])
def test_each_answer_is_offered_once_however_late_it_comes(every: int, revisit: bool) -> None:
    """Two steps of each image are known, by different answers, and come after later questions."""
    model = model_of()
    memory = Replay(1000, 4)
    one = Learner(model, Sgd(model.parameters(), lr=0.01), bptt(24, every=every, revisit=revisit), [memory], streams=16)
    for _ in live(drift.delay(digits(batch=16, questions=9, held_out=0.25), questions=2), one):
        pass
    items = memory.memory.parts["inputs"][: memory.memory.seen].flatten(1)
    assert memory.memory.seen == len({tuple(row.tolist()) for row in items})
    waiting = one._held.gathered  # answers that no update has learned from yet
    assert memory.memory.seen + waiting == 9 * 16 - _held_out(9)


def _held_out(questions: int) -> int:
    stream, count = digits(batch=16, questions=questions, held_out=0.25), 0
    while batch := stream.send(None):
        count += sum(int((answer.target_mask & ~answer.learn_mask).sum()) for answer in batch.answers)
    return count


def test_what_is_not_finite_is_not_remembered() -> None:
    question, answer = first_pair()
    one = learner([memory := Replay(16, 16)])
    one.predict(question._replace(inputs=question.inputs * torch.nan))
    assert one.learn(answer).outcome.startswith("non-finite")
    assert memory.memory.seen == 0


# Elastic weight consolidation


def test_the_gradient_of_the_penalty_is_the_distance_in_the_metric_of_fisher() -> None:
    question, answer = first_pair(double=True)
    keep = EWC(7.0, every=1, samples=16)
    plain, held = learner([], double=True), learner([keep], double=True)
    for one in (plain, held):
        one.predict(question)
        one.learn(answer)
    shifted = [p + 0.01 * torch.arange(p.numel(), dtype=p.dtype).reshape(p.shape).sin() for p in keep.anchor]
    for one in (plain, held):
        with torch.no_grad():
            torch._foreach_copy_(list(one.model.parameters()), shifted)
        one.predict(question._replace(time=8))
        before = [weight.clone() for weight in keep.weight], [anchor.clone() for anchor in keep.anchor]
        one.learn(answer._replace(time=8))
    assert any(bool((weight > 0).any()) for weight in before[0])
    for with_it, without, weight, anchor, at in zip(
        held.optimizer.seen, plain.optimizer.seen, *before, shifted, strict=True
    ):
        torch.testing.assert_close(with_it - without, 7.0 * weight * (at - anchor), rtol=1e-9, atol=1e-12)


class Linear(nn.Module):
    """Logits, or the mean of a normal number with deviation 1, that are linear in the inputs."""

    def __init__(self, nats: Callable[[Tensor, Tensor], Tensor], outputs: int):
        super().__init__()
        self.map, self.nats = nn.Linear(3, outputs, bias=False).double(), nats

    def init_state(self, batch: int, extra: Any = ()) -> tuple[Tensor]:
        return (torch.zeros(batch, 0),)

    def forward(self, x: Tensor, state: Any = None, *, reset: Any = None, mask: Any = None) -> tuple[Tensor, Any]:
        output = self.map(x)
        return (output if output.shape[-1] > 1 else output[..., 0]), state


def consolidated(model: Linear, inputs: Tensor, targets: Tensor, fisher: Any) -> Tensor:
    keep = EWC(every=1, samples=len(inputs), fisher=fisher)
    keep.init(model, torch.optim.SGD(model.parameters(), lr=0.1))
    flags = torch.zeros(len(inputs), 1, dtype=torch.bool)
    one = Lesson(inputs[:, None], flags, ~flags, (torch.zeros(len(inputs), 0),), targets[:, None], ~flags)
    question = Question(inputs[:, None], flags, ~flags, 0, torch.arange(len(inputs)))
    with torch.no_grad():
        assert keep.apply(model, torch.optim.SGD(model.parameters()), Probe(1, generator(1, "x"), question, 1, (one,)))
    return keep.weight[0]


def test_fisher_of_a_linear_gaussian_model_is_the_second_moment_of_its_inputs() -> None:
    """g = (said - target) x; where the error is ±1, as large as its deviation, F is E[x²] exactly."""
    with seeded(1):
        model, inputs = Linear(lambda said, truth: 0.5 * (said - truth) ** 2, 1), torch.randn(50, 3).double()
    said = model(inputs)[0].detach()
    targets = said + torch.tensor([1.0, -1.0]).repeat(25)
    found = consolidated(model, inputs, targets, "empirical")
    torch.testing.assert_close(found[0], inputs.square().mean(0), rtol=1e-12, atol=0)
    with pytest.raises(UsageError, match="empirical"):
        consolidated(model, inputs, targets, "sampled")


def test_fisher_of_softmax_is_the_closed_form_whatever_the_targets() -> None:
    """E over the model's own answers of g² is p (1 - p) x² for logits W x."""

    def nats(said: Tensor, truth: Tensor) -> Tensor:
        return nn.functional.cross_entropy(said, truth, reduction="none")

    with seeded(2):
        model, x = Linear(nats, 4), torch.randn(4, 3).double()
    inputs = x.repeat(400, 1)
    p = model(x)[0].softmax(-1).detach()
    exact = ((p * (1 - p))[:, :, None] * x.square()[:, None]).mean(0)
    truth = torch.zeros(len(inputs), dtype=torch.long)
    found = consolidated(model, inputs, truth, "sampled")
    assert float((found / exact - 1).abs().max()) < 0.15  # 1600 draws; the deviation of the worst is about 0.05
    empirical = consolidated(model, inputs, truth, "empirical")
    errors = p - nn.functional.one_hot(torch.zeros(4, dtype=torch.long), 4)
    torch.testing.assert_close(empirical, (errors.square()[:, :, None] * x.square()[:, None]).mean(0))
    assert float((empirical / exact - 1).abs().max()) > 0.3


def test_a_second_consolidation_adds_to_what_has_decayed() -> None:
    question, answer = first_pair()
    keep = EWC(1.0, every=1, samples=4, decay=0.25)
    one = learner([keep], lr=0.0)
    seen = []
    for time in range(0, 24, 8):
        one.predict(question._replace(time=time))
        before, information = [w.clone() for w in keep.weight], []
        keep.information = lambda *args, into=information: into.extend(EWC.information(keep, *args)) or into  # type: ignore[method-assign,func-returns-value]
        one.learn(answer._replace(time=time))
        seen.append(all(torch.allclose(new, 0.25 * old + f)
                        for new, old, f in zip(keep.weight, before, information, strict=True)))  # fmt: skip
    assert seen == [True] * 3 and keep.times == 3


def test_what_is_frozen_later_is_passed_over() -> None:
    question, answer = first_pair()
    keep = EWC(1.0, every=2, samples=4)
    one = learner([keep], lr=0.1)
    for time in range(0, 24, 8):  # a third one waits in the memory
        one.predict(question._replace(time=time))
        one.learn(answer._replace(time=time))
    frozen, *others = one.model.parameters()
    frozen.requires_grad_(False)
    for p in (frozen, *others):
        p.grad = None
    keep.gradient(one.model, one.optimizer, Probe(4, generator(0, "probe"), question, 1.0))
    assert frozen.grad is None and all(p.grad is not None for p in others)
    of_frozen, *of_others = keep.information(one.model, generator(0, "sample"))
    assert not of_frozen.any() and any(f.any() for f in of_others)


def test_a_detector_says_when_to_consolidate() -> None:
    keep = EWC(1.0, detector=Cusum(settle=5, threshold=3.0), samples=4)
    one = learner([keep], lr=0.5)
    stream = drift.permute(digits(batch=16, questions=80, held_out=0.0), every=60 * 16)
    times = [keep.times for _ in live(stream, one)]
    assert times[75] > times[60]


# Both


@pytest.mark.parametrize("keep", [
    lambda: [Replay(40, 8), ShrinkPerturb(1e-3, 1e-3)],
    lambda: [EWC(3.0, every=7, samples=5)],
    lambda: [EWC(3.0, detector=Cusum(settle=4, threshold=1.0), samples=5, fisher="empirical"), Replay(5, 8)],
])  # fmt: skip
def test_a_life_goes_on_to_the_same_bits(keep: Callable[[], list[Upkeep]], tmp_path: Any) -> None:
    def life() -> Life:
        stream = drift.permute(digits(batch=16, questions=30), every=80, returning=2)
        return Life(learner=learner(keep(), clip=1.0), stream=stream)

    whole = life()
    for i, _ in enumerate(live(whole.stream, whole.learner)):
        if i == 15:
            whole.save(tmp_path)
            fork = whole.fork()
    resumed = life()
    resumed.load(tmp_path)
    for other in (fork, resumed):
        for _ in live(other.stream, other.learner):
            pass
        assert whole.diff(other) == []


def test_a_learner_without_a_gradient_of_its_own_makes_no_lessons() -> None:
    class Looking(ShrinkPerturb):
        def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
            assert probe.lessons == ()
            return {}

    class Empty(Looking):
        """Has the hook, does nothing."""

        def gradient(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> None:
            assert torch.is_grad_enabled() and len(probe.lessons) == 1

        def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
            return {}

    ends = []
    for keep in ([], [Looking()], [Empty()]):
        one = learner(keep, clip=1.0)
        for _ in live(digits(batch=16, questions=10), one):
            pass
        ends.append([p.detach().clone() for p in one.model.parameters()])
    for other in ends[1:]:
        assert all(torch.equal(p, q) for p, q in zip(ends[0], other, strict=True))


def test_a_loop_that_is_not_ours_is_told_that_there_is_nothing_to_replay() -> None:
    model = model_of()
    with pytest.raises(UsageError, match="Replay"):
        attach(torch.optim.SGD(model.parameters(), lr=0.1), model, [Replay()])


@pytest.mark.parametrize("make", [
    lambda: Replay(0), lambda: Replay(batch=0), lambda: Replay(strength=-1.0), lambda: EWC(),
    lambda: EWC(-1.0, every=1), lambda: EWC(every=0), lambda: EWC(every=1, decay=2.0), lambda: EWC(every=1, samples=0),
])  # fmt: skip
def test_what_does_not_fit_is_told(make: Callable[[], Any]) -> None:
    with pytest.raises(UsageError):
        make()
