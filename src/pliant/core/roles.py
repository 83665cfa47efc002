"""What a parameter is for.

Every model and mixer of ours names a role for each of its parameters. Optimizers, upkeep and
measures read roles instead of guessing from shapes. A role is kept by parameter *name*, because
attributes on Parameters do not survive sharding.
"""

from collections.abc import Mapping
from enum import Enum

from torch import nn


class Role(Enum):
    """The value says what the parameter does to its input."""

    MATRIX = "mixes features; its scale is free where a norm follows"
    GATE = "mixes features into a gate that a sigmoid squashes; its scale sets how sharp the gate is"
    CONV = "mixes neighboring steps of one channel"
    DECAY = "how fast a recurrence forgets"
    EMBEDDING = "maps raw inputs to features"
    HEAD = "maps features to outputs; its scale is the scale of the outputs"
    GAIN = "scales each feature"
    BIAS = "shifts each feature"


MIXING = frozenset({Role.MATRIX, Role.GATE, Role.CONV, Role.EMBEDDING, Role.HEAD})
"""Roles of weights that multiply an input; weight decay pulls on these and on nothing else."""


def prefix(name: str, roles: Mapping[str, Role]) -> dict[str, Role]:
    """The roles of a submodule under its parent's names."""
    return {f"{name}.{key}": role for key, role in roles.items()}


def check_roles(module: nn.Module, roles: Mapping[str, Role]) -> None:
    """Raise `ValueError` unless `roles` names exactly the parameters of `module`."""
    names = {name for name, _ in module.named_parameters()}
    if wrong := names ^ roles.keys():
        raise ValueError(
            f"{type(module).__name__}.roles() must name every parameter once; differing: {', '.join(sorted(wrong))}"
        )
