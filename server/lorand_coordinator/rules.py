"""Rules that bound what participants who lie do to a round (pure, numpy).

All take the participants' decoded scalars and are functions of the multiset of rows: who sent what,
and in which order it came, changes no bit. What each withstands, with n participants of whom f lie:

    median         coordinate by coordinate; between honest values while f < n/2
    trimmed mean   without the g largest and g smallest of each coordinate; while f <= g
    clipped mean   no vector longer than the typical one, C; f liars move it by at most 2 f C / n
    vote           of signs, coordinate by coordinate; right where honest signs outnumber the others

Median and trimmed mean: Yin et al., "Byzantine-Robust Distributed Learning: Towards Optimal
Statistical Rates", ICML 2018, definitions 1 and 2, here on scalars along directions as in CyBeR-0
(arXiv 2406.14362). Vote: FeedSign, arXiv 2501.17610. What they cost: docs/robustness.md.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np

from lorand.codec import Floats


def median(rows: Floats) -> Floats:
    """Return the median of each column of rows of shape (n, m), shape (m,)."""
    middle: Floats = np.median(rows, axis=0)
    return middle


def trimmed_mean(rows: Floats, share: float) -> Floats:
    """Return the mean of each column without ceil(share · n) values at either end, shape (m,).

    rows: shape (n, m). Where nothing would be left, the middle one or two are: the median.
    """
    count = len(rows)
    cut = min(ceil(share * count), (count - 1) // 2)
    kept = np.sort(rows, axis=0)[cut : count - cut]
    mean: Floats = kept.sum(axis=0) / len(kept)
    return mean


def clip(rows: Floats) -> Floats:
    """Return the rows, shape (n, m), those longer than the typical row shortened to its length.

    The bound is a round's own, so that it needs no state, and follows scalars that shrink in the
    course of a run; while f < n/2 it is at most the length of an honest row.
    """
    lengths = np.sqrt(np.sum(rows**2, axis=1))
    bound = lengths[typical(rows)]
    factors = np.divide(bound, lengths, out=np.ones(len(rows)), where=lengths > bound)
    clipped: Floats = rows * factors[:, None]
    return clipped


def typical(rows: Floats) -> int:
    """Return the number of the row whose length is the (lower) median of all."""
    order = np.argsort(np.sum(rows**2, axis=1), kind="stable")
    return int(order[(len(rows) - 1) // 2])


def vote(rows: Floats, weights: Sequence[float]) -> Floats:
    """Return the sign that outweighs the other in each column, 0 where none does, shape (m,)."""
    votes = [weight * np.sign(row) for weight, row in zip(weights, rows, strict=True)]
    outcome: Floats = np.sign(np.sum(votes, axis=0))
    return outcome
