"""Run the tests behind each claim and write to the ledger how many passed.

python benchmarks/claims.py              # all of them
python benchmarks/claims.py leak input   # those whose claim holds one of these words
"""

import re
import subprocess
import sys
import time
from pathlib import Path

from _ledger import append

ROOT = Path(__file__).parents[1]
CLAIMS = {
    "Whole sequence = steps = random chunks; resets, masks, packing, forks, extra axes; every mixer and model": (
        "tests/test_contract.py tests/kernels"
    ),
    "Acceptance checks 2-8 and 14 of the gated LRU": "tests/mixers tests/kernels/test_causal_conv.py",
    "A fault, a power loss, damage or a full disk at any operation of saving leaves the old or the new life": (
        "tests/learn/test_life.py"
    ),
    "No leak: another future has the same past, and streams that leak on purpose are caught": (
        "tests/streams/test_contract.py"
    ),
    "Reusing the forward pass gives the same gradients to the bit; predict moves nothing but stream memory": (
        "tests/learn/test_learner.py"
    ),
    "Bad input: one sentence and exit code 2": "tests/cli/test_bad_input.py",
    "Bad input of learn series: one sentence and exit code 2, or counted, reported and gone on": (
        "tests/cli/test_bad_series.py tests/streams/test_table.py"
    ),
    "Later labels, no leak of series: no label is an input, a lesson or a reference before its time": (
        "tests/streams/test_series.py tests/cli/test_series.py tests/learn/test_references.py "
        "tests/models/test_table.py"
    ),
    "One pass over table, blocks and head is the readable form, with its gradients; else it steps back": (
        "tests/kernels/test_gated_block.py"
    ),
    "Scores agree with scikit-learn and closed forms": "tests/measure",
    "The report loads in headless Chromium without errors or requests": "-m slow tests/report",
}


def main() -> None:
    failed, words = False, sys.argv[1:]
    for claim, selection in CLAIMS.items():
        if words and not any(word in claim for word in words):
            continue
        began = time.time()
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *selection.split()]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|skipped)", done.stdout)}
        holds = done.returncode == 0 and counts.get("passed", 0) > 0 and not counts.get("skipped")
        failed |= not holds
        figures = {"tests_passed": counts.pop("passed", 0), **counts, "seconds": round(time.time() - began, 1)}
        append(claim, f"python -m pytest {selection}", figures, holds=holds)
        print(claim, figures)
    sys.exit(failed)


if __name__ == "__main__":
    main()
