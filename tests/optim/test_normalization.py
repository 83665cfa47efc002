"""Norms before nonlinearities: where they are put, and that matrices have no scale then."""

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from pliant.core import Role, UsageError, generator, seeded
from pliant.core.roles import roles_of
from pliant.models import XLSTM, SequenceClassifier
from pliant.optim import invariant, normalize_and_project, normalized, norms_of
from pliant.optim.normalization import AlongChannels


def mlp() -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(
            nn.Linear(6, 16), nn.ReLU(),
            nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.0), nn.GELU()),
            nn.Linear(16, 3), nn.LogSoftmax(-1),
        )  # fmt: skip


def cnn() -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(8, 4, 3, stride=2), nn.Tanh(),
            nn.Flatten(), nn.Linear(36, 8), nn.SiLU(), nn.Linear(8, 2),
        )  # fmt: skip


def conv(axes: int) -> nn.Sequential:
    make = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
    with seeded(0):
        return nn.Sequential(make(2, 4, 2), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 3**axes, 2))


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


CASES = [
    (mlp, (5, 6)), (cnn, (5, 3, 16, 16)),
    (lambda: conv(1), (5, 2, 4)), (lambda: conv(2), (5, 2, 4, 4)), (lambda: conv(3), (5, 2, 4, 4, 4)),
]  # fmt: skip


@pytest.mark.parametrize("norm", ["layer", "rms"])
@pytest.mark.parametrize(("make", "shape"), CASES)
def test_with_projected_matrices_the_outputs_have_no_scale(make: object, shape: tuple[int, ...], norm: str) -> None:
    model = normalized(make().double(), norm, eps=1e-30)  # type: ignore[operator, arg-type]
    optimizer = normalize_and_project(torch.optim.SGD(model.parameters(), lr=0.1), model)
    x = drawn(*shape)
    model(x).square().sum().backward()
    optimizer.step()  # norms have biases then, and gains of their own
    first = model(x).detach()
    projected = [p for group in optimizer.param_groups if group["projected_norms"] for p in group["params"]]
    assert len(projected) == sum(role is Role.MATRIX for role in roles_of(model).values()) > 0
    for factor in (1e-3, 7.0):
        with torch.no_grad():
            torch._foreach_mul_(projected, factor)
        torch.testing.assert_close(model(x).detach(), first, rtol=1e-10, atol=1e-10)


def test_all_else_keeps_its_name_and_twice_is_once() -> None:
    model = cnn()
    before = dict(model.named_parameters())
    assert normalized(model) is model
    after = dict(model.named_parameters())
    assert before.keys() - after.keys() == {"0.bias", "3.bias", "6.bias"}
    assert all(after[name] is p for name, p in before.items() if name in after)
    assert after.keys() - before.keys() == {
        "1.0.norm.weight", "1.0.norm.bias", "4.0.norm.weight", "4.0.norm.bias", "7.0.weight", "7.0.bias",
    }  # fmt: skip
    text = repr(model)
    normalized(model)
    assert repr(model) == text
    assert set(roles_of(model).values()) == {Role.MATRIX, Role.HEAD, Role.GAIN, Role.BIAS}


def test_a_norm_over_channels_is_that_of_each_place_and_streams_need_no_batch() -> None:
    norm = AlongChannels(nn.LayerNorm(3), 2)
    x = drawn(2, 3, 4, 5).float()
    y = norm(x)
    torch.testing.assert_close(y[1, :, 2, 3], norm.norm(x[1, :, 2, 3]))
    torch.testing.assert_close(norm(x[0]), y[0])


def test_norms_have_the_device_and_type_of_their_map_and_the_mode_of_the_model() -> None:
    model = normalized(mlp().to(torch.bfloat16).eval())
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert not any(part.training for part in model.modules())
    far = normalized(nn.Sequential(nn.Linear(2, 3, device="meta"), nn.ReLU(), nn.Linear(3, 1, device="meta")), "rms")
    assert {p.device.type for p in far.parameters()} == {"meta"}


def test_the_report_says_what_is_missing_redundant_and_left() -> None:
    with seeded(0):
        model = nn.Sequential(
            nn.Linear(4, 8), nn.Identity(), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.ReLU(),
            nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2), nn.Sigmoid(),
        )  # fmt: skip
    found = norms_of(model)
    assert found.missing == {"0": "1"} and found.present == ["3", "6"] and found.outputs == ["10"]
    assert found.redundant == ["0.bias", "3.bias"] and found.idle == ["6.bias"]
    assert str(found).splitlines() == [
        "0       no norm before 1", "3       a norm follows", "6       a norm follows", "10      after the head",
        "0.bias  redundant before a norm", "3.bias  redundant before a norm", "6.bias  does nothing before its norm",
    ]  # fmt: skip
    kept = normalized(copy.deepcopy(model), keep_biases=True)
    assert kept[0].bias is not None and kept[3].bias is not None
    normalized(model)
    assert model[0].bias is None and model[3].bias is None and model[6].bias is not None
    assert norms_of(model).redundant == []


def test_a_bias_before_a_norm_lets_the_scale_through() -> None:
    x = drawn(5, 6)
    kept, taken = (normalized(mlp(), keep_biases=keep) for keep in (True, False))
    assert not invariant(kept, x)["0.weight"] and invariant(taken, x)["0.weight"]


def test_our_own_have_norms_where_their_papers_put_them_and_stay_as_they_are() -> None:
    with seeded(0):
        models = SequenceClassifier(3, 4, width=8, depth=1), XLSTM(16, 2, 1)
    for model in models:
        text = repr(model)
        assert repr(normalized(model)) == text
        assert norms_of(model).ours == [""]
    with seeded(0):
        around = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), SequenceClassifier(3, 4, width=8, depth=1))
    found = norms_of(around)
    assert found.missing == {"0": "1"} and found.ours == ["2"]


class Around(nn.Module):
    """A `forward` of its own around parts that are seen."""

    def __init__(self, *parts: nn.Module):
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.head = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)
        return self.head(torch.relu(x[0] if isinstance(x, tuple) else x))


class Swish(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


@pytest.mark.parametrize(("part", "words"), [
    (lambda: nn.GRU(4, 4), r"parts.0 \(GRU, which applies them inside\)"),
    (lambda: nn.LSTMCell(4, 4), r"parts.0 \(LSTMCell, which applies"),
    (lambda: nn.TransformerEncoderLayer(4, 1, 8, batch_first=True), r"parts.0 \(TransformerEncoderLayer, which"),
    (lambda: nn.MultiheadAttention(4, 2), r"parts.0 \(MultiheadAttention, which"),
    (lambda: nn.Linear(4, 4), r"parts.0 \(Linear, called in the forward of Around\)"),
    (lambda: nn.ReLU(), r"parts.0 \(ReLU, called in the forward of Around\)"),
    (lambda: nn.Sequential(nn.Linear(4, 4), Swish()), r"parts.0.1 \(Swish, which may be one\)"),
    (lambda: Around(nn.Linear(4, 4)), r"parts.0.parts.0 \(Linear"),
])  # fmt: skip
def test_what_cannot_be_seen_is_named_and_can_be_left(part: object, words: str) -> None:
    with seeded(0):
        model = Around(part())  # type: ignore[operator]
    text = repr(model)
    with pytest.raises(UsageError, match=words):
        normalized(model)
    assert repr(model) == text
    assert repr(normalized(model, leave=tuple(norms_of(model).unseen))) == text


def test_a_forward_around_chains_is_noticed(caplog: pytest.LogCaptureFixture) -> None:
    with seeded(0):
        model = Around(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)))
    assert norms_of(model).noticed == [""]
    with caplog.at_level(logging.INFO, "pliant.optim"):
        normalized(model)
    assert "norms were added after parts.0.0" in caplog.text and "parts.0.0.bias" in caplog.text
    assert "what the model call in a forward" in caplog.text
    # The function that nobody saw leaves a matrix with a scale, and that can be seen.
    found = invariant(model, drawn(5, 4))
    assert found == {"parts.0.0.weight": True, "parts.0.2.weight": False, "head.weight": False}


def test_what_is_not_known_is_one_sentence() -> None:
    with pytest.raises(UsageError, match="Sequential has no module nowhere"):
        normalized(mlp(), leave=["nowhere"])


def test_invariance_is_seen_and_changes_nothing() -> None:
    with seeded(0):
        model = nn.Sequential(
            nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(),
            nn.Linear(8, 2),
        )  # fmt: skip
    before = copy.deepcopy(model.state_dict())
    x = drawn(16, 6).float()
    # In training a batch norm takes the scale away, later it divides by what it has seen.
    assert invariant(model, x) == {"0.weight": True, "4.weight": False, "6.weight": False}
    assert not invariant(model.eval(), x)["0.weight"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_invariance_of_our_recurrent_models_is_that_of_their_structure() -> None:
    with seeded(0):
        model = SequenceClassifier(3, 4, width=8, depth=1)
    # Norms before blocks on a residual stream: no matrix is without a scale, and heads of zeros hide none of that.
    found = invariant(model, drawn(2, 7, 3))
    assert len(found) > 10 and not any(found.values())


def test_a_nonlinearity_that_is_used_twice_gets_two_norms() -> None:
    with seeded(0):
        shared = nn.ReLU()
        model = normalized(nn.Sequential(nn.Linear(4, 8), shared, nn.Linear(8, 8), shared, nn.Linear(8, 2)))
    assert not norms_of(model).missing and len([m for m in model.modules() if isinstance(m, nn.LayerNorm)]) == 2
    assert invariant(model, torch.randn(5, 4, generator=generator(0, "x")))["2.weight"]


def test_a_map_that_is_used_twice_is_refused() -> None:
    with seeded(0):
        shared = nn.Linear(8, 8)
        model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), nn.Linear(8, 2))
    with pytest.raises(UsageError, match="one map that is called more than once"):
        normalized(model)
