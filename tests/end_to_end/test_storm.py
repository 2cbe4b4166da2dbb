"""Five hundred members lose their connections at once, and come back (benchmarks/storm.py)."""

import json
import subprocess
import sys
from typing import Final

import pytest
from tests.commands import ENVIRONMENT, ROOT

WORKERS: Final = 500
BACK_S: Final = 30.0
"""A few seconds where two cores do nothing else."""
GROWN_MB: Final = 40.0
"""Half of what so many connections take."""


@pytest.mark.slow
@pytest.mark.timeout(290)
def test_a_storm_of_five_hundred_that_come_back() -> None:
    """Within bounds of time and memory, each as the member it was, and nobody refused for good."""
    command = [sys.executable, "-m", "benchmarks.storm", "--workers", str(WORKERS), "--resets", "2"]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=280, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    assert (result["members"], result["refused_for_good"]) == (WORKERS, 0), "each once, all wanted"
    assert max(*result["back_s"]["resets"], result["back_s"]["kill"]) < BACK_S
    assert result["grown_mb"] < GROWN_MB
    assert result["rounds"] >= 4
    assert result["tracebacks"] == 0
