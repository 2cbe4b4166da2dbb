"""The ledger's logic: entries, hash chain, replay and the portable file; no database.

An entry is serialised once, by the coordinator. Its digest is
SHA-256("lorand/entry/v1" ‖ digest of the entry before ‖ body), so every reader checks history by
the bytes it received.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import IO, Final

import numpy as np
from google.protobuf.message import DecodeError

from lorand import codec, merkle
from lorand.closed import Closed, Sparse
from lorand.coefficients import Coefficients, add, zeros
from lorand.config import RunConfig
from lorand.directions import Draws, Pool
from lorand.errors import ContributionError, LedgerError
from lorand.heads import KEY_BYTES, SIGNATURE_BYTES, Head, Signature
from lorand.manifest import Identity, Manifest, run_digest
from lorand.merkle import Frontier
from lorand.subspaces import periods
from lorand.subspaces.elections import Elections
from lorand.v1 import ledger_pb2 as pb

GENESIS: Final = bytes(32)
"""The digest before entry 0."""
FILE_MAGIC: Final = b"lorand ledger v1\n"
SIGNED_FILE_MAGIC: Final = b"lorand ledger v2\n"
STATED_FILE_MAGIC: Final = b"lorand ledger v3\n"
_MAGICS: Final = (FILE_MAGIC, SIGNED_FILE_MAGIC, STATED_FILE_MAGIC)
_END: Final = bytes(4)
"""In the place of a length, but in files of version 1: the list ends here."""
_SEAL_BYTES: Final = KEY_BYTES + SIGNATURE_BYTES
MAX_ENTRY_BYTES: Final = 32 << 20


def entry_digest(previous: bytes, body: bytes) -> bytes:
    """Return the digest of an entry, 32 bytes."""
    return hashlib.sha256(b"lorand/entry/v1" + previous + body).digest()


def contributions_digest(contributions: Iterable[bytes]) -> bytes:
    """Return SHA-256 over serialised StoredContributions, each after its length as u32."""
    total = hashlib.sha256(b"lorand/contributions/v1")
    for body in contributions:
        total.update(len(body).to_bytes(4, "little") + body)
    return total.digest()


def coefficients_digest(coefficients: Coefficients) -> bytes:
    """Return SHA-256 of A as little-endian 64-bit integers."""
    return hashlib.sha256(pack_coefficients(coefficients)).digest()


def width_of(coefficients: Coefficients) -> int:
    """Return the fewest bytes, 1 to 8, that hold each coefficient in two's complement.

    >>> width_of(np.array([127, -128])), width_of(np.array([128, 0]))
    (1, 2)
    """
    furthest = max(int(coefficients.max()), ~int(coefficients.min()))
    return furthest.bit_length() // 8 + 1


def pack_coefficients(coefficients: Coefficients, width: int = 8) -> bytes:
    """Return A as little-endian integers of so many bytes, which must hold them (`width_of`)."""
    assert width >= width_of(coefficients)
    parts = coefficients.astype("<i8").view(np.uint8).reshape(-1, 8)
    return parts[:, :width].tobytes()


def unpack_coefficients(data: bytes, size: int, width: int = 8) -> Coefficients:
    """Return A. Raises LedgerError when the length is not width·K."""
    if not 1 <= width <= 8 or len(data) != width * size:
        raise LedgerError(f"{size} coefficients of {width} bytes are not {len(data)} bytes")
    parts = np.frombuffer(data, np.uint8).reshape(size, width)
    whole = np.zeros((size, 8), np.uint8)
    whole[:, :width] = parts
    whole[:, width:] = np.where(parts[:, -1:] >= 128, 255, 0)  # the sign
    return whole.view("<i8").reshape(size).astype(np.int64)


def parse(body: bytes) -> pb.Entry:
    """Return the entry of a body. Raises LedgerError when it is none."""
    try:
        entry = pb.Entry.FromString(body)
    except DecodeError as error:
        raise LedgerError(f"an entry of the ledger cannot be read: {error}") from error
    if entry.WhichOneof("kind") is None:
        raise LedgerError(f"entry {entry.sequence} of the ledger is of an unknown kind")
    return entry


def start_entry(config: RunConfig, identity: Identity) -> pb.Entry:
    """Return entry 0 of a run."""
    return pb.Entry(
        start=pb.Start(
            config=config.canonical(),
            base_digest=identity.base_digest,
            tokenizer_digest=identity.tokenizer_digest,
            manifest=identity.manifest.to_json(),
        )
    )


@dataclass(frozen=True)
class Position:
    """A reader's place in a run: what it has applied, and the coefficients that follow from it.

    The weights are those of the `closed` pools, one after another, and then of `coefficients`.
    `before` are the coefficients that the last commit found, where it was read and on this pool.
    """

    config: RunConfig
    identity: Identity
    draws: Draws
    coefficients: Coefficients
    next_sequence: int = 0
    head: bytes = GENESIS
    committed: int = 0
    finished: bool = False
    closed: Closed = field(default_factory=Closed)
    elections: Elections = field(default_factory=Elections)
    before: Coefficients | None = None
    tree: Frontier = field(default_factory=Frontier)

    def pool(self, number: int) -> Pool:
        """Return a pool of the run, with the basis that directions act in."""
        return pool_of(self.config, self.identity, number, self.elections)

    @property
    def run_digest(self) -> bytes:
        """The run's identity, 32 bytes."""
        return self.draws.run_digest

    @property
    def history(self) -> Head:
        """The entries so far, as the coordinator signs them."""
        return Head(self.next_sequence, self.tree.root(), self.head)


def pool_of(
    config: RunConfig, identity: Identity, number: int, elections: Elections | None = None
) -> Pool:
    """Return a pool of a run, with the basis that directions act in."""
    if not config.subspace.restricts:
        return config.pool(identity, number)
    first = periods.first_pool(config, periods.period(config, number))
    key = config.pool(identity, first).key
    basis = (elections or Elections()).basis(config, identity.manifest, number, key)
    return config.pool(identity, number, basis)


def origin(config: RunConfig, identity: Identity) -> Position:
    """Return the position before entry 0 of the run of this config and identity."""
    digest = run_digest(config.digest(), identity)
    return Position(config, identity, config.draws(digest), zeros(config.directions.pool_size))


def origin_of(body: bytes) -> Position:
    """Return the position before entry 0, read from entry 0 itself."""
    entry = parse(body)
    if entry.sequence != 0 or not entry.HasField("start"):
        raise LedgerError("the ledger does not begin with a start entry")
    start = entry.start
    identity = Identity(
        start.base_digest, start.tokenizer_digest, Manifest.from_json(start.manifest)
    )
    config = RunConfig.from_json(start.config)
    if config.canonical() != start.config:
        raise LedgerError(
            "the run's config was written by another version of LoRand and reads differently here;"
            " use the version that started the run"
        )
    return origin(config, identity)


def apply(position: Position, body: bytes) -> Position:
    """Return the position after one more entry. Raises LedgerError when it does not follow."""
    entry = parse(body)
    if entry.sequence != position.next_sequence:
        raise LedgerError(
            f"entry {entry.sequence} came where entry {position.next_sequence} was due"
        )
    kind = entry.WhichOneof("kind")
    if (kind == "start") != (entry.sequence == 0):
        raise LedgerError("a ledger has one start entry, its first")
    after = replace(
        position,
        next_sequence=position.next_sequence + 1,
        head=entry_digest(position.head, body),
        tree=position.tree.add(merkle.leaf_hash(body)),
    )
    if kind == "start":
        if entry != start_entry(position.config, position.identity):
            raise LedgerError("the start entry is of another run")
        return after
    if kind == "commit":
        indices, change = committed_delta(position, entry)
        moved = add(position.coefficients, indices, change)
        draws = position.draws.after(indices, change)
        committed = position.committed + 1
        elections = position.elections.after(
            position.config, position.identity.manifest, position.committed, entry.commit
        )
        after = replace(
            after,
            coefficients=moved,
            committed=committed,
            draws=draws,
            elections=elections,
            before=position.coefficients,
        )
        if position.config.pool_after(committed) == len(position.closed):
            return after
        closed = position.closed.then(Sparse.of(moved))
        return replace(after, coefficients=zeros(len(moved)), closed=closed, before=None)
    if kind == "finish":
        return replace(after, finished=True)
    return after


def committed_delta(position: Position, entry: pb.Entry) -> tuple[Coefficients, Coefficients]:
    """Return (indices, ΔA) of a commit entry. Raises LedgerError when its codes do not fit."""
    commit = entry.commit
    workers = tuple(commit.workers)
    if not workers or list(workers) != sorted(set(workers)):
        raise LedgerError(f"entry {entry.sequence} does not list its workers in order")
    uncounted = set(commit.uncounted)
    if not uncounted < set(workers) or list(commit.uncounted) != sorted(uncounted):
        raise LedgerError(f"entry {entry.sequence} does not count workers that it does not list")
    if commit.directions > position.config.estimator.max_directions_per_round:
        raise LedgerError(f"entry {entry.sequence} moves more directions than the run allows")
    indices = position.draws.committed(entry.round_index, workers, commit.directions)
    try:
        codes = codec.unpack(position.config.codec.down, commit.codes, len(indices))
        return indices, codec.delta(commit.scale, codes)
    except ContributionError as error:
        raise LedgerError(f"entry {entry.sequence} of the ledger is damaged: {error}") from error


def replay(bodies: Iterable[bytes]) -> Position:
    """Return the position after a whole history, checked link by link."""
    position = None
    for body in bodies:
        position = apply(origin_of(body) if position is None else position, body)
    if position is None:
        raise LedgerError("the ledger is empty")
    return position


def check_contributions(entry: pb.Entry, contributions: Sequence[bytes]) -> None:
    """Raise LedgerError unless these are the contributions that a commit was made of."""
    if contributions_digest(contributions) != entry.commit.contributions_digest:
        raise LedgerError(
            f"the contributions stored with entry {entry.sequence} are not those it was made of"
        )


def write_file(
    path: Path,
    bodies: Iterable[bytes],
    signature: Signature | None = None,
    statements: Iterable[bytes] = (),
) -> int:
    """Write a portable ledger file: magic, then each body after its length as u32.

    Of version 1, or, with a signature of the whole history, of version 2: it ends in a length of
    zero, the public key and the signature. With statements it is of version 3: three lists, each
    ended by a length of zero: entries, statements, and the key with the signature, if there is one.
    Returns the number of entries.
    """
    stated = list(statements)
    seal = b"" if signature is None else signature.key + signature.value
    count = 0
    with path.open("wb") as file:
        magic = FILE_MAGIC if signature is None else SIGNED_FILE_MAGIC
        file.write(STATED_FILE_MAGIC if stated else magic)
        for body in bodies:
            file.write(len(body).to_bytes(4, "little") + body)
            count += 1
        if stated:
            seals = [seal] if seal else []
            for part in (stated, seals):
                file.write(_END + b"".join(len(b).to_bytes(4, "little") + b for b in part))
            file.write(_END)
        elif seal:
            file.write(_END + seal)
    return count


def is_file(path: Path | str) -> bool:
    """Whether a file is a portable ledger, of any version."""
    try:
        with Path(path).open("rb") as file:
            return file.read(len(FILE_MAGIC)) in _MAGICS
    except OSError:
        return False


def read_file(path: Path) -> Iterator[bytes]:
    """Yield the bodies of a portable ledger file. Raises LedgerError when it is damaged."""
    return (body for part, body in _parts(path) if part is _Part.ENTRIES)


def file_statements(path: Path) -> Iterator[bytes]:
    """Yield the statements of a portable ledger file; only version 3 has some."""
    return (body for part, body in _parts(path) if part is _Part.STATEMENTS)


def file_signature(path: Path) -> Signature | None:
    """Return the signature that a portable file ends with; version 1 has none."""
    for part, body in _parts(path):
        if part is _Part.SEAL:
            return Signature(body[:KEY_BYTES], body[KEY_BYTES:])
    return None


class _Part(Enum):
    ENTRIES = 0
    STATEMENTS = 1
    SEAL = 2


def _parts(path: Path) -> Iterator[tuple[_Part, bytes]]:
    """Yield everything in a portable file, in order, with what it is. Raises LedgerError."""
    cut_off = LedgerError(f"{path} is cut off; export the ledger again")
    try:
        with path.open("rb") as file:
            magic = file.read(len(FILE_MAGIC))
            if magic not in _MAGICS:
                raise LedgerError(
                    f"{path} is not an exported ledger; "
                    "write one with `lr-coordinator ledger export`"
                )
            stated = magic == STATED_FILE_MAGIC
            for part in _Part if stated else (_Part.ENTRIES,):
                for body in _listed(file, cut_off, closed=magic != FILE_MAGIC):
                    if part is _Part.SEAL and len(body) != _SEAL_BYTES:
                        raise cut_off
                    yield part, body
            if magic == SIGNED_FILE_MAGIC:
                seal = file.read(_SEAL_BYTES)
                if len(seal) != _SEAL_BYTES:
                    raise cut_off
                yield _Part.SEAL, seal
            if file.read(1):
                raise cut_off
    except OSError as error:
        raise LedgerError(f"cannot read the ledger file {path}: {error}") from error


def _listed(file: IO[bytes], cut_off: LedgerError, *, closed: bool) -> Iterator[bytes]:
    """Yield bodies, each after its length; up to a length of zero where the list is `closed`."""
    while prefix := file.read(4):
        if closed and prefix == _END:
            return
        length = int.from_bytes(prefix, "little")
        body = file.read(min(length, MAX_ENTRY_BYTES))
        if len(prefix) != 4 or len(body) != length:
            raise cut_off
        yield body
    if closed:
        raise cut_off
