"""Contributions of a round → one gradient estimate, whatever order they came in (DESIGN §3)."""

from dataclasses import replace
from typing import Any, Final, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runs import codes_of, config_of

from lorand import codec
from lorand.codec import Floats
from lorand.directions import Draws
from lorand.errors import ContributionError
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.aggregation import Estimate, Report, aggregate, report

RUN: Final = bytes(range(32))
SCALE: Final = -4


def reports_of(
    workers: list[int], examples: list[int] | None = None, **changes: Any
) -> dict[int, Report]:
    config = config_of(**changes)
    counts = examples or [0] * len(workers)
    return {w: Report(codes_of(config, w), n) for w, n in zip(workers, counts, strict=True)}


def estimate_of(
    reports: dict[int, Report],
    *,
    mode: Literal["shared", "own"] = "shared",
    weighting: str = "equal",
    round_index: int = 5,
    count: int = 3,
) -> Estimate:
    config = config_of(
        directions={"mode": mode},
        rounds={"weighting": weighting},
        estimator={"directions_per_round": count},
    )
    return aggregate(config, draws_of(mode, count), round_index, SCALE, reports)


def draws_of(mode: Literal["shared", "own"], count: int = 3) -> Draws:
    return Draws(RUN, mode, 64, count)


def values_of(reports: dict[int, Report]) -> Floats:
    """The decoded scalars, a row a worker."""
    return np.array([reports[w].codes * 2.0**SCALE for w in sorted(reports)])


# ------------------------------------------------------------- shared directions


def test_the_estimate_is_the_mean_at_the_rounds_directions() -> None:
    reports = reports_of([1, 2, 9])
    estimate = estimate_of(reports)
    assert estimate.indices.tolist() == draws_of("shared").of(5, 0).tolist()
    assert estimate.values == pytest.approx(values_of(reports).mean(axis=0))
    assert estimate.measured == 3


@pytest.mark.parametrize("up", ["sign", "int8"])
def test_a_majority_moves_by_its_sign_alone(up: str) -> None:
    """However large a participant's scalars are, it has one vote; a tie moves nothing."""
    codes = {1: [1, -1, 1], 2: [1, -1, -1], 9: [-1, -1, 1], 10: [1, 1, -1]}
    loud = 100 if up == "int8" else 1
    reports = {w: Report(np.array(c) * (loud if w == 9 else 1)) for w, c in codes.items()}
    config = config_of(codec={"up": up}, rounds={"aggregation": "majority"})
    estimate = aggregate(config, draws_of("shared"), 5, SCALE, reports)
    assert estimate.values.tolist() == [1, -1, 0]
    weighted = config_of(
        codec={"up": up}, rounds={"aggregation": "majority", "weighting": "examples"}
    )
    counted = {w: Report(report.codes, 97 if w == 9 else 1) for w, report in reports.items()}
    estimate = aggregate(weighted, draws_of("shared"), 5, SCALE, counted)
    assert estimate.values.tolist() == [-1, -1, 1]


def test_by_examples_is_the_mean_over_examples() -> None:
    """Federated averaging: as if every example had been measured at one place."""
    reports = reports_of([1, 2, 9], [1, 10, 989])
    estimate = estimate_of(reports, weighting="examples")
    weights = np.array([1, 10, 989]) / 1000
    assert estimate.values == pytest.approx(weights @ values_of(reports))
    assert estimate.measured == 3


def test_equal_weighting_ignores_examples() -> None:
    with_examples = estimate_of(reports_of([1, 2], [1, 1000]))
    assert with_examples.values.tolist() == estimate_of(reports_of([1, 2])).values.tolist()


def test_workers_without_any_examples_count_alike() -> None:
    nobody = estimate_of(reports_of([1, 2], [0, 0]), weighting="examples")
    assert nobody.values.tolist() == estimate_of(reports_of([1, 2])).values.tolist()


# ------------------------------------------------------------- own directions


def test_own_scalars_stand_at_their_own_directions() -> None:
    reports = reports_of([1, 2])
    estimate = estimate_of(reports, mode="own")
    dense = np.zeros(64)
    for worker, values in zip([1, 2], values_of(reports), strict=True):
        np.add.at(dense, draws_of("own").of(5, worker), values)
    assert len(set(estimate.indices.tolist())) == len(estimate.indices)
    assert dense[estimate.indices] == pytest.approx(estimate.values)
    assert dense.sum() == pytest.approx(estimate.values.sum())
    assert estimate.measured == 6


def test_where_two_drew_the_same_direction_their_scalars_add() -> None:
    """Twenty of 64 directions, three workers: some are drawn twice."""
    reports = reports_of([1, 2, 3], estimator={"directions_per_round": 20})
    estimate = estimate_of(reports, mode="own", count=20)
    drawn = [draws_of("own", 20).of(5, worker).tolist() for worker in (1, 2, 3)]
    assert len(estimate.indices) == len({k for row in drawn for k in row}) < 60
    assert estimate.measured == 60
    for place, k in enumerate(estimate.indices.tolist()):
        parts = [
            values[row.index(k)]
            for row, values in zip(drawn, values_of(reports), strict=True)
            if k in row
        ]
        assert estimate.values[place] == pytest.approx(sum(parts))


def test_own_by_examples() -> None:
    reports = reports_of([1, 2], [1, 3])
    weighted = estimate_of(reports, mode="own", weighting="examples")
    dense = np.zeros(64)
    for worker, weight, values in zip([1, 2], [0.5, 1.5], values_of(reports), strict=True):
        np.add.at(dense, draws_of("own").of(5, worker), weight * values)
    assert weighted.values == pytest.approx(dense[weighted.indices])


# ------------------------------------------------------------- any round


@settings(deadline=None, max_examples=60)
@given(
    st.permutations([1, 2, 3, 7, 40]),
    st.sampled_from(["shared", "own"]),
    st.sampled_from(["equal", "examples"]),
)
def test_the_order_of_arrival_is_irrelevant(
    arrival: list[int], mode: Literal["shared", "own"], weighting: str
) -> None:
    """To the bit: a restarted coordinator reads them in another order than they came."""
    sorted_reports = reports_of([1, 2, 3, 7, 40], [5, 3, 11, 2, 8])
    arrived = {worker: sorted_reports[worker] for worker in arrival}
    first = estimate_of(sorted_reports, mode=mode, weighting=weighting)
    second = estimate_of(arrived, mode=mode, weighting=weighting)
    assert second.indices.tolist() == first.indices.tolist()
    assert second.values.tobytes() == first.values.tobytes()


def test_nobody_is_an_error() -> None:
    with pytest.raises(ContributionError, match="without contributions"):
        estimate_of({})


@pytest.mark.parametrize("up", ["int8", "sign", "int32"])
def test_unpack_takes_a_contribution_of_the_run(up: codec.Codec) -> None:
    config = config_of(codec={"up": up})
    codes = codes_of(config, 0)
    packed = codec.pack(up, codes)
    assert report(config, pb.Contribution(codes=packed)).codes.tolist() == codes.tolist()
    with pytest.raises(ContributionError, match=f"3 {up} codes take"):
        report(config, pb.Contribution(codes=packed + b"\0"))


def test_a_first_order_contribution_has_the_whole_pool() -> None:
    config = config_of(estimator={"kind": "backprop"})
    assert config.num_directions == 64
    assert len(report(config, pb.Contribution(codes=bytes(64))).codes) == 64
    with pytest.raises(ContributionError):
        report(config, pb.Contribution(codes=bytes(3)))


# ------------------------------------------------------------- local steps

QUANTUM: Final = 2.0**-32


def walks_of(workers: list[int], count: int = 3) -> dict[int, Report]:
    """Where steps led, each with a scale of its own."""
    config = config_of(estimator={"directions_per_round": count}, local={"steps": 1})
    return {w: Report(codes_of(config, w), examples=w, scale=1000 * w) for w in workers}


def ways_of(reports: dict[int, Report]) -> Floats:
    """How far each went, in weights, a row a worker."""
    return np.array([reports[w].codes * reports[w].scale * QUANTUM for w in sorted(reports)])


def walked(
    reports: dict[int, Report], mode: str = "shared", weighting: str = "equal", count: int = 3
) -> Estimate:
    config = config_of(
        directions={"mode": mode},
        rounds={"weighting": weighting},
        estimator={"directions_per_round": count},
        local={"steps": 1},
    )
    draws = config.draws(RUN)
    return aggregate(config, draws, 5, SCALE, reports)


def test_of_walks_the_estimate_is_the_mean_way_back() -> None:
    """In weights, whatever the round's scale is: that is for scalars."""
    reports = walks_of([1, 2, 9])
    estimate = walked(reports)
    assert estimate.walked
    assert estimate.values == pytest.approx(-ways_of(reports).mean(axis=0))
    by_examples = walked(reports, weighting="examples")
    weights = np.array([1, 2, 9]) / 12
    assert by_examples.values == pytest.approx(-(weights @ ways_of(reports)))


@pytest.mark.parametrize("weighting", ["equal", "examples"])
def test_own_walks_are_divided_by_the_workers_and_add(weighting: str) -> None:
    """The mean over workers of sparse ways; at a direction of two, both have a part in it."""
    reports = walks_of([1, 2, 3], 20)
    estimate = walked(reports, "own", weighting, 20)
    weights = np.ones(3) / 3 if weighting == "equal" else np.array([1, 2, 3]) / 6
    dense = np.zeros(64)
    for worker, weight, way in zip([1, 2, 3], weights, ways_of(reports), strict=True):
        np.add.at(dense, draws_of("own", 20).of(5, worker), -weight * way)
    assert len(estimate.indices) < 60
    assert estimate.values == pytest.approx(dense[estimate.indices])
    assert dense.any()


@settings(deadline=None, max_examples=30)
@given(st.permutations([1, 2, 3, 7, 40]), st.sampled_from(["shared", "own"]))
def test_walks_arrive_in_any_order(arrival: list[int], mode: str) -> None:
    reports = walks_of([1, 2, 3, 7, 40])
    again = walked({worker: reports[worker] for worker in arrival}, mode, "examples")
    assert again.values.tobytes() == walked(reports, mode, "examples").values.tobytes()


@pytest.mark.parametrize("mode", ["shared", "own"])
def test_scalars_of_weighted_directions_are_divided_by_how_likely_they_were(mode: str) -> None:
    """Local steps have them divided already, where they were measured."""
    directions = {"mode": mode, "drawing": "weighted-unbiased"}
    config = config_of(directions=directions, estimator={"directions_per_round": 20})
    draws = config.draws(RUN).after(np.arange(9), np.arange(9) * 1000)
    plain = replace(draws, drawing="weighted")
    reports = reports_of([1, 2, 3], estimator={"directions_per_round": 20})
    unbiased = aggregate(config, draws, 5, SCALE, reports)
    weighted = aggregate(config, plain, 5, SCALE, reports)
    factors = draws.importance(unbiased.indices)
    assert len(set(factors.tolist())) > 3
    assert unbiased.indices.tolist() == weighted.indices.tolist()
    assert unbiased.values == pytest.approx(factors * weighted.values)
    stepping = config_of(
        directions=directions, estimator={"directions_per_round": 20}, local={"steps": 1}
    )
    walks = walks_of([1, 2], 20)
    one, two = (aggregate(stepping, d, 5, SCALE, walks) for d in (draws, plain))
    assert one.values.tolist() == two.values.tolist()


@pytest.mark.parametrize(
    ("up", "scale", "codes", "why"),
    [
        ("int8", 0, [1, 0, 0], "without the scale"),
        ("int32", 0, [0, 0, -1], "without the scale"),
        ("int8", 2**62, [0, 0, 0], "above the limit"),
        ("int8", 2**64 - 1, [1, 1, 1], "above the limit"),
        ("sign", 2**62, [1, 1, 1], "above the limit"),
        ("int32", 2**40, [2**31 - 1, 0, 0], "above the limit"),
        ("int8", 2**42, [0, 2, 0], "the limit is 1024"),
        ("sign", 2**41, [1, 1, 1], "the limit is 1024"),
        ("sign", 2**61, [1, 1, 1], "the limit is 1024"),
    ],
)
def test_walks_that_cannot_be_are_refused(
    up: codec.Codec, scale: int, codes: list[int], why: str
) -> None:
    """Before they count: one contribution never stops a round, nor ruins the coefficients."""
    config = config_of(codec={"up": up}, local={"steps": 1})
    packed = codec.pack(up, np.array(codes))
    with pytest.raises(ContributionError, match=why):
        report(config, pb.Contribution(codes=packed, scale=scale))


@pytest.mark.parametrize(
    ("up", "scale", "codes"),
    [("int8", 0, [0, 0, 0]), ("sign", 0, [1, -1, 1]), ("int8", 2**34, [127, -127, 1])],
)
def test_small_and_large_walks_that_can_be(up: codec.Codec, scale: int, codes: list[int]) -> None:
    config = config_of(codec={"up": up}, local={"steps": 1})
    read = report(config, pb.Contribution(codes=codec.pack(up, np.array(codes)), scale=scale))
    assert (read.codes.tolist(), read.scale) == (codes, scale)


def test_a_scale_does_not_come_with_scalars() -> None:
    codes = codec.pack("int8", np.ones(3, np.int64))
    with pytest.raises(ContributionError, match="a scale came with scalars"):
        report(config_of(), pb.Contribution(codes=codes, scale=1))
