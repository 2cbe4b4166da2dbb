"""Real coordinators and workers as processes on loopback; every wait has a limit."""

import json
import os
import random
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Protocol, Self

import grpc
from tests import tiny

from lorand import credentials
from lorand.config import RunConfig
from lorand.credentials import Credentials
from lorand.v1 import status_pb2 as pb
from lorand.v1 import status_pb2_grpc as service
from lorand_coordinator import show, verification
from lorand_coordinator.ledgers import Location

BIN: Final = Path(sys.executable).parent
ROOT: Final = Path(__file__).resolve().parent.parent
LIMIT_S: Final = 60.0
CONNECTING: Final = frozenset(
    {"serve", "status", "health", "join", "evaluate", "export", "squeeze", "replay"}
)
"""Commands that reach a coordinator, or may; `ledger export` is `ledger`."""
ENVIRONMENT: Final = {
    **os.environ,
    # One thread a process: the models are tiny, and the machine is shared.
    **{"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    **{"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore", "COLUMNS": "200"},
    "PYTHONPATH": os.pathsep.join(
        str(ROOT / part) for part in ("", "common", "server", "client", "api")
    ),
}


class Command:
    """A running command: JSON lines on its output, its standard error in a file."""

    def __init__(self, pid: int, output: int, log: Path, wait: Callable[[float], int]) -> None:
        """Follow a process; `wait(limit_s)` returns its exit code or raises TimeoutError."""
        self.pid, self._output, self._wait = pid, output, wait
        self._log, self._rest = log, b""
        self.code: int | None = None

    def errors(self) -> str:
        """Return what it wrote to standard error."""
        return self._log.read_text(encoding="utf-8")

    def line(self, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Return the next line of its output, a JSON object."""
        end = time.monotonic() + limit_s
        while b"\n" not in self._rest:
            assert self._read(end - time.monotonic()), f"no line came: {self.errors()}"
        text, _, self._rest = self._rest.partition(b"\n")
        return dict(json.loads(text))

    def _read(self, limit_s: float) -> bool:
        """Read some output; False at its end or when none comes in time."""
        ready, _, _ = select.select([self._output], [], [], max(0.0, limit_s))
        more = os.read(self._output, 1 << 16) if ready else b""
        self._rest += more
        return bool(more)

    def end(self, limit_s: float = LIMIT_S) -> tuple[int, str]:
        """Wait for its end; return the exit code and the output not read so far."""
        limit = time.monotonic() + limit_s
        while self._read(limit - time.monotonic()):
            pass
        if self.code is None:
            try:
                self.code = self._wait(max(0.1, limit - time.monotonic()))
            except TimeoutError:
                raise AssertionError(f"still running after {limit_s} s: {self.errors()}") from None
        return self.code, self._rest.decode()

    def result(self, limit_s: float = LIMIT_S) -> dict[str, Any]:
        """Wait for its end, which must be a success; return the JSON it printed last."""
        code, output = self.end(limit_s)
        assert code == 0, f"exit {code}: {self.errors()}"
        return dict(json.loads(output.splitlines()[-1]))

    def running(self) -> bool:
        """Whether it has not ended."""
        if self.code is None:
            try:
                self.code = self._wait(0.0)
            except TimeoutError:
                return True
        return False

    def signal(self, number: signal.Signals) -> None:
        """Send a signal, if it still runs."""
        if self.running():
            with suppress(ProcessLookupError):  # it has ended since
                os.kill(self.pid, number)

    def kill(self) -> None:
        """End it with SIGKILL, and wait."""
        self.signal(signal.SIGKILL)
        if self.code is None:
            self.code = self._wait(LIMIT_S)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave nothing running."""
        self.kill()
        os.close(self._output)


class Starter(Protocol):
    """A way to start a command in a folder, with its standard error in a file."""

    def __call__(self, folder: Path, log: Path, program: str, *arguments: object) -> Command:
        """Start it."""


def start(
    folder: Path,
    log: Path,
    program: str,
    *arguments: object,
    environment: dict[str, str] = ENVIRONMENT,
) -> Command:
    """Start a console command of this project; a name that ends in .py is run by this Python."""
    command = [sys.executable, program] if program.endswith(".py") else [str(BIN / program)]
    output, theirs = os.pipe()
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [*command, *map(str, arguments)],
            stdout=theirs,
            stderr=errors,
            cwd=folder,
            env=environment,
        )
    os.close(theirs)

    def wait(limit_s: float) -> int:
        try:
            return process.wait(limit_s)
        except subprocess.TimeoutExpired:
            raise TimeoutError from None

    return Command(process.pid, output, log, wait)


class Nursery:
    """Starts commands as forks of a process that has imported everything (nursery.py).

    Called, it forks workers alone: a coordinator starts soon, and should start without torch.
    """

    def __init__(self, folder: Path) -> None:
        """Start it; the first fork waits until it has imported."""
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket.settimeout(LIMIT_S)
        self._log = folder / "nursery.log"
        with self._log.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, str(ROOT / "tests" / "nursery.py")],
                stdin=theirs.fileno(),
                stderr=errors,
                env=ENVIRONMENT,
            )
        theirs.close()

    def __call__(self, folder: Path, log: Path, program: str, *arguments: object) -> Command:
        """Start a worker's command; any other is started as `start` does."""
        starter = self.fork if program == "lr-worker" else start
        return starter(folder, log, program, *arguments)

    def fork(
        self,
        folder: Path,
        log: Path,
        program: str,
        *arguments: object,
        journal: Path | None = None,
    ) -> Command:
        """Start any command; a worker's journal is appended to (tests/journal.py)."""
        output, their_output = os.pipe()
        status, their_status = os.pipe()
        request = {
            "program": program,
            "arguments": [*map(str, arguments)],
            "folder": str(folder),
            "journal": str(journal or ""),
        }
        with log.open("wb") as errors:
            descriptors = [their_output, errors.fileno(), their_status]
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            answer = self._socket.recv(64)
        assert answer, self._log.read_text(encoding="utf-8")
        os.close(their_output)
        os.close(their_status)

        def wait(limit_s: float) -> int:
            if not select.select([status], [], [], limit_s)[0]:
                raise TimeoutError
            code = int(os.read(status, 16))
            os.close(status)
            return code

        return Command(json.loads(answer), output, log, wait)

    def close(self) -> None:
        """End it; what it started was ended by whoever asked for it."""
        self._socket.close()
        self._process.kill()
        self._process.wait(LIMIT_S)


class Room:
    """A folder with a run file, run.lock, a model and data, and the processes of one run.

    Unless `insecure` is set to False, it all goes without certificates.
    """

    insecure = True

    def __init__(
        self,
        folder: Path,
        content: tiny.Settings,
        model: Path,
        data: dict[str, Path],
        starter: Starter,
    ) -> None:
        """Write the run file; `lock` writes run.lock."""
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.model, self.data = folder, model, data
        self._starter = starter
        self._logs = 0
        self.run = folder / "run.toml"
        self.run.write_text(tiny.to_toml(content), encoding="utf-8")
        self.config = RunConfig.parse(self.run.read_text(encoding="utf-8"))
        self.ledger = folder / f"{self.config.run.name}.ledger"
        self.state = folder / "state"

    def lock(self) -> Self:
        """Write run.lock as `lr-worker prepare` does, without its start-up."""
        from lorand_worker import model as models

        task = self.config.task
        loaded = models.load(self.config.model, len(task.labels), self.model, kind=task.kind)
        identity = models.identity(loaded, self.config, prepares=True)
        (self.folder / "run.lock").write_text(identity.to_lock(), encoding="utf-8")
        return self

    def start(self, program: str, *arguments: object) -> Command:
        """Start a command in the folder."""
        self._logs += 1
        log = self.folder / f"{self._logs:03}-{program}.log"
        return self._starter(self.folder, log, program, *self.flagged(*arguments))

    def flagged(self, *arguments: object) -> tuple[object, ...]:
        """Return a command's arguments with --insecure, where it would take one."""
        flags = ("--insecure",) if self.insecure and arguments[0] in CONNECTING else ()
        return (*arguments, *flags)

    def once(self, program: str, *arguments: object) -> dict[str, Any]:
        """Run a command with --json to its end; return what it printed."""
        with self.start(program, *arguments, "--json") as command:
            return command.result()

    def failure(self, program: str, *arguments: object) -> tuple[int, str]:
        """Run a command that should fail; return its exit code and its message on one line."""
        with self.start(program, *arguments) as command:
            code, output = command.end()
            assert output == "", output
            return code, " ".join(command.errors().split())

    @contextmanager
    def coordinator(self, *arguments: object, port: int = 0) -> Iterator[tuple[Command, str]]:
        """Serve the run; yield the process and its address."""
        listen = ("--address", f"127.0.0.1:{port}", "--json")
        with self.start("lr-coordinator", "serve", self.run, *listen, *arguments) as command:
            yield command, command.line()["address"]

    def join(self, address: str, name: str, *arguments: object, data: str = "") -> Command:
        """Start a worker on the data of its name."""
        return self.start("lr-worker", *self.join_arguments(address, name, data), *arguments)

    def join_arguments(self, address: str, name: str, data: str = "") -> tuple[str, ...]:
        """Return the arguments of a worker's command."""
        return (
            *("join", address, "--data", str(self.data[data or name]), "--name", name, "--json"),
            *("--model", str(self.model), "--device", "cpu", "--threads", "1"),
            *("--state", str(self.state)),
        )

    def enrol(self, name: str, role: str = "worker") -> Path:
        """Invite and enrol a member by the commands of docs/operations.md; return the file."""
        line = self.once("lr-coordinator", "invite", name, "--role", role)["invitation"]
        path = self.folder / f"{name}.pem"
        made = self.once("lr-worker", "enrol", line, "--credentials", path)
        assert (made["name"], made["role"], made["credentials"]) == (name, role, str(path))
        return path

    def export(self, location: Location | None = None) -> Path:
        """Export the ledger, checked, in this process; return the file."""
        verification.verify(location or self.ledger)
        exported = self.folder / "exported.bin"
        show.export(location or self.ledger, exported)
        return exported


class MakeRoom:
    """Makes rooms in one folder."""

    def __init__(self, folder: Path, model: Path, data: dict[str, Path], starter: Starter) -> None:
        """Keep what rooms have in common."""
        self._folder, self._model, self._data, self._starter = folder, model, data, starter

    def __call__(
        self, content: tiny.Settings, *, model: Path | None = None, starter: Starter | None = None
    ) -> Room:
        """Make one."""
        folder = self._folder / content["run"]["name"]
        return Room(folder, content, model or self._model, self._data, starter or self._starter)


def status(address: str, shown: Credentials | None = None) -> pb.GetStatusResponse | None:
    """Return a coordinator's status; None where none answers."""
    with credentials.channel(address, shown) as channel:
        try:
            answer: pb.GetStatusResponse = service.StatusServiceStub(channel).GetStatus(
                pb.GetStatusRequest(), timeout=5
            )
        except grpc.RpcError:
            return None
    return answer


def committed(address: str, shown: Credentials | None = None) -> int:
    """Return how many rounds a coordinator has committed; -1 where none answers."""
    answer = status(address, shown)
    return -1 if answer is None else answer.committed


def wait_for(what: Callable[[], bool], why: str, limit_s: float = LIMIT_S) -> None:
    """Look every so often until it is so; AssertionError when it is not within the limit."""
    end = time.monotonic() + limit_s
    while not what():
        assert time.monotonic() < end, f"not within {limit_s} s: {why}"
        select.select([], [], [], 0.05)


def free_port() -> int:
    """Return a port that is free, as is the one after it, where members enrol.

    Not one that the system gives to outgoing connections: while a coordinator is down, somebody
    else's would take its place.
    """
    source = random.SystemRandom()
    while True:
        port = source.randrange(20000, 32000, 2)
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 1))
            return port
