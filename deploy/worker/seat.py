#!/usr/bin/env python3
"""Start a worker in a container: take a free seat, enrol at it once, and join as its member.

A seat is a member of the run: an invitation, a data file and a folder of state. Replicas of a
service are alike and share the folders, so that which of them is whom is settled here: whoever
locks a seat has it, and the lock ends with the process, however that ends. A replica that takes
the place of another so finds its credentials, budget and history.
"""

import argparse
import fcntl
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

from lorand.credentials import Credentials
from lorand.errors import ConfigError, LorandError
from lorand.invitation import Invitation


@dataclass(frozen=True)
class Seat:
    """A member's place; `lock` is an open file that this process has locked."""

    name: str
    invitation: Path
    folder: Path
    lock: int

    @property
    def credentials(self) -> Path:
        """Where the member's key and certificates are, once it is enrolled."""
        return self.folder / "credentials.pem"

    def enrolled(self) -> bool:
        """Whether they are there: a key alone is left of an enrolment that did not finish."""
        try:
            Credentials.read(self.credentials)
        except ConfigError:
            return False
        return True


def take(invitations: Path, state: Path) -> Seat:
    """Lock the first free seat. Raises ConfigError when there is none."""
    files = [invitations]
    if invitations.is_dir():
        files = sorted(each for each in invitations.iterdir() if each.suffix != ".partial")
    names = []
    for file in files:
        try:
            name = Invitation.parse(file.read_text(encoding="utf-8")).name
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the invitation {file}: {error}") from error
        folder = state / quote(name, safe="")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            lock = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            raise ConfigError(f"cannot write {folder}: {error}; mount a volume there") from error
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(lock)
            names.append(name)
            continue
        return Seat(name, file, folder, lock)
    if names:
        raise ConfigError(
            f"every member is taken by another replica ({', '.join(names)}): invite more members, "
            "or run fewer replicas"
        )
    raise ConfigError(f"there is no invitation in {invitations}: `lr-coordinator invite` makes one")


def command(seat: Seat, address: str, data: str, model: Path, rest: Sequence[str]) -> list[str]:
    """Return the worker's command at a seat; NAME in `data` stands for the member's name."""
    result = ["lr-worker", "join", address, "--data", data.replace("NAME", seat.name)]
    result += ["--credentials", str(seat.credentials), "--state", str(seat.folder)]
    if (model / "config.json").exists():
        result += ["--model", str(model)]
    return [*result, *rest]


def show(seat: Seat, where: Path) -> None:
    """Let health checks of this container find the seat."""
    where.unlink(missing_ok=True)
    where.symlink_to(seat.folder)


def main(arguments: Sequence[str]) -> None:
    """Become the worker of a free seat."""
    parser = argparse.ArgumentParser(prog="lr-seat", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("address", help="HOST:PORT of the coordinator")
    parser.add_argument("--invitations", type=Path, required=True, help="one, or a folder of them")
    parser.add_argument("--data", required=True, help="a member's data file, as /data/NAME.csv")
    parser.add_argument("--state", type=Path, default=Path("/var/lib/lorand"))
    parser.add_argument("--model", type=Path, default=Path("/model"), help="used if it has a model")
    parser.add_argument(
        "--link", type=Path, default=Path("/run/lorand/seat"), help="leads to the seat"
    )
    chosen, rest = parser.parse_known_args(arguments)
    seat = take(chosen.invitations, chosen.state)
    show(seat, chosen.link)
    print(f"this replica is {seat.name!r}", file=sys.stderr, flush=True)
    if not seat.enrolled():
        line = seat.invitation.read_bytes()
        enrol = ["lr-worker", "enrol", "-", "--credentials", str(seat.credentials)]
        done = subprocess.run(enrol, input=line, check=False)
        if done.returncode:
            sys.exit(done.returncode)
    os.set_inheritable(seat.lock, True)
    worker = command(seat, chosen.address, chosen.data, chosen.model, rest)
    os.execvp(worker[0], worker)


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except LorandError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
