"""Small streams, learners and lives for the tests of learning."""

from typing import Any

import torch

from pliant.core import Answer, Question, generator, seeded
from pliant.learn import Frozen, Learner, Life, Majority, NoChange, Retrained, bptt
from pliant.measure.scores import Accuracy, Bits, Scores
from pliant.models import SequenceClassifier
from pliant.optim import Schedule, adamw, warmup
from pliant.streams import Passive, Spec, Stream, drift
from pliant.streams._digits import Items

FEATURES, CLASSES = 3, 2


class Signs(Passive):
    """Noisy sensors in `batch` streams; the class of a step is the sign of a mean that stays for ten steps."""

    def __init__(self, questions: int = 60, batch: int = 2, steps: int = 1, resets: bool = False):
        super().__init__(Spec(FEATURES, CLASSES, batch, steps))
        self.questions, self.resets = questions, resets

    def pair(self, index: int) -> tuple[Question, Answer] | None:
        if index >= self.questions:
            return None
        _, _, batch, steps = self.spec
        sign = torch.randint(2, (batch, 1), generator=generator(index * steps // 10, "sign")).expand(batch, steps)
        noise = torch.randn(batch, steps, FEATURES, generator=generator(index, "noise"))
        yes, rows, time = torch.ones(batch, steps, dtype=torch.bool), torch.arange(batch), index * steps
        reset = torch.zeros_like(yes)
        reset[:, 0] = self.resets
        question = Question(noise + (2.0 * sign - 1)[..., None], reset, yes, time, rows)
        return question, Answer(sign, yes, yes, time, rows)


def items(questions: int | None = 40, batch: int = 4, labels: torch.Tensor | None = None) -> Items:
    """24 short sequences of which a quarter may not be learned from."""
    random = generator(0, "items")
    inputs = torch.randn(24, 4, FEATURES, generator=random)
    drawn = torch.randint(CLASSES, (24,), generator=random)
    return Items(inputs, drawn if labels is None else labels, CLASSES, batch, questions, 0.25, 0)


def learner(stream: Stream, *, window: int = 8, seed: int = 0, mixer: str = "GatedLRU", **options: Any) -> Learner:
    with seeded(seed):
        model = SequenceClassifier(stream.spec.num_features, stream.spec.num_outputs, width=4, depth=1, mixer=mixer)
        with torch.no_grad():
            model.head.linear.weight.normal_()
    return Learner(model, adamw(model, 1e-2), bptt(window), [Schedule(warmup(5))], seed=seed, **options)


def scores() -> Scores:
    return Scores(bits=Bits(), accuracy=Accuracy())


def late(stream: Stream) -> Stream:
    """Some labels missing, all of them late."""
    return drift.delay(drift.hide(stream, rate=0.3), questions=3)


class Panel:
    """Opponents and their scores, as a part of a life."""

    def __init__(self, ours: Learner, source: Stream, after: int):
        self.members: dict[str, tuple[Any, Scores]] = {
            "majority": (Majority(CLASSES), scores()),
            "no-change": (NoChange(CLASSES), scores()),
            "frozen": (Frozen(ours, after=after), scores()),
            "retrained": (Retrained(lambda k: learner(source, seed=k), every=25, window=20, passes=2), scores()),
        }

    def state_dict(self) -> dict[str, Any]:
        return {name: [part.state_dict() for part in member] for name, member in self.members.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, member in self.members.items():
            for part, saved in zip(member, state[name], strict=True):
                part.load_state_dict(saved)


def life(after: int = 30, questions: int = 60) -> Life:
    """A life with everything in it: late and missing labels, and all opponents."""
    stream = late(Signs(questions))
    ours = learner(stream)
    return Life(learner=ours, stream=stream, scores=scores(), panel=Panel(ours, stream, after))


def small_life() -> Life:
    stream = late(Signs())
    return Life(learner=learner(stream), stream=stream, scores=scores())


def run(this: Life, replies: int | None = None) -> list[Any]:
    """Go on for so many replies of the stream (to its end if None); the records."""
    from itertools import islice

    from pliant.learn import prequential

    opponents = this.panel.members if hasattr(this, "panel") else None
    return list(islice(prequential(this.stream, this.learner, this.scores, opponents), replies))
