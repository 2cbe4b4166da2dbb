"""Real containers without a Docker engine: podman, on a base image made by debootstrap.

Nothing is taken from an image registry. The base is Debian with its Python, PostgreSQL's image is
a stand-in with the same contract, and pip finds the wheels that were put into a folder before.
"""

import json
import os
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import yaml
from tests import commands

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parent.parent
KEPT: Final = ROOT / ".venv" / "containers"
"""What is expensive to make again: wheels, the tools' own virtual environment."""
PROGRAMS: Final = ("podman", "debootstrap", "runc", "catatonit")
BASE: Final = "localhost/lorand-base:bookworm"
POSTGRES: Final = "localhost/lorand-postgres:15"
COORDINATOR: Final = "localhost/lorand-coordinator:test"
WORKER: Final = "localhost/lorand-worker:test"
INCLUDED: Final = "python3,python3-venv,ca-certificates"
LEFT_OUT: Final = (
    *("usr/share/doc", "usr/share/man", "usr/share/locale"),
    *("var/cache/apt", "var/lib/apt/lists"),
)
LIMIT_S: Final = 600
FILES: Final = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
CONF: Final = f"""
[containers]
default_ulimits = ["nofile=1024:{FILES}", "nproc=4096:4096"]
[engine]
runtime = "runc"
cgroup_manager = "cgroupfs"
[network]
network_backend = "cni"
"""


def why_not() -> str:
    """Return why containers cannot be run here; empty: they can."""
    if os.geteuid() != 0:
        return "containers are tried as root"
    if not Path("/etc/debian_version").exists():
        return "containers are tried on Debian, whose packages make the base image"
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing or not compose_program().exists():
        return f"not installed: {', '.join(missing) or 'podman-compose'}; see `make compose-test`"
    return ""


def compose_program() -> Path:
    """Return where podman-compose is: newer than Debian's, which knows no conditions."""
    return KEPT / "tools" / "bin" / "podman-compose"


class Engine:
    """Podman with the settings that it needs in a container or a virtual machine of CI."""

    def __init__(self, folder: Path) -> None:
        """Keep settings and logs in a folder."""
        self.folder = folder
        conf = folder / "containers.conf"
        conf.write_text(CONF, encoding="utf-8")
        self._environment = {**os.environ, "CONTAINERS_CONF": str(conf)}

    def run(
        self,
        *command: object,
        cwd: Path = ROOT,
        more: Mapping[str, str] | None = None,
        check: bool = True,
        limit_s: float = LIMIT_S,
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; an AssertionError shows the end of what it said."""
        done = subprocess.run(
            [*map(str, command)],
            cwd=cwd,
            env={**self._environment, **(more or {})},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_s,
            check=False,
        )
        said = (done.stdout + done.stderr)[-3000:]
        assert not check or done.returncode == 0, f"{command}: exit {done.returncode}\n{said}"
        return done

    def podman(self, *arguments: object, check: bool = True) -> str:
        """Return what a podman command prints."""
        return self.run("podman", *arguments, check=check).stdout.strip()

    def megabytes(self, image: str) -> float:
        """Return the size of an image."""
        return int(self.podman("image", "inspect", "--format", "{{.Size}}", image)) / 1e6

    def make_base(self) -> None:
        """Make the base image, unless it is there: Debian's own packages, without their manuals."""
        if self.run("podman", "image", "exists", BASE, check=False).returncode == 0:
            return
        root, archive = self.folder / "base", self.folder / "base.tar"
        self.run("debootstrap", "--variant=minbase", f"--include={INCLUDED}", "bookworm", root)
        skipped = [f"--exclude=./{folder}" for folder in LEFT_OUT]
        self.run("tar", *skipped, "-C", root, "-cf", archive, ".")
        self.podman("import", archive, BASE)
        shutil.rmtree(root)
        archive.unlink()

    def build(self, image: str, file: Path, context: Path, *arguments: str) -> float:
        """Build an image in place of one of that name; return the seconds it took."""
        began = time.monotonic()
        self.podman("rmi", "--force", image, check=False)
        self.run(
            *("podman", "build", "--isolation", "chroot", "--layers=false", "--format", "docker"),
            *("--build-arg", f"BASE={BASE}", "--file", file, "--tag", image, *arguments, context),
        )
        return time.monotonic() - began

    def make_postgres(self) -> None:
        """Make the stand-in for PostgreSQL's image, with the machine's own package sources."""
        if self.run("podman", "image", "exists", POSTGRES, check=False).returncode == 0:
            return
        sources = shutil.copytree("/etc/apt", self.folder / "apt", symlinks=True)
        self.build(POSTGRES, HERE / "postgres.Dockerfile", HERE, "--volume", f"{sources}:/etc/apt")

    def make_images(self) -> dict[str, float]:
        """Build the images of both roles; return the seconds each took."""
        wheels = ("--volume", f"{KEPT / 'wheels'}:/wheels:ro")
        pip = ("--build-arg", "PIP_NO_INDEX=1", "--build-arg", "PIP_FIND_LINKS=/wheels")
        return {
            image: self.build(image, ROOT / f"deploy/{role}/Dockerfile", ROOT, *wheels, *pip)
            for role, image in (("coordinator", COORDINATOR), ("worker", WORKER))
        }


class Federation:
    """The services of a compose file, under a name of their own."""

    def __init__(self, engine: Engine, file: Path, name: str, settings: Mapping[str, str]) -> None:
        """`settings` are the variables that the file takes from its environment."""
        self._engine, self._file, self.name = engine, file, name
        self._settings = {**settings, "COMPOSE_PROJECT_NAME": name}
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
        self.services: dict[str, Any] = content["services"]

    def compose(self, *arguments: object) -> str:
        """Run podman-compose."""
        program = (compose_program(), "--file", self._file, "--project-name", self.name)
        done = self._engine.run(*program, *arguments, cwd=self._file.parent, more=self._settings)
        return done.stdout

    def up(self, service: str, *arguments: object) -> None:
        """Start a service when those it depends on are as it asks.

        Podman of Debian 12 does not wait for healthy services by itself.
        """
        for other, asked in self.services[service].get("depends_on", {}).items():
            self.wait(other, asked["condition"])
        self.compose("up", "--detach", "--no-build", "--no-deps", *arguments, service)

    def wait(self, service: str, condition: str) -> None:
        """Wait until a service is healthy, or has ended well."""
        (container,) = self.containers(service)
        if condition == "service_completed_successfully":
            wait_for(lambda: self.ended(container), f"{service} to end", self)
            assert self.state(container)["ExitCode"] == 0, self.logs(container)
        else:
            wait_for(lambda: self.healthy(container), f"{service} to be healthy", self)

    def healthy(self, container: str) -> bool:
        """Run a container's own health check."""
        done = self._engine.run("podman", "healthcheck", "run", container, check=False)
        return done.returncode == 0

    def containers(self, service: str) -> list[str]:
        """Return the names of a service's containers."""
        return sorted(
            self._engine.podman(
                *("ps", "--all", "--format", "{{.Names}}"),
                *("--filter", f"label=io.podman.compose.project={self.name}"),
                *("--filter", f"label=com.docker.compose.service={service}"),
            ).split()
        )

    def state(self, container: str) -> dict[str, Any]:
        """Return what podman says of a container's state."""
        return dict(json.loads(self._engine.podman("inspect", container))[0]["State"])

    def ended(self, container: str) -> bool:
        """Whether a container has ended and stays so."""
        return bool(self.state(container)["Status"] == "exited")

    def logs(self, container: str) -> str:
        """Return what a container has said."""
        done = self._engine.run("podman", "logs", container, check=False)
        return done.stdout + done.stderr

    def down(self) -> None:
        """Remove containers, volumes and networks."""
        project = f"label=io.podman.compose.project={self.name}"
        podman = self._engine.podman
        if found := podman("ps", "--all", "--quiet", "--filter", project).split():
            podman("rm", "--force", *found)
        if found := podman("volume", "ls", "--quiet", "--filter", project).split():
            podman("volume", "rm", "--force", *found)
        if found := podman("network", "ls", "--quiet", "--filter", project).split():
            podman("network", "rm", "--force", *found)


def wait_for(
    what: Callable[[], bool], why: str, federation: Federation, limit_s: float = 120
) -> None:
    """Wait as for commands; AssertionError with all logs when it never is so."""
    try:
        commands.wait_for(what, why, limit_s)
    except AssertionError as error:
        shown = [
            f"--- {each}\n{federation.logs(each)[-2000:]}"
            for service in federation.services
            for each in federation.containers(service)
        ]
        raise AssertionError(f"{error}\n" + "\n".join(shown)) from error


def fetch_wheels() -> None:
    """Put into a folder what pip would download while images are built, once."""
    wheels = KEPT / "wheels"
    wheels.mkdir(parents=True, exist_ok=True)
    asked = ("torch", "hatchling>=1.27", f"{ROOT}[worker,privacy,postgres,page]")
    pip = (sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check")
    subprocess.run(
        [*pip, "--dest", str(wheels), "-c", str(ROOT / "constraints.txt"), *asked],
        check=True,
        timeout=LIMIT_S,
    )
