"""Drive a life in a run folder: records, saving, resuming, progress, report."""

import json
import math
import os
import resource
import signal
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from pliant.core import Record, UsageError, nbytes
from pliant.core.plain import dumps
from pliant.core.run import Run, environment
from pliant.learn import Life, prequential
from pliant.learn.life import saved_lives
from pliant.recipes.checkup import Checkup, Overheard
from pliant.recipes.panel import LEARNER, REFERENCE, Panel
from pliant.recipes.watch import Watched
from pliant.report import write_report

STOPPED = 130


@dataclass
class Progress:
    """Where a run stands; a part of its life."""

    records: int = 0
    """Bytes of records.jsonl that belong to this life."""
    row: int = 0
    """Lines among them."""
    replies: int = 0
    """Replies of the stream so far, with or without answers."""
    nats: float = 0.0
    learned: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)

    def count(self, record: Record) -> None:
        """Take note of one record of the running window."""
        self.replies += 1
        self.outcomes[record.outcome] += 1
        if record.learned:
            self.nats += record.nats * record.learned
            self.learned += record.learned

    @property
    def at(self) -> tuple[int, int]:
        """Where the run stands: it never comes back to where it was but after a kill."""
        return self.replies, self.row

    def cut(self) -> dict[str, Any]:
        """What the running window amounts to, which then begins anew."""
        mean = self.nats / self.learned if self.learned else math.nan
        row = {"nats": mean, "outcomes": dict(sorted(self.outcomes.items()))}
        self.nats, self.learned, self.outcomes = 0.0, 0, Counter()
        self.row += 1
        return row

    def state_dict(self) -> dict[str, Any]:
        return vars(self) | {"outcomes": dict(self.outcomes)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        vars(self).update(state | {"outcomes": Counter(state["outcomes"])})


@dataclass(frozen=True, kw_only=True)
class Driving:
    """How a run is carried out; none of this changes its results."""

    run: Path | None = None
    """Folder of the run. Default: the next free runs/<name>-<number>, or with --resume the newest one there."""
    resume: bool = False
    """Continue the run where it was last saved; starts it if it has not begun. Options given again must agree."""
    save_every: int = 5000
    """Answers between two saves."""
    threads: int = 1
    """Processor threads of the model; a small model is fastest with one. A resumed run keeps its own."""
    plasticity: bool = False
    """At each look at the learner, tell by how many bits random targets shape what forks of it say: of classes, and
    several times slower where steps are few (docs/plasticity.md)."""
    report: bool = True
    """Write report.html at the end."""
    json: bool = False
    """Print the summary as JSON on standard output."""

    def __post_init__(self) -> None:
        if self.save_every < 1:
            raise UsageError(f"--save-every is {self.save_every}, expected at least 1 answer")
        if not 1 <= self.threads <= (os.cpu_count() or 1):
            raise UsageError(
                f"--threads is {self.threads}, expected 1 to {os.cpu_count()}, the processors of this machine"
            )


@dataclass(frozen=True)
class Task:
    """What a config amounts to.

    Attributes:
        life: builds the life.
        title: for people.
        total: answers in the whole run, None if it has no end.
        main: the score beside bits.
        row: answers per line of the records.
        every: answers per task, None if there are no tasks.
        notes: sentences about the data.
        schema: what a run is bound to, written into its folder; None for nothing.
    """

    life: Callable[[], Life]
    title: str
    total: int | None
    main: str = "accuracy"
    row: int = 500
    every: int | None = None
    notes: tuple[str, ...] = ()
    schema: dict[str, Any] | None = None

    def begin(self, run: Run) -> None:
        """Write down what a run is bound to."""
        if self.schema is not None:
            run.write("schema.json", self.schema)

    def check(self, run: Run) -> None:
        """Raise `UsageError` if what a run is bound to has changed since it was begun."""
        if not (run.folder / "schema.json").exists() and not saved_lives(run.lives):
            self.begin(run)  # killed before it was written
        elif self.schema is not None and run.read("schema.json") != json.loads(dumps(self.schema)):
            raise UsageError(
                f"the data of {run.folder} have changed since the run was begun (other columns, classes or number "
                "of rows); begin a new run"
            )


Show = Callable[[int, dict[str, Any], dict[str, float], dict[str, float]], None]
"""Called for every row: answers so far, the row, and by member bits saved so far and processor seconds."""


def drive(
    run: Run, life: Life, *, driving: Driving, show: Show, row: int = 500, every: int | None = None
) -> dict[str, Any] | None:
    """Continue `life` in the folder of `run` until its stream ends; returns the summary, None if stopped before.

    Args:
        run: an existing run, new or to be continued.
        life: built from the run's config; has the parts `learner`, `stream` and `panel`.
        driving: how.
        show: called for every row of records.
        row: answers per line of the records.
        every: answers per task, for the records; None if the stream has no tasks.
    """
    panel: Panel = life.panel
    progress = Progress()
    life = Life(
        learner=life.learner, stream=life.stream, panel=panel, progress=progress, checkup=Checkup(driving.plasticity)
    )
    _restore(run, life)
    with run.begin(keep=progress.records):
        ended = _loop(run, life, row, every, driving, show)
    if not ended:
        return None
    summary = run.read("summary.json")
    # A run that had ended before stays as it was, and has its line in the ledger.
    if not isinstance(summary, dict) or summary.get("answers") != panel.answers:
        summary = _summarize(run, life)
    if driving.report:
        write_report([run.folder])
    return summary


def _loop(run: Run, life: Life, size: int, every: int | None, driving: Driving, show: Show) -> bool:
    """Record and save until the stream ends (True) or the process is asked to stop (False)."""
    panel, progress, checkup = life.panel, life.progress, life.checkup
    clock = _Clock(panel, checkup, session=_sessions(run))

    def save() -> None:
        progress.records = run.sync()
        # What was spent since the last row belongs to this life: the row, when it comes, may come in another process.
        rest = clock.read(panel.answers, progress.at)
        if any(rest["cpu"].values()):
            run.time(rest | {"part": True})
        if panel.resumable:
            life.save(run.lives)

    def cut(ended: bool = False) -> None:
        task = None if every is None else (panel.answers - 1) // every
        row = {"answers": panel.answers, "update": life.learner.updates, "task": task}
        row |= progress.cut() | {"members": panel.cut()}
        if isinstance(life.stream, Watched):
            row["drift"] = life.stream.drift()
        if checkup.due(ended):
            row["health"] = checkup.look(life.learner)
        run.record(row, clock.read(panel.answers, progress.at))
        show(panel.answers, row, panel.saved(), panel.seconds())

    save()
    saved = panel.answers
    with stop_signal() as stop:
        stream = Overheard(life.stream, checkup)
        for record in prequential(stream, panel.learner.timed, panel.watch, panel.opponents):
            progress.count(record)
            if panel.answers // size > progress.row:
                cut()
            if stop:
                save()
                return False
            if panel.answers - saved >= driving.save_every:
                saved = panel.answers
                save()
    if panel.learner.window.answers:
        cut(ended=True)
    save()
    return True


def open_run(driving: Driving, name: str) -> Run:
    """The run folder that the options mean."""
    if driving.run is not None:
        return Run(driving.run)
    taken = sorted(path for path in Path("runs").glob(f"{name}-[0-9][0-9][0-9]") if path.is_dir())
    if driving.resume and taken:
        return Run(taken[-1])
    number = int(taken[-1].name[-3:]) + 1 if taken else 1
    return Run(Path("runs") / f"{name}-{number:03d}")


def set_threads(run: Run, threads: int) -> None:
    """Use the thread count that the run was begun with; results are equal to the bit only with the same."""
    now, begun = environment(), run.read("environment.json") or {}
    torch.set_num_threads(int(begun.get("threads", threads)))
    changed = [
        f"{name} {was} -> {now['packages'][name]}"
        for name, was in begun.get("packages", {}).items()
        if now["packages"].get(name) != was
    ]
    if changed:
        warnings.warn(f"the run was begun with other versions ({', '.join(changed)}); numbers may differ", stacklevel=2)


def _restore(run: Run, life: Life) -> None:
    if saved_lives(run.lives):
        life.load(run.lives)
    else:
        # Begun, but never saved: whatever was recorded is recorded again.
        (run.folder / "records.jsonl").unlink(missing_ok=True)
    # What was done after the save is done again, and so is its cost.
    at = life.progress.at
    run.trim("timing.jsonl", lambda line: tuple(line.get("at", ())) <= at)


def _sessions(run: Run) -> int:
    return max((int(line.get("session", -1)) for line in run.lines("timing.jsonl")), default=-1) + 1


class _Clock:
    """What a row of timing holds: what was spent since the one before, and how far the run has come."""

    def __init__(self, panel: Panel, checkup: Checkup, session: int):
        self.panel, self.checkup, self.session = panel, checkup, session
        self.began = time.perf_counter()
        self.spent, self.looked = panel.seconds(), checkup.seconds

    def read(self, answers: int, at: tuple[int, int]) -> dict[str, Any]:
        now = self.panel.seconds()
        cpu = {name: round(seconds - self.spent[name], 6) for name, seconds in now.items()}
        self.spent = now
        seconds = round(time.perf_counter() - self.began, 6)
        row = {"answers": answers, "session": self.session, "at": at, "seconds": seconds, "cpu": cpu,
               "rss": resident_bytes()}  # fmt: skip
        looked, self.looked = self.checkup.seconds - self.looked, self.checkup.seconds
        return row | ({"health": round(looked, 6)} if looked else {})


def resident_bytes() -> int:
    """Memory of this process that is in RAM now, in bytes (its peak where /proc is missing)."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def stop_signal() -> Iterator[list[int]]:
    """A list that is filled when the process is asked to stop; a second time stops at once."""
    stop: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _summarize(run: Run, life: Life) -> dict[str, Any]:
    """Write down what the run came to, in its folder and in the ledger."""
    timing = run.lines("timing.jsonl")
    cpu: Counter[str] = Counter()
    for line in timing:
        cpu.update(line.get("cpu", {}))
    tuning = sum(line["cpu"][LEARNER] for line in timing if line.get("tuning"))
    model, panel = life.learner.model, life.panel
    summary = {
        "answers": panel.answers,
        "updates": life.learner.updates,
        "reference": REFERENCE,
        **_scores(panel),
        "cpu_seconds": {name: round(seconds, 3) for name, seconds in cpu.items()},
        "seconds": round(sum(_session_seconds(timing)), 3),
        "parameters": sum(p.numel() for p in model.parameters()),
        "state_bytes": nbytes(life.learner.memory),
        "peak_rss": max((line["rss"] for line in timing if "rss" in line), default=0),
        "latency": _latency(panel.learner.timed),
    }
    if looked := sum(line.get("health", 0.0) for line in timing):
        summary["health_cpu_seconds"] = round(looked, 3)
    if tuning:
        summary["tuning_cpu_seconds"] = round(tuning, 3)
    spent = cpu[LEARNER] - tuning
    summary["rows_per_second"] = round(panel.answers / spent, 1) if spent else None
    if isinstance(life.stream, Watched):
        summary |= {"problems": dict(life.stream.problems), "notes": list(getattr(life.stream.source, "notes", ()))}
        nothing = None if panel.answers else "nothing was scored, since no label of these rows is known and finite"
        summary |= {"stopped": stopped} if (stopped := life.stream.error or nothing) else {}
    run.write("summary.json", summary)
    _append_ledger(run, summary)
    return summary


def _scores(panel: Panel) -> dict[str, Any]:
    """Scores of the members; apart by visit they belong to each, by group to the whole."""
    members, apart = panel.summary(), panel.apart()
    found: dict[str, Any] = {"members": members}
    if panel.scoring.by == "visit":
        for name, visits in apart.items():
            members[name]["visits"] = visits
    elif panel.scoring.by is not None:
        ours, reference = apart[LEARNER], apart[REFERENCE]
        found["groups"] = {
            group: {"answers": own["answers"], panel.scoring.main: own[panel.scoring.main],
                    "bits_saved": (reference[group]["bits"] - own["bits"]) * own["answers"]}
            for group, own in ours.items()
        }  # fmt: skip
    if panel.changes is not None:
        found["changes"] = [{"answers": place, "name": "code length rose"} for place in panel.changes.found]
    return found


def _latency(timed: Any) -> dict[str, dict[str, float]]:
    """Milliseconds of a call in this session: median, 99th and 99.9th percentile."""
    shares = {"p50": 0.5, "p99": 0.99, "p999": 0.999}
    return {
        call: {name: round(1000 * times.quantile(share), 4) for name, share in shares.items()}
        for call, times in timed.latency.items()
        if times.counts.any()
    }


def _session_seconds(timing: list[dict[str, Any]]) -> list[float]:
    last: dict[int, float] = {}
    for line in timing:
        if "session" in line:
            last[line["session"]] = line["seconds"]
    return list(last.values())


def _append_ledger(run: Run, summary: dict[str, Any]) -> None:
    """One line per finished run, in ledger.jsonl beside the run folder."""
    head = run.read("config.json")
    ours = summary["members"][LEARNER]
    line = {
        "recipe": head["command"],
        "run": run.folder.name,
        "config": head["config"],
        "seed": head["config"].get("seed"),
        "environment": run.read("environment.json"),
        "scores": _main(ours),
        "opponents": {name: _main(member) for name, member in summary["members"].items() if name != LEARNER},
        "cpu_seconds": summary["cpu_seconds"],
        "seconds": summary["seconds"],
    }
    with open(run.folder.parent / "ledger.jsonl", "a") as file:
        file.write(dumps(line) + "\n")


def _main(member: dict[str, Any]) -> dict[str, Any]:
    names = ("bits", "bits_saved", "accuracy", "error", "brier", "calibration", "temporal_kappa")
    return {name: member[name] for name in names if name in member}
