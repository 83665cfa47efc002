"""What operators of our own cannot do is said, and never answered with numbers that are wrong."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch.autograd import forward_ad

from pliant.kernels import linear_scan
from pliant.mixers import RGLRU


@pytest.mark.parametrize("dtype", [torch.float64, torch.complex128])
def test_there_is_no_forward_mode(dtype: torch.dtype) -> None:
    x = torch.ones(1, 3, 2, dtype=dtype)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(x, x)
        flag = torch.zeros(1, 3, dtype=torch.bool)
        with pytest.raises(RuntimeError, match="linear_scan has no derivatives in forward mode"):
            linear_scan(x, dual, reset=flag, form="numba")
        assert forward_ad.unpack_dual(linear_scan(x, dual, form="loop")[0]).tangent is not None
        linear_scan(x, x, form="numba")  # without a tangent


def test_there_is_no_gradient_of_a_gradient() -> None:
    x = torch.ones(1, 3, 2, requires_grad=True)
    (dx,) = torch.autograd.grad(linear_scan(x, x, form="numba")[0].sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="need the readable form"):
        torch.autograd.grad(dx.sum(), x)


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev, torch.func.hessian])
def test_functional_gradients_name_the_form_that_has_them(transform: Callable[..., Any]) -> None:
    x = torch.linspace(0.1, 0.9, 6).view(1, 3, 2)

    def total(form: str, u: torch.Tensor) -> torch.Tensor:
        return (linear_scan(x, u, form=form)[0] ** 2).sum()

    with pytest.raises(RuntimeError, match='choose the readable form, form="loop"'):
        transform(partial(total, "numba"))(x)
    u = x.clone().requires_grad_()
    (du,) = torch.autograd.grad(total("numba", u), u)
    torch.testing.assert_close(torch.func.grad(partial(total, "loop"))(x), du)


@pytest.mark.global_rng
def test_a_mixer_says_so_too() -> None:
    model = RGLRU(4)
    with pytest.raises(RuntimeError, match="has no gradients for torch"):
        torch.func.grad(lambda x: model(x)[0].sum())(torch.rand(1, 3, 4))
