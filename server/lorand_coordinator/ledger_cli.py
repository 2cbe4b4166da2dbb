"""lr-coordinator ledger: look into a ledger, check it, write it for others, copy it."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from lorand import heads, ledger
from lorand.errors import LedgerError
from lorand.heads import KeptHead
from lorand.privacy.roster import Members
from lorand_coordinator import backup_cli, show, verification
from lorand_coordinator.stating import Standing

app = typer.Typer(help="Read, export, back up and restore ledgers.", no_args_is_help=True)
app.command()(backup_cli.backup)
app.command()(backup_cli.restore)

LedgerFile = Annotated[
    str, typer.Argument(metavar="LEDGER", help="A file, postgresql://…#RUN, or an exported ledger.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


@app.command()
def verify(
    path: LedgerFile,
    key: Annotated[
        str, typer.Option(metavar="HEX", help="The coordinator's public key: its end is signed so.")
    ] = "",
    head: Annotated[
        Path | None,
        typer.Option(help="A head that a worker kept (*.head.json): the ledger has its history."),
    ] = None,
    roster: Annotated[
        Path | None,
        typer.Option(help="The workers' names and keys, from themselves: they signed this ledger."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Check chain, tree, signatures, every delta and every stored contribution; print the head."""
    found = verification.verify(
        path,
        heads.public_key(key) if key else None,
        _kept(head) if head else None,
        Members.read(roster) if roster else None,
    )
    position = found.position
    result: dict[str, Any] = {
        "entries": position.next_sequence,
        "committed": position.committed,
        "finished": position.finished,
        "contributions_checked": found.contributions,
        "signatures_checked": found.signatures,
        "head": position.head.hex(),
        "root": position.tree.root().hex(),
        "key": found.key.hex() if found.key else None,
        "run": position.run_digest.hex(),
        "coefficients_digest": ledger.coefficients_digest(position.coefficients).hex(),
    }
    if found.standing is not None:
        result |= {
            "statements_checked": found.standing.statements,
            "stated": found.standing.stated,
            "not_stated": [asdict(unstated) for unstated in found.standing.unstated],
        }
    if json_output:
        typer.echo(json.dumps(result))
        return
    signed = f"signed by {result['key']}" if found.key else "its end is not signed"
    typer.echo(
        f"whole: {result['entries']} entries, {result['committed']} rounds committed, "
        f"{found.contributions} contributions and {found.signatures} signatures checked\n"
        f"head {result['head']}\nroot {result['root']}\n{signed}"
    )
    if found.standing is not None:
        typer.echo(_told(found.standing, found.contributions))


def _told(standing: Standing, contributions: int) -> str:
    """What workers stand by, for people."""
    count = f"{standing.statements} statement{'s' * (standing.statements != 1)}"
    if not contributions:
        return f"this is the history of {count} by workers"
    lines = [
        f"{standing.stated} of {contributions} contributions are stated by their workers, in "
        f"{count}"
    ]
    for each in standing.unstated:
        lines.append(
            f"not stated: {each.contributions} of worker {each.worker} ({each.name!r}), rounds "
            f"{each.first_round} to {each.last_round}"
        )
    return "\n".join(lines)


def _kept(path: Path) -> KeptHead:
    try:
        return KeptHead.from_json(path.read_bytes())
    except OSError as error:
        raise LedgerError(f"cannot read {path}: {error}") from error


@app.command("show")
def show_entries(
    path: LedgerFile,
    last: Annotated[int, typer.Option(min=1, help="How many entries.")] = 20,
    json_output: Json = False,
) -> None:
    """Print the last entries, one a line."""
    for row in show.rows(path, last):
        typer.echo(json.dumps(row) if json_output else show.line(row))


@app.command()
def export(
    path: LedgerFile,
    target: Annotated[Path, typer.Argument(help="Where to write it.")],
    json_output: Json = False,
) -> None:
    """Write a portable ledger file, for `lr-worker replay` and for archives."""
    try:
        count = show.export(path, target)
    except OSError as error:
        raise LedgerError(f"cannot write {target}: {error}") from error
    size = target.stat().st_size
    typer.echo(
        json.dumps({"entries": count, "bytes": size, "path": str(target)})
        if json_output
        else f"wrote {count} entries, {size:,} bytes, to {target}"
    )
