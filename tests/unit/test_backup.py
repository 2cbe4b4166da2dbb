"""Backups: from any store to a file and back, whole or not at all; runs go on with them."""

import json
import re
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Final

import psycopg
import pytest
from tests.postgres import Server
from tests.runs import IDENTITY, config_of, contribution, hello
from typer.testing import CliRunner

from lorand import ledger
from lorand.errors import LedgerError
from lorand.privacy.primitives import IdentityKey
from lorand_coordinator import backup, cli, ledgers, show, verification
from lorand_coordinator.ledgers import Location
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import SqliteStore, Stated, Store
from lorand_coordinator.store_postgres import InUse, PostgresStore

CONFIG: Final = config_of(run={"rounds": 50}, service={"checkpoint_every": 4})
ROUNDS: Final = 10
KEY: Final = IdentityKey(bytes(range(32)))


def take_rounds(store: Store, first: int, last: int) -> bytes:
    """Run some rounds of two workers on a store; return the digest of A after them."""
    sequencer = Sequencer(CONFIG, store, IDENTITY, key=KEY)
    for name in ("a", "b"):
        assert sequencer.position is not None
        worker, _ = sequencer.admit(hello(sequencer.position, name))
        sequencer.connect(worker, 0.0)
    for round_index in range(first, last + 1):
        for worker in (1, 2):
            message = contribution(CONFIG, round_index, seed=10 * round_index + worker)
            sequencer.receive(worker, message, 0.0)
    assert sequencer.position is not None
    assert sequencer.position.committed == last
    return ledger.coefficients_digest(sequencer.position.coefficients)


@pytest.fixture(params=["file", pytest.param("database", marks=pytest.mark.postgres)])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """A ledger of ten rounds, its coordinator still there."""
    store: Store
    if request.param == "file":
        location: Location = tmp_path / "small.ledger"
        store = SqliteStore(location)
    else:
        url = database(request.getfixturevalue("postgres"), f"from_{tmp_path.name}")
        location = f"{url}#small"
        store = PostgresStore(url, "small")
    with closing(store):
        take_rounds(store, 1, ROUNDS)
        store.keep(Stated(2, 5, b"what two said"))
        yield location


def database(server: Server, name: str) -> str:
    """Make an empty database; return its URL."""
    name = name.replace("[", "_").replace("]", "_")[:60].lower()
    server.execute(f'CREATE DATABASE "{name}"')
    return server.url.replace("/postgres?", f"/{name}?")


def everything(location: Location) -> tuple[object, ...]:
    with closing(ledgers.reader(location)) as store:
        bodies = list(store.entries())
        parts = [store.contributions(sequence) for sequence in range(len(bodies))]
        signatures = [store.signature(sequence) for sequence in range(len(bodies))]
        assert None not in signatures
        statements = list(store.statements())
        return bodies, parts, signatures, statements, store.newest_checkpoint(), store.head()


def test_a_backup_is_everything_and_a_run_goes_on_with_it(source: Location, tmp_path: Path) -> None:
    copy = tmp_path / "copy.ledger"
    position = backup.backup(source, copy)
    assert sorted(path.name for path in tmp_path.glob("copy*")) == ["copy.ledger"]
    assert position.committed == ROUNDS
    assert everything(copy) == everything(source)
    with closing(ledgers.reader(copy)) as store:
        assert list(store.statements()) == [Stated(2, 5, b"what two said")]
    found = verification.verify(copy, KEY.public)
    assert (found.contributions, found.signatures) == (2 * ROUNDS, position.next_sequence)
    with closing(SqliteStore(":memory:")) as uninterrupted:
        expected = take_rounds(uninterrupted, 1, ROUNDS + 3)
    with closing(SqliteStore(copy)) as store:
        assert take_rounds(store, ROUNDS + 1, ROUNDS + 3) == expected


@pytest.mark.postgres
def test_a_run_moves_into_a_database_and_goes_on(
    source: Location, tmp_path: Path, postgres: Server
) -> None:
    copy = tmp_path / "copy.ledger"
    backup.backup(source, copy)
    url = database(postgres, f"to_{tmp_path.name}")
    backup.restore(copy, url)
    assert everything(f"{url}#small") == everything(source)
    with closing(PostgresStore(url, "small")) as store:
        take_rounds(store, ROUNDS + 1, ROUNDS + 3)
        with pytest.raises(InUse):
            backup.restore(copy, url)
    with pytest.raises(LedgerError, match="holds 16 entries already"):
        backup.restore(copy, url)
    with pytest.raises(LedgerError, match="is of run 'small', not of 'other'; leave out #other"):
        backup.restore(copy, f"{url}#other")


@pytest.mark.postgres
def test_a_damaged_run_is_replaced_as_the_page_says(tmp_path: Path, postgres: Server) -> None:
    """Its epoch rises all the same: who led it before writes nothing."""
    page = (Path(__file__).parents[2] / "docs" / "operations.md").read_text(encoding="utf-8")
    (removal,) = re.findall(r"```sql\n(BEGIN.*?)```", page, re.DOTALL)
    url, copy = database(postgres, f"to_{tmp_path.name}"), tmp_path / "copy.ledger"
    with closing(PostgresStore(url, "small")) as store:
        take_rounds(store, 1, ROUNDS)
        backup.backup(f"{url}#small", copy)
        before = everything(copy)
    with psycopg.connect(url, autocommit=True) as connection:
        connection.execute("UPDATE lorand.entry SET body = 'x' WHERE sequence = 3")
        with pytest.raises(LedgerError, match="breaks at entry 3"):
            backup.restore(copy, url)
        connection.execute(removal.replace("sentiment", "small").encode())
    backup.restore(copy, url)
    assert everything(f"{url}#small") == before
    with closing(PostgresStore(url, "small")) as store:
        assert store.epoch == 4


def test_commands_say_what_was_copied(tmp_path: Path) -> None:
    path, copy, again = (tmp_path / name for name in ("a.ledger", "b.ledger", "c.ledger"))
    with closing(SqliteStore(path)) as store:
        take_rounds(store, 1, 2)
        head = store.head().hex()
    made = CliRunner().invoke(cli.app, ["ledger", "backup", str(path), str(copy), "--json"])
    assert json.loads(made.output) == {"entries": 5, "committed": 2, "head": head}
    text = CliRunner().invoke(cli.app, ["ledger", "restore", str(copy), str(again)]).output
    assert "restored: 5 entries, 2 rounds committed, all checked" in text
    assert everything(again) == everything(path)


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    path, copy = tmp_path / "a.ledger", tmp_path / "b.ledger"
    with closing(SqliteStore(path)) as store:
        take_rounds(store, 1, 2)
    copy.write_text("something else")
    for command in (backup.backup, backup.restore):
        with pytest.raises(LedgerError, match="is there already; choose another name"):
            command(path, copy)
    assert copy.read_text() == "something else"


def test_a_backup_that_fails_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.ledger"
    with closing(SqliteStore(path)) as store:
        take_rounds(store, 1, 2)
        store._database.execute("UPDATE contribution SET body = x'00' WHERE sequence = 3")
    with pytest.raises(LedgerError, match="contributions stored with entry 3 are not those"):
        backup.backup(path, tmp_path / "b.ledger")
    with pytest.raises(LedgerError, match=r"cannot write .*b\.ledger"):
        backup.backup(path, tmp_path / "nowhere" / "b.ledger")
    assert not list(tmp_path.glob("b.ledger*"))


def test_an_exported_ledger_is_no_backup(tmp_path: Path) -> None:
    path, exported = tmp_path / "a.ledger", tmp_path / "exported.bin"
    with closing(SqliteStore(path)) as store:
        take_rounds(store, 1, 2)
    ledger.write_file(exported, show.bodies(path))
    with pytest.raises(LedgerError, match="exported ledger, which has no contributions"):
        backup.backup(exported, tmp_path / "b.ledger")
