"""A stack of gated LRU blocks in a single pass, for small models on a CPU.

Each block, with σ the logistic function and gelu(z) = z σ(2 GELU (z + CUBIC z³)):

    n = rms(x) g_1;  c = conv(W_x n + b_x);  v = RG-LRU(c);  x' = x + W_o (v ⊙ gelu(W_y n + b_y)) + b_o
    m = rms(x') g_2; [p, q] = W_in m + b_in;                 y = x' + W_out (gelu(p) ⊙ q) + b_out

then rms(y) g and, with `Ends`, an embedding before the first block and a linear head after the norm.

The readable form is `pliant.models.blocks.Stack` around `pliant.mixers.GatedLRU`, of which this is
the same function with the same gradients. At one step of a narrow model nearly all time goes into
starting some hundred operations and their derivatives; here it is one of each.

Parameters come by address, read anew at each call, so there is nothing that could go stale. The arithmetic
is in `_stack_pass`; here is what it reads and keeps, and its place in autograd.
"""

import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pliant.kernels._stack_pass import backward_pass, constants_of, forward_pass
from pliant.kernels._traces_pass import NAMES, advance_pass, credit_pass

MAX_ROWS = 1024
MAX_WORK = 1 << 16
"""B T, and B T x width, beyond which products of whole matrices are faster than this."""


class BlockWeights(NamedTuple):
    """Parameters of a block: D width, W width of the recurrence, K taps, H heads, F width of the MLP."""

    norm: Tensor  # (D,)
    x_weight: Tensor  # (W, D)
    x_bias: Tensor  # (W,)
    y_weight: Tensor  # (W, D)
    y_bias: Tensor  # (W,)
    conv_weight: Tensor  # (K, W)
    conv_bias: Tensor  # (W,)
    input_weight: Tensor  # (H, W/H, W/H)
    input_bias: Tensor  # (H, W/H)
    decay_weight: Tensor  # (H, W/H, W/H)
    decay_bias: Tensor  # (H, W/H)
    decay: Tensor  # (W,)
    out_weight: Tensor  # (D, W)
    out_bias: Tensor  # (D,)
    mlp_norm: Tensor  # (D,)
    in_weight: Tensor  # (2F, D)
    in_bias: Tensor  # (2F,)
    mlp_weight: Tensor  # (D, F)
    mlp_bias: Tensor  # (D,)


class Ends(NamedTuple):
    """Parameters around a stack: x = W_e u + b_e + the sum of the rows `codes` of a table; out = W_h y + b_h."""

    embed_weight: Tensor  # (D, N)
    embed_bias: Tensor  # (D,)
    table: Tensor  # (V, D)
    head_weight: Tensor  # (C, D)
    head_bias: Tensor  # (C,)


class Weights:
    """The parameters of a stack whose blocks have the same sizes, in the order of the pass.

    Raises:
        ValueError: the sizes of the blocks differ, or a parameter is not a plain float tensor on the CPU.
    """

    def __init__(self, blocks: Sequence[BlockWeights], norm: Tensor, ends: Ends | None = None):
        first = blocks[0]
        self.parameters = tuple(p for block in blocks for p in block) + (norm,) + (() if ends is None else tuple(ends))
        self.dtype = norm.dtype
        self.depth = len(blocks)
        width, inner = first.out_weight.shape
        self.reach = first.conv_weight.shape[0] - 1
        self.inner = inner
        ends_sizes = (0, 0, 0) if ends is None else (ends.embed_weight.shape[1], len(ends.table), len(ends.head_bias))
        self.sizes = (len(blocks), width, inner, self.reach + 1, len(first.input_bias), first.mlp_weight.shape[1],
                      *ends_sizes)  # fmt: skip
        shapes = [[p.shape for p in block] for block in blocks]
        if any(shape != shapes[0] for shape in shapes) or self.dtype not in (torch.float32, torch.float64):
            raise ValueError("blocks of different sizes or of another type")
        if not all(type(p) is torch.nn.Parameter and p.device.type == "cpu" for p in self.parameters):
            raise ValueError("a parameter that is not plain")
        self.numels = [p.numel() for p in self.parameters]
        self.dtypes = [self.dtype] * len(self.numels)
        self.scalar = np.float32 if self.dtype == torch.float32 else np.float64
        # Offsets of the gradients in their buffer, in bytes.
        self.offsets = np.cumsum([0, *self.numels[:-1]]) * self.scalar().itemsize
        self.size = sum(self.numels)

    def as_made(self) -> bool:
        """Whether what `p.data` of each parameter is now still has the size, type and order it had."""
        parameters = self.parameters
        return (
            list(map(Tensor.numel, parameters)) == self.numels
            and all(map(Tensor.is_contiguous, parameters))
            and list(map(attrgetter("dtype"), parameters)) == self.dtypes
        )

    def addresses(self) -> Any:
        return np.fromiter(map(Tensor.data_ptr, self.parameters), np.int64, len(self.parameters))


def gated_block_fits(x: Tensor, width: int) -> bool:
    """Whether the single pass serves: few steps of a narrow model, on the CPU, and no transform under way."""
    rows = x.shape[0] * x.shape[1]
    return (
        x.ndim == 3
        and 0 < rows <= MAX_ROWS
        and rows * width <= MAX_WORK
        and type(x) in (Tensor, torch.nn.Parameter)
        and x.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch._C._functorch.peek_interpreter_stack()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._get_tracing_state()
        and torch.autograd.forward_ad._current_level < 0
    )


class Sink:
    """Puts the gradients of a pass into `p.grad` itself, which takes autograd longer than to compute them.

    For whoever calls `backward()` to find gradients in `p.grad` and nowhere else. They are parts of one
    buffer, `flat`, which serves again once nobody holds a part of it.
    """

    def __init__(self) -> None:
        self.weights: Weights | None = None
        self.flat: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()
        self.names: frozenset[int] = frozenset()
        self.taken: list[Taken] | None = None
        """Passes whose gradients were taken, or that have none, if somebody wants to know."""
        self.last: _Call | None = None
        """The last pass without a gradient: who asks for that of the same pass need not have it run again."""

    def __reduce__(self) -> Any:
        return Sink, ()

    def __enter__(self) -> "Sink":
        _sinks.open = [*getattr(_sinks, "open", ()), self]
        return self

    def __exit__(self, *_: Any) -> None:
        _sinks.open = _sinks.open[:-1]

    def holds_all(self, gradients: Sequence[Tensor]) -> bool:
        """Whether these are the parts of `flat`, all of them."""
        return len(gradients) == len(self.parts) and self.names.issuperset(map(id, gradients))

    def buffer(self, weights: Weights) -> tuple[Tensor, bool]:
        """Where to add gradients, and whether these are those of the parameters already."""
        parameters = weights.parameters
        before = [p.grad for p in parameters]
        same = self.weights is weights
        if not all(map(is_, before, repeat(None))):
            if same and all(
                gradient is part or not p.requires_grad
                for p, gradient, part in zip(parameters, before, self.parts, strict=True)
            ):
                assert self.flat is not None
                return self.flat, True
            return torch.zeros(weights.size, dtype=weights.dtype), False
        if same and self._unheld():
            assert self.flat is not None
            self.flat.zero_()
        else:
            self.weights, self.flat = weights, torch.zeros(weights.size, dtype=weights.dtype)
            self.parts = torch._utils._unflatten_dense_tensors(self.flat, parameters)
            self.names = frozenset(map(id, self.parts))
        for p, part, wanted in zip(parameters, self.parts, map(_wanted, parameters), strict=True):
            if wanted:
                p.grad = part
        return self.flat, True

    def take(self, call: "_Call", dy: Tensor | None, dstates: Sequence[Tensor | None]) -> tuple[Any, list[Tensor]]:
        """The backward pass of `call`, its gradients of parameters added to their `grad`."""
        weights = call.weights
        flat, placed = self.buffer(weights)
        dx, states = call.backward(dy, dstates, flat)
        if self.taken is not None and placed:
            self.taken.append(Taken(call, flat))
        if not placed:
            parts = torch._utils._unflatten_dense_tensors(flat, weights.parameters)
            for p, part in zip(weights.parameters, parts, strict=True):
                if p.requires_grad:
                    p.grad = part if p.grad is None else p.grad + part
        return dx, states

    def _unheld(self) -> bool:
        assert self.flat is not None
        owners = torch._C._storage_Use_Count(self.flat.untyped_storage()._cdata)
        # The storage for `flat`, itself here, and each part; a part for the tuple and this call.
        return owners <= len(self.parts) + 2 and max(map(sys.getrefcount, self.parts)) <= 2


class Taken(NamedTuple):
    """A pass whose gradients of parameters are in `flat`; None if it has none."""

    call: "_Call"
    flat: Tensor | None

    def decays(self) -> list[Tensor]:
        """The parameter Λ of each block, by which it is known whose pass this was."""
        return list(self.call.weights.parameters[11 : 19 * self.call.weights.depth : 19])

    def apply(self, traces: Sequence[Mapping[str, Tensor]], advance: bool) -> None:
        """Add to the gradients of parameters, if there are some, what goes on by the traces of the states before the
        pass; then, if asked to, bring the traces to the states after it, in place.

        Args:
            traces: of each block, contiguous, as `pliant.mixers.GatedLRU.advance_traces` makes them.
        """
        call, sizes, where = self.call, self.call.weights.sizes, _addresses(traces)
        if self.flat is not None:
            gradients = call.weights.offsets + self.flat.data_ptr()
            credit_pass(call.addresses, gradients, where, sizes, call.constants, *call.slopes)
        if advance:
            advance_pass(call.addresses, where, sizes, call.constants, *call.flags, call.seen, call.source, call.work,
                         call.first)  # fmt: skip


def _addresses(traces: Sequence[Mapping[str, Tensor]]) -> Any:
    parts = [each[name] for each in traces for name in NAMES]
    assert all(map(Tensor.is_contiguous, parts))
    return np.fromiter(map(Tensor.data_ptr, parts), np.int64, len(parts))


_sinks = threading.local()
_version, _wanted = attrgetter("_version"), attrgetter("requires_grad")


class _Call:
    """What one pass reads, and keeps for its gradient."""

    def __init__(self, weights: Weights, states: Sequence[tuple[Tensor, Tensor, Tensor]], reset: Tensor | None,
                 mask: Tensor | None, numbers: Any, codes: Any, offset: Any,
                 constants: tuple[float, float, float]):  # fmt: skip
        self.weights = weights
        self.states, self.reset, self.mask = states, reset, mask
        self.numbers, self.codes, self.offset = numbers, codes, offset
        self.constants = constants_of(weights.scalar, *constants)
        self.sink: Sink | None = None

    def forward(self, x: Tensor | None, batch: int, steps: int) -> tuple[Tensor, list[Tensor]]:
        """Features or outputs `(B, T, ·)`, and conv, h, fresh of each block."""
        weights, dtype = self.weights, self.weights.scalar
        depth, width, inner, taps, _, hidden, inputs, _, outputs = weights.sizes
        rows, reach = batch * steps, taps - 1
        self.shape = (batch, steps)
        # Held for the backward pass: what the addresses point to.
        self.held = [leaf.contiguous() for state in self.states for leaf in state]
        before = np.array(list(map(Tensor.data_ptr, self.held)), np.int64)
        self.addresses = weights.addresses()
        self.versions = list(map(_version, weights.parameters))
        self.flags = (_flags(self.reset, batch, steps, False), _flags(self.mask, batch, steps, True))
        self.layers = np.empty((depth + 1, rows, width), dtype)
        if x is not None:
            self.layers[0] = x.detach().numpy().reshape(rows, width)
        self.seen = np.empty((depth, batch, reach + steps, inner), dtype)
        self.source = np.empty((batch, steps + 1, taps), np.int64)
        self.work = np.empty((depth, rows * (2 + 3 * width + 9 * inner + 3 * hidden)), dtype)
        self.first = np.empty((depth, batch, steps), np.bool_)
        self.top = np.empty((rows, width + 1), dtype)
        self.fed = np.empty((rows, inputs), dtype)
        y = self.y = np.empty((batch, steps, outputs or width), dtype)
        after = [np.empty(shape, dtype) for shape in ((depth, batch, reach, inner), (depth, batch, inner))]
        fresh = np.empty((depth, batch), np.bool_)
        forward_pass(self.addresses, before, weights.sizes, self.constants, *self.flags, self.numbers, self.codes,
                 self.offset, self.layers, self.seen, self.source, self.work, self.first, self.top, self.fed,
                 y.reshape(rows, -1), *after, fresh)  # fmt: skip
        states = [torch.from_numpy(part[k]) for k in range(depth) for part in (*after, fresh)]
        return torch.from_numpy(y), states

    def gave(self, states: Sequence[tuple[Tensor, ...]], reset: Tensor | None, mask: Tensor | None, numbers: Any,
             codes: Any, offset: Any, constants: tuple[float, float, float]) -> bool:  # fmt: skip
        """Whether the forward pass of a stack with `Ends` would give the same again; arguments as of a call."""
        if constants_of(self.weights.scalar, *constants) is not self.constants:
            return False
        if not all(map(is_, chain.from_iterable(self.states), chain.from_iterable(states))):
            return False
        flags = _flags(reset, *self.shape, False), _flags(mask, *self.shape, True)
        same = zip((*flags, numbers, codes, offset), (*self.flags, self.numbers, self.codes, self.offset), strict=True)
        return all(one.tobytes() == two.tobytes() for one, two in same) and self.is_current()

    def is_current(self) -> bool:
        """Whether the parameters are still as the forward pass has read them."""
        same = list(map(_version, self.weights.parameters)) == self.versions
        return same and np.array_equal(self.weights.addresses(), self.addresses)

    def backward(self, dy: Tensor | None, dstates: Sequence[Tensor | None], flat: Tensor) -> tuple[Any, list[Tensor]]:
        """Gradients of x `(B T, D)`, and of conv and h of each block; those of parameters are added to `flat`."""
        weights, dtype = self.weights, self.weights.scalar
        depth, width, inner, taps, _, _, _, _, outputs = weights.sizes
        batch, steps = self.shape
        gradients = weights.offsets + flat.data_ptr()
        if dy is None:
            dy_rows = np.zeros((batch * steps, outputs or width), dtype)
        else:
            dy_rows = dy.detach().contiguous().numpy().reshape(batch * steps, -1)
        dconv = np.zeros((depth, batch, taps - 1, inner), dtype)
        dh = np.zeros((depth, batch, inner), dtype)
        for k in range(depth):
            for part, given in ((dconv, dstates[3 * k]), (dh, dstates[3 * k + 1])):
                if given is not None:
                    part[k] = given.detach().numpy()
        self.slopes = dconv, dh
        dx = np.empty((batch * steps, width), dtype)
        backward_pass(self.addresses, gradients, weights.sizes, self.constants, *self.flags, self.codes, self.layers,
                  self.seen, self.source, self.work, self.first, self.top, self.fed, dy_rows, dconv, dh,
                  dx)  # fmt: skip
        states = [torch.from_numpy(part[k]) for k in range(depth) for part in (dconv, dh)]
        return dx, states


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, batch, steps, x, *tensors):  # type: ignore[no-untyped-def]
        y, states = call.forward(x, batch, steps)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(*states[2::3])
        return y, *states

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, *dstates):  # type: ignore[no-untyped-def]
        call, need = ctx.call, ctx.needs_input_grad
        weights, sink = call.weights, call.sink
        if not call.is_current():
            raise RuntimeError("a parameter was modified by an inplace operation between the single pass of a stack "
                               "and its gradient; run the model again")  # fmt: skip
        given: list[Tensor | None] = []
        if sink is None:
            flat = torch.zeros(weights.size, dtype=weights.dtype)
            dx, states = call.backward(dy, dstates, flat)
            given = [*states, *torch._utils._unflatten_dense_tensors(flat, weights.parameters)]
        else:
            dx, states = sink.take(call, dy, dstates)
            given = [*states, None]
        found = [g if wanted else None for g, wanted in zip(given, need[4:], strict=True)]
        return None, None, None, torch.from_numpy(dx).view(*call.shape, -1) if need[3] else None, *found


def gated_block(
    x: Tensor | None,
    states: Sequence[tuple[Tensor, Tensor, Tensor]],
    weights: Weights,
    reset: Tensor | None,
    mask: Tensor | None,
    *,
    decay_power: float,
    max_derivative: float,
    eps: float,
    numbers: Tensor | None = None,
    codes: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]]]:
    """Run a stack over `(B, T, D)`, or with `Ends` over numbers and codes.

    Args:
        x: `(B, T, D)` in the float type of the parameters; None with `Ends`.
        states: of each block conv `(B, K-1, W)`, the last inputs of the convolution, oldest first; h
            `(B, W)`, state of the recurrence; fresh `(B,)` bool, no step yet.
        weights: the parameters.
        reset, mask: `(B, T)` bool or None.
        decay_power, max_derivative, eps: the constants C and G of the unit, and that of the norms.
        numbers: `(B, T, N)` float64, with `Ends`; no gradient goes there.
        codes: `(B, T, M)`, rows of the table to add, whole numbers of any type, with `Ends`.
        offset: `(B, T, C)` float64, to be added to the outputs of `Ends`; no gradient goes there.

    Returns:
        Features after the norm `(B, T, D)`, or with `Ends` outputs of the head `(B, T, C)`; and the
        states after the last step.
    """
    like = numbers if x is None else x
    assert like is not None
    batch, steps = like.shape[:2]
    constants = (decay_power, max_derivative, eps)
    call = _Call(weights, states, reset, mask, *_rows_of(numbers, codes, offset, batch * steps), constants)
    if torch.is_grad_enabled():
        floats = [leaf for conv, h, _ in states for leaf in (conv, h)]
        sinks = getattr(_sinks, "open", ())
        inputs: tuple[Tensor, ...] = weights.parameters
        if sinks:
            call.sink = sinks[-1]
            # Stands for all parameters in the graph.
            inputs = (torch.empty(0, requires_grad=any(map(_wanted, weights.parameters))),)
        y, *after = _Pass.apply(call, batch, steps, x, *floats, *inputs)
    else:
        y, after = call.forward(x, batch, steps)
        if sinks := getattr(_sinks, "open", ()):
            sinks[-1].last = call if x is None else None
            y = y.clone()  # what is kept is not given away
            if sinks[-1].taken is not None:
                sinks[-1].taken.append(Taken(call, None))
    return y, list(zip(after[::3], after[1::3], after[2::3], strict=True))


def gated_block_descent(
    slope: Callable[[Tensor], tuple[float, Tensor | None]],
    states: Callable[[], Sequence[tuple[Tensor, Tensor, Tensor]]],
    weights: Callable[[], Weights | None],
    reset: Tensor | None,
    mask: Tensor | None,
    *,
    decay_power: float,
    max_derivative: float,
    eps: float,
    numbers: Tensor,
    codes: Tensor | None = None,
    offset: Tensor | None = None,
    sink: Sink,
) -> float | None:
    """Gradients of a loss of `gated_block` with `Ends`, put where `sink` says, with no graph in between.

    The last pass that `sink` has heard of serves if it was the same.

    Args:
        slope: from the outputs `(B, T, C)` to the loss and its gradient with regard to them, None for none.
        states, weights: make what `gated_block` takes; asked only where there are some, weights only for a new pass.
        reset, mask, decay_power, max_derivative, eps, numbers, codes, offset: see there.

    Returns:
        The loss; None if there are no weights, and then nothing was done.
    """
    batch, steps = numbers.shape[:2]
    given = (*_rows_of(numbers, codes, offset, batch * steps), (decay_power, max_derivative, eps))
    call, sink.last = sink.last, None
    if call is None or not call.gave(states(), reset, mask, *given):
        if (found := weights()) is None:
            return None
        call = _Call(found, states(), reset, mask, *given)
        call.forward(None, batch, steps)
    loss, dy = slope(torch.from_numpy(call.y))
    if dy is not None:
        sink.take(call, dy, [None] * (3 * call.weights.depth))
    return loss


def _rows_of(numbers: Tensor | None, codes: Tensor | None, offset: Tensor | None, rows: int) -> tuple[Any, Any, Any]:
    """`(B T, ·)` arrays, with no columns (an offset: no rows) for what is not there."""
    return (
        np.empty((rows, 0)) if numbers is None else numbers.numpy().reshape(rows, numbers.shape[-1]),
        np.empty((rows, 0)) if codes is None else codes.numpy().reshape(rows, codes.shape[-1]),
        np.empty((0, 0)) if offset is None else offset.numpy().reshape(rows, -1),
    )


def _flags(flag: Tensor | None, batch: int, steps: int, value: bool) -> Any:
    return np.full((batch, steps), value) if flag is None else flag.contiguous().numpy()
