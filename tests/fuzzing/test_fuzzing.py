"""Whatever is read: our own errors and no others, and no memory that a few bytes ask for.

The unmarked test reads 20,000 inputs, the slow one a million: plain seeded changes of valid
inputs, since a reader takes microseconds and hypothesis milliseconds (it has its own tests of
these readers, in the files of their units). LORAND_FUZZ_SEED takes another seed.
"""

import os
import random
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

import pytest
from tests.fuzzing.mutations import inputs
from tests.fuzzing.targets import Target, TurnedAway, all_targets

from lorand.errors import LorandError

SEED: Final = int(os.environ.get("LORAND_FUZZ_SEED", "7"))
FEW: Final = 20_000
MANY: Final = 1_000_000
MEMORY_KIB: Final = 64 << 10
"""By how much a target may raise the process's peak; one input is a few kilobytes."""


def shares(targets: list[Target], total: int) -> list[int]:
    """How many inputs each target gets, so many or a few more together."""
    whole = sum(target.share for target in targets)
    return [1 + int(total * target.share / whole) for target in targets]


def fuzz(target: Target, count: int, seed: int) -> Counter[str]:
    """Have a target read; return how often it took an input, and how often which error came."""
    rng = random.Random(f"{seed}/{target.name}")
    ended: Counter[str] = Counter()
    for number, content in enumerate(inputs(target.seeds, count, rng)):
        try:
            target.read(content)
        except (LorandError, TurnedAway) as error:
            ended[type(error).__name__] += 1
            if number < len(target.seeds):
                raise AssertionError(f"{target.name} refuses a valid input: {error}") from error
            continue
        except Exception as error:
            raise AssertionError(
                f"{target.name}: {error!r} escapes, input {number} of seed {seed}: {content!r}"
            ) from error
        ended["taken"] += 1
    return ended


def fuzz_all(folder: Path, total: int) -> int:
    """Have all targets read; return how many inputs there were."""
    done = 0
    targets = all_targets(folder)
    for target, count in zip(targets, shares(targets, total), strict=True):
        before, began = _peak_kib(), time.process_time()
        ended = fuzz(target, count, SEED)
        grown = _peak_kib() - before
        micros = 1e6 * (time.process_time() - began) / count
        sys.stdout.write(f"{target.name}: {count:,}, {micros:.0f} µs, +{grown} KiB, {ended}\n")
        assert grown < MEMORY_KIB, f"{target.name} took {grown} KiB more"
        assert ended["taken"] >= len(target.seeds)
        assert sum(ended.values()) == count
        done += count
    return done


def _peak_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@pytest.fixture(autouse=True)
def no_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody pulls the plug here, and a reader that writes back would wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


def test_twenty_thousand_inputs(tmp_path: Path) -> None:
    assert fuzz_all(tmp_path, FEW) >= FEW


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_million_inputs(tmp_path: Path) -> None:
    assert fuzz_all(tmp_path, MANY) >= MANY


class Careless:
    """A reader with a fault at one byte."""

    @staticmethod
    def read(data: bytes) -> None:
        """Take it, unless there is a zero in it."""
        if 0 in data:
            raise IndexError


def test_an_error_of_another_kind_is_noticed() -> None:
    with pytest.raises(AssertionError, match=r"IndexError.* escapes, input .* of seed"):
        fuzz(Target("careless", [b"abc"], Careless.read), 1000, SEED)
