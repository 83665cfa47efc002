"""The single pass over a stack is the readable stack: outputs, states, gradients; and it steps back when watched."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pliant.core import UsageError, categorical_nats, leaves, map_state, seeded
from pliant.core.columns import Column, Columns
from pliant.core.pack import differences
from pliant.kernels import _gated_block as kernel
from pliant.kernels import _stack_pass as arithmetic
from pliant.kernels._jit import jit_fast
from pliant.kernels._softmax import softmax_slope
from pliant.mixers import GatedLRU
from pliant.models import blocks
from pliant.models.blocks import Stack
from pliant.models.table import TableModel
from tests.suite import World, close, in_chunks, same_state, worlds

WIDTH = 6
COLUMNS = Columns("classify", (Column("a"), Column("b", "category", ("x", "y")), Column("c")), ("t",), ("0", "1", "2"))
SERIES = Columns("forecast", (), ("t",), lag=2)


def shaken(module: Any) -> Any:
    with seeded(1), torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def noise(batch: int, steps: int) -> Tensor:
    return torch.randn(batch, steps, WIDTH, generator=torch.Generator().manual_seed(batch * 100 + steps))


def stack(depth: int = 2, heads: int = 2, conv_width: int = 3, lru_width: int = 8) -> Stack:
    with seeded(0):
        return shaken(Stack([GatedLRU(WIDTH, lru_width, heads, conv_width) for _ in range(depth)]))


def table(columns: Columns = COLUMNS) -> TableModel:
    with seeded(0):
        return shaken(TableModel(columns, width=WIDTH, depth=2))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one with each single pass."""
    seen: list[int] = []
    run = blocks.gated_block
    monkeypatch.setattr(blocks, "gated_block", lambda *a, **k: (seen.append(1), run(*a, **k))[1])
    return seen


def readable(call: Callable[[], Any]) -> Any:
    """The same call through the modules."""
    fits, blocks.gated_block_fits = blocks.gated_block_fits, lambda *_: False
    try:
        return call()
    finally:
        blocks.gated_block_fits = fits


def random_state(module: Any, batch: int, dtype: torch.dtype, seed: int = 3) -> Any:
    random = torch.Generator().manual_seed(seed)

    def draw(leaf: Tensor) -> Tensor:
        if leaf.dtype == torch.bool:
            return torch.rand(leaf.shape, generator=random) < 0.4
        return torch.randn(leaf.shape, generator=random, dtype=dtype).requires_grad_()

    return map_state(draw, module.init_state(batch))


def everything(module: Any, world: World, state: Any) -> dict[str, Tensor]:
    """Outputs, states and all gradients of a sum over both with fixed random weights."""
    for leaf in (*module.parameters(), *(leaf for _, leaf in leaves(state))):
        leaf.grad = None
    x = world.x.clone().requires_grad_()
    y, after = module(x, state, **world.flags)
    random = torch.Generator().manual_seed(5)
    total = (y * torch.randn(y.shape, generator=random, dtype=y.dtype)).sum()
    for _, leaf in leaves(after):
        if leaf.is_floating_point():
            total = total + (leaf * torch.randn(leaf.shape, generator=random, dtype=leaf.dtype)).sum()
    total.backward()
    found = {"y": y, "x": x.grad, **dict(leaves(after, "after"))}
    found |= {name: p.grad for name, p in module.named_parameters()}
    found |= {f"before.{name}": leaf.grad for name, leaf in leaves(state) if leaf.is_floating_point()}
    return {name: value.detach().clone() for name, value in found.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("sizes", [(2, 2, 3, 8), (1, 1, 1, 6), (3, 3, 4, 9)])
@given(data=st.data())
def test_outputs_states_and_gradients_are_those_of_the_readable_form(
    dtype: torch.dtype, sizes: tuple[int, int, int, int], data: st.DataObject
) -> None:
    module = stack(*sizes).to(dtype)
    world = data.draw(worlds(WIDTH, dtype, [()]))
    state = random_state(module, world.x.shape[0], dtype)
    ours, theirs = everything(module, world, state), readable(lambda: everything(module, world, state))
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        # sqrt(1 - a²) loses digits where a is near 1, in both forms.
        close(ours[name], value, 1.0 if dtype == torch.float64 else 16.0)


@given(data=st.data())
def test_whole_chunks_and_steps_agree_and_a_step_does_not_depend_on_the_others(data: st.DataObject) -> None:
    module = stack().double()
    world = data.draw(worlds(WIDTH, torch.float64, [()]))
    state = module.init_state(world.x.shape[0])
    whole, parts = module(world.x, state, **world.flags), in_chunks(module, world, state)
    close(whole[0], parts[0])
    same_state(whole[1], parts[1])


def test_gradients_are_right_for_a_tiny_stack() -> None:
    module = stack(depth=1, heads=1, conv_width=2, lru_width=3).double()
    state = random_state(module, 2, torch.float64)
    reset = torch.tensor([[False, False, True], [True, False, False]])
    mask = torch.tensor([[True, True, True], [True, False, True]])
    leaf = [leaf for _, leaf in leaves(state) if leaf.is_floating_point()]

    def run(x: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
        y, after = module(x, state, reset=reset, mask=mask)
        return y, *(part for _, part in leaves(after) if part.is_floating_point())

    x = noise(2, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(run, (x, *leaf, *module.parameters()))


def rows(columns: Columns, batch: int, steps: int, seed: int = 0) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, steps, columns.num_features, generator=random, dtype=torch.float64)
    for i, column in enumerate(columns.features):
        if column.size:
            x[..., i] = torch.randint(column.size, (batch, steps), generator=random).double()
    if columns.classes:
        x[..., -1] = torch.randint(len(columns.classes), (batch, steps), generator=random).double()
    x[torch.rand(x.shape, generator=random) < 0.2] = torch.nan
    return x


@pytest.mark.parametrize("columns", [COLUMNS, SERIES], ids=["classes", "numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_table_in_one_pass_is_the_readable_one(columns: Columns, dtype: torch.dtype, passes: list[int]) -> None:
    module = table(columns).to(dtype)
    flags = {"reset": noise(3, 20)[..., 0] < -1, "mask": noise(3, 20)[..., 1] < 0.5}
    _, state = module(rows(columns, 3, 8, seed=1))

    def run() -> tuple[Tensor, dict[str, Tensor], Any]:
        module.zero_grad()
        output, after = module(rows(columns, 3, 20), state, **flags)
        (output * torch.linspace(-1, 1, output.numel(), dtype=output.dtype).reshape(output.shape)).sum().backward()
        return output, {name: p.grad for name, p in module.named_parameters() if p.grad is not None}, after

    ours = run()
    assert len(passes) == 2
    theirs = readable(run)
    assert len(passes) == 2
    assert ours[1].keys() == theirs[1].keys()
    scale = 1.0 if dtype == torch.float64 else 16.0
    close(ours[0].to(dtype), theirs[0].to(dtype), scale)
    same_state(ours[2].stack, theirs[2].stack)
    assert differences(tuple(ours[2].moments), tuple(theirs[2].moments)) == []
    assert differences(tuple(ours[2].reference), tuple(theirs[2].reference)) == []
    for name, gradient in theirs[1].items():
        close(ours[1][name], gradient, 4 * scale)


def case(columns: Columns, dtype: torch.dtype, steps: int = 20) -> dict[str, Any]:
    """Rows that are known in part, their targets, and a memory before them."""
    module = table(columns).to(dtype)
    with torch.no_grad():
        _, state = module(rows(columns, 3, 8, seed=1))
    random = torch.Generator().manual_seed(7)
    shape = (3, steps)
    numbers = torch.randn(*shape, 1, generator=random, dtype=torch.float64)
    targets = torch.randint(3, shape, generator=random) if columns.task == "classify" else numbers
    use, reset = (torch.rand(shape, generator=random) < share for share in (0.6, 0.1))
    return {"module": module, "state": state, "x": rows(columns, 3, steps), "targets": targets, "use": use,
            "reset": reset}  # fmt: skip


@pytest.mark.parametrize("part", [True, False], ids=["some targets", "all targets"])
@pytest.mark.parametrize("columns", [COLUMNS, SERIES], ids=["classes", "numbers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_way_without_a_graph_gives_the_loss_and_gradient_of_autograd(
    columns: Columns, dtype: torch.dtype, part: bool
) -> None:
    module, state, x, targets, use, reset = case(columns, dtype).values()
    output, after = module(x, state, reset=reset)
    loss = module.nats(output[use], targets[use]).mean() if part else module.nats(output, targets).mean()
    loss.backward()
    theirs = {name: p.grad.clone() for name, p in module.named_parameters()}
    module.zero_grad()
    seen, observed = module.observe(x, state)
    nats = module.descend(seen, observed, targets, use if part else None, reset=reset, sink=kernel.Sink())
    scale = 1.0 if dtype == torch.float64 else 16.0
    close(torch.tensor(nats, dtype=dtype), loss.detach().to(dtype), scale)
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None
        close(parameter.grad, theirs[name], 4 * scale)
    # What was observed once serves again.
    again, moved = module(x, observed, reset=reset, seen=seen)
    assert again.equal(output) and differences(tuple(leaves(moved)), tuple(leaves(after))) == []


def test_no_gradient_where_the_loss_is_not_finite() -> None:
    module, state, x, targets, use, reset = case(COLUMNS, torch.float32).values()
    with torch.no_grad():
        module.head.bias[0] = torch.nan
    seen, observed = module.observe(x, state)
    assert np.isnan(module.descend(seen, observed, targets, use, reset=reset, sink=kernel.Sink()))
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_way_without_a_graph_is_not_taken_where_somebody_would_notice() -> None:
    module, state, x, targets, use, reset = case(COLUMNS, torch.float32).values()
    seen, observed = module.observe(x, state)

    def taken(**flags: Tensor) -> bool:
        module.zero_grad()
        found = module.descend(seen, observed, targets, use, reset=reset, sink=kernel.Sink(), **flags)
        assert (found is None) == all(parameter.grad is None for parameter in module.parameters())
        return found is not None

    assert taken() and taken(mask=torch.ones(3, 20, dtype=torch.bool))
    assert taken(mask=torch.arange(20).expand(3, 20) > 1)
    for listen in (module.register_forward_hook, module.head.register_forward_pre_hook):
        handle = listen(lambda *_: None)
        assert not taken()
        handle.remove()
        assert taken()
    module.forward = module.forward
    assert not taken()


def test_the_slope_of_classes_is_that_of_torch() -> None:
    random = torch.Generator().manual_seed(0)
    for dtype, scale in ((torch.float64, 1.0), (torch.float32, 4.0)):
        logits = (40 * torch.randn(4, 9, 5, generator=random)).to(dtype).requires_grad_()
        targets, use = torch.randint(5, (4, 9), generator=random), torch.rand(4, 9, generator=random) < 0.5
        for chosen in (use, None):
            picked = slice(None) if chosen is None else chosen
            loss = categorical_nats(logits.double()[picked], targets[picked]).mean()
            (theirs,) = torch.autograd.grad(loss, logits)
            nats, ours = softmax_slope(logits.detach(), targets, chosen)
            assert nats == pytest.approx(loss.item(), rel=1e-13) and ours is not None
            close(ours, theirs, scale)
        nats, ours = softmax_slope(logits.detach(), targets, torch.zeros(4, 9, dtype=torch.bool))
        assert np.isnan(nats) and ours is None


def test_a_category_without_such_a_code_is_refused() -> None:
    x = rows(COLUMNS, 1, 3)
    x[0, 1, 1] = 7.0
    with pytest.raises(UsageError, match="code 7"):
        table()(x)


# When it steps back


def watched(module: Any) -> dict[str, Callable[[], Any]]:
    """Ways to make the single pass noticeable, each returning how to undo it, or None."""
    block, parameter = module.stack.blocks[0], module.stack.blocks[1].mlp.linear_in.weight
    return {
        "forward hook": lambda: block.mixer.linear_x.register_forward_hook(lambda *_: None),
        "forward pre-hook": lambda: block.mlp.register_forward_pre_hook(lambda *_: None),
        "backward hook": lambda: block.mixer_norm.register_full_backward_hook(lambda *_: None),
        "global hook": lambda: nn.modules.module.register_module_forward_hook(lambda *_: None),
        "gradient hook": lambda: parameter.register_hook(lambda gradient: None),
        "accumulation hook": lambda: parameter.register_post_accumulate_grad_hook(lambda p: None),
    }


@pytest.mark.parametrize("way", list(watched(table())))
def test_who_listens_to_a_part_makes_it_step_back_and_only_as_long(way: str, passes: list[int]) -> None:
    module, x = table(), rows(COLUMNS, 1, 4)
    module(x)
    handle = watched(module)[way]()
    module(x)
    assert len(passes) == 1
    handle.remove()
    module(x)
    assert len(passes) == 2


def test_a_hook_on_a_part_is_called() -> None:
    module, seen = table(), []
    module(rows(COLUMNS, 1, 4))
    parts = [module.embed, module.head, module.stack, module.stack.norm, module.stack.blocks[1].mixer.lru]
    for part in parts:
        part.register_forward_hook(lambda part, *_: seen.append(part))
    module(rows(COLUMNS, 1, 4))
    assert set(map(id, seen)) == set(map(id, parts))


def test_transforms_and_exchanged_parts_make_it_step_back(passes: list[int]) -> None:
    module, x = stack(), noise(1, 4)
    module(x, module.init_state(1))
    assert len(passes) == 1
    with torch.autocast("cpu", torch.bfloat16):
        module(x, module.init_state(1))
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def total(given: Any) -> Tensor:
        return torch.func.functional_call(module, given, (x, module.init_state(1)))[0].sum()

    # Parameters that are exchanged for the time of a call are those that count.
    doubled = {name: (2 * p).requires_grad_() for name, p in parameters.items()}
    value = total(doubled)
    found = torch.autograd.grad(value, list(doubled.values()))
    assert len(passes) == 1
    module.load_state_dict(doubled)
    again = module(x, module.init_state(1))[0].sum()
    assert len(passes) == 2
    close(value, again, 16.0)
    for one, two in zip(found, torch.autograd.grad(again, list(module.parameters())), strict=True):
        close(one, two, 16.0)
    module.blocks[0].mlp = nn.Identity()  # type: ignore[assignment]
    module(x, module.init_state(1))
    assert len(passes) == 2


def test_a_frozen_parameter_gets_no_gradient_and_the_others_what_they_had() -> None:
    module, x = stack(), noise(2, 4)
    module(x, module.init_state(2))[0].square().sum().backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    module.zero_grad()
    module.norm.requires_grad_(False)
    module.blocks[0].mixer.linear_x.weight.requires_grad_(False)
    module(x, module.init_state(2))[0].square().sum().backward()
    for name, p in module.named_parameters():
        assert (p.grad is None) == (not p.requires_grad)
        assert p.grad is None or p.grad.equal(expected[name])


# Nothing goes stale


def output(module: Stack) -> Tensor:
    with torch.no_grad():
        return module(torch.linspace(-1, 1, 3 * WIDTH).reshape(1, 3, WIDTH), module.init_state(1))[0]


def changed(p: Tensor) -> None:
    p.data = p.data.clone().add_(0.5)


def turned(p: Tensor) -> None:
    """Other values, and another order of the same sizes."""
    p.data = (2 * p.data).mT.contiguous().mT


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.load_state_dict({name: p + 0.1 for name, p in m.state_dict().items()}),
        lambda m: m.load_state_dict({name: p + 0.1 for name, p in m.state_dict().items()}, assign=True),
        lambda m: m.norm.weight.data.mul_(2),
        lambda m: changed(m.blocks[1].mlp.linear_out.bias),
        lambda m: turned(m.blocks[0].mlp.linear_out.weight),
        lambda m: setattr(m.blocks[0].mlp_norm, "weight", nn.Parameter(torch.full((WIDTH,), 3.0))),
        lambda m: setattr(m.blocks, "0", Stack([GatedLRU(WIDTH, 8, 2, 3)]).blocks[0]),
    ],
    ids=["load", "assign", "in place", "data", "order", "parameter", "block"],
)  # fmt: skip
def test_a_change_of_the_parameters_is_seen(change: Callable[[Stack], Any]) -> None:
    module = stack()
    before = output(module)
    with seeded(2):
        change(module)
    after = output(module)
    close(after, readable(lambda: output(module)), 16.0)
    assert not before.equal(after)


def test_a_copy_has_its_own_parameters() -> None:
    module = stack()
    before = output(module)
    twin = copy.deepcopy(module)
    with torch.no_grad():
        twin.norm.weight.mul_(2)
    close(output(twin), 2 * before)
    assert output(module).equal(before)
    module.double()
    with torch.no_grad():
        x = torch.linspace(-1, 1, 3 * WIDTH, dtype=torch.float64).reshape(1, 3, WIDTH)
        close(module(x, module.init_state(1))[0].float(), before, 16.0)


def test_parameters_that_moved_before_the_gradient_are_an_error() -> None:
    module = stack()
    y, _ = module(noise(1, 3), module.init_state(1))
    with torch.no_grad():
        module.norm.weight.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        y.sum().backward()


def test_a_state_of_another_size_is_refused() -> None:
    module = table()
    with pytest.raises(UsageError, match="was made for 2 streams"):
        module(rows(COLUMNS, 1, 3), module.init_state(2))


# Gradients that do not go through the graph


def test_a_sink_finds_the_same_gradients_and_adds_to_what_is_there() -> None:
    module, x = table(), rows(COLUMNS, 2, 5)
    module.stack.norm.weight.requires_grad_(False)
    module(x)[0].square().sum().backward()
    expected = {name: p.grad for name, p in module.named_parameters()}
    sink = kernel.Sink()
    held: list[Tensor] = []
    for _ in range(3):
        module.zero_grad()
        with sink:
            y, _ = module(x)
        y.square().sum().backward()
        for name, p in module.named_parameters():
            assert expected[name] is None if p.grad is None else p.grad.equal(expected[name])
        held.append(module.head.weight.grad.detach())
    # What somebody keeps is not written over.
    assert all(gradient.equal(expected["head.weight"]) for gradient in held)
    with sink:
        y, _ = module(x)
    y.square().sum().backward()
    for name, p in module.named_parameters():
        if p.grad is not None:
            torch.testing.assert_close(p.grad, 2 * expected[name])
    module.zero_grad()
    module.head.bias.grad = torch.ones(3)
    with sink:
        y, _ = module(x)
    y.square().sum().backward()
    torch.testing.assert_close(module.head.bias.grad, 1 + expected["head.bias"])


# Its exp


@jit_fast
def all_exp(x, constants, out):  # type: ignore[no-untyped-def]
    k = arithmetic._scalars(constants)
    for i in range(x.shape[0]):
        out[i] = arithmetic._exp(x[i], k)


@pytest.mark.parametrize(("dtype", "limit"), [(np.float32, 87.0), (np.float64, 708.0)])
def test_exp_is_within_a_rounding(dtype: Any, limit: float) -> None:
    x = np.concatenate([np.linspace(-limit, limit, 100_001), np.linspace(-2, 2, 100_001)]).astype(dtype)
    out, constants = np.empty_like(x), arithmetic.constants_of(dtype, 8.0, 1000.0, 1e-6)
    all_exp(x, constants, out)
    exact = np.exp(x.astype(np.longdouble))
    assert np.abs(out / exact - 1).max() <= np.finfo(dtype).eps
    odd = np.array([np.nan, np.inf, -np.inf, 0.0], dtype)
    all_exp(odd, constants, out := np.empty_like(odd))
    assert np.isnan(out[0])
    assert out[1] > np.finfo(dtype).max / 20
    assert 0 < out[2] < 1e-37
    assert out[3] == 1
