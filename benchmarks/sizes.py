"""Does sharper attention generalize to larger problems? A network on graphs, and a language model on CLRS-Text.

python benchmarks/sizes.py --data FOLDER           # whatever is missing in docs/results/sizes.jsonl
python benchmarks/sizes.py --tasks bfs --seeds 0
python benchmarks/sizes.py --draw                  # docs/sizes.md
python benchmarks/sizes.py --ledger

bfs, bellman-ford: graphs of 4 to 16 nodes, every pair joined with probability 1/2, and for each node its parent in the
tree of the search; a network whose nodes attend to their neighbors, eight times over with the same weights. clrs-text:
questions and answers of 29 algorithms as text (Markeeva et al. 2024, arXiv:2406.04229), of sizes 4 to 12, those that
are not too long; FOLDER holds the rows. Each net is trained with softmax or with what sharpens it, and what was trained
with softmax is also asked with what sharpens at inference alone.
"""

import gzip
import json
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from _ledger import DOCS, append
from _trials import Record, Trials
from scipy.sparse.csgraph import dijkstra
from torch import Tensor, nn
from torch.nn import functional as F

from pliant.core import generator, seeded
from pliant.kernels import adaptive_softmax, masked_softmax, perplexity_softmax
from pliant.models import ByteTokenizer, LanguageModel

FILE, PAGE = DOCS / "results" / "sizes.jsonl", DOCS / "sizes.md"
SEEDS = (0, 1, 2)
GRAPHS = ("bfs", "bellman-ford")
TASKS = (*GRAPHS, "clrs-text")


WAYS: dict[str, Callable[..., Tensor]] = {
    "softmax": masked_softmax, "adaptive": adaptive_softmax, "perplexity": perplexity_softmax,
}  # fmt: skip


# Graphs

SMALLEST, LARGEST, SIZES = 4, 16, (16, 32, 64, 128, 256)
WIDTH, HEADS, ROUNDS = 64, 4, 8
STEPS, BATCH, RATE, ASKED = 3000, 32, 1e-3, 64


class Batch(NamedTuple):
    """nodes `(B, N, 2)`: whether it is the source, and its place; edges `(B, N, N)`: weights, 0 where there is none;
    parents `(B, N)`."""

    nodes: Tensor
    edges: Tensor
    parents: Tensor


def graphs(task: str, count: int, size: int, random: np.random.Generator) -> Batch:
    upper = np.triu(random.random((count, size, size)) < 0.5, 1)
    weights = np.triu(random.uniform(0.05, 1, (count, size, size)), 1) if task == "bellman-ford" else 1.0
    edges = upper * weights
    edges = edges + edges.swapaxes(1, 2)
    sources = random.integers(size, size=count)
    parents = np.stack([parents_of(task, one, source) for one, source in zip(edges, sources, strict=True)])
    nodes = np.stack([np.arange(size) == sources[:, None], np.tile(np.linspace(0, 1, size), (count, 1))], -1)
    return Batch(*(torch.from_numpy(x).float() for x in (nodes, edges)), torch.from_numpy(parents).long())


def parents_of(task: str, edges: np.ndarray, source: int) -> np.ndarray:
    """Of each node; itself, where there is none. Of several in a search by breadth the first counts."""
    depth, before = dijkstra(edges, indices=source, return_predecessors=True)
    if task == "bfs":
        nearer = (edges > 0) & (depth[None, :] == depth[:, None] - 1)
        before = np.where(nearer.any(1), nearer.argmax(1), -1)
    return np.where(before < 0, np.arange(len(edges)), before)


class Attending(nn.Module):
    """Nodes attend to their neighbors, `ROUNDS` times over with the same weights, and then point at one of them."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.norm = nn.Linear(2, WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.bias = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(1, HEADS)
        self.change = nn.Sequential(nn.Linear(2 * WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH))
        self.points, self.pointed, self.along = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(1, 1)

    def forward(self, batch: Batch, weigh: Callable[..., Tensor]) -> Tensor:
        """Scores of each node as a parent of each, `(B, N, N)`."""
        visible = (batch.edges > 0) | torch.eye(batch.edges.shape[1], dtype=torch.bool)
        bias = self.bias(batch.edges[..., None]).permute(0, 3, 1, 2)
        h = self.encode(batch.nodes)
        for _ in range(ROUNDS):
            q, k, v = (x.unflatten(-1, (HEADS, -1)).transpose(1, 2) for x in self.qkv(self.norm(h)).chunk(3, -1))
            weights = weigh(q @ k.mT * (WIDTH // HEADS) ** -0.5 + bias, -1, visible[:, None])
            read = (weights @ v).transpose(1, 2).flatten(2)
            h = h + self.change(torch.cat([self.norm(h), read], -1))
        h = self.norm(h)
        scores = self.points(h) @ self.pointed(h).mT * WIDTH**-0.5 + self.along(batch.edges[..., None])[..., 0]
        return scores.masked_fill(~visible, -torch.inf)


def on_graphs(task: str, way: str, seed: int) -> dict[str, dict[str, float]]:
    """Share of parents that are right by size, for each way of weighing that it is asked with."""
    with seeded(seed, task):
        model = Attending()
    random = np.random.default_rng((seed, GRAPHS.index(task)))
    optimizer = torch.optim.AdamW(model.parameters(), RATE, fused=True)
    for step in range(STEPS):
        optimizer.param_groups[0]["lr"] = RATE * min(1, (step + 1) / 100) * (1 - step / STEPS)
        batch = graphs(task, BATCH, int(random.integers(SMALLEST, LARGEST + 1)), random)
        loss = F.cross_entropy(model(batch, WAYS[way]).flatten(0, 1), batch.parents.flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    asked = {size: graphs(task, ASKED, size, np.random.default_rng((1000 + seed, size))) for size in SIZES}
    with torch.no_grad():
        return {other: {str(size): float((model(batch, WAYS[other]).argmax(-1) == batch.parents).float().mean())
                        for size, batch in asked.items()} for other in asked_with(way)}  # fmt: skip


def asked_with(way: str) -> list[str]:
    return list(WAYS) if way == "softmax" else [way]


# Text

LONGEST = 220
"""Bytes of a question with its answer that is learned from; longer ones are asked about."""
LM_WIDTH, LM_DEPTH, LM_STEPS, LM_BATCH, LM_RATE = 64, 3, 1500, 16, 2e-3
CUT = 800
"""Bytes of what is asked about at most."""


class Row(NamedTuple):
    tokens: Tensor
    answer: int
    """Bytes of the answer, at the end."""
    size: int


def rows_of(file: Path, longest: int) -> list[Row]:
    found = []
    for line in gzip.decompress(file.read_bytes()).splitlines():
        row = json.loads(line)
        if len(row["question"]) + len(row["answer"]) <= longest:
            tokens = ByteTokenizer().encode(row["question"] + row["answer"].strip() + "\n")
            found.append(Row(tokens, len(row["answer"].strip()) + 1, row["length"]))
    return found


def together(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens, what follows them, whether they exist, and whether what follows is of an answer; `(B, T)`."""
    steps = max(len(row.tokens) for row in rows) - 1
    tokens, after = (torch.zeros(len(rows), steps, dtype=torch.long) for _ in range(2))
    mask, told = (torch.zeros(len(rows), steps, dtype=torch.bool) for _ in range(2))
    for i, row in enumerate(rows):
        n = len(row.tokens) - 1
        tokens[i, :n], after[i, :n], mask[i, :n], told[i, n - row.answer : n] = row.tokens[:-1], row.tokens[1:], 1, 1
    return tokens, after, mask, told


def on_text(data: Path, way: str, seed: int) -> dict[str, dict[str, float]]:
    """Share of the bytes of answers that are foreseen, those before them given, by size."""
    train = rows_of(data / "clrs_text" / "train.jsonl.gz", LONGEST)
    options = {"num_heads": 4} | ({} if way == "softmax" else {"sharpen": way})
    with seeded(seed, "clrs-text"):
        model = LanguageModel(width=LM_WIDTH, depth=LM_DEPTH, mixer="FullAttention", mixer_options=options)
    random, optimizer = generator(seed, "rows"), torch.optim.AdamW(model.parameters(), LM_RATE, fused=True)
    by_length = sorted(range(len(train)), key=lambda i: len(train[i].tokens))
    for step in range(LM_STEPS):
        optimizer.param_groups[0]["lr"] = LM_RATE * min(1, (step + 1) / 100) * (1 - step / LM_STEPS)
        first = int(torch.randint(len(train) - LM_BATCH, (), generator=random))  # alike in length, for little padding
        tokens, after, mask, told = together([train[i] for i in by_length[first : first + LM_BATCH]])
        logits, _ = model(tokens, mask=mask)
        loss = model.nats(logits[told], after[told]).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    asked = [row for name in ("test_id", "test_ood") for row in rows_of(data / "clrs_text" / f"{name}.jsonl.gz", CUT)]
    return {other: right_by_size(model, other, asked) for other in asked_with(way)}


@torch.no_grad()
def right_by_size(model: LanguageModel, way: str, rows: Sequence[Row]) -> dict[str, float]:
    for block in model.stack.blocks:
        block.mixer.sharpen = None if way == "softmax" else WAYS[way]  # type: ignore[assignment]
    right: dict[int, list[float]] = {}
    for row in rows:
        tokens, after, mask, told = together([row])
        logits, _ = model(tokens, mask=mask)
        right.setdefault(row.size, []).append(float((logits.argmax(-1) == after)[told].float().mean()))
    return {str(size): statistics.fmean(values) for size, values in sorted(right.items())}


def run(data: Path, task: str, way: str, seed: int) -> Record:
    torch.set_num_threads(1)
    began = time.process_time()
    by_way = on_text(data, way, seed) if task == "clrs-text" else on_graphs(task, way, seed)
    mean = statistics.fmean(by_way[way].values())
    return {"mean": mean, "right": by_way, "cpu seconds": round(time.process_time() - began, 1)}


def work(tasks: Sequence[str], ways: Sequence[str], seeds: Sequence[int], data: Sequence[Path]) -> None:
    trials = trials_in(data[0])
    for task in tasks:
        for seed in seeds:
            for way in ways:
                trials.once(task=task, way=way, seed=seed)


def trials_in(data: Path) -> Trials:
    return Trials(FILE, partial(run, data))


# What is made of the runs.

HEAD = """# Sharper attention on larger problems

Written by `python benchmarks/sizes.py --draw` from the records in `docs/results/sizes.jsonl`; the head of the script
says what is learned. Right answers in percent, mean and standard deviation over {seeds} seeds. *at inference*: trained
with softmax, and asked with what sharpens.
"""
OF = {
    "bfs": "Parents in a search by breadth, by nodes; trained on 4 to 16.",
    "bellman-ford": "Parents in the tree of shortest paths, by nodes; trained on 4 to 16.",
    "clrs-text": "Bytes of answers, those before them given, by size; trained on 4 to 12, and on what is short.",
}


def shares(records: Sequence[Record], task: str, seeds: Sequence[int]) -> dict[str, dict[str, list[float]]]:
    """By what was trained and asked, by size, over seeds."""
    found: dict[str, dict[str, list[float]]] = {}
    for record in records:
        key = record["key"]
        if key["task"] != task or key["seed"] not in seeds:
            continue
        for asked, sizes in record["right"].items():
            name = asked if asked == key["way"] else f"{asked}, at inference"
            for size, share in sizes.items():
                found.setdefault(name, {}).setdefault(size, []).append(share)
    return found


def spread(values: Sequence[float]) -> str:
    apart = f" ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{100 * statistics.fmean(values):.1f}{apart}"


def draw(records: Sequence[Record], seeds: Sequence[int]) -> None:
    parts = [HEAD.format(seeds=len(seeds))]
    for task in TASKS:
        if rows := shares(records, task, seeds):
            sizes = list(next(iter(rows.values())))
            parts += [f"\n## {task}\n\n{OF[task]}\n", f"| | {' | '.join(sizes)} |", "| --- " * (len(sizes) + 1) + "|"]
            parts += [f"| {name} | {' | '.join(spread(by[size]) for size in sizes)} |" for name, by in rows.items()]
    PAGE.write_text("\n".join(parts) + "\n")


def ledger(records: Sequence[Record], seeds: Sequence[int]) -> None:
    for task in TASKS:
        rows = shares(records, task, seeds)
        if not rows or any(len(values) < len(seeds) for by in rows.values() for values in by.values()):
            continue
        largest = list(rows["softmax"])[-1]
        ahead = {name: [a - b for a, b in zip(by[largest], rows["softmax"][largest], strict=True)]
                 for name, by in rows.items() if name.startswith("adaptive")}  # fmt: skip
        append(
            f"{task}: attention at the published adaptive temperature, trained so or at inference alone, is right more "
            f"often than softmax at size {largest} with each seed, trained at small sizes",
            "python benchmarks/sizes.py --data FOLDER; --ledger",
            {**{f"{name}, {size}": spread(by[size]) for name, by in rows.items() for size in by}, "seeds": len(seeds)},
            holds=any(min(gains) > 0 for gains in ahead.values()),
        )


if __name__ == "__main__":
    trials_in(Path()).command(work, draw, ledger, tasks=TASKS, ways=list(WAYS), seeds=SEEDS, data=[Path("shared/data")])
