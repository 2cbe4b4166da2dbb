"""Commands about who may take part: invite, members, revoke, rotate."""

import json
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Annotated, Final

import typer

from lorand import transport
from lorand.config import RunConfig, load
from lorand.credentials import Role
from lorand.errors import ConfigError
from lorand_coordinator import ledgers
from lorand_coordinator.identity.admission import EVERYWHERE, Admission
from lorand_coordinator.identity.members import Listed

WARN_DAYS: Final = 14
"""`members` points at certificates that expire within so many days."""

IdentityFolder = Annotated[
    Path | None,
    typer.Option(
        "--identity-dir",
        help="The run's authority and members; default: NAME.identity by the run file.",
    ),
]
HostNames = Annotated[
    list[str] | None,
    typer.Option(
        "--host-name",
        help="Name or address by which workers reach this machine; may be repeated, the first goes "
        "into invitations. Default: those of last time, or the host of the address.",
    ),
]
Insecure = Annotated[
    bool,
    typer.Option("--insecure", help="Neither encrypt nor authenticate; on this machine alone."),
]
CredentialsFile = Annotated[
    Path | None,
    typer.Option(
        "--credentials",
        envvar="LORAND_CREDENTIALS",
        help="Credentials of a member; on the coordinator's machine: operator.pem in its "
        "--identity-dir. Default: where `lr-worker enrol` put them.",
    ),
]
RunFile = Annotated[Path, typer.Option("--run", help="The run file.")]
Name = Annotated[str, typer.Argument(help="The member's name.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def folder(config: RunConfig, run: Path, given: Path | None) -> Path:
    """Return where the identities of a run are."""
    return given or run.with_name(f"{config.run.name}.identity")


def check_addresses(config: RunConfig, insecure: bool, advertised: str = "") -> None:
    """Raise ConfigError when the run cannot, or with --insecure must not, be served there.

    Or when other coordinators cannot reach this one where it is `advertised`, if it is.
    """
    host, _ = transport.split(config.service.address)
    transport.split(enrolment_address(config))
    if advertised:
        where, port = transport.split(advertised)
        if where in EVERYWHERE or not port or (insecure and not transport.is_loopback(where)):
            raise ConfigError(
                f"--advertise {advertised}: give the name or address and the port at which the "
                "other coordinators reach this one; with --insecure, 127.0.0.1 and the port"
            )
    if insecure and not transport.is_loopback(host):
        raise ConfigError(
            f"--insecure serves this machine alone, and {host} is reached from others: leave the "
            "flag away and invite workers (`lr-coordinator invite`), or serve 127.0.0.1"
        )


def admission(config: RunConfig, run: Path, given: Path | None, host_names: list[str]) -> Admission:
    """Return who is let into a run that is to be served. Raises ConfigError."""
    place, name = folder(config, run, given), config.run.name
    made = Admission.create_or_open(place, name, members_at(config))
    made.certify(config.service.address, host_names)
    return made


def opened(config: RunConfig, run: Path, given: Path | None) -> Admission:
    """Return who is let into a run that was served. Raises ConfigError, StoreUnavailable."""
    return Admission.open(folder(config, run, given), config.run.name, members_at(config))


def members_at(config: RunConfig) -> str:
    """Return the URL of the database with a run's members; empty: they are in its folder.

    Raises ConfigError when it is something else.
    """
    url = config.service.members
    if url and not ledgers.in_database(url):
        raise ConfigError(
            f"service.members = {url!r} is no database: give postgresql://…, or leave it empty for "
            "members.db in the identity folder"
        )
    return url


def enrolment_address(config: RunConfig) -> str:
    """Return the HOST:PORT at which new members enrol; port 0 picks a free one."""
    if config.service.enrol_address:
        return config.service.enrol_address
    host, port = transport.split(config.service.address)
    return transport.join(host, port + 1 if port else 0)


@contextmanager
def _opened(run: Path, given: Path | None) -> Iterator[Admission]:
    config = load(run)
    with closing(opened(config, run, given)) as found:
        yield found


def invite(
    name: Name,
    role: Annotated[Role, typer.Option(help="What the member may do.")] = Role.WORKER,
    hours: Annotated[
        float, typer.Option(min=0.01, max=8760, help="How long the invitation is open.")
    ] = 24.0,
    run: RunFile = Path("run.toml"),
    identity_dir: IdentityFolder = None,
    json_output: Json = False,
) -> None:
    """Print one line that makes its bearer a member, once: send it over a channel you trust."""
    with _opened(run, identity_dir) as found:
        made = found.invite(name, role, hours)
    typer.echo(json.dumps({"invitation": made.line()}) if json_output else made.line())


def revoke(
    name: Name,
    run: RunFile = Path("run.toml"),
    identity_dir: IdentityFolder = None,
    json_output: Json = False,
) -> None:
    """End a membership, or withdraw an invitation; open connections end within seconds."""
    with _opened(run, identity_dir) as found:
        found.members.revoke(name)
    typer.echo(json.dumps({"revoked": name}) if json_output else f"{name} is no member any more")


def members(
    run: RunFile = Path("run.toml"),
    identity_dir: IdentityFolder = None,
    json_output: Json = False,
) -> None:
    """List members and open invitations, and until when they are good."""
    with _opened(run, identity_dir) as found:
        listed, present = found.members.listed(), found.members.clock()
    if json_output:
        lines = [
            {
                "name": each.name,
                "role": each.role.value,
                "state": each.state,
                "days_left": round((each.expires - present) / 86400, 2),
            }
            for each in listed
        ]
        typer.echo(json.dumps({"members": lines}))
        return
    for each in listed:
        typer.echo(line(each, present))


def line(listed: Listed, present: float) -> str:
    """Return what is shown of a member at a time, seconds since the epoch."""
    days = (listed.expires - present) / 86400
    text = f"{listed.name}  {listed.role}  {listed.state}"
    if listed.state == "invited":
        return f"{text}, for {24 * days:.1f} h"
    if listed.state != "member":
        return text
    warning = "; WARNING: renew with `lr-worker enrol --renew`" if days < WARN_DAYS else ""
    return f"{text}, for {days:.0f} days{warning}"


def rotate(
    run: RunFile = Path("run.toml"),
    identity_dir: IdentityFolder = None,
    host_name: HostNames = None,
    json_output: Json = False,
) -> None:
    """Replace the coordinator's keys and certificates; `serve` takes them when it starts again."""
    with _opened(run, identity_dir) as found:
        names = found.rotate(host_name or [])
    text = (
        f"new certificate for {', '.join(names)}: start `serve` again; members need not do anything"
    )
    typer.echo(json.dumps({"names": names}) if json_output else text)
