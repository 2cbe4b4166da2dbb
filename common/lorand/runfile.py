"""Changing a value in the text of a run file; comments stay where they stood."""

import json
import re
from collections.abc import Mapping
from typing import Any

from lorand.errors import ConfigError

_HEADER = r"^[ \t]*\[{section}\][ \t]*(?:#[^\n]*)?$"
_ENTRY = r"^[ \t]*{key}[ \t]*=[ \t]*(?P<value>\[[^\]]*\]|\"[^\"\n]*\"|'[^'\n]*'|[^#\n\"'\[]*?)"
_REST = r"(?P<gap>[ \t]*)(?P<comment>#[^\n]*)?$"


def literal(value: Any) -> str:
    """Return a string, number, boolean or list of these as TOML (their JSON is)."""
    return json.dumps(list(value) if isinstance(value, tuple) else value)


def with_value(text: str, section: str, key: str, value: Any) -> str:
    """Return the text with `key = value` in a section; a missing key or section is added.

    Raises ConfigError where the key is written in a way that is not understood here (in an inline
    table, or as a text over several lines).

    >>> with_value("[run]\\nrounds = 5    # until the end\\n", "run", "rounds", 12)
    '[run]\\nrounds = 12   # until the end\\n'
    >>> with_value("[run]\\nrounds = 5\\n", "run", "name", "a")
    '[run]\\nname = "a"\\nrounds = 5\\n'
    """
    line = f"{key} = {literal(value)}"
    header = re.search(_HEADER.format(section=re.escape(section)), text, re.M)
    if header is None:
        if re.search(rf"^[ \t]*{re.escape(section)}[ \t]*[.=]", text, re.M):
            raise ConfigError(f"set {section}.{key} = {literal(value)} in the run file by hand")
        return f"{text.rstrip()}\n\n[{section}]\n{line}\n"
    start = header.end()
    following = re.search(r"^[ \t]*\[[^\]\n]+\]", text[start:], re.M)
    end = start + following.start() if following else len(text)
    body = text[start:end]
    found = re.search(_ENTRY.format(key=re.escape(key)) + _REST, body, re.M)
    if found is None:
        if re.search(rf"^[ \t]*[\"']?{re.escape(key)}[\"']?[ \t]*=", body, re.M):
            raise ConfigError(f"set {section}.{key} = {literal(value)} in the run file by hand")
        return f"{text[:start]}\n{line}{body}{text[end:]}"
    old = found.group().removesuffix(found["comment"] or "")
    new = line.ljust(len(old)) + found["comment"] if found["comment"] else line
    if found["comment"] and not new.startswith(line + " "):
        new = f"{line}  {found['comment']}"
    return text[:start] + body[: found.start()] + new + body[found.end() :] + text[end:]


def with_values(text: str, changes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the text with the values of several sections. Raises ConfigError."""
    for section, values in changes.items():
        for key, value in values.items():
            text = with_value(text, section, key, value)
    return text


def lines(changes: Mapping[str, Mapping[str, Any]]) -> str:
    """Return values as the lines of a run file, section by section."""
    return "\n".join(
        "\n".join([f"[{section}]", *(f"{key} = {literal(v)}" for key, v in values.items())])
        for section, values in changes.items()
    )
