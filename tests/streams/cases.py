"""One row per stream and wrapper; the conformance suite runs on each."""

from collections.abc import Callable
from typing import NamedTuple

import torch

from pliant.streams import Stream, digits, drift, listops, pathfinder
from pliant.streams._digits import Items
from tests.learn.worlds import Signs, items

QUESTIONS = 40


class Case(NamedTuple):
    """`make(inner)` builds the stream around a source that the suite gives; delay in questions."""

    name: str
    source: Callable[[], Stream]
    wrap: Callable[[Stream], Stream]
    delay: int = 0


def small() -> Stream:
    return items(QUESTIONS)


def ragged() -> Stream:
    """The same items, the end of every other one missing, the last six held out, as `archive` has them."""
    whole = items(QUESTIONS)
    mask = torch.ones(24, 4, dtype=torch.bool)
    mask[::2, 2:] = False
    return Items(whole.inputs, whole.labels, whole.spec.num_outputs, 4, QUESTIONS, torch.arange(24) >= 18, 0, mask)


CASES = (
    Case("items", small, lambda s: s),
    Case("items of several lengths", ragged, lambda s: s),
    Case("signs", lambda: Signs(QUESTIONS), lambda s: s),
    Case("digits by row", lambda: digits(batch=3, questions=QUESTIONS), lambda s: s),
    Case("digits by pixel", lambda: digits(by="pixel", batch=3, questions=QUESTIONS, images=50), lambda s: s),
    Case("listops", lambda: listops(batch=3, questions=QUESTIONS, min_length=5, max_length=20), lambda s: s),
    Case(
        "pathfinder",
        lambda: pathfinder(batch=2, questions=QUESTIONS, side=16, by="row", length=1, distractors=0),
        lambda s: s,
    ),
    Case("permute", small, lambda s: drift.permute(s, every=30, seed=1)),
    Case("permute, returning", small, lambda s: drift.permute(s, every=30, returning=2, seed=1)),
    Case("relabel", small, lambda s: drift.relabel(s, every=30, seed=1)),
    Case("redraw", small, lambda s: drift.redraw(s, every=30, items=24, seed=1)),
    Case("visits", small, lambda s: drift.visits(drift.permute(s, every=30), items=24)),
    Case("hide", small, lambda s: drift.hide(s, rate=0.4, seed=1)),
    Case("delay", small, lambda s: drift.delay(s, questions=5), 5),
    Case("delay, nothing", small, lambda s: drift.delay(s, questions=0)),
    Case("shard", small, lambda s: drift.shard(s, rank=1, world=3)),
    Case(
        "everything",
        small,
        lambda s: drift.shard(
            drift.delay(drift.hide(drift.visits(drift.relabel(s, every=30), items=24), rate=0.2), questions=3),
            rank=0,
            world=2,
        ),
        3,
    ),
)
