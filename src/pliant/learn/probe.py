"""Whether a learner can still learn something new: a fork of it is asked to learn random targets."""

import copy
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pliant.core import Answer, Question, UsageError, generator
from pliant.learn.learner import Learner


class NewTask(NamedTuple):
    """What came of it.

    Attributes:
        first: mean code length of the random targets over the first pass, nats; each is said before it is learned.
        last: over the last pass.
        accuracy: of classes over the last pass; NaN of numbers.
        updates: made by the fork.
    """

    first: float
    last: float
    accuracy: float
    updates: int

    @property
    def fell(self) -> float:
        """Nats by which the code length fell."""
        return self.first - self.last


def new_task(learner: Learner, pairs: Sequence[tuple[Question, Answer]], *, passes: int = 10, seed: int = 0) -> NewTask:
    """How far a fork of `learner` comes with random targets on fixed inputs (Lyle et al. 2021, arXiv:2204.09560).

    Classes are drawn anew, each as likely as any other; numbers change places among the answers. The fork has the
    parameters, the optimizer with its moments, the upkeep and the generator of the learner, and fresh streams; the
    learner stays what it is, to the bit.

    Args:
        learner: whose ability is asked for.
        pairs: questions and answers about them, such as the first of a stream.
        passes: over all pairs; at least 2.
        seed: of the targets; the same one asks for the same task.

    Raises:
        UsageError: less than two passes, or no pair has a target.
    """
    known = [pair for pair in pairs if bool(pair[1].target_mask.any())]
    if passes < 2 or not known:
        raise UsageError(f"new_task: got {len(known)} questions with answers and {passes} passes, expected 1 and 2")
    fork = copy.deepcopy(learner)
    _forget(fork)
    # Times of their own: those of the learner may still wait for answers.
    questions = [question._replace(time=i - len(known)) for i, (question, _) in enumerate(known)]
    questions[0] = questions[0]._replace(reset=_from_the_start(questions[0].reset))
    classes = fork.predict(questions[0]).shape[-1]
    _forget(fork)
    targets = _random_targets([answer for _, answer in known], classes, seed)
    answers = [
        answer._replace(targets=new, learn_mask=answer.target_mask, time=question.time, final=True)
        for question, (_, answer), new in zip(questions, known, targets, strict=True)
    ]
    began = fork.updates
    told = [_pass(fork, questions, answers) for _ in range(passes)]
    return NewTask(told[0][0], told[-1][0], told[-1][1], fork.updates - began)


def _forget(fork: Learner) -> None:
    """Streams begin anew; parameters, moments and upkeep stay."""
    fork.close()
    fork.memory = fork.output = None
    fork._asked.clear()
    fork._before.clear()
    if fork.traces is not None:
        fork.traces.values.clear()


def _from_the_start(reset: Tensor) -> Tensor:
    reset = reset.clone()
    reset[:, 0] = True
    return reset


def _random_targets(answers: Sequence[Answer], classes: int, seed: int) -> list[Tensor]:
    draw = generator(seed, "new task")
    if not answers[0].targets.is_floating_point():
        return [torch.randint(classes, answer.targets.shape, generator=draw) for answer in answers]
    known = torch.cat([answer.targets[answer.target_mask] for answer in answers])
    mixed, found, place = known[torch.randperm(len(known), generator=draw)], [], 0
    for answer in answers:
        targets, count = answer.targets.clone(), int(answer.target_mask.sum())
        targets[answer.target_mask] = mixed[place : place + count]
        found.append(targets)
        place += count
    return found


def _pass(fork: Learner, questions: Sequence[Question], answers: Sequence[Answer]) -> tuple[float, float]:
    """Learn each once; mean code length, nats, and share of right classes, said before it was learned."""
    nats, right = [], []
    for question, answer in zip(questions, answers, strict=True):
        output, truth = fork.predict(question)[answer.target_mask], answer.targets[answer.target_mask]
        nats.append(fork.model.nats(output, truth).flatten())  # type: ignore[operator]
        if not truth.is_floating_point():
            right.append((output.argmax(-1) == truth).float().flatten())
        fork.learn(answer)
    return float(torch.cat(nats).mean()), float(torch.cat(right).mean()) if right else math.nan
