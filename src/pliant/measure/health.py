"""Whether a model can still learn: a table of diagnostics by layer, and one line in plain words.

Nothing is left on the model, and no parameter, state or random generator moves.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import Role
from pliant.core.rates import norms, power_of
from pliant.core.roles import roles_of
from pliant.core.units import activations, units_of
from pliant.measure.features import dead_units, dormant_units, effective_rank, flipped, similarity_moved, srank

SATURATED = 4.0
"""Absolute input of a sigmoid beyond which its slope is less than a tenth of the largest."""
ROWS = 512
"""Probe rows that are looked at, at most: a singular value decomposition of more tells little more."""


@dataclass(frozen=True)
class Health:
    """Diagnostics of one moment; a later one may refer to it.

    Attributes:
        units: by layer of hidden units: `dead`, `dormant`, `srank`, `effective rank`, `width`, and since an earlier
            moment `moved` (Δ_C) and `flipped` (Δ_A).
        matrices: by name: `norm`, `rate` (effective), and since an earlier moment `norm ratio`, `rate ratio`,
            `distance` (of the parameter from then, over its norm then).
        recurrences: by name: quantiles 0.05, 0.5, 0.95 of `time constants` in steps, and of each gate the share
            that is `saturated`.
        features: activations of each layer of units on the probe inputs, to compare with.
        parameters: copies of the matrices, to compare with; empty unless asked for.
    """

    units: dict[str, dict[str, float]]
    matrices: dict[str, dict[str, float]]
    recurrences: dict[str, dict[str, Any]]
    features: dict[str, Tensor] = field(repr=False)
    parameters: dict[str, Tensor] = field(repr=False)

    def __str__(self) -> str:
        lines = []
        for title, rows in (("units", self.units), ("matrices", self.matrices), ("recurrences", self.recurrences)):
            columns = list(dict.fromkeys(column for row in rows.values() for column in row))
            if not rows:
                continue
            table = [[title, *columns], *([name, *(_text(row.get(c)) for c in columns)] for name, row in rows.items())]
            widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
            lines += ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]
            lines.append("")
        return "\n".join([*lines, verdict(self)])


def _text(value: Any) -> str:
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
    keep_parameters: bool = False,
) -> Health:
    """Diagnostics of a model on probe inputs.

    Args:
        model: any module; those of ours are called with `state`, `reset` and `mask`, others with `inputs` alone.
        inputs: probe inputs; the same at every moment, if moments are to be compared.
        state: of the streams before them; None is fresh.
        optimizer: who moves the parameters; without it there are no rates.
        roles: of parameters whose role nothing tells.
        since: an earlier moment of the same model and inputs.
        keep_parameters: hold copies of the matrices, so that a later moment can tell how far they have gone.

    Raises:
        UsageError: a parameter's role is not known, see `roles_of`.
    """
    names = {id(part): name for name, part in model.named_modules()}
    units = units_of(model)
    known = roles_of(model, roles)
    training = model.training
    recurrences: dict[str, dict[str, Any]] = {}
    try:
        model.eval()
        with torch.no_grad(), activations(units) as seen, _gates(model, names, recurrences):
            if hasattr(model, "init_state"):
                model(inputs, state, reset=reset, mask=mask)
            else:
                model(inputs)
    finally:
        model.train(training)
    features = {names[id(one.reader)]: h[:ROWS] for one, h in zip(units, seen, strict=True) if h is not None}
    matrices = {name: p.detach() for name, p in model.named_parameters() if p.ndim >= 2}
    return Health(
        units={name: _of_units(h, since.features.get(name) if since else None) for name, h in features.items()},
        matrices=_of_matrices(matrices, known, optimizer, since),
        recurrences=recurrences,
        features=features,
        parameters={name: p.clone() for name, p in matrices.items()} if keep_parameters else {},
    )


def _of_units(h: Tensor, before: Tensor | None) -> dict[str, float]:
    found = {
        "width": float(h.shape[1]), "dead": dead_units(h), "dormant": dormant_units(h), "srank": float(srank(h)),
        "effective rank": effective_rank(h),
    }  # fmt: skip
    if before is not None:
        found |= {"moved": similarity_moved(before, h), "flipped": flipped(before, h)}
    return found


def _of_matrices(
    matrices: Mapping[str, Tensor], roles: Mapping[str, Role], optimizer: torch.optim.Optimizer | None,
    since: Health | None,
) -> dict[str, dict[str, float]]:  # fmt: skip
    lengths = dict(zip(matrices, norms(list(matrices.values())).tolist(), strict=True))
    groups = [] if optimizer is None else optimizer.param_groups
    rates = {p.data_ptr(): float(group["lr"]) for group in groups for p in group["params"]}
    found: dict[str, dict[str, float]] = {}
    for name, p in matrices.items():
        row = {"norm": lengths[name]}
        if optimizer is not None and p.data_ptr() in rates and lengths[name] > 0:
            row["rate"] = rates[p.data_ptr()] / lengths[name] ** power_of(optimizer)
        if since is not None and (then := since.matrices.get(name)):
            row["norm ratio"] = lengths[name] / then["norm"] if then["norm"] else torch.inf
            if then.get("rate") and "rate" in row:
                row["rate ratio"] = row["rate"] / then["rate"]
            if name in since.parameters and then["norm"]:
                row["distance"] = float((p - since.parameters[name]).norm()) / then["norm"]
        found[name] = row
    return found


@contextmanager
def _gates(model: nn.Module, names: Mapping[int, str], found: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Time constants of recurrences, and how far their gates are open on what they get to read."""
    hooks = []
    for part in model.modules():
        name = names[id(part)] or type(part).__name__
        if callable(constants := getattr(part, "time_constants", None)):
            with torch.no_grad():
                marks = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)
                found.setdefault(name, {})["time constants"] = constants().double().quantile(marks).tolist()
        if callable(gates := getattr(part, "gates", None)):

            def look(module: nn.Module, args: tuple[Any, ...], name: str = name, gates: Any = gates) -> None:
                for gate, z in gates(args[0]).items():
                    found.setdefault(name, {})[f"{gate} saturated"] = float((z.abs() > SATURATED).float().mean())

            hooks.append(part.register_forward_pre_hook(look))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


SLOW, DEAD, DORMANT, NARROW, STILL = 0.25, 0.5, 0.5, 0.1, 1e-3
"""Where a ratio of effective rates, a share of units, of directions, or a movement becomes worth a word."""


def verdict(found: Health) -> str:
    """What is worst, in one line: which layer, why, and what helps."""
    said = [*_of_rates(found), *_of_layers(found)]
    return min(said)[1] if said else "nothing is wrong with what was looked at"


def _of_rates(found: Health) -> Iterator[tuple[float, str]]:
    """How bad it is (the less the worse), and the line."""
    for name, row in found.matrices.items():
        if (ratio := row.get("rate ratio", 1.0)) < SLOW:
            text = f"{name} turns slowly: its effective rate fell to {ratio:.0%} of its start; re-warm or project"
            yield ratio / SLOW, text


def _of_layers(found: Health) -> Iterator[tuple[float, str]]:
    for name, row in found.units.items():
        whose = f"the units that {name} reads"
        if row["dead"] > DEAD:
            help_ = "put a norm before the nonlinearity or renew units"
            yield DEAD / row["dead"], f"{row['dead']:.0%} of {whose} are dead; {help_}"
        if row["dormant"] > DORMANT:
            yield DORMANT / row["dormant"], f"{row['dormant']:.0%} of {whose} are dormant; renew units"
        if (share := row["effective rank"] / row["width"]) < NARROW:
            directions = f"{row['effective rank']:.0f} directions of {row['width']:.0f}"
            yield share / NARROW, f"{whose} span {directions}; renew units or regularize"
        if (still := max(row.get("flipped", 1.0), row.get("moved", 1.0))) < STILL:
            yield still / STILL, f"{whose} have stopped moving; re-warm"
