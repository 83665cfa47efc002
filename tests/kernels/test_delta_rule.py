"""The delta rule: chunks = steps, the checks A1 to A6 of further-mixers.md, limits of its gates."""

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pliant.core import UsageError
from pliant.kernels import delta_rule
from pliant.kernels._delta_rule import LEAF
from pliant.kernels._delta_steps import SPAN
from tests.suite import close

FORMS = [{"form": "loop"}, {"form": "numba"}, *({"form": "chunk", "chunk": chunk} for chunk in (1, 3, 64))]
every_form = pytest.mark.parametrize("how", FORMS, ids=lambda how: "-".join(map(str, how.values())))
few_forms = pytest.mark.parametrize("how", [FORMS[0], FORMS[1], FORMS[3]], ids=["loop", "numba", "chunk"])
fast_forms = pytest.mark.parametrize("form", ["chunk", "numba"])
FLOATS = ("q", "k", "v", "log_decay", "erase", "write", "state")


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    """The test inputs of the dossier."""
    i = torch.arange(math.prod(shape), dtype=torch.float64)
    return torch.sin(0.53 * ((i * i + 3 * i) % 1009) + phase).reshape(shape)


def unit(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def problem(batch: int, steps: int, heads: int, key: int, value: int, seed: int = 0, dtype: torch.dtype = torch.float64,
            decays: str = "head", gates: str = "head", share: float = 0.2) -> dict[str, Any]:  # fmt: skip
    random = torch.Generator().manual_seed(seed)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    at = (batch, steps, heads)
    decay_shape, erase_shape = ((*at, key) if kind == "channel" else at for kind in (decays, gates))
    write_shape = (*at, value) if gates == "channel" else at
    return {
        "q": unit(noise(*at, key)),
        "k": unit(noise(*at, key)),
        "v": noise(*at, value),
        "log_decay": -F.softplus(noise(*decay_shape)),
        "erase": noise(*erase_shape).sigmoid(),
        "write": noise(*write_shape).sigmoid(),
        "state": noise(batch, heads, key, value),
        "reset": torch.rand(batch, steps, generator=random) < share,
        "mask": torch.rand(batch, steps, generator=random) >= share,
    }


@st.composite
def problems(draw: st.DrawFn, dtype: torch.dtype) -> dict[str, Any]:
    sizes = [draw(st.integers(1, 2)), draw(st.integers(0, 40)), draw(st.integers(1, 2))]
    sizes += [draw(st.integers(1, 5)), draw(st.integers(1, 5))]
    kinds = st.sampled_from(["head", "channel"])
    seed, share = draw(st.integers(0, 2**31)), draw(st.sampled_from([0.05, 0.5]))
    found = problem(*sizes, seed, dtype, draw(kinds), draw(kinds), share)
    return found | {name: None for name in ("state", "reset", "mask") if draw(st.booleans())}


def run(given: dict[str, Any], **how: Any) -> list[Tensor]:
    """Outputs, last state, and the gradients of a loss that weighs all of them differently."""
    leaves = {n: given[n].detach().clone().requires_grad_() for n in FLOATS if given[n] is not None}
    o, state = delta_rule(**(given | leaves), **how)
    weigh = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).reshape(o.shape).to(o.dtype)
    loss = (o * weigh).sum() + (state * state).sum().to(o.dtype)
    found: Sequence[Tensor | None] = [None] * len(leaves)  # as with no steps and no state
    if loss.requires_grad:
        found = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    zeros = [torch.zeros_like(x) for x in leaves.values()]
    return [o.detach(), state.detach(), *(z if g is None else g for g, z in zip(found, zeros, strict=True))]


def as_dtype(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {n: x.to(dtype) if x is not None and x.is_floating_point() else x for n, x in given.items()}


# Checks of the dossier


@every_form
def test_check_a1_by_hand(how: dict[str, Any]) -> None:
    k = torch.tensor([[1, 0], [1, 0], [0, 1], [0.6, 0.8]], dtype=torch.float64).reshape(1, 4, 1, 2)
    v = torch.tensor([[2, -1], [4, 3], [1, 1], [0, 2]], dtype=torch.float64).reshape(1, 4, 1, 2)
    beta = torch.tensor([1, 0.5, 1, 0.5], dtype=torch.float64).reshape(1, 4, 1)
    decay = torch.tensor([0.9, 0.5, 0.8, 0.5], dtype=torch.float64).reshape(1, 4, 1)
    o, state = delta_rule(k, k, v, decay.log(), beta, beta, **how)
    close(o.reshape(4, 2), torch.tensor([[2, -1], [2.5, 1.25], [1, 1], [0.5, 1.35]], dtype=torch.float64))
    close(state.reshape(2, 2), torch.tensor([[0.7, 0.89], [0.1, 1.02]], dtype=torch.float64))


def inputs_a2() -> dict[str, Tensor]:
    beta = wave((2, 7, 2), 2.9).sigmoid()
    return {
        "q": unit(wave((2, 7, 2, 3), 0.1)) / 3**0.5,
        "k": unit(wave((2, 7, 2, 3), 0.7)),
        "v": wave((2, 7, 2, 4), 1.3),
        "log_decay": -F.softplus(wave((2, 7, 2), 2.0)),
        "erase": beta,
        "write": beta,
    }


def expect(o: Tensor, state: Tensor, row: list[float], total: float) -> None:
    torch.testing.assert_close(o[0, 6, 1], torch.tensor(row, dtype=torch.float64), atol=1e-10, rtol=0)
    assert state.sum().item() == pytest.approx(total, abs=1e-9)


@every_form
def test_check_a2_gated_delta(how: dict[str, Any]) -> None:
    o, state = delta_rule(**inputs_a2(), **how)
    expect(o, state, [0.2957305699, 0.3009266468, 0.0547619251, 0.0144804104], 2.9904596029)
    assert state.norm().item() == pytest.approx(1.4407153836, abs=1e-9)


@every_form
def test_check_a3_with_a_state_resets_and_masks(how: dict[str, Any]) -> None:
    reset, mask = torch.zeros(2, 7, dtype=torch.bool), torch.ones(2, 7, dtype=torch.bool)
    reset[0, 3] = reset[1, 0] = reset[1, 5] = True
    mask[0, 4] = mask[1, 2] = mask[1, 6] = False
    o, state = delta_rule(**inputs_a2(), state=wave((2, 2, 3, 4), 0.3), reset=reset, mask=mask, **how)
    expect(o, state, [0.2885467954, 0.2991734816, 0.0689189802, 0.0165668283], 2.0382386057)


@every_form
def test_check_a4_a_unit_key_returns_what_was_stored_and_can_be_bound_anew(how: dict[str, Any]) -> None:
    keys = torch.linalg.qr(wave((8, 8), 0.2)).Q
    values, others = wave((8, 5), 0.4), wave((8, 5), 1.7)
    zero, one = torch.zeros(1, 16, 1, dtype=torch.float64), torch.ones(1, 16, 1, dtype=torch.float64)
    k = torch.cat([keys, keys]).reshape(1, 16, 1, 8)
    v = torch.cat([values, others]).reshape(1, 16, 1, 5)
    o, state = delta_rule(k, k, v, zero, one, one, wave((1, 1, 8, 5), 0.9), **how)
    close(o, v)  # what was in the memory before does not matter
    close(keys @ state[0, 0], others)
    _, state = delta_rule(k[:, :8], k[:, :8], v[:, :8], zero[:, :8], one[:, :8], one[:, :8], **how)
    close(keys @ state[0, 0], values)


@every_form
def test_check_a5_a_write_of_two_turns_the_sign(how: dict[str, Any]) -> None:
    k = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 3, 1, 2)
    two = torch.full((1, 3, 1), 2.0, dtype=torch.float64)
    for steps, sign in ((1, -1), (2, 1), (3, -1)):
        q, v, g, b = k[:, :steps], 0 * k[:, :steps], 0 * two[:, :steps], two[:, :steps]
        _, state = delta_rule(q, q, v, g, b, b, torch.eye(2, dtype=torch.float64)[None, None], **how)
        close(state[0, 0], torch.diag(torch.tensor([sign, 1.0], dtype=torch.float64)))


@every_form
def test_check_a6_decays_and_gates_per_channel(how: dict[str, Any]) -> None:
    given = inputs_a2() | {"log_decay": -F.softplus(wave((2, 7, 2, 3), 2.0))}
    o, state = delta_rule(**given, **how)
    expect(o, state, [0.2750947792, 0.2594413599, 0.0258480416, -0.0254266171], 2.1719204698)
    gates = {"erase": wave((2, 7, 2, 3), 0.4).sigmoid(), "write": wave((2, 7, 2, 4), 0.8).sigmoid()}
    o, state = delta_rule(**(given | gates), **how)
    expect(o, state, [0.3663564561, 0.3464480409, 0.0080443231, -0.0095560458], 4.1250356387)


@every_form
def test_settings_are_special_cases_of_each_other(how: dict[str, Any]) -> None:
    given = problem(2, 9, 2, 3, 4)
    o, state = delta_rule(**given, **how)
    spread = {name: given[name][..., None].expand_as(given["k"]) for name in ("log_decay", "erase")}
    spread["write"] = given["write"][..., None].expand_as(given["v"])
    for names in (("log_decay",), ("erase", "write"), tuple(spread)):
        other, last = delta_rule(**(given | {name: spread[name] for name in names}), **how)
        close(other, o)
        close(last, state)


def test_keys_of_length_one_cannot_blow_up_the_memory_and_gates_per_channel_can() -> None:
    given = problem(8, 2000, 1, 3, 2, decays="channel") | {"reset": None, "mask": None}
    given |= {"k": F.normalize(given["k"], dim=-1), "v": 0 * given["v"], "erase": 2 * given["erase"]}
    _, state = delta_rule(**given)
    assert (state.norm(dim=2) <= given["state"].norm(dim=2)).all()
    # further-mixers.md 1.4: two keys, each erased through the channel of the other
    k = torch.tensor([[0.2, 0.8], [0.8, 0.2]], dtype=torch.float64).sqrt().repeat(100, 1).reshape(1, 200, 1, 2)
    b = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64).repeat(100, 1).reshape(1, 200, 1, 2)
    none = torch.zeros(1, 200, 1, dtype=torch.float64)
    start = torch.ones(1, 1, 2, 1, dtype=torch.float64)
    _, at = delta_rule(k[:, :198], k[:, :198], 0 * k[:, :198], none[:, :198], b[:, :198], none[:, :198],
                       start.expand(1, 1, 2, 2))  # fmt: skip
    _, last = delta_rule(k, k, 0 * k, none, b, none, start.expand(1, 1, 2, 2))
    assert float(last.norm() / at.norm()) == pytest.approx(1.246606, abs=1e-6)


# Forms


@fast_forms
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_the_fast_forms_are_the_loop(form: str, dtype: torch.dtype, data: st.DataObject) -> None:
    found = data.draw(problems(dtype))
    chunk = data.draw(st.sampled_from([1, 2, 3, 7, 16, 40]))
    for fast, loop in zip(run(found, form=form, chunk=chunk), run(found, form="loop"), strict=True):
        close(fast, loop)


@fast_forms
@pytest.mark.parametrize("decays", ["head", "channel"])
@pytest.mark.parametrize("steps", [2 * LEAF + 1, 2 * SPAN + 1, 3 * SPAN])
def test_the_fast_forms_are_the_loop_over_many_steps(form: str, decays: str, steps: int) -> None:
    found = problem(2, steps, 2, 4, 3, decays=decays, share=0.03)
    for fast, loop in zip(run(found, form=form), run(found, form="loop"), strict=True):
        close(fast, loop)


def test_threads_do_not_change_a_bit() -> None:
    found = problem(2, 70, 4, 16, 16, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = run(found, form="numba")
        torch.set_num_threads(3)
        assert all(torch.equal(x, y) for x, y in zip(run(found, form="numba"), alone, strict=True))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("decays", ["head", "channel"])
def test_the_custom_op_fits_its_schema_and_its_gradient(decays: str) -> None:
    found = problem(2, 6, 2, 3, 2, decays=decays)
    decay = found["log_decay"].exp()
    decay = decay if decays == "channel" else decay[..., None]
    floats = [x.detach().requires_grad_() for x in (found["q"], found["k"], found["v"], found["k"], decay)]
    start = found["state"].detach().requires_grad_()
    for reset in (None, found["reset"]):
        torch.library.opcheck(torch.ops.pliant.delta_rule.default, (*floats, start, reset, True))


@few_forms
@given(data=st.data())
def test_going_on_from_a_state_is_the_same_as_never_having_stopped(how: dict[str, Any], data: st.DataObject) -> None:
    found = data.draw(problems(torch.float64))
    o, last = delta_rule(**found, **how)
    state, parts, steps = found["state"], [], o.shape[1]
    for start, end in pairwise([0, *sorted(data.draw(st.lists(st.integers(0, steps), max_size=3))), steps]):
        span = {n: None if x is None else x[:, start:end] for n, x in found.items() if n != "state"}
        part, state = delta_rule(**span, state=state, **how)
        parts.append(part)
    close(torch.cat(parts, 1), o)
    assert state is not None
    close(state, last)


@few_forms
@pytest.mark.parametrize("kind", ["head", "channel"])
def test_gradients_are_those_of_finite_differences(how: dict[str, Any], kind: str) -> None:
    found = problem(2, 5, 1, 2, 2, decays=kind, gates=kind)

    def rule(*values: Tensor) -> Any:
        return delta_rule(**(found | dict(zip(FLOATS, values, strict=True))), **how)

    assert torch.autograd.gradcheck(rule, [found[name].requires_grad_() for name in FLOATS])


def test_nothing_within_a_chunk_is_kept_for_the_gradient() -> None:
    found = problem(1, 64, 1, 2, 2, dtype=torch.float32) | {"mask": None, "reset": None}
    found["k"].requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        delta_rule(**found, chunk=32, form="chunk")
    assert max(kept) <= 64 * 2


# Limits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("decays", ["head", "channel"])
def test_decays_of_zero_one_and_all_between_stay_exact(dtype: torch.dtype, decays: str) -> None:
    found = problem(2, 70, 2, 4, 3, dtype=dtype, decays=decays, share=0.02)
    choice = torch.tensor([-torch.inf, -1e4, -20.0, -1e-4, -1e-40, 0.0], dtype=dtype)
    random = torch.Generator().manual_seed(1)
    found["log_decay"] = choice[torch.randint(6, found["log_decay"].shape, generator=random)]
    loops = run(found, form="loop")
    for form in ("chunk", "numba"):
        for fast, loop in zip(run(found, form=form), loops, strict=True):
            close(fast, loop, 4.0)


def test_weak_decays_are_not_lost_behind_strong_ones() -> None:
    found = problem(1, 64, 1, 4, 3, dtype=torch.float32) | {"reset": None, "mask": None}
    found["log_decay"] = torch.full((1, 64, 1), -20.0)
    found["log_decay"][:, 50:] = -1e-4
    exact, _ = delta_rule(**as_dtype(found, torch.float64), form="loop")
    o, _ = delta_rule(**found, form="chunk")
    torch.testing.assert_close(o.double(), exact, atol=1e-6, rtol=0)  # a sum in float32 is off by 7e-6


@every_form
def test_decay_zero_has_no_memory_and_decay_one_keeps_it(how: dict[str, Any]) -> None:
    found = problem(1, 9, 2, 3, 2) | {"reset": None, "mask": None}
    gone = found | {"log_decay": torch.full((1, 9, 2), -torch.inf, dtype=torch.float64)}
    o, _ = delta_rule(**gone, **how)
    reads = (found["q"] * found["k"]).sum(-1, keepdim=True)
    close(o, reads * found["write"][..., None] * found["v"])
    nothing = torch.zeros(1, 9, 2, dtype=torch.float64)
    _, state = delta_rule(**(found | {"log_decay": nothing, "erase": nothing, "write": nothing}), **how)
    assert state.equal(found["state"])


@every_form
@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e10])
def test_values_and_keys_of_any_size_stay_finite(how: dict[str, Any], size: float) -> None:
    found = problem(2, 12, 1, 3, 2, dtype=torch.float32)
    found |= {"v": size * found["v"], "k": min(size, 1.0) * found["k"], "q": size * found["q"]}
    assert all(part.isfinite().all() for part in run(found, **how))


def test_a_long_run_keeps_its_precision() -> None:
    found = problem(1, 3000, 1, 8, 8, dtype=torch.float32) | {"reset": None, "mask": None}
    found["log_decay"] = 1e-3 * found["log_decay"]
    o, state = delta_rule(**found)
    exact, last = delta_rule(**as_dtype(found, torch.float64), form="loop")
    close(o, exact.float(), 4.0)
    close(state, last.float(), 4.0)


@every_form
def test_what_is_not_finite_goes_no_further_than_a_reset_or_a_mask(how: dict[str, Any]) -> None:
    found = problem(1, 8, 2, 3, 2) | {"state": torch.full((1, 2, 3, 2), torch.nan, dtype=torch.float64)}
    found["reset"], found["mask"] = torch.zeros(1, 8, dtype=torch.bool), torch.ones(1, 8, dtype=torch.bool)
    found["reset"][:, [2, 6]], found["mask"][:, [2, 4]] = True, False
    expected, last = delta_rule(**(found | {"state": None}), **how)
    for name in FLOATS[:-1]:
        found[name][:, 4] = torch.nan
    for name in ("k", "v", "log_decay", "erase", "write"):
        broken = found | {name: found[name].clone()}
        broken[name][:, 5] = torch.nan
        o, state = delta_rule(**broken, **how)
        assert o[:, :2].isnan().all()
        close(o[:, 2:5], expected[:, 2:5])
        assert o[:, 5].isnan().all()
        close(o[:, 6:], expected[:, 6:])
        close(state, last)
    v, w = found["v"].requires_grad_(), found["write"].requires_grad_()
    o, _ = delta_rule(**(found | {"state": None}), **how)
    o.sum().backward()
    assert v.grad is not None
    assert w.grad is not None
    assert v.grad.isfinite().all()
    assert w.grad.isfinite().all()


def test_narrow_inputs_are_accumulated_wide() -> None:
    found = as_dtype(problem(2, 20, 2, 3, 4), torch.bfloat16) | {"state": None}
    o, state = delta_rule(**found)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    exact, last = delta_rule(**as_dtype(found, torch.float64), form="loop")
    close(state, last.float())
    torch.testing.assert_close(o.double(), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.usefixtures("unchecked")
def test_what_does_not_fit_is_refused() -> None:
    found = problem(2, 3, 1, 2, 4)
    for wrong in (
        {"q": found["v"]},
        {"v": found["v"][:, :2]},
        {"k": found["k"][0], "q": found["k"][0]},
        {"log_decay": found["v"]},
        {"erase": found["v"]},
        {"write": found["k"]},
        {"state": found["state"].mT},
        {"reset": torch.zeros(2, 4, dtype=torch.bool)},
        {"mask": torch.ones(2, 3)},
        {"chunk": 0},
        {"form": "magic"},
    ):
        with pytest.raises(UsageError, match="delta_rule"):
            delta_rule(**(found | wrong))
