#!/usr/bin/env python3
"""Write an invitation for each name that is no member yet, one file a name.

Started again it replaces invitations that were not used, since they expire. Members are left as
they are, and so is whoever was revoked.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lorand import durable


def ask(*command: str) -> dict[str, Any]:
    """Return the JSON that a command of the coordinator prints; end as it does when it fails."""
    done = subprocess.run(
        ["lr-coordinator", *command, "--json"], stdout=subprocess.PIPE, check=False
    )
    if done.returncode:
        sys.exit(done.returncode)
    return dict(json.loads(done.stdout))


def main(arguments: Sequence[str]) -> None:
    """Write them."""
    parser = argparse.ArgumentParser(
        prog="lr-invitations", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="where they are written")
    parser.add_argument("names", help="of members, with commas between them")
    parser.add_argument("--run", required=True, help="the run file")
    parser.add_argument("--identity-dir", required=True, help="as the coordinator's")
    chosen = parser.parse_args(arguments)
    run = ("--run", chosen.run, "--identity-dir", chosen.identity_dir)
    listed = ask("members", *run)["members"]
    open_or_over = ("invited", "invitation expired", "expired")
    states = {each["name"]: each["state"] for each in reversed(listed)}  # an open one comes first
    for name in chosen.names.split(","):
        if states.get(name, "invited") not in open_or_over:
            print(f"{name}: {states[name]}")
            continue
        line = ask("invite", name, *run)["invitation"]
        durable.replace(chosen.folder / quote(name, safe=""), f"{line}\n".encode())
        print(f"{name}: invited")


if __name__ == "__main__":
    main(sys.argv[1:])
