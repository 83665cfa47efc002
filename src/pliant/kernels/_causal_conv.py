"""Depthwise causal convolution with carried inputs, resets and masks.

    y_t = b + sum_{s=0}^{K-1} w[K-1-s] x_{t-s},     row K-1 multiplies the current step

Steps before the start, or before a reset, count as zero. Masked steps do not exist: the window
reaches over them to the step before.

Source: `Conv1D` of Griffin (De et al. 2024, arXiv:2402.19427, section 2.4), trecvit.md 2.3.
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pliant.kernels.select import select


def causal_conv(
    x: Float[Tensor, "B T *E D"],
    weight: Float[Tensor, "K D"],
    bias: Float[Tensor, "D"] | None = None,
    history: Float[Tensor, "B L *E D"] | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    form: str | None = None,
) -> tuple[Float[Tensor, "B T *E D"], Float[Tensor, "B L *E D"]]:
    """Convolve each channel over time.

    Args:
        x: `(B, T, *E, D)`.
        weight: `(K, D)`; the last row belongs to the current step.
        bias: `(D,)`.
        history: the K-1 inputs before this chunk, `(B, K-1, *E, D)`, oldest first; None means zeros.
        reset: `(B, T)`, true where what came before is dropped.
        mask: `(B, T)`, false where the step does not exist; y is zero there.
        form: `"loop"` (readable, any device) or `"triton"` (CUDA); None chooses.

    Returns:
        y: `(B, T, *E, D)` in the dtype of `x`, and the history for the next chunk in at least float32.
    """
    keep = torch.promote_types(x.dtype, torch.float32)
    if history is None:
        history = x.new_zeros(x.shape[0], weight.shape[0] - 1, *x.shape[2:], dtype=keep)
    if form is None and (x.shape[1] <= 1 or x.device.type != "cuda"):
        form = "loop"  # on a CPU as fast as any other
    conv = select("causal_conv", {"loop": conv_loop, "triton": _conv_triton}, x, form)
    return conv(x, weight, bias, history.to(keep), reset, mask)


def conv_loop(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Sums over taps in plain torch; shapes as in `causal_conv`."""
    batch, steps = x.shape[:2]
    reach, keep = weight.shape[0] - 1, history.dtype
    x = x if mask is None else _where(mask, x)  # not even their gradient may read masked steps
    padded = torch.cat([history.to(x.dtype), x], dim=1)
    if mask is None and reset is None:
        y = padded[:, :steps] * weight[0]
        for k in range(1, reach + 1):
            y = y + padded[:, k : k + steps] * weight[k]
        return (y if bias is None else y + bias), padded[:, steps:].to(keep)

    # Episode of each step; what was carried belongs to episode 0.
    none = x.new_zeros(batch, steps, dtype=torch.bool)
    episode = (none if reset is None else reset).long().cumsum(1)
    last = episode[:, -1:] if steps else episode.new_zeros(batch, 1)
    end = torch.full_like(last, steps)
    if mask is not None:
        # Move the existing steps to the front, convolve there, and read each result back from its place.
        order = (~mask).long().argsort(dim=1, stable=True)
        place = mask.long().cumsum(1) - 1
        end = mask.long().sum(1, keepdim=True)
        padded = torch.cat([history.to(x.dtype), _pick(x, order)], dim=1)
        episode = episode.gather(1, order)
    episode = torch.cat([episode.new_zeros(batch, reach), episode], dim=1)
    now = episode[:, reach:]

    y = torch.zeros_like(x)
    for k in range(reach + 1):
        same = episode[:, k : k + steps] == now
        y = y + _where(same, padded[:, k : k + steps]) * weight[k]
    y = y if bias is None else y + bias
    if mask is not None:
        y = _where(mask, _pick(y, place.clamp(min=0)))
    tail = end + torch.arange(reach, device=x.device)
    return y, _where(episode.gather(1, tail) == last, _pick(padded, tail)).to(keep)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x `(B, T, ...)` at the steps `index` `(B, T')`."""
    shape = (*index.shape, *x.shape[2:])
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.ndim - 2)).expand(shape))


def _where(flag: Tensor, x: Tensor) -> Tensor:
    """x where `flag` `(B, T)` holds, zero elsewhere, so that nothing non-finite gets through."""
    return torch.where(flag.reshape(*flag.shape, *[1] * (x.ndim - 2)), x, 0)


def _conv_triton(
    x: Tensor, weight: Tensor, bias: Tensor | None, history: Tensor, reset: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    from pliant.kernels._triton.causal_conv import run

    return run(x, weight, bias, history, reset, mask)
