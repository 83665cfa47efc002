"""Window and full attention against the numbers of their dossier (further-mixers.md, section 4)."""

import math
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pliant.core import UsageError, nbytes, seeded
from pliant.mixers import FullAttention, SequenceMixer, WindowAttention
from pliant.mixers.attention import SHORT, AttentionState, causal_attention, rotate, rotation
from tests.mixers.compaction import agrees_with_compaction
from tests.suite import close, equal_states, same_state, worlds

KINDS = (WindowAttention, FullAttention)
STEPS = 9


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    """The dossier's numbers: sin(0.53 ((i² + 3i) mod 1009) + phase), i counted in C order."""
    i = torch.arange(math.prod(shape))
    return torch.sin(0.53 * ((i * i + 3 * i) % 1009).double() + phase).reshape(shape)


SHAPE = (2, STEPS, 2, 4)
Q, K, V = 2 * wave(SHAPE, 0.1), 2 * wave(SHAPE, 0.9), wave(SHAPE, 1.6)


def fresh(kept: int, dtype: torch.dtype = torch.float64) -> AttentionState:
    shape = (2, kept, 2, 4)
    return AttentionState(torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), torch.zeros(2).long())


def attend(
    window: int, state: AttentionState | None = None, span: slice = slice(None), q: Tensor = Q, k: Tensor = K,
    v: Tensor = V, **flags: Tensor | None
) -> tuple[Tensor, AttentionState]:  # fmt: skip
    state = fresh(window - 1) if state is None else state
    cut = {name: None if flag is None else flag[:, span] for name, flag in flags.items()}
    return causal_attention(q[:, span], k[:, span], v[:, span], state, window, state.keys.shape[1], **cut)


def mixer(kind: type, *sizes: int, width: int = 8, num_heads: int = 2) -> SequenceMixer:
    with seeded(0):
        return kind(width, num_heads, *sizes).double()


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def flag(*at: tuple[int, int]) -> Tensor:
    found = torch.zeros(2, STEPS, dtype=torch.bool)
    found[tuple(torch.tensor(at).T)] = True
    return found


EVENTS = {"reset": flag((0, 4), (1, 0), (1, 7)), "mask": ~flag((0, 5), (1, 1), (1, 2))}


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (3, (-0.3621862654, 0.0251969911, -0.9157589892, -0.2783208892)),
        (4, (-0.3300792718, 0.0402631280, -0.8823258029, -0.2496238350)),
        (STEPS, (-0.2328881460, 0.2279601922, -0.4820215986, -0.0664039853)),
    ],
)
def test_check_d1_windows(window: int, expected: tuple[float, ...]) -> None:
    torch.testing.assert_close(attend(window)[0][1, 8, 1], numbers(*expected), atol=1e-9, rtol=0)


def test_check_d2_the_turn_and_that_only_ages_matter() -> None:
    cos, sin = rotation(8, 4, Q)
    found = rotate(numbers(1, 2, 3, 4)[None, None], cos[3:4], sin[3:4])[0, 0]
    expected = numbers(-1.4133525208, 1.8791180667, -2.8288574817, 4.0581911354)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)

    def product(at: int, other: int) -> Tensor:
        one, two = (rotate(x[:, :1], cos[t : t + 1], sin[t : t + 1]) for x, t in ((Q, at), (K, other)))
        return (one * two).sum(-1)

    close(product(2, 0), product(7, 5))


@pytest.mark.parametrize("cuts", [(), (4,), (2,), (6, 8), tuple(range(1, STEPS))])
def test_check_d3_resets_masks_and_chunks(cuts: tuple[int, ...]) -> None:
    outputs, state = [], None
    edges = (0, *cuts, STEPS)
    for start, end in pairwise(edges):
        y, state = attend(3, state, slice(start, end), **EVENTS)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    expected = numbers(0.3178452686, -0.6115162265, -0.9732626461, -0.6323764684)
    torch.testing.assert_close(y[0, 8, 1], expected, atol=1e-9, rtol=0)
    expected = numbers(-0.4356953700, 0.1326476055, 0.7396469118, -0.4544140944)
    torch.testing.assert_close(y[1, 4, 0], expected, atol=1e-9, rtol=0)
    assert state is not None
    assert equal_states(state, attend(3, **EVENTS)[1])


def test_check_d4_a_step_is_seen_as_long_as_the_window_is() -> None:
    k, v = K.clone(), V.clone()
    k[:, 2] += 1
    v[:, 2] += 1
    moved = (attend(3, k=k, v=v)[0] != attend(3)[0]).flatten(2).any(-1).all(0)
    assert moved.nonzero()[:, 0].tolist() == [2, 3, 4]


def test_check_d5_limits() -> None:
    close(attend(1)[0], V)
    close(attend(STEPS)[0], attend(STEPS + 5)[0])
    equal = attend(3, q=torch.zeros_like(Q))[0]
    close(equal[:, 8], V[:, 6:9].mean(1))


def test_check_d5_a_window_as_long_as_the_episode_is_full_attention() -> None:
    window, full = mixer(WindowAttention, STEPS), mixer(FullAttention, STEPS)
    full.load_state_dict(window.state_dict())
    x = wave((3, STEPS, 8), 0.5)
    close(window(x)[0], full(x)[0])


def test_check_d6_an_old_stream_is_as_exact_as_a_young_one() -> None:
    with seeded(0):
        module = WindowAttention(8, 2, 5)
    x = wave((2, 12, 8), 0.5).float()
    _, state = module(x)
    old = state._replace(steps=state.steps + 4 * 25_000_000)
    assert module(x, old)[0].equal(module(x, state)[0])
    close(module(x, old)[0], module.double()(x.double(), old)[0].float())


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
def test_resets_and_masks_are_those_of_compaction(kind: type, data: st.DataObject) -> None:
    module = mixer(kind, data.draw(st.integers(1, 5)) if kind is WindowAttention else 24)
    world = data.draw(worlds(8, torch.float64, ((), (2,))))
    agrees_with_compaction(module, world)
    agrees_with_compaction(module, world, module(world.x + 1)[1])


@pytest.mark.parametrize("steps", [127, 128, 129, 300])
def test_long_chunks_are_worked_on_in_blocks(steps: int) -> None:
    q, k, v = (wave((1, steps, 1, 2), phase) for phase in (0.1, 0.9, 1.6))
    state = AttentionState(*(torch.zeros(1, 2, 1, 2, dtype=torch.float64) for _ in range(2)), torch.zeros(1).long())
    y, _ = causal_attention(q, k, v, state, 3, 2)
    turned = [rotate(part, *rotation(steps, 2, q)).transpose(1, 2) for part in (q, k)]
    age = torch.arange(steps)[:, None] - torch.arange(steps)
    weights = (turned[0] @ turned[1].mT / 2**0.5).where((age >= 0) & (age < 3), -torch.inf).softmax(-1)
    close(y, (weights @ v.transpose(1, 2)).transpose(1, 2))


def test_the_size_of_the_state() -> None:
    with seeded(0):
        assert nbytes(WindowAttention(256, 4, 128).init_state(1)) == 260_104
        assert nbytes(FullAttention(256, 4, 2048).init_state(1)) == 4_194_312


def test_what_an_episode_leaves_behind_is_cleared() -> None:
    module, x = mixer(WindowAttention, 4), wave((2, 6, 8), 0.5)
    reset = torch.zeros(2, 6, dtype=torch.bool)
    reset[:, 5] = True
    _, state = module(x, reset=reset)
    assert state.steps.tolist() == [1, 1]
    assert not state.keys[:, :2].any()
    assert not state.values[:, :2].any()
    same_state(state, module(x[:, 5:])[1])


def test_an_episode_that_is_too_long_is_refused_before_anything_changes() -> None:
    module, x = mixer(FullAttention, 6), wave((2, 5, 8), 0.5)
    _, state = module(x)
    kept = [leaf.clone() for leaf in state]
    with pytest.raises(UsageError, match="7 steps, with room for 6"):
        module(x[:, :2], state)
    assert all(one.equal(two) for one, two in zip(state, kept, strict=True))
    _, full = module(x[:, :1], state)
    with pytest.raises(UsageError, match="max_steps"):
        module.step(x[:, 0], full)
    # Steps that do not exist need no room, and a reset makes some, in its stream alone.
    module.step(x[:, 0], full, mask=torch.zeros(2, dtype=torch.bool))
    reset = torch.tensor([[True, False], [False, False]])
    with pytest.raises(UsageError, match="8 steps"):
        module(x[:, :2], full, reset=reset)
    module(x, full, reset=torch.tensor([[True, False, False, False, False]] * 2))


def test_resets_make_room_within_a_chunk() -> None:
    module, x = mixer(FullAttention, 4), wave((1, 12, 8), 0.5)
    reset = (torch.arange(12) % 4 == 0)[None]
    y, _ = module(x, reset=reset)
    close(y, torch.cat([module(x[:, t : t + 4])[0] for t in (0, 4, 8)], 1))
    with pytest.raises(UsageError, match="5 steps"):
        module(x, reset=(torch.arange(12) % 5 == 0)[None])


def test_steps_that_do_not_exist_leave_no_trace_in_gradients() -> None:
    module = mixer(WindowAttention, 3)
    x = wave((2, STEPS, 8), 0.5)
    mask = torch.zeros(2, STEPS, dtype=torch.bool)
    mask[0, 4:7] = True
    module(torch.where(mask[..., None], x, torch.nan), mask=mask)[0].square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in module.parameters())


def test_what_cannot_be_built_is_refused() -> None:
    for kind in KINDS:
        with pytest.raises(UsageError, match="3 heads"):
            kind(8, 3)
        with pytest.raises(UsageError, match="an even number"):
            kind(6, 2)
    with pytest.raises(UsageError, match="window"):
        WindowAttention(8, 2, 0)
    with pytest.raises(UsageError, match="max_steps"):
        FullAttention(8, 2, 0)


@pytest.mark.slow
def test_they_compile_in_one_graph_and_export_as_plain_torch() -> None:
    # In a process of its own, since the type checks of the tests cannot be traced.
    code = """
import torch
from pliant.mixers import FullAttention, WindowAttention
for module in (WindowAttention(8, 2, 4), FullAttention(8, 2, 12)):
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 8, requires_grad=True)
    y, state = module(x)
    state = type(state)(*(leaf.detach() for leaf in state))
    torch.testing.assert_close(compiled(x)[0], y)
    compiled(x)[0].sum().backward()
    for part in (x.detach(), x[:, :1].detach()):
        program = torch.export.export(module, (part, state))
        torch.testing.assert_close(program.module()(part, state)[0], module(part, state)[0])
        assert "pliant" not in str(program.graph)
try:
    compiled(torch.randn(2, 13, 8))
except RuntimeError as error:
    assert "max_steps" in str(error)
else:
    raise SystemExit("compiled, an episode without room was taken")
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def _sliced(y: Tensor) -> int:
    """Numbers that slices write on the way back from y: each gives an array as large as what it was cut from."""
    seen, waiting, numbers = set(), [y.grad_fn], 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        waiting += [before for before, _ in node.next_functions]
        if "Slice" in node.name():
            numbers += math.prod(node._saved_self_sym_sizes)  # type: ignore[attr-defined]
    return numbers


@pytest.mark.global_rng
def test_the_way_back_grows_as_the_sequence_does() -> None:
    mixer = WindowAttention(8, 2, window=32)
    short, long = (_sliced(mixer(torch.ones(1, steps, 8))[0]) for steps in (4 * SHORT, 16 * SHORT))
    assert 0 < long <= 5 * short
