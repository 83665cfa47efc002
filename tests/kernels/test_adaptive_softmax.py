"""Adaptive softmax and its relatives; numbered checks are those of adaptive-temperature.md, section 8."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from pliant.core import UsageError
from pliant.kernels import (
    adaptive_softmax,
    entmax,
    entropy_of_blocks,
    perplexity_softmax,
    sharp_attention,
    sparsemax,
    ssmax,
    stieltjes,
    tempered_softmax,
)
from pliant.kernels._adaptive_softmax import COEFFICIENTS, inverse_temperature
from pliant.kernels._row_softmax import row_entropy, row_softmax
from tests.suite import close

FORMS = ("loop", "numba")
TEMPERED: dict[str, Callable[..., Tensor]] = {
    "adaptive": adaptive_softmax,
    "perplexity": partial(perplexity_softmax, items=1.5),
    "ssmax": partial(ssmax, scale=0.7, bias=0.2),
    "falls": partial(ssmax, scale=-0.7),
}
SPARSE: dict[str, Callable[..., Tensor]] = {
    "entmax": entmax,
    "entmax 1.2": partial(entmax, alpha=1.2),
    "sparsemax": sparsemax,
    "stieltjes 1": partial(stieltjes, power=1.0),
    "stieltjes 16": partial(stieltjes, power=16.0),
}
ALL = TEMPERED | SPARSE
every_kind = pytest.mark.parametrize("kind", ALL.values(), ids=ALL)
every_form = pytest.mark.parametrize("form", FORMS)


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def drawn(*shape: int, scale: float = 1.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def beta(entropy: float) -> float:
    return float(inverse_temperature(numbers(entropy)))


def of(logits: Tensor) -> tuple[float, float]:
    """Entropy of a row, and β."""
    entropy = row_entropy(logits)
    return float(entropy), float(inverse_temperature(entropy))


def entropy_of(p: Tensor) -> Tensor:
    return -torch.xlogy(p, p).sum(-1)


def spike(n: int, height: float) -> Tensor:
    """One logit above n - 1 equal ones."""
    return torch.cat([numbers(height), torch.zeros(n - 1, dtype=torch.float64)])


def test_check_1_the_polynomial() -> None:
    assert [beta(h) for h in (0.5, 0.7, 0.8, 6.0)] == [1, 1, 1, 1]
    table = {1: 1.27, 2: 2.099, 3: 2.25, 4: 2.389, 1.5: 1.845563, 5.5: 1.846563, 4.412402: 2.421388}
    for entropy, expected in table.items():
        assert beta(entropy) == pytest.approx(expected, abs=5e-7), entropy
    assert float(inverse_temperature(torch.linspace(0, 12, 100_001, dtype=torch.float64)).max()) <= 2.421389


def test_check_2_where_it_acts() -> None:
    for low, high in ((0.848581, 0.848583), (5.944522, 5.944520)):
        assert beta(low) == 1 < beta(high)
    table = {2: 1, 3: 1.418786, 16: 2.226509, 256: 1.783080, 380: 1.010956, 382: 1}
    for n, expected in table.items():
        # The dossier's figures are with the 1e-9 of the listing, which matters where the polynomial is steep.
        assert of(torch.zeros(n, dtype=torch.float64))[1] == pytest.approx(expected, abs=2e-6), n


@every_form
def test_check_3_short_rows(form: str) -> None:
    row = numbers(1, 2, 3, 4)
    assert of(row) == pytest.approx((0.947537, 1.182411), abs=1e-6)
    expected = numbers(0.020153, 0.065742, 0.214466, 0.699639)
    torch.testing.assert_close(adaptive_softmax(row, form=form), expected, atol=1e-6, rtol=0)
    row = numbers(0, 0, 0, 3)
    assert of(row) == pytest.approx((0.529061, 1), abs=1e-6)
    expected = numbers(0.043317, 0.043317, 0.043317, 0.870049)
    torch.testing.assert_close(adaptive_softmax(row, form=form), expected, atol=1e-6, rtol=0)
    assert of(numbers(1, 0, -1))[1] == 1


@every_form
def test_check_4_and_5_longer_rows(form: str) -> None:
    row = 3 * torch.arange(64, dtype=torch.float64).sin()
    assert of(row) == pytest.approx((3.311403, 2.287407), abs=1e-6)
    found = adaptive_softmax(row, form=form)
    assert (int(found.argmax()), float(found.max())) == pytest.approx((33, 0.101942), abs=1e-6)
    assert float(entropy_of(found)) == pytest.approx(2.795274, abs=1e-6)
    row = 0.25 * torch.arange(16, dtype=torch.float64)
    assert of(row) == pytest.approx((2.295780, 2.167296), abs=1e-6)
    found = adaptive_softmax(row, form=form)
    assert float(found[-1]) == pytest.approx(0.418386, abs=1e-6)
    assert float(found[0]) == pytest.approx(1.236e-4, abs=1e-7)


@every_kind
@settings(max_examples=8)
@given(n=st.integers(1, 40), scale=st.sampled_from([0.1, 1.0, 8.0]), seed=st.integers(0, 2**31))
def test_check_6_shifts_orders_and_masked_entries(kind: Any, n: int, scale: float, seed: int) -> None:
    row = drawn(3, n, scale=scale, seed=seed)
    found = kind(row)
    torch.testing.assert_close(found.sum(-1), numbers(1, 1, 1), atol=1e-9, rtol=0)
    torch.testing.assert_close(kind(row + 7.3), found, atol=1e-6, rtol=0)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(kind(row[:, order]), found[:, order], atol=1e-6, rtol=0)
    longer = torch.cat([row, torch.full((3, 5), -torch.inf, dtype=torch.float64)], 1)
    torch.testing.assert_close(kind(longer)[:, :n], found, atol=1e-6, rtol=0)
    longer = torch.cat([row, torch.full((3, 5), torch.nan, dtype=torch.float64)], 1)
    mask = torch.arange(n + 5) < n
    torch.testing.assert_close(kind(longer, mask=mask)[:, :n], found, atol=1e-6, rtol=0)
    assert not kind(longer, mask=mask)[:, n:].any()


@pytest.mark.parametrize("offset", [1e3, 1e5])
@pytest.mark.parametrize("scale", [3.0, -3.0])
def test_both_forms_keep_shifts_in_float32(offset: float, scale: float) -> None:
    row = (drawn(4, 30) * 8).round() / 8  # so that the offset rounds nothing away
    wanted = (scale * row).softmax(-1).float()
    for form in ("loop", "numba"):
        found = row_softmax((row + offset).float(), torch.full((4, 1), scale), form)
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@every_kind
@pytest.mark.parametrize("hide", ["mask", "logits"])
def test_check_6_rows_of_which_nothing_is_visible(kind: Any, hide: str) -> None:
    row = drawn(2, 4, 6).requires_grad_()
    mask = torch.ones(2, 4, 6, dtype=torch.bool)
    mask[0, 2] = False
    found = kind(row, mask=mask) if hide == "mask" else kind(torch.where(mask, row, -torch.inf))
    assert not found[0, 2].any()
    (found**2).sum().backward()
    assert row.grad is not None and row.grad.isfinite().all() and not row.grad[0, 2].any() and row.grad[1].any()


@given(n=st.integers(1, 2000), scale=st.floats(0, 30), seed=st.integers(0, 2**31))
def test_check_7_entropy_never_rises_and_the_top_stays(n: int, scale: float, seed: int) -> None:
    row = drawn(n, scale=scale, seed=seed)
    found = adaptive_softmax(row)
    assert float(entropy_of(found)) <= float(row_entropy(row)) + 1e-9
    assert int(found.argmax()) == int(row.softmax(-1).argmax())


def test_check_8_how_entropy_falls_with_the_inverse_temperature() -> None:
    row, at = 0.5 * torch.arange(10, dtype=torch.float64), numbers(1.3).requires_grad_()
    (slope,) = torch.autograd.grad(row_entropy(at * row), at)
    p = (1.3 * row).softmax(-1)
    assert float(slope) == pytest.approx(-0.693701, abs=1e-6)
    assert float(slope) == pytest.approx(-1.3 * float((p * row**2).sum() - (p * row).sum() ** 2), abs=1e-12)


@given(data=st.data())
def test_check_11_entropy_of_blocks(data: st.DataObject) -> None:
    n = data.draw(st.integers(1, 200))
    row = drawn(3, n, scale=3.0, seed=data.draw(st.integers(0, 2**31))).float()
    # Blocks that raise the largest so far by 50, or hold nothing that is visible.
    row += 50 * (torch.arange(n) // 50)
    sizes, left = [], n
    while left:
        sizes.append(data.draw(st.integers(1, left)))
        left -= sizes[-1]
    blocks = [*row.split(sizes, -1), torch.full((3, 2), -torch.inf)]
    if data.draw(st.booleans()):
        blocks = blocks[::-1]
    torch.testing.assert_close(entropy_of_blocks(blocks), row_entropy(row.double()).float(), atol=1e-6, rtol=1e-6)
    assert not entropy_of_blocks([blocks[-1], blocks[-1]]).any() or blocks[-1].isfinite().any()


def test_check_11_entropy_of_blocks_of_the_dossier() -> None:
    row = 3 * torch.arange(64, dtype=torch.float64).sin()
    assert float(entropy_of_blocks(row.split(7))) == pytest.approx(3.3114033, abs=1e-7)
    with pytest.raises(UsageError, match="no blocks"):
        entropy_of_blocks([])


def test_check_12_the_order_of_the_coefficients() -> None:
    def reversed_order(h: float) -> float:
        return sum(c * h**i for i, c in enumerate(COEFFICIENTS))

    assert (reversed_order(2), reversed_order(3)) == pytest.approx((2.405, -31.606), abs=1e-3)
    assert beta(2) == pytest.approx(2.099) and beta(3) == pytest.approx(2.25)


def test_check_13_margins_of_the_others() -> None:
    assert float(sparsemax(spike(1024, 0.5))[0]) == pytest.approx(0.500488, abs=1e-6)
    assert float(sparsemax(spike(1024, 1.0))[0]) == pytest.approx(1, abs=1e-12)
    assert float(entmax(spike(1024, 2.0))[0]) == pytest.approx(1, abs=1e-12)
    assert float(entmax(spike(1024, 1.9))[0]) < 0.99
    assert float(ssmax(spike(1024, 2.5), scale=0.43)[0]) == pytest.approx(0.627344, abs=1e-6)
    for n, power, margin in ((16, 1.0, 28), (1024, 1.0, 2044), (16384, 1.0, 32764), (16, 4.0, 1.151),
                             (1024, 4.0, 5.536), (16384, 4.0, 12.265)):  # fmt: skip
        exact = (2 * (n - 1)) ** (1 / power) - 2 ** (1 / power)
        assert exact == pytest.approx(margin, abs=1e-3)
        found = stieltjes(spike(n, exact), power=power)
        assert float(found[0]) == pytest.approx(0.5, abs=1e-6) and float(found.sum()) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("n", [16, 1024])
def test_softmax_needs_log_n_and_ssmax_does_not(n: int) -> None:
    row = spike(n, math.log(n - 1))
    assert float(row.softmax(-1)[0]) == pytest.approx(0.5)
    margin = math.log(n - 1) / (0.43 * math.log(n))
    assert float(ssmax(spike(n, margin))[0]) == pytest.approx(0.5)


def test_sparsemax_is_the_nearest_point_of_the_simplex() -> None:
    # Its conditions: p = max(0, e - t), and p sums to 1.
    row = drawn(50, 7, scale=0.7)
    found = sparsemax(row)
    t = ((row - found) * (found > 0)).sum(-1) / (found > 0).sum(-1)
    torch.testing.assert_close(found, (row - t[:, None]).clamp(min=0), atol=1e-9, rtol=0)


@pytest.mark.parametrize("alpha", [1.0001, 1.2, 1.5, 2.0])
def test_entmax_maximizes_what_defines_it(alpha: float) -> None:
    row = drawn(40, 6)
    found = entmax(row, alpha=alpha)

    def worth(p: Tensor) -> Tensor:  # p·e + Tsallis entropy
        return (p * row).sum(-1) + (p - p**alpha).sum(-1) / (alpha * (alpha - 1))

    for seed in range(20):
        other = torch.lerp(found, drawn(40, 6, seed=seed).softmax(-1), 0.01)
        assert (worth(other) <= worth(found) + 1e-12).all()
    if alpha < 1.001:
        torch.testing.assert_close(found, row.softmax(-1), atol=1e-3, rtol=0)


def test_the_perplexity_rule_bounds_how_many_share_where_scores_get_denser() -> None:
    for n in (256, 4096, 65_536):
        row = torch.arange(n, dtype=torch.float64) / n * 30
        shared = [float(entropy_of(f(row)).exp()) for f in (partial(perplexity_softmax, items=2.0), adaptive_softmax)]
        assert 1 < shared[0] < 3
        assert shared[1] > n / 30 / 2.5
    assert perplexity_softmax(spike(8, 40.0), items=2.0).equal(spike(8, 40.0).softmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_check_15_narrow_inputs(dtype: torch.dtype) -> None:
    row = drawn(20, 64, scale=2.0).to(dtype)
    found = adaptive_softmax(row)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), adaptive_softmax(row.float()), atol=4e-3, rtol=0)
    entropy = row_entropy(row.float())
    torch.testing.assert_close(inverse_temperature(entropy), inverse_temperature(row_entropy(row.double())).float())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert adaptive_softmax(row.float()).dtype == torch.float32


def run(kind: Any, logits: Tensor, form: str, **more: Any) -> tuple[Tensor, Tensor]:
    row = logits.clone().requires_grad_()
    found = kind(row, form=form, **more)
    weigh = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).reshape(found.shape).to(found.dtype)
    return found.detach(), torch.autograd.grad((found * weigh).sum(), row)[0]


@pytest.mark.parametrize("kind", TEMPERED.values(), ids=TEMPERED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@given(data=st.data())
def test_the_fast_form_is_the_loop(kind: Any, dtype: torch.dtype, data: st.DataObject) -> None:
    shape = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4)), data.draw(st.integers(1, 70))
    seed, scale = data.draw(st.integers(0, 2**31)), data.draw(st.sampled_from([0.3, 2.0, 30.0]))
    row, more = drawn(*shape, scale=scale, seed=seed).to(dtype), {}
    if data.draw(st.booleans()):
        more["mask"] = torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < 0.6
    for fast, loop in zip(run(kind, row, "numba", **more), run(kind, row, "loop", **more), strict=True):
        close(fast, loop, scale=max(1.0, scale))


@every_form
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_finite_differences(form: str, masked: bool) -> None:
    mask = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    row, scale = drawn(2, 3, 5, scale=1.5).requires_grad_(), drawn(2, 3, 1, seed=2).requires_grad_()
    for kind in (adaptive_softmax, partial(perplexity_softmax, items=1.5)):
        assert torch.autograd.gradcheck(lambda e, kind=kind: kind(e, mask=mask, form=form), [row])
    assert torch.autograd.gradcheck(lambda e, s: ssmax(e, mask=mask, scale=s, bias=s, form=form), [row, scale])


@pytest.mark.parametrize("kind", SPARSE.values(), ids=SPARSE)
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_of_sparse_weights(kind: Any, masked: bool) -> None:
    mask = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(1)) < 0.7 if masked else None
    assert torch.autograd.gradcheck(lambda e: kind(e, mask=mask), [drawn(2, 3, 5).requires_grad_()])


def test_gradients_flow_through_the_temperature() -> None:
    row = drawn(2, 9).requires_grad_()
    weigh = torch.arange(18.0).reshape(2, 9).double()
    (whole,) = torch.autograd.grad((adaptive_softmax(row) * weigh).sum(), row)
    held = tempered_softmax(row, lambda h: inverse_temperature(h).detach())
    (part,) = torch.autograd.grad((held * weigh).sum(), row)
    assert (whole - part).abs().max() > 1e-3


@every_kind
def test_any_axis(kind: Any) -> None:
    row = drawn(3, 4, 5)
    mask = torch.rand(4, 1, generator=torch.Generator().manual_seed(1)) < 0.7
    torch.testing.assert_close(kind(row, 1, mask), kind(row.mT, -1, mask.mT).mT)
    assert kind(row[..., :0]).shape == (3, 4, 0)


@every_kind
def test_what_does_not_fit_is_refused(kind: Any, unchecked: None) -> None:
    with pytest.raises(UsageError, match="true where visible"):
        kind(drawn(3, 4), mask=torch.ones(5, dtype=torch.bool))
    with pytest.raises(UsageError, match="true where visible"):
        kind(drawn(3, 4), mask=torch.ones(4))
    with pytest.raises(UsageError, match="expected floating point"):
        kind(torch.arange(4))
    for alpha in (1.0, math.inf):
        with pytest.raises(UsageError, match="alpha"):
            entmax(drawn(3), alpha=alpha)
    with pytest.raises(UsageError, match="items"):
        perplexity_softmax(drawn(3), items=0.0)
    with pytest.raises(UsageError, match="power"):
        stieltjes(drawn(3), power=0.0)


# Attention


def soft(logits: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(dim)


def attend(strip: int, sharpen: Any = adaptive_softmax, causal: bool = False, keys: int = 11,
           mask: Tensor | None = None) -> list[Tensor]:  # fmt: skip
    """The output for seven queries, and gradients."""
    given = [drawn(2, 3, n, size, seed=n + size).requires_grad_() for n, size in ((7, 4), (keys, 4), (keys, 5))]
    y = sharp_attention(*given, sharpen, mask, causal=causal, strip=strip)
    return [y, *torch.autograd.grad((y * drawn(*y.shape, seed=9)).sum(), given)]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("keys", [11, 7, 3])
def test_strips_are_the_whole(causal: bool, keys: int) -> None:
    whole = [attend(7, causal=causal, keys=keys)]
    for shape in ((2, 3, 7, keys), (7, keys), (2, 1, 1, keys), (keys,), (7, 1)):
        mask = torch.rand(shape, generator=torch.Generator().manual_seed(3)) < 0.7
        whole.append(attend(7, causal=causal, keys=keys, mask=mask))
        for strip in (1, 3):
            for part, all_at_once in zip(attend(strip, causal=causal, keys=keys, mask=mask), whole[-1], strict=True):
                close(part, all_at_once)
    for part, all_at_once in zip(attend(2, causal=causal, keys=keys), whole[0], strict=True):
        close(part, all_at_once)


@pytest.mark.parametrize("causal", [False, True])
def test_with_softmax_it_is_attention(causal: bool) -> None:
    q, k, v = drawn(2, 9, 4), drawn(2, 9, 4, seed=1), drawn(2, 9, 4, seed=2)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    close(sharp_attention(q, k, v, soft, causal=causal, strip=4), expected)
    close(sharp_attention(q, k, v, soft, causal=causal, scale=0.5), sharp_attention(q, k, v, soft, causal=causal))


def test_logits_are_not_kept_for_the_way_back() -> None:
    q = torch.zeros(1, 256, 4, requires_grad=True)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y = sharp_attention(q, q, q, strip=16)
    assert sum(kept.values()) <= 2 * 4 * q.numel()
    assert y.grad_fn is not None


def test_attention_refuses_what_does_not_fit(unchecked: None) -> None:
    q = drawn(2, 5, 4)
    with pytest.raises(UsageError, match="expected"):
        sharp_attention(q, q[..., :3], q)
    with pytest.raises(UsageError, match=r"\(2, 5, 5\)"):
        sharp_attention(q, q, q, mask=torch.ones(4, 5, dtype=torch.bool))
