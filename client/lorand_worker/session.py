"""A worker's session: join, catch up, measure, report, reconnect, until the run is finished."""

import secrets
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import grpc

from lorand import codec, ledger
from lorand.codec import Floats
from lorand.config import RunConfig
from lorand.errors import HandshakeError
from lorand.ledger import Position
from lorand.manifest import Identity
from lorand.privacy.primitives import IdentityKey
from lorand.privacy.secure_sum import SumMember
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_worker import feedback
from lorand_worker.bench import ModelBench
from lorand_worker.budget import Budget
from lorand_worker.feedback import Place
from lorand_worker.link import CALL_TIMEOUT_S, FEATURES, Link, Retry, Stream
from lorand_worker.participant import Bench, Participant, hello
from lorand_worker.stating import Statements
from lorand_worker.tasks import Score
from lorand_worker.traced import Figures, Watch, unwatched
from lorand_worker.witness import Witness

CHECK_EVERY: Final = 50
"""Commits after which the coordinator is asked for its signature of the history."""
LEAVING_S: Final = 3.0
"""How long a worker that was interrupted waits for its last statement to be taken."""


def nowhere(step: int, values: dict[str, float | None]) -> None:
    """Take figures that nobody asked for."""


class Reporter(Protocol):
    """What a session tells its owner."""

    def note(self, text: str) -> None:
        """Say a sentence."""

    def progress(self, committed: int, total: int, text: str) -> None:
        """Show how far the run is."""


@dataclass
class Session:
    """One worker in one run."""

    link: Link
    config: RunConfig
    identity: Identity
    bench: Bench
    name: str
    report: Reporter
    state: Path | None = None
    """Folder in which what must survive a restart is kept; None: nothing does."""
    budget: Budget | None = None
    """What a private run is charged to."""
    member: SumMember | None = None
    """This worker's part in the secure sums of a run that has them."""
    uniform: Callable[[int], Floats] = codec.system_uniform
    """Draws numbers for unbiased rounding; experiments inject a seeded one."""
    coordinator_key: bytes | None = None
    """The key that the ledger must be signed by; None: the first one seen."""
    figures: Figures = nowhere
    watch: Watch = unwatched
    key: IdentityKey | None = None
    """Signs what this worker contributed, where the coordinator takes statements."""

    def __post_init__(self) -> None:
        """Begin before entry 0, with a new session number."""
        self._session = secrets.randbits(63)
        start = ledger.origin(self.config, self.identity)
        place = None if self.state is None else Place(self.state, start.run_digest, self.name)
        known = self.coordinator_key
        self._witness = Witness(start.run_digest, place, known, self.report.note)
        self._stating: Statements | None = None
        if self.key is not None:
            self._stating = Statements(self.key, start.run_digest, place, self.report.note)
        memory = None
        if self.config.keeps_feedback and place is not None:
            size = self.config.directions.pool_size
            memory = feedback.FileMemory(size, place, self.report.note)
        self.participant = Participant(
            start, self.bench, self.uniform, memory, self.budget, self.member
        )

    def run(self) -> Participant:
        """Take part until the run is finished; return the participant at the end of the ledger.

        Raises HandshakeError when refused for good, ConnectionLost when the coordinator stays away.
        """
        try:
            while not self.participant.position.finished:
                self.link.persist(self._once, self._waiting)
        except KeyboardInterrupt:
            self._state_last(LEAVING_S)
            raise
        self.participant.settle()
        return self.participant

    def _waiting(self, why: str) -> None:
        self.report.note(f"waiting for the coordinator ({why})")

    def _once(self) -> None:
        """One connection: catch up by calls, then follow the stream until it ends."""
        if self._has_ledger():
            self._catch_up()
        self._check_history()
        self._hand_in_what_waits()
        self._show()
        if self.participant.position.finished and self.participant.worker is None:
            return
        # Who took part says Hello also at the end of the run: there histories are compared.
        stream = self.link.participate(self._hello())
        try:
            for message in stream:
                self._handle(stream, message)
                if self.participant.position.finished:
                    return
        finally:
            stream.close()
        raise Retry("the coordinator ended the stream")

    def _catch_up(self) -> None:
        """From a checkpoint where that is nearer, then entry by entry."""
        participant = self.participant
        later = self.link.from_checkpoint(participant.position)
        awaited = participant.awaited_from
        leaps = later is not participant.position
        if leaps and awaited is not None and awaited < later.next_sequence:
            participant.look_up(self.link.entries(awaited))
        stating = self._stating
        if leaps and stating is not None:
            if stating.awaited_from is not None:
                stating.look_up(self.link.entries(stating.awaited_from))
            stating.jump(later)
        participant.catch_up(later)
        for body in self.link.entries(participant.position.next_sequence):
            participant.on_entry(body)
            if stating is not None:
                stating.follow(body, participant.position)

    def _check_history(self) -> None:
        """Have the coordinator sign the history so far, as one that begins with what was seen."""
        position = self.participant.position
        self._witness.expect(position.next_sequence, signs=self.link.signs)
        if self.link.signs and position.next_sequence:
            answer = self.link.get_head(position.next_sequence, self._witness.known_size)
            self._witness.take(position.history, answer)

    def _has_ledger(self) -> bool:
        """Whether the run has begun: its identity may still wait for the first worker."""
        _, identity = self.link.get_run()
        return identity is not None

    def _hello(self) -> wire.Hello:
        message = hello(self.name, self.participant.position, self.identity)
        message.features.extend(FEATURES)
        message.session = self._session
        message.sum_key = b"" if self.member is None else self.member.announcement
        return message

    def _handle(self, stream: Stream, message: wire.ParticipateResponse) -> None:
        participant = self.participant
        match message.WhichOneof("message"):
            case "welcome":
                welcome = message.welcome
                participant.worker = welcome.worker
                stream.keep_alive(welcome.heartbeat_s, welcome.heartbeat_timeout_s)
                self.report.note(f"joined as worker {welcome.worker}")
            case "refusal":
                if message.refusal.retry:
                    raise Retry(message.refusal.reason)
                raise HandshakeError(f"the coordinator refused: {message.refusal.reason}")
            case "entry":
                entry = participant.on_entry(message.entry)
                if entry.HasField("abandon"):
                    reason = entry.abandon.reason
                    self.report.note(f"round {entry.round_index} was abandoned: {reason}")
                self._check_now_and_then(entry)
                self._state_now_and_then(message.entry, entry)
                self._show()
                if entry.HasField("commit"):
                    self._track()
            case "sum_keys":
                if self.member is not None:
                    self.member.agree(message.sum_keys.announcements)
            case "round_start":
                round_index = message.round_start.round_index
                if stream.is_over(round_index):
                    request = participant.sit_out(round_index, "it ended before this worker began")
                else:
                    with self.watch(round_index):
                        request = participant.on_round_start(message.round_start)
                if request.HasField("skip"):
                    skip = request.skip
                    self.report.note(f"sitting out round {skip.round_index}: {skip.reason}")
                elif self._stating is not None and participant.worker is not None:
                    contribution, position = request.contribution, participant.position
                    self._stating.sent(participant.worker, contribution, position)
                stream.send(request)
            case "rejection":
                participant.counts.rejected += 1
                rejection = message.rejection
                if self._stating is not None:
                    self._stating.rejected(rejection.round_index)
                self.report.note(
                    f"round {rejection.round_index} went on without this worker: {rejection.reason}"
                )

    def _check_now_and_then(self, entry: pb.Entry) -> None:
        if entry.HasField("commit") and self.participant.position.committed % CHECK_EVERY == 0:
            self._check_history()
        if entry.HasField("finish"):
            # The coordinator may go as soon as all have the last entry: nothing is lost by that.
            with suppress(grpc.RpcError):
                self._check_history()

    def _state_now_and_then(self, body: bytes, entry: pb.Entry) -> None:
        """State what was contributed, when it is this worker's turn and at the end."""
        if self._stating is None:
            return
        position, every = self.participant.position, self.config.service.statements_every
        self._stating.follow(body, position)
        if entry.HasField("finish"):
            self._state_last(CALL_TIMEOUT_S)
        elif entry.HasField("commit") and self.link.states:
            if self._stating.due(position.committed, every):
                self._stating.state()
            self._hand_in()

    def _state_last(self, limit_s: float) -> None:
        """State all there is. What cannot be handed in now is kept, for the same command again."""
        if self._stating is None or not self.link.states:
            return
        self._stating.state()
        try:
            self._hand_in(limit_s)
        except (grpc.RpcError, ValueError):  # the latter: gRPC's word for a closed channel
            self.report.note(
                "the coordinator did not take the last statement of this worker: the same command "
                "hands it in later"
            )
        if self.participant.position.finished:
            self._stating.end()

    def _hand_in_what_waits(self) -> None:
        """Hand in, after catching up, what was signed before or is due since."""
        if self.participant.position.finished:
            self._state_last(CALL_TIMEOUT_S)
        else:
            self._hand_in()

    def _hand_in(self, limit_s: float = CALL_TIMEOUT_S) -> None:
        """Have the coordinator keep what was signed."""
        while self._stating is not None and self.link.states and self._stating.next is not None:
            try:
                self.link.post_statement(self._stating.next, limit_s)
            except HandshakeError as error:
                self.report.note(f"a statement of this worker was refused: {error}")
            self._stating.posted()

    def _track(self) -> None:
        """Report a committed round as this worker sees it; its loss is of its own batch."""
        participant, traffic = self.participant, self.link.traffic
        values: dict[str, float | None] = {
            "local_loss": participant.last_loss,
            "contributions": participant.counts.committed,
            "skipped": participant.counts.skipped,
            "rejected": participant.counts.rejected,
            "bytes_sent": traffic.sent,
            "bytes_received": traffic.received,
        }
        self.figures(participant.position.committed, values)

    def _show(self) -> None:
        loss = self.participant.last_loss
        text = f"loss {loss:.4f}" if loss is not None else ""
        self.report.progress(self.participant.position.committed, self.config.run.rounds, text)


def evaluate(
    link: Link,
    config: RunConfig,
    identity: Identity,
    bench: ModelBench,
    *,
    name: str,
    every: int,
    follow: bool,
    report: Reporter,
    figures: Figures = nowhere,
) -> Score | None:
    """Follow the ledger and post accuracy every so many rounds, at the start and at the end.

    Without `follow` only the newest weights are measured, and nothing is posted. Returns the last
    score.
    """
    if not follow:
        newest = link.persist(lambda: link.catch_up(ledger.origin(config, identity)), report.note)
        bench.adopt(newest)
        return bench.score()
    position = ledger.origin(config, identity)
    done = link.persist(lambda: _already_posted(link, name), report.note)
    last: Score | None = None

    due = False

    def settle() -> None:
        """Measure and post what is due; repeated after a lost connection."""
        nonlocal due, last
        if due and position.committed not in done:
            bench.adopt(position)
            last = bench.score()
            _post(link, position, name, last)
            done.add(position.committed)
            text = f"accuracy {last.accuracy:.3f}, loss {last.loss:.4f}"
            report.progress(position.committed, config.run.rounds, text)
            figures(position.committed, {"accuracy": last.accuracy, "loss": last.loss})
        due = False

    def go_on() -> None:
        nonlocal due, position
        settle()
        for body in link.entries(position.next_sequence, follow=True):
            position = ledger.apply(position, body)
            kind = ledger.parse(body).WhichOneof("kind")
            due = kind in ("start", "finish")
            due = due or (kind == "commit" and position.committed % every == 0)
            settle()
            if position.finished:
                return

    while not position.finished or due:
        link.persist(go_on, report.note)
    return last


def _already_posted(link: Link, name: str) -> set[int]:
    """Rounds that this evaluator posted before it was restarted."""
    evaluations = (ledger.parse(body).evaluation for body in link.entries(0))
    return {e.committed for e in evaluations if e.evaluator == name}


def _post(link: Link, position: Position, name: str, score: Score) -> None:
    evaluation = pb.Evaluation(
        sequence=position.next_sequence - 1,
        committed=position.committed,
        evaluator=name,
        accuracy=score.accuracy,
        loss=score.loss,
        examples=score.examples,
    )
    link.post_evaluation(evaluation, position.run_digest)


def fetch_run(link: Link, on_wait: Callable[[str], None]) -> tuple[RunConfig, Identity | None]:
    """Return the run of a coordinator, waiting for it to come up."""
    return link.persist(link.get_run, on_wait)
