"""What may be asked of OpenTelemetry, and what is sent of it, without its libraries.

Nothing is sent unless a flag says where to. `otlp` is what then sends it.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from importlib import util
from typing import Annotated, Final, Literal
from urllib.parse import urlsplit

import typer

from lorand.errors import ConfigError

FROM_ENVIRONMENT: Final = "env"
ENDPOINT: Final = "OTEL_EXPORTER_OTLP_ENDPOINT"
PROTOCOL: Final = "OTEL_EXPORTER_OTLP_PROTOCOL"
LIBRARIES: Final = {
    "opentelemetry.sdk": "opentelemetry-sdk",
    "opentelemetry.exporter.otlp.proto.http": "opentelemetry-exporter-otlp-proto-http",
}
"""Modules that it takes, and what pip calls them."""

OTel = Annotated[
    str,
    typer.Option(
        "--otel",
        metavar="URL|env",
        help="Send OpenTelemetry traces and metrics by OTLP/HTTP to this collector, say "
        f"http://127.0.0.1:4318; env: to that of {ENDPOINT}.",
    ),
]

Attributes = Mapping[str, str | int | float | bool]


@dataclass(frozen=True)
class RoundId:
    """What the span of a round is known by, at the coordinator and at every worker."""

    trace: int
    span: int

    @staticmethod
    def of(run_digest: bytes, round_index: int) -> "RoundId":
        """Return that of a run's round: both sides calculate it, so that no message carries it.

        >>> RoundId.of(b"run", 1) == RoundId.of(b"run", 1) != RoundId.of(b"run", 2)
        True
        """
        digest = sha256(b"round's trace" + run_digest + round_index.to_bytes(8, "little")).digest()
        # Zero is no id.
        return RoundId(int.from_bytes(digest[:16]) or 1, int.from_bytes(digest[16:24]) or 1)


@dataclass(frozen=True)
class Meter:
    """One figure of a run as it is now."""

    name: str
    about: str
    value: float
    kind: Literal["counter", "gauge"] = "gauge"
    unit: Literal["", "bytes", "seconds", "ratio"] = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    """Tell it from others of the name."""


@dataclass(frozen=True)
class Durations:
    """A histogram of seconds: its name, and where its buckets end."""

    name: str
    about: str
    buckets: tuple[float, ...]


def check(asked: str) -> None:
    """Raise ConfigError for what --otel cannot mean, before anything is started."""
    if not asked:
        return
    url = asked
    if asked == FROM_ENVIRONMENT:
        url = os.environ.get(ENDPOINT, "")
        if not url:
            raise ConfigError(
                f"--otel env sends to where {ENDPOINT} says, which is not set: set it, or give the "
                "collector's URL to --otel"
            )
    if os.environ.get(PROTOCOL, "http/protobuf") != "http/protobuf":
        raise ConfigError(
            f"{PROTOCOL} is {os.environ[PROTOCOL]!r}, and --otel sends http/protobuf alone: unset "
            "it, and give the collector's port for OTLP over HTTP, usually 4318"
        )
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"--otel: {url!r} is no URL of a collector; it is like http://127.0.0.1:4318"
        )
    missing = [package for module, package in LIBRARIES.items() if not _found(module)]
    if missing:
        raise ConfigError(
            f"--otel needs {', '.join(missing)}: pip install 'lorand[otel]', or leave --otel away"
        )


def _found(module: str) -> bool:
    try:
        return util.find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it is a part of
        return False
