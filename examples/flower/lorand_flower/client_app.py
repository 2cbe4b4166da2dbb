"""Flower's side of a worker."""

from collections.abc import Callable
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from lorand.durable import state_folder
from lorand.errors import ConfigError, LorandError
from lorand_worker import sources

from .working import Seat

app = ClientApp()
_seats: dict[tuple[int, int], Seat] = {}
"""The last node's that this process answered for: one model in memory."""


def _seat(context: Context) -> Seat:
    key, node = (context.run_id, context.node_id), context.node_config
    if key not in _seats:
        shards = str(context.run_config["shards"]).split(",")
        place = int(node.get("partition-id", len(shards)))
        data = str(node.get("data") or (shards[place : place + 1] or [""])[0])
        if not data:
            raise ConfigError(
                "this node has no data: start it with --node-config 'data=\"/path/reviews.csv\"'"
            )
        model = str(node.get("model") or context.run_config["model"])
        _seats.clear()
        _seats[key] = Seat(
            name=str(node.get("name") or f"node-{context.node_id}"),
            data=sources.parse(data),
            state=Path(str(node.get("state") or state_folder())),
            model=Path(model) if model else None,
        )
    return _seats[key]


def _answered(message: Message, context: Context, answer: Callable[..., bytes]) -> Message:
    """Answer with the entries that this node keeps in Flower's state of it."""
    body, failure = b"", ""
    kept = list(context.state.config_records.get("lorand", {}).get("entries", []))
    try:
        body = answer(_seat(context), message.content["lorand"]["parts"], kept)
        context.state["lorand"] = ConfigRecord({"entries": kept})
    except LorandError as error:
        failure = str(error)
    content = RecordDict({"lorand": ConfigRecord({"body": body, "failure": failure})})
    return Message(content, reply_to=message)


@app.query()
def greet(message: Message, context: Context) -> Message:
    """Say which model and history this node has."""
    return _answered(message, context, lambda seat, parts, kept: seat.greet(parts[0], kept))


@app.train()
def follow(message: Message, context: Context) -> Message:
    """Follow the ledger, and measure what is asked."""
    return _answered(message, context, lambda seat, parts, kept: seat.follow(parts, kept))
