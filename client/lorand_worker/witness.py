"""What a worker holds its coordinator to: the last signed head of the run, kept in a file.

A coordinator that shows another history later (forked, rolled back, or signed by somebody else)
is refused. The key is the one given, or else the first one seen.
"""

from collections.abc import Callable

from lorand import durable, merkle
from lorand.errors import Behind, HandshakeError, LedgerError, LorandError
from lorand.heads import Head, KeptHead, Signature
from lorand.v1 import ledger_pb2 as pb
from lorand_worker.feedback import Place


class Witness:
    """Remembers the longest history that a coordinator signed, also across a restart."""

    def __init__(
        self,
        run_digest: bytes,
        place: Place | None,
        key: bytes | None,
        note: Callable[[str], None],
    ) -> None:
        """Read what is kept. Raises LorandError when it cannot be used.

        Without a place nothing outlives this object.
        """
        self._run_digest, self._note = run_digest, note
        self._path = place.file("head.json") if place is not None else None
        self._kept = self._read()
        self._key = key or (self._kept.signature.key if self._kept else None)

    @property
    def known_size(self) -> int:
        """Entries of the kept history; 0 before there is one."""
        return self._kept.head.size if self._kept else 0

    def expect(self, size: int, *, signs: bool) -> None:
        """Have a coordinator with so many entries be one that could be believed.

        Raises HandshakeError when it does not sign although it should, Behind when entries lack.
        """
        if self._key is not None and not signs:
            raise HandshakeError(
                f"the ledger of this run is signed by {self._key.hex()}, and this coordinator "
                "does not sign: it is another program or an older release; ask its owner"
            )
        if size < self.known_size:
            raise Behind(
                f"the coordinator's ledger has {size} entries, and it signed {self.known_size} "
                f"for this worker: it was rolled back; its owner should restore it{self._advice()}"
            )

    def take(self, ours: Head, answer: pb.GetHeadResponse) -> None:
        """Check a signed head of the history that this worker has, and keep it.

        Raises HandshakeError when it is of another history, of one that does not begin with the
        kept one, or signed by another key; LorandError when it cannot be kept.
        """
        signed = answer.head
        head = Head(signed.size, signed.root, signed.digest)
        signature = Signature(signed.key, signed.signature)
        if self._key is not None and signature.key != self._key:
            raise HandshakeError(
                f"the run's ledger is signed by {signature.key.hex()}, and this worker knows "
                f"{self._key.hex()}: it is another coordinator; if its owner confirms that the key "
                f"is new, join with --coordinator-key {signature.key.hex()}"
            )
        if head != ours:
            raise HandshakeError(
                f"the coordinator does not sign the {ours.size} entries that it sent to this "
                "worker: it shows others another history; ask its owner, and the other workers'"
            )
        if not signature.is_of(self._run_digest, head):
            raise HandshakeError(
                "the coordinator's signature of its ledger is not valid; ask its owner"
            )
        if self._kept is not None:
            old = self._kept.head
            if not merkle.extends(old.size, old.root, head.size, head.root, answer.consistency):
                raise HandshakeError(
                    f"the coordinator's history does not begin with the {old.size} entries that "
                    f"were signed for this worker: it was forked{self._advice()}"
                )
        if self._key is None:
            self._note(f"the run's ledger is signed by {signature.key.hex()}: noted")
        self._key = signature.key
        self._keep(KeptHead(self._run_digest, head, signature))

    def _advice(self) -> str:
        if self._path is None:
            return ""
        return (
            f". {self._path} has its signature: `lr-coordinator ledger verify FILE --head` tells "
            "which ledger it is of. Where its owner says that the run was begun anew on purpose, "
            "remove that file, or join with another --state"
        )

    def _read(self) -> KeptHead | None:
        if self._path is None:
            return None
        try:
            kept = KeptHead.from_json(self._path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, LedgerError) as error:
            raise LorandError(
                f"cannot use the history kept in {self._path}: {error}; restore the file, or "
                "remove it to believe the coordinator anew"
            ) from error
        if kept.run_digest != self._run_digest:
            raise LorandError(
                f"{self._path} is of another run; remove it, or choose another --state"
            )
        return kept

    def _keep(self, kept: KeptHead) -> None:
        self._kept = kept
        if self._path is None:
            return
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            durable.replace(self._path, kept.to_json().encode())
        except OSError as error:
            raise LorandError(
                f"cannot keep the run's history in {self._path}: {error}; choose another folder "
                "with --state"
            ) from error
