"""Adapters on the hub: what is pushed is what is loaded, by the hub's own client on loopback."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from tests import local_hub
from tests.runs import IDENTITY, config_of, history

import lorand
from lorand import adapter, ledger
from lorand.adapter import Adapter
from lorand.card import Facts
from lorand.errors import ModelError
from lorand_api import hub as hubs

constants = pytest.importorskip("huggingface_hub.constants")
NAME = "clinic/reviews"


@pytest.fixture
def made() -> Adapter:
    return adapter.of(ledger.replay(history(config_of(), rounds=4)))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[local_hub.Hub]:
    with local_hub.serving() as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.endpoint)
        template = found.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield found


def test_what_is_pushed_is_loaded(hub: local_hub.Hub, made: Adapter, tmp_path: Path) -> None:
    url = lorand.push_to_hub(made, NAME, token="hf_test", facts=Facts("60 sentences"))
    assert url.startswith(f"{hub.endpoint}/{NAME}/commit/")
    assert set(hub.files[NAME]) == {"adapter.safetensors", "adapter_config.json", "README.md"}
    card = hub.files[NAME]["README.md"].decode()
    assert made.head.hex() in card
    assert "60 sentences" in card
    found = adapter.load(hubs.folder_of(NAME))
    assert found.coefficients.tolist() == made.coefficients.tolist()
    assert (found.identity, found.head) == (IDENTITY, made.head)
    adapter.save(made, tmp_path / "folder")
    assert lorand.push_to_hub(tmp_path / "folder", NAME, token="hf_test")


def test_what_is_not_there_says_what_to_do(hub: local_hub.Hub, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"no folder clinic/none, and the hub gives no repository"):
        hubs.folder_of("clinic/none")
    with pytest.raises(ModelError, match="holds no readable adapter"):
        adapter.load(hubs.folder_of(tmp_path / "none"))


def test_a_hub_that_refuses_says_what_to_do(hub: local_hub.Hub, made: Adapter) -> None:
    with pytest.raises(ModelError, match=r"the hub did not take 'one/two/three'"):
        lorand.push_to_hub(made, "one/two/three", token="hf_test")
