"""Labels come five steps late and a third of them never: the loop stays the same.

A stream of single steps whose label is the sign of a hidden mean that changes now and then.
"""

import torch

from pliant.core import Answer, Question, generator
from pliant.learn import Learner, bptt
from pliant.measure.scores import Accuracy, Bits, Scores
from pliant.models import SequenceClassifier
from pliant.optim import adamw
from pliant.streams import Passive, Spec, drift


class SwitchingMean(Passive):
    """Three noisy sensors; the class is the sign of their common mean, which stays for 40 steps."""

    def pair(self, index: int) -> tuple[Question, Answer] | None:
        if index >= 2000:
            return None
        sign = int(torch.randint(2, (), generator=generator(index // 40, "sign")))
        noise = torch.randn(1, 1, 3, generator=generator(index, "noise"))
        yes, rows = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, dtype=torch.int64)
        question = Question(noise + (2 * sign - 1), ~yes, yes, index, rows)
        return question, Answer(torch.full((1, 1), sign), yes, yes, index, rows)


def main() -> dict[str, float]:
    stream = drift.delay(drift.hide(SwitchingMean(Spec(3, 2, 1, 1)), rate=1 / 3), questions=5)
    torch.manual_seed(0)
    model = SequenceClassifier(3, 2, width=16, depth=1)
    learner = Learner(model, adamw(model, 3e-3), bptt(16))
    scores = Scores(bits=Bits(), accuracy=Accuracy())
    output = None
    while batch := stream.send(output):
        for answer in batch.answers:
            scores.update(answer, learner.said(answer))
            learner.learn(answer)
        output = None if batch.question is None else learner.predict(batch.question)
    return scores.value()


if __name__ == "__main__":
    print(main())
