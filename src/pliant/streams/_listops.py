"""ListOps: expressions of nested operations on digits, whose value is one of ten classes.

A node at depth d < `max_depth` is an operation with probability 1/4, else a digit; at `max_depth` it is a digit. An
operation is MIN, MAX, MED (the median, rounded down) or SM (the sum modulo 10) with equal chances, of 2 to `max_args`
nodes, any number as likely as another. Digits are uniform. Expressions are drawn anew until their length is between
the bounds given; that is the published distribution, of which no expression is kept from coming twice.

    [MAX 2 4 [MIN 1 6 ] 1 0 [MED 1 9 7 ] ]  =  7

Papers: Nangia and Bowman 2018, ListOps, arXiv:1804.06028; Tay et al. 2021, Long Range Arena, arXiv:2011.04006, whose
generator has depth 10, 10 arguments and lengths from 501 to 1,999; there as here, brackets to the right of a node are
tokens, and those that only group are none.
"""

import numpy as np
import torch

from pliant.core import Answer, Question, UsageError, numpy_generator
from pliant.streams.base import Passive, Spec, Stream

OPERATIONS = ("MIN", "MAX", "MED", "SM")
TOKENS = (*(str(digit) for digit in range(10)), *(f"[{name}" for name in OPERATIONS), "]")
"""Names of tokens, by number."""
OPEN, CLOSE = 10, 14
CLASSES = 10
OPERATION_CHANCE = 0.25
MOST_DRAWS = 1_000_000


def listops(
    *,
    batch: int = 16,
    questions: int | None = None,
    min_length: int = 20,
    max_length: int = 96,
    max_depth: int = 10,
    max_args: int = 10,
    seed: int = 0,
) -> Stream:
    """One question is `batch` expressions, each an episode; the answer their values, at their last tokens.

    Inputs are `(B, max_length, 15)` float32, one of the 15 tokens at each step, behind masked steps where an expression
    is shorter. The n-th question depends on the seed and n alone. The published distribution has lengths of 501 to
    1,999.

    Args:
        batch: B, expressions per question.
        questions: length of the stream; None is endless.
        min_length, max_length: bounds of the number of tokens, both included.
        max_depth: operations within one another, and a digit in them.
        max_args: most arguments of an operation.
        seed: decides all expressions.

    Raises:
        UsageError: an argument is out of range, or such lengths do not come up.
    """
    if batch < 1 or max_depth < 1 or max_args < 2 or not 1 <= min_length <= max_length:
        raise UsageError(
            f"listops: batch is {batch}, max_depth {max_depth}, max_args {max_args} and lengths from {min_length} to "
            f"{max_length}; expected at least 1, 1, 2 and bounds in order"
        )
    return _ListOps(batch, questions, (min_length, max_length, max_depth, max_args), seed)


class _ListOps(Passive):
    """Expressions of a question from a generator of their own."""

    def __init__(self, batch: int, questions: int | None, bounds: tuple[int, int, int, int], seed: int):
        super().__init__(Spec(len(TOKENS), CLASSES, batch, bounds[1]))
        self.questions, self.bounds, self.seed = questions, bounds, seed

    def pair(self, index: int) -> tuple[Question, Answer] | None:
        if self.questions is not None and index >= self.questions:
            return None
        batch, steps = self.spec.batch, self.spec.steps
        random = numpy_generator(self.seed, f"listops/{index}")
        inputs, mask = torch.zeros(batch, steps, len(TOKENS)), torch.zeros(batch, steps, dtype=torch.bool)
        values, reset, last = torch.zeros(batch, dtype=torch.int64), torch.zeros_like(mask), torch.zeros_like(mask)
        for row in range(batch):
            tokens = torch.from_numpy(expression(random, *self.bounds))
            inputs[row, steps - len(tokens) :] = torch.nn.functional.one_hot(tokens, len(TOKENS)).float()
            mask[row, steps - len(tokens) :] = True
            values[row] = value_of(tokens.tolist())
        reset[:, 0] = last[:, -1] = True
        time, rows = index * steps, torch.arange(batch)
        targets = values[:, None].expand(-1, steps)
        return Question(inputs, reset, mask, time, rows), Answer(targets, last, last, time, rows)


def expression(
    random: np.random.Generator, min_length: int, max_length: int, max_depth: int = 10, max_args: int = 10
) -> np.ndarray:
    """Tokens of one expression, int64, by `TOKENS`.

    Raises:
        UsageError: no expression of such a length in a million.
    """
    for _ in range(MOST_DRAWS):
        tokens = _drawn(random, max_length, max_depth, max_args)
        if min_length <= len(tokens) <= max_length:
            return np.array(tokens, np.int64)
    raise UsageError(
        f"listops: none of {MOST_DRAWS} expressions of depth {max_depth} with up to {max_args} arguments has "
        f"{min_length} to {max_length} tokens"
    )


def _drawn(random: np.random.Generator, max_length: int, max_depth: int, max_args: int) -> list[int]:
    """Tokens from left to right; given up at more than `max_length`, which is too many for whoever asks."""
    tokens: list[int] = []
    waiting = [1]  # nodes that are still to come, in each operation that is open; the first is the whole
    while waiting and len(tokens) <= max_length:
        if waiting[-1] == 0:
            waiting.pop()
            if waiting:
                tokens.append(CLOSE)
            continue
        waiting[-1] -= 1
        if len(waiting) < max_depth and random.random() < OPERATION_CHANCE:
            tokens.append(OPEN + int(random.integers(len(OPERATIONS))))
            waiting.append(int(random.integers(2, max_args + 1)))
        else:
            tokens.append(int(random.integers(10)))
    return tokens


def value_of(tokens: list[int]) -> int:
    """The value of an expression."""
    found: list[list[int]] = [[]]
    operations: list[int] = []
    for token in tokens:
        if token < OPEN:
            found[-1].append(token)
        elif token < CLOSE:
            operations.append(token - OPEN)
            found.append([])
        else:
            arguments, name = found.pop(), OPERATIONS[operations.pop()]
            found[-1].append(_apply(name, arguments))
    return found[0][0]


def _apply(name: str, arguments: list[int]) -> int:
    if name == "MED":
        ordered, middle = sorted(arguments), len(arguments) // 2
        return ordered[middle] if len(arguments) % 2 else (ordered[middle - 1] + ordered[middle]) // 2
    if name == "SM":
        return sum(arguments) % 10
    return min(arguments) if name == "MIN" else max(arguments)
