"""A small run for tests: 64 directions, three a round, and the messages of its workers."""

from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from lorand import codec, ledger
from lorand.codec import Codes
from lorand.config import PROTOCOL_VERSION, RunConfig
from lorand.ledger import Position
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import aggregation, optimizer

IDENTITY: Final = Identity(b"\1" * 32, b"\2" * 32, Manifest((TensorSpec("w", (2, 3), "float32"),)))
OTHER_IDENTITY: Final = Identity(b"\3" * 32, b"\2" * 32, IDENTITY.manifest)

SECTIONS: Final[dict[str, dict[str, Any]]] = {
    "run": {"name": "small", "rounds": 4},
    "model": {"name": "some/model"},
    "task": {"labels": ["negative", "positive"]},
    "directions": {"pool_size": 64},
    "estimator": {"kind": "spsa", "directions_per_round": 3},
    "optimizer": {"learning_rate": 0.01},
    "rounds": {"quorum": 2, "deadline_s": 10.0},
}


def config_of(**changes: dict[str, Any]) -> RunConfig:
    """The small run, with settings of its sections changed."""
    names = dict.fromkeys([*SECTIONS, *changes])
    return RunConfig.model_validate(
        {name: {**SECTIONS.get(name, {}), **changes.get(name, {})} for name in names}
    )


def codes_of(config: RunConfig, seed: int) -> Codes:
    """Some codes of a contribution, each the codec's own."""
    rng = np.random.default_rng(seed)
    values = rng.normal(0, 2.0, config.num_directions)
    return codec.encode(config.codec.up, values, codec.first_scale_exponent(config.codec.up))


def contribution(
    config: RunConfig, round_index: int, seed: int, loss: float | None = 0.5, examples: int = 0
) -> wire.ParticipateRequest:
    """A contribution as a worker sends it."""
    packed = codec.pack(config.codec.up, codes_of(config, seed))
    scale = (1000 + seed) * config.local.taken
    message = pb.Contribution(round_index=round_index, codes=packed, examples=examples, scale=scale)
    if loss is not None:
        message.loss = loss
    return wire.ParticipateRequest(contribution=message)


def hello(position: Position, name: str) -> wire.Hello:
    """The Hello of a worker at a position, as a session writes it."""
    identity = position.identity
    return wire.Hello(
        protocol_version=PROTOCOL_VERSION,
        name=name,
        run_digest=position.run_digest,
        base_digest=identity.base_digest,
        tokenizer_digest=identity.tokenizer_digest,
        manifest_digest=identity.manifest.digest(),
        manifest=identity.manifest.to_json() if position.next_sequence == 0 else "",
        next_sequence=position.next_sequence,
        head=position.head if position.next_sequence else b"",
        session=len(name),
    )


def history(config: RunConfig, rounds: int, workers: Sequence[int] = (1, 2)) -> list[bytes]:
    """The bodies of a run's ledger: start, members, some rounds (every third given up)."""
    position = ledger.origin(config, IDENTITY)
    state = optimizer.start(config)
    entries = [ledger.start_entry(config, IDENTITY)]
    entries += [pb.Entry(member=pb.Member(worker=w, name=f"worker-{w}")) for w in workers]
    for round_index in range(1, rounds + 1):
        if round_index % 3 == 0:
            abandon = pb.Abandon(reason="nobody came")
            entries.append(pb.Entry(round_index=round_index, abandon=abandon))
            continue
        reports = {w: aggregation.Report(codes_of(config, 100 * round_index + w)) for w in workers}
        scale_exponent = state.scale_exponent
        state, update = optimizer.advance(config, position.draws, state, round_index, reports)
        commit = pb.Commit(
            scale=update.scale,
            codes=codec.pack(config.codec.down, update.codes),
            workers=workers,
            scale_exponent=scale_exponent,
        )
        entries.append(pb.Entry(round_index=round_index, commit=commit))
    return numbered(entries)


def numbered(entries: Sequence[pb.Entry]) -> list[bytes]:
    """Serialise entries in the order given."""
    bodies = []
    for sequence, entry in enumerate(entries):
        entry.sequence = sequence
        bodies.append(entry.SerializeToString(deterministic=True))
    return bodies


def evaluation_of(evaluator: str, committed: int, accuracy: float) -> pb.Evaluation:
    """An evaluator's result, as the ledger keeps it."""
    return pb.Evaluation(
        evaluator=evaluator, committed=committed, accuracy=accuracy, loss=0.5, examples=9
    )
