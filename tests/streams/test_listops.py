"""ListOps: values, and the distribution of what is drawn against exact numbers."""

import numpy as np
import pytest
import torch

from pliant.core import UsageError, numpy_generator
from pliant.streams import listops
from pliant.streams._listops import CLOSE, OPEN, OPERATION_CHANCE, TOKENS, _drawn, expression, value_of

DRAWS = 12_000
DEPTH, ARGUMENTS = 4, 5


def read(text: str) -> list[int]:
    return [TOKENS.index(token) for token in text.split()]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("[MAX 2 4 [MIN 1 6 ] 1 0 [MED 1 9 7 ] ]", 7),
        ("[SM 9 9 9 ]", 7),
        ("[MED 1 2 ]", 1),
        ("[MED 0 9 3 4 ]", 3),
        ("[MIN [SM 5 5 ] 3 ]", 0),
        ("8", 8),
    ],
)
def test_values(text: str, value: int) -> None:
    assert value_of(read(text)) == value


@pytest.fixture(scope="module")
def drawn() -> list[list[int]]:
    random = numpy_generator(0, "test")
    return [_drawn(random, 10**6, DEPTH, ARGUMENTS) for _ in range(DRAWS)]


def lengths(depth: int, arguments: int, most: int) -> np.ndarray:
    """The probability of each length, exactly: digits at the bottom, and a sum of nodes within an operation."""
    digit = np.zeros(most + 1)
    digit[1] = 1
    node = digit
    for _ in range(depth - 1):
        operation, together = np.zeros(most + 1), node
        for _ in range(2, arguments + 1):
            together = np.convolve(together, node)[: most + 1]
            operation[2:] += together[:-2] / (arguments - 1)
        node = (1 - OPERATION_CHANCE) * digit + OPERATION_CHANCE * operation
    return node


def test_lengths_have_the_published_distribution(drawn: list[list[int]]) -> None:
    exact = lengths(DEPTH, ARGUMENTS, 60)
    found = np.bincount([min(len(tokens), 60) for tokens in drawn], minlength=61) / DRAWS
    exact[60] = 1 - exact[:60].sum()
    error = 5 * np.sqrt(exact * (1 - exact) / DRAWS) + 1e-9
    assert (np.abs(found - exact) < error + 1 / DRAWS).all()


def test_tokens_have_the_published_shares(drawn: list[list[int]]) -> None:
    counts = np.bincount([token for tokens in drawn for token in tokens], minlength=15)
    assert counts[CLOSE] == counts[OPEN:CLOSE].sum()
    for kinds in (counts[:10], counts[OPEN:CLOSE]):
        expected = kinds.sum() / len(kinds)
        assert ((kinds - expected) ** 2 / expected).sum() < 30  # chi squared: beyond 99.9 % of 9 or 3 degrees
    firsts = np.array([tokens[0] >= OPEN for tokens in drawn])
    assert firsts.mean() == pytest.approx(OPERATION_CHANCE, abs=5 * 0.433 / DRAWS**0.5)


def test_expressions_are_whole_and_not_too_deep(drawn: list[list[int]]) -> None:
    for tokens in drawn[:2000]:
        depth = most = 0
        arguments = [0]
        for token in tokens:
            if token == CLOSE:
                assert 2 <= arguments.pop() <= ARGUMENTS
                depth -= 1
                continue
            arguments[-1] += 1
            if token >= OPEN:
                depth += 1
                arguments.append(0)
            most = max(most, depth)
        assert arguments == [1] and depth == 0 and most < DEPTH


def test_long_ones_are_those_of_the_long_range_arena() -> None:
    """Drawn anew until the length fits: the share that does, and lengths between the bounds."""
    exact = lengths(10, 10, 1999)
    share = exact[501:].sum()
    assert share == pytest.approx(0.08276, abs=1e-5)
    random = numpy_generator(1, "test")
    found = np.array([len(_drawn(random, 1999, 10, 10)) for _ in range(1000)])
    assert ((found > 500) & (found < 2000)).mean() == pytest.approx(share, abs=5 * (share / 1000) ** 0.5)
    assert 500 < len(expression(random, 501, 1999)) < 2000


def test_a_question_holds_whole_expressions_and_their_values() -> None:
    stream = listops(batch=4, questions=3, min_length=10, max_length=40, seed=3)
    batch = stream.send(None)
    assert batch is not None and batch.question is not None
    question, following = batch.question, stream.send(None)
    assert following is not None
    answer = following.answers[0]
    assert question.inputs.shape == (4, 40, 15)
    for row in range(4):
        tokens = question.inputs[row][question.mask[row]].argmax(1).tolist()
        assert 10 <= len(tokens) <= 40
        assert answer.targets[row, -1] == value_of(tokens)
    assert not question.inputs[~question.mask].any()
    assert answer.target_mask.sum(1).tolist() == [1, 1, 1, 1] and bool(answer.target_mask[:, -1].all())
    assert torch.equal(question.reset.long().sum(1), torch.ones(4, dtype=torch.int64))


def test_what_cannot_be_drawn_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in ({"batch": 0}, {"max_depth": 0}, {"max_args": 1}, {"min_length": 9, "max_length": 8}):
        with pytest.raises(UsageError, match="listops"):
            listops(**wrong)
    monkeypatch.setattr("pliant.streams._listops.MOST_DRAWS", 50)
    with pytest.raises(UsageError, match="none of 50"):
        listops(min_length=50, max_length=60, max_depth=1).send(None)
