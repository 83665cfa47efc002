"""A paper's claim: its number beside ours.

A reproduction is a list of trials for a scale, each of which is run on its own and kept in a file when it is done, so
that a stopped reproduction goes on where it was; and a judge that makes claims of all their results.
"""

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pliant.core import Disk, UsageError
from pliant.core.plain import dumps

Scale = Literal["minute", "ten", "hour", "paper"]
Verdict = Literal["reproduced", "direction only", "not reproduced", "not possible here"]
Known = Literal["read", "transcribed", "secondary", "inferred"]
Result = dict[str, Any]


@dataclass(frozen=True)
class Trial:
    """One run: what it is called, its settings, its seed."""

    name: str
    settings: Mapping[str, Any]
    seed: int

    @property
    def key(self) -> str:
        return json.dumps([self.name, dict(self.settings), self.seed], sort_keys=True)


@dataclass(frozen=True)
class Claim:
    """What a paper says, and what came out here.

    Attributes:
        claim: in words.
        paper: its figure, and `known`: how that is known.
        ours, spread: our figure and its range or deviation over `seeds`.
        verdict: see `Verdict`; only what is known by reading or from a figure can be called reproduced.
    """

    claim: str
    paper: str
    known: Known
    ours: str
    spread: str
    seeds: int
    verdict: Verdict


@dataclass(frozen=True)
class Reproduction:
    """A paper's experiment at several scales.

    Attributes:
        title: what it is about.
        cite: the paper.
        trials: of a scale.
        run: one trial; is told of its progress by a share of 1 and a word.
        judge: claims from the results of each trial by its key.
        seconds: about how long a trial takes here, one after the other.
        then: further trials, whose settings depend on the results of the first, such as a rate that did best; judged
            with them. Asked with no results it tells what they will be, with settings that are not chosen yet.
        page: one page of HTML about all results and claims, where figures say more; page.html in the folder.
    """

    title: str
    cite: str
    trials: Callable[[Scale], Sequence[Trial]]
    run: Callable[[Trial, Callable[[float, str], None]], Result]
    judge: Callable[[Sequence[tuple[Trial, Result]]], Sequence[Claim]]
    seconds: Callable[[Trial], float]
    then: Callable[[Scale, Sequence[tuple[Trial, Result]]], Sequence[Trial]] = lambda scale, results: ()
    page: Callable[[Sequence[tuple[Trial, Result]], Sequence[Claim]], str] | None = None


Tell = Callable[[str], None]


def reproduce(what: Reproduction, scale: Scale, folder: Path, *, tell: Tell = lambda _: None) -> dict[str, Any]:
    """Run what is missing in `folder`, judge, and return `{"claims": [...]}` as plain values.

    Raises:
        UsageError: the folder holds something else, or cannot be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder} cannot be written ({error.strerror or error})") from None
    file = folder / "trials.jsonl"
    done = _done(file)
    results = _run(what, what.trials(scale), done, file, tell)
    results += _run(what, what.then(scale, results), done, file, tell)
    seconds = round(sum(result["seconds"] for _, result in results), 1)
    claims = what.judge(results)
    if what.page is not None:
        try:
            Disk().replace_file(folder / "page.html", what.page(results, claims).encode())
        except OSError as error:
            raise UsageError(f"{folder} cannot be written ({error.strerror or error})") from None
    return {"claims": [asdict(claim) | {"scale": scale, "seconds": seconds} for claim in claims]}


def _run(
    what: Reproduction, trials: Sequence[Trial], done: dict[str, Result], file: Path, tell: Tell
) -> list[tuple[Trial, Result]]:
    """Each trial with its result; one that is done is not run again."""
    for number, trial in enumerate(trials, 1):
        if trial.key in done:
            tell(f"[{number}/{len(trials)}] {trial.name}, seed {trial.seed}: kept from before")
            continue
        began = time.perf_counter()
        result = what.run(trial, _progress(tell, f"[{number}/{len(trials)}] {trial.name}, seed {trial.seed}"))
        done[trial.key] = result | {"seconds": round(time.perf_counter() - began, 2)}
        _keep(file, trial, done[trial.key])
    return [(trial, done[trial.key]) for trial in trials]


def _progress(tell: Tell, title: str) -> Callable[[float, str], None]:
    told = [-1]

    def progress(share: float, word: str) -> None:
        tenth = int(10 * share)
        if tenth > told[0]:
            told[0] = tenth
            tell(f"{title}: {share:.0%}{word and ', '}{word}")

    return progress


def _done(file: Path) -> dict[str, Result]:
    """Results by key; a line that a kill cut short is left out."""
    if not file.exists():
        return {}
    found: dict[str, Result] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        try:
            row = json.loads(line)
            found[row["key"]] = row["result"]
        except (json.JSONDecodeError, KeyError, TypeError):
            continue
    return found


def _keep(file: Path, trial: Trial, result: Result) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        cut = file.exists() and not file.read_bytes().endswith(b"\n")
        with open(file, "a", encoding="utf-8") as out:
            out.write(("\n" if cut else "") + dumps({"key": trial.key, "result": result}) + "\n")
    except OSError as error:
        raise UsageError(f"{file.parent} cannot be written ({error.strerror or error})") from None
