"""The kilobyte adapter: what is saved is what is loaded, and damage is noticed (DESIGN §1)."""

import json
import zlib
from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file
from tests.runs import IDENTITY, config_of, history

from lorand import adapter, ledger
from lorand.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from lorand.coefficients import Coefficients
from lorand.errors import LorandError, ModelError

CONFIG: Final = config_of()
HEAD: Final = bytes(range(32))


def adapter_of(coefficients: Coefficients) -> Adapter:
    config = config_of(directions={"pool_size": len(coefficients)})
    return Adapter(config, IDENTITY, coefficients, 7, HEAD)


def assert_same(a: Adapter, b: Adapter) -> None:
    assert a.coefficients.dtype == b.coefficients.dtype == np.int64
    assert a.coefficients.tolist() == b.coefficients.tolist()
    assert (a.identity, a.committed, a.head) == (b.identity, b.committed, b.head)
    assert a.config.canonical() == b.config.canonical()


# ------------------------------------------------------------- round trip


@pytest.mark.parametrize("extreme", [0, 2**31 - 1, -(2**31) + 1, 2**31, -(2**31), 2**61, -(2**61)])
def test_an_adapter_is_read_back_exactly(extreme: int, tmp_path: Path) -> None:
    """In 32 bits where they fit, else in 64; the reader sees no difference."""
    coefficients = np.arange(-32, 32, dtype=np.int64)
    coefficients[5] = extreme
    saved = adapter_of(coefficients)
    size = adapter.save(saved, tmp_path / "new" / "folder")
    assert size == (tmp_path / "new" / "folder" / WEIGHTS_FILE).stat().st_size
    assert_same(adapter.load(tmp_path / "new" / "folder"), saved)


def test_an_adapter_is_the_place_in_the_run_it_was_made_of(tmp_path: Path) -> None:
    position = ledger.replay(history(CONFIG, rounds=4))
    adapter.save(adapter.of(position), tmp_path)
    loaded = adapter.load(tmp_path)
    assert loaded.coefficients.tolist() == position.coefficients.tolist()
    assert (loaded.committed, loaded.head) == (3, position.head)
    assert loaded.config.digest() == position.config.digest()


def test_it_is_16_kilobytes_at_the_default_pool(tmp_path: Path) -> None:
    """DESIGN §1: 16 KB at K = 4096, header included below 17,000 bytes."""
    coefficients = np.random.default_rng(0).integers(-(2**30), 2**30, 4096, dtype=np.int64)
    size = adapter.save(adapter_of(coefficients), tmp_path)
    assert 4 * 4096 < size < 17_000


@pytest.mark.parametrize("size", [1024, 4096])
@pytest.mark.parametrize("largest", [1, 100, 2**40])
def test_it_is_smaller_where_nothing_is_lost(size: int, largest: int, tmp_path: Path) -> None:
    """Few directions moved: zlib of byte planes, which any reader of safetensors shows as bytes."""
    coefficients = np.zeros(size, np.int64)
    coefficients[:: size // 16] = np.arange(-8, 8) * largest
    saved = adapter_of(coefficients)
    assert adapter.save(saved, tmp_path) < 2 * size
    tensors = load_file(tmp_path / WEIGHTS_FILE)
    assert [tensor.dtype for tensor in tensors.values()] == [np.uint8]
    assert_same(adapter.load(tmp_path), saved)


def test_a_file_of_an_older_release_is_read(tmp_path: Path) -> None:
    saved = adapter_of(np.zeros(64, np.int64))
    adapter.save(saved, tmp_path)
    save_file({"coefficients": np.zeros(64, np.int32)}, tmp_path / WEIGHTS_FILE)
    path = tmp_path / CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    del content["coefficients_digest"]
    path.write_text(json.dumps(content), encoding="utf-8")
    assert_same(adapter.load(tmp_path), saved)


def test_saving_again_replaces(tmp_path: Path) -> None:
    for value in (1, 2**40, 3):
        saved = adapter_of(np.full(64, value, np.int64))
        adapter.save(saved, tmp_path)
        assert_same(adapter.load(tmp_path), saved)


def test_the_config_file_is_for_people_too(tmp_path: Path) -> None:
    adapter.save(adapter_of(np.zeros(64, np.int64)), tmp_path)
    content = json.loads((tmp_path / CONFIG_FILE).read_text(encoding="utf-8"))
    assert content["format"] == "lorand/adapter/v1"
    assert content["base_model"] == "some/model"
    assert content["labels"] == ["negative", "positive"]
    assert content["ledger_head"] == HEAD.hex()


# ------------------------------------------------------------- damage


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    adapter.save(adapter_of(np.arange(64, dtype=np.int64)), tmp_path)
    return tmp_path


def edit(folder: Path, **changes: Any) -> None:
    path = folder / CONFIG_FILE
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **changes}), encoding="utf-8")


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_missing_file_is_an_error_that_says_what_to_do(folder: Path, name: str) -> None:
    (folder / name).unlink()
    with pytest.raises(ModelError, match=r"holds no readable adapter .*lr-worker export"):
        adapter.load(folder)


@pytest.mark.parametrize("name", [CONFIG_FILE, WEIGHTS_FILE])
def test_a_cut_off_file_is_an_error(folder: Path, name: str) -> None:
    whole = (folder / name).read_bytes()
    for length in [0, 1, 7, 8, 9, len(whole) // 2, len(whole) - 1]:
        (folder / name).write_bytes(whole[:length])
        with pytest.raises(ModelError, match="holds no readable adapter"):
            adapter.load(folder)


@settings(
    deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_a_flipped_bit_of_the_config_is_our_error_or_harmless(
    folder: Path, data: st.DataObject
) -> None:
    """Never a traceback of somebody else's exception."""
    whole = (folder / CONFIG_FILE).read_bytes()
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    (folder / CONFIG_FILE).write_bytes(bytes(flipped))
    try:
        adapter.load(folder)
    except LorandError:
        pass
    finally:
        (folder / CONFIG_FILE).write_bytes(whole)


@pytest.mark.parametrize(
    "changes",
    [
        {"committed": "many"},
        {"ledger_head": "xyz"},
        {"identity": "?"},
        {"identity": {}},
        {"run": {}},
        {"run": "?"},
        {"format": None},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_setting_of_the_wrong_kind_is_our_error(folder: Path, changes: dict[str, Any]) -> None:
    edit(folder, **changes)
    with pytest.raises(LorandError):
        adapter.load(folder)


def test_files_of_two_adapters_are_noticed(folder: Path, tmp_path: Path) -> None:
    adapter.save(adapter_of(np.arange(64, dtype=np.int64)[::-1].copy()), tmp_path / "other")
    (folder / WEIGHTS_FILE).write_bytes((tmp_path / "other" / WEIGHTS_FILE).read_bytes())
    with pytest.raises(ModelError, match="take both files of one export"):
        adapter.load(folder)


@pytest.mark.parametrize("planes", [b"", bytes(64 * 4 - 1), bytes(64 * 4 + 1), bytes(1 << 24)])
def test_planes_of_another_length_are_refused(folder: Path, planes: bytes) -> None:
    """However many bytes they would inflate to."""
    packed = np.frombuffer(zlib.compress(planes), np.uint8)
    save_file({"coefficients_zlib_int32": packed}, folder / WEIGHTS_FILE)
    with pytest.raises(ModelError, match="do not fit their pool"):
        adapter.load(folder)


def test_planes_that_are_no_zlib_are_refused(folder: Path) -> None:
    save_file({"coefficients_zlib_int32": np.arange(9, dtype=np.uint8)}, folder / WEIGHTS_FILE)
    with pytest.raises(ModelError, match="holds no readable adapter"):
        adapter.load(folder)


def test_another_format_is_refused(folder: Path) -> None:
    edit(folder, format="lorand/adapter/v2")
    with pytest.raises(ModelError, match="has format 'lorand/adapter/v2', not"):
        adapter.load(folder)


def test_coefficients_of_another_pool_are_refused(folder: Path, tmp_path: Path) -> None:
    adapter.save(adapter_of(np.zeros(128, np.int64)), tmp_path / "other")
    (folder / WEIGHTS_FILE).write_bytes((tmp_path / "other" / WEIGHTS_FILE).read_bytes())
    with pytest.raises(ModelError, match="do not fit their pool"):
        adapter.load(folder)


def test_a_folder_that_cannot_be_written_is_our_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ModelError, match="cannot write the adapter"):
            adapter.save(adapter_of(np.zeros(64, np.int64)), folder)
