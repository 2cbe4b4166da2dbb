"""Elections of columns: what contributions must hold, and what a commit writes (pure)."""

from collections.abc import Sequence

from lorand.errors import ContributionError, LedgerError
from lorand.ledger import Position
from lorand.subspaces import elections
from lorand.v1 import ledger_pb2 as pb


def check_votes(position: Position | None, contribution: pb.Contribution) -> None:
    """Raise ContributionError unless a contribution votes on what its round elects, and no more."""
    if position is not None:
        _votes(position, contribution)


def elected(position: Position, stored: Sequence[pb.StoredContribution]) -> list[pb.Columns]:
    """Return the columns that a round's participants elect; empty where it elects none.

    Every participant has one vote a column, whatever its number of examples: a vote says which
    columns matter to it, not by how much.
    """
    votes = [_votes(position, part.contribution) for part in stored]
    if not votes[0]:
        return []
    return elections.pack(elections.most_votes(position.identity.manifest, votes))


def _votes(position: Position, contribution: pb.Contribution) -> elections.Columns:
    manifest = position.identity.manifest
    due = position.elections.due(position.config, manifest, position.committed)
    try:
        return elections.read(manifest, contribution.votes, due)
    except LedgerError as error:
        raise ContributionError(f"its votes do not fit the round: {error}") from error
