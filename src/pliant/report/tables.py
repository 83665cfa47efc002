"""The tables of a run."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from pliant.report.load import Loaded, Total, speed
from pliant.report.style import OURS
from pliant.report.values import (
    MAX_NAME,
    NONE,
    amount,
    as_dict,
    is_count,
    number,
    relative,
    short,
    show,
    signed,
    zero,
)

MAX_ROWS = 50


@dataclass(frozen=True)
class Table:
    """A table of the page; the row whose first cell is `ours` stands out."""

    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    ours: str = ""
    prose: bool = False
    """The first cells are sentences, which may wrap."""


def tables(run: Loaded) -> list[Table]:
    """Scores, speed, problems, parts of the stream; some without rows."""
    return [_score_table(run), _visit_table(run), _speed_table(run), _problem_table(run), _group_table(run)]


def settings(run: Loaded) -> list[Table]:
    """What was asked for, and where it ran."""
    return [
        Table(title, ["", ""], [[key, value] for key, value in values.items()])
        for title, values in (("Config", run.config), ("Environment", run.environment))
    ]


def _score_table(run: Loaded) -> Table:
    ours, known = run.totals[run.names[0]], {name: run.member(name) for name in run.names}
    errors = run.totals[run.reference].error if run.reference in run.totals else math.nan
    columns: dict[str, Callable[[str, Total], str]] = {
        "Bits per answer": lambda name, total: show(total.bits, 3),
        "Bits saved": lambda name, total: zero(signed(total.saved, 0)),
        "Accuracy": lambda name, total: show(total.accuracy, 3),
        "Absolute error": lambda name, total: amount(total.error),
        f"Error relative to {short(run.reference)}": lambda name, total: show(error_ratio(run, name, errors), 3),
        "Brier": lambda name, total: show(number(known[name].get("brier")), 3),
        "Calibration error": lambda name, total: show(number(known[name].get("calibration")), 3),
        "Kappa": lambda name, total: show(number(known[name].get("kappa")), 3),
        "Temporal kappa": lambda name, total: show(number(known[name].get("temporal_kappa")), 3),
        "Missed": lambda name, total: show(number(known[name].get("missed")) or math.nan, 0),
        "CPU seconds": lambda name, total: show(total.cpu, 1),
        f"Compute relative to {short(run.names[0])}": lambda name, total: relative(total.cpu, ours.cpu),
    }
    cells = {head: [cell(name, run.totals[name]) for name in run.names] for head, cell in columns.items()}
    cells = {head: column for head, column in cells.items() if set(column) != {NONE}}
    names = [short(name, MAX_NAME) for name in run.names]
    rows = [[name, *(column[index] for column in cells.values())] for index, name in enumerate(names)]
    note = "Bits, Brier and calibration error: lower is better; bits saved, accuracy and kappa: higher is better."
    if run.measure == "error":
        note = "Bits and errors: lower is better; bits saved: higher is better. The error is in units of the target."
    return Table("Scores", ["", *cells], rows, note, names[0])


def error_ratio(run: Loaded, name: str, reference: float) -> float:
    """A member's absolute error divided by that of no-change; worked out if the summary lacks it."""
    known = run.member(name)
    if "relative_error" in known:
        return number(known["relative_error"])
    return run.totals[name].error / reference if reference > 0 else math.nan


def _visit_table(run: Loaded) -> Table:
    visits = {name: as_dict(run.member(name).get("visits")) for name in run.names}
    kinds = list(dict.fromkeys(kind for visit in visits.values() for kind in visit))
    head = ["", *(f"{short(kind)}: {what}" for kind in kinds for what in ("accuracy", "bits"))]
    rows = [
        [
            short(name, MAX_NAME),
            *(show(number(as_dict(visit.get(kind)).get(key)), 3) for kind in kinds for key in ("accuracy", "bits")),
        ]
        for name, visit in visits.items()
        if visit
    ]
    note = "First visit: an item that is new in this task. Revisit: it was answered before. Held out: never learned."
    return Table("New and known items", head, rows if kinds else [], note, short(run.names[0], MAX_NAME))


def _group_table(run: Loaded) -> Table:
    groups = [(name, as_dict(group)) for name, group in run.told("groups").items()]
    groups = [(name, group) for name, group in groups if is_count(group.get("answers"))]
    groups.sort(key=lambda pair: (-pair[1]["answers"], pair[0]))
    rows = []
    for name, group in groups[:MAX_ROWS]:
        answers = group["answers"]
        saved = number(group.get("bits_saved")) / answers if answers else math.nan
        measure = number(group.get(run.measure))
        rows.append([short(name, MAX_NAME), f"{answers:,}", zero(signed(saved, 3)),
                     amount(measure) if run.measure == "error" else show(measure, 3)])  # fmt: skip
    head = ["", "Answers", "Bits saved per answer", "Absolute error" if run.measure == "error" else "Accuracy"]
    more = f" The {len(groups) - MAX_ROWS:,} smallest are left out." if len(groups) > MAX_ROWS else ""
    return Table("Groups", head, rows, f"Scores of {OURS} itself; bits saved against {run.reference}.{more}")


def _speed_table(run: Loaded) -> Table:
    spent, name, summary = speed(run), short(run.names[0]), as_dict(run.summary)
    rows = []
    window = f"a window of {np.median(spent.answers):,.0f} answers" if len(spent.answers) else ""
    if spent.wall.sum() > 0:
        p50, p99 = (show(float(np.quantile(spent.wall, q)), 3) for q in (0.5, 0.99))
        rows += [
            ["Answers per second, all members together", show(float(spent.answers.sum() / spent.wall.sum()), 0)],
            [f"Seconds for {window}, all members: median, 99th percentile", f"{p50}, {p99}"],
        ]
    if np.isfinite(spent.cpu).any():
        p50, p99 = (show(float(np.nanquantile(spent.cpu, q)), 3) for q in (0.5, 0.99))
        rows.append([f"CPU seconds for {window}, {name}: median, 99th percentile", f"{p50}, {p99}"])
    for act in ("predict", "learn"):
        times = [number(as_dict(run.told("latency").get(act)).get(key)) for key in ("p50", "p99", "p999")]
        if np.isfinite(times).any():
            words = f"Milliseconds to {act}, {name}: median, 99th and 99.9th percentile"
            rows.append([words, ", ".join(map(amount, times))])
    if math.isfinite(rate := number(summary.get("rows_per_second"))):
        rows.append(["Rows per second", show(rate, 0 if rate >= 10 else 2)])
    memory = [number(row.get("rss")) for row in run.timing]
    memory.append(number(summary.get("peak_rss")))
    if np.isfinite(memory).any():
        rows.append(["Peak memory of the process, MiB", show(float(np.nanmax(memory)) / 2**20, 0)])
    for key, words in (("parameters", "Parameters"), ("state_bytes", "State, bytes"), ("updates", "Updates")):
        rows += [[words, show(number(summary[key]), 0)]] if key in summary else []
    if spent.sessions:
        rows.append(["Seconds in all; sessions", f"{show(spent.total, 0)}; {spent.sessions}"])
    elif math.isfinite(seconds := number(summary.get("seconds"))):
        rows.append(["Seconds in all", show(seconds, 0)])
    return Table("Speed and memory", ["", ""], rows)


def _problem_table(run: Loaded) -> Table:
    problems = [(words, count) for words, count in run.told("problems").items() if is_count(count)]
    problems.sort(key=lambda pair: (-pair[1], pair[0]))
    rows = [[words, f"{count:,}"] for words, count in problems[:MAX_ROWS]]
    more = len(problems) - MAX_ROWS
    note = f"{more:,} more that were met less often are left out." if more > 0 else ""
    return Table("Problems met while reading", ["", "Times"], rows, note, prose=True)
