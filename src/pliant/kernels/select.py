"""Which form of a kernel to use here; can be overruled by name."""

import logging
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

from torch import Tensor

from pliant.core import UsageError

logger = logging.getLogger("pliant.kernels")


def select(kernel: str, forms: Mapping[str, Callable[..., Any]], x: Tensor, form: str | None) -> Callable[..., Any]:
    """The form named `form`, or the fastest one for the device of `x`.

    `forms` maps names to functions of one signature; `"loop"` is the readable form and is always there.

    Raises:
        UsageError: no form of that name.
    """
    if form is not None:
        if form not in forms:
            raise UsageError(f"{kernel}: there is no form {form!r}; choose one of {', '.join(forms)}")
        return forms[form]
    if x.device.type == "cpu" and "numba" in forms:
        return forms["numba"]
    _say_once(f"{kernel}: no fast form for {x.device.type} tensors yet, using the readable loop")
    return forms["loop"]


@cache
def _say_once(message: str) -> None:
    logger.warning(message)
