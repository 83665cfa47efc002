"""The filter bank as a module, the filters it starts with, and multiresolution convolution, which is that and a sum.

    y_t = sum_m w[m] b_t[m],   b = (x, d^1 … d^S, a^S)                the bands of `filter_bank`

Paper: Shi, Wang and Fox 2023, Sequence Modeling with Multiresolution Convolutional Memory, arXiv:2305.01638, section 3;
code read: `MultiresLayer` with "fading" selection. Daubechies 1988, Orthonormal bases of compactly supported wavelets.
Departures: the nonlinearity and dropout behind the layer are the block's; resets, masks and carried samples are ours.
Cost: O(T S K D) time, (K-1)(2^S - 1) D floats of state, whatever the length.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from pliant.core import Role, UsageError
from pliant.kernels import filter_bank
from pliant.kernels._causal_conv import causal_conv
from pliant.kernels._scale_scan import scale_scan
from pliant.mixers.base import SequenceMixer
from pliant.mixers.s6 import _repeated, _streams

FILTERS = ("uniform", "haar", "daubechies")
MAX_LEVELS = 16


class FilterBank(nn.Module):
    """Learned filters for S levels. x `(B, T, D)` -> bands `(S+2, B, T, D)` and the samples carried on.

    Args:
        width: D.
        levels: S.
        taps: K.
        filters: `"uniform"`: each tap is drawn from ±1/sqrt(K); `"haar"`: mean and half the difference of two
            neighbors; `"daubechies"`: of K / 2 vanishing moments, their sum 1.
        shared: one pair of filters for all levels.

    Raises:
        UsageError: there are no such levels, taps or filters.
    """

    def __init__(self, width: int, levels: int, taps: int, filters: str = "uniform", shared: bool = False):
        super().__init__()
        if width < 1 or taps < 1 or not 1 <= levels <= MAX_LEVELS:
            raise UsageError(
                f"FilterBank: width is {width}, taps {taps} and levels {levels}; expected at least 1, and 1 to "
                f"{MAX_LEVELS} levels"
            )
        self.levels, self.reach = levels, (taps - 1) * (2**levels - 1)
        self.weight = nn.Parameter(torch.empty(1 if shared else levels, 2, taps, width))
        if filters == "uniform":
            nn.init.uniform_(self.weight, -(taps**-0.5), taps**-0.5)
        else:
            with torch.no_grad():
                self.weight.copy_(wavelet(filters, taps)[..., None])

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        history: Float[Tensor, "B R D"],
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "M B T D"], Float[Tensor, "B R D"]]:
        return filter_bank(x, self.weight.expand(self.levels, -1, -1, -1), history, reset, mask)

    def responses(self) -> Float[Tensor, "M L D"]:
        """What each band answers to an impulse, `(S+2, R+1, D)` float64, newest first: the filters, composed."""
        impulse = self.weight.new_zeros(1, self.reach + 1, self.weight.shape[-1], dtype=torch.float64)
        impulse[:, 0] = 1
        weight = self.weight.detach().double().expand(self.levels, -1, -1, -1)
        return filter_bank(impulse, weight)[0].squeeze(1)

    def fold(self) -> "FoldedBank":
        """The same bands by independent filters of x."""
        return FoldedBank(self.responses().flip(1).to(self.weight.dtype))

    def roles(self) -> dict[str, Role]:
        return {"weight": Role.CONV}


def wavelet(name: str, taps: int) -> Float[Tensor, "2 K"]:
    """Low-pass and high-pass filter, float64, the last tap for the current step; the low-pass taps add to one.

    Raises:
        UsageError: no filters of that name and length.
    """
    if name == "haar" and taps >= 2:
        low = torch.zeros(taps, dtype=torch.float64)
        low[-2:] = 0.5
    elif name == "daubechies" and taps >= 2 and taps % 2 == 0:
        low = torch.from_numpy(_daubechies(taps // 2))
    else:
        raise UsageError(
            f"filters are {name!r} with {taps} taps; expected one of {', '.join(FILTERS)}, two taps or more for haar, "
            "and an even number of them for daubechies"
        )
    # The alternating flip, with the sign that lets a band of two taps be the current step less the one before it.
    sign = torch.tensor([(-1.0) ** (taps - 1 - k) for k in range(taps)], dtype=torch.float64)
    if name == "haar":
        return torch.stack([low, sign * low])
    return torch.stack([low, sign * low.flip(0)])


def _daubechies(moments: int) -> np.ndarray:
    """The low-pass filter of extremal phase: ((1 + z) / 2)^p times the factors (z - r) / (1 - r) with |r| < 1.

    r are the zeros of sum_k C(p-1+k, k) y^k with y = (2 - z - 1/z) / 4, of which half lie within the unit circle.
    """
    half = [math.comb(moments - 1 + k, k) for k in reversed(range(moments))]
    filters = np.array([1.0])
    for _ in range(moments):
        filters = np.convolve(filters, [0.5, 0.5])
    for y in np.roots(half):
        r = min(np.roots([1, 4 * y - 2, 1]), key=abs)
        filters = np.convolve(filters, np.array([1, -r]) / (1 - r))
    return np.ascontiguousarray(filters.real)


class MultiresState(NamedTuple):
    """history `(B, *E, R, D)`: samples of each level, oldest first; R = (K-1)(2^S - 1)."""

    history: Tensor


class MultiresConv(SequenceMixer):
    """Weigh the bands of a filter bank and add them. `(B, T, *E, D) -> (B, T, *E, D)`.

    Args:
        width: D.
        levels: S; the filters reach (K-1)(2^S - 1) steps back.
        taps: K.
        filters: what they start with, see `FilterBank`.
        shared: one pair of filters for all levels, as in the paper.

    Raises:
        UsageError: sizes or filters that are none.
    """

    def __init__(self, width: int, levels: int = 6, taps: int = 2, filters: str = "uniform", shared: bool = True):
        super().__init__()
        self.width = width
        self.bank = FilterBank(width, levels, taps, filters, shared)
        self.weight = nn.Parameter(torch.empty(levels + 2, width))
        nn.init.uniform_(self.weight, -((levels + 2) ** -0.5), (levels + 2) ** -0.5)

    def init_state(
        self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None
    ) -> MultiresState:
        device = self.weight.device if device is None else device
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        return MultiresState(torch.zeros(batch, *extra, self.bank.reach, self.width, dtype=dtype, device=device))

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: MultiresState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], MultiresState]:
        x, state = self.start(x, state, reset, mask)
        streams = _streams(x)
        reset, mask = (_repeated(flag, streams.shape[0]) for flag in (reset, mask))
        bands, history = self.bank(streams, state.history.flatten(0, -3), reset, mask)
        if streams.shape[1] == 1:
            y = (self.weight[:, None, None] * bands).sum(0)
        else:
            none = self.weight.new_zeros(len(self.weight), 0, self.width)  # scales without states: a sum of bands
            y, _ = scale_scan(bands, none, none, self.weight)
        return as_streams_of(x, y.to(x.dtype)), MultiresState(history.reshape(state.history.shape))

    def fold(self) -> "FoldedFilter":
        """One filter for each channel, for inference, equal up to rounding; its states are its own."""
        return FoldedFilter((self.weight.detach()[:, None] * self.bank.responses()).sum(0)).to(self.weight.dtype)

    def roles(self) -> dict[str, Role]:
        return {"weight": Role.GAIN} | {f"bank.{name}": role for name, role in self.bank.roles().items()}


def as_streams_of(x: Tensor, y: Tensor) -> Tensor:
    """y `(B E, T, D)` in the shape of x `(B, T, *E, D)`."""
    return y.reshape(x.shape[0], *x.shape[2:-1], x.shape[1], y.shape[-1]).movedim(-2, 1)


class FoldedBank(nn.Module):
    """Independent filters `(M, R+1, D)`, the last row for the current step, in place of a `FilterBank`.

    One step is one product instead of S in turn. Carried are R samples of x.
    """

    def __init__(self, taps: Float[Tensor, "M L D"]):
        super().__init__()
        self.reach = taps.shape[1] - 1
        self.register_buffer("taps", taps)

    def forward(
        self,
        x: Float[Tensor, "B T D"],
        history: Float[Tensor, "B R D"],
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "M B T D"], Float[Tensor, "B R D"]]:
        taps = self.get_buffer("taps")
        if x.shape[1] == 1 and reset is None and mask is None:
            window = torch.cat([history, x.to(history.dtype)], 1)
            return (taps[:, None] * window).sum(2, keepdim=True).to(x.dtype), window[:, 1:]
        found = [causal_conv(x, band, None, history, reset=reset, mask=mask) for band in taps]
        return torch.stack([band for band, _ in found]), found[0][1]

    def roles(self) -> dict[str, Role]:
        return {}


class FoldedState(NamedTuple):
    """history `(B, *E, R, D)`: the last inputs, oldest first; h `(B, *E, 1, N, D)`, of complex states both parts."""

    history: Tensor
    h: Tensor


class FoldedFilter(SequenceMixer):
    """A linear layer that does not change over time, as one filter per channel. `(B, T, *E, D) -> same`.

        y_t = sum_{k ≤ R} f[k] x_{t-k} + Re(sum_n c[n] h_t[n]),   h_t[n] = a[n] h_{t-1}[n] + x_{t-R}

    It has no parameters, and is made by `fold`.

    Args:
        taps: f, `(R+1, D)`, the first for the current step.
        decay: a, `(N, D)`, real or complex; None means no states.
        read: c, like `decay`.
    """

    def __init__(
        self,
        taps: Float[Tensor, "L D"],
        decay: Shaped[Tensor, "N D"] | None = None,
        read: Shaped[Tensor, "N D"] | None = None,
    ):
        super().__init__()
        self.width, self.rotates = taps.shape[1], decay is not None and decay.is_complex()
        late = torch.zeros_like(taps)
        late[-1] = 1
        self.bank = FoldedBank((taps[None] if decay is None else torch.stack([taps, late])).flip(1))
        for name, part in (("decay", decay), ("read", read)):
            part = taps.new_zeros(0, self.width) if part is None else part
            # As real numbers, so that `to` and files treat them as any other.
            self.register_buffer(name, torch.view_as_real(part) if self.rotates else part)

    def init_state(self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None) -> FoldedState:
        taps = self.bank.get_buffer("taps")
        device = taps.device if device is None else device
        dtype = torch.promote_types(taps.dtype, torch.float32)
        history = torch.zeros(batch, *extra, self.bank.reach, self.width, dtype=dtype, device=device)
        return FoldedState(history, history.new_zeros(batch, *extra, 1, *self.get_buffer("decay").shape))

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: FoldedState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], FoldedState]:
        x, state = self.start(x, state, reset, mask)
        streams = _streams(x)
        reset, mask = (_repeated(flag, streams.shape[0]) for flag in (reset, mask))
        bands, history = self.bank(streams, state.history.flatten(0, -3), reset, mask)
        y, h, decay = bands[0], state.h, self.get_buffer("decay")
        if len(decay):
            a, c, before = (self._numbers(part)[None] for part in (decay, self.get_buffer("read"), h))
            z, last = scale_scan(bands[1:], a, c, None, None, before[0].flatten(0, -4), reset, mask)
            y, h = y + z, torch.view_as_real(last) if self.rotates else last
        return as_streams_of(x, y), FoldedState(history.reshape(state.history.shape), h.reshape(state.h.shape))

    def _numbers(self, x: Tensor) -> Tensor:
        return torch.view_as_complex(x) if self.rotates else x

    def roles(self) -> dict[str, Role]:
        return {}
