"""What a parameter is for.

Every model and mixer of ours names a role for each of its parameters. Optimizers, upkeep and
measures read roles instead of guessing from shapes. A role is kept by parameter *name*, because
attributes on Parameters do not survive sharding.
"""

import re
from collections.abc import Iterator, Mapping
from enum import Enum

from torch import nn

from pliant.core.errors import UsageError


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


NORMS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
"""Modules whose output does not depend on the scale of their input."""


def roles_of(module: nn.Module, given: Mapping[str, Role] | None = None) -> dict[str, Role]:
    """What each parameter of `module` is for: as it declares itself, else by the types of its parts.

    A part with `roles()` is asked. Linear and convolution weights are matrices (CONV where each channel has its own),
    those of the last such module the HEAD; recurrent cells of torch are gates, since most of what they stack is.

    Args:
        module: any module.
        given: roles by parameter name, which stand above everything else.

    Raises:
        UsageError: `given` names what is not there; or there are parameters whose role nothing tells: they are named.
    """
    given = dict(given or {})
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    if unknown := given.keys() - shapes.keys():
        raise UsageError(f"roles: {type(module).__name__} has no parameter {', '.join(sorted(unknown))}")
    found = _declared(module) | given
    if silent := [f"{name} {shapes[name]}" for name in shapes if name not in found]:
        raise UsageError(
            f"roles: what are these of {type(module).__name__} for: {', '.join(silent)}? "
            "Name them, as in roles={'" + silent[0].split(" ")[0] + "': Role.MATRIX}"
        )
    return {name: found[name] for name in shapes}


def declares(module: nn.Module) -> bool:
    """Whether a module says itself what its parameters are for, by `roles()`."""
    return callable(getattr(module, "roles", None))


def _declared(module: nn.Module) -> dict[str, Role]:
    found = _of_parts(module)
    if (last := head_of(module)) is not None and not declares(module):
        found |= {name: Role.HEAD for name in [f"{last}.weight".removeprefix(".")] if name in found}
    return found


def _of_parts(module: nn.Module) -> dict[str, Role]:
    return {f"{path}{name}": role for path, part in _parts(module, "") for name, role in _of_part(part).items()}


def head_of(module: nn.Module) -> str | None:
    """Name of the last linear map or convolution within `module`, attention and transformer layers of torch aside.

    None where there is none, or where a part after it declares a head of its own.
    """
    last = None
    inside = tuple(f"{name}.".removeprefix(".") for name, part in module.named_modules() if isinstance(part, _LAYERS))
    for path, part in _parts(module, ""):
        if declares(part) and Role.HEAD in _of_part(part).values():
            last = None
        elif isinstance(part, _MATRICES) and not path.startswith(inside):
            last = path.removesuffix(".")
    return last


def _parts(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Modules that hold parameters or declare them, by the start of their parameters' names, in order."""
    if not declares(module):
        for name, child in module.named_children():
            yield from _parts(child, f"{path}{name}.")
    yield path, module


_MATRICES = (nn.Linear, nn.Bilinear, nn.modules.conv._ConvNd)
_GATES = (nn.RNNBase, nn.RNNCellBase)
_LAYERS = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


_KNOWN = {
    Role.MATRIX: r"(in_proj_|[qkv]_proj_)?weight|(in_proj_)?bias|bias_[kv]",
    Role.CONV: "weight|bias",
    Role.GATE: r"(weight|bias)_[ih][hr](_l\d+(_reverse)?)?",
    Role.EMBEDDING: "weight",
    Role.GAIN: "weight|bias",
}
"""Names of parameters of the modules with such a weight."""


def _of_part(part: nn.Module) -> dict[str, Role]:
    """Roles of the parameters that a module holds itself, or all if it declares them."""
    if callable(declare := getattr(part, "roles", None)):
        return dict(declare())
    own = [name for name, _ in part.named_parameters(recurse=False)]
    weight: Role | None = None
    if isinstance(part, _MATRICES):
        depthwise = isinstance(part, nn.modules.conv._ConvNd) and part.groups == part.in_channels > 1
        weight = Role.CONV if depthwise else Role.MATRIX
    elif isinstance(part, nn.MultiheadAttention):
        weight = Role.MATRIX
    elif isinstance(part, _GATES):
        weight = Role.GATE
    elif isinstance(part, (nn.Embedding, nn.EmbeddingBag)):
        weight = Role.EMBEDDING
    elif isinstance(part, (*NORMS, nn.PReLU)):
        weight = Role.GAIN
    if weight is None:
        return {}
    # What a module has beside what its type is known to have, such as the length of a reparametrized weight, is not
    # guessed.
    named = {name: Role.BIAS if "bias" in name else weight for name in own if re.fullmatch(_KNOWN[weight], name)}
    return named


def doubts_of(module: nn.Module, roles: Mapping[str, Role]) -> dict[str, str]:
    """Parameters whose role is one of several that could be meant, by name, and why; see `roles_of`.

    Args:
        module: any module; what a part declares by `roles()` is not doubted.
        roles: of its parameters, by name.
    """
    if declares(module):
        return {}
    found = {}
    names: dict[int, list[str]] = {}
    for name, p in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    single = _declared(module)
    for first, *others in names.values():
        if also := [f"{other} ({single[other].name.lower()})" for other in others if other in single]:
            found[first] = f"also {', '.join(also)}"
    if not isinstance(module, nn.Sequential) and (last := head_of(module)) and roles.get(f"{last}.weight") is Role.HEAD:
        found.setdefault(f"{last}.weight", "the last map to be registered, and so perhaps not the last")
    for path, part in _parts(module, ""):
        if isinstance(part, nn.MultiheadAttention) and part.in_proj_weight is not None:
            found.setdefault(f"{path}in_proj_weight", "queries, keys and values in one")
        if isinstance(part, (nn.LSTM, nn.GRU, nn.LSTMCell, nn.GRUCell)):
            stacked = [name for name in _of_part(part) if name.startswith("weight") and "hr" not in name]
            found |= {f"{path}{name}": "gates and what they let through in one" for name in stacked}
    return {name: why for name, why in found.items() if name in roles}


def table_of(module: nn.Module, roles: Mapping[str, Role]) -> str:
    """Names, shapes, roles and what is doubtful about them, a line each, to be read before they are relied on."""
    doubts = doubts_of(module, roles)
    rows = [(name, str(tuple(p.shape)), roles[name].name.lower(), doubts.get(name, ""))
            for name, p in module.named_parameters()]  # fmt: skip
    a, b, c = (max((len(row[i]) for row in rows), default=0) for i in range(3))
    return "\n".join(f"{row[0]:<{a}}  {row[1]:<{b}}  {row[2]:<{c}}  {row[3]}".rstrip() for row in rows)
