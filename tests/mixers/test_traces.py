"""Traces of mixers: with the gradient of the state at each border they give the gradient through the whole past."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import leaves, seeded
from pliant.core.state import map_state
from pliant.kernels import linear_scan, matrix_memory
from pliant.kernels._gated_traces import Fed, Unit, gated_traces
from pliant.kernels._lru_traces import lru_traces
from pliant.kernels._scale_traces import carried, invariant_traces, rows_of
from pliant.kernels._traces import Border, GatedSlopes
from pliant.mixers import LRU, RGLRU, S6, GatedLRU, MultiScaleSSM, SequenceMixer
from pliant.mixers.gated_lru import by_head

EXACT = {
    "RGLRU": (lambda: RGLRU(6, 2), {}, ()),
    "GatedLRU": (lambda: GatedLRU(4, 6, 2, 3), {"linear_x": "exact"}, ()),
    "GatedLRU, one tap": (lambda: GatedLRU(4, conv_width=1), {"linear_x": "exact"}, ()),
    "LRU": (lambda: LRU(3, 4), {}, ()),
    "MultiScaleSSM": (lambda: MultiScaleSSM(3, 2, 3, 2), {}, ()),
    "MultiScaleSSM, selective, softmax": (
        lambda: MultiScaleSSM(3, 2, 2, 2, True, weights="softmax"),
        {"linear_select": "exact"},
        (),
    ),
    "MultiScaleSSM, complex, per channel, no bank": (
        lambda: MultiScaleSSM(3, 0, state_per_scale=2, weights="channel", complex_states=True),
        {},
        (),
    ),
    "MultiScaleSSM, complex, selective, static": (
        lambda: MultiScaleSSM(2, 3, 2, 1, True, weights="static", complex_states=True),
        {"linear_select": "exact"},
        (),
    ),
    "S6": (lambda: S6(3, state_size=2), {"linear_select": "exact"}, ("conv_", "linear_in.")),
}
"""How to make it, kinds of traces, and beginnings of the names of parameters that have none that are exact."""


def made(name: str) -> tuple[SequenceMixer, dict[str, str], tuple[str, ...]]:
    make, kinds, others = EXACT[name]
    with seeded(3):
        mixer = make().double()
        for p in mixer.parameters():  # away from where biases are zero
            p.data.add_(0.1 * torch.randn_like(p))
    return mixer, kinds, others


def whole(mixer: SequenceMixer, x: Tensor, weight: Tensor, reset: Tensor, mask: Tensor) -> dict[str, Tensor]:
    y, _ = mixer(x, reset=reset, mask=mask)
    names = dict(mixer.named_parameters())
    return dict(
        zip(names, torch.autograd.grad(reaching(y * weight, *names.values()), list(names.values())), strict=True)
    )


def reaching(y: Tensor, *others: Tensor) -> Tensor:
    """The sum of y, with a gradient of zero for what it does not depend on."""
    return y.sum() + sum(0 * other.sum() for other in others)


def by_traces(
    mixer: SequenceMixer, kinds: Mapping[str, str], x: Tensor, weight: Tensor, reset: Tensor, mask: Tensor,
    lengths: Sequence[int], carry: bool = True,
) -> tuple[dict[str, Tensor], dict[str, Tensor], Any]:  # fmt: skip
    """The same gradients chunk by chunk, the last traces and the last state."""
    names = dict(mixer.named_parameters())
    found = {name: torch.zeros_like(p) for name, p in names.items()}
    state, traces, t = mixer.init_state(x.shape[0], tuple(x.shape[2:-1])), None, 0
    for length in lengths:
        part = slice(t, t + length)
        t += length
        state = map_state(lambda leaf: leaf.requires_grad_() if leaf.is_floating_point() else leaf, state)
        y, after = mixer(x[:, part], state, reset=reset[:, part], mask=mask[:, part])
        ends = [leaf for _, leaf in leaves(state) if leaf.requires_grad]
        gradients = torch.autograd.grad(reaching(y * weight[:, part], *names.values(), *ends), [*names.values(), *ends])
        for name, gradient in zip(names, gradients, strict=False):
            found[name] += gradient
        left = iter(gradients[len(names) :])
        dstate = map_state(lambda leaf: next(left) if leaf.requires_grad else leaf, state)  # noqa: B023
        state = map_state(Tensor.detach, state)
        with torch.no_grad():
            if traces is not None and carry:
                for name, gradient in mixer.trace_gradients(traces, state, dstate).items():
                    found[name] += gradient
            flags = {"reset": reset[:, part], "mask": mask[:, part]}
            traces = mixer.advance_traces(traces, x[:, part], state, kinds, **flags)
        state = map_state(Tensor.detach, after)
    assert traces is not None
    return found, traces, state


def apart(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().amax() / two.abs().amax().clamp(min=1e-12)) if two.numel() else 0.0


@st.composite
def chunked(draw: st.DrawFn) -> tuple[list[int], Tensor, Tensor, tuple[int, ...]]:
    lengths = draw(st.lists(st.integers(0, 5), min_size=1, max_size=6))
    shape = (2, sum(lengths))
    flags = draw(st.lists(st.integers(0, 9), min_size=math.prod(shape), max_size=math.prod(shape)))
    drawn = torch.tensor(flags, dtype=torch.int64).reshape(shape)
    return lengths, drawn == 0, drawn < 8, draw(st.sampled_from([(), (2,)]))


def test_check_a1_a_leaky_integrator() -> None:
    """h = a h + x with a = sigmoid(1): the trace by its logit, in one chunk of any length and from chunk to chunk."""
    x = torch.tensor([1, 2, -1, 0.5], dtype=torch.float64).reshape(1, 4, 1, 1)
    a = torch.full_like(x, 1.0).sigmoid()
    h = linear_scan(a.flatten(2), x.flatten(2))[0].reshape(x.shape)
    source = (a * (1 - a)) * torch.cat([torch.zeros_like(h[:, :1]), h[:, :-1]], 1)
    wanted = [0.0, 0.1966119332, 0.6806935474, 0.6935631931]
    assert h.flatten().tolist() == pytest.approx([1, 2.7310585786, 0.9965638026, 1.2285465171], abs=1e-9)
    trace: Tensor | None = None
    for t in range(4):
        whole, step = Border(a[:, : t + 1], None), Border(a[:, t : t + 1], None)
        trace = step.onto(trace, step.left(source[:, t : t + 1]).sum(1))
        for found in (trace, whole.onto(None, whole.left(source[:, : t + 1]).sum(1))):
            assert float(found) == pytest.approx(wanted[t], abs=1e-9)


@pytest.mark.parametrize("name", EXACT)
@given(case=chunked())
@settings(max_examples=8, deadline=None)
def test_any_chunks_give_the_gradient_through_the_whole_past(name: str, case: Any) -> None:
    lengths, reset, mask, extra = case
    mixer, kinds, others = made(name)
    random = torch.Generator().manual_seed(len(lengths))
    x = torch.randn(*reset.shape, *extra, mixer.width, generator=random, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=random, dtype=torch.float64)
    expected = whole(mixer, x, weight, reset, mask)
    found, _, _ = by_traces(mixer, kinds, x, weight, reset, mask, lengths)
    for name, gradient in expected.items():
        if not name.startswith(others or ("-",)):
            assert torch.allclose(found[name], gradient, rtol=1e-12, atol=1e-13), name


def run(name: str, steps: int = 60, lengths: Sequence[int] | None = None, **options: Any) -> Any:
    mixer, kinds, _ = made(name)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(1, steps, mixer.width, generator=random, dtype=torch.float64)
    weight = torch.randn(x.shape, generator=random, dtype=torch.float64)
    reset, mask = torch.zeros(1, steps, dtype=torch.bool), torch.ones(1, steps, dtype=torch.bool)
    return by_traces(mixer, kinds, x, weight, reset, mask, lengths or [1] * steps, **options)


@pytest.mark.parametrize("name", EXACT)
def test_chunks_give_what_single_steps_give_also_where_traces_are_no_more_than_own(name: str) -> None:
    steps = run(name)
    for length in (7, 16, 60):
        chunks = run(name, lengths=[*[length] * (60 // length), 60 % length])
        for part, e in steps[1].items():
            assert apart(chunks[1][part], e) < 1e-12, (length, part)


def test_without_what_is_carried_the_gradient_is_another() -> None:
    """A6: at a ring of 0.9 and chunks of 8."""
    one, two = (run("RGLRU", lengths=[8] * 7 + [4], carry=carry)[0]["decay"] for carry in (True, False))
    assert torch.cosine_similarity(one, two, dim=0) < 0.99


def unit() -> RGLRU:
    """The unit of online-gradients.md A2."""
    with seeded(0):
        unit = RGLRU(2).double()
    values = {
        "decay": [-2.0, -4.0],
        "input_gate.weight": [[[0.5, -0.25], [0.1, 0.3]]],
        "input_gate.bias": [[0.2, -0.1]],
        "decay_gate.weight": [[[-0.4, 0.6], [0.2, -0.3]]],
        "decay_gate.bias": [[0.1, 0.4]],
    }
    unit.load_state_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})
    return unit


def of_unit(lengths: Sequence[int], carry: bool = True) -> Any:
    x = torch.tensor([[[1, 2], [-1, 0.5], [0.25, -3], [2, 1]]], dtype=torch.float64)
    reset, mask = torch.tensor([[True, False, False, False]]), torch.ones(1, 4, dtype=torch.bool)
    return by_traces(unit(), {}, x, torch.ones_like(x), reset, mask, lengths, carry)


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float64).reshape(found.shape), rtol=0, atol=2e-10
    )


@pytest.mark.parametrize("lengths", [[1] * 4, [3, 1], [4]])
def test_values_computed_elsewhere(lengths: list[int]) -> None:
    """A2 and A3."""
    found, traces, state = of_unit(lengths)
    close(state.h, [1.2094251541, 0.7939870998])
    close(traces["decay"], [0.2099847342, -0.2426063861])
    close(traces["decay_gate.bias"], [0.1820832243, -0.0517993438])
    close(traces["input_gate.bias"], [0.2274989646, 0.2768518535])
    close(traces["decay_gate.weight"], [[0.5074246019, 0.0039090442], [0.1533357535, 0.1404079009]])
    close(traces["input_gate.weight"], [[0.6510313795, 0.4974756099], [0.2062332641, 1.5637991201]])
    close(found["decay"], [-0.2898515578, -0.5512412406])
    close(found["decay_gate.bias"], [0.0028853937, -0.1245317753])
    close(found["input_gate.bias"], [0.3017126762, 1.4603638739])


def test_immediate_derivatives_can_have_the_other_sign() -> None:
    """A3."""
    found, _, _ = of_unit([1] * 4, carry=False)
    close(found["decay"], [0.0558914919, -0.2759436731])
    close(found["input_gate.bias"], [0.2861975486, 0.3816463834])


def test_a_reset_leaves_traces_of_the_input_gate_alone_and_no_other_stream_changed() -> None:
    """A4."""
    mixer = unit()
    state = mixer.init_state(2)
    x = torch.randn(2, 5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = mixer.advance_traces(None, x, state)
    reset = torch.tensor([[False], [True]])
    after, other = (mixer.advance_traces(before, x[:, :1], mixer(x)[1], reset=flag) for flag in (reset, reset & False))
    for name, e in after.items():
        assert e[0].equal(other[name][0]) and not e[1].equal(other[name][1])
        assert (name.startswith("input_gate")) == bool(e[1].any())


@pytest.mark.parametrize("name", EXACT)
def test_streams_are_traced_for_themselves(name: str) -> None:
    """A14."""
    mixer, kinds, _ = made(name)
    random = torch.Generator().manual_seed(1)
    x = torch.randn(3, 6, mixer.width, generator=random, dtype=torch.float64)
    flags = {"reset": torch.rand(3, 6, generator=random) < 0.2, "mask": torch.rand(3, 6, generator=random) < 0.8}
    together = by_traces(mixer, kinds, x, torch.ones_like(x), *flags.values(), [2, 4])
    alone = [by_traces(mixer, kinds, *(part[b : b + 1] for part in (x, torch.ones_like(x), *flags.values())), [2, 4])
             for b in range(3)]  # fmt: skip
    for part, e in together[0].items():
        assert apart(e, sum(one[0][part] for one in alone)) < 1e-12
    for part, e in together[1].items():
        torch.testing.assert_close(e, torch.cat([one[1][part] for one in alone]), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", EXACT)
def test_what_is_not_finite_ends_at_a_reset(name: str) -> None:
    mixer, kinds, _ = made(name)
    x = torch.randn(2, 6, mixer.width, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[0, 3] = True
    mask = torch.ones(2, 6, dtype=torch.bool)
    mask[:, 4] = False
    clean = mixer.advance_traces(None, x[:1, [3, 5]], mixer.init_state(1), kinds)
    x[0, 2], x[:, 4] = math.inf, math.nan
    past = mixer.advance_traces(None, x[:, :2], mixer.init_state(2), kinds)
    spoiled = {part: torch.full_like(e, math.nan) for part, e in past.items()}
    found = mixer.advance_traces(spoiled, x, mixer.init_state(2), kinds, reset=reset, mask=mask)
    for part, e in clean.items():
        torch.testing.assert_close(found[part][:1], e, rtol=1e-12, atol=1e-14)


def test_the_slope_of_the_root_is_bounded_in_traces_as_it_is_on_the_way_back() -> None:
    with seeded(0):
        mixer = RGLRU(4, 2).double()
    mixer.decay.data.fill_(-20.0)
    x = torch.randn(2, 9, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    reset, mask = torch.zeros(2, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.bool)
    expected = whole(mixer, x, torch.ones_like(x), reset, mask)
    found, _, _ = by_traces(mixer, {}, x, torch.ones_like(x), reset, mask, [1] * 9)
    for name, gradient in expected.items():
        assert apart(found[name], gradient) < 1e-12, name


def test_a_rotating_state_has_the_derivatives_computed_elsewhere() -> None:
    """A8."""
    with seeded(0):
        mixer = LRU(1, 1).double()
    values = {"log_decay": [math.log(0.2)], "log_phase": [math.log(0.7)], "log_gain": [math.log(0.5)],
              "weight_in": [[[1.0]], [[-0.5]]], "weight_out": [[[0.3]], [[0.8]]], "skip": [0.0]}  # fmt: skip
    mixer.load_state_dict({name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()})
    x = torch.tensor([[[1.0], [-2.0], [0.5]]], dtype=torch.float64)
    last = torch.tensor([[[0.0], [0.0], [1.0]]], dtype=torch.float64)
    no, yes = torch.zeros(1, 3, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
    assert abs(float(mixer(x)[0][0, 2, 0].detach()) + 0.0953111792) < 1e-9
    found, _, _ = by_traces(mixer, {}, x, last, no, yes, [1, 1, 1])
    close(found["log_decay"], [0.0890238051])
    close(found["log_phase"], [0.1678500045])
    close(found["weight_in"], [0.0619558939, 0.3145341462])


def numbers(make: Callable[[], SequenceMixer], kinds: Mapping[str, str] | None = None) -> dict[str, int]:
    """Numbers in the traces of one stream."""
    with seeded(0):
        mixer = make()
    x = torch.zeros(1, 0, mixer.width)
    return {name: e.numel() for name, e in mixer.advance_traces(None, x, mixer.init_state(1), kinds).items()}


def test_sizes_are_those_that_were_promised() -> None:
    """A11, and the table of online-gradients.md 2.1."""
    for width, heads, expected in ((768, 12, 100_608), (1536, 12, 397_824), (256, 4, 33_536)):
        assert sum(numbers(lambda: RGLRU(width, heads)).values()) == expected  # noqa: B023
    block = numbers(lambda: GatedLRU(768, num_heads=12))
    assert block["conv_weight"] + block["conv_bias"] == 245_760
    assert block["linear_x.weight"] == 768 * 768
    assert sum(numbers(lambda: LRU(128, 64)).values()) == 2 * (64 * 128 + 64)
    assert numbers(lambda: LRU(8, 4), {"weight_in": "instant", "log_phase": "instant"}).keys() == {"eigenvalues"}
    none = dict.fromkeys(made("GatedLRU")[0].traceable(), "instant")
    assert not numbers(lambda: GatedLRU(4), none)


def test_each_band_is_traced_by_the_taps_that_reach_it() -> None:
    """A10, and the number of online-gradients.md 2.1e: band by band 0, K, 2K … SK, SK."""
    with seeded(0):
        mixer = MultiScaleSSM(5, 3, 3, 2).double()
    x = torch.randn(1, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    traces = mixer.advance_traces(None, x, mixer.init_state(1))
    rows = rows_of(3, 3)
    assert [int((rows.band == band).sum()) for band in range(5)] == [0, 3, 6, 9, 9]
    assert traces["bank"].shape == (1, 1, len(rows.band), 2, 5) and (traces["bank"] != 0).all()
    sizes = numbers(lambda: MultiScaleSSM(128, 3, 4, 16))
    assert sizes["bank"] == 73_728
    assert sizes["samples"] == 128 * 4 * 3 * (6 + 4)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 10**6), st.integers(0, 3), st.integers(1, 4), st.integers(0, 5), st.booleans(), st.booleans())
def test_fast_traces_of_scales_are_the_readable_ones(
    seed: int, levels: int, taps: int, steps: int, flags: bool, fresh: bool
) -> None:
    random = torch.Generator().manual_seed(seed)
    bands, rows = levels + 2 if levels else 1, rows_of(levels, taps)
    shapes = ((2, steps, 4), (levels, 2, taps, 4), (bands, 3, 4), (bands, 4), (2, carried(levels - 1, taps), 4),
              (2, bands, 3, 4), (2, bands, 3, 4), (2, len(rows.band), 3, 4), (2, len(rows.place), 4))  # fmt: skip
    given = [torch.randn(shape, dtype=torch.float64, generator=random) for shape in shapes]
    given[2] = given[2].sigmoid()
    wanted = [None if fresh and part < 7 else e for part, e in enumerate(given)][6:]  # those by rates are left out
    reset, mask = ((torch.rand(2, steps, generator=random) < p) if flags else None for p in (0.2, 0.7))
    slow, fast = (invariant_traces(*given[:6], *wanted, reset, mask, form=form) for form in ("loop", "numba"))
    for one, other in zip(slow, fast, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10**6),
    st.sampled_from([(1, 3), (2, 2), (4, 1)]),
    st.integers(1, 4),
    st.integers(0, 6),
    st.tuples(*[st.sampled_from(["exact", "instant"])] * 3, *[st.sampled_from(["exact", "own", "instant"])] * 2),
    st.booleans(),
    st.booleans(),
)
def test_fast_traces_of_the_gated_lru_are_the_readable_ones(
    seed: int, heads: tuple[int, int], taps: int, steps: int, wanted: tuple[str, ...], flags: bool, bare: bool
) -> None:
    random, (number, part), streams = torch.Generator().manual_seed(seed), heads, (2, steps, 3)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=random)

    width = number * part
    slopes = GatedSlopes(*(draw(*streams, width) for _ in range(4)))
    unit = Unit(draw(*streams, width), draw(*streams, width).sigmoid(), slopes, *draw(2, number, part, part))
    u, ring, filters = draw(*streams, width), draw(2, taps - 1, 3, width), draw(taps, width)
    fed = None if bare else Fed(draw(*streams, 2), u, ring, filters)
    groups = ("decay", "input_gate", "decay_gate", "conv", "linear_x")
    kinds = dict(zip(groups[: 3 if bare else 5], wanted, strict=False))
    reset, mask = ((torch.rand(2, steps, generator=random) < p) if flags else None for p in (0.2, 0.7))
    if mask is not None:  # what `gated_slopes` says of steps that do not exist
        unit.a[~mask] = 1
        for slope in slopes:
            slope[~mask] = 0
    past = None
    for _ in range(2):  # from nothing, and from traces that are there
        once = gated_traces(past, unit, fed, kinds, reset, mask, form="loop")
        twice = gated_traces(past, unit, fed, kinds, reset, mask, form="numba")
        past = once
        assert once.keys() == twice.keys()
        for name, e in once.items():
            torch.testing.assert_close(twice[name], e, rtol=1e-12, atol=1e-12, msg=name)


def test_traces_through_a_layer_above_make_the_layer_below_exact() -> None:
    """A15: online-gradients.md 2.2, S <- a2 S + (dh2/dh1) e1; without it the layer below, and it alone, is off."""
    with seeded(0):
        lower, upper, width, steps = RGLRU(6, 2).double(), RGLRU(6, 2).double(), 6, 20
    random = torch.Generator().manual_seed(2)
    x, weight, direct = (torch.randn(1, steps, width, generator=random, dtype=torch.float64) for _ in range(3))
    ones, no = torch.ones(1, steps, dtype=torch.bool), torch.zeros(1, steps, dtype=torch.bool)
    h1, _ = lower(x)
    names = dict(lower.named_parameters())
    loss = (upper(h1)[0] * weight).sum() + (h1 * direct).sum()
    expected = dict(zip(names, torch.autograd.grad(loss, list(names.values())), strict=True))
    below, above = lower.init_state(1), upper.init_state(1)
    e1: dict[str, Tensor] | None = None
    both: dict[str, Tensor] = {}
    exact, spatial = ({name: torch.zeros_like(p) for name, p in names.items()} for _ in range(2))
    for t in range(steps):
        with torch.no_grad():
            e1 = lower.advance_traces(e1, x[:, t : t + 1], below)
        h1, below = (map_state(Tensor.detach, part) for part in lower(x[:, t : t + 1], below))
        by_input, by_state = torch.autograd.functional.jacobian(
            lambda inputs, h: upper(inputs[None, None], above._replace(h=h[None]))[0][0, 0],  # noqa: B023
            (h1[0, 0], above.h[0]),
        )
        a2, above = by_state.diagonal(), map_state(Tensor.detach, upper(h1, above)[1])
        assert torch.equal(by_state, a2.diag())
        for name, e in e1.items():  # (1, 1, …, channel): here (…, channel), behind the channels of the layer above
            e, shape = e[0, 0], (width, *[1] * (e.ndim - 3), width)
            both[name] = a2.reshape(-1, *[1] * e.ndim) * both.get(name, 0) + by_input.reshape(shape) * e
            through = torch.einsum("i,i...->...", weight[0, t], both[name])
            for found, gradient in (
                (exact, direct[0, t] * e + through),
                (spatial, (direct[0, t] + weight[0, t] @ by_input) * e),
            ):
                found[name] += gradient if name == "decay" else by_head(gradient, 2)
    for name, gradient in expected.items():
        assert apart(exact[name], gradient) < 1e-12 and apart(spatial[name], gradient) > 1e-2, name
    h1, _ = lower(x)
    top, _, _ = by_traces(upper, {}, h1.detach(), weight, no, ones, [1] * steps)
    for name, gradient in whole(upper, h1.detach(), weight, no, ones).items():
        assert apart(top[name], gradient) < 1e-12, name


@pytest.mark.parametrize("gate", [0.3, -2.5])
def test_a_matrix_memory_cares_for_its_input_gate_only_while_its_floor_holds(gate: float) -> None:
    """A13, and A8: but for what stabilizes it, the memory is its own derivative by the bias of that gate."""
    forget, bias = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (2.0, gate))
    one, v = torch.ones(1, 3, 1, 1, dtype=torch.float64), torch.tensor([[[[1.0]], [[2.0]], [[3.0]]]]).double()
    log_gates = bias.expand(1, 3, 1), torch.nn.functional.logsigmoid(forget).expand(1, 3, 1)
    h, memory = matrix_memory(one, one, v, *log_gates, eps=0.0)
    found = torch.stack([h[0, -1, 0, 0], *torch.autograd.grad(h[0, -1, 0, 0], (forget, bias), retain_graph=True)])
    known = {0.3: [2.0843922530, -0.0788321718, 0.0], -2.5: [0.4545372784, 0.0324189167, 0.4545372784]}
    close(found.detach(), known[gate])
    C, n, m = memory
    for part in (C, n):
        written = (part.sum((-1, -2)) if part is C else part.sum(-1)) * m.exp()
        (slope,) = torch.autograd.grad(written.sum(), bias, retain_graph=True)
        torch.testing.assert_close(slope, written.sum(), rtol=1e-12, atol=0)


@pytest.mark.slow
def test_own_is_most_of_what_flows_through_the_input_map() -> None:
    """online-gradients.md 2.2: better than nothing by far, not all of it."""
    with seeded(1):
        mixer = GatedLRU(6, 8, 2).double()
    x = torch.randn(2, 60, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    weight = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    no, yes = torch.zeros(2, 60, dtype=torch.bool), torch.ones(2, 60, dtype=torch.bool)
    expected = whole(mixer, x, weight, no, yes)["linear_x.weight"].flatten()
    found = {kind: by_traces(mixer, {"linear_x": kind}, x, weight, no, yes, [1] * 60)[0]["linear_x.weight"].flatten()
             for kind in ("exact", "own", "instant")}  # fmt: skip
    cosines = {kind: float(torch.cosine_similarity(g, expected, dim=0)) for kind, g in found.items()}
    assert cosines["exact"] > 1 - 1e-12 and 0.9 < cosines["own"] < 1 and cosines["instant"] < cosines["own"] - 0.05


@pytest.mark.parametrize("length", [1, 7])
def test_the_fast_form_for_rotating_states_is_the_readable_one(length: int) -> None:
    random = torch.Generator().manual_seed(length)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, 2, generator=random, dtype=torch.float64)

    x, u, h0, e, rows = draw(3, length, 2, 4)[..., 0], *map(torch.view_as_complex, (
        draw(3, length, 2, 5), draw(3, 2, 5), draw(3, 2, 5), draw(3, 2, 4, 5)))  # fmt: skip
    a, gain = torch.view_as_complex(draw(5)), torch.rand(5, generator=random, dtype=torch.float64)
    for flagged in (False, True):
        reset, mask = (torch.rand(3, length, generator=random) < share if flagged else None for share in (0.2, 0.7))
        if mask is not None:
            x, u = torch.where(mask[..., None, None], x, 0), torch.where(mask[..., None, None], u, 0)
        slow, fast = (lru_traces(x, u, a / 2, gain, h0, e, rows, reset, mask, form=form) for form in ("loop", "numba"))
        for one, two in zip(fast, slow, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-13)
