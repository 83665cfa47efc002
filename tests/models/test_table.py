"""The model of tables keeps the promises of all models, over rows instead of random numbers."""

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import (
    UsageError,
    check_roles,
    leaves,
    load_state,
    mixture_mean,
    mixture_nats,
    nbytes,
    put,
    save_state,
    seeded,
    stack,
    take,
)
from pliant.core.columns import Column, Columns
from pliant.kernels import ClassCounts, NumberScale, class_reference, number_reference
from pliant.models.table import TableModel
from tests.suite import close

FEATURES = (
    Column("a"),
    Column("kind", "category", ("p", "q", "r")),
    Column("b"),
    Column("many", "category", buckets=7),
)


def columns(task: Any = "classify", *, hold: bool = True, lag: int = 2, targets: int = 2, **more: Any) -> Columns:
    classes = tuple("xyz") if task == "classify" else ()
    names = ("y",) if task == "classify" else tuple("yz"[:targets])
    return Columns(task, more.pop("features", FEATURES), names, classes, lag, label_as_input=hold, **more)


class Case(NamedTuple):
    name: str
    of: Columns
    options: dict[str, Any] = {}  # noqa: RUF012

    def module(self, dtype: torch.dtype = torch.float32, *, fresh: bool = False) -> TableModel:
        with seeded(0, self.name):
            module = TableModel(self.of, **({"width": 8, "depth": 1} | self.options))
            with torch.no_grad():
                for parameter in module.parameters():
                    if not fresh:
                        parameter.add_(0.1 * torch.randn_like(parameter))
        return module.to(dtype)

    def rows(self, batch: int = 3, steps: int = 9, seed: int = 1, missing: float = 0.2) -> Tensor:
        random = np.random.default_rng(seed)
        shape = (batch, steps)
        cells = [
            random.normal(size=shape) if column.kind == "number" else random.integers(column.size, size=shape)
            for column in self.of.features
        ]
        for _ in self.of.targets:
            code = random.integers(max(1, len(self.of.classes)), size=shape)
            cells.append(code if self.of.classes else random.normal(size=shape).cumsum(1))
        x = np.stack(cells, -1).astype(np.float64)
        x[random.random(x.shape) < missing] = np.nan
        return torch.from_numpy(x)


CASES = (
    Case("classes", columns()),
    Case("classes, blind", columns(hold=False)),
    Case("numbers", columns("regress")),
    Case("numbers, blind", columns("regress", hold=False)),
    Case("forecast, deep", columns("forecast", lag=5, targets=1), {"depth": 2}),
    Case("numbers only", columns(features=(Column("a"), Column("b")))),
    Case("categories only", columns(features=FEATURES[1:2])),
    Case("past only", columns("forecast", features=(), targets=1)),
    Case("bare recurrence", columns("regress"), {"mixer": "RGLRU", "mixer_options": {"num_heads": 1}}),
)
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def near(one: Tensor, two: Tensor, dtype: torch.dtype) -> None:
    """Equal up to rounding in the dtype of the parameters."""
    assert one.dtype == two.dtype
    close(one.to(dtype), two.to(dtype))


def same(one: Any, two: Any, dtype: torch.dtype) -> None:
    """States: statistics to the bit, memories up to rounding."""
    for name in ("moments", "reference"):
        for (part, a), (_, b) in zip(leaves(getattr(one, name)), leaves(getattr(two, name)), strict=True):
            assert a.nan_to_num(nan=-9e99).equal(b.nan_to_num(nan=-9e99)), f"{name}.{part}"
    for (_, a), (_, b) in zip(leaves(one.stack), leaves(two.stack), strict=True):
        near(a, b, dtype) if a.is_floating_point() else close(a, b)


class World(NamedTuple):
    x: Tensor
    reset: Tensor | None
    mask: Tensor | None
    cuts: list[int]

    def cut(self, start: int, end: int) -> tuple[Tensor, dict[str, Any]]:
        flags = {"reset": self.reset, "mask": self.mask}
        return self.x[:, start:end], {
            name: flag if flag is None else flag[:, start:end] for name, flag in flags.items()
        }


@st.composite
def worlds(draw: st.DrawFn, case: Case) -> World:
    batch, steps, seed = draw(st.integers(1, 3)), draw(st.integers(1, 12)), draw(st.integers(0, 999))
    share = draw(st.sampled_from([0.0, 0.2, 0.6]))
    random = torch.Generator().manual_seed(seed)
    reset = torch.rand(batch, steps, generator=random) < share if draw(st.booleans()) else None
    mask = torch.rand(batch, steps, generator=random) >= share if draw(st.booleans()) else None
    return World(case.rows(batch, steps, seed), reset, mask, draw(st.lists(st.integers(0, steps), max_size=4)))


@every_case
@given(data=st.data())
def test_whole_sequence_chunks_and_steps_are_the_same(case: Case, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    module, before, world = case.module(dtype), data.draw(worlds(case)), data.draw(worlds(case))
    carried = module(before.x)[1] if len(before.x) == len(world.x) else None
    x, flags = world.cut(0, world.x.shape[1])
    y, end = module(x, carried, **flags)
    assert y.dtype == (dtype if module.classify else torch.float64)
    for edges in (sorted({0, *world.cuts, x.shape[1]}), range(x.shape[1] + 1)):
        state, parts = carried, []
        for a, b in pairwise(edges):
            part, flags = world.cut(a, b)
            out, state = module(part, state, **flags)
            parts.append(out)
        near(torch.cat(parts, 1), y, dtype)
        same(state, end, dtype)
    state, parts = carried, []
    for t in range(x.shape[1]):
        part, flags = world.cut(t, t + 1)
        out, state = module.step(
            part[:, 0], state, **{name: flag if flag is None else flag[:, 0] for name, flag in flags.items()}
        )
        parts.append(out)
    near(torch.stack(parts, 1), y, dtype)
    same(state, end, dtype)


@every_case
def test_a_reset_clears_the_memory_and_keeps_what_is_known_of_the_inputs(case: Case) -> None:
    module, x = case.module(torch.float64), case.rows()
    _, carried = module(case.rows(seed=2))
    reset = torch.zeros(3, 9, dtype=torch.bool)
    reset[1, 4] = True
    y, state = module(x, carried, reset=reset)
    plain, other = module(x, carried)
    others = torch.tensor([0, 2])
    near(y[others], plain[others], torch.float64)
    assert not y[1, 4:].equal(plain[1, 4:])
    same(state._replace(stack=()), other._replace(stack=()), torch.float64)
    # From there on it is a fresh stack that knows the inputs.
    middle = module(x[1:2, :4], take(carried, torch.tensor([1])))[1]
    fresh = middle._replace(stack=module.init_state(1).stack)
    again, end = module(x[1:2, 4:], fresh)
    near(y[1:2, 4:], again, torch.float64)
    same(take(state, torch.tensor([1])), end, torch.float64)


@every_case
def test_no_state_and_a_fresh_state_are_the_same(case: Case) -> None:
    module, x = case.module(), case.rows()
    (y, state), (other, after) = module(x), module(x, module.init_state(3))
    assert y.equal(other)
    same(state, after, torch.float32)
    reset = torch.zeros(3, 9, dtype=torch.bool)
    reset[:, 0] = True
    near(module(x, reset=reset)[0], y, torch.float32)


@every_case
@given(data=st.data())
def test_masked_steps_do_not_exist(case: Case, data: st.DataObject) -> None:
    module, steps = case.module(torch.float64), data.draw(st.integers(1, 10))
    exists = torch.tensor(data.draw(st.lists(st.booleans(), min_size=steps, max_size=steps)))
    x = case.rows(1, steps)
    garbage = data.draw(st.sampled_from([math.nan, math.inf, -1e300, 7e8, -3.5]))
    _, carried = module(case.rows(1, 5, seed=3))
    y, state = module(torch.where(exists[None, :, None], x, garbage), carried, mask=exists[None])
    assert not y[0, ~exists].any()
    short, after = module(x[:, exists], carried)
    near(y[:, exists], short, torch.float64)
    same(state, after, torch.float64)


@every_case
def test_gradients_are_finite_and_do_not_pass_through_masked_steps(case: Case) -> None:
    module, x = case.module(torch.float64), case.rows()
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 3:] = mask[1, :4] = False
    targets = (
        torch.ones(3, 9, dtype=torch.int64) if module.classify else torch.ones(3, 9, len(case.of.targets)).double()
    )
    gradients = []
    for garbage in (math.nan, math.inf, 5e7):
        module.zero_grad()
        y, _ = module(torch.where(mask[..., None], x, garbage), mask=mask)
        module.nats(y[mask], targets[mask]).sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters() if p.numel())
        gradients.append([p.grad for p in module.parameters()])
    for other in gradients[1:]:
        assert all(a is None or a.equal(b) for a, b in zip(gradients[0], other, strict=True))


@every_case
def test_the_future_does_not_touch_the_past_and_streams_are_independent(case: Case) -> None:
    module, x = case.module(torch.float64), case.rows(missing=0)
    altered = torch.cat([x[:, :5], case.rows(missing=0, seed=8)[:, 5:]], 1)
    y, other = module(x)[0], module(altered)[0]
    assert y[:, :5].equal(other[:, :5])
    assert not y[:, 5:].equal(other[:, 5:])
    order = torch.tensor([2, 0, 1])
    (y, state), (moved, after) = module(x), module(x[order])
    near(moved, y[order], torch.float64)
    same(after, take(state, order), torch.float64)
    same(stack([module(x[i : i + 1])[1] for i in range(3)]), state, torch.float64)
    same(put(state, order[:1], take(state, order[:1])), state, torch.float64)


@every_case
def test_a_state_is_a_value_of_fixed_size_and_survives_a_file(case: Case, tmp_path: Path) -> None:
    module, x = case.module(), case.rows()
    _, state = module(x)
    copies = [leaf.clone() for _, leaf in leaves(state)]
    one = module(x[:, :4], state)[0]
    assert module(x[:, :4], state)[0].equal(one)
    assert all(a.nan_to_num().equal(b.nan_to_num()) for a, (_, b) in zip(copies, leaves(state), strict=True))
    assert {nbytes(module(case.rows(steps=steps))[1]) for steps in (1, 2, 33)} == {nbytes(module.init_state(3))}
    y, after = module(x[:, :0], state)
    assert y.shape[:2] == (3, 0)
    same(after, state, torch.float32)
    save_state(state, tmp_path / "state")
    same(load_state(tmp_path / "state", like=module.init_state(1)), state, torch.float32)


@every_case
def test_every_parameter_has_a_role(case: Case) -> None:
    module = case.module()
    check_roles(module, module.roles())


@every_case
def test_a_fresh_model_says_what_no_change_says(case: Case) -> None:
    module, x, of = case.module(torch.float64, fresh=True), case.rows(steps=40), case.of
    known, hold = x[..., len(of.features) :], of.label_as_input
    y, _ = module(x)
    if module.classify:
        expected, _ = class_reference(known[..., 0], ClassCounts.fresh(3, of.lag, 3), hold=hold)
        near(y, expected, torch.float64)
        return
    about, _ = number_reference(known, NumberScale.fresh(3, of.lag, len(of.targets)), hold=hold)
    # In whatever units the scales are told, the distribution lies around the center.
    near(mixture_mean(y), about[:, :, 0], torch.float64)
    logits, means, _ = y.chunk(3, -1)
    assert means.equal(about[:, :, 0, :, None].expand_as(means))
    near(logits.exp().sum(-1), torch.ones_like(logits[..., 0]), torch.float64)


@pytest.mark.parametrize("task", ["classify", "regress"])
def test_a_blind_model_learns_frequencies_and_spreads_but_not_the_newest_label(task: str) -> None:
    case = Case("blind", columns(task, hold=False, targets=1))
    module, x = case.module(torch.float64), case.rows(1, 30, missing=0)
    last = x.clone()
    last[0, -1, -1] = 2 - x[0, -1, -1]
    stack, other = module(x)[1].stack, module(last)[1].stack
    # The stack never reads the channel of labels.
    assert all(a.equal(b) for (_, a), (_, b) in zip(leaves(stack), leaves(other), strict=True))
    if task == "classify":
        shuffled = x.clone()
        shuffled[0, :, -1] = x[0, torch.randperm(30, generator=torch.Generator().manual_seed(0)), -1]
        early, late = module(x)[0][0, -1], module(shuffled)[0][0, -1]
        # The frequencies are all it knows of them: nearly the same in any order.
        assert float((early - late).detach().abs().max()) < 0.05


def test_missing_unseen_and_hashed_categories_are_told_apart_and_work() -> None:
    case = Case("categories", columns())
    module = case.module(torch.float64)
    x = case.rows(1, 1, missing=0).repeat(6, 1, 1)
    x[:, 0, 1] = torch.tensor([0.0, 1, 2, 3, math.nan, 1])
    y = module(x)[0][:, 0]
    assert y[1].equal(y[5])
    assert len({tuple(row) for row in y.detach().tolist()}) == 5
    column = FEATURES[3]
    assert 1 <= column.code("whatever") <= 7
    assert FEATURES[1].code("unseen") == 0
    assert math.isnan(FEATURES[1].code(" N/A "))


@given(
    values=st.lists(
        st.floats(width=64, allow_infinity=False) | st.sampled_from([1e200, -1e300, 1e9, math.nan]),
        min_size=2,
        max_size=40,
    ),
    lag=st.integers(1, 3),
)
def test_outputs_stay_finite_under_wild_values(values: list[float], lag: int) -> None:
    case = Case("wild", columns("regress", features=(Column("a"),), targets=1, lag=lag))
    module = case.module()
    x = torch.tensor(values, dtype=torch.float64)[None, :, None].expand(1, -1, 2).contiguous()
    y, state = module(x)
    assert y.dtype == torch.float64
    assert y.isfinite().all()
    targets = torch.randn(1, len(values), 1, generator=torch.Generator().manual_seed(0)).double()
    assert mixture_nats(y, targets).isfinite().all()
    module.nats(y, targets).sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())
    assert all(leaf.isfinite().all() for _, leaf in leaves(state.stack))


def test_a_scaled_target_gives_a_scaled_answer() -> None:
    case = Case("scaled", columns("regress", features=(Column("a"),), targets=1))
    module, x = case.module(torch.float64), case.rows(1, 60, missing=0)
    scaled = x * torch.tensor([1.0, 1e6], dtype=torch.float64)
    y, other = module(x)[0], module(scaled)[0]
    target = torch.randn(1, 60, 1, generator=torch.Generator().manual_seed(0)).double()
    nats, moved = mixture_nats(y, target), mixture_nats(other, 1e6 * target)
    # Once something has varied: before, the scale is a guess.
    assert (moved - nats)[0, 10:].detach().numpy() == pytest.approx(math.log(1e6), abs=1e-6)


@every_case
def test_a_model_is_saved_and_loaded_by_its_configuration(case: Case, tmp_path: Path) -> None:
    module = case.module()
    module.save_pretrained(tmp_path)
    json.loads((tmp_path / "config.json").read_text())
    with seeded(1):
        loaded = TableModel.from_pretrained(tmp_path)
    x = case.rows()
    assert loaded.columns == case.of
    assert loaded(x)[0].equal(module(x)[0])


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused_with_a_sentence() -> None:
    case = CASES[0]
    module, x = case.module(), case.rows()
    _, state = module(x)
    with pytest.raises(UsageError, match=r"made for 3 streams but the input has 2"):
        module(x[:2], state)
    for wrong in (x[..., :-1], x.float(), x[:, 0], torch.cat([x, x], -1)):
        with pytest.raises(UsageError, match=r"expected torch\.float64"):
            module(wrong)
    with pytest.raises(UsageError, match="mask"):
        module(x, mask=torch.ones(3, 8, dtype=torch.bool))
    with pytest.raises(UsageError, match="reset"):
        module(x, reset=torch.ones(3, 9, dtype=torch.int64))
    with pytest.raises(UsageError, match="extra axes"):
        module.init_state(3, (2,))
    with pytest.raises(UsageError, match="another version"):
        TableModel({"task": "classify"})
