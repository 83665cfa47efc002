"""Sections of docs/ms-ssm.md: each script writes its own between two marks, the rest of the page is prose.

python benchmarks/_ms_ssm_page.py        # what the parts are worth, from docs/results/ms-ssm.jsonl
"""

import json
import statistics
from collections.abc import Sequence

from _ledger import DOCS

from pliant.recipes.ms_ssm import ARMS, FULL

PAGE = DOCS / "ms-ssm.md"


def put(section: str, lines: Sequence[str]) -> None:
    """Exchange what stands between the marks of a section."""
    begin, end = f"<!-- {section} -->\n", f"<!-- end of {section} -->"
    text = PAGE.read_text()
    before, rest = text.split(begin)
    PAGE.write_text(before + begin + "\n" + "\n".join(lines).strip() + "\n\n" + end + rest.split(end)[1])


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]


def spread(values: Sequence[float], digits: int = 3) -> str:
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def main() -> None:
    rows = [json.loads(line) for line in (DOCS / "results/ms-ssm.jsonl").read_text().splitlines()]
    by = {name: {row["seed"]: row for row in rows if row["name"] == name} for name in ARMS}
    lines = []
    for name, found in by.items():
        if found:
            less = [found[seed]["accuracy"] - by[FULL][seed]["accuracy"] for seed in sorted(found)]
            accuracy = spread([row["accuracy"] for row in found.values()])
            parameters = next(iter(found.values()))["parameters"]
            change = "" if name == FULL else f"{min(less):+.3f} to {max(less):+.3f}"
            lines.append([name, f"{parameters:,}", accuracy, change, str(len(found))])
    put("ablation", table(("arm", "parameters", "accuracy", "less the whole, by seed", "seeds"), lines))


if __name__ == "__main__":
    main()
