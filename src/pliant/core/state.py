"""State: the memory of a recurrent layer or model, as a value.

A State is a `NamedTuple` of tensors, or a tuple of States. Axis 0 of every leaf is the stream
(B). Nothing in this package changes a State in place, so an old one stays valid: keep it, fork
it, compare it. Floats are at least float32, flags are bool, counters are int64; the size is
fixed when the state is made and does not grow with time.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pliant.core.errors import UsageError
from pliant.core.files import Disk

State = tuple[Any, ...]
"""A NamedTuple of tensors with streams on axis 0, or a tuple of such."""


def map_state(fn: Callable[..., Tensor], state: Any, *others: Any) -> Any:
    """Apply `fn` to each leaf of `state` (with the matching leaves of `others`), keeping its types."""
    if isinstance(state, Tensor):
        return fn(state, *others)
    parts = [map_state(fn, *same) for same in zip(state, *others, strict=True)]
    return type(state)(*parts) if hasattr(state, "_fields") else tuple(parts)


def leaves(state: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of every leaf, such as `("blocks.0.scan.h", h)`."""
    if isinstance(state, Tensor):
        yield prefix, state
        return
    names = getattr(state, "_fields", None) or [str(i) for i in range(len(state))]
    for name, part in zip(names, state, strict=True):
        yield from leaves(part, f"{prefix}.{name}" if prefix else name)


def take(state: Any, rows: Tensor) -> Any:
    """The state of the streams `rows` (int64, shape `(R,)`), in that order; a stream may repeat."""
    return map_state(lambda leaf: leaf.index_select(0, rows.to(leaf.device)), state)


def put(state: Any, rows: Tensor, part: Any) -> Any:
    """A state in which the streams `rows` have the values of `part` and all others are as in `state`."""
    return map_state(lambda leaf, new: leaf.index_copy(0, rows.to(leaf.device), new), state, part)


def detach(state: Any) -> Any:
    """The same values without their history of gradients."""
    return map_state(Tensor.detach, state)


def to(state: Any, device: torch.device | str) -> Any:
    """The same state on another device; dtypes stay."""
    return map_state(lambda leaf: leaf.to(device), state)


def stack(states: Sequence[Any]) -> Any:
    """One state that holds the streams of all `states`, one after the other on axis 0."""
    if not states:
        raise UsageError("stack: got no states; give at least one")
    return map_state(lambda *same: torch.cat(same, 0), *states)


def nbytes(state: Any) -> int:
    """Bytes that the state occupies."""
    return sum(leaf.numel() * leaf.element_size() for _, leaf in leaves(state))


def check_batch(state: Any, batch: int, who: str) -> None:
    """Raise `UsageError` unless every leaf of `state` was made for `batch` streams."""
    for _, leaf in leaves(state):
        if leaf.shape[0] != batch:
            raise UsageError(
                f"{who}: the state was made for {leaf.shape[0]} streams but the input has {batch}; "
                f"call init_state({batch}) or choose streams with pliant.core.take"
            )


def from_leaves(table: Mapping[str, Tensor], like: Any) -> Any:
    """The state of the same kind as `like` whose leaves are those of `table`, on the devices of `like`.

    Raises:
        UsageError: names, dtypes or shapes (but for the number of streams) do not fit; the message says which.
    """
    expected = dict(leaves(like))
    if table.keys() != expected.keys():
        differing = ", ".join(sorted(table.keys() ^ expected.keys()))
        raise UsageError(f"state: this is the state of another model; leaves that differ: {differing}")
    for name, leaf in expected.items():
        got = table[name]
        if got.shape[1:] != leaf.shape[1:] or got.dtype != leaf.dtype:
            wanted = ("streams", *leaf.shape[1:])
            raise UsageError(
                f"state: {name} is {got.dtype} {tuple(got.shape)}, expected {leaf.dtype} "
                f"({', '.join(map(str, wanted))}); load it into a model of the same configuration"
            )
    names = iter(expected)
    return map_state(lambda leaf: table[next(names)].to(leaf.device), like)


def save_state(state: Any, path: str | Path) -> None:
    """Write the state to one safetensors file, whole or not at all."""
    tensors = {name: leaf.detach().cpu().contiguous().clone() for name, leaf in leaves(state)}
    Disk().replace_file(Path(path), save_tensors(tensors))


def load_state(path: str | Path, *, like: Any) -> Any:
    """Read what `save_state` wrote, as a state of the same kind as `like` (any number of streams).

    Raises:
        UsageError: the file is missing or torn, or its leaves do not fit those of `like`.
    """
    try:
        table = load_tensors(Path(path).read_bytes())
    except (OSError, SafetensorError) as error:
        raise UsageError(f"load_state: {path} cannot be read as a state ({error})") from None
    return from_leaves(table, like)
