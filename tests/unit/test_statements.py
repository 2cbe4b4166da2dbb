"""Statements as a coordinator takes them, and as an auditor reads them."""

import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from tests.unit.signed_histories import KEY, rewritten
from tests.unit.stated_runs import KEYS, NAMES, ROSTER, Run, after_three_rounds
from typer.testing import CliRunner

from lorand import ledger, statements
from lorand.errors import HandshakeError, LedgerError
from lorand.privacy.roster import Members
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import cli, show, stating
from lorand_coordinator.stating import Standing, Unstated
from lorand_coordinator.verification import verify


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Run]:
    """A run after three rounds of all, of which nothing is stated."""
    run = after_three_rounds(tmp_path)
    with closing(run.store):
        yield run


def made(run: Run, **changes: Any) -> pb.Statement:
    """Worker 1's statement, with changes that its owner signs too."""
    one = run.workers[0].statements
    one.state()
    assert one.next is not None
    statement = pb.Statement.FromString(one.next.SerializeToString())
    for name, value in changes.items():
        setattr(statement, name, value)
    return statements.sign(KEYS["a"], run.position.run_digest, statement)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"last": 99}, "ends with entry 99"),
        ({"last": 2**64 - 1}, "ends with entry"),
        ({"last": 5}, "ends with entry 5"),
        ({"head": bytes(32)}, "ends with entry 6"),
        ({"first": 7}, "entries 7 to 6 is of none"),
    ],
)
def test_statements_of_other_histories_are_refused(
    run: Run, changes: dict[str, Any], why: str
) -> None:
    with pytest.raises(HandshakeError, match=why):
        stating.take(made(run, **changes), run.store, run.position)
    assert list(run.store.statements()) == []


@pytest.mark.parametrize("name", ["head", "contributions", "key", "signature"])
def test_broken_statements_are_refused(run: Run, name: str) -> None:
    for value in (b"", bytes(31), bytes(33)):
        statement = made(run)
        setattr(statement, name, value)
        with pytest.raises(HandshakeError, match="install the same release"):
            stating.take(statement, run.store, run.position)
    statement = made(run)
    broken = bytearray(getattr(statement, name))
    broken[0] ^= 1
    setattr(statement, name, bytes(broken))
    with pytest.raises(HandshakeError, match="not signed by the key"):
        stating.take(statement, run.store, run.position)
    of_another_run = statements.sign(KEYS["a"], bytes(32), made(run))
    with pytest.raises(HandshakeError, match="not signed by the key that it names, for this run"):
        stating.take(of_another_run, run.store, run.position)


def test_nothing_is_stated_twice(run: Run) -> None:
    """The same statement again is no other; another one of the same entries is refused."""
    statement = made(run)
    for _ in range(2):
        stating.take(statement, run.store, run.position)
    with pytest.raises(HandshakeError, match=r"up to entry 6 already.*begins with 5"):
        stating.take(made(run, first=5, contributions=bytes(32)), run.store, run.position)
    assert [stated.body for stated in run.store.statements()] == [statement.SerializeToString()]


def test_what_a_newer_release_adds_is_not_kept(run: Run) -> None:
    whole = made(run)
    longer = pb.Statement.FromString(whole.SerializeToString() + b"\x7a\x04more")
    stating.take(longer, run.store, run.position)
    assert [stated.body for stated in run.store.statements()] == [whole.SerializeToString()]


# ------------------------------------------------------------- what an auditor is told


def test_everything_that_is_stated(run: Run) -> None:
    for worker in run.workers:
        worker.state()
    found = verify(run.path, KEY.public, roster=ROSTER)
    assert found.standing == Standing(statements=3, stated=9, unstated=())
    assert found.contributions == 9
    assert verify(run.path).standing is None


def test_what_is_not_stated_is_told_by_rounds(run: Run) -> None:
    """Before the first statement, between two, and of whom the roster does not have."""
    for number in (1, 2):
        run.workers[number - 1].state()
    run.end_round(4, {2: run.workers[1].answer(4, 4), 3: run.workers[2].answer(4, 4)})
    known = Members.of({name: KEYS[name].public for name in ("a", "b")})
    found = verify(run.path, roster=known).standing
    assert found == Standing(2, 6, (Unstated(3, "c", 4, 1, 4), Unstated(2, "b", 1, 4, 4)))


def test_the_command_says_it_to_people_and_scripts(run: Run) -> None:
    run.workers[0].state()
    roster = run.folder / "roster.json"
    roster.write_text(ROSTER.to_json(), encoding="utf-8")
    verify_it = ["ledger", "verify", str(run.path)]
    told = CliRunner().invoke(cli.app, [*verify_it, "--roster", str(roster)]).output
    assert "3 of 9 contributions are stated by their workers, in 1 statement\n" in told
    assert "not stated: 3 of worker 2 ('b'), rounds 1 to 3" in told
    lines = CliRunner().invoke(cli.app, [*verify_it, "--roster", str(roster), "--json"]).output
    assert json.loads(lines)["not_stated"][1] == {
        "worker": 3,
        "name": "c",
        "contributions": 3,
        "first_round": 1,
        "last_round": 3,
    }
    assert "stated" not in CliRunner().invoke(cli.app, verify_it).output
    file = run.folder / "exported.bin"
    show.export(run.path, file)
    told = CliRunner().invoke(cli.app, [*verify_it[:2], str(file), "--roster", str(roster)]).output
    assert "this is the history of 1 statement by workers" in told


def test_a_ledger_from_before_there_were_statements(run: Run) -> None:
    run.store._database.execute("DROP TABLE statement")
    found = verify(run.path, roster=ROSTER).standing
    assert found is not None
    assert found.unstated == tuple(Unstated(w, name, 3, 1, 3) for w, name in enumerate(NAMES, 1))


def test_another_key_than_the_rosters_is_found(run: Run) -> None:
    """A coordinator may sign with keys of its own: they are nobody's."""
    own = statements.sign(KEYS["b"], run.position.run_digest, made(run))
    stating.take(own, run.store, run.position)
    theirs, known = KEYS["b"].public.hex(), KEYS["a"].public.hex()
    why = rf"worker 1 \('a'\) for rounds 1 to 3 .* by {theirs}, and the roster has {known}"
    with pytest.raises(LedgerError, match=why):
        verify(run.path, roster=ROSTER)


def test_statements_that_were_tampered_with_are_found(run: Run) -> None:
    for worker in run.workers:
        worker.state()
    statement = pb.Statement.FromString(next(run.store.statements()).body)
    statement.first -= 1
    replace = run.store._database.execute
    replace("UPDATE statement SET body = ? WHERE worker = 1", [statement.SerializeToString()])
    with pytest.raises(LedgerError, match=r"worker 1 \('a'\) for rounds .* is not signed by"):
        verify(run.path, roster=ROSTER)
    replace("UPDATE statement SET body = 'x' WHERE worker = 1")
    with pytest.raises(LedgerError, match="cannot be read"):
        verify(run.path, roster=ROSTER)
    whole = next(stated.body for stated in run.store.statements() if stated.worker == 2)
    replace("UPDATE statement SET body = ? WHERE worker = 1", [whole])
    with pytest.raises(LedgerError, match="two statements of worker 2"):
        verify(run.path, roster=ROSTER)


def test_an_exported_ledger_has_statements_of_its_history(run: Run) -> None:
    """It has no contributions to be compared; that it is the history that was signed is told."""
    for worker in run.workers:
        worker.state()
    file, again = run.folder / "exported.bin", run.folder / "again.bin"
    show.export(run.path, file)
    show.export(file, again)
    assert file.read_bytes() == again.read_bytes()
    assert verify(file, KEY.public, roster=ROSTER).standing == Standing(3, 0, ())

    def otherwise(entry: pb.Entry, parts: list[bytes]) -> list[bytes]:
        return parts[::-1]

    forged = rewritten(run.path, run.folder / "forged.ledger", KEY, otherwise)
    show.export(forged, file)
    assert verify(file, KEY.public).standing is None
    with pytest.raises(LedgerError, match=r"worker 1 \('a'\) signed another history up to entry 6"):
        verify(file, roster=ROSTER)


def test_a_shorter_ledger_than_was_signed_is_found(run: Run) -> None:
    for worker in run.workers:
        worker.state()
    bodies, stated = run.bodies[:5], [stated.body for stated in run.store.statements()]
    file = run.folder / "short.bin"
    ledger.write_file(file, bodies, None, stated)
    with pytest.raises(LedgerError, match=r"worker 1 \('a'\) signed a history .* up to 6"):
        verify(file, roster=ROSTER)


def test_a_file_with_statements_that_is_cut_off_anywhere_is_refused(run: Run) -> None:
    run.workers[0].state()
    file = run.folder / "exported.bin"
    for signature in (None, run.store.signature(len(run.store) - 1)):
        stated = [stated.body for stated in run.store.statements()]
        ledger.write_file(file, run.bodies, signature, stated)
        assert ledger.file_signature(file) == signature
        assert list(ledger.file_statements(file)) == stated
        assert list(ledger.read_file(file)) == run.bodies
        whole = file.read_bytes()
        for content in (*(whole[:n] for n in range(17, len(whole), 3)), whole[:-1], whole + b"x"):
            file.write_bytes(content)
            with pytest.raises(LedgerError, match="is cut off"):
                list(ledger.read_file(file))
