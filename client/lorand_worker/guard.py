"""The worker's own limits: which runs it takes part in, and what it tells its owner at join."""

from dataclasses import dataclass
from typing import Final

from lorand.coefficients import check_size
from lorand.config import LocalSection, RunConfig
from lorand.errors import ConfigError, DataError, HandshakeError
from lorand.manifest import Identity
from lorand.subspaces import periods

ANY: Final = "any"
ANY_POOL: Final = 0


@dataclass(frozen=True)
class Policy:
    """What this worker's owner allows. `seed_pool`: None any run, ANY_POOL a finite pool, or K."""

    seed_pool: int | None = None
    max_batch_size: int = 4096


def parse_seed_pool(text: str) -> int | None:
    """Return the policy of `--seed-pool [K]`: "" any run, "any" a finite pool, or its size."""
    if not text:
        return None
    if text == ANY:
        return ANY_POOL
    try:
        check_size(int(text))
    except ValueError as error:
        raise ConfigError(f"--seed-pool {text}: {error}") from error
    return int(text)


def check(config: RunConfig, policy: Policy) -> None:
    """Raise HandshakeError when the run asks for more than the policy allows."""
    size = config.directions.pool_size
    if policy.seed_pool not in (None, ANY_POOL) and policy.seed_pool != size:
        raise HandshakeError(
            f"this worker takes part only in runs with a seed pool of {policy.seed_pool}, the run "
            f"{config.run.name!r} has {size}; join with `--seed-pool {size}` if that is right"
        )
    if policy.seed_pool is not None and periods.pool_after(config, config.run.rounds):
        raise HandshakeError(
            f"this worker takes part only in runs with one seed pool, the run {config.run.name!r} "
            "moves to others (directions.rotate_every, or an elected subspace); join without "
            "--seed-pool if that is right"
        )
    most = max(config.estimator.batch_size, config.estimator.max_batch_size)
    if most > policy.max_batch_size:
        raise HandshakeError(
            f"the run asks for batches of {most}, this worker allows {policy.max_batch_size}"
        )


def check_examples(config: RunConfig, examples: int, source: str) -> None:
    """Raise DataError when the data are fewer than one batch of the run.

    A smaller batch in its place would be noisier than the run's settings say, and the same
    examples would be measured in every round.
    """
    wanted = config.estimator.batch_size
    if examples < wanted:
        raise DataError(
            f"{source} holds {examples} example{'s' * (examples != 1)}, fewer than the run's batch "
            f"of {wanted}: give at least {wanted}, or ask the coordinator's operator for a run "
            f"with estimator.batch_size = {examples}"
        )


def check_identity(ours: Identity, theirs: Identity) -> None:
    """Raise HandshakeError unless this machine's model is the run's, naming both."""
    advice = "use the same model, revision and dtype (`--model` may point to another copy)"
    if ours.base_digest != theirs.base_digest:
        raise HandshakeError(
            f"the base weights here ({ours.base_digest.hex()[:16]}) are not the run's "
            f"({theirs.base_digest.hex()[:16]}); {advice}"
        )
    if ours.tokenizer_digest != theirs.tokenizer_digest:
        raise HandshakeError(
            f"the tokenizer here ({ours.tokenizer_digest.hex()[:16]}) is not the run's "
            f"({theirs.tokenizer_digest.hex()[:16]}); use the one that comes with the run's model"
        )
    if ours.manifest != theirs.manifest:
        differing = set(ours.manifest.tensors) ^ set(theirs.manifest.tensors)
        name = min(spec.name for spec in differing)
        raise HandshakeError(
            f"the trainable tensors here are not the run's (first difference: {name!r}); "
            "use the same release of lorand and transformers"
        )


def disclosure(config: RunConfig) -> list[str]:
    """Return, as sentences, what leaves this machine in this run."""
    count = config.num_directions
    codes = f"{count:,} {config.codec.up} code{'s' * (count != 1)}"
    lines = [
        f"A round sends {codes}: how the loss on one batch changes along public random directions."
    ]
    if config.local.taken:
        lines = [
            f"A round sends {codes} and their scale: where {_steps(config.local)} on the data here "
            "led, along public random directions."
        ]
    also = []
    if config.rounds.telemetry == "loss":
        also.append(f"the mean loss of the batch{'es' * config.local.taken}")
        if config.subspace.probe:
            also.append("its mean curvature along these directions")
    if config.rounds.weighting == "examples":
        also.append("the number of local examples")
    if periods.voted(config):
        also.append("in some rounds, which columns of each matrix have most of the gradient here")
    listed = " and ".join(filter(None, (", ".join(also[:-1]), *also[-1:])))
    lines.append(f"With it goes {listed}." if also else "Nothing else goes with it.")
    lines.append("Texts, labels, weights and gradients stay here. This run adds no privacy noise.")
    return lines


def _steps(local: LocalSection) -> str:
    many, word = (local.steps, "step") if local.steps else (local.epochs, "epoch")
    return f"{many:,} {word}{'s' * (many != 1)}"
