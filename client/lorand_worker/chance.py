"""Where a worker's batches and its unbiased rounding come from."""

import random
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lorand import codec
from lorand.codec import Floats


@dataclass(frozen=True)
class Chance:
    """What shuffles examples (None: the operating system), and numbers in [0, 1) for rounding."""

    batches: random.Random | None = None
    uniform: Callable[[int], Floats] = codec.system_uniform

    @staticmethod
    def of(seed: int | None, name: str) -> "Chance":
        """Return the operating system's, or that of a seed: every worker of a run has its own.

        With a seed a run can be repeated, by virtual workers or by processes, and whoever knows it
        knows the batches: for experiments.
        """
        if seed is None:
            return Chance()
        rounding = np.random.default_rng([seed, *name.encode()])

        def uniform(count: int) -> Floats:
            return rounding.random(count)

        return Chance(random.Random(f"{seed}/{name}"), uniform)
