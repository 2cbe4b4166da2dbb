"""`lr-worker doctor`: whether this machine can take part, before it does."""

from pathlib import Path
from typing import Annotated, Any, Final

import typer

from lorand import findings
from lorand.findings import Check
from lorand_worker.doctor import connection, contents, machine
from lorand_worker.doctor.patient import Patient
from lorand_worker.flags import Columns, CredentialsFile, Device, Insecure, Json, Model, State
from lorand_worker.reporting import say
from lorand_worker.sources import parse

CHECKS: Final[tuple[tuple[str, Check[Patient]], ...]] = (
    ("versions", machine.versions),
    ("polling", machine.polling),
    ("processors", machine.processors),
    ("memory", machine.free_memory),
    ("device", machine.gpu),
    ("proxies", machine.proxies),
    ("state", machine.place_for_state),
    ("certificate", connection.certificate),
    ("port", connection.port),
    ("TLS", connection.tls),
    ("run", connection.run),
    ("data", contents.examples),
    ("model", contents.model),
    ("lengths", contents.lengths),
)


def doctor(
    address: Annotated[
        str, typer.Argument(help="HOST:PORT of the coordinator; without one: this machine alone.")
    ] = "",
    run: Annotated[
        Path | None, typer.Option(help="A run file, where no coordinator serves it yet.")
    ] = None,
    data: Annotated[
        Any,  # a Source: typer takes no unions
        typer.Option(parser=parse, metavar="DATA", help="Examples, as for join."),
    ] = None,
    columns: Columns = "",
    model: Model = None,
    device: Device = "auto",
    credentials_file: CredentialsFile = None,
    insecure: Insecure = False,
    state: State = None,
    json_output: Json = False,
) -> None:
    """Check machine, versions, GPU, network, certificate, data and model; say what to fix.

    Nothing is sent but the question which run is served. Exit code 1 when a check failed.
    """
    patient = Patient(
        *(address, run, data, columns, model, device, credentials_file, insecure, state)
    )
    found = findings.go_through(CHECKS, patient)
    say(findings.as_dict(found), findings.text(found), json_output)
    if code := findings.exit_code(found):
        raise typer.Exit(code)
