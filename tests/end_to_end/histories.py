"""What must hold of a run's history after any crash, whatever store it is in."""

from collections.abc import Iterator
from contextlib import closing

from lorand import ledger
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import ledgers, show
from lorand_coordinator.ledgers import Location


def assert_nothing_lost(location: Location, seen: dict[int, str]) -> None:
    """Every head that was ever shown, by number of entries, is in the history, at its place."""
    heads, head = {0: ""}, ledger.GENESIS
    for count, body in enumerate(show.bodies(location), 1):
        head = ledger.entry_digest(head, body)
        heads[count] = head.hex()
    assert {count: heads[count] for count in seen} == seen


def assert_nothing_twice(location: Location) -> None:
    """A round has one outcome, and in it a worker's one contribution, made for that round."""
    outcomes: set[int] = set()
    for entry, stored in _rounds(location):
        assert entry.round_index not in outcomes
        outcomes.add(entry.round_index)
        if entry.HasField("commit"):
            workers = [part.worker for part in stored]
            assert workers == sorted(set(workers)) == list(entry.commit.workers)
            assert {part.contribution.round_index for part in stored} == {entry.round_index}
    assert outcomes == set(range(1, len(outcomes) + 1))


def _rounds(location: Location) -> Iterator[tuple[pb.Entry, list[pb.StoredContribution]]]:
    """The entries that end rounds, each with its stored contributions."""
    with closing(ledgers.reader(location)) as store:
        for body in store.entries():
            entry = ledger.parse(body)
            if entry.WhichOneof("kind") in ("commit", "abandon"):
                bodies = store.contributions(entry.sequence)
                yield entry, [pb.StoredContribution.FromString(body) for body in bodies]
