"""`lr-coordinator preflight`: what a run will need, looked at before it starts. Nothing is made.

Each check of the table is a function of the plan that returns a finding.
"""

import os
import shutil
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final

import typer

from lorand import findings, free_memory, ledger, transport, wire_size
from lorand.config import RunConfig, load
from lorand.credentials import Role
from lorand.errors import ConfigError, LedgerError
from lorand.findings import Check, Finding, failed, ok, warning
from lorand.privacy import plan
from lorand.privacy.roster import Roster
from lorand_coordinator import identity_cli, ledgers, run_lock
from lorand_coordinator.identity_cli import HostNames, IdentityFolder, Insecure
from lorand_coordinator.ledgers import Location
from lorand_coordinator.store import SqliteStore, in_use

NUMBERS_KEPT: Final = 10
"""Numbers of eight bytes that are kept a direction: coefficients, moments, feedback."""


@dataclass(frozen=True)
class Planned:
    """A run as `serve` would be told of it."""

    run: Path
    config: RunConfig
    ledger: Location
    identity_dir: Path | None = None
    host_names: tuple[str, ...] = ()
    insecure: bool = False
    roster: Path | None = None

    @property
    def expected(self) -> int:
        """Participants of a round, at least."""
        rounds = self.config.rounds
        return max(rounds.quorum, rounds.start_with)


def preflight(
    run: Annotated[Path, typer.Argument(help="The run file.")],
    address: Annotated[str, typer.Option(help="HOST:PORT, as for serve.")] = "",
    ledger_at: Annotated[str, typer.Option("--ledger", help="The ledger, as for serve.")] = "",
    identity_dir: IdentityFolder = None,
    host_name: HostNames = None,
    insecure: Insecure = False,
    roster: Annotated[
        Path | None, typer.Option(help="Secure sums: the members' roster, as for serve.")
    ] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")] = False,
) -> None:
    """Look at a whole run before it starts: settings, ledger, ports, members, bytes, privacy."""
    import json

    found = examine(run, address, ledger_at, identity_dir, tuple(host_name or ()), insecure, roster)
    typer.echo(json.dumps(findings.as_dict(found)) if json_output else findings.text(found))
    if code := findings.exit_code(found):
        raise typer.Exit(code)


def examine(
    run: Path,
    address: str = "",
    ledger_at: str = "",
    identity_dir: Path | None = None,
    host_names: tuple[str, ...] = (),
    insecure: bool = False,
    roster: Path | None = None,
) -> list[Finding]:
    """Return all findings; without a valid run file there is one."""
    try:
        config = load(run)
    except ConfigError as error:
        return [Finding(findings.Level.FAILED, str(error), "settings")]
    if address:
        service = config.service.model_copy(update={"address": address})
        config = config.model_copy(update={"service": service})
    location = ledger_at or config.service.ledger or run.with_name(f"{config.run.name}.ledger")
    planned = Planned(
        *(run, config, location, identity_dir, host_names, insecure),
        roster or run.with_name("roster.json"),
    )
    return findings.go_through(CHECKS, planned)


def settings(planned: Planned) -> Finding:
    """What the run file says fits together: it would not have loaded otherwise."""
    config = planned.config
    what = f"{config.run.name}: {config.run.rounds} rounds of {config.estimator.kind}"
    if config.rounds.start_with == config.rounds.quorum == 1:
        return warning(
            f"{what}, with a quorum of 1: a single worker decides every round; set rounds.quorum "
            "to 2 or more unless that is meant"
        )
    return ok(f"{what}, a quorum of {config.rounds.quorum}")


def identity(planned: Planned) -> Finding:
    """run.lock is there, and says of which model the run is."""
    found = run_lock.read(planned.run, planned.config)
    if found is None:
        return warning(
            "there is no run.lock: model and trained tensors are the first worker's, whoever that "
            f"is; `lr-worker prepare {planned.run}` on a machine with the model decides it now"
        )
    tensors = found.manifest.tensors
    weights = found.manifest.num_weights
    size = planned.config.directions.pool_size
    text = f"{len(tensors)} tensors of {weights:,} weights, base {found.base_digest.hex()[:16]}"
    if size > weights:
        return warning(
            f"{text}: fewer than the {size:,} directions of the pool; a smaller "
            "directions.pool_size does the same with less to send"
        )
    return ok(text)


def history(planned: Planned) -> Finding | None:
    """A ledger that is there already is of this run, and nobody else writes to it."""
    if ledgers.in_database(planned.ledger):
        ledgers.check_installed()
        return ok("in a database: serve says whether it is reached")
    path = Path(planned.ledger)
    if not path.exists():
        return _new_ledger(planned, path)
    if in_use(path):
        return failed(f"{path} is in use by another coordinator; stop that one first")
    store = SqliteStore(path, read_only=True)
    try:
        first = next(iter(store.entries(0, 1)), None)
        entries = len(store)
    finally:
        store.close()
    if first is None:
        return ok(f"{path} is there, and empty")
    start = ledger.origin_of(first)
    if start.config.digest() != planned.config.digest():
        raise LedgerError(
            f"{path} is of run {start.config.run.name!r} with other settings: give the run another "
            "name, or another ledger, or restore its run file"
        )
    here = run_lock.read(planned.run, planned.config)
    if here is not None and here != start.identity:
        raise LedgerError(
            f"{path} is of another base model, tokenizer or trainable set than run.lock: restore "
            "the run.lock of this run, or give another ledger"
        )
    return ok(f"{path} has {entries} entries of this run, which goes on there")


def _new_ledger(planned: Planned, path: Path) -> Finding:
    folder = _standing(path.parent)
    if not os.access(folder, os.W_OK | os.X_OK):
        return failed(
            f"{path} cannot be made: {folder} is not this user's to write; choose another place "
            "with --ledger or service.ledger"
        )
    a_round = wire_size.of_round(planned.config, planned.expected)
    needed, free = a_round.stored * planned.config.run.rounds, shutil.disk_usage(folder).free
    if needed > free:
        return failed(
            f"{path} will take about {needed:,} bytes, and {free:,} are free there: make room, or "
            "choose another place with --ledger"
        )
    return ok(f"{path} will be made, and take about {needed:,} bytes")


def _standing(folder: Path) -> Path:
    """The nearest folder that is there."""
    folder = folder.absolute()
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def ports(planned: Planned) -> Finding:
    """The ports that are served are free."""
    identity_cli.check_addresses(planned.config, planned.insecure)
    wanted = [planned.config.service.address]
    if not planned.insecure:
        wanted.append(identity_cli.enrolment_address(planned.config))
    for each in wanted:
        host, port = transport.split(each)
        try:
            family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            with socket.socket(family, kind) as probe:
                # As gRPC does: a connection of before that is not forgotten yet does no harm.
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(place)
        except OSError as error:
            return failed(
                f"cannot listen on {each} ({error.strerror}): stop what uses the port, or set "
                "service.address" + (" and enrol_address" if len(wanted) > 1 else "")
            )
    return ok(f"{' and '.join(wanted)} {'are' if len(wanted) > 1 else 'is'} free")


def admission(planned: Planned) -> Finding | None:
    """The identity folder can be used, and its members are enough for a quorum."""
    if planned.insecure:
        return warning("--insecure: for this machine alone, without certificates")
    folder = identity_cli.folder(planned.config, planned.run, planned.identity_dir)
    host, _ = transport.split(planned.config.service.address)
    if not (folder / "authority.pem").exists():
        if not os.access(_standing(folder), os.W_OK | os.X_OK):
            return failed(
                f"{folder} cannot be made: {_standing(folder)} is not this user's to write; choose "
                "another --identity-dir"
            )
        if host in ("0.0.0.0", "::") and not planned.host_names:
            return failed(
                f"{host} is every address of this machine: say with --host-name by which name or "
                "address workers reach it"
            )
        return warning(
            f"{folder} will be made when the run is served; then invite {planned.expected} "
            "workers or more (`lr-coordinator invite NAME`)"
        )
    if identity_cli.members_at(planned.config):
        ledgers.check_installed()
        return ok(f"{folder} is there, its members in a database: serve says whether it is reached")
    found = identity_cli.opened(planned.config, planned.run, planned.identity_dir)
    try:
        workers = [each for each in found.members.listed() if each.role == Role.WORKER]
    finally:
        found.close()
    members = sum(each.state == "member" for each in workers)
    invited = sum(each.state == "invited" for each in workers)
    text = f"{folder} has {members} workers, and {invited} invited"
    if members + invited < planned.expected:
        return warning(
            f"{text}; rounds begin with {planned.expected}: invite more (`lr-coordinator invite "
            "NAME`), or set rounds.quorum and rounds.start_with lower"
        )
    return ok(text)


def room(planned: Planned) -> Finding:
    """As many workers may connect as a round waits for."""
    most = planned.config.service.max_workers
    if most < planned.expected:
        return failed(
            f"service.max_workers = {most} is below the {planned.expected} that rounds wait for: "
            "raise it"
        )
    return ok(f"up to {most} workers may connect")


def bytes_sent(planned: Planned) -> Finding:
    """What a round and the whole run send."""
    config = planned.config
    a_round = wire_size.of_round(config, planned.expected)
    whole = config.run.rounds * (a_round.up.socket + a_round.down.socket)
    return ok(
        f"about {a_round.up.socket:,} bytes up and {a_round.down.socket:,} down a worker and "
        f"round, {whole:,} a worker in all {config.run.rounds} rounds, before TCP"
    )


def memory(planned: Planned) -> Finding | None:
    """The numbers of a round fit into this machine."""
    config = planned.config
    most = min(config.service.max_workers, config.rounds.participants or 2**31)
    needed = 8 * NUMBERS_KEPT * config.directions.pool_size
    needed += 2 * most * wire_size.of_round(config, 1).up.message
    available = free_memory.free_bytes()
    if available is None:
        return None
    text = (
        f"about {1 + needed // 10**6:,} MB for a round of {most} workers, beside the program's own"
    )
    if needed > available:
        return failed(
            f"{text}, and {available // 10**6:,} MB are free: lower service.max_workers or "
            "rounds.participants"
        )
    return ok(text)


def privacy(planned: Planned) -> Finding | None:
    """The noise of a private run can be calculated, and its roster is there."""
    config = planned.config
    section = config.privacy
    if not section.noised:
        return ok("none: scalars leave without noise; docs/privacy.md says what they tell")
    if section.mode == "secure-sum":
        assert planned.roster is not None
        Roster.read(planned.roster)
    if section.differences:
        made = plan.planned_differences(config)
        multiplier = f"{made.restart.multiplier:.4g} and {made.increment.multiplier:.4g}"
    else:
        multiplier = f"{plan.planned(config).multiplier:.4g}"
    text = (
        f"epsilon {section.target_epsilon:g} at delta {section.delta:g} over {config.releases} "
        f"rounds takes a noise multiplier of {multiplier}, {section.mode}"
    )
    if not section.spare_rounds:
        return warning(
            f"{text}; no round to spare: each that is abandoned is one that workers cannot answer "
            "at the end; set privacy.spare_rounds"
        )
    return ok(text)


CHECKS: Final[tuple[tuple[str, Check[Planned]], ...]] = (
    ("settings", settings),
    ("run.lock", identity),
    ("ledger", history),
    ("ports", ports),
    ("members", admission),
    ("workers", room),
    ("bytes", bytes_sent),
    ("memory", memory),
    ("privacy", privacy),
)
