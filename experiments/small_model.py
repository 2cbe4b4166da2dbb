"""A small causal language model on Conan Doyle's stories: what experiments on answers start from.

    python -m experiments.small_model        # seven minutes of one thread, once

A Llama of about a million weights and a byte-level tokenizer of its own, both trained here on
`sherlock` (3 MB, public domain). It is small: it writes words and knows hardly a fact, and what is
fine-tuned from it says how methods compare, not what they reach. Nothing of it is committed; the
folder's name is a digest of settings and text, so that another setting is another model. Sums of
floats differ between machines, so that the weights are the same to the bit on one machine only.
"""

import hashlib
import json
import math
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from experiments.cells import RESULTS
from experiments.federation import DATA
from experiments.provenance import provenance
from lorand_worker.pretrained import quiet_transformers

MODELS: Final = Path.home() / ".cache" / "lorand" / "experiments"
END: Final = "<|end|>"
HELD_OUT: Final = 20
"""One block of so many is never trained on."""


@dataclass(frozen=True)
class Settings:
    """Sizes of model and tokenizer, and how it is trained."""

    vocabulary: int = 2048
    width: int = 128
    layers: int = 4
    heads: int = 4
    inner: int = 384
    context: int = 256
    batch: int = 16
    steps: int = 700
    learning_rate: float = 3e-3
    warmup: int = 50
    seed: int = 0

    def rate(self, step: int) -> float:
        """Return the learning rate of a step: a warm-up, then half a cosine down to a tenth."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        left = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.45 * (1 + math.cos(math.pi * left)))


def paragraphs(text: str) -> list[str]:
    """Return a book's paragraphs, each as one line."""
    parts = (" ".join(part.split()) for part in text.split("\n\n"))
    return [part for part in parts if part]


def folder_of(settings: Settings, text: str) -> Path:
    """Return where the model of these settings on this text is, or will be."""
    said = json.dumps([asdict(settings), text], sort_keys=True)
    return MODELS / f"sherlock-{hashlib.sha256(said.encode()).hexdigest()[:16]}"


def made(settings: Settings | None = None) -> Path:
    """Return the model's folder, trained now where it is not there yet."""
    settings = settings or Settings()
    text = (DATA / "sherlock" / "sherlock.txt").read_text(encoding="utf-8")
    folder = folder_of(settings, text)
    if not folder.exists():
        MODELS.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=MODELS) as unfinished:
            place = Path(unfinished) / "model"
            train(settings, paragraphs(text), place)
            os.replace(place, folder)
    return folder


def record() -> None:
    """Write results/small_model.json: the model's settings, loss, digest and provenance."""
    folder = made()
    content = json.loads((folder / "about.json").read_text(encoding="utf-8"))
    content["sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    (RESULTS / "small_model.json").write_text(json.dumps(content, indent=1) + "\n")


def train(settings: Settings, texts: Sequence[str], folder: Path) -> None:
    """Train tokenizer and model, and write them with about.json."""
    import transformers

    tokenizer = _tokenizer(settings, texts)
    rows = _blocks(settings, tokenizer, texts)
    held = np.arange(len(rows)) % HELD_OUT == HELD_OUT - 1
    end = tokenizer.eos_token_id
    with torch.random.fork_rng():
        torch.manual_seed(settings.seed)
        model: Any = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=settings.vocabulary,
                hidden_size=settings.width,
                num_hidden_layers=settings.layers,
                num_attention_heads=settings.heads,
                intermediate_size=settings.inner,
                max_position_embeddings=2 * settings.context,
                tie_word_embeddings=True,
                bos_token_id=end,
                eos_token_id=end,
                pad_token_id=end,
            )
        )
        started = time.process_time()
        _descend(settings, model, rows[~held])
    spent = time.process_time() - started
    with quiet_transformers():
        model.save_pretrained(folder, safe_serialization=True)
        tokenizer.save_pretrained(folder)
    said = {
        "settings": asdict(settings),
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": int(rows.size),
        "characters_a_token": round(sum(map(len, texts)) / rows.size, 3),
        "loss_held_out": round(_loss(settings, model, rows[held]), 4),
        "cpu_s": round(spent),
        "provenance": provenance(),
    }
    (folder / "about.json").write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")


def _tokenizer(settings: Settings, texts: Sequence[str]) -> Any:
    """Byte-level merges: a space belongs to the word after it, and nothing is unknown."""
    import tokenizers
    import transformers

    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        show_progress=False,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    raw.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END, pad_token=END)


def _blocks(settings: Settings, tokenizer: Any, texts: Sequence[str]) -> "np.ndarray[Any, Any]":
    """All paragraphs, each with its end, one after the other: rows of `context` tokens."""
    encoded = tokenizer(list(texts), verbose=False)["input_ids"]
    stream = [token for row in encoded for token in (*row, tokenizer.eos_token_id)]
    count = len(stream) // settings.context
    return np.array(stream[: count * settings.context]).reshape(count, settings.context)


def _batches(settings: Settings, count: int) -> Iterator["np.ndarray[Any, Any]"]:
    """Shuffled epochs without end."""
    draw = np.random.default_rng(settings.seed)
    size = min(settings.batch, count)
    while True:
        order = draw.permutation(count)
        yield from (order[at : at + size] for at in range(0, count - size + 1, size))


def _descend(settings: Settings, model: Any, rows: "np.ndarray[Any, Any]") -> None:
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), weight_decay=0.1)
    for step, batch in zip(range(settings.steps), _batches(settings, len(rows)), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(step)
        loss = _pass(model, rows[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0 or step == settings.steps - 1:
            print(f"step {step} of {settings.steps}: loss {loss.item():.3f}", flush=True)


def _pass(model: Any, rows: "np.ndarray[Any, Any]") -> torch.Tensor:
    ids = torch.from_numpy(rows)
    return torch.as_tensor(model(input_ids=ids, labels=ids).loss)


@torch.no_grad()
def _loss(settings: Settings, model: Any, rows: "np.ndarray[Any, Any]") -> float:
    """Mean loss of a token, in nats."""
    parts = range(0, len(rows), settings.batch)
    sums = (len(p) * float(_pass(model, p)) for p in (rows[a : a + settings.batch] for a in parts))
    return sum(sums) / len(rows)


def main() -> None:
    """Train the model where it is not there, and say where it is."""
    torch.set_num_threads(1)
    print(made())
    record()


if __name__ == "__main__":
    main()
