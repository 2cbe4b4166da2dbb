"""Whole runs with real processes on loopback: everyone ends with the same bits (DESIGN §5)."""

import hashlib
import json
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from tests import tiny
from tests.commands import Command, MakeRoom, Room, committed, start, status, wait_for

from lorand import adapter, ledger
from lorand.replica import tensor_bytes
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.presets import PRESETS
from lorand_worker.link import Link

QUICK: dict[str, dict[str, Any]] = {
    # One round waits until the late worker has joined, so its deadline is far away.
    "rounds": {"deadline_s": 60.0},
    "service": {"checkpoint_every": 4, "heartbeat_s": 1.0, "heartbeat_timeout_s": 40.0},
}
SPSA: dict[str, dict[str, Any]] = {**QUICK, "run": {"rounds": 24}}
BACKPROP: dict[str, dict[str, Any]] = {
    **QUICK,
    "run": {"rounds": 60},
    "optimizer": {"learning_rate": 0.001},
    "estimator": {"batch_size": 16},
}


OWN: tuple[tuple[object, ...], ...] = (
    ("--weights", "copy", "--precision", "float32", "--cache-memory-gb", 0, "--cache-disk-gb", 0),
    ("--weights", "layerwise", "--precision", "bfloat16", "--cache-memory-gb", 0),
    (),  # auto
)
"""What a machine may choose for itself: it changes what is measured by rounding, no replica."""


def kinds(room: Room) -> list[str]:
    """The kinds of the ledger's entries, in order."""
    bodies = ledger.read_file(room.export())
    return [ledger.parse(body).WhichOneof("kind") or "" for body in bodies]


def evaluations(room: Room) -> list[pb.Evaluation]:
    """The evaluations in the exported ledger."""
    entries = [ledger.parse(body) for body in ledger.read_file(room.export())]
    return [entry.evaluation for entry in entries if entry.HasField("evaluation")]


def replayed(room: Room) -> str:
    """The digest of the weights that `lr-worker replay` rebuilds from the exported ledger."""
    answer = room.once("lr-worker", "replay", room.export(), "--model", room.model)
    return str(answer["weights_digest"])


def assert_same_bits(room: Room, results: Sequence[dict[str, Any]]) -> None:
    """Every replica has the weights and the history that the exported ledger gives."""
    position = ledger.replay(ledger.read_file(room.export()))
    assert position.finished
    assert {result["weights_digest"] for result in results} == {replayed(room)}
    assert {result["head"] for result in results} <= heads_after_finish(room)
    moved = position.coefficients.any() or any(pool.values.any() for pool in position.closed)
    assert moved, "the run went somewhere"


def heads_after_finish(room: Room) -> set[str]:
    """Digests of the finish entry and of what came later (evaluations)."""
    heads, previous, finished = set(), ledger.GENESIS, False
    for body in ledger.read_file(room.export()):
        previous = ledger.entry_digest(previous, body)
        finished = finished or ledger.parse(body).HasField("finish")
        if finished:
            heads.add(previous.hex())
    return heads


def evaluator(room: Room, address: str) -> Command:
    """Start an evaluator that follows the run."""
    return room.start(
        *("lr-worker", "evaluate", address, "--data", room.data["test"], "--name", "held-out"),
        *("--follow", "--every", 4, "--model", room.model, "--device", "cpu", "--json"),
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "content", [tiny.settings("spsa", **SPSA), tiny.settings("backprop", **BACKPROP)]
)
def test_late_or_early_everyone_ends_with_the_same_bits(
    make_room: MakeRoom, content: tiny.Settings
) -> None:
    """Three workers, one that joins in the middle, one that comes when all is over.

    Wherever they keep their weights and hidden states, in whatever precision they measure.
    """
    room = make_room(content).lock()
    with room.coordinator() as (coordinator, address):
        following = evaluator(room, address)
        workers = [
            room.join(address, name, *flags) for name, flags in zip(tiny.DOMAINS, OWN, strict=True)
        ]
        wait_for(lambda: committed(address) >= 5, "the run moves, past a checkpoint")
        workers[0].signal(signal.SIGSTOP)  # the round waits for it: the run cannot end meanwhile
        late = room.join(address, "late", "--checkpointing", data="hotels")
        wait_for(lambda: connected(address, "late"), "the late worker joins")
        workers[0].signal(signal.SIGCONT)
        results = [worker.result() for worker in (*workers, late)]
        assert results[-1]["contributions"] >= 1, "it took part"
        results.append(room.join(address, "after", data="gadgets").result())
        assert results[-1]["worker"] is None, "it found the run finished"
        last = following.result()
        assert_checkpoint_and_tail(room, address)
        coordinator.signal(signal.SIGTERM)
        assert coordinator.end()[0] == 0
    assert_same_bits(room, results)
    posted = evaluations(room)
    assert [e.committed for e in posted] == list(range(0, room.config.run.rounds + 1, 4))
    assert last == {"accuracy": posted[-1].accuracy, "loss": posted[-1].loss, "examples": 60}
    if room.config.estimator.kind == "backprop":
        assert posted[0].loss == pytest.approx(np.log(2), abs=1e-6), "a new head knows nothing"
        assert posted[-1].accuracy >= 0.7, "it learned"
        assert posted[-1].loss < 0.6


def preset_settings(name: str) -> tiny.Settings:
    """A preset on the tiny model: fewer rounds, a smaller pool."""
    changes = {section: dict(values) for section, values in PRESETS[name].settings.items()}
    kind = changes.get("estimator", {}).get("kind", "spsa")
    changes["run"] = {"name": f"preset-{name}", "rounds": 10}
    changes["model"] = {"trainable": "last:1"}
    changes.setdefault("directions", {})["pool_size"] = 256
    changes.setdefault("estimator", {})["batch_size"] = 8
    changes["rounds"] = changes.get("rounds", {}) | {"quorum": 2, "start_with": 2}
    changes["rounds"]["deadline_s"] = 60.0  # one round waits for the late worker
    return tiny.settings(kind, **changes)


QUICKEST = ("just-one-byte", "lorand-fo")
"""Presets whose runs differ most: the others take their turn with the slow tests."""


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICKEST else pytest.mark.slow) for n in PRESETS],
)
def test_late_in_a_run_of_a_preset(make_room: MakeRoom, name: str) -> None:
    """Whatever the method is, a worker that joins in the middle ends with everybody's bits."""
    room = make_room(preset_settings(name)).lock()
    with room.coordinator() as (_, address):
        first, second, third = tiny.DOMAINS
        workers = [room.join(address, domain) for domain in (first, second)]
        wait_for(lambda: committed(address) >= 3, "the run moves")
        workers[0].signal(signal.SIGSTOP)
        late = room.join(address, "late", data=third)
        wait_for(lambda: connected(address, "late"), "the late worker joins")
        workers[0].signal(signal.SIGCONT)
        results = [worker.result() for worker in (*workers, late)]
    assert results[-1]["contributions"] >= 1
    assert_same_bits(room, results)


def connected(address: str, name: str) -> bool:
    """Whether a worker of this name is connected."""
    answer = status(address)
    return answer is not None and any(w.name == name and w.connected for w in answer.workers)


def assert_checkpoint_and_tail(room: Room, address: str) -> None:
    """A reader that starts at a checkpoint ends where one that reads every entry ends."""
    link = Link(address, give_up_s=5.0)
    try:
        whole = ledger.replay(link.entries(0))
        checkpoint = link.from_checkpoint(ledger.origin(whole.config, whole.identity))
        assert checkpoint.next_sequence > 4, "a checkpoint was there"
        short = link.catch_up(ledger.origin(whole.config, whole.identity))
    finally:
        link.close()
    assert (short.head, short.next_sequence, short.committed, short.finished) == (
        whole.head,
        whole.next_sequence,
        whole.committed,
        True,
    )
    assert np.array_equal(short.coefficients, whole.coefficients)


@pytest.mark.slow
def test_what_the_commands_print_can_be_parsed(make_room: MakeRoom) -> None:
    """Status, health, ledger, export and evaluate: their JSON, and that it is true."""
    room = make_room(tiny.settings("backprop", run={"rounds": 4}))
    model = ("--model", room.model)
    lock = room.once("lr-worker", "prepare", room.run, *model)
    with room.coordinator() as (_, address):
        healthy = room.once("lr-coordinator", "health", address)
        assert healthy == {"serving": True}
        workers = [
            room.join(address, name, "--output", room.folder / name) for name in tiny.DOMAINS
        ]
        results = [worker.result() for worker in workers]
        shown = room.once("lr-coordinator", "status", address)
        live = room.once("lr-worker", "replay", address, *model)
        data = ("--data", room.data["test"])
        score = room.once("lr-worker", "evaluate", address, *data, *model, "--threads", 1)
    digest = results[0]["weights_digest"]
    assert live["weights_digest"] == digest
    assert shown["phase"] == "finished"
    assert shown["reason"] == "finished: 4 rounds are committed"
    assert (shown["committed"], shown["rounds"], shown["abandoned"]) == (4, 4, 0)
    assert {w["name"]: w["contributions"] for w in shown["workers"]} == dict.fromkeys(
        tiny.DOMAINS, 4
    )
    assert {w["name"]: w["bytes_received"] for w in shown["workers"]} == {
        r["name"]: r["message_bytes_sent"] - asked() for r in results
    }
    assert score["examples"] == 60
    ledger_commands(room, shown)
    exported = room.folder / "exported.bin"
    wrote = room.once("lr-worker", "export", exported, room.folder / "ad", "--merged", *model)
    assert wrote["weights_digest"] == digest == merged_digest(Path(wrote["merged"]), lock)
    assert_adapter(room, wrote["adapter_bytes"])


def asked() -> int:
    """Bytes beside a stream: GetRun and GetCheckpoint twice, GetHead when it joins and ends."""
    return 2 * (2 + 2) + 2 + 4


def ledger_commands(room: Room, shown: dict[str, Any]) -> None:
    """`ledger verify`, `show` and `export`, on the file itself and on the exported one."""
    exported = room.folder / "exported.bin"
    verified = room.once("lr-coordinator", "ledger", "verify", room.ledger)
    wrote = room.once("lr-coordinator", "ledger", "export", room.ledger, exported)
    again = room.once("lr-coordinator", "ledger", "verify", exported)
    assert verified["contributions_checked"] == 12
    assert verified["signatures_checked"] == shown["entries"]
    assert again == {**verified, "contributions_checked": 0, "signatures_checked": 1}
    assert (verified["head"], verified["entries"]) == (shown["head"], shown["entries"])
    assert verified["coefficients_digest"] == shown["coefficients_digest"]
    assert wrote == {
        "entries": shown["entries"],
        "bytes": exported.stat().st_size,
        "path": str(exported),
    }
    with room.start("lr-coordinator", "ledger", "show", room.ledger, "--json", "--last", 3) as it:
        code, output = it.end()
    assert code == 0
    rows = [json.loads(line) for line in output.splitlines()]
    assert [row["kind"] for row in rows] == ["commit", "commit", "finish"]
    assert rows[0]["workers"] == [1, 2, 3]


def merged_digest(folder: Path, lock: dict[str, Any]) -> str:
    """The digest of the trainable tensors in the written model, computed here from its files."""
    tensors = {f"encoder.{n}": t for n, t in load_file(folder / "model.safetensors").items()}
    head = load_file(folder / "head.safetensors")
    tensors |= {f"head.{name}": tensor for name, tensor in head.items()}
    written = json.loads(Path(lock["lock"]).read_text())
    total = hashlib.sha256()
    for name, *_ in written["manifest"]:
        total.update(name.encode() + b"\0")
        total.update(tensor_bytes(tensors[name]))
    assert json.loads((folder / "head.json").read_text())["labels"] == list(tiny.LABELS)
    return total.hexdigest()


def assert_adapter(room: Room, size: int) -> None:
    """The adapter that export wrote is the one every worker wrote with --output."""
    position = ledger.replay(ledger.read_file(room.folder / "exported.bin"))
    for folder in ("ad", *tiny.DOMAINS):
        loaded = adapter.load(room.folder / folder)
        assert np.array_equal(loaded.coefficients, position.coefficients)
        assert loaded.config.digest() == room.config.digest()
        assert loaded.identity == position.identity
        assert (loaded.committed, loaded.head) == (4, position.head)
    assert size == (room.folder / "ad" / adapter.WEIGHTS_FILE).stat().st_size
    assert size < 4 * room.config.directions.pool_size + 256


def test_a_run_that_rotates_is_followed_measured_and_exported(make_room: MakeRoom) -> None:
    """Weights are those of all pools, wherever somebody reads them."""
    content = tiny.settings(
        "spsa",
        run={"rounds": 5, "name": "rotating"},
        directions={"mode": "own", "rotate_every": 2},
        rounds={"quorum": 2, "start_with": 2},
    )
    room = make_room(content).lock()
    model, data = ("--model", room.model), ("--data", room.data["test"])
    with room.coordinator() as (_, address):
        following = evaluator(room, address)
        workers = [room.join(address, name) for name in ("hotels", "gadgets")]
        results = [worker.result() for worker in workers]
        last = following.result()
        assert room.once("lr-worker", "evaluate", address, *data, *model, "--threads", 1) == last
    assert_same_bits(room, results)
    assert [e.committed for e in evaluations(room)] == [0, 4, 5]
    folder = room.folder / "adapter"
    wrote = room.once("lr-worker", "export", room.export(), folder, "--merged", *model)
    assert wrote["weights_digest"] == results[0]["weights_digest"]
    loaded, position = adapter.load(folder), ledger.replay(ledger.read_file(room.export()))
    assert loaded.closed == position.closed
    assert len(loaded.closed) == 2
    assert np.array_equal(loaded.coefficients, position.coefficients)


def test_calibrated_scales(make_room: MakeRoom) -> None:
    """Measured once, where the run is prepared; workers take them from the run."""
    content = tiny.settings("spsa", run={"rounds": 3}, directions={"scale_rule": "calibrated"})
    room = make_room(content)
    prepare = ("lr-worker", "prepare", room.run, "--model", room.model)
    code, text = room.failure(*prepare)
    assert code == 2
    assert "give examples, --calibrate DATA" in text
    code, text = room.failure("lr-coordinator", "serve", room.run)
    assert code == 2
    assert "there is no" in text
    room.once(*prepare, "--calibrate", room.data["hotels"])
    lock = json.loads((room.folder / "run.lock").read_text())
    scales = {name: scale for name, _, _, scale in lock["manifest"]}
    assert len(set(scales.values())) > 1
    with room.coordinator() as (_, address):
        workers = [room.join(address, name) for name in tiny.DOMAINS]
        results = [worker.result() for worker in workers]
    assert_same_bits(room, results)
    room.run.write_text(tiny.to_toml(tiny.settings("spsa")), encoding="utf-8")
    code, text = room.failure(*prepare, "--calibrate", room.data["hotels"])
    assert code == 2
    assert "set it in" in text


def test_interrupted_and_terminated_it_leaves_cleanly_and_goes_on(make_room: MakeRoom) -> None:
    """Ctrl-C of a worker, SIGTERM of the coordinator, the same commands again."""
    room = make_room(tiny.settings("backprop", run={"rounds": 4}, rounds={"start_with": 2})).lock()
    with room.coordinator() as (coordinator, address):
        port = int(address.rsplit(":", 1)[1])
        first = room.join(address, "hotels")
        wait_for(lambda: connected(address, "hotels"), "the worker joins")
        first.signal(signal.SIGINT)
        assert first.end() == (130, "")
        assert "Traceback" not in first.errors()
        wait_for(lambda: not connected(address, "hotels"), "the coordinator sees it go")
        staying = room.join(address, "gadgets")
        wait_for(lambda: connected(address, "gadgets"), "the other joins")
        coordinator.signal(signal.SIGTERM)
        assert coordinator.end()[0] == 0
        assert "the ledger is whole" in coordinator.errors()
        assert "Traceback" not in coordinator.errors()
    waiting = room.join(address, "restaurants")  # nobody listens there now
    waiting.signal(signal.SIGINT)
    assert waiting.end()[0] == 130
    with room.coordinator(port=port) as (_, again):
        assert again == address
        results = [room.join(address, "hotels").result(), staying.result()]
    assert_same_bits(room, results)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["spsa", "backprop"])
def test_with_nothing_but_the_commands_of_the_manual(make_room: MakeRoom, kind: Any) -> None:
    """As a user types it: every process is a console command, started from nothing."""
    room = make_room(tiny.settings(kind), starter=start)
    room.once("lr-worker", "prepare", room.run, "--model", room.model)
    with room.coordinator() as (_, address):
        following = evaluator(room, address)
        workers = [room.join(address, name) for name in tiny.DOMAINS]
        results = [worker.result(limit_s=110.0) for worker in workers]
        following.result()
    assert_same_bits(room, results)
