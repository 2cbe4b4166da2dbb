"""No wall clock decides anything: jumps and drift of clocks cannot change what a run does."""

import ast
from pathlib import Path
from typing import Final

import pytest

ROOT: Final = Path(__file__).resolve().parent.parent.parent
ROOMS: Final = ("common", "server", "client", "api")
WALL_CLOCKS: Final = {
    *("time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "time.strftime"),
    *("datetime.now", "datetime.utcnow", "datetime.today", "date.today", "datetime.fromtimestamp"),
    *("os.times", "time.clock_gettime"),
}
ALLOWED: Final[dict[str, str]] = {
    "common/lorand/logs.py": "people read when a line was written",
    "client/lorand_worker/reporting.py": "the same",
    "common/lorand/trackers.py": "files of TensorBoard say when",
    "common/lorand/otlp.py": "spans of OpenTelemetry say when",
    "server/lorand_coordinator/identity/authority.py": "certificates begin and end at dates",
    "client/lorand_worker/doctor/connection.py": "says whether its own is outside of them",
    "server/lorand_coordinator/identity/members.py": "so do invitations, also across restarts",
}
"""Files that may read a wall clock, their own machine's, and why. Nothing of a run is in them."""


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
    found = {
        str(path.relative_to(ROOT)): readings(path.read_text(encoding="utf-8")) for path in paths
    }
    read = {name: lines for name, lines in found.items() if lines}
    message = "compare durations with time.monotonic, and clocks of machines never"
    assert read.keys() == ALLOWED.keys(), f"{message}: {read}"


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
