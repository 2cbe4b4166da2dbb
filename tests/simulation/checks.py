"""What must hold after a run, whatever happened in it (invariants of DESIGN §5, notes §3)."""

from contextlib import closing
from itertools import chain
from pathlib import Path

from tests.simulation.workers import key_of
from tests.simulation.world import KEY, World

from lorand import codec, ledger
from lorand.heads import KeptHead
from lorand.ledger import Position
from lorand.privacy.roster import Members
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import aggregation, optimizer, verification
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.snapshot import pack_state
from lorand_coordinator.store import SqliteStore


def check(world: World) -> Position:
    """Check the whole run; return where its ledger ends. Closes the store."""
    coordinator = world.coordinator
    if coordinator.hub is None:
        coordinator.start()
    assert coordinator.hub is not None
    assert coordinator.store is not None
    sequencer, store = coordinator.hub.sequencer, coordinator.store
    bodies = list(store.entries())
    entries = [ledger.parse(body) for body in bodies]
    check_order(entries)
    check_once(entries)
    check_seen(world, store)
    end = check_commits(world, store, bodies)
    check_everyone(world, sequencer, end)
    check_feedback(world, entries)
    world.disk.crash(store)
    with closing(world.disk.open()) as reopened:
        again = Sequencer(world.config, reopened, None)
        check_signatures(world, reopened)
        check_statements(world, Path(reopened._path))
    assert again.position is not None
    assert again.position.head == end.head, "I1: lost at the very end"
    ours, theirs = (pack_state(one._optimizer) for one in (sequencer, again))
    assert ours == theirs, "I6: reopened, the optimizer's state does not repeat"
    return end


def check_signatures(world: World, store: SqliteStore) -> None:
    """I3, I4: every entry is signed, and the histories that workers kept are the ledger's."""
    kept_heads = [KeptHead.from_json(path.read_bytes()) for path in world.state.glob("*.head.json")]
    assert len(kept_heads) == len(world.workers), "I4: a worker kept no history"
    for kept in kept_heads:
        found = verification.verify(Path(store._path), KEY.public, kept)
        assert found.signatures == len(store), "I3: an entry is not signed"


def check_statements(world: World, path: Path) -> None:
    """I9: every contribution is stated by its worker, whatever happened on the way."""
    if not world.config.service.statements_every:
        return
    roster = Members.of({one.name: key_of(one.name).public for one in world.workers})
    found = verification.verify(path, roster=roster)
    assert found.standing is not None
    assert found.standing.unstated == (), "I9: not stated"
    assert found.standing.stated == found.contributions, "I9: stated"
    assert not list(world.state.glob("*.statements.json")), "I9: the account is gone with the run"


def check_order(entries: list[pb.Entry]) -> None:
    """I3: dense, and each round one outcome, in turn; one start, first, and one finish."""
    assert [entry.sequence for entry in entries] == list(range(len(entries))), "I3: not dense"
    outcomes = [e.round_index for e in entries if e.HasField("commit") or e.HasField("abandon")]
    assert outcomes == list(range(1, len(outcomes) + 1)), f"I3: rounds ended as {outcomes}"
    kinds = [entry.WhichOneof("kind") for entry in entries]
    assert [kinds.count("start"), kinds.count("finish"), kinds[0]] == [1, 1, "start"], kinds
    assert not {"commit", "abandon"} & set(kinds[kinds.index("finish") :]), "I3: after the end"


def check_once(entries: list[pb.Entry]) -> None:
    """I2: a worker is in a round at most once, and a name has one number."""
    pairs = [(e.round_index, worker) for e in entries for worker in e.commit.workers]
    assert len(pairs) == len(set(pairs)), "I2: counted twice"
    members = [e.member for e in entries if e.HasField("member")]
    assert [m.worker for m in members] == list(range(1, len(members) + 1)), "I2: numbers"
    assert len({m.name for m in members}) == len(members), "I2: a name has two numbers"


def check_seen(world: World, store: SqliteStore) -> None:
    """I1, I4: every history that anybody saw is a prefix of the ledger's."""
    for sequence, head in world.heads.items():
        assert store.digest(sequence) == head, f"I1: entry {sequence} was seen, and is gone"


def check_commits(world: World, store: SqliteStore, bodies: list[bytes]) -> Position:
    """I6: each commit is the optimizer's step from exactly what its workers sent; I3: the chain."""
    config = world.config
    position, state = ledger.origin_of(bodies[0]), optimizer.start(config)
    for body in bodies:
        entry = ledger.parse(body)
        if entry.HasField("commit"):
            stored = store.contributions(entry.sequence)
            ledger.check_contributions(entry, stored)
            parts = [pb.StoredContribution.FromString(part) for part in stored]
            assert [part.worker for part in parts] == list(entry.commit.workers), "I6: workers"
            assert len(parts) >= config.rounds.quorum, "committed below the quorum"
            for part in parts:
                said = part.contribution
                sent = (entry.round_index, part.worker, said.codes, said.scale)
                assert sent in world.reported, f"I6: worker {part.worker} never sent that"
                assert part.contribution.round_index == entry.round_index, "I6: of another round"
            count = entry.commit.directions
            reports = {
                part.worker: aggregation.report(config, part.contribution, count) for part in parts
            }
            assert entry.commit.scale_exponent == state.scale_exponent, "I6: scale"
            state, update = optimizer.advance(
                config, position.draws, state, entry.round_index, reports
            )
            packed = codec.pack(config.codec.down, update.codes)
            assert (entry.commit.scale, entry.commit.codes) == (update.scale, packed), "I6: ΔA"
        position = ledger.apply(position, body)
        assert position.head == store.digest(entry.sequence), "I3: the chain"
    assert position.committed == config.run.rounds, "the run ended early"
    return position


def check_everyone(world: World, sequencer: Sequencer, end: Position) -> None:
    """I5: sequencer, every worker and a replay hold the same integers."""
    assert sequencer.position is not None
    followers = chain(
        [("the sequencer", sequencer.position)],
        ((w.name, w.session.participant.position) for w in world.workers if w.session),
    )
    for name, position in followers:
        assert position.finished, f"{name} is not at the end"
        assert position.coefficients.tobytes() == end.coefficients.tobytes(), f"I5: {name}"
        assert position.closed == end.closed, f"I5: {name} left other pools"


def check_feedback(world: World, entries: list[pb.Entry]) -> None:
    """I8: a worker owes what its codes lost in the rounds that the ledger holds, and no others."""
    config = world.config
    if not config.keeps_feedback:
        return
    nothing = bytes(8 * config.directions.pool_size)
    owed: dict[int | None, bytes] = {}
    for committed, entry in enumerate((e for e in entries if e.HasField("commit")), start=1):
        for worker in entry.commit.workers:
            before, after = world.owed[entry.round_index, worker]
            assert before == owed.get(worker, nothing), f"I8: worker {worker} owed something else"
            owed[worker] = after
        if config.pool_after(committed) != config.pool_after(committed - 1):
            owed.clear()
    for one in world.workers:
        if one.session is not None and one.number is not None:
            memory = one.session.participant._memory
            assert memory.feedback.tobytes() == owed.get(one.number, nothing), (
                f"I8: {one.name} owes something else"
            )
    assert not list(world.state.glob("*.safetensors")), "I8: feedback is gone when the run is"
