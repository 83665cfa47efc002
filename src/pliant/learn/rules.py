"""Learning rules: which past a gradient reaches.

A rule sees the questions of the recent past, each with the memory before it, and runs the model
over them so that `backward` on the last output gives the gradient that the rule stands for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pliant.core import Question, UsageError, detach, put, take


class Asked(NamedTuple):
    """A question, the memory of all streams before it (detached), and what was said (detached)."""

    question: Question
    before: Any
    said: Tensor


@dataclass(frozen=True)
class Bptt:
    """Truncated back-propagation through time; see `bptt`."""

    window: int

    def first(self, past: Sequence[Asked]) -> int:
        """Index in `past` of the question at which the gradient of the last one begins."""
        start, steps = len(past) - 1, past[-1].question.inputs.shape[1]
        while start > 0 and not _starts_fresh(past[start].question):
            steps += past[start - 1].question.inputs.shape[1]
            if steps > self.window:
                break
            start -= 1
        return start

    def run(self, model: nn.Module, question: Question, memory: Any) -> tuple[Tensor, Any]:
        """Output for `question` and the memory after it; gradients end every `window` steps."""
        whole = len(question.rows) == _streams(memory) and _is_range(question.rows)
        state = memory if whole else take(memory, question.rows)
        outputs = []
        for i, piece in enumerate(
            zip(*(part.split(self.window, 1) for part in (question.inputs, question.reset, question.mask)), strict=True)
        ):
            inputs, reset, mask = piece
            state = detach(state) if i else state
            output, state = model(inputs, state, reset=reset, mask=mask)
            outputs.append(output)
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
        return output, state if whole else put(memory, question.rows, state)

    def replay(self, model: nn.Module, past: Sequence[Asked]) -> Tensor:
        """Output for the last question of `past`, with gradients through all that `first` reaches."""
        reached = past[self.first(past) :]
        questions = [asked.question for asked in reached]
        rows, steps = questions[-1].rows, questions[-1].inputs.shape[1]
        if len(questions) > 1 and all(question.rows.equal(rows) for question in questions):
            # One pass over all of them: a chunk gives the same as its steps.
            inputs, reset, mask = (torch.cat(same, 1) for same in zip(*(q[:3] for q in questions), strict=True))
            joined = Question(inputs, reset, mask, questions[0].time, rows)
            output, _ = self.run(model, joined, reached[0].before)
            return output[:, -steps:]
        memory = reached[0].before
        for question in questions:
            output, memory = self.run(model, question, memory)
        return output

    def spare(self, past: Sequence[Asked]) -> int:
        """How many of the oldest questions of `past` no later gradient will begin at."""
        steps, start = 1, len(past)
        while start > 0:
            steps += past[start - 1].question.inputs.shape[1]
            if steps > self.window:
                break
            start -= 1
        return start


def bptt(window: int) -> Bptt:
    """Truncated back-propagation through time over `window` steps.

    The gradient of an answer goes back over its own question and as many whole questions before
    it as make `window` steps together, also when each question holds one step; within a longer
    question it ends every `window` steps. A question whose first step is a reset in every row
    needs none before it. (Williams & Peng 1990, BPTT(h; h'), with h' the steps of a question.)

    Raises:
        UsageError: window is not positive.
    """
    if window < 1:
        raise UsageError(f"bptt: window is {window}, expected at least 1 step")
    return Bptt(window)


def _starts_fresh(question: Question) -> bool:
    return bool(question.reset[:, 0].all())


def _streams(memory: Any) -> int:
    while not isinstance(memory, Tensor):
        memory = memory[0]
    return memory.shape[0]


def _is_range(rows: Tensor) -> bool:
    return rows.equal(torch.arange(len(rows), device=rows.device))
