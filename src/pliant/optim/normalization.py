"""Norms before nonlinearities: the first half of normalize-and-project.

A matrix whose output goes straight into a norm has no scale, f(cW) = f(W). Once `normalize_and_project` holds it to its
first length, the rate that is written is the rate that is felt. A bias between the two would let the scale through,
f(cW, b) ≠ f(W, b), and the bias of the norm does its work, so it is taken away. A unit that is dead behind a norm still
gets a gradient, from the statistics that it shares with others.

Papers: Lyle et al. 2024, arXiv:2407.01800; Lyle et al. 2025, arXiv:2507.20057, section 2.

What is seen is the order of parts in every `nn.Sequential`. Between the last map and the end of the chain that has the
head stands no norm: a loss depends on the scale of the outputs.
"""

import copy
import logging
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pliant.core import UsageError, generator, seeded
from pliant.core.roles import NORMS, declares, head_of

logger = logging.getLogger("pliant.optim")

_CONVS = nn.modules.conv._ConvNd
_MAPS = (nn.Linear, _CONVS, nn.Embedding)
_NONLINEAR = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.GLU,
    nn.Tanh, nn.Sigmoid, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Softmax, nn.LogSoftmax, nn.Softmin, nn.Softmax2d,
    nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.Tanhshrink, nn.Threshold,
)  # fmt: skip
_PASSING = (
    nn.Identity, nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle, nn.Upsample,
    nn.modules.dropout._DropoutNd, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d,
    nn.modules.padding._ReflectionPadNd, nn.modules.padding._ReplicationPadNd, nn.modules.padding._CircularPadNd,
    nn.modules.pooling._AvgPoolNd, nn.modules.pooling._MaxPoolNd, nn.modules.pooling._AdaptiveAvgPoolNd,
    nn.modules.pooling._AdaptiveMaxPoolNd, nn.modules.pooling._LPPoolNd,
)  # fmt: skip
"""Modules that let a factor of their input through."""
_CENTERED = (nn.modules.batchnorm._NormBase,)
"""Norms that take the mean of each feature away, and a bias before them with it."""
_INSIDE = (
    nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.Bilinear, nn.Transformer, nn.TransformerEncoder,
    nn.TransformerDecoder, nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.AdaptiveLogSoftmaxWithLoss,
)  # fmt: skip
"""Modules of torch that apply their nonlinearities in a function of their own, where nothing can be put before them."""


class AlongChannels(nn.Module):
    """A norm over the channels of each place: input `(..., C, *places)`, `places` axes at the end.

    Args:
        norm: of the last axis.
        places: 1, 2 or 3 axes, as of `nn.Conv1d` to `nn.Conv3d`.
    """

    def __init__(self, norm: nn.Module, places: int):
        super().__init__()
        self.norm, self.axis = norm, -1 - places

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.norm(x.movedim(self.axis, -1)).movedim(-1, self.axis)
        return y


@dataclass
class Norms:
    """Which nonlinearities of a model have a norm, by the names of its modules.

    Attributes:
        missing: maps that go into a nonlinearity without a norm, and the part before which one belongs.
        present: maps that a norm follows.
        outputs: nonlinearities after the head, which are to have none.
        redundant: biases of maps that a norm follows or is to follow; they would let the scale of the map through.
        idle: biases that the norm after them takes away itself, with the mean of each feature.
        ours: modules that declare what their parameters are for; their norms stand where their papers have them.
        unseen: modules whose nonlinearities only their own `forward` knows, and why.
        noticed: modules with a `forward` of their own around parts that are seen.
    """

    missing: dict[str, str] = field(default_factory=dict)
    present: list[str] = field(default_factory=list)
    outputs: list[str] = field(default_factory=list)
    redundant: list[str] = field(default_factory=list)
    idle: list[str] = field(default_factory=list)
    ours: list[str] = field(default_factory=list)
    unseen: dict[str, str] = field(default_factory=dict)
    noticed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        rows = [(name, f"no norm before {where}") for name, where in self.missing.items()]
        rows += [(name, "a norm follows") for name in self.present]
        rows += [(name, "after the head") for name in self.outputs]
        rows += [(name, "redundant before a norm") for name in self.redundant]
        rows += [(name, "does nothing before its norm") for name in self.idle]
        rows += [(name or "the model", "as its paper has it") for name in self.ours]
        rows += [(name or "the model", why) for name, why in self.unseen.items()]
        rows += [(name or "the model", "forward of its own, not seen") for name in self.noticed]
        width = max((len(name) for name, _ in rows), default=0)
        return "\n".join(f"{name:<{width}}  {what}" for name, what in rows)


def norms_of(model: nn.Module, *, leave: Collection[str] = ()) -> Norms:
    """Where norms stand before the nonlinearities of `model`, and where they are missing; nothing is changed.

    Args:
        model: any module.
        leave: names of modules of `model` that are not looked into.

    Raises:
        UsageError: `leave` names what is not there.
    """
    names = {name for name, _ in model.named_modules(remove_duplicate=False)}
    if unknown := set(leave) - names:
        raise UsageError(f"normalized: {type(model).__name__} has no module {', '.join(sorted(unknown))}")
    found, head = Norms(), head_of(model)
    for chain in _chains(model, "", found, leave):
        _look(chain, head, found)
    found.unseen.pop(head or "", None)  # what follows it is the output
    return found


def normalized(
    model: nn.Module,
    norm: Literal["layer", "rms"] = "layer",
    *,
    eps: float = 1e-5,
    keep_biases: bool = False,
    leave: Collection[str] = (),
) -> nn.Module:
    """Put a norm behind each map whose output goes into a nonlinearity without one; returns `model`, which is changed.

    The part that follows the map, `next`, becomes `nn.Sequential(norm, next)`, so that all other parts and parameters
    keep their names. Norms are over features, of a convolution over channels at each place; they have the device and
    dtype of the map. Applied again it does nothing. To be called before there is an optimizer, and on a model that is
    yet to be trained: it computes something else afterwards. `norms_of` says the same and changes nothing.

    Left as they are: what stands after the head (see `roles_of`); and modules that declare `roles()`, all of ours,
    which have norms where their papers put them, mostly before blocks on a residual stream.

    Args:
        model: whose nonlinearities are modules in an `nn.Sequential`; see `leave` for others.
        norm: `"layer"` or `"rms"`.
        eps: of the norms that are added.
        keep_biases: of maps before norms, which else are taken away: they let the scale of the map through. Before
            batch and instance norms they are kept in any case, for they do nothing there.
        leave: names of modules that are not touched: recurrent and transformer layers of torch, and modules whose
            `forward` calls functions such as `torch.relu`, where nothing can be put before them.

    Raises:
        UsageError: some modules' nonlinearities cannot be seen: they are named; or `norm` or `leave` is not known.
    """
    if norm not in ("layer", "rms"):
        raise UsageError(f"normalized: norm is {norm!r}, expected 'layer' or 'rms'")
    found = norms_of(model, leave=leave)
    if found.unseen:
        names = "; ".join(f"{name or type(model).__name__} ({why})" for name, why in found.unseen.items())
        raise UsageError(
            f"normalized: which nonlinearities are there, and what is before them, cannot be seen at {names}. Put maps "
            f"and nonlinearities into an nn.Sequential, or leave them as they are with leave={tuple(found.unseen)}"
        )
    modules = dict(model.named_modules(remove_duplicate=False))
    if twice := [name for name in found.missing if sum(modules[name] is modules[other] for other in found.missing) > 1]:
        raise UsageError(
            f"normalized: {', '.join(twice)} are one map that is called more than once; each call would need a norm of "
            "its own, so give them as maps apart, or leave= them"
        )
    for name, where in found.missing.items():
        parent, _, own = where.rpartition(".")
        following = modules[where]
        both = nn.Sequential(_norm_after(modules[name], norm, eps), following).train(following.training)
        setattr(modules[parent], own, both)
    biases = [] if keep_biases else found.redundant
    for name in biases:
        modules[name.rpartition(".")[0]].register_parameter("bias", None)
    _tell(found, biases)
    return model


def _tell(found: Norms, biases: list[str]) -> None:
    if found.missing:
        logger.info("norms were added after %s", ", ".join(found.missing))
    if biases:
        logger.info("biases were taken away, since norms follow: %s", ", ".join(biases))
    if found.noticed:
        logger.warning(
            "what %s call in a forward of their own is not seen; `invariant` shows which matrices have a scale",
            ", ".join(name or "the model" for name in found.noticed),
        )


Chain = list[tuple[str, nn.Module]]


def _chains(module: nn.Module, path: str, found: Norms, leave: Collection[str]) -> Iterator[Chain]:
    """Parts that follow one another, with their names; what is not to be looked into is noted and ends a chain."""
    if path in leave:
        return
    if declares(module):
        found.ours.append(path)
    elif isinstance(module, _INSIDE):
        found.unseen[path] = f"{type(module).__name__}, which applies them inside"
    elif isinstance(module, nn.Sequential):
        chain: Chain = []
        for name, part in _flat(module, path, leave):
            chain.append((name, part))
            yield from _chains(part, name, found, leave)
        yield chain
    elif not isinstance(module, (*_MAPS, *_NONLINEAR, *_PASSING, *NORMS, AlongChannels)):
        yield from _around(module, path, found, leave)


def _around(module: nn.Module, path: str, found: Norms, leave: Collection[str]) -> Iterator[Chain]:
    """Chains within a module with a `forward` of its own, if what it does itself is no part of one."""
    parts = dict(_children(module, path))
    if not parts:
        found.unseen[path] = f"{type(module).__name__}, which may be one"
        return
    found.noticed.append(path)
    for name, part in parts.items():
        if isinstance(part, (nn.Linear, _CONVS, *_NONLINEAR)) and name not in leave:
            found.unseen[name] = f"{type(part).__name__}, called in the forward of {type(module).__name__}"
        yield from _chains(part, name, found, leave)


def _children(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    for name, part in module._modules.items():  # `named_children` has a module that is used twice only once
        if part is None:
            continue
        where = f"{path}.{name}".removeprefix(".")
        if isinstance(part, (nn.ModuleList, nn.ModuleDict)):
            yield from _children(part, where)
        else:
            yield where, part


def _flat(module: nn.Sequential, path: str, leave: Collection[str]) -> Iterator[tuple[str, nn.Module]]:
    for name, part in _children(module, path):
        if isinstance(part, nn.Sequential) and not declares(part) and name not in leave:
            yield from _flat(part, name, leave)
        else:
            yield name, part


def _look(chain: Chain, head: str | None, found: Norms) -> None:
    """Go along a chain: which map was last, and whether a norm has come since."""
    last: tuple[str, nn.Module, str] | None = None  # a map, and the name of what follows it
    after_head = False
    for i, (name, part) in enumerate(chain):
        if isinstance(part, _MAPS):
            after_head = name == head
            last = None if after_head or i + 1 == len(chain) else (name, part, chain[i + 1][0])
        elif isinstance(part, (*NORMS, AlongChannels)):
            if last is not None:
                found.present.append(last[0])
                _note_bias(last[0], last[1], found.idle if isinstance(part, _CENTERED) else found.redundant)
            last = None
        elif isinstance(part, _NONLINEAR):
            if last is not None:
                found.missing[last[0]] = last[2]
                _note_bias(last[0], last[1], found.redundant)
            if after_head:
                found.outputs.append(name)
            last = None
        elif not isinstance(part, _PASSING):
            last, after_head = None, False


def _note_bias(name: str, part: nn.Module, where: list[str]) -> None:
    if getattr(part, "bias", None) is not None:
        where.append(f"{name}.bias")


def _norm_after(part: nn.Module, norm: str, eps: float) -> nn.Module:
    weight = part.weight
    assert isinstance(weight, Tensor)
    width = part.out_channels if isinstance(part, _CONVS) else weight.shape[1 if isinstance(part, nn.Embedding) else 0]
    make = nn.LayerNorm if norm == "layer" else nn.RMSNorm
    made = make(width, eps=eps, device=weight.device, dtype=weight.dtype)
    return AlongChannels(made, len(part.kernel_size)) if isinstance(part, _CONVS) else made


# Proof by trying


@torch.no_grad()
def invariant(
    model: nn.Module, inputs: Any, *, factor: float = 3.0, tolerance: float = 1e-3, seed: int = 0
) -> dict[str, bool]:
    """For every parameter with two axes or more, by name: whether the outputs stay when it is multiplied by `factor`.

    A copy in float64 is asked once for each of them, in the mode in which `model` is, with the same random numbers;
    parameters of zeros, as heads often begin, are drawn anew in it, for behind them nothing can be seen. The
    ε of a norm leaves a little of the scale, hence `tolerance`. Of a tuple only what stands first counts: a state may
    hold what has the scale. That it holds for each does not say that it holds for all together, where maps follow one
    another without a norm.

    Args:
        model: any module; not changed.
        inputs: what it is called with: a tensor, or a tuple of arguments.
        factor: by which a parameter is multiplied.
        tolerance: largest change of outputs, over their largest magnitude.
        seed: of what the model draws, such as dropout.
    """
    wide = copy.deepcopy(model).double()
    random = generator(seed, "invariant zeros")
    for p in wide.parameters():
        if not p.any():
            p.copy_(torch.randn(p.shape, generator=random, dtype=p.dtype))
    arguments = tuple(
        x.double() if isinstance(x, Tensor) and x.is_floating_point() else x
        for x in (inputs if isinstance(inputs, tuple) else (inputs,))
    )
    first = _outputs(wide, arguments, seed)
    found = {}
    for name, p in wide.named_parameters():
        if p.ndim < 2:
            continue
        before = p.clone()
        p.mul_(factor)
        moved = (_outputs(wide, arguments, seed) - first).abs().max()
        p.copy_(before)
        found[name] = bool(moved <= tolerance * first.abs().max())
    return found


def _outputs(model: nn.Module, arguments: tuple[Any, ...], seed: int) -> Tensor:
    with seeded(seed, "invariant"):
        y = model(*arguments)
    while isinstance(y, tuple):
        y = y[0]
    if not isinstance(y, Tensor):
        raise UsageError(f"invariant: {type(model).__name__} returns {type(y).__name__}, expected a tensor or a tuple")
    return y
