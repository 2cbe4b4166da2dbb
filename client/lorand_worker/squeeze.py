"""The `squeeze` command: a run's LoRA layers at a smaller rank, as an adapter that `peft` opens.

LoRA-Squeeze (arXiv 2602.10993), after training ("Post-Squeeze"): what was learned at a high rank is
brought to the closest update of a lower one. The paper takes a randomised SVD of the whole update;
here its factors are at hand, and give the exact one at the cost of small matrices.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from torch import nn

from lorand import adapter
from lorand.config import RunConfig
from lorand.errors import ConfigError, ModelError
from lorand.ledger import Position
from lorand_worker import merge
from lorand_worker.heads import LanguageModel, PooledClassifier
from lorand_worker.libraries import optional
from lorand_worker.model import LoadedModel

WEIGHTS_FILE: Final = "adapter_model.safetensors"
PREFIX: Final = "base_model.model."
"""What PEFT puts before the names of the model that it adapts."""


@dataclass(frozen=True)
class Squeezed:
    """An update up · down of one layer, float32: (outputs, rank) times (rank, inputs).

    `kept` is the share of the energy, the sum of squares of all its elements, that is left.
    """

    down: torch.Tensor
    up: torch.Tensor
    kept: float


def squeeze(down: torch.Tensor, up: torch.Tensor, scaling: float, rank: int) -> Squeezed:
    """Return the update of this rank that is closest to ΔW = scaling · up · down.

    down: shape (r, inputs), LoRA's A; up: shape (outputs, r), its B; rank is 1 … r. ΔW is never
    formed: with up = Q_u R_u and downᵀ = Q_d R_d, its singular values are those of the core
    scaling · R_u R_dᵀ = U S Vᵀ, at most r × r. The largest `rank` of them, shared evenly:

        up' = Q_u U √S        down' = √S Vᵀ Q_dᵀ

    The error is the root of the sum of squares of the others (Eckart and Young). All in float64.

    >>> found = squeeze(torch.eye(2, 5), torch.diag(torch.tensor([4.0, 3.0])), 0.5, rank=1)
    >>> round(float((found.up @ found.down).norm()), 4), round(found.kept, 4)
    (2.0, 0.64)
    """
    q_up, r_up = torch.linalg.qr(up.detach().double())
    q_down, r_down = torch.linalg.qr(down.detach().double().T)
    left, values, right = torch.linalg.svd(scaling * r_up @ r_down.T, full_matrices=False)
    energy = values.square()
    kept = float(energy[:rank].sum() / energy.sum()) if energy.any() else 1.0
    root = values[:rank].sqrt()
    # A layer that is narrower than the rank has no more: the rest is zero.
    squeezed_up = torch.zeros(up.shape[0], rank)
    squeezed_down = torch.zeros(rank, down.shape[1])
    squeezed_up[:, : len(root)] = q_up @ (left[:, :rank] * root)
    squeezed_down[: len(root)] = (root[:, None] * right[:rank]) @ q_down.T
    return Squeezed(squeezed_down, squeezed_up, kept)


def check(config: RunConfig, rank: int, folder: Path) -> None:
    """Raise ConfigError for a run without LoRA layers, a rank that is none less, a taken folder."""
    model = config.model
    if model.adapter != "lora":
        why = " (RandLoRA's update is of full rank)" if model.adapter == "randlora" else ""
        raise ConfigError(
            f'the run {config.run.name!r} has model.adapter = "{model.adapter}"{why}: only LoRA '
            "layers can be squeezed; `lr-worker export --merged` writes the whole model"
        )
    if not 1 <= rank <= model.adapter_rank:
        raise ConfigError(
            f"--rank {rank}: the run has model.adapter_rank = {model.adapter_rank}; give 1 to "
            f"{model.adapter_rank}"
        )
    if (folder / adapter.WEIGHTS_FILE).exists():
        raise ConfigError(
            f"{folder} holds an exported adapter, whose {adapter.CONFIG_FILE} would be written "
            "over: give another folder"
        )


def save(loaded: LoadedModel, position: Position, rank: int, folder: Path) -> dict[str, float]:
    """Write an adapter folder of PEFT; return each layer's share of energy that is kept.

    The weights are those of the module as it stands. `peft.PeftModel.from_pretrained` puts them on
    the model that `transformers` loads: a language model, a classifier (a new head comes with the
    adapter) or an encoder, whose pooled head is beside it as in `merge.save`. Raises ModelError.
    """
    peft: Any = optional("peft", "a squeezed adapter is written by the peft library", "peft")
    module = loaded.module
    inside = "encoder." if isinstance(module, PooledClassifier) else "model."
    layers: dict[str, Any] = {
        name.removeprefix(inside): part
        for name, part in module.named_modules()
        if isinstance(part, peft.tuners.lora.LoraLayer)
    }
    kept, tensors = {}, {}
    for name, layer in layers.items():
        found = _squeezed(layer, rank)
        kept[name] = found.kept
        tensors[f"{PREFIX}{name}.lora_A.weight"] = found.down
        tensors[f"{PREFIX}{name}.lora_B.weight"] = found.up
    new = {} if isinstance(module, PooledClassifier) else _new(loaded, inside)
    tensors |= {PREFIX + name: tensor for name, tensor in new.items()}
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=rank,  # a scaling of 1
        lora_dropout=0.0,
        target_modules=sorted(layers),
        modules_to_save=sorted({name.rpartition(".")[0] for name in new}) or None,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in layers.values()),
        base_model_name_or_path=position.config.model.name,
        revision=position.config.model.revision,
        task_type=_task_type(module),
        inference_mode=True,
    )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / WEIGHTS_FILE, metadata={"format": "pt"})
        config.save_pretrained(folder)
        merge.save_beside(module, position.config.task, folder)
    except OSError as error:
        raise ModelError(f"cannot write the adapter to {folder}: {error}") from error
    return kept


def told(kept: dict[str, float], rank: int, folder: Path) -> str:
    """Return what was kept, layer by layer, as text."""
    width = max(len(name) for name in kept)
    lines = [f"{name:<{width}}  {share:7.2%} of its energy" for name, share in kept.items()]
    size = (folder / WEIGHTS_FILE).stat().st_size
    lines.append(
        f"wrote {folder / WEIGHTS_FILE}: {size:,} bytes, {len(kept)} layers of rank {rank}; "
        f"{min(kept.values()):.2%} of the energy or more is kept in each"
    )
    return "\n".join(lines)


def _squeezed(layer: Any, rank: int) -> Squeezed:
    """One layer of PEFT's, whose own adapter is called as `peft_layers.attach` calls it."""
    down, up = (side["default"].weight.cpu() for side in (layer.lora_A, layer.lora_B))
    return squeeze(down, up, layer.scaling["default"], rank)


def _new(loaded: LoadedModel, inside: str) -> dict[str, torch.Tensor]:
    """Tensors of a new head inside of a Hugging Face model, by their names there."""
    return {
        name.removeprefix(inside): parameter.detach().cpu().contiguous()
        for name, parameter in loaded.module.named_parameters()
        if name in loaded.new_names
    }


def _task_type(module: nn.Module) -> str | None:
    """PEFT's name for what the model does; for classifiers it would expect its own kind of head."""
    if isinstance(module, PooledClassifier):
        return "FEATURE_EXTRACTION"
    return "CAUSAL_LM" if isinstance(module, LanguageModel) and not module.masked else None
