"""Causal attention with bounded memory: a window over the past, or all of it up to a number of steps.

    q, k, v = W_q x, W_k x, W_v x                           heads of K features
    y_t = Σ_s softmax_s(q_t · k_s / √K) v_s                 s: steps of the episode, age t - s below the window
    out = W_o y

Steps are numbered by how many have existed since the last reset, not by wall time. Features x_j and
x_{j + K/2} of q and k are turned by the angle t · 10000^(-2j/K), so that q_t · k_s depends on t - s alone.

Papers: Vaswani et al. 2017, arXiv:1706.03762; Su et al. 2021, RoFormer, arXiv:2104.09864; further-mixers.md,
section 4. `window` counts the current step, as in transformers; recurrentgemma's sees one step more.
Departures: keys are kept unturned and are turned by their age when they are read, which is exact however
old a stream is; what is kept is in order of age, since a state that is a value is copied in any case.
Cost: O(T·W·D) time, 2(W-1)·D numbers of state per stream.
"""

import math
from abc import abstractmethod
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import Role, UsageError
from pliant.core.roles import prefix
from pliant.kernels import sharp_attention
from pliant.kernels._sharp_attention import Sharpen
from pliant.mixers.base import SequenceMixer, over_steps, steps_since_reset, where_steps
from pliant.mixers.gated_lru import check_heads
from pliant.mixers.sharpen import sharpen_for

BASE = 10_000.0  # further-mixers.md 4
SHORT = 64
"""Queries that are worked on at a time, at least."""


class AttentionState(NamedTuple):
    """keys, values `(B, *E, S, H, K)`: of the last S steps, oldest first, zero where there are none; steps `(B,)`.

    steps int64: those of the running episode that have existed.
    """

    keys: Tensor
    values: Tensor
    steps: Tensor


class _Attention(SequenceMixer):
    """What both kinds share; `kept` is the number of steps whose keys and values are carried."""

    def __init__(self, width: int, num_heads: int, window: int, kept: int, sharpen: Sharpen | str | None):
        super().__init__()
        name = type(self).__name__
        check_heads(name, width, num_heads)
        if width // num_heads % 2:
            raise UsageError(
                f"{name}: width {width} gives {num_heads} heads of {width // num_heads} features, expected an even "
                "number, since they are turned in pairs; choose another number of heads"
            )
        self.width, self.num_heads, self.window, self.kept = width, num_heads, window, kept
        self.sharpen = sharpen_for(sharpen, num_heads, width // num_heads)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        for linear in (self.query, self.key, self.value, self.out):
            nn.init.normal_(linear.weight, std=width**-0.5)

    def init_state(
        self, batch: int, extra: tuple[int, ...] = (), *, device: torch.device | None = None
    ) -> AttentionState:
        weight = self.key.weight
        device = weight.device if device is None else device
        dtype = torch.promote_types(weight.dtype, torch.float32)
        shape = (batch, *extra, self.kept, self.num_heads, self.width // self.num_heads)
        keys, values = (torch.zeros(shape, dtype=dtype, device=device) for _ in range(2))
        return AttentionState(keys, values, torch.zeros(batch, dtype=torch.int64, device=device))

    def forward(
        self,
        x: Float[Tensor, "B T *E D"],
        state: AttentionState | None = None,
        *,
        reset: Bool[Tensor, "B T"] | None = None,
        mask: Bool[Tensor, "B T"] | None = None,
    ) -> tuple[Float[Tensor, "B T *E D"], AttentionState]:
        x, state = self.start(x, state, reset, mask)
        read = self._read(state.steps, x.shape[1], reset, mask)
        extra = x.shape[2:-1]
        streams = math.prod(extra)
        q, k, v = (
            _to_streams(part(x).unflatten(-1, state.keys.shape[-2:])) for part in (self.query, self.key, self.value)
        )
        steps = _steps_after(state.steps, x.shape[1], reset, mask)
        # Extra axes are streams of their own: (B E, T, H, K).
        keys, values = (part.flatten(0, len(extra)) for part in (state.keys, state.values))
        past = AttentionState(keys, values, _repeat(state.steps, streams))
        reset, mask = (None if flag is None else _repeat(flag, streams) for flag in (reset, mask))
        y, last = causal_attention(q, k, v, past, self.window, read, reset=reset, mask=mask, sharpen=self.sharpen)
        y = y.flatten(2).reshape(x.shape[0], streams, *x.shape[1:2], self.width).transpose(1, 2).reshape(x.shape)
        keys, values = (part.reshape(state.keys.shape) for part in (last.keys, last.values))
        return self.out(y.to(x.dtype)), AttentionState(keys, values, steps)

    @abstractmethod
    def _read(self, count: Tensor, steps: int, reset: Tensor | None, mask: Tensor | None) -> int:
        """How many of the kept steps may matter. Raises `UsageError` where the new ones do not fit."""

    def roles(self) -> dict[str, Role]:
        found = {f"{name}.weight": Role.MATRIX for name in ("query", "key", "value", "out")}
        roles: Any = getattr(self.sharpen, "roles", dict)
        return found | prefix("sharpen", roles())


class WindowAttention(_Attention):
    """Attention over the last steps. `(B, T, *E, D) -> (B, T, *E, D)`.

    Args:
        width: D.
        num_heads: divides `width` into heads of an even number of features.
        window: W, steps that are seen, the current one among them.
        sharpen: weights from logits, or their name in `pliant.mixers.sharpen.NAMED`; None: softmax.
    """

    def __init__(self, width: int, num_heads: int = 4, window: int = 128, *, sharpen: Sharpen | str | None = None):
        if window < 1:
            raise UsageError(f"WindowAttention: window is {window}, expected at least 1, the current step")
        super().__init__(width, num_heads, window, window - 1, sharpen)

    def _read(self, count: Tensor, steps: int, reset: Tensor | None, mask: Tensor | None) -> int:
        return self.kept


class FullAttention(_Attention):
    """Attention over the whole episode. `(B, T, *E, D) -> (B, T, *E, D)`.

    An episode has room for `max_steps` steps; `forward` raises `UsageError` before one that has none, and
    changes nothing then (compiled or exported, it raises `RuntimeError`). A reset makes room. With one head, a graph
    that inductor of torch 2.13 makes for all lengths fails on its way back; with more it does not.

    Args:
        width: D.
        num_heads: divides `width` into heads of an even number of features.
        max_steps: existing steps of an episode, at most.
        sharpen: weights from logits, or their name in `pliant.mixers.sharpen.NAMED`; None: softmax.
    """

    def __init__(self, width: int, num_heads: int = 4, max_steps: int = 2048, *, sharpen: Sharpen | str | None = None):
        if max_steps < 1:
            raise UsageError(f"FullAttention: max_steps is {max_steps}, expected at least 1")
        super().__init__(width, num_heads, max_steps, max_steps, sharpen)

    def _read(self, count: Tensor, steps: int, reset: Tensor | None, mask: Tensor | None) -> int:
        counts = steps_since_reset(count, steps, reset, mask)
        longest = torch.cat([count[:, None], counts], 1).amax(1)
        if torch.compiler.is_compiling():
            torch._assert_async((longest <= self.kept).all(), "FullAttention: an episode has more than max_steps steps")
            return self.kept
        if not len(count):
            return 0
        read, most = torch.stack([count.max(), longest.max()]).tolist()
        if most > self.kept:
            raise UsageError(
                f"FullAttention: an episode would have {most} steps, with room for {self.kept}; "
                "reset the stream, or make the layer with more max_steps"
            )
        return int(read)


def causal_attention(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H K"],
    state: AttentionState,
    window: int,
    read: int,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    sharpen: Sharpen | None = None,
) -> tuple[Float[Tensor, "B T H K"], AttentionState]:
    """Attention of each step to those of its episode that are less than `window` steps old.

    `read` says how many of the kept steps, the newest, may be seen. Outputs are in the dtype of the state or wider.
    """
    wide = torch.promote_types(q.dtype, state.keys.dtype)
    q, k, v = (part.to(wide) for part in (q, k, v))
    size = state.keys.shape[1]
    exists = q.new_ones(q.shape[:2], dtype=torch.bool) if mask is None else mask
    # Episode of each step, -1 where there is none; what was kept is of episode 0.
    episode = torch.where(exists, 0 if reset is None else reset.long().cumsum(1), -1)
    if mask is not None:
        # Existing steps move to the front, so that what they see is a band.
        order = (~mask).long().argsort(dim=1, stable=True)
        q, k, v, episode = (_pick(part, order) for part in (q, k, v, episode))
    empty = torch.arange(size, device=q.device) < size - state.steps[:, None]
    episode = torch.cat([-empty.long(), episode], 1)
    k, v = torch.cat([state.keys.to(wide), k], 1), torch.cat([state.values.to(wide), v], 1)

    near, keys, values = (part[:, size - read :] for part in (episode, k, v))
    y = _banded(q, keys, values, near, window, sharpen)
    if mask is not None:
        y = where_steps(mask, _pick(y, (mask.long().cumsum(1) - 1).clamp(min=0)))
    return y, _kept(k, v, episode, state, reset, mask)


def _kept(
    k: Tensor, v: Tensor, episode: Tensor, state: AttentionState, reset: Tensor | None, mask: Tensor | None
) -> AttentionState:
    """The state after the chunk: of all steps, old and new, the last existing ones of the last episode."""
    size = state.keys.shape[1]
    steps = k.shape[1] - size
    if mask is None:
        k, v, episode = (part[:, steps:] for part in (k, v, episode))
    else:
        tail = mask.long().sum(1, keepdim=True) + torch.arange(size, device=k.device)
        k, v, episode = (_pick(part, tail) for part in (k, v, episode))
    if reset is not None:
        last = reset.long().sum(1, keepdim=True)
        k, v = (where_steps(episode == last, part) for part in (k, v))
    return AttentionState(k, v, _steps_after(state.steps, steps, reset, mask))


def _steps_after(count: Tensor, steps: int, reset: Tensor | None, mask: Tensor | None) -> Tensor:
    return steps_since_reset(count, steps, reset, mask)[:, -1] if steps else count


def _banded(q: Tensor, keys: Tensor, values: Tensor, episodes: Tensor, window: int, sharpen: Sharpen | None) -> Tensor:
    """Attention of the last T of P + T steps, block by block, since no block sees further back than the window."""
    steps, past = q.shape[1], keys.shape[1] - q.shape[1]
    # What is not finite reaches those that see it: a product with the weight zero would carry it to all.
    fine = ((keys * 0).sum((2, 3)) + (values * 0).sum((2, 3))) == 0
    keys, values = where_steps(fine, keys), where_steps(fine, values)
    cos, sin = rotation(keys.shape[1], q.shape[-1], q)
    unturned = q
    q, keys = rotate(q, cos[past:], sin[past:]), rotate(keys, cos, sin)
    outputs = []
    size = max(window, SHORT)
    # A graph for all lengths has no loop over blocks: compiled, all steps are one block.
    whole = torch.compiler.is_compiling() and not torch.compiler.is_exporting()
    sizes = [steps] if whole else [min(size, steps - start) for start in range(0, steps, size)]
    # Split, since on the way back each slice would be an array of all steps.
    before, *blocks = zip(*(x.split([past, *sizes], 1) for x in (keys, values, episodes, fine)), strict=True)
    for queries, given, block in zip(q.split(sizes, 1), unturned.split(sizes, 1), blocks, strict=True):
        k, v, other, known = (
            torch.cat([x[:, max(0, x.shape[1] - window + 1) :], y], 1) for x, y in zip(before, block, strict=True)
        )
        before, own = block, block[2]
        at = torch.arange(k.shape[1], device=q.device)
        age = at[k.shape[1] - own.shape[1] :, None] - at
        own, other = own[..., None], other[:, None]
        # A step that does not exist sees itself: nothing at all would make the softmax NaN.
        visible = ((age >= 0) & (age < window) & (own == other) & (other >= 0)) | (age == 0)
        heads, k, v = (x.transpose(1, 2) for x in (queries, k, v))
        if sharpen is None:
            y = F.scaled_dot_product_attention(heads, k, v, attn_mask=visible[:, None])
        else:
            # Turned ones would tell the number of a step, which is not the same in all ways to cut a sequence.
            y = sharp_attention(heads, k, v, sharpen, visible[:, None], queries=given.transpose(1, 2))
        spoiled = (visible & ~known[:, None]).any(-1)
        outputs.append(torch.where(spoiled[..., None, None], torch.nan, y.transpose(1, 2)))
    return torch.cat(outputs, 1) if outputs else q


def rotation(steps: int, size: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin `(T, 1, K/2)` of the angles of steps 0 to T - 1, computed in float64, of the dtype of `like`."""
    at = torch.arange(steps, dtype=torch.float64, device=like.device)
    pairs = torch.arange(0, size, 2, dtype=torch.float64, device=like.device)
    angle = (at[:, None] * BASE ** (-pairs / size))[:, None]
    return angle.cos().to(like.dtype), angle.sin().to(like.dtype)


def rotate(x: Float[Tensor, "*S T H K"], cos: Tensor, sin: Tensor) -> Float[Tensor, "*S T H K"]:
    """Turn the pairs x_j, x_{j + K/2} by angles as `rotation` gives them."""
    one, two = x.chunk(2, -1)
    return torch.cat([one * cos - two * sin, two * cos + one * sin], -1)


def _to_streams(x: Tensor) -> Tensor:
    """`(B, T, *E, H, K)` -> `(B E, T, H, K)`"""
    return x if x.ndim == 4 else x.flatten(2, -3).transpose(1, 2).flatten(0, 1)


def _repeat(x: Tensor, times: int) -> Tensor:
    return x if times == 1 else x.repeat_interleave(times, 0)


def _pick(x: Tensor, index: Tensor) -> Tensor:
    """x `(B, T, ...)` at the steps `index` `(B, T')`."""
    return x.gather(1, over_steps(index, x).expand(*index.shape, *x.shape[2:]))
