"""Virtual workers on a real Ray cluster, of this machine alone."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from tests import tiny

import lorand
from lorand import ledger
from lorand.errors import ConfigError, HandshakeError, LorandError
from lorand_api.groups import Setup
from lorand_api.shards import examples_of
from lorand_worker.precision import Precision
from lorand_worker.tasks import Forward

ray = pytest.importorskip("ray")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("default"),  # Ray's own
    pytest.mark.timeout(300),
]
WORKERS = 40
GROUPS = 2
LIMIT_S = 120.0


@pytest.fixture
def settings(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A run of forty workers; where Ray's processes find the packages."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    return {
        "run": tiny.config(
            "backprop",
            run={"rounds": 5},
            codec={"up": "sign", "down": "sign"},
            rounds={"quorum": WORKERS, "start_with": WORKERS},
        ),
        "shards": [tiny.rows("hotels", 8, seed=number) for number in range(WORKERS)],
        "model": tiny_model,
        "seed": 1,
        "forward": Forward(Precision.FLOAT32),
    }


def test_the_ledger_is_that_of_one_process(settings: dict[str, Any]) -> None:
    alone = lorand.simulate(**settings)
    spread = lorand.simulate(**settings, machines=lorand.Ray(GROUPS, cpus=1))
    assert not ray.is_initialized(), "what it began it ends"
    assert spread.position.head == alone.position.head
    assert spread.base.replica.digest() == alone.base.replica.digest()


def test_what_is_wrong_with_a_group(
    settings: dict[str, Any], tiny_model: Path, tmp_path: Path
) -> None:
    """In a cluster that the script began, which is left as it is."""
    config = settings["run"]
    rows = examples_of(settings["shards"][0], config.task, "a shard")
    identity = lorand.prepare(config, tiny_model)
    other = tiny.write_model(tmp_path / "other", seed=3)
    history = [ledger.start_entry(config, identity).SerializeToString()]
    ray.init(num_cpus=GROUPS, include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        with lorand.Ray().places(WORKERS) as places:
            assert len(places) == GROUPS
            setup = Setup(config, identity, other, "cpu", Forward(), [rows], 1, 1, 1)
            call = places[0](setup)
            with pytest.raises(HandshakeError, match="the base weights here"):
                call("begin", history).result(LIMIT_S)
            call("__ray_terminate__")
            with pytest.raises(LorandError, match="a group of virtual workers was lost; simulate"):
                call("begin", history).result(LIMIT_S)
        with pytest.raises(ConfigError, match="no room for a group of 64 CPUs"):
            lorand.simulate(**settings, machines=lorand.Ray(cpus=64))
        assert ray.is_initialized()
    finally:
        ray.shutdown()
