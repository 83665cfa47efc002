"""`pliant stream` on many lines: memory, latency, and a restart in the middle.

python benchmarks/live_stream.py --lines 1000000
"""

import argparse
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

from _ledger import append

WARM = 10_000
PLIANT = [sys.executable, "-m", "pliant.cli"]


def messages(count: int, lag: int = 5) -> Iterator[str]:
    """Rows of a rule that changes every 5,000; each label comes `lag` rows late."""
    chance = random.Random(0)
    labels: list[str] = []
    for i in range(count // 2 + lag):
        if i < count // 2:
            x = {f"x{k}": round(chance.gauss(0, 1), 4) for k in range(6)} | {"site": chance.choice("abcd")}
            labels.append("yes" if x[f"x{i // 5000 % 6}"] + chance.gauss(0, 0.5) > 0 else "no")
            yield json.dumps({"id": i, "x": x}) + "\n"
        if i >= lag and i - lag < count // 2:
            yield json.dumps({"id": i - lag, "y": labels[i - lag]}) + "\n"


def table(path: Path, rows: int = 3000) -> None:
    """The same rows as a CSV file to begin with."""
    pending: dict[int, dict[str, str]] = {}
    lines = ["x0,x1,x2,x3,x4,x5,site,class"]
    for text in messages(2 * rows):
        message = json.loads(text)
        if "x" in message:
            pending[message["id"]] = message["x"]
        else:
            lines.append(",".join(map(str, [*pending.pop(message["id"]).values(), message["y"]])))
    path.write_text("\n".join(lines) + "\n")


def resident(process: int) -> float:
    """MB."""
    with open(f"/proc/{process}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def long_run(run: str, count: int) -> dict[str, object]:
    """All lines through a pipe; memory after the first 10,000 and its largest growth."""
    command = [*PLIANT, "stream", run, "--learn", "--json"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdin and process.stdout and process.stderr
    answered, seen = [0], []

    def read() -> None:
        for number, _ in enumerate(process.stdout):  # type: ignore[arg-type]
            answered[0] = number + 1
            if number % 2000 == 0:
                seen.append((2 * number, resident(process.pid)))

    reader = threading.Thread(target=read)
    reader.start()
    for piece in itertools.batched(messages(count), 200) if sys.version_info >= (3, 12) else _pieces(messages(count)):
        process.stdin.write("".join(piece))
    process.stdin.close()
    reader.join()
    summary = json.loads(process.stderr.read().splitlines()[-1])
    warm = next(size for line, size in seen if line >= WARM)
    largest = max(size for line, size in seen if line >= WARM)
    return {"lines": summary["lines"], "answered at once": answered[0], "malformed": summary["errors"],
            "bits per answer": summary["bits"], "MB after 10,000 lines": round(warm, 1),
            "largest growth MB": round(largest - warm, 2), "milliseconds a line": summary["milliseconds"]}  # fmt: skip


def _pieces(lines: Iterator[str]) -> Iterator[list[str]]:
    while piece := list(itertools.islice(lines, 200)):
        yield piece


def restarted(run: str, folder: Path, count: int = 20_000) -> bool:
    """Whether a stream stopped by SIGTERM in the middle and started again says what an uninterrupted one says."""
    source = folder / "lines.jsonl"
    source.write_text("".join(messages(count)))

    def go(state: Path, out: Path, stop: bool) -> int:
        with open(out, "a") as file:
            command = [*PLIANT, "stream", run, "--learn", "--input", str(source), "--state", str(state)]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.DEVNULL)
            while stop and process.poll() is None:
                if out.read_bytes().count(b"\n") > count // 6:
                    process.send_signal(signal.SIGTERM)
                    break
            return process.wait()

    one, two = folder / "one", folder / "two"
    assert go(folder / "a.state", one, stop=False) == 0
    assert go(folder / "b.state", two, stop=True) == 0
    middle = two.read_bytes().count(b"\n")
    assert go(folder / "b.state", two, stop=False) == 0
    print("stopped after", middle, "replies", file=sys.stderr)
    return 0 < middle < count // 2 and one.read_bytes() == two.read_bytes()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--lines", type=int, default=1_000_000)
    count = parser.parse_args().lines
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table(folder / "begin.csv")
        run = str(folder / "run")
        learn = [*PLIANT, "learn", "series", "--data", str(folder / "begin.csv"), "--target", "class", "--delay", "4"]
        subprocess.run([*learn, "--opponents", "no-change", "--no-report", "--run", run], check=True,
                       stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)  # fmt: skip
        exact = restarted(run, folder)
        figures = long_run(run, count)
    times = figures.pop("milliseconds a line")
    assert isinstance(times, dict)
    figures |= {f"{name} ms a line": round(value, 3) for name, value in times.items()}
    figures["restart is exact"] = exact
    print(json.dumps(figures))
    claim = "pliant stream: memory grows by less than 5 MB after the first 10,000 lines; a restart continues exactly"
    growth = figures["largest growth MB"]
    assert isinstance(growth, float)
    append(claim, f"python benchmarks/live_stream.py --lines {count}", figures, holds=exact and growth < 5)


if __name__ == "__main__":
    main()
