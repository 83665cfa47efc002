"""Estimates from many lives: bias, corrections, intervals, nulls, what is refused."""

import math
from typing import Any

import numpy as np
import pytest

from pliant.core import UsageError
from pliant.measure.information import Law, directed_information, empowerment, joint_law, plasticity
from pliant.measure.lifetimes import CORRECTIONS, Lifetimes, bias, estimate, prefixes, sampled
from tests.measure.systems import Literal, fair, flip, random_law, sure

COINS = joint_law(fair, fair, 4)
LOOP = joint_law(lambda a, o: flip(o[-1], 0.1) if a else fair(a, o), lambda a, o: flip(a[-1], 0.1), 3)


def test_bias_of_frequencies_and_what_takes_it_away() -> None:
    """Fair bits that tell nothing of each other, 50 seeds; the formula says 0.0559."""
    found: dict[str, list[float]] = {"none": [], "miller-madow": [], "jackknife": [], "grassberger": []}
    for seed in range(50):
        lives = sampled(COINS, 2000, seed)
        for correction, values in found.items():
            flow = lives.flow(correction)  # type: ignore[arg-type]
            values.append(directed_information(flow, ("A", (1, 4)), ("O", (1, 4))))
    assert bias(4, 2000) == pytest.approx(0.0559, abs=5e-5) and bias(8, 2**21) == pytest.approx(0.0149, abs=5e-5)
    assert 0.050 <= np.mean(found["none"]) <= 0.062
    for correction in ("miller-madow", "jackknife", "grassberger"):
        assert abs(np.mean(found[correction])) <= 0.008


def test_the_plain_flow_is_that_of_the_frequencies() -> None:
    """As the exact flow of a law whose probabilities are the frequencies."""
    for order in ("AO", "OA"):
        lives = sampled(random_law((2, 3), 3, order, seed=2), 500, seed=1)
        frequencies = np.zeros((2, 3) * 3 if order == "AO" else (3, 2) * 3)
        for a, o in zip(lives.actions, lives.observations, strict=True):
            pair = (a, o) if order == "AO" else (o, a)
            frequencies[tuple(np.stack(pair, 1).reshape(-1))] += 1 / 500
        law = Law(frequencies, order)  # type: ignore[arg-type]
        np.testing.assert_allclose(lives.flow("none").matrix, law.flow.matrix, atol=1e-12)
        windows: dict[str, Any] = {"act_window": (2, 3), "obs_window": (1, 2)}
        found = estimate(lives, **windows, correction="none", permutations=0)
        assert found.plasticity.bits == pytest.approx(plasticity(law, **windows), abs=1e-12)
        assert found.empowerment.bits == pytest.approx(empowerment(law, **windows), abs=1e-12)
        literal = estimate(lives, **windows, correction="none", permutations=0, mode="literal")
        assert literal.plasticity.plain == pytest.approx(plasticity(law, **windows, mode="literal"), abs=1e-12)


def test_corrected_windows_are_sums_of_the_corrected_flow() -> None:
    lives = sampled(LOOP, 400, seed=3)
    for correction in ("miller-madow", "jackknife", "grassberger", "chao-shen"):
        flow = lives.flow(correction)  # type: ignore[arg-type]
        found = estimate(lives, act_window=(1, 2), correction=correction, permutations=0)  # type: ignore[arg-type]
        assert found.empowerment.bits == pytest.approx(empowerment(flow, act_window=(1, 2)), abs=1e-12)


def test_the_jackknife_leaves_out_one_life_at_a_time() -> None:
    lives = sampled(LOOP, 30, seed=0)
    plain = empowerment(lives.flow("none"))
    rest = [
        empowerment(Lifetimes(np.delete(lives.actions, k, 0), np.delete(lives.observations, k, 0)).flow("none"))
        for k in range(30)
    ]
    assert empowerment(lives.flow("jackknife")) == pytest.approx(30 * plain - 29 * np.mean(rest), abs=1e-10)


def test_grassberger_by_its_recursion() -> None:
    """G_1 = -γ - log 2, G_2 = 2 + G_1, G_2n+1 = G_2n, G_2n+2 = G_2n + 2 / (2n + 1)."""
    g = [-np.euler_gamma - math.log(2)]
    for n in range(2, 12):
        g.append(g[-1] if n % 2 else g[-1] + 2 / (n - 1))
    counts = np.arange(1, 12)
    wanted = math.log(66) - float((counts * np.array(g)).sum()) / 66
    assert CORRECTIONS["grassberger"](counts, 66) == pytest.approx(wanted, abs=1e-12)


def test_transfer_entropy_of_one_lag() -> None:
    """Of triples from a delayed binary symmetric channel; the figure is what infomeasure and pyinform give."""
    rng = np.random.default_rng(0)
    x = rng.integers(0, 2, 20_000)
    y = np.zeros_like(x)
    y[1:] = x[:-1] ^ (rng.random(20_000) < 0.1)[1:]
    pairs = [np.stack([z[:-1], z[1:]], 1) for z in (x, y)]
    lives = Lifetimes(*pairs)
    one: Any = (("A", (1, 1)), ("O", (2, 2)))
    assert directed_information(lives.flow("none"), *one) == pytest.approx(0.530202234537, abs=1e-9)
    back: Any = (("O", (1, 1)), ("A", (2, 2)))
    assert directed_information(lives.flow("none"), *back) == pytest.approx(6.0e-6, abs=1e-6)


def test_intervals_hold_the_truth() -> None:
    """Of 60 trials, with the variance of ratios and that of draws; more of it is in docs/plasticity.md."""
    truth = (empowerment(LOOP), plasticity(LOOP))
    held = {0: [0, 0], 10: [0, 0]}
    for seed in range(60):
        lives = sampled(LOOP, 640, seed)
        for draws, counts in held.items():
            found = estimate(lives, bootstrap=draws, permutations=0)
            for k in (0, 1):
                counts[k] += found[k].low <= truth[k] <= found[k].high
    assert all(52 <= count <= 60 for count in held[0])
    assert all(count >= 46 for count in held[10])


def test_intervals_where_nothing_flows() -> None:
    held = 0
    for seed in range(60):
        found = estimate(sampled(COINS, 4000, seed), act_window=(1, 3), obs_window=(1, 3), permutations=0)
        held += found.plasticity.low <= 1e-9
        assert found.enough
    assert held >= 53


def test_the_null_tells_flow_from_chance() -> None:
    found = estimate(sampled(LOOP, 300, seed=0), permutations=50)
    assert found.empowerment.p == pytest.approx(1 / 51) and found.plasticity.p == pytest.approx(1 / 51)
    coins = [estimate(sampled(COINS, 300, seed), obs_window=(1, 2), permutations=20) for seed in range(10)]
    shares = [one.plasticity.p for one in coins]
    assert 0.2 < np.mean(shares) < 0.8
    # What the plain estimate is too high by, since nothing flows.
    assert np.mean([one.plasticity.null - one.plasticity.plain for one in coins]) == pytest.approx(0, abs=0.01)


def test_the_verdict_asks_for_more() -> None:
    few = estimate(sampled(COINS, 300, seed=0), permutations=0)
    assert not few.enough and few.verdict.startswith("not enough lifetimes: need about ") and few.needed >= 2560
    assert estimate(sampled(COINS, few.needed, seed=1), permutations=0).verdict == "enough lifetimes"
    # A short window asks for less.
    assert estimate(sampled(COINS, 300, seed=0), act_window=(1, 1), obs_window=(1, 1), permutations=0).enough


def test_sure_flow_has_an_interval_of_hardly_any_width() -> None:
    echo = joint_law(lambda a, o: sure(o[-1]), fair, 2, "OA")
    lives = sampled(echo, 4000, seed=0)
    found = estimate(lives, permutations=0)
    assert found.empowerment[:2] == pytest.approx((0, 0), abs=1e-9) and found.empowerment.high < 1e-3
    assert found.plasticity.bits == pytest.approx(2, abs=1e-2)
    assert Literal(echo).information(((1, 2), ()), ((), (1, 2)), ((), ())) == pytest.approx(2)


def test_no_interval_goes_beyond_the_bound() -> None:
    echo = joint_law(lambda a, o: sure(o[-1]), fair, 2, "OA")
    for lives in (20, 400):
        found = estimate(sampled(echo, lives, seed=0), permutations=0)
        assert found.plasticity.high <= found.bound == 2


def test_rare_lives_that_say_much_are_too_few() -> None:
    """One action in fifty copies what is seen, all others are drawn: the flow rests on those lives, not on all."""
    law = joint_law(lambda a, o: [0.02, 0.0, 0.98] if o[-1] == 0 else [0.0, 0.02, 0.98], fair, 1, "OA")
    few, many = (estimate(sampled(law, lives, seed=0), permutations=0) for lives in (700, 7000))
    assert not few.enough and few.lives < few.needed < 10 * few.lives and many.enough
    assert many.plasticity.low <= plasticity(law) <= many.plasticity.high


def test_many_prefixes_are_sorted_rather_than_tabled(monkeypatch: pytest.MonkeyPatch) -> None:
    lives = sampled(LOOP, 200, seed=0)
    wanted = lives.flow("jackknife").matrix
    monkeypatch.setattr("pliant.measure.lifetimes.DENSE", 0)
    again = Lifetimes(lives.actions, lives.observations, lives.order, lives.sizes)
    assert again._counts.joint(3, 3)[1] <= 4 * 64
    np.testing.assert_allclose(again.flow("jackknife").matrix, wanted, atol=1e-12)


def test_prefixes_are_the_same_where_rows_begin_alike() -> None:
    rows = np.array([[0, 2, 1], [0, 2, 0], [1, 2, 0]])
    whole, one, two, three = prefixes(rows)
    assert (whole == 0).all() and one.tolist() == [0, 0, 1] and two.tolist() == [0, 0, 1] and three[0] != three[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((np.zeros((3, 2), int), np.zeros((3, 3), int)), "expected two arrays of the same shape"),
        ((np.zeros((1, 2), int), np.ones((1, 2), int)), "at least two lives"),
        ((np.zeros((3, 2), int), np.ones((3, 2), int)), "an alphabet of 1 of actions"),
        ((np.ones((3, 2), int), -np.ones((3, 2), int)), "an alphabet of 0 of observations"),
        ((np.ones((3, 2), int), np.full((3, 2), 5), "AO", (2, 3)), "observations hold 5, expected symbols from 0 to 2"),
        ((np.ones((3, 2), int), np.ones((3, 2), int), "OO"), "expected AO"),
    ],
)
def test_lives_that_are_none(arguments: Any, said: str, unchecked: None) -> None:
    with pytest.raises(UsageError, match=said):
        Lifetimes(*arguments)


def test_misuse(unchecked: None) -> None:
    lives = sampled(LOOP, 10, seed=0)
    with pytest.raises(UsageError, match="expected one of none, miller-madow"):
        estimate(lives, correction="all")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"window \(2, 5\) is not within"):
        estimate(lives, act_window=(2, 5))
    with pytest.raises(UsageError, match="expected causal or literal"):
        estimate(lives, mode="both")  # type: ignore[arg-type]
    assert math.isnan(estimate(lives, permutations=0).plasticity.p)


RARE = (
    joint_law(lambda a, o: [0.995, 0.005], lambda a, o: [0.995, 0.005], 2),
    joint_law(lambda a, o: [0.995, 0.005], lambda a, o: [0.9, 0.1] if a[-1] == 0 else [0.1, 0.9], 2),
    joint_law(lambda a, o: [0.99, 0.01], lambda a, o: sure(a[-1]), 1),
)


@pytest.mark.parametrize("law", RARE)
@pytest.mark.parametrize("lives", [100, 1000])
def test_where_a_symbol_is_rare_an_interval_that_is_enough_holds_the_truth(law: Any, lives: int) -> None:
    truth, held, enough = (empowerment(law), plasticity(law)), [0, 0], 0
    for seed in range(100):
        found = estimate(sampled(law, lives, seed), permutations=0)
        enough += found.enough
        for i, one in enumerate(found[:2]):
            held[i] += found.enough and one.low - 1e-9 <= truth[i] <= one.high + 1e-9
    assert min(held) >= 0.88 * enough - 1  # 0.92 less two deviations, and it may be enough by chance


def test_numbers_of_an_estimate_are_checked() -> None:
    lives = sampled(COINS, 100, seed=0)
    wrong: tuple[dict[str, Any], ...] = (
        {"confidence": 1.0},
        {"confidence": 0.0},
        {"bootstrap": 1},
        {"permutations": -1},
    )
    for options in wrong:
        with pytest.raises(UsageError, match="expected a share between 0 and 1"):
            estimate(lives, **options)  # type: ignore[arg-type]


def test_what_deals_reach_as_well_may_be_nothing() -> None:
    coins = joint_law(lambda a, o: flip(0, 0.02), lambda a, o: flip(0, 0.1), 2)
    few = [estimate(sampled(coins, 480, seed), permutations=39) for seed in range(60)]
    alone = [estimate(sampled(coins, 480, seed), permutations=0) for seed in range(60)]
    for found in few:
        for one in found[:2]:
            assert one.low == 0 or one.p <= 0.05
    held, before = (sum(found.empowerment.low == 0 for found in several) for several in (few, alone))
    assert held >= 53 and held > before
