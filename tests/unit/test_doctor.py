"""What `lr-worker doctor` finds: each check where it passes, and where it does not."""

import socket
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Final

import pytest
from tests import tiny
from tests.commands import MakeRoom, free_port
from tests.unit.identity.office import Office, certified, opened

from lorand import findings
from lorand.credentials import Role, Subject
from lorand.errors import ConfigError
from lorand.findings import Finding, Level, go_through, ok
from lorand_coordinator.identity import authority
from lorand_worker.doctor import connection, contents, machine
from lorand_worker.doctor.command import CHECKS
from lorand_worker.doctor.patient import Patient

MODEL: Final = {"name": "tiny", "trainable": "last:1", "max_length": 24}


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """A coordinator that serves over TLS."""
    with opened(tmp_path_factory.mktemp("identity") / "small.identity") as made:
        yield made


@pytest.fixture
def member(office: Office, tmp_path: Path) -> Patient:
    """A machine whose worker is a member."""
    shown = office.member(tmp_path, f"w{tmp_path.name}")
    return Patient(office.address, credentials_file=shown.path, state=tmp_path / "state")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run file."""
    path = tmp_path / "run.toml"
    path.write_text(tiny.to_toml(tiny.settings("spsa")), encoding="utf-8")
    return path


def found(finding: Finding | None, level: Level, *sentences: str) -> None:
    """Hold a finding to its level and to what it says."""
    assert finding is not None
    assert finding.level == level, finding
    for sentence in sentences:
        assert sentence in finding.text


# ------------------------------------------------------------- the table


def test_every_check_is_gone_through() -> None:
    def refuses(examined: int) -> Finding:
        raise ConfigError("not so; do this")

    def lacks(examined: int) -> Finding:
        raise ImportError("no such module", name="torch")

    checks = [("a", refuses), ("b", lambda n: None), ("c", lambda n: ok(f"{n}")), ("d", lacks)]
    made = go_through(checks, 7)
    assert [(f.check, f.level, f.text) for f in made] == [
        ("a", Level.FAILED, "not so; do this"),
        ("c", Level.OK, "7"),
        ("d", Level.FAILED, "torch is not installed"),
    ]
    assert findings.exit_code(made) == 1
    assert findings.exit_code(made[1:2]) == 0
    assert findings.as_dict(made)["findings"][1] == {"check": "c", "level": "ok", "text": "7"}
    assert findings.text(made).splitlines()[0] == "failed  a  not so; do this"
    assert findings.text(made).splitlines()[-1] == "1 ok, 0 warning, 2 failed"


# ------------------------------------------------------------- the machine


def test_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    found(machine.versions(Patient()), Level.OK, "Python 3.", "torch ", "grpcio ")
    wanted = ['torch>=99; extra == "worker"', 'peft>=99; extra == "peft"', "no-such-thing>=1"]
    monkeypatch.setattr("importlib.metadata.requires", lambda name: wanted)
    found(
        machine.versions(Patient()),
        Level.FAILED,
        "torch is 2.",
        "not >=99; no-such-thing is missing",
        "pip install -U 'lorand[worker]'",
    )


def test_polling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GRPC_POLL_STRATEGY", raising=False)
    monkeypatch.setattr("platform.release", lambda: "6.1.0")
    assert machine.polling(Patient()) is None
    monkeypatch.setattr("platform.release", lambda: "7.0.1-generic")
    found(machine.polling(Patient()), Level.WARNING, "set GRPC_POLL_STRATEGY=poll")
    monkeypatch.setenv("GRPC_POLL_STRATEGY", "poll")
    found(machine.polling(Patient()), Level.OK)


def test_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: {0, 1, 2, 3})
    found(machine.processors(Patient()), Level.OK, "4 processors")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found(machine.processors(Patient()), Level.WARNING, "OMP_NUM_THREADS = 1 lets passes use 1")


def test_memory(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = (tiny_model / "model.safetensors").stat().st_size
    patient = Patient(model=tiny_model)
    for free, level, sentence in [
        (10 * size, Level.OK, "the weights are"),
        (2 * size, Level.WARNING, "join with --weights layerwise"),
        (size, Level.FAILED, "a machine with more memory"),
    ]:
        monkeypatch.setattr("lorand_worker.memory.free_bytes", lambda device, free=free: free)
        found(machine.free_memory(patient), level, sentence)
    found(machine.free_memory(Patient()), Level.OK, "GB free")


def test_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    found(machine.gpu(Patient(device="auto")), Level.OK, "passes run on the CPU")
    for device, sentence in [
        ("cuda", "use cpu or auto, or install a torch"),
        ("cuda:1", "use cpu or auto, or install a torch"),
        ("balanced", "computes on one device: use cuda or cuda:0, and --weights layerwise"),
        ("cuda:0,cuda:1", "start a worker for each GPU, with CUDA_VISIBLE_DEVICES"),
        ("abacus", "use cpu, cuda or auto"),
    ]:
        [finding] = go_through([("device", machine.gpu)], Patient(device=device))
        found(finding, Level.FAILED, f"--device {device}: ", sentence)


def test_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in machine.PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert machine.proxies(Patient("10.0.0.1:7700")) is None
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy:3128")
    found(machine.proxies(Patient("127.0.0.1:7700")), Level.OK, "HTTPS_PROXY is set")
    found(
        machine.proxies(Patient("10.0.0.1:7700")),
        Level.WARNING,
        "the coordinator is called directly: have its address and port opened",
    )


def test_a_place_for_state(tmp_path: Path) -> None:
    found(machine.place_for_state(Patient(state=tmp_path / "a" / "b")), Level.OK, "a/b")
    (tmp_path / "file").write_text("")
    [finding] = go_through(
        [("state", machine.place_for_state)], Patient(state=tmp_path / "file" / "b")
    )
    found(finding, Level.FAILED, "choose another place with --state")
    assert not (tmp_path / "a").exists(), "nothing was made"


# ------------------------------------------------------------- the way to the coordinator


def test_a_member_finds_its_run(member: Patient) -> None:
    checks = [(name, check) for name, check in CHECKS if check.__module__ == connection.__name__]
    made = {f.check: f for f in go_through(checks, member)}
    assert list(made) == ["certificate", "port", "TLS", "run"]
    for finding in made.values():
        found(finding, Level.OK)
    assert "is good until" in made["TLS"].text
    assert "small: classification on some/model, 4 rounds" in made["run"].text


def test_without_a_coordinator_nothing_is_called() -> None:
    for check in (connection.certificate, connection.port, connection.tls, connection.run):
        assert check(Patient()) is None


def test_a_missing_certificate(office: Office, tmp_path: Path) -> None:
    patient = Patient(office.address, state=tmp_path)
    made = {f.check: f for f in go_through(CHECKS, patient)}
    found(made["certificate"], Level.FAILED, "give it to `lr-worker enrol`")
    found(made["port"], Level.OK)
    assert not {"TLS", "run"} & set(made), "the certificate's finding is enough"


@pytest.mark.parametrize(
    ("days", "level", "sentence"),
    [
        (0, Level.OK, "good until"),
        (-3650, Level.FAILED, "before its certificate began"),
        (3650, Level.FAILED, "ask the run's operator for a new invitation, or set the clock"),
        (None, Level.WARNING, "`lr-worker enrol --renew 127.0.0.1:"),
    ],
)
def test_a_clock_beyond_the_certificates_dates(
    member: Patient,
    monkeypatch: pytest.MonkeyPatch,
    days: int | None,
    level: Level,
    sentence: str,
) -> None:
    assert member.shown is not None
    present = datetime.now(UTC) + timedelta(days=days or 0)
    if days is None:
        present = member.shown.expires - timedelta(days=3)
    monkeypatch.setattr(connection, "now", lambda: present)
    found(connection.certificate(member), level, sentence)


@pytest.mark.parametrize(("days", "sentence"), [(-20000, "has expired"), (3650, "has not begun")])
def test_the_coordinators_certificate_out_of_its_dates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, days: int, sentence: str
) -> None:
    with monkeypatch.context() as patched:
        elsewhen = authority.now() + timedelta(days=days)
        patched.setattr(authority, "now", lambda: elsewhen)
        made = opened(tmp_path / "small.identity")
        office = made.__enter__()
    try:
        shown = certified(tmp_path / "a.pem", office.authority, Subject("small", Role.WORKER, "a"))
        patient = Patient(office.address, credentials_file=shown.path)
        found(connection.tls(patient), Level.FAILED, f"{sentence} by this machine's clock", "UTC")
    finally:
        made.__exit__(None, None, None)


def test_another_runs_coordinator(office: Office, tmp_path: Path) -> None:
    other = authority.Authority.create(tmp_path / "authority.pem", "small")
    shown = certified(tmp_path / "a.pem", other, Subject("small", Role.WORKER, "a"))
    patient = Patient(office.address, credentials_file=shown.path)
    found(connection.tls(patient), Level.FAILED, "is not certified for it by the run's authority")


def test_who_is_no_member_any_more(office: Office, tmp_path: Path) -> None:
    shown = office.member(tmp_path, "gone")
    office.admission.members.revoke("gone")
    made = {
        f.check: f for f in go_through(CHECKS, Patient(office.address, credentials_file=shown.path))
    }
    found(made["TLS"], Level.OK)
    found(made["run"], Level.FAILED, "the membership of 'gone' was revoked")


def test_ports_that_do_not_answer(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    closed = f"127.0.0.1:{free_port()}"
    found(connection.port(Patient(closed)), Level.FAILED, "`lr-coordinator serve` runs there")
    both = Patient(f"{closed},{office.address}")
    found(connection.port(both), Level.WARNING, f"{closed}: ")
    for error, sentence in [
        (socket.gaierror(-2, "unknown"), "is no name that this machine knows"),
        (TimeoutError(), "check that a firewall lets"),
    ]:

        def fails(*_: object, error: OSError = error) -> None:
            raise error

        monkeypatch.setattr(socket, "create_connection", fails)
        found(connection.port(Patient("somewhere:7700")), Level.FAILED, sentence)


def test_a_server_without_tls(member: Patient, tmp_path: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        patient = Patient(
            f"127.0.0.1:{silent.getsockname()[1]}", credentials_file=member.credentials_file
        )
        assert patient.shown is not None
        monkey = pytest.MonkeyPatch()
        monkey.setattr(connection, "GIVE_UP_S", 0.2)
        with monkey.context():
            found(connection.tls(patient), Level.FAILED, "does not serve with --insecure")
        monkey.undo()


# ------------------------------------------------------------- what it brings


def test_data_and_model_of_a_run(run: Path, tiny_data: dict[str, Path], tiny_model: Path) -> None:
    patient = Patient(run=run, data=tiny_data["hotels"], model=tiny_model)
    found(contents.examples(patient), Level.OK, "160 examples in")
    found(contents.model(patient), Level.OK, "trained weights, loaded")
    found(contents.lengths(patient), Level.OK, "0% of the examples fill model.max_length = 24")


def test_data_that_do_not_fit(run: Path, tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "a.csv"

    def examined(content: str, columns: str = "") -> Finding:
        path.write_text(content, encoding="utf-8")
        patient = Patient(run=run, data=path, columns=columns, model=tiny_model)
        [finding] = go_through([("data", contents.examples)], patient)
        return finding

    rows = "".join(f"lovely room {i},positive\n" for i in range(8))
    for content, level, sentence in [
        (f"text,label\n{rows}", Level.WARNING, "none of them labelled 'negative'"),
        (f"review,label\n{rows}", Level.FAILED, "say which is meant with --columns text=review"),
        ("text,label\nx,meh\n", Level.FAILED, "the label 'meh' is not one of the run's"),
        ("text,label\nx,positive\n", Level.FAILED, "fewer than the run's batch of 8"),
    ]:
        found(examined(content), level, sentence)
    found(examined(f"review,label\n{rows}", "text=review"), Level.WARNING, "8 examples")
    path.write_text("text,label\n" + f"{'lovely ' * 40},positive\n" * 8, encoding="utf-8")
    patient = Patient(run=run, data=path, model=tiny_model)
    found(contents.lengths(patient), Level.WARNING, "100% of the examples fill")


def test_data_and_model_without_a_run(tiny_data: dict[str, Path], tiny_model: Path) -> None:
    patient = Patient(data=tiny_data["hotels"], model=tiny_model)
    found(contents.examples(patient), Level.WARNING, "has the columns 'text', 'label'")
    found(contents.model(patient), Level.WARNING, "--run FILE")
    assert contents.lengths(patient) is None
    nothing = Patient()
    assert (
        contents.examples(nothing) is contents.model(nothing) is contents.lengths(nothing) is None
    )


def test_models_that_do_not_fit(run: Path, tmp_path: Path, masked_model: Path) -> None:
    [finding] = go_through([("model", contents.model)], Patient(run=run, model=tmp_path))
    found(finding, Level.FAILED, "cannot load the model")
    words: dict[str, Any] = {
        "kind": "label-words",
        "labels": list(tiny.LABELS),
        "label_words": ["awful", "bad-ish"],
        "template": "it was {mask} , {text}",
    }
    run.write_text(tiny.to_toml({**tiny.settings("spsa"), "task": words}), encoding="utf-8")
    patient = Patient(run=run, model=masked_model)
    [finding] = go_through([("model", contents.model)], patient)
    found(finding, Level.FAILED, "'bad-ish' is not one token", "(one token each: great")


@pytest.mark.slow
def test_the_command(make_room: MakeRoom, own_model: Path) -> None:
    """Against a coordinator: all is well, and with another model it is not."""
    room = make_room(tiny.settings("spsa")).lock()
    with room.coordinator() as (_, address):
        ours = ("doctor", address, "--insecure", "--data", room.data["hotels"], "--device", "cpu")
        answer = room.once("lr-worker", *ours, "--model", room.model, "--state", room.state)
        with room.start("lr-worker", *ours, "--model", own_model) as command:
            code, text = command.end()
    assert answer["ok"], answer
    levels = {each["check"]: each["level"] for each in answer["findings"]}
    assert levels["run"] == levels["data"] == levels["model"] == levels["lengths"] == "ok"
    assert code == 1
    assert "the base weights here (" in text
    assert not room.state.exists(), "nothing was kept"
