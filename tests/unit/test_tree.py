"""The model of a tree of relays: levels, nodes, bytes and seconds by hand."""

import pytest
from experiments import scaling
from experiments.tree import tree

from lorand import wire_size
from lorand.config import RunConfig

SMALL = {"kind": "spsa", "directions": 8, "codec": "int8"}


@pytest.fixture
def config() -> RunConfig:
    return scaling.run_of(SMALL)


def both_ways(config: RunConfig, children: int) -> int:
    size = wire_size.of_round(config, children)
    return size.up.wire + size.down.wire


def test_a_coordinator_alone_has_no_relays(config: RunConfig) -> None:
    found = tree(config, 1000, 1000, us_a_child=200, hop_s=0.05)
    assert (found.levels, found.relays, found.relay_bytes) == (1, 0, 0)
    assert found.seconds == pytest.approx(1000 * 200e-6 + 2 * 0.05)
    assert found.root_bytes == 1000 * found.worker_bytes == 1000 * both_ways(config, 1000)


def test_a_million_workers_under_a_thousand_relays(config: RunConfig) -> None:
    found = tree(config, 10**6, 1000, us_a_child=200, hop_s=0.05)
    assert (found.levels, found.relays) == (2, 1000)
    assert found.seconds == pytest.approx(2 * 1000 * 200e-6 + 4 * 0.05)
    summed = both_ways(scaling.run_of(SMALL | {"codec": "int8"}), 1000) + 8 * 3
    assert found.root_bytes == pytest.approx(1000 * summed, rel=0.01)
    assert found.relay_bytes == 1000 * found.worker_bytes + found.root_bytes // 1000


@pytest.mark.parametrize(
    ("fan_out", "levels", "relays"), [(100, 3, 10_100), (10, 6, 111_110), (999, 3, 1002 + 2)]
)
def test_levels_are_as_few_as_hold_all(
    config: RunConfig, fan_out: int, levels: int, relays: int
) -> None:
    found = tree(config, 10**6, fan_out, us_a_child=200, hop_s=0.05)
    assert (found.levels, found.relays) == (levels, relays)


def test_more_workers_never_cost_less(config: RunConfig) -> None:
    took = [
        tree(config, workers, 100, us_a_child=200, hop_s=0.05).seconds
        for workers in (1, 10, 100, 101, 1000, 10_001, 10**6)
    ]
    assert took == sorted(took)
