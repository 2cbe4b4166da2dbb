"""A million workers under a tree of relays, on paper (pure): relays are not built.

A relay of `fan_out` children stands to them as a coordinator does: it waits for their contributions
and hands down the commit. It sends its parent one contribution, the sum of its children's codes in
32 bits (exact: the sum of 2^23 codes of a byte fits), and how many there were. So the mean of
all is the one that a coordinator alone would have committed, to the bit.

Assumed, and not measured:

- every worker takes part in every round, and no relay fails;
- a level costs its node as much a child and round as the coordinator was measured to spend, and
  levels wait for each other;
- a message takes `hop_s` from one level to the next, each way;
- a commit names the children of one node at most, not all workers as today;
- bytes are those of `lorand.wire_size`, over mutual TLS on Ethernet.

Rules that look at single contributions (median, quarantine) see a relay's children or relays'
sums, never all workers. Workers weigh alike; secure sums are not in it.
"""

from dataclasses import dataclass

from lorand import wire_size
from lorand.config import RunConfig


@dataclass(frozen=True)
class Tree:
    """What a round comes to, in seconds and in bytes on the wire, both ways together."""

    workers: int
    fan_out: int
    levels: int
    """Levels of nodes above the workers; 1: a coordinator alone."""
    relays: int
    seconds: float
    """What nodes and network add to the workers' own measurement."""
    worker_bytes: int
    relay_bytes: int
    """A lowest relay's: with its children, and with its parent."""
    root_bytes: int


def tree(config: RunConfig, workers: int, fan_out: int, *, us_a_child: float, hop_s: float) -> Tree:
    """Return what a round comes to with at most `fan_out` children a node.

    `us_a_child` is the processor time of a node for one child and round, in microseconds.
    """
    assert workers >= 1, "a tree has workers"
    assert fan_out >= 2, "a node has two children or more"
    widths = [workers]
    while widths[-1] > fan_out:
        widths.append(-(-widths[-1] // fan_out))
    levels, top = len(widths), widths[-1]
    busiest = min(workers, fan_out)
    below = _both_ways(config, busiest)
    above = _both_ways(_summed(config), min(top, fan_out))
    children_s = (levels - 1) * busiest * us_a_child / 1e6 + top * us_a_child / 1e6
    return Tree(
        workers=workers,
        fan_out=fan_out,
        levels=levels,
        relays=sum(widths[1:]),
        seconds=children_s + 2 * levels * hop_s,
        worker_bytes=below,
        relay_bytes=busiest * below + above if levels > 1 else 0,
        root_bytes=top * (above if levels > 1 else below),
    )


def _both_ways(config: RunConfig, children: int) -> int:
    size = wire_size.of_round(config, children)
    return size.up.wire + size.down.wire


def _summed(config: RunConfig) -> RunConfig:
    """Return the run with contributions as wide as sums of codes."""
    codec = config.codec.model_copy(update={"up": "int32"})
    return config.model_copy(update={"codec": codec})
