"""What could be: capacities against closed forms, with bounds that hold on the way; worlds; the Bellman equation."""

import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from pliant.core import UsageError
from pliant.measure.capacity import capacity, closed_loop_capacity, explored, grid, plasticity_values, reach
from pliant.measure.information import empowerment, joint_law, plasticity
from tests.measure.systems import drawn_tables, fair, flip, h, sure

CHANNELS = {
    "binary symmetric": ([[0.9, 0.1], [0.1, 0.9]], 0.5310044064),
    "Z": ([[1, 0], [0.5, 0.5]], math.log2(5 / 4)),
    "erasure": ([[0.7, 0.3, 0], [0, 0.3, 0.7]], 0.7),
    "asymmetric": ([[0.9, 0.1], [0.3, 0.7]], 0.2966718028),
    "an input that is of no use": ([[1, 0], [0, 1], [0.5, 0.5]], 1.0),
    "without noise": (np.eye(5).tolist(), math.log2(5)),
    "the same whatever goes in": ([[0.2, 0.8], [0.2, 0.8]], 0.0),
}


@pytest.mark.parametrize("name", CHANNELS)
def test_capacities_of_channels(name: str) -> None:
    rows, wanted = CHANNELS[name]
    channel = np.array(rows, dtype=np.float64)
    found = capacity(channel)
    assert found.lower == pytest.approx(wanted, abs=1e-8) and found.upper - found.lower <= 1e-10
    seen = [capacity(channel, tolerance=0.0, rounds=k) for k in range(8)]
    assert all(one.upper >= one.lower - 1e-14 for one in seen)
    assert all(b.lower >= a.lower - 1e-14 for a, b in pairwise(seen))
    # Attained: the information that the given inputs carry.
    joint = found.inputs[:, None] * channel
    kept = joint[joint > 0] * np.log2((joint / (joint.sum(1, keepdims=True) * joint.sum(0)).clip(1e-300))[joint > 0])
    assert kept.sum() == pytest.approx(wanted, abs=1e-8)


def test_inputs_of_the_z_channel() -> None:
    assert capacity(np.array([[1, 0], [0.5, 0.5]])).inputs == pytest.approx([0.6, 0.4], abs=1e-5)


def trapdoor(actions: Any, observations: Any) -> list[float]:
    """A ball goes in, one of two comes out; the first inside is 0 (Blackwell)."""
    inside = sum(actions[:-1]) - sum(observations)
    return sure(inside) if actions[-1] == inside else [0.5, 0.5]


TRAPDOOR = (0.321928, 1.082726, 1.788830, 2.492832, 3.187342)


def test_the_trapdoor_channel_with_feedback() -> None:
    for n, wanted in enumerate(TRAPDOOR, 1):
        found = closed_loop_capacity(trapdoor, n, symbols=2, tolerance=2e-6 if n < 5 else 1.5e-5)
        assert found.lower == pytest.approx(wanted, abs=1e-5)
        assert wanted - 1e-6 <= found.upper <= wanted + 2e-5
    golden = math.log2((1 + math.sqrt(5)) / 2)
    assert TRAPDOOR[4] - TRAPDOOR[3] == pytest.approx(golden, abs=0.002)


def test_bounds_on_the_way() -> None:
    seen = [closed_loop_capacity(trapdoor, 3, symbols=2, tolerance=0.0, rounds=k) for k in range(8)]
    assert all(b.lower >= a.lower - 1e-14 for a, b in pairwise(seen))
    assert all(one.lower <= TRAPDOOR[2] + 1e-6 and one.upper >= TRAPDOOR[2] - 1e-6 for one in seen)
    # What is given back attains what is claimed for it.
    for one in seen:
        assert empowerment(joint_law(one.inputs, trapdoor, 3)) >= one.lower - 1e-12


def test_feedback_does_not_help_without_memory() -> None:
    found = closed_loop_capacity(lambda a, o: flip(a[-1], 0.1), 3, symbols=2)
    assert (found.lower, found.upper) == pytest.approx((3 * (1 - h(0.1)),) * 2, abs=1e-9)


def test_potential_plasticity_of_win_stay_lose_shift() -> None:
    """One bit for each action after the first, with arms that pay half of the time."""

    def agent(actions: Any, observations: Any) -> list[float]:
        return fair(actions, observations) if not actions else flip(actions[-1], 1.0 - observations[-1])

    found = closed_loop_capacity(agent, 4, source="O", symbols=2)
    assert (found.lower, found.upper) == pytest.approx((3, 3), abs=1e-9)
    assert plasticity(joint_law(agent, found.inputs, 4)) == pytest.approx(3, abs=1e-9)


@pytest.mark.parametrize(("order", "source"), [("AO", "A"), ("AO", "O"), ("OA", "A"), ("OA", "O")])
def test_nobody_beats_the_upper_bound(order: Any, source: Any) -> None:
    """Sources that are drawn, against a responder that is drawn; and the bounds meet, whoever comes first."""
    size = {"A": 2, "O": 3}
    responder = drawn_tables((2, 3), 3, order, seed=3, sharp=5)["O" if source == "A" else "A"]
    found = closed_loop_capacity(responder, 3, source=source, symbols=size[source], order=order, tolerance=1e-3)
    assert 0 <= found.upper - found.lower <= 1e-3
    for seed in range(5):
        other = drawn_tables((2, 3), 3, order, seed, sharp=5)[source]
        pair = (other, responder) if source == "A" else (responder, other)
        law = joint_law(*pair, 3, order)
        assert (empowerment if source == "A" else plasticity)(law) <= found.upper + 1e-12


def test_reach_on_grids() -> None:
    moves = grid(11, 11)
    for n, cells in ((1, 5), (2, 13), (3, 25), (5, 61)):
        assert reach(moves, n, [60])[0] == pytest.approx(math.log2(cells), abs=1e-12)  # the middle
    for n, cells in ((1, 3), (2, 6), (3, 10), (5, 21)):
        assert reach(grid(10, 10), n)[0] == pytest.approx(math.log2(cells), abs=1e-12)  # a corner
    assert reach(grid(1, 3, walls=[(0, 1)]), 4)[0] == 0
    # As a world with chance, of which there is none, and by a function.
    small = grid(3, 3)
    np.testing.assert_allclose(reach(np.eye(9)[small], 2), reach(small, 2), atol=1e-8)
    states, moves = explored(lambda cell, action: int(small[cell, action]), [4], 5, depth=3)
    assert states[0] == 4 and sorted(states) == list(range(9))
    assert reach(moves, 2, [0])[0] == pytest.approx(math.log2(9))


def test_rooms_with_a_light() -> None:
    """A light that obeys with probability c, else is drawn: a binary symmetric channel of noise (1 - c)/2."""

    def room(c: float) -> Any:
        return lambda light, action: {action: (1 + c) / 2, 1 - action: (1 - c) / 2}

    for c, wanted in ((0, 0), (0.25, 0.045566), (0.5, 0.188722), (0.75, 0.456436), (1, 1)):
        _, moves = explored(room(c), [0], 2, depth=2)
        assert reach(moves, 1, [0])[0] == pytest.approx(wanted, abs=1e-6)


def test_the_bellman_equation_of_plasticity() -> None:
    """No answers, sure or drawn, are worth more; those given back are worth what is said."""
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(4), (4, 2))
    p[0, 0] = [0, 1, 0, 0]
    discount = 0.8
    values, answers = plasticity_values(p, discount=discount)
    assert values.max() * (1 - discount) <= 1 + 1e-9

    def worth(pi: np.ndarray) -> np.ndarray:
        """Of answers `(S, A, S, A)`: V = r + γ P V, r = Σ p π log(π / q)."""
        joint = p[..., None] * pi
        q = joint.sum(2, keepdims=True)
        r = (joint * np.log2(np.where(joint > 0, pi, 1.0) / np.where(joint > 0, q, 1.0))).sum((2, 3))
        return np.linalg.solve(np.eye(8) - discount * joint.reshape(8, 8), r.reshape(8)).reshape(4, 2)

    np.testing.assert_allclose(worth(np.eye(2)[answers]), values, atol=1e-8)
    for _ in range(50):
        assert (worth(rng.dirichlet(np.full(2, 0.3), (4, 2, 4))) <= values + 1e-8).all()
        assert (worth(np.eye(2)[rng.integers(2, size=(4, 2, 4))]) <= values + 1e-8).all()


def test_the_reward_of_the_bellman_equation_is_our_plasticity() -> None:
    """One step, observation first: what the next state tells of the action after it."""
    p = np.array([[[0.3, 0.7], [0.5, 0.5]], [[0.9, 0.1], [0.5, 0.5]]])
    values, answers = plasticity_values(p, discount=0.0)
    law = joint_law(lambda a, o: sure(int(answers[0, 0, o[0]])), lambda a, o: p[0, 0].tolist(), 1, "OA")
    assert values[0, 0] == pytest.approx(plasticity(law), abs=1e-12) == pytest.approx(h(0.3))


def test_misuse(unchecked: None) -> None:
    for call, said in (
        (lambda: capacity(np.array([[0.5, 0.6]])), "must sum to 1"),
        (lambda: grid(2, 2, walls=[(2, 0)]), r"wall \(2, 0\) is outside"),
        (lambda: reach(np.array([[0, 7]]), 1), "lead to state 7, and there are 1"),
        (lambda: reach(np.full((2, 4, 2), 0.5), 11), "4,194,304 sequences"),
        (lambda: plasticity_values(np.full((2, 2, 2), 0.5), discount=1.0), "discount is 1.0"),
        (lambda: plasticity_values(np.full((30, 2, 30), 1 / 30)), "30 states may follow"),
        (lambda: closed_loop_capacity(trapdoor, 20, symbols=2), "would take about"),
        (lambda: closed_loop_capacity(trapdoor, 2, symbols=0), "0 symbols, expected at least 1"),
        (lambda: closed_loop_capacity(trapdoor, 2, symbols=2, source="X"), "source is 'X', expected A or O"),  # type: ignore[arg-type]
    ):
        with pytest.raises(UsageError, match=said):
            call()
