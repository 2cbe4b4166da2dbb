"""Load a base model for a task, choose its trainable tensors, and name its identity."""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any, Final

import torch
from torch import nn

from lorand.config import ModelSection, RunConfig
from lorand.errors import ModelError
from lorand.kernels.reference import signs
from lorand.layers import Absent
from lorand.manifest import Identity, Manifest, TensorSpec, select_trainable
from lorand.replica import tensor_bytes
from lorand.sections import TaskKind
from lorand_worker import hugging_face, peft_layers, ranks, scales
from lorand_worker.pretrained import quiet_transformers, read
from lorand_worker.quantisation import Quantised, quantise_layers

HEAD_KEY = (0x4C6F5261, 0x6E644831)
"""Key of the signs that start the inner layers of a new multi-layer head ("LoRa", "ndH1")."""


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


_ONE_AT_A_TIME: Final = Lock()
"""transformers changes its own classes while it loads and puts them back after: two threads that
load at once leave them changed, and later models come without their tied weights."""


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
        with _ONE_AT_A_TIME, quiet_transformers(), hugging_face.cached_where_away(name):
            found = read(section, num_labels, name, kind)
            start_alike(found.module, found.new, num_labels)
            adapted = peft_layers.attach(found.module, section)
            stored = quantise_layers(found.module, section.quantisation, beside=adapted)
    except ModelError:
        raise
    except Exception as error:  # transformers raises many kinds for one cause: it cannot load.
        raise ModelError(_why_not(error, name)) from error
    return LoadedModel(found.module.eval(), found.tokenizer, found.new, stored, adapted)


def _why_not(error: Exception, name: str) -> str:
    """Why a model cannot be loaded, and what to do."""
    said = hugging_face.first_line(error)
    if not Path(name).is_dir() and (why := hugging_face.trouble(error, name, "model")):
        return why
    if "safetensors" in said and ("no file named" in said or "does not appear to have" in said):
        return (
            f"the model {name!r} has no weights as safetensors ({said}). Other formats are not "
            "opened, since they can run code: name a revision that has model.safetensors, or have "
            "`save_pretrained` of transformers write it on a machine that may run that code"
        )
    return (
        f"cannot load the model {name!r}: {said}; give a folder with config.json, "
        "model.safetensors and the tokenizer (`--model FOLDER`), or a name that the Hugging Face "
        "hub knows"
    )


def start_alike(module: nn.Module, new: frozenset[str], num_labels: int) -> None:
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


def trainable_tensors(model: LoadedModel, rule: str) -> dict[str, torch.Tensor]:
    """Return the parameters that the rule selects, tied ones once, in the model's order.

    Adapters were put where it selects: then they are what is trained, and a new head.
    """
    parameters = dict(model.module.named_parameters())
    if model.adapted:
        return {n: p for n, p in parameters.items() if n in model.adapted | model.new_names}
    return {name: parameters[name] for name in select_trainable(list(parameters), rule)}


def identity(
    model: LoadedModel,
    config: RunConfig,
    theirs: Identity | None = None,
    *,
    prepares: bool = False,
) -> Identity:
    """Return base digest, tokenizer digest and manifest of a loaded, untrained model.

    `theirs` is the run's identity where it is known: measured direction scales and ranks come from
    there. Without it, ranks are measured only by the machine that `prepares` the run.
    """
    if not prepares:
        ranks.check_decided(config.subspace, theirs)
    tensors = {
        name: model.stored[name].dense() if name in model.stored else tensor
        for name, tensor in trainable_tensors(model, config.model.trainable).items()
    }
    known = None if theirs is None else theirs.manifest
    found = ranks.ranks(config.subspace, tensors, model.new_names, known)
    exponents = scales.exponents(
        config.directions.scale_rule,
        {name: tensors[name] for name in found},
        new=model.new_names,
        head_exponent=int(math.log2(config.directions.head_scale)),
        shifts=ranks.shifts(config.subspace, found),
        theirs=known,
    )
    specs = [
        TensorSpec(
            name,
            tuple(tensors[name].shape),
            str(tensors[name].dtype).removeprefix("torch."),
            exponents[name],
            rank,
        )
        for name, rank in found.items()
    ]
    manifest = Manifest(tuple(sorted(specs, key=lambda spec: spec.name)))
    digest = base_digest(model.module, model.stored)
    chats = config.task.format == "chat"
    return Identity(digest, tokenizer_digest(model.tokenizer, chats=chats), manifest)


def base_digest(
    module: nn.Module, stored: Mapping[str, Quantised] | None = None, without: str = ""
) -> bytes:
    """Return SHA-256 over name, dtype, shape and bytes of every weight, sorted by name.

    Quantised weights count as what they are dequantised to here: a machine whose library would
    give other numbers has another base model. Names that begin with `without` are left out.
    """
    total = hashlib.sha256()
    for name, tensor in sorted(module.state_dict(keep_vars=True).items()):
        if without and name.startswith(without):
            continue
        if isinstance(tensor, Absent):
            tensor = (stored or {})[tensor.parameter].dense()
        total.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        total.update(tensor_bytes(tensor))
    return total.digest()


def tokenizer_digest(tokenizer: Any, *, chats: bool = False) -> bytes:
    """Return SHA-256 of what maps a text to ids: vocabulary, rules and special tokens.

    `chats`: of what maps a conversation to ids, the chat template included. Truncation and padding
    are left out: they are set a call, and would change the digest.
    """
    content: dict[str, Any] = {"vocabulary": sorted(tokenizer.get_vocab().items())}
    if getattr(tokenizer, "backend_tokenizer", None) is not None:
        rules = json.loads(tokenizer.backend_tokenizer.to_str())
        content["rules"] = {
            key: rules.get(key)
            for key in ("added_tokens", "normalizer", "pre_tokenizer", "post_processor", "model")
        }
    if chats:
        content["chat_template"] = tokenizer.chat_template
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).digest()
