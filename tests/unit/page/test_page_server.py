"""The page's server on loopback: what it answers, whom it refuses, and what it asks nobody for."""

import asyncio
import http.client
import json
import re
from collections.abc import Awaitable, Callable
from importlib.resources import files
from typing import Any

import pytest
from tests.commands import wait_for
from tests.unit.page.conftest import MakeStage
from tests.unit.page.staging import Stage

from lorand.errors import ConfigError
from lorand.privacy import accountant, plan
from lorand_coordinator import spending
from lorand_coordinator.page import feed, server
from lorand_coordinator.page.access import Gate
from lorand_coordinator.page.desk import PageDesk

TOKEN = "t" * 32
LIMIT_S = 10.0


class Browser:
    """Requests to a page that is served in this process."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def get(self, path: str, method: str = "GET", **headers: str) -> tuple[int, Any, bytes]:
        """Return status, headers and body."""
        return await asyncio.to_thread(self._get, path, method, headers)

    def _get(self, path: str, method: str, headers: dict[str, str]) -> tuple[int, Any, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=LIMIT_S)
        try:
            connection.request(method, path, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.headers, answer.read()
        finally:
            connection.close()

    async def follow(self) -> "Events":
        """Open the stream of events."""
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        await writer.drain()
        return Events(reader, writer)


class Events:
    """An open stream of events."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer

    async def next(self, kind: str) -> Any:
        """Return the content of the next event of a kind."""
        while True:
            line = await asyncio.wait_for(self._reader.readline(), LIMIT_S)
            assert line, "the stream ended"
            if line.strip() == f"event: {kind}".encode():
                return json.loads((await self._reader.readline()).removeprefix(b"data: "))

    async def close(self) -> None:
        self._writer.close()
        await self._writer.wait_closed()


def serve(
    stage: Stage, visit: Callable[[Browser, PageDesk], Awaitable[None]], token: str = ""
) -> None:
    """Serve a stage's page during a visit."""

    async def run() -> None:
        counting = spending.Spending(stage.config, stage.hub)
        desk = PageDesk(stage.config, list, lambda: counting.spent)
        desk.lead(stage.hub)
        listening = server.listen("127.0.0.1:0")
        async with server.served(desk, Gate(token), listening):
            fresh = asyncio.gather(desk.keep_fresh(), counting.keep_fresh())
            try:
                port = listening.getsockname()[1]
                await asyncio.wait_for(visit(Browser(port), desk), LIMIT_S)
            finally:
                fresh.cancel()

    asyncio.run(run())


def test_the_page_and_its_headers(stage: Stage) -> None:
    async def visit(browser: Browser, desk: PageDesk) -> None:
        for path, (_, kind) in server.FILES.items():
            status, headers, body = await browser.get(path)
            assert (status, headers["Content-Type"]) == (200, kind)
            assert body
            assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src")
            assert headers["Cache-Control"] == "no-store"
        assert (await browser.get("/../../etc/passwd"))[0] == 404
        assert (await browser.get("/status.json", method="POST"))[0] == 405

    serve(stage, visit)


def test_nothing_that_is_served_names_another_host() -> None:
    """What a browser loads is here; uPlot names its home in a comment, SVG its namespace."""
    static = files("lorand_coordinator.page").joinpath("static")
    for name, _ in server.FILES.values():
        text = static.joinpath(name).read_text(encoding="utf-8")
        hosts = set(re.findall(r"(?:https?:)?//[\w-]+\.[\w./-]+", text))
        assert hosts <= {"https://github.com/leeoniya/uPlot", "http://www.w3.org/2000/svg"}, name
    assert "MIT License" in static.joinpath("uplot", "LICENSE").read_text(encoding="utf-8")


def test_events_follow_the_run(stage: Stage) -> None:
    async def visit(browser: Browser, desk: PageDesk) -> None:
        events = await browser.follow()
        assert (await events.next("status"))["committed"] == 0
        assert (await events.next("curves"))["rounds"]["committed"] == []
        stage.commit()
        status = await events.next("status")
        assert (status["committed"], status["loss"]) == (1, 1.0)
        assert (await events.next("curves"))["rounds"]["loss"] == [1.0]
        await events.close()

    serve(stage, visit)


def test_what_did_not_change_is_not_sent_again(stage: Stage) -> None:
    async def visit(browser: Browser, desk: PageDesk) -> None:
        stream = desk.feed.follow()
        desk.refresh()
        assert (await anext(stream)).count(b"event: ") == 2
        desk.refresh()
        stage.answer(stage.hub.connections[1])
        desk.refresh()
        frame = await anext(stream)
        assert frame.count(b"event: status") == 1
        assert b"event: curves" not in frame

    serve(stage, visit)


def test_a_quiet_connection_is_heard_of(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "ALIVE_S", 0.01)

    async def visit(browser: Browser, desk: PageDesk) -> None:
        events = await browser.follow()
        assert await events.next("alive") == 1
        await events.close()

    serve(stage, visit)


def test_viewers_are_bounded(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "VIEWERS", 1)

    async def visit(browser: Browser, desk: PageDesk) -> None:
        events = await browser.follow()
        await events.next("status")
        status, _, body = await browser.get("/events")
        assert (status, body) == (
            503,
            b"1 viewers are here already: close a tab, or come back later",
        )
        await events.close()

    serve(stage, visit)


def test_who_left_is_no_viewer(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "ALIVE_S", 0.01)

    async def visit(browser: Browser, desk: PageDesk) -> None:
        events = await browser.follow()
        await events.next("status")
        assert desk.feed.viewers == 1
        await events.close()
        await asyncio.to_thread(wait_for, lambda: desk.feed.viewers == 0, "nobody watches", LIMIT_S)

    serve(stage, visit)


def test_what_a_private_run_spent_is_counted_beside_the_rounds(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a thread, since accounting takes seconds; here it takes none."""
    monkeypatch.setattr(spending, "SPENT_S", 0.01)
    monkeypatch.setattr(plan, "planned", lambda config: "release")
    monkeypatch.setattr(accountant, "epsilon", lambda release, rounds, delta: 0.5 * rounds)
    section = stage.config.privacy.model_copy(update={"mode": "worker"})
    stage.config = stage.hub.config = stage.config.model_copy(update={"privacy": section})

    async def visit(browser: Browser, desk: PageDesk) -> None:
        events = await browser.follow()
        while (await events.next("status"))["privacy"]["epsilon"] != 0.5:
            pass
        stage.commit()
        while (status := await events.next("status"))["privacy"]["epsilon"] != 1.0:
            pass
        assert status["privacy"]["rounds"] == 2
        await events.close()

    serve(stage, visit)


def test_workers_are_asked_for_by_page(make_stage: MakeStage) -> None:
    stage = make_stage(rounds={"quorum": 30})
    for number in range(30):
        stage.join(f"worker-{number:02}")

    async def visit(browser: Browser, desk: PageDesk) -> None:
        _, _, body = await browser.get("/workers.json?page=1&order=name&descending=1")
        assert [row["name"] for row in json.loads(body)["rows"]][-1] == "worker-00"
        for page in ("-1", "x", "9" * 50, "%F0"):
            status, _, body = await browser.get(f"/workers.json?page={page}")
            assert (status, json.loads(body)["page"]) == (200, 0)

    serve(stage, visit)


def test_who_stands_by_has_a_page(stage: Stage) -> None:
    async def visit(browser: Browser, desk: PageDesk) -> None:
        desk.rest("b:7700 leads run 'small' (epoch 2)")
        _, _, body = await browser.get("/status.json")
        assert json.loads(body)["reason"] == "b:7700 leads run 'small' (epoch 2)"
        assert json.loads((await browser.get("/workers.json"))[2])["known"] == 0
        assert b"lorand_leading 0.0" in (await browser.get("/metrics"))[2]

    serve(stage, visit)


def test_other_names_for_this_machine_are_refused(stage: Stage) -> None:
    async def visit(browser: Browser, desk: PageDesk) -> None:
        status, headers, body = await browser.get("/status.json", Host="evil.example")
        assert status == 403
        assert b"open it by 127.0.0.1" in body
        assert "Content-Security-Policy" in headers

    serve(stage, visit)


def test_the_operators_link_lets_in(stage: Stage) -> None:
    async def visit(browser: Browser, desk: PageDesk) -> None:
        assert (await browser.get("/"))[0] == 401
        assert (await browser.get("/?token=wrong"))[0] == 401
        status, headers, _ = await browser.get(f"/?token={TOKEN}")
        assert (status, headers["Location"]) == (303, "./")
        cookie = headers["Set-Cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie
        assert (await browser.get("/", Cookie=cookie.split(";")[0]))[0] == 200
        assert (await browser.get("/metrics", Authorization=f"Bearer {TOKEN}"))[0] == 200

    serve(stage, visit, TOKEN)


def test_a_port_that_is_taken() -> None:
    with server.listen("127.0.0.1:0") as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"page at 127.0.0.1:{port}.*give --page another"):
            server.listen(f"127.0.0.1:{port}")
