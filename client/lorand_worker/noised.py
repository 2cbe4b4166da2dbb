"""A private round: a secret sample, each example by itself, and a release with noise."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorand.config import RunConfig
from lorand.directions import Indices
from lorand.privacy.mechanism import Integers, Mechanism
from lorand_worker.data import PoissonSampler
from lorand_worker.estimators import Estimator, Losses
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

    def release(self, losses: Losses, indices: Indices) -> Integers:
        """Return one number a direction, in the mechanism's grid steps."""
        batch = self.sampler.batch()
        vectors = np.empty((0, len(indices)))
        if batch:
            vectors = self.estimator.each(alone(losses), batch, indices)
        return self.mechanism.steps(vectors)
