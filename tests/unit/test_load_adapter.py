"""Adapters on models as transformers loads them: the bits of the run's replicas, and back again."""

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import tiny
from torch import nn

import lorand
from lorand import adapter
from lorand.errors import ModelError
from lorand.replica import tensor_bytes
from lorand_api import Simulation

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = [row for domain in tiny.DOMAINS for row in tiny.rows(domain, 12, seed=1)]
ONE = {"quorum": 1, "start_with": 1}
SHORT: dict[str, dict[str, Any]] = {"run": {"rounds": 4}, "rounds": ONE}
WORDS = {
    "kind": "label-words",
    "template": "{text} {mask}",
    "label_words": ["awful", "great"],
}


def simulated(folder: Path, **changes: dict[str, Any]) -> Simulation:
    config = tiny.config("backprop", **{**SHORT, **changes})
    return lorand.simulate(config, [ROWS], model=folder, seed=1, device="cpu")


def loaded(folder: Path, kind: str, **options: Any) -> Any:
    """The model as a user loads it."""
    return getattr(transformers, kind).from_pretrained(folder, **options).eval()


def trained(model: nn.Module, run: Simulation, prefix: str) -> dict[str, bytes]:
    tensors = dict(model.named_parameters())
    names = [spec.name for spec in run.position.identity.manifest.tensors]
    return {name: bytes(tensor_bytes(tensors[name.removeprefix(prefix)])) for name in names}


def at_the_run(run: Simulation) -> dict[str, bytes]:
    return {name: bytes(tensor_bytes(tensor)) for name, tensor in run.base.replica.weights()}


def all_weights(model: nn.Module) -> dict[str, bytes]:
    return {name: bytes(tensor_bytes(t)) for name, t in model.state_dict().items()}


RUNS: dict[str, tuple[str, str, dict[str, dict[str, Any]]]] = {
    "its own head": ("own_model", "AutoModelForSequenceClassification", {}),
    "all weights": (
        "own_model",
        "AutoModelForSequenceClassification",
        {"model": {"trainable": "all"}},
    ),
    "a new head of two layers": (
        "roberta_model",
        "AutoModelForSequenceClassification",
        {"model": {"head": "own"}},
    ),
    "a new pooler and head": (
        "tiny_model",
        "AutoModelForSequenceClassification",
        {"model": {"head": "own"}},
    ),
    "masked": ("masked_model", "AutoModelForMaskedLM", {"task": WORDS}),
    "pools that rotate": (
        "own_model",
        "AutoModelForSequenceClassification",
        {"directions": {"rotate_every": 2}},
    ),
    "columns of coordinates": (
        "own_model",
        "AutoModelForSequenceClassification",
        {
            "directions": {"rotate_every": 2},
            "subspace": {"kind": "coordinate", "rank": 4, "refresh_every": 2},
        },
    ),
    "cosines in 8 bits": (
        "own_model",
        "AutoModelForSequenceClassification",
        {"subspace": {"kind": "dct", "rank": 4, "weights": "int8-stochastic"}},
    ),
    "elected columns": (
        "own_model",
        "AutoModelForSequenceClassification",
        {
            "directions": {"rotate_every": 2},
            "subspace": {
                "kind": "coordinate",
                "rank": 4,
                "selection": "voted",
                "refresh_every": 2,
            },
        },
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_model_gets_the_bits_of_the_run_and_loses_them_again(
    name: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    fixture, kind, changes = RUNS[name]
    folder = request.getfixturevalue(fixture)
    run = simulated(folder, **changes)
    run.save(tmp_path)
    model = loaded(folder, kind)
    before = all_weights(model)
    assert lorand.load_adapter(model, tmp_path, tokenizer=run.tokenizer) is model
    assert trained(model, run, "model.") == at_the_run(run)
    assert all_weights(model) != before
    assert lorand.unload(model) is model
    assert all_weights(model) == before


def test_an_encoder_comes_back_with_the_head_of_the_run(tiny_model: Path, tmp_path: Path) -> None:
    """Also one whose pooler transformers made up, which is left as it was."""
    run = simulated(tiny_model)
    run.save(tmp_path)
    encoder = loaded(tiny_model, "AutoModel")
    before = all_weights(encoder)
    model = lorand.load_adapter(encoder, tmp_path)
    assert trained(model, run, "") == at_the_run(run)
    ids = torch.tensor([[2, 9, 14, 3]])
    with torch.no_grad():
        logits = model(ids, torch.ones_like(ids))
        assert torch.equal(logits, run.model(ids, torch.ones_like(ids)))
    assert lorand.unload(model) is encoder
    assert all_weights(encoder) == before


def test_lora_layers_are_put_in_taken_out_or_merged(own_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("peft", reason="peft is not installed")
    run = simulated(own_model, model={"adapter": "lora", "adapter_rank": 2})
    run.save(tmp_path)
    model = loaded(own_model, "AutoModelForSequenceClassification")
    before, ids = all_weights(model), torch.tensor([[2, 9, 14, 3]])
    mask = torch.ones_like(ids)
    lorand.load_adapter(model, tmp_path)
    assert trained(model, run, "model.") == at_the_run(run)
    with torch.no_grad():
        adapted = model(ids, mask).logits
    lorand.unload(model)
    assert all_weights(model) == before
    lorand.merge_and_unload(lorand.load_adapter(model, tmp_path))
    assert all_weights(model).keys() == before.keys()
    with torch.no_grad():
        merged = model(ids, mask).logits
        assert torch.allclose(merged, adapted, atol=1e-6)
        assert torch.equal(adapted, run.model(ids, mask))


def test_a_quantised_base_is_dequantised_as_workers_do(own_model: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    run = simulated(own_model, model={"quantisation": "int8"})
    run.save(tmp_path)
    model = loaded(own_model, "AutoModelForSequenceClassification")
    before = all_weights(model)
    lorand.load_adapter(model, tmp_path)
    assert trained(model, run, "model.") == at_the_run(run)
    lorand.unload(model)
    assert all_weights(model) == before


def test_a_merged_model_opens_in_transformers_with_a_card(own_model: Path, tmp_path: Path) -> None:
    run = simulated(own_model)
    run.save(tmp_path, merged=True, about_data="36 sentences")
    opened = loaded(tmp_path / "merged", "AutoModelForSequenceClassification")
    assert trained(opened, run, "model.") == at_the_run(run)
    assert opened.config.id2label == dict(enumerate(tiny.LABELS))
    card = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    for told in (run.position.head.hex(), "36 sentences", "4 of 4", "none: no noise was added"):
        assert told in card


# -- sums ----------------------------------------------------------------------------------------


def test_adapters_of_one_pool_are_added_exactly(own_model: Path) -> None:
    first = simulated(own_model).adapter
    other = simulated(own_model, run={"rounds": 2}, optimizer={"learning_rate": 0.01}).adapter
    total = lorand.add_weighted([first, other], [2, -1])
    assert total.coefficients.tolist() == (2 * first.coefficients - other.coefficients).tolist()
    model = loaded(own_model, "AutoModelForSequenceClassification")
    before = all_weights(model)
    lorand.load_adapter(model, lorand.add_weighted([first, first], [1, -1]))
    assert all_weights(model) == before
    half = lorand.add_weighted([first], [0.5])
    assert abs(2 * half.coefficients - first.coefficients).max() <= 1


def test_pools_that_were_left_are_added_one_by_one(own_model: Path, tmp_path: Path) -> None:
    rotates = {"directions": {"rotate_every": 2}}
    longer = simulated(own_model, **rotates, run={"rounds": 5}).adapter
    shorter = simulated(own_model, **rotates, run={"rounds": 3}).adapter
    assert (len(longer.closed), len(shorter.closed)) == (2, 1)
    total = lorand.add_weighted([shorter, longer], [1, 1])
    size = len(total.coefficients)
    expected = shorter.closed[0].dense(size) + longer.closed[0].dense(size)
    assert total.closed[0].dense(size).tolist() == expected.tolist()
    expected = shorter.coefficients + longer.closed[1].dense(size)
    assert total.closed[1].dense(size).tolist() == expected.tolist()
    assert total.coefficients.tolist() == longer.coefficients.tolist()
    adapter.save(total, tmp_path)
    assert adapter.load(tmp_path).closed == total.closed


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"model": {"trainable": "all"}}, "other trainable tensors"),
        ({"directions": {"pool_size": 512}}, "other directions"),
        ({"task": {"labels": ["bad", "good"]}}, "other labels"),
    ],
)
def test_numbers_that_mean_something_else_are_not_added(
    changes: dict[str, Any], why: str, own_model: Path
) -> None:
    rows = [(text, dict(zip(tiny.LABELS, ("bad", "good"), strict=True))[y]) for text, y in ROWS]
    config = tiny.config("backprop", **{**SHORT, **changes})
    data = rows if "task" in changes else ROWS
    other = lorand.simulate(config, [data], model=own_model, seed=1).adapter
    with pytest.raises(ModelError, match=why):
        lorand.add_weighted([simulated(own_model).adapter, other], [1, 1])


# -- what does not fit ---------------------------------------------------------------------------


def test_what_does_not_fit_is_said(
    own_model: Path, masked_model: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    run = simulated(own_model)
    run.save(tmp_path)
    model = loaded(own_model, "AutoModelForSequenceClassification")
    other = tiny.write_model(tmp_path_factory.mktemp("other"), "own", seed=5)
    words = tiny.write_model(tmp_path_factory.mktemp("words"), "own", more_words=["more"])
    with pytest.raises(ModelError, match=r"not the base of this adapter.*load 'tiny' at revision"):
        lorand.load_adapter(loaded(other, "AutoModelForSequenceClassification"), tmp_path)
    with pytest.raises(ModelError, match=r"the run trains 'model\.bert"):
        lorand.load_adapter(loaded(own_model, "AutoModel"), tmp_path)
    with pytest.raises(ModelError, match=r"bfloat16 .* in this model"):
        lorand.load_adapter(model.to(torch.bfloat16), tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(words)
    model = loaded(own_model, "AutoModelForSequenceClassification")
    with pytest.raises(ModelError, match="the tokenizer is not the one of the adapter's run"):
        lorand.load_adapter(model, tmp_path, tokenizer=tokenizer)
    with pytest.raises(ModelError, match="has no adapter"):
        lorand.unload(model)
    lorand.load_adapter(model, tmp_path)
    with pytest.raises(ModelError, match="has an adapter already"):
        lorand.load_adapter(model, tmp_path)
    with pytest.raises(ModelError, match="holds no readable adapter"):
        lorand.load_adapter(lorand.unload(model), tmp_path / "nowhere")


def test_a_refused_model_is_as_it_was(own_model: Path, tmp_path: Path) -> None:
    simulated(own_model, model={"adapter": "lora", "adapter_rank": 2}).save(tmp_path)
    model = loaded(own_model, "AutoModelForSequenceClassification")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1
    before = all_weights(model)
    with pytest.raises(ModelError, match="not the base of this adapter"):
        lorand.load_adapter(model, tmp_path)
    assert all_weights(model) == before
