"""One row of results."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

OUTCOMES = {
    "asked": "no answer came",
    "updated": "the parameters changed",
    "gathered": "the answer waits for the next update",
    "nothing to learn": "the answer held no target that may be learned from",
    "forgotten": "the answer came after its question had been forgotten",
    "non-finite loss": "the loss was not a finite number, so nothing was changed",
    "non-finite gradient": "the gradient was not finite, so nothing was changed",
}
"""What can come of an answer, from the most harmless to the worst, with a sentence for each."""


class Record(NamedTuple):
    """What came of one reply of a stream.

    Attributes:
        update: parameter updates so far.
        time: the question that the answer was about (the last one, if several); -1 if none.
        outcome: a key of `OUTCOMES`.
        nats: mean loss of the learned targets, NaN if there were none.
        learned: number of targets learned from.
        upkeep: what each keeper reported.
    """

    update: int
    time: int = -1
    outcome: str = "asked"
    nats: float = math.nan
    learned: int = 0
    upkeep: tuple[dict[str, Any], ...] = ()


def merge_records(records: Sequence[Record], update: int) -> Record:
    """One record for all answers of a reply: counts add up, losses average, the worst outcome stays."""
    if len(records) == 1:
        return records[0]
    learned = sum(record.learned for record in records)
    total = sum(record.nats * record.learned for record in records if record.learned)
    order = list(OUTCOMES)
    return Record(
        update=update,
        time=records[-1].time if records else -1,
        outcome=max((record.outcome for record in records), key=order.index, default="asked"),
        nats=total / learned if learned else math.nan,
        learned=learned,
        upkeep=tuple(report for record in records for report in record.upkeep),
    )
