"""Seats of replicas: each member is taken once, for as long as its holder lives."""

import os
from pathlib import Path

import pytest
from deploy.worker import seat

from lorand.errors import ConfigError
from lorand.invitation import Invitation


def invite(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        line = Invitation("coordinator:7701", name, "t" * 43, "0" * 64).line()
        (folder / name).write_text(f"{line}\n", encoding="utf-8")
    return folder


def test_replicas_take_different_seats_and_the_last_is_told(tmp_path: Path) -> None:
    invitations = invite(tmp_path / "invitations", "bars", "hotels")
    taken = [seat.take(invitations, tmp_path / "state") for _ in range(2)]
    assert [each.name for each in taken] == ["bars", "hotels"]
    with pytest.raises(ConfigError, match="taken by another replica \\(bars, hotels\\)"):
        seat.take(invitations, tmp_path / "state")
    os.close(taken[0].lock)  # as its process ends
    assert seat.take(invitations, tmp_path / "state").name == "bars"


def test_an_invitation_may_be_a_file_and_half_written_ones_are_not_read(tmp_path: Path) -> None:
    invitations = invite(tmp_path / "invitations", "hotels")
    (invitations / "bars.partial").write_text("lorand:", encoding="utf-8")
    assert seat.take(invitations, tmp_path / "one").name == "hotels"
    assert seat.take(invitations / "hotels", tmp_path / "two").name == "hotels"


def test_what_is_no_invitation_is_told(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no invitation"):
        seat.take(invite(tmp_path / "none"), tmp_path / "state")
    (tmp_path / "wrong").write_text("hello", encoding="utf-8")
    with pytest.raises(ConfigError, match="no invitation, or a part of one"):
        seat.take(tmp_path / "wrong", tmp_path / "state")
    with pytest.raises(ConfigError, match="cannot read the invitation"):
        seat.take(tmp_path / "missing", tmp_path / "state")


def test_the_command_is_of_the_seat(tmp_path: Path) -> None:
    invitations = invite(tmp_path / "invitations", "hotels")
    taken = seat.take(invitations, tmp_path / "state")
    assert not taken.enrolled()
    model = tmp_path / "model"
    given = seat.command(taken, "c:7700", "/data/NAME.csv", model, ["--threads=1"])
    assert given[:5] == ["lr-worker", "join", "c:7700", "--data", "/data/hotels.csv"]
    assert given[-1] == "--threads=1"
    assert str(tmp_path / "state" / "hotels" / "credentials.pem") in given
    assert "--model" not in given
    model.mkdir()
    (model / "config.json").write_text("{}", encoding="utf-8")
    assert "--model" in seat.command(taken, "c:7700", "/data/NAME.csv", model, [])


def test_health_checks_find_the_seat(tmp_path: Path) -> None:
    taken = seat.take(invite(tmp_path / "invitations", "hotels"), tmp_path / "state")
    for _ in range(2):  # a container that was started again has the link already
        seat.show(taken, tmp_path / "seat")
        assert (tmp_path / "seat").resolve() == taken.folder
