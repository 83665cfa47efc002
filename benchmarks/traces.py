"""Learning rules beside each other: throughput, direction of gradients, credit at a distance.

python benchmarks/traces.py throughput      # steps per second, width 128, two layers, batch 1, one core
python benchmarks/traces.py cosines         # gradients of 1 to 8 layers against back-propagation through all
python benchmarks/traces.py distance --cell copy:100:trace:0    # one cell of docs/results/traces.jsonl
python benchmarks/traces.py distance --minutes 60               # the cells that are missing
python benchmarks/traces.py draw            # docs/rules.svg, and the figures in docs/rules.md
python benchmarks/traces.py ledger          # lines of docs/ledger.jsonl about what is there
python benchmarks/traces.py life --steps 10000000 --folder DIR  # a long life, killed ten times: docs/results/life.jsonl

One thread throughout.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from random import Random
from typing import Any

import torch
from _ledger import DOCS, append
from _traces_page import draw
from torch import Tensor, nn

from pliant.core import Answer, Question, Record, categorical_nats, generator, nbytes, seeded
from pliant.core.columns import Column, Columns
from pliant.learn import Learner, Life, Rule, bptt, immediate, trace, trace_bytes
from pliant.mixers import GatedLRU
from pliant.models import SequenceClassifier
from pliant.models.table import TableModel
from pliant.optim import adamw

RESULTS = DOCS / "results" / "traces.jsonl"
RULES: dict[str, Callable[[], Rule]] = {
    "immediate": immediate,
    "bptt 1": lambda: bptt(1),
    "bptt 32": lambda: bptt(32),
    "bptt 256": lambda: bptt(256),
    "trace 1": lambda: trace(1),
    "trace": trace,
    "trace exact": lambda: trace(policy={"linear_x": "exact"}),
}


DEFAULT = {"num_heads": 4, "depth": 2}
MIXERS = {"RGLRU": {"num_heads": 4}, "LRU": {}, "S6": {}, "MultiScaleSSM": {}}

# Steps per second.


def table_learner(rule: Rule, mixer: str = "GatedLRU", **options: Any) -> Learner:
    columns = Columns("classify", tuple(Column(f"x{i}", "number", ()) for i in range(8)), ("t",), ("0", "1"),
                      label_as_input=False)  # fmt: skip
    with seeded(0):
        model = TableModel(columns, width=128, depth=2, mixer=mixer, mixer_options=options)
    return Learner(model, adamw(model, 1e-3), rule, streams=1)


def timed(learner: Learner, steps: int, start: int) -> float:
    """Steps per second of processor time of asking and learning, one row at a time."""
    random = generator(start, "rows")
    targets = torch.randint(2, (steps, 1, 1), generator=random)
    inputs = torch.randn(steps, 1, 1, 9, generator=random, dtype=torch.float64)
    inputs[..., -1] = targets
    yes, rows = torch.ones(1, 1, dtype=torch.bool), torch.arange(1)
    began = time.process_time()
    for t in range(steps):
        learner.predict(Question(inputs[t], ~yes, yes, start + t, rows))
        learner.learn(Answer(targets[t], yes, yes, start + t, rows))
    return steps / (time.process_time() - began)


def throughput(rounds: int) -> None:
    names = ["immediate", "trace 1", "trace", "bptt 32"]
    learners = {name: table_learner(RULES[name](), **DEFAULT) for name in names}
    figures: dict[str, Any] = {f"steps a second, {name}": round(rate) for name, rate in rates(learners, rounds).items()}
    figures["KB of traces"] = round(trace_bytes(learners["trace"].model, trace()) / 1000)
    figures["rounds"] = rounds
    command = f"python benchmarks/traces.py throughput --rounds {rounds}"
    append("trace(): at least 2,000 steps a second, width 128, two layers, batch 1, learning from every step", command,
           figures, holds=figures["steps a second, trace"] >= 2000,
           note="one update for each chunk of 16 steps; trace 1 makes one at every step")  # fmt: skip
    append("The same with an update at every step, trace(1)", command, figures,
           holds=figures["steps a second, trace 1"] >= 2000,
           note="half of a step are AdamW, clipping and other passes over 320,000 parameters and their gradients, "
           "which do not fit the nearest caches; the other half is Python")  # fmt: skip
    append("A step of trace() takes no more than three of bptt(1)", command, figures,
           holds=figures["steps a second, trace 1"] * 3 >= figures["steps a second, immediate"])  # fmt: skip
    figures = {}
    for mixer, options in MIXERS.items():
        learners = {name: table_learner(RULES[name](), mixer, **options) for name in ("bptt 1", "trace 1", "trace")}
        found = rates(learners, rounds)
        figures |= {f"{mixer}: ms a step, {name}": round(1000 / rate, 2) for name, rate in found.items()}
        figures[f"{mixer}: trace 1 / bptt 1"] = round(found["bptt 1"] / found["trace 1"], 2)
    append("A step of trace(1) takes no more than three of bptt(1), with RGLRU, LRU, S6 and MS-SSM as well", command,
           figures | {"rounds": rounds},
           holds=all(figures[f"{mixer}: trace 1 / bptt 1"] <= 3 for mixer in MIXERS))  # fmt: skip


def rates(learners: dict[str, Learner], rounds: int) -> dict[str, float]:
    """Steps a second, medians of interleaved rounds."""
    found: dict[str, list[float]] = {name: [] for name in learners}
    for i in range(rounds + 1):  # the first one warms up
        for name, learner in learners.items():
            rate = timed(learner, 200 if name == "bptt 32" else 600, 1000 * i)
            found[name] += [rate] if i else []
    return {name: statistics.median(each) for name, each in found.items()}


# Directions of gradients.

GROUPS = {"recurrent": ("mixer.lru", "mixer.conv"), "input maps": ("mixer.linear_x",), "all": ("",)}


def gradient(
    rule: Rule | None, model: SequenceClassifier, x: Tensor, targets: Tensor, use: Tensor
) -> dict[str, Tensor]:
    """Of the sum of all losses in use; None means through the whole past."""
    steps, rows = x.shape[1], torch.arange(len(x))
    names = dict(model.named_parameters())
    if rule is None:
        output, _ = model(x, model.init_state(len(x)))
        total = model.nats(output[:, use], targets[:, use]).sum()
        return dict(zip(names, torch.autograd.grad(total, list(names.values())), strict=True))
    found = {name: torch.zeros_like(p) for name, p in names.items()}
    optimizer, learned, last = torch.optim.SGD(model.parameters(), 0.0), list[int](), list[Tensor]()
    optimizer.register_step_pre_hook(lambda *_: last.extend(p.grad.clone() for p in names.values()))  # type: ignore[union-attr]
    learner = Learner(model, optimizer, rule, clip_norm=None)
    yes, no = torch.ones(len(x), 1, dtype=torch.bool), torch.zeros(len(x), 1, dtype=torch.bool)
    for t in range(steps):
        learner.predict(Question(x[:, t : t + 1], no, yes, t, rows))
        record = learner.learn(Answer(targets[:, t : t + 1], yes, yes if use[t] else no, t, rows))
        if record.outcome == "updated":
            learned.append(record.learned)
            for name, g in zip(names, last, strict=True):
                found[name] += record.learned * g
        last.clear()
    assert sum(learned) == len(x) * int(use.sum())
    return found


def cosines(seeds: int) -> None:
    """With losses at all of 256 steps, and with one at the last of 512."""
    for last in (False, True):
        steps = 512 if last else 256
        rules: dict[str, Rule] = {"bptt 1": bptt(1), "bptt 32": bptt(32)} | ({"bptt 256": bptt(256)} if last else {})
        rules |= {f"trace {chunk}": trace(chunk) for chunk in (1, 16, 32)}
        figures: dict[str, Any] = {}
        for depth in (1, 2, 4, 8):
            found: dict[tuple[str, str], list[float]] = {}
            for seed in range(seeds):
                with seeded(seed):
                    options = {"num_heads": 2, "depth": depth}
                    model = SequenceClassifier(4, 2, width=16, depth=depth, mixer_options=options).double()
                    model.head.linear.weight.data.normal_(std=0.25)
                random = generator(seed, "cosines")
                x = torch.randn(1, steps, 4, generator=random, dtype=torch.float64)
                targets = torch.randint(2, (1, steps), generator=random)
                use = torch.arange(steps) >= (steps - 1 if last else 0)
                whole = gradient(None, model, x, targets, use)
                for name, rule in rules.items():
                    own = gradient(rule, model, x, targets, use)
                    for group, begins in GROUPS.items():
                        one, two = (torch.cat([g.flatten() for n, g in of.items() if any(b in n for b in begins)])
                                    for of in (own, whole))  # fmt: skip
                        found.setdefault((name, group), []).append(float(torch.cosine_similarity(one, two, dim=0)))
            for (name, group), values in found.items():
                figures[f"{name}, {depth} layers, {group}"] = round(statistics.mean(values), 3)
            print(last, depth, {k: v for k, v in figures.items() if f"{depth} layers" in k}, flush=True)
        write({"kind": "cosines", "last": last, "seeds": seeds, "steps": steps, "figures": figures})


# Credit at a distance.


Episode = tuple[Tensor, Tensor, Tensor, Tensor]
"""Inputs `(B, L, 3)`: a bit as ±1 where it counts and noise elsewhere, a mark where it counts, a mark where it is asked
for; targets; use; reset."""


def episode(marked: Sequence[int], asked: Sequence[int], length: int, streams: int, random: torch.Generator) -> Episode:
    """Bits at `marked`, asked for in turn, in noise that adds up to twice a bit: gates have to learn what to let in."""
    bits = torch.randint(2, (streams, length), generator=random)
    x, targets, use = (
        torch.zeros(streams, length, 3),
        torch.zeros(streams, length, dtype=torch.int64),
        torch.zeros(length),
    )
    x[..., 0] = torch.randn(streams, length, generator=random) * 2 * length**-0.5
    x[:, marked, 0], x[:, marked, 1], x[:, asked, 2] = 2.0 * bits[:, marked] - 1, 1.0, 1.0
    targets[:, asked], use[asked] = bits[:, marked], 1
    return x, targets, use.bool().expand(streams, -1), (torch.arange(length) == 0).expand(streams, -1)


def recall(distance: int, streams: int, random: torch.Generator) -> Episode:
    """One marked bit near the beginning, asked for `distance` steps later."""
    return episode([2], [distance + 2], distance + 4, streams, random)


def copying(distance: int, streams: int, random: torch.Generator) -> Episode:
    """Three marked bits, said again `distance` steps later."""
    return episode([2, 3, 4], [distance + 2, distance + 3, distance + 4], distance + 6, streams, random)


def questions(task: str, distance: int, streams: int, seed: int, steps: int) -> Iterator[tuple[Tensor, ...]]:
    """Episodes one after the other, 16 steps at a time."""
    random, held = generator(seed, task), tuple[Tensor, ...]()
    for _ in range(steps // LENGTH):
        while not held or held[0].shape[1] < LENGTH:
            new = TASKS[task](distance, streams, random)
            held = tuple(torch.cat(pair, 1) for pair in zip(held, new, strict=True)) if held else new
        yield tuple(part[:, :LENGTH] for part in held)
        held = tuple(part[:, LENGTH:] for part in held)


class Unit(nn.Module):
    """Three inputs, a gated LRU of 16 units that remember from a quarter of the distance to four times, two classes.

    It reads the inputs by a map and a convolution of its own, so that all that comes before its state is traced.
    """

    def __init__(self, distance: int, units: int = 16):
        super().__init__()
        # The decay of a unit is about the fourth power of its radius.
        radii = (1 - 4 / max(distance, 8)) ** 0.25, (1 - 0.25 / distance) ** 0.25
        self.unit = GatedLRU(3, units, 2, 4, *radii)
        self.head = nn.Linear(self.unit.width, 2)

    def init_state(self, batch: int, extra: tuple[int, ...] = ()) -> Any:
        return self.unit.init_state(batch, extra)

    def forward(self, x: Tensor, state: Any, *, reset: Tensor, mask: Tensor) -> tuple[Tensor, Any]:
        h, state = self.unit(x, state, reset=reset, mask=mask)
        return self.head(h), state

    def nats(self, output: Tensor, targets: Tensor) -> Tensor:
        return categorical_nats(output, targets)


LENGTH, STREAMS, RATE = 16, 64, 3e-2
"""Steps of a question; of 16 streams the gradient is too noisy at 1,000 steps, that through the whole past as well."""
TASKS = {"recall": recall, "copy": copying}
EPISODES = {10: 500, 100: 400, 1000: 400, 10_000: 100}
"""Of a cell, as many for each rule; each is one update."""


def cell(task: str, distance: int, rule: str, seed: int, streams: int = STREAMS) -> dict[str, Any]:
    """Accuracy over the last fifth of a life, processor time of a step, and bytes that learning holds."""
    with seeded(seed):
        model = Unit(distance)
    learner = Learner(model, torch.optim.Adam(model.parameters(), RATE), RULES[rule](), streams=streams)
    steps, rows = EPISODES[distance] * distance, torch.arange(streams)
    yes, right, answers, began = torch.ones(streams, LENGTH, dtype=torch.bool), 0, 0, time.process_time()
    for i, (x, targets, use, reset) in enumerate(questions(task, distance, streams, seed, steps)):
        output = learner.predict(Question(x, reset, yes, i, rows))
        if i * LENGTH >= 0.8 * steps:
            right += int((output.argmax(-1) == targets)[use].sum())
            answers += int(use.sum())
        learner.learn(Answer(targets, yes, use, i, rows))
    seconds = time.process_time() - began
    return {"kind": "distance", "task": task, "distance": distance, "rule": rule, "seed": seed,
            "steps": steps, "streams": streams, "accuracy": right / max(1, answers), "answers": answers,
            "bytes": bytes_held(learner), "microseconds a step": 1e6 * seconds / steps}  # fmt: skip


def bytes_held(learner: Learner) -> int:
    """Of traces, of the state before each question that is held, and of what autograd keeps of the steps of a pass."""
    traces, rule = learner.traces, learner.rule
    steps = traces.rule.chunk if traces else rule.window
    assert learner.streams
    kept = activations(learner.model, steps, learner.streams)
    return (traces.nbytes() if traces else 0) + kept + -(-steps // LENGTH) * nbytes(learner.memory)


def activations(model: nn.Module, steps: int, streams: int) -> int:
    """Bytes that autograd keeps of so many steps, parameters and flags not counted."""
    kept: dict[int, Tensor] = {}

    def keep(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)  # held, so that its place is not given away
        return x

    no = torch.zeros(streams, steps, dtype=torch.bool)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        output, _ = model(torch.randn(streams, steps, 3), model.init_state(streams), reset=no, mask=~no)
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert output.requires_grad
    return sum(
        x.untyped_storage().nbytes() for place, x in kept.items() if place not in own and x.dtype.is_floating_point
    )


def cells() -> Iterator[tuple[str, int, str, int]]:
    """Three seeds of recall, one of what takes long or is slow: copy at 1,000 steps, 10,000 steps, `bptt 1`."""
    order = ["trace exact", "trace", "bptt 32", "bptt 256", "bptt 1"]
    for seed, distance, task, rule in product(range(3), EPISODES, TASKS, order):
        rare = rule == "bptt 1" or distance == 10_000 or (distance == 1000 and (task == "copy" or rule == "trace"))
        left_out = (rule == "bptt 1" and distance > 100) or (distance == 10_000 and (task == "copy" or rule == "trace"))
        if not left_out and not (rare and seed):
            yield task, distance, rule, seed


def known(file: Path = RESULTS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def write(record: dict[str, Any], to: Path = RESULTS) -> None:
    to.parent.mkdir(exist_ok=True)
    with open(to, "a") as file:
        file.write(json.dumps(record) + "\n")


def distances(minutes: float) -> None:
    done = {(r["task"], r["distance"], r["rule"], r["seed"]) for r in known() if r["kind"] == "distance"}
    for which in cells():
        if which not in done and time.process_time() < 60 * minutes:
            record = cell(*which)
            print(record, flush=True)
            write(record)


def ledger() -> None:
    _ledger_of_life()  # before anything else has been in memory
    for task in TASKS:
        records = [r for r in known() if r["kind"] == "distance" and r["task"] == task]
        figures: dict[str, Any] = {}
        for distance, rule in sorted({(r["distance"], r["rule"]) for r in records}):
            own = [r["accuracy"] for r in records if (r["distance"], r["rule"]) == (distance, rule)]
            figures[f"{distance} steps, {rule}"] = [round(one, 3) for one in own]
        rules = {r["rule"] for r in records}
        size = {rule: max(r["bytes"] / r["streams"] for r in records if r["rule"] == rule) for rule in rules}
        figures |= {f"KB a stream, {rule}": round(size[rule] / 1000, 1) for rule in size}
        figures |= {f"microseconds a step, {rule}": round(time_of(records, rule)) for rule in rules}
        far = figures.get("1000 steps, trace exact", [0])
        append(f'{task}: trace(policy={{"linear_x": "exact"}}) gives credit 1,000 steps back, keeps less from step to '
               "step than bptt(32), and a step takes at most three of bptt(1)",
               "python benchmarks/traces.py distance; ledger", figures,
               holds=min(far) > 0.95 and size["trace exact"] < size["bptt 32"]
               and time_of(records, "trace exact") <= 3 * time_of(records, "bptt 1"),
               note="accuracy over the last fifth of a life by seed, chance 0.5; a gated LRU of 16 units, 64 streams, "
               f"{EPISODES[1000]} episodes at 1,000 steps, {EPISODES[10_000]} at 10,000")  # fmt: skip
    peaks = {rule: round(peak(rule) / 1e6, 2) for rule in ("trace", "trace exact", "bptt 32", "bptt 1")}
    append("An update of trace() takes less memory at its peak than one of bptt(32)",
           "python benchmarks/traces.py ledger",
           {f"MB, {rule}": size for rule, size in peaks.items()}, holds=peaks["trace exact"] < peaks["bptt 32"],
           note="what torch allocates above what it held before a question and its answer; recall at 100 steps, 16 "
           "units, 64 streams, questions of 16 steps")  # fmt: skip
    for record in known():
        if record["kind"] == "cosines":
            where = "one loss, at the last of 512 steps" if record["last"] else "losses at all of 256 steps"
            short = {k: v for k, v in record["figures"].items() if "recurrent" in k}
            holds = all(short[f"trace 16, {d} layers, recurrent"] > short[f"bptt 32, {d} layers, recurrent"]
                        for d in (1, 2, 4, 8))  # fmt: skip
            append(f"The gradient of trace(16) is closer to that through the whole past than that of bptt(32); {where}",
                   f"python benchmarks/traces.py cosines --seeds {record['seeds']}; ledger", short, holds=holds,
                   note="cosines of gates, decay and convolution; width 16, at initialization")  # fmt: skip


def time_of(records: Sequence[dict[str, Any]], rule: str) -> float:
    """The median over cells in microseconds, of a step of all streams."""
    return statistics.median(r["microseconds a step"] for r in records if r["rule"] == rule)


def peak(rule: str) -> int:
    """Bytes that torch has allocated, at most, above what it held before a question and its answer."""
    with seeded(0):
        model = Unit(1000)
    learner = Learner(model, torch.optim.SGD(model.parameters(), 1e-3), RULES[rule](), streams=STREAMS)
    yes, rows = torch.ones(STREAMS, LENGTH, dtype=torch.bool), torch.arange(STREAMS)
    most = 0
    for i, (x, targets, use, reset) in enumerate(questions("recall", 100, STREAMS, 0, LENGTH * 30)):
        watching = torch.profiler.profile(profile_memory=True) if i > 20 else nullcontext()  # what is made first stays
        with watching as profiled:
            learner.predict(Question(x, reset, yes, i, rows))
            learner.learn(Answer(targets, yes, use, i, rows))
        events = profiled.profiler.kineto_results.events() if i > 20 else []
        held = 0
        for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
            held += event.nbytes()
            most = max(most, held)
    return most


# A long life.

LIFE = DOCS / "results" / "life.jsonl"
EVERY = 100_000


def live(steps: int, folder: Path) -> None:
    """Memory, time per step and norms of traces along a life that may be killed at any moment."""
    this = _life()
    if folder.exists() and any(folder.iterdir()):
        this.load(folder)
    began, nats, updates = time.process_time(), 0.0, 0
    while this.stream.step < steps:
        record = _step(this)
        if record.outcome == "updated":
            nats, updates = nats + record.nats, updates + 1
        if this.stream.step % EVERY == 0:
            seconds, traces = time.process_time() - began, this.learner.traces
            assert traces is not None
            squares = (float(e.square().sum()) for part in traces.values.values() for e in part.values())
            figures = {"step": this.stream.step, "process": os.getpid(), "traces": traces.nbytes(),
                      "norm": math.sqrt(sum(squares)), "nats": nats / updates,
                      "resident": _resident(),
                      "microseconds a step": 1e6 * seconds / EVERY}  # fmt: skip
            this.save(folder)
            write(figures, LIFE)
            began, nats, updates = time.process_time(), 0.0, 0


def _life() -> Life:
    with seeded(0):
        model = SequenceClassifier(3, 2, width=16, depth=2, mixer_options={"num_heads": 2})
    return Life(learner=Learner(model, adamw(model, 1e-3), trace(), streams=1), stream=Count())


def _step(this: Life) -> Record:
    """One question and its answer."""
    t, rows = this.stream.step, torch.arange(1)
    yes, no = torch.ones(1, 1, dtype=torch.bool), torch.zeros(1, 1, dtype=torch.bool)
    x = torch.randn(1, 1, 3, generator=generator(t, "life"))
    this.learner.predict(Question(x, no, yes, t, rows))
    this.stream.step += 1
    return this.learner.learn(Answer((x[..., 0] > 0).long(), yes, yes, t, rows))


def _resident() -> int:
    """Bytes, counted page by page; what /proc/self/statm has is off by up to 32 pages a processor."""
    return 1024 * int(next(line for line in open("/proc/self/smaps_rollup") if line.startswith("Rss:")).split()[1])


def life(steps: int, folder: Path, kills: int) -> None:
    """Kills the process `kills` times, each time somewhere between two places where it is saved; then lets it end."""
    command = [sys.executable, __file__, "live", "--steps", str(steps), "--folder", str(folder)]
    random, began = Random(0), len(known(LIFE))
    for i in range(kills):
        process = subprocess.Popen(command)
        while process.poll() is None and len(known(LIFE)) - began < (i + 1) * steps / EVERY / (kills + 1):
            time.sleep(1)
        time.sleep(random.uniform(0, 30))
        process.kill()
        print(f"killed, {process.wait()}, at {known(LIFE)[-1]['step']:,} steps", flush=True)
    subprocess.run(command, check=True)


def _ledger_of_life() -> None:
    """From the records of the newest run; what a kill had cut off was lived again."""
    rows = list({row["step"]: row for row in known(LIFE)}.values())
    if not rows:
        return
    first: dict[int, int] = {}
    for row in rows:  # the first of each process warms up
        first.setdefault(row["process"], row["step"])
    warm = [row for row in rows if row["step"] > first[row["process"]]]
    growth = [max(own) - min(own) for process in first
              if (own := [row["resident"] for row in warm if row["process"] == process])]  # fmt: skip
    tenth = max(1, len(warm) // 10)
    micro = [statistics.median(row["microseconds a step"] for row in part) for part in (warm[:tenth], warm[-tenth:])]
    norms, nats = [row["norm"] for row in rows], [row["nats"] for row in rows]
    part = max(1, len(norms) // 10)
    tenths = [round(statistics.median(norms[i : i + part]), 1) for i in range(0, len(norms), part)]
    same = len({row["traces"] for row in rows}) == 1
    stepping = resting()
    append(f"A life of {rows[-1]['step']:,} steps, killed and resumed {len(first) - 1} times: memory flat to the byte "
           "while it steps, no drift of time per step, traces finite", "python benchmarks/traces.py life; ledger",
           {"KB of traces": rows[0]["traces"] / 1000, "growth of resident memory over 80,000 steps, bytes": stepping,
            "over the life of a process, that is saved ten times": max(growth),
            "microseconds a step, first tenth": micro[0], "last tenth": micro[1],
            "norm of traces, median of each tenth": tenths, "most": max(norms),
            "nats an answer, first": nats[0], "last": nats[-1]},
           holds=same and stepping == 0 and micro[1] < 1.1 * micro[0] and all(map(math.isfinite, norms)),
           note="a process at a time, beside other work on the machine; a record each 100,000 steps. What grows within "
           "a process comes from saving. Norms of traces grow with the maps into the recurrences")  # fmt: skip


def resting() -> int:
    """Bytes by which resident memory grows over 80,000 steps, after 40,000, where nothing is saved."""
    this, sizes = _life(), list[int]()
    for steps in (40_000, 80_000):
        for _ in range(steps):
            _step(this)
        sizes.append(_resident())
    return sizes[1] - sizes[0]


class Count:
    """How far a stream is."""

    step = 0

    def state_dict(self) -> dict[str, Any]:
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.step = state["step"]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("what", choices=["throughput", "cosines", "distance", "draw", "ledger", "life", "live"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--cell")
    parser.add_argument("--steps", type=int, default=10_000_000)
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--folder", type=Path, default=Path("run/traces"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.cell:
        task, distance, rule, seed = given.cell.split(":")
        write(cell(task, int(distance), rule, int(seed)))
        return
    {"throughput": lambda: throughput(given.rounds), "cosines": lambda: cosines(given.seeds),
     "distance": lambda: distances(given.minutes), "draw": lambda: draw(known()), "ledger": ledger,
     "life": lambda: life(given.steps, given.folder, given.kills),
     "live": lambda: live(given.steps, given.folder)}[given.what]()  # fmt: skip


if __name__ == "__main__":
    main()
