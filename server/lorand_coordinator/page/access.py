"""Who may see the page (pure): anybody on this machine, or whoever has the operator's link."""

import secrets
from contextlib import suppress
from dataclasses import dataclass
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Final

from lorand import durable, transport
from lorand.errors import ConfigError

COOKIE: Final = "lorand_page"
FEWEST_CHARACTERS: Final = 20


@dataclass(frozen=True)
class Gate:
    """What a request must show. Without a token it must come by an address of this machine."""

    token: str = ""
    cookie: str = COOKIE
    """The name of the cookie that holds the token."""

    def refusal(self, host: str, *, cookie: str = "", bearer: str = "", link: str = "") -> str:
        """Return why a request is refused, with what to do; empty: it is let in.

        `host` is the Host header, which on a page without a token must be this machine's own: a
        name that somebody else's server resolved to 127.0.0.1 would let that server's page in.
        """
        if self.token:
            shown = (_value(cookie, self.cookie), bearer.removeprefix("Bearer ").strip(), link)
            if any(secrets.compare_digest(self.token.encode(), each.encode()) for each in shown):
                return ""
            return "This page is for who has the operator's link, which `serve --page` printed."
        if _is_loopback(host):
            return ""
        return "This page is for this machine alone: open it by 127.0.0.1 or localhost."


def token_at(path: Path) -> str:
    """Return the token in a file, made there if need be. Raises ConfigError."""
    try:
        with suppress(FileExistsError):
            durable.create(path, secrets.token_urlsafe(24).encode())
        token = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"cannot read or write the page's token, {path}: {error}") from error
    if len(token) < FEWEST_CHARACTERS:
        raise ConfigError(f"{path} holds no token: remove it, and a new one is made")
    return token


def _value(header: str, name: str) -> str:
    try:
        found = SimpleCookie(header).get(name)
    except CookieError:
        return ""
    return "" if found is None else found.value


def _is_loopback(host: str) -> bool:
    bare = host if host.endswith("]") or ":" not in host else host.rpartition(":")[0]
    return transport.is_loopback(bare.removeprefix("[").removesuffix("]"))
