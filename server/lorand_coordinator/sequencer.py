"""The sequencer: carries out the round engine's effects on the store, and says what to send.

No network and no clock: the gRPC service and the simulator drive the same object. Single-threaded;
every call returns the messages to deliver, in order. An entry is appended (durable) before it is
in a returned message.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from lorand import heads, ledger
from lorand.codec import SCALE_EXPONENTS
from lorand.config import RunConfig
from lorand.errors import ContributionError, HandshakeError, LedgerError
from lorand.ledger import Position
from lorand.manifest import Identity, Manifest
from lorand.privacy.primitives import IdentityKey
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import (
    aggregation,
    diagnostics,
    folding,
    handshake,
    optimizer,
    payoff,
    rounds,
    subspace,
    summing,
)
from lorand_coordinator.aggregation import Report, UnsoundRound
from lorand_coordinator.conduct import Watch
from lorand_coordinator.folding import Carried
from lorand_coordinator.snapshot import pack_state, resumed
from lorand_coordinator.store import Checkpoint, Store, StoreUnavailable
from lorand_coordinator.summing import Summing
from lorand_coordinator.tally import Observer, Outcome, Tally, mean_loss

MAX_REASON: Final = 300

Message = wire.ParticipateResponse


@dataclass(frozen=True)
class Outgoing:
    """A message for one worker."""

    worker: int
    message: Message
    can_wait: bool = False
    """Whether nothing is lost when it comes with the next message that cannot wait."""


class Sequencer:
    """One run: engine, optimizer state, ledger and who is connected."""

    def __init__(
        self,
        config: RunConfig,
        store: Store,
        identity: Identity | None,
        summing: Summing | None = None,
        key: IdentityKey | None = None,
    ) -> None:
        """Open the run in the store, or begin it there when the identity is known.

        `summing` is what makes the noisy sums of a run that keeps nothing else; `key` signs what is
        written. Raises LedgerError when the store holds another run.
        """
        assert config.privacy.summed == (summing is not None)
        self.config = config
        self.store = store
        self.key = key
        self.tally = Tally(config)
        self.observers: list[Observer] = []
        self.on_abandon: list[Callable[[str], None]] = []
        self.recent = diagnostics.Recent(config)
        self.reason = ""
        self._carried = folding.start(config)
        self._summing = summing
        self._sum: tuple[int, pb.StoredContribution] | None = None
        self._waiting_identity = identity
        whole = summing is not None and summing.all_or_nothing
        self._settings = rounds.Settings.of(config, all_or_nothing=whole)
        self._watch = Watch(config)
        self.engine = rounds.State()
        self._position: Position | None = None
        if len(store):
            self._reopen(identity)
            self._give_up_what_is_lost()
        elif identity is not None:
            self._begin(identity)

    # -- opening ---------------------------------------------------------------------------------

    def _begin(self, identity: Identity) -> None:
        """Write entry 0."""
        origin = ledger.origin(self.config, identity)
        self.store.signer = heads.signer(self.key, origin.run_digest)
        body, _ = self.store.append(ledger.start_entry(self.config, identity))
        self._position = ledger.apply(origin, body)

    def _reopen(self, identity: Identity | None) -> None:
        """Rebuild everything from the ledger: newest checkpoint, then the tail."""
        first = next(iter(self.store.entries(0, 1)))
        start = ledger.origin_of(first)
        if start.config.digest() != self.config.digest():
            raise LedgerError(
                f"the ledger is of run {start.config.run.name!r} with another config than "
                f"{self.config.run.name!r}: use its run file, or another ledger file for a new run"
            )
        if identity is not None and identity != start.identity:
            raise LedgerError(
                "run.lock names another base model, tokenizer or trainable set than the ledger; "
                "restore the run.lock of this run, or use another ledger file for a new run"
            )
        self.store.signer = heads.signer(self.key, start.run_digest)
        position = start
        checkpoint = self.store.newest_checkpoint()
        if checkpoint is not None:
            position, state = resumed(start, checkpoint, self.store)
            self._carried = Carried(state, self.comparison)
        committed_before = position.next_sequence
        last: deque[pb.Entry] = deque(maxlen=self.recent.window)
        for body in self.store.entries():
            entry = ledger.parse(body)
            self._count(entry)
            if entry.HasField("commit"):
                last.append(entry)
                if self._watch.on:
                    self._watch.take(entry.commit, self._stored(entry), self.tally.numbers)
            if entry.sequence < committed_before:
                continue
            if entry.HasField("commit"):
                self._repeat(position, entry)
            position = ledger.apply(position, body)
        if not np.array_equal(position.coefficients, self._optimizer.coefficients):
            raise LedgerError("the optimizer's coefficients are not those of the ledger")
        for entry in last:
            counted = folding.counted(self._stored(entry), entry.commit.uncounted)
            self._note_scalars(
                entry.commit.scale_exponent,
                folding.reports(self.config, counted, entry.commit.directions),
            )
        self.engine = replace(self.engine, quarantined=self._watch.apart)
        self._position = position

    def _stored(self, entry: pb.Entry) -> list[pb.StoredContribution]:
        """Return the stored contributions of a commit."""
        return list(map(pb.StoredContribution.FromString, self.store.contributions(entry.sequence)))

    def _repeat(self, position: Position, entry: pb.Entry) -> None:
        """Fold a stored round into what is carried on; ΔA and the rest must come out as written."""
        bodies = self.store.contributions(entry.sequence)
        ledger.check_contributions(entry, bodies)
        commit = entry.commit
        counted = folding.counted(map(pb.StoredContribution.FromString, bodies), commit.uncounted)
        folded = folding.fold(
            self.config, position, self._carried, entry.round_index, counted, commit.directions
        )
        if folded.written != (commit.scale, commit.codes, commit.gives_up_subspace):
            raise LedgerError(
                f"round {entry.round_index} does not repeat to what the ledger holds; continue this"
                " run with the LoRand and numpy versions that wrote it"
            )
        self._carried = folded.after

    def _give_up_what_is_lost(self) -> None:
        """Abandon the round that a secure sum was in: its masked vectors are gone with a process.

        Workers who answered would repeat their answers to what is no longer asked.
        """
        lost = self._settings.all_or_nothing and self.tally.accounts
        if lost and self.engine.phase != "finished":
            abandon = pb.Abandon(reason="the coordinator was started again")
            entry = pb.Entry(round_index=self.engine.round_index, abandon=abandon)
            self._append(entry)
            self._count(entry)

    def _count(self, entry: pb.Entry) -> None:
        """Keep the figures and the engine's counters in step with an entry."""
        kind = entry.WhichOneof("kind")
        engine = self.engine
        if kind == "commit":
            for worker in entry.commit.workers:
                self.tally.accounts[worker].contributions += 1
            self.engine = replace(
                engine, round_index=entry.round_index + 1, committed=engine.committed + 1
            )
        elif kind == "abandon":
            self.engine = replace(
                engine, round_index=entry.round_index + 1, abandoned=engine.abandoned + 1
            )
        elif kind == "finish":
            self.engine = replace(engine, phase="finished")
        self.tally.note(entry)

    # -- what others ask -------------------------------------------------------------------------

    @property
    def comparison(self) -> payoff.Comparison:
        """What the rounds so far tell of the subspace against full space."""
        return self._carried.comparison

    @property
    def _optimizer(self) -> optimizer.State:
        return self._carried.optimizer

    @property
    def position(self) -> Position | None:
        """Where the ledger ends; None until an identity is adopted."""
        return self._position

    @property
    def identity(self) -> Identity | None:
        """What every replica must share; None until an identity is adopted."""
        return self._position.identity if self._position else self._waiting_identity

    def findings(self) -> list[diagnostics.Finding]:
        """Return what the run's scalars tell, warnings first."""
        return self._watch.findings(self.tally.accounts) + payoff.told(self.recent, self.comparison)

    def tail(self, start: int) -> Iterator[bytes]:
        """Yield the entries from a sequence on."""
        return self.store.entries(start)

    # -- joining ---------------------------------------------------------------------------------

    def admit(self, hello: wire.Hello) -> tuple[int, list[Outgoing]]:
        """Check a worker's handshake; return its number, durable by then, and what others hear.

        Raises HandshakeError with a sentence that names both sides, StoreUnavailable when a new
        member cannot be written.
        """
        handshake.check_greeting(hello)
        if self._position is None:
            self._adopt(hello)
        assert self._position is not None
        handshake.check_identity(hello, self._position)
        handshake.check_history(hello, self.store)
        known = self.tally.numbers.get(hello.name)
        if known is not None:
            self._greet(known, hello)
            return known, []
        if len(self.tally.accounts) >= self.config.service.max_workers:
            raise HandshakeError(
                f"the run has its {self.config.service.max_workers} workers already "
                "(service.max_workers)"
            )
        number = len(self.tally.accounts) + 1
        self._greet(number, hello)
        return number, self._append(pb.Entry(member=pb.Member(worker=number, name=hello.name)))

    def _greet(self, number: int, hello: wire.Hello) -> None:
        if self._summing is not None:
            self._summing.greet(number, hello)

    def _adopt(self, hello: wire.Hello) -> None:
        """Take the first worker's identity, where the run allows it."""
        if not self.config.run.adopt_first_worker:
            raise HandshakeError(
                "the coordinator has no run.lock yet; run `lr-worker prepare run.toml` and put "
                "run.lock beside it, or set run.adopt_first_worker = true"
            )
        if (len(hello.base_digest), len(hello.tokenizer_digest)) != (32, 32):
            raise HandshakeError("the worker's digests are not of 32 bytes; install this release")
        manifest = Manifest.from_json(hello.manifest)
        identity = Identity(hello.base_digest, hello.tokenizer_digest, manifest)
        handshake.check_identity(
            hello, ledger.origin(self.config, identity)
        )  # before it is written
        self._begin(identity)

    def connect(self, worker: int, now: float) -> list[Outgoing]:
        """Count a worker that has every entry as connected."""
        return self._step(rounds.Joined(worker), now) + self._sent_away(worker)

    def disconnect(self, worker: int, now: float) -> list[Outgoing]:
        """Count a worker as gone."""
        return self._step(rounds.Left(worker), now)

    # -- rounds ----------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Outgoing]:
        """Let time pass."""
        return self._step(rounds.Tick(), now)

    def receive(self, worker: int, message: wire.ParticipateRequest, now: float) -> list[Outgoing]:
        """Take a contribution or a skip from a connected worker."""
        kind = message.WhichOneof("message")
        if kind == "skip":
            why = message.skip.reason[:MAX_REASON]
            return self._step(rounds.Skipped(worker, message.skip.round_index, why), now)
        if kind != "contribution":
            why = f"a worker does not send {kind or 'nothing'} here"
            return [self._reject(worker, 0, why, "unexpected")]
        contribution = message.contribution
        try:
            payload = self._checked(worker, contribution).SerializeToString(deterministic=True)
        except ContributionError as error:
            return [self._reject(worker, contribution.round_index, str(error), "malformed")]
        return self._step(rounds.Reported(worker, contribution.round_index, payload), now)

    def _checked(self, worker: int, contribution: pb.Contribution) -> pb.Contribution:
        """Return what a round takes of a contribution. Raises ContributionError."""
        if self._summing is not None:
            # One to a round that is over is the engine's to refuse.
            if contribution.round_index == self.engine.round_index:
                self._summing.check(self.tally.accounts[worker].name, contribution)
            return pb.Contribution(round_index=contribution.round_index, sum=contribution.sum)
        aggregation.report(self.config, contribution, self._optimizer.pace.directions)
        subspace.check_votes(self._position, contribution)
        contribution.DiscardUnknownFields()
        contribution.ClearField("sum")
        probing = self._position is not None and self._position.elections.probing(self.config)
        payoff.drop_unasked(contribution, probing=probing)
        if self.config.rounds.telemetry == "none" or not np.isfinite(contribution.loss):
            contribution.ClearField("loss")
        return contribution

    def post_evaluation(self, evaluation: pb.Evaluation, run_digest: bytes) -> list[Outgoing]:
        """Append an evaluator's result. Raises HandshakeError or StoreUnavailable."""
        if self._position is None or run_digest != self._position.run_digest:
            raise HandshakeError("the evaluation is of another run than the coordinator's")
        if len(evaluation.evaluator) > handshake.MAX_NAME:
            raise HandshakeError(f"an evaluator's name has at most {handshake.MAX_NAME} characters")
        if not (0 <= evaluation.accuracy <= 1 and np.isfinite(evaluation.loss)):
            raise HandshakeError("an evaluation needs an accuracy in 0 … 1 and a finite loss")
        return self._append(pb.Entry(round_index=self.engine.round_index, evaluation=evaluation))

    def _step(self, event: rounds.Event, now: float) -> list[Outgoing]:
        """Run the engine until it asks for nothing more."""
        outgoing: list[Outgoing] = []
        events: list[rounds.Event] = [event]
        while events:
            self.engine, effects, self.reason = rounds.step(
                self._settings, self.engine, events.pop(0), now
            )
            for effect in effects:
                more, answer = self._carry_out(effect)
                outgoing += more
                events += answer
        return outgoing

    def _carry_out(self, effect: rounds.Effect) -> tuple[list[Outgoing], list[rounds.Event]]:
        match effect:
            case rounds.StartRound(round_index, workers):
                return self._start_round(round_index, workers), []
            case rounds.Reject(worker, round_index, why):
                return [self._reject(worker, round_index, why, "untimely")], []
        try:
            outgoing = self._append_outcome(effect)
            apart = self._watch.apart - self.engine.quarantined
            outgoing += [told for worker in sorted(apart) for told in self._sent_away(worker)]
            return outgoing, [rounds.Quarantined(apart), rounds.Appended()]
        except UnsoundRound as error:
            return [], [rounds.Unsound(str(error))]
        except (LedgerError, ContributionError) as error:  # the latter: an update too large
            return [], [rounds.AppendFailed(str(error))]

    def _start_round(self, round_index: int, workers: tuple[int, ...]) -> list[Outgoing]:
        start = wire.RoundStart(
            round_index=round_index,
            scale_exponent=self._optimizer.scale_exponent,
            batch_size=self._optimizer.pace.batch_size,
            directions=self._optimizer.pace.directions,
        )
        outgoing = []
        if self._summing is not None:
            assert self._position is not None
            names = [self.tally.accounts[worker].name for worker in workers]
            start.sum_attempt = self._summing.begin(round_index, names, self._position)
            heard = [(worker, self._summing.keys_for(worker)) for worker in workers]
            outgoing = [Outgoing(w, Message(sum_keys=keys)) for w, keys in heard if keys]
        return outgoing + [Outgoing(worker, Message(round_start=start)) for worker in workers]

    def _append_outcome(self, effect: rounds.Append) -> list[Outgoing]:
        match effect:
            case rounds.Commit(round_index, contributions):
                return self._commit(round_index, dict(contributions))
            case rounds.Abandon(round_index, why):
                abandon = pb.Abandon(reason=why[:MAX_REASON])
                outgoing = self._append(pb.Entry(round_index=round_index, abandon=abandon))
                for observe in self.on_abandon:
                    observe(why)
                return outgoing
            case rounds.Finish(committed):
                return self._append(pb.Entry(finish=pb.Finish(committed=committed)))

    def _commit(self, round_index: int, contributions: dict[int, bytes]) -> list[Outgoing]:
        assert self._position is not None
        stored = self._to_store(round_index, contributions)
        bodies = [part.SerializeToString(deterministic=True) for part in stored]
        count = self._optimizer.pace.directions
        uncounted = sorted(self._watch.doubted & contributions.keys())
        counted = folding.counted(stored, uncounted)
        folded = folding.fold(
            self.config, self._position, self._carried, round_index, counted, count
        )
        commit = pb.Commit(
            scale=folded.scale,
            codes=folded.codes,
            workers=sorted(contributions),
            scale_exponent=self._optimizer.scale_exponent,
            contributions_digest=ledger.contributions_digest(bodies),
            directions=count,
            basis=subspace.elected(self._position, counted),
            gives_up_subspace=folded.gives_up_subspace,
            uncounted=uncounted,
        )
        assert commit.scale_exponent in SCALE_EXPONENTS
        outgoing = self._append(pb.Entry(round_index=round_index, commit=commit), bodies)
        self._carried = folded.after
        self._note_scalars(commit.scale_exponent, folded.reports)
        self._watch.take(commit, stored, self.tally.numbers)
        for worker in commit.workers:
            self.tally.accounts[worker].contributions += 1
        self.tally.loss = mean_loss(counted)
        self._maybe_checkpoint()
        self._tell(round_index, len(commit.workers))
        return outgoing

    def _tell(self, round_index: int, workers: int) -> None:
        assert self._position is not None
        ratio = self.recent.rounds[-1].signal_to_noise
        outcome = Outcome(
            round_index,
            self._position.committed,
            self.tally.code_bytes,
            workers,
            self.tally.loss,
            ratio[0] if ratio else None,
        )
        for observe in self.observers:
            observe(outcome)

    def _to_store(
        self, round_index: int, contributions: dict[int, bytes]
    ) -> list[pb.StoredContribution]:
        """Return what the ledger keeps of a round: its contributions, or their noisy mean."""
        parts = {w: pb.Contribution.FromString(contributions[w]) for w in sorted(contributions)}
        if self._summing is None:
            return [pb.StoredContribution(worker=w, contribution=c) for w, c in parts.items()]
        if self._sum is None or self._sum[0] != round_index:
            # Once a round: what is tried to be written again must be the same bytes, and the same
            # sum with other noise would be another release.
            named = {self.tally.accounts[worker].name: part for worker, part in parts.items()}
            scale = self._optimizer.scale_exponent
            kept = summing.stored(self.config, self._summing, named, round_index, scale)
            self._sum = round_index, kept
        return [self._sum[1]]

    def _note_scalars(self, scale_exponent: int, reports: Mapping[int, Report]) -> None:
        self.recent.add(scale_exponent, [reports[worker] for worker in sorted(reports)])

    def _sent_away(self, worker: int) -> list[Outgoing]:
        """Tell a worker that is in quarantine why the run goes on without it."""
        why = self._watch.why(worker)
        rejection = wire.Rejection(round_index=self.engine.round_index, reason=why)
        return [Outgoing(worker, Message(rejection=rejection))] if why else []

    def _append(self, entry: pb.Entry, contributions: list[bytes] | None = None) -> list[Outgoing]:
        """Make an entry durable, follow it, and send it to everyone connected."""
        assert self._position is not None
        body, _ = self.store.append(entry, contributions or ())
        self._position = ledger.apply(self._position, body)
        self.tally.note(entry)
        can_wait = entry.HasField("member") or entry.HasField("evaluation")
        message = Message(entry=body)
        return [Outgoing(worker, message, can_wait) for worker in sorted(self.engine.members)]

    def _reject(self, worker: int, round_index: int, why: str, kind: str) -> Outgoing:
        self.tally.accounts[worker].rejected += 1
        self.tally.rejected[kind] += 1
        rejection = wire.Rejection(round_index=round_index, reason=why[:MAX_REASON])
        return Outgoing(worker, Message(rejection=rejection))

    def _maybe_checkpoint(self) -> None:
        """Keep a checkpoint every so many commits. Failing to is not failing the round."""
        assert self._position is not None
        due = self._position.committed % self.config.service.checkpoint_every == 0
        if not due or self.config.needs_history:
            return
        checkpoint = Checkpoint(
            sequence=self._position.next_sequence - 1,
            head=self._position.head,
            committed=self._position.committed,
            coefficients=ledger.pack_coefficients(self._position.coefficients),
            state=pack_state(self._optimizer),
        )
        try:
            self.store.save_checkpoint(checkpoint)
        except StoreUnavailable as error:
            self.reason = f"no checkpoint could be kept: {error}"
