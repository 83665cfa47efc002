"""An agent whose world is rewired: PPO of stable-baselines3 on CartPole, with and without keeping.

python -m venv .venv-control
.venv-control/bin/pip install -c constraints.txt torch==2.13.0 stable-baselines3==2.9.2 gymnasium==1.4.0 -e .
.venv-control/bin/python benchmarks/switching_control.py             # what is missing in docs/results/control.jsonl
.venv-control/bin/python benchmarks/switching_control.py --draw      # docs/control.md and docs/control.svg
.venv-control/bin/python benchmarks/switching_control.py --ledger    # a line of the ledger

A world is an order and the signs of the four sensors, whether the two actions are exchanged, and gravity, masses,
length and force, each within a factor of 1.5. A new one comes every 20,480 steps; nobody is told, but the arm "fresh".
Each arm has three rates, tried on a seed of their own over five worlds, and one more beyond where an outer one is best;
the one with the best mean return is run with other seeds over twelve. All arms see the same worlds.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from _ledger import DOCS
from _switching_page import Page
from _trials import Record, Trials
from torch import Tensor, nn

from pliant.core import Role
from pliant.core.change import Cusum
from pliant.core.seeds import numpy_generator
from pliant.core.units import Units
from pliant.optim import (
    ContinualBackprop,
    Isometry,
    Rewarm,
    ShrinkPerturb,
    Upkeep,
    normalize_and_project,
    warmup_cosine,
)
from pliant.optim.attach import attach

WORLDS, TUNING_WORLDS, STEPS = 12, 5, 20_480
ENVS, ROLLOUT, BATCH, EPOCHS = 32, 32, 256, 5
AFTER_ROLLOUT = ENVS * ROLLOUT // BATCH * EPOCHS
UPDATES = STEPS // (ENVS * ROLLOUT) * AFTER_ROLLOUT
"""Per world."""
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
BINS = 10
"""Parts of a world for which returns are written down."""
HEADS = {"action_net.weight": Role.HEAD, "value_net.weight": Role.HEAD}


class World(NamedTuple):
    """Sensor i shows `signs[i]` times number `order[i]` of the state."""

    order: tuple[int, ...]
    signs: tuple[int, ...]
    exchanged: bool
    physics: dict[str, float]


def draw_worlds(number: int, seed: int) -> list[World]:
    random = numpy_generator(seed, "worlds")
    first = {"gravity": 9.8, "masscart": 1.0, "masspole": 0.1, "length": 0.5, "force_mag": 10.0}
    return [
        World(
            tuple(random.permutation(4).tolist()),
            tuple(random.choice((-1, 1), 4).tolist()),
            bool(random.integers(2)),
            {name: value * 1.5 ** float(random.uniform(-1, 1)) for name, value in first.items()},
        )
        for _ in range(number)
    ]


def rewired() -> Any:
    """gymnasium's carts, many at once, as stable-baselines3 wants them; `enter` gives them a world."""
    from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
    from stable_baselines3.common.vec_env import VecEnv

    class Rewired(VecEnv):
        def __init__(self) -> None:
            self.carts: Any = CartPoleVectorEnv(ENVS)
            super().__init__(ENVS, self.carts.single_observation_space, self.carts.single_action_space)

        def enter(self, world: World) -> None:
            self.world = world
            vars(self.carts).update(world.physics)
            self.carts.total_mass = self.carts.masspole + self.carts.masscart
            self.carts.polemass_length = self.carts.masspole * self.carts.length

        def seen(self) -> np.ndarray:
            state = self.carts.state[list(self.world.order)] * np.array(self.world.signs)[:, None]
            return np.ascontiguousarray(state.T, dtype=np.float32)

        def reset(self) -> np.ndarray:
            self.carts.reset(seed=self._seeds[0])
            self._reset_seeds()
            return self.seen()

        def step_async(self, actions: np.ndarray) -> None:
            self.actions = 1 - actions if self.world.exchanged else actions

        def step_wait(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[dict[str, Any]]]:
            _, reward, failed, late, _ = self.carts.step(self.actions)
            done, infos = failed | late, [{} for _ in range(ENVS)]
            if done.any():
                last = self.seen()
                for i in np.flatnonzero(done):
                    infos[i] = {"terminal_observation": last[i], "TimeLimit.truncated": bool(late[i] & ~failed[i])}
                # At once, where gymnasium would wait for a further step that is none of an episode.
                shape = (4, int(done.sum()))
                self.carts.state[:, done] = self.carts.np_random.uniform(self.carts.low, self.carts.high, shape)
                self.carts.steps[done] = 0
                self.carts.prev_done[:] = False
            return self.seen(), reward, done, infos

        def close(self) -> None:
            self.carts.close()

        def get_attr(self, attr_name: str, indices: Any = None) -> list[Any]:
            return [getattr(self.carts, attr_name)] * ENVS

        def set_attr(self, attr_name: str, value: Any, indices: Any = None) -> None:
            setattr(self.carts, attr_name, value)

        def env_method(self, method_name: str, *args: Any, indices: Any = None, **options: Any) -> list[Any]:
            return [getattr(self.carts, method_name)(*args, **options)]

        def env_is_wrapped(self, wrapper_class: Any, indices: Any = None) -> list[bool]:
            return [False] * ENVS

    return Rewired()


class NormedReLU(nn.Module):
    """A norm before the nonlinearity, without parameters."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:]).relu()


@dataclass(frozen=True)
class Arm:
    """How the agent is kept.

    Attributes:
        keep: upkeep.
        normed: whether there are norms before nonlinearities.
        project: whether matrices keep their norms.
        fresh: whether a new agent begins in each world.
    """

    keep: Callable[[], list[Upkeep]] = list
    normed: bool = False
    project: bool = False
    fresh: bool = False


class Rises(Cusum):
    """Listens to how many episodes end in a rollout; counts the changes that it finds."""

    def __init__(self) -> None:
        super().__init__(settle=8, threshold=5.0)
        self.times = 0

    def update(self, value: float) -> bool:
        risen = super().update(value)
        self.times += risen
        return risen


def rewarm() -> Rewarm:
    """Falls to a tenth over a world."""
    return Rewarm(warmup_cosine(AFTER_ROLLOUT, UPDATES, floor=0.1), detector=Rises(), rest=4 * AFTER_ROLLOUT)


RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
"""The outer ones are tried where their neighbor is the best of the others."""
ARMS = {
    "adam": Arm(),
    "norm": Arm(normed=True),
    "project": Arm(normed=True, project=True),
    "project-rewarm": Arm(lambda: [rewarm()], normed=True, project=True),
    "project-isometry": Arm(lambda: [Isometry(detector=Rises())], normed=True, project=True),
    "isometry": Arm(lambda: [Isometry(detector=Rises())]),
    "shrink-perturb": Arm(lambda: [ShrinkPerturb(1e-3, 1e-2)]),
    "continual": Arm(lambda: [ContinualBackprop(1e-3)]),
    "fresh": Arm(fresh=True),
}


def policy() -> Any:
    """The usual policy, but it is called as a module when it learns too, and tells where its hidden units are."""
    from stable_baselines3.common.policies import ActorCriticPolicy

    class Policy(ActorCriticPolicy):
        def forward(self, obs: Tensor, deterministic: bool = False, actions: Tensor | None = None) -> tuple[Any, ...]:
            return super().forward(obs, deterministic) if actions is None else super().evaluate_actions(obs, actions)

        def evaluate_actions(self, obs: Tensor, actions: Tensor) -> tuple[Any, ...]:
            return self(obs, actions=actions)

        def units(self) -> list[Units]:
            found = []
            nets = (self.mlp_extractor.policy_net, self.mlp_extractor.value_net)
            for net, head in zip(nets, (self.action_net, self.value_net), strict=True):
                first, second = (part for part in net if isinstance(part, nn.Linear))
                found += [Units(second, ((first, 0),)), Units(head, ((second, 0),))]
            return found

    return Policy


def agent(arm: Arm, rate: float, envs: Any, seed: int) -> tuple[Any, Any, list[Upkeep]]:
    """PPO, near to what its authors publish for CartPole; but the rate is constant and entropy is worth something."""
    from stable_baselines3 import PPO

    net = {"net_arch": [64, 64], "activation_fn": NormedReLU if arm.normed else nn.ReLU}
    made = PPO(policy(), envs, rate, n_steps=ROLLOUT, batch_size=BATCH, n_epochs=EPOCHS, gamma=0.98,
               gae_lambda=0.8, ent_coef=0.01, policy_kwargs={**net, "optimizer_kwargs": {"fused": True}}, seed=seed,
               device="cpu")  # fmt: skip
    model, keep = made.policy, arm.keep()
    if arm.project:
        normalize_and_project(model.optimizer, model, roles=HEADS)
    kept = attach(model.optimizer, model, keep, roles=HEADS, seed=seed)
    if any(isinstance(one, Rewarm) for one in keep):
        made._update_learning_rate = lambda optimizers: None  # PPO would set the rate again before each rollout
    return made, kept, keep


def watch() -> Any:
    """A callback that writes down episodes, and tells upkeep how many ended."""
    from stable_baselines3.common.callbacks import BaseCallback

    class Watch(BaseCallback):
        def begin(self, kept: Any) -> None:
            self.kept, self.ages, self.steps = kept, np.zeros(ENVS), 0
            self.ended = 0
            self.episodes: list[tuple[int, float]] = []

        def _on_step(self) -> bool:
            self.steps += ENVS
            self.ages += 1
            for i in np.flatnonzero(self.locals["dones"]):
                self.episodes.append((self.steps, float(self.ages[i])))
                self.ages[i] = 0
                self.ended += 1
            return True

        def _on_rollout_end(self) -> None:
            self.kept.tell(np.log(0.5 + self.ended))
            self.ended = 0

    return Watch()


def run(arm: str, rate: float, worlds: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    torch.distributions.Distribution.set_default_validate_args(False)
    kind = ARMS[arm]
    envs, seen, made, began = rewired(), watch(), None, time.process_time()
    found: dict[str, list[Any]] = {"return": [], "rewarmed": [], "isometries": []}
    for i, world in enumerate(draw_worlds(worlds, seed)):
        envs.enter(world)
        if made is None or kind.fresh:
            made, kept, keep = agent(kind, rate, envs, 1000 * seed + i)
        seen.begin(kept)
        made.set_env(envs, force_reset=True)
        made.learn(STEPS, seen, reset_num_timesteps=False)
        found["return"].append(binned(seen.episodes))
        found["rewarmed"].append(sum(one.times for one in keep if isinstance(one, Rewarm)))
        found["isometries"].append(sum(one.detector.times for one in keep if isinstance(one, Isometry)))
        for what, value in looked(made).items():
            found.setdefault(what, []).append(round(value, 4))
    mean = round(float(np.mean(found["return"])), 2)
    return {"mean": mean, **found, "cpu seconds": round(time.process_time() - began, 1)}


def binned(episodes: Sequence[tuple[int, float]]) -> list[float]:
    """Mean return of the episodes that ended in each part of a world; where none did, as before."""
    found: list[float] = []
    for i in range(BINS):
        ages = [age for step, age in episodes if i < step * BINS / STEPS <= i + 1]
        found.append(round(statistics.fmean(ages), 1) if ages else (found[-1] if found else 0.0))
    return found


@torch.no_grad()
def looked(made: Any) -> dict[str, float]:
    """Of the policy on its last rollout: entropy in bits, share of dead units in its last layer, norm of matrices."""
    policy = made.policy
    h = policy.mlp_extractor.policy_net(torch.as_tensor(made.rollout_buffer.observations.reshape(-1, 4)))
    entropy = torch.distributions.Categorical(logits=policy.action_net(h)).entropy().mean() / np.log(2)
    matrices = [p for p in policy.mlp_extractor.policy_net.parameters() if p.ndim == 2]
    norm = sum(float(p.square().sum()) for p in matrices) ** 0.5
    return {"entropy": float(entropy), "dead": float((h <= 0).all(0).float().mean()), "norm": norm}


TRIALS = Trials(DOCS / "results" / "control.jsonl", run, TUNING_SEED)


def tuned(arm: str) -> float:
    def best(rates: Sequence[float]) -> float:
        keys = [{"arm": arm, "rate": rate, "worlds": TUNING_WORLDS, "seed": TUNING_SEED} for rate in rates]
        return float(TRIALS.best(keys)["rate"])

    found = best(RATES[1:-1])
    beyond = {RATES[1]: RATES[0], RATES[-2]: RATES[-1]}
    return best((found, beyond[found])) if found in beyond else found


def work(arms: Sequence[str], seeds: Sequence[int]) -> None:
    rates = {arm: tuned(arm) for arm in arms}
    for seed in seeds:
        for arm, rate in rates.items():
            TRIALS.once(arm=arm, rate=rate, worlds=WORLDS, seed=seed)


def page(records: Sequence[Record], seeds: Sequence[int]) -> Page:
    return Page(records, list(ARMS), RATES, seeds, TUNING_SEED, STEPS)


if __name__ == "__main__":
    TRIALS.command(
        work, lambda *told: page(*told).draw(), lambda *told: page(*told).ledger(), arms=list(ARMS), seeds=SEEDS
    )
