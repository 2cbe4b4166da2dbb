"""Commands in the documentation are those that there are, with their options."""

import re
import shlex
from pathlib import Path
from typing import Any, Final

import pytest
import typer

from lorand_coordinator import cli as coordinator
from lorand_worker import cli as worker
from lorand_worker.flags import with_optional_value

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = [
    str(page.relative_to(ROOT))
    for page in [
        ROOT / "README.md",
        *sorted([*ROOT.glob("docs/**/*.md"), *ROOT.glob("examples/**/*.md")]),
    ]
]
APPS: Final = {"lr-coordinator": coordinator.app, "lr-worker": worker.app}


def commands(text: str) -> list[list[str]]:
    """Command lines of a page's blocks of code; a comment ends one."""
    blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    blocks += ["\n".join(re.findall(r"^    (.*)$", text, re.MULTILINE))]
    lines = [line.strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith(tuple(APPS))]


def check(words: list[str]) -> None:
    """Parse as the program does, without running: what is unknown, lacking or malformed fails."""
    program, *rest = with_optional_value(words, "--seed-pool", "any")
    command: Any = typer.main.get_command(APPS[program])
    while hasattr(command, "commands"):
        assert rest[0] in command.commands, f"{program} has no command {rest[0]}"
        command, rest = command.commands[rest[0]], rest[1:]
    command.make_context(program, list(rest))


@pytest.mark.parametrize("page", PAGES)
def test_documented_commands_can_be_given(page: str) -> None:
    for words in commands((ROOT / page).read_text(encoding="utf-8")):
        try:
            check(words)
        except Exception as error:
            raise AssertionError(f"{page}: {shlex.join(words)}: {error}") from error


def test_the_pages_hold_commands_and_the_check_can_fail() -> None:
    assert sum(len(commands((ROOT / page).read_text(encoding="utf-8"))) for page in PAGES) > 40
    for wrong in ("lr-worker join HOST:1 --dta x", "lr-coordinator srve run.toml"):
        with pytest.raises(Exception, match=r"dta|srve"):
            check(shlex.split(wrong))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", text):
        assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
