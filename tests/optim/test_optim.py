"""AdamW by roles, and rates over updates."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pliant.core import Role, generator, seeded
from pliant.core.roles import MIXING
from pliant.models import SequenceClassifier
from pliant.optim import Probe, Schedule, adamw, normalize_and_project, warmup, warmup_cosine
from tests.optim.test_projection import first_matrix, invariant_loss


def model() -> SequenceClassifier:
    with seeded(0):
        return SequenceClassifier(3, 2, width=8, depth=1)


def train(net: SequenceClassifier, optimizer: torch.optim.Optimizer, updates: int = 5) -> list[torch.Tensor]:
    x = torch.linspace(-1, 1, 2 * 6 * 3).reshape(2, 6, 3)
    for _ in range(updates):
        optimizer.zero_grad()
        net(x)[0].square().mean().sub(net(x)[0].mean()).backward()
        optimizer.step()
    return [p.detach() for p in net.parameters()]


def test_without_decay_it_is_the_adamw_of_torch_to_the_bit() -> None:
    one, two = model(), model()
    ours = train(one, adamw(one, 1e-2, weight_decay=0.0))
    theirs = train(two, torch.optim.AdamW(two.parameters(), 1e-2, betas=(0.9, 0.99), weight_decay=0.0, fused=True))
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


def test_only_weights_that_mix_are_decayed() -> None:
    net = model()
    optimizer = adamw(net, 0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    roles = net.roles()
    for name, parameter in net.named_parameters():
        factor = 0.95 if roles[name] in MIXING else 1.0
        torch.testing.assert_close(parameter.detach(), factor * before[name])
    assert {Role.DECAY, Role.GAIN, Role.BIAS}.isdisjoint(MIXING)


def test_a_state_of_the_optimizer_resumes_to_the_bit() -> None:
    one, two = model(), model()
    first, second = adamw(one, 1e-2), adamw(two, 1e-2)
    train(one, first)
    two.load_state_dict(one.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert all(a.equal(b) for a, b in zip(train(one, first), train(two, second), strict=True))


def test_a_parameter_without_gradient_is_left_alone() -> None:
    net = model()
    optimizer = adamw(net, 0.1)
    before = [p.detach().clone() for p in net.parameters()]
    optimizer.step()
    assert all(a.equal(b.detach()) for a, b in zip(before, net.parameters(), strict=True))


def test_rates_over_updates() -> None:
    rise = warmup(4)
    assert [rise(update) for update in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert warmup(0)(0) == 1
    fall = warmup_cosine(2, 12, floor=0.1)
    assert [fall(update) for update in (0, 1, 2, 7, 12, 100)] == pytest.approx([0.5, 1, 1, 0.55, 0.1, 0.1])


def torchs(net: SequenceClassifier, like: torch.optim.Optimizer) -> torch.optim.AdamW:
    """The AdamW of torch with the groups of `like`, over the parameters of `net`."""
    options = ("lr", "betas", "eps", "weight_decay", "fused")
    groups = [
        {"params": mine["params"]} | {name: theirs[name] for name in options}
        for mine, theirs in zip(adamw(net).param_groups, like.param_groups, strict=True)
    ]
    return torch.optim.AdamW(groups)


def test_every_step_is_that_of_torch_to_the_bit_also_where_it_takes_the_long_way() -> None:
    one, two = model(), model()
    ours = adamw(one, 1e-2, weight_decay=0.1)
    theirs = torchs(two, ours)
    calls: list[str] = []
    ours.register_step_pre_hook(lambda *_: calls.append("before"))
    ours.register_step_post_hook(lambda *_: calls.append("after"))
    for round_ in range(5):
        train(one, ours, 3)
        train(two, theirs, 3)
        if round_ == 1:
            for net in (one, two):  # one that gets no gradient for a while
                net.head.linear.bias.requires_grad_(False)
                net.head.linear.bias.grad = None
        if round_ == 2:
            for net, optimizer in ((one, ours), (two, theirs)):
                net.head.linear.bias.requires_grad_(True)
                optimizer.param_groups[0]["lr"] = 3e-3
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        if round_ == 3:
            del ours.state[one.embed.weight]
            del theirs.state[two.embed.weight]
        assert all(a.equal(b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
        mine, torch_own = ours.state_dict(), theirs.state_dict()
        assert mine["state"].keys() == torch_own["state"].keys()
        for key, state in torch_own["state"].items():
            assert all(value.equal(mine["state"][key][name]) for name, value in state.items())
    assert calls == ["before", "after"] * 15


def test_who_listens_to_all_optimizers_or_profiles_is_heard() -> None:
    net = model()
    optimizer = adamw(net)
    calls: list[str] = []
    handles = [
        register(lambda *_, name=name: calls.append(name))
        for name, register in (
            ("before", register_optimizer_step_pre_hook),
            ("after", register_optimizer_step_post_hook),
        )
    ]
    train(net, optimizer, 2)
    for handle in handles:
        handle.remove()
    train(net, optimizer, 1)
    assert calls == ["before", "after"] * 2
    with torch.autograd.profiler.profile() as profile:
        train(net, optimizer, 1)
    assert "Optimizer.step#AdamW.step" in {event.name for event in profile.function_events}


def test_a_copy_of_the_optimizer_counts_for_itself() -> None:
    net = model()
    optimizer = adamw(net)
    train(net, optimizer, 3)
    twin_net, twin = copy.deepcopy((net, optimizer))
    train(twin_net, twin, 2)
    steps = [{float(state["step"]) for state in each.state.values()} for each in (optimizer, twin)]
    assert steps == [{3.0}, {5.0}]


def test_a_closure_is_called() -> None:
    net = model()
    optimizer = adamw(net)
    train(net, optimizer, 2)
    assert optimizer.step(lambda: 7.0) == 7.0


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_schedule_of_the_effective_rate_turns_matrices_as_a_projection_does(adaptive: bool) -> None:
    def learned(project: bool) -> tuple[Tensor, float]:
        weight = nn.Parameter(first_matrix().detach())
        kind: Any = torch.optim.Adam([weight], lr=0.05, eps=0.0) if adaptive else torch.optim.SGD([weight], lr=0.5)
        model = nn.ParameterList([weight])
        fall = warmup_cosine(1, 40, floor=0.2)
        schedule = Schedule(fall, effective=not project, roles={"0": Role.MATRIX})
        if project:
            normalize_and_project(kind, model, roles={"0": Role.MATRIX})
        schedule.init(model, kind)
        start = weight.detach().norm()
        for update in range(1, 31):
            (weight.grad,) = torch.autograd.grad(invariant_loss(weight), weight)
            if adaptive:
                weight.grad *= float(weight.detach().norm() / start)  # moments are of gradients at one length
            kind.step()
            with torch.no_grad():
                schedule.apply(model, kind, Probe(update, generator(0, "x"), None))  # type: ignore[arg-type]
        return (weight / weight.norm()).detach(), float(weight.detach().norm() / start)

    (free, grown), (projected, held) = learned(False), learned(True)
    assert grown > 1.01
    assert held == pytest.approx(1.0, abs=1e-9)
    torch.testing.assert_close(free, projected, rtol=0, atol=1e-9)
