"""Where a worker keeps its weights, by what is free."""

from pathlib import Path

import pytest
import torch

from lorand_worker.memory import Weights, choose, fits, free_bytes

GB = 1 << 30


def machine(root: Path, files: dict[str, str]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize("asked", [Weights.COPY, Weights.LAYERWISE])
def test_the_owner_is_obeyed(asked: Weights) -> None:
    for free in (None, 0, 100 * GB):
        assert choose(asked, quantised=True, needed_bytes=GB, free=free)[0] == asked


@pytest.mark.parametrize(
    ("quantised", "needed", "free", "expected", "why"),
    [
        (True, 1, 100 * GB, Weights.LAYERWISE, "since the run's base model is quantised"),
        (False, 8 * GB, 10 * GB, Weights.COPY, "weights: copy"),
        (False, 9 * GB, 10 * GB, Weights.LAYERWISE, "a copy needs 9.7 GB"),
        (False, 900 * GB, None, Weights.COPY, "weights: copy"),
    ],
)
def test_auto(quantised: bool, needed: int, free: int | None, expected: Weights, why: str) -> None:
    chosen, sentence = choose(Weights.AUTO, quantised=quantised, needed_bytes=needed, free=free)
    assert chosen == expected
    assert why in sentence
    assert quantised or fits(needed, free) == (expected == Weights.COPY)


def test_free_memory_is_what_system_and_container_both_leave(tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert free_bytes(cpu, tmp_path / "elsewhere") is None
    machine(tmp_path, {"proc/meminfo": "MemTotal: 9 kB\nMemAvailable:   2097152 kB\n"})
    assert free_bytes(cpu, tmp_path) == 2 * GB
    group = "sys/fs/cgroup/memory."
    machine(tmp_path, {f"{group}max": "max\n", f"{group}current": "5", f"{group}stat": ""})
    assert free_bytes(cpu, tmp_path) == 2 * GB, "a container without a limit"
    stat = "anon 5\ninactive_file 1000\nactive_file 24\n"
    machine(tmp_path, {f"{group}max": str(GB), f"{group}current": "5000", f"{group}stat": stat})
    assert free_bytes(cpu, tmp_path) == GB - 5000 + 1024


def test_other_devices_do_not_say() -> None:
    assert free_bytes(torch.device("meta")) is None
