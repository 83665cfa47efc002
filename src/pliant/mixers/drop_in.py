"""Sharp attention in models that are not ours: `nn.MultiheadAttention`, and models of transformers.

    model.attention = SharpMultihead.of(model.attention, adaptive_softmax)
    sharpen_transformer(AutoModelForCausalLM.from_pretrained(...), adaptive_softmax)

Weights stay as they are and under their names.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import UsageError
from pliant.kernels import adaptive_softmax, masked_softmax, sharp_attention
from pliant.kernels._sharp_attention import Sharpen

NAME = "pliant"
"""Under which transformers knows our attention."""


class SharpMultihead(nn.MultiheadAttention):
    """`nn.MultiheadAttention` with weights by `sharpen`; same arguments, same parameters, same call.

    Args:
        sharpen: weights from logits; see `pliant.kernels.sharp_attention`.

    Raises:
        UsageError: when called with a mask that adds numbers, with dropout in training, or with nested tensors; when
            built with bias_kv, add_zero_attn, or other widths of keys and values than of queries.
    """

    def __init__(self, embed_dim: int, num_heads: int, *args: Any, sharpen: Sharpen = adaptive_softmax, **more: Any):
        super().__init__(embed_dim, num_heads, *args, **more)
        if not self._qkv_same_embed_dim or self.bias_k is not None or self.add_zero_attn:
            raise UsageError("SharpMultihead: bias_kv, add_zero_attn, kdim and vdim are not supported")
        self.sharpen = sharpen
        # Layers of torch call a kernel past their attention in inference, but not where a hook wants to see it.
        self.register_forward_hook(_seen)

    @classmethod
    def of(cls, module: nn.MultiheadAttention, sharpen: Sharpen = adaptive_softmax) -> "SharpMultihead":
        """What does the work of `module` from now on, with the same parameters, not copies."""
        made = cls(
            module.embed_dim, module.num_heads, module.dropout, bias=module.in_proj_bias is not None,
            add_zero_attn=module.add_zero_attn, kdim=module.kdim, vdim=module.vdim, batch_first=module.batch_first,
            add_bias_kv=module.bias_k is not None, sharpen=sharpen, device="meta",
        )  # fmt: skip
        made.in_proj_weight, made.in_proj_bias = module.in_proj_weight, module.in_proj_bias
        made.out_proj = module.out_proj
        return made.train(module.training)

    def forward(  # type: ignore[override]
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None,
        need_weights: bool = True, attn_mask: Tensor | None = None, average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """As of `nn.MultiheadAttention`; masks are true where a key is hidden, as there, or -inf there and else 0."""
        if query.is_nested:
            raise UsageError("SharpMultihead: nested tensors are not supported; give nn.TransformerEncoder "
                             "enable_nested_tensor=False")  # fmt: skip
        if self.training and self.dropout:
            raise UsageError(f"SharpMultihead: dropout is {self.dropout:g}, expected 0; it is not supported")
        batched = query.ndim == 3
        first = self.batch_first or not batched
        query, key, value = (x if first else x.transpose(0, 1) for x in (query, key, value))
        query, key, value = (x if batched else x[None] for x in (query, key, value))
        weights, biases = self.in_proj_weight.chunk(3), (None,) * 3
        if self.in_proj_bias is not None:
            biases = self.in_proj_bias.chunk(3)  # type: ignore[assignment]
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for x, weight, bias in zip((query, key, value), weights, biases, strict=True)
        )
        visible = self._visible(q, k, key_padding_mask if batched else _one(key_padding_mask), attn_mask)
        noted: list[Tensor] = []
        sharpen = _Noting(self.sharpen, noted) if need_weights else self.sharpen
        y = sharp_attention(q, k, v, sharpen, visible, strip=q.shape[-2] if need_weights else None)
        y = self.out_proj(y.transpose(1, 2).flatten(2))
        share = None
        if need_weights:
            share = noted[0].mean(1) if average_attn_weights else noted[0]
        y = y if first else y.transpose(0, 1)
        return (y, share) if batched else (y[0], None if share is None else share[0])

    def _visible(self, q: Tensor, k: Tensor, padding: Tensor | None, hidden: Tensor | None) -> Tensor | None:
        padding, hidden = _hidden("key_padding_mask", padding), _hidden("attn_mask", hidden)
        found = None if padding is None else ~padding[:, None, None]
        if hidden is not None:
            own = ~hidden if hidden.ndim == 2 else ~hidden.reshape(-1, self.num_heads, *hidden.shape[1:])
            found = own if found is None else found & own
        return found


def _hidden(name: str, mask: Tensor | None) -> Tensor | None:
    """The mask as bool; layers of torch make floats of it."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    hidden = mask == -torch.inf
    if not mask.is_floating_point() or bool(((mask != 0) & ~hidden).any()):
        raise UsageError(f"SharpMultihead: {name} is not bool and not of 0 and -inf alone; biases are not supported")
    return hidden


def sharpen_transformer(model: Any, sharpen: Sharpen | None = adaptive_softmax) -> Any:
    """Have a model of transformers attend with weights by `sharpen`; the model itself is returned.

    Each of its attentions gets an attribute `sharpen`, which may be set for one alone, and to None for softmax.
    A module with parameters is one for all of them unless it is set.

    Raises:
        UsageError: transformers is not installed, or the model does not take attention from its registry.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask
    except ImportError:
        raise UsageError("sharpen_transformer needs transformers: pip install 'transformers>=5.0'") from None
    # Those that attend know the number of their layer, for their part of the memory.
    parts = [part for part in model.modules() if type(part).__name__.endswith("Attention") and hasattr(part, "config")]
    if not parts or not hasattr(model, "set_attn_implementation"):
        raise UsageError(f"sharpen_transformer: {type(model).__name__} has no attention of transformers' registry")
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    model.set_attn_implementation(NAME)
    if model.config._attn_implementation != NAME:
        raise UsageError(f"sharpen_transformer: {type(model).__name__} does not take attention from the registry")
    for part in parts:
        part.sharpen = sharpen
    return model


def _attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, is_causal: bool | None = None, **more: Any
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention as transformers asks for it: q `(B, H, T, K)`, k and v `(B, G, N, K)`, y `(B, T, H, K)`."""
    if dropout or any(more.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise UsageError("attention with dropout, softcap, sinks or position bias cannot be sharpened")
    groups = query.shape[1] // key.shape[1]
    key, value = (x if groups == 1 else x.repeat_interleave(groups, 1) for x in (key, value))
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    # A single query sees all keys; with a mask that has been made, causality is in it.
    causal = bool(is_causal) and attention_mask is None and query.shape[-2] > 1
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        attention_mask = attention_mask == 0
    sharpen = getattr(module, "sharpen", None) or masked_softmax
    y = sharp_attention(query, key, value, sharpen, attention_mask, causal=causal, scale=scaling)
    return y.transpose(1, 2).contiguous(), None


class _Noting:
    """A sharpen that keeps its weights."""

    def __init__(self, sharpen: Any, noted: list[Tensor]):
        self._sharpen, self._noted = sharpen, noted
        self.reads_queries = getattr(sharpen, "reads_queries", False)

    def __call__(self, *arguments: Any, **more: Any) -> Tensor:
        self._noted.append(self._sharpen(*arguments, **more))
        return self._noted[-1]


def _one(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else mask[None]


def _seen(*_: Any) -> None:
    """A hook that does nothing."""
