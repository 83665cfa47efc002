"""Turns of agents in Gymnasium environments, recorded in the order in which they happen; needs pliant[control].

What an environment says to an action is the next observation, the reward, and whether an episode ended, in one turn,
since all of it may shape what the agent does next. A life begins with an observation, so the order is "OA", and goes on
over ends of episodes: what is seen after a reset belongs to the turn that ended the episode before.
"""

from collections.abc import Callable, Hashable, Sequence
from typing import Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box, Dict, Discrete, Tuple

from pliant.core import UsageError
from pliant.streams.turns import Life, Turns

See = Callable[[Any, float, bool], Hashable]
"""(observation, reward, whether an episode ended) -> what counts as one symbol."""
TRIED = 1000
"""Steps with random actions from which the borders of bins are taken."""


class Recorded(gymnasium.Wrapper[Any, Any, Any, Any]):
    """An environment whose turns are written down; agents need not know.

    Every symbol that is seen for the first time gets the next number; `turns` counts the alphabets. Call `new_life`
    before the reset with which an agent begins anew.

    Args:
        env: with discrete actions.
        see: what counts as one symbol; None: observation, reward and end as they are.

    Raises:
        UsageError: actions that are not discrete; observations that are continuous, and no `see`.
    """

    def __init__(self, env: gymnasium.Env[Any, Any], see: See | None = None):
        super().__init__(env)
        if not isinstance(env.action_space, Discrete):
            raise UsageError(f"Recorded: actions are {env.action_space}, expected Discrete")
        if see is None and not _is_discrete(env.observation_space):
            raise UsageError(f"Recorded: observations are {env.observation_space}; continuous ones need a quantizer, "
                             "such as bins_of(env, 3), on the command line --bins 3")  # fmt: skip
        self.see = plainly if see is None else see
        self.symbols: dict[Hashable, int] = {}
        self.lives: list[Life] = []
        self._ended: float | None = None  # the reward with which an episode ended

    def new_life(self) -> None:
        """The next reset begins a life."""
        self.lives.append(Life())
        self._ended = None

    def reset(self, **arguments: Any) -> tuple[Any, dict[str, Any]]:
        """As that of the environment."""
        observation, info = self.env.reset(**arguments)
        if not self.lives:
            self.new_life()
        life = self.lives[-1]
        left = len(life.observations) > len(life.actions)  # an episode, or one that had only just begun
        if left:
            life.observations.pop()
        reward, self._ended = self._ended, None
        ended = reward is not None or (left and bool(life.actions))
        self._note(observation, 0.0 if reward is None else reward, ended)
        return observation, info

    def step(self, action: Any) -> Any:
        """As that of the environment."""
        observation, reward, ended, cut, info = self.env.step(action)
        self.lives[-1].actions.append(int(action) - int(self.env.action_space.start))  # type: ignore[attr-defined]
        if ended or cut:
            self._ended = float(reward)  # what is seen next is seen after a reset
        else:
            self._note(observation, float(reward), False)
        return observation, reward, ended, cut, info

    @property
    def turns(self) -> Turns:
        """What was recorded, without observations that no action followed."""
        lives = {number: Life(life.actions, life.observations[: len(life.actions)])
                 for number, life in enumerate(self.lives) if life.actions}  # fmt: skip
        actions = int(self.env.action_space.n)  # type: ignore[attr-defined]
        return Turns("OA", (actions, max(2, len(self.symbols))), lives)

    def _note(self, observation: Any, reward: float, ended: bool) -> None:
        symbol = self.see(observation, reward, ended)
        self.lives[-1].observations.append(self.symbols.setdefault(symbol, len(self.symbols)))


def plainly(observation: Any, reward: float, ended: bool) -> Hashable:
    """Everything as it is; rewards to six digits."""
    return _frozen(observation), round(reward, 6), ended


def _frozen(observation: Any) -> Hashable:
    if isinstance(observation, dict):
        return tuple((name, _frozen(observation[name])) for name in sorted(observation))
    return tuple(map(_frozen, observation)) if isinstance(observation, tuple) else np.asarray(observation).tobytes()


def _is_discrete(space: gymnasium.Space[Any]) -> bool:
    if isinstance(space, Dict | Tuple):
        return all(map(_is_discrete, space.values() if isinstance(space, Dict) else space.spaces))
    return not isinstance(space, Box) or np.issubdtype(space.dtype, np.integer)


def bins_of(env: gymnasium.Env[Any, Any], bins: int, seed: int = 0) -> See:
    """A quantizer: every number of an observation, and the reward, falls into one of so many bins.

    Borders are quantiles of what random actions come to see; a number that takes no more values than there are bins
    keeps them.

    Raises:
        UsageError: fewer than two bins.
    """
    if bins < 2:
        raise UsageError(f"bins_of: {bins} bins, expected 2 or more")
    env.action_space.seed(seed)
    rows, (observation, _) = [], env.reset(seed=seed)
    for _ in range(TRIED):
        observation, reward, ended, cut, _ = env.step(env.action_space.sample())
        rows.append([*np.ravel(observation), float(reward)])
        if ended or cut:
            observation, _ = env.reset()
    borders = [borders_of(column, bins) for column in np.array(rows, np.float64).T]

    def see(observation: Any, reward: float, ended: bool) -> Hashable:
        numbers: Sequence[float] = [*np.ravel(observation), reward]
        return (*(int(np.searchsorted(own, one)) for own, one in zip(borders, numbers, strict=True)), ended)

    return see


def borders_of(values: np.ndarray, bins: int) -> np.ndarray:
    """Borders between bins that hold about as many values each; between the values themselves, if they are few."""
    kinds = np.unique(values)
    if len(kinds) <= bins:
        return (kinds[1:] + kinds[:-1]) / 2
    return np.unique(np.quantile(values, np.arange(1, bins) / bins))
