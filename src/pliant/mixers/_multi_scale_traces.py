"""Traces of `MultiScaleSSM`: derivatives of its states by what they depend on, and what they give of a gradient.

In names of traces and shapes, B streams of S side by side: `"rates"` is dh/dA `(B, S, M, N, D)`, from which those by
rates, frequencies and invariant steps follow; `"step_bias"` `(B, S, M, N, D)` and `"step_weight"` `(B, S, R, M, N, D)`;
`"steps"` and `"inputs"` `(B, S, D, M, N, D)` are by what `linear_select` makes of the input; `"bank"` `(B, S, P, N, D)`
and `"samples"` `(B, S, Q, D)` by the taps of the filter bank, rows as of `rows_of`. Complex ones have two parts at the
end (online-gradients.md 2.1e).
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional as F

from pliant.kernels import filter_bank
from pliant.kernels._scale_traces import Rows, bank_traces, invariant_traces, rows_of
from pliant.kernels._traces import Border, states_before
from pliant.mixers.multires import FilterBank

if TYPE_CHECKING:
    from pliant.mixers.multi_scale import MultiScaleSSM

BY_RATES = ("log_rate", "frequency", "log_step")


def advance(
    layer: "MultiScaleSSM",
    past: Mapping[str, Tensor],
    x: Float[Tensor, "B T D"],
    history: Float[Tensor, "B R D"],
    h: Shaped[Tensor, "B M N D"],
    reset: Bool[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B T"] | None,
    kinds: Mapping[str, str],
) -> dict[str, Tensor]:
    """Traces after a chunk; here S is 1 and left out, and what is complex is so.

    Args:
        past: traces before it; none, or all of these kinds.
        x, history, h: inputs and what is carried, at least float32.
    """
    bank = None if layer.bank is None else layer.bank.get_parameter("weight").to(x.dtype)
    weight = x.new_zeros(0, 2, 1, layer.width) if bank is None else bank
    known: dict[str, Tensor | None] = {"rates": None, "bank": None, "samples": None}
    if "exact" in map(kinds.get, BY_RATES):
        known["rates"] = past.get("rates", torch.zeros_like(h))
    if kinds.get("bank") == "exact":
        rows = rows_of(len(weight), weight.shape[2])
        known["bank"] = past.get("bank", h.new_zeros(len(h), len(rows.band), *h.shape[2:]))
        known["samples"] = past.get("samples", history.new_zeros(len(h), len(rows.place), layer.width))
    if layer.selective:
        return _of_selective(layer, dict(past), known, weight, x, history, h, reset, mask, kinds)
    step = torch.exp(layer.log_step.to(x.dtype))
    decay = torch.exp(step[:, None] * layer.rates())
    given = known["rates"], known["bank"], known["samples"]
    found = invariant_traces(x, weight, decay, step, history, h, *given, reset, mask)
    return {name: e for name, e in zip(known, found, strict=True) if e is not None}


def _of_selective(
    layer: "MultiScaleSSM", past: Mapping[str, Tensor], known: Mapping[str, Tensor | None], weight: Tensor, x: Tensor,
    history: Tensor, h: Tensor, reset: Tensor | None, mask: Tensor | None, kinds: Mapping[str, str],
) -> dict[str, Tensor]:  # fmt: skip
    """The same where steps and inputs come from the input; arrays are `(B, T, 1, M, N, D)`."""
    A, after = layer.rates(), dict[str, Tensor]()
    bands = filter_bank(x, weight, history, reset, mask)[0] if len(weight) else x[None]
    b = bands.movedim(0, 2)[:, :, None, :, None]
    rank, states = layer.step_weight.shape[1], A[..., 0].numel()
    low, inputs = F.linear(x, layer.linear_select.weight.to(x.dtype)[: rank + states]).split([rank, states], -1)
    pre = torch.einsum("btr,mrd->btmd", low, layer.step_weight.to(x.dtype)) + layer.step_bias.to(x.dtype)
    pre, B = pre[:, :, None, :, None], inputs.unflatten(-1, A.shape[:2])[:, :, None, ..., None]
    dt = F.softplus(pre)
    there = torch.ones_like(pre, dtype=torch.bool) if mask is None else mask[..., None, None, None, None]
    a = torch.where(there, torch.exp(dt * A), 1)
    gains = torch.where(there, dt * B, 0).expand(a.shape)
    before = torch.where(there, states_before(a, (gains * b).to(a.dtype), h[:, None], reset), 0)
    border, gained = Border(a, reset), dict[str, Tensor]()
    if known["rates"] is not None:
        after["rates"] = border.onto(known["rates"][:, None], border.left(a * dt * before).sum(1))[:, 0]
    by_step = border.left((A * a * before + torch.where(there, b * B, 0)) * torch.sigmoid(pre))
    if kinds["step_bias"] == "exact":
        gained["step_bias"] = by_step.sum(1)
    if kinds["step_weight"] == "exact":
        gained["step_weight"] = _products(border.since(low[:, :, None]), by_step)
    if kinds["linear_select"] == "exact":
        read, by_input = border.since(x[:, :, None]), border.left((dt * b).expand(a.shape))
        gained |= {"steps": _products(read, by_step), "inputs": _products(read, by_input)}
    for name, e in gained.items():
        after[name] = border.onto(past[name][:, None] if name in past else None, e)[:, 0]
    if known["bank"] is not None and known["samples"] is not None:
        bank = bank_traces(x, weight, history, border, gains, known["bank"], known["samples"], reset, mask)
        after["bank"], after["samples"] = bank
    return after


def gradients(
    layer: "MultiScaleSSM",
    traces: Mapping[str, Tensor],
    dh: Shaped[Tensor, "B M N D"],
    dhistory: Float[Tensor, "B R D"] | None,
) -> dict[str, Tensor]:
    """Gradients of parameters; here too S is 1 and left out.

    Args:
        dh, dhistory: those of the states and of what the bank carries; the real part of a product with dh is what
            dL/dh does to it.
    """
    found: dict[str, Tensor] = {}
    if "rates" in traces:
        A, by = layer.rates(), (dh * traces["rates"]).sum(0)
        found["log_rate"] = (by * A.real).real
        if layer.frequency is not None:
            found["frequency"] = -by.imag
        if not layer.selective:
            found["log_step"] = (by * A).real.sum(1)
    for name, of in (("step_bias", "bmnd,bmnd->md"), ("step_weight", "brmnd,bmnd->mrd")):
        if name in traces:
            found[name] = torch.einsum(of, traces[name], dh).real
    if "steps" in traces:
        by_step = torch.einsum("bimnd,bmnd->imd", traces["steps"], dh).real
        to_step = torch.einsum("imd,mrd->ri", by_step, layer.step_weight.to(by_step.dtype))
        to_input = torch.einsum("bimnd,bmnd->mni", traces["inputs"], dh).real.flatten(0, 1)
        none = to_input.new_zeros(layer.linear_select.out_features - len(to_step) - len(to_input), layer.width)
        found["linear_select.weight"] = torch.cat([to_step, to_input, none])
    if "bank" in traces:
        assert isinstance(layer.bank, FilterBank)
        found["bank.weight"] = _of_taps(layer.bank.weight, traces, dh, dhistory)
    return found


def _of_taps(weight: Tensor, traces: Mapping[str, Tensor], dh: Tensor, dhistory: Tensor | None) -> Tensor:
    rows = Rows(*(part.to(dh.device) for part in rows_of(len(weight), weight.shape[2])))
    found = dh.real.new_zeros(weight.shape[:3].numel(), weight.shape[3])
    found.index_add_(0, rows.tap, (traces["bank"] * dh[:, rows.band]).real.sum((0, 2)))
    if dhistory is not None:
        found.index_add_(0, rows.place_tap, (traces["samples"] * dhistory[:, rows.place]).sum(0))
    return found.view(weight.shape)


def _products(left: Float[Tensor, "B T S I"], right: Shaped[Tensor, "B T S M N D"]) -> Shaped[Tensor, "B S I M N D"]:
    """sum_t left_t ⊗ right_t."""
    return torch.einsum("btsi,btsmnd->bsimnd", left.to(right.dtype), right)
