"""Adapters on the Hugging Face hub: two small files and a card."""

import re
import tempfile
from pathlib import Path
from typing import Any, Final

from lorand import adapter as adapters
from lorand import card
from lorand.adapter import CONFIG_FILE, WEIGHTS_FILE, Adapter
from lorand.errors import ModelError

_NAME: Final = re.compile(r"^[\w.-]+/[\w.-]+$")


def folder_of(source: Path | str, revision: str | None = None) -> Path:
    """Return the folder of an adapter: itself, or where the hub's files are put.

    Raises ModelError.
    """
    if Path(source).exists() or not _NAME.match(str(source)):
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        found = snapshot_download(
            str(source), revision=revision, allow_patterns=[CONFIG_FILE, WEIGHTS_FILE]
        )
    except Exception as error:  # the library raises many kinds for one cause: it is not there
        raise ModelError(
            f"there is no folder {source}, and the hub gives no repository of that name "
            f"({_first_line(error)}); check the name, `hf auth login` for a private one, and "
            "HF_HUB_OFFLINE"
        ) from error
    return Path(found)


def push_to_hub(
    adapter: Adapter | Path | str,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    facts: card.Facts | None = None,
    message: str = "Upload a LoRand adapter",
) -> str:
    """Write an adapter with a card to a repository of the hub, made if need be; return its address.

    `facts` is what the card may say beside what the adapter tells. Raises ModelError.
    """
    from huggingface_hub import HfApi

    found = adapter if isinstance(adapter, Adapter) else adapters.load(Path(adapter))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        adapters.save(found, folder)
        card.write(found, facts or card.Facts(), folder, merged=False)
        api: Any = HfApi(token=token)
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id, folder_path=str(folder), commit_message=message
            )
        except Exception as error:
            raise ModelError(
                f"the hub did not take {repo_id!r} ({_first_line(error)}); check the name, and "
                "that `hf auth login` or token = gives a token that may write"
            ) from error
    return str(done.commit_url)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
