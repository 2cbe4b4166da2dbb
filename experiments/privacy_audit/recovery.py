"""A1: how much of a gradient the scalars give back, against their number over its dimension.

Zeroth order: SPSA scalars of MiniLM's head, d = 770, one sentence or eight. The shortest gradient
that fits is what an attacker knows at least; one who knows that two classes share one row (a head's
gradient is (p − y)hᵀ) needs half the scalars. First order: sketches of the last layer and of the
whole model, by back-projection, which for whole pools is the shortest fit but for a factor.
"""

from itertools import product
from typing import Any, Final

import numpy as np

from experiments.privacy_audit import subjects, view
from experiments.privacy_audit.subjects import Subject
from lorand.codec import Codec, Floats
from lorand.directions import draw
from lorand.privacy.accountant import Release, calibrated
from lorand.privacy.mechanism import Mechanism

COUNTS: Final = (96, 192, 385, 578, 770, 1155, 2310, 4096)
CODECS: Final[tuple[Codec | None, ...]] = (None, "int8", "sign")
ROUNDS, RATE, DELTA = 1000, 0.01, 1e-5
"""Of the private run whose noise is measured: T, q and δ."""
TOP: Final = 0.01
"""Share of the rows of all matrices that count as the largest."""


def name_of(codec: Codec | None) -> str:
    """Return what a results file calls a codec."""
    return codec or "float"


def multipliers() -> dict[str, float]:
    """Return the noise multipliers of runs of epsilon 8 and 2."""
    like = Release("gaussian", 1.0, RATE)
    return {f"{e:g}": calibrated(like, ROUNDS, e, DELTA).multiplier for e in (8.0, 2.0)}


def run(seeds: int) -> dict[str, Any]:
    """Return the rows of A1."""
    return {"zeroth_order": zeroth(seeds), "first_order": first(seeds), "noise": noised(seeds)}


def zeroth(seeds: int) -> list[dict[str, Any]]:
    """Return relative errors of the head's gradient, by scalars, codec and batch size."""
    subject = head()
    dimension, rows = subject.view.dimension, []
    for batch_size in (1, 8):
        errors: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for seed in range(seeds):
            batch = subjects.batch_of(subject, batch_size, seed)
            true = subject.gradient(batch)
            indices = np.random.default_rng([seed, 5]).permutation(subject.view.size)
            values = subject.estimator.measure(subject.task.loss, batch, indices).values
            for count, name in product(COUNTS, CODECS):
                told, at = view.coded(name, values[:count]), indices[:count]
                plain = subject.view.solve(told, at, iterations=4 * dimension)
                fits = view.fitted(plain, true), view.fitted(one_row(subject, told, at), true)
                errors.setdefault((count, name_of(name)), []).append(fits)
        for (count, codec), pairs in errors.items():
            error, known = (view.mean_and_error([pair[i] for pair in pairs]) for i in (0, 1))
            rows.append(
                {
                    "scalars": count,
                    "dimension": dimension,
                    "batch_size": batch_size,
                    "codec": codec,
                    "error": error,
                    "error_structure_known": known,
                    "theory": round(max(0.0, 1 - count / dimension) ** 0.5, 4),
                }
            )
    return rows


def head() -> Subject:
    """Return MiniLM with its head trained alone, by forward passes."""
    config = subjects.config_of("name:head", 4096, "spsa")
    return subjects.minilm(config, subjects.sentences(200, 1), seed=0)


def one_row(subject: Subject, told: Floats, indices: view.Places) -> Floats:
    """Return the shortest gradient that fits and has one row for both classes, signs apart."""
    half = subject.view.dimension // 2  # bias (2,), then weight (2, width)

    def forth(x: Floats) -> Floats:
        return np.concatenate([[x[0], -x[0]], x[1:], -x[1:]])

    def back(g: Floats) -> Floats:
        return np.concatenate([[g[0] - g[1]], g[2 : 1 + half] - g[1 + half :]])

    expand = (half, forth, back)
    return forth(subject.view.solve(told, indices, expand=expand, iterations=4 * half))


def first(seeds: int) -> list[dict[str, Any]]:
    """Return cosines of back-projected sketches, and how many of the largest rows they show."""
    rows = []
    for trainable in ("last:1", "all"):
        for size in (4096, 65536):
            config = subjects.config_of(trainable, size, "backprop")
            subject = subjects.minilm(config, subjects.sentences(100, 1), seed=0)
            for batch_size in (1, 16):
                rows += _sketches(subject, batch_size, seeds)
    return rows


def _sketches(subject: Subject, batch_size: int, seeds: int) -> list[dict[str, Any]]:
    size, dimension = subject.view.size, subject.view.dimension
    indices, found = np.arange(size), dict[str, list[tuple[float, float]]]()
    for seed in range(seeds):
        batch = subjects.batch_of(subject, batch_size, seed)
        true = subject.gradient(batch)
        values = subject.estimator.measure(subject.task.loss, batch, indices).values
        for name in CODECS:
            estimate = subject.view.back(view.coded(name, values), indices)
            pair = (view.cosine(estimate, true), largest_rows(subject, estimate, true))
            found.setdefault(name_of(name), []).append(pair)
    return [
        {
            "trainable": subject.config.model.trainable,
            "scalars": size,
            "dimension": dimension,
            "batch_size": batch_size,
            "codec": name,
            "cosine": view.mean_and_error([pair[0] for pair in pairs]),
            "theory": round((size / dimension) ** 0.5, 4),
            "largest_rows": view.mean_and_error([pair[1] for pair in pairs]),
            "chance": TOP,
        }
        for name, pairs in found.items()
    ]


def largest_rows(subject: Subject, estimate: Floats, true: Floats) -> float:
    """Return the share of a gradient's longest rows that are among the estimate's longest.

    Rows of the matrices, the longest hundredth of them by mean square.
    """
    ours, theirs = (_row_squares(subject, vector) for vector in (estimate, true))
    count = max(1, round(TOP * len(ours)))
    top = [set(np.argsort(-squares, kind="stable")[:count].tolist()) for squares in (ours, theirs)]
    return len(top[0] & top[1]) / count


def _row_squares(subject: Subject, vector: Floats) -> Floats:
    parts, at = [], 0
    for spec in subject.replica.manifest.tensors:
        if len(spec.shape) == 2:
            rows = vector[at : at + spec.size].reshape(spec.shape)
            parts.append(np.mean(rows**2, axis=1))
        at += spec.size
    return np.concatenate(parts)


def noised(seeds: int) -> list[dict[str, Any]]:
    """Return relative errors of a sentence's head gradient from a private round's scalars.

    All d directions and more, one example in the batch, at the noise of runs of epsilon 8 and 2.
    The clip bound is the length of the vector itself: the least noise that does not shorten it.
    """
    subject = head()
    indices = draw(b"audit", 0, b"shared", subject.view.size, 1155)
    rows = []
    for epsilon, multiplier in multipliers().items():
        errors = []
        for seed in range(seeds):
            batch = subjects.batch_of(subject, 1, seed)
            vectors = subject.estimator.each(subject.task.losses, batch, indices)
            mechanism = Mechanism("gaussian", float(np.linalg.norm(vectors)), multiplier, 1)
            released = mechanism.release(vectors, subjects.below(seed))
            found = subject.view.solve(released, indices, iterations=3000)
            errors.append(view.fitted(found, subject.gradient(batch)))
        rows.append(
            {
                "epsilon": epsilon,
                "multiplier": round(multiplier, 4),
                "scalars": len(indices),
                "dimension": subject.view.dimension,
                "error": view.mean_and_error(errors),
            }
        )
    return rows
