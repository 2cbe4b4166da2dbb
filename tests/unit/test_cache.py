"""What is kept comes back as it was, limits hold, and a bad disk loses nothing but time."""

import gc
import io
import os
import stat
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lorand_worker import cache
from lorand_worker.cache import Limits, TensorCache


def states(key: int, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Some tensor, shape (rows, 6)."""
    return torch.arange(rows * 6).reshape(rows, 6).add(1000 * key).to(dtype)


SIZES = st.lists(st.integers(0, 30), max_size=20)


@given(sizes=SIZES, memory=st.integers(0, 3000), disk=st.integers(0, 3000))
def test_limits_hold_and_what_is_kept_is_what_was_put(
    sizes: list[int], memory: int, disk: int
) -> None:
    kept = TensorCache(Limits(memory, disk))
    put = [states(key, rows) for key, rows in enumerate(sizes)]
    for key, tensor in enumerate(put):
        kept.put(key, tensor)
        assert kept.memory_bytes <= memory
        assert kept.disk_bytes <= disk
        assert kept._file is None or os.fstat(kept._file.fileno()).st_size <= disk
    found = [kept.get(key) for key in range(len(put))]
    for tensor, here in zip(put, found, strict=True):
        assert here is None or torch.equal(here, tensor)
    assert sum(t.nbytes for t in found if t is not None) == kept.memory_bytes + kept.disk_bytes
    if sum(t.nbytes for t in put) <= max(memory, disk):
        assert all(here is not None for here in found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_disk_gives_back_the_same_bits(dtype: torch.dtype, tmp_path: Path) -> None:
    kept = TensorCache(Limits(0, 1 << 20, tmp_path))
    special = torch.tensor([[0.0, -0.0, float("inf"), float("nan"), 1e-40, -1.5]]).to(dtype)
    put = [special, states(1, 7, dtype), states(2, 9, dtype).T]
    for key, tensor in enumerate(put):
        kept.put(key, tensor)
    assert kept.memory_bytes == 0
    assert kept.disk_bytes == sum(tensor.nbytes for tensor in put)
    for key in (2, 0, 1, 0):
        found = kept.get(key)
        assert found is not None
        assert found.dtype == dtype
        assert found.shape == put[key].shape
        bits = [t.contiguous().view(torch.uint8) for t in (found, put[key])]
        assert torch.equal(*bits)


def test_a_copy_is_kept_not_the_batch_it_was_part_of() -> None:
    kept = TensorCache(Limits(1 << 20, 0))
    batch = torch.ones(4, 6)
    kept.put(0, batch[1])
    batch.zero_()
    found = kept.get(0)
    assert found is not None
    assert found.sum() == 6
    assert found.untyped_storage().nbytes() == 24


@pytest.mark.skipif(os.name != "posix", reason="modes and links are POSIX's")
def test_the_file_is_private_and_gone_with_its_cache(tmp_path: Path) -> None:
    kept = TensorCache(Limits(0, 1 << 20, tmp_path))
    assert not list(tmp_path.iterdir())
    kept.put(0, states(0, 5))
    assert kept._file is not None
    file = kept._file
    status = os.fstat(file.fileno())
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert status.st_nlink == 0, "no name: the system frees it even when the worker is killed"
    assert not list(tmp_path.iterdir())
    del kept
    gc.collect()
    assert file.closed


def test_without_a_limit_for_disk_none_is_used(tmp_path: Path) -> None:
    kept = TensorCache(Limits(0, 0, tmp_path))
    kept.put(0, states(0, 5))
    assert kept.get(0) is None
    assert kept._file is None


def test_a_folder_that_is_not_there_is_said_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for disk in (None, 1 << 20):
        caplog.clear()
        kept = TensorCache(Limits(0, disk, tmp_path / "gone"))
        for key in range(3):
            kept.put(key, states(key, 5))
            assert kept.get(key) is None
        assert len(caplog.messages) == 1
        assert "--cache-dir" in caplog.messages[0]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's full device")
def test_a_full_disk_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(cache, "_nameless_file", lambda folder: io.FileIO("/dev/full", "r+"))
    kept = TensorCache(Limits(150, 1 << 20))
    for key in range(4):
        kept.put(key, states(key, 5))
    said = [record for record in caplog.records if record.name == cache.__name__]
    assert len(said) == 1
    assert "No space left" in said[0].getMessage()
    first = kept.get(0)
    assert first is not None
    assert torch.equal(first, states(0, 5)), "memory goes on"
    assert [kept.get(key) for key in (1, 2, 3)] == [None] * 3


def test_a_disk_that_fills_up_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """A write that goes in half is no write."""
    kept = TensorCache(Limits(0, 1 << 20))
    kept.put(0, states(0, 5))
    assert kept._file is not None

    class Half(io.FileIO):
        def write(self, content: object) -> int:
            return 7

    half = Half(os.dup(kept._file.fileno()), "r+")
    monkeypatch.setattr(kept, "_file", half)
    kept.put(1, states(1, 5))
    found = kept.get(0)
    assert found is not None
    assert torch.equal(found, states(0, 5))
    assert kept.get(1) is None
    half.close()


def test_a_file_that_cannot_be_read_is_forgotten(caplog: pytest.LogCaptureFixture) -> None:
    kept = TensorCache(Limits(0, 1 << 20))
    for key in range(3):
        kept.put(key, states(key, 5))
    assert kept._file is not None
    os.ftruncate(kept._file.fileno(), 200)
    first = kept.get(0)
    assert first is not None
    assert torch.equal(first, states(0, 5))
    assert kept.get(2) is None
    assert kept.get(0) is None, "one error is enough"
    kept.put(3, states(3, 5))
    assert kept.get(3) is None
    assert len(caplog.messages) == 1


def test_default_limits_are_a_share_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "free_bytes", lambda device: 4000)
    kept = TensorCache(Limits(disk_bytes=0))
    kept.put(0, torch.zeros(1001, dtype=torch.uint8))
    assert kept.get(0) is None
    kept.put(1, torch.zeros(1000, dtype=torch.uint8))
    assert kept.get(1) is not None
    monkeypatch.setattr(cache, "free_bytes", lambda device: None)
    assert TensorCache(Limits())._memory_limit == cache.FALLBACK_MEMORY // cache.SHARE
