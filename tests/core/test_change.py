"""The detector of changes: how often it is wrong, and how soon it is right."""

import math

import numpy as np
import pytest

from pliant.core.change import LIMIT, Cusum, Foreign

SETTLED = 2000


def settled(random: np.random.Generator, **options: float) -> Cusum:
    """A detector that knows a standard normal regime exactly, without the memory of its sum."""
    detector = Cusum(settle=SETTLED, **options)  # type: ignore[arg-type]
    for value in random.permutation(np.tile([1.0, -1.0], SETTLED // 2)):
        assert not detector.update(value)
    assert (detector.mean, detector.spread / detector.count) == (pytest.approx(0, abs=1e-12), pytest.approx(1))
    return detector


def alarm(values: np.ndarray, random: np.random.Generator) -> int:
    """Values up to the first alarm of a detector whose regime is known from so many that new ones hardly move it."""
    detector = settled(random, threshold=5.0)
    # As if the regime had been watched for ever.
    detector.count, detector.spread = 10**9, 1e9
    return next(i for i, value in enumerate(values, 1) if detector.update(value))


def runs(level: float, count: int, longest: int, seed: int, limit: float = math.inf) -> np.ndarray:
    """Lengths of so many runs at a level, in deviations, by the recursion itself."""
    random = np.random.default_rng(seed)
    total, length, alive = np.zeros(count), np.zeros(count), np.ones(count, bool)
    for _ in range(longest):
        step = np.clip(random.normal(level, 1, int(alive.sum())), -limit, limit)
        total[alive] = np.maximum(0, total[alive] + step - 0.5)
        length[alive] += 1
        alive &= total <= 5
        if not alive.any():
            break
    assert not alive.any()
    return length


def test_in_control_and_out_of_control_run_lengths_are_those_of_the_literature() -> None:
    # Of the recursion, over so many runs that the mean is known to 2 % and 1 %.
    assert runs(0, 4000, 20_000, seed=1).mean() == pytest.approx(930, rel=0.1)
    assert runs(1, 4000, 500, seed=2).mean() == pytest.approx(10.3, abs=0.5)


def test_the_detector_is_that_recursion() -> None:
    random = np.random.default_rng(3)
    for level in (0.0, 0.5, 1.0):
        values = random.normal(level, 1, 30_000)
        total, expected = 0.0, 0
        while total <= 5:
            total = max(0.0, total + min(max(values[expected], -LIMIT), LIMIT) - 0.5)
            expected += 1
        assert alarm(values, random) == expected


def test_the_detector_itself_keeps_those_run_lengths() -> None:
    random = np.random.default_rng(4)
    detector = settled(random, threshold=5.0)
    state = detector.state_dict() | {"count": 10**9, "spread": 1e9}
    for level, count, within in ((0.0, 100, 0.3), (1.0, 500, 0.05)):
        lengths = []
        for _ in range(count):
            detector.load_state_dict(dict(state))
            length = 1
            while not detector.update(random.normal(level, 1)):
                length += 1
            lengths.append(length)
        assert np.mean(lengths) == pytest.approx(runs(level, 2000, 30_000, 8, LIMIT).mean(), rel=within)


def noise(kind: str, size: int, seed: int) -> np.ndarray:
    """Stationary values `(size,)` of mean 0 and deviation 1."""
    random = np.random.default_rng(seed)
    if kind == "heavy tails":
        return random.standard_t(3, size) / math.sqrt(3)
    values = random.normal(0, 1, size)
    if kind == "autocorrelated":
        for i in range(1, size):
            values[i] = 0.3 * values[i - 1] + math.sqrt(1 - 0.3**2) * values[i]
    return values


@pytest.mark.parametrize(("kind", "most"), [("normal", 2), ("heavy tails", 2), ("autocorrelated", 20)])
def test_false_alarms_are_rare_while_nothing_changes(kind: str, most: int) -> None:
    # 4 times 10,000 values: at most one in 20,000, among dependent values one in 2,000.
    found = 0
    for seed in range(4):
        detector = Cusum()
        found += sum(detector.update(value) for value in noise(kind, 10_000, seed))
    assert found <= most


def test_regimes_of_few_values_give_hardly_more() -> None:
    false = 0
    for seed in range(200):
        detector = Cusum()
        false += any(detector.update(value) for value in noise("normal", 200, seed))
    assert false <= 3


@pytest.mark.parametrize(("jump", "within", "share"), [(2.0, 20, 0.98), (1.0, 60, 0.75)])
def test_a_jump_is_found_soon(jump: float, within: int, share: float) -> None:
    found = 0
    for seed in range(100):
        detector, values = Cusum(), noise("normal", 100 + within, seed)
        values[100:] += jump
        alarms = [i for i, value in enumerate(values) if detector.update(value)]
        found += bool(alarms) and alarms[0] >= 100
    assert found >= 100 * share


def test_one_outlier_is_no_rise() -> None:
    detector, values = Cusum(), noise("normal", 300, 0)
    values[[100, 200]] = 1e6
    assert not any(detector.update(value) for value in values)


def test_after_an_alarm_a_regime_is_learned_anew() -> None:
    random = np.random.default_rng(5)
    detector, found = Cusum(threshold=8.0, settle=200), []
    for i, value in enumerate(np.concatenate([random.normal(level, 1, 400) for level in (0, 4, 8)])):
        if detector.update(value):
            found.append(i)
            assert detector.state_dict() == {"count": 0, "mean": 0.0, "spread": 0.0, "total": 0.0, "first": []}
    assert [400 <= found[0] < 405, 800 <= found[1] < 805, len(found)] == [True, True, 2]


@pytest.mark.parametrize("at", [5, 100])
@pytest.mark.parametrize("outlier", [50.0, 1e6, 1.7e308, -1.7e308])
def test_one_outlier_does_not_make_it_deaf(at: int, outlier: float) -> None:
    random = np.random.default_rng(8)
    values = random.normal(1.0, 0.15, 200)
    values[at] = outlier
    detector = Cusum(settle=20, threshold=6.0)
    assert not any(detector.update(float(value)) for value in values)
    assert any(detector.update(float(value)) for value in random.normal(2.3, 0.15, 10))


def test_falls_and_constants_and_what_is_not_finite_give_no_alarm() -> None:
    detector = Cusum()
    assert not any(detector.update(value) for value in [3.0] * 200)
    assert not any(detector.update(value) for value in [math.nan, math.inf, -math.inf] * 20)
    assert detector.count == 200
    random = np.random.default_rng(6)
    falling = Cusum(settle=200)
    assert not any(falling.update(value) for value in random.normal(-np.arange(500) / 10, 1))


def test_a_saved_detector_goes_on_to_the_same_alarms() -> None:
    random = np.random.default_rng(7)
    values = random.normal(np.repeat([0, 3], 300), 1)
    one, two = (Cusum(threshold=8.0, settle=100) for _ in range(2))
    first = [one.update(value) for value in values[:250]]
    two.load_state_dict(one.state_dict())
    assert [one.update(value) for value in values[250:]] == [two.update(value) for value in values[250:]]
    assert one.state_dict() == two.state_dict()
    assert not any(first)


class Above:
    """A detector as river has them: a change is a mean of the last four that is 1 from the first four."""

    def __init__(self) -> None:
        self.seen: list[float] = []
        self.drift_detected = False

    def update(self, value: float) -> None:
        self.seen.append(value)
        apart = abs(sum(self.seen[-4:]) - sum(self.seen[:4])) / 4
        self.drift_detected = len(self.seen) >= 8 and apart > 1


def test_a_foreign_detector_tells_rises_and_not_falls() -> None:
    detector = Foreign(Above)
    assert not any(detector.update(value) for value in [5.0] * 10 + [math.nan] + [2.0] * 10)
    assert not detector.values or 5.0 not in detector.values  # the fall was a change, which began it anew
    found = [place for place, value in enumerate([2.0] * 10 + [9.0] * 10) if detector.update(value)]
    assert found
    assert found[0] >= 10


def test_a_saved_foreign_detector_goes_on_to_the_same_alarms() -> None:
    values = [1.0, 1.1, 0.9, 1.0, 1.2, 0.8] + [4.0] * 12
    one = Foreign(Above)
    for value in values[:7]:
        one.update(value)
    two = Foreign(Above)
    two.load_state_dict(one.state_dict())
    assert [one.update(value) for value in values[7:]] == [two.update(value) for value in values[7:]]
    assert one.state_dict() == two.state_dict()
