"""The coordinator's part in secure sums: it passes on keys, and adds up what they mask."""

from collections.abc import Mapping, Sequence

from lorand.config import RunConfig
from lorand.errors import ContributionError, HandshakeError
from lorand.ledger import Position
from lorand.privacy import plan
from lorand.privacy.mechanism import Integers
from lorand.privacy.secure_sum import Attempt, Keys, MaskedSum, Roster
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.aggregation import UnsoundRound


class SecureSum:
    """Masked vectors of which nobody, the coordinator included, learns more than the sum.

    A round that misses a participant is given up: the next one has other masks, batches and noise.
    """

    all_or_nothing = True

    def __init__(self, config: RunConfig, roster: Roster, multiplier: float) -> None:
        """Take the roster as the members have it, and the noise multiplier of `plan.planned`."""
        self.mechanism = plan.whole(config, multiplier)
        self._length = config.num_directions
        self._largest = plan.largest_number(config, multiplier)
        self._roster = roster
        self._announced: dict[str, bytes] = {}
        self._heard: dict[int, tuple[bytes, ...]] = {}
        self._attempt: Attempt | None = None

    def greet(self, worker: int, hello: wire.Hello) -> None:
        """See Summing: it brings its key of this run, signed by a member of the roster."""
        keys = Keys.verified(hello.run_digest, self._roster, [hello.sum_key])
        (member,) = keys.public
        if self._roster.names[member] != hello.name:
            raise HandshakeError(
                f"the worker {hello.name!r} brings the key of {self._roster.names[member]!r}: join "
                "with the --name that the roster has for this identity key"
            )
        self._announced[hello.name] = hello.sum_key
        self._heard.pop(worker, None)

    def keys_for(self, worker: int) -> wire.SumKeys | None:
        """See Summing."""
        known = tuple(self._announced[name] for name in sorted(self._announced))
        if self._heard.get(worker) == known:
            return None
        self._heard[worker] = known
        return wire.SumKeys(announcements=known)

    def begin(self, round_index: int, names: Sequence[str], position: Position) -> bytes:
        """See Summing."""
        keys = Keys.verified(position.run_digest, self._roster, self._announced.values())
        self._attempt = keys.attempt(
            round_index,
            0,
            names,
            length=self._length,
            bound=self._largest,
            state_digest=position.head,
        )
        return self._attempt.to_bytes()

    def check(self, name: str, contribution: pb.Contribution) -> None:
        """See Summing."""
        sender = self._sum().add(contribution.sum)
        if sender != name:
            raise ContributionError(f"{name!r} sent the vector of {sender!r}")

    def total(self, contributions: Mapping[str, pb.Contribution]) -> Integers:
        """See Summing. The noise is in it already, a share of each."""
        masked = self._sum()
        try:
            for contribution in contributions.values():
                masked.add(contribution.sum)
            return masked.total()
        except ContributionError as error:
            raise UnsoundRound(str(error)) from error

    def _sum(self) -> MaskedSum:
        if self._attempt is None:
            raise ContributionError("no round has begun: wait for its start")
        return MaskedSum(self._roster, self._attempt)
