"""Who may see the page."""

from pathlib import Path

import pytest

from lorand.errors import ConfigError
from lorand_coordinator.page.access import COOKIE, Gate, token_at

TOKEN = "t" * 32


@pytest.mark.parametrize("host", ["127.0.0.1:7780", "localhost", "localhost:7780", "[::1]:7780"])
def test_this_machine_is_let_in(host: str) -> None:
    assert Gate().refusal(host) == ""


@pytest.mark.parametrize("host", ["", "evil.example", "evil.example:7780", "10.0.0.5:7780", "[::"])
def test_a_name_that_leads_here_is_not(host: str) -> None:
    """A page elsewhere whose name its owner points at 127.0.0.1 must not read this one."""
    assert "this machine alone" in Gate().refusal(host)


def test_a_token_is_shown_in_one_of_three_ways() -> None:
    gate = Gate(TOKEN)
    assert gate.refusal("any.example", link=TOKEN) == ""
    assert gate.refusal("any.example", bearer=f"Bearer {TOKEN}") == ""
    assert gate.refusal("any.example", cookie=f"other=1; {COOKIE}={TOKEN}") == ""


@pytest.mark.parametrize("shown", ["", "t", TOKEN + "t", "ü" * 32, "Bearer", ";;=;"])
def test_anything_else_is_refused(shown: str) -> None:
    gate = Gate(TOKEN)
    for why in (
        gate.refusal("127.0.0.1", link=shown),
        gate.refusal("127.0.0.1", bearer=shown),
        gate.refusal("127.0.0.1", cookie=shown),
        gate.refusal("127.0.0.1", cookie=f"{COOKIE}={shown}"),
    ):
        assert "operator's link" in why


def test_a_token_is_made_once_for_its_owners_eyes(tmp_path: Path) -> None:
    path = tmp_path / "small.page-token"
    token = token_at(path)
    assert len(token) >= 32
    assert token_at(path) == token
    assert path.stat().st_mode & 0o077 == 0
    path.write_text("short")
    with pytest.raises(ConfigError, match="holds no token: remove it"):
        token_at(path)
    with pytest.raises(ConfigError, match="cannot read or write the page's token"):
        token_at(path / "below-a-file")
