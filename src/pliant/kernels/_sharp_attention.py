"""Attention whose weights are any function of a row of logits, in strips of queries against all keys.

    y_t = Σ_s w_ts v_s,     w_t = sharpen(q_t · k_s / √K  over all s that t may see)

QKᵀ is computed once, a strip at a time, so that memory is O(strip · N) and not O(T N); on the way back a strip is
computed again. What is causal stops at the last key that its strip may see.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pliant.core import UsageError
from pliant.kernels._adaptive_softmax import adaptive_softmax

Sharpen = Callable[..., Tensor]
"""`sharpen(logits, dim=-1, mask=None) -> weights`, as `adaptive_softmax`: a function, or a module with parameters.

One with an attribute `reads_queries` that is true is also given `queries=`, `(*B, T, K)`.
"""

LOGITS = 1 << 20
"""Logits of a strip, about: what stays in the cache of a processor."""
QUERIES = 16
"""Queries of a strip, at least, since products with few rows are slow."""


def sharp_attention(
    q: Float[Tensor, "*B T K"],
    k: Float[Tensor, "*B N K"],
    v: Float[Tensor, "*B N V"],
    sharpen: Sharpen = adaptive_softmax,
    mask: Bool[Tensor, "*M"] | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    strip: int | None = None,
    queries: Float[Tensor, "*B T K"] | None = None,
) -> Float[Tensor, "*B T V"]:
    """Attention of T queries to N keys with weights by `sharpen`.

    Args:
        q, k, v: queries, keys and values; leading axes are alike.
        sharpen: weights from logits, see `Sharpen`.
        mask: true where a query may see a key; broadcasts to `(*B, T, N)`.
        causal: the last query sees all keys, the one before all but the last, and so on; together with `mask`.
        scale: of the logits; None: 1/√K.
        strip: queries at a time; None chooses.
        queries: what `sharpen` is given as queries where it reads them, such as those before they were turned by their
            step; None: q.

    Returns:
        y; zero where nothing is visible.

    Raises:
        UsageError: shapes do not fit.
    """
    _check(q, k, v, mask)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    steps, keys = q.shape[-2], k.shape[-2]
    size = _strip(q, keys) if strip is None else strip
    attend = partial(_attend, sharpen, scale)
    # Split, since on the way back each slice would be an array of all queries.
    parts, masks = q.split(max(1, size), -2), _parts(mask, steps, size)
    read = _parts(queries if getattr(sharpen, "reads_queries", False) else None, steps, size)
    again = len(parts) > 1 and torch.is_grad_enabled()
    outputs, end = [], keys - steps
    for part, visible, extra in zip(parts, masks, read, strict=True):
        end += part.shape[-2]
        seen = max(0, end) if causal else keys
        past, values = (x if seen == keys else x[..., :seen, :] for x in (k, v))
        visible = visible if visible is None or visible.shape[-1] == 1 else visible[..., :seen]
        if causal:
            own = _triangle(part.shape[-2], seen, q.device)
            visible = own if visible is None else visible & own
        if again:
            y = checkpoint(attend, part, past, values, visible, extra, use_reentrant=False, preserve_rng_state=False)
        else:
            y = attend(part, past, values, visible, extra)
        outputs.append(y)
    return torch.cat(outputs, -2) if len(outputs) > 1 else outputs[0]


def _attend(
    sharpen: Any, scale: float, q: Tensor, k: Tensor, v: Tensor, visible: Tensor | None, queries: Tensor | None
) -> Tensor:
    # Scaled here and not after the product, which is larger.
    logits = (q * scale) @ k.mT
    more = {"queries": q if queries is None else queries} if getattr(sharpen, "reads_queries", False) else {}
    return sharpen(logits, mask=visible, **more) @ v


def _strip(q: Tensor, keys: int) -> int:
    """Queries at a time. A graph for all lengths has no loop: compiled, all are one strip."""
    steps = q.shape[-2]
    if torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return steps
    rows = max(1, q.numel() // max(1, steps * q.shape[-1]))
    return max(QUERIES, LOGITS // max(1, rows * keys))


def _parts(x: Tensor | None, steps: int, size: int) -> list[Tensor | None]:
    """That of each strip: of a mask, which may be the same for all queries, or of what has an axis of queries."""
    count = -(-steps // max(1, size)) if steps else 1
    if x is None or x.ndim < 2 or (x.shape[-2] == 1 and steps != 1):
        return [x] * count
    return list(x.split(max(1, size), -2))


def _triangle(steps: int, keys: int, device: torch.device) -> Tensor:
    at = torch.arange(keys, device=device)
    return at <= torch.arange(keys - steps, keys, device=device)[:, None]


def _check(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> None:
    fits = q.ndim >= 2 and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if not fits or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        raise UsageError(
            f"sharp_attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}; "
            "expected (*B, T, K), (*B, N, K), (*B, N, V)"
        )
    if mask is None:
        return
    whole = (*q.shape[:-1], k.shape[-2])
    try:
        fits = mask.dtype == torch.bool and torch.broadcast_shapes(mask.shape, whole) == whole
    except RuntimeError:
        fits = False
    if not fits:
        raise UsageError(
            f"sharp_attention: mask is {mask.dtype} {tuple(mask.shape)}, expected torch.bool that broadcasts to {whole}"
        )
