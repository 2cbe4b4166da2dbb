"""Every figure in README and docs/ is found in a result file.

The rule, for each paragraph, list item and row of a table:

- Its **sources** are the files under `results/` that it links to. A row or an item that links to
  none has the links of a row's "same", or of what introduces the table or list: the paragraph
  before it, else the one after.
- Its **figures** are the numbers with a decimal point, a thousands separator or a unit, and beside
  sources those from 100 on; without, seconds and kilobytes are limits and sizes, not figures.
- With sources, each figure has to be there: equal to a number of theirs, rounded as the figure is,
  in the figure's unit. Where a results file has a page (`NAME.md`, written from it), the page
  counts, since a file with ten thousand numbers holds any.
- Without sources there are no figures but those of `SAID`, each with a reason; powers of two are
  settings.

Code, code in a line and links to other hosts are not read. docs/results.md and docs/reference are
written by scripts and compared with them elsewhere.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).resolve().parents[2]
PAGES: Final = sorted(
    str(path.relative_to(ROOT))
    for pattern in ("README.md", "docs/*.md", "docs/how-to/*.md")
    for path in ROOT.glob(pattern)
    if path != ROOT / "docs" / "results.md"
)
UNITS: Final[dict[str, tuple[float, ...]]] = {
    "": (1.0,),
    "%": (1.0, 0.01),
    "KB": (1.0, 1e3, 2.0**10),
    "MB": (1.0, 1e6, 2.0**20),
    "GB": (1.0, 1e3, 1e9, 2.0**30),
    "µs": (1.0, 1e-6),
    "ms": (1.0, 1e-3, 1e3),
    "s": (1.0, 1e3),
    "million": (1e6,),
    "×": (1.0,),
    "times": (1.0,),
}
"""What a figure with a unit may stand for in a file that has another."""
NUMBER: Final = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d*\.\d+|\d+)"
UNIT: Final = rf"\s?({'|'.join(sorted(filter(None, UNITS), key=len, reverse=True))})(?!\w)"
FIGURE: Final = re.compile(
    rf"(?<![\w.,^/-])[+−±-]?({NUMBER})(?![.,]?\d)(?=(?:\s?(?:to|±|–) {NUMBER})*(?:{UNIT})?)"
)
"""A number with the unit that stands behind it, or behind the last of several."""
SAID: Final = {
    "README.md": {
        "3.11": "Python's version",
        ".98": "a target",
        "1,000 times": "a target",
        "20 times": "a target",
    },
    "docs/comparison.md": dict.fromkeys(("1.28", "1.6", "2.2", "2.8"), "others' versions"),
    "docs/methods.md": {"92 %": "an example of what a command prints"},
    "docs/quickstart.md": {"3.11": "Python's version"},
    "docs/security.md": dict.fromkeys(("1.2", "1.3"), "TLS's versions"),
}
"""Figures that nothing measured, by page, and why they stand there."""


@dataclass(frozen=True)
class Figure:
    """A number as it is written, and its unit."""

    text: str
    unit: str

    @property
    def shown(self) -> str:
        return f"{self.text} {self.unit}".strip()

    @property
    def value(self) -> float:
        return float(self.text.replace(",", ""))

    @property
    def step(self) -> float:
        """Half of what its last digit stands for."""
        _, _, decimals = self.text.partition(".")
        return float(0.5 * 10 ** -len(decimals))

    def counts(self, *, measured: bool) -> bool:
        """Whether it is one: beside a result every large number and unit, else what looks so."""
        if measured:
            return bool(set(".,") & set(self.text) or self.unit or self.value >= 100)
        return bool(set(".,") & set(self.text)) or self.unit not in ("", "s", "KB", "times")

    @property
    def is_power_of_two(self) -> bool:
        """Settings are: pools, and the numbers that are trained."""
        return self.value >= 64 and self.value.is_integer() and int(self.value).bit_count() == 1

    def among(self, numbers: frozenset[float]) -> bool:
        return any(
            abs(abs(number) / scale - self.value) <= self.step * (1 + 1e-9)
            for number in numbers
            for scale in UNITS[self.unit]
        )


@dataclass(frozen=True)
class Block:
    """A paragraph, a list item or a row, and the files that its figures come from."""

    text: str
    sources: tuple[Path, ...]

    def figures(self) -> list[Figure]:
        found = (Figure(match[1], match[2] or "") for match in FIGURE.finditer(self.text))
        return [figure for figure in found if figure.counts(measured=bool(self.sources))]


def blocks(page: Path) -> Iterator[Block]:
    """Yield a page's paragraphs, items and rows."""
    text = re.sub(r"^(```|~~~).*?^\1$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    text = re.sub(r"^    .*$|<!--.*?-->", "", text, flags=re.M)
    chunks = [chunk for chunk in re.split(r"\n\s*\n", text) if chunk.strip()]
    said = [sources(page, chunk) for chunk in chunks]
    for at, chunk in enumerate(chunks):
        parts = split(chunk)
        around = said[at - 1] if at else ()
        if not around and at + 1 < len(chunks) and parts[0].startswith("|"):
            around = said[at + 1]
        last: tuple[Path, ...] = ()
        for part in parts:
            own = sources(page, part)
            listed = re.match(r"\||- |\d+\. ", part)
            if not own and re.search(r"\|\s*same[^|]*\|\s*$", part):
                own = last
            if not own and listed:
                own = around
            last = own or last
            yield Block(plain(part), own)


def split(chunk: str) -> list[str]:
    """Return a table's rows, a list's items, or the paragraph."""
    if chunk.startswith("|"):
        return chunk.splitlines()
    return re.split(r"\n(?=(?:-|\d+\.) )", chunk)


def sources(page: Path, text: str) -> tuple[Path, ...]:
    """Return the result files that it links to; a file's page, where it has one."""
    links = re.findall(r"\]\(([^)\s]*results/[\w.]+\.(?:json|md))", text)
    found = [(page.parent / link).resolve() for link in links]
    return tuple(
        path.with_suffix(".md") if path.with_suffix(".md").exists() else path for path in found
    )


def plain(text: str) -> str:
    """Return it without code, targets of links, and what other hosts' links say."""
    text = re.sub(r"`[^`]*`", " ", text)
    text = re.sub(r"\[[^\]]*\]\(https?:[^)]*\)|<[^>]+>|https?:\S+|arXiv \S+", " ", text)
    text = re.sub(r"\]\([^)]*\)", "] ", text)
    return re.sub(r"^\d+\. ", "", text)


@cache
def numbers(path: Path) -> frozenset[float]:
    """Return the numbers of a results file."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".json":
        return frozenset(_numbers(json.loads(text)))
    return frozenset(float(n.replace(",", "")) for n in re.findall(NUMBER, text))


def _numbers(content: Any) -> Iterator[float]:
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list):
        for each in content:
            yield from _numbers(each)
    elif isinstance(content, int | float):
        yield float(content)
    elif isinstance(content, str):
        yield from (float(n.replace(",", "")) for n in re.findall(NUMBER, content))


def unfounded(page: Path, said: frozenset[str] = frozenset()) -> list[str]:
    """Return the figures of a page that no result file holds, and that are not said to be none."""
    found = []
    for block in blocks(page):
        known = frozenset[float]().union(*(numbers(path) for path in block.sources))
        for figure in block.figures():
            if not (figure.is_power_of_two or figure.shown in said or figure.among(known)):
                where = ", ".join(path.name for path in block.sources) or "no result file"
                found.append(f"{figure.shown} is not in {where}: {block.text.strip()[:90]}")
    return found


@pytest.mark.parametrize("page", PAGES)
def test_figures_are_found_in_result_files(page: str) -> None:
    assert unfounded(ROOT / page, frozenset(SAID.get(page, {}))) == []


@pytest.mark.parametrize("page", sorted(SAID))
def test_every_exception_is_one(page: str) -> None:
    shown = {figure.shown for block in blocks(ROOT / page) for figure in block.figures()}
    assert set(SAID[page]) <= shown


RESULTS: Final = ROOT / "experiments" / "results"
PAGE: Final = """# A page

| claim | figure | results |
|---|---|---|
| accuracy | .919 ± .003, 16,384 bytes and 142 MB | [results](first_order.json) |
| its other row | .903 | same |

Measured ([results](run.json)):

- 30 rounds in 40.0 s, `0.123` in code

Nothing is measured here, at K = 4,096 and after 5 s.
"""


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        (".919", ".918"),
        ("142 MB", "143 MB"),
        (".903", ".713"),
        ("16,384", "16,385"),
        ("40.0 s", "41.0 s"),
        ("after 5 s", "after 5.1 s"),
        ("K = 4,096", "K = 4,097"),
        ("(first_order.json)", "(late_join.json)"),
    ],
)
def test_the_check_can_fail(tmp_path: Path, right: str, wrong: str) -> None:
    folder = tmp_path / "results"
    folder.mkdir()
    for name in ("first_order.json", "first_order.md", "late_join.json"):
        (folder / name).write_bytes((RESULTS / name).read_bytes())
    (folder / "run.json").write_text('{"rounds": 30, "seconds": 40.0}')
    text = re.sub(r"\((\w+\.json)\)", r"(results/\1)", PAGE)
    page = tmp_path / "page.md"
    page.write_text(text, encoding="utf-8")
    assert unfounded(page) == []
    changed = wrong.replace("(", "(results/") if right.startswith("(") else wrong
    wanted = right.replace("(", "(results/") if right.startswith("(") else right
    assert wanted in text
    page.write_text(text.replace(wanted, changed), encoding="utf-8")
    assert len(unfounded(page)) >= 1


def test_the_pages_have_figures() -> None:
    counted = [
        figure
        for page in PAGES
        for block in blocks(ROOT / page)
        if block.sources
        for figure in block.figures()
    ]
    assert len(counted) > 150
