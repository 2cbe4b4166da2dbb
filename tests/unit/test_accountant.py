"""What releases cost (notes/privacy.md §1.3), and the ways to count them wrongly."""

import builtins
from math import log
from typing import Any

import dp_accounting
import pytest
from dp_accounting import pld, rdp

from lorand.errors import ConfigError
from lorand.privacy.accountant import (
    Accountant,
    Release,
    calibrated,
    epsilon,
    laplace_epsilon,
    per_scalar,
)

DELTA = 1e-5


def gaussian(rate: float, multiplier: float) -> Release:
    return Release("gaussian", multiplier, rate)


@pytest.mark.parametrize(
    ("rate", "multiplier", "times", "by_pld", "by_rdp"),
    [
        (0.01, 1.0, 1000, 1.828244, 2.101367),
        (0.01, 1.0, 10000, 6.187745, 6.712757),
        (0.05, 2.0, 500, 2.532034, 2.768585),
        (1.0, 10.0, 100, 4.377179, 4.728507),
    ],
)
def test_golden_values(
    rate: float, multiplier: float, times: int, by_pld: float, by_rdp: float
) -> None:
    """The last row is a Gaussian of multiplier 1, whose exact epsilon is 4.377178."""
    release = gaussian(rate, multiplier)
    assert epsilon(release, times, DELTA) == pytest.approx(by_pld, abs=1e-3)
    assert epsilon(release, times, DELTA, "rdp") == pytest.approx(by_rdp, abs=1e-3)


@pytest.mark.slow
def test_without_sampling_the_same_noise_costs_hundreds() -> None:
    """What a rate of a hundredth brings down to 1.83."""
    assert epsilon(gaussian(1.0, 1.0), 1000, DELTA) == pytest.approx(633.93, abs=1e-2)
    assert epsilon(gaussian(1.0, 1.0), 1000, DELTA, "rdp") == pytest.approx(654.86, abs=1e-2)


@pytest.mark.slow
def test_discrete_noise_on_one_number_costs_what_continuous_noise_does() -> None:
    """T9: on a grid of 50 steps a clip bound it is 1.8801 for 1.8282; ours has 2^30 steps."""
    once = pld.privacy_loss_distribution.from_discrete_gaussian_mechanism(
        50, sensitivity=50, sampling_prob=0.01
    )
    spent = once.self_compose(1000).get_epsilon_for_delta(DELTA)
    assert spent == pytest.approx(1.8801, abs=1e-3)
    assert epsilon(gaussian(0.01, 1.0), 1000, DELTA) == pytest.approx(spent, rel=0.03)


@pytest.mark.parametrize(("share", "expected"), [(0.5, 1.0986), (0.2, 2.1972)])
def test_a_sign_that_is_flipped_by_chance_costs_in_each_round(
    share: float, expected: float
) -> None:
    """T6: why a sign is that of a noisy sum here: ln((1 − p/2) / (p/2)), whatever the batch is."""
    assert log((1 - share / 2) / (share / 2)) == pytest.approx(expected, abs=1e-4)
    once = pld.privacy_loss_distribution.from_randomized_response(share, 2)
    assert once.get_epsilon_for_delta(0) == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(
    ("target", "multiplier"), [(0.5, 2.3823), (1, 1.4147), (2, 0.9592), (4, 0.7348), (8, 0.5863)]
)
@pytest.mark.slow
def test_golden_multipliers(target: float, multiplier: float) -> None:
    found = calibrated(gaussian(0.01, 1.0), 1000, target, DELTA)
    assert found.multiplier == pytest.approx(multiplier, abs=1e-3)
    assert target * 0.999 < epsilon(found, 1000, DELTA) <= target
    assert (found.rate, found.noise) == (0.01, "gaussian")


@pytest.mark.parametrize(
    ("release", "times", "target"),
    [
        (gaussian(0.001, 1.0), 100, 0.1),  # where RDP asks for far more noise
        (Release("gaussian", 1.0, 0.05, cap=12, examples=150), 50, 4.0),  # and for too little
    ],
)
@pytest.mark.slow
def test_no_more_noise_than_the_target_takes(release: Release, times: int, target: float) -> None:
    found = calibrated(release, times, target, DELTA)
    assert epsilon(found, times, DELTA) <= target
    less = Release("gaussian", found.multiplier - 2e-4, found.rate, found.cap, found.examples)
    assert epsilon(less, times, DELTA) > target


@pytest.mark.parametrize(("cap", "expected"), [(13, 7.57), (20, 3.834), (30, 1.8285)])
@pytest.mark.slow
def test_a_cap_on_the_batch_costs_unless_it_is_far_away(cap: int, expected: float) -> None:
    """T3: at three times the mean it is free."""
    release = Release("gaussian", 1.0, 0.01, cap=cap, examples=1000)
    assert epsilon(release, 1000, DELTA) == pytest.approx(expected, abs=2e-3)


@pytest.mark.slow
def test_fewer_examples_than_the_cap_assumes_cost_no_more() -> None:
    """The number of examples is private: what is assumed of it is an upper bound."""
    spent = [
        epsilon(Release("gaussian", 1.0, 0.01, cap=25, examples=count), 1000, DELTA)
        for count in (1000, 2000)
    ]
    assert spent == sorted(spent)


@pytest.mark.parametrize(
    ("rate", "multiplier", "times", "expected"),
    [(0.01, 10.0, 1000, 1.0512), (0.01, 1.0, 1000, 17.037), (1.0, 100.0, 100, 1.0)],
)
def test_laplace_has_a_closed_form(
    rate: float, multiplier: float, times: int, expected: float
) -> None:
    """PLD answers infinity at delta 0."""
    assert laplace_epsilon(multiplier, rate, times) == pytest.approx(expected, abs=1e-3)
    release = Release("laplace", multiplier, rate)
    assert epsilon(release, times, 0.0) == laplace_epsilon(multiplier, rate, times)
    again = calibrated(Release("laplace", 1.0, rate), times, expected, 0.0)
    assert again.multiplier == pytest.approx(multiplier, rel=2e-3)
    assert laplace_epsilon(again.multiplier, rate, times) <= expected * (1 + 1e-12)


def test_laplace_noise_that_is_none() -> None:
    assert laplace_epsilon(1e-4, 0.5, 1) == float("inf")


def test_adjacency_is_to_add_or_to_remove_one() -> None:
    """T1: under "replace one" PLD doubles the sensitivity of a Gaussian, and RDP does not."""
    replace = dp_accounting.NeighboringRelation.REPLACE_ONE
    event = dp_accounting.SelfComposedDpEvent(dp_accounting.GaussianDpEvent(10.0), 100)
    doubled = pld.PLDAccountant(replace).compose(event).get_epsilon(DELTA)
    not_doubled = rdp.RdpAccountant(neighboring_relation=replace).compose(event)
    assert doubled == pytest.approx(9.997256, abs=1e-4)
    assert not_doubled.get_epsilon(DELTA) == pytest.approx(4.7285, abs=1e-3)
    ours = epsilon(gaussian(1.0, 10.0), 100, DELTA)
    assert ours == pytest.approx(4.377, abs=1e-3)


@pytest.mark.parametrize(
    ("rate", "multiplier", "times", "expected"),
    [(0.01, 1.0, 1000, 2.843446), (0.01, 1.0, 10000, 10.880807), (0.05, 2.0, 500, 4.980757)],
)
@pytest.mark.slow
def test_replacing_one_costs_more_and_only_one_accountant_says_so(
    rate: float, multiplier: float, times: int, expected: float
) -> None:
    """T1, with sampling: RDP refuses; so nothing here is promised of replaced examples."""
    replace = dp_accounting.NeighboringRelation.REPLACE_ONE
    sampled = dp_accounting.PoissonSampledDpEvent(rate, dp_accounting.GaussianDpEvent(multiplier))
    event = dp_accounting.SelfComposedDpEvent(sampled, times)
    spent = pld.PLDAccountant(replace).compose(event).get_epsilon(DELTA)
    assert spent == pytest.approx(expected, abs=1e-4)
    with pytest.raises(dp_accounting.UnsupportedEventError):
        rdp.RdpAccountant(neighboring_relation=replace).compose(event)


def test_scalars_of_one_batch_are_one_sampled_event() -> None:
    """T2: composing them as if each had a batch of its own understates epsilon."""
    count, multiplier, times = 16, 4.0, 1000
    right = epsilon(gaussian(0.01, per_scalar(multiplier, count)), times, DELTA)
    wrong = epsilon(gaussian(0.01, multiplier), count * times, DELTA)
    assert right == pytest.approx(1.828, abs=1e-3)
    assert wrong == pytest.approx(1.225, abs=1e-3)
    nested = dp_accounting.ComposedDpEvent([dp_accounting.GaussianDpEvent(multiplier)] * count)
    event = dp_accounting.PoissonSampledDpEvent(0.01, nested)
    check = rdp.RdpAccountant().compose(event, times).get_epsilon(DELTA)
    assert check == pytest.approx(
        epsilon(gaussian(0.01, per_scalar(multiplier, count)), times, DELTA, "rdp"), abs=1e-6
    )


@pytest.mark.parametrize("accountant", ["pld", "rdp"])
def test_nothing_released_costs_nothing(accountant: Accountant) -> None:
    assert epsilon(gaussian(0.01, 1.0), 0, DELTA, accountant) == 0.0


def test_a_target_out_of_reach_is_said() -> None:
    with pytest.raises(ConfigError, match=r"privacy.target_epsilon"):
        calibrated(gaussian(1.0, 1.0), 10**6, 1e-6, 1e-9)
    with pytest.raises(ConfigError, match=r"noise multiplier .* raise privacy.target_epsilon"):
        calibrated(Release("laplace", 1.0, 1.0), 10**6, 1e-6, 0.0)


def test_without_the_library_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any) -> Any:
        if name.startswith("dp_accounting"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ConfigError, match=r"pip install 'lorand\[privacy\]'"):
        epsilon(gaussian(0.01, 1.0), 1, DELTA)
    assert laplace_epsilon(1.0, 1.0, 1) == 1.0, "needs no library"
