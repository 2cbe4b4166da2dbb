"""The worker's own limits, and what its owner is told."""

from dataclasses import replace

import pytest
from tests.runs import IDENTITY, config_of

from lorand.errors import ConfigError, HandshakeError
from lorand.manifest import Manifest, TensorSpec
from lorand_worker import guard
from lorand_worker.cli import with_optional_value
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
