"""The linear scan in JAX, for linear_scan.py: one timed run of forward and backward per line of input.

python _linear_scan_jax.py FOLDER scan|associative

FOLDER holds a.npy, u.npy and g.npy; the first run writes h.npy, da.npy and du.npy there.
"""

import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def scan(a: Any, u: Any) -> Any:
    def step(h: Any, at: Any) -> Any:
        h = at[0] * h + at[1]
        return h, h

    swapped = jnp.swapaxes(a, 0, 1), jnp.swapaxes(u, 0, 1)
    return jnp.swapaxes(jax.lax.scan(step, jnp.zeros_like(u[:, 0]), swapped)[1], 0, 1)


def associative(a: Any, u: Any) -> Any:
    return jax.lax.associative_scan(lambda x, y: (x[0] * y[0], y[0] * x[1] + y[1]), (a, u), axis=1)[1]


def main() -> None:
    folder, form = Path(sys.argv[1]), {"scan": scan, "associative": associative}[sys.argv[2]]
    a, u, g = (jnp.asarray(np.load(folder / f"{name}.npy")) for name in ("a", "u", "g"))

    @jax.jit
    def both(a: Any, u: Any, g: Any) -> Any:
        h, back = jax.vjp(form, a, u)
        return h, *back(g)

    first = True
    for _ in sys.stdin:
        began = time.perf_counter()
        found = jax.block_until_ready(both(a, u, g))
        took = time.perf_counter() - began
        if first:
            for name, value in zip(("h", "da", "du"), found, strict=True):
                np.save(folder / f"{name}.npy", value)
        first = False
        print(took, flush=True)


if __name__ == "__main__":
    main()
