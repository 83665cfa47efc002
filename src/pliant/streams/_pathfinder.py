"""Pathfinder: pictures of dashed contours with two marks; are they the two ends of one contour?

A contour is a chain of dashes. Between two of them the direction turns by an angle δ with a density in proportion to

    cos²(κ δ)   for |δ| < π / 2κ,

κ the continuity, on the angles with which the next dash keeps its distance from all others. Each picture has two
contours that start near each other, and shorter ones beside them. A mark, a disk, stands on an end of one of the two,
and the other on the other end of the same (class 1) or on an end of the other one (class 0); both classes are as
likely. In each picture both pairs of ends are as far apart, but for a pixel, so that how far the marks are apart tells
nothing: with the start of one and the end of the other, as one might take them, it tells 86 % of the classes.

Papers: Linsley et al. 2018, Learning long-range spatial dependencies with horizontal gated recurrent units,
arXiv:1805.08315, whose generator draws in a raster of 300 and turns by the law above; Tay et al. 2021, Long Range
Arena, arXiv:2011.04006. Departures: dashes lie in the plane and not in a raster, so that pictures of any side have the
same law; lengths are in pixels of the picture, and these are ours, since at 32 pixels the published dashes are too
short to be seen.
"""

import math
from typing import NamedTuple

import numpy as np
import torch

from pliant.core import Answer, Question, UsageError, numpy_generator
from pliant.streams.base import Passive, Spec, Stream

CLASSES = 2
TRIES = 20
"""Directions tried for a dash, and places for a short contour, before it is given up."""
ROOM = 5000
"""Of so many pairs of contours one has to fit."""
APART = 1.0
"""Pixels by which the distance of two ends of one contour may differ from that of two ends of two."""
POINTS = 4
"""Places along a dash between which distances to others are taken."""
MAX_STEPS = 1 << 20


class Sizes(NamedTuple):
    """In pixels: length and thickness of a dash, the gap to the next, the least distance to other contours, the radius
    of a mark, and how far apart the two contours start."""

    dash: float = 2.5
    thickness: float = 1.0
    gap: float = 1.6
    margin: float = 2.5
    mark: float = 1.6
    apart: float = 7.0


class Picture(NamedTuple):
    """contours: of each its dashes, `(dashes, 2 ends, 2)` in pixels; the first two are the long ones.

    marks: the two marks, `(2, 2)`; label: whether they belong to one contour.
    """

    contours: list[np.ndarray]
    marks: np.ndarray
    label: int


def pathfinder(
    *,
    batch: int = 16,
    questions: int | None = None,
    side: int = 32,
    by: str = "pixel",
    length: int = 6,
    distractors: int = 5,
    continuity: float = 1.8,
    sizes: Sizes = Sizes(),  # noqa: B008, a value
    seed: int = 0,
) -> Stream:
    """One question is `batch` pictures, each an episode; the answer their classes, at the last step.

    Inputs are `(B, side², 1)` float32 in 0 … 1 (`by="pixel"`) or `(B, side, side)` (`by="row"`). The n-th question
    depends on the seed and n alone.

    Args:
        batch: B, pictures per question.
        questions: length of the stream; None is endless.
        side: pixels of a side.
        by: what a step reads, `"pixel"` or `"row"`.
        length: dashes of the two long contours; published are 6, 9 and 14, in pictures of 300 pixels. In 32 there is
            room for 7; the more, the longer it takes to find some.
        distractors: short contours of a third as many dashes, as far as there is room for them.
        continuity: κ; 1.8 is published, and larger is straighter.
        sizes: lengths in pixels.
        seed: decides all pictures.

    Raises:
        UsageError: an argument is out of range, or such contours find hardly any room.
    """
    if by not in ("pixel", "row"):
        raise UsageError(f"pathfinder: by is {by!r}, expected pixel or row")
    numbers = {"batch": batch, "side": side, "length": length}
    for name, value in numbers.items():
        if value < 1:
            raise UsageError(f"pathfinder: {name} is {value}, expected at least 1")
    if distractors < 0 or not continuity > 0.5 or side * side > MAX_STEPS:
        raise UsageError(
            f"pathfinder: distractors is {distractors}, continuity {continuity} and side {side}; expected 0 or more, "
            "above 0.5 and at most 1024"
        )
    if any(not 0 <= size < math.inf for size in sizes) or not sizes.dash or continuity == math.inf:
        raise UsageError(f"pathfinder: {sizes} and continuity {continuity}; expected numbers of 0 or more, and a dash")
    random = numpy_generator(seed, "pathfinder/room")
    if all(_two_contours(random, side, length, continuity, sizes) is None for _ in range(ROOM)):
        raise UsageError(
            f"pathfinder: not one of {ROOM} pairs of contours of {length} dashes finds room in {side} by {side} "
            "pixels; choose a larger side or a smaller length"
        )
    return _Pathfinder(batch, questions, side, by, (length, distractors, continuity, sizes), seed)


class _Pathfinder(Passive):
    """Pictures of a question from a generator of their own."""

    def __init__(self, batch: int, questions: int | None, side: int, by: str, law: tuple, seed: int):  # type: ignore[type-arg]
        steps, features = (side * side, 1) if by == "pixel" else (side, side)
        super().__init__(Spec(features, CLASSES, batch, steps))
        self.questions, self.side, self.law, self.seed = questions, side, law, seed

    def pair(self, index: int) -> tuple[Question, Answer] | None:
        if self.questions is not None and index >= self.questions:
            return None
        (features, _, batch, steps), random = self.spec, numpy_generator(self.seed, f"pathfinder/{index}")
        pictures = [picture(random, self.side, *self.law) for _ in range(batch)]
        drawn = np.stack([paint(one, self.side, self.law[3]) for one in pictures])
        inputs = torch.from_numpy(drawn).reshape(batch, steps, features)
        reset, last, mask = (torch.zeros(batch, steps, dtype=torch.bool) for _ in range(3))
        reset[:, 0] = last[:, -1] = True
        targets = torch.tensor([one.label for one in pictures])[:, None].expand(-1, steps)
        time, rows = index * steps, torch.arange(batch)
        return Question(inputs, reset, ~mask, time, rows), Answer(targets, last, last, time, rows)


def picture(
    random: np.random.Generator, side: int, length: int, distractors: int, continuity: float, sizes: Sizes
) -> Picture:
    """Contours, marks and label of one picture; looks for room for them for as long as it takes."""
    ends = None
    while ends is None:
        found = _two_contours(random, side, length, continuity, sizes)
        ends = None if found is None else _ends(*found)
    assert found is not None
    contours = list(found)
    for _ in range(distractors):
        for _ in range(TRIES):
            start, angle = random.uniform(0, side, 2), random.uniform(-math.pi, math.pi)
            short = _contour(random, start, angle, -(-length // 3), contours, side, continuity, sizes)
            if short is not None:
                contours.append(short)
                break
    label, first = (int(n) for n in random.integers(2, size=2))
    marks = ends[1 - label][[first, 1 - first]]
    return Picture(contours, marks, label)


def _ends(*contours: np.ndarray) -> tuple[np.ndarray, np.ndarray] | None:
    """Two ends of one of the contours and two of both, `(2, 2)`, about as far apart; None if there are none."""
    own = [np.stack([contour[0, 0], contour[-1, 1]]) for contour in contours]
    across = [np.stack([one, other]) for one in own[0] for other in own[1]]
    pairs = [(abs(_length(same) - _length(both)), i, j) for i, same in enumerate(own) for j, both in enumerate(across)]
    differ, i, j = min(pairs)
    return (own[i], across[j]) if differ <= APART else None


def _length(ends: np.ndarray) -> float:
    return float(np.linalg.norm(ends[0] - ends[1]))


def _two_contours(
    random: np.random.Generator, side: int, length: int, continuity: float, sizes: Sizes
) -> tuple[np.ndarray, np.ndarray] | None:
    """Contours that start `apart` from each other, and grow in turn; None if one of them finds no way on."""
    start, angle = random.uniform(0, side, 2), random.uniform(-math.pi, math.pi)
    starts = [start, start + sizes.apart * np.array([math.cos(angle), math.sin(angle)])]
    angles = list(random.uniform(-math.pi, math.pi, 2))
    grown: list[list[np.ndarray]] = [[], []]
    for _ in range(length):
        for which in (0, 1):
            others = [np.stack(grown[1 - which])] if grown[1 - which] else []
            step = _next(random, starts[which], angles[which], grown[which], others, side, continuity, sizes)
            if step is None:
                return None
            dash, angles[which] = step
            grown[which].append(dash)
    return np.stack(grown[0]), np.stack(grown[1])


def _contour(
    random: np.random.Generator, start: np.ndarray, angle: float, length: int, others: list[np.ndarray], side: int,
    continuity: float, sizes: Sizes,
) -> np.ndarray | None:  # fmt: skip
    own: list[np.ndarray] = []
    for _ in range(length):
        step = _next(random, start, angle, own, others, side, continuity, sizes)
        if step is None:
            return None
        dash, angle = step
        own.append(dash)
    return np.stack(own)


def _next(
    random: np.random.Generator, start: np.ndarray, angle: float, own: list[np.ndarray], others: list[np.ndarray],
    side: int, continuity: float, sizes: Sizes,
) -> tuple[np.ndarray, float] | None:  # fmt: skip
    """The next dash `(2 ends, 2)` and its direction; None if all that were tried are in the way of something."""
    for _ in range(TRIES if own else 1):
        turned = angle + turn(random, continuity) if own else angle
        direction, before = (np.array([math.cos(a), math.sin(a)]) for a in (turned, angle))
        # The direction turns in the middle of the gap.
        begin = own[-1][1] + sizes.gap / 2 * (before + direction) if own else start
        dash = np.stack([begin, begin + sizes.dash * direction])
        if _is_free(dash, own, others, side, sizes):
            return dash, turned
    return None


def turn(random: np.random.Generator, continuity: float) -> float:
    """An angle of density cos²(κ δ), |δ| < π / 2κ."""
    while True:
        part = random.uniform(-0.5, 0.5)
        if random.random() < math.cos(math.pi * part) ** 2:
            return part * math.pi / continuity


def _is_free(dash: np.ndarray, own: list[np.ndarray], others: list[np.ndarray], side: int, sizes: Sizes) -> bool:
    edge = max(sizes.thickness / 2, sizes.mark)
    if (dash < edge).any() or (dash > side - edge).any():
        return False
    points = _points(dash[None])
    if own[:-1] and _distance(points, _points(np.stack(own[:-1]))) < min(sizes.margin, sizes.gap):
        return False
    return all(_distance(points, _points(contour)) >= sizes.margin for contour in others)


def _points(dashes: np.ndarray) -> np.ndarray:
    """Places along dashes, `(n, 2)`."""
    share = np.linspace(0, 1, POINTS)[:, None, None]
    return ((1 - share) * dashes[:, 0] + share * dashes[:, 1]).reshape(-1, 2)


def _distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.sqrt(((one[:, None] - other[None]) ** 2).sum(-1)).min())


def paint(one: Picture, side: int, sizes: Sizes) -> np.ndarray:
    """`(side, side)` float32 in 0 … 1; edges are one pixel wide."""
    axis = np.arange(side) + 0.5
    pixels = np.stack(np.meshgrid(axis, axis, indexing="ij"), -1)[:, :, None]  # (side, side, 1, 2)
    dashes = np.concatenate(one.contours)
    begin, along = dashes[:, 0], dashes[:, 1] - dashes[:, 0]
    share = ((pixels - begin) * along).sum(-1) / (along**2).sum(-1)
    nearest = begin + share.clip(0, 1)[..., None] * along
    to_dashes = np.sqrt(((pixels - nearest) ** 2).sum(-1)).min(2) - sizes.thickness / 2
    to_marks = np.sqrt(((pixels - one.marks) ** 2).sum(-1)).min(2) - sizes.mark
    return (0.5 - np.minimum(to_dashes, to_marks)).clip(0, 1).astype(np.float32)
