"""Products with few rows: what one pass over the weights gives is the product, in float32 and int8."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from pliant.kernels._few_rows import AT_ONCE, HALF, ROWS, linear, linear_int8, to_int8

SIZES = [(257, 96), (64, 256), (4, 4096), (1, 1 << 14), (3, 7000)]


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
@given(rows=st.integers(1, ROWS), bias=st.booleans(), threads=st.integers(1, 2))
def test_the_product_is_that_of_float64(outputs: int, inputs: int, rows: int, bias: bool, threads: int) -> None:
    random = torch.Generator().manual_seed(rows)
    x, weight = (torch.randn(*size, inputs, generator=random) for size in ((1, rows), (outputs,)))
    offset = torch.randn(outputs, generator=random) if bias else None
    expected = F.linear(x.double(), weight.double(), None if offset is None else offset.double())
    torch.set_num_threads(threads)
    with torch.no_grad():
        y = linear(x, weight, offset)
    assert y.shape == (1, rows, outputs)
    torch.testing.assert_close(y.double(), expected, atol=1e-5 * inputs**0.5, rtol=1e-5)


@pytest.mark.parametrize(("outputs", "inputs"), SIZES)
def test_int8_is_off_by_half_a_step_per_weight(outputs: int, inputs: int) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, inputs, generator=random)
    weight[0] = 0
    whole, scale = to_int8(weight)
    assert whole.dtype == torch.int8
    assert float((whole * scale[:, None] - weight).abs().max()) <= 0.5001 * float(scale.max())
    assert not whole[0].any()
    x = torch.randn(3, inputs, generator=random)
    x[1] = 0
    with torch.no_grad():
        y = linear_int8(x, whole, scale)
    # To the readable product with the rounded weights: x has at least 12 bits.
    expected = F.linear(x.double(), whole.double() * scale.double()[:, None])
    bound = float(x.abs().max()) / 2**11 * 127 * float(scale.max()) * inputs**0.5
    assert float((y - expected).abs().max()) <= bound
    assert not y[1].any()


def test_sums_of_the_largest_numbers_do_not_overflow() -> None:
    inputs = 1 << 15
    weight, x = torch.ones(2, inputs), torch.full((1, inputs), 3.0)
    with torch.no_grad():
        y = linear_int8(x, *to_int8(weight))
    torch.testing.assert_close(y, torch.full((1, 2), 3.0 * inputs), rtol=1e-3, atol=0)


@pytest.mark.parametrize("inputs", [1, AT_ONCE - 1, AT_ONCE, 3 * AT_ONCE + 5])
def test_products_of_whole_numbers_are_exact(inputs: int) -> None:
    random = torch.Generator().manual_seed(0)
    weight = torch.randint(-127, 128, (5, inputs), generator=random, dtype=torch.int8)
    weight[:, 0] = 127
    x = torch.randint(-99, 100, (4, inputs), generator=random).float()
    x[:, 0] = HALF  # the unit of each row is 1
    with torch.no_grad():
        y = linear_int8(x, weight, torch.ones(5))
    torch.testing.assert_close(y, (x.long() @ weight.long().T).float(), rtol=0, atol=0)


@pytest.mark.parametrize("what", [torch.inf, -torch.inf, torch.nan])
def test_int8_says_when_an_input_is_not_finite(what: float) -> None:
    x = torch.ones(2, 128)
    x[0, 7] = what
    with torch.no_grad():
        y = linear_int8(x, *to_int8(torch.ones(128, 128)))
    assert not y[0].isfinite().any() and y[1].isfinite().all()


@pytest.mark.global_rng
def test_gradients_and_other_dtypes_take_the_product_of_torch() -> None:
    weight = torch.randn(128, 128, requires_grad=True)
    x = torch.randn(2, 128, requires_grad=True)
    linear(x, weight).sum().backward()
    assert weight.grad is not None and x.grad is not None
    with torch.no_grad():
        assert linear(x.bfloat16(), weight.bfloat16()).dtype == torch.bfloat16
        assert linear(x.double(), weight.double()).dtype == torch.float64
        torch.testing.assert_close(linear(x.T.contiguous().T, weight), F.linear(x, weight), atol=1e-4, rtol=1e-5)
    whole, scale = to_int8(weight)
    x.grad = None
    linear_int8(x, whole, scale).sum().backward()
    torch.testing.assert_close(x.grad, (whole * scale[:, None]).sum(0).expand(2, -1))


@torch.no_grad()
def test_within_a_transform_of_torch_the_product_is_that_of_torch() -> None:
    random = torch.Generator().manual_seed(0)
    x, weight = torch.randn(3, 2, 128, generator=random), torch.randn(128, 128, generator=random)
    y = torch.func.vmap(lambda rows: linear(rows, weight))(x)
    torch.testing.assert_close(y, F.linear(x, weight), atol=1e-4, rtol=1e-5)
