"""Where a worker's rows come from: a CSV, TSV, JSONL or Parquet file, or a data set of the hub.

`hub:OWNER/NAME`, then `@REVISION`, `:CONFIGURATION` and `:SPLIT` where they are wanted; a split may
be a slice of one, as in `hub:owner/reviews:train[:1000]`.
"""

import csv
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from lorand.errors import ConfigError, DataError
from lorand_worker import hugging_face
from lorand_worker.libraries import optional

HUB: Final = "hub:"
MAX_FILE_BYTES: Final = 2 << 30
SUFFIXES: Final = (".csv", ".tsv", ".jsonl", ".parquet")
_ROWS_AT_ONCE: Final = 1024

Row = Mapping[str, object]


@dataclass(frozen=True)
class HubSet:
    """A data set of the hub; `split` may be left away where there is only one."""

    name: str
    revision: str | None = None
    configuration: str | None = None
    split: str | None = None

    def __str__(self) -> str:
        """Return it as it is written on the command line."""
        revision = f"@{self.revision}" * (self.revision is not None)
        parts = (f":{part}" for part in (self.configuration, self.split) if part is not None)
        return f"{HUB}{self.name}{revision}{''.join(parts)}"


Source = Path | HubSet


@dataclass(frozen=True)
class Table:
    """Rows, each with where it stands ("line 3"), and the names of labels that are numbers."""

    rows: Iterator[tuple[str, Row]]
    class_names: Mapping[str, Sequence[str]] = field(default_factory=dict)


def parse(text: str) -> Source:
    """Return what `--data` names. Raises ConfigError.

    >>> parse("hub:owner/reviews:plain:train[:1000]")
    HubSet(name='owner/reviews', revision=None, configuration='plain', split='train[:1000]')
    """
    if not text.startswith(HUB):
        return Path(text)
    # A slice has colons of its own, inside of brackets.
    place, *parts = re.split(r":(?![^\[]*\])", text.removeprefix(HUB))
    name, _, revision = place.partition("@")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or len(parts) > 2 or "" in parts:
        raise ConfigError(
            f"{text!r} is no data set of the hub: write hub:OWNER/NAME, hub:OWNER/NAME:SPLIT or "
            "hub:OWNER/NAME:CONFIGURATION:SPLIT"
        )
    configuration = parts[0] if len(parts) == 2 else None
    return HubSet(name, revision or None, configuration, parts[-1] if parts else None)


def stem(source: Source) -> str:
    """Return a short name of a source."""
    return source.stem if isinstance(source, Path) else source.name.rpartition("/")[2]


def key(source: Source) -> str:
    """Return what is spent when a private run shows something of a source.

    Slices and splits of one data set may share examples: they count as the whole of it.
    """
    return str(source.resolve()) if isinstance(source, Path) else f"{HUB}{source.name}"


def read(source: Source, wanted: Sequence[str] = ()) -> Table:
    """Open a source; rows of some kinds have only the wanted columns, where it has all of them.

    Raises DataError, now or while rows are read, and ModelError without a library it needs.
    """
    if isinstance(source, HubSet):
        return _hub_set(source, wanted)
    suffix = source.suffix.lower()
    if suffix not in SUFFIXES:
        raise DataError(
            f"{source}: the data file must end in {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}; a "
            "data set of the hub is written hub:OWNER/NAME"
        )
    try:
        too_large = source.stat().st_size > MAX_FILE_BYTES
    except OSError as error:
        raise _unreadable(source, error) from error
    if too_large:
        raise _too_large(source)
    return _parquet(source, wanted) if suffix == ".parquet" else Table(_lines(source, suffix))


def _lines(path: Path, suffix: str) -> Iterator[tuple[str, Row]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if suffix == ".jsonl":
                yield from _json_lines(path, file)
                return
            reader = csv.DictReader(file, delimiter="\t" if suffix == ".tsv" else ",", strict=True)
            for row in reader:
                # A short line has no fields at its end, a long one some without a name.
                found = {k: v for k, v in row.items() if k is not None and v is not None}
                yield f"line {reader.line_num}", found
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from error


def _json_lines(path: Path, file: Iterator[str]) -> Iterator[tuple[str, Row]]:
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number}: each line must be one JSON object")
        yield f"line {number}", row


def _parquet(path: Path, wanted: Sequence[str]) -> Table:
    optional("pyarrow", f"{path} is a Parquet file", "data")
    parquet: Any = optional("pyarrow.parquet", f"{path} is a Parquet file", "data")
    try:
        file = parquet.ParquetFile(path)
        groups = range(file.metadata.num_row_groups)
        if sum(file.metadata.row_group(i).total_byte_size for i in groups) > MAX_FILE_BYTES:
            raise _too_large(path)
        schema = file.schema_arrow
        columns = list(wanted) if wanted and set(wanted) <= set(schema.names) else None
        names = _names_in(schema.metadata or {})
    except (OSError, ValueError) as error:  # what is wrong with the content is a ValueError there
        raise _unreadable(path, error) from error
    return Table(_parquet_rows(path, file, columns), names)


def _parquet_rows(path: Path, file: Any, columns: list[str] | None) -> Iterator[tuple[str, Row]]:
    number = 0
    try:
        with file:
            for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _names_in(metadata: Mapping[bytes, bytes]) -> dict[str, tuple[str, ...]]:
    """Names of labels as files of the hub carry them, in the schema's metadata."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {
            column: tuple(map(str, kind["names"]))
            for column, kind in features.items()
            if kind.get("_type") == "ClassLabel"
        }
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _hub_set(source: HubSet, wanted: Sequence[str]) -> Table:
    datasets: Any = optional("datasets", f"{source} is a data set of the hub", "data")
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
    try:
        with hugging_face.cached_where_away(source.name):
            found = datasets.load_dataset(
                source.name, source.configuration, split=source.split, revision=source.revision
            )
    except Exception as error:  # many kinds for one cause: it cannot be read.
        why = hugging_face.trouble(error, source.name, "data set") or (
            f"cannot read the data set {source}: {hugging_face.first_line(error)}; write "
            "hub:OWNER/NAME:SPLIT, or hub:OWNER/NAME:CONFIGURATION:SPLIT where it has several"
        )
        raise DataError(why) from error
    if isinstance(found, dict):
        if len(found) != 1:
            example = "train" if "train" in found else min(found)
            raise DataError(
                f"{source} has several splits ({', '.join(found)}): write {source}:{example}"
            )
        (found,) = found.values()
    names = {
        column: tuple(kind.names)
        for column, kind in found.features.items()
        if isinstance(kind, datasets.ClassLabel)
    }
    if wanted and set(wanted) <= set(found.column_names):
        found = found.select_columns(list(wanted))
    return Table(((f"row {number}", row) for number, row in enumerate(found, start=1)), names)


def _unreadable(path: Path, error: Exception) -> DataError:
    return DataError(f"cannot read the data file {path}: {error}")


def _too_large(path: Path) -> DataError:
    return DataError(f"{path} is larger than 2 GB; give the worker a smaller shard")
