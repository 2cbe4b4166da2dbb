"""`examples/flower`: both halves through bytes, and Flower's own objects where it is installed."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from examples.flower.lorand_flower import coordinating
from examples.flower.lorand_flower.coordinating import MOST_FAILURES, Answer, Fleet, Kind
from examples.flower.lorand_flower.working import Seat
from tests import tiny

import lorand
from lorand import ledger
from lorand.errors import LorandError
from lorand_coordinator import verification
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import SqliteStore
from lorand_worker.precision import Precision
from lorand_worker.tasks import Forward

pytestmark = pytest.mark.usefixtures("one_thread")
SEED = 7
STEPS: dict[str, dict[str, Any]] = {
    "run": {"rounds": 3, "adopt_first_worker": True},
    "local": {"steps": 3, "learning_rate": 0.002},
    "codec": {"up": "sign", "down": "int8"},
    "optimizer": {"kind": "sgd", "learning_rate": 1.0, "normalise": False},
}


@dataclass
class Loopback:
    """Nodes in this process: `losing` says which messages fail on their way back."""

    seats: dict[int, Seat]
    losing: Callable[[int, Kind, int], bool] = lambda node, kind, number: False
    kept: dict[int, list[bytes]] = field(default_factory=dict)
    answers: list[Answer] = field(default_factory=list)
    sent: int = 0

    def nodes(self) -> Iterable[int]:
        return self.seats

    def send(self, node: int, kind: Kind, parts: list[bytes]) -> None:
        assert all(type(part) is bytes for part in parts)
        self.sent += 1
        kept = self.kept.setdefault(node, [])
        try:
            seat = self.seats[node]
            body = seat.greet(parts[0], kept) if kind == "greet" else seat.follow(parts, kept)
            lost = self.losing(node, kind, self.sent)
            self.answers.append(Answer(node, failure="expired") if lost else Answer(node, body))
        except LorandError as error:
            self.answers.append(Answer(node, failure=str(error)))

    def receive(self) -> list[Answer]:
        answers, self.answers = self.answers, []
        return answers


@dataclass
class Setting:
    network: Loopback
    config: lorand.config.RunConfig
    ledger_at: Path
    notes: list[str] = field(default_factory=list)
    now: float = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def run(self) -> ledger.Position:
        store = SqliteStore(self.ledger_at)
        try:
            sequencer = Sequencer(self.config, store, None)
            fleet = Fleet(sequencer, self.network, self.notes.append, lambda: self.now, self.sleep)
            return fleet.run()
        finally:
            store.close()


@pytest.fixture
def setting(tiny_model: Path, tiny_data: dict[str, Path], tmp_path: Path) -> Setting:
    seats = {
        number: Seat(
            f"worker-{number:04}",
            tiny_data[domain],
            tmp_path,
            tiny_model,
            "cpu",
            Precision.FLOAT32,
            SEED,
        )
        for number, domain in enumerate(tiny.DOMAINS, start=1)
    }
    return Setting(Loopback(seats), tiny.config("backprop", **STEPS), tmp_path / "run.ledger")


def test_a_run_through_bytes_has_the_ledger_of_a_simulated_one(
    setting: Setting, tiny_model: Path, tiny_data: dict[str, Path]
) -> None:
    end = setting.run()
    exact = Forward(Precision.FLOAT32)
    files = [tiny_data[domain] for domain in tiny.DOMAINS]
    simulated = lorand.simulate(setting.config, files, model=tiny_model, seed=SEED, forward=exact)
    assert end.head == simulated.position.head
    assert end.coefficients.any()
    assert verification.verify(str(setting.ledger_at), None, None).position.head == end.head
    assert setting.notes == []
    for node, seat in setting.network.seats.items():
        assert ledger.replay(setting.network.kept[node]).head == end.head
        assert seat.base is not None
        assert seat.base.replica.digest() == simulated.base.replica.digest()


def test_processes_that_come_and_go_and_lost_answers_leave_replicas_alike(
    setting: Setting,
) -> None:
    """Flower may start a process a message; one answer in five expires."""
    network = setting.network
    send = network.send

    def fresh(node: int, kind: Kind, parts: list[bytes]) -> None:
        network.seats[node].base = network.seats[node].bench = None
        send(node, kind, parts)

    network.send = fresh  # type: ignore[method-assign]
    network.losing = lambda node, kind, number: number % 5 == 0
    end = setting.run()
    assert end.committed == 3
    assert any("expired" in note for note in setting.notes)
    heads = {ledger.replay(entries).head for entries in network.kept.values()}
    assert heads == {end.head}


def test_a_node_that_comes_back_as_another_takes_its_place(setting: Setting) -> None:
    network, send = setting.network, setting.network.send

    def replaced(node: int, kind: Kind, parts: list[bytes]) -> None:
        if kind == "follow" and node == 2:  # it ends with the first round's message in its hands
            network.seats[7] = network.seats[2]
        else:
            send(node, kind, parts)

    network.send = replaced  # type: ignore[method-assign]
    assert setting.run().committed == 3
    assert setting.notes == ["node 7 is 'worker-0002' now, node 2 is left out"]
    store = SqliteStore(setting.ledger_at, read_only=True)
    commits = [e.commit for e in map(ledger.parse, store.entries()) if e.HasField("commit")]
    store.close()
    assert [list(commit.workers) for commit in commits] == [[1, 2, 3]] * 3


def test_a_node_that_fails_is_left_out_and_said(setting: Setting, tmp_path: Path) -> None:
    setting.network.seats[9] = Seat("ninth", tmp_path / "none.csv", tmp_path)
    assert setting.run().committed == 3
    told = [note for note in setting.notes if note.startswith("node 9: ")]
    assert len(told) == MOST_FAILURES
    assert "none.csv" in told[0]


class Grid:
    """Flower's Grid over ClientApps in this process; each node keeps its own Context."""

    def __init__(self, client: Any, contexts: dict[int, Any]) -> None:
        self._client, self._contexts = client, contexts
        self._replies: dict[str, Any] = {}

    def get_node_ids(self) -> list[int]:
        return list(self._contexts)

    def push_messages(self, messages: list[Any]) -> list[str]:
        names = []
        for message in messages:
            name = message.metadata.__dict__["_message_id"] = message.object_id
            self._replies[name] = self._client(
                message, self._contexts[message.metadata.dst_node_id]
            )
            names.append(name)
        return names

    def pull_messages(self, names: list[str]) -> list[Any]:
        return [self._replies.pop(name) for name in names if name in self._replies]


def test_the_apps_hand_on_bytes(
    tiny_model: Path,
    tiny_data: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Flower's own messages, records and contexts, without its processes."""
    app = pytest.importorskip("flwr.app", reason="flwr is not installed: see examples/flower")
    from examples.flower.lorand_flower import client_app, server_app

    monkeypatch.setattr(coordinating, "POLL_S", 0.0)
    for name in ("_task_id", "_run_id", "_node_id"):  # what Flower's own process sets
        monkeypatch.setattr(f"flwr.supercore.task_identity.TaskIdentity.{name}", 1)
    run = tmp_path / "run.toml"
    run.write_text(tiny.to_toml(tiny.settings("backprop", **STEPS)), encoding="utf-8")
    ledger_at = tmp_path / "run.ledger"
    files = ",".join(str(tiny_data[domain]) for domain in tiny.DOMAINS)
    given = {
        "run": str(run),
        "ledger": str(ledger_at),
        "shards": files,
        "model": str(tiny_model),
    }

    def context(node: int, **config: Any) -> Any:
        return app.Context(1, node, {"state": str(tmp_path), **config}, app.RecordDict(), given)

    contexts = {node: context(node, **{"partition-id": node - 2}) for node in (2, 3, 4)}
    contexts[5] = context(5)
    server_app.app(Grid(client_app.app, contexts), context(1))
    told = capsys.readouterr().out
    assert "node 5: this node has no data: start it with --node-config" in told
    head = verification.verify(str(ledger_at), None, None).position.head
    assert f"finished: 3 rounds, head {head.hex()}" in told
    weights = [line.split()[-1] for line in told.splitlines() if "finished, weights" in line]
    assert len(weights) == 3
    assert len(set(weights)) == 1
    for node in (2, 3, 4):
        kept = contexts[node].state["lorand"]["entries"]
        assert ledger.replay(kept).head == head
