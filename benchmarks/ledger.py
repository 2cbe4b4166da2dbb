"""What signing a ledger costs: time an entry, bytes on the disk and bytes to a worker.

Claims: signing every entry adds less than 0.1 ms to making it durable, whatever the disk takes for
that, and a worker's checks add less than 16 bytes a round, so that a round's messages keep their
bounds (tests/end_to_end/test_bytes.py).

Times are medians over entries, `append_*` of wall-clock time with the file's fsync (a commit of 8
codes), the others of processor time. `check_bytes_a_round` are a worker's requests and answers,
spread over the rounds between two checks.

    python -m benchmarks.ledger --json > benchmarks/results/ledger.json

About half a minute.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from experiments.provenance import provenance

from lorand import heads, merkle
from lorand.heads import Head, Signature
from lorand.merkle import Frontier, Tree
from lorand.privacy.primitives import IdentityKey
from lorand.v1 import ledger_pb2 as pb
from lorand_coordinator.store import SqliteStore
from lorand_worker.session import CHECK_EVERY

ENTRIES: Final = 400
SIZES: Final = (100, 10_000, 1_000_000)
RUN: Final = bytes(32)
KEY: Final = IdentityKey(bytes(range(32)))


def commit(number: int) -> pb.Entry:
    """A commit of eight codes by three workers."""
    done = pb.Commit(
        scale=number, codes=bytes(8), workers=[1, 2, 3], contributions_digest=bytes(32)
    )
    return pb.Entry(round_index=number, commit=done)


def micros(call: Callable[[], object], clock: Callable[[], float], turns: int) -> list[float]:
    """Microseconds of each of so many calls."""
    taken = []
    for _ in range(turns):
        began = clock()
        call()
        taken.append((clock() - began) * 1e6)
    return taken


def appends(folder: Path) -> dict[str, Any]:
    """Medians of appending with and without a signer, taken in turns; and the files' sizes."""
    unsigned, signed = (SqliteStore(folder / name) for name in ("unsigned", "signed"))
    signed.signer = heads.signer(KEY, RUN)
    times: dict[str, list[float]] = {"append_unsigned_us": [], "append_signed_us": []}
    with closing(unsigned), closing(signed):
        for number in range(ENTRIES):
            for name, store in zip(times, (unsigned, signed), strict=True):
                entry = commit(number)
                times[name] += micros(lambda: store.append(entry), time.perf_counter, 1)  # noqa: B023
        for store in (unsigned, signed):
            store._database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    bytes_an_entry = {
        f"{name}_bytes_an_entry": round((folder / name).stat().st_size / ENTRIES)
        for name in ("unsigned", "signed")
    }
    return {name: round(statistics.median(t), 1) for name, t in times.items()} | bytes_an_entry


def primitives() -> dict[str, float]:
    """Medians of what is done for an entry, without a disk."""
    head, frontier = Head(1, bytes(32), bytes(32)), Frontier()
    for number in range(999):
        frontier = frontier.add(merkle.leaf_hash(b"%d" % number))
    signature: Signature = heads.sign(KEY, RUN, head)
    calls: dict[str, Callable[[], object]] = {
        "sign_us": lambda: heads.sign(KEY, RUN, head),
        "verify_us": lambda: signature.is_of(RUN, head),
        "leaf_and_root_us": lambda: frontier.add(merkle.leaf_hash(bytes(80))).root(),
    }
    return {
        name: round(statistics.median(micros(call, time.thread_time, 2000)), 2)
        for name, call in calls.items()
    }


def checks() -> list[dict[str, Any]]:
    """By the length of the history: making and checking a proof, and the bytes of a check."""
    tree, rows = Tree(), []
    for size in SIZES:
        while len(tree) < size:
            tree.add(merkle.leaf_hash(len(tree).to_bytes(8, "little")))
        known = size - CHECK_EVERY
        proof = tree.consistency(known, size)
        roots = tree.root(known), tree.root(size)
        assert merkle.extends(known, roots[0], size, roots[1], proof)
        signed = pb.SignedHead(
            size=size, root=bytes(32), digest=bytes(32), key=bytes(32), signature=bytes(64)
        )
        request = pb.GetHeadRequest(size=size, known_size=known)
        answer = pb.GetHeadResponse(head=signed, consistency=proof)
        total = request.ByteSize() + answer.ByteSize()
        make = micros(lambda: tree.consistency(known, size), time.thread_time, 200)  # noqa: B023
        check = micros(
            lambda: merkle.extends(known, roots[0], size, roots[1], proof),  # noqa: B023
            time.thread_time,
            200,
        )
        rows.append(
            {
                "entries": size,
                "proof_hashes": len(proof),
                "make_proof_us": round(statistics.median(make), 1),
                "check_proof_us": round(statistics.median(check), 1),
                "check_bytes": total,
                "check_bytes_a_round": round(total / CHECK_EVERY, 1),
            }
        )
    return rows


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object on one line")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        durable = appends(Path(folder))
    result = {
        "an_entry": primitives() | durable,
        "a_check": checks(),
        "check_every": CHECK_EVERY,
        "entries_appended": ENTRIES,
        "provenance": provenance() | {"cryptography": version("cryptography")},
    }
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
