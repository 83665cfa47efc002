"""Continual backprop: units that are of little use are made new, a few at a time.

Paper: Dohare et al. 2024, Loss of plasticity in deep continual learning, Nature 632. With h_j the activation of unit j
and decay η of running means, both corrected for their start,

    utility_j <- η utility_j + (1 - η) |h_j - mean_j| Σ_i |w_ij| / Σ_k |w_jk|        (w_ij leaves unit j, w_jk enters)

and of the units older than `maturity` the share `rate` with the least utility is replaced per update: what enters
is drawn as at the start, what leaves is zero, what it used to add on average goes into the reader's bias, and
its moments in the optimizer are zero.
"""

from typing import Any

import torch
from torch import Tensor, nn

from pliant.core import Question, UsageError
from pliant.core.units import Units, activations, of_steps, units_of
from pliant.optim.base import Probe, Upkeep

STATISTICS = ("utility", "mean", "looks", "age")
"""Of each unit."""


class ContinualBackprop(Upkeep):
    """Replace the least useful hidden units, gradually.

    Units are those of `pliant.core.units.units_of`: between two linear maps of an `nn.Sequential`, or as a module
    declares them. Memory: four numbers for each.

    Args:
        rate: share of the mature units that is replaced per update.
        maturity: updates that a unit lives before it may be replaced.
        look: updates from one look at the units to the next; a look is a forward pass over the last question.
        decay: η, per look.

    Raises:
        UsageError: an argument is out of range, or no unit is found in the model.
    """

    def __init__(self, rate: float = 1e-4, maturity: int = 100, look: int = 10, decay: float = 0.99):
        if not 0 <= rate <= 1 or maturity < 0 or look < 1 or not 0 <= decay < 1:
            raise UsageError(
                f"ContinualBackprop: rate is {rate}, maturity {maturity}, look {look}, decay {decay}; "
                "expected 0 to 1, >= 0, >= 1, 0 to 1"
            )
        self.rate, self.maturity, self.look, self.decay = rate, maturity, look, decay
        self.replaced = 0

    def init(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.units = units_of(model)
        if not self.units:
            raise UsageError(f"ContinualBackprop: no hidden units are known in {type(model).__name__}")
        like = self.units[0].reader.weight
        wide = torch.promote_types(like.dtype, torch.float32)  # averages of many looks do not move in bfloat16
        self.layers = [
            {name: torch.zeros(one.number, dtype=wide, device=like.device) for name in STATISTICS} for one in self.units
        ]
        self.owed = [0.0] * len(self.units)
        self.spread = [
            [float(w.weight.detach()[at : at + one.number].std()) for w, at in one.writers] for one in self.units
        ]

    def apply(self, model: nn.Module, optimizer: torch.optim.Optimizer, probe: Probe) -> dict[str, Any]:
        for layer in self.layers:
            layer["age"] += 1
        if probe.update % self.look:
            return {}
        replaced = 0
        for i, (one, h) in enumerate(zip(self.units, self._look(model, probe.question), strict=True)):
            if h is not None and len(h):
                self._learn(self.layers[i], one, h)
                replaced += self._replace(i, one, optimizer, probe.generator)
        self.replaced += replaced
        return {"replaced": replaced} if replaced else {}

    def _look(self, model: nn.Module, question: Question) -> list[Tensor | None]:
        """What each unit is at the steps of a question that exist; no statistic or random number of the model moves."""
        modes = {part: part.training for part in model.modules()}
        try:
            model.eval()
            with activations(self.units) as seen:
                model(question.inputs, None, reset=question.reset, mask=question.mask)
        finally:
            for part, mode in modes.items():
                part.training = mode
        return [None if h is None else of_steps(h, question.mask) for h in seen]

    def _learn(self, layer: dict[str, Tensor], one: Units, h: Tensor) -> None:
        layer["looks"] += 1
        h = h.to(layer["mean"].dtype)
        layer["mean"].lerp_(h.mean(0), 1 - self.decay)
        mean = layer["mean"] / (1 - self.decay ** layer["looks"])
        leaves = one.reader.weight.abs().sum(0)
        enters = torch.stack([w.weight[at : at + one.number].abs().sum(1) for w, at in one.writers]).sum(0)
        use = (h - mean).abs().mean(0) * leaves / enters.clamp(min=torch.finfo(enters.dtype).tiny)
        layer["utility"].lerp_(use.to(h.dtype), 1 - self.decay)

    def _replace(self, i: int, one: Units, optimizer: torch.optim.Optimizer, generator: torch.Generator) -> int:
        layer = self.layers[i]
        mature = (layer["age"] > self.maturity) & (layer["looks"] > 0)
        self.owed[i] += self.rate * self.look * float(mature.sum())
        number = min(int(self.owed[i]), int(mature.sum()))
        if not number:
            return 0
        self.owed[i] -= number
        utility = layer["utility"] / (1 - self.decay ** layer["looks"].clamp(min=1))
        chosen = torch.where(mature, utility, torch.inf).topk(number, largest=False).indices
        mean = layer["mean"] / (1 - self.decay ** layer["looks"].clamp(min=1))
        reader = one.reader
        if reader.bias is not None:
            reader.bias.add_(reader.weight[:, chosen] @ mean[chosen].to(reader.weight.dtype))
        for (writer, at), spread in zip(one.writers, self.spread[i], strict=True):
            rows = chosen + at
            fresh = torch.randn(number, writer.in_features, generator=generator) * spread
            _renew(optimizer, writer.weight, rows, fresh.to(writer.weight))
            if writer.bias is not None:
                _renew(optimizer, writer.bias, rows, 0.0)
        _renew(optimizer, reader.weight.mT, chosen, 0.0, of=reader.weight)
        for name in layer:
            layer[name][chosen] = 0
        return number

    def state_dict(self) -> dict[str, Any]:
        return {"layers": self.layers, "owed": self.owed, "spread": self.spread, "replaced": self.replaced}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for mine, saved in zip(self.layers, state["layers"], strict=True):
            for name, value in saved.items():
                mine[name].copy_(value)
        self.owed, self.spread = list(state["owed"]), [list(one) for one in state["spread"]]
        self.replaced = state["replaced"]


def _renew(
    optimizer: torch.optim.Optimizer, view: Tensor, rows: Tensor, value: Tensor | float, of: Tensor | None = None
) -> None:
    """Set rows of `view`, a parameter or its transpose, to `value`, and their moments to zero."""
    parameter = view if of is None else of
    view[rows] = value
    for moment in optimizer.state.get(parameter, {}).values():
        if isinstance(moment, Tensor) and moment.shape == parameter.shape:
            (moment if of is None else moment.mT)[rows] = 0
