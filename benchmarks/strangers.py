"""A stranger's own table to a correct report in under three minutes, without reading more than --help.

python benchmarks/strangers.py              # prints a table
python benchmarks/strangers.py --ledger     # and appends a line to the ledger
python benchmarks/strangers.py --keep DIR   # leaves tables and runs there to look at

Three odd tables, made from a seed, each learned by the installed `pliant` in a clean home and folder. What
summary and report say is compared with what was planted, and no-change with a computation of its own.
"""

import argparse
import gzip
import html.parser
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
from _ledger import append

from pliant.streams._files import NO_OBJECT, RAGGED, UNDECODABLE
from pliant.streams._table import DUPLICATE_TIME, MISSING_LABEL, NOT_FINITE, NOT_NUMBER

LIMIT = 180
"""Seconds from the command to the report."""
KEPT = ("PATH", "LANG", "LC_ALL", "SYSTEMROOT")


@dataclass
class Case:
    """A table on disk and what a right report of it says.

    Attributes:
        options: of `pliant learn series`, beside --data. A name of a column that the user cannot know is "?".
        rows: how many can be learned from.
        labels: in order of the rows, NaN where missing; codes of classes in the order of their names.
        groups: name of the group of each row, empty if there are none.
        ahead, lag: rows from a step to its label, and to where that label is known.
        problems: what was planted, counted; missing labels come on top.
        said: parts of sentences that the user has to be told.
    """

    file: str
    options: list[str]
    task: str
    rows: int
    labels: np.ndarray
    problems: dict[str, int]
    groups: list[str] = field(default_factory=list)
    ahead: int = 0
    lag: int = 1
    said: tuple[str, ...] = ()


def walk(random: np.random.Generator, size: int, keep: float = 0.97) -> np.ndarray:
    """A number that wanders slowly around 0 with a standard deviation of 1."""
    steps, found = random.normal(size=size) * np.sqrt(1 - keep**2), np.zeros(size)
    for i in range(1, size):
        found[i] = keep * found[i - 1] + steps[i]
    return found


def places(random: np.random.Generator, size: int, *counts: int) -> list[list[int]]:
    """So many different places for each count, none of them among the first hundred; each list ascends."""
    drawn = 100 + random.choice(size - 100, sum(counts), replace=False)
    return [sorted(part.tolist()) for part in np.split(drawn, np.cumsum(counts)[:-1])]


def insert(lines: list[str], at: list[int], more: list[str]) -> None:
    """Put lines before those at these places."""
    for place, line in zip(reversed(at), more, strict=True):
        lines.insert(place, line)


def comma(value: float, digits: int = 3) -> str:
    return f"{value:.{digits}f}".replace(".", ",")


def meters(folder: Path) -> Case:
    """Semicolons, decimal commas, Latin-1, German dates, four groups of which one begins late; 24 rows on."""
    random, ahead, late = np.random.default_rng(1), 24, 600
    sites = ("Köln", "Zürich Süd", "Malmö", "Nord")
    hours = (12_000 + late) // len(sites)
    forecast = [walk(random, hours) for _ in sites]
    begin = datetime(2023, 1, 2)
    lines, labels, groups = [], [], []
    for hour in range(hours):
        moment = begin + timedelta(hours=hour)
        for g, site in enumerate(sites):
            if g == len(sites) - 1 and hour < late:
                continue
            day = 5 * np.sin(2 * np.pi * hour / 24 + g) - 6 * (moment.weekday() >= 5)
            value = 50 + 10 * g + day + random.normal() + 6 * (forecast[g][hour - ahead] if hour >= ahead else 0.0)
            labels.append(round(float(value), 3))
            groups.append(site)
            door = ("geöffnet", "zu", "k. A.")[random.integers(3)]
            lines.append([f"{moment:%d.%m.%Y %H:%M}", site, comma(value), comma(forecast[g][hour], 4), door, "kWh",
                          comma(random.normal())])  # fmt: skip
    words, endless, gone, unlabelled, sums = places(random, len(lines), 9, 5, 40, 30, 6)
    for at, cells in ((words, ("k.A.", "defekt")), (endless, ("9e999",)), (gone, ("", "-", "n/a"))):
        for number, place in enumerate(at):
            lines[place][3] = cells[number % len(cells)]
    for place in unlabelled:
        lines[place][2], labels[place] = "", np.nan
    names = ["Datum", "Standort", "Verbrauch", "Vorhersage °C", "Tür", "Einheit", "<script>"]
    rows = [";".join(row) for row in (names, *lines)]
    insert(rows, [1 + place for place in sums], ["Zwischensumme;;"] * len(sums))
    (folder / "Zähler 2023.csv").write_bytes("\r\n".join([*rows, ""]).encode("latin-1"))
    strange = sum(not row.isascii() for row in rows)
    problems = {NOT_NUMBER: len(words), NOT_FINITE: len(endless), RAGGED: len(sums), UNDECODABLE: strange}
    options = ["--target", "Verbrauch", "--horizon", str(ahead), "--group", "Standort"]
    return Case("Zähler 2023.csv", options, "forecast", len(lines), np.array(labels), problems, groups, ahead, ahead,
                ("'Einheit' is constant",))  # fmt: skip


def machines(folder: Path) -> Case:
    """JSON lines, nested and missing keys; halfway a feature appears, which then decides, and one vanishes later."""
    random, rows = np.random.default_rng(2), 10_000
    early, late = walk(random, rows), walk(random, rows)
    noise = random.random(rows) < 0.03
    names, begin = ("fail", "ok", "warn"), datetime(2024, 3, 1)
    lines: list[dict[str, Any]] = []
    labels = np.zeros(rows)
    for i in range(rows):
        deciding = early[i] if i < rows // 2 else late[i]
        label = 1 if i < 50 else int(random.integers(3)) if noise[i] else int(np.digitize(deciding, (-0.6, 0.6)))
        labels[i] = label
        line: dict[str, Any] = {
            "ts": (begin + timedelta(minutes=5 * i)).isoformat() + "Z",
            "site": {"name": "north" if i % 7 else "south", "line": int(random.integers(3))},
            "temp": round(20 + 5 * early[i] + 10 * i / rows, 3),
            "fan": bool(random.random() < 0.5),
            "tags": ["a", "b"][: int(random.integers(3))],
            "state": names[label],
        }
        if i >= rows // 2:
            line["vibration"] = round(100 + 30 * late[i], 2)
        if i < 6 * rows // 10:
            line["old sensor"] = round(float(random.normal()), 3)
        lines.append(line)
    words, endless, gone, unlabelled, twice, cut = places(random, rows, 11, 4, 60, 25, 6, 5)
    for place in words:
        lines[place]["temp"] = "n.m."
    for place in endless:
        lines[place]["temp"] = float("inf")
    for place in gone:
        del lines[place]["temp"]
    for place in unlabelled:
        lines[place]["state"], labels[place] = None, np.nan
    for place in twice:
        lines[place]["ts"] = lines[place - 1]["ts"]
    texts = [json.dumps(line) for line in lines]
    insert(texts, cut, ["[1, 2]", "null", '{"ts": "2024-', '"ok"', "# restarted"])
    (folder / "machines.jsonl").write_text("\n".join(texts) + "\n")
    problems = {NOT_NUMBER: len(words), NOT_FINITE: len(endless), NO_OBJECT: len(cut), DUPLICATE_TIME: len(twice)}
    return Case("machines.jsonl", ["--target", "state"], "classify", rows, labels, problems,
                said=("'ts' is used as the time",))  # fmt: skip


def clicks(folder: Path) -> Case:
    """No header, tabs, '?', a cell that is no number, ragged rows, formulas, yes or no six rows late, .txt.gz."""
    random, rows, delay = np.random.default_rng(3), 20_000, 5
    drive, other = walk(random, rows, 0.95), random.normal(size=rows)
    labels = (drive + 0.3 * random.normal(size=rows) > 0).astype(float)
    labels[:50] = 0
    lines = []
    for i in range(rows):
        formula = ("=1+2", "@SUM(A1)", "+cmd", "plain", '=HYPERLINK("http://x")')[random.integers(5)]
        lines.append(
            [f"{drive[i]:.4f}", f"{other[i]:.3e}", formula, str(random.integers(1000)), ("no", "yes")[int(labels[i])]]
        )
    words, missing, unlabelled, ragged = places(random, rows, 13, 200, 40, 8)
    for place in words:
        lines[place][0] = "12 kg"
    for place in missing:
        lines[place][0] = "?"
    for place in unlabelled:
        lines[place][4], labels[place] = "?", np.nan
    texts = ["\t".join(line) for line in lines]
    insert(texts, ragged, ["0.5\t1.5", "0.5\t1.5\tplain\t7\tyes\tmore"] * (len(ragged) // 2))
    (folder / "clicks.txt.gz").write_bytes(gzip.compress(("\n".join(texts) + "\n").encode(), mtime=0))
    problems = {NOT_NUMBER: len(words), RAGGED: len(ragged)}
    return Case("clicks.txt.gz", ["--target", "?", "--delay", str(delay)], "classify", rows, labels, problems,
                lag=1 + delay, said=("they are called c0, c1",))  # fmt: skip


CASES: dict[str, Callable[[Path], Case]] = {"meters": meters, "machines": machines, "clicks": clicks}


def no_change(case: Case) -> tuple[dict[str, int], float, float]:
    """Answers of each group, accuracy or mean absolute error of the newest known label, and how exact that is.

    The label of step t stands in row t + ahead and is known once step t + lag is asked. A step before the first known
    label is answered by nobody knows what, so right or wrong.
    """
    names = np.array(case.groups or [""] * len(case.labels))
    right, answers, open_, counts = 0.0, 0, 0, {}
    for name in dict.fromkeys(names.tolist()):
        labels = case.labels[names == name]
        known = np.maximum.accumulate(np.where(np.isnan(labels), -1, np.arange(len(labels))))
        steps = np.arange(len(labels) - case.ahead)
        truth, newest = labels[steps + case.ahead], steps + case.ahead - case.lag
        place = np.where(newest >= 0, known[newest.clip(0)], -1)
        scored = ~np.isnan(truth)
        guess, truth, place = labels[place][scored], truth[scored], place[scored]
        said = place >= 0
        each = (guess == truth) if case.task == "classify" else np.abs(guess - truth)
        right, open_ = right + float(each[said].sum()), open_ + int((~said).sum())
        counts[name], answers = len(truth), answers + len(truth)
    return counts, right / answers, open_ / answers + 1e-9


class Page(html.parser.HTMLParser):
    """Counts the elements of a page that a browser would run, and gathers its text."""

    def __init__(self, text: str):
        super().__init__()
        self.run, self.text = 0, ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.run += tag in ("script", "iframe", "object") or any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


def learn(case: Case, folder: Path) -> tuple[float, float, subprocess.CompletedProcess[str]]:
    """What a new user does, with seconds and processor seconds; all that a first run leaves behind is in `folder`."""
    home = folder / "home"
    home.mkdir()
    variables = {name: os.environ[name] for name in KEPT if name in os.environ}
    variables |= {"HOME": str(home), "NUMBA_CACHE_DIR": str(home / "numba")}
    pliant = str(Path(sys.executable).parent / "pliant")

    def run(options: list[str]) -> subprocess.CompletedProcess[str]:
        command = [pliant, "learn", "series", "--data", case.file, *options, "--json"]
        return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)

    began, spent = time.time(), os.times()
    done = run(case.options)
    if "?" in case.options and (listed := re.findall(r"choose from (.*)", done.stderr)):
        # The user reads what columns there are and takes the last.
        name = re.findall(r"'([^']*)'", listed[0])[-1]
        done = run([name if option == "?" else option for option in case.options])
    now = os.times()
    cpu = now.children_user + now.children_system - spent.children_user - spent.children_system
    return time.time() - began, cpu, done


def check(case: Case, folder: Path, done: subprocess.CompletedProcess[str]) -> dict[str, bool]:
    """What is right and what is not."""
    problems = case.problems | {MISSING_LABEL: int(np.isnan(case.labels).sum())}
    if done.returncode:
        return {f"exit code {done.returncode}: {done.stderr.strip().splitlines()[-1:]}": False}
    summary = json.loads(done.stdout)
    (run,) = (folder / "runs").glob("series-*")
    schema = json.loads((run / "schema.json").read_text())
    page = Page((run / "report.html").read_text())
    groups, score, exact = no_change(case)
    members, main = summary["members"], "accuracy" if case.task == "classify" else "error"
    answers = sum(groups.values())
    found = {name: group["answers"] for name, group in summary.get("groups", {}).items()}
    return {
        "task": schema["columns"]["task"] == case.task and case.task in page.text,
        "rows": schema["rows"] == case.rows,
        "answers": summary["answers"] == answers and all(one["answers"] == answers for one in members.values()),
        "groups": found == (groups if case.groups else {}),
        "problems": summary["problems"] == problems,
        "told": all(part in done.stderr for part in case.said)
        and all(f"{what}: {count:,}" in done.stderr for what, count in problems.items()),
        "no-change": abs(members["no-change"][main] - score) <= exact,
        "better than no-change": members["pliant"]["bits"] < members["no-change"]["bits"],
        "harmless": page.run == 0,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--ledger", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--cases", nargs="*", default=list(CASES))
    asked = parser.parse_args()
    figures: dict[str, Any] = {"load of the machine before": round(os.getloadavg()[0], 1)}
    wrong: list[str] = []
    for name in asked.cases:
        with tempfile.TemporaryDirectory() as temporary:
            folder = (asked.keep or Path(temporary)) / name
            folder.mkdir(parents=True)
            case = CASES[name](folder)
            seconds, cpu, done = learn(case, folder)
            checks = check(case, folder, done)
        failed = [what for what, right in checks.items() if not right]
        wrong += [f"{name}: {what}" for what in failed] + ([f"{name}: too slow"] if seconds >= LIMIT else [])
        figures |= {
            f"seconds of {name}": round(seconds, 1),
            f"CPU seconds of {name}": round(cpu, 1),
            f"checks of {name}": f"{len(checks) - len(failed)} of {len(checks)}",
        }
        verdict = f"wrong: {', '.join(failed)}" if failed else "all right"
        print(f"{name:10} {case.rows:7,} rows {seconds:6.1f} s {cpu:6.1f} CPU s   {verdict}", flush=True)
    if asked.ledger:
        append(f"A stranger's own table to a correct report in under {LIMIT} seconds, without more than --help",
               "python benchmarks/strangers.py --ledger", figures, holds=not wrong, note="; ".join(wrong))  # fmt: skip
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
