"""How a coordinator is watched: page, metrics, trackers, traces; each only where asked for."""

import asyncio
import logging
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager, closing
from dataclasses import dataclass, field
from importlib import util
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lorand import otel, tracking, transport
from lorand.config import RunConfig
from lorand.errors import ConfigError, LorandError
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import ledgers
from lorand_coordinator.hub import Hub
from lorand_coordinator.ledgers import Location
from lorand_coordinator.spending import Spending
from lorand_coordinator.tally import Outcome

if TYPE_CHECKING:
    from lorand_coordinator.page.desk import PageDesk
    from lorand_coordinator.traces import Traces

LIBRARIES: Final = ("starlette", "uvicorn", "prometheus_client")

log = logging.getLogger("lorand.coordinator")


@dataclass(frozen=True)
class Asked:
    """What the operator wants to watch the run with."""

    page: str = ""
    """HOST:PORT of the page and of /metrics; empty: none."""
    report_to: str = ""
    """Trackers, with commas."""
    token_file: Path = Path("page.token")
    """Where the token of a page that others can reach is kept."""
    folder: Path = Path("tracking")
    """Where trackers that keep files keep them."""
    otel: str = ""
    """Where OpenTelemetry sends to; empty: nowhere."""

    def check(self) -> None:
        """Raise ConfigError for what cannot be, before anything is started."""
        tracking.names_in(self.report_to)
        otel.check(self.otel)
        if self.page:
            transport.split(self.page)
            missing = [name for name in LIBRARIES if util.find_spec(name) is None]
            if missing:
                raise ConfigError(
                    f"--page needs {', '.join(missing)}: pip install 'lorand[page]', or leave "
                    "--page away"
                )


@dataclass
class Monitor:
    """Follows whichever hub leads the run in this process, and shows it."""

    config: RunConfig
    ledger: Location
    asked: Asked = field(default_factory=Asked)
    url: str = ""
    """Where the page is, once it is served; with its token, if it has one."""

    def __post_init__(self) -> None:
        """Watch nothing yet."""
        self._hub: Hub | None = None
        self._desk: PageDesk | None = None
        self._written: list[pb.Evaluation] = []
        self._trackers = tracking.Background({})
        self._spending = Spending(self.config)
        self._traces: Traces | None = None

    @asynccontextmanager
    async def running(self) -> AsyncIterator["Monitor"]:
        """Serve the page, write and send meanwhile. Raises ConfigError when it cannot."""
        asked, config = self.asked, self.config
        async with AsyncExitStack() as stack:
            self._trackers = tracking.open_all(asked.report_to, config, "coordinator", asked.folder)
            # Closing waits for slow trackers, the loop does not.
            stack.push_async_callback(asyncio.to_thread, self._trackers.close)
            stack.callback(self._track_the_end)
            if asked.page or asked.otel:
                await stack.enter_async_context(_meanwhile(self._spending.keep_fresh()))
            if asked.otel:
                await stack.enter_async_context(self._tracing())
            if asked.page:
                await stack.enter_async_context(self._page())
            yield self

    def lead(self, hub: Hub) -> None:
        """Watch this hub from now on."""
        self._hub, self._written = hub, hub.sequencer.tally.evaluations[-1:]
        self._spending.hub = hub
        hub.sequencer.observers.append(self._track)
        if self._traces is not None:
            self._traces.lead(hub)
        if self._desk is not None:
            self._desk.lead(hub)

    def rest(self, reason: str) -> None:
        """Watch no hub: this coordinator leads nothing."""
        self._hub = self._spending.hub = None
        if self._traces is not None:
            self._traces.rest()
        if self._desk is not None:
            self._desk.rest(reason)

    def _track(self, outcome: Outcome) -> None:
        """Have a committed round written to the trackers, and what evaluators posted since."""
        assert self._hub is not None
        values: dict[str, float | None] = {
            "loss": outcome.loss,
            "signal_to_noise": outcome.signal_to_noise,
            "workers": outcome.workers,
            "code_bytes": outcome.code_bytes,
            "abandoned": self._hub.sequencer.engine.abandoned,
        }
        self._trackers.log(outcome.committed, values | self._posted(self._hub))

    def _posted(self, hub: Hub) -> dict[str, float | None]:
        """Return what evaluators posted since this was asked last; of each the newest."""
        values: dict[str, float | None] = {}
        evaluations = hub.sequencer.tally.evaluations
        for each in reversed(evaluations):
            if self._written and each is self._written[0]:
                break
            values.setdefault(f"accuracy/{each.evaluator}", each.accuracy)
            values.setdefault(f"evaluation_loss/{each.evaluator}", each.loss)
        self._written = evaluations[-1:]
        return values

    def _track_the_end(self) -> None:
        """Have what was posted after the last round written, too."""
        if self._hub is not None:
            engine = self._hub.sequencer.engine
            self._trackers.log(engine.committed, self._posted(self._hub))

    @asynccontextmanager
    async def _tracing(self) -> AsyncIterator[None]:
        from lorand import otlp
        from lorand_coordinator.traces import Traces

        about = {"lorand.run": self.config.run.name}
        sender = otlp.connected(self.asked.otel, "lorand-coordinator", socket.gethostname(), about)
        self._traces = Traces(self.config, sender, self._spending)
        try:
            async with _meanwhile(self._traces.keep_fresh()):
                yield
        finally:
            self._traces.refresh()
            self._traces = None
            await asyncio.to_thread(sender.close)

    @asynccontextmanager
    async def _page(self) -> AsyncIterator[None]:
        from lorand_coordinator.page import access, server
        from lorand_coordinator.page.desk import PageDesk

        host, _ = transport.split(self.asked.page)
        alone = transport.is_loopback(host)
        token = "" if alone else access.token_at(self.asked.token_file)
        listening = server.listen(self.asked.page)
        at = transport.join(host, listening.getsockname()[1])
        self.url = f"http://{at}/" + (f"?token={token}" if token else "")
        if not alone:
            log.warning(
                "the page at %s is reached from other machines, unencrypted: whoever is on the way "
                "can read the run's status and the link; put TLS before it, or use an SSH tunnel",
                at,
            )
        # Cookies are a host's, whatever the port: pages beside each other have names of their own.
        gate = access.Gate(token, f"{access.COOKIE}_{listening.getsockname()[1]}")
        desk = PageDesk(self.config, self._read_curve, lambda: self._spending.spent)
        self._desk = desk
        async with server.served(desk, gate, listening), _meanwhile(desk.keep_fresh()):
            try:
                yield
            finally:
                self._desk = None

    def _read_curve(self) -> list[Outcome]:
        """Read the rounds so far from the ledger; none where that fails, which is only a plot."""
        from lorand_coordinator.page import curve

        try:
            place = self.ledger
            if ledgers.in_database(place) and "#" not in str(place):
                place = f"{place}#{self.config.run.name}"
            with closing(ledgers.reader(place)) as store:
                return list(curve.read(self.config, store))
        except LorandError as error:
            log.warning("the page shows rounds from now on alone: %s", error)
            return []


@asynccontextmanager
async def _meanwhile(doing: Coroutine[None, None, None]) -> AsyncIterator[None]:
    """Do something until what is inside ends; a fault of it is told, and ends nothing else."""
    task = asyncio.create_task(doing)
    task.add_done_callback(_tell)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


def _tell(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("the run is watched no more: %s", error, exc_info=error)
