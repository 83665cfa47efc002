"""Plasticity and empowerment of exact laws: the identities of the paper, its examples, what is refused."""

import math
from itertools import combinations_with_replacement
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pliant.core import UsageError
from pliant.measure.flow import Flow
from pliant.measure.information import (
    Law,
    Machine,
    Tension,
    bound,
    conditional_information,
    directed_information,
    empowerment,
    flow_matrix,
    joint_law,
    plasticity,
    tension,
    uniform,
)
from pliant.recipes.plasticity import EXAMPLES, bandit, q_learner
from tests.measure.systems import Literal, drawn, drawn_tables, fair, flip, random_law, sure

SYSTEMS = [((2, 2), 4, "AO"), ((2, 3), 3, "AO"), ((3, 2), 3, "AO"), ((2, 2), 4, "OA"), ((2, 3), 3, "OA"),
           ((3, 2), 3, "OA")]  # fmt: skip
"""Alphabets, indices, order."""


def windows(n: int) -> list[tuple[int, int]]:
    return list(combinations_with_replacement(range(1, n + 1), 2))


@pytest.mark.parametrize(("sizes", "n", "order"), SYSTEMS)
def test_every_window_is_a_sum_of_the_flow_matrix(sizes: tuple[int, int], n: int, order: Any) -> None:
    law = random_law(sizes, n, order, seed=sum(sizes) + n)
    literal = Literal(law)
    for a, b in windows(n):
        for c, d in windows(n):
            for source, sink in (("A", "O"), ("O", "A")):
                for delayed in (False, True):
                    found = directed_information(law, (source, (a, b)), (sink, (c, d)), delayed)  # type: ignore[arg-type]
                    assert abs(found - literal.directed(source, a, b, c, d, delayed)) < 1e-12
            rectangle = literal.information(
                (tuple(range(a, b + 1)), ()), ((), tuple(range(c, d + 1))), (tuple(range(1, a)), tuple(range(1, c)))
            )
            assert abs(conditional_information(law, act_window=(a, b), obs_window=(c, d)) - rectangle) < 1e-12


pairs = st.tuples(st.sampled_from([(2, 2), (2, 3), (3, 2)]), st.integers(1, 3), st.sampled_from(["AO", "OA"]),
                  st.integers(0, 10_000), st.sampled_from([1.0, 10.0]))  # fmt: skip
"""Alphabets, indices, order, seed, sharpness of a system."""


@given(pairs)
def test_conservation(pair: Any) -> None:
    """Theorem 3.5 for every window; with a plain second term it misses by what is on the diagonal."""
    law = random_law(*pair)
    matrix = flow_matrix(law)
    for a, b in windows(law.n):
        for c, d in windows(law.n):
            actions, observations = ("A", (a, b)), ("O", (c, d))
            whole = conditional_information(law, act_window=(a, b), obs_window=(c, d))
            there = directed_information(law, actions, observations)  # type: ignore[arg-type]
            back = directed_information(law, observations, actions, delayed=True)  # type: ignore[arg-type]
            plain = directed_information(law, observations, actions)  # type: ignore[arg-type]
            diagonal = sum(matrix[i - 1, i - 1] for i in range(max(a, c), min(b, d) + 1))
            assert abs(whole - there - back) < 1e-12
            assert abs(there + plain - whole - diagonal) < 1e-12


@given(pairs)
def test_additive_in_source_and_sink(pair: Any) -> None:
    law = random_law(*pair)
    n = law.n
    for a, b in windows(n):
        for k in range(a, b):
            for window in windows(n):
                for one, two in (("A", "O"), ("O", "A")):
                    for parts in (
                        [((one, w), (two, window)) for w in ((a, b), (a, k), (k + 1, b))],
                        [((one, window), (two, w)) for w in ((a, b), (a, k), (k + 1, b))],
                    ):
                        whole, first, second = (directed_information(law, *part) for part in parts)  # type: ignore[arg-type]
                        assert abs(whole - first - second) < 1e-12


@given(pairs)
def test_the_sum_is_bounded_and_a_conditional_information(pair: Any) -> None:
    """Theorem 4.8; with the literal sums it does not hold, see below."""
    law = random_law(*pair)
    for act in windows(law.n):
        for obs in windows(law.n):
            found = tension(law, act_window=act, obs_window=obs)
            assert found.room >= -1e-9
            whole = conditional_information(law, act_window=act, obs_window=obs)
            assert abs(found.empowerment + found.plasticity - whole) < 1e-12
            if act[0] > obs[1]:
                assert directed_information(law, ("A", act), ("O", obs)) == 0


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_the_bound_on_many_pairs(count: int) -> None:
    """Any probabilities of streams are the law of some pair."""
    for seed in range(count):
        (a, o), order = ((2, 2), (2, 3), (3, 2))[seed % 3], ("AO", "OA")[seed % 2]
        shape = (a, o) * 3 if order == "AO" else (o, a) * 3
        p = np.random.default_rng(seed).dirichlet(np.full((a * o) ** 3, (1.0, 0.1, 0.01)[seed % 3])).reshape(shape)
        law = Law(p, order)
        assert law.flow.matrix.min() >= 0 and law.flow.matrix.shape == (3, 3)
        found = tension(law, act_window=(1 + seed % 2, 3), obs_window=(1, 2 + seed % 2))
        assert found.empowerment + found.plasticity <= found.bound + 1e-9


def test_massey() -> None:
    """The whole windows are directed information of Massey 1990, here from causally conditioned entropies."""
    law = random_law((2, 3), 4, "AO", seed=5)
    p = law.probabilities
    total = 0.0
    for i in range(4):
        joint = p.sum(tuple(range(2 * i + 2, 8)))  # (A_1, O_1, ..., A_i+1, O_i+1)
        alone = joint.sum(tuple(range(0, 2 * i + 2, 2)))
        causal = (joint * np.log2(joint / joint.sum(-1, keepdims=True))).sum()
        total += causal - (alone * np.log2(alone / alone.sum(-1, keepdims=True))).sum()
    assert abs(directed_information(law, ("A", (1, 4)), ("O", (1, 4))) - total) < 1e-12


@pytest.mark.parametrize("name", EXAMPLES)
def test_closed_forms(name: str) -> None:
    one = EXAMPLES[name]
    law = joint_law(one.agent, one.environment, one.n, one.order)
    found = tension(law)
    assert (found.empowerment, found.plasticity) == pytest.approx((one.empowerment, one.plasticity), abs=1e-9)
    for value, wanted in zip(tension(law, mode="literal"), one.naive, strict=False):
        assert wanted is None or value == pytest.approx(wanted, abs=1e-9)


def test_figures_of_the_formulas() -> None:
    loop = EXAMPLES["loop"]
    assert (loop.empowerment, loop.plasticity) == pytest.approx((1.3753302149667133, 0.8443258085559946), abs=1e-12)
    assert EXAMPLES["noisy echo"].plasticity == pytest.approx(2.6550220320535938, abs=1e-12)
    differ = EXAMPLES["win-stay, arms differ"]
    assert differ.empowerment == pytest.approx(0.7638195097281573, abs=1e-12)
    assert differ.plasticity == pytest.approx(2.8877123795494493, abs=1e-12)


def test_windows_of_examples() -> None:
    agent, environment, n, order, *_ = EXAMPLES["copy, two indices late"]
    law = joint_law(agent, environment, n, order)
    for source, sink, wanted in (((1, 2), (3, 4), 2), ((3, 4), (3, 4), 0), ((1, 5), (3, 3), 1), ((4, 5), (1, 3), 0)):
        assert directed_information(law, ("O", source), ("A", sink)) == pytest.approx(wanted, abs=1e-12)
    agent, environment, n, order, *_ = EXAMPLES["common cause"]
    law = joint_law(agent, environment, n, order)
    assert directed_information(law, ("A", (2, 3)), ("O", (2, 3))) == 0
    assert Literal(law).information(((2, 3), ()), ((), (2, 3)), ((), ())) == pytest.approx(1)
    np.testing.assert_allclose(flow_matrix(law), np.diag([1.0, 0.0, 0.0]), atol=1e-12)
    agent, environment, n, order, *_ = EXAMPLES["exclusive or"]
    np.testing.assert_allclose(flow_matrix(joint_law(agent, environment, n, order)), np.eye(4), atol=1e-12)


@pytest.mark.parametrize(("sizes", "n", "order"), SYSTEMS)
def test_the_mirror(sizes: tuple[int, int], n: int, order: Any) -> None:
    """Proposition 4.6: agent and environment change places, and so do plasticity and empowerment."""
    law = random_law(sizes, n, order, seed=n)
    mirror = Law(law.probabilities, "OA" if order == "AO" else "AO")
    for a, c in ((1, 1), (1, 2), (2, 1)):
        there = tension(law, act_window=(a, n), obs_window=(c, n - 1))
        back = tension(mirror, act_window=(c, n - 1), obs_window=(a, n))
        assert there == pytest.approx((back.plasticity, back.empowerment, back.bound), abs=1e-13)


@pytest.mark.parametrize("order", ["AO", "OA"])
def test_the_mirror_of_players(order: Any) -> None:
    """The same, with a law that is made anew: each plays the other's part, and hears what the other heard."""
    agent, environment = drawn(2, 1), drawn(3, 2)
    law = joint_law(agent, environment, 3, order)
    swapped = "OA" if order == "AO" else "AO"
    mirror = joint_law(lambda a, o: environment(o, a), lambda a, o: agent(o, a), 3, swapped)
    for act, obs in (((1, 3), (1, 3)), ((2, 3), (1, 2))):
        there = tension(law, act_window=act, obs_window=obs)
        back = tension(mirror, act_window=obs, obs_window=act)
        assert there == pytest.approx((back.plasticity, back.empowerment, back.bound), abs=1e-12)
        assert there.empowerment + there.plasticity > 0.01


def test_the_bound_is_attained_and_broken_by_literal_sums() -> None:
    for name in ("echo", "exclusive or"):
        agent, environment, n, order, *_ = EXAMPLES[name]
        assert tension(joint_law(agent, environment, n, order)).room == pytest.approx(0, abs=1e-9)
    naive = tension(joint_law(fair, lambda a, o: sure(a[-1]), 5), mode="literal")
    assert naive.empowerment + naive.plasticity == pytest.approx(2 * naive.bound)


def test_the_bound_pairs_alphabets_with_their_own_windows() -> None:
    law = joint_law(fair, lambda a, o: sure(0 if len(a) < 2 else 2 * a[0] + a[1], 4), 2)
    windows = {"act_window": (1, 2), "obs_window": (2, 2)}
    assert empowerment(law, **windows) == pytest.approx(2)  # type: ignore[arg-type]
    assert bound(law, **windows) == 2  # type: ignore[arg-type]


@pytest.mark.parametrize("order", ["AO", "OA"])
def test_who_has_none(order: Any) -> None:
    """A deterministic world teaches nobody, a deterministic agent moves nothing, an agent that listens to nothing
    has no plasticity."""

    def settled(tables: list[np.ndarray]) -> list[np.ndarray]:
        return [np.eye(3)[table.argmax(-1)] for table in tables]

    def deaf(tables: list[np.ndarray], own: bool) -> list[np.ndarray]:
        """As if all observations, and unless `own` all actions, had been the first."""
        heard = [name == "A" and own for name in order * 3]
        return [table[tuple(slice(None) if hears else slice(1) for hears in heard[: table.ndim - 1])]
                for table in tables]  # fmt: skip

    for seed in range(20):
        agent, environment = drawn_tables((3, 3), 3, order, seed).values()
        assert plasticity(joint_law(agent, settled(environment), 3, order)) == pytest.approx(0, abs=1e-12)
        assert empowerment(joint_law(settled(agent), environment, 3, order)) == pytest.approx(0, abs=1e-12)
        for listless in (lambda a, o: [0.2, 0.5, 0.3], deaf(agent, own=True), deaf(agent, own=False)):
            assert plasticity(joint_law(listless, environment, 3, order)) == pytest.approx(0, abs=1e-12)
        assert plasticity(joint_law(agent, environment, 3, order)) > 0.1


GREEDY = {
    0.0: (0.576974, 0.785528, 0.254167), 0.1: (0.398240, 0.678674, 0.318430), 0.25: (0.275079, 0.644937, 0.396980),
    0.5: (0.129705, 0.606071, 0.488796), 0.75: (0.034561, 0.571317, 0.539938), 1.0: (0, 0.556144, 0.556144),
}  # fmt: skip
"""By ε: plasticity, literally, empowerment of A_2:5 on O_1:3."""


def test_exploration_and_plasticity_of_a_learner() -> None:
    found = {}
    for epsilon, wanted in GREEDY.items():
        law = joint_law(q_learner(epsilon), bandit(0.2, 0.8), 5)
        three = {"obs_window": (1, 3), "act_window": (2, 5)}
        found[epsilon] = plasticity(law, **three)  # type: ignore[arg-type]
        ours = found[epsilon], plasticity(law, **three, mode="literal"), empowerment(law, **three)  # type: ignore[arg-type]
        assert ours == pytest.approx(wanted, abs=1e-6)
        assert bound(law, **three) == 3  # type: ignore[arg-type]
    assert list(found.values()) == sorted(found.values(), reverse=True) and found[1] == pytest.approx(0, abs=1e-12)


def test_functions_tables_and_machines_agree() -> None:
    """The noisy echo one index late, as each of the three."""
    say = np.array([[0.9, 0.1], [0.1, 0.9]])
    move = np.zeros((2, 2, 2))
    move[:, 0, 0] = move[:, 1, 1] = 1
    for order in ("AO", "OA"):
        function = lambda a, o: flip(o[-1] if o else 0, 0.1)  # noqa: E731
        machine = Machine(np.array([1.0, 0.0]), say, np.eye(2)[:, None], move)
        tables = []
        for t in range(4):
            heard = t if order == "AO" else t + 1
            axes = [1] * (t + heard)
            if not heard:
                tables.append(say[0])
            else:  # the last turn of the environment was the last of all
                tables.append(say.reshape(*axes[1:], 2, 2))
        laws = [joint_law(agent, drawn(2, 7), 4, order) for agent in (function, machine, tables)]  # type: ignore[arg-type]
        for law in laws[1:]:
            np.testing.assert_allclose(law.probabilities, laws[0].probabilities, atol=1e-15)


def test_a_machine_with_hidden_states_is_a_mixture() -> None:
    """One of two biased coins, drawn once: states that are never told apart by a symbol alone."""
    coins = np.array([[0.9, 0.1], [0.2, 0.8]])
    machine = Machine(np.array([0.3, 0.7]), coins, np.eye(2)[:, None], np.eye(2)[:, None])
    law = joint_law(uniform(2), machine, 3)
    heads = law.probabilities.sum((0, 2, 4))
    wanted = sum(w * np.einsum("i,j,k", c, c, c) for w, c in zip((0.3, 0.7), coins, strict=True))
    np.testing.assert_allclose(heads, wanted, atol=1e-15)


def test_impossible_histories_are_not_asked_about() -> None:
    def agent(actions: Any, observations: Any) -> list[float]:
        assert 0 not in observations
        return [0.0, 1.0]

    law = joint_law(agent, lambda a, o: [0.0, 1.0], 3)
    assert law.probabilities.sum() == 1 and tension(law).empowerment == 0


def test_a_flow_answers_like_its_law() -> None:
    law = random_law((2, 3), 3, "OA", seed=1)
    flow = Flow(flow_matrix(law), "OA", (2, 3))
    assert tension(flow, act_window=(1, 2)) == pytest.approx(tension(law, act_window=(1, 2)))
    assert isinstance(tension(flow), Tension)


@pytest.mark.parametrize(
    ("agent", "environment", "said"),
    [
        (lambda a, o: [0.5, 0.6], fair, r"the agent gave \[0.5, 0.6\] after actions \(\).*must sum to 1.*1.1"),
        (lambda a, o: [0.5, 0.5] if len(a) < 2 else [1.5, -0.5], fair, r"after actions \(0, 0\).*negative.*-0.5"),
        (fair, lambda a, o: [math.nan, 1.0], "the environment gave.*finite"),
        (fair, lambda a, o: [1.0], "1 of observations: an alphabet needs two"),
        (fair, lambda a, o: [0.5, 0.5] if len(a) < 2 else [0.2, 0.3, 0.5], "gave 2 probabilities at first and 3"),
        (fair, lambda a, o: [0.5, 0.5] if a[-1] else [0.2, 0.3, 0.5], r"gave 2 probabilities after actions \(1,\)"),
        (fair, 7, "the environment is int, expected a function"),
        ([np.array([0.5, 0.5])], fair, "has arrays for 1 turns"),
        ([np.array([0.5, 0.5])] * 3, fair, "expected 2 axes for the turns before"),
        ([np.array([0.5, 0.5]), np.full((3, 2, 2), 0.5)], fair, "axis 0 should be 2 or 1"),
        (Machine(np.ones(1), np.full((1, 2), 0.5), np.ones((1, 1, 1)), np.ones((1, 2, 1))),
         lambda a, o: [0.2, 0.3, 0.5], "hears 2 symbols"),
    ],
)  # fmt: skip
def test_players_that_are_none(agent: Any, environment: Any, said: str, unchecked: None) -> None:
    with pytest.raises(UsageError, match=said):
        joint_law(agent, environment, 3)


@pytest.mark.parametrize("window", [(0, 2), (2, 4), (3, 2), (-1, 1)])
def test_windows_outside_or_reversed(window: tuple[int, int]) -> None:
    law = random_law((2, 2), 3, "AO", seed=0)
    with pytest.raises(UsageError, match=r"is not within the stream: expected 1 <= first <= last <= 3"):
        plasticity(law, obs_window=window)
    with pytest.raises(UsageError, match="is not within the stream"):
        directed_information(law, ("A", (1, 2)), ("O", window))


def test_a_law_that_would_not_fit_is_refused_before_it_is_made() -> None:
    asked = []

    def agent(actions: Any, observations: Any) -> list[float]:
        asked.append(len(actions))
        return [0.5, 0.5]

    with pytest.raises(UsageError, match=r"over n=40 indices would take about .* GB.*take n up to 10, or estimate"):
        joint_law(agent, fair, 40, memory=1e8)
    assert set(asked) == {0}
    with pytest.raises(UsageError, match="would take"):
        joint_law(agent, fair, 10**9)


def test_other_misuse(unchecked: None) -> None:
    law = random_law((2, 2), 2, "AO", seed=0)
    for call, said in (
        (lambda: directed_information(law, ("A", (1, 1)), ("A", (1, 1))), "expected A and O"),
        (lambda: plasticity(law, mode="naive"), "expected causal or literal"),  # type: ignore[arg-type]
        (lambda: joint_law(fair, fair, 0), "n is 0"),
        (lambda: joint_law(fair, fair, 2, memory=0), "and memory 0, expected"),
        (lambda: uniform(0), "0 symbols, expected at least 1"),
        (lambda: joint_law(fair, fair, 2, "OAO"), "expected AO"),  # type: ignore[arg-type]
        (lambda: Law(np.full((2, 3, 2), 1 / 12)), "has no axis for each turn"),
        (lambda: Law(np.full((2, 2), 0.3)), "must sum to 1"),
        (lambda: Law(np.full((1, 2), 0.5)), "1 of actions"),
        (lambda: Machine(np.ones(1), np.full((1, 2), 0.5), np.ones((1, 1, 1)), np.full((1, 2, 2), 0.5)), "do not fit"),
        (lambda: Machine(np.ones(1), np.full((1, 2), 0.7), np.ones((1, 1, 1)), np.ones((1, 2, 1))), "emit holds"),
    ):
        with pytest.raises(UsageError, match=said):
            call()


@pytest.mark.parametrize("order", ["AO", "OA"])
def test_nothing_flows_back_in_time_not_even_a_rounding(order: Any) -> None:
    for seed in range(20):
        law = random_law((2, 3), 3, order, seed)
        assert empowerment(law, act_window=(3, 3), obs_window=(1, 2)) == 0
        assert plasticity(law, obs_window=(3, 3), act_window=(1, 2)) == 0
