"""How attention disperses as its rows grow longer, head by head, and the length from which no key can be sharp.

n logits whose largest and smallest are d apart give no key more than

    a_max(n) = 1 / (1 + (n - 1) exp(-d / θ)),

which the row attains whose others are all d below its largest, so that all shares are below ε from

    n > 1 + (1/ε - 1) exp(d / θ)

on. In a model with finitely many tokens and no position that grows, d is bounded whatever n is, so every head that
sees all of its input disperses. What a head does on a text is noted beside what it could do at its spread.

Paper: Veličković et al. 2024, softmax is not Enough (for Sharp Size Generalisation), arXiv:2410.01104, lemma 2.1 and
theorem 2.2; the bounds are the tight ones of adaptive-temperature.md 2.1.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from pliant.core import UsageError

FEW = 2
"""Rows of fewer visible keys say nothing."""
MISSING = object()


def share_limits(spread: float | int, n: int, temperature: float | int = 1.0) -> tuple[float, float]:
    """The least and the largest share that a key of n can have where logits are at most `spread` apart."""
    _check(spread, temperature)
    if n < 1:
        raise UsageError(f"share_limits: n is {n}, expected at least 1")
    if n == 1:
        return 1.0, 1.0
    ratio = spread / temperature
    # exp(-ratio) / (exp(-ratio) + n - 1), in which nothing overflows
    small = math.exp(-ratio)
    return small / (small + n - 1), 1 / (1 + (n - 1) * small)


def sharp_limit(spread: float | int, share: float | int, temperature: float | int = 1.0) -> int | float:
    """The smallest n at which no key can hold the share.

    Args:
        spread: d, the largest logit less the smallest, as softmax gets them.
        share: ε, above 0, at most 1.
        temperature: θ, by which logits are divided before.

    Returns:
        n; infinite where it is beyond the floats.

    Raises:
        UsageError: an argument is out of range.
    """
    _check(spread, temperature)
    if not 0 < share <= 1:
        raise UsageError(f"sharp_limit: share is {share:g}, expected above 0 and at most 1")
    if share == 1:
        return 2
    exponent = spread / temperature + math.log1p(-share) - math.log(share)
    if exponent > 700:
        return math.inf
    edge = 1 + (1 / share - 1) * math.exp(spread / temperature)
    whole = round(edge)
    # At the edge itself the share is still held; what is within rounding of a whole number is that number.
    return (whole if abs(edge - whole) <= 1e-12 * edge else math.floor(edge)) + 1


def _check(spread: float | int, temperature: float | int) -> None:
    if not spread >= 0 or not temperature > 0 or not math.isfinite(spread):
        raise UsageError(
            f"spread is {spread:g} and temperature {temperature:g}, expected a spread of at least 0 and a temperature "
            "above 0"
        )


class Rows(NamedTuple):
    """What was noted of the rows of a layer: keys `(R,)` int64 that each saw; the others `(H, R)`, one per head.

    spread: largest logit less smallest; entropy: of softmax, in nats; top: the largest share.
    """

    keys: Tensor
    spread: Tensor
    entropy: Tensor
    top: Tensor


class Watch:
    """A `sharpen` that notes what logits it is given and leaves the weights to another, softmax if that is None."""

    def __init__(self, sharpen: Callable[..., Tensor] | None = None):
        self.sharpen = sharpen
        self._rows: list[Rows] = []

    @property
    def reads_queries(self) -> bool:
        return getattr(self.sharpen, "reads_queries", False)

    def __call__(self, logits: Tensor, dim: int = -1, mask: Tensor | None = None, **more: Any) -> Tensor:
        visible = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask.expand_as(logits)
        self._rows.append(rows_of(logits.detach().movedim(dim, -1), visible.movedim(dim, -1)))
        if self.sharpen is not None:
            return self.sharpen(logits, dim=dim, mask=mask, **more)
        # Rows of which nothing is visible weigh nothing.
        return torch.where(visible, logits, -torch.inf).softmax(dim).nan_to_num(0.0)

    def rows(self) -> Rows:
        """All that was noted, where more than one key was visible.

        Raises:
            UsageError: nothing was.
        """
        if not self._rows:
            raise UsageError("nothing was noted: the model did not use this attention")
        parts = zip(*self._rows, strict=True)
        return Rows(*(torch.cat([x.cpu() for x in part], -1) for part in parts))


def rows_of(logits: Float[Tensor, "*B H T N"], mask: Bool[Tensor, "*B H T N"]) -> Rows:
    """Of logits by head; rows that see fewer than two keys, or not as many as other heads do, are left out.

    Raises:
        UsageError: a visible logit is NaN.
    """
    logits = logits.double()
    if (logits.isnan() & mask).any():
        raise UsageError("the model gives logits that are no numbers (NaN)")
    hidden = torch.where(mask, logits, -torch.inf)
    top, low = hidden.amax(-1), torch.where(mask, logits, torch.inf).amin(-1)
    p = hidden.softmax(-1)
    entropy = -torch.xlogy(p, p).sum(-1)
    found = [x.movedim(-2, 0).flatten(1) for x in (mask.sum(-1), top - low, entropy, p.amax(-1))]
    keys = found[0][0]
    fine = (found[0] == keys).all(0) & (keys >= FEW) & (top - low).isfinite().movedim(-2, 0).flatten(1).all(0)
    return Rows(keys[fine], *(x[:, fine].float() for x in found[1:]))


@contextmanager
def watched(model: nn.Module) -> Iterator[dict[str, Watch]]:
    """Within, every part of `model` that has a `sharpen` notes its rows; by name of the part.

    Raises:
        UsageError: there is no such part.
    """
    parts = {name: part for name, part in model.named_modules() if hasattr(part, "sharpen")}
    if not parts:
        raise UsageError(
            f"{type(model).__name__} has no attention that takes sharpen=; of transformers, "
            "pliant.mixers.drop_in.sharpen_transformer gives it one"
        )
    # In the dictionary of the object an attribute hides a module of that name, which stays in its place.
    before = {name: part.__dict__.get("sharpen", MISSING) for name, part in parts.items()}
    watches = {name: Watch(part.sharpen) for name, part in parts.items()}  # type: ignore[arg-type]
    try:
        for name, part in parts.items():
            part.__dict__["sharpen"] = watches[name]
        yield watches
    finally:
        for name, part in parts.items():
            if before[name] is MISSING:
                del part.__dict__["sharpen"]
            else:
                part.__dict__["sharpen"] = before[name]


class Head(NamedTuple):
    """One head on a text.

    layer: name; head: index; keys: the longest of each group of rows, of lengths within a factor of two, with the mean
    spread of logits, the mean entropy in nats and the mean top share of the group; widest: the largest spread of a row;
    limit: keys from which no key can hold the share asked about, at the widest spread.
    """

    layer: str
    head: int
    widest: float
    keys: list[int]
    spread: list[float]
    entropy: list[float]
    top: list[float]
    limit: int | float


def heads(watches: dict[str, Watch], share: float = 0.5) -> list[Head]:
    """The heads of a model that was `watched`, layer by layer; rows of 2 keys, of 3 to 4, of 5 to 8, and so on.

    Raises:
        UsageError: nothing was noted, or only rows of a single key.
    """
    found = []
    for layer, watch in watches.items():
        rows = watch.rows()
        if not len(rows.keys):
            raise UsageError(f"{layer}: no row had two keys that it could see; the text is too short")
        group = rows.keys.double().log2().ceil().long()
        levels = [int(level) for level in group.unique()]
        for head in range(len(rows.top)):
            spread, entropy, top = ([float(x[head][group == level].mean()) for level in levels]
                                    for x in (rows.spread, rows.entropy, rows.top))  # fmt: skip
            widest = float(rows.spread[head].max())
            lengths = [int(rows.keys[group == level].max()) for level in levels]
            found.append(Head(layer, head, widest, lengths, spread, entropy, top, sharp_limit(widest, share)))
    return found


def table(found: Sequence[Head], share: float = 0.5) -> list[str]:
    """Lines of text: a row for each head, in short rows and in the longest that it had."""
    width = max(len("layer"), *(len(head.layer) for head in found))
    lines = [
        f"{'layer':<{width}}  head  spread  widest  top in {'short':>5}  in long rows  entropy  {share:.0%} lost at"
    ]
    for head in found:
        limit = "never" if head.limit == math.inf else f"{head.limit:,.3g}" if head.limit >= 1e6 else f"{head.limit:,}"
        lines.append(f"{head.layer:<{width}}  {head.head:>4}  {head.spread[-1]:>6.2f}  {head.widest:>6.2f}  "
                     f"{head.top[0]:>12.3f}  {head.top[-1]:>12.3f}  {head.entropy[-1]:>7.3f}  {limit}")  # fmt: skip
    return lines


def verdict(found: Sequence[Head], share: float = 0.5) -> str:
    """One sentence: how many heads have lost their sharpness within the text, and how many can lose it soon."""
    if not found:
        raise UsageError("verdict: there are no heads")
    longest = max(head.keys[-1] for head in found)
    first, last = ([head.top[i] for head in found] for i in (0, -1))
    lost = sum(a >= share > b for a, b in zip(first, last, strict=True))
    sharp = [head for head in found if head.top[-1] >= share]
    said = f"{lost} of {len(found)} heads held {share:.0%} on their top key in short rows and no longer in the longest"
    if not sharp:
        return f"{said}; none holds it at {longest} keys"
    soonest = min(sharp, key=lambda head: head.limit)
    return (
        f"{said}; of the {len(sharp)} that hold it at {longest} keys the first that cannot is {soonest.layer} head "
        f"{soonest.head}, from {soonest.limit:,.3g} keys on"
    )
