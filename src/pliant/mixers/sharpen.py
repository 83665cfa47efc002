"""Weights of attention that learn, or were fitted to, how sharp to be; each is given as `sharpen=` to an attention.

- `SSMax`: β = s log n + b, s and b learned for each head (arXiv:2501.19399)
- `ASEntmax`: α-entmax of β e, β = δ + softplus(u·q) (log(n + 1))^(r tanh(w·q)), u and w learned for each head
  (arXiv:2506.16640)
- `TemperatureMap`: β an increasing function of the row's entropy, fitted to rows of one's own heads by
  `fit_temperature`; and `Polynomial`, by `fit_polynomial`, as the published one was made

n is the number of keys that a query sees. Functions without parameters stand in `pliant.kernels`: `adaptive_softmax`,
`perplexity_softmax`, `ssmax`, `sparsemax`, `entmax`, `stieltjes`. All have one signature, (logits, dim=-1, mask=None).
Those of `NAMED` can also be given by their name, as the config of a saved model does.

adaptive-temperature.md 2.2, 2.5. Departure of `ASEntmax`: u and w read the query of a head (K features, before it is
turned by its step) and not the input of the layer, so that it fits any attention.
"""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role, UsageError
from pliant.kernels import (
    adaptive_softmax,
    entmax,
    perplexity_softmax,
    sparsemax,
    ssmax,
    stieltjes,
    tempered_softmax,
)
from pliant.kernels._row_softmax import row_entropy
from pliant.kernels._sharp_attention import Sharpen

KNOTS = 6
START = 0.43  # of s; 2501.19399: what heads come to without being told
SHARPEST = 64.0
"""β up to which the best one of a row is looked for."""


class SSMax(nn.Module):
    """Softmax at β = s log n + b. Logits `(*B, H, T, N)`.

    Args:
        num_heads: H.
        bias: whether there is a b, zero at first.
        scale: s at first.
    """

    def __init__(self, num_heads: int, bias: bool = False, scale: float = START):
        super().__init__()
        self.scale = nn.Parameter(torch.full((num_heads,), scale))
        self.bias = nn.Parameter(torch.zeros(num_heads)) if bias else None

    def forward(self, logits: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        _last(self, dim)
        bias = 0.0 if self.bias is None else self.bias[:, None, None]
        return ssmax(logits, -1, mask, scale=self.scale[:, None, None], bias=bias)

    def roles(self) -> dict[str, Role]:
        return {"scale": Role.GAIN} | ({} if self.bias is None else {"bias": Role.BIAS})


class ASEntmax(nn.Module):
    """α-entmax at a scale that the query chooses. Logits `(*B, H, T, N)`, queries `(*B, H, T, K)`.

    Args:
        num_heads: H.
        key_size: K.
        alpha: above 1.
        reach: r, the largest power of the logarithm.
        offset: δ.
    """

    reads_queries = True

    def __init__(self, num_heads: int, key_size: int, alpha: float = 1.5, reach: float = 1.0, offset: float = 1.0):
        super().__init__()
        self.alpha, self.reach, self.offset = alpha, reach, offset
        self.factor, self.power = (nn.Parameter(torch.randn(num_heads, key_size) * key_size**-0.5) for _ in range(2))
        self.factor_bias, self.power_bias = (nn.Parameter(torch.zeros(num_heads)) for _ in range(2))

    def forward(self, logits: Tensor, dim: int = -1, mask: Tensor | None = None, *, queries: Tensor) -> Tensor:
        _last(self, dim)
        factor, power = (
            (queries * weight[:, None]).sum(-1, keepdim=True) + bias[:, None, None]
            for weight, bias in ((self.factor, self.factor_bias), (self.power, self.power_bias))
        )
        visible = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.expand_as(logits)
        longer = visible.sum(-1, keepdim=True).to(factor.dtype).add(1).log().clamp(min=1e-6)
        scale = self.offset + F.softplus(factor) * longer ** (self.reach * power.tanh())
        return entmax(logits * scale, -1, mask, alpha=self.alpha)

    def roles(self) -> dict[str, Role]:
        gates = dict.fromkeys(("factor", "power"), Role.GATE)
        return gates | dict.fromkeys(("factor_bias", "power_bias"), Role.BIAS)


class TemperatureMap(nn.Module):
    """log β = Σ_i slope_i · (how far H is on from knot_i toward knot_{i+1}): it rises with H and goes on for ever.

    With one knot at log k and slope 1 it is `perplexity_softmax` with k items. Saved with the model, as buffers.

    Args:
        knots: M entropies in nats, rising.
        slopes: M for all heads, or H times M, for logits `(*B, H, T, N)`; none negative.
    """

    knots: Tensor
    slopes: Tensor

    @classmethod
    def plain(cls, num_heads: int, num_knots: int = KNOTS) -> "TemperatureMap":
        """β = 1 at any entropy, with room for what `fit_temperature` finds, by `load_state_dict`."""
        return cls(torch.arange(1.0, num_knots + 1), torch.zeros(num_heads, num_knots))

    def __init__(self, knots: Sequence[float] | Tensor, slopes: Sequence[float] | Tensor):
        super().__init__()
        knots, slopes = (torch.as_tensor(x, dtype=torch.float32).detach().clone() for x in (knots, slopes))
        fits = knots.ndim == 1 and slopes.ndim in (1, 2) and slopes.shape[-1] == len(knots) > 0
        if not fits or bool((knots.diff() <= 0).any()) or bool((slopes < 0).any()):
            raise UsageError(
                f"TemperatureMap: knots are {tuple(knots.shape)} and slopes {tuple(slopes.shape)}; expected M rising "
                "entropies and M slopes, for each head or for all, none negative"
            )
        self.register_buffer("knots", knots)
        self.register_buffer("slopes", slopes)

    def rule(self, entropy: Tensor) -> Tensor:
        """β at entropies in nats, `(..., 1)`, or `(*B, H, T, 1)` where heads differ."""
        return _log_scale(entropy, self.knots, self.slopes).exp()

    def forward(self, logits: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        _last(self, dim)
        return tempered_softmax(logits, self.rule, -1, mask)

    def roles(self) -> dict[str, Role]:
        return {}


class Polynomial(nn.Module):
    """β = max(1, polynomial of H) where H > 0.5, else 1: the published form with coefficients of one's own.

    Above `largest`, the largest H that it was fitted to, β stays what it is there; a polynomial means nothing beyond.
    """

    coefficients: Tensor
    largest: Tensor

    def __init__(self, coefficients: Sequence[float] | Tensor, largest: float = float("inf")):
        super().__init__()
        self.register_buffer("coefficients", torch.as_tensor(coefficients, dtype=torch.float64).clone())
        self.register_buffer("largest", torch.tensor(largest, dtype=torch.float64))

    def rule(self, entropy: Tensor) -> Tensor:
        """β at entropies in nats, any shape."""
        known = torch.minimum(entropy.double(), self.largest)
        power = torch.zeros_like(known)
        for coefficient in self.coefficients.unbind():
            power = power * known + coefficient
        return torch.where(entropy > 0.5, power.clamp(min=1), 1).to(entropy.dtype)

    def forward(self, logits: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
        return tempered_softmax(logits, self.rule, dim, mask)

    def roles(self) -> dict[str, Role]:
        return {}


NAMED: dict[str, Callable[[int, int], Sharpen]] = {
    "adaptive": lambda heads, size: adaptive_softmax,
    "perplexity": lambda heads, size: perplexity_softmax,
    "ssmax": lambda heads, size: SSMax(heads),
    "entmax": lambda heads, size: entmax,
    "sparsemax": lambda heads, size: sparsemax,
    "asentmax": ASEntmax,
    "stieltjes": lambda heads, size: stieltjes,
    "fitted": lambda heads, size: TemperatureMap.plain(heads),
}
"""By name, made for a number of heads and their key size."""


def sharpen_for(sharpen: Sharpen | str | None, num_heads: int, key_size: int) -> Sharpen | None:
    """What a name stands for; anything else as it is.

    Raises:
        UsageError: there is no such name.
    """
    if not isinstance(sharpen, str):
        return sharpen
    if sharpen not in NAMED:
        raise UsageError(f"sharpen is {sharpen!r}, expected one of {', '.join(NAMED)}, a function or a module")
    return NAMED[sharpen](num_heads, key_size)


def fit_temperature(
    logits: Float[Tensor, "*H R N"],
    targets: Int[Tensor, "*H R"],
    mask: Bool[Tensor, "*H R N"] | None = None,
    *,
    num_knots: int = KNOTS,
    beyond: float = 1.0,
    updates: int = 300,
) -> TemperatureMap:
    """The map that gives the targets of rows from one's own heads the least mean code length, -log w_target.

    Rows of several lengths are one tensor with a mask. Beyond the largest entropy that the rows have, log β rises by
    `beyond` per nat: 1 keeps the number of entries that share the weight where scores get ever more dense.

    Args:
        logits: R rows of a head, or of each of H heads.
        targets: index of the entry of a row that should have the weight.
        mask: true where visible.
        num_knots: where the slope may change, spread evenly over the rows by their entropy.
        beyond: not negative.
        updates: of the fit, by Adam.

    Raises:
        UsageError: fewer rows than knots, fewer knots than 2, logits that are NaN, or a target that is not visible.
    """
    e, entropy = _visible(logits, mask, targets)
    if entropy.numel() < num_knots or num_knots < 2:
        raise UsageError(f"fit_temperature: {entropy.numel()} rows and {num_knots} knots, expected more rows, 2 knots")
    levels = torch.linspace(0, 1, num_knots, dtype=torch.float64, device=e.device)
    # Apart, also where many rows have the same entropy.
    knots = entropy.double().flatten().quantile(levels) + 1e-4 * torch.arange(num_knots, device=e.device)
    knots = knots.to(e.dtype)
    raw = torch.full((*logits.shape[:-2], len(knots) - 1), -3.0, dtype=e.dtype, device=e.device, requires_grad=True)
    last = torch.full_like(raw[..., :1], beyond).detach()
    optimizer = torch.optim.Adam([raw], lr=0.05)
    for _ in range(updates):
        slopes = torch.cat([F.softplus(raw), last], -1)
        loss = _code_length(e, _log_scale(entropy, knots, slopes).exp(), targets)
        optimizer.zero_grad()
        loss.mean().backward()
        optimizer.step()
    return TemperatureMap(knots, torch.cat([F.softplus(raw), last], -1))


def fit_polynomial(
    logits: Float[Tensor, "R N"], targets: Int[Tensor, " R"], mask: Bool[Tensor, "R N"] | None = None, *,
    degree: int = 4
) -> Polynomial:  # fmt: skip
    """The polynomial through the best β of each row in which the target has not the largest weight, by least squares.

    Where it has, larger β are ever better, so these rows say nothing. The best β is looked for from 1 to 64.

    Raises:
        UsageError: too few such rows, logits that are NaN, or a target that is not visible.
    """
    e, entropy = _visible(logits, mask, targets)
    wrong = e.argmax(-1) != targets
    if int(wrong.sum()) <= degree:
        raise UsageError(
            f"fit_polynomial: the target has not the largest weight in {int(wrong.sum())} rows, too few to fit to; "
            "take longer rows"
        )
    e, entropy, targets = e[wrong], entropy[wrong], targets[wrong]
    scales = torch.logspace(0, torch.tensor(SHARPEST).log10().item(), 100, dtype=e.dtype, device=e.device)
    lengths = torch.stack([_code_length(e, scale.expand(len(e), 1), targets) for scale in scales])
    best = scales[lengths.argmin(0)].double()
    powers = entropy.double() ** torch.arange(degree, -1, -1, device=e.device)
    return Polynomial(torch.linalg.lstsq(powers, best[:, None]).solution[:, 0], float(entropy.max()))


def _visible(logits: Tensor, mask: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Rows in float32 at least, -inf where not visible, and their entropies `(..., 1)`."""
    e = logits.detach() if mask is None else torch.where(mask, logits.detach(), -torch.inf)
    if e.isnan().any() or (e.gather(-1, targets[..., None]) == -torch.inf).any():
        raise UsageError("logits to fit to are NaN, or a target is not visible in its row")
    e = e.to(torch.promote_types(e.dtype, torch.float32))
    return e, row_entropy(e)


def _code_length(e: Tensor, scale: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(scale e)[target] of each row, in nats."""
    hidden = e == -torch.inf
    scaled = torch.where(hidden, -torch.inf, scale * torch.where(hidden, 0, e))
    return scaled.logsumexp(-1) - scaled.gather(-1, targets[..., None])[..., 0]


def _log_scale(entropy: Tensor, knots: Tensor, slopes: Tensor) -> Tensor:
    slopes = slopes if slopes.ndim == 1 else slopes[:, None]
    widths = torch.cat([knots.diff(), knots.new_full((1,), torch.inf)])
    on = torch.minimum((entropy - knots).clamp(min=0), widths)
    return (on * slopes).sum(-1, keepdim=True).to(entropy.dtype)


def _last(module: nn.Module, dim: int) -> None:
    if dim != -1:
        raise UsageError(f"{type(module).__name__}: dim is {dim}, expected -1, since axis -3 is that of heads")
