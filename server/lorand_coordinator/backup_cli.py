"""`lr-coordinator ledger backup` and `restore`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from lorand.ledger import Position
from lorand_coordinator import backup as backups

Json = Annotated[bool, typer.Option("--json", help="Print JSON for scripts.")]


def backup(
    source: Annotated[
        str,
        typer.Argument(
            metavar="LEDGER",
            help="The coordinator's: a file, or postgresql://…#RUN; it may be in use.",
        ),
    ],
    target: Annotated[Path, typer.Argument(help="A new file.")],
    json_output: Json = False,
) -> None:
    """Copy a whole ledger to a file, checked; a coordinator can go on with it."""
    _told("backed up", backups.backup(source, target), json_output)


def restore(
    source: Annotated[Path, typer.Argument(metavar="BACKUP", help="What backup wrote.")],
    target: Annotated[
        str, typer.Argument(metavar="LEDGER", help="A new file, or postgresql://… without the run.")
    ],
    json_output: Json = False,
) -> None:
    """Copy a backup to where a coordinator finds it. Stop the run's coordinators first."""
    _told("restored", backups.restore(source, target), json_output)


def _told(done: str, position: Position, json_output: bool) -> None:
    content = {
        "entries": position.next_sequence,
        "committed": position.committed,
        "head": position.head.hex(),
    }
    text = (
        f"{done}: {position.next_sequence} entries, {position.committed} rounds committed, all "
        f"checked\nhead {position.head.hex()}"
    )
    typer.echo(json.dumps(content) if json_output else text)
