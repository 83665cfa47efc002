"""Logs of turns, and Gymnasium environments whose turns are recorded."""

from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

from pliant.core import UsageError
from pliant.streams.recorded import Recorded
from pliant.streams.turns import Life, Turns, parse, read_turns

HEAD = '{"order": "AO", "actions": 2, "observations": 3}'


def lines(*turns: tuple[int, int, str, Any]) -> list[str]:
    return [HEAD, *(f'{{"life": {life}, "index": {index}, "{kind}": {symbol}}}' for life, index, kind, symbol in turns)]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    turns = Turns("OA", (2, 3), {0: Life([1, 0], [2, 2]), 7: Life([0, 0], [0, 1])})
    turns.write(tmp_path / "log.jsonl")
    again = read_turns(tmp_path / "log.jsonl")
    assert again == turns
    actions, observations = again.arrays()
    assert actions.tolist() == [[1, 0], [0, 0]] and observations.tolist() == [[2, 2], [0, 1]]


def test_lives_may_be_mixed_but_not_their_turns() -> None:
    mixed = lines((0, 1, "action", 1), (5, 1, "action", 0), (5, 1, "observation", 2), (0, 1, "observation", 0))
    assert parse([*mixed, "  \n"], "log").lives == {0: Life([1], [0]), 5: Life([0], [2])}


@pytest.mark.parametrize(
    ("turns", "said"),
    [
        (
            [(0, 1, "observation", 0)],
            "line 2: life 0 has the observation of index 1 where the action of index 1 should",
        ),
        (
            [(0, 1, "action", 0), (0, 2, "action", 1)],
            "line 3: .* where the observation of index 1 should be; a turn is",
        ),
        ([(0, 1, "action", 0), (0, 1, "observation", 0), (0, 3, "action", 0)], "where the action of index 2 should be"),
        (
            [(0, 1, "action", 0), (0, 1, "observation", 0), (0, 2, "action", 0)],
            "life 0 ends without the observation of",
        ),
        ([(0, 1, "action", 2)], "action 2, expected a symbol from 0 to 1"),
        ([(0, 1, "action", "true")], "action True, expected a symbol"),
        ([(0, 1, "reward", 1)], "expected a life, an index, and either an action or an observation, got life, index"),
    ],
)
def test_turns_that_are_missing_or_out_of_order(turns: list[Any], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(lines(*turns), "log")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ([], "log is empty"),
        (["[1, 2]"], "line 1 is no object in JSON"),
        (["what"], "line 1 is no object in JSON"),
        (['{"life": 0, "index": 1, "action": 0}'], "the first line must say which turn comes first"),
        (["[" * 100_000], "line 1 is no object in JSON"),
        (['{"order": ' + "9" * 5000 + "}"], "line 1 is no object in JSON"),
        (['{"order": "AO", "actions": 1, "observations": 2}'], "1 actions and 2 observations, expected how many"),
        (['{"order": "AO", "actions": 2, "observations": 10000000000}'], "two to 1,048,576"),
    ],
)
def test_what_is_no_log(text: list[str], said: str) -> None:
    with pytest.raises(UsageError, match=said):
        parse(text, "log")


def test_lives_of_different_lengths(tmp_path: Path, unchecked: None) -> None:
    turns = Turns("AO", (2, 2), {0: Life([0, 1], [1, 1]), 1: Life([0], [1])})
    with pytest.raises(UsageError, match="life 1 has 1 indices and 2 are needed of each; take the first 1 of each"):
        turns.arrays()
    assert turns.arrays(1)[0].tolist() == [[0], [0]]
    with pytest.raises(UsageError, match="cannot be read"):
        read_turns(tmp_path / "none.jsonl")
    with pytest.raises(UsageError, match=r"expected .AO. or .OA."):
        Turns("AOA", (2, 2))  # type: ignore[arg-type]


def test_an_environment_is_recorded_in_the_order_of_its_turns() -> None:
    """What an action brings is one turn: reward, end, and the next observation, after an end that of the reset."""
    from pliant.recipes.lives import live

    class Corridor(gymnasium.Env):  # type: ignore[misc,name-defined]
        """Two cells; leaving the second to the right pays and ends."""

        action_space, observation_space = gymnasium.spaces.Discrete(2, start=5), gymnasium.spaces.Discrete(2)

        def reset(self, **arguments: Any) -> Any:
            self.cell = 0
            return self.cell, {}

        def step(self, action: Any) -> Any:
            over = self.cell == 1 and action == 6
            self.cell = min(1, self.cell + 1) if action == 6 else 0
            return self.cell, float(over), over, False, {}

    heard: list[Any] = []

    def make(env: Any, seed: int) -> Any:
        def agent(observation: Any, reward: float, ended: bool) -> Any:
            heard.append((observation, reward, ended))
            return 6

        return agent

    recorded = Recorded(Corridor())
    turns = live(recorded, make, lives=2, indices=4)
    assert heard[:4] == [(0, 0.0, False), (1, 0.0, False), (0, 1.0, True), (1, 0.0, False)]
    assert turns.order == "OA" and turns.sizes == (2, 3)
    assert turns.lives == {0: Life([1, 1, 1, 1], [0, 1, 2, 1]), 1: Life([1, 1, 1, 1], [0, 1, 2, 1])}
    with pytest.raises(UsageError, match="the agent gave 0 in life 0"):
        live(Recorded(Corridor()), lambda env, seed: lambda *heard: 0, 1, 1)


def test_bins() -> None:
    from pliant.streams.recorded import Recorded, bins_of, borders_of

    assert borders_of(np.array([0.0, 1.0, 1.0]), 3).tolist() == [0.5]
    assert borders_of(np.arange(9.0), 3).tolist() == pytest.approx([8 / 3, 16 / 3])
    env = gymnasium.make("CartPole-v1")
    see = bins_of(env, 2)
    assert see(np.full(4, -9.0), 1.0, False) == (0, 0, 0, 0, 0, False)
    assert see(np.full(4, 9.0), 1.0, True) == (1, 1, 1, 1, 0, True)
    for call, said in (
        (lambda: Recorded(env), "continuous ones need a quantizer"),
        (lambda: bins_of(env, 1), "1 bins"),
        (lambda: Recorded(gymnasium.make("Pendulum-v1")), "expected Discrete"),
    ):
        with pytest.raises(UsageError, match=said):
            call()
    env.close()


class Rooms(gymnasium.Env[Any, Any]):
    """Observations of several parts, made anew each time; a step leads to the next room."""

    action_space = gymnasium.spaces.Discrete(2)
    observation_space = gymnasium.spaces.Dict(
        {"room": gymnasium.spaces.Discrete(9), "pair": gymnasium.spaces.Tuple([gymnasium.spaces.Discrete(2)] * 2)}
    )

    def __init__(self) -> None:
        self.room = 0

    def _seen(self) -> Any:
        return {"room": np.int64(self.room), "pair": (np.int64(0), np.int64(1))}

    def reset(self, **arguments: Any) -> Any:
        self.room = 0
        return self._seen(), {}

    def step(self, action: Any) -> Any:
        self.room += int(action)
        return self._seen(), 0.0, False, False, {}


def test_what_has_parts_is_one_symbol_by_value() -> None:
    recorded = Recorded(Rooms())
    recorded.reset()
    for action in (0, 0, 1, 0, 1):
        recorded.step(action)
    assert recorded.turns.lives[0].observations == [0, 0, 0, 1, 1]


def test_after_a_reset_that_the_agent_asks_for_it_is_that_which_is_acted_on() -> None:
    recorded = Recorded(Rooms())
    recorded.reset()
    recorded.step(1)
    recorded.reset()
    recorded.step(0)
    recorded.step(0)
    life = recorded.turns.lives[0]
    assert life.actions == [1, 0, 0]
    first, after_reset, again = life.observations
    assert len({first, after_reset}) == 2  # the same room, but an episode has ended
    assert again == first


def test_a_partial_space_is_as_continuous_as_its_parts() -> None:
    env = Rooms()
    env.observation_space = gymnasium.spaces.Dict({"x": gymnasium.spaces.Box(0, 1)})
    with pytest.raises(UsageError, match="continuous ones need a quantizer"):
        Recorded(env)
