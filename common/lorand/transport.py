"""Channel options and limits that both ends of a gRPC connection share."""

from ipaddress import ip_address
from typing import Final

from lorand.config import RunConfig
from lorand.errors import ConfigError

CHUNK_BYTES: Final = 128 << 10
"""Size of a chunk of a checkpoint, and the target size of a page of entries."""
BASE_MESSAGE_BYTES: Final = 256 << 10
MAX_MESSAGE_BYTES: Final = BASE_MESSAGE_BYTES + (9 << 20)
"""Largest message of any run: K = 2^20 numbers of eight bytes, and a manifest of many names."""
BATCH: Final = "batch"
"""The feature of workers that take several messages at once."""
SEVERAL: Final = "several"
"""The feature of one of several coordinators, which may have slept while another led."""
METADATA_BYTES: Final = 16 << 10
PUSHBACK: Final = "grpc-retry-pushback-ms"
"""With it, RESOURCE_EXHAUSTED means: come back later (gRPC's proposal A6)."""
SPARE_CONNECTIONS: Final = 64
"""For evaluators, observers and operators."""

KEEPALIVE_MS: Final = 60_000
KEEPALIVE_TIMEOUT_MS: Final = 20_000
SERVER_MIN_PING_MS: Final = 30_000
HANDSHAKE_MS: Final = 10_000
IDLE_MS: Final = 1_800_000
"""A connection without a call is closed after so long; a worker may load its model meanwhile."""
STREAMS: Final = 8
"""Calls that a connection may have open."""
WINDOW_BYTES: Final = 64 << 10
"""What a peer may send on a stream before it is read."""


def split(address: str) -> tuple[str, int]:
    """Return host, without brackets, and port of a HOST:PORT. Raises ConfigError.

    >>> split("[::1]:7700")
    ('::1', 7700)
    """
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    bare = host[1:-1] if bracketed else host
    if not bare or (":" in bare) != bracketed or not port.isascii() or not port.isdigit():
        raise ConfigError(f"{address!r} is no HOST:PORT; write, say, 127.0.0.1:7700 or [::1]:7700")
    if int(port) > 65535:
        raise ConfigError(f"{address!r}: a port is at most 65535")
    return bare, int(port)


def join(host: str, port: int) -> str:
    """Return HOST:PORT, an IPv6 address in brackets.

    >>> join("::1", 7700)
    '[::1]:7700'
    """
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Return whether what is sent to a host stays on this machine; names but localhost do not."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def message_limit(config: RunConfig) -> int:
    """Return the largest message a coordinator of this run takes: 256 KiB plus a round's codes."""
    return BASE_MESSAGE_BYTES + (8 if config.privacy.summed else 4) * config.num_directions


def most_connections(config: RunConfig) -> int:
    """Return how many connections a coordinator has at most, and calls: a worker may need two."""
    return 2 * config.service.max_workers + SPARE_CONNECTIONS


def several(addresses: str) -> list[str]:
    """Return the HOST:PORT of a list with commas. Raises ConfigError without one."""
    found = [part.strip() for part in addresses.split(",") if part.strip()]
    if not found:
        raise ConfigError("no coordinator's address was given: HOST:PORT, or several with ,")
    return found


def channel_options() -> list[tuple[str, int]]:
    """Options of a worker's channel.

    Its reconnects are the session's own (full jitter), so gRPC's backoff is kept short, but for the
    smallest, which is gRPC's limit for a handshake.
    """
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", HANDSHAKE_MS),
        ("grpc.max_reconnect_backoff_ms", 3000),
        ("grpc.enable_http_proxy", 0),
    ]


def server_options(config: RunConfig) -> list[tuple[str, int]]:
    """Options of the coordinator's server."""
    return [
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        *bounds(message_limit(config), most_connections(config)),
    ]


def bounds(message_bytes: int, connections: int) -> list[tuple[str, int]]:
    """Options that bound what strangers cost any server. Two processes never share a port.

    Unfinished handshakes end in time, connections above the number are closed at once.
    """
    return [
        ("grpc.max_receive_message_length", message_bytes),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.max_concurrent_streams", STREAMS),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.server_handshake_timeout_ms", HANDSHAKE_MS),
        ("grpc.max_connection_idle_ms", IDLE_MS),
        ("grpc.http2.lookahead_bytes", WINDOW_BYTES),
        ("grpc.http2.bdp_probe", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", SERVER_MIN_PING_MS),
        ("grpc.so_reuseport", 0),
    ]
