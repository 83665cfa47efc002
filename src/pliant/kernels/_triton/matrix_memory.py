"""The matrix memory of `_matrix_memory`, all chunks of time at once.

The stabilizer m is a scan in which sums and maxima stand for products and sums. With it, gates are at most about 1 and
what is left is a memory that is linear in keys and values,

    C_t = f_t C_{t-1} + i_t k_t v_tᵀ,  n_t = f_t n_{t-1} + i_t k_t  ->  q_tᵀ C_t and q_tᵀ n_t:

what each chunk adds, the memory before each chunk, then reads; backward the same from the end. Products of gates are
taken between each two steps of a chunk, since quotients or differences of sums would cancel. What is kept for the way
back is the memory before each chunk. All that has one number per step and head is plain torch.

Products of matrices are taken in three passes of TF32, which is nearly float32.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pliant.kernels._autocast import own_precision
from pliant.kernels._matrix_memory import LOWEST, Memory, _chunkwise, _floor
from pliant.kernels._triton._common import call, flag, flags, new, power, row
from pliant.kernels._triton.linear_scan import scan

STEPS, WIDTH = 64, 32
"""Steps of a chunk, and keys or values that are worked on together, at most; both at least 16. With more, it would not
fit into the registers of 8 warps."""
NUMBERS = 512
"""Of a memory, carried from chunk to chunk together."""


# The stabilizer.


@triton.jit
def _later(s1, c1, s2, c2):  # type: ignore[no-untyped-def]
    """m -> max(m + s1, c1), then m -> max(m + s2, c2)."""
    return s1 + s2, tl.maximum(c1 + s2, c2)


@triton.jit
def _stabilize(log_input, log_forget, m0, reset, mask, m, T, H, STEPS: tl.constexpr, HEADS: tl.constexpr):  # type: ignore[no-untyped-def]
    blocks = tl.cdiv(H, HEADS)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    head = tl.program_id(0) % blocks * HEADS + tl.arange(0, HEADS)[None, :]
    i = tl.arange(0, STEPS)[:, None]
    now = tl.load(m0 + b * H + head, head < H, 0)
    none = float("-inf")
    for start in range(0, T, STEPS):
        t = start + i
        inside = (t < T) & (head < H)
        exists = flag(mask, b, t, t < T, T, True)
        at = (b * T + t) * H + head
        s = tl.where(exists, tl.load(log_forget + at, inside, 0), 0)
        c = tl.where(exists, tl.load(log_input + at, inside, 0), none)
        if reset is not None:
            # m is 0 before such a step.
            drop = flag(reset, b, t, t < T, T, False)
            c = tl.where(drop, tl.maximum(c, s), c)
            s = tl.where(drop, none, s)
        s, c = tl.associative_scan((s, c), 0, _later)
        found = tl.maximum(now + s, c)
        tl.store(m + at, found, inside)
        now = row(found, i, STEPS - 1)[None, :]


@torch.library.custom_op("pliant::matrix_stabilizer_triton", mutates_args=())
def _stabilizer(log_input: Tensor, log_forget: Tensor, m0: Tensor, reset: Tensor | None, mask: Tensor | None) -> Tensor:
    batch, steps, heads = log_input.shape
    m, tile = new(log_input), {"STEPS": power(steps, 128), "HEADS": power(heads, 8)}
    given = (log_input.contiguous(), log_forget.contiguous(), m0.contiguous(), flags(reset), flags(mask))
    call(_stabilize, batch * -(-heads // tile["HEADS"]), m, *given, m, steps, heads, **tile)
    return m


@torch.library.custom_op("pliant::matrix_stabilizer_triton_backward", mutates_args=())
def _stabilizer_backward(
    log_input: Tensor,
    log_forget: Tensor,
    m0: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    m: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    carried = log_forget + before(m, m0, reset)
    # m is the larger of two; at a tie each has half of its gradient.
    share = (carried > log_input).to(m.dtype) + 0.5 * (carried == log_input).to(m.dtype)
    flow = share if mask is None else torch.where(mask[..., None], share, 1)
    flow = flow if reset is None else torch.where(reset[..., None], 0, flow)
    onward = torch.cat([torch.ones_like(flow[:, :1]), flow[:, 1:].flip(1)], 1)
    total = scan(onward, grad.flip(1), torch.zeros_like(m0), None)[0].flip(1)
    dm0 = flow[:, 0] * total[:, 0]
    total = total if mask is None else torch.where(mask[..., None], total, 0)
    return total * (1 - share), total * share, dm0


def before(m: Tensor, m0: Tensor, reset: Tensor | None) -> Tensor:
    """m before each step, `(B, T, H)`."""
    m = torch.cat([m0[:, None], m[:, :-1]], 1)
    return m if reset is None else torch.where(reset[..., None], 0, m)


@_stabilizer.register_fake
def _(log_input: Tensor, log_forget: Tensor, m0: Tensor, reset: Tensor | None, mask: Tensor | None) -> Tensor:
    return new(log_input)


@_stabilizer_backward.register_fake
def _(
    log_input: Tensor,
    log_forget: Tensor,
    m0: Tensor,
    reset: Tensor | None,
    mask: Tensor | None,
    m: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    return new(log_input), new(log_input), new(m0)


def _keep_stabilizer(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output)


def _stabilizer_gradients(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
    return *_stabilizer_backward(*ctx.saved_tensors, grad), None, None


_stabilizer.register_autograd(_stabilizer_gradients, setup_context=_keep_stabilizer)


# The memory. Programs are numbered by stream and head r, chunk, and block of keys or values.


@triton.jit
def _place(H, chunks, blocks, STEPS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Stream, head, r, chunk, block, and steps `(L,)` of this program."""
    program = tl.program_id(0)
    r = (program // blocks // chunks).to(tl.int64)  # offsets may exceed 2^31
    chunk = program // blocks % chunks
    return r // H, r % H, r, chunk, program % blocks, chunk * STEPS + tl.arange(0, STEPS)


@triton.jit
def _rows(x, mask, b, h, t, col, T, H, W):  # type: ignore[no-untyped-def]
    """x `(B, T, H, W)` at steps t and columns col; 0 where no step exists."""
    t = t[:, None]
    exists = flag(mask, b, t, t < T, T, True)
    return tl.load(x + ((b * T + t) * H + h) * W + col[None, :], exists & (col < W)[None, :], 0)


@triton.jit
def _number(x, b, h, t, inside, T, H, other: tl.constexpr):  # type: ignore[no-untyped-def]
    """x `(B, T, H)` at steps t."""
    return tl.load(x + (b * T + t) * H + h, inside, other)


@triton.jit
def _from_start(keep, b, h, t, T, H):  # type: ignore[no-untyped-def]
    """Product of f from the start of the chunk through each step."""
    return tl.cumprod(tl.exp(_number(keep, b, h, t, t < T, T, H, 0.0)), 0)


@triton.jit
def _to_end(keep, enter, b, h, t, T, H):  # type: ignore[no-untyped-def]
    """i of each step times f of those after it in the chunk."""
    i = tl.arange(0, t.shape[0])
    later = tl.exp(_number(keep, b, h, t + 1, (t + 1 < T) & (i + 1 < t.shape[0]), T, H, 0.0))
    return tl.cumprod(later, 0, reverse=True) * tl.exp(_number(enter, b, h, t, t < T, T, H, float("-inf")))


@triton.jit
def _between(keep, enter, b, h, t, T, H):  # type: ignore[no-untyped-def]
    """i_s times f of the steps after s up to t, at [t, s]; 0 where s is later than t."""
    f = tl.exp(_number(keep, b, h, t, t < T, T, H, 0.0))[:, None]
    i = tl.exp(_number(enter, b, h, t, t < T, T, H, float("-inf")))[None, :]
    after = t[:, None] > t[None, :]
    return tl.where(t[:, None] >= t[None, :], tl.cumprod(tl.where(after, f, 1), 0) * i, 0)


@triton.jit
def _reduce(x, y, z, keep, enter, mask, added, added_n, T, H, K, V, chunks,  # type: ignore[no-untyped-def]
            REVERSE: tl.constexpr, STEPS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
            PRECISION: tl.constexpr):  # fmt: skip
    """What each chunk adds to C `(R, chunks, K, V)` and n `(R, chunks, K)`, from x = k and y = v; or, backward, to
    their gradients, from x = q, y the gradient of qᵀC and z that of qᵀn."""
    values = tl.cdiv(V, VALUES)
    b, h, r, chunk, block, t = _place(H, chunks, tl.cdiv(K, KEYS) * values, STEPS)
    key, value = block // values * KEYS + tl.arange(0, KEYS), block % values * VALUES + tl.arange(0, VALUES)
    given, second = _rows(x, mask, b, h, t, key, T, H, K), _rows(y, mask, b, h, t, value, T, H, V)
    if REVERSE:
        weighed = given * _from_start(keep, b, h, t, T, H)[:, None]
        along = weighed * tl.where(t < T, _number(z, b, h, t, t < T, T, H, 0.0), 0)[:, None]
    else:
        weighed = given * _to_end(keep, enter, b, h, t, T, H)[:, None] / tl.sqrt(K + tl.zeros((1, 1), given.dtype))
        along = weighed
    total = tl.dot(tl.trans(weighed), second, input_precision=PRECISION, out_dtype=given.dtype)
    at = (r * chunks + chunk) * K + key
    tl.store(added + at[:, None] * V + value[None, :], total, (key < K)[:, None] & (value < V)[None, :])
    tl.store(added_n + at, tl.sum(along, 0), (key < K) & (block % values == 0))


@triton.jit
def _carry(added, keep, start, states, last, T, H, W, chunks,  # type: ignore[no-untyped-def]
           REVERSE: tl.constexpr, STEPS: tl.constexpr, NUMBERS: tl.constexpr):  # fmt: skip
    """The state before each chunk in the order of the scan, `(R, chunks, W)`, and the last."""
    blocks = tl.cdiv(W, NUMBERS)
    r = (tl.program_id(0) // blocks).to(tl.int64)
    col = tl.program_id(0) % blocks * NUMBERS + tl.arange(0, NUMBERS)
    now = tl.load(start + r * W + col, col < W, 0)
    for n in range(chunks):
        chunk = (chunks - 1 - n) if REVERSE else n
        t = chunk * STEPS + tl.arange(0, STEPS)
        f = tl.exp(tl.sum(_number(keep, r // H, r % H, t, t < T, T, H, 0.0), 0))
        at = (r * chunks + chunk) * W + col
        tl.store(states + at, now, col < W)
        new = tl.load(added + at, col < W, 0)
        now = tl.where(f == 0, new, f * now + new)  # what is dropped need not be finite
    tl.store(last + r * W + col, now, col < W)


@triton.jit
def _read(q, k, v, keep, enter, mask, states, states_n, out, out_n, T, H, K, V, chunks,  # type: ignore[no-untyped-def]
          STEPS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """qᵀC `(B, T, H, V)` and qᵀn `(B, T, H)`."""
    b, h, r, chunk, block, t = _place(H, chunks, tl.cdiv(V, VALUES), STEPS)
    value = block * VALUES + tl.arange(0, VALUES)
    given = _rows(v, mask, b, h, t, value, T, H, V)
    scores, far = tl.zeros((STEPS, STEPS), given.dtype), tl.zeros((STEPS, VALUES), given.dtype)
    far_n = tl.zeros((STEPS,), given.dtype)
    for first in range(0, K, KEYS):
        key = first + tl.arange(0, KEYS)
        asked, keys = _rows(q, mask, b, h, t, key, T, H, K), _rows(k, mask, b, h, t, key, T, H, K)
        scores += tl.dot(asked, tl.trans(keys), input_precision=PRECISION, out_dtype=given.dtype)
        at = (r * chunks + chunk) * K + key
        memory = tl.load(states + at[:, None] * V + value[None, :], (key < K)[:, None] & (value < V)[None, :], 0)
        far += tl.dot(asked, memory, input_precision=PRECISION, out_dtype=given.dtype)
        far_n += tl.sum(asked * tl.load(states_n + at, key < K, 0)[None, :], 1)
    scores = scores / tl.sqrt(K + tl.zeros((1, 1), given.dtype)) * _between(keep, enter, b, h, t, T, H)
    reach = _from_start(keep, b, h, t, T, H)
    total = tl.dot(scores, given, input_precision=PRECISION, out_dtype=given.dtype)
    total += tl.where(reach[:, None] == 0, 0, reach[:, None] * far)  # what was dropped need not be finite
    at = (b * T + t) * H + h
    tl.store(out + at[:, None] * V + value[None, :], total, (t < T)[:, None] & (value < V)[None, :])
    total_n = tl.sum(scores, 1) + tl.where(reach == 0, 0, reach * far_n)
    tl.store(out_n + at, total_n, (t < T) & (block == 0))


@triton.jit
def _back_scores(q, k, v, keep, enter, mask, dout, dout_n, weights, dscores, near_keep, near_enter,  # type: ignore[no-untyped-def]
                 T, H, K, V, chunks, STEPS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr,
                 PRECISION: tl.constexpr):  # fmt: skip
    """Of each two steps of a chunk, what v is weighed with, and the gradient of q·k; and the parts of the gradients of
    log f and log i that come from within the chunk."""
    b, h, r, chunk, _block, t = _place(H, chunks, 1, STEPS)
    wide: tl.constexpr = q.dtype.element_ty
    scores = tl.zeros((STEPS, STEPS), wide)
    for first in range(0, K, KEYS):
        key = first + tl.arange(0, KEYS)
        asked, keys = _rows(q, mask, b, h, t, key, T, H, K), _rows(k, mask, b, h, t, key, T, H, K)
        scores += tl.dot(asked, tl.trans(keys), input_precision=PRECISION, out_dtype=wide)
    back = tl.zeros((STEPS, STEPS), wide) + _number(dout_n, b, h, t, t < T, T, H, 0.0)[:, None]
    for first in range(0, V, VALUES):
        value = first + tl.arange(0, VALUES)
        wanted, given = _rows(dout, mask, b, h, t, value, T, H, V), _rows(v, mask, b, h, t, value, T, H, V)
        back += tl.dot(wanted, tl.trans(given), input_precision=PRECISION, out_dtype=wide)
    scale = 1 / tl.sqrt(K + tl.zeros((1, 1), wide))
    gates = _between(keep, enter, b, h, t, T, H)
    scores = scores * scale * gates
    i = tl.arange(0, STEPS)
    at = (r * chunks + chunk) * STEPS * STEPS + i[:, None] * STEPS + i[None, :]
    tl.store(weights + at, scores)
    tl.store(dscores + at, back * gates * scale)
    product = scores * back  # gradient of the logarithm of what stands between each two steps
    tl.store(near_enter + (r * chunks + chunk) * STEPS + i, tl.sum(product, 0))
    # f of a step stands between all that came before it and all from it on.
    earlier = tl.cumsum(product, 1) - product
    tl.store(near_keep + (r * chunks + chunk) * STEPS + i, tl.sum(tl.where(i[:, None] >= i[None, :], earlier, 0), 0))


@triton.jit
def _back_keys(q, k, v, keep, enter, mask, dout, dout_n, dscores, states, states_n, backs, backs_n,  # type: ignore[no-untyped-def]
               dq, dk, reads, writes, along, T, H, K, V, chunks, STEPS: tl.constexpr, KEYS: tl.constexpr,
               VALUES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """dq and dk; and, one part for each block of keys, q·dq by way of the memory before the chunk, k·dk by way of that
    after it `(blocks, R, chunks L)`, and that of the decay of the chunk `(blocks, R, chunks)`."""
    blocks = tl.cdiv(K, KEYS)
    b, h, r, chunk, block, t = _place(H, chunks, blocks, STEPS)
    wide: tl.constexpr = q.dtype.element_ty
    i = tl.arange(0, STEPS)
    key = block * KEYS + tl.arange(0, KEYS)
    asked, keys = _rows(q, mask, b, h, t, key, T, H, K), _rows(k, mask, b, h, t, key, T, H, K)
    at = (r * chunks + chunk) * K + key
    n, dn = tl.load(states_n + at, key < K, 0), tl.load(backs_n + at, key < K, 0)
    wanted_n = _number(dout_n, b, h, t, t < T, T, H, 0.0)
    far_q = wanted_n[:, None] * n[None, :]
    far_k = tl.zeros((STEPS, KEYS), wide) + dn[None, :]
    decay = tl.exp(tl.sum(_number(keep, b, h, t, t < T, T, H, 0.0), 0))
    kept = tl.sum(n * dn, 0)
    for first in range(0, V, VALUES):
        value = first + tl.arange(0, VALUES)
        inside = (key < K)[:, None] & (value < V)[None, :]
        memory = tl.load(states + at[:, None] * V + value[None, :], inside, 0)
        back = tl.load(backs + at[:, None] * V + value[None, :], inside, 0)
        wanted, given = _rows(dout, mask, b, h, t, value, T, H, V), _rows(v, mask, b, h, t, value, T, H, V)
        far_q += tl.dot(wanted, tl.trans(memory), input_precision=PRECISION, out_dtype=wide)
        far_k += tl.dot(given, tl.trans(back), input_precision=PRECISION, out_dtype=wide)
        kept += tl.sum(tl.sum(memory * back, 0), 0)
    reach = _from_start(keep, b, h, t, T, H)[:, None]
    far_q = tl.where(reach == 0, 0, reach * far_q)
    scale = 1 / tl.sqrt(K + tl.zeros((1, 1), wide))
    far_k *= _to_end(keep, enter, b, h, t, T, H)[:, None] * scale
    place = ((block.to(tl.int64) * tl.num_programs(0) // blocks) + r * chunks + chunk) * STEPS + i
    tl.store(reads + place, tl.sum(asked * far_q, 1))
    tl.store(writes + place, tl.sum(keys * far_k, 1))
    one = block.to(tl.int64) * tl.num_programs(0) // blocks + r * chunks + chunk
    tl.store(along + one, tl.where(decay == 0, 0, decay * kept))
    near = tl.load(dscores + (r * chunks + chunk) * STEPS * STEPS + i[:, None] * STEPS + i[None, :])
    far_q += tl.dot(near, keys, input_precision=PRECISION, out_dtype=wide)
    far_k += tl.dot(tl.trans(near), asked, input_precision=PRECISION, out_dtype=wide)
    exists = flag(mask, b, t[:, None], t[:, None] < T, T, True)
    to = ((b * T + t[:, None]) * H + h) * K + key[None, :]
    inside = (t < T)[:, None] & (key < K)[None, :]
    tl.store(dq + to, tl.where(exists, far_q, 0), inside)
    tl.store(dk + to, tl.where(exists, far_k, 0), inside)


@triton.jit
def _back_values(k, keep, enter, mask, dout, weights, backs, dv, T, H, K, V, chunks,  # type: ignore[no-untyped-def]
                 STEPS: tl.constexpr, KEYS: tl.constexpr, VALUES: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    b, h, r, chunk, block, t = _place(H, chunks, tl.cdiv(V, VALUES), STEPS)
    wide: tl.constexpr = k.dtype.element_ty
    i = tl.arange(0, STEPS)
    value = block * VALUES + tl.arange(0, VALUES)
    far = tl.zeros((STEPS, VALUES), wide)
    for first in range(0, K, KEYS):
        key = first + tl.arange(0, KEYS)
        at = (r * chunks + chunk) * K + key
        back = tl.load(backs + at[:, None] * V + value[None, :], (key < K)[:, None] & (value < V)[None, :], 0)
        far += tl.dot(_rows(k, mask, b, h, t, key, T, H, K), back, input_precision=PRECISION, out_dtype=wide)
    scale = 1 / tl.sqrt(K + tl.zeros((1, 1), wide))
    total = far * _to_end(keep, enter, b, h, t, T, H)[:, None] * scale
    near = tl.load(weights + (r * chunks + chunk) * STEPS * STEPS + i[:, None] * STEPS + i[None, :])
    wanted = _rows(dout, mask, b, h, t, value, T, H, V)
    total += tl.dot(tl.trans(near), wanted, input_precision=PRECISION, out_dtype=wide)
    exists = flag(mask, b, t[:, None], t[:, None] < T, T, True)
    to = ((b * T + t[:, None]) * H + h) * V + value[None, :]
    tl.store(dv + to, tl.where(exists, total, 0), (t < T)[:, None] & (value < V)[None, :])


class _Plan(NamedTuple):
    """How a call is cut: sizes as the kernels take them, numbers of programs, tiles."""

    sizes: tuple[int, int, int, int, int]
    rows: int
    chunks: int
    key_blocks: int
    value_blocks: int
    tile: dict[str, Any]


def _plan(q: Tensor, v: Tensor, limit: int) -> _Plan:
    batch, steps, heads, keys = q.shape
    values = v.shape[3]
    size = max(16, power(min(steps, limit), STEPS))
    wide, across = max(16, power(keys, WIDTH)), max(16, power(values, WIDTH))
    tile = {"STEPS": size, "KEYS": wide, "VALUES": across,
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "ieee", "num_warps": 8, "num_stages": 2}  # fmt: skip
    chunks, blocks = -(-steps // size), (-(-keys // wide), -(-values // across))
    return _Plan((steps, heads, keys, values, chunks), batch * heads, chunks, *blocks, tile)


def _states(
    plan: _Plan, given: tuple[Tensor | None, ...], start: Tensor, start_n: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """C and n before each chunk in the order of the scan, and the last."""
    steps, heads, keys, values, chunks = plan.sizes
    added, states = (start.new_empty(plan.rows, chunks, keys, values) for _ in range(2))
    added_n, states_n = (start.new_empty(plan.rows, chunks, keys) for _ in range(2))
    last, last_n = new(start), new(start_n)
    programs = plan.rows * chunks * plan.key_blocks * plan.value_blocks
    call(_reduce, programs, start, *given, added, added_n, *plan.sizes, REVERSE=reverse, **plan.tile)
    for new_part, first, before_each, end in ((added, start, states, last), (added_n, start_n, states_n, last_n)):
        width = before_each[0, 0].numel()
        numbers = power(width, NUMBERS)
        call(_carry, plan.rows * -(-width // numbers), start, new_part, given[3], first.contiguous(), before_each, end,
             steps, heads, width, chunks, REVERSE=reverse, STEPS=plan.tile["STEPS"], NUMBERS=numbers)  # fmt: skip
    return states, states_n, last, last_n


@torch.library.custom_op("pliant::matrix_memory_triton", mutates_args=())
def _op(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, enter: Tensor, C: Tensor, n: Tensor, mask: Tensor | None, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """qᵀC and qᵀn of all steps; C and n after the last; both before each chunk. `keep` and `enter` are log f and log i
    in units of e^m, `(B, T, H)`."""
    plan = _plan(q, v, limit)
    q, k, v, keep, enter = (x.contiguous() for x in (q, k, v, keep, enter))
    which = flags(mask)
    states, states_n, last, last_n = _states(plan, (k, v, None, keep, enter, which), C, n, False)
    out, out_n = new(v), new(keep)
    call(_read, plan.rows * plan.chunks * plan.value_blocks, q, q, k, v, keep, enter, which, states, states_n, out,
         out_n, *plan.sizes, **plan.tile)  # fmt: skip
    return out, out_n, last, last_n, states, states_n


@torch.library.custom_op("pliant::matrix_memory_triton_backward", mutates_args=())
@own_precision
def _op_backward(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, enter: Tensor, mask: Tensor | None, limit: int, states: Tensor,
    states_n: Tensor, dout: Tensor, dout_n: Tensor, dlast: Tensor, dlast_n: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients of the first seven arguments of `_op`."""
    plan = _plan(q, v, limit)
    q, k, v, keep, enter, dout, dout_n = (x.contiguous() for x in (q, k, v, keep, enter, dout, dout_n))
    which, size, many = flags(mask), plan.tile["STEPS"], plan.rows * plan.chunks
    backs, backs_n, dC, dn = _states(plan, (q, dout, dout_n, keep, enter, which), dlast, dlast_n, True)
    weights, dscores = (q.new_empty(many, size, size) for _ in range(2))
    near_keep, near_enter = (q.new_empty(many, size) for _ in range(2))
    given = (q, k, v, keep, enter, which, dout, dout_n)
    call(_back_scores, many, q, *given, weights, dscores, near_keep, near_enter, *plan.sizes, **plan.tile)
    dq, dk, dv = new(q), new(k), new(v)
    reads, writes = (q.new_empty(plan.key_blocks, many, size) for _ in range(2))
    along = q.new_empty(plan.key_blocks, many)
    call(_back_keys, many * plan.key_blocks, q, *given, dscores, states, states_n, backs, backs_n, dq, dk, reads,
         writes, along, *plan.sizes, **plan.tile)  # fmt: skip
    call(_back_values, many * plan.value_blocks, q, k, keep, enter, which, dout, weights, backs, dv, *plan.sizes,
         **plan.tile)  # fmt: skip
    read, written = reads.sum(0), writes.sum(0)
    # f of a step is part of what is read of the memory before the chunk at and after it, of what was written before
    # it to the memory after the chunk, and of what goes through.
    dkeep = near_keep + read.flip(1).cumsum(1).flip(1) + written.cumsum(1) - written + along.sum(0)[:, None]
    dkeep, denter = (_by_steps(x, q) for x in (dkeep, near_enter + written))
    return dq, dk, dv, dkeep, denter, dC, dn


def _by_steps(x: Tensor, q: Tensor) -> Tensor:
    """`(R chunks, L)` as `(B, T, H)`."""
    batch, steps, heads, _ = q.shape
    return x.view(batch, heads, -1)[..., :steps].mT.contiguous()


@_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, enter: Tensor, C: Tensor, n: Tensor, mask: Tensor | None, limit: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = _plan(q, v, limit)
    many = (plan.rows, plan.chunks)
    return new(v), new(keep), new(C), new(n), C.new_empty(*many, *C.shape[2:]), n.new_empty(*many, *n.shape[2:])


@_op_backward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, enter: Tensor, mask: Tensor | None, limit: int, states: Tensor,
    states_n: Tensor, dout: Tensor, dout_n: Tensor, dlast: Tensor, dlast_n: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    return new(q), new(k), new(v), new(keep), new(enter), new(dlast), new(dlast_n)


def _keep(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    *tensors, _, _, mask, ctx.limit = inputs
    ctx.save_for_backward(*tensors, mask, output[4], output[5])
    ctx.mark_non_differentiable(output[4], output[5])


def _gradients(ctx, dout: Tensor, dout_n: Tensor, dlast: Tensor, dlast_n: Tensor, *_):  # type: ignore[no-untyped-def]
    *tensors, mask, states, states_n = ctx.saved_tensors
    given = (*tensors, mask, ctx.limit, states, states_n, dout, dout_n, dlast, dlast_n)
    return *_op_backward(*given), None, None


_op.register_autograd(_gradients, setup_context=_keep)


def run(
    q: Tensor, k: Tensor, v: Tensor, log_input: Tensor, log_forget: Tensor, memory: Memory,
    reset: Tensor | None, mask: Tensor | None, chunk: int, eps: float,
) -> tuple[Tensor, Memory]:  # fmt: skip
    """As the readable form, all of one float type; chunks have `chunk` steps at most, and a power of two of them."""
    if q.dtype == torch.float64 and q.is_cuda:  # products that Triton 3.7 cannot compile
        return _chunkwise(q, k, v, log_input, log_forget, memory, reset, mask, chunk, eps)
    C, n, m0 = memory
    if mask is not None:
        log_input, log_forget = (torch.where(mask[..., None], x, 0) for x in (log_input, log_forget))
    log_input = log_input.clamp(min=LOWEST)
    m = _stabilizer(log_input, log_forget, m0, reset, mask)
    keep, enter = log_forget + before(m, m0, reset) - m, log_input - m
    if mask is not None:
        keep, enter = torch.where(mask[..., None], keep, 0), torch.where(mask[..., None], enter, -torch.inf)
    keep = keep if reset is None else torch.where(reset[..., None], -torch.inf, keep)
    out, out_n, C, n, _, _ = _op(q, k, v, keep, enter, C, n, mask, chunk)
    h = out / (torch.maximum(out_n.abs(), _floor(m)) + eps)[..., None]
    return (h if mask is None else torch.where(mask[..., None, None], h, 0)), Memory(C, n, m[:, -1])
