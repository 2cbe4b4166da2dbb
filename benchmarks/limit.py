"""The speed of memory: read and write every weight in place, by a compiled loop on all threads."""

from functools import cache
from typing import Any, Final

import numpy as np
import torch
from numba import carray, cfunc, njit

from lorand.kernels import jobs
from lorand.kernels.simd import pointer_to

_TOUCH: Final = jobs.layout(weights=np.int64)
_STEP: Final = 4096


@njit
def _touch_f32(weights: Any) -> None:
    for i in range(weights.shape[0]):
        weights[i] += np.float32(1e-9)


@njit
def _touch_bf16(weights: Any) -> None:
    """torch's own bfloat16 addition is slower than memory, so this loop is the limit."""
    for i in range(weights.shape[0]):
        wide = np.uint32(np.uint32(weights[i]) << np.uint32(16)).view(np.float32)
        total = np.float32(wide + np.float32(1e-9)).view(np.uint32)
        even = np.uint32(np.uint32(total >> np.uint32(16)) & np.uint32(1))
        weights[i] = np.uint16(np.uint32(total + np.uint32(0x7FFF) + even) >> np.uint32(16))


@cache
def _loop(dtype: Any) -> Any:
    touch = _touch_f32 if dtype is np.float32 else _touch_bf16

    @cfunc(jobs.SIGNATURE)
    def loop(address: Any) -> None:
        job = carray(pointer_to(address), (1,), _TOUCH)[0]
        first, last = jobs.next_part(address, job)
        while first >= 0:
            size = np.int64(2 if dtype is np.uint16 else 4)
            start = job.weights + first * _STEP * size
            touch(carray(pointer_to(start), ((last - first) * _STEP,), dtype))
            first, last = jobs.next_part(address, job)

    return loop


def touch(memory: torch.Tensor) -> None:
    """Read and write a vector of float32 or bfloat16 weights, a multiple of 4,096 of them."""
    job = jobs.Job(_TOUCH, weights=memory)
    loop = _loop(np.float32 if memory.dtype == torch.float32 else np.uint16)
    jobs.run(loop, job, memory.numel() // _STEP, torch.get_num_threads())
