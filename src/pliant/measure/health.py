"""Whether a model can still learn: a table of diagnostics by layer, and one line in plain words.

Nothing is left on the model, and no parameter, state or random generator moves.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import Role, UsageError
from pliant.core.rates import angle, norms, power_of
from pliant.core.roles import MIXING, roles_of
from pliant.core.units import activations, of_steps, units_of
from pliant.measure.features import (
    churn,
    dormant_units,
    flipped,
    needed,
    perplexity,
    silent_units,
    similarity_moved,
    singular_values,
)
from pliant.measure.gradients import Losses, example_gradients, gradient_covariance, losses_of, parameters_of, sharpness

SATURATED = 4.0
"""Absolute input of a sigmoid beyond which its slope is less than a tenth of the largest."""
ROWS = 512
"""Probe rows that are looked at, at most: a singular value decomposition of more tells little more."""


@dataclass(frozen=True)
class Health:
    """Diagnostics of one moment; a later one may refer to it.

    Attributes:
        units: by layer of hidden units: `width`, `rows` of the probe, shares `dead` and `dormant`, `srank`, `effective
            rank`, and since an earlier moment `srank ratio`, `moved` (Δ_C) and `flipped` (Δ_A).
        matrices: by name: `norm`, `rate` (effective), and since an earlier moment `norm ratio`, `rate ratio` (to the
            effective rate then, of the whole rate if a schedule was still warming up), `distance` (of the parameter
            from then, over its norm then) and `angle` (by which it has turned since then, radians).
        recurrences: by name: quantiles 0.05, 0.5, 0.95 of `time constants` in steps, and of each gate the share
            that is `saturated`.
        roles: of the matrices, by name, in lower case.
        whole: of the model: since an earlier moment the `churn` of its outputs; with targets the `loss`, the `gradient
            cosine`, `gradient rank` and `gradient norm`, and the `sharpness`.
        features: activations of each layer of units on the probe inputs, to compare with.
        parameters: copies of the matrices, to compare with; empty unless asked for.
        outputs: of the model on the probe inputs, `(n, c)`, to compare with.
    """

    units: dict[str, dict[str, float]]
    matrices: dict[str, dict[str, float]]
    recurrences: dict[str, dict[str, Any]]
    roles: dict[str, str]
    whole: dict[str, float]
    features: dict[str, Tensor] = field(repr=False)
    parameters: dict[str, Tensor] = field(repr=False)
    outputs: Tensor = field(repr=False)

    def tables(self) -> dict[str, Any]:
        """What was found as plain values, without what later moments are compared with."""
        return {"units": self.units, "matrices": self.matrices, "recurrences": self.recurrences, "roles": self.roles,
                "whole": self.whole}  # fmt: skip

    def __str__(self) -> str:
        lines = []
        whole = {"model": self.whole} if self.whole else {}
        matrices = {name: {"role": self.roles[name], **row} for name, row in self.matrices.items()}
        tables: dict[str, Mapping[str, Mapping[str, Any]]]
        tables = {"units": self.units, "matrices": matrices, "recurrences": self.recurrences, "whole": whole}
        for title, rows in tables.items():
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            if not rows:
                continue
            table = [[title, *columns], *([name, *(_text(row.get(c)) for c in columns)] for name, row in rows.items())]
            widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
            lines += ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
            lines.append("")
        return "\n".join([*lines, verdict(self)])


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, (tuple, list)):
        return " ".join(_text(part) for part in value)
    return "" if value is None else f"{value:.3g}"


def health(
    model: nn.Module,
    inputs: Tensor,
    state: Any = None,
    *,
    reset: Tensor | None = None,
    mask: Tensor | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    roles: Mapping[str, Role] | None = None,
    since: Health | None = None,
    before: Health | None = None,
    keep_parameters: bool = False,
    targets: Tensor | None = None,
    known: Tensor | None = None,
    loss: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Health:
    """Diagnostics of a model on probe inputs.

    Args:
        model: any module; those of ours are called with `state`, `reset` and `mask`, others with `inputs` alone.
        inputs: probe inputs; the same at every moment, if moments are to be compared.
        state: of the streams before them; None is fresh.
        optimizer: who moves the parameters; without it there are no rates.
        roles: of parameters whose role nothing tells.
        since: an earlier moment of the same model and inputs, at the start: norms, rates and distances refer to it.
        before: a moment that movement and churn refer to, such as the last one; None takes `since`.
        keep_parameters: hold copies of the matrices, so that a later moment can tell how far they have gone.
        targets: of the probe inputs, for what needs a loss: some 50 gradients of the whole probe.
        known: where a target is known, of the shape of the losses; None: wherever a step exists.
        loss: (output, targets) -> one loss per place; None takes `model.nats`.

    Raises:
        UsageError: a parameter's role is not known, see `roles_of`; the probe holds no step that exists, or no target
            that is known; an earlier moment is of other inputs or another model; or what the model says is not one
            tensor `(..., c)`.
    """
    names = {id(part): name for name, part in model.named_modules()}
    units = units_of(model)
    if not inputs.numel() or (mask is not None and not bool(mask.any())):
        raise UsageError(f"health: probe inputs of shape {tuple(inputs.shape)} hold no step that exists")
    told = roles_of(model, roles)
    # Before the model is called: what shards its parameters puts others in their place for a while.
    matrices = {name: p for name, p in model.named_parameters() if p.ndim >= 2 and told[name] in MIXING}
    before = since if before is None else before
    then, last = ({}, {}) if since is None or before is None else (since.units, before.features)
    modes = {part: part.training for part in model.modules()}  # a part may be frozen by its mode alone
    recurrences: dict[str, dict[str, Any]] = {}
    whole: dict[str, float] = {}
    try:
        model.eval()
        with torch.no_grad(), activations(units) as seen, _gates(model, names, recurrences):
            if hasattr(model, "init_state"):
                outputs, _ = model(inputs, state, reset=reset, mask=mask)
            else:
                outputs = model(inputs)
        if not isinstance(outputs, Tensor) or outputs.ndim < 2:
            got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
            raise UsageError(f"health: {type(model).__name__} says {got}; expected one tensor (..., c)")
        if targets is not None:
            losses = losses_of(model, inputs, targets, state, reset=reset, mask=mask, known=known, loss=loss)
            whole = _of_losses(losses, parameters_of(model))
    finally:
        for part, mode in modes.items():
            part.training = mode
    said = _rows(outputs.flatten(0, -2), mask)
    features = {names[id(one.reader)]: _rows(h, mask) for one, h in zip(units, seen, strict=True) if h is not None}
    if before is not None:
        _same_probe(before, said, features)
        whole["churn"] = churn(before.outputs, said)
    return Health(
        units={name: _of_units(h, then.get(name), last.get(name)) for name, h in features.items()},
        matrices=_of_matrices(matrices, optimizer, since),
        recurrences=recurrences,
        roles={name: told[name].name.lower() for name in matrices},
        whole=whole,
        features=features,
        parameters={name: p.detach().clone() for name, p in matrices.items()} if keep_parameters else {},
        outputs=said,
    )


def _same_probe(before: Health, said: Tensor, features: Mapping[str, Tensor]) -> None:
    now = {"its outputs": said.shape, **{name: h.shape for name, h in features.items()}}
    then = {"its outputs": before.outputs.shape, **{name: h.shape for name, h in before.features.items()}}
    if other := [name for name, shape in now.items() if then.get(name, shape) != shape]:
        raise UsageError(f"health: the earlier moment is of another probe or model: {other[0]} has shape "
                         f"{tuple(then[other[0]])} there and {tuple(now[other[0]])} here")  # fmt: skip


def _rows(h: Tensor, mask: Tensor | None) -> Tensor:
    """What `(n, d)` holds of steps that exist, evenly spread over all of them if they are many."""
    h = of_steps(h, mask)
    return h if len(h) <= ROWS else h[torch.linspace(0, len(h) - 1, ROWS).round().long()]


def _of_losses(losses: Losses, parameters: Mapping[str, Tensor]) -> dict[str, float]:
    of_places = losses(parameters).detach()
    if not len(of_places):
        raise UsageError("health: no target of the probe is known")
    found = {"loss": float(of_places.mean())}
    found |= gradient_covariance(example_gradients(losses, parameters))
    return found | {"sharpness": sharpness(losses, parameters)}


def _of_units(h: Tensor, since: dict[str, float] | None, before: Tensor | None) -> dict[str, float]:
    values = singular_values(h)
    found = {
        "width": float(h.shape[1]), "rows": float(len(h)), "dead": silent_units(h), "dormant": dormant_units(h),
        "srank": float(needed(values)), "effective rank": perplexity(values),
    }  # fmt: skip
    if since is not None and since["srank"]:
        found["srank ratio"] = found["srank"] / since["srank"]
    if before is not None:
        found |= {"moved": similarity_moved(before, h), "flipped": flipped(before, h)}
    return found


def _of_matrices(
    matrices: Mapping[str, Tensor], optimizer: torch.optim.Optimizer | None, since: Health | None
) -> dict[str, dict[str, float]]:
    lengths = dict(zip(matrices, norms([p.detach() for p in matrices.values()]).tolist(), strict=True))
    groups = [] if optimizer is None else optimizer.param_groups
    # A schedule notes the rate that was asked for, which it reaches after it has warmed up.
    rates = {id(p): (float(g["lr"]), float(g.get("initial_lr", g["lr"]))) for g in groups for p in g["params"]}
    found: dict[str, dict[str, float]] = {}
    for name, p in matrices.items():
        row = {"norm": lengths[name]}
        power = 0 if optimizer is None else power_of(optimizer)
        rate, asked = rates.get(id(p), (0.0, 0.0))
        if id(p) in rates and lengths[name] > 0:
            row["rate"] = rate / lengths[name] ** power
        if since is not None and (then := since.matrices.get(name)):
            row["norm ratio"] = lengths[name] / then["norm"] if then["norm"] else torch.inf
            if "rate" in row and then["norm"] and (first := max(asked, then.get("rate", 0.0) * then["norm"] ** power)):
                row["rate ratio"] = rate / first / row["norm ratio"] ** power
            if name in since.parameters and then["norm"]:
                row["distance"] = float((p.detach() - since.parameters[name]).norm()) / then["norm"]
                row["angle"] = float(angle(p.detach(), since.parameters[name]))
        found[name] = row
    return found


@contextmanager
def _gates(model: nn.Module, names: Mapping[int, str], found: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Time constants of recurrences, and how far their gates are open on what they get to read."""
    hooks = []
    try:
        for part in model.modules():
            name = names[id(part)] or type(part).__name__
            if callable(constants := getattr(part, "time_constants", None)):
                with torch.no_grad():
                    marks = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
                    found.setdefault(name, {})["time constants"] = constants().double().cpu().quantile(marks).tolist()
            if callable(gates := getattr(part, "gates", None)):

                def look(module: nn.Module, args: tuple[Any, ...], name: str = name, gates: Any = gates) -> None:
                    for gate, z in gates(args[0]).items():
                        found.setdefault(name, {})[f"{gate} saturated"] = float((z.abs() > SATURATED).float().mean())

                hooks.append(part.register_forward_pre_hook(look))
        yield
    finally:
        for hook in hooks:
            hook.remove()


FEW, DEAD, DORMANT = 0.25, 0.7, 0.75
"""Share of directions below which, and of units above which a layer is spoken of. docs/warning.md: where
all had to be memorized, each of them was seen in half of the nets that collapsed, in time, and in one of ten others."""
SLOW, STILL = 0.1, 0.01
"""The same for a ratio of effective rates, and for movement: with these alone less can be told in advance."""


def verdict(found: Health) -> str:
    """What is worst, in one line: which layer, why, and what helps.

    What warns best of a collapse is said first: directions that are left, then units, then rates and movement.
    """
    for look in (_of_numbers, _of_ranks, _of_shares, _of_rates, _of_movement):
        if said := list(look(found)):
            return min(said)[1]
    return "nothing is wrong with what was looked at" + ("" if found.units else "; no hidden units are known here")


Said = Iterator[tuple[float, str]]
"""How bad it is, the less the worse, and the line."""


def _of_numbers(found: Health) -> Said:
    for name, row in found.matrices.items():
        if not math.isfinite(row["norm"]):
            yield 0.0, f"{name} is not finite; go back to an earlier life"


def _of_ranks(found: Health) -> Said:
    for name, row in found.units.items():
        room = min(row["width"], row["rows"])
        # Inputs of few kinds span few directions in any net: where the start is known, much must have been lost.
        if (share := row["srank"] / room) < FEW and row.get("srank ratio", 0.0) < 2 * FEW:
            directions = f"{row['srank']:.0f} directions of {room:.0f}"
            yield share, f"the units that {name} reads span {directions}; renew units or pull toward the start"


def _of_shares(found: Health) -> Said:
    for name, row in found.units.items():
        for kind, most, help_ in (
            ("dead", DEAD, "put a norm before the nonlinearity or renew units"), ("dormant", DORMANT, "renew units")
        ):  # fmt: skip
            if row[kind] > most:
                yield most / row[kind], f"{row[kind]:.0%} of the units that {name} reads are {kind}; {help_}"


def _of_rates(found: Health) -> Said:
    """Of matrices whose direction alone counts, so that a rate over their length is what they feel."""
    for name, row in found.matrices.items():
        if found.roles[name] == "matrix" and (ratio := row.get("rate ratio", 1.0)) < SLOW:
            why = "as its rate did; re-warm"
            if row["norm ratio"] > 1 / SLOW**0.5:
                why = f"as it grew to {row['norm ratio']:.1f} times its length; project"
            yield ratio, f"{name} turns slowly: its effective rate fell to {ratio:.0%} of its start, {why}"


def _of_movement(found: Health) -> Said:
    for name, row in found.units.items():
        if (still := max(row.get("flipped", 1.0), row.get("moved", 1.0))) < STILL:
            yield still, f"the units that {name} reads have stopped moving; re-warm or project"
