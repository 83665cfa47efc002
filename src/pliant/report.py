"""One HTML page about one or more runs, for a person who looks rather than reads.

The page needs nothing but itself: figures are inline SVG, there are no scripts and no requests. The
same folders give the same bytes. Whatever comes from a run (names, config, environment) is text and
nothing else: jinja2 escapes it, matplotlib must not read it as mathematics, and characters that do
not print are replaced.

Cost is summed over all lines of timing.jsonl, also over windows that a stopped run did twice, since
that much was spent.
"""

import io
import math
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib import resources
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pliant.core import Disk, UsageError
from pliant.core.record import OUTCOMES
from pliant.core.run import Run

if TYPE_CHECKING:
    from markupsafe import Markup
    from matplotlib.axes import Axes

Floats = NDArray[np.float64]

TEMPLATE = "report_page.html.jinja"
OURS, REFERENCE = "pliant", "no-change"
NONE, MINUS, TIMES = "\N{EN DASH}", "\N{MINUS SIGN}", "\N{MULTIPLICATION SIGN}"

# Okabe & Ito 2008: told apart by color-blind readers too. Each opponent keeps its color on every page.
BLUE = "#0072B2"
PALETTE = (BLUE, "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
COLORS = {OURS: BLUE, "retrained": "#D55E00", "boosting": "#009E73", "frozen": "#CC79A7", "majority": "#E69F00",
          REFERENCE: "#666666"}  # fmt: skip
DASHES = {"retrained": "-", "frozen": (0, (5, 1.5)), "majority": (0, (1.5, 1.5)), REFERENCE: (0, (4, 3))}

WIDE, HALF, SMALL = (11.0, 3.3), (5.4, 3.7), (5.4, 2.4)  # inches; the page scales them
FONT = 9.5  # points
STYLE = {
    "svg.fonttype": "none", "svg.hashsalt": "pliant", "text.parse_math": False, "font.size": FONT,
    "font.family": ["DejaVu Sans"], "axes.spines.top": False, "axes.spines.right": False,
    "axes.edgecolor": "#888888", "axes.labelcolor": "#444444", "xtick.color": "#888888", "ytick.color": "#888888",
    "xtick.labelcolor": "#444444", "ytick.labelcolor": "#444444", "axes.facecolor": "none", "figure.facecolor": "none",
}  # fmt: skip
SMOOTH_FROM, POINTS = 60, 40
"""Lines with more windows than the first are smoothed, over about 1/POINTS of their length."""
MAX_LABEL = 24
RARE = 0.002
HARMLESS = ("asked", "updated", "nothing to learn")
HIGHER = "Higher is better. The number behind a name is its mean over the whole run."


@dataclass(frozen=True)
class _Total:
    """What a member came to over the whole run; NaN where unknown."""

    answers: float
    bits: float
    saved: float
    saved_per_answer: float
    accuracy: float
    cpu: float


@dataclass(frozen=True)
class _Loaded:
    """A run folder as read. `names` are its members, ours first; `label` and `color` tell it from other runs."""

    name: str
    label: str
    command: str
    config: dict[str, Any]
    environment: dict[str, Any]
    color: str
    records: list[dict[str, Any]]
    timing: list[dict[str, Any]]
    summary: dict[str, Any] | None
    reference: str
    names: list[str]
    totals: dict[str, _Total]

    @property
    def answers(self) -> int:
        return int(self.records[-1]["answers"]) if self.records else 0

    def member(self, name: str) -> dict[str, Any]:
        """A member's part of the summary, empty if there is none."""
        return _dict(_dict(_dict(self.summary).get("members")).get(name))


@dataclass(frozen=True)
class _Line:
    label: str
    x: Floats
    y: Floats
    color: str
    strong: bool = False
    dashes: Any = "-"


@dataclass(frozen=True)
class _Point:
    name: str
    total: _Total
    color: str
    strong: bool

    @property
    def y(self) -> float:
        return self.total.saved_per_answer

    @property
    def text(self) -> str:
        return f"{_short(self.name)} {_zero(_signed(self.y))}"


@dataclass(frozen=True)
class _Figure:
    title: str
    caption: str
    svg: "Markup"
    wide: bool = True


@dataclass(frozen=True)
class _Table:
    title: str
    head: list[str]
    rows: list[list[str]]
    note: str = ""
    ours: str = ""


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
    page = _page(_labelled([_load(folder) for folder in folders]))
    try:
        Disk().replace_file(target, page.encode())
    except OSError as error:
        raise UsageError(f"the report cannot be written to {target} ({error.strerror or error})") from None
    return target


def _page(runs: list[_Loaded]) -> str:
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    source = resources.files("pliant").joinpath(TEMPLATE).read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: value if isinstance(value, Markup) else _text(value),
    )
    sections = [_section(run, f"run{index}") for index, run in enumerate(runs)]
    comparison = _comparison(runs) if len(runs) > 1 else None
    title = f"pliant: {runs[0].name}" if len(runs) == 1 else f"pliant: {len(runs)} runs"
    return environment.from_string(source).render(title=title, sections=sections, comparison=comparison)


# what a run folder says


def _load(folder: Path) -> _Loaded:
    run = Run(folder)
    config = run.config()
    records = [row for row in map(_dict, run.lines("records.jsonl")) if _is_count(row.get("answers"))]
    timing = [row for row in map(_dict, run.lines("timing.jsonl")) if row]
    summary = run.read("summary.json")
    summary = summary if isinstance(summary, dict) else None
    reference = _text(_dict(summary).get("reference", REFERENCE))
    found = [*_dict(_dict(summary).get("members")), *(name for row in records for name in _dict(row.get("members")))]
    names = sorted(dict.fromkeys(found), key=lambda name: name != OURS)
    name = _text(folder.resolve().name)
    loaded = _Loaded(
        name=name,
        label=name,
        command=_text(run.command()),
        config=_flat(config),
        environment=_flat(_dict(run.read("environment.json"))),
        color=BLUE,
        records=records,
        timing=timing,
        summary=summary,
        reference=reference,
        names=names,
        totals={},
    )
    loaded.totals.update({name: _total(loaded, name) for name in names})
    return loaded


def _labelled(runs: list[_Loaded]) -> list[_Loaded]:
    """Label each run by what differs between the configs, or by its name if that is no use; and color them."""
    keys = dict.fromkeys(key for run in runs for key in run.config)
    differ = [key for key in keys if len({run.config.get(key) for run in runs}) > 1]
    labels = [", ".join(f"{key}={run.config[key]}" for key in differ if key in run.config) for run in runs]
    if len(set(labels)) < len(labels) or any(not 0 < len(label) <= MAX_LABEL for label in labels):
        labels = [run.name for run in runs]
    if len(set(labels)) < len(labels):
        labels = [f"{number} {label}" for number, label in enumerate(labels, 1)]
    colors = islice(cycle(PALETTE), len(runs))
    return [replace(run, label=label, color=color) for run, label, color in zip(runs, labels, colors, strict=True)]


def _total(run: _Loaded, name: str) -> _Total:
    """Totals from the summary; what it lacks is worked out from the records."""
    counts, bits = _column(run, name, "answers"), _column(run, name, "bits")
    saved, accuracy = _column(run, run.reference, "bits") - bits, _column(run, name, "accuracy")
    known = run.member(name)

    def value(key: str, otherwise: float) -> float:
        return _number(known[key]) if key in known else otherwise

    answers = value("answers", float(np.nansum(counts)))
    total_saved = value("bits_saved", _mean(saved, counts) * answers)
    return _Total(
        answers=answers,
        bits=value("bits", _mean(bits, counts)),
        saved=total_saved,
        saved_per_answer=total_saved / answers if answers else math.nan,
        accuracy=value("accuracy", _mean(accuracy, counts)),
        cpu=_cost(run, name),
    )


def _cost(run: _Loaded, name: str) -> float:
    """CPU seconds of a member in all sessions; from the summary if there is no timing."""
    spent = [_number(_dict(row.get("cpu")).get(name)) for row in run.timing]
    spent = [seconds for seconds in spent if math.isfinite(seconds)]
    return sum(spent) if spent else _number(_dict(_dict(run.summary).get("cpu_seconds")).get(name))


def _column(run: _Loaded, name: str, key: str) -> Floats:
    """A value of a member in every window `(n,)`, NaN where it is missing or not finite."""
    values = [_number(_dict(_dict(row.get("members")).get(name)).get(key)) for row in run.records]
    column = np.array(values, dtype=np.float64)
    return np.where(np.isfinite(column), column, np.nan)


def _answers(run: _Loaded) -> Floats:
    return np.array([row["answers"] for row in run.records], dtype=np.float64)


def _tasks(run: _Loaded) -> list[tuple[float, float, str]]:
    """Start, end and name of each task, in answers; empty if the run knows no tasks."""
    tasks: list[tuple[float, float, str]] = []
    before = 0.0
    for row in run.records:
        if row.get("task") is None:
            return []
        name, end = _text(row["task"]), float(row["answers"])
        if tasks and tasks[-1][2] == name:
            tasks[-1] = (tasks[-1][0], end, name)
        else:
            tasks.append((before, end, name))
        before = end
    return tasks


@dataclass(frozen=True)
class _Speed:
    """Seconds that windows took; those that a session began in the middle are left out."""

    ends: Floats
    answers: Floats
    wall: Floats
    cpu: Floats
    total: float
    sessions: int


def _speed(run: _Loaded) -> _Speed:
    ends = [0, *(int(row["answers"]) for row in run.records)]
    size = {end: end - start for start, end in pairwise(ends)}
    last: dict[Any, float] = {}
    windows = []
    for row in run.timing:
        session, end, seconds = row.get("session"), row.get("answers"), _number(row.get("seconds"))
        if not isinstance(session, int) or not isinstance(end, int) or not math.isfinite(seconds):
            continue
        if session in last or session == 0:
            cpu = _number(_dict(row.get("cpu")).get(OURS))
            windows.append((float(end), float(size.get(end, 0)), seconds - last.get(session, 0.0), cpu))
        last[session] = seconds
    kept = np.array([window for window in windows if window[1] > 0], dtype=np.float64).reshape(-1, 4)
    return _Speed(kept[:, 0], kept[:, 1], kept[:, 2], kept[:, 3], sum(last.values(), 0.0), len(last))


# a section of the page


def _section(run: _Loaded, prefix: str) -> dict[str, Any]:
    recorded = bool(run.records) and bool(run.names)
    return {
        "id": prefix,
        "name": run.name if run.label == run.name else f"{run.name} ({run.label})",
        "color": run.color,
        "command": f"pliant {run.command}",
        "verdict": _verdict(run),
        "notes": _notes(run),
        "tiles": _tiles(run) if recorded else [],
        "figures": _figures(run, prefix) if recorded else [],
        "tables": [table for table in _tables(run) if table.rows] if recorded else [],
        "settings": [table for table in _settings(run) if table.rows],
    }


def _verdict(run: _Loaded) -> str:
    if not run.records or not run.names:
        return "Nothing was recorded yet."
    name = run.names[0]
    ours = run.totals[name]
    if not math.isfinite(ours.saved):
        return f"{name} has no finite score against {run.reference} over {run.answers:,} answers."
    verb, so_far = "saved" if ours.saved >= 0 else "lost", "" if run.summary is not None else " so far"
    sentence = (
        f"{name} {verb} {_show(abs(ours.saved), 0)} bits against {run.reference} over {_show(ours.answers, 0)} answers"
        f"{so_far} ({_show(abs(ours.saved_per_answer))} per answer), accuracy {_show(ours.accuracy)}"
    )
    rivals = [_rival(run, rival) for rival in _rivals(run)]
    return "; ".join([sentence, *rivals]) + "."


def _rivals(run: _Loaded) -> list[str]:
    """The opponents that the verdict speaks of: the one that is retrained, and whoever did best."""
    scored = {name: run.totals[name].saved_per_answer for name in run.names[1:] if name != run.reference}
    scored = {name: saved for name, saved in scored.items() if math.isfinite(saved)}
    best = [max(scored, key=scored.__getitem__)] if scored else []
    return list(dict.fromkeys([*(name for name in ("retrained",) if name in scored), *best]))


def _rival(run: _Loaded, name: str) -> str:
    ours, total = run.totals[run.names[0]], run.totals[name]
    every = run.config.get("retrain") if name == "retrained" else None
    who = f"{name} every {int(every):,}" if every is not None and every.isdigit() else name
    verb = "saved" if total.saved >= 0 else "lost"
    ahead = ", more than ours," if total.saved_per_answer > ours.saved_per_answer else ""
    cost = f" at {_show_ratio(total.cpu / ours.cpu)} times the compute" if ours.cpu > 0 and total.cpu > 0 else ""
    return f"{who} {verb} {_show(abs(total.saved_per_answer))} per answer{ahead}{cost}"


def _notes(run: _Loaded) -> list[str]:
    notes = []
    if run.summary is None and run.records:
        wanted = run.config.get("answers", "")
        of = f" of {int(wanted):,}" if wanted.isdigit() else ""
        notes.append(f"This run is not complete: {run.answers:,}{of} answers so far. Numbers are from its records.")
    for name in run.names:
        holes = int(np.isnan(_column(run, name, "bits")).sum())
        if holes:
            notes.append(f"{name} has no finite score in {holes:,} of {len(run.records):,} windows.")
    counts: Counter[str] = Counter()
    for row in run.records:
        counts.update({name: count for name, count in _dict(row.get("outcomes")).items() if _is_count(count)})
    for outcome, count in counts.items():
        if count and outcome not in HARMLESS:
            notes.append(f"{outcome}, {count:,} times: {OUTCOMES.get(outcome, 'unknown to this version')}.")
    return notes


def _tiles(run: _Loaded) -> list[tuple[str, str]]:
    """The few numbers that matter, large: value, meaning."""
    name = run.names[0]
    ours, speed = run.totals[name], _speed(run)
    tiles = [
        (_signed(ours.saved_per_answer), f"bits saved per answer against {run.reference}"),
        (_show(ours.accuracy), "accuracy"),
    ]
    rival = next(iter(_rivals(run)), None)
    if rival is not None and ours.cpu > 0:
        tiles.append((_signed(run.totals[rival].saved_per_answer), f"bits saved per answer by {rival}"))
        tiles.append((_relative(run.totals[rival].cpu, ours.cpu), f"compute of {rival} relative to {name}"))
    if np.nansum(speed.cpu) > 0:
        rate = float(np.nansum(speed.answers) / np.nansum(speed.cpu))
        tiles.append((_show(rate, 0), f"answers per CPU second of {name}, learning included"))
    return tiles


def _tables(run: _Loaded) -> list[_Table]:
    return [_score_table(run), _visit_table(run), _speed_table(run)]


def _score_table(run: _Loaded) -> _Table:
    ours, known = run.totals[run.names[0]], {name: run.member(name) for name in run.names}
    columns: dict[str, Callable[[str, _Total], str]] = {
        "Bits per answer": lambda name, total: _show(total.bits, 3),
        "Bits saved": lambda name, total: _zero(_signed(total.saved, 0)),
        "Accuracy": lambda name, total: _show(total.accuracy, 3),
        "Brier": lambda name, total: _show(_number(known[name].get("brier")), 3),
        "Calibration error": lambda name, total: _show(_number(known[name].get("calibration")), 3),
        "Kappa": lambda name, total: _show(_number(known[name].get("kappa")), 3),
        "Temporal kappa": lambda name, total: _show(_number(known[name].get("temporal_kappa")), 3),
        "Missed": lambda name, total: _show(_number(known[name].get("missed")) or math.nan, 0),
        "CPU seconds": lambda name, total: _show(total.cpu, 1),
        f"Compute relative to {run.names[0]}": lambda name, total: _relative(total.cpu, ours.cpu),
    }
    cells = {head: [cell(name, run.totals[name]) for name in run.names] for head, cell in columns.items()}
    cells = {head: column for head, column in cells.items() if set(column) != {NONE}}
    rows = [[name, *(column[index] for column in cells.values())] for index, name in enumerate(run.names)]
    note = "Bits, Brier and calibration error: lower is better; bits saved, accuracy and kappa: higher is better."
    return _Table("Scores", ["", *cells], rows, note, run.names[0])


def _visit_table(run: _Loaded) -> _Table:
    visits = {name: _dict(run.member(name).get("visits")) for name in run.names}
    kinds = list(dict.fromkeys(kind for visit in visits.values() for kind in visit))
    head = ["", *(f"{kind}: {what}" for kind in kinds for what in ("accuracy", "bits"))]
    rows = [
        [name, *(_show(_number(_dict(visit.get(kind)).get(key)), 3) for kind in kinds for key in ("accuracy", "bits"))]
        for name, visit in visits.items()
        if visit
    ]
    note = "First visit: an item that is new in this task. Revisit: it was answered before. Held out: never learned."
    return _Table("New and known items", head, rows if kinds else [], note, run.names[0])


def _speed_table(run: _Loaded) -> _Table:
    speed, name = _speed(run), run.names[0]
    rows = []
    window = f"a window of {np.median(speed.answers):,.0f} answers" if len(speed.answers) else ""
    if speed.wall.sum() > 0:
        p50, p99 = (_show(float(np.quantile(speed.wall, q)), 3) for q in (0.5, 0.99))
        rows += [
            ["Answers per second, all members together", _show(float(speed.answers.sum() / speed.wall.sum()), 0)],
            [f"Seconds for {window}, all members: median, 99th percentile", f"{p50}, {p99}"],
        ]
    if np.isfinite(speed.cpu).any():
        p50, p99 = (_show(float(np.nanquantile(speed.cpu, q)), 3) for q in (0.5, 0.99))
        rows.append([f"CPU seconds for {window}, {name}: median, 99th percentile", f"{p50}, {p99}"])
    memory = [_number(row.get("rss")) for row in run.timing]
    memory.append(_number(_dict(run.summary).get("peak_rss")))
    if np.isfinite(memory).any():
        rows.append(["Peak memory of the process, MiB", _show(float(np.nanmax(memory)) / 2**20, 0)])
    for key, words in (("parameters", "Parameters"), ("state_bytes", "State, bytes"), ("updates", "Updates")):
        rows += [[words, _show(_number(_dict(run.summary)[key]), 0)]] if key in _dict(run.summary) else []
    if speed.sessions:
        rows.append(["Seconds in all; sessions", f"{_show(speed.total, 0)}; {speed.sessions}"])
    return _Table("Speed and memory", ["", ""], rows)


def _settings(run: _Loaded) -> list[_Table]:
    return [
        _Table(title, ["", ""], [[key, value] for key, value in values.items()])
        for title, values in (("Config", run.config), ("Environment", run.environment))
    ]


def _comparison(runs: list[_Loaded]) -> dict[str, Any]:
    """The beginning of a page about several runs: their own lines over each other."""
    recorded = [run for run in runs if run.records and run.names]
    rows = []
    for run in runs:
        ours = run.totals[run.names[0]] if run.names else _Total(*[math.nan] * 6)
        state = "" if run.summary is not None else " (not complete)"
        rows.append([run.label + state, _show(ours.answers, 0), _signed(ours.saved_per_answer), _signed(ours.saved, 0),
                     _show(ours.accuracy, 3), _show(ours.cpu, 1)])  # fmt: skip
    head = ["", "Answers", "Bits saved per answer", "Bits saved", "Accuracy", "CPU seconds"]
    table = _Table("The runs", head, rows, f"Scores of {OURS} itself, against the reference of each run.")
    return {"figures": _shared_figures(recorded) if recorded else [], "table": table}


# figures


def _figures(run: _Loaded, prefix: str) -> list[_Figure]:
    points = [_Point(name, run.totals[name], _color(name), name == run.names[0]) for name in run.names]
    found = [
        _time_figure(run, prefix, "bits"),
        _time_figure(run, prefix, "accuracy"),
        _compute_figure(points, prefix),
        _reliability_figure(run, prefix),
        _pace_figure(run, prefix),
        _memory_figure(run, prefix),
    ]
    return [figure for figure in found if figure is not None]


def _curve(run: _Loaded, name: str, kind: str) -> Floats:
    own = _column(run, name, kind)
    return _column(run, run.reference, kind) - own if kind == "bits" else own


def _worth(total: _Total, kind: str) -> str:
    return _signed(total.saved_per_answer) if kind == "bits" else _show(total.accuracy)


def _time_figure(run: _Loaded, prefix: str, kind: str) -> _Figure:
    x, tasks = _answers(run), _tasks(run)
    lines = []
    for name in run.names:
        if kind == "bits" and name == run.reference:
            continue
        y = _smooth(_curve(run, name, kind), tasks, x)
        label = f"{_short(name)} {_worth(run.totals[name], kind)}"
        lines.append(_Line(label, x, y, _color(name), name == run.names[0], DASHES.get(name, "-")))
    what = f"Bits saved per answer against {run.reference}" if kind == "bits" else "Accuracy"
    caption = HIGHER if kind == "bits" else "As above."
    return _over_time(prefix, kind, what, caption, lines, tasks, run.reference)


def _shared_figures(runs: list[_Loaded]) -> list[_Figure]:
    tasks = [_tasks(run) for run in runs]
    agree = all(a[:-1] == b[: len(a) - 1] for a, b in pairwise(sorted(tasks, key=len)))
    shared = max(tasks, key=len) if agree else []
    figures = []
    for kind, what in (("bits", "Bits saved per answer"), ("accuracy", "Accuracy")):
        lines = []
        for index, (run, own) in enumerate(zip(runs, tasks, strict=True)):
            x, name = _answers(run), run.names[0]
            y = _smooth(_curve(run, name, kind), own, x)
            dashes = "-" if index < len(PALETTE) else (0, (5, 1.5))
            label = f"{_short(run.label)} {_worth(run.totals[name], kind)}"
            lines.append(_Line(label, x, y, run.color, True, dashes))
        caption = f"{OURS} in each run. {HIGHER}" if kind == "bits" else "As above."
        figures.append(_over_time("shared", kind, what, caption, lines, shared, runs[0].reference))
    points = [_Point(run.label, run.totals[run.names[0]], run.color, True) for run in runs]
    compute = _compute_figure(points, "shared")
    return [*figures, compute] if compute else figures


def _over_time(
    prefix: str, kind: str, what: str, caption: str, lines: list[_Line],
    tasks: list[tuple[float, float, str]], reference: str,
) -> _Figure:  # fmt: skip
    width = max((_width(len(line.x)) for line in lines), default=1)
    if kind == "bits":
        caption += " Bands are tasks." if len(tasks) > 1 else ""
        caption += f" Lines are running means over {width} windows, never across a change of task." if width > 1 else ""

    def paint(axes: "Axes") -> None:
        low, high = _limits(lines) if kind == "bits" else (0.0, 1.02)
        axes.set_ylim(low, high)
        axes.set_xlim(0, max((float(line.x[-1]) for line in lines), default=0) or 1)
        _paint_tasks(axes, tasks)
        if kind == "bits":
            axes.axhline(0, color=COLORS[REFERENCE], linewidth=1, dashes=(4, 3), zorder=1)
        for line in lines:
            _paint_line(axes, line)
        zero = [_Line(f"{_short(reference)} 0", np.array([axes.get_xlim()[1]]), np.zeros(1), COLORS[REFERENCE])]
        _label_ends(axes, lines + (zero if kind == "bits" else []))
        axes.set_xlabel("answers")
        axes.xaxis.set_major_formatter(_thousands)
        axes.set_ylabel("bits saved per answer" if kind == "bits" else "accuracy")

    # Inches for bold letters; the same for both kinds, so that the figures stand in line.
    room = 1.0 + 0.088 * max((len(line.label.rpartition(" ")[0]) for line in lines), default=0)
    aria = f"{what}, means over the run: " + ", ".join(line.label for line in lines)
    return _Figure(what, caption, _svg(f"{prefix}-{kind}", aria, WIDE, (0.6, room), paint))


def _compute_figure(points: list[_Point], prefix: str) -> _Figure | None:
    points = [point for point in points if point.total.cpu > 0 and math.isfinite(point.y)]
    if not points:
        return None
    low, high = _limits([_Line("", np.ones(1), np.full(1, point.y), "", point.strong) for point in points])
    costs = [point.total.cpu for point in points]

    def paint(axes: "Axes") -> None:
        from matplotlib.ticker import LogLocator, NullFormatter

        axes.set_xscale("log")
        axes.set_xlim(min(costs) / 4, max(costs) * 4)
        axes.set_ylim(low, high)
        decades = math.log10(max(costs) / min(costs))
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if decades > 1.5 else (1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(_plain)
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.axhline(0, color=COLORS[REFERENCE], linewidth=1, dashes=(4, 3), zorder=1)
        for point in points:
            mark = "o" if low <= point.y <= high else "v" if point.y < low else "^"
            axes.plot([point.total.cpu], [np.clip(point.y, low, high)], mark, color=point.color, clip_on=False,
                      markersize=10 if point.strong else 7, zorder=3)  # fmt: skip
        _label_points(axes, points)
        axes.set_xlabel("CPU seconds in the whole run (log scale)")
        axes.set_ylabel("bits saved per answer")

    aria = "Bits saved per answer and cost: "
    aria += ", ".join(f"{point.text} for {_show(point.total.cpu, 1)} CPU seconds" for point in points)
    caption = "Up is better, left is cheaper."
    return _Figure("Compute against score", caption, _svg(f"{prefix}-compute", aria, HALF, (0.6, 0.35), paint), False)


def _reliability_figure(run: _Loaded, prefix: str) -> _Figure | None:
    lines = []
    for name in run.names:
        bins = [_dict(row) for row in _list(run.member(name).get("reliability"))]
        values = np.array([[_number(row.get(key)) for key in ("confidence", "accuracy", "count")] for row in bins])
        values = values.reshape(-1, 3)
        values = values[np.isfinite(values).all(1) & (values[:, 2] > 0)]
        values = values[values[:, 2] >= RARE * values[:, 2].sum()]
        strong = name == run.names[0]
        if len(values) >= (1 if strong else 3):
            lines.append(_Line(_short(name), values[:, 0], values[:, 1], _color(name), strong, DASHES.get(name, "-")))
    if not lines:
        return None

    def paint(axes: "Axes") -> None:
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1)
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=1)
        for line in lines:
            _paint_line(axes, line, dots=True)
        _label_ends(axes, lines)
        axes.set_xlabel("how sure (mean probability of the answer)")
        axes.set_ylabel("how often right")

    caption = "On the diagonal a member is as sure as it is right; below it, it is too sure."
    caption += f" Levels with fewer than 1 in {1 / RARE:.0f} of its answers are left out."
    if len(lines) < len(run.names):
        caption += " Members that are always about equally sure are left out."
    aria = "Share of right answers by stated probability for " + ", ".join(line.label for line in lines)
    return _Figure("Reliability", caption, _svg(f"{prefix}-reliability", aria, HALF, (0.6, 1.2), paint), False)


def _pace_figure(run: _Loaded, prefix: str) -> _Figure | None:
    speed, name = _speed(run), run.names[0]
    known = np.isfinite(speed.cpu)
    if not known.any():
        return None
    line = _Line("", speed.ends[known], 1000 * speed.cpu[known] / speed.answers[known], BLUE, True)
    caption = f"CPU time of {name} for one answer, learning included."
    aria = f"CPU milliseconds of {name} per answer over time, median {_show(float(np.median(line.y)))}"
    svg = _from_zero(f"{prefix}-pace", aria, [line], "milliseconds")
    return _Figure("Time per answer", caption, svg, False)


def _memory_figure(run: _Loaded, prefix: str) -> _Figure | None:
    sessions: dict[str, list[tuple[float, float]]] = {}
    for row in run.timing:
        point = (_number(row.get("answers")), _number(row.get("rss")) / 2**20)
        if all(map(math.isfinite, point)):
            sessions.setdefault(_text(row.get("session")), []).append(point)
    if not sessions:
        return None
    arrays = [np.array(points, dtype=np.float64) for points in sessions.values()]
    lines = [_Line("", points[:, 0], points[:, 1], BLUE, strong=True) for points in arrays]
    caption = "Of the whole process, opponents included." + (" One line per session." if len(lines) > 1 else "")
    aria = f"Memory of the process over time, at most {max(float(line.y.max()) for line in lines):,.0f} MiB"
    return _Figure("Memory over time", caption, _from_zero(f"{prefix}-memory", aria, lines, "MiB"), False)


def _from_zero(prefix: str, aria: str, lines: list[_Line], unit: str) -> "Markup":
    """A small figure over answers whose axis begins at zero."""

    def paint(axes: "Axes") -> None:
        axes.set_xlim(0, max(float(line.x.max()) for line in lines) or 1)
        axes.set_ylim(0, max(float(line.y.max()) for line in lines) * 1.15 or 1)
        for line in lines:
            _paint_line(axes, line)
        axes.set_xlabel("answers")
        axes.xaxis.set_major_formatter(_thousands)
        axes.set_ylabel(unit)

    return _svg(prefix, aria, SMALL, (0.6, 0.35), paint)


def _svg(
    prefix: str, label: str, size: tuple[float, float], margins: tuple[float, float], paint: Callable[["Axes"], None]
) -> "Markup":
    """A figure as an SVG element whose ids begin with `prefix`; `margins` are left and right, inches."""
    from markupsafe import Markup
    from matplotlib import style
    from matplotlib.figure import Figure

    width, height = size
    buffer = io.BytesIO()
    with style.context(["default", STYLE]), warnings.catch_warnings():
        # Only for measuring: the browser has the letters that matplotlib's font lacks.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        figure = Figure(figsize=size)
        left, right = margins
        axes = figure.add_axes((left / width, 0.52 / height, 1 - (left + right) / width, 1 - 0.8 / height))
        paint(axes)
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return Markup(_inline(buffer.getvalue(), prefix, label))  # ElementTree escapes all text in it


def _inline(svg: bytes, prefix: str, label: str) -> str:
    """An SVG document as an element that can share a page with others."""
    root = ElementTree.fromstring(svg)
    for parent in root.iter():
        for child in list(parent):
            if child.tag.endswith(("}metadata", "}style")):  # a style would hold for the whole page
                parent.remove(child)
    for element in root.iter():
        element.tag = element.tag.rpartition("}")[2]
        for name, value in list(element.attrib.items()):
            del element.attrib[name]
            plain = name.rpartition("}")[2]  # href needs no xlink today
            if plain == "id":
                value = f"{prefix}-{value}"
            elif plain == "href":
                value = value.replace("#", f"#{prefix}-", 1)
            element.set(plain, value.replace("url(#", f"url(#{prefix}-"))
    for name in ("width", "height"):
        del root.attrib[name]
    root.attrib |= {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-label": label}
    return ElementTree.tostring(root, encoding="unicode")


# painting


def _paint_line(axes: "Axes", line: _Line, dots: bool = False) -> None:
    """A line; a dot on every point if asked for, else only on those that have no neighbour."""
    known = np.pad(np.isfinite(line.y), 1)
    alone = np.flatnonzero(known[1:-1] & ~known[:-2] & ~known[2:]).tolist()  # no line goes there
    axes.plot(line.x, line.y, color=line.color, linewidth=2.4 if line.strong else 1.2, linestyle=line.dashes,
              marker="o", markevery=None if dots else alone, markersize=5 if line.strong else 3.5,
              zorder=3 if line.strong else 2)  # fmt: skip


def _paint_tasks(axes: "Axes", tasks: list[tuple[float, float, str]]) -> None:
    """Light bands with names above; names are left out where they would not fit."""
    if len(tasks) < 2:
        return
    every = -(-len(tasks) // 30)
    for index, (start, end, name) in enumerate(tasks):
        if index % 2:
            axes.axvspan(start, end, color="#f1f1ee", linewidth=0, zorder=0)
        if index % every == 0:
            text = f"task {name}" if index == 0 and len(tasks) <= 20 else name
            axes.annotate(text[:8], ((start + end) / 2, 1), (0, 3), xycoords=axes.get_xaxis_transform(),
                          textcoords="offset points", ha="center", fontsize=FONT - 2, color="#777777")  # fmt: skip


def _label_ends(axes: "Axes", lines: list[_Line]) -> None:
    """Each name right of the end of its line, pushed apart where they would cover each other."""
    figure = axes.get_figure()
    assert figure is not None
    height = axes.get_position().height * figure.get_figheight() * 72  # type: ignore[union-attr]
    (low, high), (_, right) = axes.get_ylim(), axes.get_xlim()
    ends = []
    for line in lines:
        known = np.flatnonzero(np.isfinite(line.y))
        if not len(known):
            continue
        x, y = float(line.x[known[-1]]), float(np.clip(line.y[known[-1]], low, high))
        if x >= 0.8 * right:
            ends.append((x, y, line))
        else:
            # A leader from far away would look like data.
            axes.annotate(line.label, (x, y), (8, 0), textcoords="offset points", va="center", zorder=5,
                          bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 1},
                          **_lettering(line))  # fmt: skip
    ends.sort(key=lambda end: end[1])
    places = _apart([(y - low) / (high - low) * height for _, y, _ in ends], gap=FONT * 1.3, top=height)
    for (x, y, line), place in zip(ends, places, strict=True):
        leader = {"arrowstyle": "-", "color": line.color, "linewidth": 0.7, "linestyle": ":", "relpos": (0, 0.5)}
        axes.annotate(line.label, (x, y), (1.03, place / height), textcoords="axes fraction", va="center",
                      arrowprops=leader | {"shrinkA": 1, "shrinkB": 0}, **_lettering(line))  # fmt: skip


def _lettering(of: _Line | _Point) -> dict[str, Any]:
    return {"color": _dark(of.color), "fontweight": "bold" if of.strong else "normal", "annotation_clip": False}


def _apart(places: list[float], gap: float, top: float) -> list[float]:
    """Sorted places moved as little as needed so that neighbours are `gap` apart and none is above `top`."""
    apart: list[float] = []
    for place in places:
        apart.append(max(place, apart[-1] + gap) if apart else place)
    limit = top
    for index in reversed(range(len(apart))):
        apart[index] = min(apart[index], limit)
        limit = apart[index] - gap
    return apart


def _label_points(axes: "Axes", points: list[_Point]) -> None:
    """A name beside each point, where it covers no other name, point or the line of zero if there is such a place."""
    window, (low, high) = axes.get_window_extent(), axes.get_ylim()
    scale = axes.get_figure().dpi / 72  # type: ignore[union-attr]
    spots = [axes.transData.transform((point.total.cpu, np.clip(point.y, low, high))) for point in points]
    zero = axes.transData.transform((1, 0))[1]
    taken = [(window.x0, zero - 2, window.x1, zero + 2), *((x - 9, y - 9, x + 9, y + 9) for x, y in spots)]
    for point, (x, y) in sorted(zip(points, spots, strict=True), key=lambda pair: not pair[0].strong):
        width, height = len(point.text) * FONT * 0.62 * scale, FONT * 1.3 * scale
        choices = []
        for rank, (dx, dy, align) in enumerate(_PLACES):
            left = x + dx * scale - {"left": 0.0, "center": width / 2, "right": width}[align]
            box = (left, y + dy * scale - height / 2, left + width, y + dy * scale + height / 2)
            outside = max(0, window.x0 - box[0]) + max(0, box[2] - window.x1 - 20 * scale) + max(0, window.y0 - box[1])
            covered = sum(_overlap(box, other) for other in taken)
            choices.append((covered + 50 * outside, rank, dx, dy, align, box))
        _, _, dx, dy, align, box = min(choices)
        taken.append(box)
        axes.annotate(point.text, (point.total.cpu, np.clip(point.y, low, high)), (dx, dy), va="center", ha=align,
                      textcoords="offset points", **_lettering(point))  # fmt: skip


_PLACES = ((10, 0, "left"), (-10, 0, "right"), (0, 13, "center"), (0, -13, "center"),
           (6, 12, "left"), (-6, 12, "right"), (6, -12, "left"), (-6, -12, "right"))  # fmt: skip


def _overlap(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _limits(lines: list[_Line]) -> tuple[float, float]:
    """Range of the y axis: our lines and zero for certain; a line far away may leave the picture."""
    ours = np.concatenate([line.y for line in lines if line.strong] or [np.zeros(1)])
    every = np.concatenate([line.y for line in lines] or [np.zeros(1)])
    ours, every = ours[np.isfinite(ours)], every[np.isfinite(every)]
    low, high = min(0.0, *ours.tolist(), 0.0), max(0.0, *ours.tolist(), 0.0)
    span = max(high - low, 0.1)
    low = min(low, max(float(every.min(initial=0)), low - span))
    high = max(high, min(float(every.max(initial=0)), high + span))
    return low - 0.06 * (high - low) - 0.01, high + 0.06 * (high - low) + 0.01


def _width(windows: int) -> int:
    return 1 if windows <= SMOOTH_FROM else 2 * (windows // POINTS // 2) + 1


def _smooth(y: Floats, tasks: list[tuple[float, float, str]], x: Floats) -> Floats:
    """Running mean `(n,)` over windows of one task; what is missing stays missing."""
    reach = _width(len(y)) // 2
    starts = [start for start, _, _ in tasks] or [0.0]
    task = np.searchsorted(starts, x, side="left")
    smooth = y.copy()
    for index in np.flatnonzero(np.isfinite(y)) if reach else ():
        near = slice(max(0, index - reach), index + reach + 1)
        smooth[index] = np.nanmean(y[near][task[near] == task[index]])
    return smooth


def _color(name: str) -> str:
    return COLORS.get(name, "#56B4E9")


def _dark(color: str) -> str:
    """The color for text, dark enough to be read on white."""
    return "#" + "".join(f"{int(int(color[i : i + 2], 16) * 0.62):02x}" for i in (1, 3, 5)) if color != BLUE else BLUE


def _thousands(value: float, position: float | int = 0) -> str:
    return f"{value:,.0f}"


def _plain(value: float, position: float | int = 0) -> str:
    return f"{value:,.0f}" if value >= 1 else f"{value:g}"


# values


def _number(value: Any) -> float:
    """A JSON value as a number, NaN if it is none."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _mean(values: Floats, counts: Floats) -> float:
    """Mean weighted by counts over what is known, NaN if nothing is."""
    known = np.isfinite(values) & np.isfinite(counts) & (counts > 0)
    return float(np.average(values[known], weights=counts[known])) if known.any() else math.nan


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested values as `outer.inner` and text."""
    flat: dict[str, str] = {}
    for key, value in tree.items():
        name = prefix + _text(key)
        if isinstance(value, dict):
            flat |= _flat(value, name + ".")
        else:
            flat[name] = ", ".join(map(_text, value)) if isinstance(value, list) else _text(value)
    return flat


def _text(value: Any) -> str:
    """As text in which every character prints; others could break XML or turn the writing direction."""
    return "".join(letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}" for letter in str(value))


def _short(label: str) -> str:
    return label if len(label) <= MAX_LABEL else label[: MAX_LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"


def _show(value: float, digits: int = 2, sign: str = "") -> str:
    if not math.isfinite(value):
        return NONE
    form = f"{sign},.{digits}f" if abs(value) < 1e12 else f"{sign}.3g"
    return f"{value:{form}}".replace("-", MINUS)


def _signed(value: float, digits: int = 2) -> str:
    return _show(value, digits, "+")


def _zero(text: str) -> str:
    """A signed number, without its sign if it is zero."""
    return text[1:] if text[1:] and not text.strip(f"+{MINUS}0.") else text


def _relative(value: float, one: float) -> str:
    return _show_ratio(value / one) + TIMES if one > 0 and math.isfinite(value) else NONE


def _show_ratio(value: float) -> str:
    if not math.isfinite(value):
        return NONE
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}" if value >= 1 else f"{value:.2g}"
