"""Compiled loops that any number of threads work on together, on the threads torch computes on.

A job is a record in memory. A thread takes part after part of it until none is left, so a core that
is taken away holds up a part, not a half; Python is not entered, where threads would wait for one
another's turn. A second set of threads would share the cores with torch's, which wait actively for
some milliseconds after each operation: as long as a pass over a small model takes.
"""

import ctypes
import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numba import njit, types

from lorand.kernels.simd import take

PARALLEL: Final = 1 << 18
"""Numbers from which threads pay."""
PARTS: Final = 4
"""Parts a thread."""
SIGNATURE: Final = types.void(types.int64)
"""Of a compiled loop (`numba.cfunc`): it gets the address of its job."""
COLUMNS: Final = ("taken", "entered", "parts", "units", "multiple")
"""What every job begins with: counters that threads add to, and how its steps are cut."""


def layout(**columns: type) -> np.dtype[Any]:
    """Return the layout of a job with these columns after the first."""
    return np.dtype([*((name, np.int64) for name in COLUMNS), *columns.items()], align=True)


@njit
def enter(address: Any) -> Any:
    """Return the number of the thread that begins to work on a job: 0, 1, …"""
    return take(address + 8)


@njit
def next_part(address: Any, job: Any) -> Any:
    """Return the first step of a part nobody took yet, and the one after its last; −1: none."""
    part = take(address)
    if part >= job.parts:
        return -1, -1
    first = job.units * part // job.parts
    return first * job.multiple, job.units * (part + 1) // job.parts * job.multiple


@njit(cache=True)
def _never_called() -> None: ...


def compiled_before(module: str) -> bool:
    """Whether a module's loops, compiled by an earlier process, are at hand."""
    return any(Path(_never_called.stats.cache_path).glob(f"{module}.*.nbi"))


def threads_for(count: int) -> int:
    """Return how many threads work on so many numbers; never more than torch may use."""
    threads = torch.get_num_threads()
    return 1 if threads == 1 or count < PARALLEL else threads


class Job:
    """A job's record, and the arrays and tensors whose addresses it holds."""

    def __init__(self, layout: np.dtype[Any], **columns: Any) -> None:
        """Take the columns in the layout's order: numbers, and what has an address."""
        self._kept = columns
        assert layout.names == (*COLUMNS, *columns), "columns in the layout's order"
        values = (_address(value) for value in columns.values())
        self.record = np.array([(0,) * len(COLUMNS) + tuple(values)], layout)


def _address(value: Any) -> Any:
    """Where an array or a tensor is; a number stays what it is."""
    if isinstance(value, torch.Tensor):
        return value.data_ptr()
    return value.ctypes.data if isinstance(value, np.ndarray) else value


def run(loop: Any, job: Job, steps: int, threads: int, multiple: int = 1) -> None:
    """Run a compiled loop over steps 0 … steps, in parts that begin at multiples of `multiple`."""
    parts = 1 if threads == 1 else PARTS * threads
    record = job.record
    record["parts"], record["units"], record["multiple"] = parts, steps // multiple, multiple
    address, openmp = record.ctypes.data, _openmp() if threads > 1 else None
    if threads == 1:
        loop.ctypes(address)
    elif openmp is not None:
        openmp(loop.address, address, threads, 0)
    else:
        others = [_sleeping().submit(loop.ctypes, address) for _ in range(threads - 1)]
        loop.ctypes(address)
        for other in others:
            if not other.cancel():
                other.result()


@cache
def _openmp() -> Any:
    """GOMP_parallel(function, argument, threads, flags): what compilers make of a parallel loop.

    None where torch has not GNU's OpenMP. Another copy of it would have threads of its own.
    """
    maps = Path("/proc/self/maps")
    lines = maps.read_text().splitlines() if maps.exists() else []
    paths = {line.split(maxsplit=5)[5] for line in lines if "libgomp" in line}
    own = [path for path in paths if Path(torch.__file__).parent in Path(path).parents] or paths
    if len(own) != 1:
        return None
    parallel = ctypes.CDLL(next(iter(own))).GOMP_parallel
    parallel.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    parallel.restype = None
    return parallel


@cache
def _sleeping() -> ThreadPoolExecutor:
    """Threads of our own, which sleep between calls."""
    return ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="lorand-kernels")


os.register_at_fork(after_in_child=_sleeping.cache_clear)  # threads do not survive a fork
