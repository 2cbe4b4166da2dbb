"""Exact samples of discrete Gaussian and discrete Laplace noise, in integers alone.

Canonne, Kamath, Steinke, The Discrete Gaussian for Differential Privacy, NeurIPS 2020: algorithm 1
(Bernoulli of exp(−γ)), 2 (discrete Laplace), 3 (discrete Gaussian). No float is involved, so there
is none whose last bits could tell what was added to what (Mironov, CCS 2012).

Randomness is the operating system's. Directions are public: noise from a generator that was ever
seeded would be public with them.
"""

import secrets
from collections.abc import Callable

Below = Callable[[int], int]
"""A number from 0 to n − 1, all alike likely: `secrets.randbelow`, another source in tests only."""


def _bernoulli(numerator: int, denominator: int, below: Below) -> bool:
    return below(denominator) < numerator


def bernoulli_exp(numerator: int, denominator: int, below: Below = secrets.randbelow) -> bool:
    """Return True with the chance exp(−γ), γ = numerator/denominator ≥ 0 (algorithm 1)."""
    whole, rest = divmod(numerator, denominator)
    return all(_up_to_one(1, 1, below) for _ in range(whole)) and _up_to_one(
        rest, denominator, below
    )


def _up_to_one(numerator: int, denominator: int, below: Below) -> bool:
    """exp(−γ) for γ ≤ 1: the first K at which a chance of γ/K fails is odd."""
    count = 1
    while _bernoulli(numerator, denominator * count, below):
        count += 1
    return count % 2 == 1


def laplace(scale: int, below: Below = secrets.randbelow) -> int:
    """Return x with probability ∝ exp(−|x|/scale), scale a positive integer (algorithm 2)."""
    while True:
        part = below(scale)
        if not bernoulli_exp(part, scale, below):
            continue
        turns = 0
        while _up_to_one(1, 1, below):
            turns += 1
        magnitude = part + scale * turns
        negative = bool(below(2))
        if not (negative and magnitude == 0):
            return -magnitude if negative else magnitude


def gaussian(sigma: int, below: Below = secrets.randbelow, *, denominator: int = 1) -> int:
    """Return x with probability ∝ exp(−x²/2σ²), σ = sigma/denominator > 0 (algorithm 3)."""
    around = sigma // denominator + 1
    square, unit = sigma * sigma, denominator * denominator * around
    while True:
        candidate = laplace(around, below)
        away = abs(candidate) * unit - square
        if bernoulli_exp(away * away, 2 * square * unit * around, below):
            return candidate
