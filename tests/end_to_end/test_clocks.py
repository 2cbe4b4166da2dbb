"""The coordinator's clock jumps by hours, both ways, in the middle of a run: nothing notices."""

import os
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from tests import tiny
from tests.commands import ENVIRONMENT, MakeRoom, committed, free_port, start, wait_for

from lorand.credentials import Credentials

LIBRARIES: Final = sorted(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))
JUMPS: Final = ("+1h", "-1h", "+0")
ROUNDS: Final = 150


def faked(clock: Path) -> dict[str, str]:
    """The environment of a process whose wall clock is this file's; others run as they do."""
    return {
        **ENVIRONMENT,
        "LD_PRELOAD": str(LIBRARIES[-1]),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }


def jump(clock: Path, to: str) -> None:
    """Have the clock be ahead or behind, from one reading to the next."""
    new = clock.with_suffix(".new")
    new.write_text(to + "\n")
    os.replace(new, clock)


@pytest.mark.slow
@pytest.mark.timeout(290)
@pytest.mark.skipif(not LIBRARIES, reason="libfaketime is not installed: apt-get install faketime")
def test_an_hour_forth_and_two_hours_back(make_room: MakeRoom, tmp_path: Path) -> None:
    """Over mutual TLS: certificates are the only thing here that knows dates."""
    room = make_room(
        tiny.settings(
            "spsa",
            run={"rounds": ROUNDS},
            estimator={"directions_per_round": 2, "batch_size": 4},
            rounds={"deadline_s": 20.0, "start_with": 3, "quorum": 3},
            service={"heartbeat_s": 0.5, "heartbeat_timeout_s": 20.0},
        )
    ).lock()
    room.insecure = False
    clock, log = tmp_path / "clock", tmp_path / "coordinator.log"
    jump(clock, "+0")
    address = f"127.0.0.1:{free_port()}"
    serve = ("serve", room.run, "--address", address, "--json")
    with ExitStack() as stack:
        command = start(room.folder, log, "lr-coordinator", *serve, environment=faked(clock))
        coordinator = stack.enter_context(command)
        assert coordinator.line()["address"] == address
        shown = Credentials.read(room.folder / f"{room.config.run.name}.identity/operator.pem")
        workers = [
            stack.enter_context(room.join(address, name, "--credentials", room.enrol(name)))
            for name in tiny.DOMAINS
        ]

        def at_least(goal: int) -> bool:
            return committed(address, shown) >= goal

        wait_for(partial(at_least, 3), "the run begins")
        for to in JUMPS:
            jump(clock, to)
            reached = partial(at_least, committed(address, shown) + 10)
            wait_for(reached, f"rounds at {to}")
        results = [worker.result() for worker in workers]
    replayed = room.once("lr-worker", "replay", room.export(), "--model", room.model)
    assert replayed["rounds"] == ROUNDS
    assert {result["weights_digest"] for result in results} == {replayed["weights_digest"]}
    assert {result["contributions"] for result in results} == {ROUNDS}, "nobody was given up"
    hours = {line[:2] for line in log.read_text().splitlines() if line[2:3] == ":"}
    assert len(hours) > 2, "the clock did jump"
