"""Linear recurrent unit: a complex diagonal recurrence that does not depend on the data.

    λ = exp(-exp(log_decay) + i exp(log_phase))                       (N,)
    h_t = λ h_{t-1} + exp(log_gain) ⊙ (B x_t),   y_t = Re(C h_t) + skip ⊙ x_t

Paper: Orvieto et al. 2023, Resurrecting Recurrent Neural Networks for Long Sequences, arXiv:2303.06349, eq. 5-8;
further-mixers.md section 3. Code read: minimal-LRU, whose ranges of |λ| and phase are the defaults.
Departures: none in the numbers. log_gain starts at sqrt(1 - |λ|²), taken from the logarithm of |λ|, since the
difference loses all digits near 1; it is a parameter of its own from then on. There are no conjugate pairs and
no factor 2, and the first step of an episode is not scaled. State is at least float32.
Cost: O(T N D) time, O(N) state per stream, whatever the length.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pliant.core import Role, UsageError
from pliant.kernels import linear_scan
from pliant.kernels._lru_traces import lru_traces
from pliant.mixers.base import SequenceMixer, over_steps, side_by_side, where_steps

UNIFORM_EDGE = 1e-12
"""Draws keep away from 0 and 1, where a radius of 0 or 1 or a phase of 0 has no finite logarithm."""


class LRUState(NamedTuple):
    """h `(B, *E, N, 2)` float: real and imaginary part."""

    h: Tensor


class LRU(SequenceMixer):
    """Mix over time with a complex diagonal recurrence. `(B, T, *E, D) -> (B, T, *E, D)`.

    Args:
        width: D.
        state_size: N; None means `width`.
        min_radius, max_radius: |λ| starts in this ring, uniform in its area.
        max_phase: the phase of λ starts uniform between 0 and this, in radians.

    Raises:
        UsageError: sizes below 1, or a ring or phase that is none.
    """

    def __init__(
        self,
        width: int,
        state_size: int | None = None,
        min_radius: float = 0.0,
        max_radius: float = 1.0,
        max_phase: float = 6.28,
    ):
        super().__init__()
        state_size = width if state_size is None else state_size
        if width < 1 or state_size < 1:
            raise UsageError(f"LRU: width is {width} and state_size {state_size}, expected at least 1")
        if not 0 <= min_radius < max_radius <= 1 or max_phase <= 0:
            raise UsageError(
                f"LRU: radii are {min_radius} and {max_radius} and max_phase is {max_phase}; "
                "need 0 <= min_radius < max_radius <= 1 and a phase above 0"
            )
        self.width = width
        uniform = torch.rand(2, state_size, dtype=torch.float64)
        log_decay, log_phase, log_gain = ring(uniform, min_radius, max_radius, max_phase)
        dtype = torch.get_default_dtype()
        self.log_decay = nn.Parameter(log_decay.to(dtype))
        self.log_phase = nn.Parameter(log_phase.to(dtype))
        self.log_gain = nn.Parameter(log_gain.to(dtype))
        # Real and imaginary parts.
        self.weight_in = nn.Parameter(torch.randn(2, state_size, width) / math.sqrt(2 * width))
        self.weight_out = nn.Parameter(torch.randn(2, width, state_size) / math.sqrt(state_size))
        self.skip = nn.Parameter(torch.randn(width))

    def init_state(self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None) -> LRUState:
        device = self.skip.device if device is None else device
        dtype = torch.promote_types(self.skip.dtype, torch.float32)
        return LRUState(h=torch.zeros(batch, *extra, len(self.log_decay), 2, dtype=dtype, device=device))

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: LRUState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], LRUState]:
        x, state = self.start(x, state, reset, mask)
        wide = state.h.dtype
        gain = torch.exp(self.log_gain.to(wide))
        real, imaginary = ((x @ part.T).to(wide) * gain for part in self.weight_in)
        u = torch.complex(real, imaginary)
        a = self.eigenvalues().expand_as(u)
        if mask is not None:
            # The inputs of these steps are zero already.
            a = torch.where(over_steps(mask, u), a, 1)
        # The recurrence is element-wise, so extra axes are just more channels.
        h, last = linear_scan(a.flatten(2), u.flatten(2), torch.view_as_complex(state.h).flatten(1), reset)
        y = self._read(h.reshape(u.shape), x.dtype) + self.skip * x
        y = y if mask is None else where_steps(mask, y)
        return y, LRUState(h=torch.view_as_real(last).reshape(state.h.shape))

    def traceable(self) -> dict[str, tuple[str, ...]]:
        return dict.fromkeys(("log_decay", "log_phase", "log_gain", "weight_in"), ("exact", "instant"))

    def advance_traces(
        self,
        traces: Mapping[str, Tensor] | None,
        x: Float[Tensor, "B T *E D"],
        state: LRUState,
        kinds: Mapping[str, str] | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> dict[str, Tensor]:
        """dh/dλ `(B, S, N, 2)` and dh/dB `(B, S, D, N, 2)`, if they are wanted; log_gain needs none, since the state
        itself is its derivative (online-gradients.md 2.1b)."""
        x, state = self.start(x, state, reset, mask)
        kinds, wide = self.kinds(kinds), state.h.dtype
        x = side_by_side(x.to(wide))
        batch, _, side, width = x.shape
        gain, eigenvalues = torch.exp(self.log_gain.to(wide)), self.eigenvalues()
        u = torch.complex(*(x @ part.to(wide).T * gain for part in self.weight_in))
        h0 = torch.view_as_complex(state.h.contiguous()).reshape(batch, side, -1)
        inputs = width if kinds["weight_in"] == "exact" else 0
        before = {"eigenvalues": torch.zeros_like(h0), "weight_in": h0.new_zeros(batch, side, inputs, len(gain))}
        if traces is not None:
            before |= {name: torch.view_as_complex(e) for name, e in traces.items()}
        after = lru_traces(x, u, eigenvalues, gain, h0, before["eigenvalues"], before["weight_in"], reset, mask)
        found = dict(zip(("eigenvalues", "weight_in"), map(torch.view_as_real, after), strict=True))
        wanted = {"eigenvalues": "exact" in (kinds["log_decay"], kinds["log_phase"]), "weight_in": inputs > 0}
        return {name: e for name, e in found.items() if wanted[name]}

    def trace_gradients(self, traces: Mapping[str, Tensor], state: LRUState, dstate: LRUState) -> dict[str, Tensor]:
        if dstate.h is None:
            return {}
        # The real part of a product with this is what dL/dh does to it.
        dh = side_by_side(torch.view_as_complex(dstate.h.contiguous())[:, None])[:, 0].conj()
        h = torch.view_as_complex(state.h.contiguous()).reshape(dh.shape)
        found = {"log_gain": (dh * h).real.sum((0, 1))}
        if "eigenvalues" in traces:
            by = (dh * torch.view_as_complex(traces["eigenvalues"])).sum((0, 1)) * self.eigenvalues()
            found |= {"log_decay": (by * -torch.exp(self.log_decay.to(by.real.dtype))).real,
                      "log_phase": (by * 1j * torch.exp(self.log_phase.to(by.real.dtype))).real}  # fmt: skip
        if "weight_in" in traces:
            by = torch.einsum("bsn,bsdn->nd", dh, torch.view_as_complex(traces["weight_in"]))
            found["weight_in"] = torch.stack([by.real, -by.imag])
        return found

    def eigenvalues(self) -> Tensor:
        """λ, `(N,)` complex."""
        wide = torch.promote_types(self.log_decay.dtype, torch.float32)
        return torch.polar(torch.exp(-torch.exp(self.log_decay.to(wide))), torch.exp(self.log_phase.to(wide)))

    def time_constants(self) -> Float[Tensor, "N"]:
        """Steps in which each unit forgets all but 1/e."""
        return torch.exp(-self.log_decay)

    def _read(self, h: Tensor, dtype: torch.dtype) -> Tensor:
        """Re(C h)."""
        real, imaginary = self.weight_out
        return h.real.to(dtype) @ real.T - h.imag.to(dtype) @ imaginary.T

    def roles(self) -> dict[str, Role]:
        return {
            "log_decay": Role.DECAY,
            "log_phase": Role.DECAY,
            "log_gain": Role.GAIN,
            "weight_in": Role.MATRIX,
            "weight_out": Role.MATRIX,
            "skip": Role.GAIN,
        }


def ring(
    uniform: Float[Tensor, "2 N"], min_radius: float, max_radius: float, max_phase: float
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N"]]:
    """log_decay, log_phase and log_gain of eigenvalues that are uniform over a ring, from draws in [0, 1)."""
    area, angle = uniform.clamp(UNIFORM_EDGE, 1 - UNIFORM_EDGE)
    log_decay = torch.log(-0.5 * torch.log(area * (max_radius**2 - min_radius**2) + min_radius**2))
    log_gain = 0.5 * torch.log(-torch.expm1(-2 * torch.exp(log_decay)))
    return log_decay, torch.log(max_phase * angle), log_gain
