"""Kill a run at random moments, resume it each time, and compare it with one that was left alone.

python benchmarks/kill_resume.py --kills 20
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from safetensors.torch import load_file

OPTIONS = ["--answers", "6000", "--every", "1500", "--retrain", "1500", "--delay", "2", "--save-every", "400"]


def start(run: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "pliant.cli", "learn", "digits", "--run", str(run), *OPTIONS, *more]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)


def finish(process: subprocess.Popen[bytes]) -> None:
    _, said = process.communicate()
    if process.returncode:
        raise SystemExit(f"the run ended with {process.returncode}: {said.decode()}")


def newest(run: Path) -> Path:
    return max((run / "lives").glob("update-*"))


def compare(kills: int, seed: int) -> dict[str, object]:
    """Figures of one comparison; `records_equal` and `lives_equal` are to the byte."""
    draw = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        began = time.time()
        finish(start(whole))
        length = time.time() - began
        moments, done = [], 0
        while done < kills:
            process = start(killed, "--resume")
            wait = draw.uniform(0.0, 0.4 * length)
            time.sleep(wait)
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                moments.append(round(wait, 3))
                done += 1
            process.communicate()
            if (killed / "summary.json").exists():
                # It came to its end before we were done killing: begin again.
                moments.append("end")
                if not equal(whole, killed)["equal"]:
                    break
                os.rename(killed, Path(folder) / f"ended-{len(moments)}")
        finish(start(killed, "--resume"))
        result = equal(whole, killed)
        return {"kills": done, "seconds_uninterrupted": round(length, 1), **result, "waits": moments}


def equal(whole: Path, killed: Path) -> dict[str, object]:
    records = (whole / "records.jsonl").read_bytes() == (killed / "records.jsonl").read_bytes()
    files = ("tensors.safetensors", "tree.json")
    lives = all((newest(whole) / name).read_bytes() == (newest(killed) / name).read_bytes() for name in files)
    one, two = (load_file(newest(run) / "tensors.safetensors") for run in (whole, killed))
    parameters = [name for name in one if name.startswith("/learner/model/")]
    same = sum(bool((one[name] == two[name]).all()) for name in parameters)
    return {
        "records_equal": records,
        "lives_equal": lives,
        "parameters_equal": f"{same} of {len(parameters)}",
        "equal": records and lives and same == len(parameters),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ledger", action="store_true", help="append the figures to docs/ledger.jsonl")
    options = parser.parse_args()
    figures = compare(options.kills, options.seed)
    print(json.dumps(figures))
    if options.ledger:
        from _ledger import append

        figures.pop("waits")
        append(
            "A life is exact: killed at random moments and resumed, records and final life equal to the bit",
            f"python benchmarks/kill_resume.py --kills {options.kills} --seed {options.seed}",
            figures,
            holds=bool(figures["equal"]),
        )
    sys.exit(0 if figures["equal"] else 1)


if __name__ == "__main__":
    main()
