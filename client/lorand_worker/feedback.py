"""What a participant's codes lost, kept for its next contribution, also across a restart.

K numbers that never leave the worker. A contribution's loss counts only once the ledger holds its
commit: a round that went on without this worker changes nothing.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lorand.codec import Floats
from lorand.directions import Indices
from lorand.errors import LorandError

FORMAT: Final = "lorand/feedback/v1"


class Memory:
    """Error feedback in quanta, shape (K,), and that of a contribution on its way."""

    def __init__(self, size: int) -> None:
        """Start with none."""
        self.feedback: Floats = np.zeros(size)
        self._awaited: tuple[int, int, Floats] | None = None

    def await_commit(self, round_index: int, worker: int, indices: Indices, lost: Floats) -> None:
        """Note what codes of this worker lost at these directions, should they be committed."""
        after = self.feedback.copy()
        after[indices] = lost
        self._awaited = (round_index, worker, after)
        self._keep()

    def committed(self, round_index: int, workers: Sequence[int]) -> None:
        """Note that the ledger holds the contributions of these workers to a round."""
        if self._awaited is not None and self._awaited[0] == round_index:
            if self._awaited[1] in workers:
                self.feedback = self._awaited[2]
            self._awaited = None
            self._keep()

    def clear(self) -> None:
        """Forget all: the run has moved to directions for which it means nothing."""
        if self._awaited is not None or self.feedback.any():
            self.feedback, self._awaited = np.zeros(len(self.feedback)), None
            self._keep()

    def _keep(self) -> None:
        """Have the state survive this process, where it should."""


@dataclass(frozen=True)
class Place:
    """A folder, and whose feedback is meant: each run and worker has a file of its own."""

    folder: Path
    run_digest: bytes
    name: str

    @property
    def path(self) -> Path:
        """The file; names may hold what files may not."""
        worker = hashlib.sha256(self.name.encode()).hexdigest()[:16]
        return self.folder / f"{self.run_digest.hex()[:16]}-{worker}.feedback.safetensors"


class FileMemory(Memory):
    """A Memory in a file, which is replaced whole."""

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
        except (SafetensorError, ValueError, KeyError, TypeError) as error:
            note(f"the error feedback in {place.path} is not used: {error}; it starts at zero")
        except OSError as error:
            raise self._unwritten(error) from error

    def _read(self) -> None:
        with safe_open(self._place.path, "numpy") as file:
            header = json.loads(file.metadata()["lorand"])
            if header != {**self._header(), "awaited": header["awaited"]}:
                raise ValueError("it is of another run or worker")
            feedback, awaited = file.get_tensor("feedback"), file.get_tensor("awaited")
        for array in (feedback, awaited):
            if array.shape != self.feedback.shape or array.dtype != np.float64:
                raise ValueError("it is of another pool size")
            if not np.isfinite(array).all():
                raise ValueError("it holds no numbers")
        self.feedback = feedback
        if header["awaited"] is not None:
            round_index, worker = map(int, header["awaited"])
            self._awaited = (round_index, worker, awaited)

    def _header(self) -> dict[str, object]:
        place = self._place
        return {"format": FORMAT, "run": place.run_digest.hex(), "worker": place.name}

    def _keep(self) -> None:
        awaited = self.feedback if self._awaited is None else self._awaited[2]
        header = json.dumps({**self._header(), "awaited": self._awaited and self._awaited[:2]})
        partial = self._place.path.with_suffix(".partial")
        try:
            save_file(
                {"feedback": self.feedback, "awaited": awaited},
                partial,
                metadata={"lorand": header},
            )
            partial.replace(self._place.path)
        except (OSError, SafetensorError) as error:
            raise self._unwritten(error) from error

    def _unwritten(self, error: Exception) -> LorandError:
        return LorandError(
            f"cannot keep error feedback in {self._place.path}: {error}; choose another folder "
            "with --state"
        )
