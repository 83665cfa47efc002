"""Gated delta rule: a matrix of fixed size per head, in which the value under a key can be replaced.

    S' = Diag(a_t) S_{t-1},  a_t = exp(g_t)                 decay
    e_t = S'^T (b_t ⊙ k_t)                                  what is read out to be erased
    S_t = S' + k_t (w_t ⊙ v_t - e_t)^T                      write
    o_t = S_t^T q_t                                         read, of the new state

Settings: g, b, w one number per head is the gated delta net (b = w = β), with g = 0 the delta net; g per key
channel is Kimi delta attention (KDA); b per key and w per value channel beside it is Gated DeltaNet-2. With keys
of length one, b = w in [0, 2] and g <= 0 the state cannot blow up; with b that differs over channels it can.

In chunks of L steps, with G the sum of g since the start of the chunk and S the state before it:

    A = I + strictly lower part of Σ_c b_ic k_ic k_jc exp(G_ic - G_jc)
    R = A^{-1} (w ⊙ v - (b ⊙ k ⊙ exp G) S)                  the corrected writes, rows of an (L, V) matrix
    o_i = (q_i ⊙ exp G_i)^T S + Σ_{j<=i} (Σ_c q_ic k_jc exp(G_ic - G_jc)) R_j
    S_next = Diag(exp G_L) S + Σ_j (exp(G_L - G_j) ⊙ k_j) R_j^T

A reset divides a chunk into segments, between which there are no products; a masked step has b = w = g = 0.

Papers: Yang et al. 2024, Gated Delta Networks, arXiv:2412.06464; Yang et al. 2024, arXiv:2406.06484, section 3
(chunk form); Kimi Linear, arXiv:2510.26692 (KDA); arXiv:2605.22791 (GDN-2). further-mixers.md, section 1.
Departures: g below -50 counts as -50, exp of which is 2e-22, so that sums of it stay exact enough.
Cost: O(B T H (L + K) V) time; the gradient keeps the inputs and one state per chunk.
"""

from collections.abc import Callable
from functools import partial, reduce
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pliant.core import UsageError
from pliant.kernels._autocast import own_precision
from pliant.kernels._delta_steps import delta_steps
from pliant.kernels.select import select

LOWEST = -50.0
LEAF = 16
"""Steps between which decays per channel are taken pair by pair; farther apart they go over a step between them."""


class _Parts(NamedTuple):
    """Inputs with heads before time: q, k, g, b `(B, H, T, K or 1)`, u = w ⊙ v `(B, H, T, V)`."""

    q: Tensor
    k: Tensor
    u: Tensor
    g: Tensor
    b: Tensor


@own_precision
def delta_rule(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_decay: Float[Tensor, "B T H *_"],
    erase: Float[Tensor, "B T H *_"],
    write: Float[Tensor, "B T H *_"],
    state: Float[Tensor, "B H K V"] | None = None,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    *,
    chunk: int = 64,
    form: str | None = None,
) -> tuple[Float[Tensor, "B T H V"], Float[Tensor, "B H K V"]]:
    """Decay, erase, write and read along axis 1.

    Args:
        q, k: queries and keys, `(B, T, H, K)`, used as they are: normalize and scale them before.
        v: values, `(B, T, H, V)`.
        log_decay: g, at most 0; `(B, T, H)`, or `(B, T, H, K)` for a decay per key channel.
        erase: b, `(B, T, H)` or `(B, T, H, K)`.
        write: w, `(B, T, H)` or `(B, T, H, V)`.
        state: S before the first step, `(B, H, K, V)`; None means zeros.
        reset: `(B, T)`, true where the state is dropped before the step; counts on a masked step too.
        mask: `(B, T)`, false where the step does not exist; None means that all do.
        chunk: steps that are taken together, for speed and memory only; the numbers are the same.
        form: `"loop"` (readable), `"chunk"` (plain torch), `"numba"` (CPU); None chooses.

    Returns:
        o: `(B, T, H, V)` in the dtype of `v`, zero where masked.
        state: S after the last step, `(B, H, K, V)`, computed and returned in at least float32.

    Raises:
        UsageError: shapes do not fit.
    """
    _check(q, k, v, log_decay, erase, write, state, reset, mask, chunk)
    given = (x.dtype for x in (q, k, v, log_decay, erase, write, state) if x is not None)
    wide = reduce(torch.promote_types, given, torch.float32)
    if state is None:
        state = v.new_zeros(v.shape[0], *k.shape[2:], v.shape[3])
    q_, k_, v_, g, b, w = (x.to(wide) for x in (q, k, v, log_decay, erase, write))
    parts = _parts(q_, k_, v_, g, b, w, mask)
    # One step is the recurrence itself, which is also the least work.
    if form is None and v.shape[1] <= 1:
        form = "loop"
    elif form is None and (v.device.type != "cpu" or torch.compiler.is_exporting()):
        form = "chunk"
    forms: dict[str, Callable[..., Any]] = {
        "loop": delta_rule_loop, "chunk": partial(delta_rule_chunks, chunk=chunk), "numba": _fast
    }  # fmt: skip
    o, state = select("delta_rule", forms, v, form)(parts, state.to(wide), reset)
    o = o.transpose(1, 2)
    o = o if mask is None else torch.where(mask[..., None, None], o, 0)
    return o.to(v.dtype), state


def delta_rule_loop(parts: _Parts, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The recurrence as it is written above; masked steps have g = b = u = 0. Returns o `(B, H, T, V)` and S."""
    os = []
    for t in range(parts.k.shape[2]):
        q, k, u, g, b = (x[:, :, t, :, None] for x in parts)
        if reset is not None:
            state = torch.where(reset[:, t, None, None, None], 0, state)
        state = torch.exp(g) * state
        e = (state * (b * k)).sum(2)
        state = state + k * (u.mT - e[:, :, None])
        os.append((state * q).sum(2))
    return (torch.stack(os, 2) if os else torch.empty_like(parts.u)), state


def _fast(parts: _Parts, state: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same by the custom op, for which time stands before heads."""
    q, k, u, g, b = (x.transpose(1, 2) for x in parts)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in (*parts, state))
    o, last, _ = delta_steps(q, k, u, b * k, torch.exp(g), state, reset, differentiable)
    return o.transpose(1, 2), last


def delta_rule_chunks(parts: _Parts, state: Tensor, reset: Tensor | None, *, chunk: int) -> tuple[Tensor, Tensor]:
    """The same, `chunk` steps at a time; what is within one of several chunks is computed anew for the gradient."""
    os = []
    steps = parts.k.shape[2]
    learns = steps > chunk and torch.is_grad_enabled() and any(x.requires_grad for x in (*parts, state))
    for start in range(0, steps, chunk):
        span = slice(start, start + chunk)
        q, k, u, g, b = (x[:, :, span] for x in parts)
        flags = None if reset is None else reset[:, span]
        if learns:
            o, state = checkpoint(_chunk, q, k, u, g, b, state, flags, use_reentrant=False, preserve_rng_state=False)
        else:
            o, state = _chunk(q, k, u, g, b, state, flags)
        os.append(o)
    return (torch.cat(os, 2) if os else torch.empty_like(parts.u)), state


def _chunk(
    q: Tensor, k: Tensor, u: Tensor, g: Tensor, b: Tensor, state: Tensor, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    same, first, last = _segments(q, reset)
    g = g if reset is None else torch.where(reset[:, None, :, None], 0, g)
    parts, state, spoiled = _contain(_Parts(q, k, u, g, b), state, same, first)
    q, k, u, g, b = parts
    # In float64: after strong decays the differences of a float32 sum know nothing of weak ones.
    total = g.double().cumsum(2)
    since, until = (x.to(k.dtype).exp() for x in (total, total[:, :, -1:] - total))
    erase = b * k
    among, reading = _products(torch.stack((erase, q)), k, total, same).unbind(0)
    given = torch.where(first, u - (erase * since) @ state, u)
    r = torch.linalg.solve_triangular(among, given, upper=False, unitriangular=True)
    o = torch.where(first, (q * since) @ state, 0) + reading @ r
    left = torch.where(first[:, :, -1:], since[:, :, -1, :, None] * state, 0)
    after = left + torch.where(last, until * k, 0).mT @ r
    return torch.where(spoiled[..., None], torch.nan, o), torch.where(spoiled[:, :, -1:, None], torch.nan, after)


def _segments(x: Tensor, reset: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs j <= i without a reset between them `(B or 1, 1, L, L)`; which steps no reset divides from the state,
    and from the end of the chunk `(B or 1, 1, L, 1)`."""
    steps = x.shape[2]
    lower = torch.ones(1, 1, steps, steps, dtype=torch.bool, device=x.device).tril()
    if reset is None:
        return lower, lower[..., :1], lower[..., :1]
    segment = reset.long().cumsum(1)[:, None, :, None]
    return lower & (segment == segment.mT), segment == 0, segment == segment[:, :, -1:]


def _contain(parts: _Parts, state: Tensor, same: Tensor, first: Tensor) -> tuple[_Parts, Tensor, Tensor]:
    """Zeros in place of what is not finite, and at which steps it is in the memory of a head `(B, H, L)`.

    Products over a whole chunk would carry it into what came before, and over resets.
    """
    q, k, u, g, b = parts
    fine = (k.sum(-1) + u.sum(-1) + g.sum(-1) + b.sum(-1)).isfinite()
    known = state.sum((2, 3)).isfinite()
    held = (same & ~fine[:, :, None]).any(-1) | (first[..., 0] & ~known[..., None])
    k, u, g, b = (torch.where(fine[..., None], x, 0) for x in (k, u, g, b))
    return _Parts(q, k, u, g, b), torch.where(known[..., None, None], state, 0), held


def _products(x: Tensor, y: Tensor, total: Tensor, pairs: Tensor) -> Tensor:
    """Σ_c x_ic y_jc exp(total_ic - total_jc) for j <= i, where `pairs` holds, else 0.

    x `(2, B, H, L, K)`, y `(B, H, L, K)`, total `(B, H, L, K or 1)` -> `(2, B, H, L, L)`. Only differences that are
    at most 0 are ever raised: exp(-total) alone overflows.
    """
    steps = y.shape[2]
    if total.shape[-1] == 1:
        decay = (total - total.mT).masked_fill(~pairs, -torch.inf).to(y.dtype).exp()
        return torch.where(pairs, (x @ y.mT) * decay, 0)
    if steps <= LEAF:
        between = total[:, :, :, None] - total[:, :, None]
        decay = between.masked_fill(~pairs[..., None], -torch.inf).to(y.dtype).exp()
        return torch.where(pairs, (x[..., None, :] * (decay * y[:, :, None])).sum(-1), 0)
    # All of the second half comes after the middle step, and all of the first before it or with it.
    half = steps // 2
    one, two = slice(0, half), slice(half, steps)
    middle = total[:, :, half - 1 : half]
    decays = (total[:, :, two] - middle).to(y.dtype).exp(), (middle - total[:, :, one]).to(y.dtype).exp()
    across = (x[..., two, :] * decays[0]) @ (y[:, :, one] * decays[1]).mT
    across = torch.where(pairs[..., two, one], across, 0)
    top, bottom = (_products(x[..., s, :], y[:, :, s], total[:, :, s], pairs[..., s, s]) for s in (one, two))
    return torch.cat([torch.cat([top, torch.zeros_like(across.mT)], -1), torch.cat([across, bottom], -1)], -2)


def _parts(q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor, mask: Tensor | None) -> _Parts:
    g, b, w = (x if x.ndim == 4 else x[..., None] for x in (g, b, w))
    # A masked step neither decays nor writes; where, and first, so that no gradient reads what stands there.
    if mask is not None:
        q, k, v, g, b, w = (torch.where(mask[..., None, None], x, 0) for x in (q, k, v, g, b, w))
    parts = (q, k, w * v, g.clamp(min=LOWEST), b)
    return _Parts(*(x.transpose(1, 2) for x in parts))


def _check(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, w: Tensor,
    state: Tensor | None, reset: Tensor | None, mask: Tensor | None, chunk: int,
) -> None:  # fmt: skip
    if k.ndim != 4 or q.shape != k.shape or v.ndim != 4 or v.shape[:3] != k.shape[:3]:
        raise UsageError(
            f"delta_rule: q, k and v are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; "
            "expected (B, T, H, K) twice and (B, T, H, V)"
        )
    for name, x, size in (("log_decay", g, k), ("erase", b, k), ("write", w, v)):
        if x.shape not in (size.shape[:3], (*size.shape[:3], 1), size.shape):
            raise UsageError(
                f"delta_rule: {name} is {tuple(x.shape)}, expected {tuple(size.shape[:3])} or {tuple(size.shape)}"
            )
    wanted = (k.shape[0], *k.shape[2:], v.shape[3])
    if state is not None and state.shape != wanted:
        raise UsageError(f"delta_rule: state is {tuple(state.shape)}, expected {wanted}")
    for name, flag in (("reset", reset), ("mask", mask)):
        if flag is not None and (flag.shape != k.shape[:2] or flag.dtype != torch.bool):
            raise UsageError(
                f"delta_rule: {name} is {flag.dtype} {tuple(flag.shape)}, expected torch.bool {tuple(k.shape[:2])}"
            )
    if chunk < 1:
        raise UsageError(f"delta_rule: chunk is {chunk}, expected at least 1")
