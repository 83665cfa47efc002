"""Effective rates and normalize-and-project; numbered checks are those of effective-learning-rate.md, section 8."""

import copy
import logging
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from pliant.core import Record, Role, UsageError, seeded
from pliant.core.rates import angle, norms
from pliant.learn import Learner
from pliant.mixers import GatedLRU
from pliant.models import SequenceClassifier
from pliant.optim import adamw, effective_rate, normalize_and_project
from pliant.streams import digits

X = torch.linspace(-2, 2, 40, dtype=torch.float64).sin().reshape(5, 8)
Y = torch.linspace(1, 3, 10, dtype=torch.float64).reshape(5, 2)
READ = torch.linspace(-1, 1, 32, dtype=torch.float64).reshape(2, 16)


def first_matrix(seed: int = 0) -> Tensor:
    return torch.randn(16, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def invariant_loss(weight: Tensor, norm: str = "rms") -> Tensor:
    """Of a net whose matrix stands before a norm without ε."""
    h = X @ weight.T
    h = F.rms_norm(h, (16,), eps=0.0) if norm == "rms" else F.layer_norm(h, (16,), eps=0.0)
    return (torch.relu(h) @ READ.T - Y).square().mean()


def gradient(weight: Tensor, norm: str = "rms") -> Tensor:
    return torch.autograd.grad(invariant_loss(weight, norm), weight)[0]


def net(width: int = 16) -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(
            nn.Linear(8, width), nn.LayerNorm(width), nn.ReLU(),
            nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU(), nn.Linear(width, 2),
        )  # fmt: skip


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X.float()) - Y.float()).square().mean().backward()
        optimizer.step()


# Checks of the dossier


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_check_1_what_stands_before_a_norm_has_no_scale(norm: str) -> None:
    weight = first_matrix()
    tripled = (3 * weight).detach().requires_grad_()
    assert abs(float(invariant_loss(weight, norm).detach() - invariant_loss(tripled, norm).detach())) < 1e-12
    g = gradient(weight, norm)
    torch.testing.assert_close(gradient(tripled, norm), g / 3, rtol=1e-12, atol=1e-14)
    assert abs(float((weight.detach() * g).sum())) / float(weight.detach().norm() * g.norm()) < 1e-12


def test_check_2_descent_along_the_gradient_divides_its_rate_by_the_square_of_the_norm() -> None:
    weight = first_matrix()
    tripled = (3 * weight).detach().requires_grad_()
    one, nine = weight - 0.1 * gradient(weight), tripled - 0.9 * gradient(tripled)
    torch.testing.assert_close(nine, 3 * one, rtol=0, atol=1e-12)


def test_check_3_adam_divides_its_rate_by_the_norm() -> None:
    def run(scale: float, rate: float) -> Tensor:
        weight = (scale * first_matrix()).detach().requires_grad_()
        optimizer = torch.optim.Adam([weight], lr=rate, eps=0.0)
        for _ in range(20):
            weight.grad = gradient(weight)
            optimizer.step()
        return weight.detach() / scale

    assert float((run(3, 0.03) - run(1, 0.01)).norm() / run(1, 0.01).norm()) < 1e-10
    assert float((run(3, 0.01) - run(1, 0.01)).norm() / run(1, 0.01).norm()) > 1e-2


def test_check_4_projection_is_a_rate_that_grows_with_the_square_of_the_norm() -> None:
    projected, free = first_matrix(), first_matrix()
    first = projected.detach().norm()
    for _ in range(30):
        projected = projected - 0.5 * gradient(projected)
        projected = (projected * first / projected.norm()).detach().requires_grad_()
        rate = 0.5 * (free.detach().norm() / first) ** 2
        free = (free - rate * gradient(free)).detach().requires_grad_()
    assert free.detach().norm() > 1.01 * first  # or there is nothing to see
    torch.testing.assert_close(
        (free / free.norm()).detach(), (projected / projected.norm()).detach(), rtol=0, atol=1e-10
    )


@pytest.mark.parametrize("make", [
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    lambda p: torch.optim.AdamW(p, lr=1e-2),
    lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    lambda p: torch.optim.RMSprop(p, lr=1e-3),
])  # fmt: skip
def test_check_5_norms_stay_and_nothing_else_is_touched(
    make: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
) -> None:
    model, other = net(), net()
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = make(list(model.parameters()))
    assert normalize_and_project(optimizer, model) is optimizer
    free = make(list(other.parameters()))
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        p.grad = torch.full_like(p, 0.1)
        q.grad = torch.full_like(q, 0.1)
    optimizer.step()
    free.step()
    rest = dict(other.named_parameters())
    for name, p in model.named_parameters():
        if name in ("0.weight", "3.weight"):
            assert float(p.detach().norm() / first[name].norm()) == pytest.approx(1, abs=1e-6)
            assert float(angle(p.detach(), rest[name].detach())) < 1e-3
        elif "weight_decay" in optimizer.defaults and optimizer.defaults["weight_decay"] and name == "6.weight":
            torch.testing.assert_close(p, rest[name])
        else:
            assert torch.equal(p, rest[name]), name


def test_check_5_twice_is_once_and_a_loaded_model_keeps_its_own_norms() -> None:
    model = net()
    optimizer = normalize_and_project(torch.optim.AdamW(model.parameters(), lr=1e-2), model)
    wanted = float(model[0].weight.detach().norm())
    train(model, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    with seeded(1):
        later = net()
        for p in later.parameters():
            p.data.mul_(1.7)
    again = normalize_and_project(torch.optim.AdamW(later.parameters(), lr=1e-2), later)
    later.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    train(model, optimizer, 3)
    train(later, again, 3)
    assert float(later[0].weight.detach().norm()) == pytest.approx(wanted, rel=1e-6)
    for p, q in zip(model.parameters(), later.parameters(), strict=True):
        assert torch.equal(p, q)
    before = model[0].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    optimizer.step()
    torch.testing.assert_close(model[0].weight.detach(), before, rtol=3e-7, atol=0)


def test_check_6_a_norm_revives_a_dead_unit() -> None:
    readout = torch.tensor([1.0, -1.0, 2.0, 0.3], dtype=torch.float64)
    found = []
    for norm in (lambda z: z, lambda z: F.rms_norm(z, (4,), eps=0.0), lambda z: F.layer_norm(z, (4,), eps=0.0)):
        z = torch.tensor([1.0, 2.0, -3.0, 0.5], dtype=torch.float64, requires_grad=True)
        found.append(float(torch.autograd.grad((torch.relu(norm(z)) * readout).sum(), z)[0][2]))
    assert found == pytest.approx([0, -0.0948, -0.1436], abs=5e-5)


# Beyond them


def test_norms_grow_where_nothing_holds_them_and_the_effective_rate_says_so() -> None:
    model, held = net(), net()
    free = torch.optim.SGD(model.parameters(), lr=0.05)
    kept = normalize_and_project(torch.optim.SGD(held.parameters(), lr=0.05), held)
    first = effective_rate(free, model)
    assert first == effective_rate(kept, held)
    assert first["3.weight"] == pytest.approx(0.05 / float(model[3].weight.detach().norm()) ** 2)
    train(model, free, 100)
    train(held, kept, 100)
    assert effective_rate(free, model)["3.weight"] < 0.99 * first["3.weight"]
    assert effective_rate(kept, held)["3.weight"] == pytest.approx(first["3.weight"], rel=1e-6)


def test_every_few_steps_only() -> None:
    model = net()
    first = float(model[3].weight.detach().norm())
    optimizer = normalize_and_project(torch.optim.SGD(model.parameters(), lr=0.05), model, every=3)
    for step in range(1, 8):
        train(model, optimizer, 1)
        held = abs(float(model[3].weight.detach().norm()) / first - 1) < 1e-6
        assert held == (step % 3 == 0)


@pytest.mark.parametrize("rate", [0.01, 0.3])
def test_hyperball_turns_each_matrix_by_the_arctangent_of_the_rate_at_most(rate: float) -> None:
    model = net()
    optimizer = normalize_and_project(torch.optim.AdamW(model.parameters(), lr=rate), model, hyperball=True)
    for _ in range(3):
        before = model[3].weight.detach().clone()
        first = float(before.norm())
        train(model, optimizer, 1)
        after = model[3].weight.detach()
        assert float(after.norm()) == pytest.approx(first, rel=1e-6)
        assert float(angle(before, after)) <= math.asin(min(1.0, rate)) + 1e-6
        assert float(angle(before, after)) > 0.2 * rate


def test_scale_decay_pulls_on_gains_and_on_nothing_else() -> None:
    models = net(), net()
    plain = normalize_and_project(torch.optim.SGD(models[0].parameters(), lr=0.1), models[0])
    decayed = normalize_and_project(torch.optim.SGD(models[1].parameters(), lr=0.1), models[1], scale_decay=1.0)
    train(models[0], plain, 1)
    train(models[1], decayed, 1)
    for (name, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q, 0.9 * p if name in ("1.weight", "4.weight") else p, rtol=1e-6, atol=0)


def test_gain_and_bias_keep_their_joint_length() -> None:
    model = net()
    optimizer = normalize_and_project(torch.optim.SGD(model.parameters(), lr=0.05), model, gains="joint")
    train(model, optimizer, 5)
    for norm in (model[1], model[4]):
        assert float(norm.bias.detach().norm()) > 0.01
        assert float(torch.cat([norm.weight, norm.bias]).detach().norm()) == pytest.approx(4.0, rel=1e-6)


@pytest.mark.parametrize("options", [{"gains": "joint"}, {"scale_decay": 0.5}, {"hyperball": True}])
def test_a_copy_of_a_learner_projects_its_own_parameters(options: dict[str, Any]) -> None:
    with seeded(0):
        model = SequenceClassifier.sized(1, 8, 10, readout="mean")
    ours = Learner(model, normalize_and_project(adamw(model, 1e-2), model, **options))
    stream = digits(batch=4, questions=8)

    def learned(learner: Learner, first: int) -> list[Record]:
        found = []
        for question, answer in (stream.pair(i) for i in range(first, first + 4)):
            learner.predict(question)
            found.append(learner.learn(answer))
        return found

    learned(ours, 0)
    fork, kept = copy.deepcopy(ours), copy.deepcopy(model.state_dict())
    rest = learned(fork, 4)
    assert all(torch.equal(p, kept[name]) for name, p in model.state_dict().items())
    assert learned(ours, 4) == rest
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in fork.model.state_dict().items())


def test_a_matrix_that_begins_at_zero_is_left_free_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    nn.init.zeros_(model[3].weight)
    with caplog.at_level(logging.WARNING, "pliant.optim"):
        optimizer = normalize_and_project(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert "1 matrices are zero" in caplog.text
    train(model, optimizer, 5)
    assert float(model[3].weight.detach().norm()) > 0.01


def test_a_copy_of_an_optimizer_can_be_wrapped_again() -> None:
    model = net()
    optimizer = normalize_and_project(torch.optim.SGD(model.parameters(), lr=0.1), model, gains="joint")
    held = [float(model[i].weight.detach().norm()) for i in (0, 3)]
    twin, again = copy.deepcopy((model, optimizer))
    with torch.no_grad():
        twin[0].weight.mul_(2)  # the length to keep is the first, not that of the moment
    train(twin, normalize_and_project(again, twin, gains="joint"), 3)
    assert [float(twin[i].weight.detach().norm()) for i in (0, 3)] == pytest.approx(held, rel=1e-5)


def test_only_gains_of_norms_are_decayed_and_held() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.PReLU(), nn.Linear(16, 2))
    model[1].weight.requires_grad_(False)
    optimizer = normalize_and_project(
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1), model, gains="joint",
        scale_decay=1.0,
    )  # fmt: skip
    twin = copy.deepcopy(model)
    plain = normalize_and_project(torch.optim.SGD([p for p in twin.parameters() if p.requires_grad], lr=0.1), twin)
    train(model, optimizer, 3)
    train(twin, plain, 3)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "decoupled"), [(torch.optim.Adafactor, True), (torch.optim.RMSprop, False)])
def test_which_decay_is_decoupled(kind: type[torch.optim.Optimizer], decoupled: bool) -> None:
    model = net()
    optimizer = normalize_and_project(kind(model.parameters(), lr=0.1, weight_decay=0.1), model)  # type: ignore[call-arg]
    assert optimizer.param_groups[0]["weight_decay"] == (0.0 if decoupled else 0.1)


def test_what_could_be_something_else_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with seeded(0):
        model = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 2))
    with caplog.at_level(logging.WARNING, "pliant.optim"):
        normalize_and_project(torch.optim.SGD(model.parameters(), lr=0.1), model)
    assert "0.in_proj_weight (queries, keys and values in one)" in caplog.text


def test_decay_of_what_is_projected_is_off_and_said(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    with caplog.at_level(logging.INFO, "pliant.optim"):
        optimizer = normalize_and_project(torch.optim.AdamW(model.parameters(), weight_decay=0.1), model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.0, 0.1]
    assert "weight decay is off for 2 projected matrices" in caplog.text
    caplog.clear()
    model = net()
    with caplog.at_level(logging.INFO, "pliant.optim"):  # here decay is a part of the gradient, and turns
        optimizer = normalize_and_project(torch.optim.Adam(model.parameters(), weight_decay=0.1), model)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert not caplog.text


def test_our_models_are_projected_by_their_roles_and_gates_are_left_alone() -> None:
    with seeded(0):
        model = SequenceClassifier(8, 3, width=16, depth=1)
    optimizer = normalize_and_project(adamw(model, 1e-2), model)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    roles = model.roles()
    for name, p in model.named_parameters():
        held = abs(float(p.detach().norm() / first[name].norm()) - 1) < 1e-6
        assert held or roles[name] is not Role.MATRIX, name
        assert not torch.equal(p, first[name]), name


def test_matrices_of_zeros_and_infinities_are_left_as_they_are() -> None:
    model = net()
    optimizer = normalize_and_project(torch.optim.SGD(model.parameters(), lr=0.0), model)
    with torch.no_grad():
        model[0].weight.zero_()
        model[3].weight[0, 0] = torch.inf
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(model[0].weight, torch.zeros_like(model[0].weight))
    assert int(model[3].weight.isfinite().sum()) == model[3].weight.numel() - 1


def test_low_precision_is_projected_in_float32() -> None:
    matrix = torch.full((300, 300), 1e-3, dtype=torch.bfloat16)
    assert norms([matrix]).dtype == torch.float32
    assert float(norms([matrix])[0]) == pytest.approx(0.3, rel=5e-3)


@pytest.mark.parametrize(("arguments", "words"), [
    ({"every": 0}, "every is 0"),
    ({"every": 2, "hyperball": True}, "1 with hyperball"),
    ({"scale_decay": -1.0}, "scale_decay -1.0"),
    ({"scope": [Role.DECAY]}, "no parameter"),
    ({"roles": {"nowhere": Role.GAIN}}, "no parameter nowhere"),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(arguments: dict[str, object], words: str) -> None:
    model = net()
    with pytest.raises(UsageError, match=words):
        normalize_and_project(torch.optim.SGD(model.parameters(), lr=0.1), model, **arguments)  # type: ignore[arg-type]


def test_twice_around_one_optimizer_is_refused() -> None:
    model = net()
    optimizer = normalize_and_project(torch.optim.SGD(model.parameters(), lr=0.1), model)
    with pytest.raises(UsageError, match="already"):
        normalize_and_project(optimizer, model)


def test_a_schedule_of_torch_comes_after() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.ReLU(), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda update: 0.5**update)
    with pytest.raises(UsageError, match="wrap it first"):
        normalize_and_project(optimizer, model)
    assert len(optimizer.param_groups) == 1
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        normalize_and_project(optimizer, model), lambda update: 0.5**update
    )  # fmt: skip
    optimizer.step()
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]


def test_an_unknown_tensor_is_named() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mystery = nn.Parameter(torch.zeros(3, 4))
            self.lru = GatedLRU(4)

    with seeded(0):
        model = Odd()
    with pytest.raises(UsageError, match=r"mystery \(3, 4\)"):
        normalize_and_project(torch.optim.SGD(model.parameters(), lr=0.1), model)


def sharded(rank: int, meeting: str, hyperball: bool, gains: str) -> None:
    """One of two processes: a model whose parameters are shards beside the whole one, over a few steps."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    with seeded(0):
        models = net(5), net(5)
    fully_shard(models[0], mesh=init_device_mesh("cpu", (2,)))
    optimizers = [
        normalize_and_project(
            torch.optim.AdamW(model.parameters(), 1e-2), model, hyperball=hyperball, gains=gains, scale_decay=0.1
        )
        for model in models
    ]
    wanted = effective_rate(optimizers[1], models[1])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 4)
    assert isinstance(models[0][0].weight, DTensor) and models[0][0].weight.to_local().shape[0] < 5
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p.full_tensor(), q.detach(), rtol=1e-5, atol=1e-6)
    found = effective_rate(optimizers[0], models[0])
    assert found == pytest.approx(effective_rate(optimizers[1], models[1]), rel=1e-5)
    assert {name: found[name] for name in ("0.weight", "3.weight")} == pytest.approx(
        {name: wanted[name] for name in ("0.weight", "3.weight")}, rel=1e-5
    )
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize(("hyperball", "gains"), [(False, "free"), (True, "free"), (False, "joint")])
def test_shards_of_fsdp2_are_projected_to_norms_of_the_whole(tmp_path: Path, hyperball: bool, gains: str) -> None:
    torch.multiprocessing.spawn(sharded, (str(tmp_path / "meeting"), hyperball, gains), nprocs=2)
