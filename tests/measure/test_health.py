"""The read-out of a model's ability to learn."""

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from pliant.core import UsageError, generator, seeded
from pliant.measure.health import health, verdict
from pliant.mixers import LRU, RGLRU
from pliant.models import SequenceClassifier
from pliant.optim import Probe, Schedule, adamw

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
    assert "effective rank" in text and [line.split()[:2] for line in text.splitlines() if ".weight" in line] == [
        ["0.weight", "matrix"], ["2.weight", "matrix"], ["4.weight", "head"]
    ]  # fmt: skip
    assert text.splitlines()[-1] == verdict(found)


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
        model[2].weight *= 16
    later = health(model, X, optimizer=optimizer, since=first)
    row = later.matrices["2.weight"]
    assert (row["norm ratio"], row["rate ratio"], row["distance"]) == pytest.approx((16, 1 / 16, 15), rel=1e-5)
    assert row["angle"] == pytest.approx(0, abs=1e-6)  # longer, and no other direction
    with torch.no_grad():
        w, turned = model[4].weight, torch.randn(3, 8, generator=generator(2, "turned"))
        turned -= w * (turned * w).sum() / w.square().sum()
        w.add_(turned * w.norm() / turned.norm())
    head = health(model, X, optimizer=optimizer, since=first).matrices["4.weight"]
    assert head["angle"] == pytest.approx(math.pi / 4)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(10, 6, generator=generator(1, "moved")))
    assert verdict(health(model, X, optimizer=optimizer, since=first)) == (
        "2.weight turns slowly: its effective rate fell to 6% of its start, "
        "as it grew to 16.0 times its length; project"
    )


def test_a_schedule_that_went_down_is_told_from_a_matrix_that_grew() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = Schedule(lambda update: (0.01, 1.0, 0.05)[update])  # warms up, then falls
    schedule.init(model, optimizer)
    first = health(model, X, optimizer=optimizer)
    probe = Probe(1, generator(0, "upkeep"), None)  # type: ignore[arg-type]
    for update, wanted in ((1, 1.0), (2, 0.05)):
        schedule.apply(model, optimizer, probe._replace(update=update))
        found = health(model, X, optimizer=optimizer, since=first)
        assert found.matrices["2.weight"]["rate ratio"] == pytest.approx(wanted)
    assert verdict(found) == (
        "0.weight turns slowly: its effective rate fell to 5% of its start, as its rate did; re-warm"
    )
    head = [name for name, role in found.roles.items() if role == "head"]
    assert head == ["4.weight"]


def test_movement_and_churn_refer_to_the_moment_before_and_norms_to_the_start() -> None:
    model = net()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    first = health(model, X, optimizer=optimizer, keep_parameters=True)
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(10, 6, generator=generator(1, "moved")))
    second = health(model, X, optimizer=optimizer, since=first)
    third = health(model, X, optimizer=optimizer, since=first, before=second)
    assert second.units["2"]["moved"] > 0.1 and third.units["2"]["moved"] == 0
    assert second.whole["churn"] > 0.01 and third.whole["churn"] == 0
    assert third.matrices == second.matrices and third.matrices["0.weight"]["distance"] > 0.1
    assert third.units["2"]["srank ratio"] == second.units["2"]["srank ratio"] > 0


def test_what_warns_best_is_said_first() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight[1:] = model[2].weight[0]  # one direction
        model[2].bias[:] = 50.0
        model[0].bias[:9] = -100.0  # and dead units before it
    found = health(model, X)
    assert found.units["2"]["dead"] == pytest.approx(0.9)
    assert "span 1 directions of" in verdict(found)
    wide = replace(found, units={name: row | {"srank": row["width"]} for name, row in found.units.items()})
    assert verdict(wide).startswith("90% of the units that 2 reads are dead")
    alive = replace(wide, units={name: row | {"dead": 0.0} for name, row in wide.units.items()})
    assert verdict(alive) == "90% of the units that 2 reads are dormant; renew units"


def test_few_directions_are_no_fault_where_the_inputs_have_no_more() -> None:
    model = net()
    model[1] = nn.Tanh()
    same = X[:1].expand(64, -1).contiguous()
    first = health(model, same)
    assert "span 1 directions" in verdict(first)  # nothing else is known
    with torch.no_grad():
        model[0].weight.add_(0.5)
    assert "span" not in verdict(health(model, same, since=first))


def test_gated_units_of_ours_are_not_called_dead_for_their_sign() -> None:
    with seeded(0):
        model = SequenceClassifier(3, 2, width=16, depth=1)
    x = torch.randn(4, 64, 3, generator=generator(0, "x"))
    mlp = model.stack.blocks[0].mlp
    half = mlp.linear_out.in_features
    with torch.no_grad():
        mlp.linear_in.bias[:half] += 6.0  # open gates
        mlp.linear_in.bias[half:] -= 9.0  # over what is negative
    found = health(model, x)
    assert found.units["stack.blocks.0.mlp.linear_out"]["dead"] == 0
    with torch.no_grad():
        mlp.linear_in.bias[: half // 2] = -60.0  # closed for good
    assert health(model, x).units["stack.blocks.0.mlp.linear_out"]["dead"] == 0.5


def test_gates_biases_and_heads_are_not_said_to_turn_slowly() -> None:
    with seeded(0):
        model = SequenceClassifier(3, 2, width=16, depth=1)
    x = torch.randn(4, 64, 3, generator=generator(0, "x"))
    first = health(model, x, optimizer=adamw(model))
    assert not any("bias" in name for name in first.matrices)
    with torch.no_grad():
        model.head.linear.weight *= 100
        model.stack.blocks[0].mixer.lru.decay_gate.weight *= 100
        model.embed.weight.add_(0.3)
    assert "turns slowly" not in verdict(health(model, x, optimizer=adamw(model), since=first))
    with torch.no_grad():
        model.stack.blocks[0].mixer.linear_out.weight *= 100
    assert "mixer.linear_out.weight turns slowly" in verdict(health(model, x, optimizer=adamw(model), since=first))


def test_steps_that_do_not_exist_are_left_out() -> None:
    with seeded(0):
        model = SequenceClassifier(3, 2, width=8, depth=1)
    x = torch.randn(2, 10, 3, generator=generator(0, "x"))
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[1, 4:] = False
    found, whole = health(model, x, mask=mask), health(model, x)
    name = "stack.blocks.0.mlp.linear_out"
    assert found.units[name]["rows"] == 14 and whole.units[name]["rows"] == 20
    torch.testing.assert_close(found.features[name], whole.features[name][[*range(14)]])


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
    model.stack.blocks[0].eval()
    modes = [part.training for part in model.modules()]
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    health(model, torch.ones(2, 5, 3))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert [part.training for part in model.modules()] == modes
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(p.grad is None for p in model.parameters())


def test_an_error_leaves_nothing_either() -> None:
    model = net()
    with pytest.raises(RuntimeError):
        health(model, torch.ones(2, 5))
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("model", "more", "words"),
    [
        (nn.Sequential(nn.Linear(6, 1), nn.Flatten(0)), {}, r"says \(64,\); expected one tensor"),
        (nn.GRU(6, 4), {}, "GRU says tuple"),
        (net(), {"targets": torch.zeros(64, dtype=torch.long), "known": torch.zeros(64, dtype=torch.bool),
                 "loss": lambda y, t: nn.functional.cross_entropy(y, t, reduction="none")}, "no target of the probe"),
        (net(), {"since": health(net(), X[:32])}, r"its outputs has shape \(32, 3\) there and \(64, 3\) here"),
        (net(), {"since": health(nn.Sequential(nn.Linear(6, 3)), X)}, ""),
    ],
)  # fmt: skip
def test_what_cannot_be_looked_at_is_one_sentence(model: nn.Module, more: dict[str, Any], words: str) -> None:
    if not words:  # what the earlier moment did not have is not compared
        assert "moved" not in health(model, X, **more).units["2"]
        return
    with pytest.raises(UsageError, match=words):
        health(model, X, **more)


def test_hooks_go_when_a_look_at_recurrences_fails() -> None:
    class Broken(RGLRU):
        def time_constants(self) -> torch.Tensor:
            raise RuntimeError

    with seeded(0):
        model = nn.Sequential(RGLRU(6), Broken(6))
    with pytest.raises(RuntimeError):
        health(model, X[None])
    assert not any(part._forward_pre_hooks for part in model.modules())


def test_probe_rows_are_bounded() -> None:
    found = health(net(), torch.randn(5000, 6, generator=generator(0, "many")))
    assert found.features["2"].shape == (512, 10)
    assert math.isfinite(found.units["2"]["effective rank"])
