"""Work that is shared among the threads of torch."""

import os
import threading
from collections.abc import Iterator

import pytest
import torch

from pliant.kernels import _jit
from pliant.kernels._jit import SMALL, at_once, over_jobs, over_slices


@pytest.fixture(params=["openmp", "pool"])
def either(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    if request.param == "pool":
        monkeypatch.setattr(_jit, "_forked", True)
    elif _jit._openmp() is None:
        pytest.skip("torch has another OpenMP here")
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield request.param
    torch.set_num_threads(threads)


def test_both_run_at_the_same_time(either: str) -> None:
    both = threading.Barrier(2, timeout=20)
    at_once([both.wait, both.wait])
    assert not both.broken


def test_each_is_called_once_however_many_there_are(either: str) -> None:
    seen: list[int] = []
    at_once([lambda i=i: seen.append(i) for i in range(50)])
    assert sorted(seen) == list(range(50))


def test_an_error_comes_out_after_all_are_done(either: str) -> None:
    done = []

    def fails() -> None:
        raise RuntimeError("here")

    with pytest.raises(RuntimeError, match="here"):
        at_once([fails, lambda: done.append(1)])
    assert done == [1]


def test_within_another_call(either: str) -> None:
    seen: list[int] = []

    def outer() -> None:
        at_once([lambda: seen.append(1), lambda: seen.append(2)])

    at_once([outer, outer])
    assert sorted(seen) == [1, 1, 2, 2]


def test_parts_cover_everything_once(either: str) -> None:
    seen: list[tuple[int, ...]] = []
    over_jobs(lambda *part: seen.append(part), 5, SMALL)
    assert sorted(seen) == [(0, 2), (2, 5)]
    seen.clear()
    over_slices(lambda *part: seen.append(part), 1, 40, SMALL)
    assert sorted(seen) == [(0, 1, 0, 16), (0, 1, 16, 40)]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*:DeprecationWarning")
def test_a_forked_child_has_threads_of_its_own() -> None:
    at_once([lambda: None, lambda: None])  # the parent's are awake
    child = os.fork()
    if child == 0:
        both = threading.Barrier(2, timeout=20)
        try:
            at_once([both.wait, both.wait])
        except BaseException:
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def test_products_within_a_call_are_by_one_thread_and_those_after_it_by_all(either: str) -> None:
    x = torch.eye(64)
    found: list[torch.Tensor] = []
    inside: list[int] = []

    def product() -> None:
        inside.append(torch.get_num_threads())
        found.append(x @ x)

    at_once([product, product, product])
    assert all(y.equal(x) for y in found) and len(found) == 3
    assert either == "openmp" or inside == [1, 1, 1]
    assert torch.get_num_threads() == 2
