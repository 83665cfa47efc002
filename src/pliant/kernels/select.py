"""Which form of a kernel to use here; can be overruled by name."""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from importlib.util import find_spec
from typing import Any

from torch import Tensor

from pliant.core import UsageError

logger = logging.getLogger("pliant.kernels")

HAS_TRITON = find_spec("triton") is not None
"""Whether the package is there; it is imported where a tensor on a CUDA device needs it, and not before."""

DEVICES = {"numba": "cpu", "triton": "cuda"}
"""Forms that take tensors on one device alone."""


def select(kernel: str, forms: Mapping[str, Callable[..., Any]], x: Tensor, form: str | None) -> Callable[..., Any]:
    """The form named `form`, or the fastest one for the device of `x`.

    `forms` maps names to functions of one signature; `"loop"` is the readable form and is always there.

    Raises:
        UsageError: no form of that name, or the package it needs is not installed.
    """
    if form is not None:
        if form not in forms:
            here = [name for name in forms if DEVICES.get(name, x.device.type) == x.device.type]
            raise UsageError(f"{kernel}: there is no form {form!r}; choose one of {', '.join(here)}")
        if form == "triton" and not HAS_TRITON:
            raise UsageError(f"{kernel}: the form 'triton' needs the package triton, which is not installed")
        return forms[form]
    if x.device.type == "cpu" and "numba" in forms:
        return forms["numba"]
    if x.device.type == "cuda" and "triton" in forms:
        if HAS_TRITON:
            return forms["triton"]
        _say_once(f"{kernel}: the fast form for cuda tensors needs the package triton, using the readable loop")
    else:
        _say_once(f"{kernel}: no fast form for {x.device.type} tensors yet, using the readable loop")
    return forms["loop"]


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
