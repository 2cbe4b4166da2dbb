"""The card of a model: what the ledger tells of its run, and nothing that nobody told."""

from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest
from tests.runs import config_of, history

from lorand import adapter, card, ledger
from lorand.card import Facts
from lorand.config import RunConfig
from lorand.errors import ModelError
from lorand.manifest import Manifest, TensorSpec
from lorand.v1 import ledger_pb2 as pb

PRIVATE: Final[dict[str, dict[str, Any]]] = {
    "privacy": {"mode": "worker", "sample_rate": 0.1, "delta": 1e-5, "target_epsilon": 4.0},
    "rounds": {"telemetry": "none"},
}


def told(config: RunConfig, facts: Facts, *, merged: bool = True) -> str:
    bodies = list(history(config, rounds=5))
    position = ledger.replay(facts.reading(bodies))
    facts.account(config)
    return card.text(adapter.of(position), facts, merged=merged)


def test_it_tells_what_the_ledger_holds() -> None:
    facts = Facts("1,200 reviews")
    config = config_of()
    text = told(config, facts)
    assert facts.rounds > 0
    assert facts.bytes_up == facts.contributions * config.num_directions
    assert facts.bytes_down > 0
    for part in (
        f"| rounds | {facts.rounds} of {config.run.rounds} |",
        f"{len(facts.workers)}, with {facts.contributions} contributions",
        f"| codes of all workers, up | {facts.bytes_up:,} bytes |",
        "| data | 1,200 reviews |",
        "| privacy | none: no noise was added |",
        'base_model: "some/model"',
    ):
        assert part in text


def test_what_nobody_told_is_not_said() -> None:
    text = told(config_of(model={"name": "/srv/models/of ours"}), Facts(), merged=False)
    assert "| data | not told" in text
    assert "evaluation" not in text
    assert "base_model:" not in text  # a folder is no name of the hub
    assert "lorand.load_adapter" in text


def test_a_head_beside_an_encoder_is_pointed_at() -> None:
    names = Manifest((TensorSpec("encoder.w", (2,), "float32"), TensorSpec("head.w", (2,), "f")))
    made = adapter.of(ledger.replay(history(config_of(), rounds=1)))
    made = replace(made, identity=replace(made.identity, manifest=names))
    assert "as `head.json` says" in card.text(made, Facts(), merged=True)
    assert "`head.json`" not in told(config_of(), Facts())


def test_reading_again_counts_once() -> None:
    facts = Facts()
    assert told(config_of(), facts) == told(config_of(), facts)


def test_the_last_evaluation_is_told() -> None:
    facts = Facts()
    posted = pb.Evaluation(committed=2, evaluator="held-out", accuracy=0.875, loss=0.3, examples=60)
    facts.evaluation = posted
    text = told(config_of(), facts)
    assert "accuracy 0.8750, loss 0.3000 on 60 examples after 2 rounds" in text


@pytest.mark.slow
def test_privacy_is_what_the_accountant_finds() -> None:
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed")
    facts = Facts()
    text = told(config_of(**PRIVATE), facts)
    assert facts.epsilon is not None
    assert 0 < facts.epsilon < 4.0
    assert f"worker: epsilon {facts.epsilon:.4g} spent at delta 1e-05" in text
    facts.epsilon = None
    position = ledger.replay(history(config_of(**PRIVATE), rounds=5))
    without = card.text(adapter.of(position), facts, merged=True)
    assert "worker: at most epsilon 4 at delta 1e-05 for the whole run" in without


def test_a_folder_that_cannot_be_written_is_our_error(tmp_path: Path) -> None:
    position = ledger.replay(history(config_of(), rounds=1))
    with pytest.raises(ModelError, match="cannot write the card"):
        card.write(adapter.of(position), Facts(), tmp_path / "none", merged=True)
