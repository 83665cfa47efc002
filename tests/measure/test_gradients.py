"""What gradients on a probe tell, against the Hessian and gradients written out."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, hessian

from pliant.core import generator, seeded
from pliant.measure.gradients import (
    example_gradients,
    gradient_covariance,
    losses_of,
    parameters_of,
    sharpness,
)
from pliant.measure.health import health
from pliant.models import SequenceClassifier
from pliant.optim import adamw

X = torch.randn(12, 3, generator=generator(0, "x"), dtype=torch.float64)
Y = torch.randint(4, (12,), generator=generator(0, "y"))


def cross_entropy(output: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(output, targets, reduction="none")


def net() -> nn.Sequential:
    with seeded(0):
        return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


def classifier() -> tuple[SequenceClassifier, Tensor, Tensor, Tensor]:
    with seeded(0):
        model = SequenceClassifier(3, 4, width=8, depth=2)
    x, y = torch.randn(4, 6, 3, generator=generator(1, "x")), torch.randint(4, (4, 6), generator=generator(1, "y"))
    return model, x, y, torch.rand(4, 6, generator=generator(1, "mask")) > 0.3


def test_sharpness_is_the_largest_eigenvalue_of_the_hessian() -> None:
    model = net()
    names = [name for name, _ in model.named_parameters()]
    sizes = [p.numel() for p in model.parameters()]

    def mean_loss(flat: Tensor) -> Tensor:
        parts = zip(flat.split(sizes), model.parameters(), strict=True)
        moved = {name: part.view(p.shape) for name, (part, p) in zip(names, parts, strict=True)}
        return cross_entropy(functional_call(model, moved, (X,)), Y).mean()

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    values = torch.linalg.eigvalsh(hessian(mean_loss)(flat))
    largest = values[values.abs().argmax()]
    losses, parameters = losses_of(model, X, Y, loss=cross_entropy), parameters_of(model)
    assert sharpness(losses, parameters, iterations=200) == pytest.approx(float(largest), rel=1e-9)
    few = sharpness(losses_of(model, X, Y, loss=cross_entropy), parameters_of(model))
    assert 0.5 * abs(largest) < abs(few) <= abs(largest) * (1 + 1e-6)


def test_sharpness_of_a_quadratic_is_exact_with_one_number() -> None:
    with seeded(0):
        model = nn.Linear(1, 1, bias=False).double()
    x, y = X[:, :1], X[:, 1:2]
    losses = losses_of(model, x, y, loss=lambda said, truth: (said - truth).square())
    assert sharpness(losses, parameters_of(model), 1) == pytest.approx(float(2 * x.square().mean()), rel=1e-9)


def test_gradients_of_examples_are_those_of_their_losses() -> None:
    model = net()
    losses, parameters = losses_of(model, X, Y, loss=cross_entropy), parameters_of(model)
    found = example_gradients(losses, parameters, most=12)
    for i in (0, 7, 11):
        wanted = torch.autograd.grad(cross_entropy(model(X[i : i + 1]), Y[i : i + 1]).sum(), list(model.parameters()))
        torch.testing.assert_close(found[i], torch.cat([g.flatten() for g in wanted]))
    assert example_gradients(losses, parameters, most=3).shape == (3, found.shape[1])


def test_gradient_covariance_by_hand() -> None:
    g = torch.tensor([[2.0, 0.0, 0.0], [0.0, 5.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    found = gradient_covariance(g)
    # cosines 0, 1/sqrt 2, 1/sqrt 2 between the three that have a direction; they span two
    assert found["gradient cosine"] == pytest.approx(2 / 3 / 2**0.5)
    assert found["gradient rank"] == pytest.approx(2 / 3)
    assert found["gradient norm"] == pytest.approx(float(g.mean(0).norm()))
    same = gradient_covariance(torch.ones(6, 4) * torch.arange(1, 7)[:, None])
    assert same["gradient cosine"] == pytest.approx(1) and same["gradient rank"] == pytest.approx(1 / 6)
    assert gradient_covariance(torch.eye(5))["gradient rank"] == 1
    alone = gradient_covariance(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    assert alone["gradient cosine"] != alone["gradient cosine"] and alone["gradient norm"] == 0.5


def test_a_model_of_ours_with_steps_that_do_not_exist() -> None:
    model, x, y, mask = classifier()
    losses, parameters = losses_of(model, x, y, mask=mask), parameters_of(model)
    output, _ = model(x, None, mask=mask)
    torch.testing.assert_close(losses(parameters), model.nats(output, y)[mask])
    assert len(losses(parameters)) == int(mask.sum())


def test_differences_stand_in_where_there_is_no_second_derivative() -> None:
    model, x, y, mask = classifier()
    with seeded(1):  # a fresh one has a norm of zeros, which is a cusp
        for p in model.parameters():
            p.data.add_(0.3 * torch.randn_like(p))
    exact = copy.deepcopy(model).double()
    single, double = (
        sharpness(losses_of(one, x.to(p.dtype), y, mask=mask), parameters_of(one), 20)
        for one in (model, exact)
        for p in [next(one.parameters())]
    )
    assert single == pytest.approx(double, rel=0.05)

    class Twice(nn.Module):
        """A loss whose gradient cannot be differentiated again."""

        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return Once.apply(x @ self.w)

    losses = losses_of(Twice(), X[:, :2], X[:, 2], loss=lambda said, truth: (said - truth).square())
    hessian_ = 2 * X[:, :2].mT @ X[:, :2] / len(X)
    largest = float(torch.linalg.eigvalsh(hessian_)[-1])
    assert sharpness(losses, parameters_of(Twice()), 100) == pytest.approx(largest, rel=1e-6)


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_parameters_of_the_loss_get_no_gradient() -> None:
    with seeded(0):
        model, scale = nn.Linear(3, 1).double(), nn.Parameter(torch.tensor(2.0, dtype=torch.float64))
    losses = losses_of(model, X, Y.double(), loss=lambda said, true: scale * (said[:, 0] - true) ** 2)
    assert sharpness(losses, parameters_of(model)) > 0
    assert scale.grad is None and model.weight.grad is None


def test_health_with_targets_leaves_nothing_behind() -> None:
    model, x, y, mask = classifier()
    optimizer = adamw(model, lr=1e-3)
    output, _ = model(x, None, mask=mask)  # a graph that somebody still needs
    before, random = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    first = health(model, x, mask=mask, targets=y, optimizer=optimizer)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random) and all(p.grad is None for p in model.parameters())
    assert {"loss", "sharpness", "gradient rank", "gradient cosine", "gradient norm"} == first.whole.keys()
    model.nats(output, y)[mask].mean().backward()
    optimizer.step()
    later = health(model, x, mask=mask, targets=y, optimizer=optimizer, since=first)
    now, _ = model(x, None, mask=mask)
    assert later.whole["churn"] == pytest.approx(float((now - output).detach()[mask].abs().mean()), rel=1e-5)
    assert "churn" in str(later)
