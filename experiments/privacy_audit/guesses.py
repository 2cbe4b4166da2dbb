"""A3: an attacker who holds a list of texts asks which of them was measured.

Everyone has the model and the directions, so everyone can compute the scalars of any text. The
nearest of 600 sentences is the guess; the batch is one sentence. The attacker's scalars are
computed in batches and the worker's alone, so that they differ in their last bits as on two
machines. Zeroth order: SPSA on MiniLM's last layer. First order: whole sketches, one bit each.
"""

from typing import Any, Final

import numpy as np

from experiments.privacy_audit import subjects, view
from experiments.privacy_audit.recovery import CODECS, multipliers, name_of
from lorand.codec import Floats
from lorand.directions import draw
from lorand.privacy.mechanism import Mechanism
from lorand_worker.noised import alone

CANDIDATES: Final = 600
VICTIMS: Final = 150
COUNTS: Final = (1, 2, 4, 8, 16)


def run(seeds: int) -> dict[str, Any]:
    """Return the rows of A3."""
    return {"zeroth_order": zeroth(), "first_order": first()}


def zeroth() -> list[dict[str, Any]]:
    """Return how many sentences are named by their first scalars."""
    config = subjects.config_of("last:1", 4096, "spsa", count=COUNTS[-1])
    subject = subjects.minilm(config, subjects.sentences(CANDIDATES, 1), seed=0)
    indices = draw(b"audit", 0, b"shared", 4096, COUNTS[-1])
    theirs = subject.estimator.each(subject.task.losses, range(CANDIDATES), indices)
    ours = subject.estimator.each(alone(subject.task.losses), range(VICTIMS), indices)
    return [
        {"scalars": count, "codec": name_of(codec)}
        | named(*(_coded(codec, vectors[:, :count]) for vectors in (theirs, ours)))
        for count in COUNTS
        for codec in CODECS
    ]


def first() -> list[dict[str, Any]]:
    """Return how many are named by a sketch: in one bit, and with the noise of private runs.

    The clip bound is the median length of the sentences' sketches; the batch is the one sentence.
    """
    config = subjects.config_of("last:1", 4096, "backprop")
    subject = subjects.minilm(config, subjects.sentences(CANDIDATES, 1), seed=0)
    indices = np.arange(4096)
    vectors = subject.estimator.each(subject.task.losses, range(CANDIDATES), indices)
    victims = vectors[:VICTIMS]
    rows = [
        {"scalars": 4096, "codec": name_of(codec)}
        | named(*(_coded(codec, which) for which in (vectors, victims)))
        for codec in CODECS
    ]
    clip = float(np.median(np.linalg.norm(vectors, axis=1)))
    for epsilon, multiplier in multipliers().items():
        made, below = Mechanism("gaussian", clip, multiplier, 1), subjects.below(0)
        noisy = np.array([made.release(row[None], below) for row in victims])
        expected = made.clipped(vectors) / float(1 << 30) * clip
        rows.append(
            {"scalars": 4096, "codec": f"noise, epsilon {epsilon}"} | named(expected, noisy)
        )
    return rows


def named(candidates: Floats, seen: Floats) -> dict[str, Any]:
    """Return the share of released vectors whose nearest candidate is the right one, alone.

    Candidate number i is the i-th released vector's. A tie names nobody.
    """
    right = 0
    for at, vector in enumerate(seen):
        distances = np.linalg.norm(candidates - vector, axis=1)
        nearest = np.flatnonzero(distances <= distances.min() * (1 + 1e-12))
        right += nearest.tolist() == [at]
    share = right / len(seen)
    error = (share * (1 - share) / len(seen)) ** 0.5
    return {"named": [round(share, 4), round(error, 4)], "chance": round(1 / len(candidates), 4)}


def _coded(codec: Any, vectors: Floats) -> Floats:
    """All vectors in the codes of one scale, as everyone's are in a round."""
    return view.coded(codec, vectors.ravel()).reshape(vectors.shape)
