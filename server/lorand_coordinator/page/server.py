"""The page's HTTP server, in the coordinator's own event loop: files, events, metrics; all read.

Nothing here changes the run, and nothing that is served asks another host for anything.
"""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from importlib.resources import files
from typing import Any, Final, Protocol

import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import Headers, QueryParams
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from lorand import transport
from lorand.errors import ConfigError
from lorand_coordinator.page.access import Gate
from lorand_coordinator.page.feed import VIEWERS, Feed

FILES: Final = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "/icon.svg": ("icon.svg", "image/svg+xml"),
    "/uplot.js": ("uplot/uPlot.iife.min.js", "text/javascript; charset=utf-8"),
    "/uplot.css": ("uplot/uPlot.min.css", "text/css; charset=utf-8"),
}
HEADERS: Final = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}
CONNECTIONS: Final = 4 * VIEWERS
IDLE_S: Final = 30
STOPPING_S: Final = 1


class Desk(Protocol):
    """Where the server gets what it shows."""

    feed: Feed

    def refresh(self) -> None:
        """Put the newest into the feed."""

    def workers(self, page: int, order: str, descending: bool) -> bytes:
        """Return a page of the table of workers as JSON."""

    def metrics(self) -> tuple[bytes, str]:
        """Return what Prometheus reads, and its content type."""


def listen(address: str) -> socket.socket:
    """Return a socket that listens at HOST:PORT. Raises ConfigError."""
    host, port = transport.split(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise ConfigError(
            f"cannot serve the page at {address}: the port is in use or the address is not this "
            "machine's; give --page another"
        ) from error


@asynccontextmanager
async def served(desk: Desk, gate: Gate, listening: socket.socket) -> AsyncIterator[None]:
    """Serve the page meanwhile."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    config = uvicorn.Config(
        _guarded(_app(desk), gate),
        log_config=None,
        access_log=False,
        lifespan="off",
        ws="none",
        http="h11",
        server_header=False,
        limit_concurrency=CONNECTIONS,
        timeout_keep_alive=IDLE_S,
        timeout_graceful_shutdown=STOPPING_S,
    )
    server = _Server(config)
    task = asyncio.create_task(server.serve(sockets=[listening]))
    try:
        yield
    finally:
        desk.feed.close()
        server.should_exit = True
        await task


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the coordinator."""
        yield


def _app(desk: Desk) -> Starlette:
    async def events(request: Request) -> Response:
        if desk.feed.viewers >= VIEWERS:
            text = f"{VIEWERS} viewers are here already: close a tab, or come back later"
            return PlainTextResponse(text, 503)
        desk.refresh()
        # A proxy that collects what it passes on would hold events back.
        headers = {"X-Accel-Buffering": "no"}
        return StreamingResponse(
            desk.feed.follow(), media_type="text/event-stream", headers=headers
        )

    async def newest(request: Request) -> Response:
        desk.refresh()
        return _json(desk.feed.newest(request.path_params["kind"]))

    async def workers(request: Request) -> Response:
        asked = request.query_params
        descending = asked.get("descending") == "1"
        return _json(desk.workers(_number(asked), asked.get("order", "worker"), descending))

    async def metrics(request: Request) -> Response:
        content, kind = desk.metrics()
        return Response(content, media_type=kind)

    answers = {
        "/events": events,
        "/workers.json": workers,
        "/{kind:str}.json": newest,
        "/metrics": metrics,
    }
    routes = [Route(path, answer, methods=["GET"]) for path, answer in answers.items()]
    return Starlette(routes=[*routes, *(_file(path, *each) for path, each in FILES.items())])


def _file(path: str, name: str, kind: str) -> Route:
    content = files("lorand_coordinator.page").joinpath("static", name).read_bytes()

    async def read(request: Request) -> Response:
        return Response(content, media_type=kind)

    return Route(path, read, methods=["GET"])


def _json(content: bytes) -> Response:
    return Response(content, media_type="application/json")


def _number(asked: QueryParams) -> int:
    text = asked.get("page", "0")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 7 else 0


def _guarded(app: ASGIApp, gate: Gate) -> ASGIApp:
    """Let through what the gate lets through, and put the headers on every answer."""

    async def call(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return
        headers, link = Headers(scope=scope), QueryParams(scope["query_string"]).get("token", "")
        why = gate.refusal(
            headers.get("host", ""),
            cookie=headers.get("cookie", ""),
            bearer=headers.get("authorization", ""),
            link=link,
        )
        answer: ASGIApp = app
        if why:
            answer = PlainTextResponse(why + "\n", 401 if gate.token else 403)
        elif link and gate.token:
            # The token leaves the address bar, and with it histories and screenshots.
            answer = RedirectResponse("./", 303)
            answer.set_cookie(gate.cookie, gate.token, httponly=True, samesite="lax")
        await answer(scope, receive, _with_headers(send))

    return call


def _with_headers(send: Send) -> Callable[[Any], Awaitable[None]]:
    added = [(name.lower().encode(), value.encode()) for name, value in HEADERS.items()]

    async def sent(message: Any) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message["headers"], *added]}
        await send(message)

    return sent
