"""JSON that others wrote: whatever is wrong with it is one ValueError."""

import json
import math
from typing import Any, NoReturn


def loads(text: str | bytes) -> Any:
    """Return the content of a JSON text. Raises ValueError when it is none.

    Refused are also what `json.loads` takes beyond JSON, NaN and infinities, numbers that would
    become infinite, and nesting beyond Python's stack, for which it raises RecursionError.

    >>> loads('{"a": [1, 2.5]}')
    {'a': [1, 2.5]}
    """
    try:
        return json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:40]} is too large")
    return value
