"""The page: its sections, their sentences, and the file."""

import math
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from pliant.core import Disk, UsageError
from pliant.core.record import OUTCOMES
from pliant.report.disagree import disagreements
from pliant.report.figures import Figure, figures, shared_figures
from pliant.report.health import health_of
from pliant.report.kept import kept_figure
from pliant.report.load import Loaded, Total, column, labelled, load, speed
from pliant.report.style import OURS, REFERENCE
from pliant.report.tables import Table, error_ratio, settings, tables
from pliant.report.values import (
    MAX_NAME,
    MAX_TEXT,
    amount,
    as_count,
    as_dict,
    as_list,
    is_count,
    percent,
    relative,
    short,
    show,
    show_ratio,
    signed,
    text,
)

TEMPLATE = "page.html.jinja"
HARMLESS = ("asked", "updated", "nothing to learn")
PERSISTENT = 0.8
"""No-change is right so often that accuracy says little."""
MAX_NOTES = 20


def write_report(folders: Sequence[Path], out: Path | None = None) -> Path:
    """Write the page about the runs in `folders`; returns where it is.

    Args:
        folders: run folders, finished or not; with several, the page begins with a comparison.
        out: the file to write. Default: report.html in the first folder.

    Raises:
        UsageError: no folder, no run in one of them, one of a newer version, or `out` cannot be written.
    """
    if not folders:
        raise UsageError("write_report got no run folder; give at least one, such as runs/digits-001")
    folders = [Path(folder) for folder in folders]
    target = folders[0] / "report.html" if out is None else Path(out)
    page = _page(labelled([load(folder) for folder in folders]))
    try:
        Disk().replace_file(target, page.encode())
    except OSError as error:
        raise UsageError(f"the report cannot be written to {target} ({error.strerror or error})") from None
    return target


def _page(runs: list[Loaded]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = resources.files(__package__).joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else short(text(value), MAX_TEXT),
    )
    sections = [_section(run, f"run{index}") for index, run in enumerate(runs)]
    comparison = _comparison(runs) if len(runs) > 1 else None
    title = f"pliant: {runs[0].name}" if len(runs) == 1 else f"pliant: {len(runs)} runs"
    return environment.from_string(source).render(title=title, sections=sections, comparison=comparison)


def _section(run: Loaded, prefix: str) -> dict[str, Any]:
    return {
        "id": prefix,
        "name": run.name if run.label == run.name else f"{run.name} ({run.label})",
        "color": run.color,
        "command": f"pliant {run.command}{_asked(run)}",
        "verdict": _verdict(run),
        "notes": _notes(run),
        "tiles": _tiles(run) if run.names else [],
        "figures": _figures(run, prefix) if run.names else [],
        "health": health_of(run, prefix) if run.names else None,
        "tables": [table for table in tables(run) if table.rows] if run.names else [],
        "settings": [table for table in settings(run) if table.rows],
    }


def _figures(run: Loaded, prefix: str) -> list[Figure]:
    kept = kept_figure(run, prefix)
    return [*([kept] if kept else []), *figures(run, prefix)]


def _asked(run: Loaded) -> str:
    """What a run on a table predicts."""
    target, data, stream = (short(run.config.get(key, ""), MAX_NAME) for key in ("target", "data", "stream"))
    data = data if stream in ("", "None") else stream
    if not target or not data:
        return ""
    told = [short(run.config[key]) for key in ("task",) if key in run.config]
    told += [f"{key} {short(run.config[key])}" for key in ("horizon", "delay") if run.config.get(key, "0") != "0"]
    return f": {target} in {data}" + (f" ({', '.join(told)})" if told else "")


def _verdict(run: Loaded) -> str:
    if not run.names:
        return "Nothing was recorded yet."
    name = short(run.names[0], MAX_NAME)
    ours = run.totals[run.names[0]]
    if not math.isfinite(ours.saved):
        return f"{name} has no finite score against {run.reference} over {run.answers:,} answers."
    verb, so_far = "saved" if ours.saved >= 0 else "lost", "" if run.summary is not None else " so far"
    sentence = (
        f"{name} {verb} {show(abs(ours.saved), 0)} bits against {run.reference} over {show(ours.answers, 0)} answers"
        f"{so_far} ({show(abs(ours.saved_per_answer))} per answer), {_measured(run)}"
    )
    rivals = [_rival(run, rival) for rival in _rivals(run)]
    return "; ".join([sentence, *rivals]) + "."


def _measured(run: Loaded) -> str:
    """Our accuracy or error, in words."""
    ours = run.totals[run.names[0]]
    if run.measure == "accuracy":
        return f"accuracy {show(ours.accuracy)}"
    ratio = _error_ratio(run)
    against = f", {show(ratio)} times that of {run.reference}" if math.isfinite(ratio) else ""
    return f"absolute error {amount(ours.error)}{against}"


def _error_ratio(run: Loaded) -> float:
    reference = run.totals.get(run.reference, Total())
    return error_ratio(run, run.names[0], reference.error)


def _rivals(run: Loaded) -> list[str]:
    """The opponents that the verdict speaks of: the one that is retrained, and whoever did best."""
    scored = {name: run.totals[name].saved_per_answer for name in run.names[1:] if name != run.reference}
    scored = {name: saved for name, saved in scored.items() if math.isfinite(saved)}
    best = [max(scored, key=scored.__getitem__)] if scored else []
    return list(dict.fromkeys([*(name for name in ("retrained",) if name in scored), *best]))


def _rival(run: Loaded, name: str) -> str:
    ours, total = run.totals[run.names[0]], run.totals[name]
    every = as_count(run.config.get("retrain", "")) if name == "retrained" else None
    who = f"{name} every {every:,}" if every is not None else short(name, MAX_NAME)
    verb = "saved" if total.saved >= 0 else "lost"
    ahead = ", more than ours," if total.saved_per_answer > ours.saved_per_answer else ""
    cost = f" at {show_ratio(total.cpu / ours.cpu)} times the compute" if ours.cpu > 0 and total.cpu > 0 else ""
    return f"{who} {verb} {show(abs(total.saved_per_answer))} per answer{ahead}{cost}"


def _notes(run: Loaded) -> list[str]:
    notes = []
    if run.summary is None and run.records:
        wanted = as_count(run.config.get("answers", ""))
        of = f" of {wanted:,}" if wanted is not None else ""
        notes.append(f"This run is not complete: {run.answers:,}{of} answers so far. Numbers are from its records.")
    stopped = as_dict(run.summary).get("stopped")
    notes += [f"The data broke off: {stopped}"] if isinstance(stopped, str) else []
    told = [note for note in as_list(as_dict(run.summary).get("notes")) if isinstance(note, str)]
    notes += told[:MAX_NOTES]
    notes += [f"The run left {len(told) - MAX_NOTES:,} more notes in summary.json."] if len(told) > MAX_NOTES else []
    still = run.totals.get(REFERENCE, Total()).accuracy
    if run.config.get("task") == "classify" and still > PERSISTENT:
        notes.append(
            f"No-change is right {percent(still)} of the time here: this stream rewards predicting persistence, "
            "so read bits saved and temporal kappa, not accuracy."
        )
    notes += disagreements(run)
    for name in run.names:
        holes = int(np.isnan(column(run, name, "bits")).sum())
        if holes:
            notes.append(f"{short(name, MAX_NAME)} has no finite score in {holes:,} of {len(run.records):,} windows.")
    counts: Counter[str] = Counter()
    for row in run.records:
        counts.update({name: count for name, count in as_dict(row.get("outcomes")).items() if is_count(count)})
    for outcome, count in counts.items():
        if count and outcome not in HARMLESS:
            notes.append(f"{outcome}, {count:,} times: {OUTCOMES.get(outcome, 'unknown to this version')}.")
    return notes


def _tiles(run: Loaded) -> list[tuple[str, str]]:
    """The few numbers that matter, large: value, meaning."""
    name = run.names[0]
    ours, spent = run.totals[name], speed(run)
    tiles = [(signed(ours.saved_per_answer), f"bits saved per answer against {short(run.reference)}")]
    if run.measure == "accuracy":
        tiles.append((show(ours.accuracy), "accuracy"))
    else:
        tiles.append((amount(ours.error), "absolute error, in units of the target"))
        ratio = _error_ratio(run)
        tiles += [(show(ratio) + "\N{MULTIPLICATION SIGN}", f"the error of {run.reference}")] if ratio >= 0 else []
    rival = next(iter(_rivals(run)), None)
    if rival is not None and ours.cpu > 0:
        who = short(rival)
        tiles.append((signed(run.totals[rival].saved_per_answer), f"bits saved per answer by {who}"))
        tiles.append((relative(run.totals[rival].cpu, ours.cpu), f"compute of {who} relative to {short(name)}"))
    if np.nansum(spent.cpu) > 0:
        rate = float(np.nansum(spent.answers) / np.nansum(spent.cpu))
        tiles.append((show(rate, 0), f"answers per CPU second of {short(name)}, learning included"))
    return tiles


def _comparison(runs: list[Loaded]) -> dict[str, Any]:
    """The beginning of a page about several runs: their own lines over each other."""
    known = [run for run in runs if run.names]
    measures = {run.measure for run in known} or {"accuracy"}
    columns = {
        "Answers": lambda total: show(total.answers, 0),
        "Bits saved per answer": lambda total: signed(total.saved_per_answer),
        "Bits saved": lambda total: signed(total.saved, 0),
        **({"Accuracy": lambda total: show(total.accuracy, 3)} if "accuracy" in measures else {}),
        **({"Absolute error": lambda total: amount(total.error)} if "error" in measures else {}),
        "CPU seconds": lambda total: show(total.cpu, 1),
    }
    rows = []
    for run in runs:
        ours = run.totals[run.names[0]] if run.names else Total()
        state = "" if run.summary is not None else " (not complete)"
        rows.append([run.label + state, *(cell(ours) for cell in columns.values())])
    table = Table("The runs", ["", *columns], rows, f"Scores of {OURS} itself, against the reference of each run.")
    return {"figures": shared_figures(known), "table": table}
