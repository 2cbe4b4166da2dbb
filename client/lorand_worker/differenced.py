"""A round of a DIFF2 run: gradients at a restart, else what they changed by (experimental)."""

from collections.abc import Callable
from dataclasses import dataclass

from lorand.config import RunConfig
from lorand.errors import LorandError
from lorand.privacy.diff2 import Rule, distance
from lorand.replica import Replica
from lorand.sections import PrivacySection
from lorand_worker.data import PoissonSampler
from lorand_worker.estimators import Estimator, Losses, Measurement, Order
from lorand_worker.local_steps import Standing, Work
from lorand_worker.noised import vectors_of


@dataclass(frozen=True)
class Differenced:
    """Measures a Poisson sample here and where the last commit began, and releases the change.

    Both positions see the same examples, each by itself: what is clipped is one example's change.
    """

    estimator: Estimator
    rule: Rule
    sampler: PoissonSampler
    section: PrivacySection
    replica: Replica

    @staticmethod
    def of(
        config: RunConfig,
        work: Work,
        rule: Rule,
        replica: Replica,
        examples: int,
        source: Callable[[int], bytes],
    ) -> "Differenced":
        """Return that of a DIFF2 run on so many examples, whose weights the replica holds."""
        assert isinstance(work, Standing), "the run file refuses noise on steps"
        section = config.privacy
        sampler = PoissonSampler(examples, section.sample_rate, source=source)
        return Differenced(work.estimator, rule, sampler, section, replica)

    def measure(self, losses: Losses, order: Order) -> Measurement:
        """Return one scalar a direction, and no loss; the replica stands where it stood.

        Raises LorandError where it is not known what was before.
        """
        restart, before = self.section.restarts(order.committed), order.before
        if not restart and before is None:
            raise LorandError(
                "a round between restarts needs the commit before it; join again, so that the "
                "ledger is read from its first entry"
            )
        batch, here = self.sampler.batch(), self.replica.coefficients
        present = vectors_of(self.estimator, losses, batch, order.indices)
        if before is None or restart:
            return Measurement(self.rule.release(present), None)
        self.replica.set(before)
        try:
            earlier = vectors_of(self.estimator, losses, batch, order.indices)
        finally:
            self.replica.set(here)
        moved = distance(here - before, self.replica.pool.quantum_exponent)
        return Measurement(self.rule.release_change(present, earlier, moved), None)
