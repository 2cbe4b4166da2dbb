"""What a round costs on the network, predicted from a run's settings (pure).

From the inside out, for a participant that measures, reports and follows one round:

    payload   codes: the scalars up, the coefficients' change down
    message   the protobuf messages around them, as they are sent
              (the commit and the next round's start in one)
    frame     gRPC's 5 bytes and HTTP/2's 9 a message (RFC 9113 §4.1; a DATA frame holds 16,384
              bytes), and two WINDOW_UPDATEs of 13 in return for each received message: its
              stream's and its connection's
    record    TLS 1.3's 22 bytes a record (RFC 8446 §5.2: header 5, type 1, tag 16), of which one
              holds 16,384 bytes; what is written together shares a record
    segment   52 bytes of TCP and IPv4 (timestamps) for every `mss` bytes, and for an
              acknowledgement of what arrived, where nothing goes back within its delay

`experiments/wire_bytes.py` holds it against sockets. Not counted: heartbeats, which go by time
(`[service] heartbeat_s`), gRPC's pings, joining, what a subspace elects, and the few bytes that say
so where batches or numbers of directions grow.
"""

from dataclasses import dataclass
from math import ceil
from typing import Final

from lorand import codec
from lorand.config import RunConfig
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb

GRPC_PREFIX: Final = 5
FRAME_HEADER: Final = 9
FRAME_BYTES: Final = 16384
WINDOW_UPDATES: Final = 2 * 13
TLS_RECORD: Final = 22
RECORD_BYTES: Final = 16384
TCP_IP: Final = 52
ETHERNET_MSS: Final = 1448
LEDGER_ROW: Final = 2 * 32 + 64
"""An entry's digest, its leaf in the tree, and the head's signature."""


@dataclass(frozen=True)
class Size:
    """Bytes of one direction of a participant's round, from the inside out; each holds the last."""

    payload: int
    message: int
    socket: int
    wire: int


@dataclass(frozen=True)
class RoundSize:
    """What a participant sends (`up`) and receives (`down`) in a round.

    `stored` is what the round adds to a ledger: entry, digests, signature and contributions.
    """

    up: Size
    down: Size
    stored: int


def of_round(
    config: RunConfig,
    participants: int,
    *,
    committed: int = 1000,
    tls: bool = True,
    mss: int = ETHERNET_MSS,
    acknowledged_apart: int = 2,
) -> RoundSize:
    """Return the sizes of a round with so many participants, `committed` rounds into a run.

    `acknowledged_apart` is how many of a round's TCP acknowledgements travel alone: two where
    participants measure longer than acknowledgements wait (40 ms), none where they answer at once.
    """
    contribution, commit, start = _messages(config, participants, committed)
    batch = wire.ParticipateResponse(batch=wire.Batch(messages=[commit, start]))
    sent, received = contribution.ByteSize(), batch.ByteSize()
    up, down = on_socket(sent, tls=tls), on_socket(received, tls=tls)
    acknowledgements = TCP_IP * acknowledged_apart // 2
    codes = codec.num_bytes(config.codec.up, config.num_directions)
    kept = 1 if config.privacy.summed else participants
    return RoundSize(
        Size(codes, sent, up, up + TCP_IP * ceil(up / mss) + acknowledgements),
        Size(
            len(pb.Entry.FromString(commit.entry).commit.codes),
            received,
            down,
            down + TCP_IP * ceil(down / mss) + acknowledgements,
        ),
        len(commit.entry) + LEDGER_ROW + kept * sent,
    )


def _messages(
    config: RunConfig, participants: int, committed: int
) -> tuple[wire.ParticipateRequest, wire.ParticipateResponse, wire.ParticipateResponse]:
    """Return messages as long as a round's: the contribution, its commit and the next start."""
    count, round_index = config.num_directions, committed + 1
    changed = count * (participants if config.directions.mode == "own" else 1)
    contribution = pb.Contribution(
        round_index=round_index,
        codes=bytes(codec.num_bytes(config.codec.up, count)),
        scale=2**14 if config.local.taken else 0,
        examples=2**10 if config.rounds.weighting == "examples" else 0,
    )
    if config.rounds.telemetry != "none":
        contribution.loss = 1.0
    if config.privacy.summed:
        contribution.ClearField("codes")
        contribution.sum = bytes(8 * count)
    commit = pb.Commit(
        scale=2**14,
        codes=bytes(codec.num_bytes(config.codec.down, changed)),
        workers=range(1, participants + 1),
        scale_exponent=-10,
        contributions_digest=bytes(32),
    )
    entry = pb.Entry(sequence=committed, round_index=round_index, commit=commit)
    start = wire.RoundStart(round_index=round_index, scale_exponent=-10)
    return (
        wire.ParticipateRequest(contribution=contribution),
        wire.ParticipateResponse(entry=entry.SerializeToString()),
        wire.ParticipateResponse(round_start=start),
    )


def on_socket(message: int, *, tls: bool = True) -> int:
    """Return the bytes of a message of this size on a socket, with the window updates beside it."""
    total = GRPC_PREFIX + message + FRAME_HEADER * ceil((GRPC_PREFIX + message) / FRAME_BYTES)
    total += WINDOW_UPDATES
    return total + TLS_RECORD * ceil(total / RECORD_BYTES) if tls else total
