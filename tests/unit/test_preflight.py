"""What `lr-coordinator preflight` finds: each check where it passes, and where it does not."""

import json
import shutil
import socket
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.commands import MakeRoom, free_port
from tests.end_to_end.test_bytes import FIRST, WORKERS, ZEROTH, play
from tests.runs import IDENTITY, OTHER_IDENTITY, config_of

from lorand import findings, ledger, wire_size
from lorand.config import RunConfig
from lorand.credentials import Role
from lorand.errors import ConfigError
from lorand.findings import Finding, Level
from lorand_coordinator import preflight
from lorand_coordinator.identity.admission import Admission
from lorand_coordinator.store import SqliteStore


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """Writes a run file of two workers, with its run.lock."""

    def written(**changes: dict[str, Any]) -> Path:
        run = tmp_path / "run.toml"
        service = {"address": f"127.0.0.1:{free_port()}", **changes.pop("service", {})}
        rounds = {"quorum": 2, "start_with": 2, **changes.pop("rounds", {})}
        content = tiny.settings("spsa", service=service, rounds=rounds, **changes)
        run.write_text(tiny.to_toml(content), encoding="utf-8")
        (tmp_path / "run.lock").write_text(IDENTITY.to_lock(), encoding="utf-8")
        return run

    return written


def by_check(found: list[Finding]) -> dict[str, Finding]:
    return {finding.check: finding for finding in found}


def one(run: Path, check: str, **flags: Any) -> tuple[Level, str]:
    """What one check of a run finds."""
    finding = by_check(preflight.examine(run, **flags))[check]
    return finding.level, finding.text


def test_a_run_that_may_start(write: Callable[..., Path]) -> None:
    """Every check has something to say, and none of them leaves anything behind."""
    run = write()
    before = set(run.parent.iterdir())
    found = preflight.examine(run, insecure=True)
    assert [finding.check for finding in found] == [name for name, _ in preflight.CHECKS]
    assert findings.exit_code(found) == 0, findings.text(found)
    assert set(run.parent.iterdir()) == before


def test_a_run_file_that_is_none(tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    for content, sentence in [("[run", "is not valid TOML"), ("[run]\n", "is not a valid run")]:
        run.write_text(content)
        [finding] = preflight.examine(run)
        assert (finding.level, finding.check) == (Level.FAILED, "settings")
        assert sentence in finding.text


def test_a_quorum_of_one(write: Callable[..., Path]) -> None:
    level, text = one(write(rounds={"quorum": 1, "start_with": 1}), "settings")
    assert level == Level.WARNING
    assert "set rounds.quorum to 2 or more" in text


def test_run_lock(write: Callable[..., Path]) -> None:
    run = write()
    lock = run.with_name("run.lock")
    assert one(run, "run.lock")[0] == Level.WARNING, "a pool larger than the model"
    lock.write_bytes(b"\xff")
    level, text = one(run, "run.lock")
    assert level == Level.FAILED
    assert "write it again with `lr-worker prepare" in text
    lock.unlink()
    level, text = one(run, "run.lock")
    assert level == Level.FAILED
    assert "write it with `lr-worker prepare" in text
    level, text = one(write(run={"adopt_first_worker": True}), "run.lock")
    lock.unlink()
    level, text = one(run, "run.lock")
    assert level == Level.WARNING
    assert "are the first worker's" in text


def test_a_ledger_that_is_there(write: Callable[..., Path], tmp_path: Path) -> None:
    run = write()
    config = RunConfig.parse(run.read_text(encoding="utf-8"))
    path = tmp_path / f"{config.run.name}.ledger"
    store = SqliteStore(path)
    assert one(run, "ledger") == (
        Level.FAILED,
        f"{path} is in use by another coordinator; stop that one first",
    )
    store.append(ledger.start_entry(config, IDENTITY))
    store.close()
    level, text = one(run, "ledger")
    assert level == Level.OK
    assert "1 entries of this run" in text
    (tmp_path / "run.lock").write_text(OTHER_IDENTITY.to_lock(), encoding="utf-8")
    level, text = one(run, "ledger")
    assert level == Level.FAILED
    assert "of another base model, tokenizer or trainable set than run.lock" in text
    level, text = one(write(run={"rounds": 9}), "ledger")
    assert level == Level.FAILED
    assert "with other settings: give the run another name" in text
    path.write_bytes(b"no ledger" * 100)
    assert one(run, "ledger")[0] == Level.FAILED


def test_a_ledger_that_will_be_made(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run = write()
    assert one(run, "ledger", ledger_at=str(tmp_path / "a" / "b" / "x.ledger"))[0] == Level.OK
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(9, 8, 1))
    level, text = one(run, "ledger")
    assert level == Level.FAILED
    assert "and 1 are free there: make room" in text
    monkeypatch.setattr("os.access", lambda folder, mode: False)
    level, text = one(run, "ledger")
    assert level == Level.FAILED
    assert "choose another place with --ledger" in text


@pytest.fixture
def taken() -> Iterator[int]:
    """A port at which somebody listens."""
    with socket.socket() as busy:
        busy.bind(("127.0.0.1", 0))
        busy.listen()
        yield busy.getsockname()[1]


def test_ports(write: Callable[..., Path], taken: int) -> None:
    assert one(write(), "ports")[0] == Level.OK
    level, text = one(write(service={"address": f"127.0.0.1:{taken}"}), "ports")
    assert level == Level.FAILED
    assert f"cannot listen on 127.0.0.1:{taken} (Address already in use)" in text
    level, text = one(write(service={"enrol_address": f"127.0.0.1:{taken}"}), "ports")
    assert level == Level.FAILED
    assert "set service.address and enrol_address" in text
    run = write(service={"enrol_address": f"127.0.0.1:{taken}"})
    assert one(run, "ports", insecure=True)[0] == Level.OK, "nobody enrols there"
    level, text = one(write(), "ports", address="10.0.0.1:7700", insecure=True)
    assert level == Level.FAILED
    assert "--insecure serves this machine alone" in text


def test_members(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = write()
    level, text = one(run, "members")
    assert level == Level.WARNING
    assert "then invite 2 workers or more" in text
    level, text = one(run, "members", address="0.0.0.0:0")
    assert level == Level.FAILED
    assert "say with --host-name" in text
    assert one(run, "members", address="0.0.0.0:0", host_names=("here",))[0] == Level.WARNING
    config = RunConfig.parse(run.read_text(encoding="utf-8"))
    folder = run.with_name(f"{config.run.name}.identity")
    made = Admission.create_or_open(folder, config.run.name)
    made.certify(config.service.address, [])
    made.note_served(7700, 7701)
    made.invite("one", Role.WORKER, 1.0)
    made.invite("watcher", Role.OBSERVER, 1.0)
    level, text = one(run, "members")
    assert level == Level.WARNING
    assert "0 workers, and 1 invited; rounds begin with 2: invite more" in text
    made.invite("two", Role.WORKER, 1.0)
    made.close()
    assert one(run, "members")[0] == Level.OK
    run = write(service={"members": "postgresql://nowhere.invalid/lorand"})
    assert one(run, "members") == (
        Level.OK,
        f"{folder} is there, its members in a database: serve says whether it is reached",
    )
    assert one(write(service={"members": "members.db"}), "members")[0] == Level.FAILED
    run = write()
    (folder / "authority.pem").write_text("no key")
    assert one(run, "members")[0] == Level.FAILED
    shutil.rmtree(folder)
    monkeypatch.setattr("os.access", lambda folder, mode: False)
    assert one(run, "members")[0] == Level.FAILED


def test_fewer_workers_than_a_round_waits_for(write: Callable[..., Path]) -> None:
    run = write(rounds={"start_with": 30}, service={"max_workers": 20})
    assert one(run, "workers") == (
        Level.FAILED,
        "service.max_workers = 20 is below the 30 that rounds wait for: raise it",
    )
    assert one(write(), "workers")[0] == Level.OK


def test_memory(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    run = write()
    assert one(run, "memory")[0] == Level.OK
    monkeypatch.setattr("lorand.free_memory.free_bytes", lambda: 1000)
    assert one(run, "memory")[0] == Level.FAILED
    monkeypatch.setattr("lorand.free_memory.free_bytes", lambda: None)
    assert "memory" not in by_check(preflight.examine(run)), "where it is not known"


PRIVATE: dict[str, dict[str, Any]] = {
    "privacy": {"mode": "worker", "sample_rate": 0.5},
    "rounds": {"telemetry": "none"},
}


@pytest.mark.slow
def test_privacy(write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    level, text = one(write(), "privacy")
    assert level == Level.OK
    assert "scalars leave without noise" in text
    level, text = one(write(**PRIVATE), "privacy")
    assert level == Level.WARNING
    assert "set privacy.spare_rounds" in text
    spare = {**PRIVATE, "privacy": {**PRIVATE["privacy"], "spare_rounds": 3}}
    level, text = one(write(**spare), "privacy")
    assert level == Level.OK
    assert "over 11 rounds takes a noise multiplier of" in text

    def missing(config: RunConfig) -> None:
        raise ConfigError("pip install 'lorand[privacy]'")

    monkeypatch.setattr("lorand.privacy.plan.planned", missing)
    assert one(write(**PRIVATE), "privacy")[0] == Level.FAILED


@pytest.mark.parametrize("config", [ZEROTH, FIRST, config_of(directions={"mode": "own"})])
def test_bytes_are_predicted(config: RunConfig) -> None:
    """Within some bytes of what a round of three workers really sends."""
    config = config.model_copy(update={"rounds": config.rounds.model_copy(update={"quorum": 3})})
    expected, count = wire_size.of_round(config, len(WORKERS)), play(config)
    for predicted, sizes in ((expected.up.message, count.up), (expected.down.message, count.down)):
        assert max(sizes.values()) <= predicted <= max(sizes.values()) + 16


@pytest.mark.slow
def test_the_command(make_room: MakeRoom) -> None:
    """For people and for scripts, with an exit code, and `serve` starts after it."""
    room = make_room(tiny.settings("spsa")).lock()
    answer = room.once("lr-coordinator", "preflight", room.run, "--insecure")
    assert answer["ok"]
    with room.coordinator() as (_, address):
        taken = ("preflight", room.run, "--insecure", "--address", address)
        with room.start("lr-coordinator", *taken) as command:
            code, text = command.end()
        with room.start("lr-coordinator", *taken, "--json") as command:
            assert command.end()[0] == 1 == code
    assert f"failed  ports     cannot listen on {address}" in text
    assert "is in use by another coordinator" in text
    assert text.endswith("2 failed\n")
    assert json.dumps(answer["findings"]).count("failed") == 0
