"""Whole runs of every kind of model: quantised, with its own head, of language, with adapters."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests import tiny
from tests.commands import MakeRoom, status
from tests.end_to_end.test_run import assert_same_bits, kinds


@pytest.mark.slow
def test_workers_of_a_quantised_run(make_room: MakeRoom) -> None:
    """Dequantised whole or layer by layer: one base, one history, one digest."""
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    content = tiny.settings(
        "spsa", run={"rounds": 4}, model={"quantisation": "nf4", "trainable": "all"}
    )
    room = make_room(content).lock()
    with room.coordinator() as (_, address):
        kept = dict(zip(tiny.DOMAINS, ("copy", "layerwise", "auto"), strict=True))
        workers = [room.join(address, name, "--weights", kept[name]) for name in kept]
        results = [worker.result() for worker in workers]
    assert_same_bits(room, results)


def test_own_head_own_directions_and_the_first_workers_identity(
    make_room: MakeRoom, own_model: Path
) -> None:
    """The other choice of most settings: no run.lock, own directions, one bit, no telemetry."""
    content = tiny.settings(
        "spsa",
        run={"rounds": 5, "name": "other", "adopt_first_worker": True},
        model={"trainable": "name:classifier|layer.2.output"},
        directions={"mode": "own"},
        codec={"up": "sign", "down": "int32"},
        rounds={"weighting": "examples", "telemetry": "none"},
    )
    room = make_room(content, model=own_model)
    with room.coordinator() as (_, address):
        workers = [room.join(address, name, "--seed-pool") for name in tiny.DOMAINS]
        results = [worker.result() for worker in workers]
        answer = status(address)
        assert answer is not None
        assert not answer.HasField("loss")
    assert_same_bits(room, results)
    assert kinds(room)[:4] == ["start", "member", "member", "member"]
    into = room.folder / "adapter"
    wrote = room.once(
        *("lr-worker", "export", room.export(), into, "--merged", "--model", own_model)
    )
    assert wrote["weights_digest"] == results[0]["weights_digest"]
    import transformers

    model = transformers.AutoModelForSequenceClassification.from_pretrained(wrote["merged"])
    assert model.config.id2label == dict(enumerate(tiny.LABELS))


LANGUAGE: dict[str, dict[str, Any]] = {
    "masked_model": {
        "kind": "label-words",
        "labels": list(tiny.LABELS),
        "template": "it was {mask} , {text}",
        "label_words": ["awful", "great"],
    },
    "causal_model": {"kind": "causal-lm", "prompt_column": "text", "answer_column": "label"},
}


@pytest.mark.parametrize("fixture", LANGUAGE)
def test_language_models(make_room: MakeRoom, request: pytest.FixtureRequest, fixture: str) -> None:
    """Label words and answers: the same bits, a posted score, and a model that transformers opens.

    All weights are trained, a tied output layer among them, layer by layer or beside a copy.
    """
    import transformers

    content = tiny.settings("spsa", run={"rounds": 4}, model={"trainable": "all"})
    content["task"] = LANGUAGE[fixture]
    room = make_room(content, model=request.getfixturevalue(fixture)).lock()
    with room.coordinator() as (_, address):
        kept = dict(zip(tiny.DOMAINS, ("copy", "layerwise", "auto"), strict=True))
        workers = [room.join(address, name, "--weights", kept[name]) for name in kept]
        results = [worker.result() for worker in workers]
        data = ("--data", room.data["test"], "--model", room.model)
        score = room.once("lr-worker", "evaluate", address, *data, "--threads", 1)
    assert_same_bits(room, results)
    assert score["examples"] == 60
    into = (room.folder / "adapter", "--merged", "--model", room.model)
    wrote = room.once("lr-worker", "export", room.export(), *into)
    assert wrote["weights_digest"] == results[0]["weights_digest"]
    merged = Path(wrote["merged"])
    causal = fixture == "causal_model"
    kind = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    model = kind.from_pretrained(merged)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    asked = json.loads((merged / "prompt.json").read_text())
    assert asked["label_words"] == content["task"].get("label_words", [])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["lora", "randlora"])
def test_adapters_of_peft(make_room: MakeRoom, own_model: Path, kind: str) -> None:
    """The same bits, and merged they are an ordinary classifier."""
    import torch
    import transformers

    adapter_of = {"adapter": kind, "adapter_rank": 4}
    content = tiny.settings("backprop", run={"rounds": 4}, model=adapter_of)
    room = make_room(content, model=own_model).lock()
    with room.coordinator() as (_, address):
        kept = dict(zip(tiny.DOMAINS, ("copy", "layerwise", "auto"), strict=True))
        workers = [room.join(address, name, "--weights", kept[name]) for name in kept]
        results = [worker.result() for worker in workers]
    assert_same_bits(room, results)
    into = (room.folder / "adapter", "--merged", "--model", own_model)
    wrote = room.once("lr-worker", "export", room.export(), *into)
    assert wrote["weights_digest"] == results[0]["weights_digest"]
    kinds = transformers.AutoModelForSequenceClassification
    before, after = (kinds.from_pretrained(folder) for folder in (own_model, wrote["merged"]))
    changed = {
        name.rsplit(".", 3)[-2]
        for name, tensor in after.named_parameters()
        if not torch.equal(tensor, before.get_parameter(name))
    }
    assert changed == {"query", "key", "value", "dense"}


def test_label_words_are_checked_when_a_run_is_prepared(
    make_room: MakeRoom, masked_model: Path
) -> None:
    content = tiny.settings("spsa")
    content["task"] = LANGUAGE["masked_model"] | {"label_words": ["awful", "bad-ish"]}
    room = make_room(content, model=masked_model)
    code, text = room.failure("lr-worker", "prepare", room.run, "--model", masked_model)
    assert code == 4
    assert "the label word 'bad-ish' is not one token at its place in task.template" in text
    assert not (room.folder / "run.lock").exists()
