"""The series against 80-bit arithmetic: errors in roundings of the type."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from pliant.kernels import _math
from pliant.kernels._jit import jit_exact


@jit_exact
def evaluate(x, exps, tanhs, sigmoids, logs):  # type: ignore[no-untyped-def]
    for i in range(x.shape[0]):
        exps[i] = _math.exp(x[i])
        tanhs[i] = _math.tanh(x[i])
        sigmoids[i] = _math.sigmoid(x[i])
        logs[i] = _math.log1p_unit(min(abs(x[i]), _math.one(x[i])))


def found(x: np.ndarray) -> list[np.ndarray]:
    outputs = [np.empty_like(x) for _ in range(4)]
    evaluate(x, *outputs)
    return outputs


EXACT: tuple[Callable[[Any], Any], ...] = (
    np.exp,
    np.tanh,
    lambda x: 1 / (1 + np.exp(-x)),
    lambda x: np.log1p(np.minimum(abs(x), 1)),
)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_every_function_is_within_a_few_roundings(dtype: type) -> None:
    points = (np.linspace(-85, 85, 50_001), np.linspace(-1, 1, 50_001), np.geomspace(1e-30, 1, 500), [0])
    x = np.concatenate(points).astype(dtype)
    for value, exact in zip(found(x), EXACT, strict=True):
        right = exact(x.astype(np.longdouble))
        error = np.abs(value - right) / np.maximum(np.abs(right), np.finfo(dtype).tiny) / np.finfo(dtype).eps
        assert float(error.max()) < 3


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_far_out_they_end_and_what_is_no_number_stays_none(dtype: type) -> None:
    exps, tanhs, sigmoids, _ = found(np.array([-np.inf, -1e4, 1e4, np.inf], dtype))
    assert exps[0] == exps[1] == 0
    assert np.isfinite(exps).all()
    assert tanhs.tolist() == [-1, -1, 1, 1]
    assert sigmoids[2] == sigmoids[3] == 1
    assert 0 <= sigmoids[0] == sigmoids[1] < 1e-37
    assert all(np.isnan(value[0]) for value in found(np.array([np.nan], dtype))[:3])
