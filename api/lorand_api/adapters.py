"""Adapters on Hugging Face models: put on, taken off, merged and added."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch import nn

from lorand import adapter as adapters
from lorand import ledger
from lorand.adapter import Adapter
from lorand.config import RunConfig
from lorand.errors import ModelError
from lorand.manifest import Manifest
from lorand.replica import CopyReplica, WholeReplica, check_tensors
from lorand.subspaces.replica import SubspaceReplica
from lorand_api import hub
from lorand_worker import bench, peft_layers, quantisation
from lorand_worker.heads import LanguageModel, OwnClassifier, PooledClassifier
from lorand_worker.model import base_digest, start_alike, tokenizer_digest
from lorand_worker.quantisation import quantise_layers

Source = Adapter | Path | str
"""An adapter, a folder that holds one, or the name of a repository of the hub."""
_MARK: Final = "_lorand_adapter"


@dataclass
class _Loaded:
    """What a model has of an adapter, and what it had before."""

    given: nn.Module
    """The model that the caller has."""
    inside: nn.Module
    """The run's module, of which the caller's model is a part."""
    before: dict[str, torch.Tensor]
    layers: bool
    """Whether layers of PEFT were put in."""


def load_adapter(
    model: nn.Module, source: Source, *, tokenizer: Any = None, revision: str | None = None
) -> Any:
    """Give a base model the weights of a run, bit for bit, and return it.

    `model` is what `transformers` loads of the run's base model, in the run's dtype; its weights
    are written in place. An encoder that the run put a head on is returned with it, as a module
    that is called with input_ids and attention_mask. Other keys than the base model's are left as
    they are. With a `tokenizer`, that is checked, too. Raises ModelError.
    """
    if hasattr(model, _MARK):
        raise ModelError(
            "the model has an adapter already: `lorand.unload(model)` it, or load the sum of both "
            "that `lorand.add_weighted` returns"
        )
    found = load(source, revision)
    config, manifest = found.config, found.identity.manifest
    if tokenizer is not None and tokenizer_digest(tokenizer) != found.identity.tokenizer_digest:
        raise ModelError(
            f"the tokenizer is not the one of the adapter's run; take that of {_base(config)}"
        )
    inside = _as_in_the_run(model, config, manifest)
    before = {name: p.detach().clone() for name, p in _overwritten(inside, config, manifest)}
    loaded = _Loaded(model, inside, before, config.model.adapter != "none")
    try:
        _rebuild(inside, found)
    except BaseException:
        _restore(loaded)
        raise
    returned = inside if isinstance(inside, PooledClassifier) else model
    for each in {id(part): part for part in (model, returned)}.values():
        object.__setattr__(each, _MARK, loaded)
    return returned


def unload(model: nn.Module) -> Any:
    """Bring the base model back that `load_adapter` was given, and return it."""
    loaded = _taken(model)
    _restore(loaded)
    return loaded.given


def merge_and_unload(model: nn.Module) -> Any:
    """Make the adapter's weights the model's own: nothing is kept to go back; return the model.

    LoRA layers are added to the weights beside them. The result is saved like any other model.
    """
    loaded = _taken(model)
    if loaded.layers:
        peft_layers.merge(loaded.inside)
    return model


def add_weighted(sources: Sequence[Source], weights: Sequence[float]) -> Adapter:
    """Return Σ weight · adapter of several adapters of one pool; see `adapter.weighted_sum`."""
    return adapters.weighted_sum([load(source) for source in sources], weights)


def load(source: Source, revision: str | None = None) -> Adapter:
    """Read an adapter from a folder, or from the hub. Raises ModelError."""
    if isinstance(source, Adapter):
        return source
    return adapters.load(hub.folder_of(source, revision))


def _base(config: RunConfig) -> str:
    return f"{config.model.name!r} at revision {config.model.revision!r}"


def _as_in_the_run(model: nn.Module, config: RunConfig, manifest: Manifest) -> nn.Module:
    """Return the module that workers have around such a model."""
    if isinstance(model, PooledClassifier | OwnClassifier | LanguageModel):
        return model
    if config.task.kind != "classification":
        return LanguageModel(model, masked=False)  # only its names matter here
    if all(spec.name.startswith("model.") for spec in manifest.tensors):
        return OwnClassifier(model)
    encoder = getattr(model, "base_model", model)
    width = getattr(getattr(encoder, "config", None), "hidden_size", 0)
    labels, scale = len(config.task.labels), config.model.feature_scale
    pooled = PooledClassifier(encoder, width, labels, scale)
    parameter = next(encoder.parameters())
    pooled.head.to(parameter.device, parameter.dtype)
    start_alike(pooled, frozenset({"head.weight", "head.bias"}), labels)
    return pooled.train(model.training)


def _overwritten(
    module: nn.Module, config: RunConfig, manifest: Manifest
) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters that an adapter may change, PEFT's layers not being there yet."""
    trained = {spec.name for spec in manifest.tensors}
    heads = {name for names in _perhaps_new(module) for name in names}
    for name, parameter in module.named_parameters():
        if name in trained | heads or config.model.quantisation != "none":
            yield name, parameter


def _perhaps_new(module: nn.Module) -> list[frozenset[str]]:
    """Return, from none on, which tensors the base checkpoint may have lacked.

    transformers fills them with random numbers, workers alike everywhere: a classifier's head, and
    the pooler below it.
    """
    none: frozenset[str] = frozenset()
    if not isinstance(module, OwnClassifier):
        return [none]
    prefix = f"model.{getattr(module.model, 'base_model_prefix', '')}."
    names = [name for name, _ in module.named_parameters()]
    head = frozenset(name for name in names if not name.startswith(prefix))
    pooler = frozenset(name for name in names if name.startswith(f"{prefix}pooler."))
    return [none, head, head | pooler] if pooler else [none, head]


@torch.no_grad()
def _rebuild(module: nn.Module, found: Adapter) -> None:
    """Do what a worker does: start alike, put in layers, quantise, write w(A)."""
    config, manifest = found.config, found.identity.manifest
    candidates = _perhaps_new(module)
    parameters = dict(module.named_parameters())
    theirs = {name: parameters[name].clone() for name in candidates[-1]}
    start_alike(module, candidates[-1], len(config.task.labels))
    alike = {name: parameters[name].clone() for name in candidates[-1]}
    adapted = peft_layers.attach(module, config.model)
    stored = quantise_layers(module, config.model.quantisation, beside=adapted)
    for new in candidates:
        for name in candidates[-1]:
            parameters[name].copy_((alike if name in new else theirs)[name])
        if found.identity.base_digest in _digests(module, stored):
            break
    else:
        tensors = {**dict(module.named_parameters())}
        if not stored:
            check_tensors(tensors, manifest)
        raise ModelError(
            f"the model is not the base of this adapter, whose weights have the digest "
            f"{found.identity.base_digest.hex()[:16]}: load {_base(config)} with dtype = "
            f'"{config.model.dtype}", and without changes'
        )
    quantisation.expand(module, stored)
    replica = _replica(module, found)
    bench.bring(replica, adapters.position(found))
    replica.settle()


def _digests(module: nn.Module, stored: Any) -> Iterator[bytes]:
    """Yield the base digest, also as that of an encoder without a pooler."""
    yield base_digest(module, stored)
    if isinstance(module, PooledClassifier):
        yield base_digest(module, stored, without="encoder.pooler.")


def _replica(module: nn.Module, found: Adapter) -> WholeReplica:
    config, manifest = found.config, found.identity.manifest
    tensors, pool = dict(module.named_parameters()), ledger.pool_of(config, found.identity, 0)
    if not config.subspace.restricts:
        return CopyReplica(tensors, manifest, pool)
    return SubspaceReplica(tensors, manifest, pool, **bench.kept_of(config, manifest))


@torch.no_grad()
def _restore(loaded: _Loaded) -> None:
    if loaded.layers:
        peft_layers.remove(loaded.inside)
    parameters = dict(loaded.inside.named_parameters())
    for name, tensor in loaded.before.items():
        parameters[name].copy_(tensor)


def _taken(model: nn.Module) -> _Loaded:
    """Return what was loaded, and forget it."""
    loaded: _Loaded | None = getattr(model, _MARK, None)
    if loaded is None:
        raise ModelError("the model has no adapter: `lorand.load_adapter(model, path)` puts one on")
    for part in {id(part): part for part in (model, loaded.given, loaded.inside)}.values():
        if hasattr(part, _MARK):
            object.__delattr__(part, _MARK)
    return loaded
