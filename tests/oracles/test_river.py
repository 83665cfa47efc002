"""The trees of river, row by row."""

import copy
import random
from functools import partial
from typing import Any

import pytest
import torch

from pliant.core import UsageError
from pliant.core.change import Foreign
from pliant.learn.references import LastLabel, Marginal
from tests.learn.test_trees import TASKS, cost, table, walk

pytest.importorskip("river")
from river import drift

from pliant.learn.trees import River

pytestmark = pytest.mark.oracle
KINDS = ("hoeffding-adaptive-tree", "adaptive-random-forest")


def river(of: Any, kind: str) -> River:
    return River(of, kind, trees=3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("lag", [1, 3])
def test_rows_one_by_one_and_in_chunks_are_answered_the_same(kind: str, task: str, lag: int) -> None:
    of, question, _ = table(task, lag)
    question.mask[0, 20:40] = False
    question.reset[1, 50] = True
    one = river(of, kind)
    said = walk(one, question, 0, 80, 1)
    twin = copy.deepcopy(one)
    rest = walk(one, question, 80, None, 1)
    assert walk(twin, question, 80, None, 7).equal(rest)
    whole = river(of, kind).predict(question)
    assert whole.equal(torch.cat([said, rest], 1))
    assert whole.isfinite().all()
    assert not whole[~question.mask].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task", TASKS)
def test_it_learns_a_rule_that_the_references_cannot_see(kind: str, task: str) -> None:
    of, question, labels = table(task, steps=1500)
    ours, marginal, last = (walk(one, question) for one in (river(of, kind), Marginal(of), LastLabel(of)))
    late = slice(1000, None)
    assert cost(ours[:, late], labels[:, late]) < cost(marginal[:, late], labels[:, late]) - 0.05
    assert cost(ours[:, late], labels[:, late]) < cost(last[:, late], labels[:, late]) - 0.05


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_wild_stops_it(kind: str) -> None:
    for task in TASKS:
        of, question, _ = table(task)
        question.inputs[:, ::7, 0] = 1e300
        if task != "classify":
            question.inputs[:, ::9, -1] = 1e12
            question.inputs[:, 100::9, -1] = 1e300
        assert walk(river(of, kind), question).isfinite().all()


def test_what_cannot_be_done_is_said() -> None:
    of, _, _ = table("classify")
    with pytest.raises(UsageError, match="resumed"):
        river(of, KINDS[0]).state_dict()
    with pytest.raises(UsageError, match="kind"):
        river(of, "oak")


@pytest.mark.parametrize("name", ["ADWIN", "PageHinkley", "KSWIN"])
def test_a_detector_of_river_finds_the_rise_of_a_loss(name: str) -> None:
    make = partial(drift.KSWIN, seed=0, alpha=1e-4) if name == "KSWIN" else getattr(drift, name)
    draw = random.Random(0)
    detector, values = Foreign(make), [draw.gauss(1, 0.1) for _ in range(300)]
    assert not any(map(detector.update, values))
    twin = Foreign(make)
    twin.load_state_dict(detector.state_dict())
    later = [draw.gauss(2, 0.1) for _ in range(100)]
    found, again = ([place for place, value in enumerate(later) if one.update(value)] for one in (detector, twin))
    assert len(found) == 1
    assert found == again
