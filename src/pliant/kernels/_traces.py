"""Traces: derivatives of the state of an element-wise recurrence by its parameters, carried forward.

    h_t = a_t h_{t-1} + u_t,    e_t = dh_t/dp = a_t e_{t-1} + s_t,    s_t = (da_t/dp) h_{t-1} + du_t/dp

so over a chunk of T steps, in one product of matrices where s_t is one,

    e_T = (a_1 … a_T) e_0 + sum_t (a_{t+1} … a_T) s_t

and a gradient of a later loss that has flowed back to the state of the border goes on to all the past before it as
dL/dp = dL/dh_T e_T. Memory and time do not depend on how far back that is. After a reset e is that of the new
episode alone.

Papers: Williams & Zipser 1989 (real-time recurrent learning); Zucchet et al. 2023, arXiv:2305.15947;
online-gradients.md 2.0, 2.4. Arrays are (B, T, S, ·): streams, steps, units side by side; channels stand last.
"""

import copy
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor

from pliant.kernels._causal_conv import causal_conv
from pliant.kernels._gated_scan import DECAY_POWER, MAX_SQRT_DERIVATIVE
from pliant.kernels._linear_scan import scan_loop


class Border:
    """What a chunk leaves of the traces before it, and of what each of its steps brings.

    Args:
        a: decays `(B, T, S, *C)`, one where a step does not exist.
        reset: `(B, T)`, true where what came before is dropped.
    """

    def __init__(self, a: Shaped[Tensor, "B T S *C"], reset: Bool[Tensor, "B T"] | None):
        self.kept: Tensor | None = None
        self.dropped: Tensor | None = None
        if reset is not None:
            later = reset.flip(1).cumsum(1).flip(1) - reset.long()
            self.kept = later == 0
            # Zero also where something that is not finite stands before the reset.
            a = torch.where(_over(self.kept & ~reset, a), a, 0)
            self.dropped = reset.any(1)
        after = torch.ones_like(a)
        for t in range(a.shape[1] - 2, -1, -1):
            after[:, t] = after[:, t + 1] * a[:, t + 1]
        self.after = after
        self.whole = a[:, 0] * after[:, 0] if a.shape[1] else a.new_ones(a.shape[0], *a.shape[2:])

    def of(self, channels: slice) -> "Border":
        """The same for some of the first channels."""
        part = copy.copy(self)
        part.after, part.whole = self.after[:, :, :, channels], self.whole[:, :, channels]
        return part

    def left(self, source: Shaped[Tensor, "B T S *C"]) -> Shaped[Tensor, "B T S *C"]:
        """What is left of each step's source at the end of the chunk."""
        return self.after * self.since(source)

    def since(self, x: Shaped[Tensor, "B T S *C"]) -> Shaped[Tensor, "B T S *C"]:
        """x since the last reset, zero before it, so that nothing non-finite gets through."""
        return x if self.kept is None else torch.where(_over(self.kept, x), x, 0)

    def onto(self, trace: Tensor | None, gained: Tensor) -> Tensor:
        """The trace `(B, S, *P, *C)` at the end, from that at the start and the sum of what is left."""
        if trace is None:
            return gained
        whole = self.whole.reshape(*self.whole.shape[:2], *[1] * (trace.ndim - self.whole.ndim), *self.whole.shape[2:])
        rest = whole * trace
        if self.dropped is not None:
            rest = torch.where(self.dropped.reshape(-1, *[1] * (rest.ndim - 1)), 0, rest)
        return rest.add_(gained)


class GatedSlopes(NamedTuple):
    """Derivatives of each state of the gated LRU at its own step, the state before held fixed; `(B, T, S, W)`."""

    decay_gate: Tensor  # by the pre-activation of the decay gate
    input_gate: Tensor  # by that of the input gate
    decay: Tensor  # by Λ
    value: Tensor  # by the input, not through the gates


def gated_slopes(
    x: Float[Tensor, "B T S W"],
    input_gate: Float[Tensor, "B T S W"],
    decay_gate: Float[Tensor, "B T S W"],
    decay: Float[Tensor, "W"],
    h0: Float[Tensor, "B S W"],
    first: Bool[Tensor, "B T"],
    reset: Bool[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "B T S W"], GatedSlopes]:
    """Decays, and the derivatives of the states; with `gated_scan`'s bounded derivative of the root.

    Args:
        x: inputs; input_gate, decay_gate: pre-activations; decay: Λ; h0: state before; first: no scale there.
    """
    i, r = torch.sigmoid(input_gate), torch.sigmoid(decay_gate)
    rate = torch.nn.functional.softplus(decay)
    log_a = -DECAY_POWER * r * rate
    a, square = torch.exp(log_a), torch.exp(2 * log_a)
    begins = first[..., None, None]
    scale = torch.where(begins, 1, torch.sqrt(1 - square))
    slope = torch.where(begins, 0, 1 / torch.sqrt((4 * (1 - square)).clamp(min=MAX_SQRT_DERIVATIVE**-2)))
    if mask is not None:
        a = torch.where(mask[..., None, None], a, 1)
    before = states_before(a, x * i * scale if mask is None else torch.where(_over(mask, x), x * i * scale, 0), h0,
                           reset)  # fmt: skip
    by_log = a * before - 2 * square * i * x * slope
    slopes = GatedSlopes(
        decay_gate=by_log * -DECAY_POWER * rate * r * (1 - r),
        input_gate=scale * x * i * (1 - i),
        decay=by_log * -DECAY_POWER * r * torch.sigmoid(decay),
        value=scale * i,
    )
    if mask is not None:
        for slope in slopes:
            slope.masked_fill_(_over(~mask, x), 0)
    return a, slopes


def states_before(
    a: Shaped[Tensor, "B T *C"], u: Shaped[Tensor, "B T *C"], h0: Shaped[Tensor, "B *C"], reset: Tensor | None
) -> Shaped[Tensor, "B T *C"]:
    """h_{t-1} at each step of h_t = a_t h_{t-1} + u_t; zero at a reset."""
    h, _ = scan_loop(a.flatten(2), u.flatten(2), h0.flatten(1), reset)
    before = torch.cat([h0[:, None], h.reshape(u.shape)[:, :-1]], 1) if u.shape[1] else u
    return before if reset is None else torch.where(_over(reset, before), 0, before)


def tapped(
    x: Float[Tensor, "B T S C"], taps: int, ring: Float[Tensor, "B R S C"] | None, reset: Tensor | None,
    mask: Tensor | None,
) -> tuple[Float[Tensor, "B T S K C"], Float[Tensor, "B R S C"]]:  # fmt: skip
    """What each tap of a causal convolution reads at each step, zero where there is nothing; and the last inputs."""
    width = x.shape[-1]
    ones = torch.eye(taps, dtype=x.dtype, device=x.device)[:, :, None].expand(-1, -1, width).flatten(1)
    before = None if ring is None else ring.repeat(1, 1, 1, taps)
    found, last = causal_conv(x.repeat(1, 1, 1, taps), ones, None, before, reset=reset, mask=mask)
    return found.unflatten(-1, (taps, width)), last[..., :width].contiguous()


def sum_of_products(left: Shaped[Tensor, "B T S I"], right: Shaped[Tensor, "B T S J"]) -> Shaped[Tensor, "B S I J"]:
    """sum_t left_t ⊗ right_t."""
    return torch.einsum("btsi,btsj->bsij", left, right)


def sum_in_heads(left: Float[Tensor, "B T S W"], right: Float[Tensor, "B T S W"], heads: int) -> Tensor:
    """sum_t left_t[h, i] right_t[h, j] `(B, S, W/H, W)`: i first, then channel (h, j)."""
    left, right = (part.unflatten(-1, (heads, -1)) for part in (left, right))
    return torch.einsum("btshi,btshj->bsihj", left, right).flatten(-2)


def _over(flag: Tensor, x: Tensor) -> Tensor:
    return flag.reshape(*flag.shape, *[1] * (x.ndim - 2))
