"""A hub on a sequencer in memory: a clock that tests set, connections without a network."""

from tests.runs import config_of, contribution, hello
from tests.unit.sequencer.room import FickleStore

from lorand.config import RunConfig
from lorand.manifest import Identity
from lorand_coordinator.hub import Connection, Hub
from lorand_coordinator.sequencer import Sequencer


class Stage:
    """A run that is led here: who joins, answers and leaves is up to the test."""

    def __init__(self, identity: Identity, config: RunConfig | None = None) -> None:
        self.now = 1000.0
        self.store = FickleStore()
        self.config = config or config_of()
        self.hub = Hub(Sequencer(self.config, self.store, identity), lambda: self.now)

    def join(self, name: str) -> Connection:
        position = self.hub.sequencer.position
        assert position is not None
        return self.hub.join(hello(position, name))

    def answer(self, connection: Connection, loss: float | None = 0.5) -> None:
        """Have a worker report for the present round."""
        round_index = self.hub.sequencer.engine.round_index
        seed = 100 * round_index + connection.worker
        self.hub.take(connection, contribution(self.config, round_index, seed, loss))

    def commit(self, rounds: int = 1) -> None:
        """Commit rounds of all who are connected, with losses that fall."""
        for _ in range(rounds):
            loss = 1.0 / self.hub.sequencer.engine.round_index
            for connection in list(self.hub.connections.values()):
                self.answer(connection, loss)
            self.drain()

    def drain(self) -> None:
        """Read what was sent, as connections would."""
        for connection in self.hub.connections.values():
            while not connection.outbox.empty():
                connection.outbox.get_nowait()

    def wait(self, seconds: float) -> None:
        """Let time pass for the engine."""
        self.now += seconds
        self.hub.deliver(self.hub.sequencer.tick(self.now))

    def close(self) -> None:
        self.store.close()
