"""Models of a hub, here on loopback: downloaded, from the local cache, gated, and not there."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tests import fake_hub, tiny

from lorand.config import ModelSection, RunConfig
from lorand.errors import ConfigError, ModelError
from lorand_worker import hugging_face, model, preparing, pretrained
from lorand_worker.model import LoadedModel


class Notes(list[str]):
    """A reporter that keeps what it is told."""

    def note(self, text: str) -> None:
        """See Reporter."""
        self.append(text)

    def progress(self, committed: int, total: int, text: str) -> None:
        """See Reporter."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[fake_hub.Hub]:
    """The hub; the libraries keep its address, so that it stays where it is."""
    with fake_hub.serving(fake_hub.Hub(tmp_path_factory.mktemp("hub"))) as served:
        yield served


@pytest.fixture
def cache(place: fake_hub.Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty local cache of this hub, which has nothing."""
    import huggingface_hub.hf_api

    template = place.address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", place.address)
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", place.address)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hugging_face, "getproxies", dict)
    place.asked.clear()
    return tmp_path / "cache"


@pytest.fixture
def hub(
    place: fake_hub.Hub,
    cache: Path,
    tmp_path: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> fake_hub.Hub:
    """The hub with the tiny model."""
    folder = Path(shutil.copytree(tiny_model, tmp_path / "repository"))
    monkeypatch.setattr(place, "folder", folder)
    monkeypatch.setattr(place, "gated", False)
    return place


def go_away(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the hub look as if it were away."""

    def refused(*_: object) -> None:
        raise ConnectionRefusedError

    monkeypatch.setattr("lorand_worker.hugging_face.socket.create_connection", refused)


def loaded(name: str = fake_hub.NAME, revision: str = "main") -> LoadedModel:
    """A model by its name."""
    return model.load(ModelSection(name=name, revision=revision), 2)


@pytest.mark.slow
def test_a_model_is_downloaded_once_and_then_also_there_without_the_hub(
    hub: fake_hub.Hub,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    expected = model.base_digest(model.load(ModelSection(name="x"), 2, tiny_model).module)
    assert model.base_digest(loaded().module) == expected
    assert any(path.endswith("/model.safetensors") for path in hub.asked)
    hub.asked.clear()
    go_away(monkeypatch)
    monkeypatch.setattr("lorand_worker.hugging_face.log.propagate", True)
    with caplog.at_level(logging.INFO, "lorand"):
        assert model.base_digest(loaded().module) == expected
    assert "the hub is not reached: of owner/tiny the local cache is used" in caplog.messages
    import huggingface_hub

    assert not huggingface_hub.constants.HF_HUB_OFFLINE, "it may be back the next time"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert model.base_digest(loaded(revision=fake_hub.COMMIT).module) == expected
    assert hub.asked == []


@pytest.mark.parametrize(
    ("offline", "sentence"),
    [
        (
            False,
            r"the hub cannot be reached, and not all of the model 'owner/tiny' is in the local",
        ),
        (True, r"HF_HUB_OFFLINE is set, and not all of .* unset it once where there is a network"),
    ],
)
def test_neither_hub_nor_cache(
    cache: Path, monkeypatch: pytest.MonkeyPatch, offline: bool, sentence: str
) -> None:
    go_away(monkeypatch)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
    with pytest.raises(ModelError, match=sentence) as caught:
        loaded()
    assert str(cache) in str(caught.value)
    assert "`--model FOLDER`" in str(caught.value)


def test_a_gated_model(hub: fake_hub.Hub) -> None:
    hub.gated = True
    with pytest.raises(
        ModelError, match=r"'owner/tiny' is gated: ask for access .*`hf auth login`"
    ):
        loaded()


def test_a_model_that_is_not_there(hub: fake_hub.Hub) -> None:
    with pytest.raises(ModelError, match=r"the hub knows no model 'owner/none', or it is private"):
        loaded("owner/none")


def test_a_revision_that_is_not_there(hub: fake_hub.Hub) -> None:
    with pytest.raises(ModelError, match=r"no such revision: set model\.revision in the run file"):
        loaded(revision="v9")


@pytest.mark.slow
def test_a_model_without_safetensors(hub: fake_hub.Hub) -> None:
    """Neither opened nor converted by somebody else."""
    weights = hub.folder / "model.safetensors"
    torch.save(load_file(weights), hub.folder / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ModelError, match=r"has no weights as safetensors .* can run code"):
        loaded()
    assert not any("pytorch_model.bin" in path for path in hub.asked)


def test_other_failures_are_not_the_hubs() -> None:
    assert hugging_face.trouble(ValueError("the file is cut off"), "a", "model") is None
    assert hugging_face.first_line(ValueError("\n")) == "ValueError"


def test_a_data_set_that_is_gated_or_away(cache: Path) -> None:
    gated = FileNotFoundError("Dataset 'o/n' is a gated dataset on the Hub.")
    text = hugging_face.trouble(gated, "o/n", "data set")
    assert text is not None
    assert "the data set 'o/n' is gated" in text
    assert text.endswith("or give a file with --data")
    text = hugging_face.trouble(ConnectionError("Couldn't reach 'o/n'"), "o/n", "data set")
    assert text is not None
    assert text.startswith("the hub cannot be reached, and not all of the data set 'o/n' is in")


# ------------------------------------------------------------- the commit in the run file


@pytest.mark.slow
def test_the_commit_is_pinned(hub: fake_hub.Hub, tmp_path: Path) -> None:
    run = tmp_path / "run.toml"
    content: dict[str, Any] = tiny.settings("spsa", model={"name": fake_hub.NAME})
    run.write_text(tiny.to_toml(content), encoding="utf-8")
    config = RunConfig.parse(run.read_text(encoding="utf-8"))
    assert pretrained.commit(config.model, None) is None, "it was not loaded"
    loaded()
    told = Notes()
    preparing.pin(run, config, None, told, wanted=False)
    assert told == [
        f"'main' of owner/tiny is the commit {fake_hub.COMMIT}: --pin puts that into the run file, "
        "for the day when it is another one"
    ]
    preparing.pin(run, config, None, told, wanted=True)
    pinned = RunConfig.parse(run.read_text(encoding="utf-8"))
    assert pinned.model == config.model.model_copy(update={"revision": fake_hub.COMMIT})
    told.clear()
    preparing.pin(run, pinned, None, told, wanted=True)
    assert told == []


def test_a_folder_has_no_commit(tmp_path: Path, tiny_model: Path) -> None:
    config = tiny.config("spsa")
    preparing.pin(tmp_path / "run.toml", config, tiny_model, Notes(), wanted=False)
    with pytest.raises(ConfigError, match=r"--pin: .* is a folder, which has no commits"):
        preparing.pin(tmp_path / "run.toml", config, tiny_model, Notes(), wanted=True)
