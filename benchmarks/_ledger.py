"""Append a measured figure to docs/ledger.jsonl and draw docs/ledger.md from all of them.

python benchmarks/_ledger.py          # draw the page again
"""

import json
import time
from pathlib import Path
from typing import Any

from pliant.core.run import environment

DOCS = Path(__file__).parents[1] / "docs"
HEAD = """# Ledger

Every figure here was written by the command beside it; failures stay in. One line of
[ledger.jsonl](ledger.jsonl) holds the whole record with versions, threads and commit.

| Claim | Figure | Verdict | Command | Date | Commit |
| --- | --- | --- | --- | --- | --- |
"""


def append(claim: str, command: str, figures: dict[str, Any], *, holds: bool, note: str = "") -> None:
    """One line: what is claimed, how it was measured, what came out. None if that stands there already."""
    line = {
        "claim": claim,
        "command": command,
        "figures": figures,
        "holds": holds,
        "note": note,
        "date": time.strftime("%Y-%m-%d"),
        "environment": environment(),
    }
    told = json.dumps([claim, command, figures, holds, note])
    known = map(json.loads, (DOCS / "ledger.jsonl").read_text().splitlines())
    if told in (json.dumps([one[name] for name in list(line)[:5]]) for one in known):
        return
    with open(DOCS / "ledger.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")
    draw()


def draw() -> None:
    """docs/ledger.md from docs/ledger.jsonl, the newest line of a claim last."""
    rows = []
    for text in (DOCS / "ledger.jsonl").read_text().splitlines():
        line = json.loads(text)
        figures = "; ".join(f"{name.replace('_', ' ')} {_short(value)}" for name, value in line["figures"].items())
        verdict = ("holds" if line["holds"] else "**does not hold**") + (f" ({line['note']})" if line["note"] else "")
        cells = (line["claim"], figures, verdict, f"`{line['command']}`", line["date"], line["environment"]["commit"])
        rows.append("| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |")
    (DOCS / "ledger.md").write_text(HEAD + "\n".join(rows) + "\n")


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_short, value)) + "]"
    return str(value)


if __name__ == "__main__":
    draw()
