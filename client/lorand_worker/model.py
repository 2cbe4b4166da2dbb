"""Load a base model for a task, choose its trainable tensors, and name its identity."""

import hashlib
import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorand.config import ModelSection, RunConfig
from lorand.errors import ModelError
from lorand.kernels.reference import signs
from lorand.layers import Absent
from lorand.manifest import Identity, Manifest, TensorSpec, select_trainable
from lorand.replica import DTYPES, tensor_bytes
from lorand.sections import TaskKind
from lorand_worker import peft_layers, scales
from lorand_worker.heads import LanguageModel, OwnClassifier, PooledClassifier
from lorand_worker.quantisation import Quantised, quantise_layers

HEAD_KEY = (0x4C6F5261, 0x6E644831)
"""Key of the signs that start the inner layers of a new multi-layer head ("LoRa", "ndH1")."""
_BODY = re.compile(r"(?:^|\.)(?:layer|layers|h|block|blocks)\.\d+\.|embed|wte")
"""Parts of a model that must come from its checkpoint."""


@dataclass(frozen=True)
class LoadedModel:
    """A base model ready for a run; `new_names` are tensors the checkpoint did not have.

    `stored` are quantised weights by name; the module holds stand-ins for them (`layers.Absent`).
    `adapted` are the parameters of adapters: if there are any, only they and new ones are trained.
    """

    module: nn.Module
    tokenizer: Any
    new_names: frozenset[str]
    stored: dict[str, Quantised] = field(default_factory=dict)
    adapted: frozenset[str] = frozenset()


def load(
    section: ModelSection,
    num_labels: int,
    source: str | Path | None = None,
    *,
    kind: TaskKind = "classification",
) -> LoadedModel:
    """Load model and tokenizer by name, folder or revision; safetensors only, no remote code.

    `source` replaces the run's model name on this machine (a local copy), `kind` is the task's: a
    classifier of `num_labels`, or a language model with its own vocabulary. Dropout is off. New
    head weights start alike everywhere: zero in the last layer. Raises ModelError.
    """
    name = str(source or section.name)
    try:
        with _quiet_transformers():
            return _load(section, num_labels, name, kind)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds for one cause: it cannot load.
        raise ModelError(
            f"cannot load the model {name!r}: {str(error).strip().splitlines()[0]}; give a folder "
            "with config.json, model.safetensors and the tokenizer (`--model FOLDER`), or a name "
            "that the Hugging Face hub knows"
        ) from error


def _load(section: ModelSection, num_labels: int, name: str, kind: TaskKind) -> LoadedModel:
    import transformers

    common = {"revision": section.revision, "trust_remote_code": False}
    config = transformers.AutoConfig.from_pretrained(name, **common)
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"the weights of {name!r} are quantised already; name the model they were made from, "
            'and set model.quantisation to "int8" or "nf4" in the run file'
        )
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, **common)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    options = {**common, "use_safetensors": True, "dtype": DTYPES[section.dtype]}
    if kind == "classification":
        module, new = _classifier(section, num_labels, name, config, options)
        _name_padding(module, tokenizer)
    else:
        module, new = _language_model(name, kind, config, options), set()
    _start_alike(module, new, num_labels)
    _forget_calls(module)
    adapted = peft_layers.attach(module, section)
    stored = quantise_layers(module, section.quantisation, beside=adapted)
    return LoadedModel(module.eval(), tokenizer, frozenset(new), stored, adapted)


def _classifier(
    section: ModelSection, num_labels: int, name: str, config: Any, options: dict[str, Any]
) -> tuple[nn.Module, set[str]]:
    """A classifier, and the names of its tensors that the checkpoint did not have."""
    import transformers

    own = section.head == "own" or (
        section.head == "auto"
        and any(a.endswith("ForSequenceClassification") for a in config.architectures or [])
    )
    if own:
        model, info = transformers.AutoModelForSequenceClassification.from_pretrained(
            name,
            num_labels=num_labels,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
        return OwnClassifier(model), {f"model.{key}" for key in _fresh(info)}
    encoder, info = _load_encoder(transformers, name, options)
    module = PooledClassifier(encoder, config.hidden_size, num_labels, section.feature_scale)
    module.head.to(DTYPES[section.dtype])
    return module, {"head.weight", "head.bias", *(f"encoder.{key}" for key in _fresh(info))}


def _name_padding(module: nn.Module, tokenizer: Any) -> None:
    """Tell a classifier of its own what padding is: some read their answer before it."""
    config: Any = getattr(getattr(module, "model", None), "config", None)
    if config is not None and config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id


def _language_model(
    name: str, kind: TaskKind, config: Any, options: dict[str, Any]
) -> LanguageModel:
    """A masked or causal language model, as the checkpoint's config says."""
    import transformers

    found = config.architectures or []
    causal = any(a.endswith(("ForCausalLM", "LMHeadModel")) for a in found)
    masked = any(a.endswith(("ForMaskedLM", "ForPreTraining")) for a in found)
    if not causal and (not masked or kind == "causal-lm"):
        wanted = "causal" if kind == "causal-lm" else "masked or causal"
        raise ModelError(
            f'task.kind = "{kind}" needs a {wanted} language model, but {name!r} was saved as '
            f"{' and '.join(found) or 'nothing that its config names'}; name another model, or set "
            'task.kind = "classification"'
        )
    kinds = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForMaskedLM
    model, info = kinds.from_pretrained(name, output_loading_info=True, **options)
    if fresh := sorted(_fresh(info)):
        raise ModelError(
            f"the weights of {name!r} lack {fresh[0]!r}, a part of what predicts words; name a "
            'checkpoint of the whole language model, or set task.kind = "classification"'
        )
    return LanguageModel(model, masked=not causal)


def _load_encoder(
    transformers: Any, name: str, options: dict[str, Any]
) -> tuple[nn.Module, dict[str, Any]]:
    """The encoder and what transformers tells of loading it."""
    options = {**options, "output_loading_info": True}
    try:
        loaded = transformers.AutoModel.from_pretrained(name, add_pooling_layer=False, **options)
    except TypeError:  # an architecture without a pooler does not know the argument
        loaded = transformers.AutoModel.from_pretrained(name, **options)
    encoder, info = loaded
    return encoder, info


def _fresh(info: dict[str, Any]) -> set[str]:
    """Names of tensors that the checkpoint did not have, or had in another shape.

    Only a head or a pooler may be new. Raises ModelError for a layer or an embedding, which
    transformers would fill with random numbers.
    """
    fresh = set(info["missing_keys"]) | {key[0] for key in info["mismatched_keys"]}
    lost = sorted(key for key in fresh if _BODY.search(key))
    if lost:
        raise ModelError(
            f"the model's weights lack {lost[0]!r} and {len(lost) - 1} more, or have them in "
            "another shape; model.safetensors and config.json are not of the same model"
        )
    return fresh


def _start_alike(module: nn.Module, new: set[str], num_labels: int) -> None:
    """Give new tensors the same start on every machine: zero, or signs under a fixed key.

    Only the last layer may be zero: a head of two zero layers would have no gradient at all.
    """
    with torch.no_grad():
        for tid, (name, tensor) in enumerate(sorted(module.named_parameters())):
            if name not in new:
                continue
            if tensor.dim() == 2 and tensor.shape[0] != num_labels:
                start = signs(0, tensor.numel(), key=HEAD_KEY, tid=tid, device=torch.device("cpu"))
                scale = 2.0 ** -round(math.log2(tensor.shape[1]) / 2)
                tensor.copy_((start * scale).reshape(tensor.shape))
            elif name.endswith("weight") and tensor.dim() == 1:
                tensor.fill_(1.0)  # a new normalisation layer
            else:
                tensor.zero_()


def _forget_calls(module: nn.Module) -> None:
    """Have causal models keep no keys and values: nothing is generated, and they take memory."""
    for part in module.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False


def trainable_tensors(model: LoadedModel, rule: str) -> dict[str, torch.Tensor]:
    """Return the parameters that the rule selects, tied ones once, in the model's order.

    Adapters were put where it selects: then they are what is trained, and a new head.
    """
    parameters = dict(model.module.named_parameters())
    if model.adapted:
        return {n: p for n, p in parameters.items() if n in model.adapted | model.new_names}
    return {name: parameters[name] for name in select_trainable(list(parameters), rule)}


def identity(model: LoadedModel, config: RunConfig, theirs: Identity | None = None) -> Identity:
    """Return base digest, tokenizer digest and manifest of a loaded, untrained model.

    `theirs` is the run's identity where it is known: measured direction scales come from there.
    """
    tensors = trainable_tensors(model, config.model.trainable)
    exponents = scales.exponents(
        config.directions.scale_rule,
        {n: model.stored[n].dense() if n in model.stored else t for n, t in tensors.items()},
        new=model.new_names,
        head_exponent=int(math.log2(config.directions.head_scale)),
        theirs=None if theirs is None else theirs.manifest,
    )
    specs = [
        TensorSpec(
            name,
            tuple(tensor.shape),
            str(tensor.dtype).removeprefix("torch."),
            exponents[name],
        )
        for name, tensor in tensors.items()
    ]
    manifest = Manifest(tuple(sorted(specs, key=lambda spec: spec.name)))
    digest = base_digest(model.module, model.stored)
    return Identity(digest, tokenizer_digest(model.tokenizer), manifest)


def base_digest(module: nn.Module, stored: Mapping[str, Quantised] | None = None) -> bytes:
    """Return SHA-256 over name, dtype, shape and bytes of every weight, sorted by name.

    Quantised weights count as what they are dequantised to here: a machine whose library would
    give other numbers has another base model.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if isinstance(tensor, Absent):
            tensor = (stored or {})[tensor.parameter].dense()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor_bytes(tensor))
    return total.digest()


def tokenizer_digest(tokenizer: Any) -> bytes:
    """Return SHA-256 of what maps a text to ids: vocabulary, rules and special tokens.

    Truncation and padding are left out: they are set a call, and would change the digest.
    """
    content: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        content["rules"] = {
            key: rules.get(key)
            for key in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
        }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Keep load reports and progress bars of transformers out of the command's output."""
    import transformers

    logger = logging.getLogger("transformers")
    level = logger.level
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logger.setLevel(level)
        if bars:
            transformers.utils.logging.enable_progress_bar()
