"""Equality first, then times in turns, then memory."""

import math
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from pliant.bench.clock import Copy, available_memory, kept_for_backward, resident_peak, spread, take_turns
from pliant.bench.peers import Peer
from pliant.bench.work import Case, Problem, Sizes, Work, nbytes

WHATS = ("forward", "forward+backward", "step")
CHECK_BATCH, CHECK_STEPS = 2, 192
"""Equality is tested on so many streams and steps at most: the readable form is slow, and as float64 large."""
SLACK, FLOOR = 16.0, 256.0
"""A form may err so many times as much as the readable form in float32 does, or so many roundings."""
COPY = "copy"

Tell = Callable[[str], None]
Make = Callable[[Problem], Work]


def measure(
    cases: Sequence[Case], sizes: Sizes, *, seconds: float, peers: Sequence[Peer] = (), tell: Tell = lambda _: None
) -> dict[str, Any]:
    """Measure cases at one size in float32.

    Args:
        cases: see `KERNELS`, `MIXERS`, `MODELS`.
        sizes: B, T, D.
        seconds: how long the rounds of a case go on; a few rounds are made in any case.
        peers: whom to compare with, see `find_peers`.
        tell: is told what is being done.

    Returns:
        `"cases"`: of each its name, `"checked"` (errors over what is allowed), `"times"` and `"memory"`;
        `"refused"`: who did not compute the same, and why. Nothing of them has been timed.
    """
    found: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for index, case in enumerate(cases):
        makers = makers_of(case, peers)
        tell(f"[{index + 1}/{len(cases)}] {case.name}: {', '.join(makers)}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            entry, red = _measure_case(case, makers, sizes, seconds)
        for line in red:
            tell(f"{case.name}, {line['who']}: {line['why']}; no figures")
        found.append(entry)
        refused += red
    return {"cases": found, "refused": refused}


def _measure_case(
    case: Case, makers: Mapping[str, Make], sizes: Sizes, seconds: float
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What `measure` says about a case, and who is refused."""
    checks = check(case, makers, sizes)
    ready = _ready(case, {who: make for who, make in makers.items() if not checks[who].why}, sizes)
    why = {who: one.why for who, one in checks.items() if one.why} | ready.failed
    entry = {
        "name": case.name,
        "checked": {who: {"error": one.error, "of allowed": one.share} for who, one in checks.items()},
        "times": _times(case, ready, seconds),
        "memory": _memory(ready),
    }
    return entry, [{"case": case.name, "who": who, "why": text} for who, text in why.items()]


def makers_of(case: Case, peers: Sequence[Peer]) -> dict[str, Make]:
    """Who computes a case, by name, ours first."""

    def ours(form: str) -> Make:
        return lambda problem: case.work(problem, form)

    return {form: ours(form) for form in case.forms} | {
        peer.name: peer.make for peer in peers if peer.case == case.name
    }


@dataclass
class Check:
    """What came of a comparison: the largest error over the largest entry, its share of what is allowed, what is wrong.

    Where `why` is empty all is well.
    """

    error: float = 0.0
    share: float = 0.0
    why: str = ""


def check(case: Case, makers: Mapping[str, Make], sizes: Sizes) -> dict[str, Check]:
    """Compare outputs and gradients, and a single step, with the readable form in float64.

    Allowed is what the readable form itself errs in float32, times SLACK, or FLOOR roundings.
    """
    sizes = replace(sizes, batch=min(sizes.batch, CHECK_BATCH), steps=min(sizes.steps, CHECK_STEPS))
    exact = _values(case.work(case.problem(sizes, torch.float64), case.readable))
    plain = _values(case.work(case.problem(sizes, torch.float32), case.readable))
    floor = FLOOR * torch.finfo(torch.float32).eps
    allowed = {name: max(floor, SLACK * _difference(plain[name], exact[name])) for name in exact}
    return {who: _check(make, case.problem(sizes, torch.float32), exact, allowed) for who, make in makers.items()}


def _check(make: Make, problem: Problem, exact: Mapping[str, Tensor], allowed: Mapping[str, float]) -> Check:
    try:
        found = _values(make(problem))
    except Exception as raised:  # whatever a peer raises, the others go on
        return Check(math.inf, math.inf, _told(raised))
    # A peer need not name the gradients of its parameters, but those of what ours are called.
    done = Check()
    for name in exact:
        if name not in found:
            if name in ("y", "dx"):
                return Check(math.inf, math.inf, f"gives no {name}")
            continue
        error = _difference(found[name], exact[name])
        share = error / allowed[name]
        if not share <= 1:
            why = f"{name} differs by {error:.1e} of its largest entry, allowed is {allowed[name]:.1e}"
            return Check(error, share, why)
        done = max(done, Check(error, share), key=lambda one: one.share)
    return done


def _values(work: Work) -> dict[str, Tensor]:
    """Everything that a work computes, by name."""
    found = {name: _tensor(value) for name, value in work.both().items()}
    return found if work.step is None else {**found, "step": _tensor(work.step())}


def _tensor(value: Any) -> Tensor:
    return value.detach() if isinstance(value, Tensor) else torch.from_numpy(_numpy(value))


def _numpy(value: Any) -> Any:
    import numpy as np

    return np.array(value)  # torch wants memory that may be written to


def _difference(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest entry, infinite where one is NaN or shapes differ."""
    if found.shape != exact.shape:
        return math.inf
    if exact.numel() == 0:
        return 0.0
    largest = float(exact.abs().max())
    error = float((found.double() - exact.double()).abs().max())
    return math.inf if math.isnan(error) else error / largest if largest else (0.0 if error == 0 else math.inf)


@dataclass
class _Ready:
    """Works at full size, how many bytes a copy has to move for each what, and who could not run at that size."""

    works: dict[str, Work] = field(default_factory=dict)
    moved: dict[str, int] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def _ready(case: Case, makers: Mapping[str, Make], sizes: Sizes) -> _Ready:
    ready, problem = _Ready(), case.problem(sizes, torch.float32)
    for who, make in makers.items():
        try:
            work = make(problem)
            work.both()
        except Exception as error:  # memory that is not there, as a rule
            ready.failed[who] = _told(error)
        else:
            ready.works[who] = work
    ours = next((ready.works[form] for form in case.forms if form in ready.works), None)
    ready.moved = {} if ours is None else bytes_moved(ours)
    return ready


def _told(error: Exception) -> str:
    return f"cannot run: {type(error).__name__}: {' '.join(str(error).split())[:300]}"


def bytes_moved(work: Work) -> dict[str, int]:
    """Bytes of every input read once and every output written once, on the way forward and on the way back.

    Backward reads each input, or what forward made of it, and the gradient of the output; it writes a gradient for
    each input.
    """
    assert work.inputs is not None
    inputs, y = nbytes(*work.inputs.values()), nbytes(work.forward())
    back = sum(nbytes(x) for x in work.inputs.values() if x.requires_grad)
    return {"forward": inputs + y, "forward+backward": 2 * (inputs + y) + back, "step": work.step_bytes}


def _runs(works: Mapping[str, Work], what: str) -> dict[str, Callable[[], object]]:
    pick: dict[str, Callable[[Work], Any]] = {
        "forward": lambda work: work.forward, "forward+backward": lambda work: work.both,
        "step": lambda work: work.step,
    }  # fmt: skip
    return {who: run for who, work in works.items() if (run := pick[what](work)) is not None}


def _times(case: Case, ready: _Ready, seconds: float) -> list[dict[str, Any]]:
    rows = []
    for what in WHATS:
        runs = _runs(ready.works, what)
        if runs:
            copy = {COPY: Copy(ready.moved[what])} if what in ready.moved else {}
            rows += _rows(take_turns({**runs, **copy}, seconds / len(WHATS)), what, case.forms[0])
    return rows


def _rows(took: Mapping[str, list[float]], what: str, ours: str) -> list[dict[str, Any]]:
    """Spread of times in seconds, and medians of their ratios, round by round, to a copy and to our first form."""
    return [
        {"what": what, "who": who, "rounds": len(seconds), **spread(seconds),
         "over copy": _ratio(seconds, took.get(COPY)), "over first": _ratio(seconds, took.get(ours))}
        for who, seconds in took.items()
    ]  # fmt: skip


def _ratio(one: list[float], other: list[float] | None) -> float | None:
    return None if other is None else statistics.median(a / b for a, b in zip(one, other, strict=False))


def _memory(ready: _Ready) -> list[dict[str, Any]]:
    """Bytes of forward and backward: what autograd keeps, and the peak of resident memory."""
    rows = []
    for who, work in ready.works.items():
        kept = kept_for_backward(work.both, list((work.inputs or {}).values())) if work.torch else None
        rows.append({"who": who, "kept": kept, "peak": resident_peak(work.both)})
    return rows


def measure_lengths(
    cases: Sequence[Case], sizes: Sizes, longest: int, *, seconds: float, tell: Tell = lambda _: None
) -> dict[str, Any]:
    """Time of our default form against the number of steps: 64, 256, ... up to `longest`.

    A case is left out of a length if by its growth so far a pass would take longer than `seconds`, or more than
    half of the memory that is left. `sizes.steps` is not used.

    Returns:
        `"lengths"`: rows of case, steps, what, and spread in seconds; `"left out"`: from which length, and why;
        `"refused"` as in `measure`.
    """
    named = {case.name: case for case in cases}
    rows: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    left: list[dict[str, Any]] = []
    going: dict[str, _Growth] = {}
    for name, case in named.items():
        tell(f"{name}: equality")
        form = case.forms[0]
        why = check(case, {form: makers_of(case, ())[form]}, replace(sizes, steps=CHECK_STEPS))[form].why
        if why:
            refused.append({"case": name, "who": form, "why": why})
        else:
            going[name] = _Growth()
    steps = 64
    while steps <= longest and going:
        for name in list(going):
            if why := going[name].too_much(seconds):
                left.append({"case": name, "from": steps, "why": why})
                del going[name]
        tell(f"{steps:,} steps: {', '.join(going)}")
        works = {}
        for name in going:
            problem = named[name].problem(replace(sizes, steps=steps), torch.float32)
            works[name] = named[name].work(problem, named[name].forms[0])
        for name, work in works.items():
            going[name].memory.append(float(kept_for_backward(work.both, list((work.inputs or {}).values()))))
        for what in WHATS[:2]:
            runs = _runs(works, what)
            took = take_turns(runs, seconds) if runs else {}
            for name, values in took.items():
                rows.append({"case": name, "steps": steps, "what": what, "rounds": len(values), **spread(values)})
                if what == "forward+backward":
                    going[name].seconds.append(spread(values)["median"])
        steps *= 4
    return {"lengths": rows, "left out": left, "refused": refused}


class _Growth:
    """How time and memory of a case have grown with its length."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.memory: list[float] = []

    def too_much(self, seconds: float) -> str:
        """Why the next length, four times the last, is not tried; empty if it is."""
        time, memory = (_next(values) for values in (self.seconds, self.memory))
        if time > seconds:
            return f"a pass would take about {time:.3g} s, with {seconds:g} s for a length"
        if memory > available_memory() / 2:
            return f"a pass would keep about {memory / 2**30:.3g} GiB"
        return ""


def _next(values: list[float]) -> float:
    """The next of values that grow by the same factor each time, which is 1 to 16."""
    if len(values) < 2:
        return 0.0
    return values[-1] * min(16.0, max(1.0, values[-1] / max(values[-2], 1e-9)))
