"""A private round: a secret sample, each example by itself, and a release with noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.privacy.mechanism import Integers, Mechanism
from lorand_worker.data import PoissonSampler
from lorand_worker.estimators import Estimator, Losses, Measurement, Order
from lorand_worker.local_steps import Standing, Work


def alone(losses: Losses) -> Losses:
    """Return losses of which each is computed in a pass of its own.

    In a pass together, what an example is padded with and where kernels cut a batch depend on the
    others: last bits of a loss, and with some models more. One example more would then change the
    others' vectors too, and its own clip bound would not hold what it changes.
    """

    def each(batch: Sequence[int]) -> torch.Tensor:
        return torch.cat([losses([example]) for example in batch])

    return each


@dataclass(frozen=True)
class Noised:
    """Measures a Poisson sample along the round's directions and releases the noisy sum.

    Whatever the examples are, it answers: there is no finite loss to miss and no batch too small.
    """

    estimator: Estimator
    mechanism: Mechanism
    sampler: PoissonSampler

    @staticmethod
    def of(
        config: RunConfig,
        work: Work,
        mechanism: Mechanism,
        examples: int,
        source: Callable[[int], bytes],
    ) -> "Noised":
        """Return that of a run without local steps, on so many examples."""
        assert isinstance(work, Standing), "the run file refuses noise on steps"
        section = config.privacy
        sampler = PoissonSampler(examples, section.sample_rate, section.batch_cap, source)
        return Noised(work.estimator, mechanism, sampler)

    def measure(self, losses: Losses, order: Order) -> Measurement:
        """Return one scalar a direction, and no loss."""
        vectors = vectors_of(self.estimator, losses, self.sampler.batch(), order.indices)
        return Measurement(self.mechanism.release(vectors), None)

    def release(self, losses: Losses, indices: Indices) -> Integers:
        """Return one number a direction, in grid steps, for a sum of all workers."""
        vectors = vectors_of(self.estimator, losses, self.sampler.batch(), indices)
        return self.mechanism.steps(vectors)


def vectors_of(
    estimator: Estimator, losses: Losses, batch: Sequence[int], indices: Indices
) -> Floats:
    """Return the scalars of a batch, which may be empty, each example's by itself: (batch, K)."""
    if not batch:
        return np.empty((0, len(indices)))
    return estimator.each(alone(losses), batch, indices)
