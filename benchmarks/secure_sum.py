"""What the secure sum costs a worker and the coordinator, by members n and numbers m a vector.

Claims: with 32 members and a pool of 65,536, masking takes a worker less time than one forward pass
of MiniLM over 16 short texts (33 ms and more, results/forward.json), and 8 bytes a number; agreeing
on keys costs once a run, whatever m is.

`agree_ms` is verifying n signatures and n - 1 exchanges; `mask_ms` is opening an attempt and
masking one vector, its signature included; `coordinator_ms` is verifying and adding n vectors and
taking the sum. Times are processor time of one thread, medians of 7 after a first turn.

    python -m benchmarks.secure_sum --json > benchmarks/results/secure_sum.json

About ten seconds.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any, Final, TypeVar

import numpy as np
from experiments.provenance import provenance

from lorand.privacy.attempts import ATTEMPT_BYTES
from lorand.privacy.secure_sum import (
    IdentityKey,
    Keys,
    MaskedSum,
    Roster,
    SumMember,
    masked_bytes,
)
from lorand.privacy.vectors import IntVector

MEMBERS: Final = (3, 8, 32)
LENGTHS: Final = (1, 64, 4096, 65536)
REPEATS: Final = 7
BOUND: Final = 1 << 40
RUN, STATE = bytes(32), bytes(32)
Result = TypeVar("Result")


def timed(call: Callable[[], Result]) -> tuple[Result, float]:
    """Return a call's result and its milliseconds."""
    began = time.thread_time()
    result = call()
    return result, (time.thread_time() - began) * 1e3


def measure(size: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what agreeing costs among so many, and a row for each length."""
    identities = {f"worker-{number:02}": IdentityKey() for number in range(size)}
    roster = Roster.of({name: key.public for name, key in identities.items()})
    members = [SumMember(key, roster, RUN, bound=BOUND) for key in identities.values()]
    announcements = [member.announcement for member in members]
    turns = [timed(lambda: members[0].agree(announcements))[1] for _ in range(REPEATS + 1)]
    for member in members:
        member.agree(announcements)
    keys = Keys.verified(RUN, roster, announcements)
    agreement = {
        "members": size,
        "agree_ms": round(statistics.median(turns[1:]), 3),
        "sent_bytes": len(announcements[0]),
        "received_bytes": sum(map(len, announcements)),
    }
    turns_each = REPEATS + 1
    rows = [row(keys, members, length, i * turns_each) for i, length in enumerate(LENGTHS)]
    return agreement, rows


def row(keys: Keys, members: list[SumMember], length: int, first: int) -> dict[str, Any]:
    """Medians of rounds from `first` on: one member's mask, and the coordinator's whole part."""
    vector = np.random.default_rng(length).integers(-BOUND, BOUND, length, np.int64)
    turns = [turn(keys, members, vector, first + number) for number in range(REPEATS + 1)]
    masking, summing = zip(*turns[1:], strict=True)
    return {
        "members": len(members),
        "length": length,
        "mask_ms": round(statistics.median(masking), 3),
        "coordinator_ms": round(statistics.median(summing), 3),
        "sent_bytes": masked_bytes(length),
        "received_bytes": ATTEMPT_BYTES,
    }


def turn(
    keys: Keys, members: list[SumMember], vector: IntVector, round_index: int
) -> tuple[float, float]:
    """Return milliseconds of the first member and of the coordinator; the sum is checked."""
    length = len(vector)
    attempt = keys.attempt(
        round_index, 0, keys.roster.names, length=length, bound=BOUND, state_digest=STATE
    )
    request = attempt.to_bytes()

    def masked(member: SumMember) -> bytes:
        one = member.open(request, round_index=round_index, length=length, state_digest=STATE)
        return one.mask(vector)

    def total() -> IntVector:
        masked_sum = MaskedSum(keys.roster, attempt)
        for message in messages:
            masked_sum.add(message)
        return masked_sum.total()

    mine, mask_ms = timed(lambda: masked(members[0]))
    messages = [mine, *map(masked, members[1:])]
    result, sum_ms = timed(total)
    assert np.array_equal(result, len(members) * vector)
    return mask_ms, sum_ms


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="print one object on one line")
    options = parser.parse_args()
    load = os.getloadavg()[0]
    agreements, rounds = zip(*map(measure, MEMBERS), strict=True)
    result = {
        "a_run": list(agreements),
        "a_round": [one for rows in rounds for one in rows],
        "repeats": REPEATS,
        "load_average_at_start": round(load, 1),
        "provenance": provenance() | {"cryptography": version("cryptography")},
    }
    print(json.dumps(result, indent=None if options.json else 1))


if __name__ == "__main__":
    main()
