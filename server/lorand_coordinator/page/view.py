"""What the page shows, as plain dictionaries made from the hub's state (no server, no network).

A status is small and made a few times a second, whoever and how many watch; workers come in pages,
since there may be thousands.
"""

from dataclasses import dataclass
from typing import Any, Final, Literal

from lorand.config import RunConfig
from lorand_coordinator.hub import Hub
from lorand_coordinator.rounds import State

Shown = Literal["waiting", "running", "failed", "finished", "standing by", "stopping"]
ROWS: Final = 25
"""Workers on a page of the table."""
ORDERS: Final = (
    "worker",
    "name",
    "state",
    "seen_s",
    "answer_s",
    "contributions",
    "rejected",
    "received",
    "sent",
)


@dataclass(frozen=True)
class Spent:
    """What a private run showed so far, at most, of any participant's example."""

    rounds: int
    epsilon: float | None
    """None where it is not known: dp-accounting is missing, or the method counts otherwise."""


def status(hub: Hub, spent: Spent | None = None) -> dict[str, Any]:
    """Return where the run is, without workers and curves."""
    sequencer, config = hub.sequencer, hub.config
    engine, tally = sequencer.engine, sequencer.tally
    signal = sequencer.recent.total.signal_to_noise
    traffic = hub.traffic.values()
    return {
        **_about(config),
        "state": "stopping" if hub.draining else state_of(engine),
        "phase": engine.phase,
        "reason": sequencer.reason or "waiting for the first worker to join",
        "round": engine.round_index,
        "committed": engine.committed,
        "abandoned": engine.abandoned,
        "entries": len(sequencer.store),
        "head": sequencer.store.head().hex(),
        "key": sequencer.key.public.hex() if sequencer.key else None,
        "loss": tally.loss,
        "accuracy": tally.evaluations[-1].accuracy if tally.evaluations else None,
        "signal": list(signal) if signal else None,
        "workers": {
            "connected": len(hub.connections),
            "known": len(tally.accounts),
            "quarantined": len(engine.quarantined),
            "participants": len(engine.participants),
            "answered": len(engine.contributions),
        },
        "bytes": {
            "codes": tally.code_bytes,
            "received": sum(each.received for each in traffic),
            "sent": sum(each.sent for each in traffic),
        },
        "rejected": tally.rejected.total(),
        "findings": [
            {"text": finding.text, "warning": finding.warning} for finding in sequencer.findings()
        ],
        "privacy": privacy(config, spent),
    }


def standing_by(config: RunConfig, reason: str) -> dict[str, Any]:
    """Return the status of a coordinator that leads no run; it knows nothing of its progress."""
    return {**_about(config), "state": "standing by", "phase": "standing by", "reason": reason}


def state_of(engine: State) -> Shown:
    """Return the state that people tell apart at a glance."""
    if engine.phase == "finished":
        return "finished"
    if engine.phase == "committing" and engine.trouble:
        return "failed"
    return "waiting" if engine.phase == "selection" else "running"


def privacy(config: RunConfig, spent: Spent | None) -> dict[str, Any] | None:
    """Return what of a private run's budget is spent; None where there is none."""
    section = config.privacy
    if not section.noised:
        return None
    return {
        "mode": section.mode,
        "target_epsilon": section.target_epsilon,
        "delta": section.delta,
        "releases": config.releases,
        "rounds": 0 if spent is None else spent.rounds,
        "epsilon": None if spent is None else spent.epsilon,
    }


def rounds_released(hub: Hub) -> int:
    """Return how many rounds a participant answered at most: those begun, committed or not."""
    engine = hub.sequencer.engine
    under_way = engine.phase in ("reporting", "committing")
    return min(engine.round_index - 1 + under_way, hub.config.releases)


def evaluations(hub: Hub) -> list[dict[str, Any]]:
    """Return one curve an evaluator, in the order of their first posts."""
    curves: dict[str, dict[str, Any]] = {}
    for each in hub.sequencer.tally.evaluations:
        empty = {"evaluator": each.evaluator, "committed": [], "accuracy": [], "loss": []}
        curve = curves.setdefault(each.evaluator, empty)
        curve["committed"].append(each.committed)
        curve["accuracy"].append(round(each.accuracy, 5))
        curve["loss"].append(round(each.loss, 5))
        curve["examples"] = each.examples
    return list(curves.values())


def workers(
    hub: Hub, page: int = 0, order: str = "worker", *, descending: bool = False
) -> dict[str, Any]:
    """Return a page of the table of workers; a page beyond the last is the last."""
    now = hub.clock()
    numbers = list(hub.sequencer.tally.accounts)
    order = order if order in ORDERS else "worker"
    if order == "worker":
        numbers.sort(reverse=descending)
    else:
        figures = {number: row(hub, number, now)[order] for number in numbers}
        known = [number for number in numbers if figures[number] is not None]
        known.sort(key=figures.__getitem__, reverse=descending)
        # What is unknown comes last both ways.
        numbers = known + [number for number in numbers if figures[number] is None]
    pages = max(1, -(-len(numbers) // ROWS))
    page = min(max(page, 0), pages - 1)
    return {
        "rows": [row(hub, number, now) for number in numbers[page * ROWS : (page + 1) * ROWS]],
        "page": page,
        "pages": pages,
        "known": len(numbers),
    }


def row(hub: Hub, number: int, now: float) -> dict[str, Any]:
    """Return what is known of one worker."""
    account, traffic = hub.sequencer.tally.accounts[number], hub.count(number)
    connection = hub.connections.get(number)
    seen = traffic.last_seen if connection is None else connection.last_seen
    return {
        "worker": number,
        "name": account.name,
        "state": worker_state(hub.sequencer.engine, number, connected=connection is not None),
        "seen_s": None if seen is None else round(now - seen, 1),
        "answer_s": None if traffic.answer_s is None else round(traffic.answer_s, 3),
        "contributions": account.contributions,
        "rejected": account.rejected,
        "received": traffic.received,
        "sent": traffic.sent,
    }


def worker_state(engine: State, worker: int, *, connected: bool) -> str:
    """Return what a worker is doing, in one or two words."""
    if worker in engine.quarantined:
        return "in quarantine"
    if not connected:
        return "away"
    if engine.phase != "reporting" or worker not in engine.participants:
        return "connected"
    if worker in engine.contributions:
        return "answered"
    return "sitting out" if worker in engine.skipped else "measuring"


def _about(config: RunConfig) -> dict[str, Any]:
    return {
        "run": config.run.name,
        "rounds": config.run.rounds,
        "model": config.model.name,
        "estimator": config.estimator.kind,
        "quorum": config.rounds.quorum,
        "telemetry": config.rounds.telemetry != "none",
    }
