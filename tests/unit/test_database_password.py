"""The database's password, as a mounted secret gives it."""

from pathlib import Path
from typing import Any

import psycopg
import pytest

from lorand.errors import ConfigError
from lorand_coordinator import postgres
from lorand_coordinator.store import StoreUnavailable


def no_preparation(connection: postgres.Connection) -> None:
    """What a connection needs that is never made."""


def connect(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the password that a session would connect with."""
    given: list[Any] = []

    def refuse(*_: object, **settings: object) -> None:
        given.append(settings["password"])
        raise psycopg.OperationalError("no server here")

    monkeypatch.setattr(postgres.Connection, "connect", refuse)
    session = postgres.Session("postgresql://lorand@database/lorand", no_preparation)
    with pytest.raises(StoreUnavailable), session.use():
        pass
    return given[0]


def test_it_is_read_from_the_file_that_the_environment_names(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text("correct horse\n", encoding="utf-8")
    monkeypatch.setenv(postgres.PASSWORD_FILE, str(tmp_path / "password"))
    assert connect(monkeypatch) == "correct horse"
    monkeypatch.delenv(postgres.PASSWORD_FILE)
    assert connect(monkeypatch) is None, "libpq finds it by itself"


def test_a_file_that_cannot_be_read_is_told_and_not_tried_again(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(postgres.PASSWORD_FILE, str(tmp_path / "missing"))
    session = postgres.Session("postgresql://lorand@database/lorand", no_preparation)
    with pytest.raises(ConfigError, match="cannot read the database's password"), session.use():
        pass
