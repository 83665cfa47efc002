"""The conformance suite of mixers and models: whole, chunks, steps, resets, masks, forks, extra axes."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pliant.core import UsageError, check_roles, detach, leaves, load_state, nbytes, put, save_state, stack, take
from tests.mixers.cases import CASES as MIXERS
from tests.models.cases import CASES as MODELS
from tests.suite import Case, World, close, equal_states, in_chunks, in_steps, same_state, worlds

EXTRAS = ((), (2,), (2, 3))
DTYPES = (torch.float32, torch.float64)

every_case = pytest.mark.parametrize("case", MIXERS + MODELS, ids=lambda case: case.name)
every_mixer = pytest.mark.parametrize("case", MIXERS, ids=lambda case: case.name)


def plain(case: Case, batch: int = 3, steps: int = 9, extra: tuple[int, ...] = ()) -> torch.Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randn(batch, steps, *extra, case.features, generator=random)


@every_case
@settings(max_examples=15)
@given(data=st.data())
def test_whole_sequence_chunks_and_steps_are_the_same(case: Case, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    world = data.draw(worlds(case.features, dtype, EXTRAS))
    module = case.module(dtype)
    y, state = module(world.x, **world.flags)
    for other, after in (in_chunks(module, world), in_steps(module, world)):
        close(other, y)
        same_state(after, state)


@every_case
@settings(max_examples=10)
@given(data=st.data())
def test_going_on_from_a_state_is_the_same_as_never_having_stopped(case: Case, data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    first = data.draw(worlds(case.features, dtype, ((2,),)))
    module = case.module(dtype)
    _, state = module(first.x, **first.flags)
    x = torch.randn(*first.x.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    whole = World(x, first.reset, first.mask, first.cuts)
    y, after = module(whole.x, state, **whole.flags)
    for other, end in (in_chunks(module, whole, state), in_steps(module, whole, state)):
        close(other, y)
        same_state(end, after)


@every_case
def test_the_future_does_not_touch_the_past(case: Case) -> None:
    module, x = case.module(), plain(case)
    altered = x.clone()
    altered[:, 5:] += 1
    y, other = module(x)[0], module(altered)[0]
    assert y[:, :5].equal(other[:, :5])
    assert not y[:, 5:].equal(other[:, 5:])


@every_mixer
@given(data=st.data())
def test_a_reset_is_a_fresh_start_in_its_row_alone(case: Case, data: st.DataObject) -> None:
    module, x = case.module(), plain(case)
    at, row = data.draw(st.integers(0, 8)), data.draw(st.integers(0, 2))
    reset = torch.zeros(3, 9, dtype=torch.bool)
    reset[row, at] = True
    _, carried = module(plain(case, steps=4) + 1)
    y, state = module(x, carried, reset=reset)
    without, state_without = module(x, carried)
    alone, state_alone = module(x[row : row + 1, at:])
    close(y[row : row + 1, at:], alone)
    same_state(take(state, torch.tensor([row])), state_alone)
    others = torch.tensor([i for i in range(3) if i != row])
    close(y[others], without[others])
    same_state(take(state, others), take(state_without, others))


@every_mixer
def test_a_reset_drops_even_a_state_that_is_not_finite(case: Case) -> None:
    module, x = case.module(), plain(case)
    _, state = module(x)
    broken = type(state)(*(_broken(part) for part in state))
    reset = torch.zeros(3, 9, dtype=torch.bool)
    reset[:, 0] = True
    close(module(x, broken, reset=reset)[0], module(x)[0])


@every_mixer
def test_what_is_not_finite_stays_in_its_episode_and_its_future(case: Case) -> None:
    """However many steps are taken at once."""
    module, x = case.module(), plain(case, steps=12)
    reset = torch.zeros(3, 12, dtype=torch.bool)
    reset[0, 7] = True
    right, after = module(x, reset=reset)
    x[0, 4] = torch.nan
    y, state = module(x, reset=reset)
    assert y[0, 4].isnan().any()
    close(y[0, :4], right[0, :4])
    close(y[0, 7:], right[0, 7:])
    close(y[1:], right[1:])
    same_state(state, after)
    one_by_one = torch.stack([step.isnan() for step in _steps(module, x)], 1)
    assert module(x)[0].isnan().equal(one_by_one)


def _steps(module: Any, x: torch.Tensor) -> list[torch.Tensor]:
    ys, state = [], None
    for t in range(x.shape[1]):
        y, state = module.step(x[:, t], state)
        ys.append(y)
    return ys


def _broken(part: Any) -> Any:
    if isinstance(part, torch.Tensor):
        return torch.full_like(part, torch.nan) if part.is_floating_point() else part
    return type(part)(*(_broken(inner) for inner in part))


@every_case
def test_no_state_a_fresh_state_and_a_reset_at_the_start_are_the_same(case: Case) -> None:
    module, x = case.module(), plain(case, extra=(2,))
    reset = torch.zeros(3, 9, dtype=torch.bool)
    reset[:, 0] = True
    y, state = module(x)
    for other, after in (module(x, module.init_state(3, (2,))), module(x, reset=reset)):
        close(other, y)
        same_state(after, state)


@every_case
@given(data=st.data())
def test_masked_steps_do_not_exist(case: Case, data: st.DataObject) -> None:
    module = case.module(torch.float64)
    steps = data.draw(st.integers(1, 12))
    exists = torch.tensor(data.draw(st.lists(st.booleans(), min_size=steps, max_size=steps)))
    resets = torch.tensor(data.draw(st.lists(st.integers(0, 3), min_size=steps, max_size=steps))) == 0
    x = plain(case, 1, steps).double()
    # What stands in a masked step does not matter, not even NaN.
    x = torch.where(exists[None, :, None], x, torch.nan)
    _, carried = module(plain(case, 1, 5).double())
    y, state = module(x, carried, reset=resets[None], mask=exists[None])
    assert not y[0, ~exists].any()

    # A reset on a masked step belongs to the next step that exists.
    pending, moved = False, torch.zeros(steps, dtype=torch.bool)
    for t in range(steps):
        pending = pending or bool(resets[t])
        if exists[t]:
            moved[t], pending = pending, False
    short, after = module(x[:, exists], carried, reset=moved[None, exists])
    close(y[:, exists], short)
    if pending and case in MIXERS:
        same_state(state, module.init_state(1))
    elif not pending:
        same_state(state, after)


@every_case
def test_gradients_do_not_pass_through_masked_steps(case: Case) -> None:
    module, x = case.module(), plain(case)
    mask = torch.ones(3, 9, dtype=torch.bool)
    mask[0, 3:] = mask[1, :4] = False
    y, _ = module(torch.where(mask[..., None], x, torch.nan), mask=mask)
    y.square().sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@every_mixer
def test_packed_episodes_are_the_same_as_separate_ones(case: Case) -> None:
    module = case.module()
    episodes = [plain(case, 1, length) for length in (3, 1, 7, 2)]
    reset = torch.zeros(1, 13, dtype=torch.bool)
    reset[0, [0, 3, 4, 11]] = True
    packed, _ = module(torch.cat(episodes, 1), reset=reset)
    close(packed, torch.cat([module(episode)[0] for episode in episodes], 1))


@every_case
def test_padding_left_and_right_is_the_same_as_none(case: Case) -> None:
    module, x = case.module(), plain(case, 1, 6)
    alone, state = module(x)
    empty = torch.zeros(1, 3, *x.shape[2:])
    gone, here = torch.zeros(1, 3, dtype=torch.bool), torch.ones(1, 6, dtype=torch.bool)
    left, after_left = module(torch.cat([empty, x], 1), mask=torch.cat([gone, here], 1))
    right, after_right = module(torch.cat([x, empty], 1), mask=torch.cat([here, gone], 1))
    close(left[:, 3:], alone)
    close(right[:, :6], alone)
    same_state(after_left, state)
    same_state(after_right, state)


@every_case
def test_a_state_is_a_value(case: Case) -> None:
    module, x = case.module(), plain(case)
    _, state = module(x)
    kept = type(state)(*state)
    copies = {name: leaf.clone() for name, leaf in leaves(state)}
    one, after_one = module(x[:, :4], state)
    two, after_two = module(x[:, :4], kept)
    assert one.equal(two)
    assert equal_states(after_one, after_two)
    assert all(leaf.equal(copies[name]) for name, leaf in leaves(state))
    assert not module(x[:, :4] + 1, state)[0].equal(one)


@every_case
def test_streams_are_independent(case: Case) -> None:
    module, x = case.module(), plain(case)
    order = torch.tensor([2, 0, 1])
    y, state = module(x)
    other, moved = module(x[order])
    close(other, y[order])
    same_state(moved, take(state, order))
    split = [module(x[i : i + 1])[1] for i in range(3)]
    same_state(stack(split), state)
    same_state(put(state, order[:1], take(state, order[:1])), state)


@every_mixer
def test_extra_axes_are_streams_that_share_time(case: Case) -> None:
    module, x = case.module(), plain(case, extra=(2, 3))
    reset = torch.rand(3, 9, generator=torch.Generator().manual_seed(5)) < 0.3
    y, _ = module(x, reset=reset)
    flat = x.permute(0, 2, 3, 1, 4).reshape(18, 9, -1)
    close(y, module(flat, reset=reset.repeat_interleave(6, 0))[0].reshape(3, 2, 3, 9, -1).permute(0, 3, 1, 2, 4))


@every_case
def test_the_size_of_the_state_does_not_depend_on_time(case: Case) -> None:
    module = case.module()
    sizes = {nbytes(module(plain(case, steps=steps))[1]) for steps in (1, 2, 33)}
    assert sizes == {nbytes(module.init_state(3))}


@every_case
def test_no_steps_change_nothing(case: Case) -> None:
    module, x = case.module(), plain(case)
    _, state = module(x)
    y, after = module(x[:, :0], state)
    assert y.shape[1] == 0
    assert equal_states(after, state)


@every_mixer
def test_no_streams_and_no_extra_ones_are_allowed(case: Case) -> None:
    module = case.module()
    for batch, steps, extra in ((0, 5, ()), (0, 1, (2,)), (0, 0, ()), (2, 5, (0,)), (2, 1, (0,))):
        x, flag = plain(case, batch, steps, extra), torch.ones(batch, steps, dtype=torch.bool)
        for flags in ({}, {"reset": flag, "mask": flag}):
            y, state = module(x, module.init_state(batch, extra), **flags)
            assert y.shape == x.shape
            fresh = module.init_state(batch, extra)
            assert [part.shape for _, part in leaves(state)] == [part.shape for _, part in leaves(fresh)]
            if steps:
                y.sum().backward()


@every_mixer
def test_gradients_reach_the_initial_state_and_are_right(case: Case) -> None:
    module = case.module(torch.float64)
    _, state = module(plain(case, 2, 3).double())
    floats = [leaf for _, leaf in leaves(detach(state)) if leaf.is_floating_point() and leaf.numel()]
    x = plain(case, 2, 4).double()

    def run(x: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        values = iter(given)
        fill = _refill(detach(state), values)
        return module(x, fill)[0]

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), *(leaf.requires_grad_() for leaf in floats)))


def _refill(state: Any, values: Any) -> Any:
    if isinstance(state, torch.Tensor):
        return next(values) if state.is_floating_point() and state.numel() else state
    return type(state)(*(_refill(part, values) for part in state))


@every_mixer
def test_narrow_inputs_give_narrow_outputs_and_a_wide_state(case: Case) -> None:
    module, x = case.module(), plain(case)
    y, _ = module(x)
    narrow, state = module.to(torch.bfloat16)(x.bfloat16())
    assert narrow.dtype == torch.bfloat16
    assert all(leaf.dtype == torch.float32 for _, leaf in leaves(state) if leaf.is_floating_point())
    # bfloat16 keeps 8 bits; weights, inputs and every product are rounded.
    assert float((narrow.float() - y).detach().abs().max()) < 0.1 * max(1.0, float(y.detach().abs().max()))


@every_case
def test_extreme_inputs_stay_finite(case: Case) -> None:
    module = case.module()
    for size in (20.0, 1e4, 1e-30):
        y, state = module(size * plain(case))
        y.sum().backward()
        assert y.isfinite().all()
        assert all(leaf.isfinite().all() for _, leaf in leaves(state))
        assert all(p.grad is None or p.grad.isfinite().all() for p in module.parameters())


@every_case
def test_every_parameter_has_a_role(case: Case) -> None:
    module = case.module()
    check_roles(module, module.roles())


@every_case
def test_a_state_survives_a_file(case: Case, tmp_path: Any) -> None:
    module = case.module()
    _, state = module(plain(case, extra=(2,)))
    save_state(state, tmp_path / "state.safetensors")
    loaded = load_state(tmp_path / "state.safetensors", like=module.init_state(1, (2,)))
    assert type(loaded) is type(state)
    assert equal_states(loaded, state)
    with pytest.raises(UsageError, match="load_state"):
        load_state(tmp_path / "none", like=state)
    with pytest.raises(UsageError, match="state:"):
        load_state(tmp_path / "state.safetensors", like=module.init_state(1, (3,)))


@every_case
@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused_with_a_sentence(case: Case) -> None:
    module, x = case.module(), plain(case)
    _, state = module(x)
    with pytest.raises(UsageError, match=r"made for 3 streams but the input has 2.*init_state\(2\)"):
        module(x[:2], state)
    with pytest.raises(UsageError, match="expected"):
        module(torch.zeros(3, 9, case.features + 1))
    with pytest.raises(UsageError, match="mask"):
        module(x, mask=torch.ones(3, 8, dtype=torch.bool))
    with pytest.raises(UsageError, match="reset"):
        module(x, reset=torch.ones(3, 9, dtype=torch.int64))
