"""Calls through a coordinator that stands by: whose they are, and who may say so."""

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
from tests.runs import IDENTITY, hello
from tests.unit.identity.office import LIMIT_S, RUN, Office, certified, get_run, standing_by
from tests.unit.identity.test_refusals import ANSWERED, Code, code_of, outcomes, silent_after

from lorand import credentials, ledger, transport
from lorand.credentials import Credentials, Role, Subject, key_pem, new_key, pem
from lorand.errors import ConfigError, HandshakeError
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import ledger_pb2_grpc as ledger_service
from lorand_coordinator import limits
from lorand_coordinator.identity import authority as authorities
from lorand_coordinator.identity.admission import Admission
from lorand_coordinator.identity.authority import Authority, read_pair
from lorand_coordinator.identity.callers import CALLER, coordinator_uri
from lorand_coordinator.identity.members import Peer
from lorand_coordinator.relay import connecting
from lorand_worker import enrolment, link

Said = tuple[tuple[str, str | bytes], ...]


def names(mine: Credentials) -> Said:
    """The metadata with which a coordinator would name this member."""
    return ((CALLER, pem(mine.certificate)),)


def post(channel: grpc.Channel, office: Office, said: Said) -> None:
    """Post an evaluation, which evaluators alone may."""
    run = ledger.origin(office.hub.config, IDENTITY).run_digest
    request = pb.PostEvaluationRequest(evaluation=pb.Evaluation(accuracy=0.5), run_digest=run)
    ledger_service.LedgerServiceStub(channel).PostEvaluation(
        request, timeout=LIMIT_S, metadata=said
    )


@contextmanager
def as_coordinator(
    office: Office, *, admitted: bool = True, authority: Authority | None = None
) -> Iterator[grpc.Channel]:
    """A connection with a certificate for passing calls on, of the run's authority or another."""
    key = new_key()
    certificate = (authority or office.authority).issue_coordinator(key.public_key())
    if admitted:
        office.admission.members.admit_coordinator(certificate)
    trusts = pem(office.authority.certificate)
    shown = grpc.ssl_channel_credentials(trusts, key_pem(key), pem(certificate))
    with grpc.secure_channel(office.address, shown, transport.channel_options()) as channel:
        yield channel


# -- members through a coordinator -----------------------------------------------------------------


@pytest.mark.parametrize("role", Role)
def test_each_role_may_call_the_same_as_at_the_leader(
    role: Role, office: Office, front: str, tmp_path: Path
) -> None:
    mine = office.member(tmp_path, f"{role}-there", role)
    with credentials.channel(office.address, mine) as channel:
        there = outcomes(channel)
    with credentials.channel(front, mine) as channel:
        here = outcomes(channel)
    for name in ("GetAuthority", "Enrol"):  # of the leader's other port alone
        assert there.pop(name) == Code.PERMISSION_DENIED
        assert here.pop(name) == Code.UNIMPLEMENTED
    assert here == there
    assert {n for n, code in here.items() if code != Code.PERMISSION_DENIED} == (
        ANSWERED[role] | {"Check", "Renew"}
    )


def test_a_call_is_its_callers(office: Office, front: str, tmp_path: Path) -> None:
    """By the name in its certificate, which is looked up at the leader too."""
    mine = office.member(tmp_path, "held-out", Role.EVALUATOR)
    with credentials.channel(front, mine) as channel:
        post(channel, office, ())
    assert office.hub.sequencer.tally.evaluations[-1].evaluator == "held-out"
    greeting = hello(ledger.origin(office.hub.config, IDENTITY), "gadgets")
    with credentials.channel(front, office.member(tmp_path, "hotels")) as channel:
        stub = coordination.CoordinationServiceStub(channel)
        call = stub.Participate(iter([wire.ParticipateRequest(hello=greeting)]), timeout=LIMIT_S)
        assert "not the name in the certificate, 'hotels'" in next(call).refusal.reason


def test_a_certificate_is_renewed_through_it(office: Office, front: str, tmp_path: Path) -> None:
    mine = office.member(tmp_path, "renewing")
    renewed = enrolment.renew(front, mine)
    assert renewed.certificate.serial_number != mine.certificate.serial_number
    with credentials.channel(office.address, renewed) as channel:
        assert RUN in get_run(channel).config


def test_open_calls_are_counted_for_each_caller(office: Office, front: str, tmp_path: Path) -> None:
    """Those by itself and those passed on together, and nobody else's."""
    mine, other = office.member(tmp_path, "busy"), office.member(tmp_path, "idle")
    request, half = pb.ReadEntriesRequest(follow=True), limits.CALLS_AT_ONCE // 2
    with ExitStack() as stack:
        opened = []
        for address, count in ((front, half), (office.address, limits.CALLS_AT_ONCE - half)):
            channel = stack.enter_context(credentials.channel(address, mine))
            following = ledger_service.LedgerServiceStub(channel).ReadEntries
            opened += [following(request, timeout=LIMIT_S) for _ in range(count)]
        for call in opened:
            assert next(call).entries
        channel = stack.enter_context(credentials.channel(front, mine))
        with pytest.raises(grpc.RpcError) as caught:
            get_run(channel)
        error: Any = caught.value
        assert error.code() == Code.RESOURCE_EXHAUSTED
        assert error.details() == f"{limits.CALLS_AT_ONCE} calls are open: come back later"
        assert link._comes_back(error)
        channel = stack.enter_context(credentials.channel(front, other))
        assert RUN in get_run(channel).config
        for call in opened:
            call.cancel()


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_streams_end_with_a_membership(
    how: str, office: Office, front: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 s. Expired is a member by the leader's clock alone, so that the leader ends it."""
    name, stays = f"passed-{how}", threading.Event()
    mine = office.member(tmp_path, name)
    greeting = hello(ledger.origin(office.hub.config, IDENTITY), name)
    with credentials.channel(front, mine) as channel:
        stub = coordination.CoordinationServiceStub(channel)
        opening = wire.ParticipateRequest(hello=greeting)
        part = stub.Participate(silent_after(opening, stays), timeout=LIMIT_S)
        assert next(part).HasField("welcome")
        began = time.monotonic()
        if how == "revoked":
            office.admission.members.revoke(name)
        else:
            later = time.time() + authorities.MEMBER_LIFE.total_seconds()
            monkeypatch.setattr(office.served.members, "clock", lambda: later)
        with pytest.raises(grpc.RpcError, match=how) as caught:
            list(part)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() == Code.PERMISSION_DENIED
        assert time.monotonic() - began < 5.0
        stays.set()


# -- who may pass calls on -------------------------------------------------------------------------


def test_a_member_who_names_another_is_itself(office: Office, front: str, tmp_path: Path) -> None:
    """At the leader, and at a coordinator that stands by, which does not pass it on."""
    said = names(office.member(tmp_path, "its-name-is-used", Role.EVALUATOR))
    before = len(office.hub.sequencer.tally.evaluations)
    with_it = office.member(tmp_path, "pretender", Role.OPERATOR)
    for address in (office.address, front):
        with credentials.channel(address, with_it) as channel:
            with pytest.raises(grpc.RpcError, match="'pretender' is a member as operator"):
                post(channel, office, said)
            assert RUN in get_run(channel).config
    assert len(office.hub.sequencer.tally.evaluations) == before


def test_a_coordinator_is_believed(office: Office, tmp_path: Path) -> None:
    """Else the refusals below would prove nothing."""
    said = names(office.member(tmp_path, "named", Role.EVALUATOR))
    with as_coordinator(office) as channel:
        post(channel, office, said)


@pytest.mark.parametrize("said", [None, b"", b"-----BEGIN CERTIFICATE-----\n", b"\xff" * 500])
def test_a_coordinator_that_names_nobody_may_call_nothing(
    said: bytes | None, office: Office
) -> None:
    with as_coordinator(office) as channel:
        named: Said = () if said is None else ((CALLER, said),)
        assert code_of(lambda: post(channel, office, named)) == Code.UNAUTHENTICATED
        if said is None:
            found = outcomes(channel)
            assert {n for n, c in found.items() if c != Code.UNAUTHENTICATED} == set()


def test_whom_a_coordinator_names_is_looked_up(office: Office, tmp_path: Path) -> None:
    revoked = office.member(tmp_path, "gone", Role.EVALUATOR)
    office.admission.members.revoke("gone")
    unknown = certified(
        tmp_path / "unknown.pem", office.authority, Subject(RUN, Role.EVALUATOR, "unknown")
    )
    elsewhere = certified(
        tmp_path / "large.pem", office.authority, Subject("large", Role.EVALUATOR, "named")
    )
    worker = office.member(tmp_path, "no-evaluator")
    with as_coordinator(office) as channel:
        for member, code in (
            (revoked, Code.PERMISSION_DENIED),
            (unknown, Code.PERMISSION_DENIED),
            (elsewhere, Code.UNAUTHENTICATED),
            (worker, Code.PERMISSION_DENIED),
        ):
            named = names(member)
            assert code_of(lambda said=named: post(channel, office, said)) == code  # type: ignore[misc]


def test_forged_certificates_pass_nothing_on(
    office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of another authority, of a copy of the run's, and expired."""
    said = names(office.member(tmp_path, "wanted", Role.EVALUATOR))
    before = len(office.hub.sequencer.tally.evaluations)
    other = Authority.create(tmp_path / "authority.pem", RUN)
    with as_coordinator(office, authority=other) as channel:
        assert code_of(lambda: post(channel, office, said)) == Code.UNAVAILABLE
    with (
        as_coordinator(office, admitted=False) as channel,
        pytest.raises(grpc.RpcError, match="not, or no longer, a coordinator's") as caught,
    ):
        post(channel, office, said)
    assert isinstance(caught.value, grpc.Call)
    assert caught.value.code() == Code.UNAVAILABLE, "the member did nothing wrong"
    past = authorities.now() - timedelta(days=366)
    monkeypatch.setattr(authorities, "now", lambda: past)
    with as_coordinator(office) as channel:
        assert code_of(lambda: post(channel, office, said)) == Code.UNAVAILABLE
    assert len(office.hub.sequencer.tally.evaluations) == before


def test_no_member_gets_a_coordinators_certificate(office: Office) -> None:
    """Its name is none that a member can have, whatever it is invited as."""
    with pytest.raises(HandshakeError, match="no member's"):
        Subject.parse(coordinator_uri(RUN))
    for name in (coordinator_uri(RUN), "coordinator"):
        uri = Subject(RUN, Role.WORKER, name).uri()
        assert uri.startswith(f"lorand://{RUN}/worker/")


def test_a_rotation_ends_what_the_certificate_before_passes_on(
    office: Office, front: str, tmp_path: Path
) -> None:
    """And a coordinator that stands by goes on with another one that it makes."""
    mine = office.member(tmp_path, "through-rotation")
    path = office.admission.folder / "coordinator.pem"
    with credentials.channel(front, mine) as channel, as_coordinator(office) as before:
        assert RUN in get_run(channel).config
        serial = read_pair(path)[1].serial_number
        following = ledger_service.LedgerServiceStub(before).ReadEntries
        call = following(pb.ReadEntriesRequest(follow=True), timeout=LIMIT_S, metadata=names(mine))
        assert next(call).entries
        office.admission.rotate([])
        assert code_of(lambda: list(call)) == Code.UNAVAILABLE
        error = code_of(lambda: get_run(channel))
        assert error == Code.UNAVAILABLE, "by the connection there was"
        assert RUN in get_run(channel).config
    assert read_pair(path)[1].serial_number != serial


def test_a_leader_with_another_identity_folder_is_no_reason_to_leave(
    office: Office, tmp_path: Path
) -> None:
    """What TLS says of the leader is not what it says of the coordinator that a member calls."""
    other = Admission.create_or_open(tmp_path / "other.identity", RUN)
    other.certify("127.0.0.1:0", [])
    authority = other.authority
    mine = certified(tmp_path / "m.pem", authority, Subject(RUN, Role.WORKER, "of-the-other"))
    other.members.admit(Peer.of(mine.certificate))
    with standing_by(office, other) as front, credentials.channel(front, mine) as channel:
        with pytest.raises(grpc.RpcError) as caught:
            get_run(channel)
        assert "not certified by this run's authority (see --identity-dir)" in link._explain(
            front, caught.value
        )


def test_a_call_is_passed_on_once(office: Office, front: str, tmp_path: Path) -> None:
    """By a coordinator that believes another to lead, which stands by, too."""
    mine = office.member(tmp_path, "twice")
    with standing_by(office, leader=front) as first, credentials.channel(first, mine) as channel:
        with pytest.raises(grpc.RpcError, match="stands by: another leads") as caught:
            get_run(channel)
        assert isinstance(caught.value, grpc.Call)
        assert caught.value.code() == Code.UNAVAILABLE


def test_nothing_is_passed_on_unencrypted() -> None:
    with pytest.raises(ConfigError, match="not this machine"):
        connecting(None)("coordinator.example:7700")
