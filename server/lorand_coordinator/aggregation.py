"""Contributions of a round → one gradient estimate at the directions it measured (pure)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lorand import codec
from lorand.codec import Codes, Floats
from lorand.config import RunConfig
from lorand.directions import Draws, Indices
from lorand.errors import ContributionError


@dataclass(frozen=True)
class Report:
    """A participant's codes for a round, and how many examples are behind them."""

    codes: Codes
    examples: int = 0


@dataclass(frozen=True)
class Estimate:
    """The aggregated gradient: `values[i]` at direction `indices[i]` (distinct).

    `measured` counts scalars, so that w −= lr · (1/measured) Σ_i values[i] · z_indices[i] is a step
    along an unbiased estimate of the gradient averaged over the participants.
    """

    indices: Indices
    values: Floats
    measured: int


def unpack(config: RunConfig, data: bytes) -> Codes:
    """Return the codes of a contribution. Raises ContributionError when they do not fit."""
    return codec.unpack(config.codec.up, data, config.num_directions)


def aggregate(
    config: RunConfig,
    draws: Draws,
    round_index: int,
    scale_exponent: int,
    reports: Mapping[int, Report],
) -> Estimate:
    """Return the mean over participants (equal, or by examples) of their decoded scalars.

    With `majority` it is the sign that outweighs the other, 0 where none does (FeedSign, arXiv
    2501.17610): a participant moves a direction by its vote at most. With own directions a
    participant's scalars stand at its own indices; where two participants drew the same one, their
    scalars add. The result does not depend on the order of arrival.
    """
    if not reports:
        raise ContributionError("a round without contributions cannot be aggregated")
    workers = tuple(sorted(reports))
    weights = _weights(config, [reports[worker].examples for worker in workers])
    decoded = [
        weight * codec.decode(config.codec.up, reports[worker].codes, scale_exponent)
        for worker, weight in zip(workers, weights, strict=True)
    ]
    indices = draws.committed(round_index, workers)
    if config.directions.mode == "shared":
        if config.rounds.aggregation == "majority":
            decoded = [
                weight * np.sign(part) for weight, part in zip(weights, decoded, strict=True)
            ]
            return Estimate(indices, np.sign(np.sum(decoded, axis=0)), len(indices))
        mean = np.sum(decoded, axis=0) / len(workers)
        return Estimate(indices, mean, len(indices))
    place = {index: position for position, index in enumerate(indices.tolist())}
    values = np.zeros(len(indices))
    for worker, part in zip(workers, decoded, strict=True):
        drawn = draws.of(round_index, worker)
        np.add.at(values, [place[index] for index in drawn.tolist()], part)
    return Estimate(indices, values, len(workers) * config.num_directions)


def _weights(config: RunConfig, examples: list[int]) -> list[float]:
    """Weights with mean one."""
    if config.rounds.weighting == "equal" or sum(examples) == 0:
        return [1.0] * len(examples)
    return [len(examples) * count / sum(examples) for count in examples]
