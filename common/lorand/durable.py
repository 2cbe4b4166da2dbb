"""Files of a machine's own state: where they are, replaced whole and for their owner's eyes."""

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Replace a file; after a crash at any step it is the old one or the new one, whole.

    On return it survives the loss of power too. Raises OSError.
    """
    partial = path.with_suffix(".partial")
    with open(partial, "wb", opener=_for_its_owner) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
    _keep_name(path)


def create(path: Path, content: bytes) -> None:
    """Write a file that must not be there yet. Raises FileExistsError, OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "xb", opener=_for_its_owner) as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    _keep_name(path)


def _keep_name(path: Path) -> None:
    """Have the loss of power spare what the folder says of a file."""
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def state_folder() -> Path:
    """Return where a user keeps what must survive a restart, unless told otherwise."""
    home = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(home) / "lorand"


def _for_its_owner(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
