"""Contributions of a round → one gradient estimate at the directions it measured (pure)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorand import codec
from lorand.codec import Codes, Floats
from lorand.config import ROBUST, RunConfig
from lorand.directions import Draws, Indices
from lorand.errors import ContributionError
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import rules


class UnsoundRound(ContributionError):
    """Everyone is there, but nothing can be made of what they reported."""


@dataclass(frozen=True)
class Report:
    """A participant's codes for a round, how many examples are behind them, and their scale.

    `scale` is in quanta a code, where participants take local steps, else 0.
    """

    codes: Codes
    examples: int = 0
    scale: int = 0


@dataclass(frozen=True)
class Estimate:
    """The aggregated gradient: `values[i]` at direction `indices[i]` (distinct).

    `measured` counts scalars, so that w −= lr · (1/measured) Σ_i values[i] · z_indices[i] is a step
    along an unbiased estimate of the gradient averaged over the participants. `walked` says that
    the values are no gradient: w −= lr · Σ_i values[i] · z_indices[i] takes the mean of the
    participants' local steps at lr = 1 (Reddi et al., Adaptive Federated Optimization, ICLR 2021,
    algorithm 1).
    """

    indices: Indices
    values: Floats
    measured: int
    walked: bool = False


def report(config: RunConfig, contribution: pb.Contribution, count: int = 0) -> Report:
    """Return what a contribution to a round of `count` directions (0: as usual) says.

    Raises ContributionError when it does not fit the run.
    """
    count = count or config.num_directions
    codes = codec.unpack(config.codec.up, contribution.codes, count)
    if config.local.taken:
        moved = codec.delta(contribution.scale, codes)
        codec.check_move(moved, config.directions.quantum_exponent)
        if contribution.scale == 0 and codes.any() and config.codec.up != "sign":
            raise ContributionError("what local steps moved came without the scale of its codes")
    elif contribution.scale:
        raise ContributionError("a scale came with scalars, which have the round's")
    return Report(codes, contribution.examples, contribution.scale)


def aggregate(
    config: RunConfig,
    draws: Draws,
    round_index: int,
    scale_exponent: int,
    reports: Mapping[int, Report],
) -> Estimate:
    """Return the mean over participants (equal, or by examples) of their decoded scalars.

    Or what another of the `rules` makes of them. With own directions a participant's scalars stand
    at its own indices; where two participants drew the same one, their scalars add. The result
    does not depend on the order of arrival.
    """
    if not reports:
        raise ContributionError("a round without contributions cannot be aggregated")
    workers = tuple(sorted(reports))
    weights = _weights(config, [reports[worker].examples for worker in workers])
    parts = [
        weight * decoded(config, reports[worker], scale_exponent)
        for worker, weight in zip(workers, weights, strict=True)
    ]
    rule = config.rounds.aggregation
    if rule == "clipped-mean":
        parts = list(rules.clip(np.stack(parts)))
    indices = draws.committed(round_index, workers, len(parts[0]))
    walked = config.local.taken
    factors = np.ones(len(indices)) if walked else draws.importance(indices)
    if config.directions.mode == "shared":
        rows = np.stack(parts)
        if rule == "majority":
            return Estimate(indices, rules.vote(rows, weights), len(indices))
        if rule == "median":
            values = factors * rules.median(rows)
        elif rule == "trimmed-mean":
            values = factors * rules.trimmed_mean(rows, config.rounds.trim)
        else:
            values = factors * np.sum(rows, axis=0) / len(workers)
        return Estimate(indices, values, len(indices), walked)
    place = {index: position for position, index in enumerate(indices.tolist())}
    values = np.zeros(len(indices))
    for worker, part in zip(workers, parts, strict=True):
        drawn = draws.of(round_index, worker)
        np.add.at(values, [place[index] for index in drawn.tolist()], part)
    if walked:
        return Estimate(indices, values / len(workers), len(indices), walked)
    return Estimate(indices, factors * values, len(workers) * config.num_directions)


def scaling_codes(config: RunConfig, reports: Mapping[int, Report]) -> Codes:
    """Return the codes that the scale of the next round follows.

    Those of all participants; of the typical one alone where liars are reckoned with: a third of
    saturated contributions would else raise the scale without end, until honest codes are zero.
    """
    codes = [reports[worker].codes for worker in sorted(reports)]
    if config.rounds.aggregation in ROBUST:
        rows = np.stack([codec.decode(config.codec.up, part, 0) for part in codes])
        return codes[rules.typical(rows)]
    return np.concatenate(codes)


def decoded(config: RunConfig, report: Report, scale_exponent: int) -> Floats:
    """Return a report's scalars, shape (num_directions,).

    Of local steps it is the way they went, turned round, in units of an unscaled weight.
    """
    if not config.local.taken:
        return codec.decode(config.codec.up, report.codes, scale_exponent)
    moved = codec.delta(report.scale, report.codes).astype(np.float64)
    return moved * -(2.0**-config.directions.quantum_exponent)


def _weights(config: RunConfig, examples: list[int]) -> list[float]:
    """Weights with mean one."""
    if config.rounds.weighting == "equal" or sum(examples) == 0:
        return [1.0] * len(examples)
    return [len(examples) * count / sum(examples) for count in examples]
