"""What sharp attention costs; and the table of max retrieval, its figure and docs/sharp.md.

python benchmarks/sharp.py overhead        # time and largest array of attention over 4,096 keys, CPU, one thread
python benchmarks/sharp.py take FOLDER ... # finished runs of pliant reproduce sharp, into docs/results/sharp.json
python benchmarks/sharp.py fresh           # three seeds that nothing was chosen on
python benchmarks/sharp.py page            # draw the figure and the tables of docs/sharp.md again

Overhead: attention in strips with weights by softmax and by each of the others in turn, medians of processor time over
rounds in one process; beside it the fused attention of torch, which keeps no logits.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from _ledger import DOCS, append
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pliant.core import generator
from pliant.kernels import adaptive_softmax, perplexity_softmax, sharp_attention, ssmax
from pliant.recipes.reproduce import Trial
from pliant.recipes.sharp import PAPER, SIZES, STEPS, judge, mean, run
from pliant.report.labels import label_ends
from pliant.report.paint import Line, svg
from pliant.report.style import BLUE, DASHED, DOTTED, ORANGE, PALETTE

FRESH, FRESH_SEEDS = DOCS / "results" / "sharp-fresh.jsonl", (11, 12, 13)
FILE, PAGE, FIGURE = DOCS / "results" / "sharp.json", DOCS / "sharp.md", DOCS / "sharp.svg"
KEYS, SIZE, ROUNDS = 4096, 64, 15
MOST = 1.8
"""Times the attention with softmax."""


def softmax(logits: Tensor, dim: int = -1, mask: Tensor | None = None) -> Tensor:
    return (logits if mask is None else logits.masked_fill(~mask, -torch.inf)).softmax(dim)


WAYS: dict[str, Callable[..., Tensor]] = {
    "softmax": softmax, "adaptive": adaptive_softmax, "perplexity": perplexity_softmax, "ssmax": ssmax,
}  # fmt: skip


class Largest(TorchDispatchMode):
    """Notes the elements of the largest tensor that is made within."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for x in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(x, Tensor):
                self.elements = max(self.elements, x.numel())
        return made


def inputs(keys: int) -> list[Tensor]:
    random = generator(0, "overhead")
    return [torch.randn(1, keys, SIZE, generator=random) for _ in range(3)]


def overhead() -> dict[str, Any]:
    """Medians of processor time in milliseconds, ratios to softmax, and the largest array of one strip."""
    torch.set_num_threads(1)
    q, k, v = inputs(KEYS)
    calls: dict[str, Callable[[], Any]] = {
        f"{name}{' causal' * causal}": partial(sharp_attention, q, k, v, way, causal=causal)
        for causal in (False, True)
        for name, way in WAYS.items()
    }
    calls["fused softmax of torch"] = partial(F.scaled_dot_product_attention, q[None], k[None], v[None])
    spent: dict[str, list[float]] = {name: [] for name in calls}
    with torch.no_grad():
        for round_ in range(ROUNDS + 1):
            for name, call in calls.items():
                began = time.process_time()
                call()
                if round_:  # the first compiles
                    spent[name].append(1e3 * (time.process_time() - began))
    found: dict[str, Any] = {f"{name}_ms": round(statistics.median(times), 2) for name, times in spent.items()}
    for causal in ("", " causal"):
        for name in ("adaptive", "perplexity", "ssmax"):
            ratios = [a / b for a, b in zip(spent[name + causal], spent["softmax" + causal], strict=True)]
            found[f"{name}{causal}_ratio"] = round(statistics.median(ratios), 3)
    for keys in (KEYS, 4 * KEYS):
        q, k, v = inputs(keys)
        with torch.no_grad(), Largest() as largest:
            sharp_attention(q[:, :256], k, v)
            found[f"largest_array_at_{keys}_keys"] = largest.elements
    found["whole_logits"] = (4 * KEYS) ** 2
    return found


def tell_overhead(found: dict[str, Any]) -> None:
    shown = {name: found[name] for name in found if name.endswith("ratio")}
    append(
        f"adaptive attention takes at most {MOST} times as long as softmax in the same strips, at {KEYS:,} keys",
        "python benchmarks/sharp.py overhead",
        shown | {"softmax_ms": found["softmax_ms"], "adaptive_ms": found["adaptive_ms"],
                 "fused_softmax_of_torch_ms": found["fused softmax of torch_ms"]},
        holds=max(found["adaptive_ratio"], found["adaptive causal_ratio"]) <= MOST,
        note="processor time, one thread, forward",
    )  # fmt: skip
    append(
        "sharp attention keeps a strip of logits and no more",
        "python benchmarks/sharp.py overhead",
        {name: found[name] for name in found if name.startswith(("largest", "whole"))},
        holds=found[f"largest_array_at_{4 * KEYS}_keys"] <= 4 * found[f"largest_array_at_{KEYS}_keys"],
        note="numbers of the largest array; logits of all queries at the second length beside it",
    )


# Max retrieval


def take(*folders: Path) -> None:
    """Trials of finished runs, a seed in each or several, into a file; each claim is a line of the ledger."""
    lines = [line for folder in folders for line in (folder / "trials.jsonl").read_text().splitlines()]
    rows = [json.loads(line) for line in lines]
    trials = [dict(zip(("name", "settings", "seed"), json.loads(row["key"]), strict=True)) | {"result": row["result"]}
              for row in rows]  # fmt: skip
    FILE.write_text(json.dumps({"trials": trials}, indent=1) + "\n")
    steps = {trial.settings["steps"] for trial, _ in results()}
    scale = next(name for name, (_, updates) in STEPS.items() if steps == {updates})
    for claim in judge(results()):
        append(
            claim.claim, f"pliant reproduce sharp --scale {scale}; python benchmarks/sharp.py take FOLDER",
            {"ours": claim.ours, "spread": claim.spread, "paper": claim.paper, "seeds": claim.seeds},
            holds=claim.verdict == "reproduced", note=claim.verdict,
        )  # fmt: skip


def results() -> list[tuple[Trial, Any]]:
    """Trials with their results."""
    return [(Trial(row["name"], row["settings"], row["seed"]), row["result"])
            for row in json.loads(FILE.read_text())["trials"]]  # fmt: skip


def table(found: list[tuple[Trial, Any]]) -> str:
    """Accuracy by size, of the paper and of both heads with every weighting, means over seeds."""
    lines = ["| | " + " | ".join(f"{size:,}" for size in SIZES) + " |", "| --- |" + " ---: |" * len(SIZES)]
    lines += [_line(f"paper, {name}", values) for name, values in PAPER.items()]
    for head in ("plain", "refit"):
        lines += [_line(f"{head}, {name}", mean(found, head, name)) for name in _ways(found, head)]
    return "\n".join(lines)


def _ways(found: list[tuple[Trial, Any]], head: str) -> list[str]:
    """Weightings that all of these trials have."""
    return [name for name in found[0][1][head] if all(name in result[head] for _, result in found)]


def _line(name: str, values: Any) -> str:
    return f"| {name} | " + " | ".join(f"{value:.1f}" for value in values) + " |"


def draw(found: list[tuple[Trial, Any]]) -> str:
    """Accuracy against items."""
    import numpy as np
    from matplotlib.ticker import FuncFormatter

    from pliant.report.paint import paint_line, plain

    x = np.array(SIZES, dtype=float)

    def line(label: str, values: Any, color: str, strong: bool = False, dashes: Any = "-") -> Line:
        return Line(label, x, np.array(values), color, strong, dashes)

    lines = [
        line("refit, perplexity", mean(found, "refit", "perplexity"), BLUE, strong=True),
        line("refit, hardmax", mean(found, "refit", "hardmax"), "#666666", dashes=DOTTED),
        line("refit, softmax", mean(found, "refit", "softmax"), BLUE, dashes=DASHED),
        line("plain, adaptive", mean(found, "plain", "adaptive"), ORANGE),
        line("plain, softmax", mean(found, "plain", "softmax"), ORANGE, dashes=DASHED),
        line("paper, adaptive", PAPER["adaptive"], PALETTE[2], dashes=DOTTED),
    ]

    def paint(axes: Any) -> None:
        axes.set_xscale("log", base=2)
        axes.set_xlim(x[0], x[-1])
        axes.set_ylim(0, 102)
        axes.xaxis.set_major_formatter(FuncFormatter(plain))
        for one in lines:
            paint_line(axes, one)
        label_ends(axes, lines)
        axes.set_xlabel("items")
        axes.set_ylabel("right answers, %")

    return str(svg("sharp", "Right answers against items", (9.0, 3.6), (0.8, 2.1), paint))


def page() -> None:
    """The figure, and between its marks in docs/sharp.md each table."""
    FIGURE.write_text(draw(results()) + "\n")
    for name, found in (("table", results()), ("fresh table", _fresh())):
        start, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->\n"
        head, rest = PAGE.read_text().split(start)
        PAGE.write_text(head + start + table(found) + "\n" + end + rest.split(end)[1])


def fresh() -> None:
    """Seeds that nothing was chosen on, 5,000 updates each: what a refit head holds with the perplexity rule."""
    done = _fresh()
    for trial in (Trial("head", {"steps": 5000}, seed) for seed in FRESH_SEEDS):
        if trial not in [other for other, _ in done]:
            done.append((trial, run(trial, lambda share, word: None)))
            with open(FRESH, "a") as file:
                file.write(json.dumps({"seed": trial.seed, "result": done[-1][1]}) + "\n")
    rows = [result["refit"]["perplexity"] for _, result in done]
    held = {n: [row[SIZES.index(n)] for row in rows] for n in (64, 1024, 16_384)}
    append(
        "a refit head with weights by perplexity holds 95 % at 1,024 and 80 % at 16,384, on seeds that nothing was "
        "chosen on", "python benchmarks/sharp.py fresh",
        {f"{n} items": values for n, values in held.items()} | {"seeds": len(done)},
        holds=min(held[1024]) >= 95 and min(held[16_384]) >= 80, note="percent, by seed; 5,000 updates",
    )  # fmt: skip


def _fresh() -> list[tuple[Trial, Any]]:
    lines = FRESH.read_text().splitlines() if FRESH.exists() else []
    rows = [json.loads(line) for line in lines]
    return [(Trial("head", {"steps": 5000}, row["seed"]), row["result"]) for row in rows]


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["overhead"]:
        found = overhead()
        print(json.dumps(found, indent=1))
        tell_overhead(found)
    elif arguments[:1] == ["take"]:
        take(*map(Path, arguments[1:]))
    elif arguments[:1] == ["page"]:
        page()
    elif arguments[:1] == ["fresh"]:
        fresh()
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main(sys.argv[1:])
