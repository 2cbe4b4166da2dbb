"""The Python API over real gRPC: a simulated run is the networked one, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
from tests import tiny

import lorand
from lorand_worker.link import Stopped
from lorand_worker.precision import Precision
from lorand_worker.tasks import Forward

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 7
NAMES = ("worker-0001", "worker-0002", "worker-0003")
"""Those of virtual workers, whose streams of chance follow from names."""
RUNS: dict[str, dict[str, dict[str, Any]]] = {
    "first-order, one bit": {"codec": {"up": "sign", "down": "sign"}},
    "local steps with feedback": {
        "local": {"steps": 2, "learning_rate": 0.002},
        "codec": {"up": "sign", "down": "int8"},
        "optimizer": {"kind": "sgd", "learning_rate": 1.0, "normalise": False},
    },
    "unbiased codes, pools that rotate": {
        "codec": {"rounding": "unbiased"},
        "directions": {"rotate_every": 3},
    },
}


@pytest.mark.parametrize("name", RUNS)
def test_a_simulated_run_has_the_ledger_of_the_networked_one(
    name: str, tiny_model: Path, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny.config("backprop", **RUNS[name])
    files = [tiny_data[domain] for domain in tiny.DOMAINS]
    exact = Forward(Precision.FLOAT32)  # by itself each machine takes what is faster there
    simulated = lorand.simulate(config, files, model=tiny_model, seed=SEED, forward=exact)
    identity = lorand.prepare(config, tiny_model)
    workers: list[lorand.Worker] = []
    with lorand.Coordinator(config, identity=identity) as coordinator:
        for number, (file, who) in enumerate(zip(files, NAMES, strict=True), start=1):
            worker = lorand.Worker(
                coordinator.address,
                file,
                name=who,
                model=tiny_model,
                insecure=True,
                seed=SEED,
                precision=Precision.FLOAT32,
                state=tmp_path,
            )
            workers.append(worker.start())
            coordinator.wait_for_workers(number, timeout_s=60)
        position = coordinator.wait(timeout_s=60)
        results = [worker.wait(timeout_s=60) for worker in workers]
    assert position.head == simulated.position.head
    assert {result.head for result in results} == {position.head.hex()}
    assert {r.weights_digest for r in results} == {simulated.base.replica.digest().hex()}
    assert position.coefficients.any() or len(position.closed)


def test_a_worker_that_is_stopped_leaves_and_another_goes_on(
    tiny_model: Path, tiny_data: dict[str, Path], tmp_path: Path
) -> None:
    config = tiny.config("backprop", run={"rounds": 3}, rounds={"quorum": 2, "start_with": 2})
    shared: dict[str, Any] = {"model": tiny_model, "state": tmp_path, "insecure": True}
    with lorand.Coordinator(config, identity=lorand.prepare(config, tiny_model)) as coordinator:
        address = coordinator.address
        with lorand.Worker(address, tiny_data["hotels"], name="a", **shared) as first:
            coordinator.wait_for_workers(1, timeout_s=60)
        with pytest.raises(Stopped, match="was stopped"):
            first.wait(timeout_s=1)
        with pytest.raises(TimeoutError, match="waiting for"):
            coordinator.wait(timeout_s=0.1)
        with (
            lorand.Worker(address, tiny_data["hotels"], name="a", **shared) as again,
            lorand.Worker(address, tiny_data["gadgets"], name="b", **shared) as other,
        ):
            assert again.wait(timeout_s=60).weights_digest == other.wait(60).weights_digest
