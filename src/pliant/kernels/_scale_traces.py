"""Derivatives of the bands of a filter bank by its filters, carried forward.

    d a^s_t / d w_s[0, k] = a^{s-1}_{t - lag}                            each tap by what it reads, and from there on
    d a^r_t / d w_s[0, k] = sum_l w_r[0, l] d a^{r-1}_{t - lag} / d w_s[0, k],   r > s

so the derivatives by a tap are bands of the same cascade, in which the filters of its level are that tap alone; what is
carried of the levels above are samples of derivatives. A tap of level s reaches d^s … d^S and a^S, so d^s depends on
s K taps, those of its own high-pass filter and of the low-pass filters before it, and a^S on S K.

Source: online-gradients.md 2.1e.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pliant.kernels._filter_bank import filter_bank


def carried(level: int, taps: int) -> int:
    """Samples in the history of a bank that belong to levels 0 … level."""
    return (taps - 1) * (2 ** (level + 1) - 1)


def bands_by_taps(
    x: Float[Tensor, "B T D"],
    weight: Float[Tensor, "S 2 K D"],
    history: Float[Tensor, "B R D"],
    level: int,
    samples: Float[Tensor, "B K L D"] | None,
    reset: Bool[Tensor, "B T"] | None,
    mask: Bool[Tensor, "B T"] | None,
) -> tuple[Float[Tensor, "M B T K D"], Float[Tensor, "B K L D"]]:
    """Derivatives of the bands that the taps of a level reach, and samples of derivatives for the next chunk.

    Args:
        x, weight, history, reset, mask: see `filter_bank`.
        level: of the taps, from 0.
        samples: derivatives of the inputs of all levels above by each tap, oldest first; None means zeros.

    Returns:
        `(S - level + 1, B, T, K, D)`: first of the band of the level by its high-pass taps, then of those above by its
        low-pass taps; and samples.
    """
    (batch, _, width), taps, at = x.shape, weight.shape[2], carried(level, weight.shape[2])
    if samples is None:
        samples = history.new_zeros(batch, taps, history.shape[1] - at, width)
    filters = weight[:, :, :, None].repeat(1, 1, 1, taps, 1)
    filters[level] = torch.eye(taps, dtype=weight.dtype, device=weight.device)[None, :, :, None]
    before = history[:, None, :at].expand(-1, taps, -1, -1)
    both = torch.cat([before, samples], 2).transpose(1, 2).flatten(2)
    # Taps stand side by side as channels, which a bank does not mix.
    bands, last = filter_bank(x.repeat(1, 1, taps), filters.flatten(3), both, reset, mask)
    after = last[:, at:].unflatten(2, (taps, width)).transpose(1, 2)
    return bands[level + 1 :].unflatten(3, (taps, width)), after
