"""The tasks of the contract: settings, model and examples of each, and its losses by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from tests import tiny
from torch.nn.functional import cross_entropy

from lorand.config import EstimatorKind, RunConfig
from lorand_worker.bench import Base, load_base, task_for
from lorand_worker.data import Examples, Pairs
from lorand_worker.heads import LanguageModel
from lorand_worker.memory import Weights
from lorand_worker.tasks import Forward, Task

COUNT: Final = 24
TEMPLATES: Final = {"masked": "it was {mask} , {text}", "causal": "{text} , it was"}


@dataclass(frozen=True)
class Case:
    """A kind of task on a kind of model; `by_hand` gives an example's loss, alone and unpadded."""

    name: str
    fixture: str
    settings: dict[str, Any]
    by_hand: Callable[[Base, Examples | Pairs, int], float]

    def config(self, kind: EstimatorKind = "spsa", **changes: dict[str, Any]) -> RunConfig:
        """The run of this task."""
        content = tiny.settings(kind, **changes)
        content["task"] = self.settings
        return RunConfig.model_validate(content)

    def examples(self) -> Examples | Pairs:
        """Examples of many lengths."""
        rows = tiny.rows("hotels", COUNT, seed=5)
        texts = tuple(f"{text}{' very' * (i % 7)}" for i, (text, _) in enumerate(rows))
        if self.settings["kind"] == "causal-lm":
            words = [
                " ".join([label, *text.split()[: i % 5]]) for i, (text, label) in enumerate(rows)
            ]
            return Pairs(texts, tuple(words))
        return Examples(texts, tuple(tiny.LABELS.index(label) for _, label in rows))


@dataclass(frozen=True)
class Setup:
    """A case on a loaded model."""

    case: Case
    config: RunConfig
    base: Base

    def task(self, forward: Forward | None = None) -> Task:
        """The task on the case's examples."""
        return task_for(self.base, self.config, self.case.examples(), forward)


def set_up(
    case: Case,
    request: pytest.FixtureRequest,
    trainable: str = "last:1",
    estimator: EstimatorKind = "spsa",
    weights: Weights = Weights.COPY,
) -> Setup:
    """Load the model of a case; a new head answers something from the start."""
    folder: Path = request.getfixturevalue(case.fixture)
    config = case.config(
        estimator,
        model={"trainable": trainable, "max_length": 40},
        directions={"pool_size": 64},
        # All examples: every bench has the same batch.
        estimator={"batch_size": COUNT, "perturbation_scale": 0.001, "directions_per_round": 3},
    )
    base = load_base(config, folder, "cpu", weights)
    return Setup(case, config, base)


def _logits(base: Base, ids: list[int]) -> torch.Tensor:
    """Logits of one example: (labels,), or (length, vocabulary) of a language model."""
    row = torch.tensor([ids])
    with torch.no_grad():
        return torch.as_tensor(base.loaded.module(row, torch.ones_like(row)))[0]


def _by_head(base: Base, examples: Examples | Pairs, i: int) -> float:
    assert isinstance(examples, Examples)
    logits = _logits(base, base.loaded.tokenizer(examples.texts[i])["input_ids"])
    return float(cross_entropy(logits, torch.tensor(examples.labels[i])))


def _by_words(base: Base, examples: Examples | Pairs, i: int) -> float:
    assert isinstance(examples, Examples)
    assert isinstance(base.loaded.module, LanguageModel)
    tokenizer = base.loaded.tokenizer
    masked = base.loaded.module.masked
    space = "" if masked else " "  # bytes keep it with the word
    words = [
        tokenizer(space + w, add_special_tokens=False)["input_ids"] for w in ("awful", "great")
    ]
    template = TEMPLATES["masked" if masked else "causal"]
    text = template.replace("{text}", examples.texts[i]).replace("{mask}", "[MASK]")
    ids = tokenizer(text)["input_ids"]
    place = ids.index(tokenizer.mask_token_id) if masked else -1
    chosen = _logits(base, ids)[place][torch.tensor(words).flatten()]
    return float(cross_entropy(chosen, torch.tensor(examples.labels[i])))


def _by_answer(base: Base, examples: Examples | Pairs, i: int) -> float:
    assert isinstance(examples, Pairs)
    tokenizer = base.loaded.tokenizer
    prompt = tokenizer(f"we found {examples.prompts[i]} :")["input_ids"]
    answer = [*tokenizer(f" {examples.answers[i]}")["input_ids"], tokenizer.eos_token_id]
    logits = _logits(base, prompt + answer)[len(prompt) - 1 : -1]
    return float(cross_entropy(logits, torch.tensor(answer)))


_WORDS: Final = {
    "kind": "label-words",
    "labels": list(tiny.LABELS),
    "label_words": ["awful", "great"],
}
CASES: Final = (
    Case("head", "own_model", {"kind": "classification", "labels": list(tiny.LABELS)}, _by_head),
    Case("masked", "masked_model", {**_WORDS, "template": TEMPLATES["masked"]}, _by_words),
    Case("causal", "causal_model", {**_WORDS, "template": TEMPLATES["causal"]}, _by_words),
    Case(
        "answers",
        "causal_model",
        {"kind": "causal-lm", "template": "we found {text} : "},
        _by_answer,
    ),
)
