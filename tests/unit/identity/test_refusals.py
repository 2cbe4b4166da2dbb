"""Who is not let in: every way to call without being a member with the right role."""

import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Final

import grpc
import pytest
from google.protobuf.descriptor import MethodDescriptor
from grpc_health.v1 import health_pb2
from tests.runs import IDENTITY, config_of, hello
from tests.unit.identity.office import LIMIT_S, RUN, Office, certified, get_run, opened

from lorand import credentials, ledger, statements, transport
from lorand.credentials import Credentials, Role, Subject, key_pem, pem
from lorand.privacy.primitives import IdentityKey
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import coordination_pb2_grpc as coordination
from lorand.v1 import enrolment_pb2 as enrol
from lorand.v1 import enrolment_pb2_grpc as enrolment_service
from lorand.v1 import ledger_pb2 as pb
from lorand.v1 import ledger_pb2_grpc as ledger_service
from lorand.v1 import status_pb2 as status
from lorand_coordinator.identity import authority as authorities
from lorand_coordinator.identity.authority import Authority, read_pair
from lorand_coordinator.identity.members import Peer

Code = grpc.StatusCode
HOTELS: Final = Subject(RUN, Role.WORKER, "hotels")

Shown = tuple[grpc.ChannelCredentials | None, set[Code]]
Stranger = Callable[[Office, Path, pytest.MonkeyPatch], Shown]


def shown(office: Office, mine: Credentials) -> grpc.ChannelCredentials:
    """Credentials that trust the coordinator, whoever certified them."""
    return grpc.ssl_channel_credentials(
        pem(office.authority.certificate), key_pem(mine.key), pem(mine.certificate)
    )


def no_certificate(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    return grpc.ssl_channel_credentials(pem(office.authority.certificate)), {Code.UNAVAILABLE}


def plaintext(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    return None, {Code.UNAVAILABLE}


def another_coordinators(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    """Same run, same name, another authority: also what a self-made authority would be."""
    other = Authority.create(folder / "authority.pem", RUN)
    return shown(office, certified(folder / "m.pem", other, HOTELS)), {Code.UNAVAILABLE}


def self_signed(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    own = Authority.create(folder / "authority.pem", RUN)
    key, certificate = read_pair(folder / "authority.pem")
    made = Credentials(folder / "m.pem", key, certificate, own.certificate, HOTELS)
    return shown(office, made), {Code.UNAVAILABLE}


def expired(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    past = authorities.now() - timedelta(days=91)
    patch.setattr(authorities, "now", lambda: past)
    return shown(office, office.member(folder, "late")), {Code.UNAVAILABLE}


def not_yet_good(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    future = authorities.now() + timedelta(days=8)
    patch.setattr(authorities, "now", lambda: future)
    return shown(office, office.member(folder, "early")), {Code.UNAVAILABLE}


def the_coordinators_own(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    key, certificate = read_pair(office.admission.folder / "server.pem")
    issuer = office.authority.certificate
    made = Credentials(folder / "m.pem", key, certificate, issuer, HOTELS)
    return shown(office, made), {Code.UNAVAILABLE}


def revoked(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    made = office.member(folder, "revoked")
    office.admission.members.revoke("revoked")
    return shown(office, made), {Code.PERMISSION_DENIED}


def another_runs(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    """The authority should never make one: an identity folder is one run's."""
    made = certified(folder / "m.pem", office.authority, Subject("large", Role.WORKER, "hotels"))
    office.admission.members.admit(Peer.of(made.certificate))
    return shown(office, made), {Code.UNAUTHENTICATED}


def unknown(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    """Certified, but by a copy of the authority: no invitation was spent for it."""
    made = certified(folder / "m.pem", office.authority, Subject(RUN, Role.WORKER, "unknown"))
    return shown(office, made), {Code.PERMISSION_DENIED}


def of_another_role(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    office.member(folder, "promoted")
    made = certified(folder / "m.pem", office.authority, Subject(RUN, Role.OPERATOR, "promoted"))
    return shown(office, made), {Code.PERMISSION_DENIED}


def replaced(office: Office, folder: Path, patch: pytest.MonkeyPatch) -> Shown:
    """Renewed twice: the newest and the one it was asked with are good, older ones are not."""
    oldest = office.member(folder, "renewed")
    before = Peer.of(oldest.certificate)
    for place in ("second.pem", "third.pem"):
        made = certified(folder / place, office.authority, before.subject)
        office.admission.members.renew(before, made.certificate)
        before = Peer.of(made.certificate)
    return shown(office, oldest), {Code.PERMISSION_DENIED}


STRANGERS: Final[list[Stranger]] = [
    *(no_certificate, plaintext, another_coordinators, self_signed, expired, not_yet_good),
    *(the_coordinators_own, revoked, another_runs, unknown, of_another_role, replaced),
]


@pytest.mark.parametrize("stranger", STRANGERS)
def test_strangers(
    stranger: Stranger, office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine, codes = stranger(office, tmp_path, monkeypatch)
    if mine is None:
        channel = grpc.insecure_channel(office.address, transport.channel_options())
    else:
        channel = grpc.secure_channel(office.address, mine, transport.channel_options())
    with channel:
        assert code_of(lambda: get_run(channel)) in codes


def test_a_member_is_let_in(office: Office, tmp_path: Path) -> None:
    """Else the refusals above would prove nothing."""
    with credentials.channel(office.address, office.member(tmp_path, "welcome")) as channel:
        assert RUN in get_run(channel).config


def code_of(call: Callable[[], object]) -> Code:
    """The status that a call fails with."""
    with pytest.raises(grpc.RpcError) as caught:
        call()
    assert isinstance(caught.value, grpc.Call)
    code = caught.value.code()
    assert isinstance(code, Code)
    return code


# -- roles -----------------------------------------------------------------------------------------


def outcomes(channel: grpc.Channel) -> dict[str, Code]:
    """Call every method there is, with an empty request; return what each ends with, by name."""
    found = {}
    for module in (wire, enrol, pb, status, health_pb2):
        for served in module.DESCRIPTOR.services_by_name.values():
            for method in served.methods:
                found[method.name] = outcome(channel, f"/{served.full_name}/{method.name}", method)
    return found


def outcome(channel: grpc.Channel, path: str, method: MethodDescriptor) -> Code:
    """Call a method with bytes, of which none are an empty message."""
    sends = "stream" if method.client_streaming else "unary"
    gets = "stream" if method.server_streaming else "unary"
    call = getattr(channel, f"{sends}_{gets}")(path)
    try:
        answer = call(iter([b""]) if method.client_streaming else b"", timeout=LIMIT_S)
        if method.server_streaming:
            next(answer)
            answer.cancel()
    except grpc.RpcError as error:
        return error.code() if isinstance(error, grpc.Call) else Code.UNKNOWN
    return Code.OK


ANSWERED: Final = {
    Role.WORKER: {
        "GetRun",
        "Participate",
        "ReadEntries",
        "GetCheckpoint",
        "GetHead",
        "PostStatement",
        "GetStatus",
    },
    Role.EVALUATOR: {
        "GetRun",
        "ReadEntries",
        "GetCheckpoint",
        "GetHead",
        "PostEvaluation",
        "GetStatus",
    },
    Role.OBSERVER: {"GetRun", "ReadEntries", "GetCheckpoint", "GetHead", "GetStatus"},
    Role.OPERATOR: {"GetRun", "ReadEntries", "GetCheckpoint", "GetHead", "GetStatus"},
}


@pytest.mark.parametrize("role", Role)
def test_each_role_may_call_its_own_methods_and_no_other(
    role: Role, office: Office, tmp_path: Path
) -> None:
    """What an empty request is answered otherwise is not the role's affair."""
    with credentials.channel(office.address, office.member(tmp_path, role, role)) as channel:
        found = outcomes(channel)
    assert len(found) == 13
    refused = {name for name, code in found.items() if code == Code.PERMISSION_DENIED}
    assert found.keys() - refused == ANSWERED[role] | {"Check", "Renew"}


def test_single_contributions_are_for_operators(office: Office, tmp_path: Path) -> None:
    request = pb.ReadEntriesRequest(with_contributions=True)
    for role in Role:
        with credentials.channel(office.address, office.member(tmp_path, role, role)) as channel:
            stub = ledger_service.LedgerServiceStub(channel)
            if role == Role.OPERATOR:
                assert list(stub.ReadEntries(request, timeout=LIMIT_S))
            else:
                assert code_of(partial(next, stub.ReadEntries(request, timeout=LIMIT_S))) == (
                    Code.PERMISSION_DENIED
                )


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("claimed", "why"), [("hotels", ""), ("", ""), ("gadgets", "'hotels'")])
def test_the_name_is_the_certificates(
    claimed: str, why: str, office: Office, tmp_path: Path
) -> None:
    config = office.hub.config
    greeting = hello(ledger.origin(config, IDENTITY), claimed)
    with credentials.channel(office.address, office.member(tmp_path, "hotels")) as channel:
        stub = coordination.CoordinationServiceStub(channel)
        call = stub.Participate(iter([wire.ParticipateRequest(hello=greeting)]), timeout=LIMIT_S)
        first = next(call)
        if why:
            assert not first.refusal.retry
            assert f"not the name in the certificate, {why}" in first.refusal.reason
        else:
            assert first.HasField("welcome")
        call.cancel()


def test_an_evaluation_has_the_name_of_its_certificate(office: Office, tmp_path: Path) -> None:
    run = ledger.origin(office.hub.config, IDENTITY).run_digest
    mine = office.member(tmp_path, "held-out", Role.EVALUATOR)
    with credentials.channel(office.address, mine) as channel:
        stub = ledger_service.LedgerServiceStub(channel)

        def post(name: str) -> object:
            evaluation = pb.Evaluation(evaluator=name, accuracy=0.5)
            request = pb.PostEvaluationRequest(evaluation=evaluation, run_digest=run)
            return stub.PostEvaluation(request, timeout=LIMIT_S)

        assert code_of(lambda: post("somebody")) == Code.FAILED_PRECONDITION
        post("")
        post("held-out")
    posted = office.hub.sequencer.tally.evaluations
    assert {evaluation.evaluator for evaluation in posted} == {"held-out"}


def test_a_statement_is_handed_in_by_its_worker(office: Office, tmp_path: Path) -> None:
    """Another member's number is no more its than another member's name."""
    hub = office.hub
    position = hub.sequencer.position
    assert position is not None
    for name in ("stater", "other"):
        hub.sequencer.admit(hello(ledger.origin(hub.config, IDENTITY), name))
    numbers = hub.sequencer.tally.numbers
    store = hub.sequencer.store
    said = pb.Statement(first=0, last=0, head=store.digest(0), contributions=bytes(32))

    def post(channel: grpc.Channel, worker: int, key: IdentityKey) -> None:
        said.worker = worker
        signed = statements.sign(key, position.run_digest, said)
        stub = ledger_service.LedgerServiceStub(channel)
        stub.PostStatement(pb.PostStatementRequest(statement=signed), timeout=LIMIT_S)

    key = IdentityKey()
    with credentials.channel(office.address, office.member(tmp_path, "stater")) as channel:
        assert "statements" in get_run(channel).features
        for worker in (numbers["other"], 0, 2**32 - 1):
            assert code_of(partial(post, channel, worker, key)) == Code.FAILED_PRECONDITION
        assert list(store.statements()) == []
        post(channel, numbers["stater"], key)
        post(channel, numbers["stater"], key)
        another = partial(post, channel, numbers["stater"], IdentityKey())
        assert code_of(another) == Code.FAILED_PRECONDITION, "of the same entries"
    assert [stated.worker for stated in store.statements()] == [numbers["stater"]]


def test_a_run_may_take_no_statements(tmp_path: Path) -> None:
    """Then nothing that a worker sends is kept but what rounds ask for."""
    config = config_of(service={"address": "127.0.0.1:0", "drain_s": 0.1})
    with opened(tmp_path / "identity", config) as quiet:
        store, position = quiet.hub.sequencer.store, quiet.hub.sequencer.position
        assert position is not None
        number, _ = quiet.hub.sequencer.admit(hello(ledger.origin(config, IDENTITY), "stater"))
        said = pb.Statement(worker=number, head=store.digest(0), contributions=bytes(32))
        signed = statements.sign(IdentityKey(), position.run_digest, said)
        with credentials.channel(quiet.address, quiet.member(tmp_path, "stater")) as channel:
            assert "statements" not in get_run(channel).features
            request = pb.PostStatementRequest(statement=signed)
            post = ledger_service.LedgerServiceStub(channel).PostStatement
            found = code_of(lambda: post(request, timeout=LIMIT_S))
        assert found == Code.FAILED_PRECONDITION
        assert list(store.statements()) == []


# -- bounds ----------------------------------------------------------------------------------------


def test_large_messages_are_refused_at_both_ports(office: Office, tmp_path: Path) -> None:
    large = "n" * transport.message_limit(office.hub.config)
    greeting = wire.ParticipateRequest(hello=wire.Hello(manifest=large))
    with credentials.channel(office.address, office.member(tmp_path, "large")) as channel:
        stub = coordination.CoordinationServiceStub(channel)
        found = code_of(lambda: list(stub.Participate(iter([greeting]), timeout=LIMIT_S)))
        assert found == Code.RESOURCE_EXHAUSTED
    with at_the_door(office) as channel:
        request = enrol.EnrolRequest(name="n" * (16 << 10))
        stranger = enrolment_service.EnrolmentServiceStub(channel)
        found = code_of(lambda: stranger.Enrol(request, timeout=LIMIT_S))
        assert found == Code.RESOURCE_EXHAUSTED


def at_the_door(office: Office) -> grpc.Channel:
    """A channel to the port for enrolment, without a certificate."""
    trusting = grpc.ssl_channel_credentials(pem(office.authority.certificate))
    return grpc.secure_channel(office.enrolment, trusting, transport.channel_options())


def test_at_the_door_there_is_nothing_but_enrolment(office: Office) -> None:
    with at_the_door(office) as channel:
        codes = outcomes(channel)
    assert codes.pop("GetAuthority") == Code.OK
    assert codes.pop("Renew") == Code.UNAUTHENTICATED
    assert codes.pop("Enrol") == Code.INVALID_ARGUMENT
    assert set(codes.values()) == {Code.UNIMPLEMENTED}


# -- streams ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["revoked", "expired"])
def test_open_streams_end_with_a_membership(
    how: str, office: Office, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Within 5 s, also where another process revokes: `office.admission` is one."""
    name, stays = f"to-be-{how}", threading.Event()
    mine = office.member(tmp_path, name)
    greeting = hello(ledger.origin(office.hub.config, IDENTITY), name)
    with credentials.channel(office.address, mine) as channel:
        stub = coordination.CoordinationServiceStub(channel)
        history = ledger_service.LedgerServiceStub(channel)
        opening = wire.ParticipateRequest(hello=greeting)
        part = stub.Participate(silent_after(opening, stays), timeout=LIMIT_S)
        following = history.ReadEntries(pb.ReadEntriesRequest(follow=True), timeout=LIMIT_S)
        assert next(part).HasField("welcome")
        assert next(following).entries
        began = time.monotonic()
        if how == "revoked":
            office.admission.members.revoke(name)
        else:
            later = time.time() + authorities.MEMBER_LIFE.total_seconds()
            monkeypatch.setattr(office.served.members, "clock", lambda: later)
        for call in (part, following):
            with pytest.raises(grpc.RpcError, match=how) as caught:
                list(call)
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() == Code.PERMISSION_DENIED
        assert time.monotonic() - began < 5.0
        stays.set()
    number = [n for n, a in office.hub.sequencer.tally.accounts.items() if a.name == name]
    assert not set(number) & set(office.hub.connections)


def silent_after(
    first: wire.ParticipateRequest, end: threading.Event
) -> Iterator[wire.ParticipateRequest]:
    """Requests of a worker that says hello, and then nothing."""
    yield first
    end.wait(LIMIT_S)
