"""How much memory a process may still take on this machine."""

from pathlib import Path


def free_bytes(root: Path = Path("/")) -> int | None:
    """Return the smaller of what Linux calls available and what the control group leaves.

    None where neither is known.
    """
    known = (_available(root), _left_in_group(root))
    return min((free for free in known if free is not None), default=None)


def _available(root: Path) -> int | None:
    try:
        lines = (root / "proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    sizes = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
    return int(sizes[0]) * 1024 if sizes else None


def _left_in_group(root: Path) -> int | None:
    """What a container may still take (control groups, version 2); file pages count as free."""
    group = root / "sys/fs/cgroup"
    try:
        most = int((group / "memory.max").read_text(encoding="ascii"))
        used = int((group / "memory.current").read_text(encoding="ascii"))
        lines = (group / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no control group, or no limit ("max")
        return None
    stat = dict(line.split() for line in lines)
    return most - used + int(stat.get("inactive_file", 0)) + int(stat.get("active_file", 0))
