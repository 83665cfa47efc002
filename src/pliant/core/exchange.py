"""What a stream and a learner say to each other.

A stream asks a `Question` about T steps of B streams. Later, at once, in part or never, an
`Answer` says what was true. A question carries no target, so a target cannot leak.
"""

from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor


class Question(NamedTuple):
    """The next thing to answer.

    Attributes:
        inputs: `(B, T, ...)`; the trailing shape and dtype are the same for every question of a stream.
        reset: `(B, T)` bool, true where a new episode starts.
        mask: `(B, T)` bool, false where the step does not exist (padding, an absent stream).
        time: index of the first of the T steps, counted over the life of the stream; unique per question.
        rows: `(B,)` int64, which streams of the learner's memory these are.
    """

    inputs: Tensor
    reset: Tensor
    mask: Tensor
    time: int
    rows: Tensor


KNOWN = "known"
"""The tag that holds the newest label of the stream that was known when a step was asked, -1 if there was none."""


class Answer(NamedTuple):
    """What became known about one question.

    Attributes:
        targets: `(R, T, ...)`: class indices (int64), numbers, or whatever the learner's loss reads.
        target_mask: `(R, T)` bool, true where the target is known and revealed now.
        learn_mask: `(R, T)` bool, true where a learner may use it; elsewhere it is scored only.
        time: the `time` of the question that this is about.
        rows: `(R,)` int64, the streams that this is about, all of them in the question.
        final: no further answer about this question will come, so it need not be remembered.
        tags: for scores and reports (task, visit), never read by a learner; ints or `(R, T)` tensors.
    """

    targets: Tensor
    target_mask: Tensor
    learn_mask: Tensor
    time: int
    rows: Tensor
    final: bool = True
    tags: dict[str, Any] = {}  # noqa: RUF012  (never changed in place)


Exchanged = TypeVar("Exchanged", Question, Answer)


def moved(what: Exchanged, device: torch.device) -> Exchanged:
    """The same with what a model reads on its device; rows and tags stay where they are."""
    read = what[:3]
    if read[0].device == device:
        return what
    there = {id(x): x.to(device) for x in read}  # one tensor under two names stays one
    found: dict[str, Any] = {name: there[id(x)] for name, x in zip(what._fields, read, strict=False)}
    return what._replace(**found)


class Batch(NamedTuple):
    """One reply of a stream: the answers that came meanwhile, then the next question.

    `question` is None while only late answers are left; a stream that is finished sends None
    instead of a Batch.
    """

    answers: tuple[Answer, ...]
    question: Question | None
