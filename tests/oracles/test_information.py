"""Entropies with corrections, and transfer entropy, beside infomeasure and pyinform."""

from typing import Any

import numpy as np
import pytest

from pliant.measure.information import directed_information
from pliant.measure.lifetimes import CORRECTIONS, Lifetimes

AGPL = "infomeasure is under the AGPL and installed by hand alone"
pytestmark = pytest.mark.oracle
THEIRS = {"none": "discrete", "miller-madow": "miller_madow", "chao-shen": "chao_shen"}
"""Not Grassberger's, which is that of neither 1988 nor 2003 there; ours is tested by its recursion."""


@pytest.mark.parametrize("correction", THEIRS)
@pytest.mark.parametrize("seed", range(3))
def test_corrected_entropies(correction: str, seed: int) -> None:
    im = pytest.importorskip("infomeasure", reason=AGPL)
    rng = np.random.default_rng(seed)
    symbols = rng.choice(30, 100, p=rng.dirichlet(np.full(30, 0.5)))
    counts = np.bincount(symbols)
    ours = CORRECTIONS[correction](counts[counts > 0], 100)
    assert ours == pytest.approx(im.entropy(symbols, approach=THEIRS[correction], base="e"), abs=1e-9)


def infomeasure(x: np.ndarray, y: np.ndarray) -> float:
    im = pytest.importorskip("infomeasure", reason=AGPL)
    return float(im.te(x, y, approach="discrete", base=2))


def pyinform(x: np.ndarray, y: np.ndarray) -> float:
    from pyinform.transferentropy import transfer_entropy  # among what `make oracles` installs

    return float(transfer_entropy(x, y, k=1))


@pytest.mark.parametrize("peer", [infomeasure, pyinform])
def test_transfer_entropy_of_one_lag(peer: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, 20_000)
    y = np.roll(x, 1) ^ (rng.random(20_000) < 0.1)
    flow = Lifetimes(*(np.stack([z[:-1], z[1:]], 1) for z in (x, y))).flow("none")
    for source, sink, pair in (("A", "O", (x, y)), ("O", "A", (y, x))):
        ours: Any = directed_information(flow, (source, (1, 1)), (sink, (2, 2)))  # type: ignore[arg-type]
        assert ours == pytest.approx(peer(*pair), abs=1e-9)
