"""Numba functions, cached on disk where that is possible, run on slices by the threads of torch; and their outputs.

The parallel back ends of Numba dislike forks and concurrent calls, and their threads stand in the way of those of
torch, so kernels are serial and `nogil`, and threads come from here.
"""

import ctypes
import inspect
import mmap
import os
import sys
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numba
import torch
from torch import Tensor

SMALL = 1 << 16
"""Elements below which starting threads costs more than it brings."""

LARGE = 1 << 22
"""Bytes from which the pages of an output are worth a thought."""
HUGE_PAGE = 1 << 21
POPULATE_WRITE = 23  # of madvise, Linux 5.14; Python does not name it

_MEMBER = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_pool: ThreadPoolExecutor | None = None
_forked = False
"""Whether this is a child of a process that may have used OpenMP, whose threads are not there any more."""


def jit(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile `function` on first call; without a writable place for the cache, do without it."""
    return _compiled(function, fastmath=False)


def jit_fast(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `jit`, for sums that may be taken in any order; NaN and infinity keep their meaning."""
    return _compiled(function, fastmath={"reassoc", "contract", "nsz"})


def jit_exact(function: Callable[..., Any]) -> Callable[..., Any]:
    """As `jit`, but a product and a sum may be rounded once together."""
    return _compiled(function, fastmath={"contract"})


def _compiled(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    function = inspect.unwrap(function)  # the type checks of the tests wrap every function, numba wants it bare
    try:
        return numba.njit(nogil=True, cache=True, error_model="numpy", **options)(function)
    except RuntimeError:  # numba: no locator available
        return numba.njit(nogil=True, error_model="numpy", **options)(function)


def over_slices(function: Callable[..., None], batch: int, width: int, steps: int) -> None:
    """Call `function(b0, b1, d0, d1)` over slices that together cover `batch` x `width`.

    The slices share nothing and each computes what one call over everything would, to the bit,
    so the number of threads does not change results.
    """
    threads = torch.get_num_threads()
    if threads == 1 or batch * width * steps < SMALL:
        function(0, batch, 0, width)
        return
    if batch >= threads:
        edges = [batch * i // threads for i in range(threads + 1)]
        jobs = [(b0, b1, 0, width) for b0, b1 in pairwise(edges)]
    else:
        # Blocks of 16 keep a cache line in one thread.
        blocks = -(-width // 16)
        edges = [min(width, 16 * (blocks * i // threads)) for i in range(threads)] + [width]
        jobs = [(0, batch, d0, d1) for d0, d1 in pairwise(edges) if d0 < d1]
    at_once([partial(function, *job) for job in jobs])


def over_jobs(function: Callable[[int, int], None], jobs: int, elements: int) -> None:
    """Call `function(i0, i1)` over parts of `jobs` that share nothing and have `elements` elements together."""
    parts = 1 if elements < SMALL else min(jobs, torch.get_num_threads())
    edges = [jobs * i // max(1, parts) for i in range(parts + 1)]
    at_once([partial(function, *job) for job in pairwise(edges)])


def at_once(functions: Sequence[Callable[[], None]]) -> None:
    """Call all of them at the same time."""
    if len(functions) == 1:
        functions[0]()
    elif (parallel := _openmp()) is not None and not _forked:
        _by_openmp(parallel, functions)
    else:
        _by_pool(functions)


@cache
def _openmp() -> Any:
    """`GOMP_parallel` of the library that torch has brought, whose threads it works with; None where it has another.

    After a product these threads wait for the next one, awake, for milliseconds: threads of our own would have to
    share the processors with them. Within a call, products of torch are by one thread each.
    """
    found = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*"))
    try:
        parallel = ctypes.CDLL(str(found[0])).GOMP_parallel
    except (IndexError, OSError, AttributeError):
        return None
    parallel.argtypes = _MEMBER, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
    parallel.restype = None
    return parallel


def _by_openmp(parallel: Any, functions: Sequence[Callable[[], None]]) -> None:
    waiting, raised = deque(functions), deque[BaseException]()

    def work(_: object) -> None:
        while True:  # there may be fewer threads than functions
            try:
                function = waiting.popleft()
            except IndexError:
                return
            try:
                function()
            except BaseException as error:
                raised.append(error)

    parallel(_MEMBER(work), None, len(functions), 0)
    if raised:
        raise raised[0]


def _by_pool(functions: Sequence[Callable[[], None]]) -> None:
    threads = torch.get_num_threads()

    def alone(function: Callable[[], None]) -> None:
        torch.set_num_threads(1)  # of this thread and, for products, of all; OpenMP sees to that by itself
        function()

    running = [_threads().submit(alone, function) for function in functions[1:]]
    try:
        alone(functions[0])
    finally:
        wait(running)
        torch.set_num_threads(threads)
    for done in running:
        done.result()


def whole_pages(x: Tensor) -> Tensor:
    """x, a new tensor that nothing has been written to, with large pages where the system has them.

    A large output is memory that the system hands out page by page at the first write to each; with small
    pages that takes several times as long as writing.
    """
    _advise(x, getattr(mmap, "MADV_HUGEPAGE", None))
    return x


def populate(x: Tensor) -> None:
    """Have the memory of x handed out now, without a change to what stands there."""
    _advise(x, POPULATE_WRITE)


def _advise(x: Tensor, advice: int | None) -> None:
    size = x.numel() * x.element_size()
    if advice is None or size < LARGE or not sys.platform.startswith("linux"):
        return
    start = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    # Advice that the system does not know is refused, and nothing is lost.
    _madvise()(start, (x.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE - start, advice)


@cache
def _madvise() -> Any:
    function = ctypes.CDLL(None).madvise
    function.argtypes = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    return function


def _threads() -> ThreadPoolExecutor:
    global _pool
    if _pool is None:
        _pool = ThreadPoolExecutor(max_workers=os.cpu_count() or 1, thread_name_prefix="pliant")
    return _pool


def _after_fork() -> None:
    global _pool, _forked
    _pool, _forked = None, True


os.register_at_fork(after_in_child=_after_fork)
