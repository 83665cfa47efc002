"""Nested values to JSON and safetensors, and back. Never pickle.

A value is built of dicts, lists, tuples, None, bool, int, float, str and tensors, which is what
`state_dict()` methods return. `pack` splits it into a JSON tree and a flat table of tensors;
`unpack` puts it together again, to the bit.
"""

import json
import math
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pliant.core.files import digest

SCHEMA = 1


def pack(value: Any) -> tuple[bytes, bytes]:
    """JSON bytes and safetensors bytes of a nested value.

    Raises:
        TypeError: something in it is of another type; the message names where.
    """
    tensors: dict[str, Tensor] = {}
    tree = _pack(value, "", tensors)
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode(), save_tensors(tensors)


def unpack(tree: bytes, tensors: bytes) -> Any:
    """The value that `pack` was given."""
    return _unpack(json.loads(tree), load_tensors(tensors))


def pack_file(value: Any) -> bytes:
    """A nested value as the bytes of one file, with a checksum."""
    tree, tensors = pack(value)
    head = {"schema": SCHEMA, "tree": len(tree)}
    whole = digest(json.dumps(head).encode() + tree + tensors)
    return json.dumps(head | {"sha256": whole}).encode() + b"\n" + tree + tensors


def unpack_file(data: bytes) -> Any:
    """The value that `pack_file` was given.

    Raises:
        ValueError: the bytes are not whole, or of a newer schema.
    """
    line, _, body = data.partition(b"\n")
    try:
        head = json.loads(line)
        sha256, newer, size = head.pop("sha256"), head["schema"] > SCHEMA, head["tree"]
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError("it was not written by pliant") from None
    if newer:
        raise ValueError("it was written by a newer version")
    if digest(json.dumps(head).encode() + body) != sha256:
        raise ValueError("it is torn or was altered")
    return unpack(body[:size], body[size:])


def _pack(value: Any, where: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        plain = value.detach().cpu()
        kind = "complex" if plain.is_complex() else "tensor"
        plain = torch.view_as_real(plain) if plain.is_complex() else plain
        tensors[where] = plain.contiguous().clone()
        return {kind: where}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(part, f"{where}/{key}", tensors)] for key, part in value.items()]}
    if isinstance(value, list | tuple):
        kind = "list" if isinstance(value, list) else "tuple"
        return {kind: [_pack(part, f"{where}/{i}", tensors) for i, part in enumerate(value)]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise TypeError(f"cannot save {type(value).__name__} at {where or 'the root'}")


def _unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        return tree
    ((kind, body),) = tree.items()
    match kind:
        case "tensor":
            return tensors[body]
        case "complex":
            return torch.view_as_complex(tensors[body])
        case "dict":
            return {key: _unpack(part, tensors) for key, part in body}
        case "float":
            return float(body)
        case "list":
            return [_unpack(part, tensors) for part in body]
        case "tuple":
            return tuple(_unpack(part, tensors) for part in body)
    raise ValueError(f"unknown kind {kind!r} in a packed tree")


def differences(one: Any, two: Any, where: str = "") -> list[str]:
    """Names of the parts in which two nested values differ, compared to the bit."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and _bits(one) == _bits(two)
        return [] if same else [where]
    if isinstance(one, dict) and isinstance(two, dict):
        return [
            name
            for key in dict.fromkeys([*one, *two])
            for name in differences(one.get(key), two.get(key), f"{where}.{key}" if where else str(key))
        ]
    if isinstance(one, list | tuple) and isinstance(two, list | tuple) and len(one) == len(two):
        pairs = zip(one, two, strict=True)
        return [name for i, (a, b) in enumerate(pairs) for name in differences(a, b, f"{where}.{i}")]
    same = type(one) is type(two) and (one == two or (one != one and two != two))
    return [] if same else [where]


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
