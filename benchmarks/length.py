"""Trained on 1,024 bytes at a time, run over 65,536 in chunks: does memory stay flat, and what is the score where?

python benchmarks/length.py --draw                  # a section of docs/ms-ssm.md, and docs/length.svg
python benchmarks/length.py --ledger
TEXT=FOLDER python benchmarks/length.py             # whatever is missing in docs/results/length.jsonl

FOLDER holds state_union.zip: speeches in their order in time, as bytes; the last four stretches of 65,536 are run, what
stands before them is trained on, each stretch of training from a fresh state. A language model that goes on is compared
with itself begun anew every 1,024 bytes. Set OMP_NUM_THREADS=1.
"""

import math
import os
import statistics
import time
import zipfile
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from _ledger import DOCS, append
from _ms_ssm_page import put, spread, table
from _trials import Record, Trials
from torch import Tensor, nn

from pliant.core import nbytes, seeded
from pliant.core.seeds import generator
from pliant.models import ByteTokenizer, LanguageModel
from pliant.report.style import PALETTE, STYLE

ARMS: dict[str, tuple[str, dict[str, Any]]] = {
    "MS-SSM": ("MultiScaleSSM", {}),
    "MS-SSM, selective": ("MultiScaleSSM", {"selective": True}),
    "gated LRU": ("GatedLRU", {"num_heads": 2}),
    "S6": ("S6", {"expand": 1}),
}
SHORT, LONG, STREAMS = 1024, 65_536, 4
WIDTH, DEPTH, UPDATES, BATCH = 64, 2, 320, 8
RATES = (3e-3, 1e-2)
TUNING, SEEDS = 100, (0, 1, 2)
EDGES = (0, 64, 256, 1024, 4096, 16_384, 65_536)
"""Positions from and up to which scores are averaged."""


@cache
def text() -> Tensor:
    """All speeches, as tokens."""
    with zipfile.ZipFile(Path(os.environ.get("TEXT", "../shared/data/text")) / "state_union.zip") as file:
        names = sorted(name for name in file.namelist() if name.endswith(".txt"))
        return torch.tensor(list(b"\n".join(file.read(name) for name in names)))


def parts(tuning: bool) -> tuple[Tensor, Tensor]:
    """What is trained on, and stretches `(STREAMS, LONG + 1)` with what they begin with; of tuning the ones before."""
    whole, size = text(), STREAMS * LONG
    end = len(whole) - size * tuning
    begin = torch.full((STREAMS, 1), ByteTokenizer.start)
    return whole[: len(whole) - 2 * size], torch.cat([begin, whole[end - size : end].view(STREAMS, LONG)], 1)


def run(arm: str, rate: float, seed: int) -> Record:
    torch.set_num_threads(1)
    began = time.process_time()
    mixer, options = ARMS[arm]
    learned, asked = parts(seed == TUNING)
    with seeded(seed, "length"):
        model = LanguageModel(width=WIDTH, depth=DEPTH, mixer=mixer, mixer_options=options)
    learn(model, learned, rate, seed)
    trained = time.process_time()
    bits, memory = over(model, asked, SHORT * (4 if seed == TUNING else LONG // SHORT))
    found: Record = {"mean": -float(bits.mean()), "training seconds": round(trained - began, 1)}
    if seed != TUNING:
        anew = torch.cat([over(model, begun, SHORT)[0] for begun in stretches(asked)], 1)
        found |= {"bits": by_position(bits), "bits, begun anew": by_position(anew), **memory}
    found["parameters"] = sum(p.numel() for p in model.parameters())
    return found | {"cpu seconds": round(time.process_time() - began, 1)}


def learn(model: LanguageModel, tokens: Tensor, rate: float, seed: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=UPDATES)
    random = generator(seed, "length/batches")
    for _ in range(UPDATES):
        at = torch.randint(len(tokens) - SHORT, (BATCH, 1), generator=random)
        rows = tokens[at + torch.arange(SHORT)]
        before = torch.cat([torch.full_like(at, ByteTokenizer.start), rows[:, :-1]], 1)
        optimizer.zero_grad()
        model.nats(model(before)[0], rows).mean().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


@torch.no_grad()
def over(model: LanguageModel, tokens: Tensor, steps: int) -> tuple[Tensor, dict[str, Any]]:
    """Bits `(B, steps)` of each token given those before, chunk by chunk, and the memory that this took.

    Resident MiB of the process after the fourth chunk, when buffers have been made, and the most after it.
    """
    state, found, resident, sizes = None, [], [], []
    for first in range(0, steps, SHORT):
        logits, state = model(tokens[:, first : first + SHORT], state)
        found.append(model.nats(logits, tokens[:, first + 1 : first + 1 + SHORT]))
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20)
        sizes.append(nbytes(state))
    early = min(3, len(resident) - 1)
    most = [round(resident[early], 1), round(max(resident[early:]), 1)]
    memory = {"state bytes": [sizes[0], sizes[-1]], "resident MiB": most}
    return torch.cat(found, 1) / math.log(2), memory


def stretches(asked: Tensor) -> list[Tensor]:
    """The same in pieces of SHORT, each after the token that begins a text."""
    begin = torch.full((STREAMS, 1), ByteTokenizer.start)
    return [torch.cat([begin, part], 1) for part in asked[:, 1:].split(SHORT, 1)]


def by_position(bits: Tensor) -> list[float]:
    """Mean bits between one edge and the next."""
    return [round(float(bits[:, a:b].mean()), 4) for a, b in pairwise(EDGES)]


TRIALS = Trials(DOCS / "results" / "length.jsonl", run, tuning=TUNING)


def work(arms: Sequence[str], seeds: Sequence[int]) -> None:
    for arm in arms:
        rate = TRIALS.best([{"arm": arm, "rate": rate, "seed": TUNING} for rate in RATES])["rate"]
        for seed in seeds:
            TRIALS.once(arm=arm, rate=rate, seed=seed)


# What is made of the runs.


def by_arm(records: Sequence[Record], seeds: Sequence[int]) -> dict[str, list[Record]]:
    found = {arm: [r for r in records if r["key"]["arm"] == arm and r["key"]["seed"] in seeds] for arm in ARMS}
    return {arm: runs for arm, runs in found.items() if runs}


def draw(records: Sequence[Record], seeds: Sequence[int]) -> None:
    found = by_arm(records, seeds)
    left = [arm for arm in ARMS if arm not in found]
    head = ("", *(f"{a:,} to {b:,}" for a, b in pairwise(EDGES)))
    rows = []
    for arm, runs in found.items():
        for what, name in (("bits", arm), ("bits, begun anew", f"{arm}, begun anew")):
            rows.append([name, *(spread([run[what][i] for run in runs]) for i in range(len(EDGES) - 1))])
    memory = [
        [arm, f"{runs[0]['parameters']:,}", " and ".join(f"{n:,}" for n in runs[0]["state bytes"]),
         f"{max(r['resident MiB'][1] - r['resident MiB'][0] for r in runs):.1f}",
         f"{statistics.fmean(r['cpu seconds'] for r in runs):.0f}"]
        for arm, runs in found.items()
    ]  # fmt: skip
    note = f" **Not run yet: {', '.join(left)}.**" if left else ""
    heads = ("", "parameters", "bytes of state after the first chunk and the last", "MiB more after the fourth chunk",
             "CPU s a run")  # fmt: skip
    put("length", [f"Bits a byte by position, mean and deviation over {len(seeds)} seeds.{note}", "",
                   *table(head, rows), "", "![Bits by position](length.svg)", "", *table(heads, memory)])  # fmt: skip
    figure(found)


def figure(found: dict[str, list[Record]]) -> None:
    from matplotlib import style
    from matplotlib.figure import Figure

    with style.context(["default", STYLE]):
        sheet = Figure(figsize=(6.5, 3.4))
        axes = sheet.subplots()
        places = list(EDGES[1:])
        for color, (arm, runs) in zip(PALETTE, found.items(), strict=False):
            for what, dashes in (("bits", "-"), ("bits, begun anew", ":")):
                means = [statistics.fmean(run[what][i] for run in runs) for i in range(len(places))]
                axes.plot(places, means, dashes, marker="o", ms=3, color=color, label=arm if what == "bits" else None)
        axes.axvline(SHORT, color="#888888", lw=0.8, dashes=(4, 3))
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"position up to; trained up to {SHORT:,} (dashes); dotted: begun anew there")
        axes.set_ylabel("bits a byte")
        axes.legend(frameon=False)
        sheet.tight_layout()
        sheet.savefig(DOCS / "length.svg", metadata={"Date": None})


def ledger(records: Sequence[Record], seeds: Sequence[int]) -> None:
    found = by_arm(records, seeds)
    figures: dict[str, Any] = {}
    for arm, runs in found.items():
        bits = [round(statistics.fmean(run["bits"][i] for run in runs), 4) for i in range(len(EDGES) - 1)]
        figures |= {f"{arm}, bits by position": bits} | {
            f"{arm}, {what}": runs[0][what] for what in ("state bytes", "resident MiB")
        }
    worst = {arm: figures[f"{arm}, bits by position"][-1] - figures[f"{arm}, bits by position"][2] for arm in found}
    flat = all(run["state bytes"][0] == run["state bytes"][1] and run["resident MiB"][1] < run["resident MiB"][0] + 1
               for arm, runs in found.items() if arm.startswith("MS-SSM") for run in runs)  # fmt: skip
    append(
        "Trained at 1,024 bytes, run over 65,536 in chunks: MS-SSM keeps memory flat and its score does not get worse",
        "TEXT=FOLDER python benchmarks/length.py; --draw; --ledger", figures,
        holds=flat and all(worst[arm] <= 0.02 for arm in worst if arm.startswith("MS-SSM")),
        note=f"{len(seeds)} seeds; worse is 0.02 bits a byte over those of positions 256 to 1,024",
    )  # fmt: skip


if __name__ == "__main__":
    TRIALS.command(work, draw, ledger, arms=tuple(ARMS), seeds=SEEDS)
