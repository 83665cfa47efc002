"""Bounds of dispersion, and what is noted of heads; numbered checks are of adaptive-temperature.md, section 8."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pliant.core import UsageError, seeded
from pliant.kernels import adaptive_softmax
from pliant.kernels._row_softmax import row_entropy
from pliant.measure.dispersion import Watch, heads, rows_of, share_limits, sharp_limit, table, verdict, watched
from pliant.mixers import FullAttention, WindowAttention
from pliant.mixers.sharpen import ASEntmax, SSMax


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(n=st.integers(2, 400), scale=st.floats(0, 20), theta=st.floats(0.1, 5), seed=st.integers(0, 2**31))
def test_check_9_shares_are_within_the_bounds(n: int, scale: float, theta: float, seed: int) -> None:
    logits = scale * drawn(n, seed=seed)
    spread = float(logits.max() - logits.min())
    p = (logits / theta).softmax(-1)
    low, high = share_limits(spread, n, theta)
    assert low * (1 - 1e-9) <= float(p.min()) and float(p.max()) <= high * (1 + 1e-9)
    # Those of lemma 2.1 are wider; larger exponents are beyond the floats.
    if spread / theta < 700:
        assert math.exp(-spread / theta) / n <= low * (1 + 1e-9) and high <= math.exp(spread / theta) / n * (1 + 1e-9)


def test_check_9_one_logit_above_equal_ones_attains_it() -> None:
    table = {(2, 16): 0.330030, (2, 1024): 0.007171, (5.69, 128): 0.699688, (5.69, 1024): 0.224350}
    for (spread, n), expected in table.items():
        row = torch.zeros(n, dtype=torch.float64)
        row[0] = spread
        assert share_limits(spread, n)[1] == pytest.approx(float(row.softmax(-1)[0]), rel=1e-12)
        assert share_limits(spread, n)[1] == pytest.approx(expected, abs=1e-6)
        assert share_limits(spread, n)[0] == pytest.approx(float((-row).softmax(-1)[0]), rel=1e-9)


@given(spread=st.floats(0, 12), share=st.floats(0.01, 1), theta=st.floats(0.5, 4))
def test_the_limit_is_the_first_length_at_which_the_share_is_out_of_reach(
    spread: float, share: float, theta: float
) -> None:
    n = sharp_limit(spread, share, theta)
    assert isinstance(n, int)
    assert share_limits(spread, n, theta)[1] < share
    assert n == 1 or share_limits(spread, n - 1, theta)[1] >= share * (1 - 1e-11)


def test_the_limit_of_known_spreads() -> None:
    # Means of Gemma 2B, and the widest head of Gemma 7B; at the edge itself the share is held.
    assert sharp_limit(5.69, 0.1) == math.floor(1 + 9 * math.exp(5.69)) + 1 == 2665
    assert sharp_limit(32.74, 0.1) == pytest.approx(1.5e15, rel=0.05)
    assert sharp_limit(0, 0.1) == 11 and sharp_limit(0, 1.0) == 2 and sharp_limit(3.0, 1.0) == 2
    assert [sharp_limit(0, 1 / n) for n in range(2, 200)] == list(range(3, 201))
    assert sharp_limit(4.0, 0.3, 2.0) == sharp_limit(2.0, 0.3)
    assert sharp_limit(1e6, 0.5) == math.inf
    for bad in ((-1.0, 0.5, 1.0), (1.0, 0.0, 1.0), (1.0, 1.5, 1.0), (1.0, 0.5, 0.0), (math.nan, 0.5, 1.0)):
        with pytest.raises(UsageError, match="expected"):
            sharp_limit(*bad)


def test_check_10_the_spread_is_bounded_by_singular_values() -> None:
    def ratio(q: Tensor, k: Tensor, y: Tensor, x: Tensor) -> float:
        e = (x @ k.T) @ (q @ y)
        top = [torch.linalg.matrix_norm(m, 2) for m in (q, k)]
        return float((e.max() - e.min()) / (2 * top[0] * top[1] * y.norm() * x.norm(dim=1).max()))

    for seed in range(20):
        assert ratio(*(drawn(*shape, seed=seed + i) for i, shape in enumerate(((5, 4), (5, 4), (4,), (9, 4))))) <= 1
    u, v = drawn(5), drawn(4, seed=1)
    aligned = torch.outer(u, v)
    assert ratio(aligned, aligned, v, torch.stack([v, -v])) == pytest.approx(1, abs=1e-12)


def test_what_is_noted_of_rows() -> None:
    logits, mask = 3 * drawn(2, 3, 5, 6), torch.ones(5, 6).tril().bool().expand(2, 3, 5, 6)
    found = rows_of(logits, mask)
    assert found.keys.tolist() == [2, 3, 4, 5] * 2
    row = logits[1, 2, 3, :4]
    one = [float(x[2, 6]) for x in (found.spread, found.entropy, found.top)]
    expected = [float(row.max() - row.min()), float(row_entropy(row)), float(row.softmax(-1).max())]
    assert one == pytest.approx(expected, rel=1e-6)
    # Sequences are padded: rows see fewer keys, and what stands in padding does not matter.
    mask = mask.clone()
    mask[1, :, :, 3:] = False
    again = rows_of(torch.where(mask, logits, torch.nan), mask)
    assert again.keys.tolist() == [2, 3, 4, 5, 2, 3, 3, 3] and not again.entropy.isnan().any()


@pytest.mark.parametrize(
    "sharpen", [None, adaptive_softmax, SSMax(2), ASEntmax(2, 2)], ids=["softmax", "adaptive", "ssmax", "asentmax"]
)
def test_a_model_is_watched_and_left_as_it_was(sharpen: object) -> None:
    with seeded(0):
        model = nn.ModuleList([FullAttention(4, 2, 40, sharpen=sharpen), WindowAttention(4, 2, 5)])  # type: ignore[arg-type]
    x = drawn(2, 12, 4).float()
    before, names = model[0](x)[0], [name for name, _ in model.named_parameters()]
    with watched(model) as watches:
        torch.testing.assert_close(model[0](x)[0], before)
        model[1](x)
    assert list(watches) == ["0", "1"]
    assert model[0].sharpen is sharpen and [name for name, _ in model.named_parameters()] == names
    assert watches["0"].rows().keys.tolist() == [*range(2, 13)] * 2
    assert watches["1"].rows().keys.max() == 5
    found = heads(watches, 0.9)
    assert [(head.layer, head.head, head.keys) for head in found][1:3] == [("0", 1, [2, 4, 8, 12]), ("1", 0, [2, 4, 5])]
    assert all(head.widest >= max(head.spread) and head.limit == sharp_limit(head.widest, 0.9) for head in found)
    rows = watches["0"].rows()
    assert found[1].top[2] == pytest.approx(float(rows.top[1][(rows.keys > 4) & (rows.keys <= 8)].mean()))
    assert "of 4 heads" in verdict(found, 0.9) and len(table(found, 0.9)) == 5


def test_logits_that_are_no_numbers_are_told() -> None:
    with pytest.raises(UsageError, match="no numbers"):
        Watch()(torch.tensor([[[[0.0, math.nan]]]]))
    assert share_limits(1000.0, 1) == (1.0, 1.0)


def test_the_verdict_counts_heads() -> None:
    watch = Watch()
    # One head is sharp at any length, one only in short rows.
    for n in (2, 16):
        logits = torch.zeros(1, 2, 1, n)
        logits[0, 0, 0, 0], logits[0, 1, 0, 0] = 12.0, 2.0
        watch(logits)
    said = verdict(heads({"layer": watch}, 0.5), 0.5)
    assert said.startswith("1 of 2 heads held 50% on their top key in short rows")
    assert f"layer head 0, from {sharp_limit(12.0, 0.5):,.3g} keys on" in said


def test_what_has_no_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="no attention that takes sharpen"), watched(nn.Identity()):
        pass
    with pytest.raises(UsageError, match="nothing was noted"):
        heads({"layer": Watch()})
    watch = Watch()
    watch(torch.zeros(1, 1, 1, 1))
    with pytest.raises(UsageError, match="too short"):
        heads({"layer": watch})
