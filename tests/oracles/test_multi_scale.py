"""Parity of the filter bank with PyWavelets, and of the selective scales with mambapy (ms-ssm.md, checks 4 and 9)."""

import numpy as np
import pytest
import torch

from pliant.core import seeded
from pliant.kernels import filter_bank
from pliant.mixers import MultiScaleSSM
from pliant.mixers.multires import wavelet
from tests.suite import close

pytestmark = [pytest.mark.oracle, pytest.mark.global_rng]


@pytest.mark.parametrize(("name", "taps"), [("db1", 2), ("db2", 4), ("db3", 6), ("db8", 16)])
def test_first_filters_are_those_of_pywavelets(name: str, taps: int) -> None:
    pywt = pytest.importorskip("pywt")
    low, high = wavelet("haar" if taps == 2 else "daubechies", taps).flip(1).numpy()  # the current step first
    np.testing.assert_allclose(low, np.array(pywt.Wavelet(name).dec_lo) / 2**0.5, atol=1e-12)
    np.testing.assert_allclose(high, -np.array(pywt.Wavelet(name).dec_hi) / 2**0.5, atol=1e-12)


@pytest.mark.parametrize(("name", "taps"), [("haar", 2), ("db2", 4), ("db4", 8)])
def test_bands_are_the_stationary_wavelet_transform(name: str, taps: int) -> None:
    """Check 4: away from the start, where theirs is circular, up to its delay and the sign of details."""
    pywt = pytest.importorskip("pywt")
    x = torch.randn(256, dtype=torch.float64)
    weight = wavelet("haar" if taps == 2 else "daubechies", taps)[None, ..., None].expand(3, 2, taps, 1)
    bands = filter_bank(x[None, :, None], weight)[0][:, 0, :, 0].numpy()
    approximation, *details = pywt.swt(x.numpy(), name, level=3, trim_approx=True, norm=True)
    late = [taps // 2 * (2**level - 1) for level in (1, 2, 3)]
    interior = slice((taps - 1) * 7, None)
    assert np.abs(bands[4] - np.roll(approximation, late[2]))[interior].max() < 1e-10
    for band, detail, delay in zip(bands[1:4], details[::-1], late, strict=True):
        assert np.abs(band + np.roll(detail, delay))[interior].max() < 1e-10


def test_a_single_selective_scale_is_the_scan_of_mambapy() -> None:
    mamba = pytest.importorskip("mambapy.mamba")
    with seeded(0):
        ours = MultiScaleSSM(6, 0, state_per_scale=3, selective=True, weights="static").double()
    x = torch.randn(2, 70, 6, dtype=torch.float64)
    step, B, C = ours.linear_select(x).split([1, 3, 3], -1)
    dt = torch.nn.functional.softplus(step @ ours.step_weight[0] + ours.step_bias[0])
    theirs = mamba.MambaBlock.selective_scan(None, x, dt, ours.rates()[0].T, B, C, ours.skip[0])
    leaves = [ours.log_rate, ours.linear_select.weight, ours.skip]
    found = [[y, *torch.autograd.grad(y.square().sum(), leaves, retain_graph=True)] for y in (ours(x)[0], theirs)]
    for one, two in zip(*found, strict=True):
        close(one, two)
