"""The halves of ReCIT (arXiv 2504.20570): a base made to memorise, and gradients of few numbers.

The first is stopped: a worker compares the digest of its own base model with the run's, and its
weights follow from the ledger. The second is arithmetic, and nothing but noise stops it: scalars
that are no fewer than the trained numbers are solved for them. Here MiniLM's head, d = 770, from
4,096 scalars of one backward pass: the features are a row of the gradient over the label's part.
"""

from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch

from experiments import federation
from experiments.privacy_audit import recovery, subjects, view
from experiments.privacy_audit.subjects import Subject
from lorand.codec import Floats
from lorand.errors import HandshakeError
from lorand.privacy.mechanism import Mechanism
from lorand_worker import guard, model
from lorand_worker.bench import load_base

CANDIDATES: Final = 600
VICTIMS: Final = 30
SOLVED: Final = 0.99
"""Cosine from which features count as recovered."""


def run(seeds: int) -> dict[str, Any]:
    """Return the rows of R."""
    return {"malicious_base": malicious(), "solved": solved(VICTIMS)}


def malicious() -> list[dict[str, Any]]:
    """Return what a worker says to a run whose base is not its own: one weight, one last bit off.

    The check is the one of `lr-worker join`, on identities of really loaded models.
    """
    config = subjects.config_of("name:head", 4096, "backprop")
    ours = load_base(config, federation.minilm(), "cpu").identity
    loaded = model.load(config.model, len(subjects.LABELS), federation.minilm())
    rows = [{"base": "the same", "refused": refused(ours, model.identity(loaded, config))}]
    with torch.no_grad():
        weight = next(iter(loaded.module.parameters())).view(-1)
        weight[0] = torch.nextafter(weight[0], torch.tensor(torch.inf))
    theirs = model.identity(loaded, config)
    rows.append({"base": "one weight, one last bit", "refused": refused(ours, theirs)})
    other = replace(ours, tokenizer_digest=b"\7" * 32)
    return [*rows, {"base": "another tokenizer", "refused": refused(ours, other)}]


def refused(ours: Any, theirs: Any) -> str:
    """Return the refusal's first words; "no" where the worker takes part."""
    try:
        guard.check_identity(ours, theirs)
    except HandshakeError as error:
        return str(error).partition(" (")[0]
    return "no"


def solved(victims: int) -> list[dict[str, Any]]:
    """Return how well one sentence's features, label and text come out of its scalars."""
    config = subjects.config_of("name:head", 4096, "backprop")
    subject = subjects.minilm(config, subjects.sentences(CANDIDATES, 1), seed=0)
    features = features_of(subject)
    labels = np.array(subjects.sentences(CANDIDATES, 1).labels)
    indices = np.arange(subject.view.size)
    vectors = subject.estimator.each(subject.task.losses, range(victims), indices)
    told = {recovery.name_of(c): [view.coded(c, v) for v in vectors] for c in recovery.CODECS}
    clip = float(np.median(np.linalg.norm(vectors, axis=1)))
    for epsilon, multiplier in recovery.multipliers().items():
        made, below = Mechanism("gaussian", clip, multiplier, 1), subjects.below(0)
        told[f"noise, epsilon {epsilon}"] = [made.release(v[None], below) for v in vectors]
    return [
        {"codec": name, "scalars": len(indices), "dimension": subject.view.dimension}
        | judged(subject, features, labels, released)
        for name, released in told.items()
    ]


def judged(
    subject: Subject, features: Floats, labels: Floats, released: list[Floats]
) -> dict[str, Any]:
    """Return cosines of features, and shares of labels and texts that were read off."""
    indices, cosines, right, named = np.arange(subject.view.size), [], [], []
    for at, values in enumerate(released):
        gradient = recovery.one_row(subject, values, indices)
        bias, row = gradient[0], gradient[2 : 2 + features.shape[1]]
        label = int(bias > 0)  # p − y of class 0: positive where the label is the other
        found = row * (1 if bias > 0 else -1)
        cosines.append(view.cosine(found, features[at]))
        right.append(float(label == labels[at]))
        nearest = np.argmax(features @ found / np.linalg.norm(features, axis=1))
        named.append(float(nearest == at))
    return {
        "features_cosine": view.mean_and_error(cosines),
        "features_recovered": view.mean_and_error([float(c > SOLVED) for c in cosines]),
        "label": view.mean_and_error(right),
        "text_among_600": view.mean_and_error(named),
    }


@torch.no_grad()
def features_of(subject: Subject) -> Floats:
    """Return the head's inputs, shape (sentences, width), in the order of the examples."""
    seen: list[torch.Tensor] = []
    head = dict(subject.base.loaded.module.named_modules())["head"]
    handle = head.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[0]))
    try:
        for example in range(len(subject.task)):
            subject.task.losses([example])
    finally:
        handle.remove()
    return torch.cat(seen).double().numpy()
