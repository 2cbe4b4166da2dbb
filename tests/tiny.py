"""A tiny BERT with a tokenizer of its own, learnable data and run files.

Everything is made on the spot, and small enough that a round costs milliseconds.
"""

import csv
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Literal

from lorand.config import EstimatorKind, RunConfig

LABELS: Final = ("negative", "positive")
GOOD: Final = (
    *("lovely", "great", "superb", "clean", "friendly", "warm", "bright", "fresh", "perfect"),
    *("delicious", "excellent", "fast", "quiet", "cosy", "helpful", "charming", "tasty"),
)
BAD: Final = (
    *("awful", "dirty", "rude", "cold", "broken", "stale", "noisy", "slow", "bland", "horrible"),
    *("dull", "rusty", "cramped", "useless", "greasy", "smelly", "flimsy"),
)
DOMAINS: Final = {
    "hotels": ("room", "bed", "lobby", "pool", "towel", "view", "balcony", "hall", "window"),
    "gadgets": ("phone", "cable", "screen", "battery", "button", "case", "charger", "lens"),
    "restaurants": ("soup", "pasta", "waiter", "menu", "bread", "salad", "steak", "table"),
}
FILLER: Final = ("the", "was", "and", "we", "found", "a", "very", "it", "our", "quite", "with")
SPECIAL: Final = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


# -- texts ---------------------------------------------------------------------------------------


def rows(domain: str, count: int, seed: int) -> list[tuple[str, str]]:
    """Return (text, label) pairs: a text's adjectives give its label away."""
    source = random.Random(f"{domain}/{seed}")
    result = []
    for i in range(count):
        label = i % 2
        adjectives = source.choices(GOOD if label else BAD, k=source.randint(1, 3))
        words = [source.choice(DOMAINS[domain]), *adjectives]
        words += source.choices(FILLER, k=source.randint(2, 6))
        source.shuffle(words)
        result.append((" ".join(words), LABELS[label]))
    return result


def write_csv(path: Path, content: Sequence[tuple[str, str]]) -> Path:
    """Write a data file with a text and a label column."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *content])
    return path


def write_data(folder: Path, count: int = 160) -> dict[str, Path]:
    """Write one training file a domain, and `test`, held-out examples of all of them."""
    files = {name: write_csv(folder / f"{name}.csv", rows(name, count, seed=1)) for name in DOMAINS}
    held_out = [row for name in DOMAINS for row in rows(name, 20, seed=2)]
    return {**files, "test": write_csv(folder / "test.csv", held_out)}


# -- models --------------------------------------------------------------------------------------

Kind = Literal["encoder", "own", "roberta", "masked", "causal"]
END: Final = "<|end|>"
CHAT: Final = (
    "{% for turn in messages %}[{{ turn.role }}] {{ turn.content }}" + END + "\n{% endfor %}"
    "{% if add_generation_prompt %}[assistant] {% endif %}"
)
"""The chat template of the causal model: an answer is from a space to the mark after it."""


def write_model(
    folder: Path, kind: Kind = "encoder", *, seed: int = 0, more_words: Sequence[str] = ()
) -> Path:
    """Write config.json, model.safetensors and a fast tokenizer.

    `encoder` is a BERT without a head, `own` one that was saved with a classification head of two
    labels, `roberta` an encoder whose own head has two layers, which the checkpoint lacks, `masked`
    a BERT that fills masks, `causal` a GPT-2 on bytes and their merges. `seed` chooses the weights,
    `more_words` makes another tokenizer.
    """
    import torch
    import transformers

    vocabulary = (_write_bytes if kind == "causal" else _write_tokenizer)(folder, more_words)
    sizes: dict[str, Any] = {
        "vocab_size": max(200, len(vocabulary)),
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 72,
        "pad_token_id": 0,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "roberta":
            model = transformers.RobertaModel(
                transformers.RobertaConfig(**sizes, bos_token_id=2, eos_token_id=3),
                add_pooling_layer=False,
            )
        elif kind == "causal":
            model = transformers.GPT2LMHeadModel(_gpt2(sizes, vocabulary[END]))
        elif kind == "masked":
            model = transformers.BertForMaskedLM(transformers.BertConfig(**sizes))
        elif kind == "own":
            config = transformers.BertConfig(**sizes, num_labels=2)
            model = transformers.BertForSequenceClassification(config)
        else:
            model = transformers.BertModel(
                transformers.BertConfig(**sizes), add_pooling_layer=False
            )
        for name, parameter in model.named_parameters():
            if (
                "embeddings.word" in name or "wte" in name
            ):  # BERT's 0.02 leaves words hardly apart in 32 numbers
                parameter.data.normal_(0.0, 0.3)
    model.save_pretrained(folder, safe_serialization=True)
    return folder


def _write_tokenizer(folder: Path, more_words: Sequence[str]) -> dict[str, int]:
    import tokenizers
    import transformers

    words = [*SPECIAL, *FILLER, *GOOD, *BAD, *(w for ws in DOMAINS.values() for w in ws)]
    vocabulary = {word: i for i, word in enumerate([*words, *more_words])}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    raw.normalizer = tokenizers.normalizers.Lowercase()
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{word.strip('[]').lower()}_token": word for word in SPECIAL}
    transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **names).save_pretrained(folder)
    return vocabulary


def _gpt2(sizes: dict[str, Any], end: int) -> Any:
    import transformers

    return transformers.GPT2Config(
        vocab_size=sizes["vocab_size"],
        n_embd=sizes["hidden_size"],
        n_layer=sizes["num_hidden_layers"],
        n_head=sizes["num_attention_heads"],
        n_positions=sizes["max_position_embeddings"],
        bos_token_id=end,
        eos_token_id=end,
    )


def _write_bytes(folder: Path, more_words: Sequence[str]) -> dict[str, int]:
    """GPT-2's kind of tokenizer: a space belongs to the word after it, and nothing is unknown."""
    import tokenizers
    import transformers

    raw = tokenizers.Tokenizer(tokenizers.models.BPE())
    raw.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=800,
        show_progress=False,
        special_tokens=[END],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
    )
    words = [*FILLER, *GOOD, *BAD, *more_words, *(w for ws in DOMAINS.values() for w in ws)]
    raw.train_from_iterator([f" {word}" for word in words] * 2, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=raw, eos_token=END)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(folder)
    return dict(raw.get_vocab())


# -- run files -----------------------------------------------------------------------------------

Settings = dict[str, dict[str, Any]]


def settings(kind: EstimatorKind, **changes: dict[str, Any]) -> Settings:
    """Return the sections of a run of three workers; `changes` are merged section by section."""
    content: Settings = {
        "run": {"name": f"tiny-{kind}", "rounds": 8},
        "model": {"name": "tiny", "trainable": "last:1", "max_length": 24},
        "task": {"labels": list(LABELS)},
        "directions": {"pool_size": 1024 if kind == "backprop" else 256},
        "estimator": {"kind": kind, "batch_size": 8},
        "optimizer": {"kind": "sgd", "learning_rate": 0.002},
        "rounds": {"quorum": 2, "start_with": 3, "deadline_s": 20.0},
        "service": {"address": "127.0.0.1:0", "drain_s": 1.0, "commit_retry_s": 0.2},
    }
    if kind == "backprop":
        content["optimizer"] = {"kind": "adam", "learning_rate": 0.002}
    for section, values in changes.items():
        content.setdefault(section, {}).update(values)
    return content


def to_toml(content: Settings) -> str:
    """Return sections of plain values as TOML."""
    lines = []
    for section, values in content.items():
        lines += [f"[{section}]", *(f"{key} = {_value(v)}" for key, v in values.items()), ""]
    return "\n".join(lines)


def _value(value: Any) -> str:
    """JSON's strings, numbers, booleans and lists of strings are TOML's as well; tables are not."""
    if not isinstance(value, dict):
        return json.dumps(value)
    return "{" + ", ".join(f"{name} = {_value(part)}" for name, part in value.items()) + "}"


def config(kind: EstimatorKind, **changes: dict[str, Any]) -> RunConfig:
    """Return the config of `settings`."""
    return RunConfig.parse(to_toml(settings(kind, **changes)))
