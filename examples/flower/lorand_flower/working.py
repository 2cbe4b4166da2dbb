"""A worker's half, without Flower: bytes in, bytes out, and the entries that it has seen kept."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lorand import ledger
from lorand.config import PROTOCOL_VERSION, RunConfig
from lorand.errors import ConfigError, HandshakeError
from lorand.manifest import Identity
from lorand.v1 import coordination_pb2 as wire
from lorand_worker import data, guard
from lorand_worker.bench import Base, ModelBench, load_base
from lorand_worker.chance import Chance
from lorand_worker.feedback import FileMemory, Place
from lorand_worker.memory import Weights
from lorand_worker.participant import Participant, hello
from lorand_worker.precision import Precision, choose
from lorand_worker.sources import Source
from lorand_worker.tasks import Forward


@dataclass
class Seat:
    """A worker's model and data, in one process of perhaps many: what lasts is `kept`, and a file.

    `kept` are the ledger's entries so far; `state` is a folder for what codes lost.
    """

    name: str
    data: Source
    state: Path
    model: Path | None = None
    device: str = "auto"
    precision: Precision = Precision.AUTO
    seed: int | None = None
    """Fixes batches and rounding, for experiments."""
    base: Base | None = None
    bench: ModelBench | None = None

    def greet(self, run: bytes, kept: Sequence[bytes]) -> bytes:
        """Return the Hello to a serialised GetRunResponse. Raises LorandError."""
        response = wire.GetRunResponse.FromString(run)
        if response.protocol_version != PROTOCOL_VERSION:
            raise HandshakeError("the coordinator is of another release of lorand; install one")
        theirs = Identity.from_lock(response.identity) if response.identity else None
        self._open(RunConfig.from_json(response.config), theirs)
        return self._hello(self._participant(kept))

    def follow(self, messages: Sequence[bytes], kept: list[bytes]) -> bytes:
        """Apply ParticipateResponses; return the contribution asked for, or else how far it is.

        What is applied is added to `kept`. Raises LorandError.
        """
        parts = [wire.ParticipateResponse.FromString(message) for message in messages]
        entries = [part.entry for part in parts if part.HasField("entry")]
        if self.base is None:  # a process of its own for every message
            start = ledger.origin_of((kept or entries or [b""])[0])
            self._open(start.config, start.identity)
        participant = self._participant([*kept, *entries])
        kept += entries
        answer = b""
        for part in parts:
            if part.HasField("welcome"):
                participant.worker = part.welcome.worker
            elif part.HasField("round_start"):
                answer = participant.on_round_start(part.round_start).SerializeToString()
        if participant.position.finished and self.base is not None:
            participant.settle()
            print(f"{self.name}: finished, weights {self.base.replica.digest().hex()}", flush=True)
        return answer or self._hello(participant)

    def _open(self, config: RunConfig, theirs: Identity | None) -> None:
        """Load model and data, once a process."""
        if self.base is not None:
            return
        if config.privacy.noised:
            raise ConfigError("a private run is charged to a budget: join it with `lr-worker join`")
        guard.check(config, guard.Policy())
        examples = data.load(self.data, config.task)
        guard.check_examples(config, len(examples), str(self.data))
        base = load_base(config, self.model, self.device, Weights.AUTO, theirs=theirs)
        if theirs is not None:
            guard.check_identity(base.identity, theirs)
        forward = Forward(choose(self.precision, config, base.device)[0])
        chance = Chance.of(self.seed, self.name)
        self.bench = ModelBench(base, config, examples, chance.batches, forward)
        self.base, self._uniform = base, chance.uniform
        self._start = ledger.origin(config, base.identity)

    def _participant(self, kept: Sequence[bytes]) -> Participant:
        """Return one that has applied these entries."""
        assert self.bench is not None
        config, memory = self._start.config, None
        if config.keeps_feedback:
            place = Place(self.state, self._start.run_digest, self.name)
            memory = FileMemory(config.directions.pool_size, place, print)
        participant = Participant(self._start, self.bench, self._uniform, memory)
        for body in kept:
            participant.on_entry(body)
        return participant

    def _hello(self, participant: Participant) -> bytes:
        assert self.base is not None
        said = hello(self.name, participant.position, self.base.identity)
        return wire.ParticipateRequest(hello=said).SerializeToString()
