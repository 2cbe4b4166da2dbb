"""Commands of private runs: what was spent, and by which keys members know each other."""

from pathlib import Path
from typing import Annotated

import typer

from lorand.config import load
from lorand.durable import state_folder
from lorand_worker.flags import Json, State
from lorand_worker.reporting import say

sums = typer.Typer(
    help="Secure sums (experimental) and statements: keys and roster of the members.",
    no_args_is_help=True,
)


def privacy(
    run: Annotated[
        Path | None,
        typer.Argument(help="A run file: say what noise its settings take. None: what was spent."),
    ] = None,
    state: State = None,
    json_output: Json = False,
) -> None:
    """Show the privacy budget spent and left in each run joined here, and what was released."""
    from lorand_worker import spending

    if run is not None:
        result, text = spending.expected(load(run))
    else:
        result, text = spending.listed(state or state_folder())
    say(result, text, json_output)


@sums.command()
def key(
    path: Annotated[Path, typer.Argument(help="Where to keep it: a new file, for you alone.")],
    json_output: Json = False,
) -> None:
    """Make this worker's identity key, and print the public key for the roster."""
    from lorand_worker import membership

    public = membership.new_key(path).public.hex()
    say({"file": str(path), "public": public}, f"wrote {path}\n{public}", json_output)


@sums.command()
def roster(
    path: Annotated[Path, typer.Argument(help="The roster's file.")],
    members: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME=KEY]...", help="Write it, of these; none: read it."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Write or read a roster, and print its digest: members compare it with each other."""
    from lorand.privacy.roster import Members
    from lorand_worker import membership

    found = membership.write_roster(path, members) if members else Members.read(path)
    digest = found.digest().hex()
    result = {"digest": digest, "members": {name: public.hex() for name, public in found.members}}
    lines = [f"{name}  {public.hex()}" for name, public in found.members]
    say(result, "\n".join([*lines, f"digest {digest}"]), json_output)
