"""Multi-scale state space model: a learned filter bank, a small state space on each of its bands, and a sum of them
whose weights come from the input.

    b_t = (x_t, d^1_t … d^S_t, a^S_t)                                      M = S + 2 bands of `filter_bank`
    h_t[m, n] = exp(dt A) h_{t-1}[m, n] + b_t[m],                          A[m, n] = -exp(log_rate[m, n])
    y_t[m] = sum_n C[m, n] (exp(dt A) - 1) / A h_t[m, n] + skip[m] b_t[m]
    z_t = sum_m e_t[m] y_t[m],   e_t = W x_t + w

channel by channel, for each band m from fine to coarse. Selective: dt_t[m] = softplus(W_m s_t + w_m), with s_t, B_t and
C_t linear in x_t, and h_t[m, n] = exp(dt_t A) h_{t-1}[m, n] + dt_t B_t[m, n] b_t[m].

Scales start with memories of their own: all rates together are 1 … M N, the smallest for the coarsest band.

Paper: Karami et al. 2025, MS-SSM, arXiv:2512.23824; ms-ssm.md sections 2.1 to 2.8. There is no reference code.
Departures: the exponential of the paper's discretization has the -1 outside, and its interval of rates is moved by one
scale, since as printed the coarsest would grow. What weighs the input there weighs the output here, and B is 1, since
only its product with C matters; where both depend on the input, it is weighed by dt B as in Mamba. Filters start as
those of MultiresConv, C from a standard normal, dt from 0.001 … 0.1, skip and w from 1; the paper says nothing about
them. Complex states start at -1/2 + iπ (rate - 1), so that all of them together are S4D-Lin (Gu et al. 2022,
arXiv:2206.11893, section 4). State, rates and steps are at least float32.
Cost: O(T D (S K + M N)) time, D ((K-1)(2^S - 1) + M N) floats of state, whatever the length.
"""

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.module import _has_any_global_hook

from pliant.core import Role, UsageError
from pliant.core.roles import prefix
from pliant.kernels import scale_scan
from pliant.kernels._scale_scan import selective_scales
from pliant.kernels._scale_step import Arrays, Common, Invariant, Selective, scale_step
from pliant.mixers._multi_scale_traces import advance, gradients
from pliant.mixers.base import SequenceMixer, where_steps
from pliant.mixers.multires import FILTERS, FilterBank, FoldedBank, FoldedFilter, as_streams_of
from pliant.mixers.s6 import MAX_STEP, MIN_STEP, _repeated, _streams

WEIGHTS = ("linear", "softmax", "channel", "static")
SMALL = 1e-2
"""Of |dt A|; below it, (exp(dt A) - 1) / dt A is the sum of its first terms."""


class MultiScaleState(NamedTuple):
    """history `(B, *E, R, D)`: samples of each level, oldest first; h `(B, *E, M, N, D)`, complex h in two parts."""

    history: Tensor
    h: Tensor


class FoldedScaleState(NamedTuple):
    """The same of a folded layer, whose history `(B, *E, R, D)` holds the last R inputs."""

    history: Tensor
    h: Tensor


class MultiScaleSSM(SequenceMixer):
    """Mix over time at many scales. `(B, T, *E, D) -> (B, T, *E, D)`.

    Args:
        width: D.
        levels: S of the filter bank, of which there is none with 0: then a single state space, S4D or S6 without block.
        taps: K of each filter.
        state_per_scale: N.
        selective: whether steps, inputs and outputs of the state spaces depend on the input.
        weights: of the scales: `"linear"` in the input, any sign; `"softmax"` of that; `"channel"`: linear, for each
            channel; `"static"`: learned, the same for all inputs.
        filters: what those of the bank start with: `"uniform"`, `"haar"` or `"daubechies"`, see `FilterBank`.
        complex_states: whether states rotate.
        own_rates: whether each scale starts with rates of its own; else all with those of the coarsest.
        rank: width of the bottleneck before selective steps; None means D / 16, rounded up.
        form: of the recurrence over more than one step, see `scale_scan`: `"fft"` convolves whole sequences, where
            neither flags nor selection keep from it; rounding and what is not finite then reach the past.

    Raises:
        UsageError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        width: int,
        levels: int = 3,
        taps: int = 4,
        state_per_scale: int = 4,
        selective: bool = False,
        *,
        weights: str = "linear",
        filters: str = "uniform",
        complex_states: bool = False,
        own_rates: bool = True,
        rank: int | None = None,
        form: str | None = None,
    ):
        super().__init__()
        rank = -(-width // 16) if rank is None else rank
        for name, size, least in (("width", width, 1), ("levels", levels, 0), ("state_per_scale", state_per_scale, 1),
                                  ("rank", rank, 1), ("taps", taps, 1)):  # fmt: skip
            if size < least:
                raise UsageError(f"MultiScaleSSM: {name} is {size}, expected at least {least}")
        if filters not in FILTERS:
            raise UsageError(f"MultiScaleSSM: filters are {filters!r}, expected one of {', '.join(FILTERS)}")
        if weights not in WEIGHTS or form not in (None, "fft"):
            raise UsageError(
                f"MultiScaleSSM: weights are {weights!r} and form is {form!r}; expected one of {', '.join(WEIGHTS)}, "
                "and 'fft' or None"
            )
        self.width, self.scales, self.selective, self.form = width, levels + 2 if levels else 1, selective, form
        self.bank: FilterBank | FoldedBank | None = FilterBank(width, levels, taps, filters) if levels else None
        shape = (self.scales, state_per_scale, width)
        rates = first_rates(self.scales if own_rates else 1, state_per_scale).expand(shape[:2])[..., None].expand(shape)
        self.log_rate = nn.Parameter((torch.full_like(rates, 0.5) if complex_states else rates).log())
        self.frequency = nn.Parameter(math.pi * (rates - 1)) if complex_states else None
        steps = torch.exp(torch.rand(self.scales, width) * math.log(MAX_STEP / MIN_STEP) + math.log(MIN_STEP))
        parts = (2,) if complex_states else ()
        if selective:
            self.linear_select = nn.Linear(width, rank + (2 + complex_states) * shape[0] * shape[1], bias=False)
            self.step_weight = nn.Parameter(torch.empty(self.scales, rank, width).uniform_(-(rank**-0.5), rank**-0.5))
            # softplus(bias) = step
            self.step_bias = nn.Parameter(steps + torch.log(-torch.expm1(-steps)))
        else:
            self.log_step = nn.Parameter(steps.log())
            self.read = nn.Parameter(torch.randn(*parts, *shape))
        self.skip = nn.Parameter(torch.ones(self.scales, width))
        self.weights = ScaleWeights(width, self.scales, weights)
        self._arrays, self._no_filters = Arrays(), torch.empty(0, 2, 1, width)

    def init_state(
        self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None
    ) -> MultiScaleState | FoldedScaleState:
        device = self.skip.device if device is None else device
        dtype = torch.promote_types(self.skip.dtype, torch.float32)
        reach = 0 if self.bank is None else self.bank.reach
        history = torch.zeros(batch, *extra, reach, self.width, dtype=dtype, device=device)
        parts = () if self.frequency is None else (2,)
        return self._carried(history, history.new_zeros(batch, *extra, *self.log_rate.shape, *parts))

    @property
    def _carried(self) -> type[MultiScaleState] | type[FoldedScaleState]:
        return FoldedScaleState if isinstance(self.bank, FoldedBank) else MultiScaleState

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: MultiScaleState | FoldedScaleState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], MultiScaleState | FoldedScaleState]:
        x, state = self.start(x, state, reset, mask)
        if not isinstance(state, self._carried):
            raise UsageError(
                f"MultiScaleSSM: the state is a {type(state).__name__}, expected {self._carried.__name__}; a layer and "
                "what fold makes of it do not continue each other"
            )
        streams = _streams(x)  # extra axes share time, but not what depends on the input
        reset, mask = (_repeated(flag, streams.shape[0]) for flag in (reset, mask))
        if streams.shape[1] == 1 and (found := self._one_step(streams, state, reset, mask)) is not None:
            return found[0].reshape(x.shape), found[1]
        history, h = state.history.flatten(0, -3), self._numbers(state.h).flatten(0, -4)
        if self.bank is None:
            bands = streams[None]
        else:
            bands, history = self.bank(streams, history, reset, mask)
        z, h = (self._select if self.selective else self._invariant)(streams, bands, h, reset, mask)
        h = torch.view_as_real(h) if h.is_complex() else h
        return as_streams_of(x, z), self._carried(history.reshape(state.history.shape), h.reshape(state.h.shape))

    def _one_step(
        self, x: Tensor, state: MultiScaleState | FoldedScaleState, reset: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, MultiScaleState] | None:
        """In inference, one step `(B, 1, D)` in one pass; None where that is for plain torch to do."""
        if self.frequency is not None or self.weights.kind == "channel" or torch.is_grad_enabled():
            return None
        if torch.compiler.is_compiling() or torch.compiler.is_exporting() or not self._bare():
            return None
        own: dict[str, Any] = self._parameters
        filters: Any = self._no_filters if self.bank is None else self.bank._parameters["weight"]
        common = Common(filters, own["skip"], *self.weights.matrix())
        system: Invariant | Selective
        if self.selective:
            select = self.linear_select.weight
            system = Selective(own["log_rate"], own["step_weight"], own["step_bias"], select)
        else:
            system = Invariant(own["log_rate"], own["log_step"], own["read"])
        history, h = state.history.flatten(0, -3), state.h.flatten(0, -4)
        at_reset, there = (None if flag is None else flag[:, 0] for flag in (reset, mask))
        one, normalize = x[:, 0].contiguous(), self.weights.kind == "softmax"
        found = scale_step(one, (*common, *system), self._arrays, history, h, at_reset, there, normalize)
        if found is None:
            return None
        z, history, h = found
        return z, MultiScaleState(history.reshape(state.history.shape), h.reshape(state.h.shape))

    def _bare(self) -> bool:
        """Whether all parts are as they were made, and nobody listens to them."""
        parts = [*self._modules.values(), *self.weights._modules.values()]
        return not _has_any_global_hook() and not any(
            type(part) not in (FilterBank, ScaleWeights, nn.Linear)
            or part._forward_hooks
            or part._forward_pre_hooks
            or "forward" in part.__dict__
            for part in parts
            if part is not None
        )

    def _invariant(
        self, x: Tensor, bands: Tensor, h: Tensor, reset: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        decay, read = self.system()
        form = self.form if reset is None and mask is None and x.shape[1] > 1 else None
        weights, skip = self.weights(x), self.skip
        if weights is None:
            own = self.weights.static.to(read.real.dtype)[:, None]
            return scale_scan(bands, decay, own[:, None] * read, own * skip, None, h, reset, mask, form=form)
        if weights.ndim == 3:
            return scale_scan(bands, decay, read, skip, weights, h, reset, mask, form=form)
        each = [slice(m, m + 1) for m in range(self.scales)]
        found = [scale_scan(bands[m], decay[m], read[m], skip[m], None, h[:, m], reset, mask, form=form) for m in each]
        z = sum_over_scales(torch.stack([y for y, _ in found]), weights)
        return (z if mask is None else where_steps(mask, z)), torch.cat([last for _, last in found], 1)

    def _select(
        self, x: Tensor, bands: Tensor, h: Tensor, reset: Tensor | None, mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        scales, size, _ = self.log_rate.shape
        rank = self.step_weight.shape[1]
        step, chosen = self.linear_select(x).tensor_split([rank], -1)
        step = step[None].expand(scales, *step.shape) @ self.step_weight[:, None] + self.step_bias[:, None, None]
        inputs, *outputs = chosen.unflatten(-1, (-1, scales, size)).unbind(-3)
        C = outputs[0] if self.frequency is None else torch.complex(*(part.to(h.real.dtype) for part in outputs))
        dt = F.softplus(step.to(h.real.dtype))
        y, h = selective_scales(bands, dt, self.rates(), inputs, C, self.skip, h, reset, mask)
        z = sum_over_scales(y, self.weights.at(x))
        return (z if mask is None else where_steps(mask, z)), h

    def traceable(self) -> dict[str, tuple[str, ...]]:
        """What reads the states, `skip` and `weights` need no traces; `linear_select` has exact ones as in `S6`, which
        are M N D² numbers twice. Folded, a layer has none."""
        rates = ("log_rate", "frequency") if self.frequency is not None else ("log_rate",)
        steps = ("step_weight", "step_bias") if self.selective else ("log_step",)
        if isinstance(self.bank, FoldedBank):
            return {}
        bank = ("bank",) if self.bank is not None else ()
        groups: dict[str, tuple[str, ...]] = dict.fromkeys((*rates, *steps, *bank), ("exact", "instant"))
        return groups | ({"linear_select": ("instant", "exact")} if self.selective else {})

    def advance_traces(
        self,
        traces: Mapping[str, Tensor] | None,
        x: Float[Tensor, "B T *E D"],
        state: MultiScaleState,
        kinds: Mapping[str, str] | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> dict[str, Tensor]:
        """See `pliant.mixers._multi_scale_traces` for names and shapes."""
        x, state = self.start(x, state, reset, mask)
        shape, streams = (x.shape[0], math.prod(x.shape[2:-1])), _streams(x.to(state.history.dtype))
        reset, mask = (_repeated(flag, streams.shape[0]) for flag in (reset, mask))
        history, h = state.history.flatten(0, -3), self._numbers(state.h).flatten(0, -4)
        past = self._of_streams(traces or {})
        after = advance(self, past, streams, history, h, reset, mask, self.kinds(kinds))
        return {name: (torch.view_as_real(e) if e.is_complex() else e).unflatten(0, shape) for name, e in after.items()}

    def trace_gradients(
        self, traces: Mapping[str, Tensor], state: MultiScaleState, dstate: MultiScaleState
    ) -> dict[str, Tensor]:
        if dstate.h is None:
            return {}
        dh = self._numbers(dstate.h).flatten(0, -4).conj()
        dhistory = None if dstate.history is None else dstate.history.flatten(0, -3)
        return gradients(self, self._of_streams(traces), dh, dhistory)

    def _of_streams(self, traces: Mapping[str, Tensor]) -> dict[str, Tensor]:
        streams = {name: e.flatten(0, 1) for name, e in traces.items()}
        return {name: e if name == "samples" else self._numbers(e) for name, e in streams.items()}

    def rates(self) -> Shaped[Tensor, "M N D"]:
        """A: negative, or with a negative real part; at least float32."""
        wide = torch.promote_types(self.log_rate.dtype, torch.float32)
        real = -torch.exp(self.log_rate.to(wide))
        return real if self.frequency is None else torch.complex(real, self.frequency.to(wide))

    def system(self) -> tuple[Shaped[Tensor, "M N D"], Shaped[Tensor, "M N D"]]:
        """exp(dt A) and C (exp(dt A) - 1) / A of a layer that is not selective, for `scale_scan`."""
        A = self.rates()
        decay, gain = zero_order_hold(A, torch.exp(self.log_step.to(A.real.dtype))[:, None])
        read = self._numbers(self.read.to(A.real.dtype).movedim(0, -1) if A.is_complex() else self.read.to(A.dtype))
        return decay, read * gain

    def _numbers(self, x: Tensor) -> Tensor:
        return x if self.frequency is None else torch.view_as_complex(x.contiguous())

    def time_constants(self) -> Float[Tensor, "..."]:
        """Steps in which each state forgets all but 1/e, with selective steps at their bias."""
        log_step = F.softplus(self.step_bias).log() if self.selective else self.log_step
        return torch.exp(-log_step[:, None] - self.log_rate).flatten()

    def fold(self) -> SequenceMixer:
        """A copy for inference, equal up to rounding, by independent filters of x; its states are its own.

        With weights that are static and not selective, the whole layer becomes a `FoldedFilter`; else the bank alone
        is exchanged, by a `FoldedBank`. States of the layer do not fit either, and are refused.
        """
        with torch.no_grad():
            if not self.selective and self.weights.kind == "static":
                return self._fold()
            folded = copy.deepcopy(self).requires_grad_(False)
            if isinstance(self.bank, FilterBank):
                folded.bank = self.bank.fold()
            return folded

    def _fold(self) -> FoldedFilter:
        """Up to the reach of the bank what the layer answers to an impulse; from there on its states, whose input is
        that late."""
        twin = copy.deepcopy(self).double()
        assert not isinstance(twin.bank, FoldedBank)
        responses = twin.skip.new_ones(1, 1, self.width) if twin.bank is None else twin.bank.responses()
        reach = responses.shape[1] - 1
        decay, read = twin.system()
        weights = twin.weights.static[:, None]
        taps = (responses * (weights * twin.skip)[:, None]).sum(0)
        if reach:
            taps[:-1] = twin(F.pad(torch.ones(1, 1, self.width, dtype=taps.dtype), (0, 0, 0, reach - 1)))[0][0]
        ages = torch.arange(reach, -1, -1)[:, None, None, None]
        late = (responses.movedim(1, 0)[:, :, None] * decay**ages).sum(0)
        read = weights[:, None] * read * late
        folded = FoldedFilter(taps, decay.flatten(0, 1), read.flatten(0, 1))
        return folded.to(torch.promote_types(self.skip.dtype, torch.float32))

    def roles(self) -> dict[str, Role]:
        roles = {"log_rate": Role.DECAY, "skip": Role.GAIN} | prefix("weights", self.weights.roles())
        if self.bank is not None:
            roles |= prefix("bank", self.bank.roles())
        if self.frequency is not None:
            roles["frequency"] = Role.DECAY
        if self.selective:
            return roles | {
                "linear_select.weight": Role.MATRIX,
                "step_weight": Role.GATE,
                "step_bias": Role.DECAY,
            }
        return roles | {"log_step": Role.DECAY, "read": Role.CONV}


class ScaleWeights(nn.Module):
    """Weights e of M scales, from the input or learned."""

    def __init__(self, width: int, scales: int, kind: str):
        super().__init__()
        self.kind, self.scales, self.width = kind, scales, width
        if kind == "static":
            self.static = nn.Parameter(torch.ones(scales))
            return
        self.linear = nn.Linear(width, scales * width if kind == "channel" else scales)
        nn.init.normal_(self.linear.weight, std=width**-0.5)
        nn.init.ones_(self.linear.bias)

    def forward(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T M *D"] | None:
        """None if they are the same for all inputs."""
        if self.kind == "static":
            return None
        weights = self.linear(x)
        if self.kind == "softmax":
            return weights.softmax(-1)
        return weights.unflatten(-1, (self.scales, -1)) if self.kind == "channel" else weights

    def matrix(self) -> tuple[Tensor, Tensor]:
        """Matrix `(M, D)`, or `(0, D)` where nothing depends on the input, and bias `(M,)`."""
        if self.kind == "static":
            return self.static[:0, None].expand(0, self.width), self.static
        return self.linear.weight, self.linear.bias

    def at(self, x: Float[Tensor, "B T D"]) -> Float[Tensor, "B T M *D"]:
        """The same, also where they do not depend on the input."""
        weights = self(x)
        return self.static.expand(*x.shape[:2], -1) if weights is None else weights

    def roles(self) -> dict[str, Role]:
        if self.kind == "static":
            return {"static": Role.GAIN}
        mixes = Role.GATE if self.kind == "softmax" else Role.MATRIX
        return {"linear.weight": mixes, "linear.bias": Role.BIAS}


def sum_over_scales(y: Float[Tensor, "M B T D"], weights: Float[Tensor, "B T M *D"]) -> Float[Tensor, "B T D"]:
    """sum_m e_t[m] y_t[m]; one scale after the other, since all products at once are as large as all outputs."""
    weights = weights.to(y.dtype)
    weights = weights[..., None] if weights.ndim == 3 else weights
    z = weights[:, :, 0] * y[0]
    for m in range(1, len(y)):
        z = torch.addcmul(z, weights[:, :, m], y[m])
    return z


def first_rates(scales: int, size: int) -> Float[Tensor, "M N"]:
    """1 … M N, from the finest scale with the largest to the coarsest with the smallest."""
    return torch.arange(scales * size, 0, -1.0).unflatten(0, (scales, size)).flip(1)


def zero_order_hold(A: Shaped[Tensor, "*S"], dt: Float[Tensor, "*#S"]) -> tuple[Shaped[Tensor, "*S"], Tensor]:
    """exp(dt A) and (exp(dt A) - 1) / A, exact also where dt A is small; ms-ssm.md 2.1."""
    z = dt * A
    series = dt * (1 + z / 2 * (1 + z / 3 * (1 + z / 4 * (1 + z / 5 * (1 + z / 6)))))
    small = z.abs() < SMALL
    far = torch.where(small, 1, z)
    return torch.exp(z), torch.where(small, series, dt * torch.expm1(far) / far)
