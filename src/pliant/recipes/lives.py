"""Lives of agents in Gymnasium environments: many short ones, each from the same start; agents by name."""

import importlib
import math
import os
import sys
from collections.abc import Callable, Hashable
from typing import Any

import numpy as np

from pliant.core import UsageError
from pliant.streams.turns import Turns

Agent = Callable[[Any, float, bool], int]
"""(observation, reward of the action before, whether an episode ended with it) -> action; learns as it likes."""
MakeAgent = Callable[[Any, int], Agent]
"""(environment, seed) -> an agent that has learned nothing yet."""


def live(env: Any, make_agent: MakeAgent, lives: int, indices: int, seed: int = 0) -> Turns:
    """Turns of so many lives of so many indices.

    Args:
        env: a `pliant.streams.recorded.Recorded`.
        make_agent: makes a new agent for each life.
        lives: how many.
        indices: actions in each.
        seed: of all of them together.

    Raises:
        UsageError: the agent gives something else than an action.
    """
    for number, child in enumerate(np.random.SeedSequence(seed).spawn(lives)):
        first, second = (int(word) for word in child.generate_state(2))
        env.new_life()
        agent = make_agent(env, first)
        (observation, _), reward, ended = env.reset(seed=second), 0.0, False
        for _ in range(indices):
            action = agent(observation, reward, ended)
            if not env.action_space.contains(action):
                raise UsageError(f"the agent gave {action!r} in life {number}, expected an action of "
                                 f"{env.action_space}")  # fmt: skip
            observation, paid, over, cut, _ = env.step(action)
            reward, ended = float(paid), bool(over or cut)
            if ended:
                observation, _ = env.reset()
    return env.turns


def random_agent(env: Any, seed: int) -> Agent:
    """Draws each action evenly."""
    draws, first, count = np.random.default_rng(seed), int(env.action_space.start), int(env.action_space.n)
    return lambda observation, reward, ended: first + int(draws.integers(count))


def q_learner(
    env: Any, seed: int, *, epsilon: float = 0.1, rate: float = 0.1, discount: float = 0.9, first: float = 0.0
) -> Agent:
    """Tabular Q-learning (Watkins 1989), ε-greedy, ties broken evenly, on what the recorder tells apart."""
    draws, start, count = np.random.default_rng(seed), int(env.action_space.start), int(env.action_space.n)
    values: dict[Hashable, np.ndarray] = {}
    before: list[Any] = []  # the state and the action before

    def agent(observation: Any, reward: float, ended: bool) -> int:
        state = env.see(observation, 0.0, False)
        own = values.setdefault(state, np.full(count, first))
        if before:
            then, did = before
            target = reward + (0.0 if ended else discount * own.max())
            values[then][did] += rate * (target - values[then][did])
        greedy = np.flatnonzero(own == own.max())
        action = draws.integers(count) if draws.random() < epsilon else draws.choice(greedy)
        before[:] = state, int(action)
        return start + int(action)

    return agent


AGENTS: dict[str, Callable[..., Agent]] = {"random": random_agent, "q": q_learner}


def agent_named(name: str) -> MakeAgent:
    """`random`, `q`, `q:epsilon=0.2,first=1`, or `module:function`, a function of (environment, seed) of one's own.

    Raises:
        UsageError: nothing of that name, or settings that it does not have.
    """
    head, _, tail = name.partition(":")
    if head not in AGENTS:
        return _imported(head, tail)
    settings = {}
    for part in filter(None, tail.split(",")):
        key, _, value = part.partition("=")
        try:
            settings[key] = float(value)
        except ValueError:
            raise UsageError(f"--agent {name}: {part!r} is no setting, expected NAME=NUMBER") from None
        if not (0 <= settings[key] <= 1 if key != "first" else math.isfinite(settings[key])):
            raise UsageError(f"--agent {name}: {key} is {value}, expected {'a number' if key == 'first' else '0 to 1'}")
    known = {"q": ("epsilon", "rate", "discount", "first")}.get(head, ())
    if strange := [key for key in settings if key not in known]:
        raise UsageError(f"--agent {name}: {head} has no setting {strange[0]!r}; it has {', '.join(known) or 'none'}")
    return lambda env, seed: AGENTS[head](env, seed, **settings)


def _imported(module: str, function: str) -> MakeAgent:
    asked = f"--agent {module}{function and ':'}{function}"
    if not module.strip(".") or module.startswith(".") or not function:
        raise UsageError(f"{asked}: expected {', '.join(AGENTS)} or module:function, a function of (environment, seed)")
    sys.path.insert(0, os.getcwd())
    try:
        found: MakeAgent = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever a module of somebody else raises
        raise UsageError(f"{asked} cannot be imported ({type(error).__name__}: {error})") from None
    finally:
        sys.path.remove(os.getcwd())
    if not callable(found):
        raise UsageError(f"{asked} is {found!r}, expected a function of (environment, seed)")
    return found
