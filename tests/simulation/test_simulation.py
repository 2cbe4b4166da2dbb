"""Hundreds of short runs full of faults, each a seed (notes/platforms.md §3, I1–I7).

LORAND_SIM_SEEDS sets how many; a failure prints how to see it again and what happened last.
"""

import os
import tempfile
from collections import Counter
from pathlib import Path
from typing import Final

import pytest
from tests.simulation.checks import check
from tests.simulation.world import World

from lorand.ledger import Position
from lorand_coordinator.store import SqliteStore

SEEDS: Final = int(os.environ.get("LORAND_SIM_SEEDS", "200"))
HERE: Final = "tests/simulation/test_simulation.py::test_a_run_survives_its_faults"


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty ledger."""
    path = tmp_path_factory.mktemp("template") / "empty.ledger"
    SqliteStore(path).close()
    return path


@pytest.fixture(scope="module")
def faults() -> Counter[str]:
    """How often each thing went wrong, over all seeds of this module."""
    return Counter()


def live(seed: int, template: Path, *, faulty: bool = True) -> tuple[World, Position]:
    """Live a run and check it. Raises AssertionError with all one needs to see it again."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(seed, Path(folder), template, faults=faulty)
        try:
            world.run()
            return world, check(world)
        except Exception as error:
            last = "\n".join(world.told)
            again = f"LORAND_SIM_SEEDS={seed + 1} pytest '{HERE}[{seed}]'"
            raise AssertionError(f"seed {seed}: {error!r}\nagain: {again}\n{last}") from error
        finally:
            if world.coordinator.store is not None:
                world.coordinator.store.close()


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_run_survives_its_faults(seed: int, template: Path, faults: Counter[str]) -> None:
    world, _ = live(seed, template)
    faults.update(world.faults + world.disk.faults)
