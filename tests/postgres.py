"""A PostgreSQL server of the tests' own, in a temporary folder, on a Unix socket."""

import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import psycopg

from lorand_coordinator.store_postgres import PostgresStore

LIMIT_S: Final = 60
_SETTINGS: Final = """
listen_addresses = ''
max_connections = 40
shared_buffers = '16MB'
fsync = off  # for speed: servers are killed here, but the machine below them is not
"""


def programs() -> Path | None:
    """Return the folder of the server's programs; None where they are not installed."""
    found = shutil.which("initdb")
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return Path(found).resolve().parent if found else installed[-1].parent if installed else None


class Server:
    """A server in a folder. PostgreSQL does not run as root: then another user does."""

    def __init__(self, folder: Path, binaries: Path, settings: str = "") -> None:
        """Make a cluster and start it."""
        self._folder, self._binaries = folder, binaries
        self._user = _other_user()
        if self._user is not None:
            shutil.chown(folder, self._user)
        self._run("initdb", "-D", folder / "data", "-U", "lorand", "--auth=trust", "--no-sync")
        with (folder / "data" / "postgresql.conf").open("a") as file:
            file.write(_SETTINGS + f"unix_socket_directories = '{folder}'\n" + settings)
        self.control("start")

    @property
    def url(self) -> str:
        """What coordinators are given."""
        return f"postgresql:///postgres?host={self._folder}&user=lorand"

    def store(self, run: str) -> PostgresStore:
        """Open a run's ledger as its leader."""
        return PostgresStore(self.url, run)

    def control(self, action: str, mode: str = "immediate") -> None:
        """Start, stop or restart; `immediate` is the server's own crash, with recovery after it."""
        stops = () if action == "start" else ("-m", mode)
        log = self._folder / "log"
        self._run("pg_ctl", action, "-D", self._folder / "data", "-l", log, "-w", *stops)

    def execute(self, statement: str, *parameters: object) -> list[tuple[object, ...]]:
        """Do something from a session of its own; return the rows."""
        with psycopg.connect(self.url, autocommit=True) as connection:
            cursor = connection.execute(statement.encode(), parameters)
            return cursor.fetchall() if cursor.description else []

    def terminate(self, pid: int) -> None:
        """End a session from outside, and wait for its end."""
        self.execute("SELECT pg_terminate_backend(%s, 10000)", pid)

    def _run(self, program: str, *arguments: object) -> None:
        done = subprocess.run(
            [str(self._binaries / program), *map(str, arguments)],
            stdout=subprocess.DEVNULL,  # no pipe: the server inherits it and would keep it open
            stderr=subprocess.DEVNULL,
            cwd=self._folder,
            user=self._user,
            extra_groups=None if self._user is None else [],
            timeout=LIMIT_S,
            check=False,
        )
        log = self._folder / "log"
        told = log.read_text() if log.exists() else ""
        assert done.returncode == 0, f"{program} {arguments}: exit {done.returncode}\n{told}"


def _other_user() -> str | None:
    """Return whom to run the server as; None: as ourselves."""
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name for entry in pwd.getpwall()}
    return "postgres" if "postgres" in known else "nobody"


@contextmanager
def serving(binaries: Path, settings: str = "") -> Iterator[Server]:
    """Run a server; its folder is short, as a socket's path must be."""
    with tempfile.TemporaryDirectory(prefix="lorand-") as folder:
        server = Server(Path(folder), binaries, settings)
        try:
            yield server
        finally:
            server.control("stop")
