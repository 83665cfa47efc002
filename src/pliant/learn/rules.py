"""Learning rules: which past a gradient reaches.

- `bptt(window)`: back over the last steps, whose activations are kept, and no further
- `trace(chunk)`: back over the last steps, and from there to all the past by traces of constant size
- `immediate()`: over the step itself

A rule sees the questions of the recent past, each with the memory before it, and runs the model
over them so that `backward` on the last output gives the gradient that the rule stands for.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from pliant.core import Question, UsageError, detach, leaves, put, take

CHUNK = 16
"""Steps from one border of traces to the next, unless something else is said."""


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

    rows: the streams of the pass; None for all of them, in order. places: stream of the pass and step at which each
    question's rows and steps stand, two index arrays that broadcast to `(B, T)`; None if all questions are about the
    same streams, and stand side by side. inputs: of all steps, where they were asked for.
    """

    before: Any
    reset: Tensor
    mask: Tensor
    seen: Tensor | None
    rows: Tensor | None
    places: list[tuple[np.ndarray, np.ndarray]] | None
    inputs: Tensor | None = None

    @classmethod
    def of(cls, reached: Sequence[Asked], *, inputs: bool) -> "Together":
        """Questions as one pass, with what the model made of the inputs if all of it was kept."""
        questions = [asked.question for asked in reached]
        seen = [asked.seen for asked in reached if asked.seen is not None]
        memory, rows = reached[0].before, questions[-1].rows
        parts = [[q.reset for q in questions], [q.mask for q in questions]]
        parts += [seen] if len(seen) == len(reached) else []
        parts += [[q.inputs for q in questions]] if inputs else []
        if _same_rows(questions):
            whole, places = _is_range(rows, streams_of(memory)), None
            packed = [joined(part) for part in parts]
        else:
            whole, streams, places, shape = False, *_places(reached)
            rows, packed = torch.from_numpy(streams), [_packed(part, places, shape) for part in parts]
        reset, mask, *more = packed
        before = memory if whole else take(memory, rows)
        return cls(before, reset, mask, more.pop(0) if len(seen) == len(reached) else None, None if whole else rows,
                   places, *more)  # fmt: skip

    def apart(self, output: Tensor, reached: Sequence[Asked]) -> list[Tensor]:
        """Of outputs of the pass those for each question."""
        if self.places is None:
            return list(output.split([asked.steps for asked in reached], 1))
        return [output[torch.from_numpy(stream), torch.from_numpy(step)] for stream, step in self.places]


class Rule(ABC):
    """What a learner asks of its learning rule."""

    every: int
    """Learned targets from one update to the next; 0: an update when a chunk is full."""
    revisit: bool
    """Whether an update learns from all answers within reach, not from new ones alone."""
    window: int
    """Steps of a question after which `run` ends gradients."""

    @abstractmethod
    def reach(self, newest_first: Iterable[Asked]) -> list[Asked]:
        """The first of these questions and those to which its gradient goes back, oldest first."""

    @abstractmethod
    def needed(self, newest_first: Iterable[Asked], waiting: Callable[[int], bool]) -> set[int]:
        """Times of those of these questions that a gradient may still reach, that of one to come included.

        waiting: whether the answer to the question at a time is still to be learned from.
        """

    def alone(self, question: Question, before: Asked | None) -> bool:
        """Whether the gradient of the answer to `question` can reach no question before it."""
        return False

    def run(
        self, model: nn.Module, question: Question, memory: Any, seen: Tensor | None = None
    ) -> tuple[Tensor, Any, Tensor | None]:
        """Output for `question`, the memory after it, and what the model made of the inputs without its parameters.

        Gradients end every `window` steps. seen: the last of these, from an earlier run.
        """
        whole = _is_range(question.rows, streams_of(memory))
        state = memory if whole else take(memory, question.rows)
        if seen is None and (observe := getattr(model, "observe", None)) is not None:
            seen, state = observe(question.inputs, state, mask=question.mask)
        if question.inputs.shape[1] <= self.window:
            output, state = through(model, state, question.inputs, question.reset, question.mask, seen)
            return output, state if whole else put(memory, question.rows, state), seen
        parts = [question.inputs, question.reset, question.mask, *([] if seen is None else [seen])]
        outputs = []
        for i, piece in enumerate(zip(*(part.split(self.window, 1) for part in parts), strict=True)):
            output, state = through(model, detach(state) if i else state, *piece)
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
        if sum(asked.steps for asked in reached) > self.window or any(asked.seen is None for asked in reached):
            return None
        return Together.of(reached, inputs=False)


@dataclass(frozen=True)
class Bptt(Rule):
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
    if not _whole(window) or window < 1:
        raise UsageError(f"bptt: window is {window!r}, expected at least 1 step")
    if not _whole(every) or every < 1:
        raise UsageError(f"bptt: every is {every}, expected at least 1 target")
    if every > 1 and not revisit:
        raise UsageError(f"bptt: every is {every} without revisit, so all answers but each {every}th would be lost; "
                         "set revisit=True")  # fmt: skip
    return Bptt(window, every, revisit)


def immediate() -> Bptt:
    """Derivatives of the step itself, the memory before it held fixed: `bptt(1)`.

    The past is learned from only where it happens to have the same direction. Enough to follow a drift, blind to what
    was useful long ago (Merin 2026, arXiv:2603.28750).
    """
    return Bptt(1)


@dataclass(frozen=True)
class Trace(Rule):
    """Gradients by traces; see `trace`."""

    chunk: int
    every: int = 0
    policy: tuple[tuple[str, str], ...] = ()
    revisit = False
    window = sys.maxsize

    def reach(self, newest_first: Iterable[Asked]) -> list[Asked]:
        """All that is held: what lies before it is in the traces."""
        return list(newest_first)[::-1]

    def alone(self, question: Question, before: Asked | None) -> bool:
        """Whether the question is a chunk, so that its answer is learned from before another is asked."""
        return before is None and question.inputs.shape[1] == self.chunk

    def needed(self, newest_first: Iterable[Asked], waiting: Callable[[int], bool]) -> set[int]:
        return {asked.question.time for asked in newest_first}


def trace(chunk: int = CHUNK, *, every: int | None = None, policy: Mapping[str, str] | None = None) -> Trace:
    """Gradients that reach all the past in constant memory and time, for layers of element-wise recurrence.

    Steps are taken in chunks. Inside a chunk the gradient is that of back-propagation, through all layers. What flows
    back to the state at the chunk's beginning goes on by traces: the derivatives of that state by each parameter of
    its layer (`SequenceMixer.advance_traces`). For parameters of the last recurrent layer this is the gradient through
    the whole past; below it, paths that cross a border in a layer above are left out, as are those of parameters
    without traces (embeddings, norms, what feeds a recurrence). chunk=1 is real-time recurrent learning layer by layer,
    chunk = T is back-propagation. (Zucchet et al. 2023, arXiv:2305.15947; online-gradients.md 2.2, 2.4.)

    A chunk waits until the answers to its questions have come or are forgotten, so a late answer gets the trace of
    the step that it is about.

    Args:
        chunk: steps from one border to the next; longer questions are taken in pieces of it.
        every: learned targets from one update to the next; None means one update for each chunk.
        policy: kinds of traces other than the default, "exact", "own" or "instant", of groups of parameters as
            `SequenceMixer.traceable` names them: `{"linear_x": "exact"}`.

    Raises:
        UsageError: chunk or every is not positive.
    """
    if not _whole(chunk) or chunk < 1:
        raise UsageError(f"trace: chunk is {chunk!r}, expected at least 1 step")
    if policy is not None and not isinstance(policy, Mapping):
        raise UsageError(f'trace: policy is {policy!r}, expected kinds by groups, such as {{"linear_x": "exact"}}')
    if every is not None and (not _whole(every) or every < 1):
        raise UsageError(f"trace: every is {every}, expected at least 1 target, or None for one update a chunk")
    return Trace(chunk, every or 0, tuple((policy or {}).items()))


RuleName = Literal["bptt", "trace", "immediate"]


def rule_named(name: RuleName, window: int, steps: int, *, every: int = 1, revisit: bool = False) -> Rule:
    """A rule by its name, for questions of so many steps.

    Args:
        name: `bptt` over the window; `trace`, in chunks as long as a question, of 16 steps at least; or `immediate`.
        window: of `bptt`, as every and revisit are.
        steps: of a question.
        every: targets from one update to the next.
        revisit: see `bptt`.
    """
    if name == "bptt":
        return bptt(window, every=every, revisit=revisit)
    return trace(max(CHUNK, steps), every=every if every > 1 else None) if name == "trace" else immediate()


def _whole(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool)


def through(
    model: nn.Module, state: Any, inputs: Tensor, reset: Tensor, mask: Tensor, seen: Tensor | None = None
) -> tuple[Tensor, Any]:
    """The model's outputs and the state after; seen: what it made of the inputs before, if it did."""
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


def _places(
    reached: Sequence[Asked],
) -> tuple[np.ndarray, list[tuple[np.ndarray, np.ndarray]], tuple[int, int]]:
    """Streams of these questions, where each stands with its stream's steps side by side, and the shape of that."""
    rows = [asked.question.rows.numpy() for asked in reached]
    streams, inverse = np.unique(np.concatenate(rows), return_inverse=True)
    count, places, start = np.zeros(len(streams), np.int64), [], 0
    for asked, own in zip(reached, rows, strict=True):
        stream = inverse[start : start + len(own)]
        places.append((stream[:, None], count[stream][:, None] + np.arange(asked.steps)))
        count[stream] += asked.steps
        start += len(own)
    return streams, places, (len(streams), int(count.max()))


def _packed(parts: Sequence[Tensor], places: Sequence[tuple[np.ndarray, np.ndarray]], shape: tuple[int, int]) -> Tensor:
    """Each part at its place; zero or false at steps that do not exist, at the end of short streams."""
    out = parts[0].new_zeros(*shape, *parts[0].shape[2:])
    if out.is_cpu:  # as arrays, a write of which costs less
        for part, place in zip(parts, places, strict=True):
            out.numpy()[place] = part.numpy()
        return out
    for part, (stream, step) in zip(parts, places, strict=True):
        out[torch.from_numpy(stream), torch.from_numpy(step)] = part
    return out


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Side by side along the steps."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), 1)


def _starts_fresh(question: Question) -> bool:
    return question.reset.shape[1] > 0 and all(question.reset[:, 0].tolist())


def streams_of(memory: Any) -> int:
    """How many streams a memory holds."""
    return next(leaves(memory))[1].shape[0]


def _is_range(rows: Tensor, size: int) -> bool:
    return len(rows) == size and rows.tolist() == list(range(size))
