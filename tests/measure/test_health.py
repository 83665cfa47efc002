"""The read-out of a model's ability to learn."""

import copy
import math

import pytest
import torch
from torch import nn

from pliant.core import generator, seeded
from pliant.measure.health import health, verdict
from pliant.mixers import LRU, RGLRU
from pliant.models import SequenceClassifier
from pliant.optim import adamw

X = torch.randn(64, 6, generator=generator(0, "probe"))


def net() -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 3))


def test_a_table_of_layers_by_hand() -> None:
    model = net()
    with torch.no_grad():
        model[0].bias[:4] = -100.0  # four dead units
        model[2].weight[1:] = model[2].weight[0]
        model[2].bias[:] = 50.0  # all units the same, up to a shift
    found = health(model, X, optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    assert found.units["2"]["dead"] == pytest.approx(0.4) and found.units["2"]["dormant"] >= 0.4
    assert found.units["4"]["srank"] == 1 and found.units["4"]["effective rank"] == pytest.approx(1, abs=0.1)
    assert found.matrices["2.weight"]["norm"] == pytest.approx(float(model[2].weight.detach().norm()))
    assert found.matrices["2.weight"]["rate"] == pytest.approx(0.1 / float(model[2].weight.detach().norm()) ** 2)
    assert list(found.matrices) == ["0.weight", "2.weight", "4.weight"]
    text = str(found)
    assert "effective rank" in text and text.splitlines()[-1] == verdict(found)


def test_since_an_earlier_moment() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    first = health(model, X, optimizer=optimizer, keep_parameters=True)
    assert "moved" not in first.units["2"]
    same = health(model, X, optimizer=optimizer, since=first)
    assert same.units["2"]["moved"] == 0 and same.units["2"]["flipped"] == 0
    assert same.matrices["0.weight"]["distance"] == 0
    assert "stopped moving" in verdict(same)
    with torch.no_grad():
        model[2].weight *= 8
    later = health(model, X, optimizer=optimizer, since=first)
    row = later.matrices["2.weight"]
    assert (row["norm ratio"], row["rate ratio"], row["distance"]) == pytest.approx((8, 1 / 8, 7), rel=1e-5)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(10, 6, generator=generator(1, "moved")))
    assert verdict(health(model, X, optimizer=optimizer, since=first)) == (
        "2.weight turns slowly: its effective rate fell to 12% of its start; re-warm or project"
    )


def test_recurrences_tell_their_time_constants_and_gates() -> None:
    with seeded(0):
        model = SequenceClassifier(3, 2, width=16, depth=2)
        for p in model.parameters():
            p.data.add_(0.1 * torch.randn_like(p))
        model.stack.blocks[1].mixer.lru.input_gate.bias.data.fill_(9.0)
    x = torch.randn(4, 12, 3, generator=generator(0, "x"))
    found = health(model, x, optimizer=adamw(model))
    row = found.recurrences["stack.blocks.1.mixer.lru"]
    assert row["input gate saturated"] == 1.0 and row["decay gate saturated"] < 0.1
    low, middle, high = row["time constants"]
    assert 0 < low < middle < high


def test_time_constants_are_those_of_the_recurrence() -> None:
    with seeded(0):
        unit, lru = RGLRU(4), LRU(4, 3)
        for gate in (unit.input_gate, unit.decay_gate):
            gate.weight.data.zero_()  # gates at one half
        lru.skip.data.zero_()
    x = torch.zeros(1, 30, 4)
    x[0, 0] = 1
    h, _ = unit(x)
    decay = (h[0, 21] / h[0, 20]).detach()
    torch.testing.assert_close(-1 / decay.log(), unit.time_constants().detach(), rtol=1e-4, atol=0)
    radius = lru.double().eigenvalues().detach().abs()
    torch.testing.assert_close(-1 / radius.log(), lru.time_constants().detach(), rtol=1e-9, atol=0)


def test_nothing_is_left_behind() -> None:
    with seeded(0):
        model = SequenceClassifier(3, 2, width=8, depth=1)
    model.train()
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    health(model, torch.ones(2, 5, 3))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.training
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_an_error_leaves_nothing_either() -> None:
    model = net()
    with pytest.raises(RuntimeError):
        health(model, torch.ones(2, 5))
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_probe_rows_are_bounded() -> None:
    found = health(net(), torch.randn(5000, 6, generator=generator(0, "many")))
    assert found.features["2"].shape == (512, 10)
    assert math.isfinite(found.units["2"]["effective rank"])
