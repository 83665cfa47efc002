"""A fork that learns something new, and a learner that does not notice."""

import math

import pytest
import torch

from pliant.core import Answer, Question, UsageError, generator, seeded
from pliant.core.pack import differences
from pliant.learn import Learner, bptt
from pliant.learn.probe import new_task, plasticity, shared_bits
from pliant.models import SequenceClassifier
from pliant.optim import adamw


def pairs(questions: int = 3, numbers: bool = False) -> list[tuple[Question, Answer]]:
    found = []
    for time in range(questions):
        draw = generator(time, "pairs")
        on, rows = torch.ones(4, 5, dtype=torch.bool), torch.arange(4)
        known = on.clone()
        known[0, :2] = False
        shape = (4, 5, 1) if numbers else (4, 5)
        y = torch.randn(shape, generator=draw) if numbers else torch.randint(3, shape, generator=draw)
        reset = torch.zeros_like(on)
        reset[:, 0] = time == 0
        question = Question(torch.randn(4, 5, 2, generator=draw), reset, on, 5 * time, rows)
        found.append((question, Answer(y, known, known, 5 * time, rows)))
    return found


def learner(lr: float = 1e-2, head: str = "classes") -> Learner:
    with seeded(0):
        model = SequenceClassifier(2, 3 if head == "classes" else 1, width=16, depth=1, head=head)
    return Learner(model, adamw(model, lr), bptt(10), streams=4)


def lived(one: Learner, known: list[tuple[Question, Answer]]) -> Learner:
    for question, answer in known:
        one.predict(question)
        one.learn(answer)
    return one


def test_the_learner_goes_on_to_the_same_bits() -> None:
    known = pairs()
    one, two = lived(learner(), known[:2]), lived(learner(), known[:2])
    one.predict(known[2][0])  # which waits for its answer meanwhile
    two.predict(known[2][0])
    random = torch.get_rng_state()
    new_task(one, known, passes=4)
    assert torch.equal(torch.get_rng_state(), random)
    assert not differences(one.state_dict(), two.state_dict())
    assert one.learn(known[2][1]) == two.learn(known[2][1])
    assert not differences(one.state_dict(), two.state_dict())


def test_what_can_learn_does_and_what_cannot_does_not() -> None:
    known = pairs()
    able = new_task(lived(learner(), known), known, passes=30)
    assert able.fell > 0.3 and able.accuracy > 0.6 and able.updates == 90
    unable = new_task(lived(learner(lr=1e-9), known), known, passes=30)
    assert abs(unable.fell) < 1e-3
    assert math.isclose(unable.first, able.first, rel_tol=0.5)


def test_one_seed_is_one_task() -> None:
    known, one = pairs(), learner()
    assert new_task(one, known, passes=3, seed=1) == new_task(one, known, passes=3, seed=1)
    assert new_task(one, known, passes=3, seed=1).last != new_task(one, known, passes=3, seed=2).last


def test_numbers_change_places() -> None:
    known = pairs(numbers=True)
    found = new_task(learner(head="mixture"), known, passes=30)
    assert found.fell > 0.1 and math.isnan(found.accuracy)


# Plasticity


def test_bits_that_lives_share_with_a_symbol() -> None:
    """Of p = (u, 1 - u), u uniform: 1 - E h(u) = 1 - 1 / (2 ln 2) bits; of lives that say one symbol each, log2 n."""
    u = torch.rand(12, 4000, generator=generator(0, "u"), dtype=torch.float64)
    bits, error = shared_bits(torch.stack([u, 1 - u], -1))
    assert bits == pytest.approx(1 - 0.5 / math.log(2), abs=0.005) and error < 0.01
    sure = torch.eye(4, dtype=torch.float64)[torch.randint(4, (40, 500), generator=generator(0, "sure"))]
    assert math.isnan(shared_bits(torch.full((4, 5, 2), math.nan))[0])  # no plausible number of what has diverged
    assert shared_bits(sure)[0] == pytest.approx(2, abs=0.005)
    alike = torch.rand(1, 50, 3, generator=generator(0, "alike"), dtype=torch.float64)
    assert shared_bits((alike / alike.sum(-1, keepdim=True)).expand(8, 50, 3)) == pytest.approx((0, 0), abs=1e-12)


def test_the_error_is_the_deviation_over_draws_of_lives() -> None:
    u = torch.rand(300, 16, 20, generator=generator(0, "u"), dtype=torch.float64)
    found = [shared_bits(torch.stack([one, 1 - one], -1)) for one in u]
    spread = torch.tensor([bits for bits, _ in found]).std()
    assert sum(error for _, error in found) / len(found) == pytest.approx(float(spread), rel=0.15)


def test_a_learner_is_shaped_as_far_as_its_rate_goes_and_stays_what_it_is() -> None:
    known = pairs()
    one, two = lived(learner(), known), lived(learner(), known)
    random = torch.get_rng_state()
    found = [plasticity(one, known, passes=passes, forks=8).bits for passes in (1, 10, 40)]
    assert torch.equal(torch.get_rng_state(), random) and not differences(one.state_dict(), two.state_dict())
    assert 0 < found[0] < found[1] < found[2] < math.log2(3) + 0.05 and found[2] > 0.8
    still = plasticity(lived(learner(lr=1e-9), known), known, passes=10, forks=8)
    assert still.bits < 1e-6 and still.most == math.log2(3) and still.updates == 30
    assert plasticity(one, known, passes=10, forks=8, seed=1) != plasticity(one, known, passes=10, forks=8)


def test_plasticity_of_what_is_no_class_or_too_little_is_refused() -> None:
    for given, more, words in (
        (pairs(1), {"forks": 1}, "10 passes of 1 forks"), (pairs(1), {"passes": 0}, "0 passes"),
        ([], {}, "none of the questions"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=words):
            plasticity(learner(), given, **more)
    with pytest.raises(UsageError, match="targets are numbers"):
        plasticity(learner(head="mixture"), pairs(1, numbers=True))


def test_nothing_to_ask_or_too_few_passes() -> None:
    known = pairs(1)
    blank = known[0][1]._replace(target_mask=torch.zeros(4, 5, dtype=torch.bool))
    for given, passes in (([], 4), ([(known[0][0], blank)], 4), (known, 1)):
        with pytest.raises(UsageError, match=r"none of the questions|1 passes"):
            new_task(learner(), given, passes=passes)
