"""deploy/compose.yaml as containers: it trains, survives a kill, and leaves an adapter."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Final

import pytest
from tests import tiny
from tests.containers import engine
from tests.containers.engine import Engine, Federation, wait_for

pytestmark = [
    pytest.mark.containers,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(engine.why_not()), reason=engine.why_not()),
]
COMPOSE: Final = engine.ROOT / "deploy" / "compose.yaml"
ROUNDS: Final = 1000
MEMBERS: Final = ("gadgets", "hotels", "restaurants")
OPEN: Final = """
import json, sys
from pathlib import Path
from lorand import adapter
found = adapter.load(Path(sys.argv[1]))
print(json.dumps({"rounds": found.committed, "moved": int((found.coefficients != 0).sum())}))
"""


@pytest.fixture(scope="session")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """Podman, and the images of both roles."""
    made = Engine(tmp_path_factory.mktemp("podman"))
    began = time.monotonic()
    engine.fetch_wheels()
    print(f"\nwheels: {time.monotonic() - began:.0f} s")
    made.make_base()
    made.make_postgres()
    print(f"base images: {time.monotonic() - began:.0f} s")
    for image, seconds in made.make_images().items():
        print(f"{image}: {made.megabytes(image):.0f} MB, built in {seconds:.0f} s")
    print(f"the base alone: {made.megabytes(engine.BASE):.0f} MB")
    return made


@pytest.fixture
def federation(
    podman: Engine, tmp_path: Path, tiny_model: Path, tiny_data: dict[str, Path]
) -> Iterator[Federation]:
    """The composed services, not started yet, on a tiny model and its data."""
    content = tiny.settings("backprop", run={"rounds": ROUNDS, "adopt_first_worker": True})
    del content["service"]
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.toml").write_text(tiny.to_toml(content), encoding="utf-8")
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    # The file's paths are relative to it: a copy has its secrets beside it.
    file = tmp_path / "compose.yaml"
    file.write_text(COMPOSE.read_text(encoding="utf-8"), encoding="utf-8")
    for name in ("database-password", "grafana-password", "page-token"):
        (secrets / name).write_text(os.urandom(16).hex(), encoding="utf-8")
    settings = {
        "LORAND_POSTGRES_IMAGE": engine.POSTGRES,
        "LORAND_COORDINATOR_IMAGE": engine.COORDINATOR,
        "LORAND_WORKER_IMAGE": engine.WORKER,
        "LORAND_RUN": str(run),
        "LORAND_MODEL": str(tiny_model),
        "LORAND_DATA": str(tiny_data["hotels"].parent),
        "LORAND_DATA_FILE": "NAME.csv",
        "LORAND_THREADS": "1",
    }
    # The containers' user is nobody's here: what it reads, everybody may.
    podman.run("chmod", "-R", "a+rX", tmp_path.parent, tiny_model, tiny_data["hotels"].parent)
    made = Federation(podman, file, f"lorand-test-{os.getpid()}", settings)
    yield made
    made.down()


def committed(federation: Federation, podman: Engine) -> int:
    """Return how many rounds the coordinator says are committed; -1 while it does not answer."""
    (container,) = federation.containers("coordinator")
    done = podman.run(
        *("podman", "exec", container, "lr-coordinator", "status", "127.0.0.1:7700", "--json"),
        check=False,
    )
    return int(json.loads(done.stdout)["committed"]) if done.returncode == 0 else -1


def test_a_composed_federation_trains_survives_a_kill_and_exports(
    federation: Federation, podman: Engine, tmp_path: Path
) -> None:
    for service in ("database", "coordinator", "invitations", "worker"):
        federation.up(service)
    workers = federation.containers("worker")
    assert len(workers) == 3
    for each in workers:
        wait_for(partial(federation.healthy, each), "each member to reach it", federation)
    # Workers compile their kernels first, three at a time on what may be two busy cores.
    wait_for(lambda: committed(federation, podman) >= 3, "three rounds", federation, 400)

    (coordinator,) = federation.containers("coordinator")
    first = federation.state(coordinator)
    assert committed(federation, podman) < ROUNDS, "the run was over before the kill"
    os.kill(first["Pid"], signal.SIGKILL)
    wait_for(
        lambda: federation.state(coordinator)["Pid"] not in (0, first["Pid"]),
        "the engine to start the coordinator again",
        federation,
    )
    wait_for(lambda: committed(federation, podman) >= ROUNDS, "the last round", federation)
    for each in workers:
        wait_for(partial(federation.ended, each), "each worker to end", federation)
        assert federation.state(each)["ExitCode"] == 0, federation.logs(each)
    told = [federation.logs(each) for each in workers]
    seats = sorted(name for name in MEMBERS for log in told if f"this replica is '{name}'" in log)
    assert seats == [*MEMBERS]
    digests = {line for log in told for line in log.splitlines() if line.startswith("weights ")}
    assert len(digests) == 1, told

    out = tmp_path / "adapter"
    out.mkdir(mode=0o777)
    out.chmod(0o777)
    federation.compose(
        *("run", "--rm", "--no-deps", "--entrypoint", "lr-worker", "-v", f"{out}:/adapter"),
        *("worker", "export", "coordinator:7700", "/adapter"),
        *("--credentials", "/var/lib/lorand/hotels/credentials.pem"),
    )
    found = subprocess.run(
        [sys.executable, "-c", OPEN, out], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(found.stdout)["rounds"] == ROUNDS
    assert json.loads(found.stdout)["moved"] > 0


@pytest.mark.parametrize("image", [engine.COORDINATOR, engine.WORKER])
def test_images_have_one_user_no_secret_and_no_package_index(podman: Engine, image: str) -> None:
    (found,) = json.loads(podman.podman("image", "inspect", image))
    assert found["Config"]["User"] == "10001:10001"
    history = podman.podman("history", "--no-trunc", "--format", "{{.CreatedBy}}", image)
    environment = " ".join(found["Config"]["Env"])
    for word in ("PIP_", "PASSWORD", "/wheels"):
        assert word not in history, history
        assert word not in environment, environment


def test_the_coordinators_image_has_no_torch_and_what_it_adds_is_small(podman: Engine) -> None:
    look = ("import importlib.util as u, sys", "sys.exit(u.find_spec('torch') is not None)")
    podman.podman(
        "run", "--rm", "--entrypoint", "python3", engine.COORDINATOR, "-c", "; ".join(look)
    )
    added = podman.megabytes(engine.COORDINATOR) - podman.megabytes(engine.BASE)
    print(f"\nthe coordinator adds {added:.0f} MB to its base")
    assert added < 250
