"""What is done to a model after an update."""

import copy
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.core import Question, UsageError, generator, seeded
from pliant.core.change import Cusum
from pliant.core.units import activations, units_of
from pliant.learn import Learner, prequential
from pliant.measure.scores import Accuracy, Scores
from pliant.models import SequenceClassifier
from pliant.optim import (
    ContinualBackprop,
    Isometry,
    Probe,
    Rewarm,
    ShrinkPerturb,
    TowardInit,
    Upkeep,
    adamw,
    warmup_cosine,
)
from pliant.optim.upkeep import nearest_isometry
from pliant.streams import digits

INPUTS = torch.linspace(-1, 1, 60).sin().reshape(10, 1, 6)


class Recurrentless(nn.Sequential):
    """A net that is called as ours are."""

    def forward(self, x: Tensor, state: Any = None, *, reset: Any = None, mask: Any = None) -> Any:
        return super().forward(x), state


def net() -> Recurrentless:
    with seeded(0):
        return Recurrentless(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 2))


def probe(update: int, nats: float = 1.0, seed: int = 0) -> Probe:
    rows = torch.arange(len(INPUTS))
    flags = torch.zeros(len(INPUTS), 1, dtype=torch.bool)
    question = Question(inputs=INPUTS, reset=flags, mask=~flags, time=update, rows=rows)
    return Probe(update, generator(seed, f"probe {update}"), question, nats)


def upkept(upkeep: Upkeep, model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    upkeep.init(model, optimizer)
    return optimizer


@pytest.mark.parametrize("upkeep", [TowardInit(1.0), ShrinkPerturb(0.1, 0.1), Isometry(every=1)])
def test_what_is_frozen_stays(upkeep: Upkeep) -> None:
    model = net()
    model[0].requires_grad_(False)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.1)
    upkeep.init(model, optimizer)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1)
        before = copy.deepcopy(model)
        upkeep.apply(model, optimizer, probe(1))
    assert torch.equal(model[0].weight, before[0].weight) and torch.equal(model[0].bias, before[0].bias)
    assert not torch.equal(model[2].weight, before[2].weight)


# Re-warming


def test_a_rewarmed_rate_may_be_an_effective_one() -> None:
    model = net()
    optimizer = torch.optim.Adam([{"params": [p]} for p in model.parameters()], lr=0.1)
    rewarm = Rewarm(warmup_cosine(2, 10, floor=0.1), cycle=10, effective=True)
    rewarm.init(model, optimizer)
    grown = optimizer.param_groups[0]
    assert grown["params"][0] is model[0].weight
    with torch.no_grad():
        model[0].weight.mul_(3)
    for update in range(1, 12):
        rewarm.apply(model, optimizer, probe(update))
        factor = warmup_cosine(2, 10, floor=0.1)(update % 10)
        assert [group["lr"] for group in optimizer.param_groups[:2]] == pytest.approx([0.3 * factor, 0.1 * factor])
    assert rewarm.times == 1


def test_a_cycle_repeats_the_schedule() -> None:
    model = net()
    factor = warmup_cosine(2, 10, floor=0.1)
    upkeep = Rewarm(factor, cycle=10, peak=2.0)
    optimizer = upkept(upkeep, model)
    seen = [optimizer.param_groups[0]["lr"]]
    for update in range(1, 25):
        upkeep.apply(model, optimizer, probe(update))
        seen.append(optimizer.param_groups[0]["lr"])
    assert seen[:10] == pytest.approx([0.1 * factor(t) for t in range(10)])
    assert seen[10:20] == pytest.approx([0.2 * factor(t) for t in range(10)])
    assert seen[20:25] == pytest.approx([0.2 * factor(t) for t in range(5)])


def test_a_detector_begins_the_schedule_anew_and_rests() -> None:
    model = net()
    upkeep = Rewarm(warmup_cosine(1, 50), detector=Cusum(threshold=5.0, settle=10), rest=5)
    optimizer = upkept(upkeep, model)
    noise = torch.randn(200, generator=torch.Generator().manual_seed(0)).tolist()
    reports = [upkeep.apply(model, optimizer, probe(t + 1, 0.1 * x + (5.0 if t >= 100 else 0.0)))
               for t, x in enumerate(noise)]  # fmt: skip
    when = [t for t, report in enumerate(reports) if report.get("rewarmed")]
    assert when[0] in range(100, 105)
    assert all(b - a > 5 for a, b in pairwise(when))
    assert reports[99]["lr"] < 1e-6
    assert max(report["lr"] for report in reports[101:110]) == pytest.approx(0.1)


# Toward the start


def test_toward_init_moves_by_its_share() -> None:
    model = net()
    upkeep = TowardInit(0.5)
    optimizer = upkept(upkeep, model)
    first = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p += 1
        upkeep.apply(model, optimizer, probe(1))
    for p, start in zip(model.parameters(), first, strict=True):
        torch.testing.assert_close(p.detach(), start + 0.95)


def test_shrinking_and_perturbing_has_the_deviation_of_the_start() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Linear(300, 200), nn.LayerNorm(200), nn.Linear(200, 100))
    upkeep = ShrinkPerturb(shrink=0.5, noise=0.3)
    optimizer = upkept(upkeep, model)
    first = {name: p.detach().clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        upkeep.apply(model, optimizer, probe(1))
    for name, p in model.named_parameters():
        moved = (p.detach() - 0.5 * first[name]).std() / first[name].square().mean().sqrt()
        if p.ndim == 2:
            assert float(moved) == pytest.approx(0.3, rel=0.02)
        else:
            assert torch.equal(p.detach(), first[name]), name


def test_noise_comes_from_the_generator_of_the_life() -> None:
    found = []
    for seed in (0, 0, 1):
        model = net()
        upkeep = ShrinkPerturb()
        optimizer = upkept(upkeep, model)
        with torch.no_grad():
            upkeep.apply(model, optimizer, probe(1, seed=seed))
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])


# Isometries


@pytest.mark.parametrize("shape", [(5, 5), (7, 3), (3, 7), (2, 4, 4), (6, 2, 3, 3)])
def test_the_nearest_isometry(shape: tuple[int, ...]) -> None:
    with seeded(3):
        weight, other = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    kernel = len(shape) > 3

    def nearest(x: Tensor) -> Tensor:
        return nearest_isometry(x, rows=kernel)

    def rows(x: Tensor) -> Tensor:
        return x.flatten(1) if kernel else x

    found = nearest(weight)

    small = rows(found) if rows(found).shape[-2] <= rows(found).shape[-1] else rows(found).mT
    eye = torch.eye(small.shape[-2], dtype=torch.float64).expand(*small.shape[:-1], small.shape[-2])
    torch.testing.assert_close(small @ small.mT, eye, rtol=0, atol=1e-12)
    torch.testing.assert_close(nearest(found), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(nearest(3 * weight), found, rtol=0, atol=1e-12)
    # No other isometry is nearer.
    assert (weight - found).norm() < (weight - nearest(other)).norm()
    assert (weight - found).norm() < (weight - nearest(weight + 0.1 * other)).norm()


def test_a_convolution_over_time_is_one_isometry() -> None:
    with seeded(0):
        model = nn.Sequential(nn.Conv1d(3, 5, 4), nn.ReLU(), nn.Flatten(), nn.Linear(5, 2))
    upkeep = Isometry(every=1)
    optimizer = upkept(upkeep, model)
    with torch.no_grad():
        upkeep.apply(model, optimizer, probe(1))
    assert torch.linalg.svdvals(model[0].weight.detach().flatten(1)).tolist() == pytest.approx([1.0] * 5, rel=1e-5)


def test_the_pull_to_the_start_follows_the_rate_of_each_group() -> None:
    model = net()
    groups = [{"params": model[0].parameters(), "lr": 0.0}, {"params": model[2].parameters(), "lr": 0.5}]
    optimizer, upkeep = torch.optim.Adam(groups), TowardInit(1.0)
    rest = model[4].weight
    upkeep.init(model, optimizer)
    first = copy.deepcopy(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1.0)
        upkeep.apply(model, optimizer, probe(1))
    for part, moved in ((0, 1.0), (2, 0.5)):
        torch.testing.assert_close(model[part].weight, first[part].weight + moved)
    torch.testing.assert_close(rest, first[4].weight + 1.0)


def test_looks_of_continual_backprop_leave_statistics_and_random_numbers_alone() -> None:
    with seeded(0):
        model = Recurrentless(nn.Linear(6, 12), nn.BatchNorm1d(1), nn.Dropout(), nn.ReLU(), nn.Linear(12, 2))
    upkeep = ContinualBackprop(look=1)
    optimizer = upkept(upkeep, model)
    before, random = copy.deepcopy(model[1].state_dict()), torch.get_rng_state()
    with torch.no_grad():
        upkeep.apply(model, optimizer, probe(1))
    assert all(torch.equal(x, before[name]) for name, x in model[1].state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and model.training


def test_continual_backprop_counts_only_steps_that_exist() -> None:
    model, upkeep = net(), ContinualBackprop(look=1)
    optimizer = upkept(upkeep, model)
    asked = probe(1)
    shown = torch.zeros(len(INPUTS), 1, dtype=torch.bool)
    shown[:3] = True
    with torch.no_grad():
        upkeep.apply(model, optimizer, asked._replace(question=asked.question._replace(mask=shown)))
        wanted = torch.relu(model[0](INPUTS[:3, 0])).mean(0)
    torch.testing.assert_close(upkeep.layers[0]["mean"] / (1 - upkeep.decay), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_continual_backprop_in_other_float_types(dtype: torch.dtype) -> None:
    model, upkeep = net().to(dtype), ContinualBackprop(rate=0.05, maturity=2, look=1)
    optimizer = upkept(upkeep, model)
    with torch.no_grad():
        for update in range(1, 9):
            asked = probe(update)
            question = asked.question._replace(inputs=asked.question.inputs.to(dtype))
            upkeep.apply(model, optimizer, asked._replace(question=question))
    assert upkeep.replaced > 0
    assert upkeep.layers[0]["mean"].dtype == torch.promote_types(dtype, torch.float32)


def test_isometry_at_a_change_and_of_matrices_only() -> None:
    model = net()
    upkeep = Isometry(every=3)
    optimizer = upkept(upkeep, model)
    first = copy.deepcopy(model)
    for update in (1, 2, 3):
        with torch.no_grad():
            report = upkeep.apply(model, optimizer, probe(update))
        assert bool(report) == (update == 3)
    for (name, p), q in zip(model.named_parameters(), first.parameters(), strict=True):
        assert torch.equal(p, q) == (name not in ("0.weight", "2.weight")), name


# Continual backprop


def test_units_of_a_sequence_of_layers_and_of_our_models() -> None:
    model = net()
    assert [(one.reader, one.writers) for one in units_of(model)] == [
        (model[2], ((model[0], 0),)),
        (model[4], ((model[2], 0),)),
    ]
    with seeded(0):
        classifier = SequenceClassifier(3, 2, width=8, depth=2)
    units = units_of(classifier)
    assert len(units) == 2 and all(one.number == 16 and len(one.writers) == 2 for one in units)
    with activations(units) as seen:
        classifier(torch.ones(2, 4, 3))
    assert [h.shape for h in seen if h is not None] == [(8, 16), (8, 16)]
    assert not any(module._forward_pre_hooks for module in classifier.modules())


def test_a_unit_that_is_replaced_changes_the_output_by_what_it_varied_only() -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[4] = 0
        model[0].bias[4] = 2.0  # always on: all that it does is to shift
    upkeep = ContinualBackprop(rate=0.02, maturity=5, look=1, decay=0.5)
    optimizer = upkept(upkeep, model)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.1
        model[0].weight[4] = 0
        before = model(INPUTS)[0].clone()
        update = 0
        while not upkeep.replaced:
            update += 1
            report = upkeep.apply(model, optimizer, probe(update))
        assert report == {"replaced": upkeep.replaced}
        after = model(INPUTS)[0]
    assert update > 5  # none is mature before
    assert float(upkeep.layers[0]["age"][4]) == 0 and float(upkeep.layers[0]["age"].min()) == 0
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    assert not model[2].weight[:, 4].any()
    assert model[0].weight[4].any() and model[0].bias[4] == 0
    state = optimizer.state[model[0].weight]["exp_avg"]
    assert not state[4].any() and bool(state[3].all())
    assert not optimizer.state[model[2].weight]["exp_avg_sq"][:, 4].any()
    assert bool(optimizer.state[model[2].weight]["exp_avg_sq"][:, 3].all())


def test_as_many_units_are_replaced_as_the_rate_says() -> None:
    model = net()
    upkeep = ContinualBackprop(rate=0.01, maturity=10, look=5)
    optimizer = upkept(upkeep, model)
    with torch.no_grad():
        for update in range(1, 501):
            upkeep.apply(model, optimizer, probe(update))
    assert upkeep.replaced == pytest.approx(0.01 * 490 * 21, rel=0.15)


# All of them


@pytest.mark.parametrize("make", [
    lambda: Rewarm(warmup_cosine(2, 20), cycle=15, detector=Cusum(settle=5)),
    lambda: TowardInit(0.1),
    lambda: ShrinkPerturb(every=3),
    lambda: Isometry(every=10),
    lambda: ContinualBackprop(rate=0.01, maturity=3, look=2),
])  # fmt: skip
def test_a_learner_that_is_saved_in_the_middle_goes_on_to_the_same_bits(make: Any) -> None:
    def learner() -> Learner:
        with seeded(0):
            model = SequenceClassifier(8, 10, width=8, depth=1)
        return Learner(model, adamw(model, 1e-2), keep=[make()])

    whole, stream = learner(), digits(by="row", batch=4, questions=40, seed=0)
    half: dict[str, Any] = {}
    for step, _ in enumerate(prequential(stream, whole, Scores(accuracy=Accuracy()))):
        if step == 17:
            half = copy.deepcopy({"learner": whole.state_dict(), "model": whole.model.state_dict(),
                                  "stream": stream.state_dict()})  # fmt: skip
    later, stream = learner(), digits(by="row", batch=4, questions=40, seed=0)
    later.model.load_state_dict(half["model"])
    later.load_state_dict(half["learner"])
    stream.load_state_dict(half["stream"])
    for _ in prequential(stream, later, Scores(accuracy=Accuracy())):
        pass
    assert later.updates == whole.updates > 17
    for p, q in zip(whole.model.parameters(), later.model.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("wrong", [
    lambda: Rewarm(warmup_cosine(1, 2)), lambda: Rewarm(warmup_cosine(1, 2), cycle=0), lambda: TowardInit(-1.0),
    lambda: ShrinkPerturb(shrink=2.0), lambda: Isometry(), lambda: Isometry(every=0),
    lambda: ContinualBackprop(rate=2.0),
])  # fmt: skip
def test_what_does_not_fit_is_one_sentence(wrong: Any) -> None:
    with pytest.raises(UsageError):
        wrong()


def test_a_model_without_known_units_is_refused() -> None:
    with seeded(0):
        model = nn.Linear(3, 2)
    with pytest.raises(UsageError, match="no hidden units"):
        ContinualBackprop().init(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_losses_reach_the_upkeep() -> None:
    seen: list[float] = []

    class Listens(TowardInit):
        def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
            seen.append(probe.nats)
            return {}

    with seeded(0):
        model = SequenceClassifier(8, 10, width=8, depth=1)
    learner = Learner(model, adamw(model, 1e-2), keep=[Listens()])
    for _ in prequential(digits(by="row", batch=4, questions=5, seed=0), learner, Scores(accuracy=Accuracy())):
        pass
    assert len(seen) == learner.updates > 0 and all(map(math.isfinite, seen))
