"""Groups of virtual workers: each on one replica, in this process or in another one.

What a group elsewhere is told are the ledger's entries and the round's starts, as bytes; what it
answers are contributions. Its replica holds the bits of every other.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Final, Protocol

from lorand import ledger
from lorand.config import RunConfig
from lorand.errors import LorandError
from lorand.ledger import Position
from lorand.manifest import Identity
from lorand.v1 import coordination_pb2 as wire
from lorand.v1 import ledger_pb2 as pb
from lorand_api.shards import joined
from lorand_worker import guard, local_steps
from lorand_worker.bench import Base, ModelBench, bring, load_base, task_for
from lorand_worker.cache import Limits
from lorand_worker.chance import Chance
from lorand_worker.data import Data
from lorand_worker.participant import Participant, Request
from lorand_worker.tasks import Forward, Part

LIMIT_S: Final = 3600.0
"""How long a group elsewhere may take to load its model, or to measure a round."""

Asked = tuple[int, wire.RoundStart]
"""A worker's number, and what it is asked."""


class Crew(Protocol):
    """All virtual workers of a run."""

    def begin(self, bodies: Sequence[bytes], position: Position) -> None:
        """Read the history so far, which leads to this position."""

    def follow(self, body: bytes, entry: pb.Entry, position: Position) -> None:
        """Read one entry more, which leads to this position."""

    def answers(self, asked: Sequence[Asked]) -> Iterable[Request]:
        """Measure; return what is answered, in the order of those who were asked."""

    def check(self, digest: bytes) -> None:
        """Raise LorandError unless all replicas hold weights of this digest."""


def name_of(number: int) -> str:
    """Return the name of a virtual worker, numbered from 1."""
    return f"worker-{number:04}"


class Group:
    """Virtual workers on one replica in this process, who measure in turn: a crew."""

    def __init__(
        self,
        config: RunConfig,
        base: Base,
        parts: Sequence[Data],
        forward: Forward,
        seed: int | None,
        first: int = 1,
    ) -> None:
        """Number the owners of these parts of the examples from `first` on."""
        whole = task_for(base, config, joined(parts), forward)
        work = local_steps.build(config, base.replica, base.loaded.module)
        origin, begins = ledger.origin(config, base.identity), 0
        self._members: dict[int, Participant] = {}
        for number, part in enumerate(parts, start=first):
            chance = Chance.of(seed, name_of(number))
            mine = Part(whole, begins, len(part))
            bench = ModelBench(base, config, mine, chance.batches, work=work)
            member = self._members[number] = Participant(origin, bench, chance.uniform)
            member.worker = number
            begins += len(part)

    def begin(self, bodies: Sequence[bytes], position: Position) -> None:
        """See Crew."""
        for member in self._members.values():
            member.catch_up(position)

    def follow(self, body: bytes, entry: pb.Entry, position: Position) -> None:
        """See Crew."""
        for member in self._members.values():
            member.follow(entry, position)

    def answers(self, asked: Sequence[Asked]) -> Iterator[Request]:
        """See Crew."""
        for number, start in asked:
            yield self._members[number].on_round_start(start)

    def check(self, digest: bytes) -> None:
        """See Crew: it stands on the replica that the digest is of."""


# -- elsewhere -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """What a group elsewhere is made of: its part of the data, and a run that it must agree with.

    `model` is a folder that its machine has, too, in place of the model's name; `groups` how many
    there are in all, some of them maybe on the same machine.
    """

    config: RunConfig
    identity: Identity
    model: Path | None
    device: str
    forward: Forward
    parts: Sequence[Data]
    first: int
    seed: int | None
    groups: int


class Seat:
    """A group in the process that it was sent to: bytes in, bytes out."""

    def __init__(self, setup: Setup) -> None:
        """Take what `begin` makes the group of."""
        self._setup = setup

    def begin(self, bodies: Sequence[bytes]) -> None:
        """Load the model, which must be the run's, and read the history so far.

        Raises LorandError.
        """
        setup, forward = self._setup, self._setup.forward
        if forward.limits == Limits():
            forward = replace(forward, limits=Limits.among(setup.groups))
        self._base = load_base(setup.config, setup.model, setup.device, theirs=setup.identity)
        guard.check_identity(self._base.identity, setup.identity)
        self._group = Group(setup.config, self._base, setup.parts, forward, setup.seed, setup.first)
        self._position = ledger.replay(bodies)
        self._group.begin(bodies, self._position)

    def answers(self, bodies: Sequence[bytes], asked: Sequence[tuple[int, bytes]]) -> list[bytes]:
        """Read the entries since, then measure."""
        self._follow(bodies)
        starts = [(number, wire.RoundStart.FromString(start)) for number, start in asked]
        return [answer.SerializeToString() for answer in self._group.answers(starts)]

    def digest(self, bodies: Sequence[bytes]) -> bytes:
        """Read the entries since; return the digest of the weights there."""
        self._follow(bodies)
        bring(self._base.replica, self._position)
        self._base.replica.settle()
        return self._base.replica.digest()

    def _follow(self, bodies: Sequence[bytes]) -> None:
        for body in bodies:
            entry = ledger.parse(body)
            self._position = ledger.apply(self._position, body)
            self._group.follow(body, entry, self._position)


Call = Callable[..., Future[Any]]
"""Calls a seat: a method's name and its arguments. Calls of one seat are carried out in turn."""
Place = Callable[[Setup], Call]
"""Makes a seat somewhere, and returns at once."""


class Machines(Protocol):
    """Where groups can be."""

    def places(self, workers: int) -> AbstractContextManager[Sequence[Place]]:
        """Have room for groups of so many workers in all, meanwhile. Raises LorandError."""


class Spread:
    """A crew of groups elsewhere. Who is asked in a round measures at the same time as others."""

    def __init__(self, places: Sequence[Place], whole: Setup) -> None:
        """Deal the workers of a setup out to the places, as evenly as it goes, in order."""
        parts, count = whole.parts, min(len(places), len(whole.parts))
        bounds = [len(parts) * each // count for each in range(count + 1)]
        setups = [
            replace(whole, parts=parts[begin:end], first=whole.first + begin, groups=count)
            for begin, end in pairwise(bounds)
        ]
        self._calls = [place(setup) for place, setup in zip(places, setups, strict=False)]
        self._group_of = {
            setup.first + at: group
            for group, setup in enumerate(setups)
            for at in range(len(setup.parts))
        }
        self._untold: list[list[bytes]] = [[] for _ in setups]

    def begin(self, bodies: Sequence[bytes], position: Position) -> None:
        """See Crew."""
        for future in [call("begin", list(bodies)) for call in self._calls]:
            _result(future)

    def follow(self, body: bytes, entry: pb.Entry, position: Position) -> None:
        """See Crew; it is sent with the next call."""
        for untold in self._untold:
            untold.append(body)

    def answers(self, asked: Sequence[Asked]) -> list[Request]:
        """See Crew."""
        by_group: dict[int, list[tuple[int, bytes]]] = {}
        for number, start in asked:
            mine = by_group.setdefault(self._group_of[number], [])
            mine.append((number, start.SerializeToString()))
        futures = {
            group: self._calls[group]("answers", self._told(group), each)
            for group, each in by_group.items()
        }
        answers = {
            number: Request.FromString(body)
            for group, each in by_group.items()
            for (number, _), body in zip(each, _result(futures[group]), strict=True)
        }
        return [answers[number] for number, _ in asked]

    def check(self, digest: bytes) -> None:
        """See Crew."""
        futures = [call("digest", self._told(group)) for group, call in enumerate(self._calls)]
        for group, future in enumerate(futures, start=1):
            if (found := _result(future)) != digest:
                raise LorandError(
                    f"group {group} of the virtual workers ended at weights {found.hex()[:16]}, "
                    f"and this process at {digest.hex()[:16]}: its machine computes other bits; "
                    "`lr-worker doctor` there says more"
                )

    def _told(self, group: int) -> list[bytes]:
        told, self._untold[group] = self._untold[group], []
        return told


def _result(future: Future[Any]) -> Any:
    """Return what a call came to. Raises LorandError, also where it comes to nothing in time."""
    try:
        return future.result(LIMIT_S)
    except TimeoutError as error:
        raise LorandError(
            f"a group of virtual workers did not answer within {LIMIT_S:.0f} s: see what its "
            "machine does, or deal the workers out to more groups"
        ) from error
