"""What goes wrong between this machine and the Hugging Face hub, and what to do about it.

The libraries wrap one failure in several others, and differ in which: causes are told apart by the
names of all of them.
"""

import logging
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

What = Literal["model", "data set"]

ANSWER_S: Final = 5.0
"""How long the hub may take to be reached, before its local cache is used alone."""
log = logging.getLogger("lorand")

_AWAY = frozenset(
    {
        *("ConnectError", "ConnectTimeout", "ReadTimeout", "TimeoutException", "ProxyError"),
        *("ConnectionError", "MaxRetryError", "LocalEntryNotFoundError", "OfflineModeIsEnabled"),
    }
)


@contextmanager
def cached_where_away(name: str) -> Iterator[None]:
    """Have the hub's libraries use their local cache alone while the hub is away.

    They would ask again and again, for a minute or so, and then do the same.
    """
    from huggingface_hub import constants

    if Path(name).is_dir() or constants.HF_HUB_OFFLINE or getproxies() or _answers(constants):
        yield
        return
    log.info("the hub is not reached: of %s the local cache is used", name)
    switches: list[Any] = [constants]
    if "datasets" in sys.modules:  # it has a copy
        switches.append(sys.modules["datasets"].config)
    for switch in switches:
        switch.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        for switch in switches:
            switch.HF_HUB_OFFLINE = False


def _answers(constants: Any) -> bool:
    place = urlsplit(constants.ENDPOINT)
    port = place.port or (80 if place.scheme == "http" else 443)
    try:
        socket.create_connection((place.hostname or "", port), ANSWER_S).close()
    except OSError:
        return False
    return True


def trouble(error: BaseException, name: str, what: What) -> str | None:
    """Return what is wrong with a model or data set of the hub; None: it is something else."""
    chain = list(_chain(error))
    kinds = {kind.__name__ for each in chain for kind in type(each).__mro__}
    said = " ".join(str(each) for each in chain)
    if "GatedRepoError" in kinds or "gated dataset" in said:
        return (
            f"the {what} {name!r} is gated: ask for access on its page of the hub, then log in "
            f"here with `hf auth login`, or set HF_TOKEN{_or_copy(what)}"
        )
    if "RevisionNotFoundError" in kinds or "Revision '" in said:
        return (
            f"the {what} {name!r} has no such revision: "
            + ("set model.revision in the run file to" if what == "model" else "write after @")
            + " a branch, a tag or a commit of it"
        )
    if "RepositoryNotFoundError" in kinds or "DatasetNotFoundError" in kinds:
        return (
            f"the hub knows no {what} {name!r}, or it is private: check the name, and for a "
            f"private one log in with `hf auth login`, or set HF_TOKEN{_or_copy(what)}"
        )
    if kinds & _AWAY:
        return _away(name, what)
    return None


def first_line(error: BaseException) -> str:
    """Return the beginning of what an error says."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _away(name: str, what: What) -> str:
    from huggingface_hub import constants

    place = f"and not all of the {what} {name!r} is in the local cache ({constants.HF_HUB_CACHE})"
    if constants.HF_HUB_OFFLINE:
        return (
            f"HF_HUB_OFFLINE is set, {place}: unset it once where there is a network"
            f"{_or_copy(what)}"
        )
    return (
        f"the hub cannot be reached, {place}: check the network, and HTTPS_PROXY where there is a "
        f"proxy{_or_copy(what)}"
    )


def _or_copy(what: What) -> str:
    if what == "model":
        return "; or give a local copy with `--model FOLDER`"
    return "; or give a file with --data"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error and what it came of, also where that was not to be shown."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
