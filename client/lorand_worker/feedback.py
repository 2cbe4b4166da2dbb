"""What a participant's codes lost, kept for its next contribution, also across a restart.

K numbers that never leave the worker. A contribution's loss counts only once the ledger holds its
commit: a round that went on without this worker changes nothing.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lorand import durable, strict_json
from lorand.codec import Floats
from lorand.directions import Indices
from lorand.errors import LorandError
from lorand.v1 import ledger_pb2 as pb

FORMAT: Final = "lorand/feedback/v1"


@dataclass(frozen=True)
class Awaited:
    """A contribution of this worker whose commit is awaited, and the feedback from then on.

    It was made after so many `committed` rounds; what becomes of it stands in the ledger at
    `sequence` or later.
    """

    contribution: pb.Contribution
    worker: int
    committed: int
    sequence: int
    feedback: Floats


class Memory:
    """Error feedback in quanta, shape (K,), and that of a contribution on its way."""

    def __init__(self, size: int) -> None:
        """Start with none, on the run's first pool."""
        self.feedback: Floats = np.zeros(size)
        self.awaited: Awaited | None = None
        self.pool = 0

    def with_lost(self, indices: Indices, lost: Floats) -> Floats:
        """Return the feedback after codes that lost so much at these directions."""
        after = self.feedback.copy()
        after[indices] = lost
        return after

    def await_commit(self, awaited: Awaited) -> None:
        """Note a contribution, before it is sent."""
        self.awaited = awaited
        self._keep()

    def committed(self, round_index: int, workers: Sequence[int]) -> None:
        """Note that the ledger holds the contributions of these workers to a round."""
        awaited = self.awaited
        if awaited is not None and awaited.contribution.round_index == round_index:
            if awaited.worker in workers:
                self.feedback = awaited.feedback
            self.awaited = None
            self._keep()

    def move_to(self, pool: int) -> None:
        """Be on this pool of the run: what was lost on one before means nothing to it.

        Those who read a run from its beginning pass pools that this memory has left already.
        """
        if pool > self.pool:
            self.feedback, self.awaited = np.zeros(len(self.feedback)), None
            self.pool = pool
            self._keep()

    def end(self) -> None:
        """Forget all: the run is finished."""

    def _keep(self) -> None:
        """Have the state survive this process, where it should."""


@dataclass(frozen=True)
class Place:
    """A folder, and whose files are meant: each run and worker has its own."""

    folder: Path
    run_digest: bytes
    name: str

    @property
    def path(self) -> Path:
        """The file of error feedback."""
        return self.file("feedback.safetensors")

    def file(self, kind: str) -> Path:
        """Return the file of a kind; names of workers may hold what files may not."""
        worker = hashlib.sha256(self.name.encode()).hexdigest()[:16]
        return self.folder / f"{self.run_digest.hex()[:16]}-{worker}.{kind}"


class FileMemory(Memory):
    """A Memory in a file for its owner's eyes, replaced whole and gone when the run is finished."""

    def __init__(self, size: int, place: Place, note: Callable[[str], None]) -> None:
        """Read the file if there is one; one that cannot be used is said with `note` and replaced.

        Raises LorandError when the folder cannot be written.
        """
        super().__init__(size)
        self._place = place
        try:
            place.path.parent.mkdir(parents=True, exist_ok=True)
            if place.path.exists():
                self._read()
        except (SafetensorError, DecodeError, ValueError, KeyError, TypeError) as error:
            note(f"the error feedback in {place.path} is not used: {error}; it starts at zero")
        except OSError as error:
            raise self._unwritten(error) from error
        self._keep()

    def _read(self) -> None:
        with safe_open(self._place.path, "numpy") as file:
            header = strict_json.loads(file.metadata()["lorand"])
            if {**header, **self._owner()} != header:
                raise ValueError("it is of another run or worker")
            feedback, after = file.get_tensor("feedback"), file.get_tensor("awaited")
            body = file.get_tensor("contribution").tobytes()
        for array in (feedback, after):
            if array.shape != self.feedback.shape or array.dtype != np.float64:
                raise ValueError("it is of another pool size")
            if not np.isfinite(array).all():
                raise ValueError("it holds no numbers")
        pool, awaited = int(header["pool"]), None
        if header["awaited"] is not None:
            worker, committed, sequence = map(int, header["awaited"])
            contribution = pb.Contribution.FromString(body)
            awaited = Awaited(contribution, worker, committed, sequence, after)
        self.feedback, self.awaited, self.pool = feedback, awaited, pool

    def _owner(self) -> dict[str, object]:
        place = self._place
        return {"format": FORMAT, "run": place.run_digest.hex(), "worker": place.name}

    def _keep(self) -> None:
        awaited, after, body = self.awaited, self.feedback, b""
        header: dict[str, object] = {**self._owner(), "pool": self.pool, "awaited": None}
        if awaited is not None:
            header["awaited"] = (awaited.worker, awaited.committed, awaited.sequence)
            after, body = awaited.feedback, awaited.contribution.SerializeToString()
        arrays: dict[str, NDArray[Any]] = {
            "feedback": self.feedback,
            "awaited": after,
            "contribution": np.frombuffer(body, np.uint8),
        }
        try:
            durable.replace(self._place.path, save(arrays, {"lorand": json.dumps(header)}))
        except OSError as error:
            raise self._unwritten(error) from error

    def end(self) -> None:
        """See Memory."""
        try:
            self._place.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> LorandError:
        return LorandError(
            f"cannot keep error feedback in {self._place.path}: {error}; choose another folder "
            "with --state"
        )
