"""Members of a run as real processes: enrolment, work, revocation, rotation, over TLS."""

import json
import signal
import subprocess
import sys
import time
from typing import Any

import pytest
from tests import tiny
from tests.commands import (
    ENVIRONMENT,
    ROOT,
    Command,
    MakeRoom,
    committed,
    free_port,
    status,
    wait_for,
)

from lorand.credentials import Credentials

NAMES = ("hotels", "gadgets", "restaurants")
ROUNDS = 40


def run_of(**sections: dict[str, Any]) -> tiny.Settings:
    """A run that two of three workers can go on with."""
    basis = {"rounds": {"start_with": 3, "quorum": 2}, "run": {"rounds": ROUNDS}}
    return tiny.settings("spsa", **{**basis, **sections})


@pytest.mark.slow
def test_three_members_and_one_is_revoked_in_the_middle(make_room: MakeRoom) -> None:
    """It is away within 5 s and ends; the others finish, and so does an evaluator."""
    room = make_room(run_of(run={"rounds": 400})).lock()
    room.insecure = False
    with room.coordinator() as (coordinator, address):
        operator = Credentials.read(room.folder / f"{room.config.run.name}.identity/operator.pem")
        workers: dict[str, Command] = {}
        try:
            for name in NAMES:
                mine = room.enrol(name)
                workers[name] = room.join(address, name, "--credentials", mine)
            wait_for(lambda: committed(address, operator) >= 5, "rounds are committed")
            began = time.monotonic()
            assert room.once("lr-coordinator", "revoke", "gadgets") == {"revoked": "gadgets"}
            wait_for(lambda: not connected(address, operator, "gadgets"), "it is away", 5.0)
            assert time.monotonic() - began < 5.0 + 5.0, "the command's own start-up included"
            code, _ = workers["gadgets"].end()
            assert code == 5
            assert "the membership of 'gadgets' was revoked" in workers["gadgets"].errors()
            before = committed(address, operator)
            wait_for(lambda: committed(address, operator) >= before + 3, "the others go on")
            listed = room.once("lr-coordinator", "members")["members"]
            assert {each["name"]: each["state"] for each in listed} == {
                **dict.fromkeys(("hotels", "operator", "restaurants"), "member"),
                "gadgets": "revoked",
            }
            assert "Traceback" not in coordinator.errors()
        finally:
            for worker in workers.values():
                worker.kill()


def connected(address: str, shown: Credentials, name: str) -> bool:
    """Whether a worker is connected, as the operator sees it."""
    answer = status(address, shown)
    assert answer is not None
    return any(worker.name == name and worker.connected for worker in answer.workers)


@pytest.mark.slow
def test_members_stay_members_through_a_crash_a_rotation_and_a_renewal(
    make_room: MakeRoom,
) -> None:
    room = make_room(
        run_of(run={"rounds": 60}),
    ).lock()
    room.insecure = False
    port = free_port()
    address = f"127.0.0.1:{port}"
    with room.coordinator(port=port) as (coordinator, _):
        files = {name: room.enrol(name) for name in NAMES}
        evaluator = room.enrol("held-out", "evaluator")
        operator = Credentials.read(room.folder / f"{room.config.run.name}.identity/operator.pem")
        workers = {n: room.join(address, n, "--credentials", files[n]) for n in NAMES}
        try:
            wait_for(lambda: committed(address, operator) >= 3, "rounds are committed")
            room.once("lr-worker", "enrol", "--renew", address, "--credentials", files["hotels"])
            assert room.once("lr-coordinator", "rotate")["names"][0] == "127.0.0.1"
            coordinator.signal(signal.SIGKILL)
            coordinator.end()
            with room.coordinator(port=port):
                data = ("--data", room.data["test"], "--model", room.model, "--device", "cpu")
                shown = ("--credentials", evaluator)
                measured = room.start(
                    *("lr-worker", "evaluate", address, "--follow", "--every", 20, "--json"),
                    *(*data, *shown),
                )
                with measured:
                    results = [worker.result() for worker in workers.values()]
                    measured.result()
                code, said = room.failure(
                    *("lr-worker", "evaluate", address, "--follow", *data),
                    *("--credentials", files["gadgets"]),
                )
                assert code == 5, said
                assert "is a member as worker, which may not call PostEvaluation" in said
                exported = room.once(
                    "lr-worker", "export", address, room.folder / "adapter", *shown
                )
                assert exported["rounds"] == 60
        finally:
            for worker in workers.values():
                worker.kill()
    assert {result["name"] for result in results} == set(NAMES)
    assert len({result["weights_digest"] for result in results}) == 1


@pytest.mark.slow
def test_commands_that_are_refused_say_what_to_do(make_room: MakeRoom) -> None:
    room = make_room(run_of()).lock()
    code, said = room.failure("lr-coordinator", "invite", "hotels")
    assert code == 2
    assert "`lr-coordinator serve` makes it on its first start" in said
    room.insecure = False
    with room.coordinator() as (_, address):
        mine = room.enrol("hotels")
        arguments = room.join_arguments(address, "hotels")
        for given, status_code, why in (
            ((), 2, "ask the run's operator for an invitation"),
            (("--insecure",), 7, "with --insecure, too"),
            (("--credentials", mine, "--name", "gadgets"), 2, "leave --name away"),
            (("--credentials", mine, "--insecure"), 2, "leave one of the two flags away"),
        ):
            code, said = room.failure("lr-worker", *arguments, *given, "--give-up-s", "1")
            assert code == status_code, said
            assert why in said
        code, said = room.failure("lr-coordinator", "invite", "hotels")
        assert code == 2
        assert "'hotels' is a member already" in said
    away = ("10.0.0.1:7700", "--insecure")
    code, said = room.failure("lr-worker", "join", *away, "--data", room.data["hotels"])
    assert code == 2
    assert "10.0.0.1 is not this machine" in said


@pytest.mark.slow
def test_a_thousand_members_come_at_once() -> None:
    """As after a crash: credentials that follow their file ended the coordinator here."""
    command = [sys.executable, "-m", "benchmarks.identity", "--way", "mutual_tls"]
    done = subprocess.run(
        [*command, "--streams", "1000"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=ENVIRONMENT,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["open_ms"] > 0
