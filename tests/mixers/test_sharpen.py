"""Weights that learn or were fitted: their formulas, fits on rows whose best temperature is known, saving."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pliant.core import Role, UsageError, check_roles, seeded
from pliant.kernels import adaptive_softmax, entmax, perplexity_softmax, sharp_attention
from pliant.kernels._adaptive_softmax import COEFFICIENTS
from pliant.kernels._row_softmax import row_entropy
from pliant.mixers import FullAttention, WindowAttention
from pliant.mixers.attention import AttentionState, causal_attention
from pliant.mixers.sharpen import (
    NAMED,
    ASEntmax,
    Polynomial,
    SSMax,
    TemperatureMap,
    fit_polynomial,
    fit_temperature,
)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_ssmax_has_a_scale_for_each_head() -> None:
    module, logits = SSMax(2, bias=True).double(), drawn(3, 2, 4, 5)
    with torch.no_grad():
        module.scale.copy_(torch.tensor([0.5, 2.0]))
        module.bias.copy_(torch.tensor([0.0, 1.0]))  # type: ignore[union-attr]
    mask = torch.arange(5) < torch.arange(1, 5)[:, None]
    found = module(logits, mask=mask)
    for head, (scale, bias) in enumerate(((0.5, 0.0), (2.0, 1.0))):
        for t in range(4):
            expected = ((scale * math.log(t + 1) + bias) * logits[:, head, t, : t + 1]).softmax(-1)
            torch.testing.assert_close(found[:, head, t, : t + 1], expected)
    check_roles(module, module.roles())


def test_asentmax_is_its_formula() -> None:
    with seeded(0):
        module = ASEntmax(2, 3, alpha=1.7, reach=0.8, offset=0.5).double()
    logits, queries = drawn(1, 2, 4, 5), drawn(1, 2, 4, 3, seed=1)
    found = module(logits, queries=queries)
    for head in range(2):
        query = queries[0, head, 3]
        factor, power = (float(weight[head].detach() @ query) for weight in (module.factor, module.power))
        scale = 0.5 + math.log1p(math.exp(factor)) * math.log(6) ** (0.8 * math.tanh(power))
        torch.testing.assert_close(found[0, head, 3], entmax(logits[0, head, 3] * scale, alpha=1.7))
    check_roles(module, module.roles())
    whole = sharp_attention(*(drawn(1, 2, 4, 3, seed=i) for i in range(3)), module, strip=4)
    torch.testing.assert_close(sharp_attention(*(drawn(1, 2, 4, 3, seed=i) for i in range(3)), module, strip=3), whole)


def test_a_map_of_one_knot_is_the_perplexity_rule() -> None:
    logits = 0.1 * drawn(2, 3, 50).float()
    module = TemperatureMap([math.log(2.0)], [1.0])
    torch.testing.assert_close(module(logits), perplexity_softmax(logits, items=2.0))


def test_a_map_rises_piece_by_piece_and_goes_on() -> None:
    module = TemperatureMap([1.0, 2.0], torch.tensor([[0.5, 0.0], [0.0, 3.0]]))
    entropy = torch.tensor([0.5, 1.5, 2.5, 20.0])[:, None]
    found = module.rule(entropy.expand(2, 4, 1)).log()[..., 0]
    torch.testing.assert_close(found, torch.tensor([[0, 0.25, 0.5, 0.5], [0, 0, 1.5, 54.0]]))
    for knots, slopes in (([2.0, 1.0], [1.0, 1.0]), ([1.0], [-1.0]), ([1.0], [1.0, 2.0]), ([], [])):
        with pytest.raises(UsageError, match="rising"):
            TemperatureMap(knots, slopes)


def test_the_published_polynomial_is_one_of_them() -> None:
    logits = 2 * drawn(4, 30)
    torch.testing.assert_close(Polynomial(COEFFICIENTS)(logits), adaptive_softmax(logits))
    held = Polynomial(COEFFICIENTS, largest=3.0)
    torch.testing.assert_close(held.rule(torch.tensor([3.0, 9.0])), torch.tensor([2.25, 2.25]))


def noisy(heads: int, rows: int, n: int, noise: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Rows whose targets are drawn from softmax(logits / noise) of each head: the best β is 1 / noise."""
    random = torch.Generator().manual_seed(0)
    logits = 2 * torch.randn(heads, rows, n, generator=random, dtype=torch.float64)
    p = (logits / torch.tensor(noise, dtype=torch.float64)[:, None, None]).softmax(-1)
    return logits, torch.multinomial(p.flatten(0, 1), 1, generator=random).reshape(heads, rows)


def test_the_fit_finds_the_temperature_that_targets_were_drawn_at() -> None:
    logits, targets = noisy(2, 3000, 12, (1.0, 1 / 3))
    module = fit_temperature(logits, targets)
    beta = module.rule(row_entropy(logits)).mean((1, 2))
    assert float(beta[0]) == pytest.approx(1, abs=0.15) and float(beta[1]) == pytest.approx(3, rel=0.15)
    # Beyond what rows had: a nat more of entropy is e times the β, and heads are told apart.
    far = module.rule(torch.tensor([8.0, 9.0])[:, None].expand(2, 2, 1))
    torch.testing.assert_close(far[:, 1] / far[:, 0], torch.full((2, 1), math.e))
    assert (far[0] < far[1]).all()
    with pytest.raises(UsageError, match="more rows"):
        fit_temperature(logits[:, :2], targets[:, :2])
    with pytest.raises(UsageError, match="NaN, or a target is not visible"):
        fit_temperature(logits * torch.nan, targets)
    with pytest.raises(UsageError, match="NaN, or a target is not visible"):
        fit_temperature(logits, targets, torch.zeros_like(logits, dtype=torch.bool))


def test_the_fit_leaves_masked_entries_out() -> None:
    logits, targets = noisy(1, 500, 12, (0.5,))
    longer = torch.cat([logits, torch.full((1, 500, 3), torch.nan, dtype=torch.float64)], -1)
    mask = (torch.arange(15) < 12).expand_as(longer)
    one, two = fit_temperature(logits, targets, updates=20), fit_temperature(longer, targets, mask, updates=20)
    torch.testing.assert_close(one.slopes, two.slopes)


def test_the_polynomial_goes_through_the_best_temperatures() -> None:
    # Two logits: the target is 1 below the other, and 9 more are x below: the best β is known by calculus.
    x = torch.linspace(1.2, 6, 60, dtype=torch.float64)
    logits = torch.cat([torch.ones(60, 1, dtype=torch.float64), torch.zeros(60, 1, dtype=torch.float64),
                        -x[:, None].expand(60, 9)], 1)  # fmt: skip
    module = fit_polynomial(logits, torch.ones(60, dtype=torch.int64))
    scales = torch.linspace(1, 64, 20_000, dtype=torch.float64)
    best = torch.stack([
        scales[(row * scales[:, None]).log_softmax(-1)[:, 1].argmax()] for row in logits
    ])  # fmt: skip
    found = module.rule(row_entropy(logits))[:, 0]
    assert float((found - best).abs().max()) < 0.15
    with pytest.raises(UsageError, match="too few"):
        fit_polynomial(logits, torch.zeros(60, dtype=torch.int64))


def test_a_fit_is_saved_with_the_model() -> None:
    with seeded(0):
        model, other = (FullAttention(4, 2, 20, sharpen="fitted") for _ in range(2))
    logits, targets = noisy(2, 200, 6, (0.5, 0.2))
    model.sharpen.load_state_dict(fit_temperature(logits.float(), targets, updates=20).state_dict())  # type: ignore[union-attr]
    other.load_state_dict(model.state_dict())
    x = drawn(1, 15, 4).float()
    assert other(x)[0].equal(model(x)[0])
    model.sharpen = None
    assert not torch.allclose(other(x)[0], model(x)[0])


def test_what_has_no_slopes_yet_is_softmax() -> None:
    with seeded(0):
        model = WindowAttention(4, 2, 9, sharpen="fitted").double()
    x = drawn(2, 15, 4)
    expected = model(x)[0]
    model.sharpen = None
    torch.testing.assert_close(model(x)[0], expected)


@pytest.mark.parametrize("name", NAMED)
def test_names_stand_for_what_an_attention_takes(name: str) -> None:
    with seeded(0):
        model = WindowAttention(8, 2, 3, sharpen=name)
    check_roles(model, model.roles())
    y, _ = model(drawn(1, 5, 8).float())
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.roles()["query.weight"] is Role.MATRIX
    with pytest.raises(UsageError, match="expected one of adaptive"):
        WindowAttention(8, 2, 3, sharpen="adaptve")


@pytest.mark.parametrize("steps", [40, 130])
def test_attention_over_steps_is_that_of_rows(steps: int) -> None:
    q, k, v = (drawn(1, steps, 2, 4, seed=i) for i in range(3))
    q = 3 * q
    empty = torch.zeros(1, 4, 2, 4, dtype=torch.float64)
    state = AttentionState(empty, empty, torch.zeros(1).long())
    y, _ = causal_attention(q, k, v, state, 5, 4, sharpen=adaptive_softmax)
    from pliant.mixers.attention import rotate, rotation

    turned = [rotate(part, *rotation(steps, 4, q)).transpose(1, 2) for part in (q, k)]
    age = torch.arange(steps)[:, None] - torch.arange(steps)
    weights = adaptive_softmax(turned[0] @ turned[1].mT / 2, mask=(age >= 0) & (age < 5))
    torch.testing.assert_close(y, (weights @ v.transpose(1, 2)).transpose(1, 2))


def test_a_saved_language_model_knows_how_sharp_it_is(tmp_path: Path) -> None:
    from pliant.models.language import LanguageModel

    with seeded(0):
        model = LanguageModel(
            width=8, depth=1, mixer="FullAttention", mixer_options={"num_heads": 2, "sharpen": "ssmax"}
        )
    model.save_pretrained(tmp_path)
    tokens = torch.arange(20)[None]
    with seeded(1):
        loaded = LanguageModel.from_pretrained(tmp_path)
    assert loaded(tokens)[0].equal(model(tokens)[0])


def test_rows_of_heads_alone_have_the_last_axis() -> None:
    with seeded(0):
        modules = SSMax(2), ASEntmax(2, 3), TemperatureMap.plain(2)
    for module in modules:
        with pytest.raises(UsageError, match="dim is 1"):
            module(drawn(2, 3, 4), 1, **({"queries": drawn(2, 3, 3)} if isinstance(module, ASEntmax) else {}))


@pytest.mark.slow
def test_all_compile_in_one_graph_and_export_as_plain_torch() -> None:
    # In a process of its own, since the type checks of the tests cannot be traced.
    code = """
import torch
from pliant.mixers import WindowAttention
from pliant.mixers.sharpen import NAMED
for name in NAMED:
    module = WindowAttention(8, 2, 4, sharpen=name)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 6, 8, requires_grad=True)
    y, state = module(x)
    state = type(state)(*(leaf.detach() for leaf in state))
    torch.testing.assert_close(compiled(x)[0], y)
    compiled(x)[0].sum().backward()
    for part in (x.detach(), x[:, :1].detach()):
        program = torch.export.export(module, (part, state))
        torch.testing.assert_close(program.module()(part, state)[0], module(part, state)[0])
        assert "pliant" not in str(program.graph), name
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
