"""Sections of docs/ms-ssm.md: each script writes its own between two marks, the rest of the page is prose.

python benchmarks/_ms_ssm_page.py        # what the parts are worth, from docs/results/ms-ssm.jsonl, ms-ssm-hour.jsonl
python benchmarks/_ms_ssm_page.py ledger

The records are those of `pliant reproduce ms-ssm --scale ten` and `--scale hour`.
"""

import json
import statistics
import sys
from collections.abc import Sequence

from _ledger import DOCS, append

from pliant.recipes.ms_ssm import ARMS, BANK, FULL, TABLES, WHOLE

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


Hour = dict[str, dict[str, dict[int, float]]]


def of_hour() -> Hour:
    """Accuracy by task, arm and seed."""
    found: Hour = {}
    for line in (DOCS / "results/ms-ssm-hour.jsonl").read_text().splitlines():
        row = json.loads(line)
        name, settings, seed = json.loads(row["key"])
        found.setdefault(settings["setup"], {}).setdefault(name, {})[seed] = row["result"]["accuracy"]
    return found


def draw_hour(found: Hour) -> None:
    lines = []
    for task, by in found.items():
        less = [by[FULL][seed] - by[BANK][seed] for seed in sorted(by[FULL].keys() & by[BANK].keys())]
        lines.append([task, spread([*by[FULL].values()]), spread([*by[BANK].values()]),
                      ", ".join(f"{gap:+.3f}" for gap in less), str(len(less))])  # fmt: skip
    put("hour", table(("task", "whole", BANK, "difference by seed", "seeds"), lines))


def ledger(found: Hour) -> None:
    paper = f"the paper has {WHOLE[1]} and {TABLES[BANK][1]} % on ListOps of 501 to 1,999 tokens, and none of images"
    for task, by in found.items():
        figures = {name: [by[name][seed] for seed in sorted(by[name])] for name in (FULL, BANK)}
        append(f"MS-SSM, {task}: the filter bank is worth something with each seed",
               "pliant reproduce ms-ssm --scale hour --data IMAGES; python benchmarks/_ms_ssm_page.py ledger", figures,
               holds=all(a > b for a, b in zip(*figures.values(), strict=False)), note=paper)  # fmt: skip


def main() -> None:
    if "ledger" in sys.argv:
        ledger(of_hour())
        return
    draw_hour(of_hour())
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
