"""Parity of S6 with transformers and of the selective scan with mambapy (further-mixers.md, checks B1 and B2).

Transformers' forward over several steps with a cache begins at zero, so states are not compared.
"""

import warnings
from typing import Any

import pytest
import torch

from pliant.core import seeded
from pliant.kernels import selective_scan
from pliant.mixers import S6
from tests.suite import close

pytestmark = [pytest.mark.oracle, pytest.mark.global_rng]

SIZES = (6, 2, 3, 4, 2)
NAMES = {
    "linear_in.weight": "in_proj.weight",
    "conv_weight": "conv1d.weight",
    "conv_bias": "conv1d.bias",
    "linear_select.weight": "x_proj.weight",
    "linear_step.weight": "dt_proj.weight",
    "linear_step.bias": "dt_proj.bias",
    "log_rate": "A_log",
    "skip": "D",
    "linear_out.weight": "out_proj.weight",
}


def pair() -> tuple[S6, Any]:
    """Our block and theirs, with the same weights."""
    with warnings.catch_warnings(action="ignore"):
        modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
        width, expand, state, conv, rank = SIZES
        config = modeling.MambaConfig(hidden_size=width, expand=expand, state_size=state, conv_kernel=conv,
                                      time_step_rank=rank, num_hidden_layers=1, vocab_size=4)  # fmt: skip
        theirs = modeling.MambaMixer(config, layer_idx=0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    with seeded(0):
        ours = S6(*SIZES)
    ours.load_mamba(theirs.state_dict())
    return ours, theirs


def test_the_block_has_their_outputs_and_gradients() -> None:
    ours, theirs = pair()
    x = torch.randn(2, 70, 6)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    with warnings.catch_warnings(action="ignore"):
        y, z = ours(mine)[0], theirs(its)
    weigh = torch.linspace(-1, 1, y.numel()).reshape(y.shape)
    (y * weigh).sum().backward()
    (z * weigh).sum().backward()
    close(y, z)
    close(mine.grad, its.grad)
    for a, b in NAMES.items():
        grad = theirs.get_parameter(b).grad
        close(ours.get_parameter(a).grad, grad[:, 0].T.contiguous() if a == "conv_weight" else grad.reshape(
            ours.get_parameter(a).shape))  # fmt: skip


def test_padding_at_the_left_is_theirs() -> None:
    ours, theirs = pair()
    mask = torch.ones(2, 9, dtype=torch.bool)
    mask[0, :4] = False
    x = torch.randn(2, 9, 6)
    with warnings.catch_warnings(action="ignore"):
        z = theirs(x, attention_mask=mask.long())
    close(ours(x, mask=mask)[0][mask], z[mask])


def test_the_scan_has_the_outputs_and_gradients_of_mambapy() -> None:
    mamba = pytest.importorskip("mambapy.mamba")
    shapes = {"u": (2, 70, 5), "dt": (2, 70, 5), "A": (5, 3), "B": (2, 70, 3), "C": (2, 70, 3), "D": (5,)}
    given = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    given["dt"], given["A"] = given["dt"].exp() / 10, -given["A"].exp()
    found = []
    for scan in (
        lambda *x: selective_scan(*x, form="numba")[0],
        lambda *x: mamba.MambaBlock.selective_scan(None, *x),
    ):
        leaves = [value.clone().requires_grad_() for value in given.values()]
        y = scan(*leaves)
        found.append([y, *torch.autograd.grad(y.square().sum(), leaves)])
    for one, two in zip(*found, strict=True):
        close(one, two)
