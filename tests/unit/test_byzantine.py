"""The attacks of `experiments.byzantine`, and who has which sentences there."""

import numpy as np
import pytest
from experiments import byzantine

from lorand.codec import LARGEST
from lorand_coordinator.aggregation import Report

LABELS = [0, 1] * 500


def told(attack: str, count: int, rule: str = "mean", rounds: int = 1) -> dict[int, Report]:
    """What arrives of ten workers after some rounds."""
    config = byzantine.settings(rule, 1e-3, "alike")
    attackers = byzantine.Attackers(config, rule, attack, count)
    rng = np.random.default_rng(0)
    for _ in range(rounds):
        reports = {w: Report(rng.integers(1, 40, 8)) for w in range(10)}
        arrived = attackers(reports, 0)
    return arrived


@pytest.mark.parametrize("attack", byzantine.ATTACKS)
def test_the_honest_are_left_as_they_are(attack: str) -> None:
    honest, attacked = told(byzantine.CLEAN, 0), told(attack, 3)
    for worker in range(10):
        same = honest[worker].codes.tolist() == attacked[worker].codes.tolist()
        assert same == (worker >= 3)


def test_what_attackers_say() -> None:
    honest = told(byzantine.CLEAN, 0)
    assert told("flip", 3)[0].codes.tolist() == (-honest[0].codes).tolist()
    assert set(told("1e30", 3)[0].codes.tolist()) == {-LARGEST["int8"]}
    copied = told("copy", 3, rounds=2)
    assert copied[0].codes.tolist() == copied[2].codes.tolist()
    stealthy = told("stealth", 3)
    mean = np.mean([honest[w].codes for w in range(3, 10)], axis=0)
    deviations = np.std([honest[w].codes for w in range(3, 10)], axis=0)
    for worker, far in enumerate((1.5, 1.6, 1.7)):
        assert stealthy[worker].codes == pytest.approx(mean - far * deviations, abs=0.5)


def test_quarantine_and_the_honest_alone() -> None:
    assert set(told("flip", 3, byzantine.ALONE)) == set(range(3, 10))
    assert set(told("flip", 3, byzantine.QUARANTINE, rounds=60)) == set(range(3, 10))


@pytest.mark.parametrize(("split", "share"), [("alike", 0.5), ("skewed", 0.9)])
def test_everyone_has_as_much_and_no_sentence_is_anyone_elses(split: str, share: float) -> None:
    parts = byzantine.shards(LABELS, split, 0)
    assert sorted(index for part in parts for index in part) == list(range(1000))
    for worker, part in enumerate(parts):
        assert len(part) == pytest.approx(100, abs=10)
        own = np.mean([LABELS[index] == worker % 2 for index in part])
        assert own == pytest.approx(share, abs=0.17)
