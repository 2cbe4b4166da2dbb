"""Chromium of the system, once a session; its pages must ask nobody else for anything."""

import shutil
from collections.abc import Callable, Iterator
from typing import Literal
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, sync_playwright
from tests.browser.stage import Theatre

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
SIZES = {"desktop": (1280, 900), "phone": (360, 740)}

Scheme = Literal["light", "dark"]
Visit = Callable[..., Page]


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """The browser; skipped where there is none."""
    path = next((found for name in CHROMIUM if (found := shutil.which(name))), None)
    if path is None:
        pytest.skip("there is no Chromium: apt-get install chromium")
    with sync_playwright() as driver:
        # Run as root in containers, where Chromium's own sandbox cannot be.
        browser = driver.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def theatre() -> Iterator[Theatre]:
    """A run that nobody joined yet."""
    made = Theatre()
    made.lead()
    yield made
    made.close()


@pytest.fixture
def visit(chromium: Browser, theatre: Theatre) -> Iterator[Visit]:
    """Opens the page at a size; at the end no script failed, and no other host was asked."""
    contexts: list[BrowserContext] = []
    errors: list[str] = []
    asked: set[str] = set()

    def open_page(size: str = "desktop", scheme: Scheme = "light", clock: str = "") -> Page:
        width, height = SIZES[size]
        context = chromium.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: asked.add(urlsplit(request.url).netloc))
        page.on("console", lambda line: _note(errors, line.text))
        if clock:
            page.clock.install()
        page.goto(theatre.url)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []
    assert asked == {f"127.0.0.1:{theatre.port}"}


def _note(errors: list[str], line: str) -> None:
    """Keep what the console says, but for requests while the server is away on purpose."""
    if "ERR_CONNECTION_REFUSED" not in line and "ERR_INCOMPLETE_CHUNKED" not in line:
        errors.append(line)
