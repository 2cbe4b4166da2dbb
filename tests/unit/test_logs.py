"""Lines of a log for machines."""

import json
import logging

import pytest

from lorand.logs import JsonFormatter, LogFormat
from lorand_worker.reporting import ConsoleReporter


def record(**changes: object) -> logging.LogRecord:
    made = logging.LogRecord("lorand.coordinator", logging.WARNING, "", 0, "a %s", ("ü",), None)
    made.__dict__.update({"created": 0.25, **changes})
    return made


def test_a_record_is_one_object_on_one_line() -> None:
    line = JsonFormatter().format(record())
    assert json.loads(line) == {
        "time": "1970-01-01T00:00:00.250Z",
        "level": "warning",
        "logger": "lorand.coordinator",
        "message": "a ü",
    }
    assert "\n" not in JsonFormatter().format(record(msg="two\nlines", args=()))


def test_an_error_says_where_it_was() -> None:
    try:
        raise ValueError("odd")
    except ValueError as error:
        content = json.loads(JsonFormatter().format(record(exc_info=(ValueError, error, None))))
    assert "ValueError: odd" in content["error"]


def test_a_workers_lines(capsys: pytest.CaptureFixture[str]) -> None:
    report = ConsoleReporter(quiet=True, log_format=LogFormat.JSON)
    report.note("joined as worker 1")
    for _ in range(2):
        report.progress(8, 8, "loss 0.5000")
    report.close()
    joined, done = map(json.loads, capsys.readouterr().err.splitlines())
    assert joined["message"] == "joined as worker 1"
    assert (done["message"], done["round"], done["rounds"]) == ("round 8 of 8  loss 0.5000", 8, 8)
