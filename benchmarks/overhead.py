"""What upkeep and looking cost on models of ten million parameters, CPU, one thread.

python benchmarks/overhead.py

Projection: steps of AdamW with foreach, alone and with normalize_and_project, on copies of one model with the same
gradients, in turn; the fused AdamW is told beside it, with a projection at each step and at every 16th. Health: one
look of `pliant learn` at a model against learning from as many steps of a stream as lie between two looks. Medians of
processor time.
"""

import argparse
import copy
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from _ledger import append
from torch import Tensor, nn

from pliant.core import Answer, Batch, Question, Role, seeded
from pliant.learn import Learner, bptt
from pliant.models import SequenceClassifier
from pliant.optim import adamw, normalize_and_project
from pliant.recipes.checkup import EVERY, Checkup

MOST_PROJECTION, MOST_HEALTH = 0.05, 0.03
SPARSE = 16
"""Steps from one projection to the next where each would cost too much beside a fused optimizer."""
BATCH, STEPS, FEATURES, CLASSES = 16, 16, 16, 10


class Transformer(nn.Module):
    """An encoder of torch over a sequence of features, with the methods that a learner asks for."""

    def __init__(self, width: int = 320, depth: int = 8):
        super().__init__()
        self.embed = nn.Linear(FEATURES, width)
        layer = nn.TransformerEncoderLayer(width, 8, 4 * width, 0.0, batch_first=True, norm_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, CLASSES)

    def init_state(self, batch: int, extra: Any = (), *, device: Any = None) -> tuple[Tensor]:
        return (torch.zeros(batch, 0),)

    def forward(self, x: Tensor, state: Any = None, *, reset: Any = None, mask: Any = None) -> tuple[Tensor, Any]:
        state = self.init_state(len(x)) if state is None else state
        return self.head(self.layers(self.embed(x))), state

    def nats(self, output: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.movedim(-1, 1), targets, reduction="none")

    def roles(self) -> dict[str, Role]:
        def role(name: str, p: Tensor) -> Role:
            if p.ndim < 2:
                return Role.GAIN if "norm" in name and name.endswith("weight") else Role.BIAS
            return {"embed.weight": Role.EMBEDDING, "head.weight": Role.HEAD}.get(name, Role.MATRIX)

        return {name: role(name, p) for name, p in self.named_parameters()}


def ours() -> nn.Module:
    return SequenceClassifier(FEATURES, CLASSES, width=448, depth=5, mixer_options={"num_heads": 7, "depth": 5})


def mlp() -> nn.Module:
    width = 1800
    parts = [part for _ in range(3) for part in (nn.Linear(width, width), nn.LayerNorm(width), nn.ReLU())]
    return nn.Sequential(nn.Linear(FEATURES, width), *parts, nn.Linear(width, CLASSES))


MODELS: dict[str, Callable[[], nn.Module]] = {"ours": ours, "transformer": Transformer, "mlp": mlp}


def made(name: str) -> nn.Module:
    with seeded(0, name):
        return MODELS[name]()


def timed(call: Callable[[], Any]) -> float:
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


def projection(name: str, rounds: int) -> dict[str, float]:
    """Milliseconds of a step of each kind, and the share that the projection adds to the foreach one."""
    model = made(name)
    with seeded(1):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
    every = {"foreach": 0, "projected": 1, "fused": 0, "projected fused": 1}
    times = in_turn({kind: optimizer_of(model, "fused" in kind, n) for kind, n in every.items()}, rounds)
    median = {kind: statistics.median(values) for kind, values in times.items()}
    shares = [b / a - 1 for a, b in zip(times["foreach"], times["projected"], strict=True)]
    sparse = in_turn({kind: optimizer_of(model, True, n) for kind, n in {"alone": 0, "projected": SPARSE}.items()},
                     max(2, rounds // 4), steps=SPARSE)  # fmt: skip
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    return {
        "million parameters": millions,
        **{f"{kind} ms": value for kind, value in median.items()},
        "share": statistics.median(shares),
        "share of fused": median["projected fused"] / median["fused"] - 1,
        f"share of fused, every {SPARSE}": statistics.median(
            b / a - 1 for a, b in zip(sparse["alone"], sparse["projected"], strict=True)
        ),
    }


def optimizer_of(model: nn.Module, fused: bool, every: int) -> torch.optim.Optimizer:
    """AdamW over a copy of a model with the same gradients; it projects `every` so many steps, 0 never."""
    twin = copy.deepcopy(model)
    for p, q in zip(twin.parameters(), model.parameters(), strict=True):
        p.grad = q.grad
    optimizer = torch.optim.AdamW(twin.parameters(), 1e-3, weight_decay=0.01, fused=fused, foreach=not fused)
    return normalize_and_project(optimizer, twin, every) if every else optimizer


def in_turn(kinds: dict[str, torch.optim.Optimizer], rounds: int, steps: int = 1) -> dict[str, list[float]]:
    """Milliseconds of so many steps of each, round by round."""
    times: dict[str, list[float]] = {kind: [] for kind in kinds}
    for i in range(rounds + 2):
        for kind, optimizer in kinds.items():
            spent = timed(lambda optimizer=optimizer: [optimizer.step() for _ in range(steps)])  # type: ignore[misc]
            if i >= 2:
                times[kind].append(spent)
    return times


def stream(questions: int) -> Iterator[tuple[Question, Answer]]:
    with seeded(2):
        for time_ in range(questions):
            shape = (BATCH, STEPS)
            on, rows = torch.ones(shape, dtype=torch.bool), torch.arange(BATCH)
            reset = torch.zeros(shape, dtype=torch.bool)
            reset[:, 0] = True
            yield (
                Question(torch.randn(*shape, FEATURES), reset, on, time_, rows),
                Answer(torch.randint(CLASSES, shape), on, on, time_, rows),
            )


def looking(name: str, rounds: int) -> dict[str, float]:
    """Milliseconds of an update and of a look, and the share of looking at the interval of `pliant learn`."""
    model = made(name)
    optimizer = adamw(model, 1e-3) if name == "ours" else torch.optim.AdamW(model.parameters(), 1e-3)
    learner, checkup = Learner(model, optimizer, bptt(STEPS), streams=BATCH), Checkup()
    updates, looks = [], []
    for i, (question, answer) in enumerate(stream(rounds + 2)):
        checkup.take(Batch((), question))

        def update(question: Question = question, answer: Answer = answer) -> None:
            learner.predict(question)
            learner.learn(answer)

        spent = timed(update)
        look = timed(lambda: checkup.look(learner))
        if i >= 2:
            updates.append(spent)
            looks.append(look)
    between = EVERY / (BATCH * STEPS)
    spent, look = statistics.median(updates), statistics.median(looks)
    return {"update ms": spent, "look ms": look, "updates between": between, "share": look / (look + between * spent)}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--no-ledger", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    steps = {name: projection(name, options.rounds) for name in MODELS}
    looks = {name: looking(name, max(3, options.rounds // 8)) for name in ("ours", "transformer")}
    for title, table in (("projection", steps), ("health", looks)):
        for name, row in table.items():
            print(title, name, {key: round(value, 4) for key, value in row.items()}, flush=True)
    if options.no_ledger:
        return
    append(
        "normalize-and-project takes at most 5 % of a foreach AdamW step, 10M parameters, CPU",
        "python benchmarks/overhead.py",
        {f"{name}, {key}": row[key] for name, row in steps.items() for key in row},
        holds=all(row["share"] <= MOST_PROJECTION for row in steps.values()),
    )
    append(
        "health at its default interval takes at most 3 % of learning, 10M parameters, CPU",
        "python benchmarks/overhead.py",
        {f"{name}, {key}": row[key] for name, row in looks.items() for key in row},
        holds=all(row["share"] <= MOST_HEALTH for row in looks.values()),
    )


if __name__ == "__main__":
    main()
