"""What operators of our own cannot do is said, and never answered with numbers that are wrong."""

import pytest
import torch
from torch.autograd import forward_ad

from pliant.kernels import linear_scan


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
