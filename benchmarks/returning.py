"""What is kept when tasks return, and what is still learned: replay and EWC beside ways to stay plastic.

python benchmarks/returning.py                       # whatever is missing in docs/results/returning.jsonl
python benchmarks/returning.py --nets recurrent --bases adam
python benchmarks/returning.py --draw                # docs/returning.md and its figure
python benchmarks/returning.py --ledger

scikit-learn's digits with their pixels in one of four orders, visited in turn A B C D A B C D ..., one pass over the
images each, 16 visits; then three orders that have not been seen. Each image is answered before it is learned; a fifth
is never learned, and on it all four tasks are asked after each visit.

An arm is a way to stay plastic and a way to remember. Each has eight settings, tried with a seed of its own on the
first half of the visits; the one with the best online accuracy is run with five other seeds.
"""

import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from _ledger import DOCS, append
from _returning_page import draw, found, verdict
from _trials import Record, Trials
from keeping import BATCH, make, rewarm
from torch import Tensor

from pliant.core import Answer, seeded, take
from pliant.learn import Learner, bptt, prequential
from pliant.optim import EWC, ContinualBackprop, Replay, Rewarm, Schedule, Upkeep, normalize_and_project, warmup
from pliant.streams import Stream, digits, drift

TASKS, CYCLES, NEW = 4, 4, 3
QUESTIONS, BLOCK = 112, 8
"""Per visit, and per figure of online accuracy."""
TUNING_SEED, SEEDS = 100, (0, 1, 2, 3, 4)
NETS = ("feed-forward", "recurrent")


class Base(NamedTuple):
    """How a learner is kept plastic: upkeep with the strength that docs/keeping.md chose, norms, projection."""

    keep: Callable[[], list[Upkeep]] = list
    project: bool = False


BASES = {
    "adam": Base(),
    "project-rewarm": Base(lambda: [rewarm(0.3)], project=True),
    "continual": Base(lambda: [ContinualBackprop(1e-3)]),
}
MEMORIES: dict[str, Callable[[Any], list[Upkeep]]] = {
    "none": lambda strength: [],
    "replay": lambda strength: [Replay(500, BATCH, strength)],
    # Told when a visit ends: as favorable as can be.
    "ewc": lambda strength: [EWC(strength, every=QUESTIONS, samples=50)],
}
SETTINGS: dict[str, tuple[tuple[float, Any], ...]] = {
    "none": tuple((rate, None) for rate in (5e-4, 1e-3, 2e-3, 3e-3, 4e-3, 6e-3, 1e-2, 2e-2)),
    "replay": tuple((rate, strength) for rate in (2e-3, 6e-3) for strength in (0.1, 0.3, 1.0, 3.0)),
    "ewc": tuple((rate, strength) for rate in (2e-3, 6e-3) for strength in (0.1, 1.0, 10.0, 300.0)),
}


def learner(net: str, base: Base, memory: list[Upkeep], rate: float, seed: int) -> Learner:
    with seeded(seed, "model"):
        model = make(net, base.project)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    if base.project:
        normalize_and_project(optimizer, model)
    keep = base.keep()
    if not any(isinstance(one, Rewarm) for one in keep):
        keep = [Schedule(warmup(50)), *keep]
    return Learner(model, optimizer, bptt(8), [*keep, *memory], streams=BATCH, remember=2, seed=seed)


class Blocks:
    """Share of right answers in each block of questions, by visit; `after(visit)` is called when one has ended."""

    def __init__(self, after: Callable[[], list[float]]):
        self.after, self.asked = after, 0
        self.right: list[list[float]] = []
        self.kept: list[list[float]] = []

    def update(self, answer: Answer, said: Tensor | None) -> None:
        if said is None:
            return
        if self.asked % QUESTIONS == 0:
            if self.asked:
                self.kept.append(self.after())
            self.right.append([0.0] * (QUESTIONS // BLOCK))
        place = self.asked % QUESTIONS // BLOCK
        self.right[-1][place] += float((said.argmax(-1) == answer.targets)[answer.target_mask].float().mean()) / BLOCK
        self.asked += 1


def run(net: str, base: str, memory: str, rate: float, strength: Any, visits: int, seed: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    one = learner(net, BASES[base], MEMORIES[memory](strength), rate, seed)
    tests = _tests(seed)
    scores = Blocks(lambda: [_accuracy(one, *test) for test in tests])
    began = time.process_time()
    for stream in _streams(visits, seed):
        for _ in prequential(stream, one, scores):
            pass
        scores.kept.append(scores.after())
        scores.asked = 0
    online = [[round(x, 3) for x in visit] for visit in scores.right]
    return {
        "mean": sum(map(sum, online)) / sum(map(len, online)),
        "online": online,
        "held out": [[round(x, 4) for x in visit] for visit in scores.kept],
        "updates": one.updates,
        "cpu seconds": round(time.process_time() - began, 1),
    }


def _streams(visits: int, seed: int) -> list[Stream]:
    """The visits, and, if these are all, new tasks after them: the same stream without return, from the same place."""
    every = QUESTIONS * BATCH
    source = digits(batch=BATCH, questions=visits * QUESTIONS, seed=seed)
    back = drift.permute(source, every=every, returning=TASKS, seed=seed)
    if visits < TASKS * CYCLES:
        return [back]
    source = digits(batch=BATCH, questions=(visits + NEW) * QUESTIONS, seed=seed)
    new = drift.permute(source, every=every, seed=seed)
    new.load_state_dict({"inner": {"asked": visits * QUESTIONS}})
    return [back, new]


def _tests(seed: int) -> list[tuple[Tensor, Tensor]]:
    """Held-out images and their classes, as each task shows them."""
    source: Any = digits(batch=BATCH, seed=seed)
    inputs, labels = source.inputs[source.held_out], source.labels[source.held_out]
    flat = inputs.flatten(1)
    return [
        (flat[:, drift.permutation(task, flat.shape[1], seed)].reshape(inputs.shape), labels) for task in range(TASKS)
    ]


@torch.no_grad()
def _accuracy(one: Learner, inputs: Tensor, labels: Tensor) -> float:
    """Of answers from the memory of the streams, which holds what is known of the scale of features."""
    reset = torch.zeros(inputs.shape[:2], dtype=torch.bool)
    reset[:, 0] = True
    output, _ = one.model(inputs, take(one.memory, torch.arange(len(inputs)) % BATCH), reset=reset)
    return float((output[:, -1].argmax(-1) == labels).float().mean())


def key_of(net: str, base: str, memory: str, setting: tuple[float, Any], visits: int, seed: int) -> dict[str, Any]:
    names = ("net", "base", "memory", "rate", "strength", "visits", "seed")
    return dict(zip(names, (net, base, memory, *setting, visits, seed), strict=True))


def ledger(records: Sequence[Record], seeds: Sequence[int]) -> None:
    for net, arms in found(records, seeds).items():
        figures, holds = verdict(arms)
        append(
            f"{net}, four tasks that return: with replay more of the old is kept, and no less is learned of the new",
            "python benchmarks/returning.py --ledger",
            {**figures, "arms": len(arms), "settings each": 8, "seeds": len(seeds)},
            holds=holds,
        )


TRIALS = Trials(DOCS / "results" / "returning.jsonl", run, TUNING_SEED)


def tuned(net: str, base: str, memory: str) -> tuple[float, Any]:
    half = TASKS * CYCLES // 2
    best = TRIALS.best([key_of(net, base, memory, setting, half, TUNING_SEED) for setting in SETTINGS[memory]])
    return best["rate"], best["strength"]


def work(nets: Sequence[str], bases: Sequence[str], memories: Sequence[str], seeds: Sequence[int]) -> None:
    for net in nets:
        for base in bases:
            for memory in memories:
                best = tuned(net, base, memory)
                for seed in seeds:
                    TRIALS.once(**key_of(net, base, memory, best, TASKS * CYCLES, seed))


if __name__ == "__main__":
    TRIALS.command(work, draw, ledger, nets=NETS, bases=list(BASES), memories=list(MEMORIES), seeds=SEEDS)
