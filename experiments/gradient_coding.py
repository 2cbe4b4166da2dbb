"""What share of the data each worker holds and measures, so that stragglers cost nothing.

Where all data is one trust domain's, shards may be replicated: the sum over all of it is then known
although some workers do not answer. Loads and delays of the schemes in Krishnan, Ebrahimi and
Khisti, "Sequential Gradient Coding for Straggler Mitigation", ICLR 2023, for n workers of which
any `stragglers` may be slow, in bursts of at most B rounds out of any window of W.

    python -m experiments.gradient_coding      # writes results/gradient_coding.{json,md}

Nothing is measured; the figures are exact.
"""

import json
from collections.abc import Collection, Iterator
from dataclasses import asdict, dataclass
from itertools import combinations
from typing import Final

from experiments.provenance import ROOT

RESULTS: Final = ROOT / "experiments" / "results"
SETTINGS: Final = ((6, 2, 1, 2), (12, 2, 1, 2), (12, 2, 2, 3), (256, 27, 1, 2))
"""(workers, stragglers, B, W); the last is the paper's."""


@dataclass(frozen=True)
class Scheme:
    """A scheme's load, as a share of all data, and the rounds by which a result is late."""

    name: str
    load: float
    delay: int


def schemes(workers: int, stragglers: int, burst: int, window: int) -> list[Scheme]:
    """Return the schemes for a setting, no code at all before them.

    Raises ValueError where the selectively repeated code does not exist: B divides W - 1.

    >>> [(s.name, round(s.load, 4)) for s in schemes(256, 27, 1, 2)][:2]
    [('uncoded', 0.0039), ('gradient coding', 0.1094)]
    """
    if not 0 <= stragglers < workers or not 0 < burst < window or (window - 1) % burst:
        raise ValueError(
            "give stragglers below workers, and a burst that divides the window less one"
        )
    span = window - 1 + burst
    repeated = -(-burst * stragglers // span)
    held = (stragglers + 1) * span / (burst + (window - 1) * (stragglers + 1))
    return [
        Scheme("uncoded", 1 / workers, 0),
        Scheme("gradient coding", (stragglers + 1) / workers, 0),
        Scheme("selective repetition", (repeated + 1) / workers, burst),
        Scheme("multiplexed", held / workers, window - 2 + burst),
    ]


def repetition_groups(workers: int, stragglers: int) -> list[tuple[int, ...]]:
    """Return the groups of fractional repetition: each holds the same s + 1 shards.

    Tandon et al., "Gradient Coding", ICML 2017, §4: it has gradient coding's load, and a member's
    sum over its shards is used as it is. Raises ValueError where s + 1 does not divide the workers.
    """
    size = stragglers + 1
    if workers % size:
        raise ValueError(f"{workers} workers are no groups of {size}: change one of them")
    return [tuple(range(first, first + size)) for first in range(0, workers, size)]


def recovered(groups: Collection[tuple[int, ...]], slow: Collection[int]) -> bool:
    """Return whether one of each group answers, so that the sum over all shards is known."""
    return all(set(group) - set(slow) for group in groups)


def patterns(workers: int, stragglers: int) -> Iterator[tuple[int, ...]]:
    """Yield who may be slow: every set of so many workers."""
    return combinations(range(workers), stragglers)


def main() -> None:
    """Write the table."""
    rows = [
        {"workers": n, "stragglers": s, "burst": b, "window": w, **asdict(scheme)}
        for n, s, b, w in SETTINGS
        for scheme in schemes(n, s, b, w)
    ]
    (RESULTS / "gradient_coding.json").write_text(json.dumps(rows, indent=1) + "\n")
    lines = ["# gradient_coding", "", (__doc__ or "").split("\n\n    python")[0], ""]
    lines += ["| workers | stragglers | B, W | scheme | load | rounds late |", "|---" * 6 + "|"]
    for row in rows:
        setting = f"{row['workers']} | {row['stragglers']} | {row['burst']}, {row['window']}"
        lines.append(f"| {setting} | {row['name']} | {row['load']:.4f} | {row['delay']} |")
    (RESULTS / "gradient_coding.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
