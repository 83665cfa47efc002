"""From a fresh clone with a clean HOME to a report, and to green tests, with no step by hand.

python benchmarks/fresh_clone.py
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
KEPT = ("PATH", "PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CERT", "SSL_CERT_FILE", "LANG")


def measure() -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        home, clone = Path(folder) / "home", Path(folder) / "clone"
        home.mkdir()
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
        variables = {name: os.environ[name] for name in KEPT if name in os.environ} | {"HOME": str(home)}

        def make(target: str) -> tuple[float, str]:
            began = time.time()
            done = subprocess.run(["make", target], cwd=clone, env=variables, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"make {target} failed:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
            return round(time.time() - began, 1), done.stdout

        learn, said = make("learn")
        run = next((clone / "runs").glob("digits-*"))
        timing = json.loads((run / "summary.json").read_text())["seconds"]
        test, told = make("test")
        again, _ = make("install")
        counted = re.findall(r"(\d+) passed(?:.* (\d+) failed)?", told)[-1]
        return {
            "seconds_make_learn_with_installation": learn,
            "seconds_of_the_run_itself": timing,
            "report_KB": round((run / "report.html").stat().st_size / 1000),
            "said": said.splitlines()[1] if said else "",
            "seconds_make_test_with_installation": test,
            "tests_passed": int(counted[0]),
            "seconds_of_a_second_install": again,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ledger", action="store_true", help="append the figures to docs/ledger.jsonl")
    options = parser.parse_args()
    figures = measure()
    print(json.dumps(figures))
    if options.ledger:
        sys.path.insert(0, str(ROOT / "benchmarks"))
        from _ledger import append

        append(
            "Fresh clone and clean HOME to a report by make learn and to green tests by make test, nothing by hand",
            "python benchmarks/fresh_clone.py",
            figures,
            holds=float(str(figures["seconds_make_test_with_installation"])) < 600,
        )


if __name__ == "__main__":
    main()
