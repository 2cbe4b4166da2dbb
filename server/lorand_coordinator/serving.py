"""Serving a run until interrupted: alone on a ledger's file, or as one of several on a database."""

import asyncio
import json
import logging
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Final

import typer

from lorand import transport
from lorand.config import RunConfig
from lorand.errors import ConfigError
from lorand.manifest import Identity
from lorand.privacy import plan
from lorand.privacy.roster import Roster
from lorand_coordinator import identity_cli, ledgers, signing
from lorand_coordinator.hub import Hub
from lorand_coordinator.identity import enrolment
from lorand_coordinator.identity.admission import Admission
from lorand_coordinator.ledgers import Location
from lorand_coordinator.masked import SecureSum
from lorand_coordinator.monitoring import Monitor
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.service import serve
from lorand_coordinator.store import SqliteStore
from lorand_coordinator.summing import CentralSum, Summing

DESCRIPTORS: Final = 64
"""For the ledger, the members' file and the process's own."""

MakeSumming = Callable[[], Summing | None]

log = logging.getLogger("lorand.coordinator")


@dataclass(frozen=True)
class Serving:
    """A run as a coordinator was told to serve it."""

    config: RunConfig
    ledger: Location
    identity: Identity | None
    summing: MakeSumming
    signing_key: Path
    advertised: str
    """See `standby.Coordinator`."""
    monitor: Monitor
    json_output: bool

    def out(self, content: dict[str, object], text: str) -> None:
        """Say what happens, for scripts or for people, at once."""
        typer.echo(json.dumps(content) if self.json_output else text)
        sys.stdout.flush()


def check_descriptors(config: RunConfig, *, several: bool) -> None:
    """See that as many connections as are let in can be open. Raises ConfigError.

    One of `several` coordinators passes all their calls on, on connections of its own.
    """
    connections = transport.most_connections(config)
    needed = connections + enrolment.MAX_CALLS + DESCRIPTORS
    needed += ceil(connections / transport.STREAMS) if several else 0
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < needed:
        if hard != resource.RLIM_INFINITY and hard < needed:
            raise ConfigError(
                f"{config.service.max_workers} workers (service.max_workers) take {needed} file "
                f"descriptors, and this process may open {hard}: raise the limit (`ulimit -n "
                f"{needed}`, or LimitNOFILE={needed} of a systemd unit), or lower "
                "service.max_workers"
            )
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def key_by(config: RunConfig, ledger: Location, run: Path) -> Path:
    """Return where the key that signs a ledger is, unless told otherwise."""
    shared = ledgers.in_database(ledger)
    return signing.key_beside(
        run.with_name(f"{config.run.name}.ledger") if shared else Path(ledger)
    )


def summing_of(config: RunConfig, roster: Path) -> MakeSumming:
    """Return what makes the noisy sums of a run that has them, anew for each time it is led.

    The noise is calculated once, here. Raises ConfigError.
    """
    if not config.privacy.summed:
        return lambda: None
    members = Roster.read(roster) if config.privacy.mode == "secure-sum" else None
    log.info("calculating the noise of the sums")
    multiplier = plan.planned(config).multiplier
    if members is None:
        return partial(CentralSum, config, multiplier)
    return partial(SecureSum, config, members, multiplier)


def run(serving: Serving, admission: Admission | None) -> None:
    """Serve until SIGINT or SIGTERM. Raises ConfigError, LedgerError."""
    if ledgers.in_database(serving.ledger):
        if serving.signing_key.exists():
            signing.key_at(serving.signing_key)
        asyncio.run(_share(serving, admission))
    else:
        with closing(SqliteStore(serving.ledger)) as store:
            key = signing.key_at(serving.signing_key)
            sequencer = Sequencer(serving.config, store, serving.identity, serving.summing(), key)
            asyncio.run(_alone(serving, sequencer, admission))
    log.info("stopped; the ledger is whole")


def _interrupted() -> asyncio.Event:
    """Return an event that SIGINT and SIGTERM set; a second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    signals = (signal.SIGINT, signal.SIGTERM)

    def ask() -> None:
        log.info("stopping; asked again, it ends at once")
        stop.set()
        for number in signals:
            loop.remove_signal_handler(number)

    for number in signals:
        loop.add_signal_handler(number, ask)
    return stop


async def _alone(serving: Serving, sequencer: Sequencer, admission: Admission | None) -> None:
    """Serve a run whose ledger is a file."""
    config, monitor = sequencer.config, serving.monitor
    key = sequencer.key.public if sequencer.key else b""
    stop = _interrupted()

    def ready(bound: str, enrolment: str) -> None:
        where = {"address": bound, "enrolment": enrolment, "key": key.hex(), "page": monitor.url}
        serving.out(
            {"event": "listening", **where, "run": config.run.name},
            f"run {config.run.name!r}: {sequencer.engine.committed} of {config.run.rounds} "
            f"rounds committed, {len(sequencer.store)} entries; listening on {bound}"
            + (f"; members enrol at {enrolment}" if enrolment else ", for this machine alone")
            + f"\nits ledger is signed by {key.hex()}"
            + (f"\nits page is {monitor.url}" if monitor.url else ""),
        )

    hub = Hub(sequencer)
    async with monitor.running():
        monitor.lead(hub)
        await serve(
            hub,
            on_ready=ready,
            until=stop,
            admission=admission,
            enrol_at=identity_cli.enrolment_address(config),
        )


async def _share(serving: Serving, admission: Admission | None) -> None:
    """Be one of several coordinators of a run whose ledger is in a database."""
    ledgers.check_installed()
    from lorand_coordinator import standby
    from lorand_coordinator.store_postgres import PostgresStore

    name, monitor = serving.config.run.name, serving.monitor

    def take_over(config: RunConfig, leader: str) -> Sequencer:
        store = PostgresStore(str(serving.ledger), config.run.name, leader=leader)
        try:
            # The key only now: who leads first makes it, and nobody else writes beside it.
            key = signing.shared_key(serving.signing_key, store)
            sequencer = Sequencer(config, store, serving.identity, serving.summing(), key)
            store.begin_lease()
            return sequencer
        except BaseException:
            store.close()
            raise

    def tell(event: str, address: str, text: str) -> None:
        content: dict[str, object] = {"event": event, "address": address, "run": name, "text": text}
        if event == "listening":
            content["page"] = monitor.url
            text += f"; its page is {monitor.url}" if monitor.url else ""
        serving.out(content, f"run {name!r}, {address}: {event}; {text}")

    async with monitor.running():
        coordinator = standby.Coordinator(
            serving.config, take_over, tell, admission, monitor, serving.advertised
        )
        await standby.serve(coordinator, _interrupted())
