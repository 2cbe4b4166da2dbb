"""The round engine, told as transcripts: commands, what the engine asks for, and its reason.

A line that is neither a comment nor indented is a command; what is indented under it is recorded:
`-> effect` in order, then the reason. After a change that is meant to change them, record them anew
with `pytest tests/transcripts --rewrite` and read the diff.

    run rounds=2 quorum=2 [start_with=N]   settings; deadlines are 10 s, pauses before a retry 5 s;
                                           also all_or_nothing=1, participants=N, deadline_k=N
    join W, leave W                        a worker connects, or its connection ends
    report W round=R payload=TEXT          a contribution
    skip W round=R                         a worker sits the round out
    quarantine W                           the caller wants no more rounds with a worker
    appended, append-failed WHY            the caller's answer to commit, abandon and finish
    tick +S                                S seconds pass
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from lorand_coordinator import rounds

TRANSCRIPTS: Final = sorted(Path(__file__).parent.glob("*.txt"))


@pytest.mark.parametrize("path", TRANSCRIPTS, ids=lambda path: path.stem)
def test_transcript(path: Path, rewrite: bool) -> None:
    written = path.read_text(encoding="utf-8")
    recorded = "".join(line + "\n" for line in record(written))
    if rewrite:
        path.write_text(recorded, encoding="utf-8")
    else:
        assert recorded == written


def record(text: str) -> Iterator[str]:
    """Yield the transcript's own lines, each command followed by what the engine answers now."""
    settings, state, now = rounds.Settings(0, 0, 0, 10.0, 5.0), rounds.State(), 0.0
    for line in text.splitlines():
        if line.startswith(" "):
            continue
        yield line
        if not line or line.startswith("#"):
            continue
        command, *words = line.split()
        if command == "run":
            numbers = {name: int(value) for name, value in pairs(words).items()}
            given: dict[str, Any] = {"start_with": 0, **numbers}
            whole = bool(given.pop("all_or_nothing", 0))
            settings = rounds.Settings(
                **given, deadline_s=10.0, commit_retry_s=5.0, all_or_nothing=whole
            )
            continue
        if command == "tick":
            now += float(words[0])
        state, effects, reason = rounds.step(settings, state, event_of(command, words), now)
        yield from (f"    -> {describe(effect)}" for effect in effects)
        yield f"    {reason}"


def pairs(words: list[str]) -> dict[str, str]:
    return dict(word.split("=") for word in words)


def event_of(command: str, words: list[str]) -> rounds.Event:
    match command, words:
        case "join", [worker]:
            return rounds.Joined(int(worker))
        case "leave", [worker]:
            return rounds.Left(int(worker))
        case "report", [worker, *rest]:
            given = pairs(rest)
            return rounds.Reported(int(worker), int(given["round"]), given["payload"].encode())
        case "skip", [worker, *rest]:
            return rounds.Skipped(int(worker), int(pairs(rest)["round"]), "the loss is nan")
        case "quarantine", [worker]:
            return rounds.Quarantined(frozenset({int(worker)}))
        case "tick", _:
            return rounds.Tick()
        case "appended", []:
            return rounds.Appended()
        case "unsound", why:
            return rounds.Unsound(" ".join(why))
        case "append-failed", why:
            return rounds.AppendFailed(" ".join(why))
    raise AssertionError(f"no such command: {command} {words}")


def describe(effect: rounds.Effect) -> str:
    match effect:
        case rounds.StartRound(round_index, workers):
            return f"start round {round_index} with {', '.join(map(str, workers))}"
        case rounds.Commit(round_index, contributions):
            parts = (f"{worker}={payload.decode()}" for worker, payload in contributions.items())
            return f"commit round {round_index}: {' '.join(parts)}"
        case rounds.Abandon(round_index, why):
            return f"abandon round {round_index}: {why}"
        case rounds.Reject(worker, _, why):
            return f"reject {worker}: {why}"
        case rounds.Finish(committed):
            return f"finish after {committed} rounds"
