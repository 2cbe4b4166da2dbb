"""Ledgers checked from their files: SQLite and exported, whole, damaged, forged."""

import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest
from tests.runs import IDENTITY, config_of, contribution, hello
from tests.unit.signed_histories import (
    BODIES,
    KEY,
    OTHER_KEY,
    RUN,
    forked,
    position_of,
    store_of,
)

from lorand import heads, ledger
from lorand.errors import Behind, ConfigError, HandshakeError, LedgerError, LorandError
from lorand.heads import KeptHead
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import show, signing
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import SqliteStore, StoreUnavailable
from lorand_coordinator.verification import verify


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A signed ledger of a run that went on by itself."""
    path = tmp_path / "run.ledger"
    store_of(BODIES, KEY, path).close()
    return path


def exported(path: Path) -> Path:
    target = path.with_suffix(".bin")
    show.export(path, target)
    return target


def kept(bodies: list[bytes]) -> KeptHead:
    head = position_of(bodies).history
    return KeptHead(RUN, head, heads.sign(KEY, RUN, head))


# ------------------------------------------------------------- what a coordinator writes


def test_a_sequencer_signs_every_entry(tmp_path: Path) -> None:
    path = tmp_path / "run.ledger"
    config = config_of(run={"rounds": 2})
    with closing(SqliteStore(path)) as store:
        sequencer = Sequencer(config, store, IDENTITY, key=KEY)
        position = ledger.origin(config, IDENTITY)
        for name in ("one", "two"):
            number, _ = sequencer.admit(hello(position, name))
            sequencer.connect(number, 0.0)
        for worker in (1, 2):
            sequencer.receive(worker, contribution(config, 1, worker), 1.0)
    with closing(SqliteStore(path)) as store:  # and goes on after a restart, before its key did
        sequencer = Sequencer(config, store, None, key=OTHER_KEY)
        for worker in (1, 2):
            sequencer.connect(worker, 2.0)
        for worker in (1, 2):
            sequencer.receive(worker, contribution(config, 2, worker), 3.0)
    found = verify(path, OTHER_KEY.public)
    assert found.position.finished
    assert (found.signatures, found.contributions) == (found.position.next_sequence, 4)


def test_a_failed_append_leaves_no_signature(path: Path) -> None:
    with closing(SqliteStore(path)) as store:
        store.signer = heads.signer(KEY, RUN)
        size, root = len(store), store.tree.root()
        store._database.execute("PRAGMA max_page_count = 1")
        large = pb.Entry(round_index=9, abandon=pb.Abandon(reason="x" * 50_000))
        with pytest.raises(StoreUnavailable):
            store.append(large)
        assert (len(store.tree), store.tree.root()) == (size, root)
        assert store.signature(size) is None
    assert verify(path).position.next_sequence == size


def test_a_ledger_from_before_there_were_signatures(path: Path) -> None:
    """It is read, can be signed from now on, and its end then covers all."""
    with closing(sqlite3.connect(path)) as database:
        database.execute("DROP TABLE signature")
    found = verify(path)
    assert (found.signatures, found.key) == (0, None)
    assert exported(path).read_bytes().startswith(ledger.FILE_MAGIC)
    assert verify(exported(path)).key is None
    with pytest.raises(LedgerError, match="not signed, not by"):
        verify(path, KEY.public)
    with closing(SqliteStore(path)) as store:
        store.signer = heads.signer(KEY, RUN)
        store.append(pb.Entry(round_index=9, abandon=pb.Abandon(reason="nobody")))
    assert verify(path, KEY.public).signatures == 1


# ------------------------------------------------------------- both kinds of file


@pytest.mark.parametrize("form", [lambda path: path, exported])
def test_a_whole_ledger(form: Callable[[Path], Path], path: Path) -> None:
    found = verify(form(path), KEY.public, kept(BODIES[:6]))
    assert found.position.history == position_of(BODIES).history
    assert found.key == KEY.public


@pytest.mark.parametrize("form", [lambda path: path, exported])
def test_another_key_or_history_is_found(form: Callable[[Path], Path], path: Path) -> None:
    file = form(path)
    with pytest.raises(LedgerError, match=f"signed by {KEY.public.hex()}, not by"):
        verify(file, OTHER_KEY.public)
    with pytest.raises(LedgerError, match=r"not the history of 6 entries that .* showed two"):
        verify(file, None, kept(forked(4)[:6]))
    longer = [*BODIES, pb.Entry(sequence=len(BODIES), finish=pb.Finish()).SerializeToString()]
    with pytest.raises(LedgerError, match="entries were taken away"):
        verify(file, None, kept(longer))
    other = KeptHead(bytes(32), kept(BODIES).head, kept(BODIES).signature)
    with pytest.raises(LedgerError, match="of another run"):
        verify(file, None, other)


def test_a_rewritten_history_has_no_signature(path: Path, tmp_path: Path) -> None:
    """Who edits the file can make a chain of it again, but not sign it."""
    forgery = tmp_path / "forged.ledger"
    store_of(forked(5), OTHER_KEY, forgery).close()
    with pytest.raises(LedgerError, match="not by"):
        verify(forgery, KEY.public)
    with closing(sqlite3.connect(forgery)) as database, database:
        database.execute("ATTACH ? AS real", [str(path)])
        database.execute("DELETE FROM signature")
        database.execute("INSERT INTO signature SELECT * FROM real.signature")
    with pytest.raises(LedgerError, match="after entry 5 is not of the entries up to it"):
        verify(forgery)


def test_contributions_of_others_are_found(tmp_path: Path) -> None:
    path = tmp_path / "run.ledger"
    with closing(store_of(BODIES[:3], KEY, path)) as store:
        store.append(ledger.parse(BODIES[3]), [b"not what was summed"])
    with pytest.raises(LedgerError, match="are not those it was made of"):
        verify(path)


def test_an_empty_ledger_is_said_to_be(tmp_path: Path) -> None:
    SqliteStore(tmp_path / "run.ledger").close()
    with pytest.raises(LedgerError, match="has no entry"):
        verify(tmp_path / "run.ledger")


# ------------------------------------------------------------- the portable file


def test_both_versions_are_read(tmp_path: Path) -> None:
    signature = kept(BODIES).signature
    for given in (None, signature):
        file = tmp_path / "file"
        assert ledger.write_file(file, BODIES, given) == len(BODIES)
        assert list(ledger.read_file(file)) == BODIES
        assert ledger.file_signature(file) == given
        again = tmp_path / "again"
        assert show.export(file, again) == len(BODIES)
        assert again.read_bytes() == file.read_bytes()


def test_a_signed_file_that_is_cut_off_anywhere_is_refused(path: Path) -> None:
    """Also between two entries, where version 1 cannot tell."""
    file = exported(path)
    whole = file.read_bytes()
    for length in [*range(len(ledger.FILE_MAGIC), len(whole), 9), len(whole) - 1, len(whole) - 100]:
        file.write_bytes(whole[:length])
        with pytest.raises(LedgerError, match="is cut off"):
            list(ledger.read_file(file))
    file.write_bytes(whole + b"x")
    with pytest.raises(LedgerError, match="is cut off"):
        verify(file)


def test_any_changed_byte_of_a_signed_file_is_found(path: Path) -> None:
    file = exported(path)
    whole = bytearray(file.read_bytes())
    for place in range(0, len(whole), 29):
        whole[place] ^= 1
        file.write_bytes(whole)
        with pytest.raises(LorandError):
            verify(file, KEY.public)
        whole[place] ^= 1


# ------------------------------------------------------------- the key


def test_a_key_is_made_once_and_for_its_owner(tmp_path: Path) -> None:
    path = signing.key_beside(tmp_path / "new" / "run.ledger")
    made = signing.key_at(path)
    assert path.name == "run.ledger.key"
    assert path.stat().st_mode & 0o777 == 0o600
    assert signing.key_at(path).public == made.public


def test_a_key_that_cannot_be_used_is_our_error(tmp_path: Path) -> None:
    path = tmp_path / "key"
    path.write_bytes(bytes(32))
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"may read the key .*chmod 600"):
        signing.key_at(path)
    path.chmod(0o600)
    path.write_bytes(bytes(31))
    with pytest.raises(ConfigError, match="31 bytes instead of 32"):
        signing.key_at(path)
    with pytest.raises(ConfigError, match="choose another place"):
        signing.key_at(path / "below")


def test_several_coordinators_have_one_key(tmp_path: Path) -> None:
    """Who writes first makes it; whoever has another one, or none, is told what to copy."""
    path, other = tmp_path / "a.key", tmp_path / "b.key"
    with closing(SqliteStore(":memory:")) as empty:
        first = signing.shared_key(path, empty)
    with closing(store_of(BODIES, first, ":memory:")) as store:
        assert signing.shared_key(path, store).public == first.public
        theirs = f"signed by {first.public.hex()}"
        with pytest.raises(LedgerError, match=rf"{theirs}, and there is no key at .*b\.key; copy"):
            signing.shared_key(other, store)
        assert not other.exists()
        second = signing.key_at(other).public.hex()
        with pytest.raises(LedgerError, match=rf"{theirs}, and .*b\.key is the key {second}; copy"):
            signing.shared_key(other, store)


@pytest.mark.parametrize(
    ("request_", "key", "why"),
    [
        (pb.GetHeadRequest(size=3), None, "does not sign"),
        (pb.GetHeadRequest(size=99), KEY, "holds .* entries, not 99: it was rolled back"),
        (pb.GetHeadRequest(size=3, known_size=4), KEY, "cannot begin with 4"),
    ],
)
def test_heads_that_cannot_be_given(request_: pb.GetHeadRequest, key: object, why: str) -> None:
    store = store_of(BODIES)
    assert key is None or key is KEY
    with pytest.raises(HandshakeError, match=why):
        signing.head_for(request_, store, position_of(BODIES), KEY if key else None)
    empty = SqliteStore(":memory:")
    with pytest.raises(HandshakeError, match="holds 0 entries"):
        signing.head_for(pb.GetHeadRequest(), empty, None, KEY)


def test_too_long_a_history_is_told_apart() -> None:
    """A worker with several coordinators asks the next one then."""
    with pytest.raises(Behind, match="holds 0 entries, not 99"):
        signing.head_for(pb.GetHeadRequest(size=99), SqliteStore(":memory:"), None, KEY)


def test_without_a_size_the_whole_history_is_signed() -> None:
    store = store_of(BODIES)
    answer = signing.head_for(pb.GetHeadRequest(), store, position_of(BODIES), KEY)
    assert answer.head.size == len(BODIES)
    stored = store.signature(len(BODIES) - 1)
    assert stored is not None
    assert answer.head.signature == stored.value
