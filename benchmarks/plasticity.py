"""docs/results/plasticity.jsonl and docs/plasticity.svg from a finished `pliant reproduce plasticity`; its claims.

pliant reproduce plasticity --scale ten
python benchmarks/plasticity.py runs/reproduce-plasticity-ten --ledger
"""

import argparse
import json
from pathlib import Path
from typing import Any

from _ledger import DOCS, append

from pliant.recipes.plasticity import judge
from pliant.recipes.plasticity_page import sweeps
from pliant.recipes.reproduce import Trial

COMMAND = "pliant reproduce plasticity --scale ten"


def read(file: Path) -> list[tuple[Trial, dict[str, Any]]]:
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    return [(Trial(*json.loads(row["key"])), row["result"]) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path, nargs="?", help="without it the figure is drawn again from what is kept")
    parser.add_argument("--ledger", action="store_true")
    options = parser.parse_args()
    kept = DOCS / "results" / "plasticity.jsonl"
    if options.run:
        kept.write_text((options.run / "trials.jsonl").read_text())
    results = read(kept)
    (DOCS / "plasticity.svg").write_text(sweeps(results))
    for claim in judge(results):
        print(claim.verdict, "|", claim.claim, "|", claim.ours)
        if options.ledger:
            append(claim.claim, COMMAND, {"ours": claim.ours, "paper": claim.paper, "seeds": claim.seeds},
                   holds=claim.verdict != "not reproduced", note=claim.verdict)  # fmt: skip
    print(f"{sum(result['seconds'] for _, result in results):.0f} seconds")


if __name__ == "__main__":
    main()
