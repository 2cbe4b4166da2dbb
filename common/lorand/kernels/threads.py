"""The threads that torch computes on, lent to compiled loops that release the interpreter's lock.

A second set of threads would share the cores with torch's, which wait actively for some
milliseconds after each operation: as long as a pass over a small model takes.
"""

import ctypes
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import torch

PARALLEL: Final = 1 << 17
"""Numbers from which threads pay."""
PARTS: Final = 4
"""Parts a thread."""

_Work = Callable[[], None]


def threads_for(count: int) -> int:
    """Return how many threads work on so many numbers; never more than torch may use."""
    threads = torch.get_num_threads()
    return 1 if threads == 1 or count < PARALLEL else threads


def share(part: Callable[[int, int], None], steps: int, threads: int, multiple: int = 1) -> None:
    """Run part(first, last) over all steps, on this thread and others of this process.

    Bounds are multiples of `multiple`. Whoever is free takes the next part, so a core that is
    taken away holds up a part, not a half. Raises what a part raised.
    """
    if threads == 1:
        part(0, steps)
        return
    units, parts = steps // multiple, PARTS * threads
    bounds = [units * n // parts * multiple for n in range(parts + 1)]
    left = iter(list(pairwise(bounds)))
    errors: list[BaseException] = []

    def work() -> None:
        try:
            for first, last in left:
                part(first, last)
        except BaseException as error:  # an OpenMP thread has nobody to raise to
            errors.append(error)

    openmp = _openmp()
    if openmp is not None:
        openmp(work, threads)
    else:
        others = [_sleeping().submit(work) for _ in range(threads - 1)]
        work()
        for other in others:
            if not other.cancel():
                other.result()
    if errors:
        raise errors[0]


@cache
def _openmp() -> Callable[[_Work, int], None] | None:
    """Run a function on so many of torch's threads; None where torch has not GNU's OpenMP.

    `GOMP_parallel(function, argument, threads, flags)` is the entry that compilers call.
    """
    path = _library()
    if path is None:
        return None
    parallel: Any = ctypes.CDLL(path).GOMP_parallel
    function = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
    parallel.argtypes = [function, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None

    def run(work: _Work, threads: int) -> None:
        parallel(function(lambda _: work()), None, threads, 0)

    return run


def _library() -> str | None:
    """The OpenMP library that torch loaded; another copy of it would have threads of its own."""
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {Path(line.split(maxsplit=5)[-1]) for line in lines if "libgomp" in line}
    home = Path(torch.__file__).parent
    own = [path for path in paths if home.parent in path.parents and "torch" in str(path)]
    chosen = own or list(paths)
    return str(chosen[0]) if len(chosen) == 1 else None


@cache
def _sleeping() -> ThreadPoolExecutor:
    """Threads of our own."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="lorand-kernels")


os.register_at_fork(after_in_child=_sleeping.cache_clear)  # threads do not survive a fork
