"""Memory of `pliant learn digits --forever` over many steps.

    python benchmarks/forever_memory.py --steps 200000

A step is one time index of one question; a question of digits has eight, for each of its 16 streams.
"""

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS_PER_ANSWER = 8 / 16  # eight steps for the sixteen answers of a question


def measure(steps: int, options: list[str]) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, "-m", "pliant.cli", "learn", "digits", "--forever", "--run", str(run), *options]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        rows: list[dict[str, float]] = []
        while process.poll() is None and (not rows or rows[-1]["answers"] * STEPS_PER_ANSWER < steps):
            time.sleep(2)
            rows = _rows(run)
        process.send_signal(signal.SIGINT)
        process.wait()
    after = [row for row in rows if row["answers"] * STEPS_PER_ANSWER >= 5000]
    return {
        "steps": rows[-1]["answers"] * STEPS_PER_ANSWER,
        "updates": rows[-1]["answers"] / 16,
        "MB_after_5000_steps": after[0]["rss"] / 1e6,
        "MB_at_the_end": rows[-1]["rss"] / 1e6,
        "largest_growth_MB": (max(row["rss"] for row in after) - after[0]["rss"]) / 1e6,
        "growth_at_the_end_MB": (rows[-1]["rss"] - after[0]["rss"]) / 1e6,
    }


def _rows(run: Path) -> list[dict[str, float]]:
    try:
        lines = (run / "timing.jsonl").read_text().splitlines()
    except OSError:
        return []
    return [json.loads(line) for line in lines if line.endswith("}")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--ledger", action="store_true", help="append the figures to docs/ledger.jsonl")
    options, more = parser.parse_known_args()
    figures = measure(options.steps, more)
    print(json.dumps(figures))
    if options.ledger:
        from _ledger import append

        append(
            "Memory is flat over 200,000 steps: growth under 5 MB after the first 5,000",
            f"python benchmarks/forever_memory.py --steps {options.steps} {' '.join(more)}".strip(),
            figures,
            holds=figures["largest_growth_MB"] < 5,
        )
    sys.exit(0 if figures["largest_growth_MB"] < 5 else 1)


if __name__ == "__main__":
    main()
