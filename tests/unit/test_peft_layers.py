"""Adapters of the peft library as what a run trains."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests import tiny

from lorand.coefficients import Coefficients
from lorand.config import EstimatorKind, RunConfig
from lorand.errors import ConfigError, ModelError
from lorand_worker import model, peft_layers
from lorand_worker.bench import Base, ModelBench, load_base, task_for
from lorand_worker.data import Examples
from lorand_worker.estimators import Order
from lorand_worker.memory import Weights
from lorand_worker.model import LoadedModel

pytestmark = pytest.mark.usefixtures("one_thread")
KINDS = ["lora", "randlora"]


def config_of(kind: str, estimator: EstimatorKind = "backprop", **section: Any) -> RunConfig:
    """A run of adapters in the last layer."""
    return tiny.config(
        estimator,
        model={"adapter": kind, "adapter_rank": 4, **section},
        directions={"pool_size": 64},
        estimator={"batch_size": 16, "perturbation_scale": 0.001, "directions_per_round": 3},
    )


def examples() -> Examples:
    rows = tiny.rows("hotels", 16, seed=5)
    return Examples(tuple(t for t, _ in rows), tuple(tiny.LABELS.index(y) for _, y in rows))


def some(base: Base, bits: int = 26) -> Coefficients:
    """Coefficients that move every weight, by about a tenth with 26 bits."""
    size = base.replica.pool.size
    return np.random.default_rng(2).integers(-(2**bits), 2**bits, size)


def answers(loaded: LoadedModel) -> torch.Tensor:
    encoded = loaded.tokenizer(
        ["a clean room", "the bed was dirty"], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        return torch.as_tensor(loaded.module(encoded["input_ids"], encoded["attention_mask"]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixture", ["own_model", "causal_model"])
def test_nothing_is_changed_at_first(
    request: pytest.FixtureRequest, kind: str, fixture: str
) -> None:
    """And every machine starts with the same bits, whatever its random numbers are."""
    folder = request.getfixturevalue(fixture)
    task: Any = "causal-lm" if fixture == "causal_model" else "classification"
    plain = model.load(config_of("none").model, 2, folder, kind=task)
    if plain.tokenizer.pad_token_id is None:
        plain.tokenizer.pad_token = tiny.END
    digests = set()
    for seed in (1, 2):
        torch.manual_seed(seed)
        adapted = model.load(config_of(kind).model, 2, folder, kind=task)
        torch.testing.assert_close(answers(adapted), answers(plain), atol=0, rtol=0)
        digests.add(model.base_digest(adapted.module))
    assert len(digests) == 1
    assert digests.isdisjoint({model.base_digest(plain.module)})


def test_only_adapters_and_a_new_head_are_trained(tiny_model: Path, own_model: Path) -> None:
    trained = list(
        model.trainable_tensors(model.load(config_of("lora").model, 2, tiny_model), "last:1")
    )
    assert trained[-2:] == ["head.weight", "head.bias"]
    assert all(".layer.2." in name and ".lora_" in name for name in trained[:-2])
    assert len(trained) == 2 * 6 + 2, "all linear layers of the block"
    chosen = config_of("lora", adapter_targets=["query", "output.dense"], trainable="last:2")
    trained = list(model.trainable_tensors(model.load(chosen.model, 2, own_model), "last:2"))
    modules = {name.split(".lora_")[0].rsplit(".", 2)[-1] for name in trained}
    assert modules == {"query", "dense"}
    assert len(trained) == 2 * 2 * 3, "the head was saved with the model"


def test_alpha(own_model: Path) -> None:
    """Twice the rank, or as the run file says."""
    for alpha, scaling in ((0.0, 2.0), (12.0, 3.0)):
        loaded = model.load(config_of("lora", adapter_alpha=alpha).model, 2, own_model)
        layer: Any = loaded.module.get_submodule("model.bert.encoder.layer.2.attention.self.query")
        assert layer.scaling == {"default": scaling}


@pytest.mark.parametrize("kind", KINDS)
def test_estimators_agree_on_adapters(tiny_model: Path, kind: str) -> None:
    indices = np.array([3, 17, 40])
    found = {}
    ways: list[tuple[EstimatorKind, Weights]] = [
        ("backprop", Weights.COPY),
        ("backprop", Weights.LAYERWISE),
        ("spsa", Weights.LAYERWISE),
    ]
    if kind == "lora":
        ways.append(("forward", Weights.COPY))
    for estimator, weights in ways:
        config = config_of(kind, estimator)
        base = load_base(config, tiny_model, "cpu", weights)
        bench = ModelBench(base, config, examples())
        # RandLoRA's starts are small and its factor is large: a tenth is far away.
        bench.replica.set(some(base, 26 if kind == "lora" else 18))
        values = bench.measure(Order(np.arange(64) if estimator == "backprop" else indices)).values
        found[estimator, weights] = values[indices] if estimator == "backprop" else values
    exact = found["backprop", Weights.COPY]
    for key, values in found.items():
        tolerance = 0.05 if key[0] == "spsa" else 1e-3
        assert np.abs(values - exact).max() < tolerance * np.abs(exact).max(), key


@pytest.mark.parametrize("kind", KINDS)
def test_frozen_layers_still_run_once(own_model: Path, kind: str) -> None:
    config = config_of(kind)
    base = load_base(config, own_model, "cpu")
    task = task_for(base, config, examples())
    assert task._boundary.depth == 2


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_beside_a_quantised_base(own_model: Path, kind: str) -> None:
    """Their own weights are what is trained: no codes."""
    config = config_of(kind, quantisation="int8")
    base = load_base(config, own_model, "cpu", Weights.LAYERWISE)
    assert base.loaded.stored
    assert base.loaded.adapted.isdisjoint(base.loaded.stored)
    bench = ModelBench(base, config, examples())
    assert np.abs(bench.measure(Order(np.arange(64))).values).max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixture", ["own_model", "causal_model"])
def test_merged_weights_answer_as_the_adapters_do(
    request: pytest.FixtureRequest, kind: str, fixture: str
) -> None:
    config = config_of(kind)
    if fixture == "causal_model":
        content = {**config.model_dump(), "task": {"kind": "causal-lm"}}
        config = RunConfig.model_validate(content)
    base = load_base(config, request.getfixturevalue(fixture), "cpu")
    before = answers(base.loaded)
    base.replica.set(some(base))
    adapted = answers(base.loaded)
    assert float((adapted - before).abs().max()) > 1e-4
    names = {n.replace(".base_layer.", ".") for n, _ in base.loaded.module.named_parameters()}
    peft_layers.merge(base.loaded.module)
    torch.testing.assert_close(answers(base.loaded), adapted, atol=1e-5, rtol=1e-4)
    assert {n for n, _ in base.loaded.module.named_parameters()} == names - base.loaded.adapted


# ------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("section", "sentence"),
    [
        (
            {"adapter_targets": ["query", "q_proj"]},
            r"ends in 'q_proj'; there are dense, key, query",
        ),
        ({"trainable": "name:LayerNorm"}, "selects no linear layer in a numbered block"),
    ],
)
def test_nothing_to_adapt(own_model: Path, section: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelError, match=sentence):
        model.load(config_of("lora", **section).model, 2, own_model)


@pytest.mark.parametrize("kind", ["lora-ga", "eva"])
def test_adapters_that_start_from_data(kind: str) -> None:
    with pytest.raises(ConfigError, match=r'data, .* use "lora", or train all weights'):
        config_of(kind)


def test_randlora_has_no_forward_derivative() -> None:
    with pytest.raises(
        ConfigError, match=r'"randlora" has no forward-mode .* "spsa" or "backprop"'
    ):
        config_of("randlora", "forward")


def test_without_the_library(own_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'lorand\[peft\]'"):
        model.load(config_of("lora").model, 2, own_model)
