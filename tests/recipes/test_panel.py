"""Scores that are gathered are those of one answer after the other."""

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import Answer, categorical_nats
from pliant.core.pack import differences, pack, unpack
from pliant.recipes.panel import GATHER, SPAN, Changes, Gathered, Scoring, row_nats

STREAMS, CLASSES = 3, 4
NAMES = ("one", "two", "three")
Pair = tuple[Answer, Tensor | None]


def pairs(numbers: bool, seed: int, count: int, steps: int = 3, missed: float = 0.2) -> list[Pair]:
    """Answers about some of the streams; some targets are hidden, some questions forgotten."""
    random = torch.Generator().manual_seed(seed)
    found: list[Pair] = []
    for time in range(count):
        rows = torch.randperm(STREAMS, generator=random)[: int(torch.randint(1, STREAMS + 1, (), generator=random))]
        shape = (len(rows), steps)
        shown = torch.rand(shape, generator=random) < 0.8
        if numbers:
            targets = torch.randn(*shape, 2, generator=random, dtype=torch.float64)
            said = torch.randn(*shape, 2, 6, generator=random, dtype=torch.float64)
        else:
            targets = torch.randint(CLASSES, shape, generator=random)
            said = torch.randn(*shape, CLASSES, generator=random)
        tags = {"group": rows[:, None].expand(shape)}
        answer = Answer(targets, shown, shown, time, rows, tags=tags)
        found.append((answer, None if float(torch.rand((), generator=random)) < missed else said))
    return found


def scoring(numbers: bool) -> Scoring:
    return Scoring(numbers, "group", NAMES)


def close(one: Any, two: Any) -> None:
    """Counts exactly, sums up to rounding."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            close(one[name], two[name])
    elif isinstance(one, Tensor) and one.is_floating_point():
        torch.testing.assert_close(one, two, rtol=1e-6, atol=1e-6)
    else:
        assert differences(one, two) == [], (one, two)


@pytest.mark.parametrize("numbers", [False, True])
@given(seed=st.integers(0, 999), count=st.integers(0, 80), missed=st.sampled_from([0.0, 0.3, 1.0]))
def test_gathered_scores_are_those_of_one_answer_after_the_other(
    numbers: bool, seed: int, count: int, missed: float
) -> None:
    gathered, single = Gathered(scoring(numbers)), scoring(numbers).scores()
    for answer, said in pairs(numbers, seed, count, missed=missed):
        gathered.update(answer, said)
        single.update(answer, said)
    assert gathered.answers == single["bits"].count
    close(gathered.scores.state_dict(), single.state_dict())
    if not numbers:
        # Which label came before which is not a matter of rounding.
        kappa, other = gathered.scores["temporal_kappa"], single["temporal_kappa"]
        assert differences(kappa.state_dict(), other.state_dict()) == []
        assert differences(gathered.scores["kappa"].state_dict(), single["kappa"].state_dict()) == []


@pytest.mark.parametrize("numbers", [False, True])
@given(seed=st.integers(0, 999), cut=st.integers(0, 60))
def test_a_window_is_saved_in_its_middle_and_goes_on_to_the_bit(numbers: bool, seed: int, cut: int) -> None:
    whole, first = Gathered(scoring(numbers)), Gathered(scoring(numbers))
    everything = pairs(numbers, seed, 60, steps=7)
    for answer, said in everything:
        whole.update(answer, said)
    for answer, said in everything[:cut]:
        first.update(answer, said)
    state = unpack(*pack(first.state_dict()))
    second, twin = Gathered(scoring(numbers)), copy.deepcopy(first)
    second.load_state_dict(state)
    for other in (second, twin, first):
        for answer, said in everything[cut:]:
            other.update(answer, said)
        assert other.answers == whole.answers
        assert differences(other.state_dict(), whole.state_dict()) == []
        assert differences(other.scores.state_dict(), copy.deepcopy(whole).scores.state_dict()) == []


def test_a_new_window_knows_nothing() -> None:
    gathered = Gathered(scoring(False))
    for answer, said in pairs(False, 0, 5):
        gathered.update(answer, said)
    gathered.begin()
    assert gathered.answers == 0
    assert differences(gathered.state_dict(), Gathered(scoring(False)).state_dict()) == []
    assert differences(gathered.scores.state_dict(), scoring(False).scores().state_dict()) == []


def test_windows_merge_to_the_whole() -> None:
    everything = pairs(False, 3, 200)
    whole, total = scoring(False).scores(), scoring(False).scores()
    window = Gathered(scoring(False))
    for i, (answer, said) in enumerate(everything):
        whole.update(answer, said)
        window.update(answer, said)
        if i % 37 == 36 or i == len(everything) - 1:
            total = total.merge(window.scores)
            window.begin()
    close(total.state_dict(), whole.state_dict())


@pytest.mark.parametrize("numbers", [False, True])
def test_scores_apart_are_those_of_each_group(numbers: bool) -> None:
    of, everything = scoring(numbers), pairs(numbers, 1, 40)
    gathered = Gathered(of)
    for answer, said in everything:
        gathered.update(answer, said)
    apart = of.apart(gathered.scores)
    assert list(apart) == list(NAMES)
    for group, name in enumerate(NAMES):
        alone = Scoring(numbers).scores()
        for answer, said in everything:
            mine = answer.target_mask & (answer.rows == group)[:, None]
            alone.update(answer._replace(target_mask=mine), said)
        assert apart[name]["answers"] == alone["bits"].count
        assert apart[name]["bits"] == pytest.approx(alone["bits"].value())
        assert apart[name][of.main] == pytest.approx(alone[of.main].value())
    assert Scoring(numbers).apart(gathered.scores) == {}
    assert GATHER > 1


@pytest.mark.parametrize("numbers", [False, True])
def test_a_rise_of_the_code_length_is_found_where_it_is(numbers: bool) -> None:
    def run(changes: Changes, start: int, stop: int) -> None:
        for time in range(start, stop):
            random = torch.Generator().manual_seed(time)
            worse = 3.0 * (time >= 300)
            if numbers:
                targets = (1 + worse) * torch.randn(1, 10, 1, generator=random, dtype=torch.float64)
                said = torch.zeros(1, 10, 1, 3, dtype=torch.float64)
            else:
                targets = torch.zeros(1, 10, dtype=torch.int64)
                said = torch.randn(1, 10, CLASSES, generator=random)
                said[..., 0] -= worse
            shown = torch.ones(1, 10, dtype=torch.bool)
            changes.update(Answer(targets, shown, shown, time, torch.zeros(1, dtype=torch.int64)), said)

    nats = row_nats if numbers else categorical_nats
    whole, first, second = Changes(nats), Changes(nats), Changes(nats)
    run(whole, 0, 400)
    assert [place for place in whole.found if 3000 < place <= 3000 + 5 * SPAN][:1] == whole.found[:1] != []
    assert whole.answers == 4000
    run(first, 0, 303)
    second.load_state_dict(unpack(*pack(first.state_dict())))
    run(second, 303, 400)
    assert differences(second.state_dict(), whole.state_dict()) == []
    before = whole.state_dict()
    whole.update(pairs(numbers, 0, 1)[0][0], None)
    assert differences(whole.state_dict(), before) == []
    assert math.isfinite(whole.sum)
