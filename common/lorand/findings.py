"""What checks before a run find: `lr-worker doctor` and `lr-coordinator preflight`.

A check is a function of what is examined that returns a Finding; None where there is nothing to
examine. Tables of named checks are gone through to their end, whatever any of them finds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from lorand.errors import LorandError


class Level(StrEnum):
    """How a finding is meant."""

    OK = "ok"
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True)
class Finding:
    """One sentence or two: what is so, and what to do unless that is as it should be."""

    level: Level
    text: str
    check: str = ""


T = TypeVar("T")
Check = Callable[[T], Finding | None]


def ok(text: str) -> Finding:
    """Return a finding of something that is as it should be."""
    return Finding(Level.OK, text)


def warning(text: str) -> Finding:
    """Return a finding of something that may be wrong."""
    return Finding(Level.WARNING, text)


def failed(text: str) -> Finding:
    """Return a finding of something that a run will not do with."""
    return Finding(Level.FAILED, text)


def go_through(checks: Sequence[tuple[str, Check[T]]], examined: T) -> list[Finding]:
    """Return what the checks of a table find; a check that raises LorandError has failed."""
    found = []
    for name, check in checks:
        try:
            finding = check(examined)
        except LorandError as error:
            finding = failed(str(error))
        except ImportError as error:
            finding = failed(f"{error.name} is not installed")
        if finding is not None:
            found.append(Finding(finding.level, finding.text, name))
    return found


def exit_code(found: Sequence[Finding]) -> int:
    """Return 1 if a check failed, else 0."""
    return int(any(finding.level == Level.FAILED for finding in found))


def as_dict(found: Sequence[Finding]) -> dict[str, Any]:
    """Return findings for scripts."""
    lines = [{"check": f.check, "level": f.level.value, "text": f.text} for f in found]
    return {"ok": exit_code(found) == 0, "findings": lines}


def text(found: Sequence[Finding]) -> str:
    """Return findings for people, one a line, and how many of each kind."""
    width = max((len(finding.check) for finding in found), default=0)
    lines = [f"{f.level:<8}{f.check:<{width}}  {f.text}" for f in found]
    counts = {level: sum(f.level == level for f in found) for level in Level}
    return "\n".join([*lines, ", ".join(f"{count} {level}" for level, count in counts.items())])
