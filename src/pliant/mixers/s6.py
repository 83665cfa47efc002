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
from pliant.kernels._traces import Border, states_before, tapped
from pliant.mixers.base import SequenceMixer, over_steps, side_by_side, where_steps

MIN_STEP, MAX_STEP, STEP_FLOOR = 1e-3, 1e-1, 1e-4  # of dt at the start, further-mixers.md 2.1


class S6State(NamedTuple):
    """conv `(B, K-1, *E, M)`: the last inputs of the convolution, oldest first; h `(B, *E, M, N)`."""

    conv: Tensor
    h: Tensor


class S6Slopes(NamedTuple):
    """Derivatives of each state at its own step, the state before held fixed; `(B, T, S, M, N)`."""

    rate: Tensor  # by log_rate
    step: Tensor  # by what the step size is the softplus of
    input: Tensor  # by the weight of the input B_t[n]
    value: Tensor  # by c, neither through step sizes nor weights


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

    def traceable(self) -> dict[str, tuple[str, ...]]:
        """Exact traces of `linear_select` are M² N numbers twice, so by default its gradients end at borders, as those
        of `linear_in` always do."""
        exact = ("exact", "instant")
        return {
            "log_rate": exact,
            "linear_step": exact,
            "conv": ("own", "instant"),
            "linear_select": ("instant", "exact"),
        }

    def advance_traces(
        self,
        traces: Mapping[str, Tensor] | None,
        x: Float[Tensor, "B T *E D"],
        state: S6State,
        kinds: Mapping[str, str] | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> dict[str, Tensor]:
        """Derivatives of h `(…, M, N)` by names of parameters, behind B and S: of `log_rate` and `linear_step.bias`
        `(M, N)`, of `linear_step.weight` `(R, M, N)`, of the taps `(K, M, N)` and their bias `(M, N)`; and of what
        `linear_select` makes steps and inputs of, `"steps"` and `"inputs"`, `(M, M, N)` (online-gradients.md 2.1d).
        """
        x, state = self.start(x, state, reset, mask)
        kinds, wide = self.kinds(kinds), state.h.dtype
        u = side_by_side(F.linear(x.to(wide), self.linear_in.weight.to(wide)[: len(self.skip)]))
        taps, _ = tapped(u, len(self.conv_weight), side_by_side(state.conv), reset, mask)
        mixed = (self.conv_weight.to(wide) * taps).sum(3) + self.conv_bias.to(wide)
        c = F.silu(mixed)
        border, slopes = self._slopes(c, state.h, reset, mask)
        c, mixed, taps = map(border.since, (c, mixed, taps))
        gained: dict[str, Tensor] = {}
        if kinds["log_rate"] == "exact":
            gained["log_rate"] = slopes.rate.sum(1)
        if kinds["linear_step"] == "exact":
            step = F.linear(c, self.linear_select.weight.to(wide)[: self.linear_step.in_features])
            gained["linear_step.bias"] = slopes.step.sum(1)
            gained["linear_step.weight"] = torch.einsum("btsr,btsmn->bsrmn", step, slopes.step)
        if kinds["linear_select"] == "exact":
            gained["steps"] = torch.einsum("btsi,btsmn->bsimn", c, slopes.step)
            gained["inputs"] = torch.einsum("btsi,btsmn->bsimn", c, slopes.input)
        if kinds["conv"] == "own":
            gate = torch.sigmoid(mixed)
            own = self._by_own(slopes) * (gate * (1 + mixed * (1 - gate)))[..., None]
            gained["conv_weight"] = (taps[..., None] * own[:, :, :, None]).sum(1)
            gained["conv_bias"] = own.sum(1)
        return {name: border.onto(None if traces is None else traces[name], e) for name, e in gained.items()}

    def _slopes(
        self, c: Float[Tensor, "B T S M"], h0: Tensor, reset: Tensor | None, mask: Tensor | None
    ) -> tuple[Border, "S6Slopes"]:
        """What the chunk leaves of its past, and what is left of the derivatives of each step at its end."""
        wide, rank, size = c.dtype, self.linear_step.in_features, self.log_rate.shape[1]
        step, B, _ = F.linear(c, self.linear_select.weight.to(wide)).split([rank, size, size], -1)
        pre = F.linear(step, self.linear_step.weight.to(wide), self.linear_step.bias.to(wide))
        dt, rate = F.softplus(pre)[..., None], -torch.exp(self.log_rate.to(wide))
        a, drive = torch.exp(dt * rate), c[..., None] * B[..., None, :]
        u = dt * drive
        if mask is not None:
            exists = over_steps(mask, a)
            a, u = torch.where(exists, a, 1), torch.where(exists, u, 0)
        before = states_before(a, u, h0.reshape(a.shape[0], *a.shape[2:]), reset)
        slopes = S6Slopes(
            rate=a * before * dt * rate,
            step=(rate * a * before + drive) * torch.sigmoid(pre)[..., None],
            input=(dt * c[..., None]).expand_as(a),
            value=(dt * B[..., None, :]).expand_as(a),
        )
        if mask is not None:
            slopes = S6Slopes(*(torch.where(exists, slope, 0) for slope in slopes))
        border = Border(a, reset)
        return border, S6Slopes(*map(border.left, slopes))

    def _by_own(self, slopes: "S6Slopes") -> Tensor:
        """dh[m]/dc[m] `(B, T, S, M, N)` by way of the drive, the own step size and the input weights."""
        wide, rank, size = slopes.value.dtype, self.linear_step.in_features, self.log_rate.shape[1]
        to_step, to_input = self.linear_select.weight.to(wide)[: rank + size].split([rank, size])
        own_step = (self.linear_step.weight.to(wide) * to_step.T).sum(1)
        return slopes.value + own_step[:, None] * slopes.step + to_input.T * slopes.input

    def trace_gradients(self, traces: Mapping[str, Tensor], state: S6State, dstate: S6State) -> dict[str, Tensor]:
        if dstate.h is None:
            return {}
        dh = side_by_side(dstate.h.flatten(-2)[:, None])[:, 0].unflatten(-1, self.log_rate.shape)
        found = {"log_rate": torch.einsum("bsmn,bsmn->mn", dh, traces["log_rate"])} if "log_rate" in traces else {}
        for name in traces.keys() & {"linear_step.weight", "linear_step.bias", "conv_weight", "conv_bias"}:
            part = torch.einsum("bs...mn,bsmn->...m", traces[name], dh)
            found[name] = part.T if name == "linear_step.weight" else part
        if "steps" in traces:
            by_step = torch.einsum("bsimn,bsmn->mi", traces["steps"], dh)
            to_step = self.linear_step.weight.to(dh.dtype).T @ by_step
            to_input = torch.einsum("bsimn,bsmn->ni", traces["inputs"], dh)
            found["linear_select.weight"] = torch.cat([to_step, to_input, torch.zeros_like(to_input)])
        return found

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
