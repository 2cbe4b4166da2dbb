"""Read base models with transformers: safetensors only, no code of the model's own."""

import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lorand.errors import ModelError
from lorand.replica import DTYPES
from lorand.sections import ModelSection, TaskKind
from lorand_worker.heads import LanguageModel, OwnClassifier, PooledClassifier

_BODY = re.compile(r"(?:^|\.)(?:layer|layers|h|block|blocks)\.\d+\.|embed|wte")
"""Parts of a model that must come from its checkpoint."""

# Nobody else is asked to convert weights that are no safetensors.
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")


@dataclass(frozen=True)
class Pretrained:
    """A model with its tokenizer; `new` names the tensors that its checkpoint did not have."""

    module: nn.Module
    tokenizer: Any
    new: frozenset[str]


def read(section: ModelSection, num_labels: int, name: str, kind: TaskKind) -> Pretrained:
    """Return what a name or folder holds, as a task of this kind needs it.

    Raises ModelError for a checkpoint that does not serve, and whatever transformers raises.
    """
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
    _forget_calls(module)
    return Pretrained(module, tokenizer, frozenset(new))


def commit(section: ModelSection, source: Path | None) -> str | None:
    """Return the commit of the hub that a model was read from; None: it came from a folder."""
    from huggingface_hub import try_to_load_from_cache

    if source is not None or Path(section.name).is_dir():
        return None
    found = try_to_load_from_cache(section.name, "config.json", revision=section.revision)
    return Path(found).parent.name if isinstance(found, str) else None


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


def _forget_calls(module: nn.Module) -> None:
    """Have causal models keep no keys and values: nothing is generated, and they take memory."""
    for part in module.modules():
        config: Any = getattr(part, "config", None)
        if getattr(config, "use_cache", False):
            config.use_cache = False


@contextmanager
def quiet_transformers() -> Iterator[None]:
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
