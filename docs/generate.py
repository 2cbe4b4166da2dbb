"""Write docs/reference from the code: commands, run file, protocol and Python interface.

    python docs/generate.py            # or `make docs`; a test compares what is committed

Every page is a function from code to Markdown, so that the test needs no files.
"""

import importlib
import inspect
import re
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import click
import typer
from pydantic.fields import FieldInfo

from lorand.config import RunConfig
from lorand_coordinator import cli as coordinator
from lorand_coordinator.presets import render
from lorand_worker import cli as worker

ROOT: Final = Path(__file__).resolve().parents[1]
PROTOCOL: Final = ROOT / "proto" / "lorand" / "v1"
GENERATED: Final = "<!-- Written by docs/generate.py: change the code, then run `make docs`. -->"
PUBLIC: Final = ("lorand_api", "lorand.wire_size")
"""Modules whose public names are the Python interface."""


def page(title: str, lines: Iterator[str]) -> str:
    """Return a page of the reference."""
    return "\n".join([f"# {title}", "", GENERATED, "", *lines]).rstrip() + "\n"


# -- commands --------------------------------------------------------------------------------------


def commands() -> str:
    """Return every command with its arguments and options."""

    def lines() -> Iterator[str]:
        for name, app in (("lr-coordinator", coordinator.app), ("lr-worker", worker.app)):
            yield f"## {name}"
            yield ""
            yield from _command([name], typer.main.get_command(app))

    return page("Commands", lines())


def _command(path: list[str], command: Any) -> Iterator[str]:
    """Yield a command and those below it, in the order in which --help lists them."""
    context = click.Context(command, info_name=path[-1])
    if hasattr(command, "commands"):
        if len(path) == 1:
            yield from [_plain(command.help), ""]
        for name, each in command.commands.items():
            yield from _command([*path, name], each)
        return
    usage = " ".join(piece for piece in command.collect_usage_pieces(context))
    yield from [f"### `{' '.join(path)} {usage}`", "", _plain(command.help), ""]
    rows = [record for each in command.params if (record := each.get_help_record(context))]
    if rows:
        yield from ["| | |", "|---|---|"]
        yield from [f"| `{_cell(names)}` | {_cell(_plain(text))} |" for names, text in rows]
        yield ""


def _plain(text: str | None) -> str:
    return re.sub(r"[ \t]*\n[ \t]*", "\n", inspect.cleandoc(text or "")).replace("\b", "")


def _cell(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", "\\|").strip()


# -- run file --------------------------------------------------------------------------------------


def run_file() -> str:
    """Return every setting of a run file: its type, what it is at first, and what it means."""
    said = _comments(render(""))

    def lines() -> Iterator[str]:
        yield "`lr-coordinator init` writes a file with all of them. Everything but `[service]` is"
        yield "the identity of the run: the same for all, and another value is another run."
        yield ""
        for section, field in RunConfig.model_fields.items():
            kind = field.annotation
            assert isinstance(kind, type)
            yield from [f"## [{section}]", "", _sentence(kind), ""]
            yield from ["| setting | type | default | |", "|---|---|---|---|"]
            for name, each in kind.model_fields.items():
                default = "required" if each.is_required() else f"`{_toml(each.default)}`"
                meaning = _cell(said.get((section, name), ""))
                yield f"| `{name}` | {_cell(_type(each))} | {default} | {meaning} |"
            yield ""

    return page("Run file", lines())


def _comments(template: str) -> dict[tuple[str, str], str]:
    """Return what the template says of each setting; a comment goes on below it, indented."""
    found: dict[tuple[str, str], str] = {}
    section, last = "", ("", "")
    for line in template.splitlines():
        if heading := re.match(r"\[(\w+)\]", line):
            section = heading[1]
        elif setting := re.match(r"(\w+) = .*?(?:\s#\s(.*))?$", line):
            last = section, setting[1]
            found[last] = setting[2] or ""
        elif more := re.match(r"\s{8,}#\s(.*)", line):
            found[last] += " " + more[1]
    return found


def _type(field: FieldInfo) -> str:
    limits = [
        f"{sign} {getattr(each, name)}"
        for each in field.metadata
        for name, sign in (("ge", "≥"), ("gt", ">"), ("le", "≤"), ("lt", "<"))
        if getattr(each, name, None) is not None
    ]
    return ", ".join([_name_of(field.annotation), *limits])


def _name_of(kind: Any) -> str:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return _name_of(arguments[0])
    if origin is typing.Literal:
        return ", ".join(f'"{each}"' for each in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_name_of(each) for each in arguments)
    if origin is tuple:
        return f"list of {_name_of(arguments[0])}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))


def _toml(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f'"{value}"'
    if isinstance(value, tuple):
        return "[" + ", ".join(_toml(each) for each in value) + "]"
    return str(value)


def _sentence(thing: object) -> str:
    return inspect.getdoc(thing) or ""


# -- protocol --------------------------------------------------------------------------------------


def protocol() -> str:
    """Return services, messages and fields with the comments of the .proto files."""

    def lines() -> Iterator[str]:
        yield "gRPC services of `lorand.v1`. Numbers of fields are never used again, and unknown"
        yield "fields are ignored, so that releases beside each other understand one another."
        yield ""
        for path in sorted(PROTOCOL.glob("*.proto")):
            yield from [f"## {path.name}", ""]
            yield from _proto(path.read_text(encoding="utf-8"))

    return page("Protocol", lines())


def _proto(text: str) -> Iterator[str]:
    comment: list[str] = []
    for raw in text.splitlines():
        line = raw.strip()
        if line.startswith("//"):
            comment.append(line.removeprefix("//").strip())
            continue
        said, comment = _cell(" ".join(comment)), []
        if block := re.match(r"(service|message|enum) (\w+)", line):
            yield from [f"### {block[1]} {block[2]}", "", said, "", "| | |", "|---|---|"]
            if line.endswith("{}"):
                yield ""
        elif call := re.match(r"rpc (\w+)\((stream )?(\w+)\) returns \((stream )?(\w+)\)", line):
            takes, gives = (call[2] or "") + call[3], (call[4] or "") + call[5]
            yield f"| `{call[1]}`: {takes} → {gives} | {said} |"
        elif field := re.match(r"((?:optional |repeated )?[\w.]+) (\w+) = (\d+);", line):
            yield f"| {field[3]} `{field[2]}`: {field[1]} | {said} |"
        elif line == "}" and not raw.startswith(" "):
            yield ""


# -- Python ----------------------------------------------------------------------------------------


def python() -> str:
    """Return the public names of the Python interface with their documentation."""

    def lines() -> Iterator[str]:
        for name in PUBLIC:
            module = importlib.import_module(name)
            yield from [f"## {name}", "", _sentence(module), ""]
            for each in _names(module):
                yield from _member(each, getattr(module, each))

    return page("Python", lines())


def _names(module: types.ModuleType) -> list[str]:
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    return [
        name
        for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", "") == module.__name__
    ]


def _member(name: str, thing: Any) -> Iterator[str]:
    yield from [f"### {name}", ""]
    if callable(thing):
        yield from ["```python", f"{name}{_signature(thing)}", "```", ""]
    yield from [_sentence(thing), ""]
    if inspect.isclass(thing):
        for method, function in vars(thing).items():
            if not method.startswith("_") and inspect.isfunction(function):
                yield from [f"- `{method}{_signature(function)}`: {_cell(_sentence(function))}"]
        yield ""


def _signature(thing: Any) -> str:
    try:
        text = str(inspect.signature(thing))
    except ValueError:
        return "(…)"
    return re.sub(r"(?:[a-z_]+\.)+([A-Z]\w*)", r"\1", text)


PAGES: Final[dict[str, Callable[[], str]]] = {
    "commands": commands,
    "run-file": run_file,
    "protocol": protocol,
    "python": python,
}


def main() -> None:
    """Write the pages."""
    folder = ROOT / "docs" / "reference"
    folder.mkdir(exist_ok=True)
    for name, made in PAGES.items():
        (folder / f"{name}.md").write_text(made(), encoding="utf-8")


if __name__ == "__main__":
    main()
