"""`serve --page` as a real process: what it shows, who may see it, and after a crash."""

import http.client
import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.commands import Room, free_port, start, wait_for
from tests.end_to_end.peers import Peer, peers, served, two
from tests.postgres import Server
from tests.runs import IDENTITY

LIMIT_S = 10.0
Make = Callable[[tiny.Settings], Room]


@pytest.fixture
def make_room(tmp_path: Path) -> Make:
    """Makes rooms of runs whose model nobody has: workers are made of raw stubs."""
    return lambda content: Room(tmp_path, content, tmp_path, {}, start)


def get(port: int, path: str, **headers: str) -> tuple[int, bytes]:
    """Return what a page answers; (0, b"") where nobody listens."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=LIMIT_S)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    except ConnectionError:
        return 0, b""
    finally:
        connection.close()


def content(port: int, path: str) -> Any:
    status, body = get(port, path)
    assert status == 200, body
    return json.loads(body)


def rounds(pair: tuple[Peer, Peer], first: int, last: int) -> None:
    """Commit rounds."""
    for index in range(first, last + 1):
        for peer in pair:
            peer.report(index, seed=peer.worker)
        for peer in pair:
            peer.until_committed(index)


def test_a_run_is_shown_and_shown_again_after_a_crash(make_room: Make) -> None:
    room = make_room(two(run={"rounds": 5}))
    port = free_port()
    watched = ("--page", f"127.0.0.1:{port}", "--report-to", "tensorboard", "--log-format", "json")
    with served(room, *watched) as (command, address):
        assert content(port, "/status.json")["state"] == "waiting"
        with peers(address, room.config) as pair:
            rounds(pair, 1, 5)
        wait_for(lambda: content(port, "/status.json")["state"] == "finished", "the end is shown")
        status, curves = content(port, "/status.json"), content(port, "/curves.json")
        assert status["committed"] == 5
        assert curves["rounds"]["committed"] == [1, 2, 3, 4, 5]
        assert curves["rounds"]["loss"] == [0.5] * 5
        assert b"lorand_rounds_committed_total 5.0" in get(port, "/metrics")[1]
        command.kill()
        lines = [json.loads(line) for line in command.errors().splitlines()]
        assert any("finished: 5 rounds are committed" in line["message"] for line in lines)
    with served(room, *watched):
        wait_for(lambda: content(port, "/curves.json") == curves, "the curve is read again")
        after = content(port, "/status.json")
        for name in ("committed", "entries", "head", "key", "findings"):
            assert after[name] == status[name], name
        assert after["bytes"]["codes"] == status["bytes"]["codes"]
    name = room.config.run.name
    assert list((room.folder / "tracking" / name / "coordinator").iterdir())


def test_a_page_that_others_can_reach_asks_for_its_link(make_room: Make) -> None:
    room = make_room(two())
    (room.folder / "run.lock").write_text(IDENTITY.to_lock(), encoding="utf-8")
    listen = ("--address", "127.0.0.1:0", "--page", "0.0.0.0:0", "--json")
    with room.start("lr-coordinator", "serve", room.run, *listen) as command:
        url = command.line()["page"]
        where, _, token = url.partition("/?token=")
        port = int(where.rpartition(":")[2])
        assert "unencrypted: whoever is on the way" in command.errors()
        assert get(port, "/")[0] == 401
        assert get(port, "/metrics", Authorization=f"Bearer {token}")[0] == 200
    with room.start("lr-coordinator", "serve", room.run, *listen) as command:
        assert command.line()["page"].endswith(token), "the link stays good"


def test_a_port_that_is_taken(make_room: Make) -> None:
    room = make_room(two())
    (room.folder / "run.lock").write_text(IDENTITY.to_lock(), encoding="utf-8")
    serve = ("serve", room.run, "--address", "127.0.0.1:0")
    port = free_port()
    with room.start("lr-coordinator", *serve, "--page", f"127.0.0.1:{port}", "--json") as command:
        command.line()
        other = ("--ledger", room.folder / "other.ledger")
        taken = room.failure("lr-coordinator", *serve, *other, "--page", f"127.0.0.1:{port}")
    assert taken[0] == 2
    assert f"cannot serve the page at 127.0.0.1:{port}: the port is in use" in taken[1]


@pytest.mark.postgres
def test_who_stands_by_shows_that_and_who_leads_the_run(make_room: Make, postgres: Server) -> None:
    room = make_room(two(run={"rounds": 3}))
    (room.folder / "run.lock").write_text(IDENTITY.to_lock(), encoding="utf-8")
    addresses, ports = [f"127.0.0.1:{free_port()}" for _ in "ab"], [free_port(), free_port()]
    serve = ("serve", room.run, "--ledger", postgres.url, "--json")

    def states() -> list[str]:
        return [content(port, "/status.json")["state"] for port in ports]

    with ExitStack() as stack:
        commands = [
            stack.enter_context(
                room.start(
                    *("lr-coordinator", *serve, "--address", address),
                    *("--page", f"127.0.0.1:{port}"),
                )
            )
            for address, port in zip(addresses, ports, strict=True)
        ]
        for command in commands:
            assert command.line()["page"].startswith("http://127.0.0.1:")
        wait_for(lambda: sorted(states()) == ["standing by", "waiting"], "one leads")
        leader = states().index("waiting")
        other = ports[1 - leader]
        wait_for(lambda: "leads run" in content(other, "/status.json")["reason"], "it says who")
        with peers(addresses[leader], room.config) as pair:
            rounds(pair, 1, 3)
        wait_for(lambda: states()[leader] == "finished", "the end is shown")
        curves = content(ports[leader], "/curves.json")
        commands[leader].kill()
        wait_for(lambda: content(other, "/curves.json") == curves, "the other shows the whole run")
        assert content(other, "/status.json")["state"] == "finished"
    postgres.execute("DROP SCHEMA IF EXISTS lorand CASCADE")
