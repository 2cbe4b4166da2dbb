"""Names in certificates, invitations and addresses: what is written is what is read."""

from datetime import timedelta
from pathlib import Path

import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st
from tests.run_text import text_of
from typer.testing import CliRunner

from lorand import credentials, transport
from lorand.credentials import Role, Subject
from lorand.errors import ConfigError, HandshakeError
from lorand.invitation import Invitation
from lorand_coordinator import cli as coordinator
from lorand_coordinator.identity.authority import Authority

NAMES = st.text("aZ09 /%#?&+.:~-_'\"<>üß漢🦄", min_size=1, max_size=64)


@given(NAMES, st.sampled_from(Role), NAMES)
def test_a_subject_is_read_as_it_was_written(run: str, role: Role, name: str) -> None:
    subject = Subject(run, role, name)
    assert subject.uri().isascii()
    assert Subject.parse(subject.uri()) == subject


@pytest.mark.parametrize(
    "uri",
    [
        "",
        "lorand://run/worker",
        "lorand://run/worker/",
        "lorand://run/worker/a/b",
        "lorand://run/king/a",
        "lorand://run/worker/%61",
        "lorand://run/worker/a%2",
        "LORAND://run/worker/a",
        "spiffe://run/worker/a",
        "run/worker/a",
    ],
)
def test_a_subject_has_one_spelling(uri: str) -> None:
    with pytest.raises(HandshakeError, match="no member's"):
        Subject.parse(uri)


@given(NAMES, st.integers(0, 65535), st.sampled_from(["localhost", "10.0.0.1", "::1", "a.example"]))
def test_an_invitation_is_read_as_it_was_written(name: str, port: int, host: str) -> None:
    made = Invitation(transport.join(host, port), name, "t-_" + "T" * 40, "0a" * 32)
    line = made.line()
    assert not set(line) & set(" \n'\"\\$&;|<>*?(){}!`")
    assert Invitation.parse(f" {line}\n") == made


@given(st.text(max_size=300) | st.text("lorand:/0a.1", max_size=200))
def test_what_is_no_invitation_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="no invitation"):
        Invitation.parse(text)


@given(st.integers(1, 140))
def test_a_line_that_was_cut_is_refused(cut: int) -> None:
    line = Invitation("localhost:7701", "hotels", "t" * 43, "0" * 64).line()
    with pytest.raises(ConfigError, match="no invitation"):
        Invitation.parse(line[:-cut])


@pytest.mark.parametrize(
    ("host", "stays"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("10.0.0.1", False),
        ("localhost.example", False),
        ("127.0.0.1.example", False),
        ("127.1", False),
        ("", False),
    ],
)
def test_what_stays_on_this_machine(host: str, stays: bool) -> None:
    assert transport.is_loopback(host) is stays


@pytest.mark.parametrize(
    "address", ["", "host", ":1", "host:", "::1:80", "[host]:1", "h:70000", "h:-1", "h:²", "a:b:1"]
)
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(ConfigError, match=r"HOST:PORT|at most 65535"):
        transport.split(address)


def test_without_certificates_nothing_leaves_this_machine(tmp_path: Path) -> None:
    for address in ("10.0.0.1:7700", "coordinator.example:7700", "0.0.0.0:7700"):
        with pytest.raises(ConfigError, match="is not this machine"):
            credentials.channel(address, None)
    credentials.channel("127.0.0.1:7700", None).close()
    run = tmp_path / "run.toml"
    run.write_text(text_of(), encoding="utf-8")
    arguments = ["serve", str(run), "--insecure", "--address", "0.0.0.0:7700"]
    result = CliRunner().invoke(coordinator.app, arguments)
    assert isinstance(result.exception, ConfigError)
    assert "--insecure serves this machine alone" in str(result.exception)


def test_which_credentials_are_shown(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is no member at h:1"):
        credentials.find("h:1", None, insecure=False, state=tmp_path)
    with pytest.raises(ConfigError, match="cannot read the credentials"):
        credentials.find("h:1", tmp_path / "none.pem", insecure=False)
    with pytest.raises(ConfigError, match="leave one of the two flags away"):
        credentials.find("h:1", tmp_path / "none.pem", insecure=True)
    assert credentials.find("h:1", None, insecure=True) is None
    authority = Authority.create(tmp_path / "authority.pem", "small")
    key = credentials.new_key()
    made = authority.issue(Subject("small", Role.WORKER, "a"), key.public_key())
    path = credentials.default_path("h:1", tmp_path)
    path.parent.mkdir()
    credentials.Credentials.write(path, key, made, authority.certificate)
    found = credentials.find("h:1", None, insecure=False, state=tmp_path)
    assert found is not None
    assert (found.subject.name, found.certificate) == ("a", made)
    other = credentials.key_pem(credentials.new_key())
    path.write_bytes(other + credentials.pem(made) + credentials.pem(authority.certificate))
    with pytest.raises(ConfigError, match="the key is another certificate's"):
        credentials.find("h:1", None, insecure=False, state=tmp_path)


def test_a_certificate_says_what_it_is_for(tmp_path: Path) -> None:
    """Chains that strict verifiers take too: the library's own, as a client and as a server."""
    authority = Authority.create(tmp_path / "authority.pem", "small")
    key = credentials.new_key().public_key()
    store = x509.verification.Store([authority.certificate])
    builder = x509.verification.PolicyBuilder().store(store)
    server = authority.issue_server(["coordinator.example"], key)
    builder.build_server_verifier(x509.DNSName("coordinator.example")).verify(server, [])
    member = authority.issue(Subject("small", Role.WORKER, "a"), key)
    builder.build_client_verifier().verify(member, [])
    with pytest.raises(x509.verification.VerificationError):
        builder.build_client_verifier().verify(server, [])
    assert member.not_valid_after_utc - member.not_valid_before_utc < timedelta(days=98)
