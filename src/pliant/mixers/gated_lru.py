"""Gated linear recurrent unit (RG-LRU) and the recurrent block around it.

    i_t = σ(W_x x_t + b_x),  r_t = σ(W_a x_t + b_a)                 gates, block-diagonal
    log a_t = -C · r_t · softplus(Λ),  C = 8                        decay
    h_t = a_t ⊙ h_{t-1} + sqrt(1 - a_t²) ⊙ (i_t ⊙ x_t)              state

The first step of an episode is not scaled by sqrt(1 - a²), so it enters at full size.

Papers: De et al. 2024, Griffin, arXiv:2402.19427, section 2.4; Pătrăucean et al. 2024, TRecViT,
arXiv:2412.14294, section 3. Reference code: recurrentgemma 1.0.1 (`RGLRU`, `RecurrentBlock`).
Departures: none in the numbers. The TRecViT text writes the decay as σ(Λ)^(C r); the code, and so
this file, has softplus(Λ), which is the same with the sign of Λ turned. Initialisation is that of
the JAX code (gates with std 1/sqrt(width)), not of its PyTorch port. State is at least float32.
Cost: O(T·D) time for the recurrence, O(D) state per stream, whatever the length.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role, UsageError
from pliant.core.roles import prefix
from pliant.kernels import causal_conv, gated_unit
from pliant.kernels._gated_scan import DECAY_POWER as DECAY_POWER
from pliant.kernels._gated_scan import MAX_SQRT_DERIVATIVE as MAX_SQRT_DERIVATIVE
from pliant.kernels._gated_scan import bounded_sqrt as bounded_sqrt
from pliant.kernels._gated_traces import Fed, Unit, gated_traces
from pliant.kernels._gated_unit import through_heads
from pliant.kernels._traces import gated_slopes
from pliant.mixers.base import SequenceMixer, first_steps, side_by_side, where_steps


class RGLRUState(NamedTuple):
    """h `(B, *E, D)` float, fresh `(B,)` bool: no step yet."""

    h: Tensor
    fresh: Tensor


class GatedLRUState(NamedTuple):
    """conv `(B, K-1, *E, W)`: the last inputs of the convolution, oldest first; lru: state of the unit."""

    conv: Tensor
    lru: RGLRUState


class BlockDiagonal(nn.Module):
    """y[..., h, :] = x[..., h, :] @ weight[h] + bias[h]; weight `(H, D/H, D/H)`, bias `(H, D/H)`."""

    def __init__(self, width: int, num_heads: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_heads, width // num_heads, width // num_heads))
        self.bias = nn.Parameter(torch.zeros(num_heads, width // num_heads))
        # JAX counts the head axis into the fan, so the std is 1/sqrt(width), not 1/sqrt(width/H).
        nn.init.normal_(self.weight, std=width**-0.5)

    def forward(self, x: Float[Tensor, "*S D"]) -> Float[Tensor, "*S D"]:
        return through_heads(x, self.weight, self.bias)


class RGLRU(SequenceMixer):
    """The bare unit. `(B, T, *E, D) -> (B, T, *E, D)`.

    Args:
        width: D.
        num_heads: blocks of the gate matrices; divides `width`.
        min_radius, max_radius: exp(-softplus(Λ)) starts in this ring, uniform in its area. The
            decay itself is about its fourth power, since the gates start near one half.
    """

    def __init__(self, width: int, num_heads: int = 1, min_radius: float = 0.9, max_radius: float = 0.999):
        super().__init__()
        check_heads("RGLRU", width, num_heads)
        if not 0 <= min_radius < max_radius < 1:
            raise UsageError(f"RGLRU: radii are {min_radius} and {max_radius}; need 0 <= min_radius < max_radius < 1")
        self.width = width
        self.input_gate = BlockDiagonal(width, num_heads)
        self.decay_gate = BlockDiagonal(width, num_heads)
        uniform = torch.rand(width, dtype=torch.float64)
        log_radius = 0.5 * torch.log(uniform * (max_radius**2 - min_radius**2) + min_radius**2 + 1e-8)
        # softplus(decay) = -log radius
        self.decay = nn.Parameter(torch.log(torch.expm1(-log_radius)).to(torch.get_default_dtype()))

    def init_state(self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None) -> RGLRUState:
        device = self.decay.device if device is None else device
        dtype = torch.promote_types(self.decay.dtype, torch.float32)
        return RGLRUState(
            h=torch.zeros(batch, *extra, self.width, dtype=dtype, device=device),
            fresh=torch.ones(batch, dtype=torch.bool, device=device),
        )

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: RGLRUState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], RGLRUState]:
        x, state = self.start(x, state, reset, mask)
        first, fresh = first_steps(state.fresh, x.shape[1], reset, mask)
        # The units of extra axes stand side by side.
        side = math.prod(x.shape[2:-1])
        h, last = gated_unit(
            x.reshape(*x.shape[:2], side, self.width),
            self.input_gate.weight,
            self.input_gate.bias,
            self.decay_gate.weight,
            self.decay_gate.bias,
            F.softplus(self.decay.to(state.h.dtype)),
            state.h.reshape(x.shape[0], side, self.width),
            first,
            reset,
            mask,
        )
        return h.reshape(x.shape), RGLRUState(h=last.reshape(state.h.shape), fresh=fresh)

    def roles(self) -> dict[str, Role]:
        gates = {f"{gate}.{part}": role
                 for gate in ("input_gate", "decay_gate")
                 for part, role in (("weight", Role.GATE), ("bias", Role.BIAS))}  # fmt: skip
        return {"decay": Role.DECAY, **gates}

    def traceable(self) -> dict[str, tuple[str, ...]]:
        return dict.fromkeys(("decay", "input_gate", "decay_gate"), ("exact", "instant"))

    def advance_traces(
        self,
        traces: Mapping[str, Tensor] | None,
        x: Float[Tensor, "B T *E D"],
        state: RGLRUState,
        kinds: Mapping[str, str] | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> dict[str, Tensor]:
        """Names and shapes as of `gated_traces`."""
        x, state = self.start(x, state, reset, mask)
        unit = self.traced(side_by_side(x.to(state.h.dtype)), state, reset, mask)
        return gated_traces(traces, unit, None, self.kinds(kinds), reset, mask)

    def traced(self, x: Float[Tensor, "B T S D"], state: RGLRUState, reset: Tensor | None, mask: Tensor | None) -> Unit:
        """What traces are made of in a chunk."""
        gates = [(gate.weight.to(x.dtype), gate.bias.to(x.dtype)) for gate in (self.input_gate, self.decay_gate)]
        first, _ = first_steps(state.fresh, x.shape[1], reset, mask)
        p, r = (through_heads(x, weight, bias) for weight, bias in gates)
        h0 = state.h.reshape(x.shape[0], *x.shape[2:])
        a, slopes = gated_slopes(x, p, r, self.decay.to(x.dtype), h0, first, reset, mask)
        return Unit(x, a, slopes, *(weight for weight, _ in gates))

    def trace_gradients(self, traces: Mapping[str, Tensor], state: RGLRUState, dstate: RGLRUState) -> dict[str, Tensor]:
        if dstate.h is None:
            return {}
        dh = side_by_side(dstate.h[:, None])[:, 0]
        found = {name: torch.einsum("bs...d,bsd->...d", trace, dh) for name, trace in traces.items()}
        heads = len(self.input_gate.bias)
        return {name: part if name == "decay" else by_head(part, heads) for name, part in found.items()}

    def gates(self, x: Float[Tensor, "B T *E D"]) -> dict[str, Float[Tensor, "B T *E D"]]:
        """What the sigmoids of both gates get to see."""
        return {"input gate": self.input_gate(x), "decay gate": self.decay_gate(x)}

    def time_constants(self) -> Float[Tensor, "D"]:
        """Steps in which each unit forgets all but 1/e, with the decay gate at one half."""
        return 2 / (DECAY_POWER * F.softplus(self.decay))


class GatedLRU(SequenceMixer):
    """The recurrent block of Griffin and TRecViT, without norm and residual. `(B, T, *E, D) -> same`.

        y = gelu(x W_y + b_y);  v = RGLRU(conv(x W_x + b_x));  out = (v ⊙ y) W_o + b_o

    Args:
        width: D.
        lru_width: width of the recurrent branch; None means `width`.
        num_heads: blocks of the gate matrices; divides `lru_width`.
        conv_width: taps of the convolution over time.
        min_radius, max_radius: see `RGLRU`.
        depth: blocks in the whole model; the output starts smaller by 1/sqrt(depth).
    """

    def __init__(
        self,
        width: int,
        lru_width: int | None = None,
        num_heads: int = 1,
        conv_width: int = 4,
        min_radius: float = 0.9,
        max_radius: float = 0.999,
        depth: int = 1,
    ):
        super().__init__()
        lru_width = width if lru_width is None else lru_width
        if conv_width < 1:
            raise UsageError(f"GatedLRU: conv_width is {conv_width}, expected at least 1")
        self.width = width
        self.linear_x = nn.Linear(width, lru_width)
        self.linear_y = nn.Linear(width, lru_width)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, lru_width))
        self.conv_bias = nn.Parameter(torch.zeros(lru_width))
        self.lru = RGLRU(lru_width, num_heads, min_radius, max_radius)
        self.linear_out = nn.Linear(lru_width, width)
        self._initialize(depth)

    def _initialize(self, depth: int) -> None:
        conv_width, lru_width = self.conv_weight.shape
        nn.init.normal_(self.conv_weight, std=math.sqrt(0.01 / conv_width))
        for linear, std in (
            (self.linear_x, self.width**-0.5),
            (self.linear_y, self.width**-0.5),
            (self.linear_out, math.sqrt(2 / depth / lru_width)),
        ):
            nn.init.normal_(linear.weight, std=std)
            nn.init.zeros_(linear.bias)

    def init_state(
        self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None
    ) -> GatedLRUState:
        lru = self.lru.init_state(batch, extra, device=device)
        reach = self.conv_weight.shape[0] - 1
        conv = lru.h.new_zeros(batch, reach, *extra, self.lru.width)
        return GatedLRUState(conv=conv, lru=lru)

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: GatedLRUState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], GatedLRUState]:
        x, state = self.start(x, state, reset, mask)
        gate = F.gelu(self.linear_y(x), approximate="tanh")
        v, conv = causal_conv(self.linear_x(x), self.conv_weight, self.conv_bias, state.conv, reset=reset, mask=mask)
        v, lru = self.lru(v, state.lru, reset=reset, mask=mask)
        y = self.linear_out(v * gate)
        y = y if mask is None else where_steps(mask, y)
        return y, GatedLRUState(conv=conv, lru=lru)

    def traceable(self) -> dict[str, tuple[str, ...]]:
        own = {"conv": ("exact", "own", "instant"), "linear_x": ("own", "exact", "instant")}
        return own | {f"lru.{group}": kinds for group, kinds in self.lru.traceable().items()}

    def advance_traces(
        self,
        traces: Mapping[str, Tensor] | None,
        x: Float[Tensor, "B T *E D"],
        state: GatedLRUState,
        kinds: Mapping[str, str] | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> dict[str, Tensor]:
        """Names and shapes as of `gated_traces`, those of the unit with `lru.` before them."""
        x, state = self.start(x, state, reset, mask)
        wide = state.lru.h.dtype
        x, taps = side_by_side(x.to(wide)), self.conv_weight.to(wide)
        u = F.linear(x, self.linear_x.weight.to(wide), self.linear_x.bias.to(wide))
        ring = state.conv.reshape(*state.conv.shape[:2], *u.shape[2:])
        v, _ = causal_conv(u, taps, self.conv_bias.to(wide), ring, reset=reset, mask=mask)
        unit = self.lru.traced(v, state.lru, reset, mask)
        kinds = {name.removeprefix("lru."): kind for name, kind in self.kinds(kinds).items()}
        past = None if traces is None else {name.removeprefix("lru."): e for name, e in traces.items()}
        after = gated_traces(past, unit, Fed(x, u, ring, taps), kinds, reset, mask)
        return {f"lru.{name}" if name.split(".")[0] in self.lru.traceable() else name: e for name, e in after.items()}

    def trace_gradients(
        self, traces: Mapping[str, Tensor], state: GatedLRUState, dstate: GatedLRUState
    ) -> dict[str, Tensor]:
        units = {name[4:]: e for name, e in traces.items() if name.startswith("lru.")}
        found = {f"lru.{name}": part for name, part in self.lru.trace_gradients(units, state.lru, dstate.lru).items()}
        heads = len(self.lru.input_gate.bias)
        if dstate.lru.h is not None:
            dh = side_by_side(dstate.lru.h[:, None])[:, 0]
            for name in traces.keys() & {"conv_weight", "conv_bias", "linear_x.weight", "linear_x.bias"}:
                e, axes = traces[name], 3 + name.endswith("weight")
                if e.ndim == axes:
                    part = torch.einsum("bs...j,bsj->...j", e, dh)
                else:
                    e, by_heads = e.unflatten(-1, (heads, -1)), dh.unflatten(-1, (heads, -1))
                    part = torch.einsum("bs...ihj,bshj->...hi", e, by_heads).flatten(-2)
                found[name] = part.T if name == "linear_x.weight" else part
        if "inputs" in traces and dstate.conv is not None:
            dconv = side_by_side(dstate.conv)
            ring = torch.einsum("bksw,bksd->wd", dconv, traces["inputs"])
            for name, part in (("linear_x.weight", ring[:, :-1]), ("linear_x.bias", ring[:, -1])):
                found[name] = found[name] + part if name in found else part
        return found

    def roles(self) -> dict[str, Role]:
        own = {"conv_weight": Role.CONV, "conv_bias": Role.BIAS}
        for name in ("linear_x", "linear_y", "linear_out"):
            own |= {f"{name}.weight": Role.MATRIX, f"{name}.bias": Role.BIAS}
        return own | prefix("lru", self.lru.roles())


def by_head(part: Tensor, heads: int) -> Tensor:
    """`(..., I, H J)` as `(H, I, J)`, and `(H J,)` as `(H, J)`."""
    part = part.unflatten(-1, (heads, -1))
    return part.movedim(-2, 0)


def check_heads(name: str, width: int, num_heads: int) -> None:
    """Raise `UsageError` unless `num_heads` divides `width`."""
    if width < 1 or num_heads < 1 or width % num_heads:
        raise UsageError(f"{name}: width {width} cannot be split into {num_heads} heads; choose a divisor of the width")
