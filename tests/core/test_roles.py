"""What parameters are for: declared, inferred, or asked about."""

import pytest
import torch
from torch import nn

from pliant.core import Role, UsageError, seeded
from pliant.core.roles import NORMS, doubts_of, head_of, roles_of, table_of
from pliant.mixers import GatedLRU
from pliant.models import SequenceClassifier


def test_our_modules_are_asked() -> None:
    with seeded(0):
        model = SequenceClassifier(3, 2, width=8, depth=1)
        around = nn.Sequential(nn.Linear(8, 8), GatedLRU(8), nn.Linear(8, 2))
    assert roles_of(model) == model.roles()
    found = roles_of(around)
    assert {name.removeprefix("1."): role for name, role in found.items() if name.startswith("1.")} == around[1].roles()
    assert found["0.weight"] is Role.MATRIX and found["2.weight"] is Role.HEAD and found["2.bias"] is Role.BIAS


def test_parts_of_torch_are_known() -> None:
    with seeded(0):
        model = nn.ModuleDict({
            "embed": nn.Embedding(5, 4), "wide": nn.Conv1d(4, 8, 3), "deep": nn.Conv1d(8, 8, 3, groups=8),
            "batch": nn.BatchNorm1d(8), "rms": nn.RMSNorm(8), "prelu": nn.PReLU(), "lstm": nn.LSTM(8, 3),
            "attend": nn.MultiheadAttention(8, 2), "out": nn.Linear(8, 2),
        })  # fmt: skip
    found = roles_of(model)
    assert list(found) == [name for name, _ in model.named_parameters()]
    expected = {
        "embed.weight": Role.EMBEDDING, "wide.weight": Role.MATRIX, "wide.bias": Role.BIAS, "deep.weight": Role.CONV,
        "batch.weight": Role.GAIN, "batch.bias": Role.BIAS, "rms.weight": Role.GAIN, "prelu.weight": Role.GAIN,
        "lstm.weight_hh_l0": Role.GATE, "lstm.bias_ih_l0": Role.BIAS, "attend.in_proj_weight": Role.MATRIX,
        "attend.out_proj.weight": Role.MATRIX, "attend.in_proj_bias": Role.BIAS, "out.weight": Role.HEAD,
    }  # fmt: skip
    assert {name: found[name] for name in expected} == expected


def test_what_nothing_tells_is_named_and_can_be_given() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = (nn.Parameter(torch.zeros(2, 3)) for _ in range(2))

    with pytest.raises(UsageError, match=r"one \(2, 3\), two \(2, 3\)"):
        roles_of(Odd())
    assert roles_of(Odd(), {"one": Role.MATRIX, "two": Role.GATE}) == {"one": Role.MATRIX, "two": Role.GATE}
    with pytest.raises(UsageError, match="no parameter three"):
        roles_of(Odd(), {"three": Role.MATRIX})


def test_what_is_given_stands_above_what_is_declared() -> None:
    with seeded(0):
        lru = GatedLRU(4)
    name = next(iter(lru.roles()))
    assert roles_of(lru, {name: Role.HEAD})[name] is Role.HEAD


def test_a_table_to_be_read() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    lines = table_of(model, roles_of(model)).splitlines()
    assert lines == [
        "0.weight  (4, 3)  head", "0.bias    (4,)    bias", "1.weight  (4,)    gain", "1.bias    (4,)    bias",
    ]  # fmt: skip


def test_layers_of_transformers_have_no_head_and_a_declared_one_leaves_none_to_others() -> None:
    with seeded(0):
        layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        stack = nn.ModuleDict({"layers": nn.TransformerEncoder(layer, 2), "attend": nn.MultiheadAttention(8, 2)})
        out = nn.Linear(8, 2)
        ours = nn.Sequential(nn.Linear(3, 3), SequenceClassifier(3, 2, width=8, depth=1))
    for module in (layer, stack):
        assert head_of(module) is None
        assert set(roles_of(module).values()) == {Role.MATRIX, Role.BIAS, Role.GAIN}
    stack["out"] = out
    assert head_of(stack) == "out" and roles_of(stack)["out.weight"] is Role.HEAD
    assert roles_of(ours)["0.weight"] is Role.MATRIX


@pytest.mark.parametrize(("make", "shape"), [
    (nn.Conv1d, (2, 3, 4)), (nn.Conv2d, (2, 3, 4, 4)), (nn.Conv3d, (2, 3, 4, 4, 4)), (nn.ConvTranspose2d, (2, 3, 4, 4)),
])  # fmt: skip
def test_convolutions(make: type[nn.Module], shape: tuple[int, ...]) -> None:
    with seeded(0):
        model = nn.Sequential(make(3, 6, 2), make(6, 6, 2, groups=6), make(6, 2, 2))
    assert [role for name, role in roles_of(model).items() if "weight" in name] == [Role.MATRIX, Role.CONV, Role.HEAD]


def test_norms_are_what_takes_a_factor_away() -> None:
    with seeded(0):
        norms = nn.LayerNorm(6), nn.RMSNorm(6), nn.GroupNorm(2, 6), nn.BatchNorm1d(6)
    x = torch.randn(9, 6, generator=torch.Generator().manual_seed(0))
    for norm in norms:
        assert isinstance(norm, NORMS)
        torch.testing.assert_close(norm(1000 * x), norm(100 * x), rtol=1e-4, atol=1e-5)
    assert not isinstance(nn.LocalResponseNorm(2), NORMS)


def test_doubts_are_told_in_the_table() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.gru, self.attend = nn.Embedding(5, 4), nn.GRU(4, 4), nn.MultiheadAttention(4, 2)
            self.out, self.other = nn.Linear(4, 5), nn.Linear(4, 5)
            self.out.weight = self.embed.weight

    with seeded(0):
        model = Tied()
    assert doubts_of(model, roles_of(model)) == {
        "embed.weight": "also out.weight (matrix)",
        "gru.weight_ih_l0": "gates and what they let through in one",
        "gru.weight_hh_l0": "gates and what they let through in one",
        "attend.in_proj_weight": "queries, keys and values in one",
        "other.weight": "the last map to be registered, and so perhaps not the last",
    }
    first, *rest = table_of(model, roles_of(model)).splitlines()
    assert first.split() == ["embed.weight", "(5,", "4)", "embedding", "also", "out.weight", "(matrix)"]
    assert all(line == line.rstrip() for line in rest)
    given = {"other.weight": Role.MATRIX}
    assert "other.weight" not in doubts_of(model, roles_of(model, given))
