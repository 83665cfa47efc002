"""S6: the block of Mamba-1 around the selective scan, without norm and residual.

    u, z = W_in x;   c_t = silu(conv(u) + b)                          M = expand D channels
    step, B_t, C_t = W_x c_t;   dt = softplus(W_dt step + b_dt)       R | N | N numbers;  (M,)
    h_t[m, n] = exp(dt[m] A[m, n]) h_{t-1}[m, n] + dt[m] B_t[n] c_t[m],   A = -exp(log_rate)
    out = W_out ((sum_n C_t[n] h_t[m, n] + skip[m] c_t[m]) ⊙ silu(z))

Paper: Gu and Dao 2023, Mamba, arXiv:2312.00752, section 3; further-mixers.md section 2.
Code read for what the paper leaves open: transformers (`MambaMixer`), mambapy (`MambaBlock`).
Departures: none in the numbers. A masked step takes dt = 0 after the softplus, and leaves the convolution alone;
published code only zeroes inputs, which lets the state decay on. State is at least float32.
Cost: O(T M N) time, O(M N) state per stream, whatever the length.
"""

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role, UsageError
from pliant.kernels import causal_conv, selective_scan
from pliant.mixers.base import SequenceMixer, where_steps

MIN_STEP, MAX_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4  # of dt at the start, further-mixers.md 2.1


class S6State(NamedTuple):
    """conv `(B, K-1, *E, M)`: the last inputs of the convolution, oldest first; h `(B, *E, M, N)`."""

    conv: Tensor
    h: Tensor


class S6(SequenceMixer):
    """Mix over time with a selective state space. `(B, T, *E, D) -> (B, T, *E, D)`.

    Args:
        width: D.
        expand: channels per feature, M = expand D.
        state_size: N, states per channel.
        conv_width: taps of the convolution over time.
        rank: R, width of the bottleneck before the step sizes; None means D / 16, rounded up.

    Raises:
        UsageError: one of these is below 1.
    """

    def __init__(self, width: int, expand: int = 2, state_size: int = 16, conv_width: int = 4, rank: int | None = None):
        super().__init__()
        rank = -(-width // 16) if rank is None else rank
        sizes = {"width": width, "expand": expand, "state_size": state_size, "conv_width": conv_width, "rank": rank}
        for name, size in sizes.items():
            if size < 1:
                raise UsageError(f"S6: {name} is {size}, expected at least 1")
        self.width = width
        channels = expand * width
        self.linear_in = nn.Linear(width, 2 * channels, bias=False)
        self.conv_weight = nn.Parameter(torch.empty(conv_width, channels))
        self.conv_bias = nn.Parameter(torch.zeros(channels))
        self.linear_select = nn.Linear(channels, rank + 2 * state_size, bias=False)
        self.linear_step = nn.Linear(rank, channels)
        self.log_rate = nn.Parameter(torch.arange(1.0, state_size + 1).log().repeat(channels, 1))
        self.skip = nn.Parameter(torch.ones(channels))
        self.linear_out = nn.Linear(channels, width, bias=False)
        self._initialize()

    def _initialize(self) -> None:
        conv_width, channels = self.conv_weight.shape
        rank = self.linear_step.in_features
        nn.init.uniform_(self.conv_weight, -(conv_width**-0.5), conv_width**-0.5)
        nn.init.uniform_(self.linear_step.weight, -(rank**-0.5), rank**-0.5)
        uniform = torch.rand(channels, dtype=torch.float64)
        step = torch.exp(uniform * math.log(MAX_STEP / MIN_STEP) + math.log(MIN_STEP)).clamp(min=STEP_FLOOR)
        with torch.no_grad():
            # softplus(bias) = step
            self.linear_step.bias.copy_(step + torch.log(-torch.expm1(-step)))

    def init_state(self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None) -> S6State:
        conv_width, channels = self.conv_weight.shape
        device = self.skip.device if device is None else device
        dtype = torch.promote_types(self.skip.dtype, torch.float32)
        conv = torch.zeros(batch, conv_width - 1, *extra, channels, dtype=dtype, device=device)
        return S6State(conv=conv, h=conv.new_zeros(batch, *extra, *self.log_rate.shape))

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: S6State | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], S6State]:
        x, state = self.start(x, state, reset, mask)
        u, z = self.linear_in(x).chunk(2, -1)
        mixed, conv = causal_conv(u, self.conv_weight, self.conv_bias, state.conv, reset=reset, mask=mask)
        y, h = self._scan(F.silu(mixed), state.h, reset, mask)
        y = self.linear_out(y * F.silu(z))
        y = y if mask is None else where_steps(mask, y)
        return y, S6State(conv=conv, h=h)

    def _scan(self, c: Tensor, h: Tensor, reset: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """c `(B, T, *E, M)` and h `(B, *E, M, N)` -> y like c, and h after the last step."""
        size = self.log_rate.shape[1]
        step, B, C = self.linear_select(c).split([self.linear_step.in_features, size, size], -1)
        dt = F.softplus(self.linear_step(step).to(h.dtype))
        rate = -torch.exp(self.log_rate.to(h.dtype))
        # Extra axes share time but have step sizes of their own: they are so many streams more.
        u, dt, B, C = (_streams(part) for part in (c, dt, B, C))
        reset, mask = (_repeated(flag, u.shape[0]) for flag in (reset, mask))
        y, last = selective_scan(u, dt, rate, B, C, self.skip, h.flatten(0, -3), reset, mask)
        y = y.reshape(c.shape[0], *c.shape[2:-1], *y.shape[1:]).movedim(-2, 1)
        return y, last.reshape(h.shape)

    def roles(self) -> dict[str, Role]:
        return {
            "linear_in.weight": Role.MATRIX,
            "conv_weight": Role.CONV,
            "conv_bias": Role.BIAS,
            "linear_select.weight": Role.MATRIX,
            "linear_step.weight": Role.GATE,
            "linear_step.bias": Role.DECAY,
            "log_rate": Role.DECAY,
            "skip": Role.GAIN,
            "linear_out.weight": Role.MATRIX,
        }

    def load_mamba(self, weights: Mapping[str, Tensor]) -> None:
        """Take the parameters of a `mixer` layer of transformers' Mamba or of mambapy, by their names without prefix.

        Raises:
            UsageError: other sizes.
        """
        names = {
            "linear_in.weight": weights["in_proj.weight"],
            "conv_weight": weights["conv1d.weight"][:, 0].T,
            "conv_bias": weights["conv1d.bias"],
            "linear_select.weight": weights["x_proj.weight"],
            "linear_step.weight": weights["dt_proj.weight"],
            "linear_step.bias": weights["dt_proj.bias"],
            "log_rate": weights["A_log"],
            "skip": weights["D"],
            "linear_out.weight": weights["out_proj.weight"],
        }
        for name, own in self.named_parameters():
            if names[name].shape != own.shape:
                raise UsageError(
                    f"S6.load_mamba: {name} would be {tuple(names[name].shape)}, expected {tuple(own.shape)}"
                )
        self.load_state_dict(names)


def _streams(x: Tensor) -> Tensor:
    """x `(B, T, *E, M)` as `(B E, T, M)`."""
    return x.movedim(1, -2).flatten(0, -3)


def _repeated(flag: Tensor | None, streams: int) -> Tensor | None:
    """`(B, T)` for each of B E streams."""
    if flag is None or flag.shape[0] == streams:
        return flag
    return flag.repeat_interleave(streams // max(1, flag.shape[0]), 0)
