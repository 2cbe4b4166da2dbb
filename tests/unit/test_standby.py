"""One of several coordinators without a database: when it stops leading, where it is reached."""

import asyncio
import socket
from collections.abc import Iterable
from typing import cast

import pytest
from tests import tiny

from lorand.errors import ConfigError
from lorand_coordinator import identity_cli, standby
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import StoreUnavailable
from lorand_coordinator.store_postgres import PostgresStore, TakenOver


class Answers:
    """What a store says to `confirm`, call by call; the last for ever."""

    def __init__(self, answers: Iterable[Exception | None]) -> None:
        self.answers, self.asked = list(answers), 0

    def confirm(self) -> None:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is not None:
            raise answer


AWAY = StoreUnavailable("it is away")


def watch(monkeypatch: pytest.MonkeyPatch, lease_s: float, *answers: Exception | None) -> Answers:
    """Watch until the watch ends by itself."""
    monkeypatch.setattr(standby, "POLL_S", 0.001)
    monkeypatch.setattr(standby, "LEASE_S", lease_s)
    store = Answers(answers)

    async def run() -> None:
        over = asyncio.Event()
        leads = standby._watch(cast(PostgresStore, store), asyncio.Event(), over)
        await asyncio.wait_for(leads, 10.0)
        assert over.is_set()

    asyncio.run(run())
    return store


def test_who_was_taken_over_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    assert watch(monkeypatch, 60.0, None, AWAY, None, TakenOver("by another")).asked == 4


def test_who_hears_nothing_for_a_lease_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another may lead by then; workers that stay with this one would hold that one up."""
    store = watch(monkeypatch, 0.05, None, None, AWAY)
    assert store.asked > 4, "a moment's silence is no reason"


def test_who_is_asked_to_stop_stops(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(standby, "POLL_S", 60.0)
    store = Answers([None])

    async def run() -> None:
        until, over = asyncio.Event(), asyncio.Event()
        until.set()
        await asyncio.wait_for(standby._watch(cast(PostgresStore, store), until, over), 10.0)
        assert over.is_set()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("bound", "advertised", "expected"),
    [
        ("127.0.0.1:7700", "", "127.0.0.1:7700"),
        ("[2001:db8::7]:7700", "", "[2001:db8::7]:7700"),
        ("0.0.0.0:7700", "", f"{socket.gethostname()}:7700"),
        ("[::]:7700", "", f"{socket.gethostname()}:7700"),
        ("0.0.0.0:7700", "10.0.0.7:17700", "10.0.0.7:17700"),
    ],
)
def test_where_the_others_reach_a_leader(bound: str, advertised: str, expected: str) -> None:
    def never(*_: object) -> Sequencer:
        raise AssertionError

    config = tiny.config("spsa")
    made = standby.Coordinator(config, never, lambda *_: None, advertised=advertised)
    assert standby.reached_at(made, bound) == expected


@pytest.mark.parametrize("wrong", ["0.0.0.0:7700", "a.example:0", "a.example", "[::]:7700"])
def test_where_nobody_can_be_reached_is_refused(wrong: str) -> None:
    config = tiny.config("spsa")
    with pytest.raises(ConfigError, match=r"HOST:PORT|--advertise .*: give the name"):
        identity_cli.check_addresses(config, False, wrong)
    identity_cli.check_addresses(config, False, "a.example:7700")
    identity_cli.check_addresses(config, True, "127.0.0.1:7700")
    with pytest.raises(ConfigError, match=r"with --insecure, 127\.0\.0\.1"):
        identity_cli.check_addresses(config, True, "a.example:7700")
