"""Learning rules: which past a gradient reaches.

A rule sees the questions of the recent past, each with the memory before it, and runs the model
over them so that `backward` on the last output gives the gradient that the rule stands for.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pliant.core import Question, UsageError, detach, put, take


class Asked(NamedTuple):
    """A question, the memory of all streams before it (detached), and what was said (detached).

    seen: what `model.observe` made of the inputs, for a model that has it; steps: how many the question
    has; fresh: whether it starts with a reset in every row.
    """

    question: Question
    before: Any
    said: Tensor
    seen: Tensor | None
    steps: int
    fresh: bool

    @classmethod
    def of(cls, question: Question, before: Any, said: Tensor, seen: Tensor | None = None) -> "Asked":
        return cls(question, before, said, seen, question.inputs.shape[1], _starts_fresh(question))


class Together(NamedTuple):
    """Several questions as one pass: the memory of its streams before, and reset, mask and seen of all steps.

    places: stream and step at which each question's rows and steps stand, two index arrays that broadcast to
    `(B, T)`; None if all questions are about the same streams, and stand side by side.
    """

    before: Any
    reset: Tensor
    mask: Tensor
    seen: Tensor
    places: list[tuple[np.ndarray, np.ndarray]] | None


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

    def run(
        self, model: nn.Module, question: Question, memory: Any, seen: Tensor | None = None
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Output for `question`, the memory after it, and what the model made of the inputs without its parameters.

        Gradients end every `window` steps. seen: the last of these, from an earlier run.
        """
        whole = _is_range(question.rows, _streams(memory))
        state = memory if whole else take(memory, question.rows)
        if seen is None and (observe := getattr(model, "observe", None)) is not None:
            seen, state = observe(question.inputs, state, mask=question.mask)
        if question.inputs.shape[1] <= self.window:
            output, state = _through(model, state, question.inputs, question.reset, question.mask, seen)
            return output, state if whole else put(memory, question.rows, state), seen
        parts = [question.inputs, question.reset, question.mask, *([] if seen is None else [seen])]
        outputs = []
        for i, piece in enumerate(zip(*(part.split(self.window, 1) for part in parts), strict=True)):
            output, state = _through(model, detach(state) if i else state, *piece)
            outputs.append(output)
        return torch.cat(outputs, 1), state if whole else put(memory, question.rows, state), seen

    def replay(self, model: nn.Module, reached: Sequence[Asked]) -> list[Tensor]:
        """Outputs for what `reach` gave, with gradients through all of it: one for each question, or one for all."""
        questions = [asked.question for asked in reached]
        if len(questions) > 1 and _same_rows(questions):
            # One pass over all of them: a chunk gives the same as its steps.
            question, seen = _side_by_side(reached)
            return [self.run(model, question, reached[0].before, seen)[0]]
        memory, outputs = reached[0].before, []
        for asked in reached:
            output, memory, _ = self.run(model, asked.question, memory, asked.seen)
            outputs.append(output)
        return outputs

    def together(self, reached: Sequence[Asked]) -> "Together | None":
        """What `reach` gave as one pass over what the model saw; None if it takes several, or it kept nothing."""
        questions = [asked.question for asked in reached]
        seen = [asked.seen for asked in reached if asked.seen is not None]
        if sum(asked.steps for asked in reached) > self.window or len(seen) < len(reached):
            return None
        memory, rows = reached[0].before, questions[-1].rows
        if not _same_rows(questions):
            return _packed(reached) if all(part.is_cpu for part in seen) else None
        before = memory if _is_range(rows, _streams(memory)) else take(memory, rows)
        reset, mask = joined([q.reset for q in questions]), joined([q.mask for q in questions])
        return Together(before, reset, mask, joined(seen), None)

    def needed(self, newest_first: Iterable[Asked], waiting: Callable[[int], bool]) -> set[int]:
        """Times of those of these questions that a gradient may still reach, that of one to come included.

        waiting: whether the answer to the question at a time is still to be learned from.
        """
        needed, left = set(), self.window - 1
        for asked in newest_first:
            time = asked.question.time
            if waiting(time):
                left = max(left, self.window, asked.steps)
            if asked.steps > left:
                left = 0
                continue
            needed.add(time)
            left = 0 if asked.fresh else left - asked.steps
        return needed


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


def _through(
    model: nn.Module, state: Any, inputs: Tensor, reset: Tensor, mask: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Any]:
    more = {} if seen is None else {"seen": seen}
    return model(inputs, state, reset=reset, mask=mask, **more)


def _same_rows(questions: Sequence[Question]) -> bool:
    rows = questions[-1].rows
    return all(question.rows is rows or question.rows.equal(rows) for question in questions)


def _side_by_side(reached: Sequence[Asked]) -> tuple[Question, Tensor | None]:
    """Questions about the same streams as one, and what the model made of their inputs."""
    questions = [asked.question for asked in reached]
    inputs, reset, mask = (joined(same) for same in zip(*[q[:3] for q in questions], strict=True))
    seen = [asked.seen for asked in reached if asked.seen is not None]
    question = Question(inputs, reset, mask, questions[0].time, questions[-1].rows)
    return question, joined(seen) if len(seen) == len(reached) else None


def _packed(reached: Sequence[Asked]) -> Together:
    """Each stream's steps side by side in a row of its own, with steps that do not exist at the end of short ones."""
    rows = [asked.question.rows.numpy() for asked in reached]
    streams, inverse = np.unique(np.concatenate(rows), return_inverse=True)
    count, places, start = np.zeros(len(streams), np.int64), [], 0
    for asked, own in zip(reached, rows, strict=True):
        stream = inverse[start : start + len(own)]
        places.append((stream[:, None], count[stream][:, None] + np.arange(asked.steps)))
        count[stream] += asked.steps
        start += len(own)
    shape = (len(streams), int(count.max()))
    seen = np.zeros((*shape, reached[0].seen.shape[-1]))  # type: ignore[union-attr]
    reset, mask = np.zeros((2, *shape), np.bool_)
    for asked, place in zip(reached, places, strict=True):
        seen[place] = asked.seen.numpy()  # type: ignore[union-attr]
        reset[place], mask[place] = asked.question.reset.numpy(), asked.question.mask.numpy()
    before = take(reached[0].before, torch.from_numpy(streams))
    return Together(before, torch.from_numpy(reset), torch.from_numpy(mask), torch.from_numpy(seen), places)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Side by side along the steps."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _starts_fresh(question: Question) -> bool:
    return question.reset.shape[1] > 0 and all(question.reset[:, 0].tolist())


def _streams(memory: Any) -> int:
    while not isinstance(memory, Tensor):
        memory = memory[0]
    return memory.shape[0]


def _is_range(rows: Tensor, size: int) -> bool:
    return len(rows) == size and rows.tolist() == list(range(size))
