"""The worker's own limits: which runs it takes part in, and what it tells its owner at join."""

from dataclasses import dataclass
from typing import Final

from lorand.coefficients import check_size
from lorand.config import LocalSection, RunConfig
from lorand.errors import ConfigError, DataError, HandshakeError
from lorand.manifest import Identity, Manifest
from lorand.subspaces import periods
from lorand.subspaces.basis import Layout

ANY: Final = "any"
ANY_POOL: Final = 0


@dataclass(frozen=True)
class Policy:
    """What this worker's owner allows.

    `seed_pool`: None any run, ANY_POOL a finite pool, or K. `max_epsilon` is of a data file in all
    runs together, at deltas of `max_delta` at most, and `max_scalars` of a batch in a private run.
    """

    seed_pool: int | None = None
    max_batch_size: int = 4096
    require_privacy: bool = False
    max_epsilon: float | None = None
    max_delta: float = 1e-5
    max_scalars: int = 65536
    trust_coordinator: bool = False

    @property
    def private(self) -> bool:
        """Whether only private runs will do."""
        return self.require_privacy or self.max_epsilon is not None


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
    _check_privacy(config, policy)


def _check_privacy(config: RunConfig, policy: Policy) -> None:
    section = config.privacy
    if policy.private and not section.noised:
        raise HandshakeError(
            f"this worker takes part only in private runs, and {config.run.name!r} has no "
            "[privacy]; join without --require-privacy and --max-epsilon if that is right"
        )
    if policy.private and section.mode == "central" and not policy.trust_coordinator:
        raise HandshakeError(
            f"the noise of {config.run.name!r} is added by its coordinator, which sees sums "
            "without it; join with --trust-coordinator if you do trust it"
        )
    if policy.private and section.delta > policy.max_delta:
        raise HandshakeError(
            f"the run's delta of {section.delta:g} is above {policy.max_delta:g}, the most that "
            "this worker takes part with"
        )
    check_epsilon(config, policy, spent_elsewhere=0.0)
    if section.noised and config.num_directions > policy.max_scalars:
        raise HandshakeError(
            f"the run asks for {config.num_directions} scalars of a batch, this worker allows "
            f"{policy.max_scalars}"
        )


def check_epsilon(config: RunConfig, policy: Policy, spent_elsewhere: float) -> None:
    """Raise HandshakeError when the run's epsilon, with that of other runs, is above the policy."""
    total = config.privacy.target_epsilon + spent_elsewhere
    if policy.max_epsilon is None or total <= policy.max_epsilon:
        return
    other = f" and {spent_elsewhere:.4g} was spent of these data" if spent_elsewhere else ""
    raise HandshakeError(
        f"the run's epsilon is {config.privacy.target_epsilon:g}{other}, this worker allows "
        f"{policy.max_epsilon:g}; join with a higher --max-epsilon if that is right"
    )


def check_examples(config: RunConfig, examples: int, source: str) -> None:
    """Raise DataError when the data are fewer than one batch of the run.

    A smaller batch in its place would be noisier than the run's settings say, and the same
    examples would be measured in every round. A private run takes any number, which is nobody's
    business; but more than the run's bound of it would cost more than was planned.
    """
    section, wanted = config.privacy, config.estimator.batch_size
    if section.noised:
        if 0 < section.max_examples < examples:
            raise DataError(
                f"{source} holds {examples} examples, more than privacy.max_examples = "
                f"{section.max_examples}, for which the run's noise is calculated: give fewer"
            )
        return
    if examples < wanted:
        raise DataError(
            f"{source} holds {examples} example{'s' * (examples != 1)}, fewer than the run's batch "
            f"of {wanted}: give at least {wanted}, or ask the coordinator's operator for a run "
            f"with estimator.batch_size = {examples}"
        )


def check_evaluation(config: RunConfig, *, posts: bool, public: bool) -> None:
    """Raise ConfigError when exact results on private examples would be posted in a private run."""
    if config.privacy.noised and posts and not public:
        raise ConfigError(
            "evaluations are posted without noise, and this run is private: give public examples "
            "and say so with --public-data, or leave out --follow, which posts nothing"
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


def disclosure(config: RunConfig, manifest: Manifest | None = None) -> list[str]:
    """Return, as sentences, what leaves this machine in this run.

    With the manifest of what it trains, also whether the scalars are enough to solve for gradients.
    """
    count = config.num_directions
    sent = {"none": config.codec.up, "worker": config.codec.up, "central": "64-bit"}
    codes = f"{count:,} {sent.get(config.privacy.mode, 'masked')} code{'s' * (count != 1)}"
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
    stays = "Texts, labels, weights and gradients stay here."
    if not config.privacy.noised:
        lines.append(f"{stays} This run adds no privacy noise.")
        return lines if manifest is None else [*lines, *_solvable(config, manifest)]
    return [*lines, stays, *_noise(config)]


def _solvable(config: RunConfig, manifest: Manifest) -> list[str]:
    """Warn where scalars are as many as the numbers they measure (docs/privacy.md).

    In local steps what they measure is where the steps led, which tells as much of the data.
    """
    scalars, rounds, trained = config.num_directions, config.run.rounds, Layout(manifest).size
    advice = "join runs with [privacy] if that must not be, or runs that train more and send less."
    if scalars >= trained:
        return [
            f"Warning: that many scalars can be solved for the {trained:,} numbers that this run "
            "trains: each round tells what was measured about as well as the gradient itself, and "
            f"of small batches texts' features and labels; {advice}"
        ]
    if rounds * scalars >= trained:
        return [
            f"Warning: all {rounds:,} rounds together send {rounds * scalars:,} scalars, at least "
            f"as many as the {trained:,} numbers that this run trains: of examples that are "
            f"measured again and again they can tell the gradient; {advice}"
        ]
    return []


def _noise(config: RunConfig) -> list[str]:
    section = config.privacy
    where, towards = {
        "worker": (
            "Noise is added here, before anything leaves:",
            "towards everyone, the coordinator included",
        ),
        "central": (
            "The coordinator adds noise to the sum of all workers, and sees each one's sum without "
            "noise:",
            "towards everyone but the coordinator, if it does so",
        ),
        "secure-sum": (
            "EXPERIMENTAL, not reviewed outside: nobody sees more than the sum of "
            f"{config.rounds.quorum} workers or more, and each adds a share of its noise:",
            f"towards everyone, where {section.honest_min} of those in the sum are honest",
        ),
    }[section.mode]
    changes = (
        ["Between restarts of the estimator (DIFF2, experimental) it is how that has changed."]
        if section.differences
        else []
    )
    return [
        *changes,
        f"{where} what all rounds of this run together show of any one example is bounded by "
        f"epsilon {section.target_epsilon:g}, delta {section.delta:g}, {towards}. An example is "
        "one line of the data: of somebody with several lines more may be seen.",
        "Not bounded are what other runs on the same data show, how long a round takes here, and "
        "that this worker takes part.",
    ]


def _steps(local: LocalSection) -> str:
    many, word = (local.steps, "step") if local.steps else (local.epochs, "epoch")
    return f"{many:,} {word}{'s' * (many != 1)}"
