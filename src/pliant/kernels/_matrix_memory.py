"""Matrix memory of the mLSTM: outer products of keys and values, exponential gates, and a stabilizer.

    m_t = max(log f_t + m_{t-1}, log i_t)                              stabilizer
    f'_t = exp(log f_t + m_{t-1} - m_t),  i'_t = exp(log i_t - m_t)    gates in units of e^m, both about 1 at most
    C_t = f'_t C_{t-1} + i'_t (k_t / √K) v_tᵀ                          memory
    n_t = f'_t n_{t-1} + i'_t (k_t / √K)                               normalizer
    h_t = q_tᵀ C_t / (max(|q_tᵀ n_t|, exp(-m_t)) + ε)

for each head by itself. A fresh memory is C = n = m = 0, and a reset at t replaces C, n and m of t-1 by that.

Within a chunk, D_ts = i'_s f'_{s+1} … f'_t is a matrix that needs no logarithms and cannot overflow, so

    q_tᵀ C_t = Σ_{s≤t} D_ts (q_tᵀ k_s) v_s + f'_1 … f'_t q_tᵀ C_0,

and likewise with n, which is what C would be for one more value that is always 1.

Source: Beck et al. 2024, xLSTM, arXiv:2405.04517, section 2.3 and appendix A; lram-xlstm.md 2.1. Rows of C are keys,
columns values, and it is the key that is scaled. ε stands beside the stabilized normalizer, as in the code of xlstm
2.0.6; its gradient by way of m is kept.
Cost, with chunks of L steps: O(B H T (L (K + V) + K V)) time; the backward pass keeps C at T / L places.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from pliant.core import UsageError
from pliant.kernels._autocast import own_precision
from pliant.kernels._matrix_chunks import limit, memory_chunks
from pliant.kernels.select import HAS_TRITON, select

LOWEST = -1e30
"""Stands for the logarithm of a closed input gate, which must not be infinite: m could be."""

FAST = ("cpu", "cuda") if HAS_TRITON else ("cpu",)
"""Devices with a form of their own; the others take that in plain torch."""


class Memory(NamedTuple):
    """C `(B, H, K, V)`, n `(B, H, K)` and m `(B, H)` of the equations above, at least float32."""

    C: Tensor
    n: Tensor
    m: Tensor


@own_precision
def matrix_memory(
    q: Float[Tensor, "B T H K"],
    k: Float[Tensor, "B T H K"],
    v: Float[Tensor, "B T H V"],
    log_input: Float[Tensor, "B T H"],
    log_forget: Float[Tensor, "B T H"],
    state: tuple[Tensor, Tensor, Tensor] | None = None,
    *,
    reset: Bool[Tensor, "B T"] | None = None,
    mask: Bool[Tensor, "B T"] | None = None,
    chunk: int | None = None,
    eps: float = 1e-6,
    form: str | None = None,
) -> tuple[Float[Tensor, "B T H V"], Memory]:
    """Write to and read from one matrix per head, along axis 1.

    Args:
        q, k: queries and keys, `(B, T, H, K)`; the key is divided by √K here.
        v: values, `(B, T, H, V)`.
        log_input: logarithm of the input gate, `(B, T, H)` in nats; for the exponential gate the pre-activation
            itself, for a sigmoid gate its logsigmoid.
        log_forget: logarithm of the forget gate, `(B, T, H)` in nats, as of logsigmoid; -inf forgets everything.
        state: (C, n, m), see `Memory`; None means fresh.
        reset: `(B, T)`, true where the memory is dropped before the step; None means nowhere.
        mask: `(B, T)`, false where the step does not exist; h is zero there. None means that all exist.
        chunk: steps in a chunk at most; None chooses by K and V. The result depends on it by rounding only.
        eps: ε above.
        form: `"loop"` (readable), `"parallel"` (O(T²)), `"chunkwise"` (plain torch), `"numba"` (CPU), `"triton"`
            (CUDA); None chooses.

    Returns:
        h: `(B, T, H, V)` in the dtype of `v`.
        state: the memory after the last step, computed and returned in at least float32.

    Raises:
        UsageError: shapes do not fit, or `chunk` is not positive.
    """
    _check(q, k, v, log_input, log_forget, state, reset, mask, chunk)
    forms = {"loop": memory_loop, "parallel": _parallel, "chunkwise": _chunkwise, "numba": _fast, "triton": _triton}
    steps = q.shape[1]
    if form is None and steps <= 1:
        form = "loop"  # one step is plain torch, so that a step can be exported and costs no detour
    elif form is None and (torch.compiler.is_exporting() or q.device.type not in FAST):
        form = "chunkwise"
    run = select("matrix_memory", forms, q, form)
    given = (q, k, v, log_input, log_forget, *(() if state is None else state))
    wide = torch.float32
    for x in given:
        wide = torch.promote_types(wide, x.dtype)
    memory = _fresh(q, v, wide) if state is None else Memory(*(x.to(wide) for x in state))
    if not steps:
        return v.clone(), memory
    size = _chunk_size(q.shape[-1], v.shape[-1]) if chunk is None else chunk
    h, memory = run(*(x.to(wide) for x in given[:5]), memory, reset, mask, size, eps)
    return h.to(v.dtype), memory


def _fresh(q: Tensor, v: Tensor, dtype: torch.dtype) -> Memory:
    batch, _, heads, keys = q.shape
    shapes = ((batch, heads, keys, v.shape[-1]), (batch, heads, keys), (batch, heads))
    return Memory(*(q.new_zeros(shape, dtype=dtype) for shape in shapes))


def _chunk_size(keys: int, values: int) -> int:
    """Steps per chunk that were fastest, forward and backward, on one core: the work within chunks grows with them,
    and that between them, and what the backward pass keeps, shrinks."""
    width = max(keys, values)
    return 32 if width <= 32 else 64 if width <= 128 else 128


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    state: tuple[Tensor, Tensor, Tensor] | None,
    reset: Tensor | None,
    mask: Tensor | None,
    chunk: int | None,
) -> None:
    if q.ndim != 4 or k.shape != q.shape or v.ndim != 4 or v.shape[:3] != q.shape[:3]:
        raise UsageError(
            f"matrix_memory: q, k and v are {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)}; "
            f"expected (B, T, H, K) twice and (B, T, H, V)"
        )
    batch, _, heads, keys = q.shape
    expected = {"log_input": (log_input, q.shape[:3]), "log_forget": (log_forget, q.shape[:3])}
    if state is not None:
        shapes = ((batch, heads, keys, v.shape[-1]), (batch, heads, keys), (batch, heads))
        expected |= {
            f"{name} of the state": (x, torch.Size(s)) for name, x, s in zip(Memory._fields, state, shapes, strict=True)
        }
    for name, (x, shape) in expected.items():
        if x.shape != shape:
            raise UsageError(f"matrix_memory: {name} is {tuple(x.shape)}, expected {tuple(shape)}")
    for name, flag in (("reset", reset), ("mask", mask)):
        if flag is not None and (flag.shape != q.shape[:2] or flag.dtype != torch.bool):
            raise UsageError(
                f"matrix_memory: {name} is {flag.dtype} {tuple(flag.shape)}, expected torch.bool {tuple(q.shape[:2])}"
            )
    if chunk is not None and chunk < 1:
        raise UsageError(f"matrix_memory: chunk is {chunk}, expected at least 1 step")


def _floor(m: Tensor) -> Tensor:
    """exp(-m), short of overflow."""
    return torch.exp(-m.clamp(min=-limit(m.dtype)))


# The readable form.


def memory_loop(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Memory,
    reset: Tensor | None,
    mask: Tensor | None,
    chunk: int,
    eps: float,
) -> tuple[Tensor, Memory]:
    """The equations as they are written above; shapes as in `matrix_memory`, `chunk` is of no use here."""
    hs = []
    if mask is not None:  # not even their gradient may read masked steps
        q, k, v = (torch.where(mask[..., None, None], x, 0) for x in (q, k, v))
        log_input, log_forget = (torch.where(mask[..., None], x, 0) for x in (log_input, log_forget))
    log_input, k = log_input.clamp(min=LOWEST), k * k.shape[-1] ** -0.5
    for t in range(q.shape[1]):
        if reset is not None:
            memory = Memory(*(torch.where(_beside(reset[:, t], x), 0, x) for x in memory))
        h, after = _step(q[:, t], k[:, t], v[:, t], log_input[:, t], log_forget[:, t], memory, eps)
        if mask is not None:
            exists = mask[:, t]
            h = torch.where(_beside(exists, h), h, 0)
            after = Memory(*(torch.where(_beside(exists, x), x, old) for x, old in zip(after, memory, strict=True)))
        memory = after
        hs.append(h)
    return torch.stack(hs, 1), memory


def _step(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, memory: Memory, eps: float
) -> tuple[Tensor, Memory]:
    C, n, m_before = memory
    carried = log_forget + m_before
    m = torch.maximum(carried, log_input)
    keep = torch.exp(carried - m)[..., None]
    key = torch.exp(log_input - m)[..., None] * k
    C = torch.addcmul(keep[..., None] * C, key[..., None], v[..., None, :])
    n = torch.addcmul(key, keep, n)
    scale = torch.maximum((q * n).sum(-1).abs(), _floor(m)) + eps
    return (q[..., None, :] @ C).squeeze(-2) / scale[..., None], Memory(C, n, m)


def _beside(flag: Tensor, x: Tensor) -> Tensor:
    """`flag` `(B,)` shaped so that it broadcasts over the other axes of x."""
    return flag.reshape(-1, *[1] * (x.ndim - 1))


# Many steps at once, in plain torch: one chunk is the parallel form, and several, one after the other, the chunkwise.


def _parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Memory,
    reset: Tensor | None,
    mask: Tensor | None,
    chunk: int,
    eps: float,
) -> tuple[Tensor, Memory]:
    return _chunkwise(q, k, v, log_input, log_forget, memory, reset, mask, q.shape[1], eps)


def _chunkwise(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Memory,
    reset: Tensor | None,
    mask: Tensor | None,
    chunk: int,
    eps: float,
) -> tuple[Tensor, Memory]:
    log_input = log_input.clamp(min=LOWEST)
    if mask is not None:
        q, k, v = (torch.where(mask[..., None, None], x, 0) for x in (q, k, v))
        log_input = torch.where(mask[..., None], log_input, -torch.inf)
        log_forget = torch.where(mask[..., None], log_forget, 0)
    # Heads before time, as products of matrices want it.
    q, k, v = q.transpose(1, 2), k.transpose(1, 2) * k.shape[-1] ** -0.5, v.transpose(1, 2)
    log_input, log_forget = log_input.mT, log_forget.mT
    hs = []
    for start in range(0, q.shape[2], chunk):
        part = slice(start, start + chunk)
        since = None if reset is None else reset[:, part]
        h, memory = _one_chunk(
            q[:, :, part], k[:, :, part], v[:, :, part], log_input[..., part], log_forget[..., part], memory, since, eps
        )
        hs.append(h)
    h = torch.cat(hs, 2).transpose(1, 2)
    return h if mask is None else torch.where(mask[..., None, None], h, 0), memory


def _one_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Memory,
    reset: Tensor | None,
    eps: float,
) -> tuple[Tensor, Memory]:
    """All steps of a chunk; q, k `(B, H, L, K)`, v `(B, H, L, V)`, gates `(B, H, L)`, reset `(B, L)`."""
    C, n, m_before = memory
    steps = q.shape[2]
    # A step that is not finite writes nothing here: products would carry it into what came before it, and over resets.
    fine = ((k * 0).sum(-1) + (v * 0).sum(-1) == 0) & (log_input < torch.inf) & (log_forget < torch.inf)
    k, v = (torch.where(fine[..., None], x, 0) for x in (k, v))
    log_input, log_forget = torch.where(fine, log_input, -torch.inf), torch.where(fine, log_forget, 0)
    later = torch.ones(steps, steps, dtype=torch.bool, device=q.device).tril(-1)
    # log f_{s+1} + … + log f_t at [t, s]: sums, since differences of sums would cancel.
    between = torch.where(later, log_forget[..., None], 0).cumsum(-2)
    log_decay = between + log_input[..., None, :]
    from_start = log_forget.cumsum(-1) + m_before[..., None]
    if reset is None:
        unbroken, same = None, ~later.mT
        base = from_start
    else:
        episode = reset.long().cumsum(-1)
        unbroken = (episode == 0)[:, None]
        same = ((episode[:, :, None] == episode[:, None, :]) & ~later.mT)[:, None]
        # The sum from the latest reset on, where m starts at zero.
        place = torch.where(reset, torch.arange(steps, device=q.device), 0).cummax(-1).values
        place = place[:, None].expand_as(log_forget)
        since = between.gather(-1, place[..., None]).squeeze(-1) + log_forget.gather(-1, place)
        base = torch.where(unbroken, from_start, since)
    log_decay = log_decay.masked_fill(~same, -torch.inf)
    m = torch.maximum(base, log_decay.amax(-1))
    decay = torch.exp(log_decay - m[..., None])
    keep = torch.exp(base - m)
    read, read_n = q @ C, q @ n[..., None]
    if unbroken is not None:
        keep = torch.where(unbroken, keep, 0)
        read, read_n = (torch.where(unbroken[..., None], x, 0) for x in (read, read_n))
    weights = (q @ k.mT) * decay
    total = weights.sum(-1) + keep * read_n.squeeze(-1)
    h = (weights @ v + keep[..., None] * read) / (torch.maximum(total.abs(), _floor(m)) + eps)[..., None]
    last = keep[..., -1:]
    if unbroken is not None:
        C, n = torch.where(unbroken[..., -1:, None], C, 0), torch.where(unbroken[..., -1:], n, 0)
    key = k * decay[..., -1, :, None]
    spoiled = (same & ~fine[..., None, :]).any(-1)
    end = spoiled[..., -1:]
    C = torch.where(end[..., None], torch.nan, last[..., None] * C + key.mT @ v)
    n, m = torch.where(end, torch.nan, last * n + key.sum(-2)), torch.where(end[..., 0], torch.nan, m[..., -1])
    return torch.where(spoiled[..., None], torch.nan, h), Memory(C, n, m)


# The fast form on a CPU.


def _fast(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Memory,
    reset: Tensor | None,
    mask: Tensor | None,
    chunk: int,
    eps: float,
) -> tuple[Tensor, Memory]:
    joined = torch.cat([memory.C, memory.n[..., None]], -1)
    given = (q, k, v, log_input.clamp(min=LOWEST), log_forget, joined, memory.m)
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    h, last, m, _, _ = memory_chunks(*given, reset, mask, chunk, eps, differentiable)
    return h, Memory(last[..., :-1], last[..., -1], m)


def _triton(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_input: Tensor,
    log_forget: Tensor,
    memory: Memory,
    reset: Tensor | None,
    mask: Tensor | None,
    chunk: int,
    eps: float,
) -> tuple[Tensor, Memory]:
    from pliant.kernels._triton.matrix_memory import run

    return run(q, k, v, log_input, log_forget, memory, reset, mask, chunk, eps)
