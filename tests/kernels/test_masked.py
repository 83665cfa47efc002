"""What stands in a masked step reaches nothing: no output, state or gradient of any form, be it NaN."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pliant.core import leaves
from pliant.kernels import (
    causal_conv,
    delta_rule,
    filter_bank,
    gated_scan,
    gated_unit,
    matrix_memory,
    scalar_memory,
    scale_scan,
    selective_scan,
)

BATCH, STEPS = 2, 9
MASK = torch.tensor([[1, 1, 0, 1, 0, 0, 1, 1, 0], [0, 1, 1, 1, 1, 0, 1, 0, 1]], dtype=torch.bool)
RESET = torch.tensor([[0, 0, 0, 0, 1, 0, 0, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)
FIRST = torch.tensor([[0, 0, 0, 0, 0, 0, 1, 1, 0], [0, 0, 1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool)


class Case(NamedTuple):
    """`call(*steps, *others, reset=, mask=, form=)`; shapes of inputs at each step, without B and T, and of others."""

    call: Callable[..., Any]
    steps: Sequence[tuple[int, ...]]
    others: Sequence[tuple[int, ...]]
    forms: Sequence[str] = ("loop", "numba")


def _conv(x: Tensor, weight: Tensor, bias: Tensor, history: Tensor, **how: Any) -> Any:
    return causal_conv(x, weight, bias, history, **how)


def _scan(x: Tensor, i: Tensor, d: Tensor, rate: Tensor, h0: Tensor, **how: Any) -> Any:
    return gated_scan(x, i, d, rate.abs() + 0.1, h0, FIRST, **how)


def _unit(x: Tensor, iw: Tensor, ib: Tensor, dw: Tensor, db: Tensor, rate: Tensor, h0: Tensor, **how: Any) -> Any:
    return gated_unit(x, iw, ib, dw, db, rate.abs() + 0.1, h0, FIRST, **how)


def _selective(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor, D: Tensor, h0: Tensor, **how: Any) -> Any:
    return selective_scan(u, dt, -A.exp(), B, C, D, h0, **how)


def _matrix(*given: Tensor, **how: Any) -> Any:
    return matrix_memory(*given[:5], given[5:], chunk=4, **how)


def _scalar(pre: Tensor, recurrent: Tensor, *state: Tensor, **how: Any) -> Any:
    c, n, m, h = state
    return scalar_memory(pre, recurrent, (c, n.abs() + 1, m, h), **how)


def _delta(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, erase: Tensor, write: Tensor, s: Tensor, **how: Any) -> Any:
    return delta_rule(q, k, v, -decay, erase, write, s, chunk=4, **how)


def _bank(x: Tensor, weight: Tensor, history: Tensor, **how: Any) -> Any:
    bands, last = filter_bank(x, weight, history, **how)
    return bands.movedim(0, 2), last


def _scales(u: Tensor, scales: Tensor, *system: Tensor, **how: Any) -> Any:
    return scale_scan(u.movedim(2, 0), *system[:3], scales, system[3], **how)


B = BATCH
CASES = {
    "causal_conv": Case(_conv, [(4,)], [(3, 4), (4,), (B, 2, 4)], ("loop", "numba")),
    "filter_bank": Case(_bank, [(4,)], [(2, 2, 3, 4), (B, 6, 4)], ("loop", "conv", "numba")),
    "scale_scan": Case(
        _scales, [(2, 4), (2,)], [(2, 3, 4), (2, 3, 4), (2, 4), (B, 2, 3, 4)], ("loop", "scan", "numba")
    ),
    "gated_scan": Case(_scan, 3 * [(4,)], [(4,), (B, 4)]),
    "gated_unit": Case(_unit, [(1, 4)], [(2, 2, 2), (2, 2), (2, 2, 2), (2, 2), (4,), (B, 1, 4)]),
    "selective_scan": Case(_selective, [(4,), (4,), (3,), (3,)], [(4, 3), (4,), (B, 4, 3)]),
    "matrix_memory": Case(
        _matrix,
        [(2, 3), (2, 3), (2, 3), (2,), (2,)],
        [(B, 2, 3, 3), (B, 2, 3), (B, 2)],
        ("loop", "parallel", "chunkwise", "numba"),
    ),
    "scalar_memory": Case(_scalar, [(4, 2, 3)], [(2, 3, 4, 3), *4 * [(B, 2, 3)]]),
    "delta_rule": Case(_delta, [(2, 3), (2, 3), (2, 3), (2,), (2,), (2,)], [(B, 2, 3, 3)], ("loop", "chunk", "numba")),
}


@pytest.mark.parametrize(("name", "form"), [(name, form) for name, case in CASES.items() for form in case.forms])
def test_what_is_masked_reaches_nothing(name: str, form: str) -> None:
    case, random = CASES[name], torch.Generator().manual_seed(0)
    shapes = [(BATCH, STEPS, *shape) for shape in case.steps] + list(case.others)
    # From 0 to 1, as steps, decays and gates have to be.
    given = [torch.rand(shape, generator=random, dtype=torch.float64) for shape in shapes]
    found = []
    for value in (0.0, torch.nan):
        inputs = [
            torch.where(MASK.reshape(BATCH, STEPS, *[1] * (x.ndim - 2)), x, value) if i < len(case.steps) else x.clone()
            for i, x in enumerate(given)
        ]
        for x in inputs:
            x.requires_grad_()
        y, last = case.call(*inputs, reset=RESET, mask=MASK, form=form)
        ends = [y, *(leaf for _, leaf in leaves(last))]
        loss = sum((x * torch.linspace(-1, 1.5, x.numel(), dtype=x.dtype).reshape(x.shape)).sum() for x in ends)
        grads = torch.autograd.grad(loss, inputs)
        assert all(not g[~MASK].any() for g in grads[: len(case.steps)])
        found.append([x.detach() for x in (*ends, *grads)])
    for zero, masked in zip(*found, strict=True):
        torch.testing.assert_close(masked, zero, rtol=0, atol=0)
