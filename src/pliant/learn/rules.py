"""Learning rules: which past a gradient reaches.

A rule sees the questions of the recent past, each with the memory before it, and runs the model
over them so that `backward` on the last output gives the gradient that the rule stands for.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core import Question, UsageError, detach, put, take


class Asked(NamedTuple):
    """A question, the memory of all streams before it (detached), and what was said (detached).

    steps: how many the question has; fresh: whether it starts with a reset in every row.
    """

    question: Question
    before: Any
    said: Tensor
    steps: int
    fresh: bool

    @classmethod
    def of(cls, question: Question, before: Any, said: Tensor) -> "Asked":
        return cls(question, before, said, question.inputs.shape[1], _starts_fresh(question))


@dataclass(frozen=True)
class Bptt:
    """Truncated back-propagation through time; see `bptt`."""

    window: int
    every: int = 1
    revisit: bool = False

    def reach(self, newest_first: Iterable[Asked]) -> list[Asked]:
        """The first of these questions and those to which its gradient goes back, oldest first."""
        reached: list[Asked] = []
        steps = 0
        for asked in newest_first:
            steps += asked.steps
            if reached and (reached[-1].fresh or steps > self.window):
                break
            reached.append(asked)
        return reached[::-1]

    def alone(self, question: Question, before: Asked | None) -> bool:
        """Whether the gradient of the answer to `question` can reach no question before it."""
        steps = question.inputs.shape[1]
        return before is None or steps + before.steps > self.window or _starts_fresh(question)

    def run(self, model: nn.Module, question: Question, memory: Any) -> tuple[Tensor, Any]:
        """Output for `question` and the memory after it; gradients end every `window` steps."""
        whole = _is_range(question.rows, _streams(memory))
        state = memory if whole else take(memory, question.rows)
        if question.inputs.shape[1] <= self.window:
            output, state = model(question.inputs, state, reset=question.reset, mask=question.mask)
            return output, state if whole else put(memory, question.rows, state)
        outputs = []
        for i, piece in enumerate(
            zip(*(part.split(self.window, 1) for part in (question.inputs, question.reset, question.mask)), strict=True)
        ):
            inputs, reset, mask = piece
            state = detach(state) if i else state
            output, state = model(inputs, state, reset=reset, mask=mask)
            outputs.append(output)
        return torch.cat(outputs, 1), state if whole else put(memory, question.rows, state)

    def replay(self, model: nn.Module, reached: Sequence[Asked]) -> list[Tensor]:
        """Outputs for what `reach` gave, with gradients through all of it: one for each question, or one for all."""
        questions = [asked.question for asked in reached]
        rows = questions[-1].rows
        if len(questions) > 1 and all(question.rows is rows or question.rows.equal(rows) for question in questions):
            # One pass over all of them: a chunk gives the same as its steps.
            inputs, reset, mask = (torch.cat(same, 1) for same in zip(*[q[:3] for q in questions], strict=True))
            joined = Question(inputs, reset, mask, questions[0].time, rows)
            return [self.run(model, joined, reached[0].before)[0]]
        memory, outputs = reached[0].before, []
        for question in questions:
            output, memory = self.run(model, question, memory)
            outputs.append(output)
        return outputs

    def held(self, newest_first: Iterable[Asked]) -> list[Asked]:
        """Those of these questions at which the gradient of one still to come may begin, newest first."""
        steps, held = 1, []
        for asked in newest_first:
            steps += asked.steps
            if steps > self.window:
                break
            held.append(asked)
        return held


def bptt(window: int, *, every: int = 1, revisit: bool = False) -> Bptt:
    """Truncated back-propagation through time over `window` steps.

    The gradient of an answer goes back over its own question and as many whole questions before
    it as make `window` steps together, also when each question holds one step; within a longer
    question it ends every `window` steps. A question whose first step is a reset in every row
    needs none before it. (Williams & Peng 1990, BPTT(h; h'), with h' the steps of a question.)

    Args:
        window: steps that a gradient reaches back.
        every: learned targets from one update to the next; the answers in between wait for it.
        revisit: descend the losses of all answers within the window, not of the newest alone. The window
            has to be run for the newest one anyway, so the older ones cost next to nothing more, and each
            is learned from about window / every times.

    Raises:
        UsageError: window or every is not positive, or answers that wait would be lost.
    """
    if window < 1:
        raise UsageError(f"bptt: window is {window}, expected at least 1 step")
    if every < 1:
        raise UsageError(f"bptt: every is {every}, expected at least 1 target")
    if every > 1 and not revisit:
        raise UsageError(f"bptt: every is {every} without revisit, so all answers but each {every}th would be lost; "
                         "set revisit=True")  # fmt: skip
    return Bptt(window, every, revisit)


def _starts_fresh(question: Question) -> bool:
    return question.reset.shape[1] > 0 and all(question.reset[:, 0].tolist())


def _streams(memory: Any) -> int:
    while not isinstance(memory, Tensor):
        memory = memory[0]
    return memory.shape[0]


def _is_range(rows: Tensor, size: int) -> bool:
    return len(rows) == size and rows.tolist() == list(range(size))
