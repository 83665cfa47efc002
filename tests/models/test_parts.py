"""Parts of models: the online normalizer, the pool, the heads, the dial, the hub."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor, nn

from pliant.core import UsageError, seeded
from pliant.core.predictive import mixture_mean
from pliant.mixers import GatedLRU
from pliant.models import SequenceClassifier
from pliant.models.blocks import Stack
from pliant.models.heads import ForecastHead, Head, LabelHead, MeanPool, MixtureHead
from pliant.models.normalizer import CLIP, OnlineNormalizer


def normalized(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Two passes in float64 over everything known at each step."""
    y = np.zeros_like(x)
    for b in range(x.shape[0]):
        for t in range(x.shape[1]):
            known = x[b, : t + 1][mask[b, : t + 1]]
            if mask[b, t]:
                spread = known.std(0)
                y[b, t] = np.where(spread > 0, (x[b, t] - known.mean(0)) / np.where(spread > 0, spread, 1), 0)
    return np.clip(y, -CLIP, CLIP)


@pytest.mark.parametrize(("offset", "scale"), [(0, 1), (1e6, 1), (1e6, 1e-3), (0, 1e-9), (-5, 1e5)])
@given(data=st.data())
def test_the_normalizer_is_what_two_passes_over_the_past_give(offset: float, scale: float, data: st.DataObject) -> None:
    random = np.random.default_rng(data.draw(st.integers(0, 1000)))
    x = offset + scale * random.standard_normal((2, 15, 3))
    mask = random.random((2, 15)) < data.draw(st.sampled_from([1.0, 0.6]))
    normalizer, inputs = OnlineNormalizer(3), torch.from_numpy(x)
    cut = data.draw(st.integers(0, 15))
    state, found = normalizer.init_state(2), []
    for span in (slice(0, cut), slice(cut, 15)):
        y, state = normalizer(inputs[:, span], state, mask=torch.from_numpy(mask)[:, span])
        found.append(y)
    # The offset itself is rounded to eps: relative error eps (offset / scale) of each deviation, sixteen of them.
    tolerance = 1e-9 + 16 * 2.3e-16 * (1 + abs(offset) / scale)
    np.testing.assert_allclose(torch.cat(found, 1).numpy(), normalized(x, mask), rtol=1e-6, atol=tolerance)


def test_a_constant_feature_gives_zero_also_where_it_is_large() -> None:
    normalizer = OnlineNormalizer(2)
    x = torch.tensor([0.1, 1e7]).expand(1, 50, 2)
    y, state = normalizer(x, normalizer.init_state(1))
    assert not y.any()
    assert state.seen.item() == 50


def test_one_outlier_is_clipped() -> None:
    normalizer = OnlineNormalizer(1)
    x = torch.randn(1, 500, 1, generator=torch.Generator().manual_seed(0))
    x[0, -1] = 1e12
    y, _ = normalizer(x, normalizer.init_state(1))
    assert float(y[0, -1]) == CLIP


def test_the_pool_is_the_mean_since_the_last_reset() -> None:
    pool, x = MeanPool(1), torch.arange(1.0, 7.0).reshape(1, 6, 1)
    reset = torch.tensor([[False, False, True, False, False, False]])
    mask = torch.tensor([[True, True, True, False, True, True]])
    y, state = pool(x, pool.init_state(x, 1), reset=reset, mask=mask)
    assert y.flatten()[mask[0]].tolist() == [1, 1.5, 3, 4, pytest.approx(14 / 3)]
    assert state.steps.item() == 3


def test_the_first_answer_is_the_uniform_one() -> None:
    with seeded(0):
        model = SequenceClassifier(3, 10, width=16)
    y, _ = model(torch.ones(2, 5, 3))
    assert model.nats(y, torch.zeros(2, 5, dtype=torch.int64)).detach().numpy() == pytest.approx(math.log(10))


def test_a_mixture_starts_with_different_components_and_sums_over_targets() -> None:
    with seeded(0):
        head = MixtureHead(4, num_targets=2, components=3)
    output = head(torch.zeros(1, 1, 4))
    assert output.shape == (1, 1, 2, 9)
    assert len(set(output[0, 0, 0, 3:6].tolist())) == 3
    targets = torch.tensor([[[0.5, -1.0]]])
    both = head.nats(output, targets)
    single = [MixtureHead.nats(head, output[..., i : i + 1, :], targets[..., i : i + 1]) for i in range(2)]
    assert float(both.detach()) == pytest.approx(float(sum(single).detach()))  # type: ignore[union-attr]


def test_labels_are_coins_of_their_own() -> None:
    """Two labels at odds of 3 and 1/4 have all four outcomes with the products of their chances."""
    output = torch.tensor([3.0, 0.25], dtype=torch.float64).log().expand(4, 2)
    targets = torch.tensor([[1, 1], [1, 0], [0, 1], [0, 0]])
    with seeded(0):
        chances = torch.exp(-LabelHead(1, 2).nats(output, targets))
    assert chances.tolist() == pytest.approx([0.75 * 0.2, 0.75 * 0.8, 0.25 * 0.2, 0.25 * 0.8])
    with seeded(0):
        fresh = LabelHead(4, 3)
    assert fresh(torch.ones(2, 4)).sigmoid().tolist() == [[0.5] * 3] * 2


def test_a_forecast_is_a_gaussian_for_each_step_and_number() -> None:
    with seeded(0):
        model = SequenceClassifier(2, 3, width=8, depth=1, mixer="LRU", head="forecast", horizon=4)
        nn.init.normal_(model.head.linear.weight)
        x, targets = torch.randn(2, 5, 2), torch.randn(2, 5, 4, 3)
    output = model(x)[0].detach()
    assert output.shape == (2, 5, 4, 3, 3)
    normal = torch.distributions.Normal(output[..., 1], output[..., 2].exp())
    torch.testing.assert_close(model.nats(output, targets), -normal.log_prob(targets).sum((-2, -1)))
    torch.testing.assert_close(mixture_mean(output), output[..., 1])


def test_layer_norms_are_not_passed_by() -> None:
    """The pass over a whole stack knows RMSNorm alone."""
    with seeded(0):
        stack, x = Stack([GatedLRU(8), GatedLRU(8)], "layer"), torch.randn(2, 5, 8)
        for norm in (part for part in stack.modules() if isinstance(part, nn.LayerNorm)):
            nn.init.normal_(norm.bias)
    state = stack.init_state(2)
    y = x
    for block, before in zip(stack.blocks, state, strict=True):
        y = block(y, before)[0]
    assert stack(x, state)[0].equal(stack.norm(y))
    y = y - y.mean(-1, keepdim=True)
    expected = y / (y.square().mean(-1, keepdim=True) + 1e-6).sqrt() + stack.norm.bias
    torch.testing.assert_close(stack.norm(y), expected)


def test_one_dial_sets_the_size() -> None:
    counts = []
    for size in (1, 2, 3):
        with seeded(0):
            model = SequenceClassifier.sized(size, 8, 10)
        assert len(model.stack.blocks) == size
        counts.append(sum(p.numel() for p in model.parameters()))
    assert counts == sorted(counts)
    for size in (0, 17):
        with pytest.raises(UsageError, match="1 to 16"):
            SequenceClassifier.sized(size, 8, 10)


def test_what_cannot_be_built_is_refused() -> None:
    for options in (
        {"width": 0}, {"mixer": "Magic"}, {"readout": "last"}, {"head": "tail"}, {"norm": "batch"},
        {"head": "forecast"}, {"horizon": 3}, {"head": "forecast", "horizon": 0},
    ):  # fmt: skip
        with pytest.raises(UsageError, match="SequenceClassifier"):
            SequenceClassifier(3, 2, **options)  # type: ignore[arg-type]


def test_a_model_is_saved_and_loaded_by_its_configuration(tmp_path: Path) -> None:
    with seeded(0):
        model = SequenceClassifier(3, 2, width=8, depth=1, readout="mean", mixer_options={"num_heads": 2})
    model.save_pretrained(tmp_path)
    with seeded(1):
        loaded = SequenceClassifier.from_pretrained(tmp_path)
    x = torch.ones(1, 4, 3)
    assert loaded(x)[0].equal(model(x)[0])


@pytest.mark.parametrize(
    ("head", "wrong"),
    [
        (LabelHead(2, 3), torch.full((4, 3), 7)),
        (LabelHead(2, 3), torch.zeros(4, dtype=torch.long)),
        (MixtureHead(2, 2), torch.zeros(4, 1)),
        (ForecastHead(2, 2, 6), torch.zeros(4, 1, 2)),
    ],
)
def test_targets_that_are_none_are_refused(head: Head, wrong: Tensor) -> None:
    with pytest.raises((UsageError, TypeCheckError), match="targets"):  # the latter in tests alone
        head.nats(head(torch.ones(4, 2)), wrong)
