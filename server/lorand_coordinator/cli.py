"""lr-coordinator: order the rounds of a run and keep its ledger."""

import json
import sys
import time
from collections import deque
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import grpc
import typer
from grpc_health.v1 import health_pb2, health_pb2_grpc
from rich.console import Console
from rich.live import Live

from lorand import credentials, logs, runfile
from lorand.config import load
from lorand.credentials import Credentials
from lorand.errors import ConfigError, ConnectionLost, LorandError
from lorand.logs import LogFormat, LogFormatFlag
from lorand.otel import OTel
from lorand.tracking import ReportTo, TrackingFolder
from lorand.v1 import status_pb2 as status
from lorand.v1 import status_pb2_grpc as status_service
from lorand_coordinator import (
    diagnostics,
    history,
    identity_cli,
    ledger_cli,
    ledgers,
    payoff,
    preflight,
    presets,
    refinement,
    run_lock,
    serving,
    show,
)
from lorand_coordinator.identity_cli import CredentialsFile, HostNames, IdentityFolder, Insecure
from lorand_coordinator.monitoring import Asked, Monitor
from lorand_coordinator.service import SERVED

EXIT_CODES = """Exit codes: 0 done; 2 wrong run file or flag; 5 refused; 6 ledger damaged, in use or
of another run; 7 coordinator not reached; 1 anything else; 130 interrupted."""

app = typer.Typer(
    help="Order the rounds of a LoRand run and keep its ledger.\n\n" + EXIT_CODES,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(ledger_cli.app, name="ledger")
for command in (
    identity_cli.invite,
    identity_cli.members,
    identity_cli.revoke,
    identity_cli.rotate,
    preflight.preflight,
):
    app.command()(command)

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]
Address = Annotated[str, typer.Argument(help="HOST:PORT of a running coordinator.")]
TIMEOUT_S = 5.0


def out(text: str) -> None:
    """Print to standard output."""
    typer.echo(text)


@app.command()
def init(
    path: Annotated[Path, typer.Argument(help="Where to write it.")] = Path("run.toml"),
    preset: Annotated[
        str, typer.Option(help=f"Settings of a method: {', '.join(sorted(presets.PRESETS))}.")
    ] = "",
    force: Annotated[bool, typer.Option(help="Overwrite an existing file.")] = False,
) -> None:
    """Write a commented run file to edit."""
    text = presets.render(preset)
    if path.exists() and not force:
        raise ConfigError(f"{path} exists; choose another name, or overwrite it with --force")
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error
    out(f"wrote {path}; next: lr-worker prepare {path}, then lr-coordinator serve {path}")


@app.command()
def serve(
    run: Annotated[Path, typer.Argument(help="The run file.")],
    address: Annotated[str, typer.Option(help="HOST:PORT; port 0 picks a free one.")] = "",
    ledger_at: Annotated[
        str, typer.Option("--ledger", help="The ledger: a file, or postgresql://… for many runs.")
    ] = "",
    signing_key: Annotated[
        Path | None,
        typer.Option(
            help="The key that signs the ledger, made if need be; several coordinators have copies "
            "of one. Default: beside the ledger, or beside the run file."
        ),
    ] = None,
    advertise: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Several coordinators: where the others reach this one, to pass calls on to it "
            "while it leads. Default: the address, with this machine's name for 0.0.0.0.",
        ),
    ] = "",
    roster: Annotated[
        Path | None,
        typer.Option(help="Secure sums: the members' roster; default: roster.json by the run."),
    ] = None,
    identity_dir: IdentityFolder = None,
    host_name: HostNames = None,
    insecure: Insecure = False,
    page: Annotated[
        str,
        typer.Option(
            metavar="HOST:PORT",
            help="Serve a page that shows the run, and /metrics, say at 127.0.0.1:7780; at an "
            "address that others reach it asks for a token.",
        ),
    ] = "",
    report_to: ReportTo = "",
    tracking_dir: TrackingFolder = None,
    otel: OTel = "",
    log_format: LogFormatFlag = LogFormat.TEXT,
    json_output: Json = False,
) -> None:
    """Serve a run until interrupted. Started again, it goes on where the ledger ends."""
    logs.configure(log_format)
    config = load(run)
    if address:
        service = config.service.model_copy(update={"address": address})
        config = config.model_copy(update={"service": service})
    identity_cli.check_addresses(config, insecure, advertise)
    beside = run.with_name(config.run.name)
    asked = Asked(
        page=page,
        report_to=report_to,
        token_file=beside.with_name(f"{beside.name}.page-token"),
        folder=tracking_dir or run.with_name("tracking"),
        otel=otel,
    )
    asked.check()
    identity = run_lock.read(run, config)
    location = ledger_at or config.service.ledger or run.with_name(f"{config.run.name}.ledger")
    serving.check_descriptors(config, several=ledgers.in_database(location))
    served = serving.Serving(
        config=config,
        ledger=location,
        identity=identity,
        # What is wrong with the roster or the noise is told now, not when somebody leads.
        summing=serving.summing_of(config, roster or run.with_name("roster.json")),
        signing_key=signing_key or serving.key_by(config, location, run),
        advertised=advertise,
        monitor=Monitor(config, location, asked),
        json_output=json_output,
    )
    with ExitStack() as stack:
        admission = None
        if not insecure:
            admission = identity_cli.admission(config, run, identity_dir, host_name or [])
            stack.callback(admission.close)
        serving.run(served, admission)


@app.command("status")
def status_command(
    address: Address = "127.0.0.1:7700",
    watch: Annotated[bool, typer.Option(help="Refresh until interrupted.")] = False,
    credentials_file: CredentialsFile = None,
    insecure: Insecure = False,
    json_output: Json = False,
) -> None:
    """Show a running coordinator: phase and why, rounds, workers, evaluations."""
    shown = credentials.find(address, credentials_file, insecure)
    if watch and not json_output:
        with Live(console=Console(), refresh_per_second=4) as live:
            while True:
                live.update(show.panel(_status(address, shown)))
                time.sleep(1)
    while True:
        answer = _status(address, shown)
        if json_output:
            out(json.dumps(show.as_dict(answer)))
        else:
            Console().print(show.panel(answer))
        if not watch:
            return
        time.sleep(1)


def _status(address: str, shown: Credentials | None) -> status.GetStatusResponse:
    with credentials.channel(address, shown) as channel:
        stub = status_service.StatusServiceStub(channel)
        try:
            return stub.GetStatus(status.GetStatusRequest(), timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise _not_reached(address, error) from error


def _not_reached(address: str, error: grpc.RpcError) -> ConnectionLost:
    detail = error.details() if isinstance(error, grpc.Call) else str(error)
    return ConnectionLost(
        f"no coordinator answers at {address} ({detail}); check the address, that "
        "`lr-coordinator serve` runs, and whether both sides or neither have --insecure"
    )


@app.command()
def health(
    address: Address = "127.0.0.1:7700",
    through: Annotated[
        bool,
        typer.Option(
            "--through",
            help="Exit 0 also where a coordinator stands by and passes calls on to one that leads.",
        ),
    ] = False,
    credentials_file: CredentialsFile = None,
    insecure: Insecure = False,
    json_output: Json = False,
) -> None:
    """Exit 0 when the coordinator serves, 7 when it does not (gRPC health protocol)."""
    shown = credentials.find(address, credentials_file, insecure)
    with credentials.channel(address, shown) as channel:
        stub: Any = health_pb2_grpc.HealthStub(channel)
        try:
            asked = health_pb2.HealthCheckRequest(service=SERVED if through else "")
            answer = stub.Check(asked, timeout=TIMEOUT_S)
        except grpc.RpcError as error:
            raise _not_reached(address, error) from error
    serving = answer.status == health_pb2.HealthCheckResponse.SERVING
    out(json.dumps({"serving": serving}) if json_output else ("serving" if serving else "draining"))
    if not serving:
        raise typer.Exit(ConnectionLost.exit_code)


LedgerInUse = Annotated[
    str,
    typer.Argument(
        metavar="LEDGER", help="The coordinator's: a file, or postgresql://…#RUN; it may be in use."
    ),
]


@app.command()
def diagnose(
    path: LedgerInUse,
    last: Annotated[int, typer.Option(min=1, help="Over how many rounds.")] = diagnostics.WINDOW,
    json_output: Json = False,
) -> None:
    """Tell from a ledger's scalars why a run does not learn, and what to do."""
    config, rounds = history.read(path)
    recent, comparison = diagnostics.Recent(config, last), payoff.Comparison()
    kept: deque[history.Round] = deque(maxlen=last)
    for part in rounds:
        kept.append(part)
        comparison = payoff.after(
            config,
            comparison,
            part.committed,
            part.scale_exponent,
            list(part.reports.values()),
            part.curvatures,
        )
    for part in kept:
        recent.add(part.scale_exponent, part.reports.values())
    content = show.figures(recent, comparison)
    out(json.dumps(content) if json_output else show.figures_text(content))


@app.command()
def refine(path: LedgerInUse, json_output: Json = False) -> None:
    """Print a schedule refined from a run's scalars, as lines for the next run's file."""
    config, rounds = history.read(path)
    norm = refinement.norm_for(config)
    observed = refinement.norms(config, rounds, norm)
    settings = {
        "schedule": "refined",
        "refined": refinement.points(refinement.refine(observed, norm)),
    }
    if json_output:
        out(json.dumps({"rounds": len(observed), "norm": norm, **settings}))
        return
    if len(observed) < config.run.rounds:
        done = f"{len(observed)} of {config.run.rounds}"
        out(f"# from {done} rounds: of the rest of the run nothing is known yet")
    out(f"# refined from the {norm} norms of {len(observed)} rounds; for a run with another name")
    out(runfile.lines({"optimizer": settings}))


def main() -> None:
    """Run the command; report errors as one sentence and an exit code."""
    try:
        app()
    except LorandError as error:
        Console(stderr=True, soft_wrap=True).print(f"error: {error}", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.exit(130)
