"""Rows per second of the default small model on one core, learning at every row and in chunks of 64.

python benchmarks/throughput.py --repeats 5

Rows come from a generator, so that nothing but the model, its learner and the stream are timed; wall-clock
time of the whole loop, one thread, medians over repeats that take turns.
"""

import argparse
import statistics
import time

import torch
from _ledger import append

from pliant.recipes import series
from pliant.recipes.panel import Panel
from pliant.streams import Series


def rate(chunk: int, rows: int) -> dict[str, float]:
    """One pass over `rows` rows after a warm-up: rows per second, and percentiles of a call in milliseconds."""
    config = series.SeriesConfig(stream="regimes", rows=rows, chunk=chunk, opponents=())
    source = series.source(config)
    life = series.life(config, source)
    panel: Panel = life.panel
    member, stream = panel.learner.timed, Series(source, chunk=chunk, limit=rows)
    output, began, done = None, 0.0, 0
    while batch := stream.send(output):
        for answer in batch.answers:
            panel.learner.window.update(answer, member.said(answer))
            member.learn(answer)
        output = None if batch.question is None else member.predict(batch.question)
        if not began and stream.row >= rows // 5:
            began, done = time.perf_counter(), stream.row
    seconds = time.perf_counter() - began
    found = {"rows per second": (rows - done) / seconds}
    for call, times in member.latency.items():
        found |= {f"{call} p50 ms": 1000 * times.quantile(0.5), f"{call} p99.9 ms": 1000 * times.quantile(0.999)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    aims = {1: 1000, 64: 10_000}
    runs: dict[int, list[dict[str, float]]] = {chunk: [] for chunk in aims}
    for _ in range(repeats):
        for chunk in aims:
            runs[chunk].append(rate(chunk, 10_000 if chunk == 1 else 100_000))
    for chunk, aim in aims.items():
        figures = {name: round(statistics.median(run[name] for run in runs[chunk]), 3) for name in runs[chunk][0]}
        rates = [run["rows per second"] for run in runs[chunk]]
        figures |= {"slowest": round(min(rates)), "fastest": round(max(rates)), "repeats": repeats}
        print(chunk, figures)
        how = "learning at every row" if chunk == 1 else f"with --chunk {chunk}"
        append(f"At least {aim:,} rows per second on one core, batch 1, {how}",
               f"python benchmarks/throughput.py --repeats {repeats}", figures,
               holds=figures["rows per second"] >= aim)  # fmt: skip


if __name__ == "__main__":
    main()
