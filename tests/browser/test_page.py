"""The page in a real browser, at the sizes of a desktop and of a phone."""

import os
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect
from tests.browser.conftest import Visit
from tests.browser.stage import Theatre
from tests.runs import evaluation_of

pytestmark = pytest.mark.browser

BOTH = pytest.mark.parametrize(
    ("size", "scheme"), [("desktop", "light"), ("phone", "dark")], ids=["desktop", "phone"]
)
SHOTS = os.environ.get("LORAND_SCREENSHOTS", "")
"""A folder: what every test saw at its end is written there, for people to look at."""


@pytest.fixture(autouse=True)
def shots(request: pytest.FixtureRequest, visit: Visit) -> Iterator[None]:
    """Write screenshots, where asked for."""
    pages: list[Page] = []
    request.node.pages = pages
    yield
    for number, page in enumerate(pages if SHOTS else ()):
        page.wait_for_timeout(300)
        name = f"{request.node.name.removeprefix('test_')}-{number}.png"
        page.screenshot(path=Path(SHOTS) / name, full_page=True)


@pytest.fixture
def see(request: pytest.FixtureRequest, visit: Visit) -> Visit:
    """Opens the page."""

    def open_page(*args: str) -> Page:
        page = visit(*args)
        request.node.pages.append(page)
        return page

    return open_page


def play(theatre: Theatre, rounds: int, names: tuple[str, ...] = ("ada", "ben", "cleo")) -> None:
    """Have workers join and rounds commit, with an evaluation every ten."""

    def act() -> None:
        stage = theatre.stage
        for name in names:
            if name not in {a.name for a in stage.hub.sequencer.tally.accounts.values()}:
                stage.join(name)
        stage.drain()
        for _ in range(rounds):
            stage.now += 1.0
            stage.commit()
            committed = stage.hub.sequencer.engine.committed
            if committed % 10 == 0:
                accuracy = 1 - 0.5 / (1 + committed / 50)
                stage.hub.sequencer.tally.evaluations.append(
                    evaluation_of("held-out", committed, accuracy)
                )

    theatre.do(act)


def fits(page: Page) -> bool:
    """Whether nothing is wider than the window."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= window.innerWidth"))


@BOTH
def test_a_run_that_nobody_joined(theatre: Theatre, see: Visit, size: str, scheme: str) -> None:
    page = see(size, scheme)
    expect(page.locator("#state")).to_have_text("waiting")
    expect(page.locator("#reason")).to_have_text("Waiting for the first worker to join.")
    expect(page.locator("#nobody")).to_be_visible()
    expect(page.locator("#loss-chart")).to_contain_text("No round is committed yet.")
    expect(page.locator("#accuracy-chart")).to_contain_text("Nobody evaluated yet")
    assert fits(page)


@BOTH
def test_a_run_under_way(theatre: Theatre, see: Visit, size: str, scheme: str) -> None:
    play(theatre, 120)
    page = see(size, scheme)
    expect(page.locator("#state")).to_have_text("running")
    expect(page.locator("#progress-text")).to_have_text("120 of 600 rounds committed")
    expect(page.locator("#loss")).to_have_text("0.008333")
    expect(page.locator("#accuracy")).to_have_text("85.3 %")
    expect(page.locator(".uplot")).to_have_count(3)
    expect(page.locator("#rows tr")).to_have_count(3)
    row = page.locator("#rows tr").first
    expect(row.locator("th")).to_have_text("ada")
    expect(row.locator("td.state")).to_have_text("measuring")
    expect(page.locator("#head")).to_have_text(theatre.do(theatre.stage.store.head).hex())
    assert fits(page)


def test_a_commit_is_shown_within_a_second(theatre: Theatre, see: Visit) -> None:
    play(theatre, 5)
    page = see()
    expect(page.locator("#progress-text")).to_have_text("5 of 600 rounds committed")
    for committed in (6, 7, 8):
        play(theatre, 1)
        began = time.monotonic()
        expect(page.locator("#progress-text")).to_contain_text(f"{committed} of")
        assert time.monotonic() - began < 1.5  # the page's second, and the test's own way there
    assert page.title() == "8/600 sentiment: running"


def test_loss_against_rounds_and_against_bytes_by_keyboard(theatre: Theatre, see: Visit) -> None:
    play(theatre, 20)
    page = see()
    chart = page.locator("#loss-chart")
    expect(chart).to_have_attribute("aria-label", "Loss: 1 after round 1, 0.05 after round 20.")
    page.get_by_label("rounds", exact=True).focus()
    page.keyboard.press("ArrowRight")
    expect(page.get_by_label("bytes", exact=True)).to_be_checked()
    expect(chart.locator(".u-legend")).to_contain_text("codes exchanged")


def test_everything_is_reached_by_tab(theatre: Theatre, see: Visit) -> None:
    play(theatre, 3, tuple(f"worker-{n:02}" for n in range(60)))
    page = see()
    expect(page.locator("#pages")).to_be_visible()
    reached = []
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.append(
            page.evaluate("document.activeElement.id || document.activeElement.textContent")
        )
    assert reached[0] == "Skip to participants"
    assert {"table", "name", "last seen", "after", "/metrics"} <= set(reached)


def test_workers_come_in_pages_and_in_any_order(theatre: Theatre, see: Visit) -> None:
    play(theatre, 1, tuple(f"worker-{n:02}" for n in range(60)))
    page = see("phone", "light")
    expect(page.locator("#rows tr")).to_have_count(25)
    page.get_by_role("button", name="Next").click()
    expect(page.locator("#where")).to_have_text("page 2 of 3")
    expect(page.locator("#rows th").first).to_have_text("worker-25")
    page.get_by_role("button", name="name").click()
    page.get_by_role("button", name="name").click()
    expect(page.locator("#rows th").first).to_have_text("worker-59")
    expect(page.locator("th[aria-sort=descending]")).to_have_text("name")
    assert fits(page)


def test_a_name_is_text(theatre: Theatre, see: Visit) -> None:
    name = "<img src=x onerror=alert(1)>"
    play(theatre, 1, (name, "ben", "cleo"))
    page = see()
    expect(page.locator("#rows th").first).to_have_text(name)
    assert page.locator("#rows img").count() == 0


@BOTH
def test_a_ledger_that_cannot_be_written(
    theatre: Theatre, see: Visit, size: str, scheme: str
) -> None:
    play(theatre, 10)
    theatre.stage.store.full = True
    play(theatre, 1)
    page = see(size, scheme)
    expect(page.locator("#state")).to_have_text("ledger cannot be written")
    expect(page.locator("#reason")).to_contain_text("disk full; free space")
    expect(page.locator("#notice")).to_contain_text("Nothing is lost")
    theatre.stage.store.full = False
    if size == "desktop":
        theatre.do(lambda: theatre.stage.wait(60.0))
        expect(page.locator("#state")).to_have_text("running")
        expect(page.locator("#notice")).to_be_hidden()


@BOTH
def test_a_connection_that_is_lost_and_comes_back(
    theatre: Theatre, see: Visit, size: str, scheme: str
) -> None:
    play(theatre, 10)
    page = see(size, scheme)
    expect(page.locator("#state")).to_have_text("running")
    theatre.shut()
    expect(page.locator("#state")).to_have_text("connection lost")
    expect(page.locator("#notice")).to_contain_text("The coordinator does not answer since")
    expect(page.locator("#loss")).to_have_text("0.1")
    if size == "desktop":
        theatre.again()
        play(theatre, 1)
        expect(page.locator("#progress-text")).to_have_text("11 of 600 rounds committed")
        expect(page.locator("#state")).to_have_text("running")
        expect(page.locator("#notice")).to_be_hidden()


def test_a_connection_that_falls_silent(theatre: Theatre, see: Visit) -> None:
    play(theatre, 10)
    page = see("desktop", "light", "its own clock")
    expect(page.locator("#state")).to_have_text("running")
    page.clock.run_for(14_000)  # for the page; the server is asked to say something in 5 s of ours
    expect(page.locator("#state")).to_have_text("connection lost")


def test_events_that_a_proxy_holds_back(theatre: Theatre, see: Visit) -> None:
    play(theatre, 4)
    page = see("desktop", "light", "its own clock")
    page.route("**/events", lambda route: None)  # never answered
    page.reload()
    page.clock.run_for(9_000)
    expect(page.locator("#progress-text")).to_have_text("4 of 600 rounds committed")


def test_the_end(theatre: Theatre, see: Visit) -> None:
    play(theatre, 600)
    page = see()
    expect(page.locator("#state")).to_have_text("finished")
    expect(page.locator("#reason")).to_have_text("Finished: 600 rounds are committed.")


def test_who_stands_by(theatre: Theatre, see: Visit) -> None:
    theatre.do(lambda: theatre.desk.rest("a:7700 leads run 'sentiment' (epoch 3)"))
    page = see()
    expect(page.locator("#state")).to_have_text("standing by")
    expect(page.locator("#reason")).to_have_text("a:7700 leads run 'sentiment' (epoch 3).")
    expect(page.locator("main")).to_be_hidden()
