"""No wall clock decides anything: jumps and drift of clocks cannot change what a run does."""

import ast
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent.parent
ROOMS: Final = ("common", "server", "client")
WALL_CLOCKS: Final = {
    *("time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "time.strftime"),
    *("datetime.now", "datetime.utcnow", "datetime.today", "date.today", "datetime.fromtimestamp"),
    *("os.times", "time.clock_gettime"),
}
ALLOWED: Final[dict[str, str]] = {
    "server/lorand_coordinator/identity/authority.py": "certificates say from when to when they are good",
    "server/lorand_coordinator/identity/members.py": "invitations and certificates end, by this one clock",
    "server/lorand_coordinator/identity_cli.py": "people are told when a certificate ends",
}
"""Files that may read a wall clock, and why. It is the coordinator's alone: no other is compared."""


def readings(source: str) -> list[tuple[int, str]]:
    """Lines and names of wall clocks that are read, or imported by their bare name."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if ".".join(name.split(".")[-2:]) in WALL_CLOCKS:
                found.append((node.lineno, name))
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found += [(node.lineno, name) for name in names if name in WALL_CLOCKS]
    return found


def test_only_monotonic_clocks_are_read() -> None:
    paths = [
        p for room in ROOMS for p in sorted((ROOT / room).rglob("*.py")) if "/v1/" not in str(p)
    ]
    assert len(paths) > 100
    read = {
        f"{path.relative_to(ROOT)}:{line} {name}"
        for path in paths
        for line, name in readings(path.read_text(encoding="utf-8"))
        if str(path.relative_to(ROOT)) not in ALLOWED
    }
    assert not read, "compare durations with time.monotonic, and clocks of machines never"


@pytest.mark.parametrize(
    "source",
    [
        "import time\nnow = time.time()",
        "from time import time",
        "import datetime\ndatetime.datetime.now()",
        "from datetime import datetime\nstart = datetime.utcnow()",
        "import time\nclock = time.time_ns",
    ],
)
def test_a_wall_clock_is_noticed(source: str) -> None:
    assert readings(source)
    assert not readings("import time\ntime.monotonic() - time.perf_counter()")
