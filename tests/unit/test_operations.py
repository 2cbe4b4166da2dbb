"""docs/operations.md says what the code does: its limits, its alarms, its commands."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from lorand import transport
from lorand.config import ServiceSection
from lorand_coordinator import limits, service
from lorand_coordinator.identity import enrolment

ROOT: Final = Path(__file__).resolve().parents[2]
PAGE: Final = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
WORDS: Final = " ".join(PAGE.split())
ALARMS: Final = frozenset({"warning", "error", "exception", "critical"})
FROM_ELSEWHERE: Final = {
    "standby.py": ["… epoch …", "… the database …"],
    "floor.py": ["…% of this worker's loss differences are below …"],
}
"""Files that log a sentence as it is, and the lines of the page that stand for it."""


def section(title: str) -> str:
    """Return a section of the page."""
    return PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]


def test_the_table_of_limits_is_the_codes() -> None:
    rows = dict(re.findall(r"^\| `([\w.]+)` \| (\d+) \|", section("Limits"), re.MULTILINE))
    defaults = ServiceSection().model_dump()
    for name, told in rows.items():
        if name.startswith("service."):
            assert float(told) == defaults[name.removeprefix("service.")], name
            continue
        found = [getattr(m, name) for m in MODULES if hasattr(m, name)]
        assert found, f"{name} is nowhere"
        assert {float(value) for value in found} == {float(told)}, name
    constants = {n for n in vars(limits) if n.isupper()} - {"ROUNDING"}
    assert constants <= rows.keys(), "a limit that the page does not tell of"
    numbers = {n for n, _ in transport.bounds(1, 1)}
    assert len(numbers) == 10, "an option that bounds strangers: is it in the table?"


MODULES: Final = (limits, transport, service, enrolment)


def alarms() -> Iterator[tuple[Path, str]]:
    """Every text that is logged as a warning or worse, with its file."""
    for part in ("server", "client", "common"):
        for path in sorted((ROOT / part).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and isinstance(node.func, ast.Attribute)
                    and node.func.attr in ALARMS
                    and isinstance(node.func.value, ast.Name)
                    and node.func.value.id.lstrip("_") in ("log", "logger", "logging")
                ):
                    assert isinstance(node.args[0], ast.Constant), f"{path}: {ast.unparse(node)}"
                    yield path, str(node.args[0].value)


def test_every_alarm_is_explained() -> None:
    found = list(alarms())
    assert len(found) > 15, "the walk misses some"
    for path, text in found:
        if text == "%s":
            told = FROM_ELSEWHERE[path.name]
        else:
            head, dot, _ = re.sub(r"%(\.\d)?[sdf]", "…", text).partition("instead. ")
            told = [f"{head}{dot}".strip()]
        for line in told:
            assert f"`{line}" in WORDS, f"{path.name}: {line}"
