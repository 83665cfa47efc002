"""A fork that learns something new, and a learner that does not notice."""

import math

import pytest
import torch

from pliant.core import Answer, Question, UsageError, generator, seeded
from pliant.core.pack import differences
from pliant.learn import Learner, bptt
from pliant.learn.probe import new_task
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


def test_nothing_to_ask_or_too_few_passes() -> None:
    known = pairs(1)
    blank = known[0][1]._replace(target_mask=torch.zeros(4, 5, dtype=torch.bool))
    for given, passes in (([], 4), ([(known[0][0], blank)], 4), (known, 1)):
        with pytest.raises(UsageError, match="new_task"):
            new_task(learner(), given, passes=passes)
