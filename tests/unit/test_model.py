"""Loading a base model, its new tensors, and the digests that name it (DESIGN §2, §3)."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tests import tiny

from lorand.config import ModelSection
from lorand.errors import ConfigError, ModelError
from lorand_worker import model
from lorand_worker.heads import OwnClassifier, PooledClassifier
from lorand_worker.model import LoadedModel


def loaded(folder: Path, labels: int = 2, **changes: Any) -> LoadedModel:
    """The model of a folder."""
    return model.load(ModelSection(name="unused", **changes), labels, folder)


def copied(source: Path, folder: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(source, folder / "copy"))


def parameter(of: LoadedModel, name: str) -> torch.nn.Parameter:
    """One parameter of a model."""
    return dict(of.module.named_parameters())[name]


def logits(of: LoadedModel, text: str = "the room was lovely and clean") -> torch.Tensor:
    """The model's answer to a text."""
    encoded = of.tokenizer([text], return_tensors="pt")
    with torch.no_grad():
        return torch.as_tensor(of.module(encoded["input_ids"], encoded["attention_mask"]))


# ------------------------------------------------------------- what cannot be loaded


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"cannot load the model '.*nowhere'.*--model FOLDER"):
        loaded(tmp_path / "nowhere")


def test_weights_as_a_pickle_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    """Unpickling runs code: safetensors only."""
    folder = copied(tiny_model, tmp_path)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        loaded(folder)


def test_a_config_without_weights(tmp_path: Path, tiny_model: Path) -> None:
    folder = copied(tiny_model, tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"no weights as safetensors .* name a revision that has"):
        loaded(folder)


def test_weights_that_are_cut_off(tmp_path: Path, tiny_model: Path) -> None:
    folder = copied(tiny_model, tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelError, match="cannot load the model"):
        loaded(folder)


def test_remote_code_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = copied(tiny_model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text("raise SystemExit('code of the model ran')")
    with pytest.raises(ModelError, match="cannot load the model"):
        loaded(folder)


@pytest.mark.parametrize("kind", ["encoder", "own"])
def test_layers_the_weights_lack_are_not_made_up(tmp_path: Path, kind: Any) -> None:
    """transformers would fill them with random numbers, on every machine others."""
    folder = tiny.write_model(tmp_path / "model", kind)
    weights = load_file(folder / "model.safetensors")
    for name in list(weights):
        if "layer.1." in name:
            del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"weights lack '.*layer\.1\..* not of the same model"):
        loaded(folder)


def test_weights_of_another_shape_are_not_made_up(tmp_path: Path) -> None:
    folder = tiny.write_model(tmp_path / "model", "own")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 300}))
    with pytest.raises(ModelError, match="word_embeddings"):
        loaded(folder)


def test_weights_that_are_quantised_already_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = copied(tiny_model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"quantised already; .* set model\.quantisation"):
        loaded(folder)


def test_no_keys_and_values_are_kept(tmp_path: Path, tiny_model: Path) -> None:
    """A causal model would keep them for a generation that never comes."""
    folder = copied(tiny_model, tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"use_cache": True}))
    encoder: Any = loaded(folder).module.encoder
    assert encoder.config.use_cache is False


# ------------------------------------------------------------- heads


def test_a_pooled_head_is_zero_at_first(tiny_model: Path) -> None:
    of = loaded(tiny_model, labels=3)
    assert isinstance(of.module, PooledClassifier)
    assert of.new_names == {"head.weight", "head.bias"}
    assert logits(of).tolist() == [[0.0, 0.0, 0.0]]
    assert not of.module.training, "dropout is off"


def test_the_features_of_a_pooled_head_have_one_length(tiny_model: Path) -> None:
    of = loaded(tiny_model, feature_scale=4.0)
    assert isinstance(of.module, PooledClassifier)
    with torch.no_grad():
        of.module.head.weight.copy_(torch.eye(2, 32))
    both = logits(of).flatten()
    assert 0 < float(both.norm()) < 4.0


def test_padding_does_not_change_a_pooled_answer(tiny_model: Path) -> None:
    of = loaded(tiny_model)
    with torch.no_grad():
        parameter(of, "head.weight").normal_(generator=torch.Generator().manual_seed(1))
    encoded = of.tokenizer(["a clean room", "a " * 9], padding=True, return_tensors="pt")
    with torch.no_grad():
        padded = of.module(encoded["input_ids"], encoded["attention_mask"])
    torch.testing.assert_close(padded[:1], logits(of, "a clean room"))


def test_a_models_own_head_is_kept(own_model: Path) -> None:
    """Two labels: as it was saved. Another number: a new one, zero everywhere."""
    of = loaded(own_model)
    assert isinstance(of.module, OwnClassifier)
    assert of.new_names == frozenset()
    assert float(logits(of).abs().sum()) > 0
    other = loaded(own_model, labels=5)
    assert other.new_names == {"model.classifier.weight", "model.classifier.bias"}
    assert logits(other).tolist() == [[0.0] * 5]
    pooled = loaded(own_model, head="pooled")
    assert pooled.new_names == {"head.weight", "head.bias"}


def test_a_new_head_of_two_layers_starts_alike_and_can_learn(roberta_model: Path) -> None:
    """Only its last layer is zero: two zero layers would have no gradient at all."""
    torch.manual_seed(1)
    first = loaded(roberta_model, head="own")
    torch.manual_seed(2)
    second = loaded(roberta_model, head="own")
    names = {f"model.classifier.{n}.{p}" for n in ("dense", "out_proj") for p in ("weight", "bias")}
    assert first.new_names == names
    for name, ours in first.module.named_parameters():
        assert torch.equal(ours, parameter(second, name))
    dense = parameter(second, "model.classifier.dense.weight")
    assert set(dense.abs().flatten().tolist()) == {2.0**-2}, "signs, near 1/sqrt(32)"
    assert logits(first).tolist() == [[0.0, 0.0]]
    encoded = first.tokenizer(["a room"], return_tensors="pt")
    answer = first.module(encoded["input_ids"], encoded["attention_mask"])
    torch.nn.functional.cross_entropy(answer, torch.tensor([1])).backward()  # type: ignore[no-untyped-call]
    grown = parameter(first, "model.classifier.out_proj.weight").grad
    assert grown is not None
    assert float(grown.abs().sum()) > 0
    assert model.base_digest(first.module) == model.base_digest(second.module)


# ------------------------------------------------------------- identity


def test_the_trainable_set_and_its_direction_scales(tiny_model: Path) -> None:
    config = tiny.config("spsa", directions={"head_scale": 8.0})
    of = loaded(tiny_model)
    identity = model.identity(of, config)
    scales = {spec.name: spec.scale_exponent for spec in identity.manifest.tensors}
    assert scales.pop("head.weight") == scales.pop("head.bias") == 3
    assert set(scales.values()) == {0}
    assert all(name.startswith("encoder.encoder.layer.2.") for name in scales)
    every = model.trainable_tensors(of, "all")
    assert list(every) == [name for name, _ in of.module.named_parameters()]


@pytest.mark.parametrize(
    ("rule", "error", "sentence"),
    [
        ("name:no such thing", ModelError, "matches no parameter; the model has, for example"),
        ("last:4", ModelError, "the model has 3 layers"),
        ("last:0", ConfigError, "is not understood"),
        ("first:1", ConfigError, "use 'all', 'last:N' or 'name:REGEX'"),
        ("name:(", ConfigError, "not a regular expression"),
    ],
)
def test_a_trainable_set_that_does_not_exist(
    tiny_model: Path, rule: str, error: type[Exception], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        model.trainable_tensors(loaded(tiny_model), rule)


def test_the_base_digest_names_the_weights(tmp_path: Path, tiny_model: Path) -> None:
    digest = model.base_digest(loaded(tiny_model).module)
    assert digest == model.base_digest(loaded(copied(tiny_model, tmp_path)).module)
    others = [
        loaded(tiny.write_model(tmp_path / "seed", seed=1)),
        loaded(tiny_model, labels=3),
        loaded(tiny_model, dtype="bfloat16"),
    ]
    moved = loaded(tiny_model)
    with torch.no_grad():
        parameter(moved, "head.bias")[1] = 1e-30
    digests = {digest, *(model.base_digest(other.module) for other in [*others, moved])}
    assert len(digests) == 5


def test_the_tokenizer_digest_names_what_maps_texts(tmp_path: Path, tiny_model: Path) -> None:
    """Another word, another rule: another digest. Truncation and padding are a call's business."""
    tokenizer = loaded(tiny_model).tokenizer
    digest = model.tokenizer_digest(tokenizer)
    tokenizer(["a " * 50], truncation=True, max_length=8, padding="max_length")
    assert model.tokenizer_digest(tokenizer) == digest
    assert model.tokenizer_digest(loaded(tiny_model).tokenizer) == digest
    more = loaded(tiny.write_model(tmp_path / "words", more_words=["unheard"])).tokenizer
    folder = copied(tiny_model, tmp_path)
    rules = json.loads((folder / "tokenizer.json").read_text())
    digests = {digest, model.tokenizer_digest(more)}
    for changes in (
        {"normalizer": None},
        {"post_processor": None},
        {"model": {**rules["model"], "unk_token": "[MASK]"}},
    ):
        (folder / "tokenizer.json").write_text(json.dumps({**rules, **changes}))
        digests.add(model.tokenizer_digest(loaded(folder).tokenizer))
    assert len(digests) == 5


def test_models_that_are_loaded_at_once_leave_the_library_as_it_was(tmp_path: Path) -> None:
    """transformers patches its own classes while it loads; threads must take turns."""
    folder = tiny.write_model(tmp_path / "masked", "masked")
    section = ModelSection(name="masked")
    before = transformers.PreTrainedModel.tie_weights
    together = Barrier(4)

    def loaded(_: int) -> bool:
        together.wait(30)
        module = model.load(section, 2, folder, kind="label-words").module
        inner: Any = next(m for m in module.modules() if hasattr(m, "get_output_embeddings"))
        return inner.get_output_embeddings().weight is inner.get_input_embeddings().weight

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(loaded, range(4)))
    assert transformers.PreTrainedModel.tie_weights is before
