"""Equality before speed, turns, bytes, memory, and that nothing of ours is left out."""

import inspect
import re
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from pliant import kernels, mixers
from pliant.bench import (
    KERNELS,
    MIXERS,
    MODELS,
    PEERS,
    Peer,
    Problem,
    Sizes,
    Work,
    find_peers,
    measure,
    measure_lengths,
    torch_work,
)
from pliant.bench.cases import ALL_KERNELS, ALL_MIXERS
from pliant.bench.clock import LEAST, Copy, kept_for_backward, resident_peak, take_turns
from pliant.bench.compare import WHATS, _Growth, bytes_moved, check, makers_of
from pliant.bench.show import duration, lengths_figure, lengths_table, times_figure, times_table
from pliant.core import UsageError

TINY = Sizes(2, 9, 8)
EVERY = {**KERNELS, **MIXERS, **MODELS}
SCAN = KERNELS["linear_scan"]


def loop(problem: Problem) -> Work:
    return SCAN.work(problem, "loop")


def altered(change: Callable[[Tensor], Tensor], name: str) -> Callable[[Problem], Work]:
    """Our readable form with one of its results changed."""

    def make(problem: Problem) -> Work:
        work = loop(problem)
        return replace(work, both=lambda: {n: change(x) if n == name else x for n, x in work.both().items()})

    return make


def slow(problem: Problem) -> Work:
    work = loop(problem)

    def forward() -> Tensor:
        time.sleep(0.01)
        return work.forward()

    return replace(work, forward=forward)


def broken(problem: Problem) -> Work:
    raise RuntimeError("not on a\nTuesday")


def scan_peers(**makers: Callable[[Problem], Work]) -> list[Peer]:
    return [Peer(name, "torch", "linear_scan", make) for name, make in makers.items()]


def test_every_kernel_with_forms_is_measured_in_all_of_them() -> None:
    found = {
        name: function
        for name in kernels.__all__
        if inspect.isfunction(function := inspect.unwrap(getattr(kernels, name)))
        and "form" in inspect.signature(function).parameters
    }
    assert found.keys() <= KERNELS.keys(), "add the kernel to pliant.bench.cases.ALL_KERNELS"
    for name in found:
        inputs = KERNELS[name].problem(TINY, torch.float32).inputs
        with pytest.raises(UsageError) as refusal:
            ALL_KERNELS[name].call(**inputs, form="no such form")
        forms = re.findall(r"\w+", str(refusal.value).partition("choose one of ")[2])
        assert set(forms) == set(KERNELS[name].forms), f"forms of {name} in pliant.bench.cases.ALL_KERNELS"
        assert KERNELS[name].readable == "loop"


def test_every_mixer_is_measured() -> None:
    classes = {name for name in mixers.__all__ if isinstance(getattr(mixers, name), type)}
    classes = {name for name in classes if issubclass(getattr(mixers, name), mixers.SequenceMixer)}
    assert classes - {"SequenceMixer"} <= ALL_MIXERS.keys(), "add the mixer to pliant.bench.cases.ALL_MIXERS"


@pytest.mark.parametrize("name", EVERY)
def test_every_case_computes_what_its_readable_form_does(name: str) -> None:
    case = EVERY[name]
    for who, one in check(case, makers_of(case, ()), TINY).items():
        assert one.why == "", f"{who}: {one.why}"
        assert one.error > 0  # something was compared


def test_speed_is_printed_for_whoever_is_right_only() -> None:
    makers = {"slow": slow, "wrong_y": altered(lambda x: x + 1e-3, "y"), "wrong_da": altered(lambda x: 1.001 * x, "da"),
              "nan": altered(lambda x: x * torch.nan, "y"), "short": altered(lambda x: x[:, 1:], "du"),
              "broken": broken}  # fmt: skip
    said: list[str] = []
    found = measure([SCAN], TINY, seconds=0.01, peers=scan_peers(**makers), tell=said.append)
    why = {line["who"]: line["why"] for line in found["refused"]}
    assert why.keys() == {"wrong_y", "wrong_da", "nan", "short", "broken"}
    assert why["wrong_da"].startswith("da differs by 1.0e-03")
    assert why["broken"] == "cannot run: RuntimeError: not on a Tuesday"
    (case,) = found["cases"]
    for rows in (case["times"], case["memory"]):
        assert {row["who"] for row in rows} - {"copy"} == {"numba", "loop", "slow"}
    assert {row["what"] for row in case["times"]} == set(WHATS)
    times = {(row["what"], row["who"]): row for row in case["times"]}
    assert times["forward", "slow"]["median"] > 0.01
    assert times["forward", "slow"]["over first"] > 1
    assert times["forward", "numba"]["over first"] == 1
    row = times["forward+backward", "loop"]
    assert row["min"] <= row["q1"] <= row["median"] <= row["q3"]
    assert row["over copy"] > 0
    assert any("wrong_y" in line and "no figures" in line for line in said)


def test_rounding_is_no_difference() -> None:
    noise = altered(lambda x: x * (1 + 1e-6 * torch.rand(x.shape, generator=torch.Generator().manual_seed(0))), "da")
    assert check(SCAN, {"noise": noise}, TINY)["noise"].why == ""


@pytest.fixture
def short_check(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pliant.bench.compare.CHECK_STEPS", 4)


@pytest.mark.usefixtures("short_check")
def test_who_fails_at_full_size_only_gets_no_figures() -> None:
    def make(problem: Problem) -> Work:
        if problem.inputs["a"].shape[1] > 4:
            raise MemoryError("too long")
        return loop(problem)

    found = measure([SCAN], Sizes(1, 9, 2), seconds=0.001, peers=scan_peers(short=make))
    assert found["refused"] == [{"case": "linear_scan", "who": "short", "why": "cannot run: MemoryError: too long"}]


def test_turns_are_taken_from_a_budget() -> None:
    now, calls = [0.0], []

    def run(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            calls.append(name)
            now[0] += seconds

        return call

    took = take_turns({"a": run("a", 1), "b": run("b", 2), "c": run("c", 50)}, 24.0, lambda: now[0])
    assert {name: len(values) for name, values in took.items()} == {"a": 8, "b": 4, "c": LEAST}
    assert set(took["c"]) == {50}
    # The first round is not counted; then each begins with another.
    assert calls[:12] == [*"abc", *"abc", *"bca", *"cab"]


def test_bytes_are_those_of_each_input_and_output() -> None:
    unit = 4 * 3 * 5 * 7
    moved = bytes_moved(SCAN.work(SCAN.problem(Sizes(3, 5, 7), torch.float32), "numba"))
    # a, u -> h; then a, h, g -> da, du
    assert moved == {"forward": 3 * unit, "forward+backward": 8 * unit, "step": 3 * unit // 5}
    copied = Copy(1600)()
    assert 2 * copied.numel() * copied.element_size() == 1600


def test_memory_kept_is_that_of_saved_tensors_once() -> None:
    x, w = torch.ones(10, 100), torch.ones(100, 50)

    def run() -> Tensor:
        y = (x @ w).exp()  # exp keeps what it gives
        return y * y  # twice the same

    work = torch_work(run, {"x": x, "w": w})
    assert kept_for_backward(work.both, [x, w]) == 4 * 10 * 50
    assert work.both().keys() == {"y", "dx", "dw"}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="read from /proc")
def test_resident_peak_sees_what_is_gone_again() -> None:
    size = 1 << 26
    peak = resident_peak(lambda: torch.ones(size // 4).sum())
    if peak is None:
        pytest.skip("the peak cannot be started anew here")
    assert 0.9 * size < peak < 1.5 * size


def test_absent_peers_are_named() -> None:
    here = scan_peers(here=loop)
    others = [Peer("a", "no_such_package_a", "linear_scan", loop), Peer("b", "no_such_package_b", "S6", loop)]
    replaced = [replace(here[0], without="torch")]
    assert find_peers([*here, *others, *replaced], ["linear_scan"]) == (here, ["no_such_package_a"])
    assert {peer.case for peer in PEERS} <= EVERY.keys() | ALL_MIXERS.keys()


@pytest.mark.usefixtures("short_check")
def test_lengths_go_on_until_they_take_too_long() -> None:
    names = ("RGLRU", "SLSTM")
    found = measure_lengths([MIXERS[name] for name in names], Sizes(1, 1, 4), 300, seconds=0.02)
    assert found["refused"] == []
    assert {(row["case"], row["steps"]) for row in found["lengths"]} >= {(name, 64) for name in names}
    assert {row["steps"] for row in found["lengths"]} <= {64, 256}
    table = lengths_table(found)
    assert table.row_count == 2
    drawing = lengths_figure(found)
    ElementTree.fromstring(drawing)
    assert all(f">{name}<" in drawing for name in names)


def test_growth_is_extrapolated() -> None:
    growth = _Growth()
    assert growth.too_much(1.0) == ""
    growth.seconds, growth.memory = [0.01, 0.16], [1.0, 4.0]
    assert growth.too_much(2.6) == ""
    assert growth.too_much(2.5) == "a pass would take about 2.56 s, with 2.5 s for a length"
    growth.memory = [1e14, 4e14]
    assert "GiB" in growth.too_much(2.6)


@pytest.mark.usefixtures("short_check")
def test_a_wrong_mixer_gets_no_lengths() -> None:
    case = MIXERS["RGLRU"]

    def work(problem: Problem, form: str) -> Work:
        made = case.work(problem, form)
        wrong = replace(made, both=lambda: {**made.both(), "y": made.forward() + 1})
        return made if form == case.readable else wrong

    found = measure_lengths([replace(case, work=work)], Sizes(1, 1, 4), 64, seconds=0.01)
    assert found["lengths"] == []
    assert found["refused"][0]["why"].startswith("y differs")


def test_tables_and_figures_hold_what_was_found() -> None:
    found = measure([SCAN], TINY, seconds=0.001)
    assert times_table(found).row_count == 9
    drawing = times_figure(found)
    ElementTree.fromstring(drawing)
    assert "linear_scan, numba" in drawing
    assert times_figure(found) == drawing
    ElementTree.fromstring(times_figure({"cases": []}))
    ElementTree.fromstring(lengths_figure({"lengths": []}))


def test_durations_have_three_digits() -> None:
    found = [duration(x) for x in (1.5, 0.0123456, 999e-6, 2e-6, 3e-9, 1234.0)]
    assert found == ["1.5 s", "12.3 ms", "999 µs", "2 µs", "3 ns", "1234 s"]
