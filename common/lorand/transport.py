"""Channel options and limits that both ends of a gRPC connection share."""

from typing import Final

from lorand.config import RunConfig

CHUNK_BYTES: Final = 128 << 10
"""Size of a chunk of a checkpoint, and the target size of a page of entries."""
BASE_MESSAGE_BYTES: Final = 256 << 10
MAX_MESSAGE_BYTES: Final = BASE_MESSAGE_BYTES + (9 << 20)
"""Largest message of any run: K = 2^20 numbers of eight bytes, and a manifest of many names."""
BATCH: Final = "batch"
"""The feature of workers that take several messages at once."""
METADATA_BYTES: Final = 16 << 10

KEEPALIVE_MS: Final = 60_000
KEEPALIVE_TIMEOUT_MS: Final = 20_000
SERVER_MIN_PING_MS: Final = 30_000


def message_limit(config: RunConfig) -> int:
    """Return the largest message a coordinator of this run takes: 256 KiB plus a round's codes."""
    return BASE_MESSAGE_BYTES + (8 if config.privacy.summed else 4) * config.num_directions


def channel_options() -> list[tuple[str, int]]:
    """Options of a worker's channel.

    Its reconnects are the session's own (full jitter), so gRPC's backoff is kept short.
    """
    return [
        ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.keepalive_permit_without_calls", 0),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.min_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 3000),
        ("grpc.enable_http_proxy", 0),
    ]


def server_options(config: RunConfig) -> list[tuple[str, int]]:
    """Options of the coordinator's server. Two processes never share a port."""
    return [
        ("grpc.max_receive_message_length", message_limit(config)),
        ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
        ("grpc.max_metadata_size", METADATA_BYTES),
        ("grpc.max_concurrent_streams", 8),
        ("grpc.keepalive_time_ms", KEEPALIVE_MS),
        ("grpc.keepalive_timeout_ms", KEEPALIVE_TIMEOUT_MS),
        ("grpc.http2.min_ping_interval_without_data_ms", SERVER_MIN_PING_MS),
        ("grpc.so_reuseport", 0),
    ]
