"""Ways to stay able to learn, by name."""

from typing import Any, get_args

import pytest
import torch

from pliant.core import UsageError, seeded
from pliant.core.roles import Role, roles_of
from pliant.learn import Learner, bptt, prequential
from pliant.measure.scores import Accuracy, Scores
from pliant.models import SequenceClassifier
from pliant.optim import Isometry, Rewarm, Schedule, TowardInit, adamw, effective_rate, warmup
from pliant.optim.keeping import KEEPERS, Keeper, keeping
from pliant.streams import digits


def learned(names: tuple[Keeper, ...], questions: int = 12) -> Learner:
    with seeded(3):
        model = SequenceClassifier(8, 10, width=16, depth=1, readout="mean")
    optimizer = adamw(model, 1e-2)
    keep = keeping(names, model, optimizer, warmup(4))
    learner = Learner(model, optimizer, bptt(8), keep, streams=8, seed=1)
    for _ in prequential(digits(batch=8, questions=questions, seed=2), learner, Scores(accuracy=Accuracy())):
        pass
    return learner


def same(one: Learner, other: Learner) -> bool:
    pairs = zip(one.model.parameters(), other.model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def test_without_names_only_the_rate_is_set() -> None:
    with seeded(3):
        model = SequenceClassifier(8, 10, width=16, depth=1, readout="mean")
    optimizer = adamw(model, 1e-2)
    plain = Learner(model, optimizer, bptt(8), [Schedule(warmup(4))], streams=8, seed=1)
    for _ in prequential(digits(batch=8, questions=12, seed=2), plain, Scores(accuracy=Accuracy())):
        pass
    assert same(plain, learned(()))


@pytest.mark.parametrize("name", [name for name in get_args(Keeper) if name not in ("isometry", "rewarm", "ewc")])
def test_each_way_changes_how_a_model_learns(name: Keeper) -> None:
    assert not same(learned((name,), 150), learned((), 150))


def test_projection_keeps_the_norms_of_matrices_and_the_others_do_not() -> None:
    free, kept = learned(()), learned(("normalize-project",))
    with seeded(3):
        start = dict(SequenceClassifier(8, 10, width=16, depth=1, readout="mean").named_parameters())
    matrices = [name for name, role in roles_of(kept.model).items() if role is Role.MATRIX]
    assert matrices
    first, now, loose = (
        {name: float(p.detach().norm()) for name, p in parameters.items()}
        for parameters in (start, *(dict(learner.model.named_parameters()) for learner in (kept, free)))
    )
    assert all(now[name] == pytest.approx(first[name], rel=1e-5) for name in matrices)
    assert max(abs(loose[name] / first[name] - 1) for name in matrices) > 1e-3
    assert effective_rate(kept.optimizer, kept.model).keys() >= set(matrices)


def test_order_does_not_matter() -> None:
    assert same(learned(("toward-init", "normalize-project")), learned(("normalize-project", "toward-init")))


def test_the_rate_is_rewarmed_only_if_asked_for() -> None:
    ways: tuple[tuple[Keeper, ...], ...] = ((), ("rewarm",), ("isometry", "toward-init"))
    kinds: list[list[type[Any]]] = [[type(one) for one in learned(names, 0).keep] for names in ways]
    assert kinds == [[Schedule], [Rewarm], [Schedule, TowardInit, Isometry]]


@pytest.mark.parametrize(("names", "said"), [(("fire",), "fire"), (("rewarm", "rewarm"), "twice")])
def test_what_is_wrong_is_named(names: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        learned(names, 0)


def test_all_names_are_known() -> None:
    assert {"normalize-project", "rewarm", *KEEPERS} == set(get_args(Keeper))
    learned(get_args(Keeper))
