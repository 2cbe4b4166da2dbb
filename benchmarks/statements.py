"""What workers' statements cost: bytes a round, and time at the worker, coordinator and auditor.

Claim: with 50 rounds between two, statements add less than 4 bytes a worker and round, whatever the
size of its contributions.

`bytes` are of the request that hands it in, and of the whole answer. `take_ms` is the coordinator's
wall-clock time for a statement, its signature checked and it durable (SQLite's file, with fsync);
`check_us` is the processor's part before it is written. `note_ms` is what a worker waits for its
own disk before it sends a contribution, `state_ms` for signing one that is due. `audit_us` is the
auditor's time for a contribution, beside verifying the ledger. Medians.

    python -m benchmarks.statements --json > benchmarks/results/statements.json

About ten seconds.
"""

import argparse
import json
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from experiments.provenance import provenance

from benchmarks.ledger import commit, micros
from lorand import statements
from lorand.config import RunConfig
from lorand.ledger import Position, origin
from lorand.manifest import Identity, Manifest, TensorSpec
from lorand.privacy.primitives import IdentityKey
from lorand.privacy.roster import Members
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator import stating
from lorand_coordinator.stating import Audit
from lorand_coordinator.store import SqliteStore
from lorand_worker.feedback import Place
from lorand_worker.stating import Statements

EVERY: Final = 50
COUNT: Final = 200
SIZES: Final = (100, 10_000, 1_000_000)
KEY: Final = IdentityKey(bytes(range(32)))
RUN_FILE: Final = """
[run]
name = "bench"
rounds = 1000
[model]
name = "none"
[task]
labels = ["a", "b"]
[estimator]
kind = "spsa"
[optimizer]
learning_rate = 0.01
[rounds]
quorum = 3
"""


def start() -> Position:
    """Where a run begins."""
    manifest = Manifest((TensorSpec("w", (2, 3), "float32"),))
    return origin(RunConfig.parse(RUN_FILE), Identity(bytes(32), bytes(32), manifest))


def statement(worker: int, first: int, last: int, head: bytes) -> pb.Statement:
    """A worker's statement about some entries."""
    made = pb.Statement(
        worker=worker, first=first, last=last, head=head, contributions=statements.NOTHING
    )
    return statements.sign(KEY, start().run_digest, made)


def sizes() -> list[dict[str, Any]]:
    """Bytes of a statement by the length of the history."""
    rows = []
    for entries in SIZES:
        made = statement(1000, entries - EVERY, entries - 1, bytes(32))
        request = pb.PostStatementRequest(statement=made).ByteSize()
        total = request + pb.PostStatementResponse().ByteSize()
        rows.append({"entries": entries, "bytes": total, "bytes_a_round": round(total / EVERY, 1)})
    return rows


def taking(folder: Path) -> dict[str, float]:
    """Times of a coordinator, for statements of several workers."""
    position = start()
    with closing(SqliteStore(folder / "ledger")) as store:
        for number in range(EVERY):
            store.append(commit(number))
        head = store.digest(EVERY - 1)
        made = iter([statement(worker, 0, EVERY - 1, head) for worker in range(1, COUNT + 1)])
        take = micros(lambda: stating.take(next(made), store, position), time.perf_counter, COUNT)
        one = statement(1, 0, EVERY - 1, head)
        check = micros(
            lambda: stating.take(one, store, position), time.thread_time, COUNT
        )  # it is there already: nothing is written
    return {
        "take_ms": round(statistics.median(take) / 1e3, 2),
        "check_us": round(statistics.median(check), 1),
    }


def making(folder: Path) -> dict[str, float]:
    """Times of a worker, that keeps its account in a file."""
    position = start()
    one = Statements(KEY, position.run_digest, Place(folder, bytes(32), "one"), lambda text: None)
    said = pb.Contribution(round_index=1, codes=bytes(8), loss=0.5)
    note = micros(lambda: one.sent(1, said, position), time.perf_counter, COUNT)
    state = []
    for _ in range(COUNT):
        assert one._account is not None
        one._account = replace(one._account, next_sequence=EVERY, count=EVERY)
        state += micros(one.state, time.perf_counter, 1)
        one.posted()
    return {
        "note_ms": round(statistics.median(note) / 1e3, 2),
        "state_ms": round(statistics.median(state) / 1e3, 2),
    }


def auditing() -> dict[str, float]:
    """An auditor's time for each contribution."""
    audit = Audit(Members.of({"one": KEY.public}), [], contributions=True)
    body = statements.stored(1, pb.Contribution(round_index=1, codes=bytes(8), loss=0.5))
    entry, position = commit(1), start()
    taken = micros(lambda: audit.take(entry, [body], position), time.thread_time, 2000)
    return {"audit_us": round(statistics.median(taken), 2)}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object on one line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = taking(Path(folder)) | making(Path(folder)) | auditing()
    result = {
        "every": EVERY,
        "a_statement": sizes(),
        **times,
        "statements_taken": COUNT,
        "provenance": provenance() | {"cryptography": version("cryptography")},
    }
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
