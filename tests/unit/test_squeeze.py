"""LoRA layers at a smaller rank, opened by the peft library."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tests import tiny
from typer.testing import CliRunner

from lorand import adapter, ledger
from lorand.config import RunConfig
from lorand.errors import ConfigError
from lorand.ledger import Position
from lorand_worker import cli, squeeze
from lorand_worker.bench import Base, bring, load_base
from lorand_worker.heads import LanguageModel, PooledClassifier

pytestmark = pytest.mark.usefixtures("one_thread")
RANK = 4


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------- one layer


@pytest.mark.parametrize(("outputs", "inputs", "rank"), [(40, 30, 8), (5, 30, 8), (40, 3, 8)])
def test_at_full_rank_nothing_is_lost(outputs: int, inputs: int, rank: int) -> None:
    down, up = normal(rank, inputs, seed=1), normal(outputs, rank, seed=2)
    found = squeeze.squeeze(down, up, 2.0, rank)
    torch.testing.assert_close(found.up @ found.down, 2.0 * up @ down, atol=1e-5, rtol=1e-5)
    assert found.kept == pytest.approx(1.0)
    assert (found.up.shape, found.down.shape) == ((outputs, rank), (rank, inputs))


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_the_error_is_the_tail_of_the_singular_values(rank: int) -> None:
    down, up = normal(8, 30, seed=3), normal(40, 8, seed=4)
    update = (0.5 * up.double() @ down.double()).float()
    found = squeeze.squeeze(down, up, 0.5, rank)
    values = torch.linalg.svdvals(update.double())
    error = (update - found.up @ found.down).double()
    assert float(error.norm()) == pytest.approx(float(values[rank:].norm()), rel=1e-5)
    assert float(torch.linalg.matrix_norm(error, 2)) == pytest.approx(float(values[rank]), rel=1e-5)
    share = float(values[:rank].square().sum() / values.square().sum())
    assert found.kept == pytest.approx(share, rel=1e-6)
    assert int(torch.linalg.matrix_rank(found.up @ found.down)) == rank


def test_a_layer_that_never_moved() -> None:
    found = squeeze.squeeze(normal(4, 6, seed=1), torch.zeros(5, 4), 2.0, 2)
    assert found.kept == 1.0
    assert not (found.up @ found.down).any()


# ------------------------------------------------------------- a run


def trained(folder: Path, kind: str = "classification", **section: Any) -> tuple[Base, Position]:
    """A run of LoRA layers, far from its base."""
    content = tiny.settings(
        "backprop",
        model={"name": str(folder), "adapter": "lora", "adapter_rank": RANK, **section},
        directions={"pool_size": 64},
    )
    if kind == "causal-lm":
        content["task"] = {"kind": kind}
    elif kind == "label-words":
        words = {"label_words": ["lovely", "awful"], "template": "{text} was {mask}"}
        content["task"] = {"kind": kind, "labels": list(tiny.LABELS), **words}
    config = RunConfig.parse(tiny.to_toml(content))
    base = load_base(config, folder, "cpu")
    coefficients = np.random.default_rng(2).integers(-(2**29), 2**29, 64)
    position = replace(ledger.origin(config, base.identity), coefficients=coefficients, committed=5)
    bring(base.replica, position)
    base.replica.settle()
    return base, position


def tokens(base: Base) -> dict[str, torch.Tensor]:
    encoded = base.loaded.tokenizer(
        ["a clean room", "the bed was dirty"], return_tensors="pt", padding=True
    )
    return {name: encoded[name] for name in ("input_ids", "attention_mask")}


@torch.no_grad()
def output(model: Any, of: dict[str, torch.Tensor]) -> torch.Tensor:
    """Logits, or an encoder's last hidden states."""
    answer = model(**of)
    found = answer.logits if "logits" in answer else answer.last_hidden_state
    return torch.as_tensor(found)


CASES = {
    "pooled": ("tiny_model", "classification", transformers.AutoModel),
    "own": ("own_model", "classification", transformers.AutoModelForSequenceClassification),
    "new": ("roberta_model", "classification", transformers.AutoModelForSequenceClassification),
    "masked": ("masked_model", "label-words", transformers.AutoModelForMaskedLM),
    "causal": ("causal_model", "causal-lm", transformers.AutoModelForCausalLM),
}


# transformers deprecates what PEFT asks it for.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("case", CASES)
def test_peft_opens_it(request: pytest.FixtureRequest, case: str, tmp_path: Path) -> None:
    """On the model as transformers loads it: at full rank it answers as the run's does."""
    fixture, kind, auto = CASES[case]
    folder = request.getfixturevalue(fixture)
    base, position = trained(folder, kind, **({"head": "own"} if case == "new" else {}))
    module: Any = base.loaded.module
    ours = module.encoder if isinstance(module, PooledClassifier) else module.model
    options = {"add_pooling_layer": False} if case == "pooled" else {}
    plain = auto.from_pretrained(folder, **options).eval()
    expected, before = output(ours, tokens(base)), output(plain, tokens(base))
    assert float((expected - before).abs().max()) > 0.01
    kept = squeeze.save(base.loaded, position, RANK, tmp_path / "full")
    assert all(share == pytest.approx(1.0) for share in kept.values())
    opened = peft.PeftModel.from_pretrained(plain, tmp_path / "full").eval()
    torch.testing.assert_close(output(opened, tokens(base)), expected, atol=1e-5, rtol=1e-4)
    found = opened.peft_config["default"]
    assert (found.r, found.lora_alpha, found.base_model_name_or_path) == (RANK, RANK, str(folder))
    beside = {"pooled": ["head.json", "head.safetensors"], "masked": ["prompt.json"]}
    names = sorted(path.name for path in (tmp_path / "full").iterdir())
    always = ["adapter_config.json", "adapter_model.safetensors"]
    assert names == always + beside.get("masked" if case == "causal" else case, [])
    assert isinstance(module, LanguageModel) == ("prompt.json" in names)


def test_a_smaller_rank_is_the_closest_update(own_model: Path, tmp_path: Path) -> None:
    base, position = trained(own_model)
    kept = squeeze.save(base.loaded, position, 1, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert len(tensors) == 2 * len(kept) == 2 * 6
    for name, share in kept.items():
        layer: Any = base.loaded.module.get_submodule(f"model.{name}")
        update = layer.get_delta_weight("default").detach()
        down, up = (tensors[f"base_model.model.{name}.lora_{side}.weight"] for side in "AB")
        values = torch.linalg.svdvals(update)
        assert (down.shape[0], up.shape[1]) == (1, 1)
        assert float((update - up @ down).norm()) == pytest.approx(
            float(values[1:].norm()), rel=1e-4
        )
        assert 0.2 < share < 1
    text = squeeze.told(kept, 1, tmp_path)
    assert text.count("of its energy") == 6
    assert "6 layers of rank 1; " in text


def test_the_command(own_model: Path, tmp_path: Path) -> None:
    """From the folder that `export` writes; what was squeezed says so a layer."""
    base, position = trained(own_model)
    exported, wanted = tmp_path / "exported", tmp_path / "squeezed"
    adapter.save(adapter.of(position), exported)
    assert adapter.position(adapter.load(exported)) is not None
    arguments = ["squeeze", str(exported), str(wanted), "--rank", "2", "--json"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["kept"] == squeeze.save(base.loaded, position, 2, tmp_path / "here")
    ours, theirs = (
        load_file(at / "adapter_model.safetensors") for at in (wanted, tmp_path / "here")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    with pytest.raises(ConfigError, match=r"holds an exported adapter, whose adapter_config\.json"):
        squeeze.check(position.config, 2, exported)


# ------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("section", "rank", "sentence"),
    [
        ({}, 2, r'has model\.adapter = "none": only LoRA layers .*`lr-worker export --merged`'),
        ({"adapter": "randlora"}, 2, r"RandLoRA's update is of full rank"),
        ({"adapter": "lora", "adapter_rank": 8}, 9, r"adapter_rank = 8; give 1 to 8"),
        ({"adapter": "lora", "adapter_rank": 8}, 0, r"--rank 0: .* give 1 to 8"),
    ],
)
def test_runs_that_cannot_be_squeezed(
    section: dict[str, Any], rank: int, sentence: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=sentence):
        squeeze.check(tiny.config("spsa", model=section), rank, tmp_path)
