"""Tensors kept between rounds: in memory, then in a file without a name, then not at all.

A worker goes through its examples in shuffled epochs, each once. Whoever evicts under such an order
evicts what comes again soonest, so nothing is ever evicted: what was kept stays, and what comes
when there is no room is computed again.

Kept are copies in host memory, in the dtype they were computed in; the file holds their bytes one
after the other, nothing else. What is kept tells about private examples, so the file has mode 0600
and no name: the system frees it when the worker ends, killed or not. It is read and written, not
mapped: with a mapping a full disk is not an error that can be handled but the end of the process.
"""

import io
import logging
import shutil
import tempfile
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from lorand_worker.memory import free_bytes

SHARE: Final = 4
"""Default limits are one part in so many of what is available when the worker starts."""
FALLBACK_MEMORY: Final = 4 << 30
"""Bytes of memory taken to be available where the system does not say."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Most bytes to keep in memory and on disk, and the folder of the file; None: the default."""

    memory_bytes: int | None = None
    disk_bytes: int | None = None
    folder: Path | None = None

    @staticmethod
    def among(count: int) -> "Limits":
        """Return those of one of so many workers that may share a machine: no file."""
        return Limits(_default_memory() // count, 0)


@dataclass(frozen=True)
class _Place:
    """Where in the file a tensor begins, and what it is."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class TensorCache:
    """Bounded map from integers to CPU tensors. Never raises for want of room or for the disk."""

    def __init__(self, limits: Limits) -> None:
        """Start empty; a file is made only when memory is full."""
        given = limits.memory_bytes
        self._memory_limit = _default_memory() if given is None else given
        self._disk_limit = limits.disk_bytes
        self._folder = limits.folder or default_folder()
        self.memory_bytes = 0
        self.disk_bytes = 0
        self._in_memory: dict[int, torch.Tensor] = {}
        self._on_disk: dict[int, _Place] = {}
        self._file: io.FileIO | None = None

    def get(self, key: int) -> torch.Tensor | None:
        """Return what was kept under the key, not to be changed, or None."""
        if key in self._in_memory:
            return self._in_memory[key]
        place = self._on_disk.get(key)
        return None if place is None else self._read(place)

    def put(self, key: int, tensor: torch.Tensor) -> None:
        """Keep a copy of the tensor under a key that is not there, where there is room."""
        assert key not in self._in_memory
        assert key not in self._on_disk
        size = tensor.numel() * tensor.element_size()
        if self.memory_bytes + size <= self._memory_limit:
            self._in_memory[key] = tensor.detach().to("cpu", copy=True)
            self.memory_bytes += size
        elif self._has_room(size) and self._write(tensor):
            self._on_disk[key] = _Place(self.disk_bytes, tensor.shape, tensor.dtype)
            self.disk_bytes += size

    def _has_room(self, size: int) -> bool:
        """Whether so many bytes more are within the disk's limit."""
        if self._disk_limit is None:
            try:
                self._disk_limit = shutil.disk_usage(self._folder).free // SHARE
            except OSError as error:
                self._stop_writing(error)
        return self.disk_bytes + size <= (self._disk_limit or 0)

    def _write(self, tensor: torch.Tensor) -> bool:
        """Append to the file; return False, and never try again, when that fails."""
        try:
            if self._file is None:
                self._file = _nameless_file(self._folder)
                weakref.finalize(self, self._file.close)
            self._file.seek(self.disk_bytes)
            content = _bytes_of(tensor.detach().cpu().contiguous())
            if self._file.write(content) != len(content):
                raise OSError("the disk is full")
        except OSError as error:
            self._stop_writing(error)
            return False
        return True

    def _read(self, place: _Place) -> torch.Tensor | None:
        """Return a tensor from the file, or None, and forget the file, when that fails."""
        assert self._file is not None
        tensor = torch.empty(place.shape, dtype=place.dtype)
        content = _bytes_of(tensor)
        try:
            self._file.seek(place.offset)
            if self._file.readinto(content) != len(content):
                raise OSError("the file is shorter than it was")
        except OSError as error:
            self._on_disk.clear()
            self._stop_writing(error)
            return None
        return tensor

    def _stop_writing(self, error: OSError) -> None:
        self._disk_limit = 0
        _log.warning(
            "cannot keep more hidden states in %s: %s; what does not fit into memory is computed "
            "again each round (other folder: --cache-dir)",
            self._folder,
            error,
        )


def _nameless_file(folder: Path) -> io.FileIO:
    """Open an empty file, mode 0600, that exists only as long as it is open."""
    return tempfile.TemporaryFile(dir=folder, buffering=0)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _default_memory() -> int:
    free = free_bytes(torch.device("cpu"))
    return (FALLBACK_MEMORY if free is None else free) // SHARE


def default_folder() -> Path:
    """Return a folder for large temporary files: /tmp is in memory on many systems."""
    large = Path("/var/tmp")
    return large if large.is_dir() else Path(tempfile.gettempdir())
