"""What all simulations have in common."""

import os

import pytest


@pytest.fixture(autouse=True)
def no_power_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers' processes end here, their machines do not: what they keep need not reach the disk.

    The coordinator's disk is simulated (disk.py).
    """
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
