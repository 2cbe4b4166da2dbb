"""Logs of a process: lines for people, or one JSON object a line for machines."""

import json
import logging
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

import typer


class LogFormat(StrEnum):
    """How lines are written."""

    TEXT = "text"
    JSON = "json"


LogFormatFlag = Annotated[
    LogFormat, typer.Option("--log-format", help="Lines for people, or a JSON object each.")
]


class JsonFormatter(logging.Formatter):
    """One object a record: time (UTC), level, logger and message, and where an error was."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        content: dict[str, Any] = {
            "time": stamp(record.created),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        if record.exc_info:
            content["error"] = self.formatException(record.exc_info)
        return json.dumps(content, ensure_ascii=False)


def stamp(seconds: float) -> str:
    """Return seconds since the epoch in ISO 8601, to the millisecond.

    >>> stamp(1.5)
    '1970-01-01T00:00:01.500Z'
    """
    text = datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")
    return text.replace("+00:00", "Z")


def configure(log_format: LogFormat) -> None:
    """Have this process write what it logs to standard error, from now on."""
    handler = logging.StreamHandler()
    if log_format is LogFormat.JSON:
        handler.setFormatter(JsonFormatter())
    else:
        line = "%(asctime)s %(levelname)s %(message)s"
        handler.setFormatter(logging.Formatter(line, datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
