"""The card of a model that a run made: what it learned from, what that took and what it showed."""

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from lorand import codec, ledger
from lorand.adapter import Adapter
from lorand.config import RunConfig
from lorand.errors import ConfigError, ModelError
from lorand.privacy import accountant, plan
from lorand.v1 import ledger_pb2 as pb

_HUB_NAME: Final = re.compile(r"^[\w.-]+(/[\w.-]+)?$")


@dataclass
class Facts:
    """What a ledger tells beside its last position, and what its owner may add.

    `data` says how much and what was learned from, which no ledger holds; `epsilon` is what the
    accountant finds was spent of a private run's budget, None where nobody calculated it.
    """

    data: str = ""
    epsilon: float | None = None
    workers: set[int] = field(default_factory=set)
    rounds: int = 0
    abandoned: int = 0
    contributions: int = 0
    bytes_up: int = 0
    bytes_down: int = 0
    evaluation: pb.Evaluation | None = None

    def reading(self, bodies: Iterable[bytes]) -> Iterator[bytes]:
        """Yield a ledger's entries as they are, noting what they tell from the first one on."""
        self.workers = set()
        self.rounds = self.abandoned = self.contributions = self.bytes_up = self.bytes_down = 0
        config: RunConfig | None = None
        for body in bodies:
            entry = ledger.parse(body)
            config = config or ledger.origin_of(body).config
            self._note(config, entry)
            yield body

    def _note(self, config: RunConfig, entry: pb.Entry) -> None:
        if entry.HasField("commit"):
            commit = entry.commit
            count = commit.directions or config.num_directions
            self.rounds += 1
            self.workers |= set(commit.workers)
            self.contributions += len(commit.workers)
            self.bytes_up += len(commit.workers) * _bytes_up(config, count)
            self.bytes_down += len(commit.codes)
        self.abandoned += entry.HasField("abandon")
        if entry.HasField("evaluation"):
            self.evaluation = entry.evaluation

    def account(self, config: RunConfig) -> None:
        """Have the accountant say what all rounds so far spent, where the run is private.

        Of DIFF2, whose rounds are of two kinds, and without dp-accounting the target is all there
        is to say.
        """
        if not config.privacy.noised or config.privacy.differences:
            return
        try:
            made = min(self.rounds + self.abandoned, config.releases)
            release = plan.planned(config)
            self.epsilon = accountant.epsilon(release, made, config.privacy.delta)
        except ConfigError:
            return


def _bytes_up(config: RunConfig, count: int) -> int:
    """Bytes of codes in a contribution; numbers for sums have eight each."""
    return 8 * count if config.privacy.summed else codec.num_bytes(config.codec.up, count)


def write(adapter: Adapter, facts: Facts, folder: Path, *, merged: bool) -> None:
    """Write README.md into a folder that is there. Raises ModelError."""
    try:
        (folder / "README.md").write_text(text(adapter, facts, merged=merged), encoding="utf-8")
    except OSError as error:
        raise ModelError(f"cannot write the card of the model to {folder}: {error}") from error


def text(adapter: Adapter, facts: Facts, *, merged: bool) -> str:
    """Return README.md of a merged model, or of an adapter."""
    config = adapter.config
    head = ["---", f"library_name: {'transformers' if merged else 'lorand'}"]
    if _HUB_NAME.match(config.model.name):
        head += [f"base_model: {json.dumps(config.model.name)}"]
    head += ["tags:", "- lorand", "- federated-learning", "---", ""]
    title = f"# {config.run.name}"
    what = "The whole fine-tuned model" if merged else "A LoRand adapter: K integers"
    base = f"`{config.model.name}` at revision `{config.model.revision}`"
    lines = [
        *head,
        title,
        "",
        f"{what}, trained by a federation in which only seeds and small integers crossed the "
        f"network, on {base} (digest `{adapter.identity.base_digest.hex()[:16]}`).",
        "",
        "| | |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in _rows(adapter, facts)),
        "",
        *_usage(adapter, merged=merged),
    ]
    return "\n".join(lines)


def _rows(adapter: Adapter, facts: Facts) -> Iterator[tuple[str, str]]:
    config = adapter.config
    yield "task", f"{config.task.kind}{': ' * bool(config.task.labels)}" + _listed(config)
    yield "rounds", f"{adapter.committed:,} of {config.run.rounds:,}"
    if facts.contributions:
        yield "workers", f"{len(facts.workers):,}, with {facts.contributions:,} contributions"
    yield "data", facts.data or "not told: it stayed with the workers"
    if facts.contributions:
        yield "codes of all workers, up", f"{facts.bytes_up:,} bytes"
        yield "codes of all rounds, down to each", f"{facts.bytes_down:,} bytes"
    if facts.evaluation is not None:
        found = facts.evaluation
        yield (
            "evaluation",
            f"accuracy {found.accuracy:.4f}, loss {found.loss:.4f} on {found.examples:,} examples "
            f"after {found.committed:,} rounds, posted by `{found.evaluator}`",
        )
    yield "privacy", _privacy(config, facts)
    yield "ledger head", f"`{adapter.head.hex()}`"


def _listed(config: RunConfig) -> str:
    labels = config.task.labels
    return ", ".join(labels[:12]) + (f" and {len(labels) - 12} more" if len(labels) > 12 else "")


def _privacy(config: RunConfig, facts: Facts) -> str:
    section = config.privacy
    if not section.noised:
        return "none: no noise was added"
    target = f"epsilon {section.target_epsilon:g} at delta {section.delta:g} for the whole run"
    if facts.epsilon is None:
        return f"{section.mode}: at most {target}, of any one example"
    return (
        f"{section.mode}: epsilon {facts.epsilon:.4g} spent at delta {section.delta:g}, of any one "
        f"example; at most {target}"
    )


def _usage(adapter: Adapter, *, merged: bool) -> list[str]:
    trained = adapter.identity.manifest.tensors
    if merged and any(spec.name.startswith(("encoder.", "head.")) for spec in trained):
        beside = "The head that the run put on it is beside it, as `head.json` says."
        return [f"The encoder opens in `transformers` like any other model. {beside}", ""]
    if merged:
        return ["It opens in `transformers` like any other model.", ""]
    name = adapter.config.model.name
    return [
        "```python",
        "import lorand",
        f"model = ...  # {name}, as transformers loads it",
        'model = lorand.load_adapter(model, "this folder or repository")',
        "```",
        "",
    ]
