"""The worker's own limits, and what its owner is told."""

import re
from dataclasses import replace

import pytest
from tests.runs import IDENTITY, config_of

from lorand.errors import ConfigError, DataError, HandshakeError
from lorand.manifest import Manifest, TensorSpec
from lorand_worker import guard
from lorand_worker.flags import with_optional_value
from lorand_worker.guard import ANY_POOL, Policy, check, check_identity, parse_seed_pool

CONFIG = config_of()


@pytest.mark.parametrize(
    ("text", "policy"), [("", None), ("any", ANY_POOL), ("64", 64), ("1048576", 1 << 20)]
)
def test_the_seed_pool_of_a_policy(text: str, policy: int | None) -> None:
    assert parse_seed_pool(text) == policy


@pytest.mark.parametrize("text", ["0", "63", "100", "2097152", "-64", "many", "64.0"])
def test_a_seed_pool_that_is_no_pool(text: str) -> None:
    with pytest.raises(ConfigError, match="--seed-pool"):
        parse_seed_pool(text)


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        (["--seed-pool"], ["--seed-pool", "any"]),
        (["--seed-pool", "64", "--json"], ["--seed-pool", "64", "--json"]),
        (["--seed-pool", "--json"], ["--seed-pool", "any", "--json"]),
        (["--seed-pool=64"], ["--seed-pool=64"]),
        ([], []),
    ],
)
def test_the_number_may_be_left_out(given: list[str], taken: list[str]) -> None:
    assert with_optional_value(given, "--seed-pool", "any") == taken


def test_runs_that_ask_for_more_are_refused() -> None:
    for policy in (Policy(), Policy(seed_pool=ANY_POOL), Policy(seed_pool=64)):
        check(CONFIG, policy)
    with pytest.raises(HandshakeError, match=r"seed pool of 128, .*'small' has 64; .*pool 64`"):
        check(CONFIG, Policy(seed_pool=128))
    with pytest.raises(HandshakeError, match="asks for batches of 16, this worker allows 8"):
        check(CONFIG, Policy(max_batch_size=8))
    check(CONFIG, Policy(max_batch_size=16))


def test_a_run_of_many_pools_has_no_finite_one() -> None:
    rotating = config_of(directions={"rotate_every": 3})
    check(rotating, Policy())
    for policy in (Policy(seed_pool=ANY_POOL), Policy(seed_pool=64)):
        with pytest.raises(HandshakeError, match=r"moves to others .*join without --seed"):
            check(rotating, policy)


def test_another_identity_is_named() -> None:
    check_identity(IDENTITY, replace(IDENTITY))
    other = Manifest((*IDENTITY.manifest.tensors, TensorSpec("x", (1,), "float32")))
    for changed, sentence in [
        (replace(IDENTITY, base_digest=b"\7" * 32), r"base weights here \(0101.*run's \(0707"),
        (replace(IDENTITY, tokenizer_digest=b"\7" * 32), r"tokenizer here \(0202.*run's \(0707"),
        (replace(IDENTITY, manifest=other), "first difference: 'x'"),
    ]:
        with pytest.raises(HandshakeError, match=sentence):
            check_identity(IDENTITY, changed)


def test_the_owner_is_told_what_leaves() -> None:
    text = " ".join(guard.disclosure(CONFIG))
    assert "3 int8 codes" in text
    assert "the mean loss of the batch." in text
    assert "Texts, labels, weights and gradients stay here" in text
    more = config_of(rounds={"weighting": "examples"}, estimator={"directions_per_round": 1})
    assert "1 int8 code:" in " ".join(guard.disclosure(more))
    assert "mean loss of the batch and the number of local examples" in " ".join(
        guard.disclosure(more)
    )
    probed = config_of(
        directions={"rotate_every": 4}, subspace={"kind": "coordinate", "probe": True}
    )
    assert "the batch and its mean curvature along these directions." in " ".join(
        guard.disclosure(probed)
    )
    all_of_it = probed.model_copy(update={"rounds": more.rounds})
    assert "batch, its mean curvature along these directions and the number of" in " ".join(
        guard.disclosure(all_of_it)
    )
    least = config_of(rounds={"telemetry": "none"})
    assert "Nothing else goes with it." in guard.disclosure(least)


def test_the_owner_is_told_of_votes() -> None:
    voted = {"kind": "coordinate", "selection": "voted"}
    run = config_of(estimator={"kind": "backprop"}, subspace=voted)
    assert "which columns of each matrix have most of the gradient here" in " ".join(
        guard.disclosure(run)
    )
    with pytest.raises(HandshakeError, match="an elected subspace"):
        guard.check(run, guard.Policy(seed_pool=64))


def test_the_owner_is_told_of_local_steps() -> None:
    """They show more of the data than one batch does."""
    many = config_of(local={"steps": 20})
    text = " ".join(guard.disclosure(many))
    assert "60 int8 codes and their scale: where 20 steps on the data here led" in text
    assert "the mean loss of the batches." in text
    epoch = config_of(estimator={"kind": "backprop"}, local={"epochs": 1})
    assert "where 1 epoch on the data here led" in " ".join(guard.disclosure(epoch))


def of_size(count: int) -> Manifest:
    return Manifest((TensorSpec("w", (count,), "float32"),))


def test_the_owner_is_warned_where_scalars_can_be_solved() -> None:
    """Three scalars a round, four rounds; 64 of the whole pool by a backward pass."""
    for trained, words in [
        (3, "solved for the 3 numbers that this run trains: each round tells"),
        (4, r"all 4 rounds together send 12 scalars, at least as many as the 4 numbers"),
        (12, "measured again and again they can tell the gradient; join runs with"),
    ]:
        (warning,) = set(guard.disclosure(CONFIG, of_size(trained))) - set(guard.disclosure(CONFIG))
        assert re.search(words, warning)
        assert warning.startswith("Warning: ")
    assert guard.disclosure(CONFIG, of_size(13)) == guard.disclosure(CONFIG)
    whole = config_of(estimator={"kind": "backprop"})
    assert "solved for the 64 numbers" in guard.disclosure(whole, of_size(64))[-1]
    assert "all 4 rounds together send 256 scalars" in guard.disclosure(whole, of_size(65))[-1]


def test_in_a_subspace_its_coordinates_count() -> None:
    """A matrix of 10 × 4 in one of its columns has 10."""
    manifest = Manifest((TensorSpec("w", (10, 4), "float32", rank=1),))
    assert "at least as many as the 10 numbers" in guard.disclosure(CONFIG, manifest)[-1]


def test_noise_is_not_warned_of() -> None:
    assert guard.disclosure(PRIVATE, of_size(1)) == guard.disclosure(PRIVATE)


# ------------------------------------------------------------- privacy

PRIVATE = config_of(rounds={"telemetry": "none"}, privacy={"mode": "worker", "target_epsilon": 2.0})


def test_the_owner_is_told_what_noise_bounds_and_what_not() -> None:
    text = " ".join(guard.disclosure(PRIVATE))
    assert "Nothing else goes with it." in text
    assert "any one example is bounded by epsilon 2, delta 1e-05, towards everyone" in text
    assert "An example is one line of the data" in text
    assert "Not bounded are what other runs on the same data show, how long a round takes" in text
    assert "adds no privacy noise" not in text
    assert "This run adds no privacy noise." in " ".join(guard.disclosure(CONFIG))


def test_runs_weaker_than_the_policy_are_refused() -> None:
    for policy in (Policy(), Policy(require_privacy=True), Policy(max_epsilon=2.0)):
        check(PRIVATE, policy)
    for policy in (Policy(require_privacy=True), Policy(max_epsilon=9.0)):
        with pytest.raises(HandshakeError, match=r"only in private runs, and 'small' has no"):
            check(CONFIG, policy)
    with pytest.raises(HandshakeError, match=r"epsilon is 2, this worker allows 1\.9"):
        check(PRIVATE, Policy(max_epsilon=1.9))
    loose = config_of(rounds={"telemetry": "none"}, privacy={"mode": "worker", "delta": 1e-4})
    check(loose, Policy())
    with pytest.raises(HandshakeError, match=r"delta of 0.0001 is above 1e-05"):
        check(loose, Policy(require_privacy=True))
    with pytest.raises(HandshakeError, match="3 scalars of a batch, this worker allows 2"):
        check(PRIVATE, Policy(max_scalars=2))


def test_who_else_is_trusted_is_said_and_asked() -> None:
    quiet = {"telemetry": "none", "quorum": 5}
    central = config_of(rounds=quiet, privacy={"mode": "central"})
    text = " ".join(guard.disclosure(central))
    assert "A round sends 3 64-bit codes" in text
    assert "The coordinator adds noise to the sum of all workers, and sees each one's" in text
    assert "towards everyone but the coordinator, if it does so" in text
    check(central, Policy())
    for policy in (Policy(require_privacy=True), Policy(max_epsilon=8.0)):
        with pytest.raises(HandshakeError, match="--trust-coordinator if you do"):
            check(central, policy)
        check(central, replace(policy, trust_coordinator=True))
    secure = config_of(rounds=quiet, privacy={"mode": "secure-sum", "honest_min": 3})
    text = " ".join(guard.disclosure(secure))
    assert "EXPERIMENTAL" in text
    assert "nobody sees more than the sum of 5 workers or more" in text
    assert "towards everyone, where 3 of those in the sum are honest" in text
    check(secure, Policy(require_privacy=True))


def test_what_other_runs_spent_counts() -> None:
    guard.check_epsilon(PRIVATE, Policy(max_epsilon=3.0), 1.0)
    with pytest.raises(HandshakeError, match=r"is 2 and 1.5 was spent of these data"):
        guard.check_epsilon(PRIVATE, Policy(max_epsilon=3.0), 1.5)
    guard.check_epsilon(PRIVATE, Policy(), 1e9)


def test_how_many_examples_there_are_is_nobodys_business() -> None:
    """T7: a refusal would tell; but a bound that noise was calculated for holds."""
    guard.check_examples(PRIVATE, 1, "a.csv")
    with pytest.raises(DataError, match="holds 1 example, fewer than"):
        guard.check_examples(CONFIG, 1, "a.csv")
    capped = config_of(
        rounds={"telemetry": "none"},
        privacy={"mode": "worker", "batch_cap": 40, "max_examples": 100},
    )
    guard.check_examples(capped, 100, "a.csv")
    with pytest.raises(DataError, match=r"101 examples, more than privacy.max_examples = 100"):
        guard.check_examples(capped, 101, "a.csv")


def test_exact_evaluations_of_a_private_run_are_of_public_data() -> None:
    guard.check_evaluation(CONFIG, posts=True, public=False)
    guard.check_evaluation(PRIVATE, posts=False, public=False)
    guard.check_evaluation(PRIVATE, posts=True, public=True)
    with pytest.raises(ConfigError, match="say so with --public-data"):
        guard.check_evaluation(PRIVATE, posts=True, public=False)
