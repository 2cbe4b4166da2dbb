"""Token buckets: never more than the rate and the burst allow, and never less for who waits."""

import resource

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests import tiny

from lorand.errors import ConfigError
from lorand_coordinator import limits, serving
from lorand_coordinator.limits import Bucket, Buckets, Flow, TooMany

gaps = st.lists(st.floats(0, 10, allow_nan=False), min_size=1, max_size=20)
rates = st.floats(0.1, 5)
bursts = st.floats(1, 20)


@given(gaps, rates, bursts)
def test_no_stretch_of_time_gives_more_than_burst_and_rate(
    steps: list[float], rate: float, burst: float
) -> None:
    bucket, now = Bucket(rate, burst, 0.0), 0.0
    taken: list[float] = []
    for step in steps:
        now += step
        while not bucket.take(now):
            taken.append(now)
    for first, began in enumerate(taken):
        for last in range(first, len(taken)):
            assert last - first + 1 <= burst + rate * (taken[last] - began) + 1e-6


@given(gaps, rates, bursts)
def test_who_waits_as_long_as_it_is_told_gets_a_token(
    steps: list[float], rate: float, burst: float
) -> None:
    bucket, now = Bucket(rate, burst, 0.0), 0.0
    for step in steps:
        now += step
        wait = bucket.take(now)
        assert 0 <= wait <= 1.001 / rate
        if wait:
            now += wait
            assert bucket.take(now) == 0


def test_a_clock_that_stands_still_or_goes_back_gives_nothing() -> None:
    bucket = Bucket(1.0, 2.0, 100.0)
    assert [bucket.take(now) for now in (100.0, 90.0)] == [0.0, 0.0]
    assert bucket.take(90.0) == 1.0
    assert bucket.take(100.5) == 0.5


def test_each_peer_has_a_bucket_and_the_one_longest_unused_is_forgotten() -> None:
    buckets = Buckets(1.0, 1.0, most=2)
    assert [buckets.take(peer, 0.0) for peer in "aabb"] == [0.0, 1.0, 0.0, 1.0]
    assert buckets.take("a", 0.0)  # now b is the one
    assert buckets.take("c", 0.0) == 0.0
    assert buckets.take("a", 0.0)
    assert len(buckets) == 2


def test_a_stream_is_held_back_and_ends_only_when_it_does_not_let_up() -> None:
    flow = Flow(100.0, 0.0)
    assert [flow.take(0.0) for _ in range(100)] == [0.0] * 100
    assert flow.take(0.0) == pytest.approx(0.01)
    now = 0.0

    def send_all() -> None:
        nonlocal now
        while now < 60.0:
            now += flow.take(now)

    with pytest.raises(TooMany, match="more than 100 messages a second came for 10 s"):
        send_all()
    assert limits.PATIENCE_S < now < limits.PATIENCE_S + 0.1


def test_a_stream_that_pauses_now_and_then_never_ends() -> None:
    flow, now = Flow(100.0, 0.0), 0.0
    for _ in range(50):
        for _ in range(300):
            now += flow.take(now)
        now += 0.8


@pytest.mark.parametrize(
    ("limit", "several", "raised"),
    [((1024, 4096), False, 2192), ((1024, 4096), True, 2450), ((5000, 5000), True, 0)],
)
def test_descriptors_are_seen_to(
    limit: tuple[int, int], several: bool, raised: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 workers: 2,064 connections, 64 for enrolment, 64 for files; to a leader 258."""
    wanted: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: limit)
    monkeypatch.setattr(resource, "setrlimit", lambda what, pair: wanted.append((what, pair)))
    serving.check_descriptors(tiny.config("spsa"), several=several)
    expected = [(resource.RLIMIT_NOFILE, (raised, limit[1]))] if raised else []
    assert wanted == expected


def test_too_few_descriptors_are_told_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (256, 512))
    with pytest.raises(ConfigError, match=r"may open 512: raise the limit .*LimitNOFILE=2192"):
        serving.check_descriptors(tiny.config("spsa"), several=False)
