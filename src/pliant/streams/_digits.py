"""Handwritten digits, read as sequences.

The data are the 1,797 images of 8 x 8 pixels that scikit-learn carries (UCI, Alpaydin & Kaynak
1998). The stream goes through them in passes, each in a new order.
"""

import torch
from torch import Tensor

from pliant.core import Answer, Question, UsageError, numpy_generator
from pliant.streams.base import Passive, Spec, Stream

CLASSES = 10
SIDE = 8
LAYOUTS = {"row": (SIDE, SIDE), "pixel": (SIDE * SIDE, 1)}


def digits(
    *,
    by: str = "row",
    batch: int = 16,
    questions: int | None = None,
    held_out: float = 0.2,
    images: int | None = None,
    seed: int = 0,
) -> Stream:
    """scikit-learn's digits: one question is `batch` images, the answer their classes.

    Inputs are `(B, 8, 8)` float32 in 0 … 1 (`by="row"`: 8 steps of 8 pixels) or `(B, 64, 1)`
    (`by="pixel"`). Each image is an episode, its target stands at its last step. Tags: `item`, the
    index of the image, and `held_out`.

    Args:
        by: `"row"` or `"pixel"`.
        batch: B, images per question.
        questions: length of the stream; None is endless.
        held_out: share of the images that are scored but never learned from (`learn_mask` false).
        images: use this many of the images, chosen by the seed; None is all of them.
        seed: decides order, choice and what is held out.

    Raises:
        UsageError: an argument is out of range.
    """
    if by not in LAYOUTS:
        raise UsageError(f"digits: by is {by!r}, expected row or pixel")
    if batch < 1:
        raise UsageError(f"digits: batch is {batch}, expected at least 1")
    if images is not None and images < 1:
        raise UsageError(f"digits: images is {images}, expected at least 1, or None for all")
    if not 0 <= held_out < 1:
        raise UsageError(f"digits: held_out is {held_out}, expected a share from 0 up to, not including, 1")
    from sklearn.datasets import load_digits  # half a second, so only when it is asked for

    data = load_digits()
    chosen = numpy_generator(seed, "digits/images").permutation(len(data.target))[:images]
    pixels = torch.from_numpy(data.data[chosen]).float() / 16
    labels = torch.from_numpy(data.target[chosen]).long()
    return Items(pixels.unflatten(1, LAYOUTS[by]), labels, CLASSES, batch, questions, held_out, seed)


class Items(Passive):
    """Passes over a fixed set of labelled sequences, each pass in a new order.

    Args:
        inputs: `(N, T, F)`; each item is an episode of T steps.
        labels: `(N,)` int64.
        num_classes: C.
        batch, questions, seed: see `digits`.
        held_out: share of the items, chosen by the seed, or which `(N,)` they are.
        mask: steps that exist `(N, T)`, at least one of each item; None means all.
    """

    def __init__(
        self,
        inputs: Tensor,
        labels: Tensor,
        num_classes: int,
        batch: int,
        questions: int | None,
        held_out: float | Tensor,
        seed: int,
        mask: Tensor | None = None,
    ):
        count, steps, features = inputs.shape
        super().__init__(Spec(features, num_classes, batch, steps))
        self.inputs, self.labels, self.questions, self.seed = inputs, labels, questions, seed
        if isinstance(held_out, Tensor):
            self.held_out = held_out
        else:
            held = numpy_generator(seed, "digits/held_out").permutation(count)[: round(held_out * count)]
            self.held_out = torch.zeros(count, dtype=torch.bool)
            self.held_out[torch.from_numpy(held)] = True
        self._orders: dict[int, Tensor] = {}
        first = torch.zeros(batch, steps, dtype=torch.bool)
        first[:, 0] = True
        # The same for every question, and nobody writes into a question.
        self._first, self._rows = first, torch.arange(batch)
        self.mask = torch.ones(1, steps, dtype=torch.bool).expand(count, -1) if mask is None else mask
        ends = steps - 1 - self.mask.flip(1).long().argmax(1)
        self.last = torch.nn.functional.one_hot(ends, steps).bool()

    def pair(self, index: int) -> tuple[Question, Answer] | None:
        if self.questions is not None and index >= self.questions:
            return None
        items = self._items(index)
        steps, rows = self.spec.steps, self._rows
        time = index * steps
        question = Question(self.inputs[items], self._first, self.mask[items], time, rows)
        over_steps = [values[items, None].expand(-1, steps) for values in (self.labels, self.held_out)]
        item = items[:, None].expand(-1, steps)
        tags = {"item": item, "held_out": over_steps[1].long()}
        last = self.last[items]
        return question, Answer(over_steps[0], last, last & ~over_steps[1], time, rows, tags=tags)

    def _items(self, index: int) -> Tensor:
        count, batch = len(self.labels), self.spec.batch
        turn, start = divmod(index * batch, count)
        parts = [self._order(turn)[start : start + batch]]
        while (missing := batch - sum(map(len, parts))) > 0:
            turn += 1
            parts.append(self._order(turn)[:missing])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _order(self, turn: int) -> Tensor:
        if turn not in self._orders:
            shuffled = numpy_generator(self.seed, f"digits/pass/{turn}").permutation(len(self.labels))
            self._orders = {turn - 1: self._orders.get(turn - 1, torch.empty(0)), turn: torch.from_numpy(shuffled)}
        return self._orders[turn]
