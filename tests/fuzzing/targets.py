"""Everything that reads what others wrote, each with valid inputs: messages, files, texts.

A target takes bytes; `text` targets the bytes that are UTF-8. What protobuf or UTF-8 refuses never
gets to us: gRPC and file reading answer for it, so a target turns it away as they do.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError, Message
from tests import tiny
from tests.end_to_end.test_bytes import Stand
from tests.runs import IDENTITY, config_of, contribution, hello
from tests.unit.secure_sum.cohort import RUN, STATE, Cohort
from tests.unit.signed_histories import (
    BODIES,
    CONFIG,
    KEY,
    OTHER_KEY,
    answer,
    position_of,
    store_of,
)
from tests.unit.signed_histories import RUN as SIGNED_RUN

from lorand import adapter, codec, heads, ledger, statements
from lorand.config import RunConfig, TaskSection
from lorand.errors import ContributionError
from lorand.heads import KeptHead
from lorand.ledger import Position
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand.merkle import Frontier
from lorand.privacy.accountant import Release
from lorand.privacy.attempts import Attempt, Keys
from lorand.privacy.roster import Members, Roster
from lorand.privacy.vectors import MaskedSum
from lorand.subspaces import elections
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import optimizer, snapshot, stating, verification
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.stating import Audit
from lorand_coordinator.store import SqliteStore
from lorand_worker import budget, data, feedback
from lorand_worker.feedback import FileMemory, Place
from lorand_worker.participant import Participant
from lorand_worker.stating import Statements
from lorand_worker.witness import Witness

STATEMENT: Final = statements.sign(
    OTHER_KEY,
    SIGNED_RUN,
    pb.Statement(
        worker=1,
        first=1,
        last=len(BODIES) - 1,
        head=position_of(BODIES).head,
        contributions=statements.NOTHING,
    ),
)


class TurnedAway(Exception):
    """Not ours to read: protobuf or UTF-8 refuses it before."""


@dataclass(frozen=True)
class Target:
    """A reader, valid inputs, and how many of a million inputs it gets (by what one costs)."""

    name: str
    seeds: list[bytes]
    read: Callable[[bytes], object]
    share: float = 1.0


def text_of(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise TurnedAway from error


def message_of(kind: Any, data: bytes) -> Any:
    try:
        return kind.FromString(data)
    except DecodeError as error:
        raise TurnedAway from error


def in_file(path: Path, read: Callable[[Path], object]) -> Callable[[bytes], object]:
    """Have a reader of files read bytes."""

    def through(content: bytes) -> object:
        path.write_bytes(content)
        return read(path)

    return through


def wired(*messages: Message) -> list[bytes]:
    return [message.SerializeToString(deterministic=True) for message in messages]


# ------------------------------------------------------------- ledger


def ledger_targets(folder: Path) -> list[Target]:
    positions = [position_of(BODIES[:n]) for n in range(1, len(BODIES))]
    apply_to = [ledger.origin(CONFIG, IDENTITY), *positions]

    def apply(body: bytes) -> None:
        ledger.apply(apply_to[ledger.parse(body).sequence % len(apply_to)], body)

    plain, signed, stated = folder / "plain", folder / "signed", folder / "stated"
    head = position_of(BODIES).history
    signature = heads.sign(KEY, SIGNED_RUN, head)
    ledger.write_file(plain, BODIES)
    ledger.write_file(signed, BODIES, signature)
    ledger.write_file(stated, BODIES, signature, wired(STATEMENT))
    kept = KeptHead(SIGNED_RUN, head, signature)
    files = [plain.read_bytes(), signed.read_bytes(), stated.read_bytes()]
    roster = Members.of({"worker-1": OTHER_KEY.public})
    return [
        Target("an entry", BODIES, ledger.parse, 2.0),
        Target("an entry after others", BODIES, apply, 2.0),
        Target("a start entry", BODIES[:1], ledger.origin_of, 0.1),
        Target(
            "an exported ledger",
            files,
            in_file(folder / "fuzzed", lambda path: list(ledger.read_file(path))),
            0.4,
        ),
        Target(
            "a ledger to verify",
            files,
            in_file(folder / "fuzzed", partial(verification.verify, roster=roster)),
            0.05,
        ),
        Target("a kept head", [kept.to_json().encode()], KeptHead.from_json),
        Target("coefficients", [bytes(512)], partial(ledger.unpack_coefficients, size=64)),
        Target("narrow ones", [bytes(192)], partial(ledger.unpack_coefficients, size=64, width=3)),
        Target("a frontier", [bytes(96)], lambda d: Frontier.of(len(d), [d[:32], d[32:64]])),
    ]


def statement_targets(folder: Path) -> list[Target]:
    """What workers sign, as a coordinator takes it, an auditor reads it, a worker keeps it."""
    store, position = store_of(BODIES), position_of(BODIES)
    place = Place(folder / "state", SIGNED_RUN, "worker-1")
    account = Statements(OTHER_KEY, SIGNED_RUN, place, lambda text: None)
    account.sent(1, pb.Contribution(round_index=8, codes=b"\1\2\3"), position)
    account._unposted.append(STATEMENT)
    account._keep()
    roster = Members.of({"worker-1": OTHER_KEY.public})

    def take(data: bytes) -> None:
        stating.take(message_of(pb.Statement, data), store, position)
        assert len(list(store.statements())) == 1, "one that is signed, whatever is around it"

    def audit(data: bytes) -> None:
        one = Audit(roster, [data], contributions=False)
        one.take(ledger.parse(BODIES[1]), [], position)
        one.end()

    def contribution_of(data: bytes) -> None:
        Audit(roster, [], contributions=True).take(ledger.parse(BODIES[3]), [data], position)

    stored = pb.StoredContribution(worker=1, contribution=pb.Contribution(round_index=1))
    return [
        Target("a statement", wired(STATEMENT), take, 0.5),
        Target("a statement to audit", wired(pb.Statement(worker=3, last=1)), audit, 0.5),
        Target("a contribution to audit", wired(stored), contribution_of, 0.5),
        Target(
            "a worker's account",
            [place.file("statements.json").read_bytes()],
            in_file(
                place.file("statements.json"),
                lambda path: Statements(OTHER_KEY, SIGNED_RUN, place, lambda text: None),
            ),
            0.3,
        ),
    ]


def store_target(folder: Path) -> Target:
    """A checkpoint's optimizer state; SQLite's own files have tests of their own."""
    config = config_of(optimizer={"kind": "adam"})
    state = optimizer.start(config)
    zeros = np.zeros(64, np.int64)

    def unpack(data: bytes) -> object:
        # With a digest that is right, so that what is behind it is read.
        whole = snapshot._digest(data, zeros, 3) + data
        return snapshot.unpack_state(whole, zeros, 3)

    return Target("a checkpoint's state", [snapshot.pack_state(state)[32:]], unpack)


# ------------------------------------------------------------- texts


def text_targets() -> list[Target]:
    configs = [CONFIG, config_of(privacy={"mode": "none"}, codec={"up": "sign", "down": "sign"})]
    tomls = [tiny.to_toml(tiny.settings("spsa")), tiny.to_toml(tiny.settings("backprop"))]
    ranked = Manifest((TensorSpec("a", (8, 4), "float32", 2, 3), TensorSpec("b", (3,), "bfloat16")))
    identity = Identity(b"\5" * 32, b"\6" * 32, ranked)
    roster = Cohort(3).roster.to_json().encode()
    return [
        Target(
            "a run's config",
            [c.to_json().encode() for c in configs],
            lambda d: RunConfig.from_json(text_of(d)),
            0.3,
        ),
        Target(
            "a run file", [t.encode() for t in tomls], lambda d: RunConfig.parse(text_of(d)), 0.1
        ),
        Target(
            "a manifest",
            [ranked.to_json().encode(), IDENTITY.manifest.to_json().encode()],
            lambda d: Manifest.from_json(text_of(d)),
        ),
        Target(
            "run.lock",
            [identity.to_lock().encode(), IDENTITY.to_lock().encode()],
            lambda d: Identity.from_lock(text_of(d)),
        ),
        Target("a roster", [roster], lambda d: Roster.from_json(text_of(d))),
        Target("a key", [KEY.public.hex().encode()], lambda d: heads.public_key(text_of(d))),
    ]


# ------------------------------------------------------------- secure sums and codes


def sum_targets() -> list[Target]:
    cohort = Cohort(3)
    attempt = cohort.attempt(4)

    def masked(number: int) -> bytes:
        one = cohort.members[number].open(
            attempt.to_bytes(),
            round_index=attempt.round_index,
            length=4,
            state_digest=STATE,
        )
        return one.mask(np.arange(4, dtype=np.int64))

    def opened(data: bytes) -> object:
        cohort.members[0]._last = (-1, -1)  # else an attempt is opened once
        return cohort.members[0].open(
            data, round_index=attempt.round_index, length=4, state_digest=STATE
        )

    return [
        Target("an attempt", [attempt.to_bytes()], Attempt.from_bytes),
        Target("an attempt to open", [attempt.to_bytes()], opened, 0.3),
        Target(
            "an announced key",
            list(cohort.announcements),
            lambda d: Keys.verified(RUN, cohort.roster, [d]),
            0.5,
        ),
        Target(
            "announced keys",
            wired(wire.SumKeys(announcements=cohort.announcements)),
            lambda d: cohort.members[0].agree(message_of(wire.SumKeys, d).announcements),
            0.2,
        ),
        Target(
            "a masked vector",
            [masked(number) for number in range(3)],
            lambda d: MaskedSum(cohort.roster, attempt).add(d),
            0.5,
        ),
    ]


def code_targets() -> list[Target]:
    def unpack(data: bytes) -> None:
        for kind in ("int8", "sign", "int32", "log8"):
            for count in (len(data), 8 * len(data), len(data) // 4):
                try:
                    codec.unpack(kind, data, count)
                except ContributionError:
                    continue

    manifest = Manifest(tuple(TensorSpec(n, (16, 8), "float32", 0, 3) for n in "ab"))
    votes = [pb.Columns(tensor=tid, gaps=[tid, 2, 3]) for tid in (0, 1)]

    def read(data: bytes) -> object:
        return elections.read(manifest, message_of(pb.Commit, data).basis, [0, 1])

    return [
        Target("codes", [bytes(range(64)), b"\x80" * 8, b"\1\0\0\0"], unpack),
        Target("elected columns", wired(pb.Commit(basis=votes)), read),
    ]


# ------------------------------------------------------------- a worker's files


def file_targets(folder: Path) -> list[Target]:
    release = Release("laplace", 2.0, 0.5)
    account = budget.Account(
        RUN.hex(), "run", "worker", "/data.csv", release, 4.0, 0.0, 3, 9, 1,
        budget.Answer((1, 0, 1), pb.Contribution(round_index=1, codes=b"\1\2\3")),
    )  # fmt: skip
    place = Place(folder / "state", RUN, "worker")
    memory = FileMemory(64, place, lambda text: None)
    waiting = pb.Contribution(round_index=3, codes=b"\1", scale=7)
    memory.await_commit(feedback.Awaited(waiting, 1, 2, 4, np.ones(64)))
    saved = folder / "adapter"
    adapter.save(adapter.of(position_of(BODIES)), saved)
    weights = (saved / adapter.WEIGHTS_FILE).read_bytes()
    task, chats = CONFIG.task, TaskSection(kind="causal-lm", format="chat")
    csv = b'text,label\n"a, good one",positive\nbad,negative\n'
    lines = b'{"text": "good", "label": "positive"}\n{"text": "bad", "label": "negative"}\n'
    return [
        Target(
            "a privacy budget",
            [budget._written(account)],
            in_file(folder / "budget.json", budget.read),
            0.4,
        ),
        Target(
            "error feedback",
            [place.path.read_bytes()],
            in_file(place.path, lambda path: FileMemory(64, place, lambda text: None)),
            0.2,
        ),
        Target(
            "an adapter's weights",
            [weights],
            in_file(saved / adapter.WEIGHTS_FILE, lambda path: adapter.load(saved)),
            0.1,
        ),
        Target("an adapter's config", *_adapter_config(saved, folder), 0.05),
        Target(
            "a CSV file", [csv], in_file(folder / "d.csv", lambda path: data.load(path, task)), 0.3
        ),
        Target(
            "a JSONL file",
            [lines],
            in_file(folder / "d.jsonl", lambda path: data.load(path, task)),
            0.5,
        ),
        Target(
            "conversations",
            [b'{"messages": [{"role": "user", "content": "a"}, {"from": "gpt", "value": "b"}]}\n'],
            in_file(folder / "m.jsonl", lambda path: data.load(path, chats)),
            0.5,
        ),
    ]


def _adapter_config(saved: Path, folder: Path) -> tuple[list[bytes], Callable[[bytes], object]]:
    target = folder / "adapter-2"
    target.mkdir()
    (target / adapter.WEIGHTS_FILE).write_bytes((saved / adapter.WEIGHTS_FILE).read_bytes())
    config = (saved / adapter.CONFIG_FILE).read_bytes()
    return [config], in_file(target / adapter.CONFIG_FILE, lambda path: adapter.load(target))


# ------------------------------------------------------------- handlers


class Handlers:
    """A coordinator in round 1 and a worker in it; one of two workers never reports."""

    def __init__(self, **changes: dict[str, Any]) -> None:
        """Open both."""
        self.config = config_of(run={"rounds": 1000}, **changes)
        self.store = SqliteStore(":memory:")
        self.sequencer = Sequencer(self.config, self.store, IDENTITY, key=KEY)
        self.origin = ledger.origin(self.config, IDENTITY)
        for name in ("one", "two"):
            number, _ = self.sequencer.admit(hello(self.origin, name))
            self.sequencer.connect(number, 0.0)
        self.participant = Participant(self.position, Stand(1))
        self.participant.worker = 1

    @property
    def position(self) -> Position:
        assert self.sequencer.position is not None
        return self.sequencer.position

    def receive(self, data: bytes) -> None:
        """Whatever a worker sends is answered or rejected: nothing may be raised."""
        request = message_of(wire.ParticipateRequest, data)
        try:
            outgoing = self.sequencer.receive(1, request, 0.0)
        except Exception as error:
            raise AssertionError(f"receive raised {error!r}") from error
        assert len(outgoing) <= 4
        assert len(self.store) == 3, "one report of two must not end a round"

    def admit(self, data: bytes) -> None:
        """Be greeted; members are in the ledger, as many as the run takes."""
        self.sequencer.admit(message_of(wire.Hello, data))
        assert len(self.store) <= 3 + self.config.service.max_workers

    def evaluated(self, data: bytes) -> None:
        """Append an evaluation; the tally is bounded."""
        request = message_of(pb.PostEvaluationRequest, data)
        self.sequencer.post_evaluation(request.evaluation, request.run_digest)
        assert len(self.sequencer.tally.evaluations) <= 1000

    def round_start(self, data: bytes) -> None:
        """Measure what is asked for, within what the run's file allows."""
        answer = self.participant.on_round_start(message_of(wire.RoundStart, data))
        assert answer.ByteSize() < 4096


def handler_targets() -> list[Target]:
    room, other, third = Handlers(), Handlers(), Handlers()
    weighted = Handlers(rounds={"weighting": "examples"}, local={"steps": 2})
    digest = room.position.run_digest
    reports = [contribution(room.config, n, n) for n in (1, 2)]
    steps = [contribution(weighted.config, 1, 3, examples=5)]
    skip = wire.ParticipateRequest(skip=wire.Skip(round_index=9, reason="why"))
    beat = wire.ParticipateRequest(heartbeat=wire.Heartbeat())
    posted = pb.PostEvaluationRequest(
        evaluation=pb.Evaluation(sequence=1, evaluator="e", accuracy=0.5, loss=1.0),
        run_digest=digest,
    )
    ours = position_of(BODIES).history

    def signed(data: bytes) -> None:
        one = Witness(SIGNED_RUN, None, KEY.public, lambda text: None)
        one.take(ours, message_of(pb.GetHeadResponse, data))
        assert one.known_size == len(BODIES)

    names = ["one", "x" * 64, "ü"]
    return [
        Target("a message of a worker", wired(*reports, skip, beat), room.receive),
        Target("a message of local steps", wired(*steps, skip), weighted.receive),
        Target("a hello", wired(*(hello(other.origin, name) for name in names)), other.admit, 0.5),
        Target("an evaluation", wired(posted), third.evaluated, 0.2),
        Target(
            "a round's start",
            wired(
                wire.RoundStart(round_index=1, scale_exponent=-6, directions=3, batch_size=2),
                wire.RoundStart(round_index=2**32 - 1, scale_exponent=-6),
            ),
            room.round_start,
            0.2,
        ),
        Target(
            "a signed head",
            wired(answer(BODIES, len(BODIES), 0)),
            signed,
            0.5,
        ),
    ]


def all_targets(folder: Path) -> list[Target]:
    """Every reader, with its files in a folder."""
    return [
        *ledger_targets(folder),
        *statement_targets(folder),
        store_target(folder),
        *text_targets(),
        *sum_targets(),
        *code_targets(),
        *file_targets(folder),
        *handler_targets(),
    ]
