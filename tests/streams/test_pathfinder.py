"""Pathfinder: the law of turns, room between contours, and that nothing but the path tells the class."""

import math

import numpy as np
import pytest
import torch

from pliant.core import UsageError, numpy_generator
from pliant.streams import pathfinder
from pliant.streams._pathfinder import Picture, Sizes, _distance, _points, paint, picture, turn

SIDE, LENGTH, SIZES, CONTINUITY = 32, 4, Sizes(), 1.8


@pytest.fixture(scope="module")
def pictures() -> list[Picture]:
    random = numpy_generator(0, "test")
    return [picture(random, SIDE, LENGTH, 2, CONTINUITY, SIZES) for _ in range(120)]


def test_turns_have_the_published_density() -> None:
    random = numpy_generator(1, "test")
    turns = np.sort([turn(random, CONTINUITY) for _ in range(5000)])
    z = CONTINUITY * turns
    assert (np.abs(z) < math.pi / 2).all()
    exact = 0.5 + z / math.pi + np.sin(2 * z) / (2 * math.pi)  # the integral of cos², from -π/2 on
    assert np.abs(exact - (np.arange(5000) + 0.5) / 5000).max() < 1.95 / 5000**0.5  # Kolmogorov and Smirnov, 99.9 %


def test_contours_are_chains_of_dashes_within_the_picture(pictures: list[Picture]) -> None:
    for one in pictures[:50]:
        assert [len(contour) for contour in one.contours[:2]] == [LENGTH, LENGTH]
        for contour in one.contours:
            assert contour.min() > 0 and contour.max() < SIDE
            along = contour[:, 1] - contour[:, 0]
            assert np.linalg.norm(along, axis=1) == pytest.approx(SIZES.dash)
            angles = np.arctan2(along[:, 1], along[:, 0])
            turns = (np.diff(angles) + math.pi) % (2 * math.pi) - math.pi
            assert (np.abs(turns) < math.pi / 2 / CONTINUITY + 1e-9).all()
            across = np.linalg.norm(contour[1:, 0] - contour[:-1, 1], axis=1)
            assert across == pytest.approx(SIZES.gap * np.cos(turns / 2))


def test_contours_keep_their_distance_and_begin_near_each_other(pictures: list[Picture]) -> None:
    for one in pictures[:50]:
        parts = [_points(contour) for contour in one.contours]
        for i, part in enumerate(parts):
            assert all(_distance(part, other) >= SIZES.margin for other in parts[:i])
        assert np.linalg.norm(one.contours[0][0, 0] - one.contours[1][0, 0]) == pytest.approx(SIZES.apart)


def test_the_class_is_whether_a_path_joins_the_marks(pictures: list[Picture]) -> None:
    for one in pictures:
        ends = [[contour[0, 0], contour[-1, 1]] for contour in one.contours[:2]]
        owners = [[which for which in (0, 1) for end in ends[which] if (end == mark).all()] for mark in one.marks]
        assert [len(owner) for owner in owners] == [1, 1]
        assert one.label == (owners[0] == owners[1])
        assert not (one.marks[0] == one.marks[1]).all()


def test_how_far_apart_the_marks_are_tells_nothing(pictures: list[Picture]) -> None:
    """Two other ends are as far apart, of two contours where the marks are on one, and of one where they are on two."""
    for one in pictures:
        ends = [np.stack([contour[0, 0], contour[-1, 1]]) for contour in one.contours[:2]]
        own = [float(np.linalg.norm(end[0] - end[1])) for end in ends]
        across = [float(np.linalg.norm(a - b)) for a in ends[0] for b in ends[1]]
        apart = float(np.linalg.norm(one.marks[0] - one.marks[1]))
        assert min(abs(apart - other) for other in (across if one.label else own)) <= 1


def test_neither_how_often_nor_how_bright_it_is_tells_the_class(pictures: list[Picture]) -> None:
    labels = np.array([one.label for one in pictures])
    assert labels.mean() == pytest.approx(0.5, abs=4 * 0.5 / len(labels) ** 0.5)
    light = np.array([paint(one, SIDE, SIZES).sum() for one in pictures])
    spread = (light[labels == 1].var() / labels.sum() + light[labels == 0].var() / (1 - labels).sum()) ** 0.5
    assert abs(light[labels == 1].mean() - light[labels == 0].mean()) < 4 * spread


def test_a_dash_is_painted_where_it_lies() -> None:
    contour = np.array([[[4.5, 2.5], [4.5, 7.5]]])
    far = np.full((2, 2), -50.0)
    drawn = paint(Picture([contour], far, 0), 10, SIZES)
    assert drawn[4, 2:8] == pytest.approx(1.0)  # one pixel thick, on the centers of row 4
    assert float(drawn.sum()) == pytest.approx(6.0)
    marked = paint(Picture([contour], np.array([[4.5, 2.5], [-50.0, -50.0]]), 0), 10, SIZES)
    assert marked[4, 2] == marked[3, 2] == marked[4, 1] == 1


def test_a_question_holds_pictures_as_pixels_or_rows() -> None:
    given = {"batch": 2, "questions": 2, "side": 24, "length": 2, "distractors": 1, "seed": 3}
    by_pixel, by_row = (pathfinder(**given, by=by) for by in ("pixel", "row"))
    one, two = by_pixel.send(None), by_row.send(None)
    assert one is not None and two is not None and one.question is not None and two.question is not None
    assert one.question.inputs.shape == (2, 576, 1)
    assert torch.equal(one.question.inputs.flatten(1), two.question.inputs.flatten(1))
    assert 0 < float(one.question.inputs.mean()) < 0.3 and float(one.question.inputs.max()) <= 1
    following = by_pixel.send(None)
    assert following is not None
    answer = following.answers[0]
    assert answer.target_mask.sum(1).tolist() == [1, 1] and bool(answer.target_mask[:, -1].all())


def test_what_cannot_be_drawn_is_refused() -> None:
    for wrong in ({"batch": 0}, {"side": 0}, {"length": 0}, {"distractors": -1}, {"continuity": 0.5}, {"by": "column"},
                  {"side": 2000}, {"sizes": Sizes(dash=0)}, {"sizes": Sizes(gap=-1)}, {"continuity": math.inf},
                  {"side": 8, "length": 9}, {"length": 14}):  # fmt: skip
        with pytest.raises(UsageError, match="pathfinder"):
            pathfinder(**wrong)
    stream = pathfinder(batch=2, length=7, distractors=0)  # what finds room now and then does so each time
    assert all(stream.send(None) for _ in range(3))
