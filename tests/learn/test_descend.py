"""A learner of a table takes a way without autograd; whoever switches it off gets the same life but for rounding."""

import copy
from collections.abc import Sequence

import pytest
import torch

from pliant.core import seeded
from pliant.core.columns import Column, Columns
from pliant.learn import Learner, bptt
from pliant.models.table import TableModel
from pliant.optim import EWC, Replay, Upkeep, adamw
from pliant.streams import Series
from tests.streams.test_series import world


class Called(TableModel):
    """Takes no short way, and makes everything of the rows anew each time."""

    observe = descend = None  # type: ignore[assignment]

    def forward(self, x, state=None, **flags):  # type: ignore[no-untyped-def, override]
        state = self.init_state(x.shape[0]) if state is None else state
        seen, state = TableModel.observe(self, x, state, mask=flags.get("mask"))
        return super().forward(x, state, seen=seen, **flags)


def learner(
    columns: Columns, kind: type[TableModel], stream: Series, window: int, every: int, keep: Sequence[Upkeep] = ()
) -> Learner:
    with seeded(0):
        model = kind(columns, width=8, depth=2).double()
    rule = bptt(window, every=every, revisit=True)
    return Learner(model, adamw(model, 1e-2), rule, keep, streams=stream.streams, remember=200)


def life(ours: Learner, stream: Series) -> tuple[list[torch.Tensor], list[float], list[str]]:
    said, nats, outcomes = [], [], []
    while batch := stream.send(None):
        for answer in batch.answers:
            record = ours.learn(answer)
            outcomes.append(record.outcome)
            nats += [record.nats] if record.learned else []
        if batch.question is not None:
            said.append(ours.predict(batch.question))
    return said, nats, outcomes


@pytest.mark.parametrize("window", [1, 4, 12])
@pytest.mark.parametrize("groups", [0, 3])
@pytest.mark.parametrize(("horizon", "delay"), [(0, 0), (0, 3), (2, 0)])
def test_the_same_life_with_and_without_autograd(horizon: int, delay: int, groups: int, window: int) -> None:
    here = world(60, min(window, 4), delay, horizon, groups, seed=5, missing=0.2)
    every = 1 if window == 1 else 3
    one, two = (learner(here.source.columns, kind, here.stream(), window, every) for kind in (TableModel, Called))
    ways: list[bool] = []
    descend = one.model.descend
    one.model.descend = lambda *a, **k: (ways.append(True), descend(*a, **k))[1]  # type: ignore[method-assign]
    ours, theirs = life(one, here.stream()), life(two, here.stream())
    # Where the forward pass of predict is still valid it is used.
    assert ways or (window <= 4 and not horizon and not delay)
    assert ours[2] == theirs[2] and ours[2].count("updated") > 5
    assert ours[1] == pytest.approx(theirs[1], rel=1e-9, abs=1e-9)
    for a, b in zip(ours[0], theirs[0], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("delay", [0, 3])
def test_what_upkeep_adds_is_in_the_gradient_of_the_short_way_too(delay: int) -> None:
    """There all gradients stand in one buffer, which is clipped as one."""
    here, lives = world(40, 2, delay, seed=5, missing=0.2), []
    for kind in (TableModel, Called):
        keep = [Replay(20, 3), EWC(50.0, every=4, samples=3, fisher="empirical")]
        ours = learner(here.source.columns, kind, here.stream(), 4, 3, keep)
        lives.append(life(ours, here.stream()))
        assert keep[0].memory.seen and keep[1].times  # type: ignore[attr-defined]
    assert lives[0][1] == pytest.approx(lives[1][1], rel=1e-8, abs=1e-8)
    plain = life(learner(here.source.columns, TableModel, here.stream(), 4, 3), here.stream())
    assert plain[1] != pytest.approx(lives[0][1], rel=1e-4)


def test_answers_that_come_long_after_the_others_are_learned_from_too() -> None:
    here = world(60, 1, 20, seed=5, missing=0.0)
    stream = here.stream()
    ours = learner(here.source.columns, TableModel, stream, 4, 4)
    learned: list[int] = []
    descend = ours.model.descend
    ours.model.descend = lambda seen, *a, **k: (learned.append(seen.shape[1]), descend(seen, *a, **k))[1]  # type: ignore
    held = []
    while (batch := stream.send(None)) and batch.question is not None:
        ours.predict(batch.question)
        for answer in batch.answers:
            if answer.time == 0:
                held.append(answer)  # the first one comes with the last of a later four
                continue
            ours.learn(answer)
            if answer.time == 15:
                assert not learned or sum(learned) == 4 * len(learned)
                count = len(learned)
                ours.learn(held.pop())
                assert len(learned) == count + 2 and learned[-1] == 1  # an update for the newest, and one for it
    assert ours.updates == len(learned)


def test_a_saved_learner_keeps_what_was_seen() -> None:
    here = world(60, 1, 1, seed=5)
    stream = here.stream()
    ours = learner(here.source.columns, TableModel, stream, 6, 1)
    for _ in range(30):
        batch = stream.send(None)
        assert batch is not None and batch.question is not None
        [ours.learn(answer) for answer in batch.answers]
        ours.predict(batch.question)
    twin = learner(here.source.columns, TableModel, stream, 6, 1)
    twin.load_state_dict(copy.deepcopy(ours.state_dict()))
    other = copy.deepcopy(stream)
    assert all(a.equal(b) for a, b in zip(life(ours, stream)[0], life(twin, other)[0], strict=True))


def test_columns_of_categories_alone_take_the_short_way_too() -> None:
    columns = Columns("classify", (Column("k", "category", ("p", "q")),), ("t",), ("0", "1"), label_as_input=False)
    with seeded(0):
        model = TableModel(columns, width=8, depth=1)
    seen, state = model.observe(torch.zeros(1, 3, columns.num_features, dtype=torch.float64))
    assert seen.shape == (1, 3, 3)  # one code, two log probabilities
    output, _ = model(torch.zeros(1, 3, columns.num_features, dtype=torch.float64), state, seen=seen)
    assert output.shape == (1, 3, 2)
