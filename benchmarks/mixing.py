"""How many steps back a fresh layer looks, mixer by mixer: docs/results/mixing.json and docs/mixing.svg.

python benchmarks/mixing.py            # measure, then draw
python benchmarks/mixing.py --draw     # draw alone

Mean mixing distance (pliant.measure.mixing) of the last of 256 steps of noise, one layer of width 32 as it is made,
five seeds, eight channels each.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from typing import Any

import torch
from _ledger import DOCS

from pliant import mixers
from pliant.core import seeded
from pliant.core.run import environment
from pliant.measure.mixing import mixing_distance
from pliant.report.style import BLUE, STYLE

WIDTH, STEPS, SEEDS, CHANNELS, WINDOW = 32, 256, 5, 8, 64
MAKE: dict[str, Callable[[], Any]] = {
    "RGLRU": lambda: mixers.RGLRU(WIDTH),
    "GatedLRU": lambda: mixers.GatedLRU(WIDTH),
    "LRU": lambda: mixers.LRU(WIDTH),
    "LRU, ring 0.9 to 0.999": lambda: mixers.LRU(WIDTH, min_radius=0.9, max_radius=0.999),
    "S6": lambda: mixers.S6(WIDTH),
    "GatedDelta": lambda: mixers.GatedDelta(WIDTH),
    "MLSTM": lambda: mixers.MLSTM(WIDTH),
    "SLSTM": lambda: mixers.SLSTM(WIDTH),
    "MultiresConv": lambda: mixers.MultiresConv(WIDTH),
    "MultiScaleSSM": lambda: mixers.MultiScaleSSM(WIDTH),
    "MultiScaleSSM, selective": lambda: mixers.MultiScaleSSM(WIDTH, selective=True),
    "MultiScaleSSM, complex": lambda: mixers.MultiScaleSSM(WIDTH, complex_states=True),
    "WindowAttention, 64": lambda: mixers.WindowAttention(WIDTH, window=WINDOW),
    "FullAttention": lambda: mixers.FullAttention(WIDTH, max_steps=STEPS),
}


def measure() -> dict[str, list[float]]:
    found: dict[str, list[float]] = {}
    for name, make in MAKE.items():
        for seed in range(SEEDS):
            with seeded(seed, name):
                layer, x = make(), torch.randn(1, STEPS, WIDTH)
            distance = float(mixing_distance(layer, x, channels=CHANNELS, seed=seed))
            found.setdefault(name, []).append(round(distance, 3))
        print(f"{name:28} {found[name]}", flush=True)
    return found


def draw(found: dict[str, list[float]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = sorted(found, key=lambda name: statistics.mean(found[name]))
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(7.5, 0.3 * len(names) + 0.9))
        for row, name in enumerate(names):
            axes.plot([0, statistics.mean(found[name])], [row, row], color=BLUE, lw=1, alpha=0.5)
            axes.plot(found[name], [row] * len(found[name]), "o", color=BLUE, ms=4, alpha=0.6, mew=0)
        axes.set_yticks(range(len(names)), names)
        axes.set_xlim(0, None)
        axes.set_xlabel(f"mean mixing distance of a fresh layer, steps of {STEPS}; a dot for each seed")
        axes.spines["left"].set_visible(False)
        axes.tick_params(axis="y", length=0)
        figure.tight_layout()
        figure.savefig(DOCS / "mixing.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true")
    options = parser.parse_args()
    file = DOCS / "results" / "mixing.json"
    if not options.draw:
        torch.set_num_threads(1)
        sizes = {"width": WIDTH, "steps": STEPS, "channels": CHANNELS}
        record = {**sizes, "distances": measure(), "environment": environment()}
        file.write_text(json.dumps(record, indent=1) + "\n")
    draw(json.loads(file.read_text())["distances"])


if __name__ == "__main__":
    main()
