"""Write a fine-tuned model as ordinary weights."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import nn

from lorand import adapter, card
from lorand.card import Facts
from lorand.errors import ModelError
from lorand.ledger import Position
from lorand.sections import PLAIN_TEMPLATE, TaskSection
from lorand_worker import peft_layers
from lorand_worker.heads import LanguageModel, OwnClassifier, PooledClassifier
from lorand_worker.model import LoadedModel


def save(loaded: LoadedModel, position: Position, folder: Path, facts: Facts | None = None) -> Path:
    """Write weights, config, tokenizer and a card of the run; return the folder.

    Adapters are merged into the weights beside them, in place. A language model or one with its own
    head opens in transformers as it is; what asks for labels by words is beside it in prompt.json.
    An encoder with a pooled head is written as the encoder (which opens in transformers) beside
    head.safetensors and head.json.
    """
    task = position.config.task
    module = loaded.module
    try:
        folder.mkdir(parents=True, exist_ok=True)
        loaded.tokenizer.save_pretrained(folder)
        if loaded.adapted:
            peft_layers.merge(module)
        if isinstance(module, OwnClassifier):
            _name_labels(module.model, list(task.labels))
        inner = "encoder" if isinstance(module, PooledClassifier) else "model"
        _pretrained(module.get_submodule(inner)).save_pretrained(folder, safe_serialization=True)
        save_beside(module, task, folder)
        card.write(adapter.of(position), facts or Facts(), folder, merged=True)
    except OSError as error:
        raise ModelError(f"cannot write the merged model to {folder}: {error}") from error
    return folder


def save_beside(module: nn.Module, task: TaskSection, folder: Path) -> None:
    """Write what no Hugging Face model holds: a pooled head, or how a language model is asked."""
    labels = list(task.labels)
    if isinstance(module, LanguageModel):
        asked: dict[str, Any] = {"format": task.format}
        if task.format == "pairs":
            template = task.template or PLAIN_TEMPLATE
            asked = {"template": template, "labels": labels, "label_words": task.label_words}
        (folder / "prompt.json").write_text(json.dumps(asked, indent=1), encoding="utf-8")
    elif isinstance(module, PooledClassifier):
        head = {name: t.detach().contiguous() for name, t in module.head.state_dict().items()}
        save_file(head, folder / "head.safetensors")
        note = {
            "labels": labels,
            "pooling": "mean over tokens, unit length, times feature_scale",
            "feature_scale": module.feature_scale,
        }
        (folder / "head.json").write_text(json.dumps(note, indent=1), encoding="utf-8")


def _name_labels(model: nn.Module, labels: list[str]) -> None:
    config = _pretrained(model).config
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: i for i, label in enumerate(labels)}


def _pretrained(model: nn.Module) -> Any:
    """The module as the transformers model it is; that library is not typed."""
    return model
