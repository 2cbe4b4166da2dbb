"""Flower's side of the coordinator."""

from collections.abc import Iterable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.serverapp import Grid, ServerApp

from lorand import config as run_config
from lorand.errors import ConfigError
from lorand_coordinator import run_lock
from lorand_coordinator.sequencer import Sequencer
from lorand_coordinator.store import SqliteStore

from .coordinating import Answer, Fleet, Kind

app = ServerApp()
TYPES = {"greet": MessageType.QUERY, "follow": MessageType.TRAIN}


class GridNetwork:
    """Flower's Grid. A message that nobody answers expires, and its answer says so."""

    def __init__(self, grid: Grid, answer_s: float) -> None:
        """Messages, and what is waited for them, end after so long."""
        self._grid, self._answer_s = grid, answer_s
        self._waits: dict[str, int] = {}

    def nodes(self) -> Iterable[int]:
        """See Network."""
        return set(self._grid.get_node_ids())

    def send(self, node: int, kind: Kind, parts: list[bytes]) -> None:
        """See Network."""
        content = RecordDict({"lorand": ConfigRecord({"parts": parts})})
        message = Message(content, node, TYPES[kind], ttl=self._answer_s)
        self._waits.update((number, node) for number in self._grid.push_messages([message]))

    def receive(self) -> list[Answer]:
        """See Network."""
        replies = self._grid.pull_messages(list(self._waits)) if self._waits else ()
        return [self._answer(reply) for reply in replies]

    def _answer(self, reply: Message) -> Answer:
        node = self._waits.pop(reply.metadata.reply_to_message_id)
        if reply.has_error():
            return Answer(node, failure=f"{reply.error.reason} (code {reply.error.code})")
        record = reply.content["lorand"]
        return Answer(node, record["body"], record["failure"])


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the run file's rounds on the nodes of the fleet."""
    path = Path(__file__).parents[1] / str(context.run_config["run"])
    config = run_config.load(path)
    if config.privacy.noised:
        raise ConfigError("a private run needs budgets of its workers: serve it without Flower")
    ledger = Path(str(context.run_config["ledger"])).expanduser().resolve()
    store = SqliteStore(ledger)
    try:
        sequencer = Sequencer(config, store, run_lock.read(path, config))
        sequencer.observers.append(
            lambda o: print(f"round {o.committed}: loss {o.loss}", flush=True)
        )
        network = GridNetwork(grid, config.rounds.deadline_s)
        end = Fleet(sequencer, network).run()
        print(f"finished: {end.committed} rounds, head {end.head.hex()}, in {ledger}", flush=True)
    finally:
        store.close()
