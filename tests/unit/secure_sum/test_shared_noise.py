"""Noise that members of a secure sum share: enough where only some are honest."""

import numpy as np
import pytest
from tests.unit.secure_sum.cohort import Cohort

from lorand.errors import ConfigError
from lorand.privacy.shared_noise import local_noise, tau


@pytest.mark.parametrize(
    ("std", "expected"), [(0.5, 2.10), (1.0, 5.4e-4), (2.0, 7e-17), (4.0, 2.6e-68)]
)
def test_how_far_a_sum_of_eight_is_from_gaussian(std: float, expected: float) -> None:
    """τ of arXiv 2102.06387."""
    assert tau(std, 8) == pytest.approx(expected, rel=0.03)
    assert tau(std, 1) == 0


@pytest.mark.parametrize("honest", [1, 3, 8, 32])
def test_the_honest_shares_are_enough(honest: int) -> None:
    """Their variances add up to σ²C², and to hardly more."""
    share = local_noise(3.7, 100, members=32, honest_min=honest)
    assert 370**2 <= honest * share.std**2 < 370.01**2
    assert share.tau <= tau(4, honest)
    assert share.bound(100) >= 100 + 16 * share.std


def test_noise_on_a_coarse_grid_is_refused() -> None:
    with pytest.raises(ConfigError, match="the clip bound is at least 12 steps"):
        local_noise(1.0, 11, members=9, honest_min=9)
    assert local_noise(1.0, 12, members=9, honest_min=9).std == 4.0


@pytest.mark.parametrize(
    ("multiplier", "clip", "members", "honest", "message"),
    [
        (0.0, 8, 8, 8, "hides nothing"),
        (float("nan"), 8, 8, 8, "hides nothing"),
        (float("inf"), 8, 8, 8, "hides nothing"),
        (1.0, 0, 8, 8, "hides nothing"),
        (9.0, 8, 8, 0, "cannot be the honest ones"),
        (9.0, 8, 8, 9, "cannot be the honest ones"),
        (9.0, 8, 33, 9, "cannot be the honest ones"),
    ],
)
def test_noise_that_cannot_be(
    multiplier: float, clip: int, members: int, honest: int, message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        local_noise(multiplier, clip, members=members, honest_min=honest)


def test_noise_and_sum_together() -> None:
    """Eight workers, noise of each, one sum: the data and a noise of at least σC."""
    cohort = Cohort(8, bound=local_noise(4.0, 64, members=8, honest_min=6).bound(64))
    share = local_noise(4.0, 64, members=8, honest_min=6)
    generator = np.random.default_rng(2)
    noises = [np.rint(generator.normal(0, share.std, 4096)).astype(np.int64) for _ in range(8)]
    attempt = cohort.attempt(4096)
    messages = cohort.masked(attempt, {n: noise + 64 for n, noise in enumerate(noises)})
    total = cohort.total(attempt, messages) - 8 * 64
    assert total.tolist() == np.sum(noises, axis=0).tolist()
    assert total.std() == pytest.approx(256 * (8 / 6) ** 0.5, rel=0.05)
