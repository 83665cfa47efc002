"""Take a finished `pliant reproduce grokking --scale ten` into docs/results/grokking.json, and write the ledger.

python benchmarks/grokking.py FOLDER      # of the run, as in runs/reproduce-grokking-ten
"""

import sys
from pathlib import Path

from _ledger import DOCS, append

from pliant.core.plain import dumps
from pliant.recipes.grokking import GROKKING
from pliant.recipes.reproduce import reproduce


def main(folder: Path) -> None:
    found = reproduce(GROKKING, "ten", folder, tell=print)
    (DOCS / "results" / "grokking.json").write_text(dumps(found) + "\n")
    for claim in found["claims"]:
        append(
            f"Grokking: {claim['claim']}",
            "pliant reproduce grokking --scale ten; python benchmarks/grokking.py FOLDER",
            {"ours": claim["ours"], "paper": claim["paper"], "seeds": claim["seeds"]},
            holds=claim["verdict"] == "reproduced",
            note=claim["verdict"],
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
