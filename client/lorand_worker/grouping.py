"""Cut a batch into groups of similar length, so that little of a forward pass is padding."""

import math
from collections.abc import Sequence
from typing import Final

import torch

from lorand_worker.precision import Precision

MAX_EXAMPLES: Final = 64
"""Most examples in a group."""
MAX_TOKENS: Final = 16384
"""Most tokens in a group of several examples, padding included: what bounds a pass's memory."""


def launch_tokens(device: torch.device, precision: Precision) -> int:
    """Return how many tokens' work the fixed cost of a forward pass is.

    Measured for MiniLM on a CPU (benchmarks/results/forward.json); in bfloat16 tokens are cheaper
    and the weights are cast in each pass. For a GPU it is an estimate: 100 kernel launches of 5 µs
    against 0.25 µs a token.
    """
    if device.type != "cpu":
        return 2000
    return 250 if precision is Precision.BFLOAT16 else 100


def groups(lengths: Sequence[int], launch: int) -> list[list[int]]:
    """Return positions of `lengths` in groups that cost the least to run, each once.

    A group costs `launch` + examples × its longest length. Some best groups are runs in the order
    of length; the best cut of a sorted prefix follows from those of shorter prefixes.

    >>> groups([30, 5, 6, 31, 5], launch=20)
    [[1, 4, 2], [0, 3]]
    >>> groups([30, 5, 6, 31, 5], launch=1000)
    [[1, 4, 2, 0, 3]]
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    cost = [0.0]
    first = [0]  # first[n]: where the last group of the first n begins
    for end in range(1, len(order) + 1):
        longest = lengths[order[end - 1]]
        most = max(1, min(MAX_EXAMPLES, MAX_TOKENS // longest))
        best, begin = math.inf, end
        for start in range(max(0, end - most), end):
            here = cost[start] + launch + longest * (end - start)
            if here < best:
                best, begin = here, start
        cost.append(best)
        first.append(begin)
    result: list[list[int]] = []
    end = len(order)
    while end:
        result.append(order[first[end] : end])
        end = first[end]
    return result[::-1]
