"""What commands that talk to a coordinator share: `enrol`, and links that show credentials."""

import socket
from pathlib import Path
from typing import Annotated

import typer

from lorand import credentials, ledger
from lorand.card import Facts
from lorand.credentials import Credentials
from lorand.errors import ConfigError
from lorand.ledger import Position
from lorand_worker import sources
from lorand_worker.flags import CredentialsFile, Json, State
from lorand_worker.link import Link
from lorand_worker.reporting import say
from lorand_worker.sources import Source

POSITION_GIVE_UP_S = 30.0


def enrol(
    target: Annotated[
        str,
        typer.Argument(
            metavar="INVITATION",
            help="The line of `lr-coordinator invite`, or - to read it from standard input; with "
            "--renew: HOST:PORT of the coordinator.",
        ),
    ],
    renew: Annotated[
        bool, typer.Option("--renew", help="Replace key and certificate before they expire.")
    ] = False,
    credentials_file: CredentialsFile = None,
    state: State = None,
    json_output: Json = False,
) -> None:
    """Become a member of a run: make a key that stays here, and have it certified."""
    from lorand_worker import enrolment

    if target == "-":
        target = typer.get_text_stream("stdin").readline()
    if renew:
        present = credentials.find(target, credentials_file, False, state)
        assert present is not None
        made, address = enrolment.renew(target, present), target
    else:
        made, address = enrolment.enrol(target, credentials_file, state)
    subject, until = made.subject, f"{made.expires:%Y-%m-%d}"
    flag = f" --credentials {credentials_file}" if credentials_file is not None else ""
    say(
        {
            "name": subject.name,
            "role": subject.role.value,
            "run": subject.run,
            "address": address,
            "credentials": str(made.path),
            "valid_until": made.expires.isoformat(),
        },
        f"{subject.name!r} is a member of the run {subject.run!r} as {subject.role}, until {until} "
        f"by the coordinator's clock\nwrote {made.path}; its key never leaves this machine\n"
        f"the coordinator is at {address}{flag}",
        json_output,
    )


def connect(
    address: str, give_up_s: float, given: Path | None, insecure: bool, state: Path | None = None
) -> Link:
    """Return a link that shows the credentials for this coordinator. Raises ConfigError."""
    return Link(address, give_up_s, credentials.find(address, given, insecure, state))


def name_of(shown: Credentials | None, chosen: str, data: Source) -> str:
    """Return the name to take part with: the certificate's, where there is one.

    Raises ConfigError when another one was chosen.
    """
    if shown is None:
        return chosen or f"{socket.gethostname()}-{sources.stem(data)}"[: credentials.MAX_NAME]
    if chosen not in ("", shown.subject.name):
        raise ConfigError(
            f"{shown.path} is of {shown.subject.name!r}, not of {chosen!r}: leave --name away, or "
            "give the --credentials of that member"
        )
    return shown.subject.name


def position(
    source: str, given: Path | None, insecure: bool, facts: Facts | None = None
) -> Position:
    """Return where a ledger ends: a file's, or a running coordinator's; note what it tells."""
    facts = facts or Facts()
    path = Path(source)
    if path.exists() or ":" not in source:
        return ledger.replay(facts.reading(ledger.read_file(path)))
    link = connect(source, POSITION_GIVE_UP_S, given, insecure)
    try:
        return link.persist(lambda: ledger.replay(facts.reading(link.entries(0))), lambda why: None)
    finally:
        link.close()
