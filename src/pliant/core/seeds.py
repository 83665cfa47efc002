"""One seed in, named independent generators out."""

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def _child(seed: int, name: str) -> int:
    # A hash instead of seed + k: neighboring seeds and names must not share their numbers.
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def generator(seed: int, name: str) -> torch.Generator:
    """A CPU generator that belongs to `name` alone, such as `generator(0, "init")`."""
    return torch.Generator().manual_seed(_child(seed, name))


def numpy_generator(seed: int, name: str) -> np.random.Generator:
    """The same for numpy."""
    return np.random.default_rng(_child(seed, name))


@contextmanager
def seeded(seed: int, name: str = "init") -> Iterator[None]:
    """Give torch's global CPU generator a seed of its own for a while; afterwards it is as before.

    For code that draws from the global generator, such as the constructors of `torch.nn`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(_child(seed, name))
        yield
