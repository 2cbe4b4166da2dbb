"""Sections of a run file: what is learned, where, and what it may show of one example.

[model], [task], [subspace] and [privacy].
"""

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from lorand import schedules

Quantisation = Literal["none", "int8", "nf4"]
TaskKind = Literal["classification", "label-words", "causal-lm"]
SubspaceKind = Literal["full", "coordinate", "dct", "svd"]
StateKind = Literal["none", "adam", "frugal", "fira"]

TEXT, MASK = "{text}", "{mask}"
"""Placeholders of a template; every other character stands for itself, braces included."""
PLAIN_TEMPLATE = TEXT + "\n"
"""What an empty template of a causal-lm task means: the prompt, and the answer on the next line."""


class Section(BaseModel):
    """Settings: frozen, and none but those it names."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)


class ModelSection(Section):
    """The base model and which of its parameters are trained."""

    name: str
    revision: str = "main"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantisation: Quantisation = "none"
    trainable: str = "all"
    adapter: Literal["none", "lora", "randlora"] = "none"
    adapter_rank: Annotated[int, Field(ge=1, le=4096)] = 8
    adapter_alpha: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    adapter_targets: tuple[str, ...] = ()
    head: Literal["auto", "own", "pooled"] = "auto"
    feature_scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 10.0
    max_length: Annotated[int, Field(ge=4, le=32768)] = 128

    @field_validator("adapter", mode="before")
    @classmethod
    def _starts_without_data(cls, adapter: object) -> object:
        if adapter in ("lora-ga", "lora_ga", "eva", "corda"):
            raise ValueError(
                f'"{adapter}" starts from gradients or activations of data, which every machine '
                'would have to have alike: use "lora", or train all weights with adapter = "none"'
            )
        return adapter


class TaskSection(Section):
    """What is learned: a text's label (classification, label-words), or answers (causal-lm).

    Those are answers to prompts (`pairs`), whole texts (`text`), or what the assistant says in
    conversations, written as the tokenizer's own template has it (`chat`).
    """

    kind: TaskKind = "classification"
    labels: Annotated[tuple[str, ...], Field(max_length=10_000, validate_default=True)] = ()
    text_column: str = "text"
    label_column: str = "label"
    template: str = ""
    label_words: tuple[str, ...] = ()
    prompt_column: str = "prompt"
    answer_column: str = "answer"
    format: Literal["pairs", "text", "chat"] = "pairs"
    messages_column: str = "messages"

    @field_validator("labels")
    @classmethod
    def _distinct(cls, labels: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        kind = info.data.get("kind")
        if kind == "causal-lm" and labels:
            raise ValueError('task.kind = "causal-lm" has no labels: remove them')
        if kind in ("classification", "label-words") and len(labels) < 2:
            raise ValueError("at least 2 items are needed: list every label that the data has")
        if len(set(labels)) != len(labels):
            raise ValueError("every label is listed once")
        return labels

    @model_validator(mode="after")
    def _has_what_its_kind_needs(self) -> "TaskSection":
        if self.kind == "classification" and (self.template or self.label_words):
            raise ValueError(
                'template and label_words are for kind = "label-words"; set it, or remove them'
            )
        if self.kind == "label-words":
            if len(self.label_words) != len(self.labels):
                raise ValueError(
                    f"label_words lists {len(self.label_words)} words for {len(self.labels)} "
                    "labels; give one word a label, in the same order"
                )
            if len({word.strip() for word in self.label_words} | {""}) <= len(self.labels):
                raise ValueError("label_words must be distinct words, none of them empty")
            self._check_template(
                'e.g. "{text} It was {mask}." for a masked model, "{text}\\nSentiment:" for a '
                "causal one"
            )
            if self.template.count(MASK) > 1:
                raise ValueError(f"template has {MASK} more than once; one word is predicted")
        if self.format != "pairs" and (self.kind != "causal-lm" or self.template):
            raise ValueError(
                f'format = "{self.format}" is for kind = "causal-lm", without a template: set it, '
                'or leave format at "pairs"'
            )
        if self.kind == "causal-lm":
            if self.label_words:
                raise ValueError('label_words are for kind = "label-words"; remove them')
            if self.template:
                self._check_template('e.g. "Question: {text}\\nAnswer:"; the answer follows it')
            if MASK in self.template:
                raise ValueError(f'template has {MASK}, which kind = "causal-lm" does not fill')
        return self

    def _check_template(self, example: str) -> None:
        if self.template.count(TEXT) != 1:
            raise ValueError(f"template must have {TEXT} exactly once, {example}")


class SubspaceSection(Section):
    """The subspace of each matrix in which directions act; see `lorand.subspaces`."""

    kind: SubspaceKind = "full"
    rank: Annotated[int, Field(ge=1, le=2048)] = 8
    rank_rule: Literal["fixed", "welore"] = "fixed"
    targets: str = ""
    scale: float = 1.0
    selection: Literal["drawn", "voted"] = "drawn"
    refresh_every: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    lazy: bool = False
    state: StateKind = "none"
    weights: Literal["float", "int8", "int8-stochastic"] = "float"
    probe: bool = False
    switch_off: bool = False

    @property
    def restricts(self) -> bool:
        """Whether directions act in subspaces that all replicas share: matrices have a rank."""
        return self.kind in ("coordinate", "dct")

    @property
    def measures_ranks(self) -> bool:
        """Whether ranks follow from singular values: they are in run.lock, or nobody knows them."""
        return self.restricts and self.rank_rule == "welore"

    @field_validator("targets")
    @classmethod
    def _is_a_pattern(cls, targets: str) -> str:
        try:
            re.compile(targets)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return targets

    @field_validator("scale")
    @classmethod
    def _power_of_two(cls, scale: float) -> float:
        if scale not in {2.0**s for s in range(-10, 11)}:
            raise ValueError("scale is a power of two from 2^-10 to 2^10")
        return scale

    @field_validator("kind", mode="before")
    @classmethod
    def _not_an_adapter(cls, kind: object) -> object:
        if kind == "lora":
            raise ValueError('LoRA layers are an adapter: set model.adapter = "lora"')
        if kind == "galore":
            raise ValueError(
                '"galore" takes its basis from an SVD, whose bits differ between machines: use '
                'selection = "voted" with kind = "coordinate", or "svd" inside of local steps'
            )
        return kind


class PrivacySection(Section):
    """Noise that bounds what the run shows of any one example; see `lorand.privacy`.

    `worker`: every worker adds it before anything leaves, so that nobody else has to be trusted.
    `central`: the coordinator, which everyone trusts, adds it once to the sum of all. `secure-sum`:
    each adds a share, so that `honest_min` shares are enough, and nobody sees more than the sum.
    The noise multiplier is no setting: it follows from target_epsilon, delta, sample_rate and the
    rounds of the run, `spare_rounds` included (those that are abandoned and show something too).

    With the estimator `diff2` (`privacy.diff2`, experimental) rounds release gradients at a restart
    alone, every `restart_every` rounds and with `restart_share` of the budget, and else what they
    changed by: by `slope_bound` at most where the coefficients moved by one.
    """

    mode: Literal["none", "worker", "central", "secure-sum"] = "none"
    mechanism: Literal["gaussian", "laplace"] = "gaussian"
    target_epsilon: Annotated[float, Field(gt=0, le=100)] = 8.0
    delta: Annotated[float, Field(ge=0, le=1e-3)] = 1e-5
    clip_bound: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    sample_rate: Annotated[float, Field(gt=0, le=1)] = 0.01
    spare_rounds: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    batch_cap: Annotated[int, Field(ge=0, le=65536)] = 0
    max_examples: Annotated[int, Field(ge=0, le=2**31)] = 0
    honest_min: Annotated[int, Field(ge=0, le=32)] = 0
    estimator: Literal["gradients", "diff2"] = "gradients"
    restart_every: Annotated[int, Field(ge=2, le=1_000_000)] = 50
    restart_share: Annotated[float, Field(gt=0, lt=1)] = 0.5
    slope_bound: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0

    @property
    def differences(self) -> bool:
        """Whether rounds between restarts release differences of gradients."""
        return self.estimator == "diff2"

    def restarts(self, committed: int) -> bool:
        """Return whether DIFF2 releases gradients in the round after so many commits."""
        return schedules.restarts(committed, self.restart_every)

    @property
    def noised(self) -> bool:
        """Whether what the run shows of an example is bounded by noise, whoever adds it."""
        return self.mode != "none"

    @property
    def summed(self) -> bool:
        """Whether noise is that of the sum of all participants, and only the sum is kept."""
        return self.mode in ("central", "secure-sum")
