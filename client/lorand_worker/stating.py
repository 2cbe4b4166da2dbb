"""What this worker contributed, signed for those who read the ledger later: its statements.

It states what it knows itself: of a contribution that it is about to send it notes the digest, on
the disk, and covers it once the ledger says that it was committed. Where it does not know (its
state was lost, or the ledger has a contribution in its name that it did not make) a statement ends
before and the next begins after: a gap, which `lr-coordinator ledger verify --roster` reports.
"""

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from typing import Any, Final

from google.protobuf.message import DecodeError

from lorand import durable, ledger, statements, strict_json
from lorand.errors import HandshakeError, LorandError
from lorand.ledger import Position
from lorand.merkle import HASH_BYTES
from lorand.privacy.primitives import IdentityKey
from lorand.v1 import ledger_pb2 as pb
from lorand_worker.feedback import Place

FORMAT: Final = "lorand/statements/v1"
KEPT: Final = 64
"""Statements that may wait for a coordinator that takes none; then the oldest is given up."""


@dataclass(frozen=True)
class Account:
    """This worker's contributions from entry `first` on, up to the one before `next_sequence`.

    `head` is the digest of that one, `digest` is over the contributions, `count` of them. What
    became of the one `awaited`, a round and the SHA-256 of what is stored, is not known yet.
    """

    worker: int
    first: int
    next_sequence: int
    head: bytes
    digest: bytes = statements.NOTHING
    count: int = 0
    awaited: tuple[int, bytes] | None = None

    def begun_anew(self, first: int) -> "Account":
        """Return the account of what comes from entry `first` on."""
        return replace(self, first=first, digest=statements.NOTHING, count=0)


class Statements:
    """A worker's account, and its statements that nobody took yet; in a file where there is one."""

    def __init__(
        self,
        key: IdentityKey,
        run_digest: bytes,
        place: Place | None,
        note: Callable[[str], None],
    ) -> None:
        """Read what is kept; what cannot be used is said with `note`, and a gap.

        Raises LorandError when the file cannot be read.
        """
        self._key, self._run_digest, self._note = key, run_digest, note
        self._path = place.file("statements.json") if place is not None else None
        self._account: Account | None = None
        self._unposted: list[pb.Statement] = []
        if self._path is not None and self._path.exists():
            try:
                self._account, self._unposted = _read(self._path.read_bytes(), run_digest)
            except (ValueError, KeyError, TypeError, DecodeError, HandshakeError) as error:
                note(f"{self._path} is not used: {error}; contributions before stay unstated")
            except OSError as error:
                raise self._unkept(error) from error

    @property
    def next(self) -> pb.Statement | None:
        """The statement to be handed in next."""
        return self._unposted[0] if self._unposted else None

    @property
    def awaited_from(self) -> int | None:
        """The sequence from which the ledger says what became of the last contribution."""
        account = self._account
        return None if account is None or account.awaited is None else account.next_sequence

    def sent(self, worker: int, contribution: pb.Contribution, position: Position) -> None:
        """Note a contribution to the round after a position, before it is sent.

        Of a round that is answered again the last answer counts: the coordinator has no other, or
        it would not have asked.
        """
        account = self._account
        here = (worker, position.next_sequence, position.head)
        if account is None or (account.worker, account.next_sequence, account.head) != here:
            account = Account(worker, position.next_sequence, position.next_sequence, position.head)
        stored = sha256(statements.stored(worker, contribution)).digest()
        self._account = replace(account, awaited=(contribution.round_index, stored))
        self._keep()

    def rejected(self, round_index: int) -> None:
        """Note that the last contribution was not taken: if one is committed, it is another."""
        account = self._account
        if account is not None and account.awaited and account.awaited[0] == round_index:
            self._account = replace(account, awaited=None)
            self._keep()

    def follow(self, body: bytes, position: Position) -> None:
        """Take a durable entry, and the position after it."""
        account = self._account
        if account is None or position.next_sequence <= account.next_sequence:
            return
        self._take(body)
        if self._account is not None and self._account.head != position.head:
            self._note("the run was begun anew: what was contributed before stays unstated")
            self._account = None

    def _take(self, body: bytes) -> None:
        account, entry = self._account, ledger.parse(body)
        assert account is not None
        assert entry.sequence == account.next_sequence
        awaited = account.awaited
        if entry.HasField("commit") and account.worker in entry.commit.workers:
            if awaited is not None and awaited[0] == entry.round_index:
                digest = statements.after(account.digest, entry.sequence, awaited[1])
                account = replace(account, digest=digest, count=account.count + 1)
            else:
                self._note(
                    f"the ledger has a contribution of this worker to round {entry.round_index} "
                    "that it knows nothing of: it is not stated. If nothing of --state was lost, "
                    "ask the coordinator's owner"
                )
                self._close()
                account = account.begun_anew(entry.sequence + 1)
        ended = entry.HasField("commit") or entry.HasField("abandon")
        if ended and awaited is not None and entry.round_index >= awaited[0]:
            account = replace(account, awaited=None)
        head = ledger.entry_digest(account.head, body)
        self._account = replace(account, next_sequence=entry.sequence + 1, head=head)

    def look_up(self, bodies: Iterable[bytes]) -> None:
        """Follow entries that a jump leaves out, as far as they tell of the last contribution."""
        for body in bodies:
            if self.awaited_from is None:
                return
            self._take(body)

    def jump(self, position: Position) -> None:
        """Go on from a later position; of what is between nothing is stated."""
        account = self._account
        if account is not None and account.next_sequence < position.next_sequence:
            self._close()
            moved = replace(
                account, next_sequence=position.next_sequence, head=position.head, awaited=None
            )
            self._account = moved.begun_anew(position.next_sequence)
            self._keep()

    def due(self, committed: int, every: int) -> bool:
        """Return whether a statement is due after so many commits.

        The workers of a run take turns, so that a coordinator does not hear of all at once.
        """
        account = self._account
        return account is not None and (committed + account.worker) % every == 0

    def state(self) -> None:
        """Sign what there is to be stated."""
        if self._account is not None and self._account.count:
            self._close()
            self._account = self._account.begun_anew(self._account.next_sequence)
            self._keep()

    def posted(self) -> None:
        """Forget the statement that was handed in, or that nobody will take."""
        del self._unposted[0]
        self._keep()

    def end(self) -> None:
        """Forget all, once the run is finished and all is handed in."""
        if self._path is not None and self.next is None:
            try:
                self._path.unlink(missing_ok=True)
            except OSError as error:
                raise self._unkept(error) from error

    def _close(self) -> None:
        """Sign the account as it is."""
        account = self._account
        assert account is not None
        if not account.count:
            return
        made = pb.Statement(
            worker=account.worker,
            first=account.first,
            last=account.next_sequence - 1,
            head=account.head,
            contributions=account.digest,
        )
        self._unposted.append(statements.sign(self._key, self._run_digest, made))
        del self._unposted[:-KEPT]

    def _keep(self) -> None:
        if self._path is None:
            return
        account = self._account
        content = {
            "format": FORMAT,
            "run": self._run_digest.hex(),
            "account": None if account is None else _written(account),
            "unposted": [made.SerializeToString().hex() for made in self._unposted],
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            durable.replace(self._path, json.dumps(content, indent=1).encode())
        except OSError as error:
            raise self._unkept(error) from error

    def _unkept(self, error: OSError) -> LorandError:
        return LorandError(
            f"cannot keep what this worker contributed in {self._path}: {error}; choose another "
            "folder with --state"
        )


def _written(account: Account) -> dict[str, Any]:
    content = asdict(account)
    content |= {"head": account.head.hex(), "digest": account.digest.hex()}
    if account.awaited is not None:
        content["awaited"] = [account.awaited[0], account.awaited[1].hex()]
    return content


def _read(content: bytes, run_digest: bytes) -> tuple[Account | None, list[pb.Statement]]:
    """Return what a file keeps. Raises ValueError and the like."""
    kept: dict[str, Any] = strict_json.loads(content)
    if (kept["format"], kept["run"]) != (FORMAT, run_digest.hex()):
        raise ValueError("it is of another format or run")
    unposted = [pb.Statement.FromString(bytes.fromhex(made)) for made in kept["unposted"]]
    for made in unposted:
        statements.check(run_digest, made)
    found = kept["account"]
    if found is None:
        return None, unposted
    awaited = found["awaited"]
    if awaited is not None:
        round_index, stored = awaited
        awaited = round_index, bytes.fromhex(stored)
    account = Account(
        worker=found["worker"],
        first=found["first"],
        next_sequence=found["next_sequence"],
        head=bytes.fromhex(found["head"]),
        digest=bytes.fromhex(found["digest"]),
        count=found["count"],
        awaited=awaited,
    )
    numbers = (account.worker, account.first, account.next_sequence, account.count)
    if not all(type(number) is int for number in (*numbers, *(awaited or ())[:1])):
        raise ValueError("what it counts is no number")
    if not 0 <= account.first <= account.next_sequence < 1 << 63 or account.count < 0:
        raise ValueError("what it counts cannot be")
    if not 0 < account.worker < 1 << 32 or len(account.head + account.digest) != 2 * HASH_BYTES:
        raise ValueError("its worker or digests cannot be")
    return account, unposted
