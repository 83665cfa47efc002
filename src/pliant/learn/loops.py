"""The loops: over a stream, and over a fixed set."""

from collections.abc import Collection, Iterator, Mapping
from typing import Protocol, runtime_checkable

from torch import Tensor

from pliant.core import Answer, Question, Record, UsageError
from pliant.core.record import merge_records
from pliant.learn.base import Predictor
from pliant.streams.base import Stream


@runtime_checkable
class Watcher(Protocol):
    """Takes note of what had been said to what turned out: scores, as a rule."""

    def update(self, answer: Answer, said: Tensor | None) -> None: ...


Opponents = Mapping[str, tuple[Predictor, Watcher]]


def prequential(
    stream: Stream, learner: Predictor, scores: Watcher, opponents: Opponents | None = None
) -> Iterator[Record]:
    """Test, then train: everything is answered before its truth is known, and scored before it is learned.

    Yields one record for each reply of the stream, when learner, scores and stream stand between two
    replies, so that a life may be saved there. The learner's last output starts the loop, so the
    same call continues a loaded life.

    Args:
        stream: asks.
        learner: answers; the stream gets its outputs.
        scores: updated with what had been said.
        opponents: by name, others who get the same questions and answers, and their scores.
    """
    panel = [(learner, scores), *(opponents or {}).values()]
    output = learner.output
    while batch := stream.send(output):
        records = []
        for answer in batch.answers:
            for member, its_scores in panel:
                its_scores.update(answer, member.said(answer))
            records.append(learner.learn(answer))
            for member, _ in panel[1:]:
                member.learn(answer)
        output = None
        if batch.question is not None:
            output = learner.predict(batch.question)
            for member, _ in panel[1:]:
                member.predict(batch.question)
        yield merge_records(records, records[-1].update if records else 0)


def fit(learner: Predictor, pairs: Collection[tuple[Question, Answer]], *, passes: int = 1) -> Iterator[Record]:
    """Many passes over a fixed set with the same learner; yields a record per question.

    What waits for an update at the end of a pass is learned then, with a record of its own.

    Raises:
        UsageError: passes is negative.
    """
    if passes < 0:
        raise UsageError(f"fit: passes is {passes}, expected 0 or more")
    for _ in range(passes):
        for question, answer in pairs:
            learner.predict(question)
            yield learner.learn(answer)
        finish = getattr(learner, "finish", None)
        if finish is not None and (record := finish()) is not None:
            yield record
