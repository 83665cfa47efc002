"""Whether a learner can still learn something new: forks of it are asked to learn random targets.

- `new_task`: how well one comes to know them, in nats
- `plasticity`: how much they shape what it says afterwards, in bits
"""

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
    if passes < 2:
        raise UsageError(f"new_task: {passes} passes, expected at least 2")
    fork = _fork(learner)
    questions, answers = _task(fork, pairs, generator(seed, "new task"))
    told = [_pass(fork, questions, answers) for _ in range(passes)]
    return NewTask(told[0][0], told[-1][0], told[-1][1], fork.updates - learner.updates)


class Plasticity(NamedTuple):
    """What random targets say of an answer that is given after them, in bits, the mean over answers.

    Attributes:
        bits: the estimate; `error`: its standard error over forks (jackknife).
        most: what it could be, the logarithm of the number of classes.
        forks: lives that were compared; `updates`: made by each.
    """

    bits: float
    error: float
    most: float
    forks: int
    updates: int


def plasticity(
    learner: Learner, pairs: Sequence[tuple[Question, Answer]], *, passes: int = 10, forks: int = 16, seed: int = 0
) -> Plasticity:
    """Bits by which targets shape what a learner says: its plasticity over a window of its life.

    I(O; A) of the targets O in the window and one answer A right after it, given all that was before: the generalized
    directed information of Abel et al. 2025, arXiv:2505.10361, definition 3.1, whose observations are targets and whose
    action is an answer drawn from what the learner says. Forks are lives that begin alike and are shown other targets
    of the same questions, each class as likely as any other, so that I(O; A) is the mean divergence of what one says
    from what all say, with the bias of order 1 / forks taken away by the jackknife. Answers are asked for one by one,
    in place of the window's answers: together they hold at least as much as each.

    Args:
        learner: stays what it is, to the bit.
        pairs: questions and answers about them, such as the first of a stream; only which targets are known is used.
        passes: over all questions, which make the window.
        forks: lives; at least 2.
        seed: of the targets.

    Raises:
        UsageError: less than a pass or two forks, no pair has a target, or targets are numbers.
    """
    if passes < 1 or forks < 2:
        raise UsageError(f"plasticity: {passes} passes of {forks} forks, expected at least 1 and 2")
    said = []
    for i in range(forks):
        fork = _fork(learner)
        questions, answers = _task(fork, pairs, generator(seed, f"fork {i}"))
        if answers[0].targets.is_floating_point():
            raise UsageError("plasticity: targets are numbers, expected classes")
        for _ in range(passes):
            _pass(fork, questions, answers)
        fork.restart()
        asked = zip(questions, answers, strict=True)
        said.append(torch.cat([fork.predict(question)[answer.target_mask] for question, answer in asked]))
    bits, error = shared_bits(torch.stack(said).double().softmax(-1))
    return Plasticity(bits, error, math.log2(said[0].shape[-1]), forks, fork.updates - learner.updates)


def shared_bits(said: Tensor) -> tuple[float, float]:
    """Mean over places of I(life; symbol) of `said` `(lives, places, symbols)`, and its standard error; jackknifed."""
    lives = len(said)
    entropy = torch.special.entr(said).sum(-1) / math.log(2)  # (lives, places)
    total, spent = said.sum(0), entropy.sum(0)
    whole = (torch.special.entr(total / lives).sum(-1) / math.log(2) - spent / lives).mean()
    rest = torch.special.entr(((total - said) / (lives - 1)).clamp(min=0)).sum(-1) / math.log(2)
    without = (rest - (spent - entropy) / (lives - 1)).mean(-1)  # of all lives but one
    bits = lives * whole - (lives - 1) * without.mean()
    error = ((lives - 1) * (without - without.mean()).square().mean()).sqrt()
    return float(bits) if math.isnan(bits) else max(0.0, float(bits)), float(error)


def _fork(learner: Learner) -> Learner:
    """What it is and does, with fresh streams."""
    fork = copy.deepcopy(learner)
    fork.restart()
    return fork


def _task(
    fork: Learner, pairs: Sequence[tuple[Question, Answer]], draw: torch.Generator
) -> tuple[list[Question], list[Answer]]:
    """Questions that have answers, at times of their own, and random answers."""
    known = [pair for pair in pairs if bool(pair[1].target_mask.any())]
    if not known:
        raise UsageError("a new task: none of the questions has an answer")
    # Those of the learner may still wait for answers.
    questions = [question._replace(time=i - len(known)) for i, (question, _) in enumerate(known)]
    questions[0] = questions[0]._replace(reset=_from_the_start(questions[0].reset))
    classes = fork.predict(questions[0]).shape[-1]
    fork.restart()
    targets = _random_targets([answer for _, answer in known], classes, draw)
    answers = [
        answer._replace(targets=new, learn_mask=answer.target_mask, time=question.time, final=True)
        for question, (_, answer), new in zip(questions, known, targets, strict=True)
    ]
    return questions, answers


def _from_the_start(reset: Tensor) -> Tensor:
    reset = reset.clone()
    reset[:, 0] = True
    return reset


def _random_targets(answers: Sequence[Answer], classes: int, draw: torch.Generator) -> list[Tensor]:
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
