"""Check 15 of the dossier: memorizing random classes again and again, on scikit-learn's digits."""

from typing import Any

import pytest
import torch
from torch import nn

from pliant.core import seeded
from pliant.measure.features import dead_units
from pliant.optim import normalize_and_project

TASKS, UPDATES, IMAGES, BATCH = 30, 400, 400, 64


def made(normed: bool, affine: bool) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs in (64, 100):
        layers += [
            nn.Linear(inputs, 100),
            *([nn.LayerNorm(100, elementwise_affine=affine)] if normed else []),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers, nn.Linear(100, 10))


def lived(
    images: torch.Tensor, seed: int, *, normed: bool, affine: bool = False, gains: Any = None
) -> tuple[float, float]:
    """Accuracy at the end of a task, mean of the last five, and the share of hidden units that are dead then."""
    with seeded(seed):
        model = made(normed, affine)
    optimizer: Any = torch.optim.Adam(model.parameters(), lr=1e-3)
    if gains is not None:
        normalize_and_project(optimizer, model, gains=gains)
    draw = torch.Generator().manual_seed(seed)
    reached = []
    for _ in range(TASKS):
        classes = torch.randint(10, (IMAGES,), generator=draw)
        for _ in range(UPDATES):
            chosen = torch.randint(IMAGES, (BATCH,), generator=draw)
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), classes[chosen]).backward()
            optimizer.step()
        with torch.no_grad():
            reached.append(float((model(images).argmax(1) == classes).float().mean()))
    with torch.no_grad():
        hidden, dead = images, []
        for layer in model:
            hidden = layer(hidden)
            dead += [dead_units(hidden)] if isinstance(layer, nn.ReLU) else []
    return sum(reached[-5:]) / 5, sum(dead) / 2


@pytest.mark.slow
def test_check_15_a_projected_net_keeps_memorizing_and_a_plain_one_dies() -> None:
    from sklearn.datasets import load_digits

    images = torch.from_numpy(load_digits().data[:IMAGES]).float() / 16
    found = {
        name: [lived(images, seed, **how) for seed in (0, 1)]
        for name, how in {
            "plain": {"normed": False},
            "norm": {"normed": True},
            "project": {"normed": True, "gains": "free"},
            "affine": {"normed": True, "affine": True, "gains": "free"},
            "joint": {"normed": True, "affine": True, "gains": "joint"},
        }.items()
    }
    accuracy = {name: sum(run[0] for run in runs) / 2 for name, runs in found.items()}
    dead = {name: sum(run[1] for run in runs) / 2 for name, runs in found.items()}
    assert accuracy["project"] >= accuracy["norm"] + 0.03
    assert accuracy["norm"] > accuracy["plain"] + 0.2
    assert dead["project"] < 0.02
    assert dead["plain"] > 0.3
    # Gains and biases can undo what the projection does for the matrices, unless their joint length is held as well.
    assert accuracy["joint"] >= accuracy["affine"] + 0.03
    assert dead["joint"] < dead["affine"]
