"""An identity folder whose members are in a database: several machines, one authority."""

import shutil
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from tests.postgres import Server
from tests.unit.identity.office import RUN, certified

from lorand.credentials import Credentials, Role, Subject
from lorand.errors import ConfigError, HandshakeError
from lorand_coordinator.identity.admission import Admission
from lorand_coordinator.identity.members import Peer
from lorand_coordinator.store import StoreUnavailable

pytestmark = pytest.mark.postgres


@pytest.fixture
def url(postgres: Server) -> Iterator[str]:
    """A database without any members."""
    yield postgres.url
    postgres.execute("DROP SCHEMA IF EXISTS lorand CASCADE")


def member(admission: Admission, path: Path, name: str) -> Peer:
    """Certify a worker and let it in."""
    made = certified(path, admission.authority, Subject(RUN, Role.WORKER, name))
    found = Peer.of(made.certificate)
    admission.members.admit(found)
    return found


def test_a_second_machine_needs_the_authority_alone(tmp_path: Path, url: str) -> None:
    one = Admission.create_or_open(tmp_path / "one", RUN, url)
    one.certify("127.0.0.1:7700", ["a.example", "b.example"])
    assert not (tmp_path / "one" / "members.db").exists()
    with pytest.raises(ConfigError, match=r"have an authority already: copy authority\.pem"):
        Admission.create_or_open(tmp_path / "two", RUN, url)
    shutil.copy(tmp_path / "one" / "authority.pem", tmp_path / "two")
    two = Admission.create_or_open(tmp_path / "two", RUN, url)
    two.certify("127.0.0.1:7700", ["a.example", "b.example"])
    two.passing_credentials()
    hotels = member(one, tmp_path / "hotels.pem", "hotels")
    two.members.check(hotels)
    two.members.revoke("hotels")
    assert one.members.changed()
    with pytest.raises(HandshakeError, match="was revoked"):
        one.members.check(hotels)
    for admission in (one, two):
        admission.close()


def test_each_machine_has_an_operator(
    tmp_path: Path, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[Admission] = []
    for host in ("a.example", "b.example"):
        monkeypatch.setattr("lorand_coordinator.identity.admission.gethostname", lambda h=host: h)
        folder = tmp_path / host
        folder.mkdir()
        if opened:
            shutil.copy(opened[0].folder / "authority.pem", folder)
        opened.append(Admission.create_or_open(folder, RUN, url))
        opened[-1].certify("127.0.0.1:7700", [])
    assert [each.name for each in opened[0].members.listed()] == [
        "operator-a.example",
        "operator-b.example",
    ]
    for admission in opened:
        shown = Credentials.read(admission.folder / "operator.pem")
        opened[0].members.check(Peer.of(shown.certificate))
        admission.close()


def test_members_enrol_where_it_is_led(tmp_path: Path, url: str) -> None:
    with closing(Admission.create_or_open(tmp_path / "one", RUN, url)) as admission:
        admission.certify("0.0.0.0:7700", ["a.example", "b.example"])
    for host, expected in (
        ("b.example", "b.example"),
        ("10.0.0.1", "a.example"),
        ("", "a.example"),
    ):
        with closing(Admission.open(tmp_path / "one", RUN, url)) as opened:
            admission = Admission(opened.folder, opened.authority, opened.members, host=host)
            admission.note_served(7700, 7701)
            assert opened.invite("hotels", Role.WORKER, 1.0).address == f"{expected}:7701"


def test_members_of_the_folder_move_into_the_database_once(tmp_path: Path, url: str) -> None:
    with closing(Admission.create_or_open(tmp_path / "one", RUN)) as before:
        before.certify("127.0.0.1:7700", [])
        hotels = member(before, tmp_path / "hotels.pem", "hotels")
        before.members.invite("gadgets", Role.EVALUATOR, 1.0)
    with closing(Admission.create_or_open(tmp_path / "one", RUN, url)) as shared:
        shared.members.check(hotels)
        shared.certify("127.0.0.1:7700", [])
        shown = Credentials.read(tmp_path / "one" / "operator.pem")
        shared.members.check(Peer.of(shown.certificate))
        states = {each.name: each.state for each in shared.members.listed()}
        assert states == {"operator": "member", "hotels": "member", "gadgets": "invited"}
        shared.members.revoke("hotels")
    again = Admission.create_or_open(tmp_path / "one", RUN, url)
    with pytest.raises(HandshakeError, match="was revoked"):
        again.members.check(hotels)
    again.close()


def test_another_authority_is_told_of(tmp_path: Path, url: str) -> None:
    Admission.create_or_open(tmp_path / "one", RUN, url).close()
    Admission.create_or_open(tmp_path / "two", RUN).close()
    with pytest.raises(ConfigError, match="have another authority than this identity folder"):
        Admission.create_or_open(tmp_path / "two", RUN, url)


def test_members_are_let_in_while_the_database_is_away(
    tmp_path: Path, url: str, postgres: Server
) -> None:
    with closing(Admission.create_or_open(tmp_path / "one", RUN, url)) as admission:
        hotels = member(admission, tmp_path / "hotels.pem", "hotels")
        admission.members.check(hotels)
        stranger = certified(
            tmp_path / "s.pem", admission.authority, Subject(RUN, Role.WORKER, "stranger")
        )
        postgres.control("stop")
        try:
            admission.members.check(hotels)
            with pytest.raises(StoreUnavailable):
                admission.members.check(Peer.of(stranger.certificate))
            with pytest.raises(StoreUnavailable):
                admission.members.revoke("hotels")
        finally:
            postgres.control("start")
