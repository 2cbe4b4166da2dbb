"""Predicted sizes against messages as runs make them; sockets are for experiments/wire_bytes.py."""

import json
from pathlib import Path
from typing import Any

import pytest
from tests.runs import config_of, contribution, history

from lorand import wire_size
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb

CHANGES: list[dict[str, Any]] = [
    {},
    {"codec": {"up": "int32", "down": "int8"}},
    {"codec": {"up": "sign", "down": "sign"}},
    {"directions": {"mode": "own"}},
    {"estimator": {"kind": "backprop"}, "directions": {"pool_size": 4096}},
]


@pytest.mark.parametrize("changes", CHANGES)
def test_messages_are_as_long_as_a_runs(changes: dict[str, Any]) -> None:
    config = config_of(run={"rounds": 4}, **changes)
    size = wire_size.of_round(config, 2, committed=4)
    sent = contribution(config, 1, seed=3)
    assert abs(size.up.message - sent.ByteSize()) <= 1
    entries = [pb.Entry.FromString(body) for body in history(config, 4)]
    last = [entry for entry in entries if entry.HasField("commit")][-1]
    last.commit.contributions_digest = bytes(32)
    last.commit.scale = last.commit.scale or 2**14
    start = wire.RoundStart(round_index=1, scale_exponent=-10)
    parts = [wire.ParticipateResponse(entry=last.SerializeToString())]
    parts.append(wire.ParticipateResponse(round_start=start))
    batch = wire.ParticipateResponse(batch=wire.Batch(messages=parts))
    assert abs(size.down.message - batch.ByteSize()) <= 4, "varints of other values"


@pytest.mark.parametrize("changes", CHANGES)
def test_each_layer_holds_the_last(changes: dict[str, Any]) -> None:
    for size in (wire_size.of_round(config_of(**changes), 7),):
        for way in (size.up, size.down):
            assert 0 < way.payload < way.message < way.socket < way.wire
    plain = wire_size.of_round(config_of(**changes), 7, tls=False)
    assert plain.up.socket == size.up.socket - 22


def test_a_large_round_takes_frames_records_and_segments() -> None:
    config = config_of(
        estimator={"kind": "backprop"}, directions={"pool_size": 1 << 16}, codec={"up": "int32"}
    )
    up = wire_size.of_round(config, 3).up
    assert up.payload == 4 << 16
    frames, records, segments = 17, 17, 182
    assert up.socket == up.message + 5 + 9 * frames + 26 + 22 * records
    assert up.wire == up.socket + 52 * (segments + 1)


def test_the_committed_measurement_is_within_five_percent() -> None:
    path = Path(__file__).parents[2] / "experiments" / "results" / "wire_bytes.json"
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        for way in ("up", "down"):
            assert row[f"predicted_{way}"] == pytest.approx(row[f"measured_{way}"], rel=0.05)
