"""Threads that sleep between calls, for compiled loops that release the interpreter's lock.

Not OpenMP's: those of a second pool would wait actively on the cores that torch's pool computes on.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Final

import torch

PARALLEL: Final = 1 << 18
"""Numbers from which threads pay: waking one costs as much as a hundred thousand weights."""
PARTS: Final = 4
"""Parts a thread."""


def threads_for(count: int) -> int:
    """Return how many threads work on so many numbers; never more than torch may use."""
    threads = torch.get_num_threads()
    return 1 if threads == 1 or count < PARALLEL else threads


def share(part: Callable[[int, int], None], steps: int, threads: int, multiple: int = 1) -> None:
    """Run part(first, last) over all steps, on this thread and others of this process.

    Bounds are multiples of `multiple`. Whoever is free takes the next part, so a core that is
    taken away holds up a part, not a half.
    """
    if threads == 1:
        part(0, steps)
        return
    units, parts = steps // multiple, PARTS * threads
    bounds = [units * n // parts * multiple for n in range(parts + 1)]
    left = iter(list(pairwise(bounds)))

    def work() -> None:
        for first, last in left:
            part(first, last)

    others = [_pool().submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        if not other.cancel():
            other.result()


@cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="lorand-kernels")


os.register_at_fork(after_in_child=_pool.cache_clear)  # threads do not survive a fork
