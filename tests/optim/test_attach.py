"""Upkeep that hangs on an optimizer's step."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pliant.core import Answer, Question, Role, UsageError, seeded
from pliant.core.change import Cusum
from pliant.learn import Learner, bptt
from pliant.optim import (
    ContinualBackprop,
    Isometry,
    Probe,
    Rewarm,
    ShrinkPerturb,
    TowardInit,
    Upkeep,
    normalize_and_project,
    warmup_cosine,
)
from pliant.optim.attach import attach


class TwoHeads(nn.Module):
    """An agent: what to do, and how good it is to be here."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), nn.ReLU(), nn.Linear(9, 8), nn.ReLU())
        self.act, self.value = nn.Linear(8, 2), nn.Linear(8, 1)

    def forward(self, x: Tensor, *, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        h = self.body(x)
        return scale * self.act(h), self.value(h)


HEADS = {"act.weight": Role.HEAD}


def made(seed: int = 0) -> TwoHeads:
    with seeded(seed):
        return TwoHeads()


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """A loop that knows nothing of us."""
    for step in steps:
        x = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        act, value = model(x, scale=0.5)
        loss = nn.functional.cross_entropy(act, (x[:, 0] > 0).long()) + value.square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def everything() -> list[Upkeep]:
    return [TowardInit(0.1), ShrinkPerturb(1e-3, 1e-2, every=2), ContinualBackprop(0.02, maturity=3, look=2),
            Isometry(every=7)]  # fmt: skip


class Watch(Upkeep):
    """Writes down what it is shown."""

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def init(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.seen.append(("init",))

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        self.seen.append((probe.update, probe.nats, tuple(probe.question.inputs.shape), torch.is_grad_enabled()))
        return {"seen": probe.update}

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


def test_it_does_what_a_learner_does() -> None:
    """The same upkeep by the optimizer's hook and by our learner: the same parameters, to the bit."""

    class Net(nn.Sequential):
        def init_state(self, batch: int, extra: Any = (), *, device: Any = None) -> tuple[Tensor]:
            return (torch.zeros(batch, 1),)

        def forward(self, x: Tensor, state: Any = None, *, reset: Any = None, mask: Any = None) -> Any:
            return super().forward(x), state

        def nats(self, output: Tensor, targets: Tensor) -> Tensor:
            return nn.functional.cross_entropy(output.movedim(-1, 1), targets, reduction="none")

    def net() -> Net:
        with seeded(1):
            return Net(nn.Linear(3, 10), nn.ReLU(), nn.Linear(10, 7), nn.ReLU(), nn.Linear(7, 2))

    ours, theirs = net(), net()
    optimizers = [torch.optim.Adam(one.parameters(), 1e-2) for one in (ours, theirs)]
    # Nothing that draws: the two generators have names of their own.
    keep = [lambda: TowardInit(0.5), lambda: Isometry(every=5), lambda: ContinualBackprop(0.0, look=2),
            lambda: Rewarm(warmup_cosine(2, 8), detector=Cusum(settle=4, threshold=2.0))]  # fmt: skip
    learner = Learner(ours, optimizers[0], bptt(1), [one() for one in keep], clip_norm=None, seed=3)
    attached = attach(optimizers[1], theirs, [one() for one in keep])
    again = 0
    for step in range(30):
        x = torch.randn(6, 1, 3, generator=torch.Generator().manual_seed(step)) * (1 if step < 15 else 10)
        targets = (x[..., 0] > 0).long() if step < 15 else (x[..., 0] <= 0).long()
        flags, rows = torch.zeros(6, 1, dtype=torch.bool), torch.arange(6)
        learner.predict(Question(x, reset=flags, mask=~flags, time=step, rows=rows))
        learner.learn(Answer(targets, ~flags, ~flags, step, rows))
        output, _ = theirs(x)
        loss = theirs.nats(output, targets).mean()
        optimizers[1].zero_grad()
        loss.backward()
        attached.tell(float(loss.detach()))
        optimizers[1].step()
        again += bool(attached.reports[-1].get("rewarmed"))
    assert again
    for name, p in ours.named_parameters():
        torch.testing.assert_close(p, theirs.get_parameter(name), rtol=1e-5, atol=1e-7)


def test_what_upkeep_sees() -> None:
    model, watch = made(), Watch()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    attached = attach(optimizer, model, [watch], roles=HEADS)
    attached.tell(2.5)
    train(model, optimizer, range(2))
    with torch.no_grad():
        model(torch.zeros(3, 4))  # acting is not learning
    optimizer.step()
    nan = pytest.approx(float("nan"), nan_ok=True)
    assert watch.seen == [("init",), (1, 2.5, (16, 4), False), (2, nan, (16, 4), False), (3, nan, (16, 4), False)]
    assert attached.updates == 3
    assert attached.reports == ({"seen": 3},)


def test_saved_in_the_middle_it_goes_on_to_the_bit() -> None:
    def begin(seed: int) -> tuple[TwoHeads, torch.optim.Optimizer, Any]:
        model = made(seed)
        optimizer = normalize_and_project(torch.optim.Adam(model.parameters(), 1e-2), model, roles=HEADS)
        return model, optimizer, attach(optimizer, model, everything(), roles=HEADS)

    model, optimizer, attached = begin(0)
    train(model, optimizer, range(9))
    saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), attached.state_dict()])
    train(model, optimizer, range(9, 20))
    other, *rest = begin(1)
    for one, state in zip((other, *rest), saved, strict=True):
        one.load_state_dict(state)
    train(other, rest[0], range(9, 20))
    for name, p in model.named_parameters():
        assert torch.equal(p, other.get_parameter(name)), name


def test_roles_that_are_given_stand() -> None:
    """Of two heads one looks like a matrix; told that it is none, it is no isometry afterwards."""
    for roles, kept in ((HEADS, True), (None, False)):
        model = made()
        before = model.act.weight.detach().clone()
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        attach(optimizer, model, [Isometry(every=1)], roles=roles)
        train(model, optimizer, range(1))
        assert torch.equal(before, model.act.weight) == kept
        first = model.body[0].weight.detach()
        torch.testing.assert_close(first.mT @ first, torch.eye(4))


def test_the_model_is_left_as_it_was() -> None:
    model = made()
    names = list(model.state_dict())
    attached = attach(torch.optim.SGD(model.parameters(), 0.1), model, everything(), roles=HEADS)
    assert list(model.state_dict()) == names
    assert [name for name, _ in model.named_modules()] == [name for name, _ in made().named_modules()]
    assert attached.updates == 0


def test_what_does_not_fit_is_said() -> None:
    model = made()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with pytest.raises(UsageError, match="has no parameter actor"):
        attach(optimizer, model, [TowardInit()], roles={"actor": Role.HEAD})
    # A loop that calls parts of a model, as agents do.
    attach(optimizer, model, [ContinualBackprop(look=1)], roles=HEADS)
    model.act(model.body(torch.ones(2, 4))).sum().backward()
    with pytest.raises(UsageError, match="TwoHeads, which nobody has called"):
        optimizer.step()
