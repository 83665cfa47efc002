"""Few steps of an xLSTM in one pass are what its modules give, one after the other."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pliant.core import UsageError, detach, seeded
from pliant.kernels import _mlstm_steps
from pliant.mixers import MLSTM
from pliant.models import XLSTM, SequenceClassifier, XLSTMLarge, quantize_weights, xlstm
from pliant.models.quantize import QuantizedLinear
from tests.suite import close, same_state


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """For each pass, how many blocks it took."""
    calls: list[int] = []
    run = xlstm.mlstm_blocks_steps

    def counted(*arguments: Any) -> Any:
        calls.append(len(arguments[1]))
        return run(*arguments)

    monkeypatch.setattr(xlstm, "mlstm_blocks_steps", counted)
    return calls


def model(width: int = 8, depth: int = 2, heads: int = 2, slstm_at: tuple[int, ...] = ()) -> XLSTM:
    with seeded(0):
        made = XLSTM(width, depth, heads, slstm_at)
        for parameter in made.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return made


def inputs(batch: int, steps: int, width: int = 8, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, steps, width, generator=torch.Generator().manual_seed(seed))


def readable(made: Any, *given: Any, **flags: Any) -> Any:
    """With gradients, modules are called one after the other."""
    with torch.enable_grad():
        y, state = made(*given, **flags)
    return y.detach(), detach(state)


@given(size=st.sampled_from([(1, 1), (1, 3), (2, 4), (1, 5), (1, 8), (8, 1)]), seed=st.integers(0, 99))
@torch.no_grad()
def test_one_pass_is_the_modules_one_after_the_other(size: tuple[int, int], seed: int) -> None:
    made, random = model(), torch.Generator().manual_seed(seed)
    _, state = readable(made, inputs(size[0], 9))
    x = inputs(*size, seed=seed)
    share = (0.0, 0.3, 0.7)[seed % 3]
    flags = {
        "reset": torch.rand(size, generator=random) < share if seed % 2 else None,
        "mask": torch.rand(size, generator=random) >= share if seed % 5 else None,
    }
    for before in (None, state):
        y, after = made(x, before, **flags)
        z, expected = readable(made, x, before, **flags)
        close(y, z, 4)
        same_state(after, expected)


@pytest.mark.parametrize(
    "make", [lambda: MLSTM(3, 1, 6, 1, 2), lambda: MLSTM(5, 3, 15, 3, 5), lambda: MLSTM(4, 4, 4, 4, 1)]
)
@torch.no_grad()
def test_the_mixer_alone_has_such_a_pass_for_all_sizes(make: Any) -> None:
    with seeded(0):
        mixer = make()
        for parameter in mixer.parameters():
            torch.nn.init.normal_(parameter, std=0.5)
    state = None
    for steps in (1, 3, 8, 2):
        x = inputs(1, steps, mixer.width, steps)
        z, expected = readable(mixer, x, state)
        y, state = mixer(x, state)
        close(y, z, 4)
        same_state(state, expected)


@torch.no_grad()
def test_a_reset_drops_what_is_not_finite_and_the_state_given_stays(passes: list[int]) -> None:
    made, x = model(), inputs(1, 3)
    _, state = made(inputs(1, 3, seed=1))
    kept = [part.clone() for part in state.blocks[0].memory]
    made(x, state)
    assert all(one.equal(two) for one, two in zip(kept, state.blocks[0].memory, strict=True))
    for part in state.blocks[0].memory:
        part.fill_(torch.nan)
    state.blocks[0].conv.fill_(torch.nan)
    for at in range(3):
        reset = torch.zeros(1, 3, dtype=torch.bool)
        reset[0, at] = True
        y, after = made(x, state, reset=reset)
        assert y[:, at:].isfinite().all()
        assert all(part.isfinite().all() for part in after.blocks[0].memory)
    assert passes == 10 * [1]


@torch.no_grad()
def test_what_is_changed_in_a_model_is_seen_by_the_next_pass(passes: list[int]) -> None:
    made, x = model(), inputs(1, 3)
    made(x)

    def agrees() -> None:
        close(made(x)[0], readable(made, x)[0], 4)

    first = made.blocks[0]
    first.mixer.linear_up.weight.mul_(0.5)
    agrees()
    first.mixer.skip = torch.nn.Parameter(2 * first.mixer.skip)
    agrees()
    first.mixer.linear_down.weight.data = first.mixer.linear_down.weight.data * 3
    agrees()
    first.mixer = model().blocks[1].mixer
    agrees()
    assert passes == 10 * [1]
    heard: list[int] = []
    handle = first.mixer.linear_up.register_forward_hook(lambda *_: heard.append(1))
    agrees()
    assert heard == [1, 1] and passes == 10 * [1]
    handle.remove()
    made.double()
    made(x.double())
    made.float()
    made(x)
    assert passes == 12 * [1]


@torch.no_grad()
def test_what_is_not_few_steps_in_inference_takes_the_modules(passes: list[int]) -> None:
    made = model(slstm_at=(1,))
    for x in (inputs(1, 9), inputs(9, 1), inputs(1, 6).reshape(1, 3, 2, 8), inputs(1, 0)):
        made(x)
    with torch.enable_grad():
        made(inputs(1, 3))
    with torch.autocast("cpu", torch.bfloat16):
        made(inputs(1, 3))
    assert not passes
    made(inputs(1, 3))
    assert passes == [1]


@torch.no_grad()
def test_blocks_of_one_kind_share_a_pass(passes: list[int]) -> None:
    made, x, state, readable_state = model(8, 8, 2, (6,)), inputs(1, 3), None, None
    last = made.blocks[7].mixer
    last.linear_up, last.linear_down = (QuantizedLinear(part) for part in (last.linear_up, last.linear_down))
    for _ in range(3):
        z, readable_state = readable(made, x, readable_state)
        y, state = made(x, state)
        close(y, z, 4 * 2**10)  # few rows have inputs of whole numbers, of 13 bits
    assert passes == 3 * [4, 1, 1, 1]


@pytest.mark.parametrize("make", [lambda: model(32, 2, 4), lambda: model(32, 2, 4, (1,)), lambda: XLSTMLarge(32, 2, 2)])
@torch.no_grad()
def test_int8_weights_change_little_and_keep_the_contract(make: Any) -> None:
    with seeded(1):
        made = make()
    before = {name: p.clone() for name, p in made.named_parameters()}
    small = quantize_weights(made, least=1)
    assert all(p.equal(before[name]) for name, p in made.named_parameters())
    x = inputs(2, 12, 32)
    y, state = small(x)
    z, _ = made(x)
    assert float((y - z).norm() / z.norm()) < 0.05
    parts, memory = [], None
    for part in x.split([1, 4, 3, 4], 1):
        out, memory = small(part, memory)
        parts.append(out)
    # Few rows have inputs of whole numbers, of 13 bits.
    assert float((torch.cat(parts, 1) - y).abs().max()) < 1e-3 * float(y.abs().max())
    assert all(one.shape == two.shape for one, two in zip(memory.blocks[0][-1], state.blocks[0][-1], strict=True))


@torch.no_grad()
def test_every_linear_layer_of_any_model_is_exchanged() -> None:
    with seeded(0):
        made = SequenceClassifier(3, 4, width=16, depth=2, mixer_options={"num_heads": 2})
    small = quantize_weights(made, least=1)
    assert not any(isinstance(part, torch.nn.Linear) for part in small.modules())
    assert sum(isinstance(part, QuantizedLinear) for part in small.modules()) > 4
    x = inputs(2, 20, 3)
    y, z = small(x)[0], made(x)[0]
    assert float((y - z).abs().max()) < 0.05 * max(1.0, float(z.abs().max()))
    with pytest.raises(UsageError, match="no linear layer"):
        quantize_weights(made)


def test_freed_memory_is_kept_once() -> None:
    _mlstm_steps.keep_freed_memory()
    assert _mlstm_steps.keep_freed_memory.cache_info().currsize == 1
