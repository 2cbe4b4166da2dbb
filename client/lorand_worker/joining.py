"""The `join` command: from what a worker's owner asks for to the end of the run, step by step."""

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from lorand import adapter, otel
from lorand.config import EstimatorKind, RunConfig
from lorand.durable import state_folder
from lorand.manifest import Identity
from lorand.privacy.secure_sum import IdentityKey, SumMember
from lorand_worker import connecting, guard, own_estimator
from lorand_worker import data as data_files
from lorand_worker.bench import Base, ModelBench, load_base
from lorand_worker.budget import Budget
from lorand_worker.cache import Limits
from lorand_worker.chance import Chance
from lorand_worker.data import Data
from lorand_worker.guard import Policy
from lorand_worker.link import Link
from lorand_worker.membership import Pinned, member_of, read_key
from lorand_worker.memory import Weights
from lorand_worker.own_estimator import OwnEstimator
from lorand_worker.precision import Precision, choose
from lorand_worker.resolution import check_perturbation
from lorand_worker.session import Reporter, Session, fetch_run, nowhere
from lorand_worker.sources import Source
from lorand_worker.spending import open_budget
from lorand_worker.tasks import Forward, Score
from lorand_worker.traced import Figures, watched


@dataclass(frozen=True)
class Joining:
    """What a worker's owner asks for; each field is explained at its flag of `lr-worker join`."""

    address: str
    data: Source
    columns: str = ""
    validation: float = 0.0
    name: str = ""
    policy: Policy = field(default_factory=Policy)
    model: Path | None = None
    device: str = "auto"
    weights: Weights = Weights.AUTO
    checkpointing: bool = False
    precision: Precision = Precision.AUTO
    estimator: OwnEstimator = OwnEstimator.RUN
    limits: Limits = field(default_factory=Limits)
    give_up_s: float = 600.0
    credentials: Path | None = None
    insecure: bool = False
    pinned: Pinned = field(default_factory=Pinned)
    state: Path | None = None
    coordinator_key: bytes | None = None
    output: Path | None = None
    otel: str = ""
    seed: int | None = None
    """Fixes batches and rounding, for experiments; the command has none (`chance`)."""


@dataclass(frozen=True)
class Joined:
    """What a worker did in a run that is finished."""

    worker: int | None
    name: str
    rounds: int
    contributions: int
    skipped: int
    rejected: int
    seconds: float
    message_bytes_sent: int
    message_bytes_received: int
    weights_digest: str
    head: str
    validation: Score | None
    """On the examples that were held out."""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return asdict(self)

    def text(self) -> str:
        """Return it for people."""
        held = self.validation
        return (
            f"finished after {self.rounds} rounds: {self.contributions} contributions of this "
            f"worker, {self.message_bytes_sent:,} bytes of messages sent, "
            f"{self.message_bytes_received:,} received\n"
            + ("" if held is None else f"on examples held out here: {held.text()}\n")
            + f"weights {self.weights_digest}"
        )


Tracked = Callable[[RunConfig, str], Figures]
"""From a run and this worker's name there to what takes its figures."""


def join(
    asked: Joining,
    report: Reporter,
    *,
    opened: Callable[[Link], None] = lambda link: None,
    tracked: Tracked = lambda config, who: nowhere,
) -> Joined:
    """Take part in a run until it is finished; `opened` is given the link. Raises LorandError."""
    began = time.monotonic()
    otel.check(asked.otel)
    with ExitStack() as stack:
        link = connecting.connect(
            asked.address, asked.give_up_s, asked.credentials, asked.insecure, asked.state
        )
        stack.callback(link.close)
        opened(link)
        who = connecting.name_of(link.shown, asked.name, asked.data)
        config, theirs = fetch_run(link, report.note)
        figures = tracked(config, who)
        guard.check(config, asked.policy)
        kind = own_estimator.choose(asked.estimator, config)
        examples, held = _examples(asked, config, report)
        base = _base(asked, config, theirs, report)
        folder = asked.state or state_folder()
        budget = open_budget(config, base.identity, who, folder, asked.data, asked.policy, report)
        if budget is not None:
            stack.callback(budget.close)
        chance = Chance.of(asked.seed, who)
        bench = _bench(asked, config, base, examples, held, chance, budget, kind, report)
        member = _member(asked, config, base, who, budget)
        seen = stack.enter_context(watched(asked.otel, config, base.identity, who, bench, figures))
        session = Session(
            *(link, config, base.identity, seen.bench, who, report, folder, budget, member),
            uniform=chance.uniform,
            coordinator_key=asked.coordinator_key,
            key=_signing_key(asked, config, report),
            figures=seen.figures,
            watch=seen.round,
        )
        participant = session.run()
        position, counts = participant.position, participant.counts
        if asked.output is not None:
            adapter.save(adapter.of(position), asked.output)
    return Joined(
        worker=participant.worker,
        name=who,
        rounds=position.committed,
        contributions=counts.committed,
        skipped=counts.skipped,
        rejected=counts.rejected,
        seconds=round(time.monotonic() - began, 1),
        message_bytes_sent=link.traffic.sent,
        message_bytes_received=link.traffic.received,
        weights_digest=bench.replica.digest().hex(),
        head=position.head.hex(),
        validation=bench.validate(),
    )


def _signing_key(asked: Joining, config: RunConfig, report: Reporter) -> IdentityKey | None:
    """What this worker signs its contributions with, where the run takes statements."""
    if config.service.statements_every == 0:
        return None
    if asked.pinned.key is None:
        report.note(
            "this run's workers sign what they contributed, and this one has no key: make one "
            "with `lr-worker sum key`, and join with --identity"
        )
        return None
    return read_key(asked.pinned.key)


def _examples(asked: Joining, config: RunConfig, report: Reporter) -> tuple[Data, Data | None]:
    """The examples to train on, and those that are held out."""
    examples = data_files.load(asked.data, data_files.mapped(config.task, asked.columns))
    held = None
    if asked.validation:
        examples, held = data_files.hold_out(examples, asked.validation, str(asked.data))
        report.note(f"{len(held)} examples are held out, {len(examples)} are trained on")
    guard.check_examples(config, len(examples), str(asked.data))
    for label in data_files.missing_labels(examples, config.task):
        report.note(f"no example here is labelled {label!r}; other workers may have some")
    return examples, held


def _base(asked: Joining, config: RunConfig, theirs: Identity | None, report: Reporter) -> Base:
    """The run's model, and what of it the owner should know."""
    base = load_base(
        *(config, asked.model, asked.device, asked.weights),
        checkpointing=asked.checkpointing,
        theirs=theirs,
    )
    if theirs is not None:
        guard.check_identity(base.identity, theirs)
    for line in guard.disclosure(config, base.identity.manifest):
        report.note(line)
    check_perturbation(config, base.replica)
    report.note(base.weights)
    return base


def _bench(
    asked: Joining,
    config: RunConfig,
    base: Base,
    examples: Data,
    held: Data | None,
    chance: Chance,
    budget: Budget | None,
    kind: EstimatorKind,
    report: Reporter,
) -> ModelBench:
    chosen, why = choose(asked.precision, config, base.device)
    report.note(why)
    if kind != config.estimator.kind:
        report.note(f"scalars are measured with {kind} here, which the run leaves to its workers")
    mechanism = budget.mechanism(config) if budget is not None else None
    forward = Forward(chosen, asked.limits)
    bench = ModelBench(
        *(base, config, examples, chance.batches, forward, mechanism, held), estimator=kind
    )
    if bench.cut:
        report.note(
            f"{bench.cut} of {len(examples)} examples are longer than model.max_length = "
            f"{config.model.max_length} tokens: the ends of their prompts are left out"
        )
    return bench


def _member(
    asked: Joining, config: RunConfig, base: Base, name: str, budget: Budget | None
) -> SumMember | None:
    """This worker's part in secure sums, where the run has them."""
    if config.privacy.mode != "secure-sum" or budget is None:
        return None
    multiplier = budget.account.release.multiplier
    return member_of(asked.pinned, config, base.identity, name, multiplier)
